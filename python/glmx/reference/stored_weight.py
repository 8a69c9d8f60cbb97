"""Oracle of StoredWeight: the weights that the stored values stand for, by the definition of each format."""

from __future__ import annotations

from typing import Any

import torch

GROUP = 128


def int4_values(packed: torch.Tensor, columns: int) -> torch.Tensor:
    """int32 [rows, words] -> int8 [rows, columns]: eight values a word, lowest bits first, each stored as value + 8."""
    shifts = torch.arange(0, 32, 4, dtype=torch.int32)
    nibbles = (packed[..., None] >> shifts) & 15
    return (nibbles.flatten(-2)[:, :columns] - 8).to(torch.int8)


def dense(stored: Any) -> tuple[torch.Tensor, torch.Tensor | None]:
    """A StoredWeight -> weights bf16 [E, N, K], and the factors fp32 [E, N] of their rows' sums or None."""
    E, N, K = stored.shape
    found = [matrix(stored.format, values, scale, K) for values, scale in stored.matrices]
    factors = [factor for _, factor in found if factor is not None]
    return torch.stack([w for w, _ in found]).view(E, N, K), torch.stack(factors).view(E, N) if factors else None


def matrix(
    format: str, values: torch.Tensor, scale: torch.Tensor | None, columns: int
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """One stored matrix -> bf16 [rows, columns], and the factor fp32 [rows] of each row's sums or None."""
    if scale is None:
        return values, None
    scale = scale.float()
    if format in ("int8", "fp8"):
        return values.to(torch.bfloat16), scale[:, 0]
    q = int4_values(values, columns).float() if format == "int4" else values.float()
    rows = torch.arange(q.shape[0]) // (1 if format == "int4" else GROUP)
    groups = torch.arange(columns) // GROUP
    return (q * scale[rows][:, groups]).to(torch.bfloat16), None
