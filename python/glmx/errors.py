"""The errors glmx raises on purpose. Each message names the thing, its value and what is allowed."""

from __future__ import annotations

import reprlib
from collections.abc import Sequence
from typing import Any

_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = 80
_SHORT.maxlevel = 2


class GlmxError(Exception):
    """Base class of every error that is the user's to fix; the CLI prints it as one line and exits 2."""


class CheckpointError(GlmxError, ValueError):
    """A checkpoint on disk is missing, incomplete, corrupt or does not fit its config."""


class UnsupportedError(GlmxError, ValueError):
    """The request is well-formed, but this build, machine or version of glmx does not support it."""


class ConfigError(GlmxError, ValueError):
    """A run configuration has an unknown key, a wrong type or an impossible value."""


class MissingLibraryError(GlmxError, ImportError):
    """glmx's compiled libraries are not beside the package, or cannot be loaded."""

    def __init__(self, library: str, cause: BaseException | None = None) -> None:
        super().__init__(
            f"glmx's compiled library is missing ({library} beside the package): install glmx with "
            "`pip install .`, or build in place with `python setup.py build_ext --inplace`. "
            "The pure torch oracles need no library: import glmx.reference" + (f" (cause: {cause})" if cause else "")
        )


def shown(value: Any) -> str:
    """repr(value) on one line and cut where it is long: a value out of a file may be of any size."""
    text = _SHORT.repr(value)
    return text if len(text) <= 200 else text[:197] + "..."


def listed(names: Sequence[str]) -> str:
    """The first four names and how many more there are; a name that would not print on one line as its repr."""
    first = [name if name.isprintable() and len(name) <= 120 else shown(name) for name in names[:4]]
    rest = f" and {len(names) - 4} more" if len(names) > 4 else ""
    return ", ".join(first) + rest
