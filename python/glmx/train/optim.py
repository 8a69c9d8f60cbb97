"""AdamW on fp32 masters that the trainer owns; each step ends in one rounding from master to parameter.

Everything lives in flat buffers, one set per group (part, weight decay or not, parameter dtype): masters, both
moments, the fp32 gradient accumulators `p.main_grad`, and the parameters themselves, which become views. A
backward accumulates into `main_grad` (autograd then returns None); what an op without that support leaves
in `p.grad` is folded in by `fold_grads`.

A model's indexers are a part of their own: what trains them must not reach the rest, and one gradient norm over both,
clipped, would.

Updates are `ops.adamw`: one pass over memory, the same bits for any thread count. Weight decay is on matrices; it is
not on norms and biases (1-D) nor on the token embedding, whose rows get a gradient only when their token occurs.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

import torch
from torch import Tensor, nn

# Parameters start at multiples of 64 bytes of the narrowest dtype, so that kernels may load whole cache
# lines.
ALIGN = 32


@dataclass(frozen=True)
class Slot:
    """Where one parameter lies in its group's flat buffers."""

    name: str
    param: nn.Parameter
    offset: int

    def view(self, flat: Tensor) -> Tensor:
        return flat[self.offset : self.offset + self.param.numel()].view(self.param.shape)


class Group:
    """Parameters of one part, dtype and weight decay: flat buffers [N], N the padded sum of their sizes."""

    def __init__(self, named: list[tuple[str, nn.Parameter]], part: str, decays: bool) -> None:
        self.part, self.decays = part, decays
        self.slots: list[Slot] = []
        size = 0
        for name, param in named:
            self.slots.append(Slot(name, param, size))
            size += -(-param.numel() // ALIGN) * ALIGN
        dtype, device = named[0][1].dtype, named[0][1].device
        self.params_N = torch.zeros(size, dtype=dtype, device=device)
        self.master_N = torch.zeros(size, dtype=torch.float32, device=device)
        self.grad_N = torch.zeros_like(self.master_N)
        self.exp_avg_N = torch.zeros_like(self.master_N)
        self.exp_avg_sq_N = torch.zeros_like(self.master_N)
        for slot in self.slots:
            slot.view(self.params_N).copy_(slot.param.data)
            slot.view(self.master_N).copy_(slot.param.data)
            slot.param.data = slot.view(self.params_N)
            slot.param.main_grad = slot.view(self.grad_N)  # type: ignore[attr-defined]


def decays(name: str, param: Tensor) -> bool:
    return param.dim() > 1 and "embed_tokens" not in name


def part_of(name: str) -> str:
    """ "model" or "indexer": what the parameter belongs to, each with a gradient norm of its own."""
    return "indexer" if ".indexer." in name else "model"


class AdamW:
    """Decoupled weight decay (arXiv 1711.05101) with bias correction, as torch.optim.AdamW computes it.

    named: (name, parameter) pairs; those without `requires_grad` are left alone. Raises ValueError on a
    parameter dtype other than bf16 and fp32.
    """

    def __init__(
        self,
        named: Iterable[tuple[str, nn.Parameter]],
        *,
        beta1: float,
        beta2: float,
        eps: float,
        weight_decay: float,
    ) -> None:
        self.beta1, self.beta2, self.eps, self.weight_decay = beta1, beta2, eps, weight_decay
        self.updates = 0
        sorted_into: dict[tuple[str, bool, torch.dtype], list[tuple[str, nn.Parameter]]] = {}
        for name, param in named:
            if not param.requires_grad:
                continue
            if param.dtype not in (torch.bfloat16, torch.float32):
                raise ValueError(f"parameter {name} is {param.dtype}: expected bfloat16 or float32")
            key = part_of(name), decays(name, param), param.dtype
            sorted_into.setdefault(key, []).append((name, param))
        self.groups = [Group(members, part, decay) for (part, decay, _), members in sorted_into.items()]

    @torch.no_grad()
    def zero_grad(self) -> None:
        for group in self.groups:
            group.grad_N.zero_()
            for slot in group.slots:
                slot.param.grad = None

    @torch.no_grad()
    def fold_grads(self) -> None:
        """Adds the `p.grad` that ops without main_grad support produced into `p.main_grad`."""
        for group in self.groups:
            for slot in group.slots:
                if slot.param.grad is not None:
                    slot.param.main_grad.add_(slot.param.grad.to(torch.float32))  # type: ignore[attr-defined]
                    slot.param.grad = None

    def grad_norms(self) -> dict[str, float]:
        """Norm over all gradients of each part, summed in fp64 in a fixed order."""
        from glmx.ops import sum_squares

        grads: dict[str, list[Tensor]] = {}
        for group in self.groups:
            grads.setdefault(group.part, []).append(group.grad_N)
        return {part: math.sqrt(float(sum_squares(buffers))) for part, buffers in grads.items()}

    @torch.no_grad()
    def step(self, lr: float, grad_scales: Mapping[str, float] = MappingProxyType({})) -> None:
        """One update with the gradients of each part times its factor in `grad_scales` (clipping), then one rounding
        to the parameters. The gradients are zero afterwards.
        """
        from glmx.ops import adamw

        self.updates += 1
        for group in self.groups:
            adamw(
                group.params_N,
                group.master_N,
                group.exp_avg_N,
                group.exp_avg_sq_N,
                group.grad_N,
                updates=self.updates,
                lr=lr,
                beta1=self.beta1,
                beta2=self.beta2,
                eps=self.eps,
                weight_decay=self.weight_decay if group.decays else 0.0,
                grad_scale=grad_scales.get(group.part, 1.0),
            )

    def state_dict(self) -> dict[str, Tensor]:
        """Views of masters and moments by parameter name, to be saved as they are."""
        return {
            f"{kind}.{slot.name}": slot.view(flat)
            for group in self.groups
            for kind, flat in self._kinds(group)
            for slot in group.slots
        }

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Tensor], updates: int) -> None:
        """Restores masters, moments and the update count, and rounds the masters to the parameters."""
        own = self.state_dict()
        if wrong := sorted(own.keys() ^ state.keys()):
            raise ValueError(f"optimizer state: {wrong[0]} is {'missing' if wrong[0] in own else 'unknown'}")
        for name, tensor in own.items():
            if tensor.shape != state[name].shape:
                raise ValueError(
                    f"optimizer state: {name} has shape {tuple(state[name].shape)}, expected {tuple(tensor.shape)}"
                )
            tensor.copy_(state[name])
        for group in self.groups:
            group.params_N.copy_(group.master_N)
        self.updates = updates

    @staticmethod
    def _kinds(group: Group) -> list[tuple[str, Tensor]]:
        return [
            ("master", group.master_N),
            ("exp_avg", group.exp_avg_N),
            ("exp_avg_sq", group.exp_avg_sq_N),
        ]


def clip_factor(norm: float, limit: float) -> float:
    """What to multiply the gradients by so that their norm is at most `limit` (0: no limit)."""
    return limit / norm if limit and norm > limit else 1.0
