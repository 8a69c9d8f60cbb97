"""ModelConfig: the shape of a model of one of the three families, read from and written to a Hugging Face config.json.

Field names are the checkpoint's. `config_json` knows the spellings of config.json and refuses what glmx does not
compute; here is what the values mean, and which of them go together.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import Any

from glmx.errors import CheckpointError, UnsupportedError, shown
from glmx.jsonfile import read_json
from glmx.models import config_json, layout

_MAX_INT = 2**31 - 1  # the ops' sizes; also what keeps a product of a config's sizes cheap to compute
_MAX_EXPERTS = 512  # route_topk's
_MAX_PARAMETERS = 2**50  # a thousand times the largest GLM; more is a typing error, and would overflow torch's sizes
_DTYPES = ("bfloat16", "float32")


@dataclass(frozen=True)
class ModelConfig:
    """The shape of a model: `glm4_moe` (GQA), `glm4_moe_lite` (MLA) or `glm_moe_dsa` (MLA, sparse by an indexer).

    Layers [0, first_k_dense_replace) have a dense MLP, the others are MoE, unless `mlp_layer_types` lists them
    otherwise. `num_nextn_predict_layers` is 0 or 1: the MTP layer, stored as layer `num_hidden_layers`.
    `q_lora_rank` None is one q_proj instead of two (glm4_moe_lite). `indexer_types` None: every layer has an
    indexer of its own; the MTP layer always has. `mla_norm_eps` is that of the norms inside MLA, 1e-6 in
    transformers whatever the file says. A field that the family does not have stays at its default.
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
    model_type: str = "glm4_moe"
    head_dim: int = 0  # of GQA; 0: hidden_size // num_attention_heads
    n_shared_experts: int = 1
    n_group: int = 1
    topk_group: int = 1
    norm_topk_prob: bool = True
    routed_scaling_factor: float = 1.0
    first_k_dense_replace: int = 1
    use_qk_norm: bool = False
    attention_bias: bool = False
    partial_rotary_factor: float = 0.5
    q_lora_rank: int | None = None
    kv_lora_rank: int = 0
    qk_nope_head_dim: int = 0
    qk_rope_head_dim: int = 0
    v_head_dim: int = 0
    rope_interleave: bool = True
    mla_norm_eps: float = 1e-6
    mlp_layer_types: tuple[str, ...] | None = None  # "dense" or "sparse"; None where first_k_dense_replace says it all
    index_n_heads: int = 0
    index_head_dim: int = 0
    index_topk: int = 0
    indexer_types: tuple[str, ...] | None = None  # "full" or "shared" (the index list of the last full layer)
    indexer_rope_interleave: bool = True
    index_share_for_mtp_iteration: bool = False  # draft steps after the first reuse its index list
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
        if self.model_type not in config_json.FAMILIES:
            raise config_json.unsupported(self.model_type)
        if not self.head_dim and not self.is_mla:
            self._set("head_dim", self.hidden_size // max(self.num_attention_heads, 1))
        for name in ("eos_token_id", "mlp_layer_types", "indexer_types"):
            if isinstance(getattr(self, name), list):
                self._set(name, tuple(getattr(self, name)))
        self._check_sizes()
        # One spelling for each meaning, so that configs that mean the same are equal.
        if self.mlp_layer_types is not None:
            dense = next((i for i, kind in enumerate(self.mlp_layer_types) if kind != "dense"), self.num_hidden_layers)
            self._set("first_k_dense_replace", dense)
            if "dense" not in self.mlp_layer_types[dense:]:
                self._set("mlp_layer_types", None)
        elif self.is_mla:  # the MTP layer is MoE, whatever lies before it
            self._set("first_k_dense_replace", min(self.first_k_dense_replace, self.num_hidden_layers))
        if self.indexer_types is not None and "shared" not in self.indexer_types:
            self._set("indexer_types", None)
        self._check()

    def _set(self, name: str, value: Any) -> None:
        object.__setattr__(self, name, value)

    # Derived sizes.
    @property
    def is_mla(self) -> bool:
        return self.model_type != "glm4_moe"

    @property
    def qk_head_dim(self) -> int:
        """Of MLA: the dims of a query head, without and with RoPE; the softmax scale is this ** -0.5."""
        return self.qk_nope_head_dim + self.qk_rope_head_dim

    @property
    def rotary_dim(self) -> int:
        """Number of dims of each head that RoPE rotates: the first ones of GQA, the last ones of MLA."""
        return self.qk_rope_head_dim if self.is_mla else int(self.head_dim * self.partial_rotary_factor)

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        """Every id that ends a generation, possibly none."""
        ids = self.eos_token_id
        return ids if isinstance(ids, tuple) else () if ids is None else (ids,)

    def is_moe_layer(self, layer: int) -> bool:
        """Whether layer `layer` is MoE; the MTP layer is layer num_hidden_layers."""
        if self.mlp_layer_types is not None and layer < self.num_hidden_layers:
            return self.mlp_layer_types[layer] == "sparse"
        return layer >= self.first_k_dense_replace

    def has_indexer(self, layer: int) -> bool:
        """Whether the layer selects keys itself; the others of a glm_moe_dsa use the last such layer's list."""
        if self.model_type != "glm_moe_dsa":
            return False
        return self.indexer_types is None or layer >= self.num_hidden_layers or self.indexer_types[layer] == "full"

    def num_parameters(self) -> int:
        """Number of trained parameters, MTP layer included (the routers' correction biases are not)."""
        return layout.num_parameters(self)

    def num_active_parameters(self) -> int:
        """Number of parameters that work on one token of text: no MTP layer, only the experts it is routed to."""
        return layout.num_parameters(self, active=True)

    # config.json
    @classmethod
    def from_dict(cls, raw: Mapping[str, Any]) -> ModelConfig:
        """Reads a config.json's content: transformers 4 (`rope_theta`) and 5 (`rope_parameters`) spellings.

        Keys that do not change what is computed (architectures, use_cache, ...) are passed over. A
        quantization_config is checked and not kept: what is quantised, the files' headers say.
        """
        types = {field.name: str(field.type) for field in fields(cls)}
        return cls(**config_json.values(raw, types, _REQUIRED))

    @classmethod
    def from_dir(cls, path: str | Path) -> ModelConfig:
        """Reads DIR/config.json."""
        file = Path(path) / "config.json"
        if not os.path.lexists(file):
            raise CheckpointError(f"no config.json in '{path}'")
        return cls.from_dict(read_json(file))

    def to_dict(self) -> dict[str, Any]:
        """What config.json holds: both spellings of RoPE, so that old and new readers agree."""
        out: dict[str, Any] = {"architectures": [config_json.FAMILIES[self.model_type][0]]}
        out.update({name: getattr(self, name) for name in _fields_of(self.model_type)})
        if isinstance(self.eos_token_id, tuple):
            out["eos_token_id"] = list(self.eos_token_id)
        out["rope_parameters"] = {"rope_type": "default", "rope_theta": self.rope_theta}
        layers = range(self.num_hidden_layers)
        if self.is_mla:
            out["mlp_layer_types"] = ["sparse" if self.is_moe_layer(layer) else "dense" for layer in layers]
        else:
            out["rope_parameters"]["partial_rotary_factor"] = self.partial_rotary_factor
        if self.model_type == "glm_moe_dsa":
            out["indexer_types"] = ["full" if self.has_indexer(layer) else "shared" for layer in layers]
        out.update(hidden_act="silu", attention_dropout=0.0, use_cache=True)
        return out

    def _check_sizes(self) -> None:
        own, required = config_json.OWN[self.model_type], config_json.REQUIRED[self.model_type]
        for name, default in _DEFAULTS.items():
            if name in config_json.NOT_IN_ALL and name not in own and getattr(self, name) != default:
                raise CheckpointError(
                    f"config: {name} = {shown(getattr(self, name))}, but {self.model_type} has no such field"
                )
        for name in _INTEGERS:
            positive = name in _POSITIVE or name in required or name == "head_dim" and not self.is_mla
            most = config_json.MAX_LAYERS if name == "num_hidden_layers" else _MAX_INT
            least, value = int(positive), getattr(self, name)
            if value is not None and not least <= value <= most:
                raise CheckpointError(f"config: {name} = {shown(value)}, expected {least}..{most}")
        for name, kinds in (("mlp_layer_types", ("dense", "sparse")), ("indexer_types", ("full", "shared"))):
            types = getattr(self, name)
            if types is None:
                continue
            wrong = [kind for kind in types if kind not in kinds]
            if wrong:
                raise CheckpointError(f"config: {name} has {shown(wrong[0])}, expected {kinds[0]!r} or {kinds[1]!r}")
            if len(types) != self.num_hidden_layers:
                raise CheckpointError(
                    f"config: {name} names {len(types)} layers, num_hidden_layers is {self.num_hidden_layers}"
                )
        if self.indexer_types is not None and self.indexer_types[0] != "full":
            raise CheckpointError("config: indexer_types begins with 'shared', but no layer before it has an indexer")

    def _check(self) -> None:
        for name in ("routed_scaling_factor", "initializer_range", "rms_norm_eps", "mla_norm_eps"):
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
        self._check_attention()
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

    def _check_attention(self) -> None:
        if not self.is_mla:
            if not 0 < self.partial_rotary_factor <= 1 or self.rotary_dim < 2 or self.rotary_dim % 2:
                raise CheckpointError(
                    f"config: partial_rotary_factor = {self.partial_rotary_factor} of head_dim = {self.head_dim} "
                    f"rotates {self.rotary_dim} dims, expected an even number in 2..{self.head_dim}"
                )
            return
        if self.num_key_value_heads != self.num_attention_heads:
            raise CheckpointError(
                f"config: num_key_value_heads = {self.num_key_value_heads}, "
                f"MLA has as many as num_attention_heads = {self.num_attention_heads}"
            )
        if self.qk_rope_head_dim % 2:
            raise CheckpointError(f"config: qk_rope_head_dim = {self.qk_rope_head_dim}, expected an even number")
        if self.model_type == "glm_moe_dsa":
            if self.q_lora_rank is None:
                raise CheckpointError("config: q_lora_rank = None, but the indexer of a glm_moe_dsa reads that latent")
            if self.index_head_dim < self.qk_rope_head_dim:
                raise CheckpointError(
                    f"config: index_head_dim = {self.index_head_dim}, "
                    f"expected at least qk_rope_head_dim = {self.qk_rope_head_dim}"
                )


_REQUIRED = tuple(field.name for field in fields(ModelConfig) if field.default is MISSING)
_DEFAULTS = {field.name: field.default for field in fields(ModelConfig)}
_INTEGERS = tuple(field.name for field in fields(ModelConfig) if field.type in ("int", "int | None"))
_POSITIVE = (*_REQUIRED, "n_shared_experts", "n_group", "topk_group", "max_position_embeddings")


def _fields_of(model_type: str) -> list[str]:
    own = config_json.OWN[model_type]
    return [name for name in _DEFAULTS if name in own or name not in config_json.NOT_IN_ALL]


def _divides(config: ModelConfig, name: str, divisor: str) -> None:
    value, by = getattr(config, name), getattr(config, divisor)
    if value % by:
        raise CheckpointError(f"config: {name} = {value} is not a multiple of {divisor} = {by}")
