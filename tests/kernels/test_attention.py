"""attention: dense, packed documents, grouped heads."""

import itertools

import pytest
import torch

from openllama.ops import attention, attention_decode

from .contract import BF16, F16, F32, F64, Contract
from .rule import all_near, gradients_like, laid_out, random, run


def eager(q, k, v, cu_seqlens=None, max_seqlen=None, causal=True):
    """Attention as a user writes it in q's dtype, a document at a time."""
    if cu_seqlens is not None:
        borders = cu_seqlens.tolist()
        pieces = [
            eager(q[None, a:b], k[None, a:b], v[None, a:b], causal=causal)
            for a, b in itertools.pairwise(borders)
        ]
        return torch.cat(pieces, dim=1)[0]
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], dim=1) for t in (k, v))
    scores = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5
    if causal:
        scores = scores.masked_fill(torch.ones_like(scores, dtype=torch.bool).triu(1), float("-inf"))
    return (scores.softmax(-1) @ v).transpose(1, 2)


def borders_of(rows, device, seed):
    """Borders of random documents of `rows` tokens in all, some of them empty."""
    generator = torch.Generator().manual_seed(seed)
    inner = torch.randint(rows + 1, (4,), generator=generator).sort().values.tolist()
    return torch.tensor([0, *inner, inner[-1], rows], dtype=torch.int32, device=device)


class Heads(Contract):
    sizes = ((4, 2, 16), (1, 1, 8), (6, 1, 40), (3, 3, 64))  # heads, kv_heads, head_dim
    factor = 2.0
    twin = False
    ulps = 8.0  # PyTorch's fp32 kernel on a GPU
    fuzz_cases = 60
    layout_ulps = 8.0
    fuzz_ulps = 16.0
    terms = 4.0  # equal keys, as in an expanded k, have gradients that cancel

    def eager(self, *arguments):
        return eager(*arguments)

    def op(self, *arguments, backend=None):
        return attention(*arguments, backend=backend)

    def fuzz_size(self, rng):
        kv_heads = rng.choice((1, 2, 3))
        return kv_heads * rng.choice((1, 2, 4)), kv_heads, rng.choice((8, 16, 24, 40, 64))

    # no op of ours is behind this one yet
    test_rows_beyond_2_to_the_31_elements = None
    test_opcheck = test_fake_has_the_real_strides = test_a_second_derivative_raises = None


class TestDense(Heads):
    def make(self, rows, size, dtype, device, seed=0):
        shapes = [(2, rows, heads, size[2]) for heads in (size[0], size[1], size[1])]
        return [random(shape, dtype, device, seed + i) for i, shape in enumerate(shapes)], ()


class TestPacked(Heads):
    compiled_ulps = 16.0  # a mask in place of a document at a time

    def make(self, rows, size, dtype, device, seed=0):
        shapes = [(rows, heads, size[2]) for heads in (size[0], size[1], size[1])]
        tensors = [random(shape, dtype, device, seed + i) for i, shape in enumerate(shapes)]
        return tensors, (borders_of(rows, device, seed), rows)


def packed(lengths, dtype=F32, device="cpu", heads=4, kv_heads=2, seed=0):
    tensors, _ = TestPacked().make(sum(lengths), (heads, kv_heads, 16), dtype, device, seed)
    borders = torch.tensor([0, *lengths]).cumsum(0).to(device, torch.int32)
    return tensors, (borders, max(lengths, default=0))


@pytest.mark.parametrize("dtype", (F32, BF16, F16))
@pytest.mark.parametrize("causal", (True, False))
def test_packed_is_each_document_alone(device, dtype, causal):
    lengths = [7, 1, 30, 12]
    tensors, constants = packed(lengths, dtype, device)
    together = run(attention, tensors, constants, causal=causal)
    pieces = zip(*(t.split(lengths) for t in tensors))
    alone = [run(attention, [t[None] for t in piece], causal=causal, douts=[d[None]])
             for piece, d in zip(pieces, random((50, 4, 16), dtype, device, 100).split(lengths))]  # fmt: skip
    ulps = 0 if device == "cpu" else 4
    all_near(together[0], [torch.cat([o[0][0] for o, _ in alone])], ulps)
    for i in range(3):
        all_near([together[1][i]], [torch.cat([g[i][0] for _, g in alone])], ulps)


def test_a_document_does_not_see_another(device):
    """Document B's outputs and gradients stay the same to the bit when A changes."""
    lengths = [9, 20, 5]
    tensors, constants = packed(lengths, BF16 if device == "cuda" else F32, device)
    first = run(attention, tensors, constants)
    for t in tensors:
        t[:9] = t[:9] * 3 + 1
    second = run(attention, tensors, constants)
    for a, b in zip(first[0] + first[1], second[0] + second[1]):
        assert torch.equal(a[9:], b[9:]) and not torch.equal(a[:9], b[:9])


@pytest.mark.parametrize("lengths", ([0, 5, 0, 0, 7, 0], [0, 0, 0], [0], [3, 0]))
def test_empty_documents(device, lengths):
    dtype = BF16 if device == "cuda" else F32
    tensors, constants = packed(lengths, dtype, device)
    ours = run(attention, tensors, constants)
    theirs = run(attention, *packed([n for n in lengths if n] or [0], dtype, device))
    assert all(torch.equal(o, t) for o, t in zip(ours[0] + ours[1], theirs[0] + theirs[1]))


def test_many_short_documents(device):
    lengths = [1 + i % 3 for i in range(3000)]
    tensors, constants = packed(lengths, BF16 if device == "cuda" else F32, device, heads=2, kv_heads=1)
    (out,), grads = run(attention, tensors, constants)
    assert all(t.isfinite().all() for t in (out, *grads))
    assert torch.equal(out[0], tensors[2][0].expand(2, -1))  # the first document is one token: it sees itself


@pytest.mark.gpu
def test_more_documents_than_a_grid_takes():
    lengths = [2, 0, 1, 3] * 20_000
    tensors, constants = packed(lengths, BF16, "cuda", heads=2, kv_heads=1)
    ours = run(attention, tensors, constants)
    dout = gradients_like(ours[0])[0]
    for start in (0, 65_532, 79_000):  # in the first piece, over the cut, in the second
        a, b = (int(constants[0][i]) for i in (start, start + 8))
        some = [t[a:b] for t in tensors]
        alone = run(attention, some, (constants[0][start : start + 9] - a, 3), douts=[dout[a:b]])
        for o, t in zip(ours[0] + ours[1], alone[0] + alone[1]):
            assert torch.equal(o[a:b], t)


def test_documents_of_one_token_at_most(device):
    """With max_seqlen 1, no mask and grouped heads, a varlen kernel may count on a token in every document."""
    tensors, constants = packed([1, 0, 1, 1, 0], BF16, device)
    (out,), grads = run(attention, tensors, constants, causal=False)
    assert torch.equal(out, tensors[2].repeat_interleave(2, dim=1)) and grads[0].abs().max() < 0.1


def test_slices_of_one_packed_qkv(device):
    qkv = random((20, 8, 16), BF16 if device == "cuda" else F32, device, 0)
    pieces = qkv.split([4, 2, 2], dim=1)
    constants = packed([8, 12], device=device)[1]
    ours = run(attention, pieces, constants)
    theirs = run(attention, [p.contiguous() for p in pieces], constants)
    assert all(torch.equal(o, t) for o, t in zip(ours[0] + ours[1], theirs[0] + theirs[1]))


def test_scale(device):
    tensors, _ = TestDense().make(9, (2, 2, 16), F32, device)
    doubled = run(attention, tensors, scale=0.5)
    all_near(doubled[0], run(attention, [tensors[0] * 2, *tensors[1:]])[0], 4)  # 2 * 16 ** -0.5 = 0.5


@pytest.mark.parametrize("scale", (0.0, -1.0, float("nan"), float("inf")))
@pytest.mark.parametrize("backend", (None, "reference"))
def test_bad_scale_is_named(scale, backend):
    with pytest.raises(ValueError, match=f"scale: got {scale}, takes a finite number above 0"):
        attention(Q[None], K[None], K[None], scale=scale, backend=backend)


def test_head_dim_of_zero():
    assert attention(Q[None, ..., :0], K[None, ..., :0], K[None, ..., :0]).shape == (1, 10, 4, 0)


@pytest.mark.parametrize("dtype", (F32, BF16))
@pytest.mark.parametrize("causal", (True, False))
@pytest.mark.parametrize("lengths", ([7, 1, 30, 12], [0, 5, 0, 0, 7, 0], [50]))
def test_packed_compiles_into_one_graph(device, dtype, causal, lengths):
    torch._dynamo.reset()
    tensors, constants = packed(lengths, dtype, device)
    compiled = torch.compile(attention, backend="aot_eager", fullgraph=True)
    results = (run(f, tensors, constants, causal=causal) for f in (compiled, attention))
    for ours, theirs in zip(*results):
        all_near(ours, theirs, TestPacked.compiled_ulps)


def test_a_strided_gradient_inside_a_graph(device):
    """The gradient of one of two concatenated tensors is a slice."""
    torch._dynamo.reset()
    tensors, _ = TestDense().make(16, (4, 2, 64), BF16, device)

    def op(q, k, v):
        return torch.cat([attention(q, k, v), q], dim=1)

    compiled = torch.compile(op, backend="aot_eager", fullgraph=True)
    for ours, theirs in zip(run(compiled, tensors), run(op, tensors)):
        all_near(ours, theirs, 4)


def test_one_graph_serves_other_borders():
    """The mask is built from cu_seqlens in the graph: documents of other lengths need no new one."""
    torch._dynamo.reset()
    graphs = []

    def compiler(graph, _):
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(attention, backend=compiler, fullgraph=True)
    for lengths in ([7, 1, 2], [1, 2, 7]):
        tensors, constants = packed(lengths)
        all_near([compiled(*tensors, *constants)], [attention(*tensors, *constants)], 4)
    assert len(graphs) == 1


Q, K = torch.zeros(10, 4, 8), torch.zeros(10, 2, 8)


def borders(*values, dtype=torch.int32):
    return torch.tensor(values, dtype=dtype)


@pytest.mark.parametrize(
    "arguments, error, message",
    [
        ((Q, K, K), ValueError, r"q: got shape \(10, 4, 8\), takes \(batch, seq, heads, head_dim\)"),
        ((Q[None], K[None], K[None], borders(0, 10), 10), ValueError, r"takes \(tokens, heads, head_dim\) with cu_seqlens"),
        ((Q[None, :5], K[None], K[None]), ValueError, r"k: got shape \(1, 10, 2, 8\), takes \(1, 5, 2, 8\)"),
        ((Q, K[:9], K, borders(0, 10), 10), ValueError, r"k: got shape \(9, 2, 8\), takes \(10, 2, 8\)"),
        ((Q, K, K[..., :4], borders(0, 10), 10), ValueError, r"v: got shape \(10, 2, 4\)"),
        ((Q, K.double(), K, borders(0, 10), 10), TypeError, "k: got torch.float64, takes q's torch.float32"),
        ((Q, Q[:, :3], Q[:, :3], borders(0, 10), 10), ValueError, "k: got 3 heads, takes a divisor of q's 4"),
        ((Q, Q[:, :0], Q[:, :0], borders(0, 10), 10), ValueError, "k: got 0 heads"),
        ((Q, K, K, borders(0, 10, dtype=torch.int64), 10), TypeError, "cu_seqlens: got torch.int64"),
        ((Q, K, [1], borders(0, 10), 10), TypeError, "v: got list, takes a tensor"),
        ((Q, K, K, [0, 10], 10), TypeError, "cu_seqlens: got list, takes a tensor"),
        ((Q, K, K, borders(0), 10), ValueError, r"cu_seqlens: got shape \(1,\)"),
        ((Q, K, K, borders(0, 10)), TypeError, "max_seqlen: got None"),
        ((Q, K, K, borders(1, 10), 10), ValueError, r"cu_seqlens: got \[1, 10\].* takes 0 to q's 10 tokens"),
        ((Q, K, K, borders(0, 9), 10), ValueError, "takes 0 to q's 10 tokens"),
        ((Q, K, K, borders(0, 11), 11), ValueError, "takes 0 to q's 10 tokens"),
        ((Q, K, K, borders(0, 7, 5, 10), 10), ValueError, "not falling"),
        ((Q, K, K, borders(0, 4, 10), 5), ValueError, "max_seqlen: got 5, takes at least the longest document's 6"),
        ((Q, K, Q[:, :1], borders(0, 10), 10), ValueError, r"v: got shape \(10, 1, 8\), takes \(10, 2, 8\)"),
    ],
)  # fmt: skip
def test_bad_input_is_named(arguments, error, message):
    with pytest.raises(error, match=message):
        attention(*arguments)


def test_reference_is_the_definition():
    """The mask written out in fp64 against documents cut apart."""
    tensors, constants = packed([3, 0, 8, 1], F64)
    ours = run(attention, tensors, constants, backend="reference")
    theirs = run(eager, [laid_out(t, "slice") for t in tensors], constants)
    all_near(ours[0] + ours[1], theirs[0] + theirs[1], 16)


# ---------------------------------------------------------------- one token a row of a cache

CACHED = (9, 1, 4, 12)  # entries that each row sees, of 12


def cached(dtype=F32, device="cpu", heads=4, kv_heads=2, head_dim=16):
    """q, k, v and lengths; k and v are slices of one cache."""
    q = random((len(CACHED), heads, head_dim), dtype, device, 0)
    cache = random((2, len(CACHED) + 1, 15, kv_heads, head_dim), dtype, device, 1)
    return q, *cache[:, : len(CACHED), : max(CACHED)], torch.tensor(CACHED, device=device)


def last_row_of_each(q, k, v, lengths):
    """As a whole document each, in which only the last query counts."""
    rows = [(a[None, None].expand(1, n, -1, -1), b[None, :n], c[None, :n])
            for a, b, c, n in zip(q, k, v, lengths.tolist())]  # fmt: skip
    return torch.cat([eager(*row)[:, -1] for row in rows])


@pytest.mark.parametrize("dtype", (F64, F32, BF16, F16))
@pytest.mark.parametrize("size", (*Heads.sizes, (4, 2, 20)), ids=str)
def test_decode_is_the_last_row_of_attention(device, dtype, size):
    tensors = cached(dtype, device, *size)
    exact = last_row_of_each(*(t.double() for t in tensors[:3]), tensors[3]).to(dtype)
    all_near([attention_decode(*tensors)], [exact], 8)


def test_decode_does_not_see_what_lies_behind(device):
    q, k, v, lengths = cached(device=device)
    first = attention_decode(q, k, v, lengths)
    for row, n in enumerate(CACHED):
        k[row, n:], v[row, n:] = 1e4, -1e4
    assert torch.equal(attention_decode(q, k, v, lengths.int()), first)


def test_decode_scale(device):
    q, k, v, lengths = cached(device=device)
    all_near([attention_decode(q, k, v, lengths, scale=0.5)], [attention_decode(q * 2, k, v, lengths)], 4)
    with pytest.raises(ValueError, match=r"scale: got 0\.0"):
        attention_decode(q, k, v, lengths, scale=0.0)


@pytest.mark.parametrize(
    "change, error, message",
    [
        (lambda q, k, v, n: (q[0], k, v, n), ValueError, r"q: got shape \(4, 16\), takes \(rows, heads"),
        (lambda q, k, v, n: (q.long(), k, v, n), TypeError, "q: got torch.int64"),
        (
            lambda q, k, v, n: (q[:, :3], k, v, n),
            ValueError,
            "k: got shape .*, kv_heads a divisor of q's 3 heads",
        ),
        (
            lambda q, k, v, n: (q, k[0], v, n),
            ValueError,
            r"k: got shape \(12, 2, 16\), takes \(rows, capacity",
        ),
        (
            lambda q, k, v, n: (q, k[:3], v, n),
            ValueError,
            r"k: got shape \(3, 12, 2, 16\), takes \(4, 12, 2, 16\)",
        ),
        (lambda q, k, v, n: (q, k, v[:, :9], n), ValueError, r"v: got shape \(4, 9, 2, 16\)"),
        (
            lambda q, k, v, n: (q, k, v.double(), n),
            TypeError,
            "v: got torch.float64, takes q's torch.float32",
        ),
        (lambda q, k, v, n: (q, k, v, n.float()), TypeError, "lengths: got torch.float32"),
        (lambda q, k, v, n: (q, k, v, n[:2]), ValueError, r"lengths: got shape \(2,\)"),
    ],
)
def test_bad_input_to_decode_is_named(change, error, message):
    with pytest.raises(error, match=message):
        attention_decode(*change(*cached()))
