"""What a config.json says, as values for ModelConfig: every released spelling, and refusals by name.

Two of transformers' spellings (4: `rope_theta`, `torch_dtype`; 5: `rope_parameters`, `dtype`, `num_mtp_layers`), and
per-layer lists that are given or follow from other keys. What glmx does not compute (another architecture, another
router, another RoPE type, another quantisation) is refused here, before any tensor is read.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

from glmx.errors import CheckpointError, UnsupportedError, shown
from glmx.models import stored

MAX_LAYERS = 4096  # per-layer lists are made; the largest GLM has 92 layers

# model_type -> (transformers' class, the names people know it by).
FAMILIES = {
    "glm4_moe": ("Glm4MoeForCausalLM", "GLM-4.5, 4.6 and 4.7"),
    "glm4_moe_lite": ("Glm4MoeLiteForCausalLM", "GLM-4.7-Flash"),
    "glm_moe_dsa": ("GlmMoeDsaForCausalLM", "GLM-5, 5.1, 5.2 and 5.3"),
}
_OTHER_TYPES = {"glm5_next": "GLM-5.3-Flash, another architecture"}

# Fields that not every family has. A family's REQUIRED ones have no default that a config may rely on.
_GQA = ("head_dim", "use_qk_norm", "attention_bias", "partial_rotary_factor")
_MLA_SIZES = ("q_lora_rank", "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")
_MLA = (*_MLA_SIZES, "mlp_layer_types", "rope_interleave", "mla_norm_eps")
_INDEX_SIZES = ("index_n_heads", "index_head_dim", "index_topk")
_DSA = (*_MLA, *_INDEX_SIZES, "indexer_types", "indexer_rope_interleave", "index_share_for_mtp_iteration")
OWN = {"glm4_moe": _GQA, "glm4_moe_lite": _MLA, "glm_moe_dsa": _DSA}
REQUIRED = {"glm4_moe": (), "glm4_moe_lite": _MLA_SIZES, "glm_moe_dsa": (*_MLA_SIZES, *_INDEX_SIZES)}
NOT_IN_ALL = frozenset(_GQA + _DSA)

# Keys with the only values glmx computes; released checkpoints carry most of them.
_FIXED: dict[str, tuple[Any, ...]] = {
    "scoring_func": ("sigmoid",),
    "topk_method": ("noaux_tc",),
    "moe_layer_freq": (1,),
    "ep_size": (1,),
    "pretraining_tp": (1,),
    "hidden_act": ("silu",),
    "attention_dropout": (0,),
    "moe_router_dtype": (None, "float32"),
    "sliding_window": (None,),
}
_LAYER_TYPES = {"glm4_moe": "full_attention", "glm4_moe_lite": "full_attention", "glm_moe_dsa": "indexed_attention"}


def unsupported(model_type: Any) -> UnsupportedError:
    """The error for a model that glmx does not build, by the name people know it by."""
    known = _OTHER_TYPES.get(model_type) if isinstance(model_type, str) else None
    known = f" ({known})" if known else ""
    names = ", ".join(repr(name) for name in FAMILIES)
    return UnsupportedError(f"model_type {shown(model_type)}{known} is not supported, only {names} are")


def values(raw: Mapping[str, Any], types: Mapping[str, str], required: tuple[str, ...]) -> dict[str, Any]:
    """Arguments of ModelConfig from the content of a config.json; `types` are its fields, name -> annotation.

    Keys that do not change what is computed (architectures, use_cache, ...) are passed over, and so is the
    `head_dim` of a family with MLA: released files and transformers put several things there.
    """
    model_type = raw.get("model_type")
    if model_type is None:
        raise CheckpointError("config.json has no model_type")
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        raise unsupported(model_type)
    mla = model_type != "glm4_moe"
    fixed = {**_FIXED, "attention_bias": (False, None), "mlp_bias": (False, None)} if mla else _FIXED
    for key, allowed in fixed.items():
        # True equals 1, but is no number in a config.
        if key in raw and not any(type(raw[key]) is type(v) and raw[key] == v for v in _alike(allowed)):
            raise UnsupportedError(f"config.json: {key} = {shown(raw[key])} is not supported, only {allowed[0]!r}")
    expected = _LAYER_TYPES[model_type]
    if any(kind != expected for kind in _optional(raw, "layer_types", list) or []):
        raise UnsupportedError(f"config.json: layer_types other than {expected!r} are not supported")
    stored.check_config(_optional(raw, "quantization_config", dict))

    known = [name for name in types if name not in NOT_IN_ALL or name in OWN[model_type]]
    out = {name: raw[name] for name in known if raw.get(name) is not None}
    out.update(_rope(raw, mla))
    out["dtype"] = _dtype(raw)
    out.update(_mtp_layers(raw))
    if mla:
        out.setdefault("num_key_value_heads", out.get("num_attention_heads"))
    if model_type == "glm4_moe_lite" and out.get("mlp_layer_types") is None:
        out["first_k_dense_replace"] = 1  # this family has no such key; where a file carries it, it means nothing
    if model_type == "glm_moe_dsa":
        out.setdefault("first_k_dense_replace", 3)
        out["indexer_types"] = _indexer_types(raw)
    out = {name: _typed(name, value, types[name]) for name, value in out.items() if value is not None}

    # A null q_lora_rank says that queries have no low-rank path; without the key it is not known.
    unsaid = [name for name in REQUIRED[model_type] if name not in out]
    if "q_lora_rank" in raw and "q_lora_rank" in unsaid:
        unsaid.remove("q_lora_rank")
    missing = [name for name in required if name not in out] + unsaid
    if missing:
        raise CheckpointError(f"config.json lacks {', '.join(missing)}")
    _check_qk_head_dim(raw, out)
    return out


def _alike(allowed: tuple[Any, ...]) -> list[Any]:
    """The allowed values, and an allowed number in its other type."""
    return [*allowed, *(float(value) for value in allowed if type(value) is int)]


def _typed(name: str, value: Any, kind: str) -> Any:
    """The value in its field's type; bool is not an int here, and an int is a float."""
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
    elif kind.startswith("tuple[str"):
        good = isinstance(value, (list, tuple)) and all(isinstance(item, str) for item in value)
        value = tuple(value) if good else value
    else:
        good = type(value) is int
    if not good:
        wanted = {"float": "a finite number", "bool": "true or false", "str": "text"}.get(kind, "an integer")
        wanted = "a list of texts" if kind.startswith("tuple[str") else wanted
        wanted = "an integer or a list of them" if name == "eos_token_id" else wanted
        raise CheckpointError(f"config.json: {name} = {shown(value)}, expected {wanted}")
    return value


def _optional(raw: Mapping[str, Any], key: str, kind: type) -> Any:
    value = raw.get(key)
    if value is not None and not isinstance(value, kind):
        name = "an object" if kind is dict else "a list"
        raise CheckpointError(f"config.json: {key} = {shown(value)}, expected {name} or null")
    return value


def _rope(raw: Mapping[str, Any], mla: bool) -> dict[str, Any]:
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
    if mla and (factor := out.pop("partial_rotary_factor", 1.0)) != 1.0:
        raise UnsupportedError(
            f"config.json: partial_rotary_factor = {shown(factor)} is not supported with MLA, only 1.0"
        )
    return out


def _dtype(raw: Mapping[str, Any]) -> Any:
    given = [raw[key] for key in ("dtype", "torch_dtype") if raw.get(key) is not None]
    dtype = given[0] if given else "bfloat16"
    return dtype.removeprefix("torch.") if isinstance(dtype, str) else dtype


def _mtp_layers(raw: Mapping[str, Any]) -> dict[str, Any]:
    given = [raw[key] for key in ("num_nextn_predict_layers", "num_mtp_layers") if raw.get(key) is not None]
    if len(given) > 1 and given[0] != given[1]:
        raise CheckpointError(f"num_nextn_predict_layers and num_mtp_layers differ: {shown(given)}")
    return {"num_nextn_predict_layers": given[0]} if given else {}


def _indexer_types(raw: Mapping[str, Any]) -> Any:
    """Per layer "full" or "shared": as listed, else by a pattern of F and S, else every `freq`-th (None: all full).

    The schedule is transformers': layer i is full iff max(i - offset + 1, 0) is a multiple of freq.
    """
    if raw.get("indexer_types") is not None:
        return raw["indexer_types"]
    pattern = raw.get("index_topk_pattern")
    if isinstance(pattern, str):
        if not set(pattern) <= {"F", "S"}:
            raise CheckpointError(f"config.json: index_topk_pattern = {shown(pattern)}, expected letters F and S")
        return ["full" if letter == "F" else "shared" for letter in pattern]
    if pattern is not None:
        return _typed("index_topk_pattern", pattern, "tuple[str, ...]")
    schedule = []
    for name, default in (("index_topk_freq", 1), ("index_skip_topk_offset", 2)):
        given = raw[name] if raw.get(name) is not None else default
        schedule.append(_typed(name, given, "int"))
        if schedule[-1] < 1:
            raise CheckpointError(f"config.json: {name} = {shown(given)}, expected 1 or more")
    freq, offset = schedule
    layers = raw.get("num_hidden_layers")
    if freq == 1 or type(layers) is not int or layers > MAX_LAYERS:  # the last two are refused later, by name
        return None
    return ["shared" if max(i - offset + 1, 0) % freq else "full" for i in range(layers)]


def _check_qk_head_dim(raw: Mapping[str, Any], out: dict[str, Any]) -> None:
    given = raw.get("qk_head_dim")
    if given is None or "qk_nope_head_dim" not in out:
        return
    dim = out["qk_nope_head_dim"] + out["qk_rope_head_dim"]
    if type(given) is not int or given != dim:
        raise CheckpointError(f"config.json: qk_head_dim = {shown(given)}, its two parts make {shown(dim)}")
