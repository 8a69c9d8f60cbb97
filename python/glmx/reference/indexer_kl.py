"""Oracle of indexer_kl: per query token, the divergence of two distributions over its list of keys."""

from __future__ import annotations

import torch

from glmx.reference.attention import key_rows

F64 = torch.float64


def index_scores(q_hd: torch.Tensor, weights_h: torch.Tensor, k_Nd: torch.Tensor) -> torch.Tensor:
    """I [N] of one query token: the weighted sum over its heads of relu(q . k)."""
    return weights_h @ torch.relu(q_hd @ k_Nd.T)


def indexer_kl(
    index_q: torch.Tensor,
    index_weights: torch.Tensor,
    index_k: torch.Tensor,
    q: torch.Tensor,
    kv: torch.Tensor,
    lse: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    seq_lens: torch.Tensor,
    *,
    cu_seqlens_k: torch.Tensor,
    scale: float,
    topk_indices: torch.Tensor | None = None,
    exact: bool = False,
) -> torch.Tensor:
    """index_q [T, Hi, Di], index_weights [T, Hi], index_k [rows, Di], q [T, A, Dk], kv [rows, Dk], lse [T, A] -> [T].

    Gradients reach index_q, index_weights and index_k; an empty list gives 0.
    """
    bounds, kls = cu_seqlens_q.tolist(), []
    q, kv, lse = (x.detach().to(F64) for x in (q, kv, lse))
    for i, n in enumerate(seq_lens.tolist()):
        rows = key_rows(i, n, cu_seqlens_k, None)
        for t in range(bounds[i], bounds[i + 1]):
            seen = rows[: n - (bounds[i + 1] - 1 - t)]
            if topk_indices is not None:
                seen = rows[topk_indices[t][topk_indices[t] >= 0].long()]
            p_N = torch.exp(q[t] @ kv[seen].T * scale - lse[t, :, None]).mean(0)
            scores_N = index_scores(index_q[t].to(F64), index_weights[t].to(F64), index_k[seen].to(F64))
            log_softmax_N = scores_N - torch.logsumexp(scores_N, 0) if len(seen) else scores_N
            kls.append((torch.xlogy(p_N, p_N) - p_N * log_softmax_N).sum())
    kl = torch.stack(kls) if kls else index_q.new_zeros(0, dtype=F64)
    return kl if exact else kl.float()
