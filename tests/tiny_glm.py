"""Tiny random glm4_moe models and their transformers twins, shared by the tests of models and serve."""

from __future__ import annotations

import json
from typing import Any

import torch

from glmx.models.config import ModelConfig
from glmx.models.decoder import Decoder

CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "qk_norm_bias": {"use_qk_norm": True, "attention_bias": True, "num_key_value_heads": 1},
    "groups": {"n_group": 4, "topk_group": 2, "n_routed_experts": 16, "num_experts_per_tok": 4},
    "dense_first": {"first_k_dense_replace": 2, "use_qk_norm": True, "routed_scaling_factor": 2.5},
    "all_moe": {"first_k_dense_replace": 0, "norm_topk_prob": False, "partial_rotary_factor": 1.0},
    "tied": {"tie_word_embeddings": True, "n_shared_experts": 2, "partial_rotary_factor": 0.25},
}


def tiny_config(**overrides: Any) -> ModelConfig:
    values: dict[str, Any] = {
        "vocab_size": 96,
        "hidden_size": 32,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
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
    from transformers import Glm4MoeConfig, Glm4MoeForCausalLM

    config = Glm4MoeConfig.from_dict(json.loads(json.dumps(model.config.to_dict())))
    config._attn_implementation = "eager"
    twin = Glm4MoeForCausalLM(config).to(model.dtype)
    twin.load_state_dict(hf_state_dict(model))
    return twin.eval()


@torch.no_grad()
def hf_routes(twin: Any, ids: torch.Tensor) -> tuple[list[torch.Tensor], float]:
    """(expert ids [B*T, K] per MoE layer, smallest margin of any selection, the groups' included)."""
    routes: list[torch.Tensor] = []
    margins: list[torch.Tensor] = []

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

    gates = [layer.mlp.gate for layer in twin.model.layers if hasattr(layer.mlp, "gate")]
    hooks = [gate.register_forward_hook(record) for gate in gates]
    twin(ids)
    for hook in hooks:
        hook.remove()
    return routes, min((float(m) for m in margins), default=1.0)


def clear_cut(config: ModelConfig, tokens: int, start: int, rows: int = 2) -> tuple[Decoder, Any, torch.Tensor]:
    """(model, twin, ids) of the first seed from `start` on whose every selection has a margin above 1e-5."""
    for seed in range(start, start + 100):
        model = random_model(config, seed)
        twin, ids = hf_twin(model), random_ids(config, rows, tokens, seed)
        if hf_routes(twin, ids)[1] > 1e-5:
            return model, twin, ids
    raise AssertionError("no seed with clear selections")
