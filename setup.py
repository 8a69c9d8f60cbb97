"""Drives CMake. What a build needs, and how torch is found, is in cmake/glmx_backend.py.

Options of the build, in its environment: GLMX_CUDA and GLMX_CUDA_ARCHS (cmake/GlmxCuda.cmake), GLMX_HIP and its kin
(cmake/GlmxHip.cmake), GLMX_TORCH_DIR, CXX, MAX_JOBS.
"""

from __future__ import annotations

import os
import pathlib
import shutil
import subprocess
import sys

import setuptools
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

HERE = pathlib.Path(__file__).resolve().parent
sys.path.insert(0, str(HERE / "cmake"))

from glmx_backend import check_toolchain, check_torch_version, stop, torch_dir  # noqa: E402

if int(setuptools.__version__.split(".")[0]) < 77:  # older ones do not read pyproject.toml's license field
    stop("setuptools", found=setuptools.__version__)


def pybind11_dir() -> str:
    try:
        import pybind11
    except ImportError:
        stop("pybind11")
    return pybind11.get_cmake_dir()


class CMakeBuild(build_ext):
    def run(self) -> None:
        compiler = check_toolchain()
        torch = torch_dir() or stop("torch")
        check_torch_version(torch)
        inplace = self.editable_mode or self.inplace
        out = HERE / "python" / "glmx" if inplace else pathlib.Path(self.build_lib).resolve() / "glmx"
        configure = ["-DCMAKE_BUILD_TYPE=Release", f"-DCMAKE_CXX_COMPILER={compiler}"]
        configure += [f"-DGLMX_TORCH_DIR={torch}", f"-DGLMX_OUT={out}"]
        configure += [f"-DPython_EXECUTABLE={sys.executable}", f"-Dpybind11_DIR={pybind11_dir()}"]
        # A build without them asks for the default again: the build folder would remember the former answer.
        configure += [f"-DGLMX_CUDA={os.environ.get('GLMX_CUDA') or 'AUTO'}"]
        configure += [f"-DGLMX_CUDA_ARCHS={os.environ.get('GLMX_CUDA_ARCHS') or '80;90a'}"]
        configure += [f"-DGLMX_HIP={os.environ.get('GLMX_HIP') or 'OFF'}"]
        hip = [f"GLMX_HIP_{name}" for name in ("COMPILER", "ARCHS", "FLAGS")]
        configure += [f"-D{name}={os.environ[name]}" for name in hip if os.environ.get(name)]
        ninja = shutil.which("ninja")
        if ninja:
            configure += ["-GNinja", f"-DCMAKE_MAKE_PROGRAM={ninja}"]
        # One build folder per Python and generator, kept between runs: the second build compiles what changed.
        tag = f"cp{sys.version_info.major}{sys.version_info.minor}"
        build = HERE / "build" / f"cmake-{tag}-{'ninja' if ninja else 'make'}"
        jobs = os.environ.get("MAX_JOBS", str(os.cpu_count() or 1))
        subprocess.run(["cmake", "-S", str(HERE), "-B", str(build), *configure], check=True)
        subprocess.run(["cmake", "--build", str(build), "-j", jobs], check=True)

    def get_outputs(self) -> list[str]:
        return []

    def get_output_mapping(self) -> dict[str, str]:
        return {}


setup(ext_modules=[Extension("glmx._native", [])], cmdclass={"build_ext": CMakeBuild})
