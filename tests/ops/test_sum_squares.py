"""sum_squares: bit for bit the chunked fp64 sum of its contract, and within fp64's error of the exact sum."""

from __future__ import annotations

from fractions import Fraction

import pytest
import torch

from glmx import ops, reference
from glmx.reference.gemm_tree import flush32
from tests.ops.cases import BF16, DTYPES, F32, NAN, Case, cases, same_bits, values
from tests.ops.checks import F64

CHUNK = 4096


def chunked(x: torch.Tensor) -> torch.Tensor:
    """Chunks of 4096: element i to lane i % 16 (its square is exact in fp64, so fma and * + agree), lanes folded
    16 -> 8 -> 4 -> 2 -> 1, chunks added in order."""
    flat = flush32(x.reshape(-1).to(F64))
    total = torch.zeros((), dtype=F64)
    for chunk in flat.split(CHUNK) if flat.numel() else ():
        padded = torch.zeros(-(-chunk.numel() // 16) * 16, dtype=F64)
        padded[: chunk.numel()] = chunk
        lanes = torch.zeros(16, dtype=F64)
        for group in padded.view(-1, 16):
            lanes = lanes + group * group
        for half in (8, 4, 2, 1):
            lanes = lanes[:half] + lanes[half:]
        total = total + lanes[0]
    return total


@pytest.mark.parametrize("case", cases("sum_squares"), ids=str)
def test_bits_of_the_contract(case: Case) -> None:
    x = case.make()["x"]
    want = torch.zeros((), dtype=F64)
    for tensor in x if isinstance(x, list) else [x]:
        want = want + chunked(tensor)
    got = ops.sum_squares(x)
    assert got.dim() == 0 and same_bits(got, want)


@pytest.mark.parametrize("case", cases("sum_squares", wild=False), ids=str)
def test_against_the_exact_sum(case: Case) -> None:
    x = case.make()["x"]
    tensors = x if isinstance(x, list) else [x]
    exact = sum((Fraction(v) ** 2 for t in tensors for v in t.flatten().tolist()), Fraction(0))
    n = sum(t.numel() for t in tensors)
    # Positive terms: relative error at most one unit per addition along a path.
    bound = Fraction(CHUNK // 16 + 4 + n // CHUNK + len(tensors) + 1, 2**53) * exact + n * Fraction(1, 2**252)
    assert abs(Fraction(float(ops.sum_squares(x))) - exact) <= bound
    if exact:
        assert abs(Fraction(float(reference.sum_squares(x))) - exact) <= exact * Fraction(n + 2, 2**53)


@pytest.mark.parametrize("dtype", DTYPES)
def test_shape_strides_and_nan(dtype: torch.dtype) -> None:
    x = values(6, 50, dtype=dtype)
    assert same_bits(ops.sum_squares(x), ops.sum_squares(x.flatten()))
    assert same_bits(ops.sum_squares(x.T), ops.sum_squares(x.T.contiguous()))
    assert same_bits(ops.sum_squares(x[:, ::2]), ops.sum_squares(x[:, ::2].contiguous()))
    x[3, 3] = NAN
    assert ops.sum_squares(x).isnan()


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_many_chunks_and_threads(threads: int, restore_threads: None) -> None:
    torch.set_num_threads(threads)
    x = values(50_000, dtype=F32)
    assert same_bits(ops.sum_squares(x), chunked(x))


def test_values_beyond_fp32_squares() -> None:
    assert float(ops.sum_squares(torch.full((3,), 2.0**100))) == 3 * 2.0**200
    assert float(ops.sum_squares(torch.full((3,), 2.0**-100, dtype=BF16))) == 3 * 2.0**-200


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.int32])
def test_bad_arguments_are_refused(dtype: torch.dtype) -> None:
    with pytest.raises(ValueError, match="x"):
        ops.sum_squares(torch.zeros(3, dtype=dtype))
    with pytest.raises(ValueError, match="x"):
        ops.sum_squares([torch.zeros(3), torch.zeros(3, dtype=dtype)])
