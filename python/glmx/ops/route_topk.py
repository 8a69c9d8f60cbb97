"""route_topk: the router of a MoE layer: sigmoid scores, biased selection, normalised weights."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from glmx.ops._library import apply, check_dim, check_same_dtype, op

_forward = op("route_topk")
_backward = op("route_topk_backward")


class _Options(NamedTuple):
    n_group: int
    topk_group: int
    norm_topk_prob: bool
    routed_scaling_factor: float


class RouteTopkFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits_TE: Tensor, bias_E: Tensor, top_k: int, options: _Options, return_scores: bool):
        T, E = logits_TE.shape
        weights_TK = logits_TE.new_empty(T, top_k)
        ids_TK = logits_TE.new_empty(T, top_k, dtype=torch.int32)
        counts_E = logits_TE.new_empty(E, dtype=torch.int32)
        scores_TE = torch.empty_like(logits_TE) if return_scores else None
        _forward(weights_TK, ids_TK, counts_E, scores_TE, logits_TE, bias_E, *options)
        ctx.mark_non_differentiable(ids_TK, counts_E)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(logits_TE, ids_TK)
        ctx.options = options
        return (weights_TK, ids_TK, counts_E, scores_TE) if return_scores else (weights_TK, ids_TK, counts_E)

    @staticmethod
    def backward(ctx, d_weights_TK: Tensor | None, _ids, _counts, d_scores_TE: Tensor | None = None):
        if d_weights_TK is None and d_scores_TE is None:
            return None, None, None, None, None
        logits_TE, ids_TK = ctx.saved_tensors
        d_weights_TK = None if d_weights_TK is None else d_weights_TK.contiguous()
        d_scores_TE = None if d_scores_TE is None else d_scores_TE.contiguous()
        d_logits_TE = torch.empty_like(logits_TE)
        options = ctx.options
        _backward(
            d_logits_TE,
            d_weights_TK,
            d_scores_TE,
            logits_TE,
            ids_TK,
            options.norm_topk_prob,
            options.routed_scaling_factor,
        )
        return d_logits_TE, None, None, None, None


def route_topk(
    logits: Tensor,
    bias: Tensor,
    top_k: int,
    *,
    n_group: int = 1,
    topk_group: int = 1,
    norm_topk_prob: bool = True,
    routed_scaling_factor: float = 1.0,
    return_scores: bool = False,
) -> tuple[Tensor, ...]:
    """Chooses top_k experts per token by sigmoid(logits) + bias, and weighs them by sigmoid(logits).

    Args:
        logits: fp32 [T, E], E <= 512: the router's output.
        bias: fp32 [E]: added to the scores for the selection only (`e_score_correction_bias`); it gets no gradient.
        top_k: K, 1 <= K <= E.
        n_group, topk_group: experts in n_group equal groups; only those of the topk_group best groups can be chosen. A
            group's score is the sum of its two largest biased scores.
        norm_topk_prob: divide the weights by (their sum + 1e-20).
        routed_scaling_factor: multiplies the weights, last.
        return_scores: return the scores too.

    Returns:
        (topk_weights fp32 [T, K], topk_ids int32 [T, K], expert_counts int32 [E]) and, if asked for, scores
        fp32 [T, E].
        The ids are in descending order of the biased score; ties go to the lower id, NaN counts as -inf, -0 as +0.
        expert_counts[e] is the number of tokens routed to expert e.

    Raises:
        ValueError: dtypes, shapes or groups that do not fit; more than 512 experts.

    Differentiable in logits, through topk_weights and scores.
    Source: DeepSeek-V3, arXiv 2412.19437, section 2.1.2; GLM-4.5's `Glm4MoeTopkRouter`.
    """
    check_dim(logits, "logits", 2)
    check_same_dtype(logits, "logits", torch.float32)
    check_same_dtype(bias, "bias", torch.float32)
    E = logits.shape[1]
    if bias.shape != (E,):
        raise ValueError(
            f"bias: expected shape [logits.shape[1]]: got {list(bias.shape)}, logits is {list(logits.shape)}"
        )
    if not 1 <= top_k <= E:
        raise ValueError(f"top_k: expected 1 <= top_k <= {E} (experts): got {top_k}")
    options = _Options(n_group, topk_group, norm_topk_prob, routed_scaling_factor)
    return apply(RouteTopkFunction, logits.contiguous(), bias.detach().contiguous(), top_k, options, return_scores)
