"""X5 of the models: every instruction set that this machine has gives the same logits, bit for bit."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
from tests.build.tree import ROOT, unavailable

from glmx import _native

SCRIPT = """
import hashlib, torch
from tiny_glm import CASES, FAMILIES, random_ids, random_model, tiny_config
for case in FAMILIES:
    for dtype in (torch.float32, torch.bfloat16):
        model = random_model(tiny_config(**CASES[case]), 1, dtype)
        with torch.no_grad():
            out = model(random_ids(model.config, 2, 80), mtp=True)
        print(hashlib.sha256(torch.cat([out.logits, out.mtp_logits]).numpy().tobytes()).hexdigest())
"""


# The core whose AMX tiles are software, of the C++ tests (tests/cpp/ops/CMakeLists.txt).
TWIN = ROOT / "build/cpp-plain/tests/cpp/ops/twin"


def digest(isa, **variables):
    env = {**os.environ, "GLMX_ISA": isa, **variables}
    env["PYTHONPATH"] = os.pathsep.join([str(ROOT / "tests"), *sys.path])
    done = subprocess.run([sys.executable, "-c", SCRIPT], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert len(set(done.stdout.split())) == 6
    return done.stdout


@pytest.fixture(scope="module")
def base():
    return digest("base")


def test_logits_on_software_tiles_equal_bases(base):
    """All of the model's AMX kernels, on a CPU without AMX."""
    if "avx512" not in _native.supported_isas():
        pytest.skip("this machine has no avx512")
    if not TWIN.exists():
        unavailable("the C++ tests are not built: python tests/run.py cpp")
    assert digest("amx", LD_LIBRARY_PATH=str(TWIN)) == base


@pytest.mark.parametrize("isa", ["avx2", "avx512", "avx512_bf16", "amx"])
def test_logits_equal_bases(isa, base):
    if isa not in _native.supported_isas():
        pytest.skip(f"this machine has no {isa}")
    assert digest(isa) == base
