"""What the lists of a glm_moe_dsa leave out: the share of dense attention's probability that the listed keys hold.

Attention over some keys and over all keys differ in their denominators alone, so the share is exp(lse - lse of all).

Legend: T tokens, A heads, k listed keys.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch

from glmx import ops
from glmx.layers.dsa import DSA
from glmx.models.batch import Batch, Keys
from glmx.models.decoder import Decoder


@dataclass(frozen=True)
class Sparsity:
    """`sparse_tokens` of `tokens` had more keys than index_topk. Means over those, all layers and heads: the share of
    attention that the `selected` keys hold, and that a `window` of the last index_topk keys would hold.
    """

    tokens: int
    sparse_tokens: int
    selected: float
    window: float


@torch.no_grad()
def measure(model: Decoder, texts: Iterable[tuple[torch.Tensor, Batch]]) -> Sparsity:
    """texts: (ids int64 [T], Batch of whole sequences); `model` is in eval mode. The MTP layer is not measured."""
    layers = [layer.self_attn for layer in model.model.layers if isinstance(layer.self_attn, DSA)]
    selected: list[float] = []
    window: list[float] = []
    tokens = sparse_tokens = 0

    def observe(layer: DSA, q_TAd: torch.Tensor, kv_Td: torch.Tensor, keys: Keys, lists_Tk: torch.Tensor) -> None:
        sparse_T = positions_T >= layer.top_k
        all_TA = layer.attend(q_TAd, kv_Td, keys).lse[sparse_T]
        for shares, lists in ((selected, lists_Tk), (window, _window(positions_T, lists_Tk.shape[1]))):
            attended = ops.sparse_mla(
                q_TAd, kv_Td, lists, **keys, scale=layer.scale, v_dim=layer.latent_dim, return_lse=True
            )
            shares += (attended.lse[sparse_T] - all_TA).double().exp().flatten().tolist()

    for layer in layers:
        layer.observer = observe
    try:
        for ids_T, batch in texts:
            positions_T = torch.cat([torch.arange(n, device=model.device) for n in batch.q_lens])
            model.forward_tokens(ids_T.to(model.device), positions_T, batch)
            tokens += len(ids_T)
            sparse_tokens += int((positions_T >= model.config.index_topk).sum())
    finally:
        for layer in layers:
            layer.observer = None
    return Sparsity(tokens, sparse_tokens, *(math.fsum(shares) / max(len(shares), 1) for shares in (selected, window)))


def _window(positions_T: torch.Tensor, size: int) -> torch.Tensor:
    """int32 [T, size]: the last `size` keys that a token sees, itself included."""
    lists_Tk = (positions_T[:, None] - size + 1).clamp(min=0) + torch.arange(size, device=positions_T.device)
    return torch.where(lists_Tk <= positions_T[:, None], lists_Tk, -1).to(torch.int32)
