"""One DSA attention layer of GLM-5: 64 heads of 576/512, indexer 32 x 128, top-2048, bf16, random weights and cache.

    pytest bench/e2e/bench_dsa.py            (OMP_NUM_THREADS sets the threads)

Two things are measured, for a decode step and for the last 512 tokens of a prompt. "core": selection and attention from
given queries and cache, beside torch (index scores by a product, topk, SDPA under the mask that it makes; all heads of
a token as rows of one latent head, which is torch's strong form). "layer": the whole attention layer, projections
included, beside transformers' own (prefill at 4,096 keys, decode up to 32,768: it expands every cached key for every
head). The floor of a decode step's bytes is the index keys and the gathered latents, and for the layer its
weights; the ceilings are measured in the same test.
"""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace

import harness
import pytest
import torch

import glmx.ops
from glmx.layers.dsa import DSA
from glmx.models.batch import Batch
from glmx.models.config import ModelConfig
from glmx.models.state import ModelState

GLM5 = {
    "model_type": "glm_moe_dsa", "vocab_size": 64, "hidden_size": 6144, "num_hidden_layers": 1,
    "num_attention_heads": 64, "num_key_value_heads": 64, "intermediate_size": 64, "moe_intermediate_size": 64,
    "n_routed_experts": 2, "num_experts_per_tok": 1, "q_lora_rank": 2048, "kv_lora_rank": 512,
    "qk_nope_head_dim": 192, "qk_rope_head_dim": 64, "v_head_dim": 256, "index_n_heads": 32, "index_head_dim": 128,
    "index_topk": 2048, "first_k_dense_replace": 1, "num_nextn_predict_layers": 0, "rope_theta": 1e6,
    "max_position_embeddings": 202752,
}  # fmt: skip
SMALL = {
    "hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 4, "q_lora_rank": 32, "kv_lora_rank": 32,
    "qk_nope_head_dim": 24, "qk_rope_head_dim": 8, "v_head_dim": 32, "index_n_heads": 8, "index_head_dim": 16,
    "index_topk": 32,
}  # fmt: skip
DTYPE = torch.bfloat16


def random(*shape: int, scale: float = 1.0) -> torch.Tensor:
    return (torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))) * scale).to(DTYPE)


@pytest.fixture(scope="module")
def world():
    """world(small): the layer and its config, made once."""
    made: dict[bool, SimpleNamespace] = {}

    def make(small: bool) -> SimpleNamespace:
        if small not in made:
            config = ModelConfig.from_dict({**GLM5, **(SMALL if small else {})})
            layer = DSA(config, 0, DTYPE, torch.device("cpu")).eval()
            with torch.no_grad():
                for parameter in layer.parameters():
                    parameter.copy_(1 + random(*parameter.shape) if parameter.dim() == 1 else random(*parameter.shape))
                    if parameter.dim() == 2:
                        parameter.mul_(parameter.shape[1] ** -0.5)
            made[small] = SimpleNamespace(config=config, layer=layer)
        return made[small]

    return make


def cached(world: SimpleNamespace, tokens: int, keys: int) -> tuple[ModelState, Batch]:
    """A state whose one sequence has `keys` rows, of which the last `tokens` are the batch's."""
    state = ModelState([world.layer.planes], 1, keys, DTYPE, torch.device("cpu"))
    state.allocate()
    batch = Batch([0, tokens], [keys], [0])
    state.begin(Batch([0, keys], [keys], [0]), state.lengths)
    for plane in state.layers[0].planes.values():
        plane.copy_(random(*plane.shape))
    state.lengths[0] = keys - tokens
    state.begin(batch, state.lengths)
    return state, batch


def measure(
    benchmark, record_row, name: str, ours: Callable, peers: dict[str, Callable], unfit: dict[str, int], rounds: int,
    flop: float, touched: float,
) -> None:  # fmt: skip
    def of_its_floor(seconds: float, ceilings: dict[str, float]) -> str:
        return f"; {seconds / (touched / ceilings['read'] / 1e9):.1f}x its byte floor"

    harness.compare(
        benchmark, record_row, name, "sparse_mla", ours, peers, flop=flop, touched=touched, rounds=rounds,
        warmup_rounds=0, unfit=unfit, also=of_its_floor,
    )  # fmt: skip


CASES = [(1, 4096, 5), (1, 32768, 3), (1, 131072, 3), (512, 4096, 1), (512, 32768, 1), (512, 131072, 1)]


def sizes(benchmark, tokens: int, keys: int) -> tuple[int, int]:
    return (min(tokens, 8), 100) if benchmark.disabled else (tokens, keys)


def visible(tokens: int, keys: int) -> range:
    return range(keys - tokens + 1, keys + 1)


def phase(tokens: int, keys: int) -> str:
    return f"decode, {keys} keys" if tokens == 1 else f"prefill, the last {tokens} of {keys}"


@torch.no_grad()
@pytest.mark.parametrize(("tokens", "keys", "rounds"), CASES)
def test_core(benchmark, record_row, world, tokens: int, keys: int, rounds: int) -> None:
    tokens, keys = sizes(benchmark, tokens, keys)
    w = world(benchmark.disabled)
    config, scale = w.config, w.layer.scale
    A, c, d = config.num_attention_heads, config.kv_lora_rank, w.layer.row_dim
    Hi, Di, top_k = config.index_n_heads, config.index_head_dim, config.index_topk
    state, batch = cached(w, tokens, keys)
    q, index_q, weights = random(tokens, A, d), random(tokens, Hi, Di), random(tokens, Hi).float()
    planes, where = state.layers[0].planes, batch.keys(state.layers[0], state.device)
    rows = (where["block_table"][0].long()[:, None] * 64 + torch.arange(64)).flatten()[:keys]
    kv, index_k = planes["kv"][rows], planes["index_k"][rows]
    unseen = torch.arange(keys) > torch.arange(keys - tokens, keys)[:, None]

    def ours() -> torch.Tensor:
        lists = glmx.ops.indexer_topk(index_q, weights, planes["index_k"], top_k=top_k, **where)
        return glmx.ops.sparse_mla(q, planes["kv"], lists, **where, scale=scale, v_dim=c)

    def peer() -> torch.Tensor:
        products = (index_q.float().view(-1, Di) @ index_k.float().T).relu_().view(tokens, Hi, keys)
        scores = (weights[:, None] @ products)[:, 0].masked_fill_(unseen, float("-inf"))
        best = scores.topk(min(top_k, keys), sorted=False).indices
        mask = torch.zeros(tokens, keys, dtype=torch.bool).scatter_(1, best, True) & ~unseen
        rows_q, rows_mask = q.view(1, 1, tokens * A, d), mask.repeat_interleave(A, 0)[None, None]
        out = torch.nn.functional.scaled_dot_product_attention(
            rows_q, kv[None, None], kv[None, None, :, :c], attn_mask=rows_mask, scale=scale
        )
        return out.view(tokens, A, c)

    # fp32 index products of all heads; the mask as SDPA holds it, one row per token and head.
    needed = 4 * tokens * (Hi + 1) * keys + 2 * tokens * A * keys
    unfit = {"torch": needed} if needed > harness.PEER_BYTES else {}
    if not unfit:
        expected, got = peer().float(), ours().float()
        # A few selections are decided by the last bit: most rows must agree, and no row may be far away.
        error = (got - expected).norm(dim=-1) / expected.norm(dim=-1)
        assert (error < 2**-5).float().mean() > 0.9, error.max()
    if benchmark.disabled:
        return
    listed = sum(min(n, top_k) for n in visible(tokens, keys))
    scored = sum(n for n in visible(tokens, keys) if n > top_k)
    flop = 2.0 * scored * Hi * Di + 2.0 * listed * A * (d + c)
    touched = 2.0 * keys * Di + 2.0 * min(listed, keys) * d
    peers = {} if unfit else {"torch": peer}
    measure(benchmark, record_row, f"GLM-5 DSA core, {phase(tokens, keys)}", ours, peers, unfit, rounds, flop, touched)


@torch.no_grad()
@pytest.mark.parametrize(("tokens", "keys", "rounds"), CASES)
def test_layer(benchmark, record_row, world, tokens: int, keys: int, rounds: int) -> None:
    tokens, keys = sizes(benchmark, tokens, keys)
    w = world(benchmark.disabled)
    config, layer = w.config, w.layer
    A, c, d = config.num_attention_heads, config.kv_lora_rank, layer.row_dim
    state, batch = cached(w, tokens, keys)
    x = random(tokens, config.hidden_size)
    positions = torch.arange(keys - tokens, keys)
    cos_sin = glmx.ops.rope_cos_sin(positions, config.rotary_dim, config.rope_theta)

    def ours() -> torch.Tensor:
        return layer.forward_selected(x, cos_sin, batch, state.layers[0], None)[0]

    # transformers expands keys and values of every head from every cached latent: at 131,072 keys that takes minutes.
    peers: dict[str, Callable] = {}
    if keys <= 4096 or tokens == 1 and keys <= 32768:
        peers["transformers"] = twin(w, state, batch, x, cos_sin)
        expected, got = peers["transformers"]().float(), ours().float()
        assert (got - expected).norm() <= 0.25 * expected.norm(), "selections flip in bf16, but not many"
    if benchmark.disabled:
        return
    listed = sum(min(n, config.index_topk) for n in visible(tokens, keys))
    scored = sum(n for n in visible(tokens, keys) if n > config.index_topk)
    weights = sum(parameter.numel() for parameter in layer.parameters())
    flop = 2.0 * scored * config.index_n_heads * config.index_head_dim
    flop += 2.0 * listed * A * (d + c) + 2.0 * tokens * weights
    touched = 2.0 * (keys * config.index_head_dim + min(listed, keys) * d + weights)
    measure(benchmark, record_row, f"GLM-5 DSA layer, {phase(tokens, keys)}", ours, peers, {}, rounds, flop, touched)


def twin(w: SimpleNamespace, state: ModelState, batch: Batch, x: torch.Tensor, cos_sin) -> Callable:
    """transformers' layer with the same weights over the same cache; each call starts from the cache before it."""
    from transformers import GlmMoeDsaConfig
    from transformers.cache_utils import DynamicCache
    from transformers.models.glm_moe_dsa.modeling_glm_moe_dsa import GlmMoeDsaAttention

    config = GlmMoeDsaConfig.from_dict(w.config.to_dict())
    config._attn_implementation = "sdpa"
    theirs = GlmMoeDsaAttention(config, 0).to(DTYPE).eval()
    theirs.load_state_dict(w.layer.state_dict())
    tokens, past = len(x), batch.cached_lens[0]
    pages = state.layers[0].block_table[0].long()
    rows = (pages[:, None] * 64 + torch.arange(64)).flatten()[:past]
    kv, index_k = (state.layers[0].planes[name][rows] for name in ("kv", "index_k"))
    c, half = w.config.kv_lora_rank, w.config.qk_rope_head_dim // 2
    # transformers keeps rotated dims as [evens, odds].
    order = torch.cat([torch.arange(0, 2 * half, 2), torch.arange(1, 2 * half, 2)])
    rotated, index_rotated = kv[:, c:][:, order], index_k[:, : 2 * half][:, order]
    index_k = torch.cat([index_rotated, index_k[:, 2 * half :]], 1)
    angles = tuple(torch.cat([part, part], -1)[None].to(DTYPE) for part in cos_sin)
    mask = torch.arange(past + tokens) <= torch.arange(past, past + tokens)[:, None]

    def call() -> torch.Tensor:
        cache = DynamicCache(config=config)
        cache.update(kv[None, None, :, :c], rotated[None, None], 0)
        cache.update_indexer(index_k[None], 0)
        return theirs(x[None], angles, mask[None, None], past_key_values=cache)[0][0]

    return call
