"""The MTP layer in plain torch, written from the paper and the checkpoint's conventions, sharing no code with
glmx: the test's independent opinion. One sequence at a time, in the dtype of its arguments.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from glmx.models.config import ModelConfig


def _norm(x, weight, eps):
    return weight * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps)


def _rotate(x, positions, config, interleaved=False):  # x [T, A, d]
    r = config.qk_rope_head_dim if config.is_mla else int(config.head_dim * config.partial_rotary_factor)
    frequencies = config.rope_theta ** (-torch.arange(0, r, 2, dtype=torch.float64) / r)
    angle = (positions[:, None].double() * frequencies)[:, None]  # [T, 1, r/2]
    rest = x[..., r:]
    first, second = (x[..., :r:2], x[..., 1:r:2]) if interleaved else (x[..., : r // 2], x[..., r // 2 : r])
    cos, sin = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
    return torch.cat([first * cos - second * sin, second * cos + first * sin, rest], -1)


def _swiglu(x, gate, up, down):
    return F.linear(F.silu(F.linear(x, gate)) * F.linear(x, up), down)


def _attention(x, w, positions, config):
    T, A, G, d = len(x), config.num_attention_heads, config.num_key_value_heads, config.head_dim
    q, k, v = (F.linear(x, w[f"self_attn.{p}_proj.weight"], w.get(f"self_attn.{p}_proj.bias")) for p in "qkv")
    q, k, v = q.view(T, A, d), k.view(T, G, d), v.view(T, G, d)
    if config.use_qk_norm:
        q = _norm(q, w["self_attn.q_norm.weight"], config.rms_norm_eps)
        k = _norm(k, w["self_attn.k_norm.weight"], config.rms_norm_eps)
    q, k = _rotate(q, positions, config), _rotate(k, positions, config)
    heads = []
    for a in range(A):
        g = a // (A // G)
        scores = (q[:, a] @ k[:, g].T) / d**0.5
        scores = scores.masked_fill(torch.triu(torch.ones(T, T, dtype=torch.bool), 1), float("-inf"))
        heads.append(scores.softmax(-1) @ v[:, g])
    return F.linear(torch.cat(heads, -1), w["self_attn.o_proj.weight"])


def _selected(x, latent, w, positions, config):
    """Which keys each row attends to [T, T]: all of its past, or the index_topk with the highest index scores."""
    T, causal = len(x), torch.ones(len(x), len(x), dtype=torch.bool).tril()
    if config.model_type != "glm_moe_dsa" or config.index_topk >= T:
        return causal
    q = F.linear(latent, w["self_attn.indexer.wq_b.weight"]).view(T, config.index_n_heads, config.index_head_dim)
    k_norm = w["self_attn.indexer.k_norm.weight"], w["self_attn.indexer.k_norm.bias"]
    k = F.layer_norm(F.linear(x, w["self_attn.indexer.wk.weight"]), (config.index_head_dim,), *k_norm, 1e-6)
    q = _rotate(q, positions, config, config.indexer_rope_interleave)
    k = _rotate(k[:, None], positions, config, config.indexer_rope_interleave)[:, 0]
    weights = F.linear(x, w["self_attn.indexer.weights_proj.weight"]) * config.index_n_heads**-0.5
    scores = (weights[..., None] * (q @ k.T * config.index_head_dim**-0.5).relu()).sum(1)
    out = torch.zeros_like(causal)
    for t in range(T):
        best = scores[t, : t + 1].sort(descending=True, stable=True).indices[: config.index_topk]
        out[t, best] = True
    return out


def _mla(x, w, positions, config, seen=None):
    """Keys and values of every head, expanded: the form that papers write, and that glmx does not compute.

    `seen` [T, T] is the keys to attend to; None: the layer selects. -> (output, the keys attended to)
    """
    T, A = len(x), config.num_attention_heads
    nope, c, v_dim = config.qk_nope_head_dim, config.kv_lora_rank, config.v_head_dim
    latent = x
    if config.q_lora_rank is None:
        q = F.linear(x, w["self_attn.q_proj.weight"])
    else:
        latent = F.linear(x, w["self_attn.q_a_proj.weight"])
        latent = _norm(latent, w["self_attn.q_a_layernorm.weight"], config.mla_norm_eps)
        q = F.linear(latent, w["self_attn.q_b_proj.weight"])
    q = q.view(T, A, config.qk_head_dim)
    row = F.linear(x, w["self_attn.kv_a_proj_with_mqa.weight"])
    kv = _norm(row[:, :c], w["self_attn.kv_a_layernorm.weight"], config.mla_norm_eps)
    kv = F.linear(kv, w["self_attn.kv_b_proj.weight"]).view(T, A, nope + v_dim)
    q_rope = _rotate(q[..., nope:], positions, config, config.rope_interleave)
    k_rope = _rotate(row[:, None, c:], positions, config, config.rope_interleave)
    seen = _selected(x, latent, w, positions, config) if seen is None else seen
    heads = []
    for a in range(A):
        scores = q[:, a, :nope] @ kv[:, a, :nope].T + q_rope[:, a] @ k_rope[:, 0].T
        scores = (scores * config.qk_head_dim**-0.5).masked_fill(~seen, float("-inf"))
        heads.append(scores.softmax(-1) @ kv[:, a, nope:])
    return F.linear(torch.cat(heads, -1), w["self_attn.o_proj.weight"]), seen


def _moe(x, w, config):
    scores = F.linear(x, w["mlp.gate.weight"]).sigmoid()
    biased = scores + w["mlp.gate.e_score_correction_bias"]
    rows = []
    for t in range(len(x)):
        groups = biased[t].view(config.n_group, -1)
        best = groups.sort(descending=True).values[:, :2].sum(-1)
        outside = best.sort(descending=True, stable=True).indices[config.topk_group :]
        masked = groups.clone()
        masked[outside] = float("-inf")
        chosen = masked.flatten().sort(descending=True, stable=True).indices[: config.num_experts_per_tok]
        weights = scores[t, chosen]
        if config.norm_topk_prob:
            weights = weights / (weights.sum() + 1e-20)
        weights = weights * config.routed_scaling_factor
        y = 0
        for weight, e in zip(weights, chosen.tolist(), strict=True):
            gate, up = w["mlp.experts.gate_up_proj"][e].chunk(2)
            y = y + weight * _swiglu(x[t], gate, up, w["mlp.experts.down_proj"][e])
        rows.append(y)
    gate, up = w["mlp.shared_experts.gate_up_proj.weight"].chunk(2)
    return torch.stack(rows) + _swiglu(x, gate, up, w["mlp.shared_experts.down_proj.weight"])


def mtp_hidden(
    weights: dict[str, torch.Tensor],
    embed_tokens: torch.Tensor,
    config: ModelConfig,
    hidden: torch.Tensor,
    next_ids: torch.Tensor,
) -> torch.Tensor:
    """hidden [T, H] after the final norm, next_ids [T] -> [T, H] after shared_head.norm.

    `weights` are the MTP layer's tensors by their names behind `model.layers.N.`. Positions start at 0: with
    RoPE only differences matter.
    """
    return _step(weights, embed_tokens, config, hidden, next_ids)[0]


def mtp_chain(
    weights: dict[str, torch.Tensor],
    embed_tokens: torch.Tensor,
    config: ModelConfig,
    hidden: torch.Tensor,
    ids: torch.Tensor,
    steps: int,
) -> list[torch.Tensor]:
    """hidden [T, H] of the first T of `ids`, the document's tokens -> per step [n, H], as far as the document goes.

    Row t of step s (1 the first) has read the token t + s and predicts the one behind it.
    """
    chain, seen = [], None
    for s in range(1, steps + 1):
        n = min(len(hidden), len(ids) - s)
        if n <= 0:
            break
        known = None if seen is None else seen[:n, :n]
        hidden, used = _step(weights, embed_tokens, config, hidden[:n], ids[s : s + n], known)
        seen = used if config.index_share_for_mtp_iteration else None
        chain.append(hidden)
    return chain


def _step(w, embed_tokens, config, hidden, next_ids, seen=None):
    eps, positions = config.rms_norm_eps, torch.arange(len(hidden))
    embedded = _norm(embed_tokens[next_ids], w["enorm.weight"], eps)
    x = F.linear(torch.cat([embedded, _norm(hidden, w["hnorm.weight"], eps)], -1), w["eh_proj.weight"])
    normed = _norm(x, w["input_layernorm.weight"], eps)
    if config.is_mla:
        attended, seen = _mla(normed, w, positions, config, seen)
    else:
        attended = _attention(normed, w, positions, config)
    x = x + attended
    x = x + _moe(_norm(x, w["post_attention_layernorm.weight"], eps), w, config)
    return _norm(x, w["shared_head.norm.weight"], eps), seen
