"""X2 and X3 at the widths of real layers: one row, a few and a thousand give the bits of the whole, in bf16 and fp32.

Whatever tiles and paths a kernel picks by the number of rows, a row's sum has one order.
"""

from __future__ import annotations

import pytest
import torch

from glmx import ops
from tests.gpu.device import ON_CUDA, need_device, normal
from tests.ops.cases import same_bits

DEVICE = need_device()
DTYPES = (torch.bfloat16, torch.float32)
ROWS = 1000
COUNTS = (1, 2, 7, 16, 64, 65, 128)  # rows of a call; ROWS in one call is what they are compared with
# K, N: GLM-4.5-Air's experts, the 4.5's and GLM-5's down and up; then sizes that are a multiple of nothing.
WIDTHS = [(4096, 2816), (1408, 4096), (5120, 3072), (2048, 6144), (1001, 333), (77, 1030), (64, 8), (8200, 40)]
if not ON_CUDA:  # a trial of the tests themselves
    ROWS, COUNTS, WIDTHS = 140, (1, 2, 7, 65), [(96, 64), (77, 103)]


def spans(rows: int, count: int) -> list[slice]:
    """Whole and partial calls: the first, one in the middle, the last."""
    starts = sorted({0, min(rows - count, 3 * (rows // 7)), rows - count})
    return [slice(start, start + count) for start in starts]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("K", "N"), WIDTHS)
def test_linear(K: int, N: int, dtype: torch.dtype) -> None:
    x, w = normal(ROWS, K, seed=1, dtype=dtype), normal(N, K, seed=2, dtype=dtype)
    bias = normal(N, seed=3, dtype=dtype)
    for silu in (False, True) if N % 2 == 0 else (False,):
        whole = ops.linear(x, w, bias, silu_mul=silu)
        assert whole.isfinite().all()
        for count in COUNTS:
            for span in spans(ROWS, count):
                got = ops.linear(x[span], w, bias, silu_mul=silu)
                assert same_bits(got, whole[span]), f"{count} rows from {span.start}, silu_mul {silu}"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("K", "N"), WIDTHS[:2] + WIDTHS[4:6])
def test_rows_of_an_expert_do_not_see_their_number(K: int, N: int, dtype: torch.dtype) -> None:
    """grouped_gemm with experts of every size, and dgrad: each expert's rows as if they were alone."""
    counts = [*COUNTS, 0, 200 if ON_CUDA else 20]
    E, R = len(counts), sum(counts)
    offsets = torch.tensor([0, *torch.tensor(counts).cumsum(0).tolist()], dtype=torch.int32, device=DEVICE)
    x, w = normal(R, K, seed=1, dtype=dtype), normal(E, N, K, seed=2, dtype=dtype)
    dy = normal(R, N, seed=3, dtype=dtype)
    y, dx, dw = ops.grouped_gemm(x, w, offsets), ops.grouped_gemm_dgrad(dy, w, offsets), None
    dw = ops.grouped_gemm_wgrad(dy, x, offsets)
    at = 0
    for e, count in enumerate(counts):
        span, alone = slice(at, at + count), torch.tensor([0, count], dtype=torch.int32, device=DEVICE)
        assert same_bits(ops.grouped_gemm(x[span], w[e : e + 1], alone), y[span]), f"forward, {count} rows"
        assert same_bits(ops.grouped_gemm_dgrad(dy[span], w[e : e + 1], alone), dx[span]), f"dgrad, {count} rows"
        assert same_bits(ops.grouped_gemm_wgrad(dy[span], x[span], alone)[0], dw[e]), f"wgrad, {count} rows"
        at += count


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("H", "I"), [(4096, 1408), (333, 100)] if ON_CUDA else [(96, 40)])
def test_moe_mlp(H: int, I: int, dtype: torch.dtype) -> None:
    """A token's output, whatever chunk it comes in; and the bits of the ops that moe_mlp stands for."""
    T, E, K = ROWS, 16, 4
    x = normal(T, H, seed=1, dtype=dtype)
    gate_up = normal(E, 2 * I, H, seed=2, dtype=dtype, scale=H**-0.5)
    down = normal(E, H, I, seed=3, dtype=dtype, scale=I**-0.5)
    weights, ids, _ = ops.route_topk(normal(T, E, seed=4, dtype=torch.float32), torch.zeros(E, device=DEVICE), K)
    whole = ops.moe_mlp(x, weights, ids, gate_up, down)
    assert whole.isfinite().all()
    for count in COUNTS:
        for span in spans(T, count):
            got = ops.moe_mlp(x[span], weights[span], ids[span], gate_up, down)
            assert same_bits(got, whole[span]), f"{count} tokens from {span.start}"
    plan = ops.expert_plan(ids, E)
    h = ops.grouped_gemm(x, gate_up, plan.expert_offsets, row_token=plan.row_token, silu_mul=True)
    rows = ops.grouped_gemm(h, down, plan.expert_offsets)
    assert same_bits(ops.moe_combine(rows, weights, plan.inverse), whole)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("H", [4096, 5120, 6144, 1001] if ON_CUDA else [96])
def test_rows_of_norms(H: int, dtype: torch.dtype) -> None:
    x, residual = normal(ROWS, H, seed=1, dtype=dtype), normal(ROWS, H, seed=2, dtype=dtype)
    weight, bias = normal(H, seed=3, dtype=dtype), normal(H, seed=4, dtype=dtype)
    calls = {
        "rms_norm": lambda s: (ops.rms_norm(x[s], weight, 1e-5),),
        "add_rms_norm": lambda s: ops.add_rms_norm(x[s], residual[s], weight, 1e-5),
        "layer_norm": lambda s: (ops.layer_norm(x[s], weight, bias, 1e-5),),
        "silu_mul": lambda s: (ops.silu_mul(x[s][:, : H // 2 * 2]),),
    }
    for name, call in calls.items():
        whole = call(slice(None))
        for count in COUNTS:
            for span in spans(ROWS, count):
                for got, want in zip(call(span), whole, strict=True):
                    assert same_bits(got, want[span]), f"{name}, {count} rows from {span.start}"


@pytest.mark.parametrize("E", [128, 160, 256, 7])
def test_routing(E: int) -> None:
    logits, bias = normal(ROWS, E, seed=1, dtype=torch.float32), normal(E, seed=2, dtype=torch.float32, scale=0.1)
    top_k = min(8, E)
    weights, ids, counts = ops.route_topk(logits, bias, top_k)
    assert torch.equal(counts.long(), torch.bincount(ids.flatten().long(), minlength=E))
    for count in COUNTS:
        for span in spans(ROWS, count):
            got = ops.route_topk(logits[span], bias, top_k)
            assert same_bits(got[0], weights[span]) and torch.equal(got[1], ids[span])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_logprobs(dtype: torch.dtype) -> None:
    T, V, H = (300, 20_000, 1024) if ON_CUDA else (70, 1100, 48)
    hidden, weight = normal(T, H, seed=1, dtype=dtype), normal(V, H, seed=2, dtype=dtype, scale=H**-0.5)
    tokens = torch.arange(T, device=DEVICE) * 31 % V
    whole = ops.lm_head_logprob(hidden, weight, tokens, top_n=3)
    for count in (1, 2, 16, 65):
        for span in spans(T, count):
            for got, want in zip(ops.lm_head_logprob(hidden[span], weight, tokens[span], top_n=3), whole, strict=True):
                assert same_bits(got, want[span]), f"{count} tokens from {span.start}"
