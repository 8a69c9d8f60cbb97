"""grouped_gemm against torch's grouped_mm: real GLM expert shapes, all the experts that a row's tokens reach.

    pytest bench/ops/bench_grouped_gemm.py            (OMP_NUM_THREADS sets the threads)

Shapes are the gate-up product of one MoE layer: [tokens * top_k, hidden] x [2 * width, hidden] per expert. Expert
counts are cut to EXPERTS so that the weights fit beside the tests; tokens per expert are those of the full layer's
share. The ceiling is measured in the same test (bench/roofline.py).
"""

from __future__ import annotations

import harness
import pytest
import roofline
import torch

import glmx.ops
from glmx import _native

EXPERTS = 8
# name -> hidden, width, experts per token. GLM-4.5-Air has 128 experts, GLM-4.7-Flash 64.
LAYERS = {"air": (4096, 1408, 8), "flash": (2048, 1536, 4)}
ROUNDS = 7


def case(hidden: int, width: int, rows: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """x [rows, hidden], w [EXPERTS, 2 * width, hidden] bf16 and offsets, the rows spread over the experts evenly."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(rows, hidden, generator=generator).bfloat16()
    w = (torch.randn(EXPERTS, 2 * width, hidden, generator=generator) * hidden**-0.5).bfloat16()
    offsets = torch.tensor([rows * e // EXPERTS for e in range(EXPERTS + 1)], dtype=torch.int32)
    return x, w, offsets


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("tokens", [1, 16, 128])
def test_forward(benchmark, record_row, layer: str, tokens: int) -> None:
    hidden, width, top_k = LAYERS[layer]
    rows = tokens * top_k
    x, w, offsets = case(hidden, width, rows)
    w_t = w.transpose(1, 2)

    def ours() -> torch.Tensor:
        return glmx.ops.grouped_gemm(x, w, offsets)

    def peer() -> torch.Tensor:
        return torch.nn.functional.grouped_mm(x, w_t, offs=offsets[1:])

    expected, found = peer().float(), ours().float()
    assert (expected - found).norm() <= 2**-7 * expected.norm()  # both round to bf16 once, in another order

    if benchmark.disabled:
        return
    peer_times: list[float] = []
    benchmark.pedantic(ours, setup=lambda: peer_times.append(harness.timed(peer)), rounds=ROUNDS, warmup_rounds=1)
    times = benchmark.stats.stats.data
    seconds = sorted(times)[len(times) // 2]

    threads = torch.get_num_threads()
    measured = roofline.ceilings(threads)
    isa = next(
        row["kernel"] for row in _native.kernel_table() if (row["op"], row["variant"]) == ("grouped_gemm", "bf16")
    )
    if isa == "base":
        pytest.skip("base is the oracle, not a fast path: it has no ceiling of its own")
    touched = min(rows, EXPERTS) * 2 * width * hidden * 2 + rows * (hidden + 2 * width) * 2
    flop = 2 * rows * 2 * width * hidden
    compute = roofline.gemm_ceiling(measured, isa)
    # Whichever bound takes longer is the one that this shape runs against.
    if touched / measured["read"] > flop / compute[1]:
        unit, ceiling, bound, work = "GB/s", "read", measured["read"], touched
    else:
        unit, ceiling, bound, work = "GFLOP/s", compute[0], compute[1], flop
    rate = work / seconds / 1e9
    row = harness.Row(
        name=f"grouped_gemm {layer} T={tokens} ({rows} rows, {EXPERTS} experts)",
        machine=_native.cpu_model(),
        kernel=isa,
        threads=threads,
        rounds=len(times),
        seconds=seconds,
        rate=rate,
        unit=unit,
        ceiling=ceiling,
        share=rate / bound,
        ratio=harness.median_ratios(times, {"torch grouped_mm": peer_times[-len(times) :]}),
    )
    benchmark.extra_info.update(rate=rate, unit=unit, share=row.share, ceiling=ceiling, **row.ratio)
    record_row(row)
