"""The two models of `glmx demo`, and the rows they are trained on.

Sized so that the demo's token budget takes some minutes on two cores; shapes follow the released models: first layer
dense, sigmoid router, one shared expert, one MTP layer.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

VOCAB = 4096
_COMMON = {
    "vocab_size": VOCAB,
    "hidden_size": 256,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "intermediate_size": 768,
    "moe_intermediate_size": 192,
    "n_routed_experts": 16,
    "num_experts_per_tok": 4,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
    "norm_topk_prob": True,
    "routed_scaling_factor": 1.0,
    "rope_theta": 10000.0,
    "max_position_embeddings": 4096,
    "num_nextn_predict_layers": 1,
}


@dataclass(frozen=True)
class DemoModel:
    """A config.json's content but for the tokenizer's ids, and rows of `seq_len` tokens, 2,048 tokens to a step.

    `dense_share` of the token budget is trained with dense attention, before an indexer selects keys. The MTP layer is
    trained in `mtp_steps` steps.
    """

    config: dict[str, Any]
    seq_len: int
    batch_rows: int
    dense_share: float = 0.0
    mtp_steps: int = 1

    @property
    def tokens_per_step(self) -> int:
        return self.seq_len * self.batch_rows


MODELS = {
    # GLM-5: 64 of up to 512 keys; two of the four layers take the list of the layer before them, as from GLM-5.2 on.
    "glm_moe_dsa": DemoModel(
        {
            "model_type": "glm_moe_dsa",
            **_COMMON,
            "num_key_value_heads": 4,
            "q_lora_rank": 128,
            "kv_lora_rank": 64,
            "qk_nope_head_dim": 48,
            "qk_rope_head_dim": 16,
            "v_head_dim": 64,
            "index_n_heads": 8,
            "index_head_dim": 32,
            "index_topk": 64,
            "indexer_types": ["full", "shared", "full", "shared"],
        },
        seq_len=512,
        batch_rows=4,
        dense_share=0.25,
        # As GLM-5 was. In the full demo one step has drafts 1, 2, 3 accepted at 57, 33 and 23 % of places, and 1.932
        # bits per byte; three have 60, 41 and 29 %, and 1.902, for 1.6 times the processor time of a training step.
        # With seed 1 and 400,000 tokens: 55, 32 and 20 % at 2.062; 55, 39 and 30 % at 2.075.
        mtp_steps=3,
    ),
    # GLM-4.5. After 400,000 tokens three MTP steps have gained nothing: 38, 16 and 9 % at 2.166 bits per byte, where
    # one has 40, 18 and 10 % at 2.129.
    "glm4_moe": DemoModel(
        {
            "model_type": "glm4_moe",
            **_COMMON,
            "num_key_value_heads": 2,
            "head_dim": 64,
            "use_qk_norm": True,
            "attention_bias": False,
            "partial_rotary_factor": 0.5,
        },
        seq_len=256,
        batch_rows=8,
    ),
}
