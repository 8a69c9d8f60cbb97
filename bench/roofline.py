"""The ceilings of this machine: `python bench/roofline.py [THREADS]` measures and prints them.

Every benchmark row states its share of one of these, measured in the same run: an absolute time on a shared machine
means nothing. bench/roofline.cpp says what each is; it is compiled once, into build/bench.
"""

from __future__ import annotations

import functools
import json
import os
import pathlib
import subprocess
import sys

ROOT = pathlib.Path(__file__).resolve().parent.parent
SOURCE = ROOT / "bench" / "roofline.cpp"


@functools.cache
def program() -> pathlib.Path:
    out = ROOT / "build" / "bench" / "roofline"
    if not out.exists() or out.stat().st_mtime < SOURCE.stat().st_mtime:
        out.parent.mkdir(parents=True, exist_ok=True)
        compiler = os.environ.get("CXX", "g++")
        flags = ["-O2", "-std=c++20", "-ffp-contract=off", f"-I{ROOT / 'csrc'}", "-pthread"]
        subprocess.run([compiler, *flags, str(SOURCE), "-o", str(out)], check=True)
    return out


def ceilings(threads: int = 1, seconds: float = 0.2) -> dict[str, float]:
    """Name -> GFLOP/s (`fma_*`, `tree_*`, `tile*`) or GB/s (`read`) of `threads` threads together."""
    done = subprocess.run([str(program()), str(threads), str(seconds)], check=True, capture_output=True, text=True)
    return json.loads(done.stdout)


def gemm_ceiling(measured: dict[str, float], isa: str) -> tuple[str, float]:
    """What bounds a bf16 GEMM under an ISA level: tiles fed from L1, or the GEMM tree on the vector unit."""
    name = "tile_l1" if isa == "amx" else f"tree_{isa}"
    return name, measured[name]


def main() -> int:
    counts = [int(arg) for arg in sys.argv[1:]] or sorted({1, os.cpu_count() or 1})
    columns = [ceilings(threads, seconds=1.0) for threads in counts]
    print(f"{'ceiling':18}" + "".join(f"{threads:>10} thr" for threads in counts))
    for name in columns[0]:
        unit = "GB/s" if name == "read" else "GFLOP/s"
        print(f"{name:18}" + "".join(f"{column[name]:14.1f}" for column in columns) + f"  {unit}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
