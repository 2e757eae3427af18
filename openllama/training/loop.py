"""Pre-training: from token shards to checkpoints, through Accelerate on any number of processes.

One optimizer step is `accumulation` micro-batches on each process (openllama/training/step.py); this is what stands
around it: setting up, resuming, validation, logs, checkpoints, signals.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs

from openllama import devices
from openllama.config import ModelConfig
from openllama.data.cache import TokenCache
from openllama.data.loader import PackedLoader
from openllama.files import sole_writer
from openllama.kernels import backend
from openllama.load import load_model
from openllama.model import Llama, flops_per_token
from openllama.optim import AdamW, decay_groups
from openllama.tokenizer import Tokenizer
from openllama.training import checkpoint
from openllama.training.checkpoint import check_shape
from openllama.training.config import TrainConfig
from openllama.training.faults import StopSignal
from openllama.training.inputs import Split, check_inputs, packed_loader, token_caches
from openllama.training.memory import choose_recompute
from openllama.training.micro_step import GraphedMicroStep, choose_micro_step, drop_gradients
from openllama.training.monitor import Monitor, read_metrics
from openllama.training.ranks import TIMEOUT, Ranks
from openllama.training.step import (
    accumulate_gradients,
    batch_loss,
    held_out_loss,
    squared_mean_length,
    train_step,
)


class Trainer:
    """One run. `run()` trains to the last step, or until a signal, and returns the process's exit code."""

    def __init__(self, config: TrainConfig):
        self.config = config
        self.out = Path(config.out)
        self.checkpoints = self.out / "checkpoints"
        self.dtype = getattr(torch, config.dtype)
        self.accelerator = _accelerator(config)
        self.device, self.ranks = self.accelerator.device, Ranks(self.accelerator)
        self.tokenizer = Tokenizer(config.tokenizer)
        check_inputs(config, self.tokenizer)
        self.sources, self.loader = self._loader("train")
        self.valid_sources, self.valid_loader = self._loader("valid") if config.valid_shards else ({}, None)
        self._build_model()
        self.step = 0
        self.tokens = 0  # real tokens learned from, all processes
        self._finite = torch.ones((), dtype=torch.bool, device=self.device)  # every loss and norm so far
        self._resume()

    # ------------------------------------------------------------ setting up

    def _loader(self, split: Split) -> tuple[dict[str, TokenCache], PackedLoader]:
        """A split's token caches, and the loader of this process."""
        c = self.config
        with self.accelerator.main_process_first():  # rank 0 tokenises and packs, the others open its files
            sources = token_caches(c, self.tokenizer, split, progress=self.ranks.is_main)
            return sources, packed_loader(c, sources, split, c.batch, self.ranks.rank, self.ranks.world)

    def _build_model(self) -> None:
        c, shape = self.config, self.config.model_config()
        torch.manual_seed(c.seed)
        self.model = self._initial(shape).to(self.device, self.dtype)
        groups = decay_groups(self.model, c.weight_decay)
        self.optimizer = AdamW(
            groups, c.lr, (c.beta1, c.beta2), c.eps, moments=c.moments, masters=c.masters, seed=c.seed
        )
        recompute = c.recompute or choose_recompute(self.model, self.optimizer, c.batch * c.context)
        self.model.settings = self.model.settings._replace(recompute=recompute)
        accumulate_gradients(self.model, self.ranks.world)
        self.micro_step = choose_micro_step(
            self.model, c.batch * c.context, c.context, c.cuda_graph, self.ranks.world
        )
        self.engine = self.accelerator.prepare_model(self.model)

    def _initial(self, shape: ModelConfig) -> Llama:
        """Fresh weights, or those of `start_from`. A checkpoint of the run itself, where there is one, replaces them."""
        if self.config.start_from is None:
            return Llama(shape).initialise(self.config.seed)
        model, tokenizer = load_model(self.config.start_from, torch.float32)
        check_shape(self.config.start_from, model.config, shape)
        if tokenizer is not None and Tokenizer(tokenizer).fingerprint != self.tokenizer.fingerprint:
            raise ValueError(
                f"{self.config.start_from}: made with another tokenizer than {self.config.tokenizer}; "
                f"set tokenizer={tokenizer}"
            )
        return model

    def _resume(self) -> None:
        newest = max(checkpoint.steps(self.checkpoints), default=0)
        if len(seen := set(self.ranks.gather(newest))) > 1:
            raise ValueError(
                f"{self.checkpoints}: the processes see different newest steps, {sorted(seen)}; takes an `out` that all "
                "machines share"
            )
        if not newest:
            return
        place = checkpoint.step_folder(self.checkpoints, newest)
        state = checkpoint.read_state(place)
        if state["tokenizer"] != self.tokenizer.fingerprint:
            raise ValueError(
                f"{place}: made with the tokenizer {state['tokenizer'][:12]}, this run's {self.config.tokenizer} is "
                f"{self.tokenizer.fingerprint[:12]}; resume with its tokenizer.model, or choose another `out`"
            )
        self.loader.load_state_dict(state["loader"])
        checkpoint.load(place, self.model, self.optimizer, self.ranks.rank)
        self.step, self.tokens = state["step"], state["tokens"]

    # ------------------------------------------------------------ training

    def run(self) -> int:
        with ExitStack() as stack:
            self._hold(stack)
            stack.callback(drop_gradients, self.model)
            return self._run()

    def _hold(self, stack: ExitStack) -> None:
        """Keeps other runs out of `out`. All processes raise where one is at work there, or was since this one began."""
        why = ""
        if self.ranks.is_main:
            try:
                stack.enter_context(sole_writer(self.out))
                if (newest := max(checkpoint.steps(self.checkpoints), default=0)) != self.step:
                    why = f"{self.out}: another run saved step {newest} after this one had begun; run again to go on from it"
            except BlockingIOError as e:
                why = str(e)
        if why := self.ranks.gather(why)[0]:
            raise BlockingIOError(why)

    def _run(self) -> int:
        c = self.config
        self.monitor = Monitor(self.out / "metrics.jsonl", self.step, c.steps, quiet=not self.ranks.is_main)
        try:
            self._announce()
            if self.step < c.steps:
                self._try_validation()
            else:
                self.monitor.say(f"already at step {self.step} of {c.steps}: nothing left to train")
            with StopSignal() as stop:  # not earlier: before the first step there is nothing to save
                return self._train(stop)
        finally:
            self.monitor.close()
            self.accelerator.end_training()

    def _train(self, stop: StopSignal) -> int:
        c = self.config
        stopped = self._validation_was_cut_short() and not self._log_validation(stop)
        self._mark()
        while self.step < c.steps and not stopped:
            stopped, statistics = self.train_step(stopping=bool(stop.received))
            if self.step % c.log_every == 0 or self.step == c.steps:
                self._log(statistics)
                self._mark()
            if stopped or self.step % c.save_every == 0 or self.step == c.steps:
                self._save()
                self._mark()
            if not stopped and self._validation_is_due():
                stopped = not self._log_validation(stop)
                if stopped:
                    self._save()
                self._mark()
        if not stopped:
            return 0
        self.monitor.say(f"stopped by a signal; saved at step {self.step}; the same command goes on")
        return stop.exit_code

    def train_step(self, stopping: bool = False) -> tuple[bool, dict[str, Any]]:
        """The next optimizer step: whether any process is `stopping`, and the step's statistics.

        Loss and grad norm stay on the device, so nothing waits here.
        """
        c = self.config
        self.step += 1
        lr = c.lr_at(self.step)
        batches = [next(self.loader) for _ in range(c.accumulation)]
        targets, stops = self.ranks.sum(sum(b.targets for b in batches), stopping)
        world = self.ranks.world
        result = train_step(self.engine, self.optimizer, batches, targets, lr, c.clip, world, self.micro_step)
        self._finite &= torch.isfinite(result.loss) & torch.isfinite(result.grad_norm)
        self.tokens += int(targets)
        seq = squared_mean_length(batches)
        return stops > 0, {"loss": result.loss, "grad_norm": result.grad_norm, "lr": lr, "seq": seq}

    def _mark(self) -> None:
        """Where the next step line's speed is counted from: saving and validation are not training."""
        self._marked = (self.tokens, time.perf_counter())

    def _require_finite(self) -> None:
        """Before anything is logged or saved: a run that diverged must not replace its good checkpoints."""
        if not bool(self._finite):
            raise FloatingPointError(
                f"step {self.step}: the loss or the gradient's norm is not finite, in this step or one shortly before; "
                "the checkpoints are from before that: lower lr, lengthen warmup, or look at the data of these steps"
            )

    # ------------------------------------------------------------ validation, logs, checkpoints

    @torch.no_grad()
    def validate(self, limit: int = 0, stop: StopSignal | None = None) -> dict[str, float]:
        """Held-out loss in nats per token and bits per byte, over `limit` batches a process (0: all).

        Always the same batches, but none after a signal. With a limit, bits per byte take the whole set's tokens per
        byte.
        """
        assert self.valid_loader is not None
        batches = itertools.islice(self.valid_loader.one_epoch(), limit or None)
        if stop is not None:
            batches = itertools.takewhile(lambda _: not stop.received, batches)
        loss = held_out_loss(lambda b: batch_loss(self.model, b, self.device), batches, self.ranks)
        tokens_per_byte = self.valid_loader.targets_per_epoch / sum(
            cache.text_bytes for cache in self.valid_sources.values()
        )
        return {"valid_loss": loss, "valid_bits_per_byte": loss * tokens_per_byte / math.log(2)}

    def _try_validation(self) -> None:
        """One batch before the first step: what would crash after an hour crashes now."""
        if self.valid_loader:
            self.validate(limit=1)

    def _validation_is_due(self) -> bool:
        return bool(self.valid_loader) and (
            self.step % self.config.valid_every == 0 or self.step == self.config.steps
        )

    def _validation_was_cut_short(self) -> bool:
        """Whether the run that saved this step left before it had validated it; rank 0 holds the records."""
        if not self.step or not self._validation_is_due():
            return False
        records = read_metrics(self.monitor.path) if self.ranks.is_main else []
        (found,) = self.ranks.sum(sum(r["step"] == self.step and "valid_loss" in r for r in records))
        return not found

    def _log_validation(self, stop: StopSignal) -> bool:
        """False when a signal cut it short, on any process: then there is no result."""
        result = self.validate(self.config.valid_batches, stop)
        (stops,) = self.ranks.sum(bool(stop.received))
        if stops:
            return False
        self.monitor.valid({"step": self.step, **result})
        if self.config.trackers:
            self.accelerator.log(result, step=self.step)
        return True

    def _log(self, statistics: dict[str, Any]) -> None:
        self._require_finite()
        (loss,) = self.ranks.sum(
            float(statistics["loss"])
        )  # waits for the device, so before the clock is read
        tokens, began = self._marked
        # real tokens: padding doesn't count
        speed = (self.tokens - tokens) / self.ranks.world / (time.perf_counter() - began)
        flops = speed * flops_per_token(self.model.config, statistics["seq"])
        peak = devices.peak_flops(self.device, self.dtype)
        record = {
            "step": self.step,
            "loss": loss,
            "grad_norm": float(statistics["grad_norm"]),
            "lr": statistics["lr"],
            "tokens": self.tokens,
            "tokens_per_second_per_gpu": speed,
            "mfu": flops / peak if peak else None,
            "memory_gib": devices.peak_memory_gib(self.device),
            "epoch": self.loader.epoch,
        }
        self.monitor.step(record, f"{flops / peak:.1%}" if peak else "N/A")
        if self.config.trackers:
            self.accelerator.log({k: v for k, v in record.items() if v is not None}, step=self.step)

    def _save(self) -> None:
        self._require_finite()
        c = self.config
        state = {
            "tokens": self.tokens,
            "loader": self.loader.state_dict(),
            "tokenizer": self.tokenizer.fingerprint,
            "settings": dataclasses.asdict(c),
            "torch": torch.__version__,
        }
        random_states = self.ranks.gather(checkpoint.random_state())
        if self.ranks.is_main:
            checkpoint.save(
                self.checkpoints, self.step, self.model, self.optimizer, state, Path(c.tokenizer), random_states, c.keep
            )  # fmt: skip
        self.ranks.wait()

    def _announce(self) -> None:
        say, c, shape = self.monitor.say, self.config, self.model.config
        peak = devices.peak_flops(self.device, self.dtype)
        world = self.ranks.world
        say(f"{devices.name(self.device)}, {world} process(es), torch {torch.__version__}, {c.dtype}")
        masters = f", masters {c.masters}" if self.dtype != torch.float32 else ""
        sums = "float32" if world == 1 or not masters else f"{c.dtype}, as DDP needs"
        say(
            f"AdamW: {self.optimizer.state_bytes():.2f} bytes a parameter, with it: moments {c.moments}{masters}; "
            f"gradients add up in {sums}"
        )
        launches = "as CUDA graphs" if isinstance(self.micro_step, GraphedMicroStep) else "kernel by kernel"
        say(f"micro-batches are launched {launches}; backward makes again: {self.model.settings.recompute}")
        flops = flops_per_token(shape, c.context)
        say(
            f"model {c.preset}: {sum(p.numel() for p in self.model.parameters()):,} parameters; "
            f"{flops / 1e9:.3f} GFLOP a token at {c.context} = 6 x parameters that multiply + 6 x layers x heads x "
            "head_dim x seq (packed: seq = sum of len^2 / sum of len)"
        )
        say(
            f"MFU = tokens/s x FLOP a token / peak; peak {f'{peak / 1e12:.0f} TFLOP/s' if peak else 'N/A here'}"
        )
        chosen = (f"{op} {backend.describe(op, self.device, self.dtype)}" for op in backend.TABLE)
        say("ops: " + ", ".join(chosen))
        documents, tokens = sum(map(len, self.sources.values())), sum(s.tokens for s in self.sources.values())
        say(
            f"data: {documents:,} documents, {tokens:,} tokens, {self.loader.packs:,} packs an epoch of "
            f"{c.context}, {self.loader.padding_share:.2%} padding; {c.batch} x {c.accumulation} x {world} packs a step"
        )
        if self.step:
            say(f"resumed at step {self.step} from {self.checkpoints}")


def _accelerator(config: TrainConfig) -> Accelerator:
    """Precision and accumulation are this loop's own: what `accelerate launch` or a user's config says of them must not
    change the arithmetic."""
    trackers: Any = config.trackers or None
    accelerator = Accelerator(
        cpu=not torch.cuda.is_available(),
        mixed_precision="no",
        log_with=trackers,
        project_dir=config.out if trackers else None,
        kwargs_handlers=[InitProcessGroupKwargs(timeout=TIMEOUT)],
    )
    found = {str(t).rpartition(".")[2].lower() for t in accelerator.log_with}
    if missing := sorted(set(config.trackers) - found):
        raise ValueError(
            f"trackers: {missing[0]} is not installed or not known to accelerate; pip install {missing[0]}"
        )
    if trackers:
        settings = {k: json.dumps(v) if isinstance(v, (dict, list)) else v for k, v in vars(config).items()}
        accelerator.init_trackers("openllama", {k: v for k, v in settings.items() if v is not None})
    return accelerator
