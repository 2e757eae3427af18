"""Documents that can be followed through a loader, and what its batches hold."""

from itertools import islice, pairwise

import numpy as np
import torch

from openllama.data.loader import Batch

PAD = 3


def corpus(documents=60, longest=50, seed=0):
    """Documents whose token ids are all different, so that each token can be followed."""
    lengths = np.random.default_rng(seed).integers(2, longest, documents)
    ends = 10 + np.cumsum(lengths)
    return [list(range(end - n, end)) for n, end in zip(lengths, ends)]


def pieces(batch):
    """(inputs, labels, positions) of each piece of a batch."""
    bounds = batch.cu_seqlens.tolist()
    for a, b in pairwise(bounds):
        yield batch.ids[a:b].tolist(), batch.labels[a:b].tolist(), batch.positions[a:b].tolist()


def labels_of(batches):
    return [label for b in batches for label in b.labels.tolist() if label != -100]


def same(a: Batch, b: Batch):
    tensors = ("ids", "labels", "positions", "cu_seqlens")
    return all(torch.equal(getattr(a, t), getattr(b, t)) for t in tensors) and (a.max_seqlen, a.targets) == (
        b.max_seqlen,
        b.targets,
    )


def epochs(loader, count):
    sizes = [-(-len(loader.order(epoch)) // (loader.world_size * loader.batch)) for epoch in range(count)]
    return [labels_of(islice(loader, size)) for size in sizes]
