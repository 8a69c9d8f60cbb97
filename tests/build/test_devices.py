"""The device of a call: every tensor of it must be there, and an op without a kernel there runs on copies.

No GPU is needed for it: tensors that say they are on one are watched.
"""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from glmx import _native, ops, runtime
from glmx.ops import _library


class Trace(TorchDispatchMode):
    """Names of the ops that are called, with the devices of their tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        out = func(*args, **(kwargs or {}))
        tensors = [arg for arg in args if isinstance(arg, torch.Tensor)]
        self.calls.append(f"{func._schema.name.split('::')[1]} {' '.join(t.device.type for t in tensors)}")
        return out


class Card(torch.Tensor):
    """A tensor that says it is on a GPU. Its memory is the CPU's all the same; only a copy may be read there."""

    is_cuda = True

    def cpu(self) -> torch.Tensor:
        return self.as_subclass(torch.Tensor).clone()


def on_card(tensor: torch.Tensor) -> Card:
    return tensor.as_subclass(Card)


class Kernel:
    """The CPU's, which takes tensors of the CPU alone."""

    def __init__(self, overload: Any) -> None:
        self.overload, self._schema, self.calls = overload, overload._schema, 0

    def __call__(self, *args: Any) -> None:
        assert not any(isinstance(arg, Card) for arg in args), "a tensor on a GPU reached the CPU's kernel"
        self.calls += 1
        self.overload(*args)


def test_an_op_without_a_kernel_runs_on_copies_and_what_it_writes_is_copied_back():
    kernel = Kernel(torch.ops.glmx.cache_append.default)
    cache, rows, slots = torch.zeros(8, 4), torch.arange(1.0, 9.0).view(2, 4), torch.tensor([5, 2])
    _library.on_copies(kernel)(on_card(cache), on_card(rows), slots, 0)
    assert kernel.calls == 1 and cache.sum(1).tolist() == [0, 0, 26, 0, 0, 10, 0, 0]


def test_an_absent_output_is_left_out_and_an_input_is_not_written():
    kernel = Kernel(torch.ops.glmx.rms_norm.default)
    x, y = torch.full((2, 8), 3.0), torch.zeros(2, 8)
    with Trace() as trace:
        _library.on_copies(kernel)(on_card(y), None, on_card(x), on_card(torch.ones(8)), 1e-6)
    assert kernel.calls == 1 and torch.allclose(y, torch.ones(2, 8))
    assert sum(call.startswith("copy_ ") for call in trace.calls) == 1


def test_a_strided_output_is_copied_back():
    kernel = Kernel(torch.ops.glmx.head_gemm.default)
    x, w, wide = torch.ones(2, 1, 8), torch.ones(1, 4, 8), torch.zeros(2, 1, 6)
    _library.on_copies(kernel)(on_card(wide[:, :, 1:5]), on_card(x), on_card(w), False)
    assert wide[0, 0].tolist() == [0, 8, 8, 8, 8, 0]


def test_cpu_tensors_are_not_copied():
    kernel = Kernel(torch.ops.glmx.cache_append.default)
    cache = torch.zeros(8, 4)
    with Trace() as trace:
        _library.on_copies(kernel)(cache, torch.ones(2, 4), torch.tensor([2, 5]), 0)
    assert [call.split()[0] for call in trace.calls if not call.startswith(("ones", "lift", "detach"))] == [
        "cache_append"
    ]
    assert cache.sum(1).nonzero().flatten().tolist() == [2, 5]


# By hand: an op is served by a GPU's kernel exactly when its binding says so and the backend has it.
FORWARDS = {"expert_plan", "moe_mlp", "add_rms_norm", "rope_cos_sin", "rope"}
BOTH_WAYS = {"route_topk", "moe_combine", "rms_norm", "layer_norm", "silu_mul", "embedding", "lm_head_logprob"}
GEMMS = {"grouped_gemm", "grouped_gemm_dgrad", "grouped_gemm_wgrad", "grouped_gemm_bias_grad"}
SERVED = FORWARDS | BOTH_WAYS | {f"{name}_backward" for name in BOTH_WAYS} | GEMMS


def test_bindings_take_gpu_tensors_of_the_ops_that_have_kernels():
    names = {
        name.split("::")[1].split(".")[0] for name in torch._C._dispatch_get_all_op_names() if name.startswith("glmx::")
    }
    registered = {n for n in names if torch._C._dispatch_has_kernel_for_dispatch_key(f"glmx::{n}", "CUDA")}
    assert registered == SERVED


@pytest.mark.parametrize("backend", ["cuda", "hip", "simt"])
def test_a_backend_has_all_of_them_or_is_not_here(backend):
    have = _native.gpu_kernels(backend)
    assert sorted(have) == (sorted(SERVED) if backend in _native.backends() else [])


def test_an_unknown_backend_has_no_kernels():
    with pytest.raises(ValueError, match="backend: expected cuda, hip or simt: got tpu"):
        _native.gpu_kernels("tpu")


ONE_PLACE = {
    "rms_norm": lambda t: torch.ops.glmx.rms_norm(t(2, 8), None, t(2, 8), t(8), 1e-6),
    "moe_combine": lambda t: torch.ops.glmx.moe_combine(t(2, 8), t(4, 8), None, t(2, 2, dtype=torch.int32)),
    "head_gemm": lambda t: torch.ops.glmx.head_gemm(t(2, 1, 4), t(2, 1, 8), t(1, 4, 8), False),
}


@pytest.mark.skipif(
    not torch.cuda.is_available(), reason="needs a GPU: the dispatcher sends mixed tensors to its kernels"
)
@pytest.mark.parametrize("name", ["rms_norm", "moe_combine"])
def test_tensors_on_two_devices_are_refused_by_name(name):
    calls = itertools.count()

    def make(*shape, dtype=torch.float32):
        return torch.zeros(shape, dtype=dtype, device="cpu" if next(calls) == 1 else "cuda")

    with pytest.raises(RuntimeError, match=r": expected a tensor on (cpu|cuda:0), as \w+ is: got (cuda:0|cpu)"):
        ONE_PLACE[name](make)


def test_the_public_functions_make_their_results_where_the_inputs_are():
    """Of the MoE path and its gradients: nothing of theirs is made on the CPU."""
    at = {"device": "meta"}
    with Trace() as trace:
        x = torch.randn(6, 16, **at, requires_grad=True)
        logits = torch.randn(6, 4, **at, requires_grad=True)
        routed = ops.route_topk(logits, torch.zeros(4, **at), 2)
        up, down = torch.randn(4, 32, 16, **at, requires_grad=True), torch.randn(4, 16, 16, **at, requires_grad=True)
        y = ops.moe_mlp(x, routed[0], routed[1], up, down)
        w, bias = torch.randn(8, 16, **at, requires_grad=True), torch.randn(8, **at, requires_grad=True)
        norm = ops.rms_norm(y, torch.ones(16, **at, requires_grad=True), 1e-6)
        logp = ops.lm_head_logprob(
            ops.linear(norm, w, bias).repeat(1, 2), up[0], torch.zeros(6, **at, dtype=torch.int64)
        )
        logp.logprob.sum().backward()
    assert {t.grad.device.type for t in (x, logits, up, down, w, bias)} == {"meta"}
    assert [call for call in trace.calls if "cpu" in call] == []


def test_what_the_environment_asks_for_is_what_python_uses(monkeypatch):
    class Core:
        backends = staticmethod(lambda: ["cpu", "cuda"])
        gpu_kernels = staticmethod(lambda backend: ["rms_norm"] if backend == "cuda" else [])

    made = []
    monkeypatch.setattr(runtime, "native", lambda: Core)
    monkeypatch.setattr(torch.library, "register_fake", lambda *args: None)
    monkeypatch.setattr(_library, "on_copies", lambda overload: made.append(overload._schema.name) or overload)
    monkeypatch.setattr(_library, "_TORCH_HAS_GPU", True)
    _library.op("rms_norm"), _library.op("cache_append")
    assert made == ["glmx::cache_append"]
    monkeypatch.setattr(runtime, "settings", runtime.read_settings({"GLMX_BACKEND": "cpu"}))
    _library.op("rms_norm")
    assert made == ["glmx::cache_append", "glmx::rms_norm"], "GLMX_BACKEND=cpu: no kernel of the GPU is used"
    monkeypatch.setattr(_library, "_TORCH_HAS_GPU", False)
    _library.op("rms_norm")
    assert len(made) == 2, "a torch without GPUs has no tensor to copy"
