"""X5 of the models: every instruction set that this machine has gives the same logits, bit for bit."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

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


def digest(isa):
    env = {**os.environ, "GLMX_ISA": isa}
    env["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parents[1]), *sys.path])
    done = subprocess.run([sys.executable, "-c", SCRIPT], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert len(set(done.stdout.split())) == 6
    return done.stdout


@pytest.fixture(scope="module")
def base():
    return digest("base")


@pytest.mark.parametrize("isa", ["avx2", "avx512", "amx"])
def test_logits_equal_bases(isa, base):
    if isa not in _native.supported_isas():
        pytest.skip(f"this machine has no {isa}")
    assert digest(isa) == base
