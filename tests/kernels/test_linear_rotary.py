"""linear_rotary: against float64, on what tiles and rows of odd sizes leave over."""

import pytest
import torch

from openllama.ops import linear_rotary, rotary, rotary_tables

from .contract import BF16, F32, F64, PRODUCTS, on_hopper
from .rule import laid_out, random

# tokens, hidden, head_dim, (heads of q, k, v)
SHAPES = (
    (1, 16, 64, (2, 2, 2)),
    (127, 64, 128, (1, 1, 1)),
    (129, 72, 64, (4, 2, 2)),
    (257, 192, 128, (4, 1, 1)),
    (700, 784, 64, (12, 12, 12)),
    (3000, 256, 128, (8, 2, 2)),
)


class Inputs:
    def __init__(self, tokens, hidden, head_dim, heads, dtype=BF16, device="cuda", seed=0):
        self.head_dim, self.rotated = head_dim, heads[0] + heads[1]
        self.x = random((tokens, hidden), dtype, device, seed)
        self.weights = [
            random((n * head_dim, hidden), dtype, device, seed + 1 + i, hidden**-0.5)
            for i, n in enumerate(heads)
        ]
        self.cos, self.sin = rotary_tables(head_dim, 4096, device=device)
        generator = torch.Generator().manual_seed(seed)
        self.positions = torch.randint(4096, (tokens,), generator=generator, dtype=torch.int32).to(device)

    def run(self, **changes):
        given = {"x": self.x, "weights": self.weights, "cos": self.cos, "sin": self.sin, "positions": self.positions,
                 "head_dim": self.head_dim, "rotated": self.rotated} | changes  # fmt: skip
        return linear_rotary(**given)

    def exact(self):
        """In float64, of products rounded once."""
        weight = torch.cat(self.weights)
        qkv = (self.x.double() @ weight.double().t()).to(self.x.dtype).double()
        heads = qkv.view(len(self.x), -1, self.head_dim)
        return rotary(heads, self.cos, self.sin, self.positions, self.rotated, backend="reference")


def close(ours, exact):
    """To two roundings of the pair that turns."""
    eps = 1e-12 if ours.dtype == F64 else torch.finfo(ours.dtype).eps
    half = exact.shape[-1] // 2
    pair = exact.unflatten(-1, (2, half)).norm(dim=-2).repeat(1, 1, 2)
    fp32 = 0 if ours.dtype == F64 else 1e-5
    assert ours.isfinite().all()
    assert ((ours.double() - exact).abs() <= 2 * eps * pair + max(fp32, 1e-11) * exact.abs().max()).all()


@pytest.mark.parametrize("packed", (True, False), ids=("packed", "apart"))
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("where, dtype, backend", PRODUCTS)
def test_against_float64(where, dtype, backend, shape, packed):
    inputs = Inputs(*shape, dtype=dtype, device=where)
    weights = [torch.cat(inputs.weights)] if packed else inputs.weights
    out = inputs.run(weights=weights, backend=backend)
    assert out.shape == (shape[0], sum(shape[3]), shape[2]) and out.is_contiguous()
    close(out, inputs.exact())


@pytest.mark.parametrize("rotated", (0, 1, 6))
def test_only_the_first_heads_turn(device, rotated):
    dtype = BF16 if device == "cuda" else F32
    inputs = Inputs(1100, 64, 64, (2, 2, 2), dtype, device)
    inputs.rotated = rotated
    close(inputs.run(), inputs.exact())


@pytest.mark.parametrize("head_dim, rotary_dim", ((64, 32), (96, 96), (32, 32)))
def test_what_the_kernel_does_not_take_is_made_in_turn(device, head_dim, rotary_dim):
    dtype = BF16 if device == "cuda" else F32
    inputs = Inputs(1100, 64, head_dim, (4, 4, 4), dtype, device)
    inputs.cos, inputs.sin = rotary_tables(rotary_dim, 4096, device=device)
    weight = torch.cat(inputs.weights)
    qkv = (inputs.x.double() @ weight.double().t()).to(dtype).view(1100, 12, head_dim)
    theirs = rotary(qkv, inputs.cos, inputs.sin, inputs.positions, 8)
    torch.testing.assert_close(inputs.run(), theirs, rtol=2e-2, atol=2e-2 if dtype == BF16 else 1e-4)


@on_hopper
@pytest.mark.parametrize(
    "layout", ("slice", "inner slice", "misaligned", "every other", "transposed", "expanded")
)
def test_layouts(layout):
    inputs = Inputs(1200, 128, 64, (4, 2, 2))
    ours = inputs.run(x=laid_out(inputs.x, layout), weights=[laid_out(w, layout) for w in inputs.weights])
    inputs.x, inputs.weights = (
        laid_out(inputs.x, layout).contiguous(),
        [laid_out(w, layout).contiguous() for w in inputs.weights],
    )
    close(ours, inputs.exact())


@on_hopper
def test_nan_stays_in_its_token():
    inputs = Inputs(1100, 128, 128, (4, 2, 2))
    inputs.x[300, 5] = float("nan")
    out = inputs.run(backend="cuda")
    assert out[300].isnan().all() and out.isnan().sum() == out[300].numel()


@on_hopper
def test_runs_are_bitwise_equal():
    inputs = Inputs(2500, 512, 64, (8, 4, 4))
    runs = [inputs.run(backend="cuda") for _ in range(20)]
    assert all(torch.equal(run, runs[0]) for run in runs)


@on_hopper
def test_positions_of_64_bits():
    inputs = Inputs(1100, 64, 64, (2, 2, 2))
    assert torch.equal(
        inputs.run(positions=inputs.positions.long(), backend="cuda"), inputs.run(backend="cuda")
    )


def test_no_tokens(device):
    inputs = Inputs(0, 64, 64, (2, 2, 2), F32, device)
    assert inputs.run().shape == (0, 6, 64)


@pytest.mark.parametrize(
    "change, error, message",
    [
        ({"x": torch.ones(8)}, ValueError, r"x: got shape \(8,\), takes \(tokens, hidden\)"),
        ({"weights": []}, ValueError, r"weights: got shapes \[\], takes some of \(n, 16\)"),
        ({"weights": [torch.ones(64, 15)]}, ValueError, r"weights: got shapes \[\(64, 15\)\]"),
        ({"weights": [torch.ones(64, 16).double()]}, TypeError, r"weights\[0\]: got torch.float64"),
        ({"head_dim": 50}, ValueError, "head_dim: got 50, takes a divisor of the weights' 384 rows"),
        ({"rotated": 7}, ValueError, "rotated: got 7, takes 0 to 6 heads"),
        ({"cos": torch.ones(4096, 32, dtype=F64)}, TypeError, r"cos: got torch\.float64, takes the tables"),
        ({"positions": torch.zeros(4).int()}, ValueError, r"positions: got shape \(4,\), takes \(3,\)"),
        ({"positions": torch.full((3,), 4096)}, RuntimeError, "4096, outside the table's"),
        ({"backend": "cuda"}, ValueError, "linear_rotary can't run on 'cuda' here"),
        ({"backend": "cpu"}, ValueError, "linear_rotary has no cpu kernel"),
    ],
)  # fmt: skip
def test_bad_arguments_are_named(change, error, message):
    with pytest.raises(error, match=message):
        Inputs(3, 16, 64, (2, 2, 2), F32, "cpu").run(**change)


@on_hopper
def test_a_forced_kernel_says_what_it_takes():
    with pytest.raises(ValueError, match=r"can't run on 'cuda' here: weights of \[192, 64, 64\] rows"):
        Inputs(200, 64, 64, (3, 1, 1)).run(backend="cuda")
    with pytest.raises(ValueError, match="head_dim 32 with rotary_dim 32; it takes 64 or 128"):
        Inputs(200, 64, 32, (4, 4, 4)).run(backend="cuda")
