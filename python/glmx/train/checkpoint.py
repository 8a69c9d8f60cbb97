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

import contextlib
import fcntl
import json
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor

from glmx.errors import CheckpointError, ConfigError
from glmx.models.safetensors import save_file

FORMAT = 2  # 2: the cursor knows the hash of the tokens
TMP = ".tmp-"
# What a resumed run reads from trainer/state.json, beside its format.
STATE = {"step": int, "tokens": int, "seconds": float, "updates": int, "cursor": dict, "config": dict}


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

    save_model(path) creates the directory `path`. Raises CheckpointError, which says what is left to resume from.
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
        raise CheckpointError(f"could not write {final}: {_reason(error)}; {_left(out)}") from error
    for old in _steps(out)[:-keep]:
        if old != final:
            _retire(old)
    return final


def latest(out: Path) -> Path | None:
    """The checkpoint to resume: the one OUT/latest names, or the newest; None if there is none yet."""
    steps = _steps(out)
    pointer = out / "latest"
    if pointer.is_file():
        name = pointer.read_bytes().decode("utf-8", "replace").strip()
        if name in [path.name for path in steps]:
            return out / name
        raise CheckpointError(f"{pointer} names {name!r}, which is not in {out}; it has {_names(steps)}")
    return steps[-1] if steps else None


def read(path: Path) -> Saved:
    """Reads trainer/ of a checkpoint. Raises CheckpointError."""
    file = path / "trainer" / "state.json"
    try:
        state = json.loads(file.read_bytes())
        if not isinstance(state, dict):
            raise ValueError(f"expected an object, got {type(state).__name__}")
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{file} cannot be resumed: {error}") from error
    if state.get("format") != FORMAT:
        raise CheckpointError(
            f"{file} has format {state.get('format')!r}, this glmx resumes format {FORMAT}; "
            f"start afresh in another `out`, with this checkpoint as `model` to keep its weights"
        )
    for key, kind in STATE.items():
        if not isinstance(state.get(key), (int, float) if kind is float else kind):
            raise CheckpointError(f"{file} cannot be resumed: {key} is {state.get(key)!r}, expected {kind.__name__}")
    if step_name(state["step"]) != path.name:
        raise CheckpointError(f"{file} cannot be resumed: it is of step {state['step']}, its directory is {path.name}")
    tensors = file.with_suffix(".safetensors")
    try:
        return Saved(path, load_file(tensors), state)
    except Exception as error:  # safetensors has its own error type
        raise CheckpointError(f"{tensors} cannot be resumed: {error}") from error


@contextlib.contextmanager
def making(out: Path) -> Iterator[None]:
    """Makes the directory OUT; what it made goes again when the body fails.

    Raises ConfigError when OUT cannot be made or written to.
    """
    made: list[Path] = []
    try:
        for folder in reversed([out, *out.parents]):
            if not folder.is_dir():
                folder.mkdir()
                made.insert(0, folder)
        with tempfile.TemporaryFile(dir=out):  # permission bits say little: of root, of a read-only file system
            pass
    except OSError as error:
        _remove_empty(made)
        raise ConfigError(f"out is {str(out)!r}: cannot write there: {error.strerror}") from None
    try:
        yield
    except BaseException:
        _remove_empty(made)
        raise


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
    kept, lines = [], log.read_bytes().splitlines(keepends=True)
    for line in lines:
        try:
            if not line.endswith(b"\n") or json.loads(line)["step"] > step:
                break
        except (ValueError, KeyError, TypeError, RecursionError):
            break
        kept.append(line)
    if len(kept) < len(lines):
        _replace(log, b"".join(kept))


def _write_latest(out: Path, name: str) -> None:
    _replace(out / "latest", f"{name}\n".encode())


def _replace(path: Path, content: bytes) -> None:
    tmp = path.with_name(f"{TMP}{path.name}")
    try:
        with open(tmp, "wb", buffering=0) as file:
            view = memoryview(content)
            while view:
                view = view[file.write(view) :]
            os.fsync(file.fileno())
        tmp.replace(path)
        _sync(path.parent)
    except OSError as error:
        tmp.unlink(missing_ok=True)
        raise CheckpointError(f"could not write {path}: {error.strerror}") from error


def _reason(error: Exception) -> str:
    """The system's words, which safetensors wraps in its own."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return re.sub(r"^.*I/O error: (.*) \(os error \d+\)$", r"\1", str(error))


def _left(out: Path) -> str:
    """What a failed write leaves, for its message."""
    try:
        last = latest(out)
    except (CheckpointError, OSError):
        last = None
    return f"the last checkpoint is {last}" if last else "there is no checkpoint yet"


def _names(steps: list[Path]) -> str:
    return ", ".join(path.name for path in steps) or "no checkpoint"


def _remove_empty(folders: list[Path]) -> None:
    for folder in folders:
        with contextlib.suppress(OSError):  # not empty: somebody else's files
            folder.rmdir()


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
