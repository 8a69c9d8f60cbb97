"""Grouped-query attention with partial RoPE, optional QK-norm and biases (glm4_moe).

Legend: T tokens, H hidden, A query heads, G key/value heads, d head dim, S keys of one sequence.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import nn

from glmx import ops
from glmx.layers.linear import Linear
from glmx.layers.norm import RMSNorm

if TYPE_CHECKING:
    from glmx.models.batch import Batch
    from glmx.models.config import ModelConfig
    from glmx.models.state import LayerState


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

    One call per sequence, so that a sequence's result cannot depend on the batch around it. torch's SDPA
    stands here until the op `attention` replaces it (step 3); until then prefill and decode agree within
    rounding, not bit for bit.
    """
    lengths = batch.q_lens
    keys: Iterable[tuple[torch.Tensor, torch.Tensor]]
    if state is None:
        keys = list(zip(k_TGd.split(lengths), v_TGd.split(lengths), strict=True))
    else:
        assert batch.seq_ids is not None and batch.seq_lens is not None
        state.append(batch, k_TGd, v_TGd)
        keys = list(map(state.rows, batch.seq_ids, batch.seq_lens))
    out = [_attend_one(q, k, v) for q, (k, v) in zip(q_TAd.split(lengths), keys, strict=True) if len(q)]
    return torch.cat(out) if len(out) > 1 else out[0] if out else torch.empty_like(q_TAd)


def _attend_one(q_LAd: torch.Tensor, k_SGd: torch.Tensor, v_SGd: torch.Tensor) -> torch.Tensor:
    """The last L of S tokens attend to themselves and to everything before them -> [L, A, d]."""
    L, S = q_LAd.shape[0], k_SGd.shape[0]
    mask_LS = None
    if 1 < L < S:
        # is_causal counts from the first key; with cached keys row i sees S - L + i + 1 of them.
        mask_LS = torch.ones(L, S, dtype=torch.bool, device=q_LAd.device).tril(S - L)
    # [1, heads, tokens, d]: without the leading 1 torch picks a slower kernel.
    q, k, v = (x.transpose(0, 1).unsqueeze(0) for x in (q_LAd, k_SGd, v_SGd))
    out = F.scaled_dot_product_attention(q, k, v, mask_LS, is_causal=1 < L == S, enable_gqa=True)
    return out.squeeze(0).transpose(0, 1)
