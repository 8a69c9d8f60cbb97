"""A real `glmx serve` process for tests, and a checkpoint for it: a tiny random model with a trained tokenizer."""

from __future__ import annotations

import os
import queue
import re
import subprocess
import sys
import threading
from pathlib import Path

from glmx.data import tokenizer as tokenizers
from glmx.models import checkpoint
from tiny_glm import random_model, tiny_config

TEXT = "def add(first, second):\n    return first + second\n\n\nclass Café:\n    pass\n" * 4
PYTHON = Path(__file__).resolve().parent.parent / "python"
START_S = 180  # a start takes some seconds; only one that hangs comes near this


def tiny_checkpoint(base: Path, max_position_embeddings: int = 16384) -> Path:
    """The model's answers are noise, and with it broken UTF-8, special tokens and every kind of white space."""
    tokenizer = tokenizers.train([TEXT], 300)
    tokenizer.save(base / "tokenizer")
    config = tiny_config(
        vocab_size=304, eos_token_id=tokenizer.eos_ids, max_position_embeddings=max_position_embeddings
    )
    return checkpoint.save(random_model(config, 1), base / "tiny", tokenizer_files_from=base / "tokenizer")


class Server:
    """`glmx serve` on a free port of this machine, ready when its start-up print is complete."""

    def __init__(self, directory: Path, *options: str) -> None:
        env = {**os.environ, "PYTHONPATH": str(PYTHON), "OMP_NUM_THREADS": "1"}
        self.process = subprocess.Popen(
            [sys.executable, "-m", "glmx", "serve", str(directory), "--port", "0", *options],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=env,
        )
        self.lines: list[str] = []
        self._new: queue.Queue[str | None] = queue.Queue()
        threading.Thread(target=self._read, daemon=True).start()
        while not (self.lines and self.lines[-1].startswith("curl ")):
            try:
                line = self._new.get(timeout=START_S)
            except queue.Empty:
                line = None
            if line is None:
                self.process.kill()
                raise AssertionError("the server did not start:\n" + "".join(self.lines))
            self.lines.append(line)
        found = re.search(r"http://[\w.:\[\]]+", self.lines[-1])
        assert found, self.lines
        self.url = found[0]

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self._new.put(line)
        self._new.put(None)

    def output(self) -> str:
        """All that it has printed, start-up and log, when it has ended."""
        while (line := self._new.get(timeout=START_S)) is not None:
            self.lines.append(line)
        return "".join(self.lines)

    def stop(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
