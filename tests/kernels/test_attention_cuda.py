"""attention's kernels on Hopper: both passes against float64, what comes here, and errors.

test_attention_cuda_memory.py has strides, autograd and streams; test_attention.py the rest, on both devices; test_backend.py which calls come here.
"""

import functools
import math
import random as python_random

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from openllama.ops import attention

from .contract import BF16, F16, F32, ON_HOPPER
from .rule import LAYOUTS, all_near, assert_error_rule, laid_out, near, random, run
from .test_rms_norm import Calls

pytestmark = list(ON_HOPPER)

WIDTHS = pytest.mark.parametrize("width", (64, 128))
NAN = float("nan")
NO_ANGLES = [None] * 3  # cos, sin, positions
ours = functools.partial(attention, backend="cuda")


def op(q, k, v, causal=True, scale=None):
    return ours(q, k, v, causal=causal, scale=scale)


def sdpa(q, k, v, causal=True, scale=None):
    """PyTorch's own kernel for the dtype, of copies: it reads what does not lie on 16 bytes all the same, and crashes."""
    grouped = q.shape[2] != k.shape[2]
    q, k, v = (t.clone(memory_format=torch.contiguous_format).transpose(1, 2) for t in (q, k, v))
    with sdpa_kernel([SDPBackend.FLASH_ATTENTION, SDPBackend.MATH]):
        out = F.scaled_dot_product_attention(q, k, v, is_causal=causal, scale=scale, enable_gqa=grouped)
    return out.transpose(1, 2)


def exact(q, k, v, causal, scale):
    """out and lse in float64, of any two lengths: the last query is aligned with the last key."""
    q, k, v = (t.double().transpose(1, 2) for t in (q, k, v))
    k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], dim=1) for t in (k, v))
    scores = q @ k.transpose(-1, -2) * scale
    if causal:
        seen = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device)
        scores = scores.masked_fill(~seen.tril(k.shape[2] - q.shape[2]), -math.inf)
    lse = scores.logsumexp(-1)
    probabilities = (scores - lse[..., None]).exp().masked_fill(lse[..., None] == -math.inf, 0)
    return (probabilities @ v).transpose(1, 2), lse


def make(batch, seq, heads, kv_heads, width=128, dtype=BF16, seed=0, device="cuda"):
    """q, k and v as slices of one packed QKV."""
    parts = [heads, kv_heads, kv_heads]
    return list(random((batch, seq, sum(parts), width), dtype, device, seed).split(parts, dim=2))


def raw_forward(q, k, v, scale=None, causal=True):
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    return torch.ops.openllama.attention_fwd(q, k, v, scale, causal)


def raw_backward(dout, q, k, v, out, lse, scale=None, causal=True, grads=None):
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    grads = [torch.full_like(t, NAN) for t in (q, k, v)] if grads is None else grads
    torch.ops.openllama.attention_bwd(dout, q, k, v, out, lse, *grads, scale, causal, *NO_ANGLES)
    return grads


def raw(tensors, dout, scale=None, causal=True):
    """[out, lse, dq, dk, dv]."""
    out, lse = raw_forward(*tensors, scale, causal)
    return [out, lse, *raw_backward(dout, *tensors, out, lse, scale, causal)]


# ---------------------------------------------------------------- values


@pytest.mark.parametrize("dtype", (BF16, F16), ids=str)
@pytest.mark.parametrize("causal", (True, False))
@pytest.mark.parametrize("shape", ((1, 1, 1), (3, 4, 2), (1, 8, 1), (3, 3, 3)), ids=str)
@pytest.mark.parametrize("seq", (1, 63, 64, 65, 127, 128, 129, 192, 193, 1000, 2048))
@WIDTHS
def test_error_rule(width, seq, shape, causal, dtype):
    """At most twice the error of PyTorch's own kernel."""
    batch, heads, kv_heads = shape
    tensors = make(batch, seq, heads, kv_heads, width, dtype)
    scale = 0.3 if (batch, heads) == (3, 4) else None
    floor = 1.0 if seq == 1 else 0.0  # a single key's gradients cancel to 0
    assert_error_rule(op, sdpa, tensors, (causal, scale), factor=2.0, ulps=0.5, floor=floor)


@pytest.mark.parametrize("dtype", (BF16, F16), ids=str)
@pytest.mark.parametrize("causal", (True, False))
@pytest.mark.parametrize("seq", (1, 65, 128, 1000))
@WIDTHS
def test_lse(width, seq, causal, dtype):
    tensors = make(2, seq, 4, 2, width, dtype)
    for scale in (width**-0.5, 0.3):
        _, lse = raw_forward(*tensors, scale, causal)
        expected = exact(*tensors, causal, scale)[1]
        assert lse.dtype == F32 and lse.shape == (2, 4, seq)
        assert (lse - expected).abs().max() <= 2e-5 * max(1, expected.abs().max().item())


@pytest.mark.parametrize("causal", (True, False))
@pytest.mark.parametrize(
    "lengths", ((64, 128), (128, 64), (300, 700), (700, 300), (130, 77), (520, 130), (1, 200), (200, 1)), ids=str
)  # fmt: skip
@WIDTHS
def test_lengths_that_differ(width, lengths, causal):
    """CASES 2, of the raw ops: a causal query sees no key that lies behind it, counted from the ends."""
    seq_q, seq_k = lengths
    scale = 0.2
    q = random((2, seq_q, 4, width), BF16, "cuda", 0)
    k, v = (random((2, seq_k, 2, width), BF16, "cuda", i) for i in (1, 2))
    dout = random(q.shape, BF16, "cuda", 3)
    out, lse, *grads = raw((q, k, v), dout, scale, causal)
    leaves = [t.double().requires_grad_() for t in (q, k, v)]
    exact_out, exact_lse = exact(*leaves, causal, scale)
    blind = exact_lse == -math.inf
    assert torch.equal(lse == -math.inf, blind) and bool(blind.any()) == (causal and seq_q > seq_k)
    assert (lse - exact_lse)[~blind].abs().max() < 1e-4
    assert (
        not out.transpose(1, 2)[blind].count_nonzero() and not grads[0].transpose(1, 2)[blind].count_nonzero()
    )
    # where a query sees one key alone, dq and dk cancel to 0
    for ours, theirs in zip(
        (out, *grads), (exact_out, *torch.autograd.grad(exact_out, leaves, dout.double()))
    ):
        near(ours, theirs.to(BF16), 4, floor=0.25)


@pytest.mark.parametrize("dtype", (BF16, F16), ids=str)
@WIDTHS
def test_large_scores(width, dtype):
    """To +-1e4 and beyond: a row's maximum may lie far above its other scores, or fall and rise by thousands."""
    q, k, v = make(2, 700, 4, 2, width, dtype)
    (out,), grads = run(functools.partial(ours, scale=100.0), [q, k, v])
    expected, lse = exact(q, k, v, True, 100.0)
    assert lse.abs().max() > 1e3 and all(t.isfinite().all() for t in (out, *grads))
    near(out, expected.to(dtype), 4)
    same = torch.full((1, 300, 1, width), 28.0, dtype=dtype, device="cuda")
    ramp = same * torch.linspace(-1, 1, 300, device="cuda").to(dtype)[None, :, None, None]
    for tensors in ((same, ramp, ramp), (same, -ramp, ramp), (ramp, ramp, same)):
        (out,), grads = run(ours, tensors)  # scores to 28 * 28 * sqrt(128) = 8,869
        assert all(t.isfinite().all() for t in (out, *grads))


@WIDTHS
def test_infinite_and_nan_stay_in_their_batch_row(width):
    for which in range(4):
        for value in (NAN, math.inf):
            tensors, dout = make(3, 200, 4, 2, width), random((3, 200, 4, width), BF16, "cuda", 9)
            clean = raw(tensors, dout)
            [*tensors, dout][which][1, 77, 1, 5] = value
            found = raw(tensors, dout)
            assert any(t[1].isnan().any() for t in found)
            for a, b in zip(found, clean):
                for row in (0, 2):
                    near(a[row], b[row], 4)  # dq adds up in any order


@WIDTHS
def test_lse_of_a_nan_is_one(width):
    q, k, v = make(1, 100, 1, 1, width)
    q[0, 30] = NAN
    out, lse = raw_forward(q, k, v)
    assert lse[0, 0].isnan().nonzero().flatten().tolist() == [30]
    assert out[0, :, 0].isnan().all(dim=1).nonzero().flatten().tolist() == [30]


@pytest.mark.parametrize("seed", range(40))
@WIDTHS
def test_fuzz(width, seed):
    rng = python_random.Random(seed)
    kv_heads = rng.choice((1, 2, 3))
    heads, batch = kv_heads * rng.choice((1, 2, 4, 5)), rng.randint(1, 4)
    seq, dtype = (
        rng.choice((rng.randint(2, 40), rng.randint(2, 300), rng.randint(300, 900))),
        rng.choice((BF16, F16)),
    )
    tensors = make(batch, seq, heads, kv_heads, width, dtype, seed)
    tensors = [laid_out(t, rng.choice(LAYOUTS)) for t in tensors]
    constants = rng.random() < 0.6, rng.choice((None, 0.02, 0.5))
    assert_error_rule(op, sdpa, tensors, constants, factor=2.0, ulps=2.0, floor=2.0)


# ---------------------------------------------------------------- choice and errors


def used(q, k, v, *arguments, **options) -> bool:
    """Whether our kernel ran."""
    with Calls() as calls:
        attention(q, k, v, *arguments, **options)
    return any(name == "attention_fwd" for name, _ in calls.seen)


def test_who_comes_here_by_default():
    q, k, v = make(2, 200, 4, 2)
    assert used(q, k, v) and used(q, *(t.contiguous() for t in (k, v)), causal=False)
    assert not used(q, k, v, backend="torch") and not used(q.float(), k.float(), v.float())
    assert used(*(t[..., :64] for t in (q, k, v))) and not used(*(t[..., :32] for t in (q, k, v)))
    borders = torch.tensor([0, 200, 400], dtype=torch.int32, device="cuda")
    assert not used(*(t.flatten(0, 1) for t in (q, k, v)), borders, 200)
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        assert not used(q, k, v)
    finally:
        torch.use_deterministic_algorithms(False)


def test_a_compiled_graph_keeps_torchs():
    torch._dynamo.reset()
    tensors = make(2, 200, 4, 2)
    compiled = torch.compile(attention, backend="aot_eager", fullgraph=True)
    for a, b in zip(run(compiled, tensors), run(attention, tensors, backend="torch")):
        all_near(a, b, 4)


Q, K, V = (torch.zeros(1, 8, heads, 128, dtype=BF16) for heads in (4, 2, 2))


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda q, k, v: (q, k[:, :, :, :64], v), r"k must be \(1, 8, 2, 128\)"),
        (lambda q, k, v: (q, k, v[:, :7]), r"v must be \(1, 8, 2, 128\)"),
        (lambda q, k, v: (q[..., :64], k, v), r"k must be \(1, 8, 2, 64\)"),
        (lambda q, k, v: tuple(t[..., :32] for t in (q, k, v)), "takes a head_dim of 64 or 128"),
        (lambda q, k, v: (q[:, :, :3], k, v), "heads that are a multiple of kv_heads"),
        (lambda q, k, v: (q.float(), k, v), "takes bfloat16 or float16"),
        (lambda q, k, v: (q, k.half(), v), "k must have its partner's dtype"),
        (lambda q, k, v: (q, k.cpu(), v), "k must be on its partner's device"),
        (lambda q, k, v: (q, k[:, :1].expand(k.shape), v), "takes k with a contiguous last dimension, strides"),
        (lambda q, k, v: (laid_out(q, "misaligned"), k, v), "takes q with a contiguous last dimension, strides"),
        (lambda q, k, v: (laid_out(q, "every other"), k, v), "takes q with a contiguous last dimension, strides"),
        (lambda q, k, v: (q[:0], k[:0], v[:0]), "takes sizes of at least 1"),
    ],
)  # fmt: skip
def test_the_raw_op_takes_nothing_that_it_can_not_read(change, message):
    with pytest.raises(RuntimeError, match=message):
        raw_forward(*change(*(t.cuda() for t in (Q, K, V))))


@pytest.mark.parametrize("scale", (0.0, -1.0, NAN, math.inf))
def test_the_raw_op_takes_a_scale_above_0(scale):
    with pytest.raises(RuntimeError, match="takes a finite scale above 0"):
        raw_forward(*(t.cuda() for t in (Q, K, V)), scale)
