"""Oracle of sample: one token from each row of logits, by the rule that csrc/include/glmx/ops.h states, bit for bit.

A token's mass is e^z in fp32 arithmetic (the kernels' polynomial, from fp64 operations that round once) as a whole
multiple of 2^-42. From there on everything is integers: sorts, cumulative sums and comparisons are exact.

Random numbers: Philox4x32-10 (Salmon et al. 2011); key = the seed's low and high 32 bits, counter = (position's low
and high 32 bits, draw, 0); the coin is the top 24 bits of the first word. A row depends on nothing but itself.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from glmx.reference.gemm_tree import F64, flush32, fma32, round32_sum
from glmx.reference.route_topk import total_order

DRAW_TARGET, DRAW_ACCEPT, DRAW_RESIDUAL, DRAW_DRAFT = range(4)
ONE = 1 << 42  # the mass of the largest logit
_MASK = 0xFFFFFFFF
_TAYLOR = ("0x1.a01a02p-13", "0x1.6c16c2p-10", "0x1.111112p-7", "0x1.555556p-5", "0x1.555556p-3", "0x1p-1", "1", "1")
Values = float | Sequence[float] | torch.Tensor


def philox4x32(counter: tuple[int, int, int, int], key: tuple[int, int], rounds: int = 10) -> tuple[int, ...]:
    """Four 32-bit words from a 128-bit counter and a 64-bit key."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(rounds):
        p0, p1 = 0xD2511F53 * c0, 0xCD9E8D57 * c2
        c0, c1, c2, c3 = (p1 >> 32) ^ c1 ^ k0, p1 & _MASK, (p0 >> 32) ^ c3 ^ k1, p0 & _MASK
        k0, k1 = (k0 + 0x9E3779B9) & _MASK, (k1 + 0xBB67AE85) & _MASK
    return c0, c1, c2, c3


def coin(seed: int, position: int, draw: int = 0) -> int:
    """24 bits, a function of the three integers alone (negative ones as two's complement)."""
    counter = (position & _MASK, position >> 32 & _MASK, draw & _MASK, 0)
    return philox4x32(counter, (seed & _MASK, seed >> 32 & _MASK))[0] >> 8


def uniform(seed: int, position: int, draw: int = 0) -> float:
    """The coin as a multiple of 2^-24 in [0, 1)."""
    return coin(seed, position, draw) * 2.0**-24


def fp32(value: float) -> float:
    return float(torch.tensor(value, dtype=torch.float32))


def exp32(z: torch.Tensor) -> torch.Tensor:
    """e^z for z in [-80, 0], fp32 values held in fp64: the bits of exp16 in csrc/cpu/inl/vec_math.inl."""
    constant = lambda text: torch.full_like(z, float.fromhex(text) if "x" in text else float(text))
    magic = constant("0x1.8p+23")
    n = round32_sum(fma32(z, constant("0x1.715476p+0"), magic), -magic)
    r = fma32(n, constant("-0x1.7f7d1cp-20"), fma32(n, constant("-0x1.62e4p-1"), z))
    y = constant(_TAYLOR[0])
    for term in _TAYLOR[1:]:
        y = fma32(y, r, constant(term))
    return y * torch.exp2(n)  # a power of two: exact


class Kept(NamedTuple):
    """The tokens that a row may draw, ids ascending, and their masses."""

    ids: torch.Tensor
    mass: torch.Tensor


def ruled(
    logits_V: torch.Tensor,
    prompt: Sequence[int] = (),
    generated: Sequence[int] = (),
    penalties: tuple[float, float, float] = (1.0, 0.0, 0.0),
    bias: Sequence[tuple[int, float]] = (),
) -> torch.Tensor:
    """The row with its biases, then its penalties (repetition, presence, frequency), in fp32 steps; denormals are 0."""
    row = flush32(logits_V.detach().to(F64))
    for token, value in bias:
        row[token] = flush32(row[token] + flush32(torch.tensor(value, dtype=torch.float32).to(F64))).float().to(F64)
    step = lambda x: flush32(x.float().to(F64))
    repetition, presence, frequency = (torch.tensor(fp32(v), dtype=F64) for v in penalties)
    neutral = penalties == (1, 0, 0)
    for token in {*prompt, *generated} if not neutral else ():
        x = row[token]
        x = step(x / repetition) if x > 0 else step(x * repetition)
        if n := generated.count(token):
            x = step(x - step(frequency * n))
            x = step(x - presence)
        row[token] = x
    return row


def kept_tokens(row: torch.Tensor, temperature: float, top_k: int, top_p: float, min_p: float) -> Kept:
    """What temperature, min-p, top-k and top-p leave of a row of fp64 logits (the values of `ruled`)."""
    row = total_order(row)
    temperature, top_p, min_p = fp32(temperature), fp32(top_p), fp32(min_p)
    if temperature == 0 or top_k == 1:
        return Kept((row == row.max()).nonzero()[0], torch.tensor([ONE]))
    if row.max().isinf():
        row = torch.where(row == row.max(), 0.0, float("-inf")).to(F64)
    inverse = torch.tensor(1.0, dtype=torch.float32) / torch.tensor(temperature, dtype=torch.float32)
    z = round32_sum(round32_sum(row, -row.max()) * inverse.to(F64), torch.zeros_like(row))
    mass = ((exp32(z.clamp(min=-80.0)) + 1024.0 - 1024.0) * ONE).long()
    _, ids = torch.sort(row, descending=True, stable=True)
    if min_p > 0:
        ids = ids[z[ids] >= fp32(math.log(min_p))]
    if top_k:
        ids = ids[:top_k]
    if top_p < 1:
        running = torch.cumsum(mass[ids], 0)
        need = max(1, math.ceil(float(int(running[-1])) * top_p))
        ids = ids[: int(torch.searchsorted(running, min(need, int(running[-1])))) + 1]
    ids = ids.sort().values
    return Kept(ids, mass[ids])


def drawn(kept: Kept, coin: int) -> int:
    running = torch.cumsum(kept.mass, 0)
    place = coin * int(running[-1]) >> 24
    return int(kept.ids[int(torch.searchsorted(running, place, right=True))])


class Rules:
    """The arguments of sample, one entry per row of logits.shape[:-1]."""

    def __init__(self, logits: torch.Tensor, **given: Any) -> None:
        if logits.dim() == 0 or logits.shape[-1] == 0:
            raise ValueError(f"expected logits of shape [..., V] with V > 0: got {tuple(logits.shape)}")
        self.lead = logits.shape[:-1]
        self.given = given

    def column(self, name: str, neutral: float | None = None) -> list:
        value = self.given[name]
        if value is None:
            value = neutral
        tensor = torch.as_tensor(value)
        try:
            return tensor.broadcast_to(self.lead).flatten().tolist()
        except RuntimeError:
            raise ValueError(
                f"{name}: expected a shape that fits {list(self.lead)}: got {list(tensor.shape)}"
            ) from None

    def spans(self, name: str, width: int) -> list[list[int]]:
        spans = self.given[name]
        return spans.broadcast_to(*self.lead, width).reshape(-1, width).tolist()

    def rows(self, logits: torch.Tensor) -> list[torch.Tensor]:
        flat = logits.reshape(-1, logits.shape[-1])
        repetition, presence, frequency = (
            self.column(name, neutral)
            for name, neutral in (("repetition_penalty", 1.0), ("presence_penalty", 0.0), ("frequency_penalty", 0.0))
        )
        rows = []
        for r, row in enumerate(flat):
            prompt: list[int] = []
            generated: list[int] = []
            bias: list[tuple[int, float]] = []
            if self.given["history"] is not None:
                begin, first, end = self.spans("history", 3)[r]
                prompt = self.given["token_ids"][begin:first].tolist()
                generated = self.given["token_ids"][first:end].tolist()
            if self.given["bias_spans"] is not None:
                begin, end = self.spans("bias_spans", 2)[r]
                bias = [
                    (int(self.given["bias_ids"][i]), float(self.given["bias_values"][i])) for i in range(begin, end)
                ]
            rows.append(ruled(row, prompt, generated, (repetition[r], presence[r], frequency[r]), bias))
        return rows

    def kept(self, logits: torch.Tensor) -> list[Kept]:
        names = ("temperature", "top_k", "top_p", "min_p")
        columns = [self.column(name) for name in names]
        for t, k, top_p, min_p in zip(*columns, strict=True):
            if not t >= 0 or k < 0 or not 0 < top_p <= 1 or not 0 <= min_p <= 1:
                raise ValueError(
                    "expected temperature >= 0, top_k >= 0, 0 < top_p <= 1 and 0 <= min_p <= 1: "
                    f"got temperature={t}, top_k={k}, top_p={top_p}, min_p={min_p}"
                )
        return [kept_tokens(row, *(c[r] for c in columns)) for r, row in enumerate(self.rows(logits))]


def sample(
    logits: torch.Tensor,
    *,
    seeds: Values,
    positions: Values,
    temperature: Values = 1.0,
    top_k: Values = 0,
    top_p: Values = 1.0,
    min_p: Values = 0.0,
    token_ids: torch.Tensor | None = None,
    history: torch.Tensor | None = None,
    repetition_penalty: Values | None = None,
    presence_penalty: Values | None = None,
    frequency_penalty: Values | None = None,
    bias_ids: torch.Tensor | None = None,
    bias_values: torch.Tensor | None = None,
    bias_spans: torch.Tensor | None = None,
    draw: int = DRAW_TARGET,
) -> torch.Tensor:
    """logits [..., V] -> ids int64 [...]; the other arguments as in glmx.ops.sample."""
    given = dict(locals())
    rules = Rules(given.pop("logits"), **given)
    seeds_R, positions_R = rules.column("seeds"), rules.column("positions")
    kept = rules.kept(logits)
    ids = [drawn(k, coin(s, p, draw)) for k, s, p in zip(kept, seeds_R, positions_R, strict=True)]
    return torch.tensor(ids, dtype=torch.int64).reshape(rules.lead)
