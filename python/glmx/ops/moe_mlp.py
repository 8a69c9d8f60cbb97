"""moe_mlp: the routed experts of a MoE layer, plan, products and weighted sum, in one call."""

from __future__ import annotations

import torch
from torch import Tensor

from glmx.ops._library import check_dim, check_model_dtype, check_same_dtype, differentiated, op
from glmx.ops.expert_plan import expert_plan
from glmx.ops.grouped_gemm import grouped_gemm
from glmx.ops.moe_combine import moe_combine
from glmx.ops.stored_weight import StoredWeight

_forward = op("moe_mlp")
_stored = op("moe_mlp_stored")


def moe_mlp(
    x: Tensor,
    topk_weights: Tensor,
    topk_ids: Tensor,
    gate_up_proj: Tensor | StoredWeight,
    down_proj: Tensor | StoredWeight,
) -> Tensor:
    """out[t] = sum over k of topk_weights[t, k] * down_proj[e] @ (silu(gate) * up), e = topk_ids[t, k].

    gate and up are the two halves of gate_up_proj[e] @ x[t].

    Args:
        x: [T, H], fp32 or bf16.
        topk_weights: fp32 [T, K], the weight of each pair.
        topk_ids: int32 [T, K], the expert of each pair; -1 for a pair that goes to no expert and adds nothing.
        gate_up_proj: [E, 2 * I, H], the dtype of x: an expert's gate rows, then its up rows.
        down_proj: [E, H, I], the dtype of x. Or both a StoredWeight of one format, gate_up_proj of two parts; then x is
            bf16 and nothing is differentiable.

    Returns:
        [T, H] in the dtype of x: the bits of `expert_plan`, `grouped_gemm` with silu_mul, `grouped_gemm` and
        `moe_combine`, one after the other. silu(gate) * up and each expert's row are rounded to the dtype of x, the sum
        over k is fp32 and rounded once. A token's bits do not depend on the other tokens.

    Raises:
        ValueError: dtypes or shapes that do not fit, an id that is neither -1 nor in [0, E).

    Differentiable in x, topk_weights, gate_up_proj and down_proj: where a gradient can be asked for, those ops are
    called in its place, and the weights' `main_grad` is theirs to fill.
    Source: Shazeer et al. 2017, arXiv 1701.06538; SwiGLU: Shazeer 2020, arXiv 2002.05202.
    """
    check_model_dtype(x, "x")
    check_dim(x, "x", 2)
    check_dim(topk_ids, "topk_ids", 2)
    check_same_dtype(topk_ids, "topk_ids", torch.int32)
    check_same_dtype(topk_weights, "topk_weights", torch.float32)
    if isinstance(gate_up_proj, StoredWeight) and isinstance(down_proj, StoredWeight):
        gate_up_proj.check("gate_up_proj", x, parts=2)
        down_proj.check("down_proj", x, parts=1)
        if gate_up_proj.codes != down_proj.codes:
            raise ValueError(f"down_proj: expected format and scales of gate_up_proj, {gate_up_proj}: got {down_proj}")
    elif isinstance(gate_up_proj, StoredWeight) or isinstance(down_proj, StoredWeight):
        raise ValueError("gate_up_proj, down_proj: expected both to be a StoredWeight, or none: got one of them")
    else:
        check_dim(down_proj, "down_proj", 3)
        check_same_dtype(down_proj, "down_proj", x.dtype)
        check_same_dtype(gate_up_proj, "gate_up_proj", x.dtype)
    (T, H), (E, _, I), K = x.shape, down_proj.shape, topk_ids.shape[1]
    if topk_ids.shape[0] != T or K < 1:
        raise ValueError(f"topk_ids: expected shape [x.shape[0] == {T}, at least 1]: got {list(topk_ids.shape)}")
    if topk_weights.shape != topk_ids.shape:
        raise ValueError(f"topk_weights: expected shape {list(topk_ids.shape)}: got {list(topk_weights.shape)}")
    if down_proj.shape[1] != H:
        raise ValueError(f"down_proj: expected down_proj.shape[1] == x.shape[1] == {H}: got {down_proj.shape[1]}")
    if gate_up_proj.shape != (E, 2 * I, H):
        raise ValueError(
            f"gate_up_proj: expected shape {[E, 2 * I, H]} (E, 2 * I, H of x and down_proj): got "
            f"{list(gate_up_proj.shape)}"
        )
    if differentiated(x, topk_weights, gate_up_proj, down_proj):
        plan = expert_plan(topk_ids, E)
        at = plan.expert_offsets
        h_RI = grouped_gemm(x, gate_up_proj, at, row_token=plan.row_token, inverse=plan.inverse, silu_mul=True)
        return moe_combine(grouped_gemm(h_RI, down_proj, at), topk_weights, plan.inverse)
    x, topk_weights, topk_ids = x.contiguous(), topk_weights.contiguous(), topk_ids.contiguous()
    plan_ints = torch.empty(E + 1 + 2 * T * K, dtype=torch.int32, device=x.device)
    out_TH, h_RI, rows_RH = torch.empty_like(x), x.new_empty(T * K, I), x.new_empty(T * K, H)
    outputs = out_TH, plan_ints, h_RI, rows_RH
    if isinstance(gate_up_proj, StoredWeight) and isinstance(down_proj, StoredWeight):
        _stored(*outputs, x, topk_weights, topk_ids, gate_up_proj.table, down_proj.table, *down_proj.codes)
    elif isinstance(gate_up_proj, Tensor) and isinstance(down_proj, Tensor):
        _forward(*outputs, x, topk_weights, topk_ids, gate_up_proj.contiguous(), down_proj.contiguous())
    return out_TH
