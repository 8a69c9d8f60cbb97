"""The CUDA backend of a build: asked for, left out or found by itself; what the core then links and shows."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
from tests.build.tree import PACKAGE, ROOT, output

from glmx import _native

HAS_CUDA = "cuda" in _native.backends()


def configure(tmp_path, *options: str, **environment: str) -> tuple[int, str]:
    """Exit status and all words of a configuration of the core alone."""
    command = ["cmake", "-S", str(ROOT), "-B", str(tmp_path / "build"), "-DGLMX_PYTHON=OFF", *options]
    done = subprocess.run(command, env={**os.environ, **environment}, capture_output=True, text=True)
    return done.returncode, " ".join((done.stdout + done.stderr).split())


def test_an_unknown_choice_is_refused(tmp_path):
    code, text = configure(tmp_path, "-DGLMX_CUDA=yes")
    assert code != 0 and "GLMX_CUDA=yes: expected AUTO, ON or OFF" in text


def test_off_looks_for_no_compiler(tmp_path):
    code, text = configure(tmp_path, "-DGLMX_CUDA=OFF")
    assert code == 0 and "glmx: no CUDA backend: GLMX_CUDA=OFF" in text and "CUDA compiler" not in text


def test_without_nvcc_auto_builds_for_the_cpu_and_says_so(tmp_path):
    code, text = configure(tmp_path, "-DGLMX_CUDA=AUTO", CUDACXX=str(tmp_path / "no-nvcc"))
    assert code == 0 and "glmx: no CUDA backend: no working nvcc was found" in text


def test_without_nvcc_on_is_an_error(tmp_path):
    code, text = configure(tmp_path, "-DGLMX_CUDA=ON", CUDACXX=str(tmp_path / "no-nvcc"))
    assert code != 0 and "GLMX_CUDA=ON: no working nvcc was found. Put nvcc on the PATH, or set CUDACXX" in text


def test_a_torch_of_another_cuda_is_named(tmp_path):
    if not HAS_CUDA:
        pytest.skip("this build has no CUDA backend")
    (tmp_path / "version.py").write_text("__version__ = '2.11.0+cu128'\ncuda: Optional[str] = '9.8'\n")
    code, text = configure(tmp_path, "-DGLMX_CUDA=ON", f"-DGLMX_TORCH_DIR={tmp_path}")
    assert code == 0 and "torch of CUDA 9.8: the driver must serve both" in text
    (tmp_path / "version.py").write_text("__version__ = '2.13.0+cpu'\ncuda = None\n")
    code, text = configure(tmp_path, "-DGLMX_CUDA=ON", f"-DGLMX_TORCH_DIR={tmp_path}")
    assert code == 0 and "torch of CUDA" not in text


def test_the_core_needs_no_library_of_cuda_and_shows_none_of_its_names():
    """The runtime is inside, and torch's own copy of it must not find ours."""
    if not HAS_CUDA:
        pytest.skip("this build has no CUDA backend")
    core = PACKAGE / "libglmx_core.so"
    assert "cuda" not in output("readelf", "-d", core).lower()
    shown = [line.split()[-1] for line in output("nm", "-D", "--defined-only", core).splitlines()]
    assert not [name for name in shown if name.startswith(("cuda", "cu", "__cuda"))]


def test_without_a_card_the_library_loads_and_counts_none():
    code = "from glmx import _native as n; print(n.gpu_devices(), n.kernel_table()[0]['gpu'])"
    env = {**os.environ, "PYTHONPATH": str(PACKAGE.parent), "CUDA_VISIBLE_DEVICES": ""}
    kernel = _native.kernel_table()[0]["gpu"]
    assert output(sys.executable, "-c", code, env=env).split() == ["[]", kernel]


@pytest.mark.skipif(not HAS_CUDA, reason="this build has no CUDA backend")
def test_build_info_names_nvcc():
    assert int(_native.build_info()["cuda"].split(".")[0]) >= 12
