"""Weights in 4 and 8 bits as glmx writes them: which matrices, their names and layout, and rounding to nearest.

The spelling is compressed-tensors', which vLLM and transformers read too. For a matrix `X.weight` [rows, K]:

  int4  "pack-quantized": `X.weight_packed` I32 [rows, ceil(K / 8)], eight values a word, the first in its lowest bits,
        each stored as value + 8; `X.weight_scale` BF16 [rows, ceil(K / 128)], one scale for 128 columns, the last
        group may be partial; `X.weight_shape` I64 [2]. The weight is bf16(q * scale), q in -8 .. 7.
  int8  "int-quantized": `X.weight` I8 [rows, K], `X.weight_scale` F32 [rows, 1]. The weight is q * scale, q in
        -127 .. 127.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal, NamedTuple, get_args

import torch

from glmx.models import stored
from glmx.models.safetensors import Planned
from glmx.models.stored import GROUP

Format = Literal["int8", "int4"]
FORMATS: tuple[str, ...] = get_args(Format)
_LEAST, _MOST = {"int4": -8, "int8": -127}, {"int4": 7, "int8": 127}
FORM = {"int4": "pack-quantized", "int8": "int-quantized"}
_IGNORED = (r"mlp\.gate$", r"indexer\..*", r"eh_proj$", r"shared_head\..*")  # linear layers, to other readers


class Quantised(NamedTuple):
    """q int8 [rows, K], and scale [rows, groups]: of bf16's values in int4, fp32 in int8; the tensor is fp32."""

    q: torch.Tensor
    scale: torch.Tensor


def is_quantised(key: str) -> bool:
    """Whether a checkpoint's tensor is written in few bits: the projections of attention and of every MLP.

    Not the router, norms, biases, embedding, head, the MTP layer's eh_proj, and nothing of an indexer.
    """
    return stored.quantises(key, "int4")


def planned(key: str, shape: tuple[int, ...], to: Format) -> list[Planned]:
    """The tensors that stand for matrix `key`, scale behind values."""
    rows, columns = shape
    name = key.removesuffix(".weight")
    if to == "int8":
        values = [Planned(f"{name}.weight", torch.int8, (rows, columns))]
        return [*values, Planned(f"{name}.weight_scale", torch.float32, (rows, 1))]
    return [
        Planned(f"{name}.weight_packed", torch.int32, (rows, -(-columns // 8))),
        Planned(f"{name}.weight_scale", torch.bfloat16, (rows, -(-columns // GROUP))),
        Planned(f"{name}.weight_shape", torch.int64, (2,)),
    ]


def tensors(quantised: Quantised, to: Format) -> list[torch.Tensor]:
    """Their contents, in the order of `planned`."""
    q, scale = quantised
    if to == "int8":
        return [q, scale]
    return [packed(q), scale.bfloat16(), torch.tensor(q.shape)]


def packed(q: torch.Tensor) -> torch.Tensor:
    """int8 [rows, K] of -8 .. 7 -> int32 [rows, ceil(K / 8)]; places behind K hold zero values."""
    nibbles = torch.full((q.shape[0], -(-q.shape[1] // 8) * 8), 8, dtype=torch.uint8)
    nibbles[:, : q.shape[1]] = (q + 8).view(torch.uint8)
    return (nibbles[:, 0::2] | nibbles[:, 1::2] << 4).view(torch.int32)


def rounded(weight: torch.Tensor, to: Format) -> Quantised:
    """fp32 [rows, K] -> nearest values, against scales by which the largest value of a group just fits."""
    rows, columns = weight.shape
    scales, values = [], torch.empty(rows, columns, dtype=torch.int8)
    for first, group in groups(weight, to):
        scales.append(scale_of(group, to))
        values[:, first : first + group.shape[1]] = nearest(group, scales[-1], to)
    return Quantised(values, torch.cat(scales, 1))


def groups(weight: torch.Tensor, to: Format) -> Iterator[tuple[int, torch.Tensor]]:
    """(first column, the columns [rows, n] that share a scale in each row)."""
    width = GROUP if to == "int4" else weight.shape[1]
    for first in range(0, weight.shape[1], width):
        yield first, weight[:, first : first + width]


def scale_of(group: torch.Tensor, to: Format) -> torch.Tensor:
    """fp32 [rows, 1]. -8 .. 7 is not symmetric: 7.5 steps put the largest value half a step from either end."""
    peak = group.abs().amax(1, keepdim=True)
    scale = (peak / 7.5).bfloat16().float() if to == "int4" else peak / 127
    return torch.where(scale > 0, scale, 1.0)  # a group of zeros, or of values below what bf16 holds


def nearest(weight: torch.Tensor, scale: torch.Tensor, to: Format) -> torch.Tensor:
    """fp32 integers."""
    return (weight / scale).round_().clamp_(_LEAST[to], _MOST[to])


def dequantised(quantised: Quantised, to: Format) -> torch.Tensor:
    """fp32 [rows, K]: the weight that is meant."""
    weight = quantised.q.float()
    for i, (_, group) in enumerate(groups(weight, to)):
        group *= quantised.scale[:, i : i + 1]
    return weight.copy_(weight.bfloat16()) if to == "int4" else weight


def config(to: Format) -> dict[str, Any]:
    """config.json's quantization_config."""
    group = {"strategy": "group", "group_size": GROUP} if to == "int4" else {"strategy": "channel", "group_size": None}
    weights = {"num_bits": 4 if to == "int4" else 8, "type": "int", "symmetric": True, "dynamic": False, **group}
    return {
        "quant_method": "compressed-tensors",
        "format": FORM[to],
        "quantization_status": "compressed",
        "config_groups": {
            "group_0": {
                "targets": ["Linear"],
                "weights": {**weights, "actorder": None, "block_structure": None, "observer": "minmax"},
                "input_activations": None,
                "output_activations": None,
            }
        },
        "ignore": ["lm_head", *(rf"re:.*\.{name}" for name in _IGNORED)],
        "kv_cache_scheme": None,
        "global_compression_ratio": None,
    }
