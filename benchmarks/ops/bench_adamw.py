"""A step of AdamW on a Llama's tensors, beside torch.optim.AdamW; and the norm of all gradients.

bf16: ours has fp32 masters and moments; torch's bf16 run has neither, so that its step is a rougher one of less memory.
`torch:masters` is torch's fused AdamW on fp32 masters, with gradients cast up and weights cast down around it.
"""

from functools import partial

import pytest
import torch
from torch.optim.adamw import adamw as torch_adamw

from benchmarks.ops.implementations import ours
from benchmarks.ops.timing import DEVICE, random
from openllama.kernels import adamw_forms
from openllama.model import Llama
from openllama.optim import AdamW
from openllama.presets import preset

LR, BETAS, EPS, DECAY, STEP = 1e-4, (0.9, 0.95), 1e-8, 0.1, 10


def shapes(hidden, layers, vocab=4096):
    block = [
        (3 * hidden, hidden),
        (hidden, hidden),
        (6 * hidden, hidden),
        (hidden, 3 * hidden),
        (hidden,),
        (hidden,),
    ]
    return [(vocab, hidden), (vocab, hidden), (hidden,), *block * layers]


@pytest.mark.parametrize("hidden, layers", ((256, 4), (768, 2), (2048, 1)))
def test_adamw(versus, device, dtype, hidden, layers):
    def parameters(dtype):
        params = [torch.nn.Parameter(torch.randn(s, device=device).to(dtype)) for s in shapes(hidden, layers)]
        for p in params:
            p.grad = torch.randn_like(p)
        return params

    options = {"lr": LR, "betas": BETAS, "weight_decay": DECAY}
    params = parameters(dtype)
    steps = {"ours": AdamW(params, **options).step}
    if dtype == torch.float32:
        for name in ("foreach", "fused"):
            # the same parameters: where memory happens to lie counts for up to a factor of 2
            steps[f"torch:{name}"] = torch.optim.AdamW(params, **options, **{name: True}).step
    else:
        weights, masters = parameters(dtype), parameters(torch.float32)
        fused = torch.optim.AdamW(masters, **options, fused=True)

        @torch.no_grad()
        def with_masters():
            torch._foreach_copy_([m.grad for m in masters], [w.grad for w in weights])
            fused.step()
            torch._foreach_copy_(weights, masters)

        steps["torch:masters"] = with_masters
    count = sum(p.numel() for p in params)
    shape = {"parameters": count, "tensors": len(params), "dtype": str(dtype)[6:]}
    # fp32: weight and moments read and written, the gradient read; bf16: master and moments, gradient, the weight written
    versus("adamw_step", shape, 28 * count, steps)


# ---------------------------------------------------------------- on a GPU


def sizes(name: str) -> list[torch.Size]:
    with torch.device("meta"):
        return [p.shape for p in Llama(preset(name)).parameters()]


def tensors(name: str, dtype: torch.dtype, fill: int | None = None) -> list[torch.Tensor]:
    """One for each parameter of the preset: random, or full of `fill`."""
    if fill is None:
        return [random(*size, dtype=dtype) for size in sizes(name)]
    return [torch.full(size, fill, dtype=dtype, device=DEVICE) for size in sizes(name)]


def nbytes(*lists: list[torch.Tensor]) -> int:
    return sum(t.nbytes for tensors in lists for t in tensors)


def our_steps(params, grads, moments, masters=(), scales=()) -> dict:
    """The raw op: the optimizer's Python, the same for every backend, is not timed."""
    numbers = [LR, *BETAS, EPS, DECAY, float(STEP)]
    counts = torch.tensor([p.numel() for p in params])
    groups, firsts = [0] * len(params), (counts.cumsum(0) - counts).tolist()
    lists = [params, grads, *moments, list(masters), list(scales)]
    return ours(lambda ops: ops.adamw_(*lists, groups, numbers, None, None, None, 0, firsts))


def torch_step(params, grads, moments, kind: str, weights=()):
    """torch's AdamW, on the tensors that ours has where they fit; `weights` are the bf16 copies of fp32 params."""
    place = "cpu" if kind == "foreach" else DEVICE  # where torch.optim keeps the step's number
    steps = [torch.full((), float(STEP), device=place) for _ in params]
    options = {"lr": LR, "beta1": BETAS[0], "beta2": BETAS[1], "weight_decay": DECAY, "eps": EPS}
    options |= {"amsgrad": False, "maximize": False, kind: True}
    step = partial(torch_adamw, params, grads, *moments, [], steps, **options)

    def with_copies():
        step()
        torch._foreach_copy_(weights, params)

    return with_copies if weights else step


def in_fp32(name: str, grads):
    """28 bytes a parameter: weight and moments read and written, the gradient read."""
    params = tensors(name, torch.float32)
    moments = [tensors(name, torch.float32, 0) for _ in range(2)]
    peers = {
        f"eager:{kind}": partial(torch_step, params, grads, moments, kind) for kind in ("foreach", "fused")
    }
    return 2 * nbytes(params, *moments), our_steps(params, grads, moments) | peers


def with_masters(name: str, grads):
    """30 bytes: master and moments read and written, the weight written, the gradient read."""
    masters = tensors(name, torch.float32)
    params, moments = [m.bfloat16() for m in masters], [tensors(name, torch.float32, 0) for _ in range(2)]
    peer = partial(torch_step, masters, grads, moments, "fused", params)
    moved = 2 * nbytes(masters, *moments) + nbytes(params)
    return moved, our_steps(params, grads, moments, masters) | {"eager:fused+copies": peer}


def lean(name: str, grads):
    """16 bytes: weight, its remainder and the moments of 8 bits read and written, the gradient read.

    The peer does the same to the weights, and keeps 12 bytes a parameter where this keeps 4.
    """
    params, remainders = tensors(name, torch.bfloat16), tensors(name, torch.int16, 0)
    moments = [tensors(name, torch.uint8, zero) for zero in (128, 0)]
    scales = [torch.zeros(adamw_forms.scales_shape(p.numel()), device=DEVICE) for p in params]

    def peer():
        wide = [tensors(name, torch.float32, 0) for _ in range(2)]
        return torch_step([p.float() for p in params], grads, wide, "fused", params)

    moved = 2 * nbytes(params, remainders, *moments, scales)
    return moved, our_steps(params, grads, moments, remainders, scales) | {"eager:fused+copies": peer}


FORMS = {"fp32": in_fp32, "masters": with_masters, "lean": lean}


@pytest.mark.gpu
@pytest.mark.parametrize("name", ("125m", "1b"))
@pytest.mark.parametrize("form", FORMS)
def test_forms(race, form, name):
    grads = tensors(name, torch.float32)
    moved, builders = FORMS[form](name, grads)
    dtype = torch.float32 if form == "fp32" else torch.bfloat16
    race(f"adamw_{form}", shape_of(name, grads), builders, moved=moved + nbytes(grads), dtype=dtype)


@pytest.mark.gpu
@pytest.mark.parametrize("name", ("125m", "1b"))
def test_grad_norm(race, name):
    """One read of the gradients; clip_grad_norm_ scales them too, which ours leaves to the step."""
    grads, params = tensors(name, torch.float32), tensors(name, torch.float32, 0)
    for param, grad in zip(params, grads):
        param.grad = grad
    builders = {
        **ours(lambda ops: ops.grad_norm(grads, 1.0)),
        "eager:get_total_norm": lambda: partial(torch.nn.utils.get_total_norm, grads, foreach=True),
        "eager:clip_grad_norm_": lambda: partial(torch.nn.utils.clip_grad_norm_, params, 1.0, foreach=True),
    }
    race("grad_norm", shape_of(name, grads), builders, moved=nbytes(grads), dtype=torch.float32)


def shape_of(name: str, params: list[torch.Tensor]) -> dict:
    return {"preset": name, "parameters": sum(p.numel() for p in params), "tensors": len(params)}
