"""The routed experts of a MoE layer with one instruction set for everybody: AVX2, then AVX-512 without its bf16 part.

    pytest bench/e2e/bench_moe_pinned.py            (OMP_NUM_THREADS sets the threads)

"small" of bench/moe_layers.py, each instruction set in a process of its own: GLMX_ISA pins glmx, ONEDNN_MAX_CPU_ISA and
ATEN_CPU_CAPABILITY torch, KT_KERNEL_CPU_VARIANT kt-kernel. Of torch's ways the one that is fastest in a trial is the
peer, and named: grouped_mm in bf16 or in fp32, or oneDNN's packed weights in bf16 or in fp32, expert by expert. Under
AVX2 oneDNN refuses bf16, grouped_mm in bf16 runs ATen's own loops, and packed fp32 oneDNN's `brg_matmul:avx2`; under
AVX-512 bf16 is oneDNN's `gemm:jit:bf16`, and packed fp32 its `brg_matmul:avx512_core`. fp32 grouped_mm is MKL, which
MKL_ENABLE_INSTRUCTIONS pins on Intel's CPUs and which takes an AMD CPU for an unknown one. The fp32 weights are made
beforehand: twice the bytes to read.
"""

from __future__ import annotations

import dataclasses
import json
import os
import pathlib
import re
import subprocess
import sys
from types import SimpleNamespace

import harness
import moe_kt
import moe_layers
import pytest
import torch

from glmx import _native

PINS = {
    "avx2": {
        "ONEDNN_MAX_CPU_ISA": "AVX2",
        "MKL_ENABLE_INSTRUCTIONS": "AVX2",
        "ATEN_CPU_CAPABILITY": "avx2",
        "KT_KERNEL_CPU_VARIANT": "avx2",
    },
    "avx512": {
        "ONEDNN_MAX_CPU_ISA": "AVX512_CORE",
        "MKL_ENABLE_INSTRUCTIONS": "AVX512",
        "ATEN_CPU_CAPABILITY": "avx512",
        "KT_KERNEL_CPU_VARIANT": "avx512_base",
    },
}
BEYOND = {
    "avx2": "avx512|avx10|amx",
    "avx512": "avx512_core_bf16|avx512_core_fp16|avx10|amx",
}  # oneDNN's kernels' names
CASES = {1: 9, 16: 5, 256: 3}  # tokens: rounds


class Stopwatch:
    """What harness.compare asks of pytest-benchmark's fixture."""

    def __init__(self) -> None:
        self.extra_info: dict[str, object] = {}

    def pedantic(self, call, setup, rounds: int, warmup_rounds: int) -> None:
        data = []
        for _ in range(warmup_rounds + rounds):
            setup()
            data.append(harness.timed(call))
        self.stats = SimpleNamespace(stats=SimpleNamespace(data=data[warmup_rounds:]))


def torch_layers(layer: SimpleNamespace) -> dict[str, moe_layers.Layer]:
    """torch's ways to run the layer, those that it does not refuse."""
    layers: dict[str, moe_layers.Layer] = {}
    for word, dtype in (("bf16", torch.bfloat16), ("fp32", torch.float32)):
        stacks = moe_layers.stacks(layer, dtype)
        layers[f"torch {word} grouped_mm"] = moe_layers.grouped(*stacks)
        try:
            layers[f"torch {word} packed"] = moe_layers.packed(*stacks)
        except RuntimeError as refused:
            assert "bf16 path needs the cpu support" in str(refused), refused
    return layers


@torch.no_grad()
def run(isa: str, shape: str, out: pathlib.Path, timed: bool) -> None:
    """The process: checks every peer, and writes a row for each of CASES."""
    assert _native.active_isa() == isa and torch.backends.cpu.get_cpu_capability() == isa.upper()
    layer, twin, rows = moe_layers.make(shape), moe_kt.start(shape), []
    layers = torch_layers(layer)
    for tokens, rounds in CASES.items():
        x, weights, ids = given = moe_layers.routed(layer, tokens)
        calls = {name: lambda call=call, given=given: call(*given) for name, call in layers.items()}
        ours = lambda given=given: layer.ours(*given)
        expected = ours()
        for name, call in calls.items():
            moe_layers.check(name, expected, call())
        if twin:
            moe_layers.check("kt-kernel", expected, twin.output(tokens, layer.H))
        if not timed:
            continue
        fastest = min(calls, key=lambda name: harness.timed(calls[name]))
        peers = {fastest: calls[fastest], **({"kt-kernel": twin.run} if twin else {})}
        flop, touched = moe_layers.work(layer, ids)
        harness.compare(
            Stopwatch(),
            rows.append,
            f"MoE forward, {moe_layers.title(shape, tokens)}, pinned",
            "grouped_gemm",
            ours,
            peers,
            flop=flop,
            touched=touched,
            rounds=rounds,
            rest={"kt-kernel": moe_kt.REST},
        )
    out.write_text(json.dumps([dataclasses.asdict(row) for row in rows]))
    if twin:
        twin.close()


@pytest.mark.parametrize("isa", PINS)
def test_pinned(benchmark, record_row, tmp_path, isa: str) -> None:
    if isa not in _native.supported_isas():
        pytest.skip(f"this CPU has no {isa}")
    shape, out = "tiny" if benchmark.disabled else "small", tmp_path / "rows.json"
    variables = {
        "GLMX_ISA": isa,
        "OMP_NUM_THREADS": str(torch.get_num_threads()),
        "PYTHONPATH": os.pathsep.join(sys.path),
    }
    if benchmark.disabled:
        variables["ONEDNN_VERBOSE"] = "1"

    def child() -> str:
        command = [sys.executable, __file__, isa, shape, str(out)]
        done = subprocess.run(command, env={**os.environ, **PINS[isa], **variables}, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout

    printed = benchmark.pedantic(child, rounds=1)
    if benchmark.disabled:
        used = set(re.findall(r"primitive,exec,cpu,\w+,([^,]+),", printed))
        assert used and not [name for name in used if re.search(BEYOND[isa], name)], used
    for row in json.loads(out.read_text()):
        record_row(harness.Row(**row))


if __name__ == "__main__":
    run(sys.argv[1], sys.argv[2], pathlib.Path(sys.argv[3]), timed=sys.argv[2] != "tiny")
