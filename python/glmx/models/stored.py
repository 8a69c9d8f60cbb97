"""What a checkpoint stores of its weights, and how: which are kept in few bits, under which keys, what they stand for.

A weight X of [rows, columns] is, with the names that released checkpoints have (compressed-tensors, and `fp8`):

  int8        `X.weight` I8 [rows, columns], `X.weight_scale` [rows, 1]
  int4        `X.weight_packed` I32 [rows, ceil(columns / 8)], `X.weight_scale` [rows, ceil(columns / 128)],
              `X.weight_shape` [2]: rows, columns
  fp8         `X.weight` e4m3 [rows, columns], `X.weight_scale` [rows, 1]: GLM-4.5, 4.6 and 4.7
  fp8_blocks  `X.weight` e4m3 [rows, columns], `X.weight_scale_inv` [ceil(rows / 128), ceil(columns / 128)]: GLM-5,
              5.1, 5.2 and 5.3. It multiplies, its name notwithstanding; blocks at the edges are partial

ops.StoredWeight computes with them as they are. As a Parameter the weight is bf16(q * scale): the product in fp32,
rounded to bf16, whatever dtype the model then has. Which tensors are quantised is read off the tensors; the lists of
exceptions in config.json name modules that do not exist.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from glmx.errors import CheckpointError, UnsupportedError, listed, shown
from glmx.models.safetensors import Entry, Files

if TYPE_CHECKING:
    from glmx.ops.stored_weight import StoredFormat

GROUP = 128  # columns of an int4 weight, and rows and columns of an FP8 block, that share a scale
_ONE_PER_ROW, _BLOCKS = "_scale", "_scale_inv"  # behind the weight's name
_PACKED, _SHAPE = "_packed", "_shape"
_REFUSED = {"_zero_point": "asymmetric weights are", "_g_idx": "weights whose groups are listed (actorder) are"}
_SCALE_DTYPES = ("F32", "BF16")
_LARGEST = {"int8": 128, "int4": 8, "fp8": 448, "fp8_blocks": 448}
_COMPRESSED: dict[str, tuple[StoredFormat, str, int, str, tuple[int | None, ...]]] = {
    # format -> the other name, and what its config_groups say: type, num_bits, strategy, group_size
    "int-quantized": ("int8", "int", 8, "channel", (-1, None)),
    "pack-quantized": ("int4", "int", 4, "group", (GROUP,)),
    "float-quantized": ("fp8", "float", 8, "channel", (-1, None)),
}


class Stored(NamedTuple):
    """A weight in few bits: the tensors that hold it, and the shape [rows, columns] of what they stand for."""

    format: StoredFormat
    values: str
    scale: str
    shape: tuple[int, int]

    @property
    def keys(self) -> set[str]:
        """Every tensor of it."""
        more = {self.values.removesuffix(_PACKED) + _SHAPE} if self.format == "int4" else set()
        return {self.values, self.scale} | more


# config.json
def check_config(table: Mapping[str, Any] | None) -> StoredFormat | None:
    """The format that a `quantization_config` describes; refuses any other than the four."""
    if table is None:
        return None
    method = table.get("quant_method")
    if method == "fp8":
        _only(table, "fmt", None, "e4m3")
        _only(table, "activation_scheme", None, "dynamic")
        _only(table, "weight_block_size", [GROUP, GROUP])
        return "fp8_blocks"
    if method != "compressed-tensors":
        raise UnsupportedError(
            f"config.json: quantization_config: quant_method = {shown(method)} is not supported, "
            "only 'fp8' and 'compressed-tensors'"
        )
    name = "float-quantized" if table.get("format") is None else table["format"]
    _only({"format": name}, "format", *_COMPRESSED)
    for key in ("kv_cache_scheme", "sparsity_config", "transform_config"):
        _only(table, key, {}, None)
    format, kind, bits, strategy, group_sizes = _COMPRESSED[name]
    groups = table.get("config_groups")
    for group in groups.values() if isinstance(groups, dict) else [groups]:
        weights = group.get("weights") if isinstance(group, dict) else group
        if not isinstance(group, dict) or not isinstance(weights, dict):
            raise UnsupportedError(
                f"config.json: quantization_config: weights = {shown(weights)} is not supported, only an object"
            )
        _only(weights, "type", kind)
        _only(weights, "num_bits", bits)
        _only(weights, "strategy", strategy)
        _only(weights, "group_size", *group_sizes)
        _only(weights, "symmetric", None, True)
        _only(weights, "actorder", "static", "weight", None)  # of calibration: they leave the columns in their order
        _only(weights, "dynamic", None, False)
        _only(group, "format", None, name)
        # Inputs quantised at run time are an engine's way to be fast, and nothing in the checkpoint depends on it.
        inputs = group.get("input_activations")
        if inputs is not None:
            _only(inputs if isinstance(inputs, dict) else {"dynamic": inputs}, "dynamic", True)
        _only(group, "output_activations", None)
    return format


def _only(table: Mapping[str, Any], key: str, *allowed: Any) -> None:
    value = table.get(key)
    if not any(type(value) is type(one) and value == one for one in allowed):
        several = len(allowed) > 2 and None not in allowed
        supported = ", ".join(map(repr, allowed)) if several else repr(allowed[-1])
        raise UnsupportedError(
            f"config.json: quantization_config: {key} = {shown(value)} is not supported, only {supported}"
        )


def quantises(key: str, format: StoredFormat) -> bool:
    """Whether released checkpoints of a format keep the tensor `key` of layout.tensors in few bits."""
    if ".indexer." in key:
        return format == "fp8_blocks" and key.endswith((".wq_b.weight", ".wk.weight"))
    return key.endswith(("_proj.weight", "_proj_with_mqa.weight")) and not key.endswith("eh_proj.weight")


def stays(key: str) -> bool:
    """Whether an op computes with the weight `key` as it is stored. head_gemm does not, with kv_b_proj; nor does what
    reads embeddings and the head.
    """
    linear = key.endswith(("_proj.weight", "_proj_with_mqa.weight", ".wq_b.weight", ".wk.weight"))
    return linear and not key.endswith("kv_b_proj.weight")


def nbytes(format: StoredFormat, rows: int, columns: int) -> int:
    """Bytes of a weight's values, and of its scales as they are most often stored: bf16 with int4, else fp32."""
    groups = -(-columns // GROUP)
    if format == "bf16":
        return 2 * rows * columns
    if format == "int4":
        return 4 * rows * -(-columns // 8) + 2 * rows * groups
    return rows * columns + 4 * (-(-rows // GROUP) * groups if format == "fp8_blocks" else rows)


# The tensors
def find(files: Files) -> dict[str, Stored]:
    """Weight `X.weight` -> how the files hold it, for those in few bits, their tensors checked against each other.

    Raises CheckpointError for tensors that are missing, misshapen or contradict each other, UnsupportedError for a
    scheme that is none of the four.
    """
    out = {}
    with files:
        for key in files.in_order():
            entry = files.headers[key]
            for suffix, words in _REFUSED.items():
                if key.endswith(".weight" + suffix):
                    raise UnsupportedError(f"tensor {listed([key])}: {words} not supported")
            if key.endswith(".weight" + _PACKED):
                weight = key.removesuffix(_PACKED)
                out[weight] = _packed(weight, entry, files)
            elif entry.dtype == "F8_E4M3":
                out[key] = _eight_bits(key, entry, files, (_ONE_PER_ROW, _BLOCKS))
            elif entry.dtype == "I8" and len(entry.shape) == 2 and key.endswith(".weight"):
                out[key] = _eight_bits(key, entry, files, (_ONE_PER_ROW,))
    return out


def _eight_bits(key: str, entry: Entry, files: Files, suffixes: tuple[str, ...]) -> Stored:
    if len(entry.shape) != 2 or not key.endswith(".weight"):
        raise UnsupportedError(f"tensor {listed([key])} is {entry.dtype} {list(entry.shape)}, only matrices are")
    found = [key + suffix for suffix in suffixes if key + suffix in files.headers]
    if len(found) != 1:
        what = "both" if found else "neither" if len(suffixes) == 2 else "none"
        expected = " or its ".join(suffixes)
        raise CheckpointError(f"tensor {listed([key])} is {entry.dtype}: expected its {expected}, found {what}")
    rows, columns = entry.shape
    blocks = found[0].endswith(_BLOCKS)
    _check_scale(found[0], files, (-(-rows // GROUP), -(-columns // GROUP)) if blocks else (rows, 1), (rows, columns))
    format: StoredFormat = "int8" if entry.dtype == "I8" else "fp8_blocks" if blocks else "fp8"
    return Stored(format, key, found[0], (rows, columns))


def _packed(weight: str, entry: Entry, files: Files) -> Stored:
    key, scale, shape_key = (weight + suffix for suffix in (_PACKED, _ONE_PER_ROW, _SHAPE))
    if weight in files.headers:
        raise CheckpointError(f"tensors {listed([weight, key])} are both there, expected one of them")
    if entry.dtype != "I32" or len(entry.shape) != 2:
        raise UnsupportedError(f"tensor {listed([key])} is {entry.dtype} {list(entry.shape)}, only I32 matrices are")
    absent = [name for name in (scale, shape_key) if name not in files.headers]
    if absent:
        raise CheckpointError(f"tensor {listed([key])} lacks {listed(absent)} beside it")
    told = files.headers[shape_key]
    if told.dtype not in ("I64", "I32") or told.shape != (2,):
        raise UnsupportedError(f"tensor {listed([shape_key])} is {told.dtype} {list(told.shape)}, only I64 [2] is")
    rows, columns = files.tensor(shape_key).tolist()
    if rows < 1 or columns < 1 or entry.shape != (rows, -(-columns // 8)):
        raise CheckpointError(
            f"tensor {listed([shape_key])} is {[rows, columns]}, which {listed([key])} of {list(entry.shape)} is not: "
            "it holds eight columns in a word"
        )
    _check_scale(scale, files, (rows, -(-columns // GROUP)), (rows, columns))
    return Stored("int4", key, scale, (rows, columns))


def _check_scale(name: str, files: Files, shape: tuple[int, int], weight: tuple[int, int]) -> None:
    scale = files.headers[name]
    if scale.shape != shape:
        raise CheckpointError(
            f"tensor {listed([name])} has shape {shown(list(scale.shape))}, expected {list(shape)} "
            f"for a weight of {list(weight)}"
        )
    if scale.dtype not in _SCALE_DTYPES:
        raise UnsupportedError(f"tensor {listed([name])} is {scale.dtype}, only {', '.join(_SCALE_DTYPES)} are")


# What they stand for
def row_scales(how: Stored, scale: torch.Tensor, first: int, count: int) -> torch.Tensor:
    """fp32, of a shape that multiplies the rows [first, first + count) of the weight."""
    if how.format in ("int8", "fp8"):
        return scale[first : first + count].float()
    row = torch.arange(first, first + count)
    groups = scale[row if how.format == "int4" else row // GROUP].float()
    return groups.repeat_interleave(GROUP, dim=1)[:, : how.shape[1]]


def numbers(how: Stored, values: torch.Tensor) -> torch.Tensor:
    """Rows of stored values -> fp32 [rows, columns]."""
    if how.format != "int4":
        return values.float()
    bytes_ = values.view(torch.uint8)  # two values each, the first in its lower half
    out = torch.empty(*bytes_.shape, 2, dtype=torch.float32)
    torch.sub(bytes_ & 15, 8.0, out=out[..., 0])
    torch.sub(bytes_ >> 4, 8.0, out=out[..., 1])
    return out.flatten(1)[:, : how.shape[1]]


def dequantised(how: Stored, values: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Rows of stored values and their `row_scales` -> bf16(q * scale)."""
    return numbers(how, values).mul_(scale).bfloat16()


def rounds_to(how: Stored, copy: torch.Tensor, original: torch.Tensor, scale: torch.Tensor) -> bool:
    """Whether `copy` (dequantised, with its scales) can be `original` quantised: within half a step everywhere.

    A step of integers is their scale. e4m3 has three bits behind the point, so half a step is 2^-4 of a value and
    2^-10 at the least. Twice 2^-8 more is for the roundings to bf16 of what was quantised and of the result.
    """
    original = original.float()
    relative, least = (0.0, 0.5) if how.format in ("int4", "int8") else (2**-4, 2**-10)
    bound = original.abs() * (relative + 2**-7) + scale.abs() * least
    return bool(((copy.float() - original).abs() <= bound).all())


def not_finite(format: StoredFormat, tensor: torch.Tensor, *, scale: bool) -> int:
    """How many of a StoredWeight's values, or of its scales, stand for weights that are no numbers."""
    if scale:
        return tensor.numel() - int((tensor.float() * _LARGEST[format]).bfloat16().isfinite().sum())
    return 0 if format in ("int8", "int4") else tensor.numel() - int(tensor.float().isfinite().sum())
