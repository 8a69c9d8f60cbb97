"""What the tests of the build know about the tree: its root, the stems of ops.h, the objects of the build."""

from __future__ import annotations

import os
import pathlib
import re
import subprocess
import sys
import sysconfig

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "python" / "glmx"
OPS_H = ROOT / "csrc" / "include" / "glmx" / "ops.h"
SITE = pathlib.Path(sysconfig.get_path("purelib"))  # the packages of the environment that runs the tests
ISAS = ("base", "avx2", "avx512", "avx512_bf16", "amx")


def stems() -> list[str]:
    """The ops, in the order of ops.h: each has one `inline constexpr int k<Name>Revision`."""
    names = re.findall(r"inline constexpr int k(\w+?)Revision\b", OPS_H.read_text())
    return [re.sub(r"(?<!^)(?=[A-Z])", "_", name).lower() for name in names]


def sources(*suffixes: str, under: str = "csrc") -> list[pathlib.Path]:
    return sorted(path for path in (ROOT / under).rglob("*") if path.suffix in suffixes and path.is_file())


def relative(path: pathlib.Path) -> str:
    return path.relative_to(ROOT).as_posix()


def unavailable(reason: str) -> None:
    """A skip with its reason; under GLMX_STRICT=1 a failure."""
    if os.environ.get("GLMX_STRICT") == "1":
        pytest.fail(f"GLMX_STRICT=1: {reason}", pytrace=False)
    pytest.skip(reason)


def clean_environment(**changes: str) -> dict[str, str]:
    """The environment of a user: nothing of this test run's own paths or options, but its cmake and ninja."""
    dropped = (
        "PYTHONPATH",
        "GLMX_ISA",
        "GLMX_BACKEND",
        "GLMX_TORCH_DIR",
        "GLMX_CUDA",
        "GLMX_CUDA_ARCHS",
        "VIRTUAL_ENV",
    )
    env = {key: value for key, value in os.environ.items() if key not in dropped}
    tools = pathlib.Path(sys.executable).parent
    return {**env, "PIP_DISABLE_PIP_VERSION_CHECK": "1", "PATH": f"{tools}{os.pathsep}{env['PATH']}", **changes}


def output(*command: str | os.PathLike, **kwargs) -> str:
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, **kwargs)
    assert done.returncode == 0, f"{' '.join(map(str, command))}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def isa_objects() -> list[pathlib.Path]:
    """The object files of the ISA folders, of the newest build in build/."""
    builds = [path.parent for path in (ROOT / "build").glob("cmake-*/CMakeCache.txt")]
    found = [sorted(build.glob("CMakeFiles/glmx_cpu_*.dir/csrc/cpu/*/*.o")) for build in builds]
    found = [objects for objects in found if objects]
    if not found:
        unavailable("no object files in build/: run `make dev`")
    objects = max(found, key=lambda group: max(path.stat().st_mtime for path in group))
    # An object whose source is gone is a leftover of an earlier build.
    return [path for path in objects if (ROOT / "csrc/cpu" / path.parent.name / path.stem).exists()]
