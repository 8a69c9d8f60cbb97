"""The emulated GEMM tree against exact rational arithmetic: every fused step is rounded from a Fraction."""

from __future__ import annotations

import math
import struct
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from glmx.reference.gemm_tree import fma32, gemm_tree, round32_sum

F64 = torch.float64
MIN_NORMAL = Fraction(1, 2**126)
LARGEST = Fraction((2**24 - 1) * 2**104)


def round32(exact: Fraction, sign_of_zero: float) -> float:
    """Round to 24 significant bits, ties to even, unbounded exponent; then flush below 2^-126, overflow to
    inf.
    """
    if exact == 0:
        return math.copysign(0.0, sign_of_zero)
    sign = -1 if exact < 0 else 1
    magnitude = abs(exact)
    exponent = magnitude.numerator.bit_length() - magnitude.denominator.bit_length()
    if Fraction(2) ** exponent > magnitude:
        exponent -= 1
    ulp = Fraction(2) ** (exponent - 23)
    rounded = round(magnitude / ulp) * ulp  # Fraction rounds halves to even
    if rounded < MIN_NORMAL:
        return sign * 0.0
    return sign * (float(rounded) if rounded <= LARGEST else math.inf)


def fma_exact(a: float, b: float, c: float) -> float:
    return round32(Fraction(a) * Fraction(b) + Fraction(c), a * b + c)


def tree_exact(x: list[float], w: list[float]) -> float:
    total = 0.0
    x = [math.copysign(0.0, v) if abs(v) < MIN_NORMAL else v for v in x] + [0.0] * (-len(x) % 32)
    w = [math.copysign(0.0, v) if abs(v) < MIN_NORMAL else v for v in w] + [0.0] * (-len(w) % 32)
    for k0 in range(0, len(x), 32):
        even = odd = 0.0
        for k in range(k0, k0 + 32, 2):
            even = fma_exact(x[k], w[k], even)
            odd = fma_exact(x[k + 1], w[k + 1], odd)
        pair = round32(Fraction(even) + Fraction(odd), even + odd)
        total = round32(Fraction(total) + Fraction(pair), total + pair)
    return total


def bits(value: float) -> bytes:
    return struct.pack("<f", value)


floats32 = st.floats(width=32, allow_nan=False, allow_infinity=False, allow_subnormal=False)


@given(floats32, floats32, floats32)
@settings(max_examples=400, deadline=None)
def test_fma_rounds_once(a: float, b: float, c: float) -> None:
    got = fma32(*(torch.tensor([v], dtype=F64) for v in (a, b, c)))
    assert bits(float(got)) == bits(fma_exact(a, b, c))


@given(
    st.integers(-(2**24), 2**24),
    st.integers(-(2**24), 2**24),
    st.integers(-(2**24), 2**24),
    st.integers(-30, 30),
)
@settings(max_examples=600, deadline=None)
def test_fma_rounds_once_near_ties(a: int, b: int, c: int, shift: int) -> None:
    """Full-width products beside a shifted addend: where a double rounding would show."""
    values = (float(a), float(b), math.ldexp(c, shift))
    got = fma32(*(torch.tensor([v], dtype=F64) for v in values))
    assert bits(float(got)) == bits(fma_exact(*values))


def test_double_rounding_case() -> None:
    """1 + 2^-24 + 2^-80: fp64 rounds the sum to a tie, a second rounding would then go to even."""
    p, c = torch.tensor([2.0**-24 + 2.0**-76], dtype=F64), torch.tensor([1.0], dtype=F64)
    assert float((p + c).float()) == 1.0
    assert float(round32_sum(p, c)) == 1.0 + 2.0**-23


@pytest.mark.parametrize(
    ("p", "c", "want"),
    [
        (2.0**-126 * (1 - 2.0**-26), 0.0, 2.0**-126),  # not tiny after rounding to 24 bits: kept
        (2.0**-126 * (1 - 2.0**-24), 0.0, 0.0),  # tiny: flushed
        (-(2.0**-127), 0.0, -0.0),
        (2.0**-126, -(2.0**-126), 0.0),
        (3.0e38, 3.0e38, math.inf),
    ],
)
def test_edges_of_the_range(p: float, c: float, want: float) -> None:
    got = float(round32_sum(torch.tensor([p], dtype=F64), torch.tensor([c], dtype=F64)))
    assert bits(got) == bits(want)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("K", [1, 31, 32, 33, 70])
@pytest.mark.parametrize("scale", [1.0, 2.0**-62, 2.0**60])
def test_tree_equals_exact_rational_tree(dtype: torch.dtype, K: int, scale: float) -> None:
    g = torch.Generator().manual_seed(K)
    x = (torch.randn(2, K, generator=g) * scale * torch.randn(2, K, generator=g).exp()).to(dtype)
    w = (torch.randn(3, K, generator=g) * scale).to(dtype)
    x[0, 0] = 1e-40  # a denormal
    got = gemm_tree(x, w)
    for m in range(2):
        for n in range(3):
            want = tree_exact(x[m].double().tolist(), w[n].double().tolist())
            assert bits(float(got[m, n])) == bits(want), (m, n, float(got[m, n]), want)


def test_tree_is_not_a_plain_sum() -> None:
    """If another order gave the same bits, this oracle would prove nothing."""
    g = torch.Generator().manual_seed(0)
    x, w = torch.randn(8, 256, generator=g), torch.randn(8, 256, generator=g)
    tree = gemm_tree(x, w)
    assert not torch.equal(tree, x @ w.T)
    assert not torch.equal(tree, (x.double() @ w.double().T).float())
    torch.testing.assert_close(tree, x @ w.T)


def test_nan_and_inf_pass_through() -> None:
    x = torch.tensor([[float("nan"), 1.0], [float("inf"), 1.0], [float("inf"), float("-inf")]])
    got = gemm_tree(x, torch.ones(1, 2))
    assert math.isnan(got[0, 0]) and got[1, 0] == math.inf and math.isnan(got[2, 0])
