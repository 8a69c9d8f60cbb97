"""A whole model of random weights in int8, int4 and FP8: decoding and prompts, beside glmx's bf16 and llama.cpp.

    pytest bench/e2e/bench_model_stored.py            (OMP_NUM_THREADS sets the threads; with 4 GB of memory)

The glm4_moe of bench_model.py, whose docstring says what a round is. Its projections are rounded to nearest
(bench/stored.py; one scale for a row in int8 and fp8, for 128 columns in int4) and written as a checkpoint, which is
used in place. Embeddings, head, routers and norms stay bf16, as published checkpoints have them.
Peers: "glmx bf16" is the model before; llama.cpp's q8_0 (for int8) and q4_0 (for int4) are what its own
llama_model_quantize makes of it by default, embeddings and head included, and "head bf16" the same without these two,
as glmx's checkpoint is: of such a small model the head is half of what a token reads. Both have one scale for 32
columns. A row says which matrices are of another type.
Before anything is timed the logits of each are as near to bf16's as its format lets them be, for most of the positions.
"""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from e2e import llama_cpp
from e2e.bench_model import CHECKED, KEPT, SHORT, Ours, decode, name_of, of_shape, prefill, prompt
from e2e.stored_models import in_format

FORMATS = {"int8": "q8_0", "int4": "q4_0", "fp8": None}  # with llama.cpp's of as many bits
# What rounding costs the logits, by norms, and by how many of their deviations the best token may be another; at most.
LOST = {"int8": 0.06, "int4": 0.6, "fp8": 0.2}
WITHIN = {"int8": 1.0, "int4": 2.0, "fp8": 1.0}


@pytest.fixture(scope="session")  # one for all numbers of threads
def world() -> Callable[[str, bool], SimpleNamespace]:
    """world(format, small): a model in a format, `peers` as in bench_model.py, `note`; compared once."""
    made: dict[tuple[str, bool], SimpleNamespace] = {}
    exact: dict[bool, Any] = {}

    def make(format: str, small: bool) -> SimpleNamespace:
        if small not in exact:
            exact[small] = of_shape("glm4_moe", small)
        if (format, small) not in made:
            made[format, small] = compared(exact[small], format)
        return made[format, small]

    return make


@torch.no_grad()
def compared(exact: Any, format: str) -> SimpleNamespace:
    model, kind = in_format(exact, format), FORMATS[format]
    peers: dict[str, Callable[..., Any]] = {"glmx bf16": lambda max_tokens, *_: Ours(exact, max_tokens)}
    ids, note = prompt(exact, CHECKED), "embeddings, head and routers bf16"
    found = {format: model(torch.tensor([ids]), logits_to_keep=KEPT).logits[0]}
    if kind is not None and llama_cpp.installed():
        for name, head in ((f"llama.cpp {kind}", kind), (f"llama.cpp {kind}, head bf16", "bf16")):
            weights = llama_cpp.Weights(exact, kind, head)
            peers[name] = lambda *args, weights=weights: llama_cpp.LlamaCpp(weights, *args)
            found[name] = llama_cpp.LlamaCpp(weights, CHECKED).logits(ids, KEPT)
            if head == kind:
                note += f"; llama.cpp {kind} but {weights.exceptions}"
    expected = exact(torch.tensor([ids]), logits_to_keep=KEPT).logits[0]
    for name, logits in found.items():
        error = ((logits - expected).norm(dim=-1) / expected.norm(dim=-1)).median()
        assert error < LOST[format], f"{name}: {error:.2e} away from bf16"
    return SimpleNamespace(model=model, peers=peers, note=note)


@torch.no_grad()
@pytest.mark.parametrize("format", FORMATS)
def test_decode(benchmark, record_row, world, format: str) -> None:
    w = world(format, benchmark.disabled)
    name = f"{name_of(w.model)} in {format}"
    decode(benchmark, record_row, w, name, SHORT, 16, 7, within=WITHIN[format])


@torch.no_grad()
@pytest.mark.parametrize(("tokens", "rounds"), [(256, 5), (2048, 3)])
@pytest.mark.parametrize("format", FORMATS)
def test_prefill(benchmark, record_row, world, format: str, tokens: int, rounds: int) -> None:
    w = world(format, benchmark.disabled)
    prefill(benchmark, record_row, w, f"{name_of(w.model)} in {format}", tokens, rounds, within=WITHIN[format])
