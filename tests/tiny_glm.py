"""Tiny random models of the three families and their transformers twins, shared by the tests of models and serve."""

from __future__ import annotations

import json
from typing import Any, NamedTuple

import torch

from glmx.models import config_json
from glmx.models.config import ModelConfig
from glmx.models.decoder import Decoder

CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "qk_norm_bias": {"use_qk_norm": True, "attention_bias": True, "num_key_value_heads": 1},
    "groups": {"n_group": 4, "topk_group": 2, "n_routed_experts": 16, "num_experts_per_tok": 4},
    "dense_first": {"first_k_dense_replace": 2, "use_qk_norm": True, "routed_scaling_factor": 2.5},
    "all_moe": {"first_k_dense_replace": 0, "norm_topk_prob": False, "partial_rotary_factor": 1.0},
    "tied": {"tie_word_embeddings": True, "n_shared_experts": 2, "partial_rotary_factor": 0.25},
    "lite": {"model_type": "glm4_moe_lite"},
    "lite_one_q": {"model_type": "glm4_moe_lite", "q_lora_rank": None, "rope_interleave": False},
    "lite_groups": {"model_type": "glm4_moe_lite", "n_group": 4, "topk_group": 2, "n_routed_experts": 16},
    "dsa": {"model_type": "glm_moe_dsa", "first_k_dense_replace": 2},
    "dsa_wide": {"model_type": "glm_moe_dsa", "index_topk": 64, "n_group": 2},
    "dsa_shared": {
        "model_type": "glm_moe_dsa",
        "num_hidden_layers": 4,
        "indexer_types": ("full", "shared", "full", "shared"),
        "index_share_for_mtp_iteration": True,
    },
}
FAMILIES = ("qk_norm_bias", "lite", "dsa_shared")  # one case of each family
_MLA: dict[str, Any] = {
    "num_key_value_heads": 4,
    "q_lora_rank": 24,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 12,
    "qk_rope_head_dim": 8,
    "v_head_dim": 10,
}
_OF_FAMILY: dict[str, dict[str, Any]] = {
    "glm4_moe": {"num_key_value_heads": 2, "head_dim": 16},
    "glm4_moe_lite": _MLA,
    "glm_moe_dsa": {**_MLA, "index_n_heads": 8, "index_head_dim": 12, "index_topk": 6},
}


def tiny_config(**overrides: Any) -> ModelConfig:
    values: dict[str, Any] = {
        **_OF_FAMILY[overrides.get("model_type", "glm4_moe")],
        "vocab_size": 96,
        "hidden_size": 32,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "intermediate_size": 48,
        "moe_intermediate_size": 24,
        "n_routed_experts": 8,
        "num_experts_per_tok": 2,
        "max_position_embeddings": 512,
        "dtype": "float32",
    }
    return ModelConfig(**{**values, **overrides})


def random_model(config: ModelConfig, seed: int = 0, dtype: torch.dtype = torch.float32) -> Decoder:
    """Every tensor random and of a size that matters: norms around 1, biases and correction biases not zero."""
    model = Decoder(config, dtype)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            noise = torch.randn(tensor.shape, generator=generator)
            if name.endswith("norm.weight"):
                tensor.copy_(1 + 0.1 * noise)
            elif name.endswith("embed_tokens.weight"):
                tensor.copy_(noise)
            else:
                tensor.copy_((0.05 if "correction_bias" in name else 0.2) * noise)
    return model.eval()


def random_ids(config: ModelConfig, rows: int, tokens: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(config.vocab_size, (rows, tokens), generator=torch.Generator().manual_seed(seed))


def hf_state_dict(model: Decoder) -> dict[str, torch.Tensor]:
    """The decoder layers' tensors under transformers' in-memory names (experts fused, MLPs apart, no MTP)."""
    out = {}
    for name, tensor in model.state_dict().items():
        if name.startswith(f"model.layers.{model.config.num_hidden_layers}."):
            continue
        if name.endswith(".gate_up_proj.weight"):
            gate, up = tensor.chunk(2)
            out[name.replace("gate_up_proj", "gate_proj")] = gate
            out[name.replace("gate_up_proj", "up_proj")] = up
        else:
            out[name] = tensor
    return out


def hf_twin(model: Decoder) -> Any:
    """transformers' model with the same weights, without going through files."""
    import transformers

    family = config_json.FAMILIES[model.config.model_type][0]
    config = getattr(transformers, family.replace("ForCausalLM", "Config")).from_dict(
        json.loads(json.dumps(model.config.to_dict()))
    )
    config._attn_implementation = "eager"
    twin = getattr(transformers, family)(config).to(model.dtype)
    twin.load_state_dict(hf_state_dict(model))
    return twin.eval()


def index_scores(
    indexer: Any, x: torch.Tensor, latent: torch.Tensor, cos_sin: tuple[torch.Tensor, torch.Tensor]
) -> torch.Tensor:
    """What a twin's indexer scores keys by, [B, T, T], from its weights and the arguments of its forward."""
    half = indexer.qk_rope_head_dim // 2
    cos, sin = (part[..., None, :half] for part in cos_sin)

    def rotated(rows: torch.Tensor) -> torch.Tensor:
        even, odd = rows[..., : 2 * half : 2], rows[..., 1 : 2 * half : 2]
        return torch.cat([even * cos - odd * sin, odd * cos + even * sin, rows[..., 2 * half :]], -1)

    q = rotated(indexer.wq_b(latent).unflatten(-1, (indexer.n_heads, -1)))
    key = rotated(indexer.k_norm(indexer.wk(x))[:, :, None])[:, :, 0]
    products = torch.einsum("bthd,bsd->bths", q, key).relu()
    scores = torch.einsum("bths,bth->bts", products, indexer.weights_proj(x))
    return scores * (indexer.n_heads * indexer.head_dim) ** -0.5


class Choices(NamedTuple):
    """What a twin selected: expert ids [B*T, K] per MoE layer, keys [B, T, k] per indexer; the smallest margins."""

    routes: list[torch.Tensor]
    keys: list[torch.Tensor]
    route_margin: float
    key_margin: float


@torch.no_grad()
def hf_choices(twin: Any, ids: torch.Tensor) -> Choices:
    """Runs the twin on ids [B, T] and watches every selection, the groups' included."""
    routes: list[torch.Tensor] = []
    keys: list[torch.Tensor] = []
    margins: list[torch.Tensor] = []
    key_margins: list[torch.Tensor] = []

    def record(gate: Any, _: Any, output: Any) -> None:
        logits, _, topk_ids = output
        biased = logits.float().sigmoid() + gate.e_score_correction_bias
        if gate.num_group > 1:
            groups = biased.view(len(biased), gate.num_group, -1)
            best = groups.topk(2).values.sum(-1).sort(descending=True).values
            margins.append((best[:, gate.topk_group - 1] - best[:, gate.topk_group]).min())
            kept = best[:, gate.topk_group - 1 : gate.topk_group]
            outside = (groups.topk(2).values.sum(-1) < kept)[..., None].expand_as(groups).reshape(biased.shape)
            biased = biased.masked_fill(outside, float("-inf"))
        ordered = biased.sort(descending=True).values
        margins.append((ordered[:, gate.top_k - 1] - ordered[:, gate.top_k]).min())
        routes.append(topk_ids)

    def record_keys(indexer: Any, args: Any, output: torch.Tensor) -> None:
        T, k = output.shape[1], indexer.index_topk
        scores = index_scores(indexer, *args[:3])
        for t in range(k, T):
            ordered = scores[:, t, : t + 1].sort(descending=True).values
            key_margins.append((ordered[:, k - 1] - ordered[:, k]).min())
        keys.append(output)

    hooks = [layer.mlp.gate.register_forward_hook(record) for layer in twin.model.layers if hasattr(layer.mlp, "gate")]
    indexers = [layer.self_attn.indexer for layer in twin.model.layers if getattr(layer.self_attn, "indexer", None)]
    hooks += [indexer.register_forward_hook(record_keys) for indexer in indexers]
    twin(ids)
    for hook in hooks:
        hook.remove()
    smallest = [min((float(m) for m in each), default=1.0) for each in (margins, key_margins)]
    return Choices(routes, keys, *smallest)


def clear_cut(config: ModelConfig, tokens: int, start: int, rows: int = 2) -> tuple[Decoder, Any, torch.Tensor]:
    """(model, twin, ids) of the first seed from `start` on whose every selection has a margin: above 1e-5 for experts,
    2e-5 for keys.
    """
    for seed in range(start, start + 300):
        model = random_model(config, seed)
        twin, ids = hf_twin(model), random_ids(config, rows, tokens, seed)
        choices = hf_choices(twin, ids)
        if choices.route_margin > 1e-5 and choices.key_margin > 2e-5:
            return model, twin, ids
    raise AssertionError("no seed with clear selections")
