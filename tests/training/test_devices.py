"""Peaks of cards by the names that they give themselves."""

import pytest
import torch

from openllama import devices


@pytest.mark.parametrize(
    "card, tera",
    [
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA H100 NVL", 835),
        ("NVIDIA H200", 989),
        ("NVIDIA GH200 480GB", 989),
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA A100-PCIE-40GB", 312),
        ("GRID A100-10C", None),
        ("NVIDIA GeForce RTX 4090", 165),
        ("NVIDIA GB200", None),
        ("NVIDIA GeForce RTX 4090 D", None),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
        ("NVIDIA GeForce RTX 3090 Ti", None),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None),
        ("NVIDIA H20", None),
    ],
)
def test_an_unknown_card_has_no_peak(monkeypatch, card, tera):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: card)
    peak = devices.peak_flops(torch.device("cuda"), torch.bfloat16)
    assert peak == (tera and tera * 1e12)
