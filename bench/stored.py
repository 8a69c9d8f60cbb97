"""Weights rounded to nearest into the formats of glmx.ops.StoredWeight, scales from the largest value of each group."""

from __future__ import annotations

import torch
from torch.nn import functional as F

from glmx.ops import Matrix, StoredWeight
from glmx.ops.stored_weight import StoredFormat

FORMATS: tuple[StoredFormat, ...] = ("int8", "int4", "fp8", "fp8_blocks")
GROUP = 128
E4M3 = torch.float8_e4m3fn
_LARGEST = {"int8": 127.0, "int4": 7.5, "fp8": 448.0, "fp8_blocks": 448.0}
# What rounding them costs the output of a layer of experts, by norms: about half of this, with weights of a bell's
# shape. Peers that round activations to 8 bits too, or to int4 by rows, are within it.
LOST = {"int8": 2**-4, "int4": 0.5, "fp8": 2**-3, "fp8_blocks": 2**-3}


def rounded(format: StoredFormat, weight: torch.Tensor) -> Matrix:
    """[rows, K] of any float dtype; int4 with scales in bf16, the others in fp32."""
    (rows, K), w = weight.shape, weight.float()
    tall, wide = {"int4": (1, GROUP), "fp8_blocks": (GROUP, GROUP)}.get(format, (1, K))
    padded = F.pad(w, (0, -K % wide, 0, -rows % tall))
    peak = padded.unflatten(1, (-1, wide)).unflatten(0, (-1, tall)).abs().amax((1, 3))
    scale = peak.clamp(min=1e-12) / _LARGEST[format]
    scale = scale.bfloat16() if format == "int4" else scale
    by_value = scale.float().repeat_interleave(tall, 0)[:rows].repeat_interleave(wide, 1)[:, :K]
    q = w / by_value
    if format == "int8":
        return Matrix(q.round().to(torch.int8), scale)
    if format != "int4":
        return Matrix(q.to(E4M3), scale)
    stored = F.pad(q.round().clamp(-8, 7) + 8, (0, -K % 8), value=8.0).to(torch.uint8)
    return Matrix((stored[:, 0::2] | stored[:, 1::2] << 4).view(torch.int32), scale)


def stored(format: StoredFormat, stack: torch.Tensor, parts: int = 1) -> StoredWeight:
    """Weights [E, N, K]."""
    matrices = [rounded(format, part) for expert in stack for part in expert.chunk(parts)]
    return StoredWeight(format, matrices, parts=parts, columns=stack.shape[-1])


def moved(weight: StoredWeight, experts: int) -> float:
    """Bytes of values and scales of so many of its experts."""
    return weight.nbytes * experts / weight.shape[0]
