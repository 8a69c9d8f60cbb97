"""What a model takes in memory, before any is taken: weights, cache, and the largest step of a forward.

The bound on activations is a sum over the tensors that are alive at the widest moment of a layer, counted generously:
a forward of `chunk` tokens stays below it whatever their context. Nothing of the size tokens x context exists.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from glmx.errors import CheckpointError
from glmx.jsonfile import read_json
from glmx.models import layout, stored
from glmx.models.config import ModelConfig
from glmx.models.pages import PAGE
from glmx.models.safetensors import Files
from glmx.models.stored import Stored

# What does not follow from the config: the scratch of the kernels' threads and the allocator's own slack.
_SLACK = 64 * 2**20


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes. `cache_per_token` over all layers; `activations` at most, while `chunk` tokens are computed."""

    weights: int
    cache: int
    activations: int
    cache_per_token: int

    @property
    def total(self) -> int:
        return self.weights + self.cache + self.activations


def memory_plan(
    config: ModelConfig,
    dtype: torch.dtype,
    tokens: int,
    *,
    sequences: int = 1,
    chunk: int = 8192,
    drafts: int = 0,
    weights: int | None = None,
) -> MemoryPlan:
    """For `sequences` of `tokens` tokens each (prompt and completion), computed at most `chunk` tokens at a time.

    `drafts` is num_speculative_tokens, the most that a step verifies for a sequence; `weights` are the bytes of weights
    that are not all parameters. Raises ValueError for numbers below 1, of drafts below 0.
    """
    if drafts < 0:
        raise ValueError(f"drafts is {drafts}, expected at least 0")
    for name, value in (("tokens", tokens), ("sequences", sequences), ("chunk", chunk)):
        if value < 1:
            raise ValueError(f"{name} is {value}, expected at least 1")
    per_token = sum(cache_row(config, layer) for layer in range(_layers(config))) * dtype.itemsize
    pages = -(-tokens // PAGE) * sequences
    return MemoryPlan(
        weights=config.num_parameters() * dtype.itemsize if weights is None else weights,
        cache=pages * PAGE * per_token,
        activations=_activations(config, dtype.itemsize, min(chunk, tokens * sequences), tokens)
        + sequences * (1 + drafts) * 2 * 4 * config.vocab_size  # logits, and what a sampler makes of them
        + _SLACK,
        cache_per_token=per_token,
    )


def weight_bytes(config: ModelConfig, dtype: torch.dtype, found: Mapping[str, Stored], files: Files) -> int:
    """Bytes of the weights of a model that keeps those of `found` as the files have them, where an op can use them."""
    total = config.num_parameters() * dtype.itemsize
    if dtype != torch.bfloat16:
        return total
    for key, how in found.items():
        if stored.stays(key):
            sizes = [files.headers[part].end - files.headers[part].start for part in (how.values, how.scale)]
            total += sum(sizes) - math.prod(how.shape) * dtype.itemsize
    return total


def stored_weights(config: ModelConfig, dtype: torch.dtype, directory: Path) -> tuple[set[str], int]:
    """The formats of the weights that a model of a checkpoint keeps in few bits, and the bytes of all its weights.

    Of a quantised checkpoint they are read off the files' headers; where the files are not all there, they follow from
    the config, as if it were quantised like released ones. Raises CheckpointError, UnsupportedError.
    """
    format = stored.check_config(read_json(directory / "config.json").get("quantization_config"))
    total = config.num_parameters() * dtype.itemsize
    if format is None or dtype != torch.bfloat16:
        return set(), total
    try:
        files = Files(directory)
    except CheckpointError:
        for key, shape, count in layout.weights(config):
            if stored.quantises(key, format) and stored.stays(key):
                rows, columns = shape
                total += count * (stored.nbytes(format, rows, columns) - rows * columns * dtype.itemsize)
        return {format}, total
    found = {key: how for key, how in stored.find(files).items() if stored.stays(key)}
    return {how.format for how in found.values()}, weight_bytes(config, dtype, found, files)


def cache_row(config: ModelConfig, layer: int) -> int:
    """Values that one token leaves in the cache of a layer (the MTP layer is layer num_hidden_layers)."""
    if not config.is_mla:
        return 2 * config.num_key_value_heads * config.head_dim
    index = config.index_head_dim if config.has_indexer(layer) else 0
    return config.kv_lora_rank + config.qk_rope_head_dim + index


def _layers(config: ModelConfig) -> int:
    return config.num_hidden_layers + config.num_nextn_predict_layers


def _activations(config: ModelConfig, size: int, chunk: int, tokens: int) -> int:
    H = config.hidden_size
    stream = (4 * H * size) + 2 * 4 * config.rotary_dim + 16  # residual, layer in and out; angles; ids and positions
    widest = max(_attention(config, size, tokens), _moe(config, size), 3 * config.intermediate_size * size)
    return chunk * (stream + widest)


def _attention(config: ModelConfig, size: int, tokens: int) -> int:
    """Bytes per token of an attention layer: queries before and after RoPE, the result before and after o_proj."""
    A = config.num_attention_heads
    if not config.is_mla:
        heads = A + 2 * config.num_key_value_heads
        return size * (3 * heads * config.head_dim + A * config.head_dim) + 4 * A
    row = config.kv_lora_rank + config.qk_rope_head_dim
    queries = A * (config.qk_head_dim + 2 * config.qk_rope_head_dim + config.kv_lora_rank + row)
    values = A * (config.kv_lora_rank + 2 * config.v_head_dim)
    bytes_ = size * (queries + values + 3 * row + (config.q_lora_rank or 0)) + 4 * A
    if config.model_type == "glm_moe_dsa":
        bytes_ += size * 2 * (config.index_n_heads + 2) * config.index_head_dim + 8 * config.index_n_heads
        bytes_ += 2 * 4 * min(config.index_topk, tokens)  # a layer's list, and the one before it
    return bytes_


def _moe(config: ModelConfig, size: int) -> int:
    """Bytes per token of a MoE layer: router, plan, the rows of its experts, the shared expert."""
    K, E, I, H = (
        config.num_experts_per_tok,
        config.n_routed_experts,
        config.moe_intermediate_size,
        config.hidden_size,
    )
    return 4 * (2 * E + 6 * K) + size * (K * (I + H) + 2 * config.n_shared_experts * I + 3 * H)
