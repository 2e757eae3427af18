"""The QKV projection with rotary, at the shapes of the presets; `ours:reference` is product and rotary in turn."""

from functools import partial

import pytest
import torch

from benchmarks.ops.timing import DEVICE, Step, random
from benchmarks.peers import eager
from openllama.ops import linear_rotary, rotary_tables


def ours(tensors, head_dim, rotated, backend) -> Step:
    x, weight, cos, sin, positions = tensors
    return partial(linear_rotary, x, [weight], cos, sin, positions, head_dim, rotated, backend=backend)


@pytest.mark.gpu
@pytest.mark.parametrize(
    "tokens, seq, hidden, heads, kv_heads, head_dim",
    (
        (2048, 1024, 4096, 32, 32, 128),
        (8192, 1024, 4096, 32, 32, 128),
        (8192, 8192, 4096, 32, 8, 128),
        (16_384, 2048, 2048, 32, 8, 64),
        (65_536, 1024, 768, 12, 12, 64),
    ),
)
def test_linear_rotary(race, tokens, seq, hidden, heads, kv_heads, head_dim):
    columns = (heads + 2 * kv_heads) * head_dim
    x, weight = random(tokens, hidden), random(columns, hidden) * hidden**-0.5
    cos, sin = rotary_tables(head_dim, seq, device=DEVICE)
    positions = torch.arange(tokens, dtype=torch.int32, device=DEVICE) % seq
    tensors, rotated = (x, weight, cos, sin, positions), heads + kv_heads
    theirs = partial(eager.linear_rotary, head_dim=head_dim, rotated=rotated)
    turns = [torch.cat([t, t], -1)[positions.long(), None].to(x.dtype) for t in (cos, sin)]
    builders = {
        **{f"ours:{b}": partial(ours, tensors, head_dim, rotated, b) for b in ("cuda", "reference")},
        "eager": partial(eager.forward, theirs, x, weight, *turns),
        "compile": partial(eager.forward_compiled, theirs, x, weight, *turns),
    }
    shape = {"tokens": tokens, "hidden": hidden, "heads": heads, "kv_heads": kv_heads, "head_dim": head_dim}
    race("linear_rotary", shape, builders, flops=2 * tokens * hidden * columns)
