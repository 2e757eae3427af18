"""The tests that every differentiable op passes. `class TestSwiglu(Contract)` in test_swiglu.py says what is special."""

from __future__ import annotations

import functools
import itertools
import random as python_random

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from .rule import LAYOUTS, all_near, assert_error_rule, gradients_like, laid_far, laid_out, near, run

F32, BF16, F16, F64 = torch.float32, torch.bfloat16, torch.float16, torch.float64

#: Marks of what calls kernels that only Hopper runs.
HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability()[0] == 9
ON_HOPPER = (pytest.mark.gpu, pytest.mark.skipif(not HOPPER, reason="the kernels run on Hopper alone"))

#: (device, dtype, backend) of a product that has a kernel there.
PRODUCTS = [
    ("cpu", F32, "reference"),
    ("cpu", F64, "reference"),
    *(pytest.param("cuda", dtype, "cuda", marks=ON_HOPPER) for dtype in (BF16, F16)),
    *(pytest.param("cuda", dtype, "reference", marks=pytest.mark.gpu) for dtype in (BF16, F16)),
]


def on_hopper(test):
    for mark in ON_HOPPER:
        test = mark(test)
    return test


class Contract:
    """A subclass gives the op, PyTorch's way to write it, its inputs, and the sizes to try.

    `make` returns (tensors, constants): the float inputs, which all take gradients, and the rest. Both `op` and
    `eager` are called with `*tensors, *constants`; `op` with `backend=` too.
    """

    dtypes = (F32, BF16, F16, F64)
    sizes: tuple = ()
    compilers = ("aot_eager",)
    factor = 1.0  # of the error rule
    ulps = 1.0
    fuzz_cases = 200
    layout_ulps = 2.0  # a layout may take another path, with its sums in another order
    fuzz_ulps = 8.0  # both sides are within a few ulps of the exact result
    compiled_ulps = 2.0  # a graph may take another path
    forward_ulps = 0.0  # of what a forward without gradients may differ by
    twin = True  # whether the op has a Triton twin
    terms = 0.0  # the size of the terms of a result, where those may cancel

    def make(self, rows: int, size, dtype: torch.dtype, device: str, seed: int = 0):
        raise NotImplementedError

    def op(self, *arguments, backend: str | None = None):
        raise NotImplementedError

    def eager(self, *arguments):
        raise NotImplementedError

    def raw(self, device: str, dtype: torch.dtype) -> list:
        """(raw op, arguments) of each torch.ops.openllama op behind this one."""
        raise NotImplementedError

    def floor(self, size) -> float:
        return 0.0

    def fuzz_size(self, rng: python_random.Random):
        raise NotImplementedError

    # ---------------------------------------------------------------- values

    def test_error_rule(self, device, dtype, size):
        tensors, constants = self.make(33, size, dtype, device)
        ulps = self.ulps * (8 if dtype == F64 else 1)  # float64's own result is not exact
        assert_error_rule(
            self.op, self.eager, tensors, constants, factor=self.factor, ulps=ulps, floor=self.floor(size)
        )

    @pytest.mark.gpu
    def test_error_rule_of_the_triton_twin(self, dtype, size):
        if not self.twin or dtype == F64:
            pytest.skip("there is no Triton kernel")
        tensors, constants = self.make(33, size, dtype, "cuda")
        op = functools.partial(self.op, backend="triton")
        assert_error_rule(
            op, self.eager, tensors, constants, factor=self.factor, ulps=self.ulps, floor=self.floor(size)
        )

    def test_each_gradient_alone_equals_all_together(self, device, dtype):
        tensors, constants = self.make(9, self.sizes[0], dtype, device)
        outputs, together = run(self.op, tensors, constants)
        for needs in itertools.product((False, True), repeat=len(tensors)):
            some_outputs, some = run(self.op, tensors, constants, needs)
            for ours, theirs in zip(some_outputs, outputs):
                near(ours, theirs, 0.0 if any(needs) else self.forward_ulps)
                assert ours.requires_grad is False or any(needs)
            for grad, whole, need in zip(some, together, needs):
                assert torch.equal(grad, whole) if need else grad is None

    def test_no_grad_keeps_nothing(self, device):
        tensors, constants = self.make(9, self.sizes[0], F32, device)
        leaves = [t.requires_grad_() for t in tensors]
        kept = []
        with torch.no_grad(), torch.autograd.graph.saved_tensors_hooks(kept.append, lambda t: t):
            outputs, _ = run(self.op, leaves, constants, [False] * len(leaves))
        assert not kept and not any(o.requires_grad for o in outputs)

    def test_two_runs_are_equal(self, device, dtype):
        tensors, constants = self.make(65, self.sizes[-1], dtype, device)
        first, second = (run(self.op, tensors, constants) for _ in range(2))
        for a, b in zip((*first[0], *first[1]), (*second[0], *second[1])):
            assert torch.equal(a, b)

    def test_zero_rows(self, device, dtype):
        for layout in LAYOUTS:
            tensors, constants = self.make(0, self.sizes[0], dtype, device)
            tensors = [laid_out(t, layout) for t in tensors]
            ours, theirs = run(self.op, tensors, constants), run(self.eager, tensors, constants)
            all_near(ours[0], theirs[0], 0, layout)
            for grad, tensor in zip(ours[1], tensors):
                assert grad.shape == tensor.shape and not grad.count_nonzero()

    # ---------------------------------------------------------------- layouts

    @pytest.mark.parametrize("layout", LAYOUTS)
    def test_layout_of_inputs(self, device, dtype, layout):
        tensors, constants = self.make(16, self.sizes[0], dtype, device)
        tensors = [laid_out(t, layout) for t in tensors]
        before = [t.clone() for t in tensors]
        ours = run(self.op, tensors, constants)
        dense = run(self.op, [t.contiguous() for t in tensors], constants)
        for o, d in zip(ours, dense):
            all_near(o, d, self.layout_ulps, layout, self.terms)
        for t, b in zip(tensors, before):
            assert torch.equal(t, b), "an input was written to"

    @pytest.mark.parametrize("layout", LAYOUTS)
    def test_layout_of_output_gradients(self, device, dtype, layout):
        tensors, constants = self.make(16, self.sizes[0], dtype, device)
        douts = [laid_out(d, layout) for d in gradients_like(run(self.op, tensors, constants)[0])]
        strided = run(self.op, tensors, constants, douts=douts)
        dense = run(self.op, tensors, constants, douts=[d.contiguous() for d in douts])
        all_near(strided[1], dense[1], self.layout_ulps, layout, self.terms)

    def test_gradient_of_a_sum(self, device, dtype):
        tensors, constants = self.make(16, self.sizes[0], dtype, device)
        outputs = run(self.op, tensors, constants)[0]
        leaves = [t.detach().requires_grad_() for t in tensors]
        result = self.op(*leaves, *constants)
        sum(o.sum() for o in (result if isinstance(result, tuple) else (result,))).backward()
        expected = run(self.op, tensors, constants, douts=[torch.ones_like(o) for o in outputs])[1]
        all_near([leaf.grad for leaf in leaves], expected, 2)

    @pytest.mark.parametrize("backend", (None, pytest.param("triton", marks=pytest.mark.gpu)))
    def test_fuzz_against_the_reference(self, device, backend):
        if backend == "triton" and (device == "cpu" or not self.twin):
            pytest.skip("there is no Triton kernel, or no GPU for it")
        cases = self.fuzz_cases if backend is None else self.fuzz_cases // 8  # each shape is compiled
        for seed in range(cases):
            rng = python_random.Random(seed)
            size, rows, dtype = self.fuzz_size(rng), rng.choice((1, 2, 3, 17, 64)), rng.choice(self.dtypes)
            if backend == "triton" and dtype == F64:
                continue
            tensors, constants = self.make(rows, size, dtype, device, seed)
            layouts = [rng.choice(LAYOUTS) for _ in tensors]
            needs = [rng.random() < 0.7 for _ in tensors]
            case = f"seed {seed}: {rows} rows, size {size}, {dtype}, {layouts}, needs {needs}"
            tensors = [laid_out(t, layout) for t, layout in zip(tensors, layouts)]
            outputs, _ = run(self.op, tensors, constants, [False] * len(tensors), backend="reference")
            layout = rng.choice(LAYOUTS)
            douts = [laid_out(d, layout) for d in gradients_like(outputs)]
            ours = run(self.op, tensors, constants, needs, douts, backend=backend)
            theirs = run(self.op, tensors, constants, needs, douts, backend="reference")
            for kind, o, t in zip(("outputs", "gradients"), ours, theirs):
                all_near(o, t, self.fuzz_ulps, f"{case}, dout {layout}: {kind}", self.terms)

    def test_rows_beyond_2_to_the_31_elements(self, tmp_path):
        """On the CPU, in files with holes: inputs and output gradients whose rows lie 2^31 elements apart."""
        tensors, constants = self.make(3, self.sizes[0], BF16, "cpu")
        far = [laid_far(t, tmp_path / f"{i}") if t.dim() > 1 else t for i, t in enumerate(tensors)]
        dense = run(self.op, tensors, constants)
        douts = [
            laid_far(d, tmp_path / f"dout{i}") if d.dim() > 1 else d
            for i, d in enumerate(gradients_like(dense[0]))
        ]
        for ours, theirs in zip(run(self.op, far, constants, douts=douts), dense):
            all_near(ours, theirs, 0)

    # ---------------------------------------------------------------- torch.compile and the dispatcher

    def test_compiled_equals_eager(self, device, compiler):
        torch._dynamo.reset()
        tensors, constants = self.make(16, self.sizes[0], F32, device)
        compiled = torch.compile(self.op, fullgraph=True, backend=compiler)
        for layout in ("contiguous", "slice", "every other"):
            tensors = [laid_out(t, layout) for t in tensors]
            for ours, theirs in zip(run(compiled, tensors, constants), run(self.op, tensors, constants)):
                all_near(ours, theirs, self.compiled_ulps, layout)

    def test_compiled_with_shapes_that_change(self, device):
        torch._dynamo.reset()
        compiled = torch.compile(self.op, fullgraph=True, backend="aot_eager", dynamic=True)
        for rows in (16, 5, 1, 0):
            tensors, constants = self.make(rows, self.sizes[0], F32, device)
            for ours, theirs in zip(run(compiled, tensors, constants), run(self.op, tensors, constants)):
                all_near(ours, theirs, self.compiled_ulps, f"{rows} rows")

    def test_a_second_derivative_raises(self, device, dtype):
        self.raw(device, dtype)  # skips where there is no kernel: the reference has second derivatives
        tensors, constants = self.make(3, self.sizes[0], dtype, device)
        leaves = [t.requires_grad_() for t in tensors]
        out = self.op(*leaves, *constants)
        total = sum(o.sum() for o in (out if isinstance(out, tuple) else (out,)))
        (first,) = torch.autograd.grad(total, leaves[0], create_graph=True)
        with pytest.raises(
            RuntimeError, match=r"once_differentiable|does not require grad|twice differentiable"
        ):
            first.square().sum().backward()

    def test_opcheck(self, device, dtype):
        for op, arguments in self.raw(device, dtype):
            torch.library.opcheck(op, arguments)

    def test_fake_has_the_real_strides(self, device, dtype):
        for op, arguments in self.raw(device, dtype):
            real = op(*arguments)
            with FakeTensorMode(allow_non_fake_inputs=False) as mode:
                fakes = [mode.from_tensor(a) if isinstance(a, torch.Tensor) else a for a in arguments]
                fake = op(*fakes)
            for r, f in zip(*(v if isinstance(v, tuple) else (v,) for v in (real, fake))):
                if r is not None:
                    assert (r.shape, r.stride(), r.dtype, r.device) == (
                        f.shape,
                        f.stride(),
                        f.dtype,
                        f.device,
                    ), op
