"""Cases of grouped_gemm, linear and moe_mlp with weights as checkpoints store them. Weights are made once and kept: an
op that runs again, on copies of its arguments, finds them at their addresses.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Iterator
from typing import Any, get_args

import torch

from glmx.ops import Matrix, StoredWeight
from glmx.ops.stored_weight import StoredFormat
from glmx.reference.stored_weight import GROUP
from tests.ops.inputs import BF16, F32, Case, offsets_of, topk_ids, values

FORMATS: tuple[StoredFormat, ...] = get_args(StoredFormat)
SMALL = FORMATS[1:]


@functools.cache
def stored(
    format: StoredFormat, E: int, N: int, K: int, *, parts: int = 1, scale_dtype: torch.dtype = F32, seed: int = 0
) -> StoredWeight:
    """[E, N, K] with every value that the format has but NaN, and outputs of about unit size."""
    g = torch.Generator().manual_seed(seed)
    rows, groups = N // parts, -(-K // GROUP)

    def integers(*shape: int, low: int, high: int) -> torch.Tensor:
        return torch.randint(low, high, shape, generator=g)

    def matrix() -> Matrix:
        unit = 2.0**-10 * integers(rows, groups, low=512, high=1024).float() * K**-0.5
        if format == "bf16":
            return Matrix((integers(rows, K, low=-1024, high=1024) * (2.0**-9 * K**-0.5)).bfloat16(), None)
        if format == "int8":
            return Matrix(integers(rows, K, low=-128, high=128).to(torch.int8), (unit[:, :1] / 64).to(scale_dtype))
        if format == "int4":
            words = integers(rows, -(-K // 8), low=-(2**31), high=2**31).to(torch.int32)
            return Matrix(words, (unit / 4).to(scale_dtype))
        bytes_ = integers(rows, K, low=0, high=256).to(torch.uint8)
        values = torch.where((bytes_ & 0x7F) == 0x7F, 0, bytes_).to(torch.uint8).view(torch.float8_e4m3fn)
        scale = unit[:, :1] if format == "fp8" else unit[: math.ceil(rows / GROUP)]
        return Matrix(values, (scale / 128).to(scale_dtype).contiguous())

    return StoredWeight(format, [matrix() for _ in range(E * parts)], parts=parts, columns=K)


def operands(counts: list[int], weight: StoredWeight, *, extra_rows: int = 0, bias: bool = False) -> dict[str, Any]:
    E, N, K = weight.shape
    out = {"x": values(sum(counts) + extra_rows, K, dtype=BF16), "w": weight, "expert_offsets": offsets_of(counts)}
    return {**out, "bias": values(E, N, seed=4, dtype=BF16)} if bias else out


# Rows of each expert, N, K: one row, few, a tile, more than a tile, more than a block; partial groups; both edges.
SHAPES = [
    ([1], 16, 128),
    ([1], 34, 97),
    ([2, 0, 1], 20, 33),
    ([3, 4], 66, 300),
    ([5, 17], 130, 520),
    ([33], 258, 140),
    ([1], 70, 2180),  # more groups than a line of scales
    ([300], 20, 70),
]


def grouped(format: StoredFormat) -> Iterator[Case]:
    for (counts, N, K), (silu, scale) in itertools.product(SHAPES, ((False, F32), (True, BF16))):

        def make(counts=counts, N=N, K=K, silu=silu, scale=scale):
            weight = stored(format, len(counts), N, K, parts=2 if silu else 1, scale_dtype=scale)
            made = operands(counts, weight, extra_rows=len(counts) // 2, bias=silu)
            return {**made, "silu_mul": silu, "out_dtype": BF16 if silu else F32}

        yield Case("grouped_gemm", f"stored-{format}-{'+'.join(map(str, counts))}x{N}x{K}-silu{int(silu)}", make)


def linears(format: StoredFormat) -> Iterator[Case]:
    for T, N, K, bias in [(1, 17, 40, True), (4, 48, 256, False), (0, 4, 8, False)]:

        def make(T=T, N=N, K=K, bias=bias):
            made = {"x": values(T, K, dtype=BF16), "w": stored(format, 1, N, K, seed=3)}
            return {**made, "bias": values(N, seed=2, dtype=BF16)} if bias else made

        yield Case("linear", f"stored-{format}-{T}x{N}x{K}-bias{int(bias)}", make)


def moe(format: StoredFormat) -> Iterator[Case]:
    for T, K, E, H, I in [(1, 3, 4, 40, 24), (21, 3, 6, 150, 70), (40, 2, 2, 136, 140), (0, 2, 4, 8, 16)]:

        def make(T=T, K=K, E=E, H=H, I=I):
            return {
                "x": values(T, H, seed=T, dtype=BF16),
                "topk_weights": values(T, K, seed=3),
                "topk_ids": topk_ids(T, K, E, seed=T, holes=True),
                "gate_up_proj": stored(format, E, 2 * I, H, parts=2, seed=1),
                "down_proj": stored(format, E, H, I, seed=2),
            }

        yield Case("moe_mlp", f"stored-{format}-{T}x{K}e{E}-{H}x{I}", make)
