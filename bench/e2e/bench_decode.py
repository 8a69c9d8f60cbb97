"""Tokens per second of decoding with the MTP layer's drafts, beside the bound of the bytes that its steps must read.

    pytest bench/e2e/bench_decode.py [--decode-model RUN]            (OMP_NUM_THREADS sets the threads)

Two models: the demo's, on held-out text with the drafts that it makes (RUN is what `glmx demo` left; without it a
short one is trained, whose drafts are poor), and a glm4_moe of 240 M parameters and an MTP layer, random. Rows
marked "synthetic" decide by a coin which drafts are right: the draft forwards run as ever, then each of their tokens is
replaced, by the plain continuation with the given chance, else by another one.

Numbers of drafts take turns, round by round, on the same prompts; the prompts' own forwards are not timed. What a step
must read (random_models.Bytes) is counted in a pass of its own, the MTP layer's for each draft step. Those bytes at the
machine's read bandwidth are the bound. "auto, new" begins without any experience in each round; its count, in slow
steps, may have made other drafts. With one thread time is the processor's, which counts no waiting for a core.
"""

from __future__ import annotations

import functools
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import harness
import pytest
import torch
from e2e.random_models import GLM4, TINY, Bytes, random_model

import glmx
from glmx import _native, runtime
from glmx.models.decoder import Decoder
from glmx.serve.engine import Engine, Request
from glmx.serve.sampling import SamplingParams
from glmx.serve.speculation import speculation
from glmx.serve.text import TextStream

PROMPT, ANSWER, ROUNDS = 96, 96, 5
NUMBERS: tuple[int | str, ...] = (0, 1, 2, 3, "auto", "auto, new")
Prompts = list[list[list[int]]]  # of each round, of each sequence: token ids


def now() -> float:
    return time.thread_time() if torch.get_num_threads() == 1 else time.perf_counter()


@functools.cache  # so that no timed step throws one
def coin(place: int, token: int) -> float:
    return random.Random(f"{place} {token}").random()


class Variant:
    """An engine with a number of drafts; with a `chance`, drafts are right by a coin."""

    def __init__(self, model: Decoder, batch: int, drafts: int | str, answer: int, chance: float | None) -> None:
        self.model, self.drafts, self.answer, self.chance = model, drafts, answer, chance
        self.engine = Engine(model, batch, PROMPT + answer + 1, clock=now)
        self.plain: dict[tuple[int, ...], list[int]] = {}  # the answers without drafts, by prompt
        self._renew()
        if chance is not None:
            self._made, self.engine._drafter.draft = self.engine._drafter.draft, self._replaced

    def _renew(self) -> None:
        kind = "auto" if self.drafts == "auto, new" else self.drafts
        self.engine.speculation = speculation(kind, True)

    @torch.no_grad()
    def run(self, prompts: list[list[int]]) -> tuple[float, list[list[int]], int]:
        """Seconds of the steps behind the prompts, the answers, and how many steps."""
        if self.drafts == "auto, new":
            self._renew()
        params = SamplingParams(temperature=0, max_tokens=self.answer)
        requests = [
            Request(str(i), ids, params, 0, frozenset(), TextStream(None, params)) for i, ids in enumerate(prompts)
        ]
        for request in requests:
            self.engine.add(request)
        self.engine.step()
        steps, begun = 0, now()
        while self.engine.has_work:
            self.engine.step()
            steps += 1
        seconds = now() - begun
        for request in requests:
            assert request.error is None, request.error
        return seconds, [request.token_ids for request in requests], steps

    def _replaced(self, requests: list[Request], counts: list[int]) -> list[list[int]]:
        drafts = self._made(requests, counts)
        for request, guesses in zip(requests, drafts, strict=True):
            answer, done = self.plain[tuple(request.prompt_token_ids)], len(request.token_ids)
            for j, guess in enumerate(guesses):
                right = answer[done + j]
                if coin(request.num_tokens + j, right) < self.chance:
                    guesses[j] = right
                elif guess == right:
                    guesses[j] = (guess + 1) % self.model.config.vocab_size
        return drafts


def measure(
    benchmark: Any, record_row: Callable, name: str, model: Decoder, prompts: Prompts, answer: int, chance: float | None
) -> None:
    import roofline

    B = len(prompts[0])
    variants = {drafts: Variant(model, B, drafts, answer, chance) for drafts in NUMBERS}
    plain: dict[tuple[int, ...], list[int]] = {}
    counts = {drafts: count(variant, prompts, plain) for drafts, variant in variants.items()}
    right = {}
    if benchmark.disabled:
        return
    for drafts, variant in variants.items():
        if variant.engine.speculation is not None and drafts != "auto, new":
            counters = variant.engine.speculation.counters
            right[drafts] = counters.num_accepted_tokens / max(counters.num_draft_tokens, 1)
    for variant in variants.values():
        # What was counted ran under hooks, so not recorded and slower: nothing is to be learned from those times.
        variant._renew()
        variant.run(prompts[0])
    threads = torch.get_num_threads()
    before = roofline.ceilings(threads)["read"]
    times: dict[int | str, list[float]] = {drafts: [] for drafts in NUMBERS}

    def turn() -> None:
        r = len(times[0])
        order = [NUMBERS[(r + i) % len(NUMBERS)] for i in range(len(NUMBERS))]
        for drafts in order:
            times[drafts].append(variants[drafts].run(prompts[r % len(prompts)])[0])

    benchmark.pedantic(turn, rounds=len(prompts))
    read = max(before, roofline.ceilings(threads)["read"])
    # Counted once more by what has been learned, so with the drafts of the rounds. Counted steps are slow: no times.
    variants["auto"].engine.speculation.observe_times = lambda *_, **__: None
    counts["auto"] = count(variants["auto"], prompts, plain)
    kernel = runtime.kernel_of("grouped_gemm", "bf16" if model.dtype == torch.bfloat16 else "fp32")
    assert kernel is not None
    tokens = B * (answer - 1)
    for drafts in NUMBERS:
        bytes_, steps = counts[drafts]
        seconds, bound = statistics.median(times[drafts]), bytes_ / len(prompts) / read / 1e9
        others = {} if drafts == 0 else harness.median_ratios(times[drafts], {"no drafts": times[0]})
        per_step = len(prompts) * tokens / B / steps
        note = f"{per_step:.2f} tokens a step, bound {tokens / bound:.0f} tok/s"
        if drafts in right:
            note += f", {right[drafts]:.0%} of drafts right"
        record_row(
            harness.Row(
                name=f"{name}, batch {B}, drafts: {drafts}",
                machine=_native.cpu_model(),
                kernel=kernel["kernel"],
                threads=threads,
                rounds=len(prompts),
                seconds=seconds * B / tokens,
                rate=tokens / seconds,
                unit="tok/s",
                ceiling="byte bound",
                share=bound / seconds,
                ratio=others,
                note=note,
            )
        )


def count(variant: Variant, prompts: Prompts, plain: dict[tuple[int, ...], list[int]]) -> tuple[float, int]:
    """Bytes and steps of the answers, which are `plain`, by prompt; what is not yet there is added."""
    total, steps = 0.0, 0
    variant.plain = plain
    for group in prompts:
        with Bytes(variant.model) as counted:
            answers, n = counted_run(variant, group, counted)
        total, steps = total + counted.total, steps + n
        for ids, found in zip(group, answers, strict=True):
            assert plain.setdefault(tuple(ids), found) == found, f"{variant.drafts} drafts changed the text"
    return total, steps


def counted_run(variant: Variant, group: list[list[int]], counted: Bytes) -> tuple[list[list[int]], int]:
    """A run whose first step, the prompts', is not counted."""
    step = variant.engine.step

    def first() -> list[Request]:
        done = step()
        counted.total = 0.0
        variant.engine.step = step
        return done

    variant.engine.step = first
    _, answers, steps = variant.run(group)
    return answers, steps


@pytest.fixture(scope="module")
def large() -> Callable[[bool], Decoder]:
    made: dict[bool, Decoder] = {}

    def make(small: bool) -> Decoder:
        if small not in made:
            made[small] = random_model(GLM4, **(TINY if small else {}))
        return made[small]

    return make


@pytest.fixture(scope="module")
def demo(request: pytest.FixtureRequest) -> Path:
    given = request.config.getoption("--decode-model")
    if given is not None:
        return Path(given)
    out = harness.RESULTS.parent / "decode-demo"
    command = [sys.executable, "-m", "glmx.cli.main", "demo", "--tokens", "40960", "--out", str(out)]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return out / "run"


@pytest.mark.parametrize("batch", [1, 4])
def test_text(benchmark, record_row, request: pytest.FixtureRequest, batch: int) -> None:
    """The demo's model on held-out text, with its own drafts."""
    from glmx.data import corpus
    from glmx.data.tokenizer import Tokenizer
    from glmx.models.checkpoint import resolve

    if benchmark.disabled:
        pytest.skip("needs a trained model")
    run = request.getfixturevalue("demo")
    model, tokenizer = glmx.load(run), Tokenizer.from_dir(resolve(run))
    texts = [ids for d in corpus.load().heldout if len(ids := tokenizer.encode(d.text[:4000])) >= 2 * PROMPT]
    chosen = [ids[PROMPT : 2 * PROMPT] for ids in texts[: ROUNDS * batch]]
    name = f"demo {model.config.model_type}, held-out text"
    measure(benchmark, record_row, name, model, groups(chosen, batch), ANSWER, None)


@pytest.mark.parametrize("chance", [0.0, 0.5, 0.9])
@pytest.mark.parametrize("batch", [1, 4])
def test_synthetic_demo(benchmark, record_row, batch: int, chance: float, request: pytest.FixtureRequest) -> None:
    if benchmark.disabled:
        pytest.skip("needs a trained model")
    model = glmx.load(request.getfixturevalue("demo"))
    name = f"demo {model.config.model_type}, synthetic {chance:.0%} right"
    measure(benchmark, record_row, name, model, random_prompts(model, ROUNDS, batch), ANSWER, chance)


@pytest.mark.parametrize("chance", [0.0, 0.5, 0.9])
@pytest.mark.parametrize("batch", [1, 4])
def test_synthetic_large(benchmark, record_row, large, batch: int, chance: float) -> None:
    model = large(benchmark.disabled)
    rounds, answer = (1, 6) if benchmark.disabled else (ROUNDS, ANSWER)
    name = f"glm4_moe 240 M, synthetic {chance:.0%} right"
    measure(benchmark, record_row, name, model, random_prompts(model, rounds, batch), answer, chance)


def random_prompts(model: Decoder, rounds: int, batch: int) -> Prompts:
    draw = torch.Generator().manual_seed(0)
    ids = torch.randint(model.config.vocab_size, (rounds * batch, PROMPT), generator=draw)
    return groups(ids.tolist(), batch)


def groups(prompts: list[list[int]], batch: int) -> Prompts:
    return [prompts[i : i + batch] for i in range(0, len(prompts), batch)]
