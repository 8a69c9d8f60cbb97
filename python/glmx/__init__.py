"""glmx: kernels, model, trainer and server for GLM-class sparse models.

Importing this package loads nothing: every public name is imported when it is first used (PEP 562).
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_LAZY = {
    "LLM": "glmx.serve.llm",
    "SamplingParams": "glmx.serve.llm",
    "load": "glmx.models.checkpoint",
    "CheckpointError": "glmx.errors",
    "UnsupportedError": "glmx.errors",
}
_SUBMODULES = {"ops", "reference", "layers", "models", "data", "train", "serve", "eval", "cli", "errors"}

if TYPE_CHECKING:
    from glmx.errors import CheckpointError, UnsupportedError
    from glmx.models.checkpoint import load
    from glmx.serve.llm import LLM, SamplingParams

__all__ = ["LLM", "SamplingParams", "load", "CheckpointError", "UnsupportedError", "__version__"]


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(importlib.import_module(_LAZY[name]), name)
    if name in _SUBMODULES:
        return importlib.import_module(f"glmx.{name}")
    raise AttributeError(f"module 'glmx' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *_LAZY, *_SUBMODULES])
