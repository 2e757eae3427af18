"""rotary_pack: q and k turned, v beside them, as `rotary` turns them where they lie packed."""

import pytest
import torch

from openllama.ops import rotary, rotary_pack, rotary_tables

from .contract import BF16, F16, F32, F64
from .rule import random

SHAPES = ((12, 4, 4, 64), (5, 6, 2, 128), (7, 3, 1, 10), (1, 1, 1, 2), (0, 2, 1, 8), (33, 32, 8, 128))


def parts(shape, dtype, device, layout="apart"):
    tokens, heads, kv_heads, head_dim = shape
    if layout == "slices":  # of wider rows
        wide = random((tokens, 3 * heads + 2, head_dim), dtype, device, 3)
        return wide[:, :heads], wide[:, heads : heads + kv_heads], wide[:, heads + 1 :][:, :kv_heads]
    made = [
        random((tokens, n, head_dim), dtype, device, i) for i, n in enumerate((heads, kv_heads, kv_heads))
    ]
    if layout == "heads first":
        made = [t.transpose(0, 1).contiguous().transpose(0, 1) for t in made]
    return made


@pytest.mark.parametrize("inverse", (False, True))
@pytest.mark.parametrize("layout", ("apart", "slices", "heads first"))
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", (F32, BF16, F16, F64), ids=str)
@pytest.mark.parametrize("backend", (None, pytest.param("triton", marks=pytest.mark.gpu), "reference"))
def test_equals_rotary_of_the_packed(device, backend, dtype, shape, layout, inverse):
    if backend == "triton" and (device == "cpu" or dtype == F64):
        pytest.skip("the twin runs on GPUs, and takes no fp64")
    q, k, v = parts(shape, dtype, device, layout)
    cos, sin = rotary_tables(shape[3], 40, device=device)
    positions = torch.randint(0, 40, (shape[0],), generator=torch.Generator().manual_seed(0)).to(device)
    before = [t.clone() for t in (q, k, v)]
    got = rotary_pack(q, k, v, cos, sin, positions, inverse=inverse, backend=backend)
    turned = q.shape[1] + k.shape[1]
    expected = rotary(torch.cat([q, k, v], 1), cos, sin, positions, turned, inverse=inverse, backend=backend)
    assert got.is_contiguous() and torch.equal(got[:, turned:], v)
    if backend == "triton":  # whose tiles differ with the number of heads, and with them what is contracted
        torch.testing.assert_close(got, expected, rtol=2 * torch.finfo(dtype).eps, atol=1e-6)
    else:
        assert torch.equal(got, expected)
    assert all(torch.equal(a, b) for a, b in zip(before, (q, k, v)))


def test_turning_back_undoes_a_turn(device):
    q, k, v = parts((9, 4, 2, 32), F64, device)
    cos, sin = rotary_tables(32, 40, device=device)
    positions = torch.arange(9, device=device)
    packed = rotary_pack(q, k, v, cos, sin, positions)
    back = rotary_pack(*packed.split([4, 2, 2], dim=1), cos, sin, positions, inverse=True)
    torch.testing.assert_close(back, torch.cat([q, k, v], 1), rtol=1e-6, atol=1e-6)


def test_part_of_a_head_may_turn(device):
    q, k, v = parts((9, 4, 2, 32), F32, device)
    cos, sin = rotary_tables(16, 40, device=device)
    positions = torch.arange(9, device=device)
    expected = rotary(torch.cat([q, k, v], 1), cos, sin, positions, 6)
    assert torch.equal(rotary_pack(q, k, v, cos, sin, positions), expected)


@pytest.mark.parametrize(
    "change, kind, message",
    [
        ({"k": torch.ones(3, 2, 8)}, ValueError, r"k: got shape \(3, 2, 8\), takes \(4, 2, 8\)"),
        ({"v": torch.ones(4, 2, 8, dtype=BF16)}, TypeError, "v: got torch.bfloat16, takes q's torch.float32"),
        ({"positions": torch.arange(3)}, ValueError, r"positions: got shape \(3,\), takes \(4,\)"),
        ({"positions": 3}, TypeError, "positions: got int, takes a tensor"),
        ({"positions": torch.arange(4) + 30}, RuntimeError, "outside the table's 32 rows"),
    ],
)
def test_bad_arguments_are_named(change, kind, message):
    cos, sin = rotary_tables(8, 32)
    good = {"q": torch.ones(4, 4, 8), "k": torch.ones(4, 2, 8), "v": torch.ones(4, 2, 8)}
    with pytest.raises(kind, match=message):
        rotary_pack(**{**good, "cos": cos, "sin": sin, "positions": torch.arange(4), **change})
