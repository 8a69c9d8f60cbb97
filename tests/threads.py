"""For tests of the promise that bits do not depend on threads: with small shapes, ops would not use any."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from glmx import _native


@contextmanager
def every_op_shared_out() -> Iterator[None]:
    """Inside, an op shares its items out however small its work is. Restores that, and torch's thread count."""
    threads, small_work = torch.get_num_threads(), _native.set_small_work(0)
    try:
        yield
    finally:
        _native.set_small_work(small_work)
        torch.set_num_threads(threads)
