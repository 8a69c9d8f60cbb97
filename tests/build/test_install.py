"""pip builds glmx in every mode without touching the torch that is there, and stops with one line where it cannot.

The wheel, installed where nothing can be built, is tests/test_wheel.py's.
"""

from __future__ import annotations

import os
import pathlib
import re
import shutil
import subprocess
import sys

import pytest
from tests.build.tree import ROOT, SITE, clean_environment, output, unavailable

WORKS = """
import glmx, torch, sys, pathlib
assert pathlib.Path(glmx.__file__).is_relative_to(sys.prefix), glmx.__file__
y = glmx.ops.rms_norm(torch.full((2, 8), 3.0), torch.ones(8), 1e-6)
assert torch.allclose(y, torch.ones(2, 8)), y
from glmx import _native
print(_native.active_isa(), _native.build_info()["version"])
"""


def torch_fingerprint() -> list[tuple[str, int, int]]:
    """Every file of the installed torch's metadata, and its version file: an install may not change one."""
    found = [*SITE.glob("torch-*.dist-info/*"), SITE / "torch/version.py", SITE / "torch/lib/libtorch_cpu.so"]
    return sorted((str(path), path.stat().st_mtime_ns, path.stat().st_size) for path in found if path.is_file())


@pytest.fixture(scope="module")
def clone(tmp_path_factory) -> pathlib.Path:
    """What a fresh clone holds: tracked files, and new ones that git does not ignore."""
    target = tmp_path_factory.mktemp("clone")
    names = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True
    )
    if names.returncode != 0:
        unavailable("not a git clone")
    for name in names.stdout.splitlines():
        if (ROOT / name).is_file():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, target / name)
    return target


@pytest.fixture
def venv(tmp_path) -> pathlib.Path:
    """A fresh virtual environment that sees this one's packages (pip and torch among them) behind its own."""
    if not list(SITE.glob("torch-*.dist-info")):
        unavailable(f"torch is not installed in {SITE}")
    output(sys.executable, "-m", "venv", "--without-pip", tmp_path / "venv")
    site = next((tmp_path / "venv/lib").glob("python3*/site-packages"))
    (site / "shared.pth").write_text(f"{SITE}\n")
    return tmp_path / "venv"


def pip(venv: pathlib.Path, *args: str | os.PathLike, **environment: str) -> str:
    done = subprocess.run(
        [venv / "bin/python", "-m", "pip", *map(str, args)],
        env=clean_environment(**environment),
        cwd=venv.parent,
        capture_output=True,
        text=True,
    )
    log = done.stdout + done.stderr
    if done.returncode != 0 and re.search(r"No matching distribution|Could not find a version|Connection", log):
        unavailable("the package index does not answer")
    assert done.returncode == 0, log[-4000:]
    assert not re.search(r"(Collecting|Downloading|Uninstalling) torch\b", log), log[-4000:]
    return log


def works(venv: pathlib.Path) -> None:
    env = clean_environment()
    output(venv / "bin/python", "-c", WORKS, env=env, cwd=venv.parent)
    assert output(venv / "bin/glmx", "--version", env=env, cwd=venv.parent).startswith("glmx 0.")


@pytest.mark.slow
@pytest.mark.xdist_group("install")
def test_install_without_build_isolation(clone, venv):
    before = torch_fingerprint()
    pip(venv, "install", "--no-build-isolation", clone)
    works(venv)
    assert torch_fingerprint() == before


@pytest.mark.slow
@pytest.mark.xdist_group("install")
def test_install_with_build_isolation(clone, venv):
    """pip's own build environment: torch's headers are found in the target, and none is downloaded."""
    before = torch_fingerprint()
    pip(venv, "install", "-v", clone, GLMX_CUDA="OFF")  # the other one compiles what it finds a compiler for
    works(venv)
    assert torch_fingerprint() == before


def some_packages(tmp_path: pathlib.Path, packages: list[str]) -> pathlib.Path:
    """A folder for PYTHONPATH with the named packages of this environment and no others."""
    path = tmp_path / "path"
    path.mkdir(exist_ok=True)
    for name in [*packages, "_distutils_hack"]:
        for found in (SITE / name, *SITE.glob(f"{name}-*.dist-info")):
            (path / found.name).symlink_to(found)
    return path


def build_stops(
    clone: pathlib.Path, tmp_path: pathlib.Path, packages: list[str], prelude="", **environment: str
) -> str:
    """The last line of `python setup.py build_ext` where only the named packages are installed; pip fetched nothing."""
    path = some_packages(tmp_path, packages)
    run = "import runpy, sys; sys.argv = ['setup.py', 'build_ext']; runpy.run_path('setup.py', run_name='__main__')"
    done = subprocess.run(
        [sys._base_executable, "-S", "-c", f"{prelude}\n{run}"],  # -S: no site-packages
        cwd=clone,
        env=clean_environment(PYTHONPATH=str(path), PYTHONDONTWRITEBYTECODE="1", **environment),
        capture_output=True,
        text=True,
    )
    assert done.returncode != 0, done.stdout + done.stderr
    assert "Traceback" not in done.stderr, done.stderr
    assert not (clone / ".eggs").exists(), "setuptools downloaded something"
    return done.stderr.strip().splitlines()[-1]


PACKAGES = ["setuptools", "pybind11"]


def fake_torch(folder: pathlib.Path, version: str) -> None:
    header = folder / "torch/include/torch/csrc/stable/library.h"
    header.parent.mkdir(parents=True)
    header.touch()
    (folder / "torch/__init__.py").touch()
    (folder / "torch/version.py").write_text(f"__version__ = {version!r}\n")


def fake_compiler(path: pathlib.Path, version: str) -> str:
    banner = f"g++ (Distribution) {version}\nCopyright (C) Free Software Foundation, Inc."
    path.write_text(f'#!/bin/sh\ncase "$1" in -dumpfullversion) echo {version} ;; *) echo "{banner}" ;; esac\n')
    path.chmod(0o755)
    return str(path)


def test_no_torch_is_one_line_and_no_download(clone, tmp_path):
    # The target interpreter is asked with its own site-packages; a base Python that has torch would be used, rightly.
    base = subprocess.run([sys._base_executable, "-E", "-c", "import torch"], capture_output=True)
    if base.returncode == 0:
        pytest.skip("the base Python has torch")
    line = build_stops(clone, tmp_path, PACKAGES)
    assert line == "glmx: torch was not found; install it first: pip install torch==2.13.0"


def test_isolated_build_asks_for_torch_only_where_there_is_none(clone, tmp_path):
    """pip asks the backend what its build environment needs; with a torch in the target it must not fetch another."""
    code = "import sys; sys.path.insert(0, 'cmake'); import glmx_backend as b; print(b.get_requires_for_build_wheel())"

    env = clean_environment(PYTHONPATH=str(some_packages(tmp_path, ["setuptools"])))

    def requires(python: str) -> str:
        return output(python, "-S", "-c", code, cwd=clone, env=env)

    assert "torch" not in requires(sys.executable), "the torch of this environment was not found"
    if subprocess.run([sys._base_executable, "-E", "-c", "import torch"], capture_output=True).returncode != 0:
        assert "'torch==2.13.0'" in requires(sys._base_executable)


@pytest.mark.parametrize("version", ["2.10.1", "2.14.0+cu130", "3.0.0"])
def test_untested_torch_is_named_and_not_replaced(clone, tmp_path, version):
    fake_torch(tmp_path / "path", version)
    line = build_stops(clone, tmp_path, PACKAGES)
    assert line.startswith(f"glmx: torch {version} is installed; glmx was tested with torch>=2.11,<2.14")


def test_wrong_torch_dir_is_named(clone, tmp_path):
    line = build_stops(clone, tmp_path, PACKAGES, GLMX_TORCH_DIR="/no/torch")
    assert line.startswith("glmx: GLMX_TORCH_DIR=/no/torch has no include/torch/csrc/stable/library.h")


def test_missing_compiler_is_one_line(clone, tmp_path):
    line = build_stops(clone, tmp_path, PACKAGES, CXX="no-such-compiler")
    assert line.startswith("glmx: no C++ compiler found; install one: apt-get install g++")


def test_old_compiler_is_named(clone, tmp_path):
    line = build_stops(clone, tmp_path, PACKAGES, CXX=fake_compiler(tmp_path / "g++-9", "9.4.0"))
    assert "is version 9.4.0; glmx needs g++ 12 or newer" in line


def test_missing_cmake_is_one_line(clone, tmp_path):
    line = build_stops(clone, tmp_path, PACKAGES, CXX=fake_compiler(tmp_path / "g++", "12.2.0"), PATH="")
    assert line == "glmx: cmake 3.25 or newer is missing (found: none); install it: pip install cmake"


def test_missing_pybind11_is_one_line(clone, tmp_path):
    fake_torch(tmp_path / "path", "2.13.0")
    line = build_stops(clone, tmp_path, ["setuptools"])
    assert line.startswith("glmx: pybind11 is missing; without build isolation install it first")


def test_old_setuptools_is_one_line(clone, tmp_path):
    line = build_stops(clone, tmp_path, PACKAGES, prelude="import setuptools; setuptools.__version__ = '65.5.0'")
    assert (
        line == "glmx: setuptools 77 or newer is missing (found: 65.5.0); install it: pip install --upgrade setuptools"
    )


@pytest.mark.parametrize("target", ["demo", "test"])
@pytest.mark.parametrize("strict", ["0", "1"])
def test_make_without_a_compiler_is_one_named_skip(clone, target, strict):
    if not shutil.which("make"):
        unavailable("make is missing")
    env = clean_environment(CXX="no-such-compiler", GLMX_STRICT=strict, GLMX_PYTHON=sys._base_executable)
    done = subprocess.run(["make", "--no-print-directory", target], cwd=clone, env=env, capture_output=True, text=True)
    lines = done.stdout.strip().splitlines()
    assert lines == [
        f"glmx: SKIPPED make {target}: no C++ compiler found; install one: apt-get install g++ "
        "(version 12 or newer), or set CXX"
    ]
    assert (done.returncode != 0) == (strict == "1"), "a skip is a failure under GLMX_STRICT=1"


def test_a_second_make_installs_and_compiles_nothing(clone):
    """What `make demo` would do (-n: say, do not do) when it has been done, and after a change."""
    if not shutil.which("make"):
        unavailable("make is missing")

    def plan() -> str:
        env = clean_environment(MAKEFLAGS="", MAKELEVEL="", GLMX_PYTHON=sys._base_executable)
        return output("make", "--no-print-directory", "-n", "demo", env=env, cwd=clone)

    assert "-m venv .venv" in plan() and "torch==2.13.0" in plan()
    now = max(path.stat().st_mtime for path in clone.rglob("*"))
    (clone / ".venv").mkdir()
    for age, stamp in enumerate((".torch", ".glmx", ".built")):
        (clone / ".venv" / stamp).touch()
        os.utime(clone / ".venv" / stamp, (now + 1 + age, now + 1 + age))
    assert plan().split() == [".venv/bin/glmx", "demo"]
    os.utime(clone / "csrc/ops/rms_norm.cpp", (now + 9, now + 9))
    assert "build_ext --inplace" in plan() and "install" not in plan()
    os.utime(clone / "pyproject.toml", (now + 9, now + 9))
    assert "install --no-build-isolation --editable" in plan() and "venv .venv" not in plan()
    shutil.rmtree(clone / ".venv")
    for name in ("csrc/ops/rms_norm.cpp", "pyproject.toml"):  # the other tests build this clone
        os.utime(clone / name, (now, now))
