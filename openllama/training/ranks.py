"""The processes of a run, and the few numbers they tell each other each step."""

from __future__ import annotations

import datetime
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils import DistributedType

TIMEOUT = datetime.timedelta(hours=12)  # the others wait while one process tokenises a large corpus, or saves
_SUPPORTED = (DistributedType.NO, DistributedType.MULTI_GPU, DistributedType.MULTI_CPU)


class Ranks:
    """Sums and agreements over all processes, on the hosts (gloo): no process waits for its GPU.

    Raises ValueError for an engine that this project does not drive yet (FSDP, DeepSpeed, ...).
    """

    def __init__(self, accelerator: Accelerator):
        if accelerator.distributed_type not in _SUPPORTED:
            raise ValueError(
                f"accelerate: got {accelerator.distributed_type}, takes one process or data parallelism (DDP); "
                "choose that in `accelerate config`"
            )
        self.rank, self.world = accelerator.process_index, accelerator.num_processes
        self.is_main = self.rank == 0
        self._group = dist.new_group(backend="gloo", timeout=TIMEOUT) if self.world > 1 else None

    def sum(self, *values: float) -> list[float]:
        """The sum of each value over all processes."""
        if self.world == 1:
            return [float(v) for v in values]
        total = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(total, group=self._group)
        return total.tolist()

    def gather(self, value: Any) -> list[Any]:
        """Every process's value, in rank order."""
        if self.world == 1:
            return [value]
        values: list[Any] = [None] * self.world
        dist.all_gather_object(values, value, group=self._group)
        return values

    def wait(self) -> None:
        """Returns when every process has come here."""
        self.sum(0)
