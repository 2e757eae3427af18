"""One micro-batch: as CUDA graphs or not, dense where all documents are equally long, and without waiting."""

import copy

import pytest
import torch

from openllama.config import ModelConfig
from openllama.data.loader import Batch
from openllama.model import Llama
from openllama.optim import AdamW, decay_groups
from openllama.training import micro_step
from openllama.training.micro_step import GraphedMicroStep, choose_micro_step, model_inputs
from openllama.training.step import accumulate_gradients, train_step

SHAPE = ModelConfig(500, 128, 256, 2, 4, kv_heads=2, tied=True, stable_embedding=True, max_positions=64)


def batch(lengths, seed):
    ids = torch.randint(0, SHAPE.vocab_size, (sum(lengths),), generator=torch.Generator().manual_seed(seed))
    labels = ids.roll(-1)
    labels[torch.tensor(lengths).cumsum(0) - 1] = -100
    positions = torch.cat([torch.arange(n, dtype=torch.int32) for n in lengths])
    borders = torch.tensor([0, *torch.tensor(lengths).cumsum(0)], dtype=torch.int32)
    return Batch(ids, labels, positions, borders, max(lengths), int((labels != -100).sum()))


def steps():
    """Dense and packed micro-batches, mixed, of 128 tokens."""
    dense, packed, other = (64, 64), (20, 44, 64), (50, 10, 4, 60, 4)
    mixed = [[dense, packed], [packed, packed], [dense, dense], [other, dense], [packed, other]]
    for i, group in enumerate([*mixed, *mixed, *mixed]):
        yield [batch(lengths, 10 * i + j) for j, lengths in enumerate(group)]


def trained(model, step):
    optimizer = AdamW(decay_groups(model, 0.1), lr=1.0)
    accumulate_gradients(model)
    results = []
    for batches in steps():
        targets = sum(b.targets for b in batches)
        results.append(train_step(model, optimizer, batches, targets, 1e-3, 1.0, micro_step=step))
    return torch.tensor([(float(r.loss), float(r.grad_norm)) for r in results]), list(model.parameters())


def test_dense_batches_are_seen_on_a_gpu_only():
    device = torch.device("cpu")
    assert "cu_seqlens" in model_inputs(batch((64, 64), 0), device)
    assert micro_step.is_dense(batch((64, 64), 0)) and micro_step.is_dense(batch((64,), 0))
    assert not micro_step.is_dense(batch((64, 63), 0)) and not micro_step.is_dense(batch((20, 64), 0))


def test_packs_are_evened_out_with_empty_pieces():
    inputs = model_inputs(batch((50, 10, 4, 60, 4), 0), torch.device("cpu"))
    evened = micro_step._evened(inputs, SHAPE.max_positions)
    assert evened["cu_seqlens"].tolist() == [0, 50, 60, 64, 124, 128, 128, 128, 128]
    assert evened["max_seqlen"] == 64 and evened["cu_seqlens"].dtype == torch.int32
    model = Llama(SHAPE).initialise(0)
    assert torch.equal(model(**inputs), model(**evened))
    assert (
        micro_step._evened(inputs | {"max_seqlen": 40}, 48)["max_seqlen"] == 48
    )  # not over the tables' rows


def test_who_gets_a_graph():
    model = Llama(SHAPE)
    assert choose_micro_step(model, 128, 64, None, 1) is micro_step.micro_step
    with pytest.raises(
        ValueError, match="cuda_graph: got true with a CPU, takes bfloat16 weights on one GPU"
    ):
        choose_micro_step(model, 128, 64, True, 1)


@pytest.mark.gpu
def test_who_gets_a_graph_on_a_gpu():
    model = Llama(SHAPE).to("cuda", torch.bfloat16)
    assert isinstance(choose_micro_step(model, 128, 64, None, 1), GraphedMicroStep)
    assert choose_micro_step(model, 128, 64, False, 1) is micro_step.micro_step
    assert choose_micro_step(model, 10**8, 64, None, 1) is micro_step.micro_step
    assert choose_micro_step(model, 128, 64, None, 2) is micro_step.micro_step
    for wrong, what in ((model, "2 processes"), (Llama(SHAPE).to("cuda"), "float32 weights")):
        with pytest.raises(ValueError, match=f"got true with {what}"):
            choose_micro_step(wrong, 128, 64, True, 2 if wrong is model else 1)


@pytest.mark.gpu
def test_a_graph_trains_as_single_launches_do():
    model = Llama(SHAPE).initialise(0).to("cuda", torch.bfloat16)
    twin, graphed = copy.deepcopy(model), GraphedMicroStep()
    expected, weights = trained(model, micro_step.micro_step)
    got, others = trained(twin, graphed)
    assert len(graphed._graphs) >= 4, "first and later micro-batches, dense and packed"
    torch.testing.assert_close(got, expected, rtol=2e-3, atol=0)
    for ours, theirs in zip(others, weights):  # in bf16 a few elements end one step further
        assert (ours.float() - theirs.float()).abs().mean() < 1e-4


@pytest.mark.gpu
def test_packs_on_a_gpu_give_the_cpus_gradients():
    model = Llama(SHAPE).initialise(0)
    for lengths in ((64, 64), (50, 10, 4, 60, 4)):
        norms = []
        for device in ("cpu", "cuda"):
            twin = copy.deepcopy(model).to(device)
            accumulate_gradients(twin)
            scale = torch.full((), 1 / 128, device=device)
            micro_step.micro_step(twin, batch(lengths, 1), scale)
            norms.append(torch.stack([p.grad.norm().cpu() for p in twin.parameters()]))
        torch.testing.assert_close(norms[1], norms[0], rtol=1e-3, atol=1e-6)


@pytest.mark.gpu
@pytest.mark.parametrize("graph", (False, True))
def test_nothing_in_a_step_waits_for_the_gpu(graph):
    model = Llama(SHAPE).initialise(0).to("cuda", torch.bfloat16)
    accumulate_gradients(model)
    optimizer = AdamW(decay_groups(model, 0.1), lr=1.0)
    step = GraphedMicroStep() if graph else micro_step.micro_step
    batches = [batch((64, 64), i) for i in range(3)]

    def run():
        train_step(model, optimizer, batches, 384, 1e-3, 1.0, micro_step=step)

    for _ in range(6):  # plans, timings, captures
        run()
    torch.cuda.set_sync_debug_mode("error")
    try:
        run()
    finally:
        torch.cuda.set_sync_debug_mode("default")
