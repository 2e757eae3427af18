"""The step's clipping, whatever the optimizer is, and runs with leaner optimizer state."""

import pytest
import torch

from openllama.config import from_dict
from openllama.model import Llama
from openllama.optim import AdamW, decay_groups
from openllama.training import checkpoint
from openllama.training.config import TrainConfig
from openllama.training.loop import Trainer
from openllama.training.step import batch_loss, train_step

from .test_resume import equal, stable

LEAN = {"dtype": "bfloat16", "moments": "8bit", "masters": "remainder"}


@pytest.mark.parametrize("clip", (0.05, 1e6))
def test_the_step_clips_for_every_optimizer(settings, clip):
    """Ours, ours with its numbers on the device, and torch's, which gets clipped gradients: the same norms and weights."""
    trainer = Trainer(settings(valid_shards=None))
    steps = [[next(trainer.loader) for _ in range(2)] for _ in range(3)]
    results = []
    for cls, options in (
        (torch.optim.AdamW, {"betas": (0.9, 0.95)}),
        (AdamW, {}),
        (AdamW, {"capturable": True}),
    ):
        model = Llama(trainer.model.config).initialise(3)
        optimizer = cls(decay_groups(model, 0.1), lr=1.0, eps=1e-4, **options)
        norms = []
        for i, batches in enumerate(steps):
            targets = sum(b.targets for b in batches)
            norms.append(train_step(model, optimizer, batches, targets, 1e-3 * (i + 1), clip).grad_norm)
            assert all(p.grad is None for p in model.parameters())
        results.append((torch.stack(norms), list(model.parameters())))
    for norms, params in results[1:]:
        torch.testing.assert_close(norms, results[0][0], rtol=1e-4, atol=0)
        for ours, theirs in zip(params, results[0][1]):
            torch.testing.assert_close(ours, theirs, rtol=0, atol=2e-5)
    assert (results[0][0] > 0.05).all(), "the smaller clip must clip"


def test_the_norm_is_that_before_clipping(settings):
    trainer = Trainer(settings(valid_shards=None))
    batch = next(trainer.loader)
    model, twin = (Llama(trainer.model.config).initialise(3) for _ in range(2))
    (batch_loss(twin, batch, torch.device("cpu")) / batch.targets).backward()
    exact = torch.cat([p.grad.double().flatten() for p in twin.parameters()]).norm()
    result = train_step(model, AdamW(model.parameters()), [batch], batch.targets, 1e-3, 1e-3)
    assert result.grad_norm.item() == pytest.approx(exact.item(), rel=1e-5)


@pytest.mark.parametrize(
    "form", (LEAN, {**LEAN, "moments": "bf16", "masters": "none"}, {"moments": "8bit"}), ids=str
)
def test_a_run_with_leaner_state_resumes_bit_for_bit(settings, tmp_path, form, capsys):
    whole, parted = (settings(out=str(tmp_path / name), **form) for name in ("whole", "parted"))
    assert Trainer(whole).run() == 0
    first = Trainer(parted)
    while first.step < 4:
        first.train_step()
    first._save()
    second = Trainer(parted)
    assert second.step == 4 and second.run() == 0
    equal(*(checkpoint.step_folder(tmp_path / run / "checkpoints", 6) for run in ("whole", "parted")))
    assert stable(tmp_path / "whole")[-1]["step"] == 6
    size = second.optimizer.state_bytes()
    assert (
        f"AdamW: {size:.2f} bytes a parameter, with it: moments {form['moments']}" in capsys.readouterr().out
    )
    assert form is not LEAN or 6 < size < 6.3  # a small net has blocks that are not full


def test_a_checkpoint_with_other_state_is_refused(settings):
    assert Trainer(settings(steps=2, **LEAN)).run() == 0
    for change in ({"moments": "bf16"}, {"masters": "fp32"}, {"masters": "none"}):
        with pytest.raises(
            ValueError, match="resume with the model, dtype, moments and masters it was made with"
        ):
            Trainer(settings(steps=4, **{**LEAN, **change}))


def test_an_unknown_form_is_named(settings):
    for key, value in (("moments", "4bit"), ("masters", "bf16")):
        with pytest.raises(ValueError, match=f"{key}: got '{value}'"):
            from_dict(TrainConfig, {**vars(settings()), key: value}, "settings")
