"""FP8 weights as released: which formats, where their scales are, and the weights they stand for.

Per channel (GLM-4.5, 4.6 and 4.7; compressed-tensors): `X.weight` e4m3 [out, in], `X.weight_scale` [out, 1].
Blocks of 128 x 128 (GLM-5, 5.1, 5.2 and 5.3; `fp8`): `X.weight_scale_inv` [ceil(out / 128), ceil(in / 128)]. It
multiplies, its name notwithstanding; blocks at the edges are partial, so 576 rows have 5 rows of scales.

Of both the weight is bf16(q * scale): the product in fp32, rounded to bf16, whatever dtype the model then has. Which
tensors are quantised is read off the tensors; the lists of exceptions in config.json name modules that do not exist.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from glmx.errors import CheckpointError, UnsupportedError, listed, shown
from glmx.models.safetensors import Entry

BLOCK = 128
DTYPE = "F8_E4M3"
_CHANNEL, _BLOCKS = "_scale", "_scale_inv"  # behind the weight's name
_SCALE_DTYPES = ("F32", "BF16")


def check_config(table: Mapping[str, Any] | None) -> None:
    """Refuses a `quantization_config` other than the two released ones."""
    if table is None:
        return
    method = table.get("quant_method")
    if method == "fp8":
        _only(table, "fmt", None, "e4m3")
        _only(table, "activation_scheme", None, "dynamic")
        _only(table, "weight_block_size", [BLOCK, BLOCK])
    elif method == "compressed-tensors":
        _only(table, "format", None, "float-quantized")
        _only(table, "kv_cache_scheme", None)
        groups = table.get("config_groups")
        for group in groups.values() if isinstance(groups, dict) else [groups]:
            weights = group.get("weights") if isinstance(group, dict) else group
            if not isinstance(weights, dict):
                raise UnsupportedError(
                    f"config.json: quantization_config: weights = {shown(weights)} is not supported, only an object"
                )
            _only(weights, "type", "float")
            _only(weights, "num_bits", 8)
            _only(weights, "strategy", "channel")
            _only(weights, "symmetric", None, True)
    else:
        raise UnsupportedError(
            f"config.json: quantization_config: quant_method = {shown(method)} is not supported, "
            "only 'fp8' and 'compressed-tensors'"
        )


def _only(table: Mapping[str, Any], key: str, *allowed: Any) -> None:
    value = table.get(key)
    if not any(type(value) is type(one) and value == one for one in allowed):
        raise UnsupportedError(
            f"config.json: quantization_config: {key} = {shown(value)} is not supported, only {allowed[-1]!r}"
        )


def scales(headers: Mapping[str, Entry]) -> dict[str, str]:
    """FP8 weight -> the tensor of its scales, checked against each other.

    Raises CheckpointError for scales that are missing or misshapen, UnsupportedError for FP8 that is no matrix.
    """
    out = {}
    for key, weight in headers.items():
        if weight.dtype != DTYPE:
            continue
        if len(weight.shape) != 2 or not key.endswith(".weight"):
            raise UnsupportedError(f"tensor {listed([key])} is {DTYPE} {list(weight.shape)}, only matrices are")
        found = [key + suffix for suffix in (_CHANNEL, _BLOCKS) if key + suffix in headers]
        if len(found) != 1:
            what = "both" if found else "neither"
            raise CheckpointError(
                f"tensor {listed([key])} is {DTYPE}: expected its {_CHANNEL} or its {_BLOCKS}, found {what}"
            )
        (name,) = found
        rows, columns = weight.shape
        shape = (rows, 1) if name.endswith(_CHANNEL) else (-(-rows // BLOCK), -(-columns // BLOCK))
        scale = headers[name]
        if scale.shape != shape:
            raise CheckpointError(
                f"tensor {listed([name])} has shape {shown(list(scale.shape))}, expected {list(shape)} "
                f"for a weight of {list(weight.shape)}"
            )
        if scale.dtype not in _SCALE_DTYPES:
            raise UnsupportedError(f"tensor {listed([name])} is {scale.dtype}, only {', '.join(_SCALE_DTYPES)} are")
        out[key] = name
    return out


def row_scales(scale: torch.Tensor, name: str, first: int, weight: torch.Tensor) -> torch.Tensor:
    """fp32, of a shape that multiplies `weight` [rows, columns], which is rows [first, first + rows) of its matrix."""
    rows, columns = weight.shape
    if name.endswith(_CHANNEL):
        return scale[first : first + rows].float()
    block_of_row = torch.arange(first, first + rows) // BLOCK
    return scale.float()[block_of_row].repeat_interleave(BLOCK, dim=1)[:, :columns]


def dequantised(weight: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """e4m3 [rows, columns] and `row_scales` -> bf16(q * scale)."""
    return weight.float().mul_(scale).bfloat16()


def rounds_to(copy: torch.Tensor, original: torch.Tensor, scale: torch.Tensor) -> bool:
    """Whether `copy` (dequantised, with its scales) can be `original` quantised: within half a step everywhere.

    e4m3 has three bits behind the point, so half a step is 2^-4 of a value and 2^-10 at the least; twice 2^-8 more
    is for the roundings to bf16 of what was quantised and of the result.
    """
    original = original.float()
    bound = original.abs() * (2**-4 + 2**-7) + scale.abs() * 2**-10
    return bool(((copy.float() - original).abs() <= bound).all())
