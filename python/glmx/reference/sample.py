"""The step-1 sampler: temperature, top-k, top-p, and one uniform number per (seed, position). Later: the op
`sample`.

The rule, so that a kernel can return the same tokens from the same logits (NaN counts as -inf throughout):
1. temperature 0: the largest logit, ties to the lowest id.
2. Order the row by (logit descending, id ascending) and keep the first top_k (0 = all).
3. weight_i = exp((logit_i - largest) / temperature): the difference and the quotient in fp32, exp rounded to
   fp32. Running sums of weights are fp64, in the order of step 2.
4. Keep the shortest prefix whose sum reaches top_p times the total (1 = all); at least one token stays.
5. u = uniform(seed, position); the token is the first one whose running sum exceeds u times the sum of the
   prefix.

Random numbers: Philox4x32-10 (Salmon et al. 2011); key = the seed's low and high 32 bits, counter =
(position's low and high 32 bits, draw, 0); u = the top 24 bits of the first word * 2^-24. A row depends on
nothing but itself.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from glmx.reference.route_topk import total_order

_MASK = 0xFFFFFFFF
# torch splits elementwise work over threads above 32768 elements; below, bits do not depend on the thread
# count.
_PIECE = 16384


def philox4x32(counter: tuple[int, int, int, int], key: tuple[int, int], rounds: int = 10) -> tuple[int, ...]:
    """Four 32-bit words from a 128-bit counter and a 64-bit key."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(rounds):
        p0, p1 = 0xD2511F53 * c0, 0xCD9E8D57 * c2
        c0, c1, c2, c3 = (p1 >> 32) ^ c1 ^ k0, p1 & _MASK, (p0 >> 32) ^ c3 ^ k1, p0 & _MASK
        k0, k1 = (k0 + 0x9E3779B9) & _MASK, (k1 + 0xBB67AE85) & _MASK
    return c0, c1, c2, c3


def uniform(seed: int, position: int, draw: int = 0) -> float:
    """A multiple of 2^-24 in [0, 1), a function of the three integers alone (negative ones as two's
    complement).
    """
    counter = (position & _MASK, position >> 32 & _MASK, draw & _MASK, 0)
    return (philox4x32(counter, (seed & _MASK, seed >> 32 & _MASK))[0] >> 8) * 2.0**-24


def _weights(logits: torch.Tensor, temperature: float) -> torch.Tensor:
    """fp32 exp((logit - largest) / temperature) of a sorted row, as fp64 values; +inf logits share
    everything.
    """
    if logits[0].isinf():
        return (logits == logits[0]).double()
    z = torch.zeros(math.ceil(logits.numel() / _PIECE) * _PIECE, dtype=torch.float32)
    z[: logits.numel()] = (logits - logits[0]) / torch.tensor(temperature, dtype=torch.float32)
    pieces = [torch.exp(piece.double()).float() for piece in z.split(_PIECE)]
    return torch.cat(pieces)[: logits.numel()].double()


def _sample_row(logits: torch.Tensor, seed: int, position: int, temperature: float, top_k: int, top_p: float) -> int:
    if temperature < 0 or not 0 < top_p <= 1 or top_k < 0:
        raise ValueError(
            "expected temperature >= 0, 0 < top_p <= 1 and top_k >= 0: "
            f"got temperature={temperature}, top_p={top_p}, top_k={top_k}"
        )
    score = total_order(logits.float())
    if temperature == 0:
        return int((score == score.max()).nonzero()[0])
    ordered, ids = torch.sort(score, descending=True, stable=True)
    if top_k:
        ordered, ids = ordered[:top_k], ids[:top_k]
    running = torch.cumsum(_weights(ordered, temperature), dim=0)
    kept = running.numel()
    if top_p < 1:
        kept = min(kept, int(torch.searchsorted(running, top_p * running[-1])) + 1)
    target = uniform(seed, position) * running[kept - 1]
    chosen = int(torch.searchsorted(running[:kept], target, right=True))
    return int(ids[min(chosen, kept - 1)])


def _per_row(value: float | Sequence[float] | torch.Tensor, rows: int, name: str) -> list:
    if isinstance(value, torch.Tensor):
        value = value.tolist()
    values = list(value) if isinstance(value, Sequence) else [value] * rows
    if len(values) != rows:
        raise ValueError(f"expected len({name}) == logits.shape[0]: got {len(values)}, logits has {rows} rows")
    return values


def sample(
    logits: torch.Tensor,
    *,
    seeds: int | Sequence[int] | torch.Tensor,
    positions: int | Sequence[int] | torch.Tensor,
    temperature: float | Sequence[float] | torch.Tensor = 1.0,
    top_k: int | Sequence[int] | torch.Tensor = 0,
    top_p: float | Sequence[float] | torch.Tensor = 1.0,
) -> torch.Tensor:
    """logits [B, V] -> ids int64 [B]. The other arguments are one value each, or one per row.

    `positions` is the index in its sequence of the token being drawn. Raises ValueError on a bad shape or
    value.
    """
    if logits.dim() != 2 or logits.shape[1] == 0:
        raise ValueError(f"expected logits of shape [B, V] with V > 0: got {tuple(logits.shape)}")
    B = logits.shape[0]
    columns = [
        _per_row(v, B, n)
        for v, n in (
            (seeds, "seeds"),
            (positions, "positions"),
            (temperature, "temperature"),
            (top_k, "top_k"),
            (top_p, "top_p"),
        )
    ]
    rows = logits.detach()
    return torch.tensor([_sample_row(rows[b], *(column[b] for column in columns)) for b in range(B)], dtype=torch.int64)
