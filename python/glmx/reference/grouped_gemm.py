"""Oracle of grouped_gemm, its two gradients and linear: one matrix product per expert over its own rows."""

from __future__ import annotations

from typing import Any

import torch

from glmx.reference.stored_weight import dense

F64 = torch.float64


def _weights(w: Any) -> tuple[torch.Tensor, torch.Tensor | None]:
    """fp64 [E, N, K], and the factors [E, N] of the sums of stored weights that have them."""
    if isinstance(w, torch.Tensor):
        return w.to(F64), None
    w_ENK, factor_EN = dense(w)
    return w_ENK.to(F64), None if factor_EN is None else factor_EN.to(F64)


def _gathered(x: torch.Tensor, row_token: torch.Tensor | None) -> torch.Tensor:
    """Rows of x by row_token; -1 gives a row of zeros, which no expert owns."""
    if row_token is None:
        return x
    rows = x[row_token.long().clamp(min=0)]
    return torch.where((row_token >= 0)[:, None], rows, torch.zeros((), dtype=x.dtype))


def grouped_gemm(
    x: torch.Tensor,
    w: torch.Tensor | Any,
    expert_offsets: torch.Tensor,
    *,
    row_token: torch.Tensor | None = None,
    inverse: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    silu_mul: bool = False,
    out_dtype: torch.dtype | None = None,
    exact: bool = False,
) -> torch.Tensor:
    """x [M, K], w [E, N, K] (or stored weights), expert_offsets int32 [E+1] -> [R, N], or [R, N/2] with silu_mul.

    Row r of expert e is x[r] @ w[e].T (x[row_token[r]] when gathering) + bias[e]; rows past expert_offsets[E]
    are zero.
    """
    rows, (w64, factor_EN) = _gathered(x, row_token).to(F64), _weights(w)
    offsets = expert_offsets.tolist()
    blocks = []
    for e in range(w.shape[0]):
        y = rows[offsets[e] : offsets[e + 1]] @ w64[e].T
        y = y if factor_EN is None else y * factor_EN[e]
        blocks.append(y if bias is None else y + bias[e].to(F64))
    blocks.append(torch.zeros(rows.shape[0] - offsets[-1], w.shape[1], dtype=F64))
    out = torch.cat(blocks)
    if silu_mul:
        gate, up = out.chunk(2, dim=1)
        out = gate * torch.sigmoid(gate) * up
    return out if exact else out.to(out_dtype or x.dtype)


def grouped_gemm_dgrad(
    dy: torch.Tensor,
    w: torch.Tensor,
    expert_offsets: torch.Tensor,
    *,
    out_dtype: torch.dtype | None = None,
    exact: bool = False,
) -> torch.Tensor:
    """dy [R, N], w [E, N, K] -> dx [R, K]: row r of expert e is dy[r] @ w[e]."""
    return grouped_gemm(dy, w.transpose(1, 2), expert_offsets, out_dtype=out_dtype or dy.dtype, exact=exact)


def grouped_gemm_wgrad(
    dy: torch.Tensor,
    x: torch.Tensor,
    expert_offsets: torch.Tensor,
    *,
    row_token: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
    accumulate: bool = False,
    out_dtype: torch.dtype | None = None,
    exact: bool = False,
) -> torch.Tensor:
    """dy [R, N], x [M, K] -> dw [E, N, K] = dy_e.T @ x_e; empty experts get zeros; accumulate: out + dw."""
    rows, dy64 = _gathered(x, row_token).to(F64), dy.to(F64)
    offsets = expert_offsets.tolist()
    blocks = [dy64[a:b].T @ rows[a:b] for a, b in zip(offsets[:-1], offsets[1:], strict=True)]
    dw = torch.stack(blocks)
    if accumulate:
        assert out is not None
        dw = out.to(F64) + dw
    if exact:
        return dw
    dw = dw.to(out.dtype if out is not None else out_dtype or dy.dtype)
    return dw if out is None else out.copy_(dw)


def linear(
    x: torch.Tensor,
    w: torch.Tensor | Any,
    bias: torch.Tensor | None = None,
    *,
    silu_mul: bool = False,
    out_dtype: torch.dtype | None = None,
    exact: bool = False,
) -> torch.Tensor:
    """x [.., K], w [N, K] -> [.., N] = x @ w.T + bias, or [.., N/2] with silu_mul; one rounding."""
    w64, factor_EN = _weights(w)
    y = x.to(F64) @ w64.view(w.shape[-2:]).T
    if factor_EN is not None:
        y = y * factor_EN[0]
    if bias is not None:
        y = y + bias.to(F64)
    if silu_mul:
        gate, up = y.chunk(2, dim=-1)
        y = gate * torch.sigmoid(gate) * up
    return y if exact else y.to(out_dtype or x.dtype)
