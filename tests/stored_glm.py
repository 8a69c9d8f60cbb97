"""Quantised checkpoints, spelled out: values and scales of each format, the weights they stand for, their files."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from glmx.models import checkpoint
from glmx.models.decoder import Decoder
from glmx.models.safetensors import INDEX, SINGLE

FORMATS = ("int8", "int4", "fp8", "fp8_blocks")
E4M3 = torch.float8_e4m3fn


def compressed(format: str, group: dict[str, Any], **inputs: Any) -> dict[str, Any]:
    weights = {"symmetric": True, "dynamic": False, **group}
    inputs = {"input_activations": {"num_bits": 8, "strategy": "token", "dynamic": True, **inputs} if inputs else None}
    groups = {"group_0": {"targets": ["Linear"], "weights": weights, **inputs}}
    return {
        "quant_method": "compressed-tensors",
        "format": format,
        "config_groups": groups,
        "ignore": ["lm_head"],
        "quantization_status": "compressed",
    }


CONFIGS: dict[str, dict[str, Any]] = {
    "int8": compressed("int-quantized", {"num_bits": 8, "type": "int", "strategy": "channel"}, type="int"),
    "int4": compressed("pack-quantized", {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 128}),
    "fp8": compressed("float-quantized", {"num_bits": 8, "type": "float", "strategy": "channel"}, type="float"),
    "fp8_blocks": {
        "quant_method": "fp8",
        "fmt": "e4m3",
        "activation_scheme": "dynamic",
        "weight_block_size": [128, 128],
        "modules_to_not_convert": ["lm_head", "model.layers.0.self_attn.indexers_proj"],
    },
}
_LARGEST = {"int8": 127, "int4": 7.5, "fp8": 448, "fp8_blocks": 448}


def quantised(
    weight: torch.Tensor, format: str, power_of_two: bool = False
) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """({what comes behind the key: tensor}, the bf16 weight they stand for), one block of one scale after the other."""
    rows, columns = weight.shape
    step = {"int8": (1, columns), "fp8": (1, columns), "int4": (1, 128), "fp8_blocks": (128, 128)}[format]
    q, exact = torch.empty(weight.shape), torch.empty(weight.shape, dtype=torch.bfloat16)
    scales = torch.empty(-(-rows // step[0]), -(-columns // step[1]))
    for i in range(scales.shape[0]):
        for j in range(scales.shape[1]):
            block = (slice(i * step[0], (i + 1) * step[0]), slice(j * step[1], (j + 1) * step[1]))
            scale = weight[block].abs().max() / _LARGEST[format]
            scale = scale.log2().ceil().exp2() if power_of_two else scale
            scales[i, j] = scale.bfloat16() if format == "int4" else scale
            q[block] = weight[block] / scales[i, j]
            q[block] = q[block].to(E4M3).float() if "fp8" in format else q[block].round().clamp(-128, 127)
            if format == "int4":
                q[block] = q[block].clamp(-8, 7)
            exact[block] = (q[block] * scales[i, j]).bfloat16()
    if format == "int4":
        words = torch.zeros(rows, -(-columns // 8), dtype=torch.int64)
        for c in range(columns):
            words[:, c // 8] += (q[:, c].long() + 8) << 4 * (c % 8)
        packed = (words - (words >> 31 << 32)).int()
        return {"_packed": packed, "_scale": scales.bfloat16(), "_shape": torch.tensor([rows, columns])}, exact
    values = q.to(torch.int8) if format == "int8" else q.to(E4M3)
    return {"": values, "_scale_inv" if format == "fp8_blocks" else "_scale": scales}, exact


def is_quantised(key: str, format: str) -> bool:
    """What released checkpoints quantise; the indexer's two large matrices where they come in blocks."""
    if ".indexer." in key:
        return format == "fp8_blocks" and key.endswith((".wq_b.weight", ".wk.weight"))
    return key.endswith(("_proj.weight", "_with_mqa.weight")) and "eh_proj" not in key


def write(
    model: Decoder,
    directory: Path,
    format: str,
    change: Callable[[dict[str, torch.Tensor]], Any] = lambda tensors: None,
    *,
    shards: bool = False,
    power_of_two: bool = False,
) -> dict[str, torch.Tensor]:
    """Writes a quantised checkpoint in bf16 -> the tensors that a model of parameters must hold."""
    tensors = load_file(checkpoint.save(model, directory) / SINGLE)
    tensors = {key: tensor.bfloat16() if tensor.dim() > 1 else tensor for key, tensor in tensors.items()}
    expected = dict(tensors)
    for key in [key for key in tensors if format != "bf16" and is_quantised(key, format)]:
        parts, expected[key] = quantised(tensors.pop(key).float(), format, power_of_two)
        tensors |= {key + behind: tensor for behind, tensor in parts.items()}
    change(tensors)
    tensors = {key: tensor.contiguous() for key, tensor in tensors.items()}
    (directory / SINGLE).unlink()
    if shards:  # scales apart from what they scale, and before it
        halves: dict[str, dict[str, torch.Tensor]] = {"a.safetensors": {}, "b.safetensors": {}}
        for key, tensor in tensors.items():
            halves["a.safetensors" if "_scale" in key else "b.safetensors"][key] = tensor
        for name, half in halves.items():
            save_file(half, directory / name)
        index = {"weight_map": {key: name for name, half in halves.items() for key in half}}
        (directory / INDEX).write_text(json.dumps(index))
    else:
        save_file(tensors, directory / SINGLE)
    config = {**model.config.to_dict(), "dtype": "bfloat16"}
    if format != "bf16":
        config["quantization_config"] = CONFIGS[format]
    (directory / "config.json").write_text(json.dumps(config))
    return expected
