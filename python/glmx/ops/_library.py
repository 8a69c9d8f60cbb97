"""Loads the compiled op library once, and the helpers every op module shares."""

from __future__ import annotations

import pathlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from glmx import runtime
from glmx.errors import MissingLibraryError

_LIBRARY = pathlib.Path(__file__).resolve().parent.parent / "libglmx_torch.so"


def _load() -> None:
    if not _LIBRARY.exists():
        raise MissingLibraryError(_LIBRARY.name)
    runtime.native()  # a wrong GLMX_ISA is an error here, before any op runs
    torch.ops.load_library(str(_LIBRARY))


_load()


def op(name: str) -> Callable[..., None]:
    """The out-variant op `torch.ops.glmx.<name>`: outputs lead, nothing is returned. Bad arguments raise ValueError.

    Where it has no kernel for tensors on a GPU, the CPU's runs on copies of them.
    """
    overload = getattr(torch.ops.glmx, name).default
    torch.library.register_fake(f"glmx::{name}", lambda *args, **kwargs: None)
    gpu = runtime.gpu_backend()
    copies = _TORCH_HAS_GPU and (gpu is None or name not in runtime.native().gpu_kernels(gpu))
    run = on_copies(overload) if copies else overload

    def call(*args: Any) -> None:
        try:
            run(*args)
        except RuntimeError as error:
            raise ValueError(str(error).split("\n", 1)[0]) from None

    return _logged(name, call, "copies" if copies else gpu) if runtime.settings.log_kernels else call


_TORCH_HAS_GPU = torch.version.cuda is not None or torch.version.hip is not None


def _on_gpu(arg: Any) -> bool:
    return isinstance(arg, Tensor) and arg.is_cuda  # torch says so of AMD's cards too


def on_copies(overload: Any) -> Callable[..., None]:
    """The op for tensors on a GPU that it has no kernel for: all are copied to the CPU, and what it writes is copied
    back. Slow, and exact.
    """
    written = [i for i, arg in enumerate(overload._schema.arguments) if arg.alias_info and arg.alias_info.is_write]

    def run(*args: Any) -> None:
        if not any(map(_on_gpu, args)):
            return overload(*args)
        copies = [arg.cpu() if _on_gpu(arg) else arg for arg in args]
        overload(*copies)
        for i in written:
            if _on_gpu(args[i]):
                args[i].copy_(copies[i])

    return run


def _logged(name: str, call: Callable[..., None], gpu: str | None) -> Callable[..., None]:
    """GLMX_LOG=kernels: names the kernel at the first call with each dtype, on the CPU and on a GPU (`gpu`: whose)."""
    seen: set[tuple[str, str | None]] = set()
    cpu = "simt" if name in runtime.native().gpu_kernels("simt") else "cpu"

    def logged(*args: Any) -> None:
        bf16 = any(isinstance(arg, Tensor) and arg.dtype is torch.bfloat16 for arg in args)
        key = "bf16" if bf16 else "fp32", gpu if any(map(_on_gpu, args)) else cpu
        if key not in seen:
            seen.add(key)
            runtime.log_kernel(name, *key)
        call(*args)

    return logged


class _NoGradient:
    """The ctx of a forward that nobody will differentiate: nothing is kept."""

    needs_input_grad = ()

    def save_for_backward(self, *tensors: Tensor | None) -> None: ...

    def mark_non_differentiable(self, *tensors: Tensor) -> None: ...

    def set_materialize_grads(self, value: bool) -> None: ...

    def __setattr__(self, name: str, value: Any) -> None: ...


_NO_GRADIENT = _NoGradient()


def differentiated(*args: Any) -> bool:
    """Whether a gradient to any of these can be asked for."""
    return torch.is_grad_enabled() and any(isinstance(arg, Tensor) and arg.requires_grad for arg in args)


def apply(function: type[torch.autograd.Function], *args: Any) -> Any:
    """function.apply(*args); where no gradient can be asked for, its forward alone, without autograd's bookkeeping.

    That bookkeeping is 15 to 30 us of Python a call, more than most ops take for one token.
    """
    return function.apply(*args) if differentiated(*args) else function.forward(_NO_GRADIENT, *args)


def check_model_dtype(tensor: Tensor, name: str) -> None:
    """fp32 or bf16, else ValueError."""
    if tensor.dtype not in (torch.float32, torch.bfloat16):
        raise ValueError(f"{name}: expected dtype torch.float32 or torch.bfloat16: got {tensor.dtype}")


def check_same_dtype(tensor: Tensor, name: str, dtype: torch.dtype) -> None:
    if tensor.dtype != dtype:
        raise ValueError(f"{name}: expected dtype {dtype}: got {tensor.dtype}")


def check_dim(tensor: Tensor, name: str, dim: int) -> None:
    if tensor.dim() != dim:
        raise ValueError(f"{name}: expected {dim} dimensions: got shape {list(tensor.shape)}")


def weight_gradient(weight: Tensor, accumulate: Callable[[Tensor, bool], None]) -> Tensor | None:
    """The gradient of a parameter from an op that can add into an fp32 buffer.

    `accumulate(out, True)` adds the gradient to `out`; `accumulate(out, False)` writes it. When the trainer owns
    `weight.main_grad` (fp32, the weight's shape) the gradient is added there and autograd gets None; otherwise a
    fresh fp32 gradient is rounded once to the weight's dtype.
    """
    main_grad = getattr(weight, "main_grad", None)
    if main_grad is not None:
        accumulate(main_grad, True)
        return None
    fresh = torch.empty(weight.shape, dtype=torch.float32, device=weight.device)
    accumulate(fresh, False)
    return fresh.to(weight.dtype)
