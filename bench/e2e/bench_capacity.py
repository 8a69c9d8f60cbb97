"""A checkpoint as large as the machine's memory allows: load, first token, decoding with and without drafts, memory.

    glmx make-random examples/configs/glm-4.7-flash --to int4 --out DIR            (16 GB)
    pytest bench/e2e/bench_capacity.py --capacity-model DIR            (OMP_NUM_THREADS sets the threads)

The files are used in place (glmx.load, mapped). Each measurement has a process of its own (e2e/capacity.py). "Load and
first token" is glmx.load and the forward of a prompt of 96 random tokens, once with the files in the page cache and
once after the system was asked to drop them; the row says how much of them was there. Decoding is one sequence, greedy,
behind that prompt. Of random weights hardly any draft is right; in rows marked "by a coin" a given share is, as in
bench_decode.py. They take turns with
decoding without drafts.
A row's rate is that of the bytes which its forwards must read (random_models.Bytes). Memory is the process's, Python
and torch included: the most that was resident at a time, and then of which kind; what is of files the system may drop.
"""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import harness
import pytest
import torch
from e2e import capacity
from e2e.random_models import GLM5, TINY, random_model
from e2e.stored_models import write

from glmx import _native, runtime

KINDS: list[capacity.Kind] = [(0, None), (1, None), (1, 0.8), (2, 0.8)]
ROUNDS, ANSWER = 3, 32
GB = 1e9


@pytest.fixture(scope="module")
def directory(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    given = request.config.getoption("--capacity-model")
    if given is not None:
        return given
    if not request.config.getoption("--benchmark-disable"):
        pytest.skip("needs --capacity-model DIR")
    out = tmp_path_factory.mktemp("capacity") / "model"
    write(random_model({**GLM5, "model_type": "glm4_moe_lite"}, **TINY, num_nextn_predict_layers=1), out, "int4")
    return out


def alone(call: Callable[..., Any], *args: Any) -> Any:
    """The result of a function of capacity.py, in a process that ends with it."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as processes:
        return processes.submit(call, *args).result()


def ceiling() -> float:
    import roofline

    return roofline.ceilings(torch.get_num_threads())["read"]


def row(name: str, seconds: float, found: dict[str, Any], read: float, rounds: int, note: str) -> harness.Row:
    """`seconds` that it took to read found["bytes"]; `read` is the ceiling."""
    kernel = runtime.kernel_of("grouped_gemm", "bf16")
    assert kernel is not None
    rate = found["bytes"] / seconds / GB
    kinds = f"{found['RssAnon'] / GB:.2f} GB its own, {found['RssFile'] / GB:.2f} GB of files"
    return harness.Row(
        name=name,
        machine=_native.cpu_model(),
        kernel=kernel["kernel"],
        threads=torch.get_num_threads(),
        rounds=rounds,
        seconds=seconds,
        rate=rate,
        unit="GB/s",
        ceiling="read",
        share=rate / read,
        ratio={},
        note=f"{note}; peak {found['VmHWM'] / GB:.2f} GB, then {kinds}",
    )


@pytest.mark.parametrize("in_cache", [True, False], ids=["cached", "on-disk"])
def test_load(benchmark, record_row, directory: Path, in_cache: bool) -> None:
    before = 0.0 if benchmark.disabled else ceiling()
    found = benchmark.pedantic(lambda: alone(capacity.loaded, directory, torch.get_num_threads(), in_cache), rounds=1)
    assert found["first"] > 0
    if benchmark.disabled:
        return
    where = "page cache" if in_cache else "disk"
    note = (
        f"load {found['load']:.2f} s, first token {found['first']:.2f} s; files of {found['size'] / GB:.1f} GB, "
        f"{found['cached']:.0%} in the page cache"
    )
    seconds, read = found["load"] + found["first"], max(before, ceiling())
    record_row(row(f"{found['name']}, load and first token, from {where}", seconds, found, read, 1, note))


def test_decode(benchmark, record_row, directory: Path) -> None:
    threads, rounds, answer = torch.get_num_threads(), ROUNDS, ANSWER
    if benchmark.disabled:
        rounds, answer = 1, 6
    before = 0.0 if benchmark.disabled else ceiling()
    name, found = benchmark.pedantic(
        lambda: alone(capacity.decoded, directory, threads, KINDS, rounds, answer), rounds=1
    )
    assert all(one["seconds"] > 0 for one in found)
    if benchmark.disabled:
        return
    read = max(before, ceiling())
    for (drafts, chance), one in zip(KINDS, found, strict=False):
        tokens = answer - 1
        note = f"{tokens / one['seconds']:.1f} tok/s, {one['bytes'] / tokens / GB:.2f} GB a token"
        if "right" in one:
            note += f", {tokens / one['steps']:.2f} tokens a step, {one['right']:.0%} of drafts right"
        coin = "" if chance is None else f", {chance:.0%} right by a coin"
        made = row(f"{name}, decode, drafts: {drafts}{coin}", one["seconds"], one, read, rounds, note)
        made.seconds /= tokens
        made.ratio = {"no drafts": one["ratio"]} if drafts else {}
        record_row(made)
