"""ModelConfig: the shape of a glm4_moe model, read from and written to a Hugging Face config.json.

Field names are the checkpoint's. What glmx does not compute (another architecture, another router, another
RoPE type, quantised weights) is refused here by name, before any tensor is read.
"""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, fields, replace
from pathlib import Path
from typing import Any

from glmx.errors import CheckpointError, UnsupportedError, shown
from glmx.jsonfile import read_json

MODEL_TYPE = "glm4_moe"
# Its relatives, by the names people know them by.
_OTHER_TYPES = {
    "glm4_moe_lite": "GLM-4.7-Flash: not yet",
    "glm_moe_dsa": "GLM-5, 5.1, 5.2 and 5.3: not yet",
    "glm5_next": "GLM-5.3-Flash, another architecture",
}
_MAX_INT = 2**31 - 1  # the ops' sizes; also what keeps a product of a config's sizes cheap to compute
_MAX_EXPERTS = 512  # route_topk's
_MAX_PARAMETERS = 2**50  # a thousand times the largest GLM; more is a typing error, and would overflow torch's sizes

# config.json keys with the only values glmx computes; released checkpoints carry most of them.
_FIXED: dict[str, tuple[Any, ...]] = {
    "scoring_func": ("sigmoid",),
    "topk_method": ("noaux_tc",),
    "moe_layer_freq": (1,),
    "ep_size": (1,),
    "pretraining_tp": (1,),
    "hidden_act": ("silu",),
    "attention_dropout": (0,),
    "moe_router_dtype": (None, "float32"),
    "quantization_config": (None,),
    "sliding_window": (None,),
}
_DTYPES = ("bfloat16", "float32")


@dataclass(frozen=True)
class ModelConfig:
    """The shape of a glm4_moe model. Layers [0, first_k_dense_replace) have a dense MLP, the others are MoE.

    `num_nextn_predict_layers` is 0 or 1: the MTP layer, stored as layer `num_hidden_layers`.
    `dtype` is the compute dtype, "bfloat16" or "float32". Raises CheckpointError for values that contradict
    each other and UnsupportedError for those that glmx does not compute.
    """

    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    intermediate_size: int
    moe_intermediate_size: int
    n_routed_experts: int
    num_experts_per_tok: int
    head_dim: int = 0  # 0: hidden_size // num_attention_heads
    n_shared_experts: int = 1
    n_group: int = 1
    topk_group: int = 1
    norm_topk_prob: bool = True
    routed_scaling_factor: float = 1.0
    first_k_dense_replace: int = 1
    use_qk_norm: bool = False
    attention_bias: bool = False
    partial_rotary_factor: float = 0.5
    rope_theta: float = 10_000.0  # transformers' default; released checkpoints state 1e6
    rms_norm_eps: float = 1e-5
    max_position_embeddings: int = 131072
    tie_word_embeddings: bool = False
    num_nextn_predict_layers: int = 1
    initializer_range: float = 0.02
    eos_token_id: int | tuple[int, ...] | None = None
    pad_token_id: int | None = None
    dtype: str = "bfloat16"

    def __post_init__(self) -> None:
        if not self.head_dim:
            object.__setattr__(self, "head_dim", self.hidden_size // max(self.num_attention_heads, 1))
        if isinstance(self.eos_token_id, list):
            object.__setattr__(self, "eos_token_id", tuple(self.eos_token_id))
        self._check()

    # Derived sizes.
    @property
    def rotary_dim(self) -> int:
        """Number of leading dims of each head that RoPE rotates."""
        return int(self.head_dim * self.partial_rotary_factor)

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        """Every id that ends a generation, possibly none."""
        ids = self.eos_token_id
        return ids if isinstance(ids, tuple) else () if ids is None else (ids,)

    def is_moe_layer(self, layer: int) -> bool:
        return layer >= self.first_k_dense_replace

    def num_parameters(self) -> int:
        """Number of trained parameters, MTP layer included (the routers' correction biases are not)."""
        H, d = self.hidden_size, self.head_dim
        q, kv = self.num_attention_heads * d, self.num_key_value_heads * d
        attention = 2 * H * q + 2 * H * kv
        attention += (q + 2 * kv) if self.attention_bias else 0
        attention += 2 * d if self.use_qk_norm else 0
        dense = 3 * H * self.intermediate_size
        expert = 3 * H * self.moe_intermediate_size
        moe = expert * (self.n_routed_experts + self.n_shared_experts) + H * self.n_routed_experts
        dense_layers, moe_layers = self._layers_of_each_kind()
        total = self.vocab_size * H * (1 if self.tie_word_embeddings else 2) + H
        total += (dense_layers + moe_layers) * (attention + 2 * H) + moe_layers * moe + dense_layers * dense
        return total + self.num_nextn_predict_layers * (2 * H * H + 3 * H)

    def num_tensors(self, fused_layers: int = 0) -> int:
        """Number of tensors of a checkpoint, of which `fused_layers` layers store their experts as two tensors."""
        dense_layers, moe_layers = self._layers_of_each_kind()
        each = 6 + 3 * self.attention_bias + 2 * self.use_qk_norm  # two norms, q, k, v and o
        moe = 5  # router, correction bias, shared expert
        experts = 3 * self.n_routed_experts * max(moe_layers - fused_layers, 0) + 2 * fused_layers
        outside = 2 if self.tie_word_embeddings else 3
        layers = (dense_layers + moe_layers) * each + dense_layers * 3 + moe_layers * moe + experts
        return outside + layers + 4 * self.num_nextn_predict_layers

    def num_active_parameters(self) -> int:
        """Number of parameters that work on one token of text: no MTP layer, only the experts it is routed to."""
        idle = 3 * self.hidden_size * self.moe_intermediate_size * (self.n_routed_experts - self.num_experts_per_tok)
        decoder = replace(self, num_nextn_predict_layers=0)
        return decoder.num_parameters() - decoder._layers_of_each_kind()[1] * idle

    def _layers_of_each_kind(self) -> tuple[int, int]:
        """(dense, MoE) layers, the MTP layer among them."""
        layers = self.num_hidden_layers + self.num_nextn_predict_layers
        dense = min(self.first_k_dense_replace, layers)
        return dense, layers - dense

    # config.json
    @classmethod
    def from_dict(cls, raw: Mapping[str, Any]) -> ModelConfig:
        """Reads a config.json's content: transformers 4 (`rope_theta`) and 5 (`rope_parameters`) spellings.

        Keys that do not change what is computed (architectures, use_cache, ...) are passed over.
        """
        model_type = raw.get("model_type")
        if model_type is None:
            raise CheckpointError("config.json has no model_type")
        if model_type != MODEL_TYPE:
            known = _OTHER_TYPES.get(model_type) if isinstance(model_type, str) else None
            known = f" ({known})" if known else ""
            raise UnsupportedError(f"model_type {shown(model_type)}{known} is not supported, only {MODEL_TYPE!r} is")
        for key, allowed in _FIXED.items():
            # True equals 1, but is no number in a config.
            if key in raw and (isinstance(raw[key], bool) or raw[key] not in allowed):
                raise UnsupportedError(f"config.json: {key} = {shown(raw[key])} is not supported, only {allowed[0]!r}")
        layer_types = _optional(raw, "layer_types", list) or []
        if any(kind != "full_attention" for kind in layer_types):
            raise UnsupportedError("config.json: layer_types other than 'full_attention' are not supported")

        values = {field.name: raw[field.name] for field in fields(cls) if raw.get(field.name) is not None}
        values.update(_rope(raw))
        values["dtype"] = _dtype(raw)
        mtp_layers = [raw[key] for key in ("num_nextn_predict_layers", "num_mtp_layers") if raw.get(key) is not None]
        if len(mtp_layers) > 1 and mtp_layers[0] != mtp_layers[1]:
            raise CheckpointError(f"num_nextn_predict_layers and num_mtp_layers differ: {shown(mtp_layers)}")
        if mtp_layers:
            values["num_nextn_predict_layers"] = mtp_layers[0]
        for name, value in values.items():
            values[name] = _typed(name, value)
        missing = [field.name for field in fields(cls) if field.name in _REQUIRED and field.name not in values]
        if missing:
            raise CheckpointError(f"config.json lacks {', '.join(missing)}")
        return cls(**values)

    @classmethod
    def from_dir(cls, path: str | Path) -> ModelConfig:
        """Reads DIR/config.json."""
        file = Path(path) / "config.json"
        if not os.path.lexists(file):
            raise CheckpointError(f"no config.json in '{path}'")
        return cls.from_dict(read_json(file))

    def to_dict(self) -> dict[str, Any]:
        """What config.json holds: both spellings of RoPE, so that old and new readers agree."""
        out: dict[str, Any] = {"architectures": ["Glm4MoeForCausalLM"], "model_type": MODEL_TYPE}
        out.update({field.name: getattr(self, field.name) for field in fields(self)})
        if isinstance(self.eos_token_id, tuple):
            out["eos_token_id"] = list(self.eos_token_id)
        out["rope_parameters"] = {
            "rope_type": "default",
            "rope_theta": self.rope_theta,
            "partial_rotary_factor": self.partial_rotary_factor,
        }
        out.update(hidden_act="silu", attention_dropout=0.0, use_cache=True)
        return out

    def _check(self) -> None:
        for name in _INTEGERS:
            least, value = int(name in _POSITIVE), getattr(self, name)
            if value is not None and not least <= value <= _MAX_INT:
                raise CheckpointError(f"config: {name} = {shown(value)}, expected {least}..{_MAX_INT}")
        for name in ("routed_scaling_factor", "initializer_range", "rms_norm_eps"):
            if not 0 <= getattr(self, name) < math.inf:
                raise CheckpointError(f"config: {name} = {getattr(self, name)}, expected a finite number >= 0")
        if not all(0 <= i <= _MAX_INT for i in self.eos_token_ids):
            raise CheckpointError(f"config: eos_token_id = {shown(self.eos_token_id)}, expected ids in 0..{_MAX_INT}")
        if self.n_routed_experts > _MAX_EXPERTS:
            raise UnsupportedError(
                f"config: n_routed_experts = {self.n_routed_experts} is not supported, only 1..{_MAX_EXPERTS}"
            )
        _divides(self, "num_attention_heads", "num_key_value_heads")
        _divides(self, "n_routed_experts", "n_group")
        if self.topk_group > self.n_group:
            raise CheckpointError(f"config: topk_group = {self.topk_group} exceeds n_group = {self.n_group}")
        group = self.n_routed_experts // self.n_group
        if self.n_group > 1 and group < 2:
            raise CheckpointError(f"config: n_group = {self.n_group} leaves {group} expert per group, 2 are needed")
        if self.num_experts_per_tok > group * self.topk_group:
            raise CheckpointError(
                f"config: num_experts_per_tok = {self.num_experts_per_tok} exceeds the "
                f"{group * self.topk_group} experts of topk_group = {self.topk_group} groups"
            )
        if not 0 < self.partial_rotary_factor <= 1 or self.rotary_dim < 2 or self.rotary_dim % 2:
            raise CheckpointError(
                f"config: partial_rotary_factor = {self.partial_rotary_factor} of head_dim = {self.head_dim} "
                f"rotates {self.rotary_dim} dims, expected an even number in 2..{self.head_dim}"
            )
        if not 1 <= self.rope_theta <= 1e30:  # rope_cos_sin's
            raise CheckpointError(f"config: rope_theta = {self.rope_theta}, expected 1..1e30")
        if self.num_nextn_predict_layers not in (0, 1):
            raise UnsupportedError(
                f"num_nextn_predict_layers = {self.num_nextn_predict_layers} is not supported, only 0 and 1"
            )
        if self.dtype not in _DTYPES:
            raise UnsupportedError(f"dtype {shown(self.dtype)} is not supported, only {' and '.join(_DTYPES)} are")
        if self.num_parameters() > _MAX_PARAMETERS:
            raise CheckpointError(
                f"config: its sizes make {self.num_parameters()} parameters, expected at most {_MAX_PARAMETERS}"
            )


_REQUIRED = tuple(field.name for field in fields(ModelConfig) if field.default is MISSING)
_INTEGERS = tuple(field.name for field in fields(ModelConfig) if field.type in ("int", "int | None"))
_POSITIVE = (*_REQUIRED, "head_dim", "n_shared_experts", "n_group", "topk_group", "max_position_embeddings")


def _divides(config: ModelConfig, name: str, divisor: str) -> None:
    value, by = getattr(config, name), getattr(config, divisor)
    if value % by:
        raise CheckpointError(f"config: {name} = {value} is not a multiple of {divisor} = {by}")


def _typed(name: str, value: Any) -> Any:
    """The value in its field's type; bool is not an int here, and an int is a float."""
    kind = ModelConfig.__dataclass_fields__[name].type
    if name == "eos_token_id":
        ids = value if isinstance(value, (list, tuple)) else [value]
        good = all(type(i) is int for i in ids)
        value = tuple(ids) if isinstance(value, (list, tuple)) else value
    elif kind == "float":
        # abs: an int too large for a float raises; NaN and the infinities compare as false.
        good = type(value) in (int, float) and abs(value) <= sys.float_info.max
        value = float(value) if good else value
    elif kind == "bool":
        good = isinstance(value, bool)
    elif kind == "str":
        good = isinstance(value, str)
    else:
        good = type(value) is int
    if not good:
        wanted = {"float": "a finite number", "bool": "true or false", "str": "text"}.get(str(kind), "an integer")
        wanted = "an integer or a list of them" if name == "eos_token_id" else wanted
        raise CheckpointError(f"config.json: {name} = {shown(value)}, expected {wanted}")
    return value


def _optional(raw: Mapping[str, Any], key: str, kind: type) -> Any:
    value = raw.get(key)
    if value is not None and not isinstance(value, kind):
        name = "an object" if kind is dict else "a list"
        raise CheckpointError(f"config.json: {key} = {shown(value)}, expected {name} or null")
    return value


def _rope(raw: Mapping[str, Any]) -> dict[str, Any]:
    """rope_theta and partial_rotary_factor from either spelling; they must not contradict each other."""
    out: dict[str, Any] = {}
    nested = _optional(raw, "rope_parameters", dict) or {}
    for table in (nested, _optional(raw, "rope_scaling", dict) or {}):
        rope_type = table.get("rope_type", table.get("type", "default"))
        if rope_type != "default":
            raise UnsupportedError(f"config.json: rope_type = {shown(rope_type)} is not supported, only 'default'")
    for name in ("rope_theta", "partial_rotary_factor"):
        given = [table[name] for table in (nested, raw) if table.get(name) is not None]
        if len(given) == 2 and given[0] != given[1]:
            raise CheckpointError(f"config.json: two values of {name}: {shown(given[0])} and {shown(given[1])}")
        if given:
            out[name] = given[0]
    return out


def _dtype(raw: Mapping[str, Any]) -> Any:
    given = [raw[key] for key in ("dtype", "torch_dtype") if raw.get(key) is not None]
    dtype = given[0] if given else "bfloat16"
    return dtype.removeprefix("torch.") if isinstance(dtype, str) else dtype
