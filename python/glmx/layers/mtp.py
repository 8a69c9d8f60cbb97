"""The multi-token-prediction layer (DeepSeek-V3, 2.2; GLM-4.5): one more decoder layer, a joined input."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn

from glmx.layers.block import DecoderLayer, Stream
from glmx.layers.dsa import Selection
from glmx.layers.linear import Linear
from glmx.layers.norm import RMSNorm

if TYPE_CHECKING:
    from glmx.models.batch import Batch
    from glmx.models.config import ModelConfig
    from glmx.models.state import LayerState


class SharedHead(nn.Module):
    """The norm before the head; the head's matrix is the model's own lm_head."""

    def __init__(self, config: ModelConfig, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps, dtype, device)


class MTPLayer(DecoderLayer):
    """z_t = shared_head.norm(layer(eh_proj[enorm(embedding of token t+1) ; hnorm(hidden_t)])).

    The embedding comes first. hidden_t is the output of a final norm: model.norm's for the first step, this
    layer's own z for a further one. lm_head(z_t) predicts token t+2.
    """

    def __init__(self, config: ModelConfig, layer: int, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__(config, layer, dtype, device)
        H, eps = config.hidden_size, config.rms_norm_eps
        self.enorm = RMSNorm(H, eps, dtype, device)
        self.hnorm = RMSNorm(H, eps, dtype, device)
        self.eh_proj = Linear(2 * H, H, False, dtype, device)
        self.shared_head = SharedHead(config, dtype, device)

    def predict(
        self,
        embedding_TH: torch.Tensor,
        hidden_TH: torch.Tensor,
        cos_sin: tuple[torch.Tensor, torch.Tensor],
        batch: Batch,
        state: LayerState | None,
        selection: Selection | None = None,
    ) -> tuple[torch.Tensor, Selection | None]:
        """-> (z [T, H], the keys attended to where the layer selects). `selection`: an earlier draft step's, reused."""
        joined_T2H = torch.cat([self.enorm(embedding_TH), self.hnorm(hidden_TH)], dim=-1)
        stream = self(Stream(self.eh_proj(joined_T2H), selection=selection), cos_sin, batch, state)
        z_TH, _ = stream.norm(self.shared_head.norm)
        return z_TH, stream.selection
