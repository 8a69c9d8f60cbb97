"""sum_squares: the sum of squares of tensors as one fp64 scalar, the same bits for any thread count."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from glmx.ops._library import check_model_dtype, op

_sum_squares = op("sum_squares")


def sum_squares(x: Tensor | Sequence[Tensor]) -> Tensor:
    """Adds up x_i^2 in fp64: chunks of 4096 elements in sixteen lanes, chunks in order, tensors in order.

    Args:
        x: a tensor of any shape, fp32 or bf16, or a sequence of them on one device. Denormals count as zero.

    Returns:
        A 0-dimensional fp64 tensor; 0 for no elements.

    Raises:
        ValueError: a dtype other than fp32 or bf16.

    Not differentiable: it serves gradient clipping and metrics.
    """
    tensors = [x] if isinstance(x, Tensor) else list(x)
    total = torch.zeros((), dtype=torch.float64, device=tensors[0].device if tensors else None)
    for i, tensor in enumerate(tensors):
        check_model_dtype(tensor, "x" if isinstance(x, Tensor) else f"x[{i}]")
        part = tensor.new_empty(1, dtype=torch.float64)
        _sum_squares(part, tensor.detach().reshape(-1).contiguous())
        total = total + part[0]
    return total
