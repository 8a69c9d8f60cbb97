"""Every tensor of a checkpoint, by name and shape, from the config alone: counted before anything is built.

Names are those on disk: gate, up and the experts apart, the MTP layer as layer N. What a checkpoint may repeat (the
MTP layer's embedding and head) and the scales of weights in few bits are not listed.

Legend: H hidden, A heads, G key/value heads, E experts.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from glmx.models.config import ModelConfig

Shapes = dict[str, tuple[int, ...]]
CORRECTION_BIAS = "mlp.gate.e_score_correction_bias"  # a buffer: moved by balancing, not by gradients


class Kind(NamedTuple):
    """What tells one layer from another."""

    moe: bool
    indexer: bool
    mtp: bool


def tensors(config: ModelConfig) -> Iterator[tuple[str, tuple[int, ...]]]:
    """(key, shape) of every tensor on disk."""
    yield from _outside(config).items()
    for number in range(config.num_hidden_layers + config.num_nextn_predict_layers):
        prefix, kind = f"model.layers.{number}.", _kind(config, number)
        for name, shape in _layer(config, kind).items():
            yield prefix + name, shape
        for e in range(config.n_routed_experts if kind.moe else 0):
            for name, shape in _expert(config).items():
                yield f"{prefix}mlp.experts.{e}.{name}", shape


def weights(config: ModelConfig) -> Iterator[tuple[str, tuple[int, ...], int]]:
    """(the end of a key, shape, how many tensors have both) of what is in the layers."""
    for kind, n in _kinds(config).items():
        for name, shape in _layer(config, kind).items():
            yield name, shape, n
        for name, shape in _expert(config).items() if kind.moe else ():
            yield name, shape, n * config.n_routed_experts


def num_tensors(config: ModelConfig, fused_layers: int = 0) -> int:
    """Number of tensors on disk, of which `fused_layers` layers store their experts as two tensors."""
    kinds = _kinds(config)
    moe_layers = sum(n for kind, n in kinds.items() if kind.moe)
    experts = 3 * config.n_routed_experts * max(moe_layers - fused_layers, 0) + 2 * fused_layers
    return len(_outside(config)) + sum(n * len(_layer(config, kind)) for kind, n in kinds.items()) + experts


def num_parameters(config: ModelConfig, *, active: bool = False) -> int:
    """Number of trained parameters; `active`: those that work on one token of text, so no MTP layer either."""
    experts = config.num_experts_per_tok if active else config.n_routed_experts
    total = _elements(_outside(config))
    for kind, n in _kinds(config).items():
        if not (active and kind.mtp):
            total += n * (_elements(_layer(config, kind)) + (experts * _elements(_expert(config)) if kind.moe else 0))
    return total


def _kind(config: ModelConfig, layer: int) -> Kind:
    return Kind(config.is_moe_layer(layer), config.has_indexer(layer), layer >= config.num_hidden_layers)


def _kinds(config: ModelConfig) -> Counter[Kind]:
    layers = range(config.num_hidden_layers + config.num_nextn_predict_layers)
    return Counter(_kind(config, layer) for layer in layers)


def _outside(config: ModelConfig) -> Shapes:
    V, H = config.vocab_size, config.hidden_size
    out: Shapes = {"model.embed_tokens.weight": (V, H), "model.norm.weight": (H,)}
    return out if config.tie_word_embeddings else {**out, "lm_head.weight": (V, H)}


def _layer(config: ModelConfig, kind: Kind) -> Shapes:
    """A layer's tensors but for its routed experts, under `model.layers.{l}.`"""
    H = config.hidden_size
    out: Shapes = {"input_layernorm.weight": (H,), "post_attention_layernorm.weight": (H,)}
    attention = _mla(config) if config.is_mla else _gqa(config)
    if kind.indexer:
        attention |= {f"indexer.{name}": shape for name, shape in _indexer(config).items()}
    out |= {f"self_attn.{name}": shape for name, shape in attention.items()}
    if kind.moe:
        E = config.n_routed_experts
        out |= {"mlp.gate.weight": (E, H), CORRECTION_BIAS: (E,)}
        shared = _mlp(H, config.moe_intermediate_size * config.n_shared_experts)
        out |= {f"mlp.shared_experts.{name}": shape for name, shape in shared.items()}
    else:
        out |= {f"mlp.{name}": shape for name, shape in _mlp(H, config.intermediate_size).items()}
    if kind.mtp:
        out |= {"enorm.weight": (H,), "hnorm.weight": (H,), "eh_proj.weight": (H, 2 * H)}
        out |= {"shared_head.norm.weight": (H,)}
    return out


def _gqa(config: ModelConfig) -> Shapes:
    H, d = config.hidden_size, config.head_dim
    q, kv = config.num_attention_heads * d, config.num_key_value_heads * d
    out: Shapes = {"q_proj.weight": (q, H), "k_proj.weight": (kv, H), "v_proj.weight": (kv, H), "o_proj.weight": (H, q)}
    if config.attention_bias:
        out |= {"q_proj.bias": (q,), "k_proj.bias": (kv,), "v_proj.bias": (kv,)}
    if config.use_qk_norm:
        out |= {"q_norm.weight": (d,), "k_norm.weight": (d,)}
    return out


def _mla(config: ModelConfig) -> Shapes:
    H, A, rank = config.hidden_size, config.num_attention_heads, config.kv_lora_rank
    q = A * config.qk_head_dim
    out: Shapes = {
        "kv_a_proj_with_mqa.weight": (rank + config.qk_rope_head_dim, H),
        "kv_a_layernorm.weight": (rank,),
        "kv_b_proj.weight": (A * (config.qk_nope_head_dim + config.v_head_dim), rank),
        "o_proj.weight": (H, A * config.v_head_dim),
    }
    if config.q_lora_rank is None:
        return {**out, "q_proj.weight": (q, H)}
    q_rank = config.q_lora_rank
    q_path: Shapes = {"q_a_proj.weight": (q_rank, H), "q_a_layernorm.weight": (q_rank,), "q_b_proj.weight": (q, q_rank)}
    return {**out, **q_path}


def _indexer(config: ModelConfig) -> Shapes:
    H, heads, d = config.hidden_size, config.index_n_heads, config.index_head_dim
    return {
        "wq_b.weight": (heads * d, config.q_lora_rank or 0),  # the config refuses an indexer without a q latent
        "wk.weight": (d, H),
        "k_norm.weight": (d,),
        "k_norm.bias": (d,),
        "weights_proj.weight": (heads, H),
    }


def _expert(config: ModelConfig) -> Shapes:
    return _mlp(config.hidden_size, config.moe_intermediate_size)


def _mlp(hidden: int, width: int) -> Shapes:
    up = (width, hidden)
    return {"gate_proj.weight": up, "up_proj.weight": up, "down_proj.weight": (hidden, width)}


def _elements(shapes: Shapes) -> int:
    """Trained values in `shapes`."""
    return sum(math.prod(shape) for name, shape in shapes.items() if name != CORRECTION_BIAS)
