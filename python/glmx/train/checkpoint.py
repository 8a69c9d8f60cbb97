"""Checkpoints of a run, complete or absent.

    OUT/log.jsonl               one record per optimizer step, one per held-out measurement
    OUT/step-00001200/          a complete Hugging Face directory, and
        trainer/state.safetensors   masters and moments by parameter name, RNG state
        trainer/state.json          step, tokens, data cursor, seconds, configuration
    OUT/latest                  the name of the newest

A checkpoint is written under `.tmp-step-...`, synced to disk and renamed: a kill or a full disk at any moment
leaves the last good one. Resuming cuts log.jsonl back to the checkpoint's step.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

from glmx.errors import CheckpointError

FORMAT = 1
TMP = ".tmp-"


@dataclass(frozen=True)
class Saved:
    """What a checkpoint holds beside the Hugging Face files."""

    path: Path
    tensors: dict[str, Tensor]
    state: dict[str, Any]


def step_name(step: int) -> str:
    return f"step-{step:08d}"


def write(
    out: Path,
    step: int,
    *,
    save_model: Callable[[Path], object],
    tensors: dict[str, Tensor],
    state: dict[str, Any],
    keep: int,
) -> Path:
    """Writes OUT/step-XXXXXXXX and OUT/latest, then drops all but the newest `keep`.

    save_model(path) creates the directory `path`. Raises CheckpointError.
    """
    name = step_name(step)
    tmp, final = out / f"{TMP}{name}", out / name
    try:
        _remove(tmp)
        save_model(tmp)
        (tmp / "trainer").mkdir()
        save_file({k: v.detach().contiguous() for k, v in tensors.items()}, tmp / "trainer" / "state.safetensors")
        (tmp / "trainer" / "state.json").write_text(json.dumps({"format": FORMAT, "step": step, **state}, indent=1))
        _sync_tree(tmp)
        if final.exists():  # a run that resumed from an older checkpoint comes by here again
            _retire(final)
        tmp.rename(final)
        _sync(out)
        _write_latest(out, name)
    except KeyboardInterrupt:
        shutil.rmtree(tmp, ignore_errors=True)
        raise
    except Exception as error:  # safetensors has its own error type, and so has the caller's save_model
        shutil.rmtree(tmp, ignore_errors=True)
        raise CheckpointError(f"could not write {final}: {error}") from error
    for old in _steps(out)[:-keep]:
        if old != final:
            _retire(old)
    return final


def latest(out: Path) -> Path | None:
    """The checkpoint to resume: the one OUT/latest names, or the newest; None if there is none yet."""
    steps = _steps(out)
    pointer = out / "latest"
    if pointer.is_file():
        named = out / pointer.read_text(encoding="utf-8").strip()
        if named in steps:
            return named
        raise CheckpointError(f"{pointer} names {named.name}, which is not in {out}")
    return steps[-1] if steps else None


def read(path: Path) -> Saved:
    """Reads trainer/ of a checkpoint. Raises CheckpointError."""
    trainer = path / "trainer"
    try:
        state = json.loads((trainer / "state.json").read_text(encoding="utf-8"))
        tensors = load_file(trainer / "state.safetensors")
    except Exception as error:
        raise CheckpointError(f"{trainer} cannot be resumed: {error}") from error
    if state.get("format") != FORMAT:
        raise CheckpointError(f"{trainer}/state.json has format {state.get('format')!r}, expected {FORMAT}")
    return Saved(path, tensors, state)


def lock(out: Path) -> int:
    """An open handle that keeps other processes from training in OUT until it is closed. Raises CheckpointError."""
    handle = os.open(out, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(handle)
        raise CheckpointError(f"another process is training in {out}") from None
    return handle


def clean(out: Path) -> None:
    """Removes what a killed run left half-written."""
    for leftover in out.glob(f"{TMP}*"):
        _remove(leftover)


def cut_log(log: Path, step: int) -> None:
    """Keeps the records of log.jsonl up to and including `step`; a torn last line goes too."""
    if not log.exists():
        return
    kept = []
    for line in log.read_text(encoding="utf-8").splitlines(keepends=True):
        try:
            if not line.endswith("\n") or json.loads(line)["step"] > step:
                break
        except (ValueError, KeyError):
            break
        kept.append(line)
    _replace(log, "".join(kept))


def _write_latest(out: Path, name: str) -> None:
    _replace(out / "latest", name + "\n")


def _replace(path: Path, text: str) -> None:
    tmp = path.with_name(f"{TMP}{path.name}")
    with open(tmp, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    tmp.replace(path)
    _sync(path.parent)


def _steps(out: Path) -> list[Path]:
    return sorted(p for p in out.glob("step-*") if p.is_dir() and p.name[5:].isdigit())


def _retire(path: Path) -> None:
    """Removes a checkpoint so that no moment shows half of one under a good name."""
    aside = path.with_name(f"{TMP}old-{path.name}")
    _remove(aside)
    path.rename(aside)
    _remove(aside)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    elif path.exists():
        path.unlink()


def _sync_tree(root: Path) -> None:
    for folder, _, files in os.walk(root):
        for name in files:
            _sync(Path(folder) / name)
        _sync(Path(folder))


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
