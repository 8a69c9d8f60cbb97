"""Multi-head latent attention in its absorbed form (glm4_moe_lite, and under DSA glm_moe_dsa).

A token leaves one latent row behind, which is key and value of every head: heads meet it through kv_b_proj's two
halves, W_UK on the query and W_UV on the result, so no key or value of a single head ever exists. Prefill, decode and
training all compute this form: re-expanded keys would round differently.

Legend: T tokens, H hidden, A heads, n and r dims of a head without and with RoPE, v value dims of a head,
c latent dims (kv_lora_rank), d = c + r dims of a cached row, q query latent (q_lora_rank).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn

from glmx import ops
from glmx.layers.linear import Linear
from glmx.layers.norm import RMSNorm

if TYPE_CHECKING:
    from glmx.models.batch import Batch, Keys
    from glmx.models.config import ModelConfig
    from glmx.models.state import LayerState, Planes


class MLA(nn.Module):
    """x [T, H] -> [T, H], causal within each sequence. Scores are scaled by (n + r)^-0.5, the expanded heads' width.

    RoPE turns the last r dims of a query head and of the latent row: in pairs (2i, 2i+1), or with
    `rope_interleave` false in halves. The norms inside have eps `mla_norm_eps` (DeepSeek-V2, arXiv 2405.04434, 2.1).
    """

    def __init__(self, config: ModelConfig, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        H, A, eps = config.hidden_size, config.num_attention_heads, config.mla_norm_eps
        self.heads, self.nope_dim, self.v_dim = A, config.qk_nope_head_dim, config.v_head_dim
        self.qk_dim, self.latent_dim = config.qk_head_dim, config.kv_lora_rank
        self.row_dim = config.kv_lora_rank + config.qk_rope_head_dim
        self.interleaved = config.rope_interleave
        self.scale = config.qk_head_dim**-0.5
        self.low_rank = config.q_lora_rank is not None
        if config.q_lora_rank is None:
            self.q_proj = Linear(H, A * self.qk_dim, False, dtype, device)
        else:
            self.q_a_proj = Linear(H, config.q_lora_rank, False, dtype, device)
            self.q_a_layernorm = RMSNorm(config.q_lora_rank, eps, dtype, device)
            self.q_b_proj = Linear(config.q_lora_rank, A * self.qk_dim, False, dtype, device)
        self.kv_a_proj_with_mqa = Linear(H, self.row_dim, False, dtype, device)
        self.kv_a_layernorm = RMSNorm(self.latent_dim, eps, dtype, device)
        self.kv_b_proj = Linear(self.latent_dim, A * (self.nope_dim + self.v_dim), False, dtype, device)
        self.o_proj = Linear(A * self.v_dim, H, False, dtype, device)

    @property
    def planes(self) -> Planes:
        """What a token leaves in the cache."""
        return {"kv": (self.row_dim,)}

    def forward(
        self,
        x_TH: torch.Tensor,
        cos_sin: tuple[torch.Tensor, torch.Tensor],
        batch: Batch,
        state: LayerState | None,
    ) -> torch.Tensor:
        q_TAd = self.absorbed_queries(self.query_latent(x_TH), cos_sin)
        kv_Rd = self.latent_rows(x_TH, cos_sin)
        if state is not None:
            kv_Rd = state.append(kv=kv_Rd)["kv"]
        return self.output(self.attend(q_TAd, kv_Rd, batch.keys(state, kv_Rd.device)).out)

    def query_latent(self, x_TH: torch.Tensor) -> torch.Tensor:
        """What the heads of queries, and of an indexer, are made from: [T, q] after its norm; x without q_lora_rank."""
        return self.q_a_layernorm(self.q_a_proj(x_TH)) if self.low_rank else x_TH

    def absorbed_queries(self, latent_Tq: torch.Tensor, cos_sin: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        """[T, A, d]: W_UK^T q of the dims without RoPE, then the rotated dims."""
        project = self.q_b_proj if self.low_rank else self.q_proj
        q_TAnr = project(latent_Tq).view(-1, self.heads, self.qk_dim)
        absorbed_TAc = ops.head_gemm(q_TAnr[..., : self.nope_dim], self._kv_b()[:, : self.nope_dim], transposed=True)
        rotated_TAr = ops.rope(q_TAnr[..., self.nope_dim :], *cos_sin, interleaved=self.interleaved)
        return torch.cat([absorbed_TAc, rotated_TAr], -1)

    def latent_rows(self, x_TH: torch.Tensor, cos_sin: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        """[T, d]: the normed latent, then the rotated key dims that all heads share."""
        row_Td = self.kv_a_proj_with_mqa(x_TH)
        latent_Tc = self.kv_a_layernorm(row_Td[:, : self.latent_dim])
        rotated_T1r = ops.rope(row_Td[:, None, self.latent_dim :], *cos_sin, interleaved=self.interleaved)
        return torch.cat([latent_Tc, rotated_T1r[:, 0]], -1)

    def attend(self, q_TAd: torch.Tensor, kv_Rd: torch.Tensor, keys: Keys) -> ops.Attended:
        """Every key that a row sees: out [T, A, c], lse."""
        return ops.attention(
            q_TAd, kv_Rd[:, None], None, **keys, scale=self.scale, v_dim=self.latent_dim, return_lse=True
        )

    def output(self, out_TAc: torch.Tensor) -> torch.Tensor:
        """[T, H]: W_UV of each head's latent result, then o_proj."""
        out_TAv = ops.head_gemm(out_TAc, self._kv_b()[:, self.nope_dim :])
        return self.o_proj(out_TAv.flatten(1))

    def _kv_b(self) -> torch.Tensor:
        """kv_b_proj by heads, [A, n + v, c]."""
        return self.kv_b_proj.weight.view(self.heads, self.nope_dim + self.v_dim, self.latent_dim)
