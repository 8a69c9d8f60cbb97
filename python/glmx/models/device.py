"""Where a model computes: what --device and glmx.load are given, held against this build and this machine.

"auto" is the CPU: on a GPU attention and the draws of tokens still run on the CPU (docs/device.md), so a GPU is used
where somebody asks for it.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import torch

from glmx import runtime
from glmx.errors import UnsupportedError, shown

if TYPE_CHECKING:
    from glmx.models.config import ModelConfig

CPU = torch.device("cpu")
ON_A_GPU = ("glm4_moe",)  # the model types
_LEAST = (8, 0)  # the compute capability that the kernels begin at


def choose(device: str | torch.device) -> torch.device:
    """The device of "auto", "cpu", "cuda" (torch's current one) or "cuda:N". Raises UnsupportedError, which names what
    is there, where this build or this machine lacks it.
    """
    name = str(device)
    if name in ("auto", "cpu"):
        return CPU
    if not re.fullmatch(r"cuda(:\d{1,4})?", name):
        raise UnsupportedError(f"device {shown(name)}: expected auto, cpu, cuda or cuda:N")
    if runtime.settings.backend not in (None, "auto", "cuda"):
        raise UnsupportedError(f"device '{name}': GLMX_BACKEND={runtime.settings.backend} keeps everything on the cpu")
    if not runtime.native().build_info()["cuda"]:
        raise UnsupportedError(f"device '{name}': this build of glmx has no CUDA backend, only cpu (docs/install.md)")
    if torch.version.cuda is None:
        raise UnsupportedError(f"device '{name}': torch {torch.__version__} is built without CUDA, it has only cpu")
    count = torch.cuda.device_count()
    if not count:
        raise UnsupportedError(f"device '{name}': CUDA finds no GPU on this machine, which leaves cpu")
    try:
        chosen = torch.device(name) if ":" in name else torch.device("cuda", torch.cuda.current_device())
    except RuntimeError as error:  # a driver that is too old for this torch, for one
        raise UnsupportedError(f"device '{name}': {str(error).splitlines()[0]}") from None
    if chosen.index >= count:
        cards = ", ".join(f"cuda:{i} ({torch.cuda.get_device_name(i)})" for i in range(count))
        raise UnsupportedError(f"device '{name}': this machine has {cards}")
    capability = torch.cuda.get_device_capability(chosen)
    if capability < _LEAST:
        words = "compute capability {}.{}, the kernels need {}.{}".format(*capability, *_LEAST)
        raise UnsupportedError(f"device '{name}': {torch.cuda.get_device_name(chosen)} has {words}")
    return chosen


def check_model(device: torch.device, config: ModelConfig) -> None:
    """Raises UnsupportedError for a model that glmx does not compute on `device`."""
    if device.type == "cuda" and config.model_type not in ON_A_GPU:
        raise UnsupportedError(
            f"device '{device}': {config.model_type} runs on cpu so far, on a GPU only {', '.join(ON_A_GPU)} does"
        )


def of_attention(device: torch.device) -> torch.device:
    """Where the rows of a cache lie that belongs to a model on `device`: where attention over them runs.

    There is no such kernel for GPUs yet. With the cache beside the CPU's kernel a step brings over its new rows alone.
    """
    return CPU if device.type == "cuda" else device


def hardware(device: torch.device) -> str:
    """Whose bits a model on `device` computes, as runtime.numerics_id has it: "x86", "sm90"."""
    return "sm{}{}".format(*torch.cuda.get_device_capability(device)) if device.type == "cuda" else "x86"


def words(device: torch.device) -> str:
    """The device and what it is: "cuda:0: NVIDIA H200"."""
    if device.type == "cuda":
        return f"{device}: {torch.cuda.get_device_name(device)}"
    cpu = runtime.describe()["devices"][0]
    return f"{cpu['device']}: {cpu['name']}, threads: {cpu['threads']}"
