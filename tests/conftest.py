"""Until every op has landed the model cannot run: its tests are skipped by name. Goes with the last op."""

from __future__ import annotations

import pytest

import glmx.ops

NEEDED = """add_rms_norm embedding expert_plan grouped_gemm linear lm_head_logprob moe_combine rms_norm rope
rope_cos_sin route_topk silu_mul""".split()  # noqa: SIM905


def pytest_collection_modifyitems(items):
    missing = [name for name in NEEDED if not hasattr(glmx.ops, name)]
    for item in items:
        if missing and item.path.parent.name in ("models", "layers", "serve"):
            item.add_marker(pytest.mark.skip(reason=f"ops not landed: {', '.join(missing)}"))
