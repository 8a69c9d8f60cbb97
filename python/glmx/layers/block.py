"""The decoder layer (two pre-norms) and the MTP layer built on it.

The residual stream is carried beside the layer's output, so that each add is fused with the norm after it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import nn

from glmx.layers.dsa import DSA, Selection
from glmx.layers.gqa import GQA
from glmx.layers.mla import MLA
from glmx.layers.mlp import MLP
from glmx.layers.moe import MoE
from glmx.layers.norm import RMSNorm

if TYPE_CHECKING:
    from glmx.models.batch import Batch
    from glmx.models.config import ModelConfig
    from glmx.models.state import LayerState


class Stream(NamedTuple):
    """The residual stream is residual_TH + x_TH; before the first layer there is no x_TH.

    `selection` is the keys that the last DSA layer attended to, for the layers that share its list.
    """

    residual_TH: torch.Tensor
    x_TH: torch.Tensor | None = None
    selection: Selection | None = None

    def norm(self, norm: RMSNorm) -> tuple[torch.Tensor, torch.Tensor]:
        """(norm of the stream, the stream added up)."""
        if self.x_TH is None:
            return norm(self.residual_TH), self.residual_TH
        return norm.add(self.x_TH, self.residual_TH)


class DecoderLayer(nn.Module):
    """h += attention(input_layernorm(h)); h += mlp(post_attention_layernorm(h))."""

    def __init__(self, config: ModelConfig, layer: int, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        H, eps = config.hidden_size, config.rms_norm_eps
        self.input_layernorm = RMSNorm(H, eps, dtype, device)
        self.self_attn: GQA | MLA | DSA
        if config.model_type == "glm_moe_dsa":
            self.self_attn = DSA(config, layer, dtype, device)
        else:
            self.self_attn = (MLA if config.is_mla else GQA)(config, dtype, device)
        self.post_attention_layernorm = RMSNorm(H, eps, dtype, device)
        self.mlp: nn.Module
        if config.is_moe_layer(layer):
            self.mlp = MoE(config, dtype, device)
        else:
            self.mlp = MLP(H, config.intermediate_size, dtype, device)

    def forward(
        self,
        stream: Stream,
        cos_sin: tuple[torch.Tensor, torch.Tensor],
        batch: Batch,
        state: LayerState | None,
    ) -> Stream:
        x_TH, residual_TH = stream.norm(self.input_layernorm)
        selection = stream.selection
        if isinstance(self.self_attn, DSA):
            attended_TH, selection = self.self_attn.forward_selected(x_TH, cos_sin, batch, state, selection)
        else:
            attended_TH = self.self_attn(x_TH, cos_sin, batch, state)
        x_TH, residual_TH = Stream(residual_TH, attended_TH).norm(self.post_attention_layernorm)
        return Stream(residual_TH, self.mlp(x_TH), selection)
