"""Checkpoints with weights in few bits, and models that use them in place."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from stored import StoredFormat, rounded

import glmx
from glmx.models import checkpoint
from glmx.models.decoder import Decoder
from glmx.models.safetensors import SINGLE
from stored_glm import CONFIGS, is_quantised


def write(model: Decoder, directory: Path, format: StoredFormat) -> None:
    """A small model's checkpoint, rounded to nearest: the projections, as released checkpoints do."""
    file = checkpoint.save(model, directory) / SINGLE
    tensors = load_file(file)
    for key in [key for key in tensors if is_quantised(key, format)]:
        weight = tensors.pop(key)
        values, scale = rounded(format, weight)
        assert scale is not None
        if format == "int4":
            tensors |= {key + "_packed": values, key + "_shape": torch.tensor(weight.shape)}
        else:
            tensors[key] = values
        tensors[key + ("_scale_inv" if format == "fp8_blocks" else "_scale")] = scale
    file.unlink()  # what was loaded lies in it
    save_file(tensors, file)
    config = directory / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "quantization_config": CONFIGS[format]}))


def in_format(model: Decoder, format: StoredFormat) -> Decoder:
    """The model from such a checkpoint, whose file is gone afterwards: it stays mapped."""
    with tempfile.TemporaryDirectory() as folder:
        write(model, Path(folder, "model"), format)
        return glmx.load(Path(folder, "model"), mapped=True)
