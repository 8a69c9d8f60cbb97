"""The oracles: every op of glmx.ops in plain torch, slow and obvious. Importable without the extension.

Each function has the name and the signature of its op plus one keyword. By default the result has the op's
dtype and its rounding points, with fp64 arithmetic between them, so an oracle can stand in for the op. With
`exact=True` nothing is rounded: inputs are taken as fp64 (fp64 leaves are welcome, gradients then come in
fp64 too) and the result is fp64. Tests derive their tolerances around the exact form.
"""

from __future__ import annotations

from glmx.reference.adamw import adamw
from glmx.reference.add_rms_norm import add_rms_norm
from glmx.reference.attention import Attended, attention
from glmx.reference.cache_append import cache_append
from glmx.reference.embedding import embedding
from glmx.reference.expert_plan import ExpertPlan, expert_plan
from glmx.reference.gemm_tree import gemm_tree
from glmx.reference.grouped_gemm import grouped_gemm, grouped_gemm_dgrad, grouped_gemm_wgrad, linear
from glmx.reference.head_gemm import head_gemm
from glmx.reference.indexer_kl import indexer_kl
from glmx.reference.indexer_topk import indexer_topk
from glmx.reference.layer_norm import layer_norm
from glmx.reference.lm_head_logprob import LogProbs, lm_head_logprob
from glmx.reference.moe_combine import moe_combine
from glmx.reference.moe_mlp import moe_mlp
from glmx.reference.mtp_verify import Verified, mtp_verify
from glmx.reference.rms_norm import rms_norm
from glmx.reference.rope import rope, rope_cos_sin
from glmx.reference.route_topk import route_topk
from glmx.reference.sample import sample
from glmx.reference.silu_mul import silu_mul
from glmx.reference.sparse_mla import sparse_mla
from glmx.reference.sum_squares import sum_squares

__all__ = [
    "Attended",
    "ExpertPlan",
    "LogProbs",
    "Verified",
    "adamw",
    "add_rms_norm",
    "attention",
    "cache_append",
    "embedding",
    "expert_plan",
    "gemm_tree",
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
