"""Where the tests of this folder run: on a CUDA card; or, to try the tests themselves on a machine without one, where
GPU_TESTS_ON says ("cpu": this CPU's kernels; with GLMX_BACKEND=simt the GPU's, played by the CPU).
"""

from __future__ import annotations

import os

import pytest
import torch

# The ported ops: their stems, and the public functions of each.
STEMS = (
    "route_topk",
    "expert_plan",
    "grouped_gemm",
    "moe_combine",
    "moe_mlp",
    "rms_norm",
    "add_rms_norm",
    "layer_norm",
    "rope",
    "silu_mul",
    "embedding",
    "lm_head_logprob",
)


def _device() -> torch.device | None:
    named = os.environ.get("GPU_TESTS_ON")
    if named:
        return torch.device(named)
    return torch.device("cuda") if torch.cuda.is_available() else None


DEVICE = _device()
ON_CUDA = DEVICE is not None and DEVICE.type == "cuda"


def need_device() -> torch.device:
    """The device, or a skip of the whole module that calls this."""
    if DEVICE is None:
        pytest.skip("no CUDA card here", allow_module_level=True)
    return DEVICE


def need_cuda() -> torch.device:
    device = need_device()
    if not ON_CUDA:
        pytest.skip(f"needs a CUDA card: the device is {device}", allow_module_level=True)
    return device


def context_is_dead() -> bool:
    """A kernel that ended its stream with an error (gx::require, a bad address) leaves a process that cannot go on."""
    if not ON_CUDA:
        return False
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        return True
    return False


def normal(*shape: int, seed: int, dtype: torch.dtype, scale: float = 1.0) -> torch.Tensor:
    """Bell-shaped values on the device."""
    generator = torch.Generator(DEVICE or "cpu").manual_seed(seed)
    return (torch.randn(shape, generator=generator, device=DEVICE) * scale).to(dtype)
