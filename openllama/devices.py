"""Facts about cards, in one place."""

from __future__ import annotations

import re

import torch

# Dense bf16 tensor-core peaks in FLOP/s, from NVIDIA's datasheets (the figures without sparsity). The first entry
# whose words are all in the device's name decides, so narrower ones stand first.
_PEAK_BF16 = {
    "B200": 2250e12,
    "H200 NVL": 835e12,
    "H200": 989e12,
    "GH200": 989e12,
    "H100 NVL": 835e12,
    "H100 PCIe": 756e12,
    "H100": 989e12,
    "A100": 312e12,
    "L40S": 362e12,
    "A10G": 70e12,
    "RTX 4090": 165e12,
    "RTX 3090": 71e12,
}
# Words that make another card, or a slice of one.
_VARIANTS = {"Ti", "D", "SUPER", "Laptop", "Max", "MIG", "GRID"}


def name(device: torch.device) -> str:
    """What the device is called, e.g. `NVIDIA H100 80GB HBM3`; a CPU is named with its thread count."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"CPU, {torch.get_num_threads()} threads"


def peak_flops(device: torch.device, dtype: torch.dtype) -> float | None:
    """The card's dense peak in FLOP/s at `dtype`; None where it isn't known, so that no other card's is used."""
    if device.type != "cuda" or dtype not in (torch.bfloat16, torch.float16):
        return None
    words = set(re.split(r"[\s-]+", torch.cuda.get_device_name(device)))
    if words & _VARIANTS:
        return None
    return next((peak for card, peak in _PEAK_BF16.items() if words.issuperset(card.split())), None)


def peak_memory_gib(device: torch.device) -> float:
    """The most memory this process has held, in GiB: allocated on a GPU, resident on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # Linux gives KiB
