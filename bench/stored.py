"""Weights rounded to nearest into the formats of glmx.ops.StoredWeight, scales from the largest value of each group."""

from __future__ import annotations

import torch
from torch.nn import functional as F

from glmx.models import compressed
from glmx.ops import Matrix, StoredWeight
from glmx.ops.stored_weight import GROUP, StoredFormat

FORMATS: tuple[StoredFormat, ...] = ("int8", "int4", "fp8", "fp8_blocks")
E4M3 = torch.float8_e4m3fn
# What rounding them costs the output of a layer of experts, by norms: about half of this, with weights of a bell's
# shape. Peers that round activations to 8 bits too, or to int4 by rows, are within it.
LOST = {"int8": 2**-4, "int4": 0.5, "fp8": 2**-3, "fp8_blocks": 2**-3}


def rounded(format: StoredFormat, weight: torch.Tensor) -> Matrix:
    """[rows, K] of any float dtype; int8 and int4 as `glmx quantize` rounds them, FP8 with scales in fp32."""
    (rows, K), w = weight.shape, weight.float()
    if format in ("int8", "int4"):
        values, scale, *_ = compressed.tensors(compressed.rounded(w, format), format)
        return Matrix(values, scale)
    tall, wide = (GROUP, GROUP) if format == "fp8_blocks" else (1, K)
    padded = F.pad(w, (0, -K % wide, 0, -rows % tall))
    peak = padded.unflatten(1, (-1, wide)).unflatten(0, (-1, tall)).abs().amax((1, 3))
    scale = peak.clamp(min=1e-12) / 448.0
    return Matrix((w / scale.repeat_interleave(tall, 0)[:rows].repeat_interleave(wide, 1)[:, :K]).to(E4M3), scale)


def stored(format: StoredFormat, stack: torch.Tensor, parts: int = 1) -> StoredWeight:
    """Weights [E, N, K]."""
    matrices = [rounded(format, part) for expert in stack for part in expert.chunk(parts)]
    return StoredWeight(format, matrices, parts=parts, columns=stack.shape[-1])


def moved(weight: StoredWeight, experts: int) -> float:
    """Bytes of values and scales of so many of its experts."""
    return weight.nbytes * experts / weight.shape[0]
