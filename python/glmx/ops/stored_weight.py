"""StoredWeight: the weights of a product as a checkpoint stores them, in few bits and where they lie."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor

from glmx.ops._library import differentiated

StoredFormat = Literal["bf16", "int8", "int4", "fp8", "fp8_blocks"]
GROUP = 128  # columns of an int4 weight, and rows and columns of an FP8 block, that share a scale
_ELEMENTS = {
    "bf16": torch.bfloat16,
    "int8": torch.int8,
    "int4": torch.int32,
    "fp8": torch.float8_e4m3fn,
    "fp8_blocks": torch.float8_e4m3fn,
}


class Matrix(NamedTuple):
    """One matrix [rows, K]: its values and their scales, contiguous, in memory of any owner (a mapped file's too)."""

    values: Tensor
    scale: Tensor | None


class StoredWeight:
    """Weights [E, N, K] as E * parts matrices [N / parts, K]; `linear`, `grouped_gemm` and `moe_mlp` take it as w.

    matrices  E * parts of them: with parts == 2 (for silu_mul) an expert's gate rows, then its up rows. By format:
      bf16        values bf16 [rows, K], no scale
      int8        values int8 [rows, K], scale [rows, 1]
      int4        values int32 [rows, ceil(K / 8)]: eight in a word, the first in its lowest bits, each stored as
                  value + 8; scale [rows, ceil(K / 128)], one for 128 columns (compressed-tensors, pack-quantized)
      fp8         values float8_e4m3fn [rows, K], scale [rows, 1]
      fp8_blocks  values float8_e4m3fn [rows, K], scale [ceil(rows / 128), ceil(K / 128)]
    columns   K, where values do not say it (int4); default: as many as they hold.

    Scales are fp32 or bf16, of one dtype. int4 and fp8_blocks stand for the weight bf16(value * scale); int8 and fp8
    for the weight `value`, whose sums are multiplied by the row's scale. Inputs are bf16; there are no gradients.
    Raises ValueError for what is not so. The tensors are kept, and not to be moved or changed.
    """

    def __init__(
        self, format: StoredFormat, matrices: Sequence[Matrix], *, parts: int = 1, columns: int | None = None
    ) -> None:
        if format not in get_args(StoredFormat):
            raise ValueError(f"format: expected one of {', '.join(get_args(StoredFormat))}: got {format!r}")
        if parts not in (1, 2) or not matrices or len(matrices) % parts:
            raise ValueError(
                f"matrices: expected a multiple of parts, which is 1 or 2: got {len(matrices)}, parts is {parts}"
            )
        values = matrices[0].values
        rows, width = values.shape if values.dim() == 2 else (0, 0)
        K = width * (8 if format == "int4" else 1) if columns is None else columns
        scale_dtype = torch.float32 if matrices[0].scale is None else matrices[0].scale.dtype
        if scale_dtype not in (torch.float32, torch.bfloat16):
            raise ValueError(f"scale: expected dtype torch.float32 or torch.bfloat16: got {scale_dtype}")
        value_shape, scale_shape = (rows, -(-K // 8) if format == "int4" else K), _scale_shape(format, rows, K)
        for i, (q, scale) in enumerate(matrices):
            _check(q, f"matrices[{i}].values", _ELEMENTS[format], value_shape)
            if scale_shape is not None:
                _check(scale, f"matrices[{i}].scale", scale_dtype, scale_shape)
            elif scale is not None:
                raise ValueError(f"matrices[{i}].scale: expected None with {format}: got {list(scale.shape)}")
        self.format, self.parts, self.matrices, self.scale_dtype = format, parts, list(matrices), scale_dtype
        self.shape = (len(matrices) // parts, parts * rows, K)
        scales = [0 if m.scale is None else m.scale.data_ptr() for m in matrices]
        addresses = [[m.values.data_ptr() for m in matrices], scales]
        self.table = torch.tensor(addresses, dtype=torch.int64).view(2, -1, parts)
        # As csrc/include/glmx/ops.h and dtype.h count them.
        self.codes = get_args(StoredFormat).index(format), int(scale_dtype == torch.bfloat16)

    def check(self, name: str, x: Tensor, *, parts: int) -> None:
        """ValueError unless x can be multiplied by it."""
        if x.dtype != torch.bfloat16:
            raise ValueError(f"x: expected dtype torch.bfloat16 with stored weights: got {x.dtype}")
        if differentiated(x):
            raise ValueError(f"{name}: stored weights have no gradient, x requires one: load them dequantized")
        if self.parts != parts:
            what = "gate and up apart, for silu_mul" if parts == 2 else "one matrix an expert"
            raise ValueError(f"{name}: expected parts == {parts} ({what}): got {self.parts}")

    @property
    def nbytes(self) -> int:
        """Bytes of values and scales."""
        return sum(q.nbytes + (0 if scale is None else scale.nbytes) for q, scale in self.matrices)

    def __reduce__(self) -> tuple[Any, ...]:
        """A copy, or what is unpickled, has the addresses of its own tensors."""
        make = functools.partial(StoredWeight, parts=self.parts, columns=self.shape[2])
        return make, (self.format, self.matrices)

    def __repr__(self) -> str:
        return f"StoredWeight({self.format}, {list(self.shape)}, parts={self.parts})"


def _scale_shape(format: StoredFormat, rows: int, columns: int) -> tuple[int, int] | None:
    groups = -(-columns // GROUP)
    if format == "bf16":
        return None
    if format == "int4":
        return rows, groups
    return (-(-rows // GROUP), groups) if format == "fp8_blocks" else (rows, 1)


def _check(tensor: Tensor | None, name: str, dtype: torch.dtype, shape: tuple[int, int]) -> None:
    if tensor is None:
        raise ValueError(f"{name}: expected a tensor of shape {list(shape)}: got None")
    if tensor.dtype != dtype or tensor.shape != shape or not min(shape):
        raise ValueError(f"{name}: expected {dtype} {list(shape)}: got {tensor.dtype} {list(tensor.shape)}")
    if tensor.device.type != "cpu" or not tensor.is_contiguous():
        raise ValueError(f"{name}: expected a contiguous CPU tensor: got {tensor.device}, strides {tensor.stride()}")
