"""rms_norm with and without the residual add, beside transformers' LlamaRMSNorm, F.rms_norm, Liger and quack."""

from functools import partial

import pytest
import torch

from benchmarks.ops.implementations import ours
from benchmarks.ops.timing import random
from benchmarks.peers import eager, liger, quack
from openllama.ops import rms_norm

EPS = eager.EPS
SHAPES = ((16_384, 2048), (16_384, 4096), (16_384, 5120), (16_384, 8192), (2048, 4096), (65_536, 4096))


@pytest.mark.parametrize("hidden", (256, 768, 2048))
def test_rms_norm(versus, device, dtype, hidden, tokens=2048):
    x, residual, dy, dh = torch.randn(4, tokens, hidden, device=device).to(dtype)
    weight = torch.ones(hidden, dtype=dtype, device=device)
    leaves = [t.requires_grad_() for t in (x, residual, weight)]

    def step(function):
        return lambda: torch.autograd.grad(function(*leaves), leaves, (dy, dh))

    shape = {"tokens": tokens, "hidden": hidden, "dtype": str(dtype)[6:]}
    moved = 8 * x.numel() * x.element_size()  # forward: x, residual, y, h; backward: dy, dh, h, dx
    steps = {
        "ours": step(lambda x, residual, weight: rms_norm(x, weight, EPS, residual)),
        "eager:hf": step(eager.hf_add_rms_norm),
        "eager:F.rms_norm": step(eager.add_rms_norm),
    }
    versus("rms_norm_fwd_bwd", shape, moved, steps)


@pytest.mark.gpu
@pytest.mark.parametrize("tokens, hidden", SHAPES)
def test_fwd(race, tokens, hidden):
    x, weight = random(tokens, hidden), random(hidden)
    builders = {
        **ours(lambda ops: ops.rms_norm_fwd(x, None, weight, EPS)),
        "eager:F.rms_norm": partial(eager.forward, eager.rms_norm, x, weight),
        "eager:hf": partial(eager.forward, eager.hf_rms_norm, x, weight),
        "compile": partial(eager.forward_compiled, eager.rms_norm, x, weight),
        "liger": partial(liger.rms_norm_fwd, x, weight),
        "quack": partial(quack.rms_norm_fwd, x, None, weight),
    }
    race("rms_norm_fwd", {"tokens": tokens, "hidden": hidden}, builders, moved=2 * x.nbytes + weight.nbytes)


@pytest.mark.gpu
@pytest.mark.parametrize("tokens, hidden", SHAPES)
def test_residual_fwd(race, tokens, hidden):
    x, residual, weight = random(tokens, hidden), random(tokens, hidden), random(hidden)
    inputs = (x, residual, weight)
    builders = {
        **ours(lambda ops: ops.rms_norm_fwd(x, residual, weight, EPS)),
        "eager:F.rms_norm": partial(eager.forward, eager.add_rms_norm, *inputs),
        "eager:hf": partial(eager.forward, eager.hf_add_rms_norm, *inputs),
        "compile": partial(eager.forward_compiled, eager.add_rms_norm, *inputs),
        "liger": partial(liger.add_rms_norm_fwd, *inputs),
        "quack": partial(quack.rms_norm_fwd, *inputs),
    }
    shape = {"tokens": tokens, "hidden": hidden}
    race("rms_norm_residual_fwd", shape, builders, moved=4 * x.nbytes + weight.nbytes)


@pytest.mark.gpu
@pytest.mark.parametrize("tokens, hidden", SHAPES)
def test_bwd(race, tokens, hidden):
    x, weight, dy = random(tokens, hidden), random(hidden), random(tokens, hidden)
    rstd = x.float().square().mean(-1).add(EPS).rsqrt()
    overwritten = dy.clone()
    builders = {
        **ours(lambda ops: ops.rms_norm_bwd(dy, None, x, weight, rstd, True, True)),
        "eager:F.rms_norm": partial(eager.backward, eager.rms_norm, (x, weight), (dy,)),
        "eager:hf": partial(eager.backward, eager.hf_rms_norm, (x, weight), (dy,)),
        "compile": partial(eager.backward_compiled, eager.rms_norm, (x, weight), (dy,)),
        "liger": partial(liger.rms_norm_bwd, overwritten, x, weight),
        "quack": partial(quack.rms_norm_bwd, dy, None, x, None, weight),
    }
    shape, prepare = {"tokens": tokens, "hidden": hidden}, partial(overwritten.copy_, dy)
    race("rms_norm_bwd", shape, builders, moved=3 * x.nbytes + weight.nbytes, prepare=prepare)


@pytest.mark.gpu
@pytest.mark.parametrize("tokens, hidden", SHAPES)
def test_residual_bwd(race, tokens, hidden):
    x, residual, dy, dh = (random(tokens, hidden) for _ in range(4))
    weight, h = random(hidden), x + residual
    rstd = h.float().square().mean(-1).add(EPS).rsqrt()
    inputs = (x, residual, weight)
    builders = {
        **ours(lambda ops: ops.rms_norm_bwd(dy, dh, h, weight, rstd, True, True)),
        "eager:F.rms_norm": partial(eager.backward, eager.add_rms_norm, inputs, (dy, dh)),
        "eager:hf": partial(eager.backward, eager.hf_add_rms_norm, inputs, (dy, dh)),
        "compile": partial(eager.backward_compiled, eager.add_rms_norm, inputs, (dy, dh)),
        "liger": partial(liger.add_rms_norm_bwd, dy, dh, *inputs),
        "quack": partial(quack.rms_norm_bwd, dy, dh, *inputs),
    }
    shape = {"tokens": tokens, "hidden": hidden}
    race("rms_norm_residual_bwd", shape, builders, moved=4 * x.nbytes + weight.nbytes)
