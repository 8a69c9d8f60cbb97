"""ModelConfig of glm4_moe: the spellings of config.json, round trips, what is refused. The rest is test_families'."""

from __future__ import annotations

import json

import pytest

from glmx.errors import CheckpointError, UnsupportedError
from glmx.models import checkpoint, layout
from glmx.models.config import ModelConfig
from glmx.models.safetensors import read_header
from tiny_glm import CASES, random_model, tiny_config

RELEASED = {  # GLM-4.5's config.json (the fields that matter, and some that do not)
    "architectures": ["Glm4MoeForCausalLM"],
    "model_type": "glm4_moe",
    "attention_bias": True,
    "attention_dropout": 0.0,
    "head_dim": 128,
    "hidden_act": "silu",
    "hidden_size": 5120,
    "partial_rotary_factor": 0.5,
    "initializer_range": 0.02,
    "intermediate_size": 12288,
    "max_position_embeddings": 131072,
    "moe_intermediate_size": 1536,
    "eos_token_id": [151329, 151336, 151338],
    "pad_token_id": 151329,
    "n_group": 1,
    "n_routed_experts": 160,
    "n_shared_experts": 1,
    "norm_topk_prob": True,
    "num_attention_heads": 96,
    "num_experts_per_tok": 8,
    "first_k_dense_replace": 3,
    "num_hidden_layers": 92,
    "num_key_value_heads": 8,
    "num_nextn_predict_layers": 1,
    "rms_norm_eps": 1e-05,
    "rope_scaling": None,
    "rope_theta": 1000000,
    "routed_scaling_factor": 2.5,
    "tie_word_embeddings": False,
    "topk_group": 1,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.54.0",
    "use_cache": True,
    "use_qk_norm": True,
    "vocab_size": 151552,
    "scoring_func": "sigmoid",
    "topk_method": "noaux_tc",
    "moe_layer_freq": 1,
}


def test_released_config():
    config = ModelConfig.from_dict(RELEASED)
    assert config.rope_theta == 1e6 and config.rotary_dim == 64 and config.dtype == "bfloat16"
    assert config.eos_token_ids == (151329, 151336, 151338)
    assert not config.is_moe_layer(2) and config.is_moe_layer(3) and config.is_moe_layer(92)
    # 352.8 B and the MTP layer's 4.0 B
    assert config.num_parameters() == pytest.approx(356.8e9, rel=1e-3)


@pytest.mark.parametrize("case", CASES)
def test_round_trip(case):
    config = tiny_config(**CASES[case], eos_token_id=(1, 2), rope_theta=5e5)
    assert ModelConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


@pytest.mark.parametrize("case", CASES)
def test_num_parameters(case):
    model = random_model(tiny_config(**CASES[case]))
    assert model.config.num_parameters() == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("mtp", [0, 1])
def test_layout_is_what_is_saved(case, mtp, tmp_path):
    config = tiny_config(**CASES[case], num_nextn_predict_layers=mtp)
    directory = checkpoint.save(random_model(config), tmp_path / "ckpt")
    entries = {name: entry.shape for name, entry in read_header(directory / checkpoint.SINGLE).items()}
    assert dict(layout.tensors(config)) == entries and layout.num_tensors(config) == len(entries)
    E = config.n_routed_experts
    assert layout.num_tensors(config, fused_layers=1) == len(entries) - 3 * E + 2


@pytest.mark.parametrize("mtp", [0, 1])
def test_transformers_reads_and_writes_it(mtp):
    transformers = pytest.importorskip("transformers")
    config = tiny_config(num_nextn_predict_layers=mtp, rope_theta=5e5, partial_rotary_factor=0.25)
    theirs = transformers.Glm4MoeConfig.from_dict(json.loads(json.dumps(config.to_dict())))
    assert theirs.rope_parameters["rope_theta"] == 5e5
    assert theirs.rope_parameters["partial_rotary_factor"] == 0.25
    assert theirs.num_mtp_layers == mtp and theirs.head_dim == 16
    assert ModelConfig.from_dict(json.loads(theirs.to_json_string(use_diff=False))) == config


def test_spellings():
    nested = {k: v for k, v in RELEASED.items() if k not in ("rope_theta", "partial_rotary_factor")}
    nested["rope_parameters"] = {"rope_type": "default", "rope_theta": 1e6, "partial_rotary_factor": 0.5}
    nested["num_mtp_layers"] = nested.pop("num_nextn_predict_layers")
    nested["dtype"] = nested.pop("torch_dtype")
    assert ModelConfig.from_dict(nested) == ModelConfig.from_dict(RELEASED)
    assert ModelConfig.from_dict({**nested, "num_mtp_layers": 0}).num_nextn_predict_layers == 0
    del nested["rope_parameters"]["partial_rotary_factor"]
    assert ModelConfig.from_dict(nested).partial_rotary_factor == 0.5, "glm4_moe's default"


@pytest.mark.parametrize(
    "change, words",
    [
        ({"scoring_func": "softmax"}, "scoring_func = 'softmax'"),
        ({"topk_method": "greedy"}, "topk_method = 'greedy'"),
        ({"moe_layer_freq": 2}, "moe_layer_freq = 2"),
        ({"hidden_act": "gelu"}, "hidden_act = 'gelu'"),
        ({"rope_scaling": {"rope_type": "yarn"}}, "'yarn'"),
        ({"rope_parameters": {"rope_type": "llama3"}}, "'llama3'"),
        ({"num_nextn_predict_layers": 3}, "num_nextn_predict_layers = 3"),
        ({"torch_dtype": "float16"}, "'float16'"),
        ({"layer_types": ["sliding_attention"]}, "layer_types"),
        ({"model_type": "glm5_next"}, r"'glm5_next' \(GLM-5.3-Flash, another architecture\)"),
        ({"model_type": ["glm4_moe"]}, r"model_type \['glm4_moe'\]"),
        ({"moe_layer_freq": True}, "moe_layer_freq = True"),
        ({"n_routed_experts": 513}, "n_routed_experts = 513 is not supported, only 1..512"),
        (
            {"quantization_config": {"x": ["y" * 10_000] * 9}},
            r"quantization_config: quant_method = None is not supported, only 'fp8' and",
        ),
        ({"quantization_config": {"quant_method": ["y" * 10_000] * 9}}, r"quant_method = \['yyy.{,200}\.\.\. is not"),
        ({"rope_parameters": {"rope_type": ["yarn"]}}, r"rope_type = \['yarn'\]"),
    ],
)
def test_unsupported(change, words):
    with pytest.raises(UnsupportedError, match=words):
        ModelConfig.from_dict({**RELEASED, **change})


@pytest.mark.parametrize(
    "change, words",
    [
        ({"model_type": None}, "no model_type"),
        ({"vocab_size": None}, "lacks vocab_size"),
        ({"hidden_size": "5120"}, "hidden_size = '5120'"),
        ({"hidden_size": True}, "hidden_size = True"),
        ({"use_qk_norm": 1}, "use_qk_norm = 1"),
        ({"num_experts_per_tok": 0}, "num_experts_per_tok = 0"),
        ({"num_key_value_heads": 7}, "not a multiple of num_key_value_heads = 7"),
        ({"n_group": 3}, "not a multiple of n_group = 3"),
        ({"topk_group": 2}, "topk_group = 2 exceeds n_group = 1"),
        ({"n_group": 80, "topk_group": 2}, "exceeds the 4 experts"),
        ({"partial_rotary_factor": 0.01}, "rotates 1 dims"),
        ({"partial_rotary_factor": 1.5}, "partial_rotary_factor = 1.5"),
        ({"num_mtp_layers": 0}, "differ"),
        ({"rope_parameters": {"rope_theta": 1e4}}, "two values of rope_theta"),
        ({"hidden_size": 10**400}, r"hidden_size = 1000+\.\.\.0+, expected 1..2147483647"),
        ({"num_hidden_layers": -1}, "num_hidden_layers = -1, expected 1..4096"),
        ({"first_k_dense_replace": -1}, "first_k_dense_replace = -1, expected 0"),
        ({"max_position_embeddings": 2**31}, "max_position_embeddings = 2147483648, expected 1..2147483647"),
        ({"hidden_size": 2**31 - 1, "vocab_size": 2**31 - 1}, "parameters, expected at most 1125899906842624"),
        ({"hidden_size": 1.0}, "hidden_size = 1.0, expected an integer"),
        ({"rope_theta": float("nan")}, "rope_theta = nan, expected a finite number"),
        ({"rope_theta": 10**400}, "rope_theta = 1000.*, expected a finite number"),
        ({"rope_theta": 0.5}, "rope_theta = 0.5, expected 1..1e30"),
        ({"rms_norm_eps": float("inf")}, "rms_norm_eps = inf, expected a finite number"),
        ({"rms_norm_eps": -1e-5}, "rms_norm_eps = -1e-05, expected a finite number >= 0"),
        ({"routed_scaling_factor": True}, "routed_scaling_factor = True, expected a finite number"),
        ({"eos_token_id": [1, True]}, r"eos_token_id = \(1, True\), expected an integer or a list"),
        ({"eos_token_id": [1, -2]}, r"eos_token_id = \(1, -2\), expected ids in"),
        ({"pad_token_id": -1}, "pad_token_id = -1, expected 0"),
        ({"torch_dtype": 16}, "dtype = 16, expected text"),
        ({"rope_parameters": []}, r"rope_parameters = \[\], expected an object or null"),
        ({"rope_scaling": "yarn"}, "rope_scaling = 'yarn', expected an object or null"),
        ({"layer_types": 3}, "layer_types = 3, expected a list or null"),
        ({"num_mtp_layers": [1]}, r"differ: \[1, \[1\]\]"),
    ],
)
def test_contradictions(change, words):
    with pytest.raises(CheckpointError, match=words):
        ModelConfig.from_dict({**RELEASED, **change})
