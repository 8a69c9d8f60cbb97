"""What is refused on a card before any work is done, and what a kernel ends with an error: a bad index."""

from __future__ import annotations

import pathlib
import re
import subprocess
import sys

import pytest
import torch

from glmx import ops, runtime
from tests.gpu.device import need_cuda
from tests.ops.cases import same_bits, values

DEVICE = need_cuda()
ROOT = pathlib.Path(__file__).resolve().parents[2]


def test_shapes_and_dtypes_are_refused_as_on_the_cpu() -> None:
    x, w = torch.zeros(4, 8, device=DEVICE), torch.zeros(6, 9, device=DEVICE)
    with pytest.raises(ValueError, match="w"):
        ops.linear(x, w)
    with pytest.raises(ValueError, match="x"):
        ops.rms_norm(x.double(), x[0], 1e-5)
    with pytest.raises(ValueError, match="top_k"):
        ops.route_topk(x, x[0], 9)


@pytest.mark.parametrize("strange", ["weight", "x"])
def test_tensors_of_two_devices_are_refused(strange: str) -> None:
    given = {"x": torch.ones(4, 8, device=DEVICE), "weight": torch.ones(8, device=DEVICE)}
    given[strange] = given[strange].cpu()
    with pytest.raises(ValueError, match="weight|x"):
        ops.rms_norm(**given, eps=1e-5)


def test_every_ported_op_runs_on_the_card() -> None:
    """An op without a kernel for the card runs the CPU's on copies: right, and no test of a kernel."""
    listed = re.findall(r"^  X\((\w+),", (ROOT / "csrc/gpu/kernels.h").read_text(), re.MULTILINE)
    assert len(listed) > 20
    missing = {*listed, "moe_mlp"} - set(runtime.native().gpu_kernels("cuda"))
    assert not missing, f"on copies: {', '.join(sorted(missing))}"


def test_an_op_without_a_kernel_gives_the_bits_of_the_cpu() -> None:
    x = values(5000)
    assert "sum_squares" not in runtime.native().gpu_kernels("cuda")
    assert same_bits(ops.sum_squares(x.to(DEVICE)).cpu(), ops.sum_squares(x))


def test_strided_arguments_are_taken() -> None:
    wide = values(6, 40)
    x, w = wide.to(DEVICE)[:, ::2], values(8, 20, seed=1).to(DEVICE)
    assert not x.is_contiguous()
    assert same_bits(ops.linear(x, w).cpu(), ops.linear(wide[:, ::2].contiguous(), w.cpu()))


BAD_INDICES = {
    "embedding": "ops.embedding(torch.tensor([0, 5], device='cuda'), torch.ones(5, 8, device='cuda'))",
    "expert_plan": "ops.expert_plan(torch.tensor([[9]], dtype=torch.int32, device='cuda'), 4)",
    "row_token": "ops.grouped_gemm(torch.ones(3, 8, device='cuda'), torch.ones(1, 8, 8, device='cuda'), "
    "torch.tensor([0, 2], dtype=torch.int32, device='cuda'), "
    "row_token=torch.tensor([0, 7], dtype=torch.int32, device='cuda'))",
    "inverse": "ops.moe_combine(torch.ones(3, 8, device='cuda'), None, "
    "torch.tensor([[3]], dtype=torch.int32, device='cuda'))",
}


@pytest.mark.parametrize("name", BAD_INDICES)
def test_a_bad_index_ends_the_stream_with_an_error(name: str) -> None:
    """In a process of its own, which cannot use the card afterwards."""
    code = f"import torch\nfrom glmx import ops\n{BAD_INDICES[name]}\n"
    code += "try:\n    torch.cuda.synchronize()\nexcept RuntimeError as error:\n    print('refused', str(error)[:60])\n"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert "refused" in done.stdout, done.stdout + done.stderr[-500:]
