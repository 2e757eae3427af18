"""A step of openllama.optim.AdamW on a small Llama's tensors, beside torch.optim.AdamW.

bf16: ours has fp32 masters and moments; torch's bf16 run has neither, so that its step is a rougher one of less memory.
`torch:masters` is torch's fused AdamW on fp32 masters, with gradients cast up and weights cast down around it.
"""

import pytest
import torch

from openllama.optim import AdamW


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

    options = {"lr": 1e-4, "betas": (0.9, 0.95), "weight_decay": 0.1}
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
