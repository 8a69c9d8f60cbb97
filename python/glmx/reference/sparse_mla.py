"""Oracle of sparse_mla: one softmax per query row and head over the listed keys."""

from __future__ import annotations

import torch

from glmx.reference.attention import Attended, attend_one, key_rows

F64 = torch.float64


def sparse_mla(
    q: torch.Tensor,
    kv: torch.Tensor,
    topk_indices: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    seq_lens: torch.Tensor,
    *,
    cu_seqlens_k: torch.Tensor | None = None,
    block_table: torch.Tensor | None = None,
    scale: float,
    v_dim: int,
    return_lse: bool = False,
    exact: bool = False,
) -> torch.Tensor | Attended:
    """q [T, A, Dk], kv [rows, Dk], topk_indices [T, k], -1 padded -> out [T, A, v_dim] (and lse [T, A]).

    A row without keys: zeros, and an lse of +inf.
    """
    A, bounds, outs, lses = q.shape[1], cu_seqlens_q.tolist(), [], []
    for i, n in enumerate(seq_lens.tolist()):
        rows = key_rows(i, n, cu_seqlens_k, block_table)
        for t in range(bounds[i], bounds[i + 1]):
            listed = topk_indices[t][topk_indices[t] >= 0].long()
            if len(listed) == 0:
                outs.append(torch.zeros(A, v_dim, dtype=F64))
                lses.append(torch.full((A,), float("inf"), dtype=F64))
                continue
            keys = kv[rows[listed]].to(F64)[None].expand(A, -1, -1)
            out, lse = attend_one(q[t].to(F64), keys, keys[:, :, :v_dim], scale)
            outs.append(out)
            lses.append(lse)
    out = torch.stack(outs) if outs else q.new_zeros(0, A, v_dim, dtype=F64)
    lse = torch.stack(lses) if lses else q.new_zeros(0, A, dtype=F64)
    if not exact:
        out, lse = out.to(q.dtype), lse.float()
    return Attended(out, lse) if return_lse else out
