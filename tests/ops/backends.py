"""Whose kernels the op tests run, and what is then not theirs to test.

Under GLMX_BACKEND=simt CPU tensors run the GPU's kernels. Every op has one arithmetic tree for all backends, so the
tests of bits hold there too, golden bits and all; but products of bf16 are summed by matrix units, in their own order.
"""

from __future__ import annotations

import pytest
import torch

from glmx import runtime

SIMT = runtime.backend() == "simt"

cpu_only = pytest.mark.skipif(SIMT, reason="GLMX_BACKEND=simt: a test of the CPU's kernels alone")


def needs_the_cpus_products(*dtypes: torch.dtype) -> None:
    """Skips a test of the bits of bf16 products, where these are the sums of a matrix unit."""
    if SIMT and torch.bfloat16 in dtypes:
        pytest.skip("GLMX_BACKEND=simt: products of bf16 are summed in a matrix unit's order")
