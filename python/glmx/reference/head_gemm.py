"""Oracle of head_gemm: one matrix product per head."""

from __future__ import annotations

import torch

F64 = torch.float64


def head_gemm(
    x: torch.Tensor,
    w: torch.Tensor,
    *,
    transposed: bool = False,
    out: torch.Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    exact: bool = False,
) -> torch.Tensor:
    """x [T, A, K], w [A, N, K], or [A, K, N] with `transposed` -> [T, A, N]; one rounding."""
    heads = [x[:, a].to(F64) @ (w[a] if transposed else w[a].T).to(F64) for a in range(x.shape[1])]
    y = torch.stack(heads, dim=1)
    if exact:
        return y
    y = y.to(out_dtype or (x.dtype if out is None else out.dtype))
    return y if out is None else out.copy_(y)
