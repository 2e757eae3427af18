"""AdamW as a torch.optim.Optimizer over `ops.adamw`: one call a step for all parameters of a dtype."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Any, Literal, get_args

import torch

from openllama.kernels.adamw_forms import (
    NEAREST,
    decode_moment,
    encode_moment,
    join_master,
    scales_shape,
    split_master,
)
from openllama.ops import adamw

Moments = Literal["fp32", "bf16", "8bit"]
Masters = Literal["fp32", "remainder", "none"]

_MOMENTS = {"fp32": torch.float32, "bf16": torch.bfloat16, "8bit": torch.uint8}
_ENTRIES = ("step", "exp_avg", "exp_avg_sq", "scales", "master", "remainder")
_OPTIONS = ("moments", "masters", "seed", "capturable")


class AdamW(torch.optim.Optimizer):
    """AdamW whose state takes 4.03 to 14 bytes a bf16 parameter, with the parameter itself.

    A master is the truth, and its parameter follows it: set weights from outside before the first step, or clear the
    state (`optimizer.state.clear()`) after it, or the next step undoes that.

    State of a parameter: `step` (a tensor of one fp32 number), `exp_avg`, `exp_avg_sq` and, as the options say,
    `scales` (of 8-bit moments), `master` or `remainder`. State dicts carry all of it, bit for bit.

    bytes a bf16 parameter, with it | masters="fp32" | "remainder" | "none"
    moments="fp32"                  | 14             | 12          | 10
    moments="bf16"                  | 10             | 8           | 6
    moments="8bit"                  | 8.03           | 6.03        | 4.03

    Args:
        params: plain tensors (not DTensors): fp32, bf16, fp16, fp64.
        lr: a number; for `capturable` a tensor too, see there.
        moments: "fp32"; "bf16", rounded stochastically; or "8bit", likewise, with a scale for each 256 elements. fp64
            parameters have fp64 moments whatever is said.
        masters: of bf16 parameters: "fp32"; "remainder": the 16 low bits of the master, whose upper ones are the
            parameter, which is as exact (the parameter is the master rounded to the nearest, ties away from zero); or
            "none": the parameter is rounded stochastically. fp16 parameters always have an fp32 master.
        seed: of stochastic rounding, 0 to below 2^32. An element's bits depend on it, on the step, and on the element's
            number among all parameters in the order of the groups: so not on its dtype, device, or who has a gradient.
        capturable: numbers that change from step to step live on the device, and a step can be captured in a CUDA graph
            once one has been done outside. Every group counts its steps: a parameter that gets its first gradient late
            starts at its group's count. `group["lr"]` is a tensor of one fp32 number there from the first step on:
            change it for a graph's replays with `group["lr"].fill_(lr)`, as torch's schedulers do. All on one device.
    """

    def __init__(
        self,
        params: Iterable[torch.nn.Parameter] | Iterable[dict[str, Any]],
        lr: float | torch.Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
        weight_decay: float = 0.1,
        *,
        moments: Moments = "fp32",
        masters: Masters = "fp32",
        seed: int = 0,
        capturable: bool = False,
    ):
        for name, value, choices in (("moments", moments, Moments), ("masters", masters, Masters)):
            if value not in get_args(choices):
                raise ValueError(f"{name}: got {value!r}, takes one of {', '.join(get_args(choices))}")
        if not isinstance(seed, int) or not 0 <= seed < 2**32:
            raise ValueError(f"seed: got {seed!r}, takes a whole number from 0 to below 2^32")
        self.moments, self.masters, self.seed, self.capturable = moments, masters, seed, capturable
        self._counts: torch.Tensor | None = None  # steps done, of each parameter or (capturable) each group
        self._views: list[torch.Tensor] = []  # each of them: what `step` of the states is
        numbers = {"lr": lr, "betas": tuple(betas), "eps": eps, "weight_decay": weight_decay}
        self._check(numbers)
        super().__init__(params, numbers)

    # ------------------------------------------------------------ a step

    @torch.no_grad()
    def step(
        self, closure: Callable[[], float] | None = None, *, grad_scale: torch.Tensor | None = None
    ) -> float | None:
        """One update of every parameter that has a gradient.

        `grad_scale`, one fp32 number on the parameters' device, multiplies the gradients as they are read: what clips
        them (`kernels.grad_norm`) or unscales them. The gradients themselves stay as they are.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:  # all before the first is stepped
            self._check(group)
        buckets = self._buckets()
        if grad_scale is not None and any(bucket[0][0].device != grad_scale.device for bucket in buckets):
            raise ValueError(f"grad_scale: got a tensor on {grad_scale.device}, takes the parameters' device")
        for bucket in buckets:
            self._step(bucket, grad_scale)
        if self.capturable and buckets:
            groups = {entry[3] for bucket in buckets for entry in bucket}
            torch._foreach_add_([self._views[i] for i in groups], 1)  # type: ignore[attr-defined]
        return loss

    def _check(self, group: dict[str, Any]) -> None:
        for name in ("lr", "eps", "weight_decay"):
            if self.capturable and isinstance(group[name], torch.Tensor):
                continue  # reading it would wait for the device
            if not 0 <= group[name] < float("inf"):
                raise ValueError(f"{name}: got {group[name]}, takes a finite number of at least 0")
        betas = group["betas"]
        if len(betas) != 2 or not all(0 <= beta < 1 for beta in betas):
            raise ValueError(f"betas: got {betas}, takes two numbers from 0 up to, but not, 1")

    def _buckets(self) -> list[list[tuple]]:
        """What one call of the op takes together, of one dtype on one device: (parameter, gradient, state, number of
        its group, number of its first element, number of its step count)."""
        buckets = defaultdict(list)
        views = self._step_views()
        first = number = 0
        for index, group in enumerate(self.param_groups):
            for p in group["params"]:
                if (grad := p.grad) is not None:
                    if grad.is_sparse:
                        raise TypeError(
                            "grad: got a sparse gradient, takes a dense one (nn.Embedding(sparse=False))"
                        )
                    state = self.state[p]
                    place = index if self.capturable else number
                    if not state:
                        if not self.capturable or not any(map(self.state.get, group["params"])):
                            views[place].zero_()  # state that was cleared starts anew
                        self._start(p, state, views[place])
                    elif state["step"] is not views[place]:  # it was loaded, or put there by hand
                        views[place].copy_(state["step"])
                        state["step"] = views[place]
                    buckets[p.dtype, p.device].append((p, grad, state, index, first, place))
                first += p.numel()
                number += 1
        return list(buckets.values())

    def _step_views(self) -> list[torch.Tensor]:
        """Step counts, in one tensor: a small model's step is shorter than to read and raise hundreds of tensors."""
        params = [p for group in self.param_groups for p in group["params"]]
        size = len(self.param_groups) if self.capturable else len(params)
        if len(self._views) != size:
            device = params[0].device if self.capturable else torch.device("cpu")
            if self.capturable and (others := {p.device for p in params} - {device}):
                raise ValueError(
                    f"capturable: got parameters on {device} and {others.pop()}, takes one device"
                )
            self._counts = torch.zeros(size, dtype=torch.float32, device=device)
            self._views = list(self._counts.unbind())
        return self._views

    def _start(self, p: torch.Tensor, state: dict[str, Any], step: torch.Tensor) -> None:
        if p.dtype not in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
            raise TypeError(f"params: got a {p.dtype} parameter, takes float32, bfloat16, float16 or float64")
        if hasattr(p, "to_local"):
            raise TypeError("params: got a DTensor, takes plain tensors (one device, or DDP)")
        if not p.is_contiguous():
            raise ValueError(f"params: got a parameter with strides {p.stride()}, takes contiguous ones")
        for name, (shape, dtype) in self.layout(p).items():
            state[name] = torch.zeros(shape, dtype=dtype, device=p.device) if name != "step" else step
        if state["exp_avg"].dtype == torch.uint8:
            state["exp_avg"].fill_(128)  # the code of 0
        if "master" in state:
            state["master"].copy_(p)

    def _step(self, bucket: list[tuple], grad_scale: torch.Tensor | None) -> None:
        assert self._counts is not None
        params, grads, states, groups, firsts, places = (list(column) for column in zip(*bucket))
        numbers = self.param_groups
        if self.capturable:
            step: Any = self._counts + 1
            lr: Any = torch.stack([self._device_lr(group, step.device) for group in numbers])
        else:
            counts = self._counts.tolist()
            rows: dict[tuple[int, int], int] = {}  # of what shares numbers: group and step
            keys = [(group, int(counts[place]) + 1) for group, place in zip(groups, places)]
            groups = [rows.setdefault(key, len(rows)) for key in keys]
            numbers, step = [self.param_groups[group] for group, _ in rows], [step for _, step in rows]
            lr = [float(group["lr"]) for group in numbers]
        entries = {name: [s[name] for s in states if name in s] for name in _ENTRIES}
        adamw(
            params,
            grads,
            entries["exp_avg"],
            entries["exp_avg_sq"],
            entries["master"] or entries["remainder"],
            entries["scales"],
            lr=lr,
            beta1=[group["betas"][0] for group in numbers],
            beta2=[group["betas"][1] for group in numbers],
            eps=[group["eps"] for group in numbers],
            weight_decay=[group["weight_decay"] for group in numbers],
            step=step,
            groups=groups,
            grad_scale=grad_scale,
            seed=self.seed,
            firsts=firsts,
        )
        if not self.capturable:  # after the op, which raises before it writes
            if len(places) == len(self._counts):
                self._counts += 1
            else:
                self._counts[places] += 1

    @staticmethod
    def _device_lr(group: dict[str, Any], device: torch.device) -> torch.Tensor:
        """The group's learning rate, where a graph can read it."""
        lr = group["lr"]
        if not isinstance(lr, torch.Tensor):
            group["lr"] = lr = torch.full((), lr, dtype=torch.float32, device=device)
        elif lr.device != device or lr.dtype != torch.float32 or lr.dim():
            group["lr"] = lr = lr.to(device, torch.float32).reshape(())
        return lr

    # ------------------------------------------------------------ state

    def layout(self, p: torch.Tensor) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """Shape and dtype of each tensor in the state of `p`."""
        shape = tuple(p.shape)
        moment = torch.float64 if p.dtype == torch.float64 else _MOMENTS[self.moments]
        found = {
            "step": ((), torch.float32),
            "exp_avg": (shape, moment),
            "exp_avg_sq": (shape, moment),
        }
        if moment == torch.uint8:
            found["scales"] = (scales_shape(p.numel()), torch.float32)
        if p.dtype == torch.float16 or (p.dtype == torch.bfloat16 and self.masters == "fp32"):
            found["master"] = (shape, torch.float32)
        elif p.dtype == torch.bfloat16 and self.masters == "remainder":
            found["remainder"] = (shape, torch.int16)
        return found

    def state_bytes(self) -> float:
        """Bytes a parameter of weights, masters and moments together, whether the state is there yet or not."""
        params = [p for group in self.param_groups for p in group["params"]]
        tensors = [entry for p in params for name, entry in self.layout(p).items() if name != "step"]
        state = sum(torch.Size(shape).numel() * dtype.itemsize for shape, dtype in tensors)
        return (state + sum(p.nbytes for p in params)) / max(1, sum(p.numel() for p in params))

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads a state dict, bit for bit; put the parameters themselves back first. The options stay this optimizer's.

        State of another form, or of torch.optim.AdamW, is converted. Moments are rounded to the nearest. Masters in fp32
        and remainders become each other exactly; for remainders, parameters are set to their masters, rounded: ties may
        change. Where the state has neither, a master starts from the parameter; where this optimizer has none, it is
        dropped.

        Raises:
            ValueError: other groups, or state that can't be converted; nothing is changed then.
        """
        sizes = [
            [len(g["params"]) for g in groups] for groups in (state_dict["param_groups"], self.param_groups)
        ]
        new = {}
        if sizes[0] == sizes[1]:  # else super() raises
            for saved, group in zip(state_dict["param_groups"], self.param_groups):
                own = zip(saved["params"], group["params"])
                found = {p: (key, state_dict["state"][key]) for key, p in own if state_dict["state"].get(key)}
                _check_group(saved)
                for p, (key, state) in found.items():
                    _check_saved(f"state of parameter {key}", p, state)
                self._check_steps(saved["params"], [state["step"] for _, state in found.values()])
                for p, (key, state) in found.items():
                    new[p] = self.converted(p, state, f"state of parameter {key}")
        super().load_state_dict({**state_dict, "state": {}})
        for p, (state, weight) in new.items():
            self.state[p] = state
            if weight is not None:
                p.detach().copy_(weight)
        for group in self.param_groups:
            if not self.capturable:
                group["lr"] = float(group["lr"])

    def _check_steps(self, keys, steps) -> None:
        if self.capturable and len(found := sorted({int(step) for step in steps})) > 1:
            raise ValueError(
                f"state of parameters {keys[0]} to {keys[-1]}: got the steps {', '.join(map(str, found))}, takes one "
                "step for each group where capturable=True"
            )

    @torch.no_grad()
    def converted(
        self, p: torch.Tensor, saved: dict[str, Any], name: str = "state"
    ) -> tuple[dict[str, torch.Tensor], torch.Tensor | None]:
        """A copy of the saved state of `p` in this optimizer's form, on its device, and the value that `p` itself has to
        take, or None. `name` is for errors."""
        _check_saved(name, p, saved)
        layout = self.layout(p)
        saved = {
            key: torch.as_tensor(t).detach().to("cpu" if key == "step" else p.device)
            for key, t in saved.items()
        }
        new: dict[str, torch.Tensor] = {"step": saved["step"].to(torch.float32, copy=True).reshape(())}
        scales = []
        for row, key in enumerate(("exp_avg", "exp_avg_sq")):
            old, dtype = saved[key], layout[key][1]
            own_scales = saved["scales"][row] if "scales" in saved else None
            if old.dtype == dtype:
                new[key] = old.clone(memory_format=torch.contiguous_format)
            else:
                x = decode_moment(old.reshape(-1), own_scales, row == 1)
                x, own_scales = encode_moment(x, dtype, row == 1, NEAREST)
                new[key] = x.to(dtype, copy=True).view(p.shape)
            scales.append(own_scales)
        if "scales" in layout:
            new["scales"] = torch.stack(scales)
        return self._with_master(p, saved, layout, new)

    @staticmethod
    def _with_master(p, saved, layout, new) -> tuple[dict[str, torch.Tensor], torch.Tensor | None]:
        if "remainder" in saved and "remainder" in layout:
            return {**new, "remainder": saved["remainder"].clone(memory_format=torch.contiguous_format)}, None
        master = saved.get("master", p.detach()).float()
        if "remainder" in saved:
            master = join_master(p.detach(), saved["remainder"])
        if "master" in layout:
            return {**new, "master": master.clone(memory_format=torch.contiguous_format)}, None
        if "remainder" in layout:
            weight, remainder = split_master(master.contiguous())
            return {**new, "remainder": remainder}, weight if "master" in saved else None
        return new, None

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), **{name: getattr(self, name) for name in _OPTIONS}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._counts, self._views = None, []


def _check_group(saved: dict[str, Any]) -> None:
    """Raises ValueError for a saved group of another kind of optimizer."""
    for key in ("lr", "betas", "eps", "weight_decay"):
        if key not in saved:
            raise ValueError(f"param_groups: got no {key!r}, takes AdamW's lr, betas, eps and weight_decay")
    for key in ("maximize", "amsgrad"):
        if saved.get(key):
            raise ValueError(f"param_groups: got {key}=True, takes AdamW without it")


def _check_saved(name: str, p: torch.Tensor, saved: dict[str, Any]) -> None:
    """Raises ValueError naming what of a parameter's saved state can't be its own."""
    for key in saved:
        if key not in _ENTRIES:
            raise ValueError(f"{name}: got {key!r}, takes {', '.join(_ENTRIES)}")
    moments = [getattr(saved.get(key), "dtype", None) for key in ("exp_avg", "exp_avg_sq")]
    needs = ["step", "exp_avg", "exp_avg_sq", *(["scales"] if torch.uint8 in moments else [])]
    for key in needs:
        if key not in saved:
            raise ValueError(f"{name}: got no {key!r}, takes {', '.join(needs)}")
    floats = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
    dtypes = {"exp_avg": (*floats, torch.uint8), "scales": (torch.float32,), "remainder": (torch.int16,)}
    dtypes |= {"exp_avg_sq": dtypes["exp_avg"], "master": floats}
    for key, takes in dtypes.items():
        if key not in saved:
            continue
        shape = scales_shape(p.numel()) if key == "scales" else tuple(p.shape)
        if tuple(saved[key].shape) != shape:
            raise ValueError(f"{name}: {key}: got shape {tuple(saved[key].shape)}, takes {shape}")
        if saved[key].dtype not in takes:
            raise ValueError(f"{name}: {key}: got {saved[key].dtype}, takes {', '.join(map(str, takes))}")
    owners = {"master": (torch.bfloat16, torch.float16), "remainder": (torch.bfloat16,)}
    for key, takes in owners.items():
        if key in saved and p.dtype not in takes:
            raise ValueError(
                f"{name}: got a {key}, of a {' or '.join(map(str, takes))} parameter; takes none for {p.dtype}"
            )


def decay_groups(model: torch.nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Two parameter groups: matrices, which decay, and norms and biases, which don't."""
    params = [p for p in model.parameters() if p.requires_grad]
    return [
        {"params": [p for p in params if p.dim() >= 2], "weight_decay": weight_decay},
        {"params": [p for p in params if p.dim() < 2], "weight_decay": 0.0},
    ]
