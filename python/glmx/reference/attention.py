"""Oracle of attention: one softmax per query row and head over the keys that it sees."""

from __future__ import annotations

from typing import NamedTuple

import torch

F64 = torch.float64
PAGE = 64


class Attended(NamedTuple):
    """out [T, A, Dv]; lse [T, A], natural log."""

    out: torch.Tensor
    lse: torch.Tensor


def key_rows(i: int, n: int, cu_seqlens_k: torch.Tensor | None, block_table: torch.Tensor | None) -> torch.Tensor:
    """The rows of the first n keys of sequence i, int64 [n]."""
    j = torch.arange(n)
    if cu_seqlens_k is not None:
        return int(cu_seqlens_k[i]) + j
    assert block_table is not None
    return block_table[i].long()[j // PAGE] * PAGE + j % PAGE


def attend_one(
    q_AD: torch.Tensor, k_AND: torch.Tensor, v_ANd: torch.Tensor, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """One query token over its n keys, given per head -> out [A, Dv], lse [A]."""
    s_AN = (k_AND @ q_AD[:, :, None])[:, :, 0] * scale
    return (torch.softmax(s_AN, 1)[:, None] @ v_ANd)[:, 0], torch.logsumexp(s_AN, 1)


def attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor | None,
    cu_seqlens_q: torch.Tensor,
    seq_lens: torch.Tensor,
    *,
    cu_seqlens_k: torch.Tensor | None = None,
    block_table: torch.Tensor | None = None,
    scale: float | None = None,
    v_dim: int | None = None,
    return_lse: bool = False,
    exact: bool = False,
) -> torch.Tensor | Attended:
    """q [T, A, Dk], k [rows, G, Dk], v [rows, G, Dv] or None (the first v_dim values of k) -> out [T, A, Dv] (and lse).

    The query rows of a sequence are its last tokens; each sees the keys up to itself.
    """
    values = k[:, :, :v_dim] if v is None else v
    group = q.shape[1] // k.shape[1]
    scale = q.shape[2] ** -0.5 if scale is None else scale
    bounds, outs, lses = cu_seqlens_q.tolist(), [], []
    for i, n in enumerate(seq_lens.tolist()):
        rows = key_rows(i, n, cu_seqlens_k, block_table)
        k_AND, v_ANd = (x[rows].to(F64).repeat_interleave(group, 1).transpose(0, 1) for x in (k, values))
        for t in range(bounds[i], bounds[i + 1]):
            seen = n - (bounds[i + 1] - 1 - t)
            out, lse = attend_one(q[t].to(F64), k_AND[:, :seen], v_ANd[:, :seen], scale)
            outs.append(out)
            lses.append(lse)
    out = torch.stack(outs) if outs else q.new_zeros(0, q.shape[1], values.shape[2], dtype=F64)
    lse = torch.stack(lses) if lses else q.new_zeros(0, q.shape[1], dtype=F64)
    if not exact:
        out, lse = out.to(q.dtype), lse.float()
    return Attended(out, lse) if return_lse else out
