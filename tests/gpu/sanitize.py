"""Every ported op once or twice, forward and backward, on small shapes: what compute-sanitizer looks at.

    compute-sanitizer --tool memcheck python -m tests.gpu.sanitize
    compute-sanitizer --tool racecheck python -m tests.gpu.sanitize grouped_gemm moe_mlp

The cases are those of tests/ops whose rows are ragged, no multiple of a vector, or few; bf16 and fp32.
"""

from __future__ import annotations

import sys
from types import SimpleNamespace
from typing import Any

import torch

from glmx import ops
from tests.gpu.device import DEVICE
from tests.gpu.moved import NAMES, on
from tests.ops.cases import dense_cases, evaluate

EACH = 2  # of a function and dtype: the sanitizer makes a kernel a hundred times as slow


def main(names: list[str]) -> None:
    device = DEVICE or torch.device("cuda")
    moved: Any = SimpleNamespace(**{name: on(device, getattr(ops, name)) for name in NAMES})
    ran = 0
    for name in names or NAMES:
        found = [case for case in dense_cases(name, wild=False) if "no-rows" not in case.name]
        for dtype in ("fp32", "bf16", ""):  # "": functions whose cases have no dtype in their names
            of_dtype = [case for case in found if case.name.startswith(("fp32", "bf16")) == bool(dtype)]
            of_dtype = [case for case in of_dtype if case.name.startswith(dtype)]
            gathered = [case for case in of_dtype if "gather-bias1-silu1-holes1" in case.name]
            for case in of_dtype[1 :: max(1, len(of_dtype) // EACH)][:EACH] + gathered:
                evaluate(moved, case)
                ran += 1
    if device.type == "cuda":
        torch.cuda.synchronize()
    print(f"{ran} cases on {device}")


if __name__ == "__main__":
    main(sys.argv[1:])
