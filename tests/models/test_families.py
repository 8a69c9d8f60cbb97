"""Configs of glm4_moe_lite and glm_moe_dsa: released values, the spellings' traps, what transformers makes of them."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch

from glmx.errors import CheckpointError, UnsupportedError
from glmx.models import layout
from glmx.models.config import ModelConfig
from glmx.models.safetensors import SINGLE, read_header

COMMON = {  # of GLM-4.7-Flash and GLM-5: transformers 4 style, with what real files carry
    "attention_bias": False,
    "hidden_act": "silu",
    "initializer_range": 0.02,
    "kv_lora_rank": 512,
    "n_group": 1,
    "n_shared_experts": 1,
    "norm_topk_prob": True,
    "num_nextn_predict_layers": 1,
    "qk_head_dim": 256,
    "qk_nope_head_dim": 192,
    "qk_rope_head_dim": 64,
    "rms_norm_eps": 1e-5,
    "scoring_func": "sigmoid",
    "topk_group": 1,
    "topk_method": "noaux_tc",
    "v_head_dim": 256,
    "vocab_size": 154880,
}
FLASH = {
    **COMMON,
    "model_type": "glm4_moe_lite",
    "first_k_dense_replace": 1,
    "hidden_size": 2048,
    "intermediate_size": 10240,
    "max_position_embeddings": 202752,
    "moe_intermediate_size": 1536,
    "n_routed_experts": 64,
    "num_attention_heads": 20,
    "num_experts_per_tok": 4,
    "num_hidden_layers": 47,
    "num_key_value_heads": 20,
    "partial_rotary_factor": 1.0,
    "q_lora_rank": 768,
    "rope_scaling": None,
    "rope_theta": 1000000,
    "routed_scaling_factor": 1.8,
}
GLM5 = {
    **COMMON,
    "model_type": "glm_moe_dsa",
    "ep_size": 1,
    "first_k_dense_replace": 3,
    "head_dim": 64,
    "hidden_size": 6144,
    "index_head_dim": 128,
    "index_n_heads": 32,
    "index_topk": 2048,
    "indexer_rope_interleave": True,
    "intermediate_size": 12288,
    "max_position_embeddings": 202752,
    "moe_intermediate_size": 2048,
    "moe_layer_freq": 1,
    "n_routed_experts": 256,
    "num_attention_heads": 64,
    "num_experts_per_tok": 8,
    "num_hidden_layers": 78,
    "num_key_value_heads": 64,
    "pretraining_tp": 1,
    "q_lora_rank": 2048,
    "rope_interleave": True,
    "rope_parameters": {"rope_theta": 1000000, "rope_type": "default"},
    "routed_scaling_factor": 2.5,
}
FULL_52 = [0, 1, 2, *range(6, 75, 4)]
GLM52 = {
    **GLM5,
    "head_dim": 192,
    "index_share_for_mtp_iteration": True,
    "index_skip_topk_offset": 3,
    "index_topk_freq": 4,
    "index_topk_pattern": None,
    "max_position_embeddings": 1048576,
    "moe_router_dtype": "float32",
    "rope_parameters": {"rope_theta": 8000000, "rope_type": "default"},
}


@pytest.mark.parametrize(
    "raw, billions, active, mtp",
    [(FLASH, 29.9, 3.6, 0.6), (GLM5, 743.9, 40.8, 10.0), (GLM52, 743.4, None, 10.0)],
    ids=["4.7-Flash", "5", "5.2"],
)
def test_released(raw, billions, active, mtp):
    """As published: the total without the MTP layer, the active ones with lm_head and without the embedding."""
    config = ModelConfig.from_dict(raw)
    without = replace(config, num_nextn_predict_layers=0)
    assert without.num_parameters() / 1e9 == pytest.approx(billions, abs=0.06)
    assert (config.num_parameters() - without.num_parameters()) / 1e9 == pytest.approx(mtp, abs=0.06)
    embedding = config.vocab_size * config.hidden_size
    assert active is None or (config.num_active_parameters() - embedding) / 1e9 == pytest.approx(active, abs=0.06)
    assert config.num_parameters() == sum(
        torch.Size(shape).numel() for name, shape in layout.tensors(config) if "correction_bias" not in name
    )
    assert layout.num_tensors(config) == len(dict(layout.tensors(config)))
    assert (config.head_dim, config.rotary_dim, config.qk_head_dim) == (0, 64, 256)
    assert config.is_moe_layer(config.num_hidden_layers), "the MTP layer"
    assert ModelConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_glm_5s_mtp_layer_has_791_tensors():
    tensors = dict(layout.tensors(ModelConfig.from_dict(GLM52)))
    assert sum(name.startswith("model.layers.78.") for name in tensors) == 791
    assert tensors["model.layers.78.self_attn.indexer.wq_b.weight"] == (4096, 2048)
    assert tensors["model.layers.77.self_attn.kv_a_proj_with_mqa.weight"] == (576, 6144)
    assert tensors["model.layers.77.self_attn.o_proj.weight"] == (6144, 16384)
    assert "model.layers.77.self_attn.indexer.wk.weight" not in tensors, "a shared layer"


def test_which_layers_have_an_indexer():
    by_schedule = ModelConfig.from_dict(GLM52)
    assert [layer for layer in range(79) if by_schedule.has_indexer(layer)] == [*FULL_52, 78]
    letters = "".join("F" if layer in FULL_52 else "S" for layer in range(78))
    listed = ["full" if letter == "F" else "shared" for letter in letters]
    bare = {k: v for k, v in GLM52.items() if not k.startswith(("index_topk_", "index_skip"))}
    assert ModelConfig.from_dict({**bare, "index_topk_pattern": letters}) == by_schedule
    assert ModelConfig.from_dict({**bare, "indexer_types": listed}) == by_schedule
    everywhere = ["full"] * 78
    assert ModelConfig.from_dict({**GLM52, "indexer_types": everywhere}).indexer_types is None, "the list wins"
    assert ModelConfig.from_dict({**GLM52, "index_topk_pattern": "F" * 78}).indexer_types is None, "then the pattern"
    assert ModelConfig.from_dict(bare).indexer_types is None
    assert not ModelConfig.from_dict(FLASH).has_indexer(5)


def test_which_layers_are_dense():
    flash = ModelConfig.from_dict({**FLASH, "first_k_dense_replace": 7})
    assert [flash.is_moe_layer(layer) for layer in (0, 1, 46, 47)] == [False, True, True, True], "no key of this family"
    assert flash == ModelConfig.from_dict(FLASH)
    types = ["dense"] * 2 + ["sparse"] * 45
    assert ModelConfig.from_dict({**FLASH, "mlp_layer_types": types}).first_k_dense_replace == 2
    mixed = ModelConfig.from_dict({**FLASH, "mlp_layer_types": ["sparse", "dense"] * 23 + ["dense"]})
    assert [mixed.is_moe_layer(layer) for layer in (0, 1, 46, 47)] == [True, False, False, True]
    assert ModelConfig.from_dict(json.loads(json.dumps(mixed.to_dict()))) == mixed
    assert ModelConfig.from_dict({**GLM5, "mlp_layer_types": ["dense"] * 78}).is_moe_layer(78)
    bare = {k: v for k, v in GLM5.items() if k != "first_k_dense_replace"}
    assert ModelConfig.from_dict(bare) == ModelConfig.from_dict(GLM5)


def test_what_means_nothing():
    assert ModelConfig.from_dict({**GLM5, "head_dim": "junk"}) == ModelConfig.from_dict(GLM5)
    assert ModelConfig.from_dict({**GLM5, "rope_theta": 1e6}) == ModelConfig.from_dict(GLM5)
    no_kv = {k: v for k, v in GLM5.items() if k != "num_key_value_heads"}
    assert ModelConfig.from_dict(no_kv) == ModelConfig.from_dict(GLM5)
    flags = {"rope_interleave": False, "indexer_rope_interleave": False, "mla_norm_eps": 1e-5}
    config = ModelConfig.from_dict({**GLM5, **flags})
    assert {name: getattr(config, name) for name in flags} == flags
    default = ModelConfig.from_dict({k: v for k, v in GLM5.items() if k not in flags})
    assert default.rope_interleave and default.indexer_rope_interleave and default.mla_norm_eps == 1e-6


def without(raw, *keys):
    return {key: value for key, value in raw.items() if key not in keys}


@pytest.mark.parametrize(
    "raw, error, words",
    [
        (without(FLASH, "q_lora_rank"), CheckpointError, "lacks q_lora_rank"),
        (without(GLM5, "kv_lora_rank", "index_topk"), CheckpointError, "lacks kv_lora_rank, index_topk"),
        ({**GLM5, "v_head_dim": None}, CheckpointError, "lacks v_head_dim"),
        ({**GLM5, "q_lora_rank": None}, CheckpointError, "q_lora_rank = None, but the indexer"),
        ({**GLM5, "q_lora_rank": 0}, CheckpointError, "q_lora_rank = 0, expected 1"),
        ({**GLM5, "kv_lora_rank": True}, CheckpointError, "kv_lora_rank = True, expected an integer"),
        ({**GLM5, "qk_head_dim": 192}, CheckpointError, "qk_head_dim = 192, its two parts make 256"),
        ({**FLASH, "qk_rope_head_dim": 63, "qk_head_dim": 255}, CheckpointError, "qk_rope_head_dim = 63, expected an"),
        ({**GLM5, "index_head_dim": 32}, CheckpointError, "index_head_dim = 32, expected at least qk_rope_head_dim"),
        ({**GLM5, "num_key_value_heads": 8}, CheckpointError, "num_key_value_heads = 8, MLA has as many"),
        ({**GLM5, "attention_bias": True}, UnsupportedError, "attention_bias = True is not supported, only False"),
        ({**GLM5, "partial_rotary_factor": 0.5}, UnsupportedError, "partial_rotary_factor = 0.5 is not supported"),
        ({**GLM5, "layer_types": ["full_attention"] * 78}, UnsupportedError, "other than 'indexed_attention'"),
        ({**GLM5, "rope_interleave": 1}, CheckpointError, "rope_interleave = 1, expected true or false"),
        ({**GLM5, "mla_norm_eps": -1.0}, CheckpointError, "mla_norm_eps = -1.0, expected a finite"),
        ({**GLM5, "indexer_types": ["full"] * 77}, CheckpointError, "indexer_types names 77 layers"),
        ({**GLM5, "indexer_types": ["shared"] * 78}, CheckpointError, "indexer_types begins with 'shared'"),
        ({**GLM5, "indexer_types": ["full", "none"] * 39}, CheckpointError, "has 'none', expected 'full' or 'shared'"),
        ({**GLM5, "indexer_types": "FS"}, CheckpointError, "indexer_types = 'FS', expected a list of texts"),
        ({**GLM5, "index_topk_pattern": "FX"}, CheckpointError, "index_topk_pattern = 'FX', expected letters"),
        ({**GLM5, "index_topk_freq": 0}, CheckpointError, "index_topk_freq = 0, expected 1 or more"),
        ({**GLM5, "index_topk_freq": 2, "num_hidden_layers": 10**9}, CheckpointError, "num_hidden_layers = 1000000000"),
        ({**GLM5, "mlp_layer_types": ["moe"] * 78}, CheckpointError, "has 'moe', expected 'dense' or 'sparse'"),
    ],
)  # fmt: skip
def test_refused(raw, error, words):
    with pytest.raises(error, match=words) as caught:
        ModelConfig.from_dict(raw)
    assert len(str(caught.value)) < 300


def test_fields_belong_to_their_family():
    with pytest.raises(CheckpointError, match="kv_lora_rank = 4, but glm4_moe has no such field"):
        replace(ModelConfig.from_dict(GLM5), model_type="glm4_moe", **dict.fromkeys(("q_lora_rank",)), kv_lora_rank=4)


TINY = {
    **COMMON,
    "vocab_size": 96, "hidden_size": 32, "num_hidden_layers": 5, "num_attention_heads": 4, "num_key_value_heads": 4,
    "intermediate_size": 48, "moe_intermediate_size": 24, "n_routed_experts": 8, "num_experts_per_tok": 2,
    "q_lora_rank": 24, "kv_lora_rank": 16, "qk_nope_head_dim": 12, "qk_rope_head_dim": 8, "qk_head_dim": 20,
    "v_head_dim": 10, "max_position_embeddings": 512, "rope_theta": 5e5, "dtype": "float32", "head_dim": 99,
}  # fmt: skip
TINY_LITE = {**TINY, "model_type": "glm4_moe_lite"}
TINY_DSA = {**TINY, "model_type": "glm_moe_dsa", "index_n_heads": 2, "index_head_dim": 16, "index_topk": 4}


@pytest.mark.parametrize(
    "raw",
    [
        TINY_LITE,
        {
            **TINY_LITE,
            "q_lora_rank": None,
            "rope_interleave": False,
            "n_shared_experts": 2,
            "tie_word_embeddings": True,
        },
        {**TINY_LITE, "mlp_layer_types": ["sparse", "dense", "sparse", "dense", "sparse"]},
        {**TINY_DSA, "tie_word_embeddings": True},
        {**TINY_DSA, "index_topk_freq": 2, "first_k_dense_replace": 1, "num_nextn_predict_layers": 0},
    ],
    ids=["lite", "lite_no_q_lora", "lite_mixed", "dsa", "dsa_shared"],
)
def test_transformers_builds_saves_and_is_read_back(raw, tmp_path):
    """transformers makes of to_dict the tensors that the layout lists, and writes a config that reads as the same."""
    transformers = pytest.importorskip("transformers")
    config = ModelConfig.from_dict(raw)
    name = config.to_dict()["architectures"][0]
    theirs = getattr(transformers, name.replace("ForCausalLM", "Config")).from_dict(
        json.loads(json.dumps(config.to_dict()))
    )
    assert theirs.rope_parameters["rope_theta"] == 5e5 and theirs.qk_rope_head_dim == 8
    getattr(transformers, name)(theirs).save_pretrained(tmp_path)
    saved = {key: entry.shape for key, entry in read_header(tmp_path / SINGLE).items()}
    assert saved == dict(layout.tensors(replace(config, num_nextn_predict_layers=0)))
    assert ModelConfig.from_dir(tmp_path) == config
