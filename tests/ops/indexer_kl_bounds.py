"""Error bounds of indexer_kl, derived from its order of operations (ops.h).

Legend: T query tokens, A main heads, H index heads, N keys of a token's list, D the width of a key.
"""

from __future__ import annotations

from typing import Any

import torch

from tests.ops.checks import F64, TINY, U32, UNIT, gemm_unit

EXP_UNITS, LOG_UNITS = 3, 4  # exp within 1.5 ulp, log within 2
BLOCK = 64
BLOCK_SUM = 9  # roundings of a block's sum: four in a lane, four to fold it, one to spare


def _dots(q: torch.Tensor, k: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """q [heads, D] . k [N, D] exactly, [heads, N], and what the GEMM tree may be off by."""
    return q @ k.T, gemm_unit(q.shape[1]) * (q.abs() @ k.abs().T) + (q.shape[1] + 2) * TINY


class KlBounds:
    """Bounds of kl [T] and, with d_kl [T], of d_index_q, d_index_weights and d_index_k before their last rounding.

    lists[t]: the rows of the keys of token t. fp64, absolute, per element.
    """

    def __init__(self, kwargs: dict[str, Any], lists: list[torch.Tensor], d_kl: torch.Tensor | None = None) -> None:
        self.u, self.scale = UNIT[kwargs["index_q"].dtype], kwargs["scale"]
        names = ("index_q", "index_weights", "index_k", "q", "kv", "lse")
        index_q, weights, index_k, q, kv, lse = (kwargs[name].detach().to(F64) for name in names)
        self.kl = torch.zeros(len(lists), dtype=F64)
        self.d_index_q, self.d_index_weights = torch.zeros_like(index_q), torch.zeros_like(weights)
        self.d_index_k, size = torch.zeros_like(index_k), torch.zeros_like(index_k)  # size: the sums of |g q|
        for t, rows in enumerate(lists):
            if len(rows):
                main, index = (q[t], kv[rows], lse[t]), (index_q[t], weights[t], index_k[rows])
                self._token(t, rows, main, index, None if d_kl is None else d_kl[t].to(F64), size)
        adds = sum(len(rows) > 0 for rows in lists) * -(-index_q.shape[1] // 32)
        self.d_index_k += (gemm_unit(index_q.shape[1]) + 2 * adds * U32) * (size + self.d_index_k)

    def _token(self, t, rows, main, index, d_kl, size) -> None:
        (q, kv, lse), (index_q, weights, index_k) = main, index
        N, A, H = len(rows), q.shape[0], index_q.shape[0]
        blocks = -(-N // BLOCK)
        s, e_s = _dots(q, kv)
        s, e_s = s * self.scale, abs(self.scale) * e_s
        heads = torch.exp(s - lse[:, None])
        rho = e_s + U32 * (2 * s.abs() + (s - lse[:, None]).abs() + EXP_UNITS)
        p = heads.mean(0)
        e_p = (heads * torch.expm1(1.01 * rho)).mean(0) + (A + 1) * U32 * p + 2 * TINY

        dots, e_dots = _dots(index_q, index_k)
        relu = dots.relu()
        scores = weights @ relu
        e_scores = weights.abs() @ (e_dots + (H + 1) * U32 * relu) + (H + 1) * TINY
        index_lse = torch.logsumexp(scores, 0)
        # The softmax's sum: e^(I - maximum) of each place, and one alpha per block.
        reach = scores.amax() - scores.amin()
        e_sum = U32 * (2 * reach + (EXP_UNITS + 2) * (blocks + 1) + BLOCK_SUM)
        e_lse = 1.01 * (e_scores.max() + e_sum)

        log_p = torch.where(p > TINY, p, 1.0).log()
        terms = log_p - scores
        e_terms = U32 * (LOG_UNITS * log_p.abs() + 2 * terms.abs()) + e_scores
        mass, e_mass = p.sum(), e_p.sum() + BLOCK_SUM * U32 * p.sum()
        # A place below the smallest normal number adds nothing: its p log p is less than 88 of it.
        e_energy = (e_p * (1 + terms.abs()) + p * e_terms + BLOCK_SUM * U32 * p * terms.abs()).sum() + 90 * N * TINY
        kl = (p * terms).sum() + index_lse * mass
        self.kl[t] = 1.02 * (e_energy + index_lse.abs() * e_mass + mass * e_lse) + U32 * kl.abs() + TINY
        # e_p moves the energy and the mass together; bounding them apart, as above, is safe.
        if d_kl is None:
            return

        softmax = torch.exp(scores - index_lse)
        off = e_scores + e_lse + U32 * ((scores - index_lse).abs() + 2 * index_lse.abs() + EXP_UNITS)
        e_softmax = softmax * torch.expm1(1.01 * off) + TINY
        difference = softmax * mass - p
        e_difference = e_softmax * mass + 1.01 * softmax * (e_mass + U32 * mass) + e_p + U32 * difference.abs()
        d, e_d = d_kl * difference, d_kl.abs() * (1.01 * e_difference + U32 * difference.abs()) + TINY
        e_weights = relu @ e_d + 1.01 * e_dots @ (d.abs() + e_d)
        self.d_index_weights[t] = e_weights + (N / 16 + 6) * U32 * (relu @ d.abs()) + N * TINY

        g = torch.where(dots > 0, d * weights[:, None], 0.0)
        e_g = torch.where(dots > 0, e_d * weights.abs()[:, None] + 1.01 * (self.u + U32) * g.abs(), 0.0) + 2 * TINY
        kink = dots.abs() <= e_dots  # where rounding may switch the relu
        e_g = torch.where(kink, ((d.abs() + e_d) * weights.abs()[:, None]) * (1 + 2 * self.u), e_g)
        self.d_index_q[t] = (e_g + gemm_unit(BLOCK * blocks) * (g.abs() + e_g)) @ index_k.abs()
        size.index_add_(0, rows, g.abs().T @ index_q.abs())
        self.d_index_k.index_add_(0, rows, e_g.T @ index_q.abs())
