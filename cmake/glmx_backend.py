"""The PEP 517 backend: setuptools' own, with what glmx must know about torch. setup.py shares the same functions.

torch is needed for its headers and for libtorch_cpu.so to link against. It is not in build-system.requires, because pip
would then download one for every isolated build. The torch of the target environment is used wherever it is found;
only an isolated build on a machine that has none asks for the pin. An installed torch is never replaced.
"""

from __future__ import annotations

import importlib.util
import os
import pathlib
import re
import shutil
import subprocess
import sys
import sysconfig
from typing import NoReturn

from setuptools import build_meta
from setuptools.build_meta import *  # noqa: F403  every hook that is not defined below

ROOT = pathlib.Path(__file__).resolve().parent.parent
TORCH_PIN = "torch==2.13.0"
TORCH_MIN, TORCH_BELOW = (2, 11), (2, 14)  # what was tested; the range in pyproject.toml is the same (tests/build)
GCC_MIN = 12  # the oldest that was tried
CMAKE_MIN = (3, 25)

# Every way in which an install stops, as the user sees it. docs/install.md explains each (tests/build/test_docs.py).
ERRORS = {
    "platform": "glmx builds on Linux x86-64 only; this is {platform}",
    "compiler": "no C++ compiler found; install one: apt-get install g++ (version 12 or newer), or set CXX",
    "gcc": "{compiler} is version {version}; glmx needs g++ 12 or newer: apt-get install g++-12, then set CXX=g++-12",
    "cmake": "cmake 3.25 or newer is missing (found: {found}); install it: pip install cmake",
    "setuptools": "setuptools 77 or newer is missing (found: {found}); install it: pip install --upgrade setuptools",
    "pybind11": "pybind11 is missing; without build isolation install it first: pip install pybind11 cmake ninja",
    "torch": "torch was not found; install it first: pip install " + TORCH_PIN,
    "torch_dir": "GLMX_TORCH_DIR={path} has no include/torch/csrc/stable/library.h; it names a torch package's folder",
    "torch_version": "torch {version} is installed; glmx was tested with torch>=2.11,<2.14 and never replaces an "
    "installed torch; install one of those yourself: pip install " + TORCH_PIN,
}


def stop(error: str, **values: object) -> NoReturn:
    raise SystemExit(f"\nglmx: {ERRORS[error].format(**values)}\n")


def _has_headers(path: str | None) -> bool:
    return bool(path) and os.path.exists(os.path.join(path, "include/torch/csrc/stable/library.h"))


def _importable_torch() -> str | None:
    spec = importlib.util.find_spec("torch")
    return spec.submodule_search_locations[0] if spec and spec.submodule_search_locations else None


def _target_torch() -> str | None:
    """The torch that the target interpreter sees: pip hides it by environment variables, which -E ignores."""
    code = "import importlib.util as u; s = u.find_spec('torch'); print(s.submodule_search_locations[0] if s else '')"
    answer = subprocess.run([sys.executable, "-E", "-P", "-c", code], capture_output=True, text=True, cwd="/")
    return answer.stdout.strip() or None


def torch_dir() -> str | None:
    """The torch package to build against: GLMX_TORCH_DIR, else an importable one, else the target environment's."""
    named = os.environ.get("GLMX_TORCH_DIR")
    if named:
        return named if _has_headers(named) else stop("torch_dir", path=named)
    return next((path for find in (_importable_torch, _target_torch) if _has_headers(path := find())), None)


def check_torch_version(path: str) -> None:
    text = pathlib.Path(path, "version.py").read_text(encoding="utf-8")
    version = re.search(r"__version__\s*=\s*['\"]([^'\"]+)", text)[1]
    if not TORCH_MIN <= tuple(int(part) for part in version.split(".")[:2]) < TORCH_BELOW:
        stop("torch_version", version=version)


def _numbers(command: list[str]) -> str:
    """The first thing that looks like a version in what the command prints."""
    out = subprocess.run(command, capture_output=True, text=True).stdout
    found = re.search(r"\d+(\.\d+)+", out)
    return found[0] if found else "0.0"


def check_toolchain() -> str:
    """Stops with one line of help when something a build needs is missing. Returns the C++ compiler."""
    if sysconfig.get_platform() != "linux-x86_64":
        stop("platform", platform=sysconfig.get_platform())
    compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("c++")
    if not compiler or not shutil.which(compiler):
        stop("compiler")
    banner = subprocess.run([compiler, "--version"], capture_output=True, text=True).stdout
    if "Free Software Foundation" in banner:
        version = _numbers([compiler, "-dumpfullversion"])
        if int(version.split(".")[0]) < GCC_MIN:
            stop("gcc", compiler=compiler, version=version)
    found = _numbers(["cmake", "--version"]) if shutil.which("cmake") else "none"
    if found == "none" or tuple(int(part) for part in found.split(".")[:2]) < CMAKE_MIN:
        stop("cmake", found=found)
    return compiler


def _requires(base: list[str]) -> list[str]:
    return base if torch_dir() else [*base, TORCH_PIN]


def _check_installed_torch() -> None:
    """Before pip resolves dependencies: a torch outside the tested range would be replaced by one inside it."""
    path = torch_dir()
    if path:
        check_torch_version(path)


def get_requires_for_build_wheel(config_settings=None):
    return _requires(build_meta.get_requires_for_build_wheel(config_settings))


def get_requires_for_build_editable(config_settings=None):
    return _requires(build_meta.get_requires_for_build_editable(config_settings))


def prepare_metadata_for_build_wheel(metadata_directory, config_settings=None):
    _check_installed_torch()
    return build_meta.prepare_metadata_for_build_wheel(metadata_directory, config_settings)


def prepare_metadata_for_build_editable(metadata_directory, config_settings=None):
    _check_installed_torch()
    return build_meta.prepare_metadata_for_build_editable(metadata_directory, config_settings)


def build_wheel(wheel_directory, config_settings=None, metadata_directory=None):
    # setuptools never deletes from build/lib*: a module removed from the sources would stay in every later wheel.
    for stale in ROOT.glob("build/lib*"):
        shutil.rmtree(stale)
    return build_meta.build_wheel(wheel_directory, config_settings, metadata_directory)
