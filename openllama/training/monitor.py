"""What a run shows: a progress bar, step lines, metrics.jsonl, and its loss curve as a picture."""

from __future__ import annotations

import errno
import json
import sys
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

from openllama.files import file_written_aside


class Monitor:
    """Prints step lines above a progress bar and appends every record to `metrics.jsonl` (rank 0 only).

    Records of steps after `start`, left by a run that stopped after its last checkpoint, are dropped first.
    """

    def __init__(self, path: Path, start: int, total: int, quiet: bool = False):
        self.path, self.total, self.quiet = path, total, quiet
        self._began, self._first = time.monotonic(), start
        if quiet:
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        _keep_steps_until(path, start)
        path.touch()  # a folder that can't be written to is found now, not at the first record
        self._console = Console(width=None if sys.stdout.isatty() else 160, highlight=False)
        columns = (TextColumn("{task.description}"), BarColumn(None), MofNCompleteColumn())
        self._progress = Progress(*columns, console=self._console, disable=not sys.stdout.isatty())
        self._task = self._progress.add_task("training", total=total, completed=start)
        self._progress.start()

    def say(self, text: str) -> None:
        if not self.quiet:
            self._console.print(text, markup=False, soft_wrap=True)

    def step(self, record: dict[str, Any], mfu: str) -> None:
        """One step line; `record` goes to metrics.jsonl as it is."""
        if self.quiet:
            return
        self._append(record)
        self._progress.update(self._task, completed=record["step"])
        done = record["step"] - self._first
        left = (time.monotonic() - self._began) / max(1, done) * (self.total - record["step"])
        self.say(
            f"step {record['step']:>6}/{self.total}  loss {record['loss']:.4f}  grad norm {record['grad_norm']:.3f}  "
            f"lr {record['lr']:.2e}  {record['tokens_per_second_per_gpu']:,.0f} tokens/s/GPU  MFU {mfu}  "
            f"{record['memory_gib']:.2f} GiB  ETA {timedelta(seconds=round(left))}"
        )

    def valid(self, record: dict[str, Any]) -> None:
        if self.quiet:
            return
        self._append(record)
        self.say(
            f"step {record['step']:>6}  held-out loss {record['valid_loss']:.4f} nats/token, "
            f"{record['valid_bits_per_byte']:.3f} bits/byte"
        )

    def _append(self, record: dict[str, Any]) -> None:
        try:
            # opened for each record, so that after an error nothing is left to be written once more at the end
            with self.path.open("a") as file:
                file.write(json.dumps(record) + "\n")
        except OSError as e:
            remedy = (
                "free space" if e.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG) else "make it writable"
            )
            raise OSError(e.errno, f"{self.path}: {e.strerror}; {remedy}, run again") from None

    def close(self) -> None:
        if not self.quiet:
            self._progress.stop()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The records of a metrics.jsonl; a line cut off by a kill, or that is none of ours, is left out."""
    records = []
    for line in path.read_text(errors="replace").splitlines() if path.exists() else ():
        try:
            record = json.loads(line)
        except ValueError:
            continue
        if isinstance(record, dict) and isinstance(record.get("step"), int):
            records.append(record)
    return records


def _keep_steps_until(path: Path, step: int) -> None:
    if not path.exists():
        return
    kept = "".join(json.dumps(r) + "\n" for r in read_metrics(path) if r["step"] <= step)
    with file_written_aside(path) as file:
        file.write(kept.encode())


def plot_loss(metrics: Path, picture: Path, bigram_bits_per_byte: float | None = None) -> None:
    """Draws training loss, held-out bits per byte (with a bigram's, where given) and learning rate over steps."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    records = read_metrics(metrics)
    train = [r for r in records if "loss" in r]
    valid = [r for r in records if "valid_loss" in r]
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4), constrained_layout=True)
    left.plot([r["step"] for r in train], [r["loss"] for r in train], lw=1, label="training")
    left.plot([r["step"] for r in valid], [r["valid_loss"] for r in valid], "o-", ms=4, label="held out")
    left.set(xlabel="optimizer step", ylabel="loss, nats/token")
    rate = left.twinx()
    rate.plot([r["step"] for r in train], [r["lr"] for r in train], "k:", lw=0.8)
    rate.set_ylabel("learning rate (dotted)")
    left.legend()
    right.plot(
        [r["step"] for r in valid], [r["valid_bits_per_byte"] for r in valid], "o-", ms=4, label="this model"
    )
    if bigram_bits_per_byte is not None:
        right.axhline(bigram_bits_per_byte, color="tab:red", ls="--", label="bigram model of the same tokens")
    right.set(xlabel="optimizer step", ylabel="held out, bits/byte")
    right.legend()
    with file_written_aside(picture) as file:
        figure.savefig(file, dpi=130, format=picture.suffix[1:] or "png")
    plt.close(figure)
