"""How fast the demo's model decodes with and without drafts of its MTP layer: rounds in turns, medians."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from glmx.serve.llm import LLM

NUMBERS: tuple[int | str, ...] = (0, 1, "auto")
ROUNDS, PROMPTS, TOKENS = 5, 2, 64


@dataclass(frozen=True)
class Speed:
    """Tokens per second of greedy completions, one at a time, prompts included: medians over `rounds` of NUMBERS."""

    rates: tuple[float, ...]
    rounds: int
    tokens: int

    @property
    def words(self) -> str:
        plain, one, auto = self.rates
        return (
            f"decoding  {plain:,.0f} tokens/s without drafts, {one:,.0f} with one a step ({one / plain:.2f}x), "
            f"{auto:,.0f} with as many as pay off ({auto / plain:.2f}x): medians of {self.rounds} rounds in turns, "
            f"{self.tokens} tokens each, one completion at a time"
        )


def measure(llm: LLM, prompts: Sequence[str]) -> Speed:
    """Completes the first PROMPTS of them once to warm up, then in each round with each number of drafts."""
    from glmx.serve.llm import SamplingParams
    from glmx.serve.speculation import speculation

    policies = [speculation(number, True) for number in NUMBERS]
    greedy = SamplingParams(temperature=0.0, max_tokens=TOKENS, ignore_eos=True)
    rates: list[list[float]] = [[] for _ in NUMBERS]
    usual = llm.engine.speculation
    for turn in range(1 + ROUNDS):
        for i in [(turn + i) % len(NUMBERS) for i in range(len(NUMBERS))]:
            llm.engine.speculation = policies[i]
            begun = time.perf_counter()
            tokens = sum(len(llm.generate(prompt, greedy)[0].outputs[0].token_ids) for prompt in prompts[:PROMPTS])
            if turn:
                rates[i].append(tokens / (time.perf_counter() - begun))
    llm.engine.speculation = usual
    return Speed(tuple(map(statistics.median, rates)), ROUNDS, tokens)
