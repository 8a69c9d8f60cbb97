"""Error bounds of attention over lists of keys, derived from its order of operations (ops.h, "Attention").

Legend: A query heads, N keys of one query row's list, D and d the widths of keys and values.
"""

from __future__ import annotations

import torch

from tests.ops.checks import F64, TINY, U32, UNIT, gemm_unit

EXP_UNITS = 3  # exp within 1.5 ulp
BLOCK = 64


def _dot(a: torch.Tensor, b: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """a [A, D] . b [A, N, D] exactly, [A, N], and what the GEMM tree may be off by."""
    size = torch.einsum("ad,and->an", a.abs(), b.abs())
    return torch.einsum("ad,and->an", a, b), gemm_unit(a.shape[1]) * size + (a.shape[1] + 2) * TINY


class Bounds:
    """Bounds of out, lse, and of the gradients of a call whose query token t lists the key rows `lists[t]`.

    q [T, A, D], k [rows, G, D], v [rows, G, d]; with d_out [T, A, d] also d_q, d_k, d_v. fp64, absolute, per element.
    """

    def __init__(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        lists: list[torch.Tensor],
        scale: float,
        d_out: torch.Tensor | None = None,
    ) -> None:
        self.u, self.scale = UNIT[q.dtype], abs(scale)
        self.group = q.shape[1] // k.shape[1]
        q, k, v = (x.detach().to(F64) for x in (q, k, v))
        self.out = torch.zeros(*q.shape[:2], v.shape[2], dtype=F64)
        self.lse = torch.zeros(q.shape[:2], dtype=F64)
        self.d_q, self.d_k, self.d_v = torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)
        self.size_k, self.size_v = torch.zeros_like(k), torch.zeros_like(v)  # sums of |ds q| and |p d_out|
        terms = torch.zeros(k.shape[0])
        for t, rows in enumerate(lists):
            if len(rows):
                self._token(t, rows, q[t], *(x[rows].repeat_interleave(self.group, 1).transpose(0, 1) for x in (k, v)),
                            None if d_out is None else d_out[t].to(F64))  # fmt: skip
                terms[rows] += self.group
        unit = torch.tensor(
            [gemm_unit(int(n)) + 2 * len(lists) * -(-self.group // 32) * U32 for n in terms], dtype=F64
        )[:, None, None]
        self.d_k = self.scale * (self.d_k + unit * (self.size_k + self.d_k))
        self.d_v = self.d_v + unit * (self.size_v + self.d_v)

    def _token(self, t, rows, q_AD, k_AND, v_ANd, d_out) -> None:
        N = len(rows)
        blocks = -(-N // BLOCK)
        s, e_s = _dot(q_AD, k_AND)
        s, e_s = s * self.scale, e_s * self.scale + 1.01 * U32 * s.abs() * self.scale + TINY
        w, lse = torch.softmax(s, 1), torch.logsumexp(s, 1)
        reach = s.amax(1) - s.amin(1)
        # Relative error of a probability against the final maximum: its score, s - m, exp, and one alpha per block.
        off = 2 * e_s.amax(1) + U32 * (2 * reach + (EXP_UNITS + 2) * (blocks + 1))
        total = off + U32 * (8 + blocks)
        size = torch.einsum("an,and->ad", w, v_ANd.abs())
        out = torch.einsum("an,and->ad", w, v_ANd)
        relative = (off + total + self.u + gemm_unit(2 * 32 * blocks) + 3 * blocks * U32)[:, None]
        self.out[t] = 1.02 * size * relative + self.u * out.abs() * 1.01 + (N + 2) * TINY
        self.lse[t] = total * 1.01 + U32 * lse.abs() * 1.01
        if d_out is None:
            return
        rho = e_s + (self.lse[t] + 2 * U32 * lse.abs())[:, None] + U32 * (2 * s.abs() + EXP_UNITS + 2)
        grown = torch.expm1(rho)
        dp, e_dp = _dot(d_out, v_ANd)
        delta = (d_out * out).sum(1, keepdim=True)
        d = d_out.shape[1]
        e_delta = (d_out.abs() * (self.out[t] + (d / 16 + 6) * U32 * out.abs())).sum(1, keepdim=True) + d * TINY
        ds = w * (dp - delta)
        e_ds = (
            w * (1 + grown) * (e_dp + e_delta + 2 * U32 * (dp - delta).abs())
            + ds.abs() * (grown + self.u * 1.01)
            + 2 * TINY
        )
        e_p = w * (grown + self.u * 1.01) + TINY
        e_q = torch.einsum("an,and->ad", e_ds + gemm_unit(64 * blocks) * (ds.abs() + e_ds), k_AND.abs())
        self.d_q[t] = self.scale * e_q
        for sums, errors, weights, e_weights, other in (
            (self.size_k, self.d_k, ds, e_ds, q_AD),
            (self.size_v, self.d_v, w, e_p, d_out),
        ):
            for into, factor in ((sums, weights.abs()), (errors, e_weights)):
                per_head = factor.T[:, :, None] * other.abs()[None]  # [N, A, width]
                into.index_add_(0, rows, per_head.unflatten(1, (-1, self.group)).sum(2))
