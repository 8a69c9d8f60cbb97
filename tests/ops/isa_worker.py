"""Evaluates every case of the named ops and saves the tensors: run as a process of its own, so that GLMX_ISA
holds.

python -m tests.ops.isa_worker OUT.pt OP [OP ...]
"""

from __future__ import annotations

import sys

import torch

from glmx import ops
from tests.ops.cases import cases, evaluate


def main(path: str, names: list[str]) -> None:
    torch.set_num_threads(1)
    torch.save({str(case): evaluate(ops, case) for name in names for case in cases(name)}, path)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
