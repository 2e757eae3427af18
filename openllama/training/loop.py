"""Pre-training: from token shards to checkpoints, through Accelerate on any number of processes.

One optimizer step is `accumulation` micro-batches on each process (openllama/training/step.py); this is what stands
around it: setting up, resuming, validation, logs, checkpoints, signals.
"""

from __future__ import annotations

import dataclasses
import math
import time
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object

from openllama import devices
from openllama.data.cache import TokenCache, tokenize
from openllama.data.loader import PackedLoader
from openllama.kernels import backend
from openllama.model import Llama, flops_per_token
from openllama.optim import AdamW, decay_groups
from openllama.tokenizer import Tokenizer
from openllama.training import checkpoint
from openllama.training.config import TrainConfig
from openllama.training.faults import StopSignal
from openllama.training.monitor import Monitor
from openllama.training.step import (
    accumulate_in_fp32,
    batch_loss,
    squared_mean_length,
    sum_over_ranks,
    train_step,
)


class Trainer:
    """One run. `run()` trains to the last step, or until a signal, and returns the process's exit code."""

    def __init__(self, config: TrainConfig):
        self.config = config
        self.out = Path(config.out)
        self.checkpoints = self.out / "checkpoints"
        self.dtype = getattr(torch, config.dtype)
        trackers: Any = config.trackers or None
        self.accelerator = Accelerator(
            cpu=not torch.cuda.is_available(), log_with=trackers, project_dir=config.out if trackers else None
        )
        self.device, self.world = self.accelerator.device, self.accelerator.num_processes
        self.stop = StopSignal()
        self.tokenizer = Tokenizer(config.tokenizer)
        self.cache = self._tokens(config.shards, "train")
        self.valid_cache = self._tokens(config.valid_shards, "valid") if config.valid_shards else None
        self._build_model()
        self.loader = self._loader(self.cache)
        self.valid_loader = self._loader(self.valid_cache) if self.valid_cache else None
        self.step = 0
        self.tokens = 0  # real tokens learned from, all processes
        self._resume()

    # ------------------------------------------------------------ setting up

    def _tokens(self, shards: str, name: str) -> TokenCache:
        with self.accelerator.main_process_first():  # rank 0 tokenises, the others find the cache
            return tokenize(shards, self.tokenizer, self.out / "tokens" / name, progress=self._is_main)

    def _loader(self, cache: TokenCache) -> PackedLoader:
        c = self.config
        rank = self.accelerator.process_index
        return PackedLoader(cache, c.context, c.batch, c.seed, rank, self.world)

    def _build_model(self) -> None:
        shape = self.config.model_config()
        if self.tokenizer.vocab_size > shape.vocab_size:
            raise ValueError(
                f"{self.config.tokenizer}: its vocabulary of {self.tokenizer.vocab_size} is over the model's vocab_size="
                f"{shape.vocab_size}; set model.vocab_size={self.tokenizer.vocab_size} or train a smaller tokenizer"
            )
        torch.manual_seed(self.config.seed)
        self.model = Llama(shape).initialise(self.config.seed).to(self.device, self.dtype)
        c = self.config
        groups = decay_groups(self.model, c.weight_decay)
        self.optimizer = AdamW(groups, lr=c.lr, betas=(c.beta1, c.beta2), eps=c.eps)
        if self.world == 1:
            accumulate_in_fp32(self.model)
        self.engine = self.accelerator.prepare_model(self.model)

    def _resume(self) -> None:
        saved = checkpoint.steps(self.checkpoints)
        if not saved:
            return
        place = checkpoint.step_folder(self.checkpoints, saved[-1])
        state = checkpoint.read_state(place)
        if state["tokenizer"] != self.tokenizer.fingerprint:
            raise ValueError(
                f"{place}: made with the tokenizer {state['tokenizer'][:12]}, this run's {self.config.tokenizer} is "
                f"{self.tokenizer.fingerprint[:12]}; resume with its tokenizer.model, or choose another `out`"
            )
        self.loader.load_state_dict(state["loader"])
        checkpoint.load(place, self.model, self.optimizer, self.accelerator.process_index)
        self.step, self.tokens = state["step"], state["tokens"]

    @property
    def _is_main(self) -> bool:
        return self.accelerator.is_main_process

    # ------------------------------------------------------------ training

    def run(self) -> int:
        c = self.config
        self.monitor = Monitor(self.out / "metrics.jsonl", self.step, c.steps, quiet=not self._is_main)
        if c.trackers:
            self.accelerator.init_trackers("openllama", dataclasses.asdict(c))
        try:
            self._announce()
            if self.step >= c.steps:
                self.monitor.say(f"already at step {self.step} of {c.steps}: nothing left to train")
                return 0
            self._try_validation()
            return self._train()
        finally:
            self.monitor.close()
            if c.trackers:
                self.accelerator.end_training()

    def _train(self) -> int:
        c = self.config
        last_log = (self.tokens, time.perf_counter())
        while self.step < c.steps:
            statistics = self.train_step()
            if self.step % c.log_every == 0 or self.step == c.steps:
                last_log = self._log(statistics, last_log)
            stopped = self._any_stopped()
            if stopped or self.step % c.save_every == 0 or self.step == c.steps:
                self._save()
            if stopped:
                self.monitor.say(f"stopped by a signal; saved at step {self.step}; the same command goes on")
                return self.stop.exit_code or 143
            if self.valid_loader and (self.step % c.valid_every == 0 or self.step == c.steps):
                self._log_validation()
                last_log = (self.tokens, time.perf_counter())
        return 0

    def train_step(self) -> dict[str, Any]:
        """The next optimizer step. Returns its statistics; loss and grad norm stay on the device: nothing waits here."""
        c = self.config
        self.step += 1
        lr = c.lr_at(self.step)
        batches = [next(self.loader) for _ in range(c.accumulation)]
        result = train_step(self.engine, self.optimizer, batches, lr, c.clip, self.accelerator)
        self.tokens += int(result.targets)
        seq = squared_mean_length(batches)
        return {"loss": result.loss, "grad_norm": result.grad_norm, "lr": lr, "seq": seq}

    def _sum(self, value: float) -> float:
        return sum_over_ranks(value, self.accelerator)

    def _any_stopped(self) -> bool:
        return self._sum(float(bool(self.stop.received))) > 0

    # ------------------------------------------------------------ validation, logs, checkpoints

    @torch.no_grad()
    def validate(self, limit: int = 0) -> dict[str, float]:
        """Held-out loss in nats per token and bits per byte, over `limit` batches a process (0: all)."""
        assert self.valid_loader is not None and self.valid_cache is not None
        total, targets = torch.zeros((), device=self.device), 0
        for i, batch in enumerate(self.valid_loader.one_epoch()):
            if limit and i >= limit:
                break
            total += batch_loss(self.model, batch, self.device)
            targets += batch.targets
        loss = self._sum(float(total)) / max(1.0, self._sum(targets))
        tokens_per_byte = self.valid_loader.targets_per_epoch / self.valid_cache.text_bytes
        return {"valid_loss": loss, "valid_bits_per_byte": loss * tokens_per_byte / math.log(2)}

    def _try_validation(self) -> None:
        """One batch before the first step: what would crash after an hour crashes now."""
        if self.valid_loader:
            self.validate(limit=1)

    def _log_validation(self) -> None:
        result = self.validate(self.config.valid_batches)
        self.monitor.valid({"step": self.step, **result})
        if self.config.trackers:
            self.accelerator.log(result, step=self.step)

    def _log(self, statistics: dict[str, Any], last: tuple[float, float]) -> tuple[float, float]:
        loss = self._sum(float(statistics["loss"]))
        if not math.isfinite(loss):
            raise FloatingPointError(
                f"step {self.step}: the loss is {loss}; the checkpoints before it are untouched: lower lr "
                f"(now {statistics['lr']:.1e}), lengthen warmup, or look at the data of this step"
            )
        now = time.perf_counter()
        c = self.config
        speed = (self.tokens - last[0]) / self.world / (now - last[1])  # real tokens: padding doesn't count
        flops = speed * flops_per_token(self.model.config, statistics["seq"])
        peak = devices.peak_flops(self.device, self.dtype)
        record = {
            "step": self.step,
            "loss": loss,
            "grad_norm": float(statistics["grad_norm"]),
            "lr": statistics["lr"],
            "tokens": int(self.tokens),
            "tokens_per_second_per_gpu": speed,
            "mfu": flops / peak if peak else None,
            "memory_gib": devices.peak_memory_gib(self.device),
            "epoch": self.loader.epoch,
        }
        self.monitor.step(record, f"{flops / peak:.1%}" if peak else "N/A")
        if c.trackers:
            self.accelerator.log({k: v for k, v in record.items() if v is not None}, step=self.step)
        return self.tokens, now

    def _save(self) -> None:
        c = self.config
        state = {
            "tokens": self.tokens,
            "loader": self.loader.state_dict(),
            "tokenizer": self.tokenizer.fingerprint,
            "settings": dataclasses.asdict(c),
            "torch": torch.__version__,
        }
        states = gather_object([checkpoint.random_state()])
        if self._is_main:
            tokenizer = Path(c.tokenizer)
            checkpoint.save(
                self.checkpoints, self.step, self.model, self.optimizer, state, tokenizer, states, c.keep
            )
        self.accelerator.wait_for_everyone()

    def _announce(self) -> None:
        say, c, shape = self.monitor.say, self.config, self.model.config
        peak = devices.peak_flops(self.device, self.dtype)
        say(f"{devices.name(self.device)}, {self.world} process(es), torch {torch.__version__}, {c.dtype}")
        flops = flops_per_token(shape, c.context)
        say(
            f"model {c.preset}: {sum(p.numel() for p in self.model.parameters()):,} parameters; "
            f"{flops / 1e9:.3f} GFLOP a token at {c.context} = 6 x parameters that multiply + 6 x layers x heads x "
            "head_dim x seq (packed: seq = sum of len^2 / sum of len)"
        )
        say(
            f"MFU = tokens/s x FLOP a token / peak; peak {f'{peak / 1e12:.0f} TFLOP/s' if peak else 'N/A here'}"
        )
        chosen = {op: backend.explain(op, self.device, self.dtype).backend for op in backend.TABLE}
        say("ops: " + ", ".join(f"{op} {name}" for op, name in chosen.items()))
        say(
            f"data: {len(self.cache):,} documents, {self.cache.tokens:,} tokens, {self.loader.packs:,} packs of "
            f"{c.context}, {self.loader.padding_share:.2%} padding; {c.batch} x {c.accumulation} x {self.world} packs a step"
        )
        if self.step:
            say(f"resumed at step {self.step} from {self.checkpoints}")
