"""AdamW as a torch.optim.Optimizer over `ops.adamw`."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Any

import torch

from openllama.ops import adamw

#: Parameter dtypes that have an fp32 master.
HALVES = (torch.bfloat16, torch.float16)


def _wide(p: torch.Tensor) -> torch.dtype:
    return torch.float64 if p.dtype == torch.float64 else torch.float32


class AdamW(torch.optim.Optimizer):
    """AdamW with fp32 moments, and an fp32 master weight for each bf16 or fp16 parameter.

    State of a parameter: `step` (a tensor of one fp32 number), `exp_avg`, `exp_avg_sq` (fp32; fp64 for an fp64
    parameter) and, for bf16 and fp16 parameters, `master` (fp32). State dicts carry all of it, unrounded.
    """

    def __init__(
        self,
        params: Iterable[torch.nn.Parameter] | Iterable[dict[str, Any]],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
        weight_decay: float = 0.1,
    ):
        numbers = {"lr": lr, "betas": tuple(betas), "eps": eps, "weight_decay": weight_decay}
        self._check(numbers)
        super().__init__(params, numbers)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """One update of every parameter that has a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:  # all before the first is stepped
            self._check(group)
        for group, buckets in [(group, self._buckets(group)) for group in self.param_groups]:
            for (step, dtype, _), params in buckets.items():
                states = [self.state[p] for p in params]
                adamw(
                    params,
                    [p.grad for p in params if p.grad is not None],
                    [s["exp_avg"] for s in states],
                    [s["exp_avg_sq"] for s in states],
                    [s["master"] for s in states] if dtype in HALVES else [],
                    lr=float(group["lr"]),
                    beta1=group["betas"][0],
                    beta2=group["betas"][1],
                    eps=group["eps"],
                    weight_decay=group["weight_decay"],
                    step=step,
                )
                # after the op, which raises before it writes; one call, as a small model's step is short
                torch._foreach_add_([s["step"] for s in states], 1)  # type: ignore[attr-defined]
        return loss

    @staticmethod
    def _check(group: dict[str, Any]) -> None:
        for name in ("lr", "eps", "weight_decay"):
            if not 0 <= group[name] < float("inf"):
                raise ValueError(f"{name}: got {group[name]}, takes a finite number of at least 0")
        betas = group["betas"]
        if len(betas) != 2 or not all(0 <= beta < 1 for beta in betas):
            raise ValueError(f"betas: got {betas}, takes two numbers from 0 up to, but not, 1")

    def _buckets(self, group: dict[str, Any]) -> dict[tuple, list[torch.Tensor]]:
        """Parameters with a gradient by what one call of the op shares: step number, dtype, device."""
        buckets = defaultdict(list)
        for p in group["params"]:
            if p.grad is None:
                continue
            if p.dtype not in (torch.float32, torch.float64, *HALVES):
                raise TypeError(
                    f"params: got a {p.dtype} parameter, takes float32, bfloat16, float16 or float64"
                )
            if p.grad.is_sparse:
                raise TypeError("grad: got a sparse gradient, takes a dense one (nn.Embedding(sparse=False))")
            state = self.state[p]
            if not state:
                self._start(p, state)
            buckets[int(state["step"]) + 1, p.dtype, p.device].append(p)
        return buckets

    @staticmethod
    def _start(p: torch.Tensor, state: dict[str, Any]) -> None:
        state["step"] = torch.zeros((), dtype=torch.float32)
        state["exp_avg"] = torch.zeros_like(p, dtype=_wide(p), memory_format=torch.contiguous_format)
        state["exp_avg_sq"] = torch.zeros_like(state["exp_avg"])
        if p.dtype in HALVES:
            state["master"] = p.detach().to(torch.float32).contiguous()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads a state dict. torch casts state to the parameter's dtype on the way; ours stays fp32, bit for bit.

        State without masters, as torch's AdamW has, starts them from the parameters.
        """
        super().load_state_dict(state_dict)
        groups = zip(self.param_groups, state_dict["param_groups"])
        for p, key in ((p, k) for g, saved in groups for p, k in zip(g["params"], saved["params"])):
            for name, value in state_dict["state"].get(key, {}).items():
                device, dtype = ("cpu", torch.float32) if name == "step" else (p.device, _wide(p))
                self.state[p][name] = value.detach().to(device, dtype, copy=True)
            if p.dtype in HALVES and self.state.get(p):
                self.state[p].setdefault("master", p.detach().to(torch.float32).contiguous())


def decay_groups(model: torch.nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Two parameter groups: matrices, which decay, and norms and biases, which don't."""
    params = [p for p in model.parameters() if p.requires_grad]
    return [
        {"params": [p for p in params if p.dim() >= 2], "weight_decay": weight_decay},
        {"params": [p for p in params if p.dim() < 2], "weight_decay": 0.0},
    ]
