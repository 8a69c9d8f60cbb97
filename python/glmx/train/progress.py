"""What a run shows while it works: a bar on a terminal, a plain line now and then elsewhere."""

from __future__ import annotations

import sys
import time
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

PLAIN_EVERY_S = 15.0  # of a run whose output is a file or a pipe


def duration(seconds: float) -> str:
    seconds = int(seconds)
    hours, minutes = seconds // 3600, seconds // 60 % 60
    return f"{hours}:{minutes:02d}:{seconds % 60:02d}" if hours else f"{minutes}:{seconds % 60:02d}"


class RunProgress:
    """Shows loss, tokens/s, expert balance and time left of each record; a context manager."""

    def __init__(self, total_steps: int, start_step: int, minutes: float, quiet: bool = False) -> None:
        self.total, self.start = total_steps, start_step
        self.deadline = time.monotonic() + minutes * 60 if minutes else None
        self.begun = time.monotonic()
        self.last_line = -PLAIN_EVERY_S
        self.quiet = quiet
        self.console = Console(stderr=True)
        self.bar: Progress | None = None
        if self.console.is_terminal and not quiet:
            columns = [TextColumn("step {task.completed}/{task.total}"), BarColumn(), TextColumn("{task.description}")]
            self.bar = Progress(*columns, console=self.console, transient=True)
            self.task = self.bar.add_task("starting", total=total_steps, completed=start_step)

    def __enter__(self) -> RunProgress:
        if self.bar:
            self.bar.start()
        return self

    def __exit__(self, *error: object) -> None:
        if self.bar:
            self.bar.stop()

    def seconds_left(self, step: int) -> float:
        now = time.monotonic()
        planned = (now - self.begun) / max(step - self.start, 1) * (self.total - step)
        return planned if self.deadline is None else max(min(planned, self.deadline - now), 0.0)

    def step(self, record: dict[str, Any]) -> None:
        step, vio = record["step"], record["max_vio"]
        words = [f"loss {record['loss']:.3f}"]
        if record["mtp_loss"] is not None:
            words.append("mtp " + " ".join(f"{loss:.3f}" for loss in record["mtp_step_losses"]))
        if record["indexer_kl"] is not None:
            words.append(f"indexer kl {record['indexer_kl']:.3f}")
        words.append(f"{record['tokens_per_s']:,.0f} tokens/s")
        if vio:
            words.append(f"max load {1 + max(vio):.2f}x mean")
        words.append(f"{duration(self.seconds_left(step))} left")
        if self.bar:
            self.bar.update(self.task, completed=step, description="  ".join(words))
        elif not self.quiet and (
            time.monotonic() - self.last_line >= PLAIN_EVERY_S or step in (self.start + 1, self.total)
        ):
            self.last_line = time.monotonic()
            print(f"step {step}/{self.total}  " + "  ".join(words), file=sys.stderr, flush=True)

    def say(self, text: str) -> None:
        """A line that stays."""
        if self.bar:
            self.bar.console.print(text, highlight=False, markup=False)
        elif not self.quiet:
            print(text, file=sys.stderr, flush=True)
