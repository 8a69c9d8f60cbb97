"""moe_combine against torch: GLM-5's expert rows of 6144 back to tokens, 8 for each.

    pytest bench/ops/bench_moe_combine.py            (OMP_NUM_THREADS sets the threads)

The peers gather the rows of each token, then sum them by a product with the weights, or add the weighted rows up by
`index_add_` in fp32. The backward makes the gradients of rows and weights; its peers are autograd of the former, and
the formulas by hand, which make use of that every row belongs to one pair.
"""

from __future__ import annotations

import harness
import pytest
import torch
from harness import values

import glmx.ops

H, E, TOP_K = 6144, 256, 8


@pytest.mark.parametrize(("phase", "T"), [("forward", 1), ("forward", 16), ("forward", 2048), ("backward", 2048)])
def test_moe_combine(benchmark, record_row, phase: str, T: int) -> None:
    if benchmark.disabled:
        T = min(T, 5)
    draw = torch.Generator().manual_seed(T)
    plan = glmx.ops.expert_plan(torch.rand(T, E, generator=draw).topk(TOP_K).indices.int(), E)
    weights = torch.rand(T, TOP_K, generator=draw).softmax(-1)
    rows, d_out = values(T * TOP_K, H), values(T, H, seed=1)
    flat, token = plan.inverse.flatten().long(), plan.row_token.long()

    def by_product() -> torch.Tensor:
        return torch.bmm(weights.to(rows.dtype)[:, None], rows.index_select(0, flat).view(T, TOP_K, H))[:, 0]

    def by_index_add() -> torch.Tensor:
        of_row = torch.empty(T * TOP_K).index_copy_(0, flat, weights.flatten())
        return torch.zeros(T, H).index_add_(0, token, rows * of_row[:, None]).to(rows.dtype)

    def by_hand() -> tuple[torch.Tensor, torch.Tensor]:
        of_row = torch.empty(T * TOP_K, dtype=rows.dtype).index_copy_(
            0, flat, weights.detach().flatten().to(rows.dtype)
        )
        d_of_row = d_out.index_select(0, token)
        d_weights = torch.bmm(rows.detach()[:, None], d_of_row[:, :, None]).flatten().float()
        return d_of_row.mul_(of_row[:, None]), d_weights.index_select(0, flat).view(T, TOP_K)

    ours, peers = lambda: glmx.ops.moe_combine(rows, weights, plan.inverse), {"torch bmm": by_product}
    if phase == "backward":
        leaves = [rows.requires_grad_(), weights.requires_grad_()]
        ours = harness.backward(ours, leaves, d_out)
        peers = {"torch autograd": harness.backward(by_product, leaves, d_out), "torch by hand": by_hand}
    else:
        peers["torch index_add_"] = by_index_add
    harness.measure(
        benchmark,
        record_row,
        f"moe_combine {phase}, {T} x {TOP_K} rows of {H}",
        "moe_combine",
        ours,
        peers,
        touched=2 * (d_out.numel() + rows.numel() * (2 if phase == "backward" else 1)),
        bound=2**-7,  # torch rounds the weights, and their gradients, to bf16
    )
