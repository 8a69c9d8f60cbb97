"""Public ops: one module per stem. Each function's docstring is its contract; `glmx.reference` has the oracles."""

from __future__ import annotations

import importlib
from typing import Any

_EXPORTS = {
    "route_topk": "route_topk",
    "expert_plan": "expert_plan",
    "ExpertPlan": "expert_plan",
    "grouped_gemm": "grouped_gemm",
    "grouped_gemm_dgrad": "grouped_gemm",
    "grouped_gemm_wgrad": "grouped_gemm",
    "linear": "grouped_gemm",
    "moe_combine": "moe_combine",
    "rms_norm": "rms_norm",
    "add_rms_norm": "add_rms_norm",
    "silu_mul": "silu_mul",
    "rope": "rope",
    "rope_cos_sin": "rope",
    "embedding": "embedding",
    "lm_head_logprob": "lm_head_logprob",
    "LogProbs": "lm_head_logprob",
    "sum_squares": "sum_squares",
}
__all__ = sorted(_EXPORTS)


def __getattr__(name: str) -> Any:
    if name not in _EXPORTS:
        raise AttributeError(f"module 'glmx.ops' has no attribute {name!r}")
    # Cached as an attribute below: a submodule of the same name (glmx.ops.rms_norm) must not shadow the function.
    value = getattr(importlib.import_module(f"glmx.ops.{_EXPORTS[name]}"), name)
    globals()[name] = value
    return value
