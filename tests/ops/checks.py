"""Comparison with an exact fp64 result inside a derived bound, element by element; and the units bounds are
made of.
"""

from __future__ import annotations

import torch

from tests.ops.backends import SIMT

F64 = torch.float64
U32 = 2.0**-24  # unit roundoff: half the distance from 1 to the next number
UNIT = {torch.float32: U32, torch.bfloat16: 2.0**-8}
TINY = 2.0**-126  # what flushing a denormal can lose


def gemm_unit(K: int) -> float:
    """Relative error, against sum |x||w|, of the tree over K: a chain of 16, one pair sum, one add per block
    of 32. Of a matrix unit: one chain, whose products meet in steps of 16 and are cut off, not rounded.
    """
    return (2 * K + 32 if SIMT else 16 + 1 + -(-K // 32)) * U32 * 1.01


def gemm_bound(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    """Bound [M, N] of the fp32 accumulator of x [M, K] @ w [N, K].T against the exact product."""
    K = x.shape[1]
    return gemm_unit(K) * (x.to(F64).abs() @ w.to(F64).abs().T) + (K + 2) * TINY


def assert_within(actual: torch.Tensor, exact: torch.Tensor, bound: torch.Tensor | float, what: str = "") -> None:
    """|actual - exact| <= bound at every element; NaN and infinities at the same places."""
    got, exact = actual.detach().to(F64), exact.detach().to(F64)
    assert got.shape == exact.shape, f"{what}: shape {tuple(got.shape)}, expected {tuple(exact.shape)}"
    bound = torch.as_tensor(bound, dtype=F64).detach().expand_as(exact)
    assert torch.equal(got.isnan(), exact.isnan()), f"{what}: NaN at {_where(got.isnan() != exact.isnan())}"
    infinite = exact.isinf() | got.isinf()
    wrong = infinite & (got != exact)
    assert not wrong.any(), f"{what}: infinities differ at {_where(wrong)}"
    finite = ~(infinite | exact.isnan())
    error = torch.where(finite, (got - exact).abs(), 0.0)
    bad = finite & ~(error <= bound)
    if bad.any():
        i = tuple(torch.nonzero(bad)[0].tolist())
        raise AssertionError(
            f"{what}: {int(bad.sum())} of {bad.numel()} elements outside the bound, first at {i}: "
            f"got {float(got[i]):.9g}, exact {float(exact[i]):.9g}, error {float(error[i]):.3g}, "
            f"bound {float(bound[i]):.3g}"
        )


def _where(mask: torch.Tensor) -> list[list[int]]:
    return torch.nonzero(mask)[:4].tolist()


def rounding(exact: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """What one rounding to `dtype` may add."""
    return UNIT[dtype] * exact.detach().to(F64).abs() + TINY
