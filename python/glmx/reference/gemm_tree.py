"""The reduction tree of grouped_gemm, bit for bit, from fp64 arithmetic alone: an independent second oracle.

Per output element and per block of 32 k (K padded with zeros): e is the chain of fused multiply-adds over
even k, o over odd k, both from +0, and C = C + (e + o). Inputs and results that are denormal in fp32 become
zeros of their sign (DAZ and FTZ). Slow; for small shapes.

A fused multiply-add in fp32 is round32(a*b + c) with one rounding. The product of two fp32 numbers is exact
in fp64; two-sum gives the sum with c as s + err exactly; moving s to its odd neighbour when err is not zero
(round to odd) makes the second rounding to fp32 harmless, because fp64 has more than two spare bits (Boldo &
Melquiond 2008).
"""

from __future__ import annotations

import torch

F64 = torch.float64
MIN_NORMAL = 2.0**-126


def flush32(x: torch.Tensor) -> torch.Tensor:
    """Values whose magnitude is below the smallest normal fp32 become zeros of their sign."""
    return torch.where(x.abs() < MIN_NORMAL, torch.copysign(torch.zeros_like(x), x), x)


def round32_sum(p: torch.Tensor, c: torch.Tensor, flush: bool = True) -> torch.Tensor:
    """round32(p + c) with one rounding, as fp64 values. p and c are fp64; p + c = s + err must be
    representable.
    """
    s = p + c
    bb = s - p
    err = (p - (s - bb)) + (c - bb)
    inexact = torch.isfinite(s) & (err != 0)
    even = (s.view(torch.int64) & 1) == 0
    toward = torch.where(err > 0, float("inf"), float("-inf")).to(F64)
    s = torch.where(inexact & even, torch.nextafter(s, toward), s)
    if not flush:
        return s.float().to(F64)
    # x86 decides "tiny" after rounding to 24 bits with an unbounded exponent: round small values away from
    # fp32's edge.
    small = s.abs() < 2.0**-100
    rounded = torch.where(small, (s * 2.0**200).float().to(F64) * 2.0**-200, s.float().to(F64))
    return flush32(rounded)


def fma32(a: torch.Tensor, b: torch.Tensor, c: torch.Tensor, flush: bool = True) -> torch.Tensor:
    """fp32 fused multiply-add of fp32 values held in fp64."""
    return round32_sum(a * b, c, flush)


def gemm_tree(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    """x [M, K], w [N, K], bf16 or fp32 -> fp32 [M, N]: the bits of every ISA before bias and rounding."""
    M, K = x.shape
    N = w.shape[0]
    padded = (K + 31) // 32 * 32
    a = torch.zeros(M, padded, dtype=F64)
    b = torch.zeros(N, padded, dtype=F64)
    a[:, :K] = flush32(x.to(F64))
    b[:, :K] = flush32(w.to(F64))
    C = torch.zeros(M, N, dtype=F64)
    for k0 in range(0, padded, 32):
        chains = []
        for parity in (0, 1):
            chain = torch.zeros(M, N, dtype=F64)
            for k in range(k0 + parity, k0 + 32, 2):
                chain = fma32(a[:, k, None].expand(M, N), b[None, :, k].expand(M, N), chain)
            chains.append(chain)
        C = round32_sum(C, round32_sum(chains[0], chains[1]))
    return C.float()
