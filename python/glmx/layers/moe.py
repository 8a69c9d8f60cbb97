"""The MoE layer: sigmoid router with a selection bias, routed experts, one shared expert (GLM-4.5, 2.1).

Legend: T tokens, H hidden, E experts, K experts per token, I expert width.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from glmx import ops
from glmx.layers.mlp import MLP

if TYPE_CHECKING:
    from glmx.models.config import ModelConfig


@dataclass
class RouterStats:
    """What one MoE layer routed in its last training forward.

    expert_counts int32 [E] tokens per expert; with `collect_scores` also scores fp32 [T, E] (sigmoid of the
    logits, differentiable) and topk_ids int32 [T, K], for the sequence aux loss.
    """

    expert_counts: torch.Tensor
    scores: torch.Tensor | None = None
    topk_ids: torch.Tensor | None = None


class Router(nn.Module):
    """x [T, H] -> (topk_weights fp32 [T, K], topk_ids int32 [T, K]); statistics are kept while training.

    e_score_correction_bias [E] takes part in the selection only. It is a buffer: it has no gradient, and it
    stays fp32 whatever the model is cast to.
    """

    e_score_correction_bias: torch.Tensor

    def __init__(self, config: ModelConfig, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        E = config.n_routed_experts
        self.weight = nn.Parameter(torch.empty(E, config.hidden_size, dtype=dtype, device=device))
        bias_E = torch.zeros(E, dtype=torch.float32, device=device)
        self.register_buffer("e_score_correction_bias", bias_E)
        self.config = config
        self.collect_scores = False
        self.stats: RouterStats | None = None

    def forward(self, x_TH: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        if self.weight.dtype == torch.float32:
            x_TH = x_TH.float()
        logits_TE = ops.linear(x_TH, self.weight, out_dtype=torch.float32)
        config = self.config
        weights_TK, ids_TK, counts_E, *scores = ops.route_topk(
            logits_TE,
            self.e_score_correction_bias,
            config.num_experts_per_tok,
            n_group=config.n_group,
            topk_group=config.topk_group,
            norm_topk_prob=config.norm_topk_prob,
            routed_scaling_factor=config.routed_scaling_factor,
            return_scores=self.training and self.collect_scores,
        )
        if self.training:
            self.stats = RouterStats(counts_E, scores[0], ids_TK) if scores else RouterStats(counts_E)
        return weights_TK, ids_TK

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Router:
        exact_E = self.e_score_correction_bias
        super()._apply(fn, recurse)
        moved_E = self.e_score_correction_bias
        if moved_E.dtype != torch.float32:
            # A cast of the model must not cost the bias its bits: an expert's selection depends on them.
            self.e_score_correction_bias = exact_E.to(moved_E.device)
        return self


class Experts(nn.Module):
    """E SwiGLU MLPs: gate_up_proj [E, 2I, H] (gate rows, then up rows), down_proj [E, H, I].

    glmx.load may put ops.StoredWeights in their places.
    """

    gate_up_proj: Any
    down_proj: Any

    def __init__(self, config: ModelConfig, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        E, H, I = config.n_routed_experts, config.hidden_size, config.moe_intermediate_size
        self.gate_up_proj = nn.Parameter(torch.empty(E, 2 * I, H, dtype=dtype, device=device))
        self.down_proj = nn.Parameter(torch.empty(E, H, I, dtype=dtype, device=device))

    def forward(self, x_TH: torch.Tensor, weights_TK: torch.Tensor, ids_TK: torch.Tensor) -> torch.Tensor:
        return ops.moe_mlp(x_TH, weights_TK, ids_TK, self.gate_up_proj, self.down_proj)


class MoE(nn.Module):
    """sum_k weight_k * expert_k(x) + shared_experts(x); the shared expert has neither gate nor scale."""

    def __init__(self, config: ModelConfig, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        self.gate = Router(config, dtype, device)
        self.experts = Experts(config, dtype, device)
        shared = config.moe_intermediate_size * config.n_shared_experts
        self.shared_experts = MLP(config.hidden_size, shared, dtype, device)

    def forward(self, x_TH: torch.Tensor) -> torch.Tensor:
        weights_TK, ids_TK = self.gate(x_TH)
        return self.experts(x_TH, weights_TK, ids_TK) + self.shared_experts(x_TH)
