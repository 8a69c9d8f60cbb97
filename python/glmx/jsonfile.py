"""Reading a JSON file that anyone may have written: every way it can be bad is a one-line CheckpointError."""

from __future__ import annotations

import json
import os
import stat
from collections import Counter
from pathlib import Path
from typing import Any

from glmx.errors import CheckpointError, shown

# config.json and its like have a few kB; tokenizer_config.json up to a megabyte. Values parsed from JSON take up
# to twenty times its bytes, so the limit also bounds the memory that a hostile file can claim.
MAX_BYTES = 4 * 2**20


def read_json(file: Path, max_bytes: int = MAX_BYTES) -> dict[str, Any]:
    """The object that `file` holds. Raises CheckpointError: unreadable, longer than max_bytes, not JSON, a key
    given twice, not an object."""
    return parse_object(read_bytes(file, max_bytes), f"'{file}'")


def read_bytes(file: Path, max_bytes: int) -> bytes:
    """The content of a regular file (a pipe would block) of at most max_bytes. Raises CheckpointError."""
    try:
        status = os.stat(file)
        if not stat.S_ISREG(status.st_mode):
            raise CheckpointError(f"'{file}' is not a regular file")
        if status.st_size > max_bytes:
            raise CheckpointError(f"'{file}' has {status.st_size} bytes, expected at most {max_bytes}")
        with open(file, "rb") as opened:
            return opened.read(max_bytes)
    except OSError as error:
        raise CheckpointError(f"cannot read '{file}': {error.strerror or error}") from None


def parse_object(data: bytes, what: str) -> dict[str, Any]:
    """The JSON object in `data`; `what` names it in the error. Raises CheckpointError."""
    try:
        value = json.loads(data.decode("utf-8"), object_pairs_hook=_unique)
    except _DuplicateKeyError as error:
        raise CheckpointError(f"{what} has the key {error} twice") from None
    except RecursionError:
        raise CheckpointError(f"{what} is not JSON that can be read: nested too deeply") from None
    except ValueError as error:  # not UTF-8, not JSON, an integer of thousands of digits
        raise CheckpointError(f"{what} is not JSON: {error}") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{what} holds a JSON {type(value).__name__}, expected an object")
    return value


class _DuplicateKeyError(Exception):
    pass


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    out = dict(pairs)
    if len(out) < len(pairs):
        counts = Counter(key for key, _ in pairs)
        raise _DuplicateKeyError(shown(counts.most_common(1)[0][0]))
    return out
