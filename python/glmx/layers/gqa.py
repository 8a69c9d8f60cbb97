"""Grouped-query attention with partial RoPE, optional QK-norm and biases (glm4_moe).

Legend: T tokens, H hidden, A query heads, G key/value heads, d head dim.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn

from glmx import ops
from glmx.layers.linear import Linear
from glmx.layers.norm import RMSNorm

if TYPE_CHECKING:
    from glmx.models.batch import Batch
    from glmx.models.config import ModelConfig
    from glmx.models.state import LayerState, Planes


class GQA(nn.Module):
    """x [T, H] -> [T, H]. Key/value head j serves query heads [j*A/G, (j+1)*A/G); the scale is d^-0.5.

    QK-norm acts per head, after the projection's bias and before RoPE. o_proj never has a bias.
    """

    def __init__(self, config: ModelConfig, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        H, d, bias = config.hidden_size, config.head_dim, config.attention_bias
        self.heads, self.kv_heads, self.head_dim = config.num_attention_heads, config.num_key_value_heads, d
        self.q_proj = Linear(H, self.heads * d, bias, dtype, device)
        self.k_proj = Linear(H, self.kv_heads * d, bias, dtype, device)
        self.v_proj = Linear(H, self.kv_heads * d, bias, dtype, device)
        self.o_proj = Linear(self.heads * d, H, False, dtype, device)
        self.use_qk_norm = config.use_qk_norm
        if config.use_qk_norm:
            self.q_norm = RMSNorm(d, config.rms_norm_eps, dtype, device)
            self.k_norm = RMSNorm(d, config.rms_norm_eps, dtype, device)

    @property
    def planes(self) -> Planes:
        """What a token leaves in the cache."""
        row = (self.kv_heads, self.head_dim)
        return {"k": row, "v": row}

    def forward(
        self,
        x_TH: torch.Tensor,
        cos_sin: tuple[torch.Tensor, torch.Tensor],
        batch: Batch,
        state: LayerState | None,
    ) -> torch.Tensor:
        T = x_TH.shape[0]
        q_TAd = self.q_proj(x_TH).view(T, self.heads, self.head_dim)
        k_TGd = self.k_proj(x_TH).view(T, self.kv_heads, self.head_dim)
        v_TGd = self.v_proj(x_TH).view(T, self.kv_heads, self.head_dim)
        if self.use_qk_norm:
            q_TAd, k_TGd = self.q_norm(q_TAd), self.k_norm(k_TGd)
        q_TAd, k_TGd = ops.rope(q_TAd, *cos_sin), ops.rope(k_TGd, *cos_sin)
        out_TAd = attention(q_TAd, k_TGd, v_TGd, batch, state)
        return self.o_proj(out_TAd.reshape(T, self.heads * self.head_dim))


def attention(
    q_TAd: torch.Tensor, k_TGd: torch.Tensor, v_TGd: torch.Tensor, batch: Batch, state: LayerState | None
) -> torch.Tensor:
    """Causal attention within each sequence, its cached keys included -> [T, A, d].

    Over cached keys it runs where they lie (models/device.py). Without a cache, where gradients may be asked for, it
    stays on the model's device, whatever the op does there: with autograd's nodes on two devices the order in which
    gradients meet, and so their bits, would be up to two threads.
    """
    if state is None:
        return ops.attention(q_TAd, k_TGd, v_TGd, **batch.keys(None, q_TAd.device))
    planes = state.append(k=k_TGd, v=v_TGd)
    out_TAd = ops.attention(q_TAd.to(state.device), planes["k"], planes["v"], **batch.keys(state, state.device))
    return out_TAd.to(q_TAd.device)
