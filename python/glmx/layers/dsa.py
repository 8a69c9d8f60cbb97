"""DeepSeek sparse attention (DSA): MLA over the keys that an indexer selects (glm_moe_dsa).

An indexer scores every key of a row with a few light heads, I[t, s] = sum over heads of w[t] * relu(q[t] . k[s]), and
the row attends to its `index_topk` best keys (DeepSeek-V3.2, 2.1). Layers without an indexer use the list of the last
layer that has one (IndexShare, arXiv 2603.12201). Up to index_topk keys a row sees them all, and its bits are MLA's.

Selecting has no gradient. In training an indexer learns from `indexer_kl`: its softmax against the attention of every
layer that uses its list; what it reads is detached, so the rest of the model never feels that loss.

Legend: T tokens, H hidden, A heads, I index heads, i dims of an index head, d dims of a latent row, q query latent.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import nn

from glmx import ops
from glmx.layers.linear import Linear
from glmx.layers.mla import MLA
from glmx.layers.norm import LayerNorm

if TYPE_CHECKING:
    from glmx.models.batch import Batch, Keys
    from glmx.models.config import ModelConfig
    from glmx.models.state import LayerState, Planes

CosSin = tuple[torch.Tensor, torch.Tensor]
K_NORM_EPS = 1e-6  # transformers' and vLLM's, whatever rms_norm_eps says


class Selection(NamedTuple):
    """The keys that rows attend to, handed from layer to layer.

    topk_indices  int32 [T, k] as ops.sparse_mla takes them; None: every key that a row sees
    index_rows    what the list was made from (q, weights, k), where an indexer is being trained; else None
    """

    topk_indices: torch.Tensor | None
    index_rows: tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None = None


class Indexer(nn.Module):
    """Index queries [T, I, i] with their weights fp32 [T, I], and index keys [T, i].

    RoPE turns the first r dims, in pairs (2i, 2i+1), or with `indexer_rope_interleave` false in halves. The weights
    include I^-0.5 and the scores' i^-0.5; they may be negative, and are never rounded to bf16.
    """

    def __init__(self, config: ModelConfig, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        H, I, i = config.hidden_size, config.index_n_heads, config.index_head_dim
        assert config.q_lora_rank is not None, "checked by ModelConfig"
        self.heads, self.dim, self.interleaved = I, i, config.indexer_rope_interleave
        self.weight_scale = (I * i) ** -0.5
        self.wq_b = Linear(config.q_lora_rank, I * i, False, dtype, device)
        self.wk = Linear(H, i, False, dtype, device)
        self.k_norm = LayerNorm(i, K_NORM_EPS, dtype, device)
        self.weights_proj = Linear(H, I, False, dtype, device)

    def queries(
        self, x_TH: torch.Tensor, latent_Tq: torch.Tensor, cos_sin: CosSin
    ) -> tuple[torch.Tensor, torch.Tensor]:
        q_TIi = self.wq_b(latent_Tq).view(-1, self.heads, self.dim)
        weights_TI = self.weights_proj(x_TH, out_dtype=torch.float32) * self.weight_scale
        return ops.rope(q_TIi, *cos_sin, interleaved=self.interleaved), weights_TI

    def keys(self, x_TH: torch.Tensor, cos_sin: CosSin) -> torch.Tensor:
        k_Ti = self.k_norm(self.wk(x_TH))
        return ops.rope(k_Ti[:, None], *cos_sin, interleaved=self.interleaved)[:, 0]


class DSA(MLA):
    """MLA over selected keys; `indexer` is None where the layer takes the list of a layer before it.

    collect_kl   training forwards keep `kl`, indexer_kl's [T] of this layer's attention, for the trainer
    see_all_keys training forwards attend to every key (the indexer's dense warm-up); its loss is over all of them
    observer     called with (layer, q [T, A, d], kv, keys, lists) when rows have attended to lists, for measurements
    """

    def __init__(self, config: ModelConfig, layer: int, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__(config, dtype, device)
        self.top_k = config.index_topk
        self.indexer = Indexer(config, dtype, device) if config.has_indexer(layer) else None
        self.index_dim = config.index_head_dim
        # An MTP layer selects too, but a draft step behind the first one may be given that one's list, which must then
        # exist for the shortest context. In the trunk, what a layer with an indexer is given was for the layers before.
        self.takes_given = layer == config.num_hidden_layers
        self.always_lists = self.takes_given and config.index_share_for_mtp_iteration
        self.collect_kl = False
        self.see_all_keys = False
        self.kl: torch.Tensor | None = None
        self.observer: Callable[[DSA, torch.Tensor, torch.Tensor, Keys, torch.Tensor], None] | None = None

    @property
    def planes(self) -> Planes:
        own = {} if self.indexer is None else {"index_k": (self.index_dim,)}
        return {**super().planes, **own}

    def forward_selected(
        self, x_TH: torch.Tensor, cos_sin: CosSin, batch: Batch, state: LayerState | None, given: Selection | None
    ) -> tuple[torch.Tensor, Selection]:
        """x [T, H] -> ([T, H], the selection it attended to). `given`: that of the layer or draft step before."""
        latent_Tq = self.query_latent(x_TH)
        q_TAd = self.absorbed_queries(latent_Tq, cos_sin)
        kv_Rd = self.latent_rows(x_TH, cos_sin)
        if state is not None:
            kv_Rd = state.append(kv=kv_Rd)["kv"]
        selection = self.select(x_TH.detach(), latent_Tq.detach(), cos_sin, batch, state, given)
        keys, lists_Tk = batch.keys(state, kv_Rd.device), selection.topk_indices
        if lists_Tk is None:
            attended = self.attend(q_TAd, kv_Rd, keys)
        else:
            attended = ops.sparse_mla(
                q_TAd, kv_Rd, lists_Tk, **keys, scale=self.scale, v_dim=self.latent_dim, return_lse=True
            )
            if self.observer is not None:
                self.observer(self, q_TAd, kv_Rd, keys, lists_Tk)
        if selection.index_rows is not None:
            self.kl = ops.indexer_kl(
                *selection.index_rows,
                q_TAd.detach(),
                kv_Rd.detach(),
                attended.lse,
                keys["cu_seqlens_q"],
                keys["seq_lens"],
                cu_seqlens_k=keys["cu_seqlens_q"],
                scale=self.scale,
                topk_indices=lists_Tk,
            )
        return self.output(attended.out), selection

    def select(
        self,
        x_TH: torch.Tensor,
        latent_Tq: torch.Tensor,
        cos_sin: CosSin,
        batch: Batch,
        state: LayerState | None,
        given: Selection | None,
    ) -> Selection:
        """Writes this layer's index keys, then selects, or takes what is given."""
        if self.indexer is None:
            if given is None:
                raise ValueError("a layer without an indexer needs the selection of a layer before it")
            return given
        train = self.training and self.collect_kl and state is None
        with nullcontext() if train else torch.no_grad():
            k_Ri = self.indexer.keys(x_TH, cos_sin)
            if state is not None:
                k_Ri = state.append(index_k=k_Ri)["index_k"]
            if given is not None and self.takes_given:
                return given
            all_keys = self.training and self.see_all_keys or batch.max_keys <= self.top_k and not self.always_lists
            if all_keys and not train:
                return Selection(None)
            q_TIi, weights_TI = self.indexer.queries(x_TH, latent_Tq, cos_sin)
        rows = (q_TIi, weights_TI, k_Ri) if train else None
        if all_keys:
            return Selection(None, rows)
        top_k = min(self.top_k, max(batch.max_keys, 1))
        lists_Tk = ops.indexer_topk(
            q_TIi.detach(), weights_TI.detach(), k_Ri.detach(), top_k=top_k, **batch.keys(state, k_Ri.device)
        )
        return Selection(lists_Tk, rows)
