"""Oracle of rope and rope_cos_sin (Su et al. 2021), half-split and interleaved pairs."""

from __future__ import annotations

import torch

F64 = torch.float64


def rope_cos_sin(
    positions: torch.Tensor, rotary_dim: int, theta: float, *, exact: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """positions [T] int64 -> cos, sin [T, rotary_dim/2] fp32 of position * theta^(-2i/rotary_dim)."""
    exponent = torch.arange(0, rotary_dim, 2, dtype=F64) / rotary_dim
    angle = positions.to(F64)[:, None] * torch.pow(torch.tensor(theta, dtype=F64), -exponent)[None, :]
    cos, sin = torch.cos(angle), torch.sin(angle)
    return (cos, sin) if exact else (cos.float(), sin.float())


def rope(
    x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, *, interleaved: bool = False, exact: bool = False
) -> torch.Tensor:
    """x [T, A, d] -> [T, A, d]: the first r = 2 * cos.shape[1] dims of every head rotated, the others copied.

    Pairs are (i, i + r/2), or (2i, 2i+1) when interleaved; each element stays where it was. cos, sin, each
    product and each sum are rounded to x.dtype, as the Hugging Face models do.
    """

    def rounded(t: torch.Tensor) -> torch.Tensor:
        return t.to(F64) if exact else t.to(x.dtype).to(F64)

    half = cos.shape[1]
    x64 = x.to(F64)
    c, s = rounded(cos)[:, None, :], rounded(sin)[:, None, :]
    if interleaved:
        a, b = x64[..., 0 : 2 * half : 2], x64[..., 1 : 2 * half : 2]
    else:
        a, b = x64[..., :half], x64[..., half : 2 * half]
    rotated_a = rounded(rounded(a * c) - rounded(b * s))
    rotated_b = rounded(rounded(b * c) + rounded(a * s))
    if interleaved:
        rotated = torch.stack((rotated_a, rotated_b), dim=-1).flatten(-2)
    else:
        rotated = torch.cat((rotated_a, rotated_b), dim=-1)
    y = torch.cat((rotated, x64[..., 2 * half :]), dim=-1)
    return y if exact else y.to(x.dtype)
