"""llama.cpp as a peer of whole models, through llama-cpp-python and gguf where both are installed.

A glm4_moe's weights are written as GGUF, in bf16 but for the norms and routers, which llama.cpp has in fp32. Of such a
file llama.cpp itself makes q8_0 and q4_0, of the tensors and in the types that it chooses by default.
"""

from __future__ import annotations

import ctypes
import importlib.util
import statistics
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch

from glmx.models.decoder import Decoder
from tiny_glm import hf_state_dict


def installed() -> bool:
    return all(importlib.util.find_spec(name) for name in ("llama_cpp", "gguf"))


def write(model: Decoder, file: Path) -> None:
    """The decoder layers of a glm4_moe."""
    import gguf

    config = model.config
    writer = gguf.GGUFWriter(file, "glm4moe")
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("none")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_leading_dense_block_count(config.first_k_dense_replace)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_rope_dimension_count(config.rotary_dim)
    writer.add_rope_freq_base(config.rope_theta)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_expert_count(config.n_routed_experts)
    writer.add_expert_used_count(config.num_experts_per_tok)
    writer.add_expert_shared_count(config.n_shared_experts)
    writer.add_expert_feed_forward_length(config.moe_intermediate_size)
    writer.add_expert_gating_func(gguf.ExpertGatingFuncType.SIGMOID)
    writer.add_expert_weights_norm(config.norm_topk_prob)
    writer.add_expert_weights_scale(config.routed_scaling_factor)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.GLM4_MOE, config.num_hidden_layers)
    for name, tensor in hf_state_dict(model).items():
        parts = {name: tensor}
        if name.endswith(".experts.gate_up_proj"):
            gate, up = tensor.chunk(2, 1)
            parts = {name.replace("gate_up", "gate"): gate, name.replace("gate_up", "up"): up}
        for key, part in parts.items():
            key = key.replace("e_score_correction_bias", "e_score_correction.bias")
            key = key if key.endswith((".weight", ".bias")) else f"{key}.weight"
            exact = part.dim() == 1 or ".gate." in key
            writer.add_tensor(
                names.get_name(key, (".weight", ".bias")),
                part.float().numpy() if exact else part.contiguous().view(torch.uint8).numpy(),
                raw_dtype=None if exact else gguf.GGMLQuantizationType.BF16,
            )
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def quantised(file: Path, kind: str, head: str) -> Path:
    """The file in another type; `head` "bf16" keeps head and embeddings as they are."""
    import gguf
    import llama_cpp

    out = file.with_name(f"{kind}.gguf")
    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{kind.upper()}")
    if head == "bf16":
        params.output_tensor_type = params.token_embedding_type = int(gguf.GGMLQuantizationType.BF16)
    params.nthread = torch.get_num_threads()
    status = llama_cpp.llama_model_quantize(bytes(file), bytes(out), ctypes.byref(params))
    assert status == 0, f"llama_model_quantize returns {status}"
    return out


def exceptions(file: Path) -> str:
    """The matrices that are of another type than most: "output q6_k, ffn_gate_inp f32"."""
    import gguf

    types: dict[str, str] = {}
    for tensor in gguf.GGUFReader(file).tensors:
        if sum(size > 1 for size in tensor.shape) > 1:
            name = ".".join(
                part for part in tensor.name.split(".") if not part.isdigit() and part not in ("blk", "weight")
            )
            types[name] = tensor.tensor_type.name.lower()
    most = statistics.mode(types.values())
    return ", ".join(f"{name} {kind}" for name, kind in types.items() if kind != most)


class Weights:
    """A model loaded by llama.cpp, as bf16, q8_0 or q4_0, from a file that is gone afterwards: it stays mapped."""

    def __init__(self, model: Decoder, kind: str = "bf16", head: str | None = None) -> None:
        import llama_cpp
        from llama_cpp import _logger

        _logger.set_verbose(False)
        llama_cpp.llama_backend_init()
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder, "model.gguf")
            write(model, file)
            if kind != "bf16":
                file = quantised(file, kind, head or kind)
            self.exceptions = exceptions(file)
            params = llama_cpp.llama_model_default_params()
            self.handle = llama_cpp.llama_model_load_from_file(bytes(file), params)
        assert self.handle, "llama.cpp does not load the model"
        self.vocab_size = model.config.vocab_size


class LlamaCpp:
    """One sequence of at most `max_tokens` tokens, greedy, on torch's number of threads.

    `flash` attention is faster for prompts and short contexts, but not for decoding at thousands of keys.
    """

    def __init__(self, weights: Weights, max_tokens: int, flash: bool = True) -> None:
        import llama_cpp

        self.lib: Any = llama_cpp
        self.weights = weights  # kept: the context reads them
        params = llama_cpp.llama_context_default_params()
        params.n_ctx = params.n_batch = max_tokens
        params.n_threads = params.n_threads_batch = torch.get_num_threads()
        params.flash_attn_type = int(flash)
        self.context = llama_cpp.llama_init_from_model(weights.handle, params)
        assert self.context, "llama.cpp makes no context"
        self.last = 0

    def __del__(self) -> None:
        if getattr(self, "context", None):
            self.lib.llama_free(self.context)

    def logits(self, ids: list[int], keep: int) -> torch.Tensor:
        """fp32 [keep, V]: of a prompt's last token, and of `keep` - 1 decode steps behind it."""
        first = len(ids) - keep + 1
        self._clear()
        rows = [self._decode(ids[:first]), *(self._decode([token]) for token in ids[first:])]
        return torch.stack(rows)

    def begin(self, ids: list[int]) -> int:
        self._clear()
        self.last = int(self._decode(ids).argmax())
        return self.last

    def advance(self, tokens: int) -> None:
        for _ in range(tokens):
            self.last = int(self._decode([self.last]).argmax())

    def _clear(self) -> None:
        self.lib.llama_memory_clear(self.lib.llama_get_memory(self.context), False)

    def _decode(self, ids: list[int]) -> torch.Tensor:
        tokens = (ctypes.c_int32 * len(ids))(*ids)  # the batch points there
        status = self.lib.llama_decode(self.context, self.lib.llama_batch_get_one(tokens, len(ids)))
        assert status == 0, f"llama_decode returns {status}"
        found = self.lib.llama_get_logits_ith(self.context, -1)
        return torch.from_numpy(np.ctypeslib.as_array(found, (self.weights.vocab_size,)).copy())
