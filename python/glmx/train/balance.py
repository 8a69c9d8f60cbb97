"""Expert balance: the loss-free bias update, the sequence-wise balance loss and the MaxVio metric.

    T tokens of a micro-batch, E experts, K experts per token, S packed rows ("sequences")

Loss-free balancing (arXiv 2408.15664): after every optimizer step, outside autograd, each expert's selection
bias moves by `rate` against its load over the global batch: b_e += rate * sign(mean load - load_e).

Sequence-wise loss (DeepSeek-V3, arXiv 2412.19437 eq. 17-20, also GLM-4.5): per row of T tokens
    sum_e f_e * P_e,   f_e = E / (K T) * #{t : e in top-K(t)},   P_e = 1/T * sum_t s_te / sum_j s_tj
with the sigmoid scores s before the bias; f carries no gradient. It is 1 when balanced. A row is what was
packed together: documents are often too short for f to mean anything.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import accumulate

import torch
from torch import Tensor, nn

BIAS_NAME = "e_score_correction_bias"


def router_biases(model: nn.Module) -> list[Tensor]:
    """The selection bias [E] of every MoE layer, in the order of layers (the MTP layer is the last)."""
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    found = [(int(name.split(".layers.")[-1].split(".")[0]), t) for name, t in tensors.items() if BIAS_NAME in name]
    return [tensor.data for _, tensor in sorted(found, key=lambda pair: pair[0])]


class ExpertLoads:
    """Tokens per expert and MoE layer over one global batch, exact integers."""

    def __init__(self) -> None:
        self.counts: list[Tensor] = []

    def add(self, expert_counts: Sequence[Tensor]) -> None:
        """Adds one micro-batch: int32 [E] per MoE layer."""
        # One copy of all layers from a GPU: each would wait for the work before it.
        flat = torch.cat(list(expert_counts)).to(torch.int64).cpu() if expert_counts else torch.empty(0)
        new = list(flat.split([c.numel() for c in expert_counts]))
        self.counts = [a + b for a, b in zip(self.counts, new, strict=True)] if self.counts else new

    def max_vio(self) -> list[float]:
        """max load / mean load - 1, per MoE layer: 0 is balanced."""
        return [float(c.max()) * c.numel() / max(int(c.sum()), 1) - 1.0 for c in self.counts]

    def as_lists(self) -> list[list[int]]:
        return [c.tolist() for c in self.counts]


@torch.no_grad()
def update_biases(biases: Sequence[Tensor], loads: ExpertLoads, rate: float) -> None:
    """b_e += rate * sign(mean load - load_e); the comparison is one of integers, so equal loads stay put."""
    if not rate:
        return
    for bias, counts in zip(biases, loads.counts, strict=True):
        below_mean = torch.sign(counts.sum() - counts * counts.numel())
        bias.add_(below_mean.to(bias.device, bias.dtype) * rate)


@torch.no_grad()
def sequence_balance(scores_TE: Tensor, topk_ids_TK: Tensor, row_lengths: Sequence[int]) -> tuple[float, Tensor]:
    """The loss summed over the rows of a micro-batch, and its gradient with respect to scores_TE, fp32.

    row_lengths: tokens per row, in order, T in all. Sums run through grouped_gemm, with a row of tokens as
    its "expert", so their order is fixed: torch's own reductions change bits with the thread count.
    """
    from glmx.ops import grouped_gemm, grouped_gemm_wgrad

    device = scores_TE.device
    lengths = torch.tensor(row_lengths, device=device)
    S, E, K = len(row_lengths), scores_TE.shape[1], topk_ids_TK.shape[1]
    row_T = torch.repeat_interleave(torch.arange(S, device=device), lengths, output_size=sum(row_lengths))
    offsets = torch.tensor([0, *accumulate(row_lengths)], dtype=torch.int32, device=device)

    places = (row_T[:, None] * E + topk_ids_TK).flatten()
    chosen = torch.zeros(S * E, dtype=torch.int64, device=device)  # integers add up the same in any order
    chosen = chosen.scatter_add_(0, places, torch.ones_like(places)).view(S, E)
    f_SE = chosen.to(torch.float32) * (E / K) / lengths[:, None].to(torch.float32)
    scores_TE = scores_TE.contiguous()
    sums_T2 = grouped_gemm(scores_TE, torch.stack([torch.ones_like(f_SE), f_SE], dim=1), offsets)
    inverse_T1 = 1.0 / (sums_T2[:, :1] + 1e-20)
    share_SE = grouped_gemm_wgrad(inverse_T1, scores_TE, offsets)[:, 0] / lengths[:, None]
    loss = math.fsum((f_SE.double() * share_SE.double()).flatten().tolist())

    length_T1 = lengths.to(torch.float32)[row_T][:, None]
    grad_TE = (f_SE[row_T] - sums_T2[:, 1:] * inverse_T1) * (inverse_T1 / length_T1)
    return loss, grad_TE
