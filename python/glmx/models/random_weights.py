"""Checkpoints of random weights of any shape, written without being held: for benchmarks and capacity tests."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import torch

from glmx.jsonfile import read_json
from glmx.models import compressed, layout
from glmx.models.checkpoint import SHARD_BYTES, resolve
from glmx.models.compressed import Format
from glmx.models.config import ModelConfig
from glmx.models.fill import Progress
from glmx.models.safetensors import Planned, StreamedFiles, check_free

_BLOCK = 2**25  # values, or bytes; long against a matrix's rows, so that no two rows of one are alike
_STRIDE = 8191 * 64  # values between the places that two tensors begin at; the block's length is no multiple of it
# Of the integers -8 .. 7 and -128 .. 127, all as likely: ((n^2 - 1) / 12)^0.5. By the dtype of their scales.
_STD = {torch.bfloat16: 4.61, torch.float32: 73.9}


def read_config(path: str | Path) -> tuple[dict[str, Any], ModelConfig, Path]:
    """What a config.json holds, the shape that it describes, and its directory; `path` names it or the directory.

    How its weights are quantised plays no part. Raises CheckpointError and UnsupportedError.
    """
    file = Path(path) if Path(path).is_file() else resolve(path) / "config.json"
    raw = read_json(file)
    return raw, ModelConfig.from_dict({**raw, "quantization_config": None}), file.parent


def write(
    config: ModelConfig,
    directory: Path,
    to: Format | Literal["bf16"],
    *,
    seed: int = 0,
    max_shard_bytes: int = SHARD_BYTES,
) -> int:
    """Fills `directory` with the safetensors files of a model; returns their bytes.

    Matrices have standard deviation initializer_range: bf16 ones are normal, values of int4 and int8 are all as likely.
    Norms are ones, biases and correction biases zeros. One block of random values serves all tensors, each from another
    place: as fast as the disk, and no source of randomness. Raises CheckpointError for a full disk.
    """
    groups = (_planned(key, shape, to) for key, shape in layout.tensors(config))
    files = StreamedFiles(directory, groups, max_shard_bytes)
    check_free(directory, files.total)
    noise = _Noise(config.initializer_range, seed)
    with files, Progress(files.total, word="writing") as progress:
        for key, shape in layout.tensors(config):
            for tensor in _planned(key, shape, to):
                for piece in noise.pieces(tensor, shape):
                    files.write(tensor.name, piece)
                    progress.add(piece.nbytes)
    return files.total


def _planned(key: str, shape: tuple[int, ...], to: Format | Literal["bf16"]) -> list[Planned]:
    if to != "bf16" and compressed.is_quantised(key):
        return compressed.planned(key, shape, to)
    return [Planned(key, torch.float32 if key.endswith(layout.CORRECTION_BIAS) else torch.bfloat16, shape)]


class _Noise:
    """The contents of tensors, out of two blocks: of normal bf16 values, and of random bytes."""

    def __init__(self, std: float, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        self._std, self._at = std, 0
        self._normal = torch.empty(_BLOCK, dtype=torch.bfloat16)
        for part in self._normal.split(_BLOCK // 16):  # in fp32 the block would take twice its size again
            part.copy_(torch.empty(len(part)).normal_(0.0, std, generator=generator))
        words = torch.empty(_BLOCK // 8, dtype=torch.int64)
        self._bytes = words.random_(-(2**63), None, generator=generator).view(torch.uint8)

    def pieces(self, tensor: Planned, shape: tuple[int, ...]) -> Iterator[torch.Tensor]:
        """A tensor that stands for a matrix or vector of `shape`, a block or less at a time."""
        name, dtype = tensor.name, tensor.dtype
        if name.endswith(".weight_shape"):
            yield torch.tensor(shape)
        elif name.endswith(".weight_scale"):
            yield torch.full(tensor.shape, self._std / _STD[dtype], dtype=dtype)
        elif len(shape) == 1:
            yield torch.full(shape, 1.0 if name.endswith("norm.weight") else 0.0, dtype=dtype)
        else:
            block = self._normal if dtype == torch.bfloat16 else self._bytes.view(dtype)
            left = math.prod(tensor.shape)
            while left:
                start = self._at % len(block)
                piece = block[start : start + left]
                self._at += _STRIDE
                left -= len(piece)
                yield piece
