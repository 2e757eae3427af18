"""The comparison that shows that speed costs no accuracy."""

import torch

from benchmarks import same_answer
from openllama.presets import preset

SHAPE = {"preset": "tiny", "batch": 2, "seq": 64, "steps": 3}


def test_bf16_is_compared_with_fp32_and_fp32_with_itself():
    cpu = torch.device("cpu")
    for low, most in ((torch.float32, 1e-4), (torch.bfloat16, 0.1)):
        made = {r["impl"]: r for r in same_answer.compare(preset("tiny"), cpu, low, SHAPE)}
        assert made.keys() == {"hf:sdpa", "ours"}
        for row in made.values():
            assert row["loss_gap_max"] <= most and row["grad_gap_max"] <= most
        assert made["hf:sdpa"]["grads_farther_than_hf"] == 0 and made["ours"]["grads"] == 4 * 6 + 2
    assert made["ours"]["loss_gap_max"] > 0 and "of 26" in same_answer.table(list(made.values()))


def test_batches_are_python_source():
    batches = same_answer.source_batches(2, 16, 3)
    assert len(batches) == 3 and all(b.ids.shape == (32,) for b in batches)
    text = bytes(batches[0].ids.tolist())
    assert text.decode().isprintable() or b"\n" in text
    assert torch.equal(batches[0].ids[1:], batches[0].labels[:-1])
