"""What cases of the op tests are made of: Case, and tensors whose values come from integers, so that
they have the same bits on every machine (torch.randn does not).
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

BF16, F32 = torch.bfloat16, torch.float32
DTYPES = (F32, BF16)
NAN, INF = float("nan"), float("inf")


@dataclass(frozen=True)
class Case:
    """One call: `make()` gives the keyword arguments of glmx.ops.<op>, `grads` the arguments to
    differentiate.
    """

    op: str
    name: str
    make: Callable[[], dict[str, Any]]
    grads: tuple[str, ...] = ()

    def __str__(self) -> str:
        return f"{self.op}-{self.name}"


def values(*shape: int, seed: int = 0, dtype: torch.dtype = F32, scale: float = 1.0) -> torch.Tensor:
    """Bell-shaped values of unit variance times `scale`, exact functions of the seed."""
    g = torch.Generator().manual_seed(seed)
    total = sum(torch.randint(-(2**20), 2**20, shape, generator=g, dtype=torch.int64) for _ in range(3))
    return (total.double() * (scale / 2**20)).to(dtype)


def spread(*shape: int, seed: int = 0, dtype: torch.dtype = F32, low: int = -60, high: int = 60) -> torch.Tensor:
    """Values whose exponents are uniform in [low, high]."""
    g = torch.Generator().manual_seed(seed + 1000)
    exponent = torch.randint(low, high + 1, shape, generator=g).double()
    return (values(*shape, seed=seed).double() * torch.exp2(exponent)).to(dtype)


def wild(*shape: int, seed: int = 0, dtype: torch.dtype = F32) -> torch.Tensor:
    """The whole range of the format: denormals, tiny, huge, zeros of both signs, infinities and a NaN."""
    x = spread(*shape, seed=seed, dtype=torch.float64, low=-140, high=126)
    flat = x.view(-1)
    special = [0.0, -0.0, 1e-40, -1e-39, 2.0**-126, 3.3e38, -3.3e38, INF, -INF, NAN]
    for i, value in enumerate(special):
        if flat.numel() > 0:
            flat[(i * 37 + 5) % flat.numel()] = value
    return x.to(dtype)


def ids(*shape: int, high: int, seed: int = 0, low: int = 0, dtype: torch.dtype = torch.int64) -> torch.Tensor:
    g = torch.Generator().manual_seed(seed)
    return torch.randint(low, high, shape, generator=g, dtype=dtype)


def offsets_of(counts: list[int]) -> torch.Tensor:
    return torch.tensor([0, *itertools.accumulate(counts)], dtype=torch.int32)


def tag(dtype: torch.dtype) -> str:
    return {F32: "fp32", BF16: "bf16"}[dtype]


def topk_ids(T: int, K: int, E: int, seed: int = 0, holes: bool = False) -> torch.Tensor:
    """Distinct expert ids per token; with holes some are -1. Experts differ in popularity and some stay
    empty.
    """
    g = torch.Generator().manual_seed(seed)
    out = torch.empty(T, K, dtype=torch.int32)
    for t in range(T):
        used = torch.randperm(max(K, E - E // 4), generator=g)[:K]
        out[t] = used.int()
    if holes and T:
        out[torch.randint(0, 3, (T, K), generator=g) == 0] = -1
    return out
