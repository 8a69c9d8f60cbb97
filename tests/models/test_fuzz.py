"""10,000 random configs and safetensors headers, and some tokenizers: each loads or is refused in one line.

Never a traceback, a crash, a hang, or 200 MB more than the idle process has; fuzz_load.py says how that is watched.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = {"configs": 4500, "headers": 4000, "both": 1500, "tokenizers": 300}
LIMIT_MB = 200


@pytest.mark.slow
def test_random_checkpoints_load_or_are_refused(tmp_path):
    here = Path(__file__).resolve()
    path = os.pathsep.join([str(here.parents[2] / "python"), str(here.parents[1])])
    command = [sys.executable, here.with_name("fuzz_load.py"), tmp_path, *map(str, EXAMPLES.values())]
    done = subprocess.run(command, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True)
    assert done.returncode == 0, f"ended with {done.returncode}\n{done.stdout}\n{done.stderr[-8000:]}"
    report = json.loads(done.stdout)
    print(report)
    assert report["loaded"] + report["refused"] >= sum(EXAMPLES.values())
    assert report["above_idle_mb"] < LIMIT_MB
    # The examples reach deep: many are valid up to their tensors, and those refused fail in many ways.
    assert report["loaded"] > 500 and report["kinds"] > 60
