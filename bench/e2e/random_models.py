"""The random models that benchmarks of whole models share, and what their forwards must read and compute."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

from glmx.layers.block import DecoderLayer
from glmx.layers.moe import MoE
from glmx.models.config import ModelConfig
from glmx.models.decoder import Decoder
from glmx.models.plan import cache_row
from glmx.ops import StoredWeight

GLM4 = {  # 240 M without the MTP layer
    "model_type": "glm4_moe", "vocab_size": 32000, "hidden_size": 1024, "num_hidden_layers": 4,
    "first_k_dense_replace": 1, "intermediate_size": 2816, "moe_intermediate_size": 512, "n_routed_experts": 32,
    "num_experts_per_tok": 4, "n_shared_experts": 1, "num_attention_heads": 16, "num_key_value_heads": 4,
    "head_dim": 64, "max_position_embeddings": 8192, "num_nextn_predict_layers": 1,
}  # fmt: skip
GLM5 = {  # 244 M
    **{name: value for name, value in GLM4.items() if name != "head_dim"},
    "model_type": "glm_moe_dsa", "num_key_value_heads": 16, "q_lora_rank": 512, "kv_lora_rank": 256,
    "qk_nope_head_dim": 32, "qk_rope_head_dim": 32, "v_head_dim": 64, "index_n_heads": 8, "index_head_dim": 128,
    "index_topk": 512,
}  # fmt: skip
TINY = {"vocab_size": 256, "hidden_size": 64, "intermediate_size": 64, "moe_intermediate_size": 32}


def random_model(shape: dict[str, Any], **changes: Any) -> Decoder:
    model = Decoder(ModelConfig.from_dict({**shape, **changes}), torch.bfloat16).eval()
    model.init_weights(0)
    return model


def held(module: nn.Module) -> Iterator[tuple[str, nn.Parameter | StoredWeight]]:
    """Its weights by name: parameters, and those that are held as a checkpoint stores them."""
    yield from module.named_parameters()
    for prefix, part in module.named_modules():
        for name, value in vars(part).items():
            if isinstance(value, StoredWeight):
                yield f"{prefix}.{name}", value


class Bytes:
    """What forwards of a model must read, added up while it is entered.

    Every weight as it is held, its scales too: of the layers that ran, of the experts those to which rows were routed,
    embeddings and lm_head; and the keys and values attended to.
    """

    def __init__(self, model: Decoder) -> None:
        self.model, self.total = model, 0.0
        self._hooks: list[Any] = []

    def __enter__(self) -> Bytes:
        for index, layer in enumerate(self.model.model.layers):
            self._hooks.append(layer.register_forward_hook(self._of_layer(index, layer)))
            if isinstance(layer.mlp, MoE):
                experts = layer.mlp.experts
                one = sum(weight.nbytes for _, weight in held(experts)) / experts.gate_up_proj.shape[0]
                self._hooks.append(layer.mlp.gate.register_forward_hook(self._of_experts(one)))
        self._hooks.append(self.model.lm_head.register_forward_hook(self._of_head))
        return self

    def __exit__(self, *_: object) -> None:
        for hook in self._hooks:
            hook.remove()

    def _of_layer(self, index: int, layer: DecoderLayer) -> Callable:
        config, size = self.model.config, self.model.dtype.itemsize
        weights = sum(weight.nbytes for name, weight in held(layer) if ".experts." not in f".{name}.")
        row = cache_row(config, index) * size
        top_k = config.index_topk if config.model_type == "glm_moe_dsa" else None
        keys = config.index_head_dim * size if top_k and config.has_indexer(index) else 0

        def hook(_module: Any, args: tuple[Any, ...], _out: Any) -> None:
            self.total += weights
            seq_lens = args[2].keys(None, torch.device("cpu"))["seq_lens"]  # batch.seq_lens of a decode step are bounds
            for n in seq_lens.tolist():
                self.total += n * row if top_k is None else n * keys + min(n, top_k) * (row - keys)
            if index == 0:
                self.total += args[0].residual_TH.nbytes

        return hook

    def _of_experts(self, one: float) -> Callable:
        def hook(_module: Any, _args: Any, out: tuple[torch.Tensor, torch.Tensor]) -> None:
            self.total += one * len(out[1].unique())

        return hook

    def _of_head(self, module: Any, *_: Any) -> None:
        self.total += module.weight.nbytes


def forward_flop(config: ModelConfig, tokens: int, logits: int) -> float:
    """Of one sequence of `tokens` tokens and the logits of `logits` of them, without the MTP layer."""
    A, table = config.num_attention_heads, config.vocab_size * config.hidden_size
    tables = 1 if config.tie_word_embeddings else 2
    flop = 2.0 * tokens * (config.num_active_parameters() - tables * table) + 2.0 * logits * table
    seen = range(1, tokens + 1)
    for layer in range(config.num_hidden_layers):
        if not config.is_mla:
            flop += 4.0 * A * config.head_dim * sum(seen)
            continue
        top_k = config.index_topk or tokens
        if config.has_indexer(layer):
            flop += 2.0 * config.index_n_heads * config.index_head_dim * sum(n for n in seen if n > top_k)
        flop += 2.0 * A * (2 * config.kv_lora_rank + config.qk_rope_head_dim) * sum(min(n, top_k) for n in seen)
    return flop
