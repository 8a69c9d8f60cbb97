"""Values at the widths of real layers against an fp64 product on the card, with every element of the output written.

By norms, since tests/ops bounds every element of small shapes. A bf16 result was rounded once, by 2^-9 of an element
or less; an fp32 sum of 4096 products of random signs is off by some ten units of 2^-24. A stretch of 32 k left out, of
4096, would be off by 2^-3.5 of the norm.
"""

from __future__ import annotations

import pytest
import torch

from glmx import ops
from tests.gpu.device import ON_CUDA, need_device, normal

DEVICE = need_device()
BOUND = {torch.bfloat16: 2.0**-8, torch.float32: 2.0**-17}
SHAPES = [("air_up", 16, 2816, 4096, 300), ("glm5_down", 8, 6144, 2048, 513), ("odd", 5, 331, 1003, 70)]
if not ON_CUDA:
    SHAPES = [("small", 3, 34, 50, 9)]


def close(got: torch.Tensor, exact: torch.Tensor, what: str) -> None:
    assert got.isfinite().all(), f"{what}: {int((~got.isfinite()).sum())} elements are not finite"
    error = float((got.double() - exact).norm() / exact.norm())
    assert error <= BOUND[got.dtype], f"{what}: {error:.2e} of the norm, allowed {BOUND[got.dtype]:.2e}"


@pytest.mark.parametrize("dtype", BOUND, ids=str)
@pytest.mark.parametrize(("name", "E", "N", "K", "rows"), SHAPES, ids=[shape[0] for shape in SHAPES])
def test_grouped_gemm_and_its_gradients(name: str, E: int, N: int, K: int, rows: int, dtype: torch.dtype) -> None:
    counts = [(rows * (e + 1) * 2) // (E + 1) if e % 4 != 2 else 0 for e in range(E)]
    bounds = [0, *torch.tensor(counts).cumsum(0).tolist()]
    offsets = torch.tensor(bounds, dtype=torch.int32, device=DEVICE)
    R, M = bounds[-1], 400
    x, w = normal(M, K, seed=1, dtype=dtype), normal(E, N, K, seed=2, dtype=dtype)
    dy, bias = normal(R, N, seed=3, dtype=dtype), normal(E, N, seed=4, dtype=dtype)
    row_token = torch.randint(M, (R,), device=DEVICE, generator=torch.Generator(DEVICE).manual_seed(5)).int()
    rows_RK = x[row_token.long()]
    spans = [slice(a, b) for a, b in zip(bounds[:-1], bounds[1:], strict=True)]
    exact = torch.cat([rows_RK[s].double() @ w[e].double().T + bias[e].double() for e, s in enumerate(spans)])
    close(ops.grouped_gemm(x, w, offsets, row_token=row_token, bias=bias), exact, "gather and bias")
    silu = torch.nn.functional.silu(exact[:, : N // 2]) * exact[:, N // 2 :] if N % 2 == 0 else None
    if silu is not None:
        got = ops.grouped_gemm(x, w, offsets, row_token=row_token, bias=bias, silu_mul=True)
        close(got, silu, "silu_mul")
    exact = torch.cat([rows_RK[s].double() @ w[e].double().T for e, s in enumerate(spans)])
    close(ops.grouped_gemm(rows_RK, w, offsets), exact, "plain")
    exact = torch.cat([dy[s].double() @ w[e].double() for e, s in enumerate(spans)])
    close(ops.grouped_gemm_dgrad(dy, w, offsets), exact, "dgrad")
    exact = torch.stack([dy[s].double().T @ rows_RK[s].double() for s in spans])
    close(ops.grouped_gemm_wgrad(dy, x, offsets, row_token=row_token), exact, "wgrad, gathered")
    out = torch.ones(E, N, K, device=DEVICE)
    ops.grouped_gemm_wgrad(dy, rows_RK, offsets, out=out, accumulate=True)
    close(out, exact + 1, "wgrad, accumulated")
    assert all((out[e] == 1).all() for e, count in enumerate(counts) if count == 0), "experts without rows"
