"""Pre-training: one process, one loop.

    result = pretrain(load_config("run.toml"))

The same call continues a run that was cut short: what is in `out` decides. Records of log.jsonl, per step:
    step, tokens, loss, mtp_loss (null without MTP), mtp_step_losses: [per step of the MTP layer] (mtp_loss is their
    mean), aux_loss, indexer_kl (null where no indexer is trained), lr, grad_norm (without the indexers, unless they are
    trained alone), tokens_per_s, time_s, max_vio: [per MoE layer], expert_load: [[E] per MoE layer] (the MTP layer is
    the last, all of its steps added up)
and per held-out measurement: step, tokens, heldout_loss (nats per token), heldout_bpb (bits per byte).
"""

from __future__ import annotations

import math
import signal
import threading
import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from glmx.errors import GlmxError
from glmx.train import balance
from glmx.train.config import PretrainConfig
from glmx.train.loss import Denominators, Losses, forward_backward
from glmx.train.optim import clip_factor
from glmx.train.progress import RunProgress, duration
from glmx.train.run import Run
from glmx.train.schedule import learning_rate


@dataclass(frozen=True)
class Result:
    """How a run ended: `reason` is "done", "minutes" or the name of a signal."""

    reason: str
    checkpoint: Path
    step: int
    tokens: int
    heldout_bpb: float | None


def pretrain(
    config: PretrainConfig, *, quiet: bool = False, on_record: Callable[[dict[str, Any]], None] | None = None
) -> Result:
    """Trains until the planned tokens, the time bound, or a signal; always ends on a checkpoint.

    Raises ConfigError, CheckpointError, and GlmxError when the loss is no longer finite.
    """
    heldout = None
    with (
        closing(Run.start(config)) as run,
        run.open_log(on_record) as log,
        RunProgress(config.total_steps, run.step, config.train.minutes, quiet) as progress,
        StopRequest(config.train.minutes) as stop,
    ):
        if run.step:
            progress.say(f"resumed {run.saved} at step {run.step}, {run.tokens:,} tokens")
        while run.step < config.total_steps and not stop.reason:
            record = train_step(run)
            log.write(record)
            progress.step(record)
            done = run.step == config.total_steps
            stop.after_step()
            last = done or stop.reason == "minutes"
            measure = last or due(run.step, config.eval.every_steps)
            if measure and (heldout := run.heldout_record(last)):
                log.write(heldout)
                progress.say(heldout_words(heldout))
            if done or stop.reason or due(run.step, config.checkpoint.every_steps):
                log.sync()
                run.save()
        reason = "done" if run.step == config.total_steps else stop.reason
        progress.say(closing_words(run, reason))
    assert run.saved is not None
    return Result(reason, run.saved, run.step, run.tokens, heldout["heldout_bpb"] if heldout else None)


def train_step(run: Run) -> dict[str, Any]:
    """One optimizer step over one global batch; returns its log record."""
    config, begun = run.config, time.monotonic()
    micro_batches = run.next_batch()
    counts = Denominators.of(micro_batches, config.data.seq_len)
    losses, loads = Losses(), balance.ExpertLoads()
    run.model.see_all_keys = run.tokens < (config.indexer.dense_tokens or 0)
    for micro in micro_batches:
        forward_backward(
            run.model,
            micro,
            counts,
            seq_len=config.data.seq_len,
            mtp_weight=config.mtp_loss_weight if run.with_mtp else 0.0,
            aux_weight=run.aux_weight,
            kl_weight=run.kl_weight,
            losses=losses,
            loads=loads,
        )
        run.optim.fold_grads()

    norms = run.optim.grad_norms()
    norm = norms.get("model", norms.get("indexer", 0.0))
    if not math.isfinite(sum(norms.values()) + losses.main):
        last = f"the last checkpoint is {run.saved}" if run.saved else "there is no checkpoint yet"
        words = ", ".join(f"gradient norm of the {part} {value}" for part, value in norms.items())
        raise GlmxError(f"step {run.step + 1}: loss {losses.main}, {words}: {last}; try a lower optim.lr")
    tokens = run.tokens + config.tokens_per_step
    lr = learning_rate(
        tokens,
        config.total_steps * config.tokens_per_step,
        lr=config.optim.lr,
        min_lr=config.optim.min_lr,
        warmup_tokens=config.optim.warmup_tokens,
    )
    run.optim.step(lr, {part: clip_factor(value, config.optim.clip) for part, value in norms.items()})
    freeze = config.balance.freeze_after_tokens
    if not config.indexer.only and (not freeze or run.tokens < freeze):
        balance.update_biases(run.biases, loads, config.balance.rate)

    run.step, run.tokens = run.step + 1, tokens
    seconds = time.monotonic() - begun
    run.seconds += seconds
    return {
        "step": run.step,
        "tokens": run.tokens,
        "loss": losses.main,
        "mtp_loss": losses.mtp_mean if run.with_mtp else None,
        "mtp_step_losses": losses.mtp if run.with_mtp else None,
        "aux_loss": losses.aux,
        "indexer_kl": losses.indexer_kl if run.kl_weight else None,
        "lr": lr,
        "grad_norm": norm,
        "tokens_per_s": config.tokens_per_step / seconds,
        "time_s": run.seconds,
        "max_vio": loads.max_vio(),
        "expert_load": loads.as_lists(),
    }


def due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0


def heldout_words(record: dict[str, Any]) -> str:
    bpb = record["heldout_bpb"]
    size = "" if bpb is None else f", {bpb:.4f} bits per byte"
    return f"step {record['step']}: held-out loss {record['heldout_loss']:.4f} nats per token{size}"


def closing_words(run: Run, reason: str) -> str:
    planned = run.config.total_steps * run.config.tokens_per_step
    where = f"{run.tokens:,} of {planned:,} planned tokens (step {run.step}) in {duration(run.seconds)}"
    if reason == "done":
        return f"done: {where}; checkpoint {run.saved}"
    cause = f"the bound of {run.config.train.minutes:g} minutes" if reason == "minutes" else reason
    return f"stopped by {cause} after {where}; saved {run.saved}; the same command goes on from there"


class StopRequest:
    """Turns SIGINT, SIGTERM and the time bound into a stop between two steps; a second Ctrl-C stops at once."""

    def __init__(self, minutes: float) -> None:
        self.reason = ""
        self.deadline = time.monotonic() + minutes * 60 if minutes else math.inf
        self.last = time.monotonic()
        self.old: dict[int, Any] = {}

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():  # Python hands signals to no other thread
            self.old = {number: signal.signal(number, self._on_signal) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self.old.items():
            signal.signal(number, handler)

    def after_step(self) -> None:
        """Asks for a stop when another step like the last one would end past the bound."""
        now = time.monotonic()
        if not self.reason and now + (now - self.last) > self.deadline:
            self.reason = "minutes"
        self.last = now

    def _on_signal(self, number: int, frame: object) -> None:
        if self.reason and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.reason = signal.Signals(number).name
