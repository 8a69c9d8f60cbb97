"""Oracle of moe_mlp: the oracles of the ops that it is made of, one after the other."""

from __future__ import annotations

import torch

from glmx.reference.expert_plan import expert_plan
from glmx.reference.grouped_gemm import grouped_gemm
from glmx.reference.moe_combine import moe_combine


def moe_mlp(
    x: torch.Tensor,
    topk_weights: torch.Tensor,
    topk_ids: torch.Tensor,
    gate_up_proj: torch.Tensor,
    down_proj: torch.Tensor,
    *,
    exact: bool = False,
) -> torch.Tensor:
    """x [T, H], topk_weights [T, K], topk_ids int32 [T, K], gate_up_proj [E, 2I, H], down_proj [E, H, I] -> [T, H].

    out[t] is the sum over k of topk_weights[t, k] * down_proj[e] @ (silu(gate) * up), e = topk_ids[t, k], with gate and
    up the halves of gate_up_proj[e] @ x[t]. An id of -1 adds nothing.
    """
    plan = expert_plan(topk_ids, gate_up_proj.shape[0])
    offsets, row_token = plan.expert_offsets, plan.row_token
    h_RI = grouped_gemm(x, gate_up_proj, offsets, row_token=row_token, silu_mul=True, exact=exact)
    rows_RH = grouped_gemm(h_RI, down_proj, offsets, exact=exact)
    return moe_combine(rows_RH, topk_weights, plan.inverse, exact=exact)
