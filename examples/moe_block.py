"""A mixture-of-experts block of your own, from glmx.ops: route, sort by expert, two grouped products, combine.

    python examples/moe_block.py [--device cpu|cuda]            # a few seconds

First it takes the weights of transformers' `Glm4MoeMoE` and computes what that block does, gradients too. Then it
trains on a toy task with experts kept balanced by a bias (no auxiliary loss), and shows two promises: a token's result
does not depend on its batch, and not on the number of threads (on a GPU: not on the run). Both are equal bits, not a
tolerance.
"""

import argparse

import torch
from torch import nn

from glmx import ops

# T tokens, H hidden, E experts, I expert width, K experts per token
H, E, I, K = 64, 8, 96, 2


class MoEBlock(nn.Module):
    """sum over the K chosen experts of weight * down(silu(gate(x)) * up(x)), and one expert that every token shares."""

    def __init__(self, scaling: float = 1.0) -> None:
        super().__init__()
        self.router_EH = nn.Parameter(torch.randn(E, H) * 0.1)
        self.gate_up_E2IH = nn.Parameter(torch.randn(E, 2 * I, H) * H**-0.5)
        self.down_EHI = nn.Parameter(torch.randn(E, H, I) * I**-0.5)
        self.shared_gate_up_2IH = nn.Parameter(torch.randn(2 * I, H) * H**-0.5)
        self.shared_down_HI = nn.Parameter(torch.randn(H, I) * I**-0.5)
        self.register_buffer("bias_E", torch.zeros(E))  # chooses experts, never weighs them
        self.scaling = scaling

    def forward(self, x_TH: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(y [T, H], tokens per expert [E])"""
        logits_TE = ops.linear(x_TH.float(), self.router_EH.float())
        weights_TK, ids_TK, counts_E = ops.route_topk(logits_TE, self.bias_E, K, routed_scaling_factor=self.scaling)
        plan = ops.expert_plan(ids_TK, E)
        # Row r reads token plan.row_token[r]: the gather is part of the product, no sorted copy of x exists.
        rows_RI = ops.grouped_gemm(
            x_TH,
            self.gate_up_E2IH,
            plan.expert_offsets,
            row_token=plan.row_token,
            inverse=plan.inverse,
            silu_mul=True,
        )
        rows_RH = ops.grouped_gemm(rows_RI, self.down_EHI, plan.expert_offsets)
        routed_TH = ops.moe_combine(rows_RH, weights_TK, plan.inverse)
        shared_TH = ops.linear(ops.linear(x_TH, self.shared_gate_up_2IH, silu_mul=True), self.shared_down_HI)
        return routed_TH + shared_TH, counts_E

    @torch.no_grad()
    def take(self, theirs: nn.Module) -> "MoEBlock":
        """The weights of a Glm4MoeMoE."""
        self.router_EH.copy_(theirs.gate.weight)
        self.bias_E.copy_(theirs.gate.e_score_correction_bias)
        self.gate_up_E2IH.copy_(theirs.experts.gate_up_proj)
        self.down_EHI.copy_(theirs.experts.down_proj)
        shared = theirs.shared_experts
        self.shared_gate_up_2IH.copy_(torch.cat((shared.gate_proj.weight, shared.up_proj.weight)))
        self.shared_down_HI.copy_(shared.down_proj.weight)
        return self


def compare_with_transformers(device: torch.device) -> None:
    try:
        from transformers import Glm4MoeConfig
        from transformers.models.glm4_moe.modeling_glm4_moe import Glm4MoeMoE
    except ImportError:
        print("skipped: transformers is not installed, so its block is not compared")
        return
    config = Glm4MoeConfig(
        hidden_size=H,
        moe_intermediate_size=I,
        n_routed_experts=E,
        num_local_experts=E,
        num_experts_per_tok=K,
        n_shared_experts=1,
        routed_scaling_factor=2.5,
        norm_topk_prob=True,
        n_group=1,
        topk_group=1,
    )
    config._experts_implementation = "eager"
    theirs = Glm4MoeMoE(config)
    for parameter in theirs.parameters():
        nn.init.normal_(parameter, std=parameter.shape[-1] ** -0.5)
    nn.init.normal_(theirs.gate.e_score_correction_bias, std=0.1)
    ours = MoEBlock(scaling=2.5).take(theirs)
    x_TH, d_out_TH = torch.randn(2, 200, H)

    def run(block: nn.Module, dtype: torch.dtype) -> dict[str, torch.Tensor]:
        block.to(device)
        for parameter in block.parameters():  # not the buffer: the bias stays fp32 in a checkpoint
            parameter.data = parameter.data.to(dtype)
            parameter.grad = None
        x = x_TH.to(device, dtype, copy=True).requires_grad_()
        out = block(x)[0] if block is ours else block(x[None])[0]
        out.backward(d_out_TH.to(device, dtype))
        router = block.router_EH if block is ours else block.gate.weight
        down = block.down_EHI if block is ours else block.experts.down_proj
        return {"output": out, "d x": x.grad, "d router": router.grad, "d down": down.grad}

    # fp32: sums in another order. bf16: transformers rounds between steps where glmx keeps fp32.
    for dtype, bound in ((torch.float32, 1e-5), (torch.bfloat16, 2e-2)):
        mine, other = run(ours, dtype), run(theirs, dtype)
        for name in mine:
            a, b = mine[name].detach().double(), other[name].detach().double()
            away = float((a - b).norm() / b.norm())
            assert away <= bound, f"{name} in {dtype}: {away:.1e} of the norm away from transformers' block"
            print(f"transformers' Glm4MoeMoE, {str(dtype)[6:]:8}  {name:8} differs by {away:.0e} of the norm")


def train(device: torch.device) -> None:
    block = MoEBlock().to(device)
    norm_H = nn.Parameter(torch.ones(H, device=device))
    layer = lambda x_TH: block(ops.rms_norm(x_TH, norm_H, 1e-5))
    optimizer = torch.optim.AdamW([*block.parameters(), norm_H], lr=3e-3)
    # The task: four kinds of tokens, each with a map of its own.
    centers, maps = torch.randn(4, H).to(device), (torch.randn(4, H, H) * H**-0.5).to(device)
    for step in range(201):
        kind_T = torch.randint(4, (512,)).to(device)
        x_TH = centers[kind_T] + 0.5 * torch.randn(512, H).to(device)
        target_TH = torch.einsum("th,thk->tk", x_TH, maps[kind_T])
        y_TH, counts_E = layer(x_TH)
        loss = (x_TH + y_TH - target_TH).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        block.bias_E += 0.01 * torch.sign(counts_E.float().mean() - counts_E)  # busy experts become less attractive
        if step % 40 == 0:
            busiest = counts_E.max() / counts_E.float().mean()
            print(f"step {step:3}  loss {loss:.4f}  busiest expert {busiest:.2f} times the mean")

    with torch.no_grad():
        together, _ = layer(x_TH)
        alone = torch.cat([layer(x_TH[t : t + 1])[0] for t in range(16)])
        torch.set_num_threads(1)
        again, _ = layer(x_TH)
    print("a token alone gives the bits it gets in a batch:", torch.equal(alone, together[:16]))
    what = "one thread gives the bits of many:" if device.type == "cpu" else "the next run gives the same bits:"
    print(f"{what:47}", torch.equal(again, together))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    device = torch.device(parser.parse_args().device)
    torch.manual_seed(0)
    compare_with_transformers(device)
    train(device)


if __name__ == "__main__":
    main()
