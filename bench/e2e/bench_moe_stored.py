"""The routed experts of a MoE layer in int8, int4 and FP8, against glmx's bf16 and kt-kernel's in as many bits.

    pytest bench/e2e/bench_moe_stored.py            (OMP_NUM_THREADS sets the threads)

The layers of bench/moe_layers.py, their bf16 weights rounded to nearest (bench/stored.py); a call is moe_mlp from given
router results. Bytes are those of the values and scales of the experts that are hit; a row that arithmetic bounds says
at which rate they move, too. Before anything is timed each output is as near to bf16's as its format lets it be.
Peers: "glmx bf16" is the same op over the bf16 weights. "kt-kernel" has the same format (bench/moe_kt.py): its own int8
by rows, and glmx's values and scales in int4, fp8 and fp8_blocks; "kt-kernel int4 by rows" is what it makes itself of
4 bits, with one scale for a row and so with a larger error. It rounds activations to 8 bits in int8 and int4, glmx's
stay bf16. Where it is installed; 0.7.2 has all of these for AVX-512. "wide" takes some 9 GB while kt-kernel packs it.
"""

from __future__ import annotations

import dataclasses

import harness
import moe_kt
import moe_layers
import pytest
import stored
import torch

import glmx.ops

ROUNDS = {1: 15, 16: 9, 256: 5}


@pytest.fixture(scope="module")
def layers() -> harness.OneAtATime:
    """layers(shape): the bf16 layer."""
    return harness.OneAtATime(moe_layers.make)


@pytest.fixture(scope="module")
def small(layers) -> harness.OneAtATime:
    """small(shape, format): gate_up and down."""

    def make(shape: str, format: str) -> tuple:
        gate_up, down = moe_layers.stacks(layers(shape))
        return stored.stored(format, gate_up, parts=2), stored.stored(format, down)

    return harness.OneAtATime(make)


@pytest.fixture(scope="module")
def kt():
    """kt(shape, format): kt-kernel's layers in that format, by the names of the peers."""

    def start(shape: str, format: str, threads: int) -> dict[str, moe_kt.KtKernel]:
        started = {"kt-kernel": moe_kt.start(shape, format)}
        if format == "int4":
            started["kt-kernel int4 by rows"] = moe_kt.start(shape, "int4 by rows")
        return {name: peer for name, peer in started.items() if peer is not None}

    running = harness.OneAtATime(start, lambda peers: [peer.close() for peer in peers.values()])
    yield lambda shape, format: running(shape, format, torch.get_num_threads())
    running.close()


@torch.no_grad()
@pytest.mark.parametrize(
    ("shape", "format", "tokens"),
    [
        (shape, format, tokens)
        for shape in ("small", "wide", "GLM-4.7-Flash")
        for format in stored.FORMATS
        for tokens in ROUNDS
    ],
)
def test_forward(benchmark, record_row, layers, small, kt, shape: str, format: str, tokens: int) -> None:
    rounds = ROUNDS[tokens]
    if benchmark.disabled:
        shape, tokens = "tiny, whole groups" if shape == "small" else "tiny", min(tokens, 32)
    layer, (gate_up, down), twins = layers(shape), small(shape, format), kt(shape, format)
    x, weights, ids = moe_layers.routed(layer, moe_layers.tokens_of(shape, tokens))

    def ours() -> torch.Tensor:
        return glmx.ops.moe_mlp(x, weights, ids, gate_up, down)

    def bf16() -> torch.Tensor:
        return layer.ours(x, weights, ids)

    expected = bf16()
    moe_layers.check(format, expected, ours(), stored.LOST[format])
    for name, twin in twins.items():
        moe_layers.check(name, expected, twin.output(len(x), layer.H), stored.LOST[format])
    if benchmark.disabled:
        return
    flop, _ = moe_layers.work(layer, ids)
    hit = len(ids.unique())
    touched = stored.moved(gate_up, hit) + stored.moved(down, hit)

    def record(row: harness.Row) -> None:
        note = f"{touched / row.seconds / 1e9:.1f} GB/s" if row.unit != "GB/s" else ""
        record_row(dataclasses.replace(row, note=note))

    harness.compare(
        benchmark,
        record,
        f"MoE forward, {format}, {moe_layers.title(shape, tokens)}",
        "moe_mlp",
        ours,
        {"glmx bf16": bf16, **{name: twin.run for name, twin in twins.items()}},
        flop=flop,
        touched=touched,
        rounds=rounds,
        rest=dict.fromkeys(twins, moe_kt.REST),
    )
