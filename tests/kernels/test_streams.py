"""Each op on a stream of its own, and in a CUDA graph."""

import functools

import pytest
import torch

from openllama.kernels.grad_norm import grad_norm
from openllama.kernels.scale import scale_
from openllama.ops import (
    adamw,
    attention,
    linear_rotary,
    linear_swiglu,
    linear_swiglu_backward_,
    rotary,
    rotary_tables,
    swiglu_backward_,
)

from . import (
    test_adamw,
    test_cross_entropy,
    test_embedding,
    test_linear_cross_entropy,
    test_rms_norm,
    test_rotary,
    test_swiglu,
)
from .contract import BF16, F32
from .rule import gradients_like, random, run

pytestmark = pytest.mark.gpu

# A case is a function of a seed. It returns (inputs, call): tensors, and a function of tensors like them and of a
# backend that returns new ones.


def differentiable(contract, rows, size):
    """The op of a Contract, forward and backward."""

    def case(seed):
        tensors, constants = contract.make(rows, size, BF16, "cuda", seed)
        douts = gradients_like(run(contract.op, tensors, constants, [False] * len(tensors))[0])

        def call(inputs, backend):
            rest = iter(inputs[len(tensors) :])
            filled = [next(rest) if isinstance(c, torch.Tensor) else c for c in constants]
            op = functools.partial(contract.op, backend=backend)
            outputs, grads = run(op, inputs[: len(tensors)], filled, douts=douts)
            return [*outputs, *grads]

        return [*tensors, *(c for c in constants if isinstance(c, torch.Tensor))], call

    return case


class RotaryInPlace(test_rotary.TestRotary):
    def op(self, x, *arguments, backend=None):
        return rotary(x * 1, *arguments, inplace=True, backend=backend)


class CrossEntropyUncapped(test_cross_entropy.TestCrossEntropyInPlace):
    """Without a softcap: rows are held."""

    numbers = (0.0, 0.0)


def swiglu_backward_case(seed):
    def call(inputs, backend):
        dact, gate_up = (t.clone() for t in inputs)
        swiglu_backward_(dact, gate_up, backend=backend)
        return [dact, gate_up]

    return [random((65, 1024), BF16, "cuda", seed), random((65, 2048), BF16, "cuda", seed + 1)], call


def linear_swiglu_case(seed):
    def call(inputs, backend):
        x, weight, w_down = inputs
        backend = {"triton": "reference"}.get(backend, backend)
        gate_up, act = linear_swiglu(x, [weight], tune=False, backend=backend)
        kept = gate_up.clone()
        linear_swiglu_backward_(x, w_down, gate_up, False, backend=backend)
        return [act, kept, gate_up]

    shapes = (600, 256), (1024, 256), (256, 512)
    return [random(shape, BF16, "cuda", seed + i, 0.2) for i, shape in enumerate(shapes)], call


def linear_rotary_case(seed):
    cos, sin = rotary_tables(64, 1024, device="cuda")

    def call(inputs, backend):
        x, weight, positions = inputs
        backend = {"triton": "reference"}.get(backend, backend)
        return [linear_rotary(x, [weight], cos, sin, positions, 64, 5, tune=False, backend=backend)]

    positions = torch.randint(1024, (600,), dtype=torch.int32, device="cuda")
    return [
        random((600, 256), BF16, "cuda", seed),
        random((512, 256), BF16, "cuda", seed + 1),
        positions,
    ], call


def attention_case(seed):
    """Of one tile of keys, so that dq adds up in one order."""

    def call(inputs, backend):
        *tensors, dout = inputs
        backend = {"triton": "reference"}.get(backend, backend)
        outputs, grads = run(functools.partial(attention, backend=backend), tensors, douts=[dout])
        return [*outputs, *grads]

    return [
        random((5, 128, heads, 128), BF16, "cuda", seed + i) for i, heads in enumerate((4, 2, 2, 4))
    ], call


def scale_case(seed):
    def call(inputs, backend):
        x = inputs[0].clone()
        scale_(x, inputs[1], backend=backend)
        return [x]

    return [random((65, 1024), BF16, "cuda", seed), random((1,), F32, "cuda", seed)], call


def grad_norm_case(seed):
    def call(inputs, backend):
        return list(grad_norm(inputs, 1.0, backend=backend))

    # for each dtype a tensor with 16-byte accesses and one without
    return [random((n,), dtype, "cuda", seed + n) for n in (1000, 1001) for dtype in (F32, BF16)], call


def adamw_case(seed):
    state = test_adamw.Run([(1000,), (7,), (64, 64), (300, 7)], BF16, "cuda").go(seed, backend="reference")
    lists = [state.params, state.grads(), *state.lists[1:]]
    lr, step, grad_scale = torch.tensor([[1e-2 / seed], [seed], [0.5]], device="cuda")

    def call(inputs, backend):
        *tensors, lr, step, grad_scale = inputs
        copies = [t.clone() for t in tensors]
        copied = [copies[i : i + 4] for i in range(0, len(copies), 4)]
        options = {**test_adamw.HYPER, "lr": lr, "step": step, "grad_scale": grad_scale, "backend": backend}
        adamw(*copied, **options)
        return copies

    return [*(t for tensors in lists for t in tensors), lr, step, grad_scale], call


CASES = {
    "rms_norm": differentiable(test_rms_norm.TestRmsNormResidual(), 65, 4096),
    "rotary": differentiable(test_rotary.TestRotary(), 65, (6, 5, 64)),
    "rotary in place": differentiable(RotaryInPlace(), 65, (6, 5, 64)),
    "swiglu": differentiable(test_swiglu.TestSwiglu(), 65, 1024),
    "swiglu_backward_": swiglu_backward_case,
    "linear_swiglu": linear_swiglu_case,
    "linear_rotary": linear_rotary_case,
    "attention": attention_case,
    "cross_entropy": differentiable(test_cross_entropy.TestCrossEntropy(), 33, 50_257),
    "cross_entropy in place, capped": differentiable(test_cross_entropy.TestCrossEntropyInPlace(), 33, 50_257),
    "cross_entropy in place": differentiable(CrossEntropyUncapped(), 33, 100_003),
    "linear_cross_entropy": differentiable(test_linear_cross_entropy.TestLinearCrossEntropy(), 33, (64, 1000)),
    "linear_cross_entropy, rows": differentiable(test_linear_cross_entropy.TestLinearCrossEntropyRows(), 33, (64, 1000)),
    "embedding": differentiable(test_embedding.TestEmbedding(), 65, 256),
    "scale": scale_case,
    "grad_norm": grad_norm_case,
    "adamw": adamw_case,
}  # fmt: skip

of_every_op = pytest.mark.parametrize(
    "name, backend", [(n, b) for n in CASES for b in ("cuda", "triton") if (n, b) != ("scale", "triton")]
)


def fill(tensors, values):
    for t, value in zip(tensors, values):
        t.copy_(value)


def assert_equal(ours, theirs):
    assert len(ours) == len(theirs) > 0
    assert all(torch.equal(o, t) for o, t in zip(ours, theirs))


@of_every_op
def test_side_stream(name, backend):
    """The kernels wait for work on the stream they are called on, and on no other."""
    inputs, call = CASES[name](1)
    early, late = [t.clone() for t in inputs], CASES[name](2)[0]
    expected = call(late, backend)
    stream = torch.cuda.Stream()
    for _ in range(3):  # the first time, new memory may make all streams wait
        fill(inputs, early)
        torch.cuda.synchronize()
        with torch.cuda.stream(stream):
            torch.cuda._sleep(20_000_000)  # some 10 ms: on another stream, early values would be read
            fill(inputs, late)
            results = call(inputs, backend)
        stream.synchronize()
        assert_equal(results, expected)


@of_every_op
def test_cuda_graph(name, backend):
    """Replays read what the inputs are by then."""
    inputs, call = CASES[name](1)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        call(inputs, backend)  # compiles
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = call(inputs, backend)
    for seed in (2, 3):
        fresh = CASES[name](seed)[0]
        fill(inputs, fresh)
        graph.replay()
        assert_equal(captured, call(fresh, backend))
