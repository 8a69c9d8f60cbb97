"""Older CPUs than this one, emulated by qemu-x86_64: what the wheel's promise "any x86-64" rests on.

base    the C++ tests on a Nehalem (SSE4.2) and on an Opteron_G1 (SSE3): neither has AVX or FMA, so the C library
        computes std::fma. The bits of every op, denormals and overflows included, are those of this CPU's FMA unit.
Python  import, `glmx env`, ops, a model and greedy generation on a Haswell (AVX2, no AVX-512), with this CPU's bits.

qemu raises SIGILL for an instruction that the CPU it emulates lacks (tests/cpp/test_core.cpp checks that it does), so
nothing here can pass by using one.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys

import pytest

from glmx.models import checkpoint
from tests.build.tree import ROOT, output, unavailable
from tiny_glm import random_model, tiny_config

CPP = ROOT / "build/cpp-plain/tests/cpp"
# What every Haswell has and qemu does not emulate; it says so on each start, unless told to leave it out.
HASWELL = "Haswell,-pcid,-x2apic,-tsc-deadline,-hle,-invpcid,-rtm"
# The others take half a minute under emulation; the C++ digest and the model run them on the Haswell too.
STEMS = ["rms_norm", "add_rms_norm", "silu_mul", "rope", "embedding", "route_topk", "expert_plan", "moe_combine"]
STEMS += ["sum_squares", "adamw", "layer_norm", "cache_append"]


@pytest.fixture(scope="module", autouse=True)
def qemu() -> None:
    if not shutil.which("qemu-x86_64"):
        unavailable("qemu-x86_64 is missing: apt-get install qemu-user")


@pytest.fixture(scope="module")
def digest(tmp_path_factory):
    """(program, its file): the hashes of every op's outputs, computed by base on this CPU."""
    program, file = CPP / "ops/glmx_ops_digest", tmp_path_factory.mktemp("digest") / "digest.txt"
    if not program.exists():
        unavailable("the C++ tests are not built: python tests/run.py qemu")
    output(program, "write", file, "1", env=environment(GLMX_ISA="base"))
    assert len(file.read_text().splitlines()) > 600
    return program, file


def environment(**variables: str) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith("GLMX_")}
    return {**kept, "OMP_NUM_THREADS": "1", **variables}


def emulate(cpu: str, *command: object, **variables: str) -> subprocess.CompletedProcess[str]:
    words = ["qemu-x86_64", "-cpu", cpu, *map(str, command)]
    return subprocess.run(words, env=environment(**variables), capture_output=True, text=True, cwd=ROOT)


@pytest.mark.parametrize("cpu", ["Nehalem", "Opteron_G1"])
def test_base_gives_the_same_bits_without_avx_and_fma(cpu, digest):
    done = emulate(cpu, digest[0], "compare", digest[1], 3, "software_fma")
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("cpu", ["Nehalem", "Opteron_G1"])
def test_the_core_passes_its_tests_without_avx(cpu, digest):
    done = emulate(cpu, CPP / "glmx_cpp_tests")
    assert done.returncode == 0 and " 0 failed, 4 skipped" in done.stdout, done.stdout
    for line in done.stdout.splitlines()[:4]:  # so that avx2_faults_on_a_base_cpu ran
        assert "equals_base: this CPU has no avx" in line, line


def test_what_the_cpu_lacks_cannot_be_pinned(digest):
    done = emulate("Nehalem", digest[0], "compare", digest[1], 1, GLMX_ISA="avx2")
    assert done.returncode == 77 and "GLMX_ISA=avx2: this CPU has no avx2; its best is base" in done.stderr


def test_avx2_gives_the_same_bits_on_a_haswell(digest):
    done = emulate(HASWELL, digest[0], "compare", digest[1], 3, "unguarded", GLMX_ISA="avx2")
    assert done.returncode == 0, done.stderr


def test_the_python_stack_on_a_haswell(tmp_path):
    """The ops have their golden bits; logits, greedy tokens and log-probs have the bits of this CPU under avx2."""
    model = random_model(tiny_config(use_qk_norm=True, attention_bias=True), 1)
    folder = checkpoint.save(model, tmp_path / "model")
    paths = os.pathsep.join(str(ROOT / name) for name in ("python", ".", "tests"))
    command = [sys.executable, "-m", "tests.qemu_worker", folder, *STEMS]
    done = emulate(HASWELL, *command, PYTHONPATH=paths)
    assert done.returncode == 0, done.stderr[-4000:]
    there = json.loads(done.stdout)
    golden = json.loads((ROOT / "tests/ops/golden.json").read_text())
    assert there["golden"] == {stem: golden[stem] for stem in STEMS}
    assert there["isa"] == "avx2" and "Haswell" in there["cpu"]
    assert {row["kernel"] for row in there["kernels"]} == {"avx2", "base"}

    env = environment(PYTHONPATH=paths, GLMX_ISA="avx2")
    here = json.loads(output(*command, env=env, cwd=ROOT))
    for name in ("kernels", "golden", "logits", "tokens", "logprob"):
        assert there[name] == here[name], name
