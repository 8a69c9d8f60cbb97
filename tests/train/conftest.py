"""A tiny model and a tiny corpus, shared by the tests of this folder."""

import json

import numpy as np
import pytest
import torch

TINY = {
    "model_type": "glm4_moe",
    "architectures": ["Glm4MoeForCausalLM"],
    "vocab_size": 61,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "intermediate_size": 48,
    "moe_intermediate_size": 16,
    "n_routed_experts": 8,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "first_k_dense_replace": 1,
    "num_nextn_predict_layers": 1,
    "use_qk_norm": True,
    "attention_bias": True,
    "max_position_embeddings": 512,
}


# A GLM-5 whose second layer takes the first one's list; rows of 24 tokens have more than 6 keys.
TINY_DSA = {key: value for key, value in TINY.items() if key not in ("head_dim", "use_qk_norm", "attention_bias")} | {
    "model_type": "glm_moe_dsa",
    "architectures": ["GlmMoeDsaForCausalLM"],
    "num_key_value_heads": 2,
    "q_lora_rank": 24,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 12,
    "qk_rope_head_dim": 4,
    "v_head_dim": 16,
    "index_n_heads": 2,
    "index_head_dim": 8,
    "index_topk": 6,
    "indexer_types": ["full", "shared"],
}


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory):
    """A directory with config.json alone."""
    path = tmp_path_factory.mktemp("model")
    (path / "config.json").write_text(json.dumps(TINY))
    return path


@pytest.fixture(scope="session")
def dsa_dir(tmp_path_factory):
    """The same of a glm_moe_dsa."""
    path = tmp_path_factory.mktemp("dsa")
    (path / "config.json").write_text(json.dumps(TINY_DSA))
    return path


@pytest.fixture(scope="session")
def data_dir(tmp_path_factory):
    """Shards `train` and `heldout`: documents that count upwards, now and then by two."""
    from glmx.data.shards import ShardWriter

    path, rng, vocab = tmp_path_factory.mktemp("data"), np.random.default_rng(0), TINY["vocab_size"]
    for name, documents in (("train", 40), ("heldout", 4)):
        with ShardWriter(path, name, vocab_size=vocab) as writer:
            for length in rng.integers(3, 70, size=documents):
                steps = 1 + (rng.random(length) < 0.2)
                writer.add((rng.integers(vocab) + np.cumsum(steps)) % vocab)
    return path


@pytest.fixture
def raw(model_dir, data_dir, tmp_path):
    """A run of 6 steps as a nested dict, to be changed by the test."""
    return {
        "model": str(model_dir),
        "out": str(tmp_path / "out"),
        "data": {"shards": str(data_dir), "heldout": "heldout", "seq_len": 24},
        "optim": {"lr": 1e-2, "min_lr": 1e-3, "warmup_tokens": 96},
        "train": {"steps": 6, "batch_rows": 4, "micro_rows": 2, "dtype": "bf16", "seed": 3},
        "checkpoint": {"every_steps": 2},
        "eval": {"every_steps": 3},
    }


@pytest.fixture
def dsa_raw(raw, dsa_dir):
    """The run of a glm_moe_dsa, its attention dense in the first three steps."""
    return {**raw, "model": str(dsa_dir), "indexer": {"dense_tokens": 3 * 96}}


@pytest.fixture
def plain_sequence_loss():
    """The sequence-wise balance loss in plain torch, summed over rows."""

    def loss_of(scores, ids, lengths):
        """DeepSeek-V3, eq. 17-20, as written there."""
        total = 0.0
        for s, chosen in zip(scores.split(lengths), ids.split(lengths), strict=True):
            n = len(s)
            one_hot = torch.nn.functional.one_hot(chosen.long(), scores.shape[1]).sum(1)
            f = one_hot.sum(0).to(s.dtype) * scores.shape[1] / (chosen.shape[1] * n)
            P = (s / s.sum(1, keepdim=True)).mean(0)
            total = total + (f * P).sum()
        return total

    return loss_of
