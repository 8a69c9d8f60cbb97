"""Which kernel each op runs under each GLMX_ISA pin: the list is written down, and the table must equal it.

An op without a kernel for a pin names the one it runs. bf16 products have a kernel for nearly every pin; fp32 ones have
no instruction for tiles or pairs, so under those pins they name avx512.
"""

from __future__ import annotations

import json
import os
import sys

import pytest
from tests.build.tree import ISAS, PACKAGE, output, stems

VECTOR = ("base", "avx2", "avx512", "avx512", "avx512")  # under base, avx2, avx512, avx512_bf16, amx
TILES = ("base", "avx2", "avx512", "avx512_bf16", "amx")
PAIRS = ("base", "avx2", "avx512", "avx512_bf16", "avx512")
EXPECTED = {
    "route_topk": VECTOR,
    "expert_plan": ("base", "base", "base", "base", "base"),
    "grouped_gemm bf16": TILES,
    "grouped_gemm fp32": VECTOR,
    "head_gemm bf16": TILES,
    "head_gemm fp32": VECTOR,
    "moe_combine": VECTOR,
    "moe_mlp bf16": TILES,
    "moe_mlp fp32": VECTOR,
    "attention bf16": TILES,
    "attention fp32": VECTOR,
    "indexer_topk bf16": TILES,
    "indexer_topk fp32": VECTOR,
    "sparse_mla bf16": TILES,
    "sparse_mla fp32": VECTOR,
    "indexer_kl bf16": PAIRS,
    "indexer_kl fp32": VECTOR,
    "sample": VECTOR,
    "mtp_verify": VECTOR,
    "rms_norm": VECTOR,
    "add_rms_norm": VECTOR,
    "layer_norm": VECTOR,
    "silu_mul": VECTOR,
    "rope": VECTOR,
    "embedding": VECTOR,
    "cache_append": ("base", "base", "base", "base", "base"),
    "lm_head_logprob": VECTOR,
    "sum_squares": VECTOR,
    "adamw": VECTOR,
}
# The ops of csrc/gpu/kernels.h: the others run on the CPU alone.
ON_GPU = {
    "route_topk",
    "expert_plan",
    "grouped_gemm",
    "moe_combine",
    "rms_norm",
    "add_rms_norm",
    "layer_norm",
    "silu_mul",
    "rope",
    "embedding",
    "lm_head_logprob",
}


@pytest.mark.parametrize("level", ISAS)
def test_table_of_a_level(level):
    """The static table can be asked about every level, also those that this machine lacks."""
    from glmx import _native

    got = {f"{row['op']} {row['variant']}".strip(): row["kernel"] for row in _native.kernel_table(level)}
    assert got == {name: kernels[ISAS.index(level)] for name, kernels in EXPECTED.items()}


def test_column_of_the_gpu():
    """Which kernel serves a GPU, where this build has a backend for one; without a card the portable one is named."""
    from glmx import _native

    got = {f"{row['op']} {row['variant']}".strip(): row["gpu"] for row in _native.kernel_table()}
    if _native.backends() == ["cpu"]:
        assert set(got.values()) == {"none"}
        return
    hopper = any(card["architecture"] == 90 for card in _native.gpu_devices()[:1])
    own = {"grouped_gemm bf16": "sm90"} if hopper else {}
    expected = {name: "gpu" if name.split()[0] in ON_GPU else "none" for name in EXPECTED}
    assert got == {**expected, "moe_mlp bf16": "composed", "moe_mlp fp32": "composed", **own}


def test_every_op_is_listed():
    assert list(dict.fromkeys(name.split()[0] for name in EXPECTED)) == stems()


def in_process(level: str) -> str:
    code = "import json; from glmx import _native as n; print(json.dumps([n.active_isa(), n.kernel_table()]))"
    env = {**os.environ, "GLMX_ISA": level, "PYTHONPATH": str(PACKAGE.parent)}
    return output(sys.executable, "-c", code, env=env)


@pytest.mark.parametrize("level", ISAS)
def test_pin_is_in_force(level):
    """GLMX_ISA in the environment of a fresh process gives the same table."""
    from glmx import _native

    if level not in _native.supported_isas():
        pytest.skip(f"this machine has no {level}")
    active, table = json.loads(in_process(level))
    assert active == level and table == _native.kernel_table(level)


def test_unknown_pin_is_refused_by_name():
    with pytest.raises(AssertionError, match="GLMX_ISA=sse9: expected one of base, avx2, avx512, avx512_bf16, amx"):
        in_process("sse9")
