"""What a process of its own finds of a checkpoint that is used in place: times, bytes, memory (bench_capacity.py)."""

from __future__ import annotations

import ctypes
import mmap
import os
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from e2e import bench_decode
from e2e.bench_decode import PROMPT, Variant, count
from e2e.random_models import Bytes
from harness import timed

from glmx.models.checkpoint import load

Kind = tuple[int, float | None]  # drafts, and their chance to be right by a coin; None: as they come


def cached(directory: Path) -> float:
    """The share of a checkpoint's bytes that the page cache holds."""
    held = pages = 0
    for file in directory.glob("*.safetensors"):
        with open(file, "rb") as opened, mmap.mmap(opened.fileno(), 0, mmap.MAP_PRIVATE) as mapping:
            number = -(-len(mapping) // mmap.PAGESIZE)
            place, there = (ctypes.c_char * 0).from_buffer(mapping), (ctypes.c_ubyte * number)()
            found = ctypes.CDLL(None).mincore(ctypes.byref(place), ctypes.c_size_t(len(mapping)), there)
            assert found == 0, "mincore fails"
            held, pages = held + sum(byte & 1 for byte in bytes(there)), pages + number
            del place  # else the mapping does not close
    return held / max(pages, 1)


def fetch(directory: Path) -> None:
    """Reads the files into the page cache."""
    piece = bytearray(2**24)
    for file in sorted(directory.glob("*.safetensors")):
        with open(file, "rb", buffering=0) as opened:
            while opened.readinto(piece):
                pass


def evict(directory: Path) -> None:
    """Has the page cache drop the files, which no process may have mapped."""
    for file in directory.glob("*.safetensors"):
        with open(file, "rb") as opened:
            os.fsync(opened.fileno())  # only what is written can be dropped
            os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def memory() -> dict[str, int]:
    """Bytes: the most that was resident at a time; anonymous memory and files' now."""
    lines = [line.split() for line in Path("/proc/self/status").read_text().splitlines()]
    return {line[0][:-1]: int(line[1]) * 1024 for line in lines if line[0] in ("VmHWM:", "RssAnon:", "RssFile:")}


@torch.no_grad()
def loaded(directory: Path, threads: int, in_cache: bool) -> dict[str, Any]:
    """Seconds of the load and of the first token behind it, with the files in the page cache or on disk alone."""
    return _begun(directory, threads, in_cache)[0]


@torch.no_grad()
def decoded(
    directory: Path, threads: int, kinds: Sequence[Kind], rounds: int, answer: int
) -> tuple[str, list[dict[str, Any]]]:
    """The model's name, and of each of `kinds` seconds and bytes of a round of answer - 1 tokens.

    The first kind makes no drafts; without an MTP layer the others are left out.
    """
    about, model, prompt, plain = _begun(directory, threads, True)
    kinds = kinds if about["drafts"] else kinds[:1]
    variants = [Variant(model, 1, drafts, answer, chance) for drafts, chance in kinds]
    out: list[dict[str, Any]] = []
    answers: dict[tuple[int, ...], list[int]] = {}
    for (drafts, _), variant in zip(kinds, variants, strict=True):
        touched, steps = count(variant, [[prompt]], answers)
        variant.run([prompt])  # records its steps, which was refused while they were counted
        out.append({"bytes": touched, "steps": steps, **memory()})
        policy = variant.engine.speculation
        if policy is not None and drafts:
            out[-1]["right"] = policy.counters.num_accepted_tokens / max(policy.counters.num_draft_tokens, 1)
    assert answers[tuple(prompt)][0] == plain, "another first token than before"
    times: list[list[float]] = [[] for _ in kinds]
    for r in range(rounds):
        for i in range(len(kinds)):
            at = (r + i) % len(kinds)
            times[at].append(variants[at].run([prompt])[0])
    for found, seconds in zip(out, times, strict=True):
        found["seconds"] = statistics.median(seconds)
        found["ratio"] = statistics.median(none / own for none, own in zip(times[0], seconds, strict=True))
    return about["name"], out


def _begun(directory: Path, threads: int, in_cache: bool) -> tuple[dict[str, Any], Any, list[int], int]:
    torch.set_num_threads(threads)
    bench_decode.now = time.perf_counter  # waits for a file count
    torch.zeros(64, 64).square()  # torch's own start-up
    (fetch if in_cache else evict)(directory)
    out: dict[str, Any] = {"cached": cached(directory)}
    begun = time.perf_counter()
    model = load(directory, mapped=True)
    out["load"] = time.perf_counter() - begun
    variant = Variant(model, 1, 0, 1, None)
    draw = torch.Generator().manual_seed(0)
    prompt = torch.randint(model.config.vocab_size, (PROMPT,), generator=draw).tolist()
    answers: list[list[int]] = []
    out["first"] = timed(lambda: answers.extend(variant.run([prompt])[1]))
    formats = sorted({weight.format for weight in model.stored_weights().values()} - {"bf16"})
    config = model.config
    out |= {
        "name": f"{config.model_type} {config.num_parameters() / 1e9:.3g} B in {' and '.join(formats) or 'bf16'}",
        "drafts": config.num_nextn_predict_layers > 0,
        "size": sum(file.stat().st_size for file in directory.glob("*.safetensors")),
        **memory(),
    }
    with Bytes(model) as counted:
        variant.run([prompt])
    return {**out, "bytes": counted.total}, model, prompt, answers[0][0]
