"""What this process runs on: the four environment variables, read once, and the facts that `glmx env` prints.

| variable | values | meaning |
|---|---|---|
| GLMX_BACKEND | auto (default), cpu, cuda, hip, simt | whose kernels serve the ops, see below |
| GLMX_ISA | base, avx2, avx512, avx512_bf16, amx | lowers the CPU's instruction set (default: the machine's best) |
| GLMX_LOG | kernels | names the kernel of each op on standard error, when it is first called |
| GLMX_STRICT | 0 (default), 1 | in the tests, what would be skipped for want of a tool fails |

auto: tensors on a GPU run its kernels where this build has them, tensors on the CPU the CPU's. cpu: every tensor runs
the CPU's kernels; what lies on a GPU is copied there and back. cuda, hip: as auto, and a build or machine without it is
an error. simt, for tests: tensors on the CPU run the GPU's kernels, on a CPU that plays GPU (build/simt); simt:reverse
and simt:random let its threads take turns in another order, simt:sm80 makes it an older card.
"""

from __future__ import annotations

import functools
import hashlib
import os
import pathlib
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from types import ModuleType
from typing import Any

from glmx.errors import ConfigError, MissingLibraryError, UnsupportedError

VARIABLES = ("GLMX_BACKEND", "GLMX_ISA", "GLMX_LOG", "GLMX_STRICT")
BACKENDS = ("auto", "cpu", "cuda", "hip", "simt")
DTYPES = ("bf16", "fp32")
_SIMT = pathlib.Path(__file__).resolve().parents[2] / "build" / "simt" / "libglmx_simt.so"
_SIMT_PLAYS = re.compile(r"simt(:reverse|:random)?(:sm80)?")


@dataclass(frozen=True)
class Settings:
    """The variables as they stood when glmx was imported; None where unset or empty."""

    backend: str | None
    isa: str | None
    log: str | None
    strict: str | None

    @property
    def log_kernels(self) -> bool:
        return self.log == "kernels"

    def as_environment(self) -> dict[str, str | None]:
        return dict(zip(VARIABLES, (self.backend, self.isa, self.log, self.strict), strict=True))


def read_settings(environ: Mapping[str, str]) -> Settings:
    """Reads and checks the variables. Which ISA and which backend there are, the core knows (`native`).

    Raises:
        ConfigError: a value that no glmx knows.
    """
    backend, isa, log, strict = (environ.get(name) or None for name in VARIABLES)
    order = backend is not None and _SIMT_PLAYS.fullmatch(backend)
    for name, value, allowed in (
        ("GLMX_BACKEND", "simt" if order else backend, BACKENDS),
        ("GLMX_LOG", log, ("kernels",)),
        ("GLMX_STRICT", strict, ("0", "1")),
    ):
        if value is not None and value not in allowed:
            raise ConfigError(f"{name}={value}: expected one of {', '.join(allowed)}")
    return Settings(backend, isa, log, strict)


settings = read_settings(os.environ)


@functools.cache
def native() -> ModuleType:
    """glmx._native, or MissingLibraryError with what to do.

    An ISA or a backend that is asked for and missing is an error here, before any op runs.
    """
    try:
        from glmx import _native
    except ImportError as error:
        raise MissingLibraryError("_native", error) from None
    _native.active_isa()
    check_backend(settings.backend, _native)
    return _native


def check_backend(wanted: str | None, core: ModuleType) -> None:
    """Loads simt where GLMX_BACKEND asks for it.

    Raises:
        UnsupportedError: this build or machine has not what GLMX_BACKEND asks for.
    """
    if wanted in (None, "auto", "cpu"):
        return
    if wanted.startswith("simt"):
        if not _SIMT.exists():
            raise UnsupportedError(f"GLMX_BACKEND={wanted}: {_SIMT} is not built: python tests/run.py simt")
        core.load_simt(str(_SIMT))
    elif wanted not in core.backends():
        raise UnsupportedError(f"GLMX_BACKEND={wanted}: this build has no {wanted} backend")
    elif not core.gpu_devices():
        raise UnsupportedError(f"GLMX_BACKEND={wanted}: this build has it, but finds no GPU (or no driver of one) here")


def gpu_backend() -> str | None:
    """The backend whose kernels serve tensors on a GPU; None: they are copied to the CPU and back."""
    built = [name for name in native().backends() if name in ("cuda", "hip")]
    return built[0] if built and settings.backend != "cpu" else None


def backend() -> str:
    """The backend in force: simt if it is loaded, else the GPU's if there is a card, else cpu."""
    if "simt" in native().backends():
        return "simt"
    gpu = gpu_backend()
    return gpu if gpu is not None and native().gpu_devices() else "cpu"


def numerics_id(dtype: str | None = None, hardware: str = "x86") -> str:
    """Results under the same id may be compared bit for bit.

    "x86-" or a GPU's architecture ("sm90-"), then a hash of the kernels' revisions, then "-bf16" or "-fp32" if a dtype
    is given. Every instruction set of x86 gives the same bits, so it is no part of the id.
    """
    if dtype is not None and dtype not in DTYPES:
        raise ValueError(f"dtype: expected one of {', '.join(DTYPES)}: got {dtype}")
    revisions = sorted(native().op_revisions().items())
    digest = hashlib.sha256(" ".join(f"{op}={revision}" for op, revision in revisions).encode()).hexdigest()[:12]
    return f"{hardware}-{digest}" if dtype is None else f"{hardware}-{digest}-{dtype}"


def kernel_of(op: str, variant: str) -> dict[str, Any] | None:
    """The row of the kernel table that serves a torch.ops.glmx op: "rms_norm_backward" is served by rms_norm's."""
    rows = [row for row in native().kernel_table() if op == row["op"] or op.startswith(row["op"] + "_")]
    rows = [row for row in rows if row["variant"] in ("", variant)]
    return max(rows, key=lambda row: len(row["op"]), default=None)


_logged: set[str] = set()


def log_kernel(op: str, variant: str, where: str | None) -> None:
    """GLMX_LOG=kernels: one line on standard error for each op and variant.

    `where` is a backend, or "copies": the CPU's kernel on copies of tensors that are on a GPU.
    """
    row = kernel_of(op, variant)
    if row is None:
        kernel = "unknown"
    elif where in ("cpu", "copies"):
        kernel = f"cpu/{row['kernel']}" + (" (copies)" if where == "copies" else "")
    else:
        kernel = f"{where}/{row['gpu']}"
    log_once(f"{op} {row['variant'] if row else variant}".rstrip() + f" -> {kernel}")


def log_once(line: str) -> None:
    """GLMX_LOG=kernels: a line on standard error, unless it is there already."""
    if line not in _logged:
        _logged.add(line)
        print(f"glmx: {line}", file=sys.stderr)


def describe() -> dict[str, Any]:
    """Everything `glmx env` shows, as plain data."""
    core = native()  # first: a wrong GLMX_ISA is an error before torch takes its seconds
    import torch

    return {
        "glmx": core.build_info(),
        "python": sys.version.split()[0],
        "torch": torch.__version__,
        "devices": [
            {"device": "cpu", "name": core.cpu_model(), "cores": os.cpu_count(), "threads": torch.get_num_threads()},
            *core.gpu_devices(),
        ],
        "backend": backend(),
        "backends": core.backends(),
        "isa": {"active": core.active_isa(), "machine": core.machine_isa(), "supported": core.supported_isas()},
        "environment": settings.as_environment(),
        "kernels": core.kernel_table(),
        "numerics_id": numerics_id(),
        "dtypes": list(DTYPES),
    }
