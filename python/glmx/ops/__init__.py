"""Public ops: one module per stem. Each function's docstring is its contract; `glmx.reference` has the oracles.

The functions are imported eagerly so that `glmx.ops.rms_norm` is always the function, never the module of that name.
Each also takes arrays of other libraries, CuPy's above all, and then returns such arrays: see `with_arrays`.
"""

from __future__ import annotations

from glmx.ops.adamw import adamw
from glmx.ops.add_rms_norm import add_rms_norm
from glmx.ops.arrays import with_arrays
from glmx.ops.attention import Attended, attention
from glmx.ops.cache_append import cache_append
from glmx.ops.embedding import embedding
from glmx.ops.expert_plan import ExpertPlan, expert_plan
from glmx.ops.grouped_gemm import grouped_gemm, grouped_gemm_dgrad, grouped_gemm_wgrad, linear
from glmx.ops.head_gemm import head_gemm
from glmx.ops.indexer_kl import indexer_kl
from glmx.ops.indexer_topk import indexer_topk
from glmx.ops.layer_norm import layer_norm
from glmx.ops.lm_head_logprob import LogProbs, lm_head_logprob
from glmx.ops.moe_combine import moe_combine
from glmx.ops.moe_mlp import moe_mlp
from glmx.ops.mtp_verify import Verified, mtp_verify
from glmx.ops.rms_norm import rms_norm
from glmx.ops.rope import rope, rope_cos_sin
from glmx.ops.route_topk import route_topk
from glmx.ops.sample import sample
from glmx.ops.silu_mul import silu_mul
from glmx.ops.sparse_mla import sparse_mla
from glmx.ops.stored_weight import Matrix, StoredWeight
from glmx.ops.sum_squares import sum_squares

__all__ = [
    "Attended",
    "ExpertPlan",
    "LogProbs",
    "Matrix",
    "StoredWeight",
    "Verified",
    "adamw",
    "add_rms_norm",
    "attention",
    "cache_append",
    "embedding",
    "expert_plan",
    "grouped_gemm",
    "grouped_gemm_dgrad",
    "grouped_gemm_wgrad",
    "head_gemm",
    "indexer_kl",
    "indexer_topk",
    "layer_norm",
    "linear",
    "lm_head_logprob",
    "moe_combine",
    "moe_mlp",
    "mtp_verify",
    "rms_norm",
    "rope",
    "rope_cos_sin",
    "route_topk",
    "sample",
    "silu_mul",
    "sparse_mla",
    "sum_squares",
]

for _name in __all__:
    if not isinstance(globals()[_name], type):
        globals()[_name] = with_arrays(globals()[_name])
