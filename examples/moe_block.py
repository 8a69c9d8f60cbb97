"""A mixture-of-experts block of your own, from glmx.ops: route, sort by expert, two grouped products, combine.

    python examples/moe_block.py            # a few seconds

It trains the block on a toy task with experts kept balanced by a bias (no auxiliary loss), and shows two promises: a
token's result does not depend on its batch, and not on the number of threads. Both are equal bits, not a tolerance.
"""

import torch
from torch import nn

from glmx import ops

# T tokens, H hidden, E experts, I expert width, K experts per token
H, E, I, K = 64, 8, 96, 2


class MoEBlock(nn.Module):
    """x + sum over the K chosen experts of weight * down(silu(gate(norm(x))) * up(norm(x)))."""

    def __init__(self) -> None:
        super().__init__()
        self.norm_H = nn.Parameter(torch.ones(H))
        self.router_EH = nn.Parameter(torch.randn(E, H) * 0.1)
        self.gate_up_E2IH = nn.Parameter(torch.randn(E, 2 * I, H) * H**-0.5)
        self.down_EHI = nn.Parameter(torch.randn(E, H, I) * I**-0.5)
        self.register_buffer("bias_E", torch.zeros(E))  # chooses experts, never weighs them

    def forward(self, x_TH: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(y [T, H], tokens per expert [E])"""
        y_TH = ops.rms_norm(x_TH, self.norm_H, 1e-5)
        logits_TE = ops.linear(y_TH, self.router_EH)
        weights_TK, ids_TK, counts_E = ops.route_topk(logits_TE, self.bias_E, K)
        plan = ops.expert_plan(ids_TK, E)
        # Row r reads token plan.row_token[r]: the gather is part of the product, no sorted copy of x exists.
        rows_RI = ops.grouped_gemm(
            y_TH,
            self.gate_up_E2IH,
            plan.expert_offsets,
            row_token=plan.row_token,
            inverse=plan.inverse,
            silu_mul=True,
        )
        rows_RH = ops.grouped_gemm(rows_RI, self.down_EHI, plan.expert_offsets)
        return x_TH + ops.moe_combine(rows_RH, weights_TK, plan.inverse), counts_E


def main() -> None:
    torch.manual_seed(0)
    block = MoEBlock()
    optimizer = torch.optim.AdamW(block.parameters(), lr=3e-3)
    # The task: four kinds of tokens, each with a map of its own.
    centers, maps = torch.randn(4, H), torch.randn(4, H, H) * H**-0.5
    for step in range(201):
        kind_T = torch.randint(4, (512,))
        x_TH = centers[kind_T] + 0.5 * torch.randn(512, H)
        target_TH = torch.einsum("th,thk->tk", x_TH, maps[kind_T])
        y_TH, counts_E = block(x_TH)
        loss = (y_TH - target_TH).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        block.bias_E += 0.01 * torch.sign(counts_E.float().mean() - counts_E)  # busy experts become less attractive
        if step % 40 == 0:
            busiest = counts_E.max() / counts_E.float().mean()
            print(f"step {step:3}  loss {loss:.4f}  busiest expert {busiest:.2f} times the mean")

    with torch.no_grad():
        together, _ = block(x_TH)
        alone = torch.cat([block(x_TH[t : t + 1])[0] for t in range(16)])
        torch.set_num_threads(1)
        single, _ = block(x_TH)
    print("a token alone gives the bits it gets in a batch:", torch.equal(alone, together[:16]))
    print("one thread gives the bits of many:              ", torch.equal(single, together))


if __name__ == "__main__":
    main()
