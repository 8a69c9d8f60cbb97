"""grouped_gemm, its gradients and linear against torch, and their weights in few bits: real GLM layer shapes.

    pytest bench/ops/bench_grouped_gemm.py            (OMP_NUM_THREADS sets the threads)

Shapes are the gate-up product of one MoE layer: [tokens * top_k, hidden] x [2 * width, hidden] per expert. Expert
counts are cut to EXPERTS so that the weights fit beside the tests; tokens per expert are those of the full layer's
share. The ceiling is measured in the same test (bench/roofline.py).

torch's bf16 products use vdpbf16ps where the CPU has it, and so does ours, in the order of the GEMM tree (level
`avx512_bf16`); pinned to `avx512` ours runs on fp32 FMA, at half the rate.

int8, int4 and FP8 are the same weights, rounded to nearest (bench/stored.py), and their peer is glmx's bf16.
"""

from __future__ import annotations

from collections.abc import Callable

import harness
import pytest
import stored
import torch
from harness import values

import glmx.ops

EXPERTS = 8
# name -> hidden, width, experts per token. GLM-4.5-Air has 128 experts, GLM-4.7-Flash 64.
LAYERS = {"air": (4096, 1408, 8), "flash": (2048, 1536, 4)}
ROUNDS = 7
Call = Callable[[], torch.Tensor]


def case(hidden: int, width: int, rows: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """x [rows, hidden], w [EXPERTS, 2 * width, hidden] bf16 and offsets, the rows spread over the experts evenly."""
    w = values(EXPERTS, 2 * width, hidden, scale=hidden**-0.5)
    offsets = torch.tensor([rows * e // EXPERTS for e in range(EXPERTS + 1)], dtype=torch.int32)
    return values(rows, hidden), w, offsets


def measure(
    benchmark,
    record_row,
    name: str,
    variant: str,
    ours: Call,
    peer: Call,
    peer_name: str,
    flop: int,
    touched: float,
    bound: float | None = None,
) -> None:
    """Checks ours against the peer (harness.agree), times them in alternating rounds, records the row."""
    harness.agree(peer_name, ours(), peer(), bound)
    if benchmark.disabled:
        return
    harness.compare(
        benchmark,
        record_row,
        name,
        "grouped_gemm",
        ours,
        {peer_name: peer},
        flop=flop,
        touched=touched,
        rounds=ROUNDS,
        dtype=variant,
    )


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("tokens", [1, 16, 128])
def test_forward(benchmark, record_row, layer: str, tokens: int) -> None:
    hidden, width, top_k = LAYERS[layer]
    rows = tokens * top_k
    x, w, offsets = case(hidden, width, rows)
    w_t = w.transpose(1, 2)
    touched = min(rows, EXPERTS) * 2 * width * hidden * 2 + rows * (hidden + 2 * width) * 2
    measure(
        benchmark,
        record_row,
        f"grouped_gemm {layer} T={tokens} ({rows} rows, {EXPERTS} experts)",
        "bf16",
        lambda: glmx.ops.grouped_gemm(x, w, offsets),
        lambda: torch.nn.functional.grouped_mm(x, w_t, offs=offsets[1:]),
        "torch grouped_mm",
        2 * rows * 2 * width * hidden,
        touched,
    )


@pytest.mark.parametrize("gradient", ["dgrad", "wgrad"])
def test_backward(benchmark, record_row, gradient: str) -> None:
    """The gradients of GLM-4.7-Flash's gate-up product, 64 rows to an expert."""
    hidden, width, _ = LAYERS["flash"]
    rows = 64 * EXPERTS
    x, w, offsets = case(hidden, width, rows)
    dy = values(rows, 2 * width)
    dy_t = dy.t()
    calls = {
        "dgrad": (
            lambda: glmx.ops.grouped_gemm_dgrad(dy, w, offsets),
            lambda: torch.nn.functional.grouped_mm(dy, w, offs=offsets[1:]),
        ),
        "wgrad": (
            lambda: glmx.ops.grouped_gemm_wgrad(dy, x, offsets),
            lambda: torch.nn.functional.grouped_mm(dy_t, x, offs=offsets[1:]),
        ),
    }
    touched = EXPERTS * 2 * width * hidden * 2 + rows * (hidden + 2 * width) * 2
    measure(
        benchmark,
        record_row,
        f"grouped_gemm_{gradient} flash ({rows} rows, {EXPERTS} experts)",
        "bf16",
        *calls[gradient],
        "torch grouped_mm",
        2 * rows * 2 * width * hidden,
        touched,
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
@pytest.mark.parametrize("rows", [1, 128])
def test_linear(benchmark, record_row, rows: int, dtype: torch.dtype) -> None:
    """A third of GLM-4.5-Air's q_proj: 4096 of its 12288 outputs."""
    N, K = 4096, 4096
    x, w = values(rows, K, dtype=dtype), values(N, K, scale=K**-0.5, dtype=dtype)
    measure(
        benchmark,
        record_row,
        f"linear {rows} x {K} -> {N} {'bf16' if dtype == torch.bfloat16 else 'fp32'}",
        "bf16" if dtype == torch.bfloat16 else "fp32",
        lambda: glmx.ops.linear(x, w),
        lambda: torch.nn.functional.linear(x, w),
        "torch F.linear",
        2 * rows * N * K,
        (N * K + rows * (N + K)) * x.element_size(),
    )


@pytest.mark.parametrize("tokens", [1, 16, 128])
@pytest.mark.parametrize("format", stored.FORMATS)
def test_stored_forward(benchmark, record_row, format: stored.StoredFormat, tokens: int) -> None:
    """GLM-4.7-Flash's gate-up product."""
    hidden, width, top_k = LAYERS["flash"]
    rows = tokens * top_k
    x, w, offsets = case(hidden, width, rows)
    small = stored.stored(format, w)
    measure(
        benchmark,
        record_row,
        f"grouped_gemm flash T={tokens} ({rows} rows, {EXPERTS} experts) {format}",
        "bf16",
        lambda: glmx.ops.grouped_gemm(x, small, offsets),
        lambda: glmx.ops.grouped_gemm(x, w, offsets),
        "glmx bf16",
        2 * rows * 2 * width * hidden,
        stored.moved(small, min(rows, EXPERTS)) + rows * (hidden + 2 * width) * 2,
        stored.LOST[format],
    )


@pytest.mark.parametrize("rows", [1, 128])
@pytest.mark.parametrize("format", stored.FORMATS)
def test_stored_linear(benchmark, record_row, format: stored.StoredFormat, rows: int) -> None:
    """The bf16 case of test_linear."""
    N, K = 4096, 4096
    x, w = values(rows, K), values(N, K, scale=K**-0.5)
    small = stored.stored(format, w[None])
    measure(
        benchmark,
        record_row,
        f"linear {rows} x {K} -> {N} {format}",
        "bf16",
        lambda: glmx.ops.linear(x, small),
        lambda: glmx.ops.linear(x, w),
        "glmx bf16",
        2 * rows * N * K,
        small.nbytes + rows * (N + K) * 2,
        stored.LOST[format],
    )
