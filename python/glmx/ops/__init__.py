"""Public ops: one module per stem. Each function's docstring is its contract; `glmx.reference` has the oracles.

The functions are imported eagerly so that `glmx.ops.rms_norm` is always the function, never the module of that name.
"""

from __future__ import annotations

from glmx.ops.rms_norm import rms_norm

__all__ = ["rms_norm"]
