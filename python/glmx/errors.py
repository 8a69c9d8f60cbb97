"""The errors glmx raises on purpose. Each message names the thing, its value and what is allowed."""

from __future__ import annotations


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
