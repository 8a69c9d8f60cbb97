"""A checkpoint of bf16, fp32, fp16 or FP8 weights, rewritten with int8 or int4 ones: matrix by matrix, file to file.

What is quantised, and how, is `compressed`'s; the rest is copied. With a calibration the matrices are rounded for least
error of their outputs (`calibrate`), for which the bf16 model is loaded whole; without, a few matrices are all that is
ever held.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch

from glmx.errors import CheckpointError, UnsupportedError, shown
from glmx.jsonfile import read_json
from glmx.models import calibrate, compressed, stored
from glmx.models.checkpoint import (
    SHARD_BYTES,
    TOKENIZER_FILES,
    copy_files,
    load,
    opened,
    resolve,
    views,
    write_json,
    writing,
)
from glmx.models.compressed import Format
from glmx.models.config import ModelConfig
from glmx.models.decoder import Decoder
from glmx.models.fill import Progress
from glmx.models.safetensors import Planned, StreamedFiles, check_free

REPORT = "quantization.json"
_PIECE = 2**20  # values of a copied tensor that are held at a time
_COPIES = {".shared_head.head.weight": "lm_head.weight", ".embed_tokens.weight": "model.embed_tokens.weight"}
_DTYPES = {"BF16": torch.bfloat16, "F32": torch.float32, "F16": torch.float16, "F8_E4M3": torch.bfloat16}


class Calibration(NamedTuple):
    """ids int64 [T] to calibrate on, about `tokens` of them, and what is measured of the model before and after."""

    ids: torch.Tensor
    tokens: int
    bits_per_byte: Callable[[Decoder], float]


@dataclass
class Error:
    """Squares summed over matrices: of weights and what they lost, of outputs and what they lost."""

    weights: float = 0.0
    weights_lost: float = 0.0
    outputs: float = 0.0
    outputs_lost: float = 0.0

    def add(self, weight: torch.Tensor, lost: torch.Tensor, moments: calibrate.Moments | None) -> None:
        self.weights += _norm2(weight)
        self.weights_lost += _norm2(lost)
        if moments is not None:
            self.outputs += moments.norm2(weight)
            self.outputs_lost += moments.norm2(lost)

    def relative(self) -> dict[str, float]:
        """||W - Wq|| / ||W||, and with a calibration the same of outputs, root mean square over its text."""
        out = {"weights": math.sqrt(self.weights_lost / self.weights) if self.weights else 0.0}
        if self.outputs:
            out["outputs"] = math.sqrt(max(self.outputs_lost, 0.0) / self.outputs)
        return out

    def __iadd__(self, other: Error) -> Error:
        self.weights += other.weights
        self.weights_lost += other.weights_lost
        self.outputs += other.outputs
        self.outputs_lost += other.outputs_lost
        return self


@dataclass
class Report:
    """errors  layer -> kind of matrix (as its name says, experts' together) -> Error."""

    to: Format
    bytes_before: int = 0
    bytes_after: int = 0
    errors: dict[int, dict[str, Error]] = field(default_factory=dict)
    calibration_tokens: int = 0
    bits_per_byte: tuple[float, float, float] | None = None  # before; rounded to nearest; as written

    def of(self, key: str) -> Error:
        _, _, layer, *parts, _ = key.split(".")
        kind = ".".join(part for part in parts if not part.isdigit())
        return self.errors.setdefault(int(layer), {}).setdefault(kind, Error())

    def total(self) -> Error:
        out = Error()
        for kinds in self.errors.values():
            for error in kinds.values():
                out += error
        return out

    def to_dict(self) -> dict[str, Any]:
        """What quantization.json holds."""
        layers = {
            str(layer): {kind: error.relative() for kind, error in sorted(kinds.items())}
            for layer, kinds in sorted(self.errors.items())
        }
        out: dict[str, Any] = {
            "to": self.to,
            "rounding": "least output error" if self.calibration_tokens else "nearest",
            "bytes": {"before": self.bytes_before, "after": self.bytes_after},
            "relative_error": self.total().relative(),
            "layers": layers,
        }
        if self.calibration_tokens:
            out["calibration_tokens"] = self.calibration_tokens
        if self.bits_per_byte is not None:
            out["bits_per_byte"] = dict(zip(("before", "nearest", "after"), self.bits_per_byte, strict=True))
        return out


class Part(NamedTuple):
    """A tensor of the new checkpoint under its name on disk: rows of a tensor of the source, seen as [rows, last]."""

    name: str
    key: str
    first: int
    shape: tuple[int, ...]


class Source:
    """The checkpoint that is read: its tensors as parts, and their rows as they are meant."""

    def __init__(self, directory: Path) -> None:
        self.raw = read_json(directory / "config.json") if (directory / "config.json").exists() else {}
        _refuse_quantised(self.raw, directory)
        self.config, self.files, self.found = opened(directory, ModelConfig.from_dir(directory))
        if any(how.format in compressed.FORMATS for how in self.found.values()):  # whatever config.json says
            raise UnsupportedError(f"'{directory}' is quantised already, expected bf16, fp32, fp16 or FP8 weights")
        used_up = {how.scale for how in self.found.values()}
        self.parts = [part for key in self.files.in_order() if key not in used_up for part in self._parts(key)]
        self.size = sum(entry.end - entry.start for entry in self.files.headers.values())

    def _parts(self, key: str) -> Iterator[Part]:
        """A tensor as it is; fused experts taken apart."""
        shape = self.files.headers[key].shape
        if len(shape) != 3:
            yield Part(key, self._original(key), 0, shape)
            return
        prefix, _, name = key.rpartition(".")
        E, rows, K = shape
        names = ("gate_proj", "up_proj") if name == "gate_up_proj" else (name,)
        rows //= len(names)
        for e in range(E):
            for i, one in enumerate(names):
                yield Part(f"{prefix}.{e}.{one}.weight", key, (e * len(names) + i) * rows, (rows, K))

    def _original(self, key: str) -> str:
        """Where the MTP layer's copy of the head or embedding is FP8, its rounding: what it copies. Else the key."""
        for end, original in _COPIES.items():
            if key in self.found and key.endswith(end) and key != original:
                return original if original in self.files.keys else "model.embed_tokens.weight"
        return key

    def dtype(self, part: Part) -> torch.dtype:
        """Of a part that is copied."""
        if self.config.dtype == "float32" and ".mlp.gate." not in part.key:
            return torch.bfloat16
        return _DTYPES[self.files.headers[part.key].dtype]

    def rows(self, part: Part, first: int = 0, count: int | None = None) -> torch.Tensor:
        """Rows of a part; of FP8 the bf16 weights that they stand for."""
        first, count = part.first + first, math.prod(part.shape[:-1]) if count is None else count
        rows, how = self.files.rows(part.key, first, count), self.found.get(part.key)
        if how is None:
            return rows
        return stored.dequantised(how, rows, stored.row_scales(how, self.files.tensor(how.scale), first, count))


def quantize(
    source: str | Path,
    target: str | Path,
    to: Format,
    calibration: Callable[[Path, ModelConfig], Calibration] | None = None,
    *,
    max_shard_bytes: int = SHARD_BYTES,
) -> Report:
    """Writes `target`: the checkpoint `source` with int8 or int4 matrices, quantization.json, and its tokenizer files.

    `calibration` is made when source and target are known to be good, from the source's directory and config. The
    target is complete or absent, as with `checkpoint.save`. A model of dtype float32 becomes one of bfloat16: int4 and
    int8 are defined with bf16 inputs; its routers and correction biases stay fp32. Raises CheckpointError and
    UnsupportedError, ValueError for another `to`.
    """
    if to not in compressed.FORMATS:
        raise ValueError(f"to is {shown(to)}, expected {' or '.join(compressed.FORMATS)}")
    directory = resolve(source)
    old = Source(directory)
    planned = [_planned(part, old, to) for part in old.parts]
    report = Report(to, old.size, sum(tensor.nbytes for group in planned for tensor in group))
    with writing(target) as temporary:
        check_free(temporary, report.bytes_after)
        write_json(temporary / "config.json", config_json(old.raw, to))
        if calibration is None:
            _rewrite(old, StreamedFiles(temporary, planned, max_shard_bytes), None, report)
        else:
            asked = calibration(directory, old.config)
            model = load(directory, dtype=torch.bfloat16, dequantize=True)
            before = asked.bits_per_byte(model)
            windows = calibrate.windows(asked.ids, asked.tokens)
            report.calibration_tokens = sum(map(len, windows))
            inputs = calibrate.Inputs(model, windows)
            _rewrite(old, StreamedFiles(temporary, planned, max_shard_bytes), inputs, report)
            _round_to_nearest(model, old, to)
            nearest = asked.bits_per_byte(model)
            report.bits_per_byte = before, nearest, asked.bits_per_byte(load(temporary, mapped=True))
        write_json(temporary / REPORT, report.to_dict())
        copy_files((*TOKENIZER_FILES, "generation_config.json"), directory, temporary)
    return report


def config_json(raw: dict[str, Any], to: Format | Literal["bf16"]) -> dict[str, Any]:
    """A config.json's content for weights in bf16, int8 or int4."""
    dropped = ("quantization_config", "torch_dtype")
    out = {key: value for key, value in raw.items() if key not in dropped} | {"dtype": "bfloat16"}
    return out if to == "bf16" else {**out, "quantization_config": compressed.config(to)}


def _refuse_quantised(raw: dict[str, Any], directory: Path) -> None:
    table = raw.get("quantization_config")
    form = table.get("format") if isinstance(table, dict) else None
    if form in compressed.FORM.values():
        raise UnsupportedError(
            f"'{directory}' is quantised already (config.json: quantization_config: format = {form!r}), "
            "expected bf16, fp32, fp16 or FP8 weights"
        )


def _planned(part: Part, source: Source, to: Format) -> list[Planned]:
    if compressed.is_quantised(part.name):
        return compressed.planned(part.name, part.shape, to)
    return [Planned(part.name, source.dtype(part), part.shape)]


@torch.no_grad()
def _rewrite(source: Source, files: StreamedFiles, inputs: calibrate.Inputs | None, report: Report) -> None:
    with source.files, files, Progress(files.total, word="quantising") as progress:
        for part in source.parts:
            if compressed.is_quantised(part.name):
                contents = _quantised(source.rows(part).float(), part.name, inputs, report)
                for tensor, content in zip(_planned(part, source, report.to), contents, strict=True):
                    files.write(tensor.name, content)
                    progress.add(content.nbytes)
                continue
            step, rows = max(1, _PIECE // max(part.shape[-1], 1)), math.prod(part.shape[:-1])
            for first in range(0, rows, step):
                piece = source.rows(part, first, min(step, rows - first)).to(source.dtype(part))
                files.write(part.name, piece)
                progress.add(piece.nbytes)


def _quantised(weight: torch.Tensor, name: str, inputs: calibrate.Inputs | None, report: Report) -> list[torch.Tensor]:
    """The contents that stand for a matrix fp32 [rows, K]; its error goes into the report."""
    bad = weight.numel() - int(weight.isfinite().sum())
    if bad:
        raise CheckpointError(f"tensor {name}: {bad} of its {weight.numel()} values are NaN or infinite")
    moments = None if inputs is None else inputs.moments(name)
    if moments is None:
        quantised = compressed.rounded(weight, report.to)
    else:
        quantised = calibrate.compensated(weight, moments, report.to)
    report.of(name).add(weight, compressed.dequantised(quantised, report.to).sub_(weight), moments)
    return compressed.tensors(quantised, report.to)


@torch.no_grad()
def _round_to_nearest(model: Decoder, source: Source, to: Format) -> None:
    """The model of bf16 parameters gets bf16(q * scale)."""
    held = views(model)
    with source.files:
        for part in source.parts:
            if compressed.is_quantised(part.name):
                held[part.name].copy_(compressed.dequantised(compressed.rounded(source.rows(part).float(), to), to))


def _norm2(x: torch.Tensor) -> float:
    return float(torch.linalg.vector_norm(x)) ** 2
