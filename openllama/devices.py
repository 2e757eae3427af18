"""Facts about cards, in one place."""

from __future__ import annotations

import torch

# Dense bf16 tensor-core peaks in FLOP/s, from NVIDIA's datasheets (the figures without sparsity). The first name that
# the device's name contains decides, so narrower names stand first.
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


def name(device: torch.device) -> str:
    """What the device is called, e.g. `NVIDIA H100 80GB HBM3`; a CPU is named with its thread count."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"CPU, {torch.get_num_threads()} threads"


def peak_flops(device: torch.device, dtype: torch.dtype) -> float | None:
    """The card's dense peak in FLOP/s at `dtype`; None where it isn't known, so that no other card's is used."""
    if device.type != "cuda" or dtype not in (torch.bfloat16, torch.float16):
        return None
    card = torch.cuda.get_device_name(device)
    return next((peak for key, peak in _PEAK_BF16.items() if key in card), None)


def peak_memory_gib(device: torch.device) -> float:
    """The most memory this process has held, in GiB: allocated on a GPU, resident on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # Linux gives KiB
