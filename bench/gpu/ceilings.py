"""The ceilings that torch gives, as JSON lines: a product of two random bf16 matrices, and a copy of device memory.

ceilings.cu has the others: read, gather, the time of a launch.
"""

from __future__ import annotations

import torch
from timing import Timed, normal, options, say


def main() -> None:
    run = options(__doc__)
    for n in (64,) if run.small else (4096, 8192):
        pairs = [(normal(n, n, run=run), normal(n, n, run=run)) for _ in range(2)]
        timed = Timed([lambda a=a, b=b: a @ b.t() for a, b in pairs], run, graph=False)
        for _ in range(17):
            timed.turn()
        seconds = sorted(timed.seconds[2:])[7]
        name = "matmul" if n in (64, 8192) else f"matmul_{n}"
        say(name=name, unit="TFLOP/s", rate=round(2 * n**3 / seconds / 1e12, 1), n=n)
    x = normal(1 << (10 if run.small else 30), run=run)
    y = torch.empty_like(x)
    timed = Timed([lambda: y.copy_(x)], run, graph=False)
    for _ in range(17):
        timed.turn()
    seconds = sorted(timed.seconds[2:])[7]
    say(name="copy", unit="TB/s", rate=round(2 * x.numel() * x.element_size() / seconds / 1e12, 3), bytes=2 * x.nbytes)


if __name__ == "__main__":
    main()
