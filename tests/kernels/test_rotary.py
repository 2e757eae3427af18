"""rotary: turns of q and k heads, positions, and the in-place form. test_rotary_tables.py holds the tables."""

import math

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from openllama.kernels.rotary import as_int32
from openllama.ops import rotary, rotary_tables

from .contract import BF16, F16, F32, F64, Contract
from .rule import all_near, ends, near, random, run

TABLE_ROWS = 64


def huggingface(x, cos, sin, positions, rotated):
    """transformers' apply_rotary_pos_emb on q and k, or on the first elements of their heads; the rest beside them."""
    cos, sin = (torch.cat([t, t], -1)[positions.long()][:, None].to(x.dtype) for t in (cos, sin))
    turning = x[:, :rotated, : cos.shape[-1]]
    first, second = turning.chunk(2, dim=-1)
    turned = turning * cos + torch.cat([-second, first], dim=-1) * sin
    heads = torch.cat([turned, x[:, :rotated, cos.shape[-1] :]], dim=2)
    return torch.cat([heads, x[:, rotated:]], dim=1)


def every_two(x):
    """The elements 2i of a head's first half, then the elements 2i + 1: what interleaved pairs are, half-split."""
    return torch.cat([x[..., ::2], x[..., 1::2]], dim=-1)


def interleaved(x, cos, sin, first, rotated):
    """GPT-J's layout, token i at position first + i."""
    dim = 2 * cos.shape[1]
    positions = torch.arange(first, first + len(x), device=x.device)
    split = huggingface(every_two(x[:, :rotated, :dim]), cos, sin, positions, rotated)
    turned = split.unflatten(-1, (2, -1)).transpose(-1, -2).flatten(-2)
    heads = torch.cat([turned, x[:, :rotated, dim:]], dim=2)
    return torch.cat([heads, x[:, rotated:]], dim=1)


class TestRotary(Contract):
    sizes = (
        (3, 2, 8),
        (1, 1, 2),
        (1, 1, 128),
        (5, 0, 4),
        (6, 5, 64),
        (2, 2, 6),
        (12, 8, 122),
    )  # heads, rotated, head_dim
    share = 1.0  # of a head, that turns
    table_rows = TABLE_ROWS
    interleaved = False

    def make(self, rows, size, dtype, device, seed=0):
        heads, rotated, head_dim = size
        cos, sin = rotary_tables(2 * math.ceil(self.share * head_dim / 2), self.table_rows, device=device)
        x = random((rows, heads, head_dim), dtype, device, seed)
        return [x], (cos, sin, self.positions(rows, device, seed), rotated)

    def positions(self, rows, device, seed):
        generator = torch.Generator().manual_seed(seed)
        return torch.randint(TABLE_ROWS, (rows,), generator=generator, dtype=torch.int32).to(device)

    def op(self, x, cos, sin, positions, rotated, backend=None):
        return rotary(x, cos, sin, positions, rotated, interleaved=self.interleaved, backend=backend)

    def eager(self, *arguments):
        return huggingface(*arguments)

    def fuzz_size(self, rng):
        heads = rng.choice((1, 2, 3, 6))
        return heads, rng.randrange(heads + 1), rng.choice((2, 4, 6, 30, 32, 34, 64, 128))

    def raw(self, device, dtype):
        if dtype == F64 or (device == "cpu" and dtype == F16):
            pytest.skip("the raw op has no such kernel")
        (x,), (cos, sin, at, rotated) = self.make(5, (6, 2, 8), dtype, device)
        positions, offset = (at, 0) if isinstance(at, torch.Tensor) else (None, at)
        ops = torch.ops.openllama
        return [
            (op.default, (x[:, 1:4], cos, sin, positions, offset, rotated, self.interleaved, inverse))
            for op in (ops.rotary, ops.rotary_)
            for inverse in (False, True)
        ]


class TestRotaryPartial(TestRotary):
    """The first elements of a head turn, the others pass through."""

    sizes = ((3, 2, 8), (6, 5, 64), (2, 2, 6), (4, 3, 122))
    share = 0.4
    fuzz_cases = 50


class TestRotaryInterleaved(TestRotary):
    """With positions counted from a number on, and heads that turn in part."""

    sizes = ((3, 2, 8), (1, 1, 2), (5, 0, 4), (6, 5, 64), (12, 8, 122))
    share = 0.7
    table_rows = 100
    interleaved = True
    fuzz_cases = 50

    def positions(self, rows, device, seed):
        return 7 + seed % 20

    def eager(self, *arguments):
        return interleaved(*arguments)


def example(dtype=F32, device="cpu", heads=6, rotated=4, head_dim=16):
    (x,), constants = TestRotary().make(9, (heads, rotated, head_dim), dtype, device)
    return x, constants


@pytest.mark.parametrize("dtype", (F32, BF16, F16))
def test_gqa_leaves_v_untouched(device, dtype):
    """q and k heads of a packed QKV turn, v passes through to the bit: values, gradient, in place or not."""
    x, constants = example(dtype, device)
    (out,), (grad,) = run(rotary, [x], constants, douts=[x])
    assert torch.equal(out[:, 4:], x[:, 4:]) and not torch.equal(out[:, :4], x[:, :4])
    assert torch.equal(grad[:, 4:], x[:, 4:])
    written = x.clone()
    assert rotary(written, *constants, inplace=True) is written and torch.equal(written, out)


@pytest.mark.parametrize("first", (0, 1, 55))
def test_a_number_counts_positions_from_it_on(device, first):
    x, (cos, sin, _, rotated) = example(F32, device)
    listed = torch.arange(first, first + 9, device=device)
    expected = run(rotary, [x], (cos, sin, listed, rotated))
    for backend in (None, "reference"):
        counted = run(rotary, [x], (cos, sin, first, rotated), backend=backend)
        all_near(counted[0] + counted[1], expected[0] + expected[1], 0 if backend is None else 2)
    written = x.clone()
    rotary(written, cos, sin, first, rotated, inplace=True)
    assert torch.equal(written, expected[0][0])


def test_tables_of_a_slice_start_where_it_does(device):
    """The tables' rows from n on, and positions from 0, are positions from n on."""
    x, (cos, sin, _, _) = example(F32, device)
    assert torch.equal(rotary(x, cos[5:], sin[5:], 0), rotary(x, cos, sin, 5))


@pytest.mark.parametrize("dtype", (F32, BF16, F64))
def test_interleaved_is_half_split_in_another_order(device, dtype):
    x, constants = example(dtype, device)
    turned = rotary(x, *constants, interleaved=True)
    near(every_two(turned), rotary(every_two(x), *constants), 1)


@pytest.mark.parametrize("interleaved", (False, True))
def test_in_place_keeps_what_does_not_turn(device, interleaved):
    x, (cos, sin, *rest) = example(device=device)
    written = x.clone()
    rotary(written, cos[:, :3], sin[:, :3], *rest, interleaved=interleaved, inplace=True)
    assert torch.equal(written, rotary(x, cos[:, :3], sin[:, :3], *rest, interleaved=interleaved))
    assert torch.equal(written[..., 6:], x[..., 6:]) and torch.equal(written[:, 4:], x[:, 4:])
    assert not torch.equal(written[:, :4, :6], x[:, :4, :6])


def test_gradient_is_the_opposite_turn(device):
    """Turning back what was turned gives the input: backward of the output as its own gradient."""
    x, constants = example(F32, device)
    (out,), _ = run(rotary, [x], constants)
    (back,) = run(rotary, [x], constants, douts=[out])[1]
    near(back, x, 4)


def test_norms_are_kept(device):
    x, constants = example(F32, device)
    near(rotary(x, *constants).norm(dim=-1), x.norm(dim=-1), 4)


def test_only_differences_of_positions_count():
    q, k = random((2, 1, 1, 64), F64, "cpu", 0)
    tables = [t.double().float() for t in rotary_tables(64, 4096)]
    dots = [
        (rotary(q, *tables, torch.tensor([i])) * rotary(k, *tables, torch.tensor([j]))).sum()
        for i, j in ((3, 0), (4003, 4000))
    ]
    assert abs(dots[0] - dots[1]) < 1e-3  # the fp32 angles of position 4000 are good to 2e-4


@pytest.mark.parametrize("reentrant", (False, True))
def test_in_place_under_checkpoint_turns_once(device, reentrant):
    """Backward runs the projection and its in-place turn again; on a fresh product that changes nothing."""
    _, constants = example(device=device)
    weight, x = random((96, 32), F32, device, 1), random((9, 32), F32, device, 2)

    def loss(x, weight, inplace):
        return rotary((x @ weight.T).view(9, 6, 16), *constants, inplace=inplace).square()[:, :, 3].sum()

    def gradients(function):
        leaves = [t.clone().requires_grad_() for t in (x, weight)]
        function(*leaves).backward()
        return [leaf.grad for leaf in leaves]

    plain = gradients(lambda *leaves: loss(*leaves, False))
    for inplace in (False, True):
        again = gradients(
            lambda *leaves, inplace=inplace: checkpoint(loss, *leaves, inplace, use_reentrant=reentrant)
        )
        assert all(torch.equal(a, p) for a, p in zip(again, plain))


def test_in_place_writes_through_a_slice_of_wider_rows(device):
    wide = random((9, 8, 16), F32, device, 0)
    x, constants = wide[:, 1:7], example(device=device)[1]
    expected = rotary(x, *constants)
    before = wide.clone()
    rotary(x, *constants, inplace=True)
    assert torch.equal(wide[:, 1:7], expected)
    assert torch.equal(wide[:, 0], before[:, 0]) and torch.equal(wide[:, 7], before[:, 7])


def test_in_place_refuses_before_it_writes():
    """A leaf, views of one, one of several views (autograd would refuse them too late), and tokens that overlap."""
    x, constants = example()
    leaf = x.clone().requires_grad_()
    parts = (leaf * 1).split([6], dim=1)
    for refused in (leaf, leaf.view(9, 6, 16), parts[0], parts[0][:8], x[:1].expand(9, 6, 16)):
        before = refused.detach().clone()
        positions = constants[2][: len(refused)]
        with pytest.raises(ValueError, match=r"x: got .* when inplace"):
            rotary(refused, *constants[:2], positions, *constants[3:], inplace=True)
        assert torch.equal(refused, before)
    with torch.no_grad():
        rotary(leaf, *constants, inplace=True)
    assert torch.equal(leaf, rotary(x, *constants))


def test_in_place_compiled(device):
    torch._dynamo.reset()
    x, constants = example(device=device)
    for fresh in (lambda x: x * 2, lambda x: (x * 2).view(9, 6, 16), lambda x: torch.cat([x, x], 1)[:, :6]):
        compiled = torch.compile(
            lambda x, fresh=fresh: rotary(fresh(x), *constants, inplace=True),
            fullgraph=True,
            backend="aot_eager",
        )
        for needs in ([True], [False]):
            ours = run(compiled, [x], needs=needs)
            theirs = run(lambda x, fresh=fresh: rotary(fresh(x), *constants), [x], needs=needs)
            all_near(ours[0] + ours[1], theirs[0] + theirs[1], 0)


@pytest.mark.parametrize("dtype", (F32, F64))  # the kernel, and the reference
@pytest.mark.parametrize("position", (TABLE_ROWS, -1, 2**32, -(2**40)))
@pytest.mark.parametrize("inplace", (False, True))
def test_position_outside_the_tables_is_named_and_nothing_written(dtype, position, inplace):
    x, (cos, sin, positions, rotated) = example(dtype)
    positions, before = positions.long(), x.clone()
    positions[5] = position
    named = max(-(2**31), min(position, 2**31 - 1)) if dtype == F32 else position  # the kernel's are int32
    with pytest.raises(RuntimeError, match=rf"positions\[5\] is {named}, outside the table's 64 rows"):
        rotary(x, cos, sin, positions, rotated, inplace=inplace)
    assert torch.equal(x, before)


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ("cuda", "triton"))
@pytest.mark.parametrize("inplace", (False, True))
def test_more_than_2_to_the_31_elements(backend, inplace):
    heads, rotated, head_dim = 48, 40, 128
    tokens = 2**31 // (heads * head_dim) + 2  # 4.3 GB
    if torch.cuda.mem_get_info()[0] < 15 * 2**30:
        pytest.skip("needs 15 GB of free GPU memory")
    x = torch.ones(tokens, heads, head_dim, dtype=BF16, device="cuda")
    x[0], x[-1] = random((2, heads, head_dim), BF16, "cuda", 0)
    cos, sin = rotary_tables(head_dim, 4096, device="cuda")
    positions = torch.arange(tokens, device="cuda").flip(0) % len(cos)  # the first turns too
    expected = rotary(ends(x), cos, sin, ends(positions), rotated, backend="reference")
    out = rotary(x, cos, sin, positions, rotated, inplace=inplace, backend=backend)
    near(ends(out), expected, 1)


X, (COS, SIN, POSITIONS, _) = example()


@pytest.mark.parametrize(
    "arguments, options, error, message",
    [
        ((X[0], COS, SIN, POSITIONS), {}, ValueError, r"x: got shape \(6, 16\)"),
        ((X[..., :15], COS, SIN, POSITIONS), {}, ValueError, r"x: got shape \(9, 6, 15\)"),
        ((X[..., :0], COS, SIN, POSITIONS), {}, ValueError, r"x: got shape \(9, 6, 0\)"),
        ((X, 1, 2, 3), {}, TypeError, "cos: got int, takes a tensor"),
        ((X, COS, SIN, 3.0), {}, TypeError, "positions: got float, takes a tensor"),
        (
            (X, COS, SIN, 56),
            {},
            ValueError,
            "positions: got 56 for 9 tokens, takes .* within the tables' 64 rows",
        ),
        ((X, COS, SIN, -1), {}, ValueError, "positions: got -1 for 9 tokens, takes a number of at least 0"),
        (
            (X[..., :14], COS, SIN, POSITIONS),
            {},
            ValueError,
            r"cos: got shape \(64, 8\), .* from 2 to head_dim=14",
        ),
        ((X, COS[:, :0], SIN[:, :0], POSITIONS), {}, ValueError, r"cos: got shape \(64, 0\)"),
        (
            (X, COS[0], SIN[0], POSITIONS),
            {},
            ValueError,
            r"cos: got shape \(8,\), takes \(positions, rotary_dim / 2\)",
        ),
        ((X, COS[:, :4], SIN, POSITIONS), {}, ValueError, r"sin: got shape \(64, 8\), takes \(64, 4\)"),
        ((X, COS, SIN[:3], POSITIONS), {}, ValueError, r"sin: got shape \(3, 8\), takes \(64, 8\)"),
        (
            (X, COS.bfloat16(), SIN, POSITIONS),
            {},
            TypeError,
            "cos: got torch.bfloat16, takes the tables's torch.float32",
        ),
        ((X, COS, SIN, POSITIONS[:3]), {}, ValueError, r"positions: got shape \(3,\), takes \(9,\)"),
        ((X, COS, SIN, POSITIONS.float()), {}, TypeError, "positions: got torch.float32"),
        ((X, COS, SIN, POSITIONS, 7), {}, ValueError, "rotated: got 7, takes 0 to x's 6 heads"),
        ((X, COS, SIN, POSITIONS, 1.0), {}, ValueError, "rotated: got 1.0"),
        ((X, COS, SIN, POSITIONS, -1), {}, ValueError, "rotated: got -1"),
        ((X[..., ::2], COS[:, :4], SIN[:, :4], POSITIONS), {"inplace": True}, ValueError, "x: got strides"),
    ],
)
def test_bad_input_is_named(arguments, options, error, message):
    with pytest.raises(error, match=message):
        rotary(*arguments, **options)


def test_a_position_of_64_bits_does_not_become_one_of_32():
    """The kernels take 32: what lies outside all tables must stay there."""
    assert as_int32(torch.tensor([3, 2**32, -(2**40)])).tolist() == [3, 2**31 - 1, -(2**31)]
