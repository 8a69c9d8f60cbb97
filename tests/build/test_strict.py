"""A missing module is a named skip, and a failure under GLMX_STRICT=1: whether a whole file needs it or one test."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys

import pytest
from tests.build.tree import ROOT

WHOLE = "import pytest\npytest.importorskip('no_such_module')\ndef test_never(): pass\n"
ONE = """
import pytest
def test_one(): pytest.importorskip("no_such_module")
def test_other(): pytest.skip("no AVX-512")
"""


@pytest.mark.parametrize("strict", ["0", "1"])
def test_a_missing_module(tmp_path, strict):
    shutil.copy(ROOT / "tests/conftest.py", tmp_path)
    (tmp_path / "test_whole.py").write_text(WHOLE)
    (tmp_path / "test_one.py").write_text(ONE)
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "--continue-on-collection-errors", "-rs"]
    command += ["-p", "no:benchmark", "-p", "no:hypothesispytest"]  # half of the start-up time
    env = {**os.environ, "GLMX_STRICT": strict, "PYTEST_ADDOPTS": ""}
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
    if strict == "0":
        assert "3 skipped" in done.stdout and "could not import 'no_such_module'" in done.stdout, done.stdout
    else:
        assert "1 failed, 1 skipped, 1 error" in done.stdout and done.returncode == 1, done.stdout
        assert done.stdout.count("GLMX_STRICT=1: ") == 2, done.stdout
