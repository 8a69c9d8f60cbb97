"""Drives CMake.

torch is needed for its headers and for libtorch_cpu.so to link against. It is never a build requirement that pip could
replace: an importable torch is used, else the one in the target environment (pip's build isolation keeps sys.prefix),
else a pin.
"""

from __future__ import annotations

import importlib.util
import os
import pathlib
import shutil
import subprocess
import sys
import sysconfig

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

HERE = pathlib.Path(__file__).resolve().parent
TORCH_PIN = "torch==2.13.0"


def stop(message: str) -> None:
    raise SystemExit(f"\nglmx: {message}\n")


def torch_dir() -> str | None:
    """The torch package whose headers are used: GLMX_TORCH_DIR, an importable one, the target environment's."""
    candidates = [os.environ.get("GLMX_TORCH_DIR")]
    spec = importlib.util.find_spec("torch")
    if spec and spec.submodule_search_locations:
        candidates.append(spec.submodule_search_locations[0])
    candidates += [os.path.join(sysconfig.get_path(key), "torch") for key in ("platlib", "purelib")]
    for path in candidates:
        if path and os.path.exists(os.path.join(path, "include/torch/csrc/stable/library.h")):
            return path
    return None


def pybind11_dir() -> str:
    try:
        import pybind11
    except ImportError:
        stop("pybind11 is missing; install it first: pip install pybind11 cmake ninja setuptools")
    return pybind11.get_cmake_dir()


def check_toolchain() -> str:
    """One line of help for each thing a build needs. Returns the C++ compiler."""
    if sys.platform != "linux" or sysconfig.get_platform().rsplit("-", 1)[-1] != "x86_64":
        stop(f"builds on Linux x86-64 only; this is {sysconfig.get_platform()}")
    compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("c++")
    if not compiler or not shutil.which(compiler):
        stop("no C++ compiler found. Install one: apt-get install g++ (version 12 or newer), or set CXX")
    if not shutil.which("cmake"):
        stop("cmake 3.25 or newer is missing. Install it: pip install cmake")
    return compiler


class CMakeBuild(build_ext):
    def run(self) -> None:
        compiler = check_toolchain()
        torch = torch_dir()
        if torch is None:
            stop(f"torch's headers were not found. Install torch first: pip install {TORCH_PIN}")
        inplace = self.editable_mode or self.inplace
        out = HERE / "python" / "glmx" if inplace else pathlib.Path(self.build_lib).resolve() / "glmx"
        tag = f"cp{sys.version_info.major}{sys.version_info.minor}"
        build = HERE / "build" / f"cmake-{tag}"
        build.mkdir(parents=True, exist_ok=True)
        configure = ["cmake", "-S", str(HERE), "-B", str(build), "-DCMAKE_BUILD_TYPE=Release"]
        configure += [f"-DCMAKE_CXX_COMPILER={compiler}", f"-DGLMX_TORCH_DIR={torch}", f"-DGLMX_OUT={out}"]
        configure += [f"-DPython_EXECUTABLE={sys.executable}", f"-Dpybind11_DIR={pybind11_dir()}"]
        ninja = shutil.which("ninja")
        if ninja:
            configure += ["-GNinja", f"-DCMAKE_MAKE_PROGRAM={ninja}"]
        jobs = os.environ.get("MAX_JOBS", str(os.cpu_count() or 1))
        subprocess.run(configure, check=True)
        subprocess.run(["cmake", "--build", str(build), "-j", jobs], check=True)

    def get_outputs(self) -> list[str]:
        return []

    def get_output_mapping(self) -> dict[str, str]:
        return {}


setup(
    ext_modules=[Extension("glmx._native", [])],
    cmdclass={"build_ext": CMakeBuild},
    setup_requires=[] if torch_dir() else [TORCH_PIN],
)
