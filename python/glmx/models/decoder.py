"""Decoder: the one forward pass of trainer and server, for the three families of GLM checkpoints.

Inside, everything is flat: T rows of several sequences, described by a Batch. Parameter names are the
checkpoint's, except that gate and up projections are stored as one tensor, gate rows first:
`...mlp.experts.gate_up_proj [E, 2I, H]` and `...mlp.gate_up_proj.weight [2I, H]` (dense and shared).

Legend: T tokens (rows), B sequences, H hidden, V vocabulary.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import nn

from glmx import ops
from glmx.layers.block import DecoderLayer, Stream
from glmx.layers.dsa import DSA, Selection
from glmx.layers.linear import Linear
from glmx.layers.moe import MoE, Router, RouterStats
from glmx.layers.mtp import MTPLayer
from glmx.layers.norm import RMSNorm
from glmx.models.batch import Batch
from glmx.models.config import ModelConfig
from glmx.models.device import check_model
from glmx.models.state import ModelState
from glmx.ops.stored_weight import StoredWeight


@dataclass
class Output:
    """logits fp32 [B, T, V] (or the last `logits_to_keep` of T); mtp_logits fp32 [B, T, V] on request.

    logits[b, t] predict token t+1 and mtp_logits[b, t] token t+2. Rows past a length are zero, and so is the
    last mtp row of a sequence: the token that it needs is not known.
    """

    logits: torch.Tensor
    mtp_logits: torch.Tensor | None = None


class MTPStep(NamedTuple):
    """One draft step: hidden [T, H], and the keys that a glm_moe_dsa's MTP layer attended to (else None)."""

    hidden: torch.Tensor
    selection: Selection | None


class Embedding(nn.Module):
    def __init__(self, vocab: int, hidden: int, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(vocab, hidden, dtype=dtype, device=device))

    def forward(self, ids_T: torch.Tensor) -> torch.Tensor:
        return ops.embedding(ids_T, self.weight)


class Trunk(nn.Module):
    """The parameters under the checkpoint's prefix `model.`; the MTP layer is the last of `layers`."""

    def __init__(self, config: ModelConfig, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        N = config.num_hidden_layers
        layers: list[DecoderLayer] = [DecoderLayer(config, layer, dtype, device) for layer in range(N)]
        if config.num_nextn_predict_layers:
            layers.append(MTPLayer(config, N, dtype, device))
        self.embed_tokens = Embedding(config.vocab_size, config.hidden_size, dtype, device)
        self.layers = nn.ModuleList(layers)
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps, dtype, device)


class Decoder(nn.Module):
    """A glm4_moe, glm4_moe_lite or glm_moe_dsa. Parameters start uninitialised: `init_weights` or glmx.load fills them.

    `dtype` is torch.bfloat16 or torch.float32 and is every parameter's; correction biases are fp32 buffers.
    A parameter with an attribute `main_grad` (fp32, same shape) gets its gradient added there.
    """

    def __init__(self, config: ModelConfig, dtype: torch.dtype, device: str | torch.device = "cpu") -> None:
        super().__init__()
        if dtype not in (torch.bfloat16, torch.float32):
            raise ValueError(f"dtype is {dtype}, expected torch.bfloat16 or torch.float32")
        device = torch.device(device)
        check_model(device, config)
        self.config = config
        self.model = Trunk(config, dtype, device)
        self.lm_head = Linear(config.hidden_size, config.vocab_size, False, dtype, device)
        if config.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight

    @property
    def dtype(self) -> torch.dtype:
        return self.model.embed_tokens.weight.dtype

    @property
    def device(self) -> torch.device:
        return self.model.embed_tokens.weight.device

    @property
    def mtp_layer(self) -> MTPLayer:
        """The MTP layer; ValueError when the model has none."""
        if not self.config.num_nextn_predict_layers:
            raise ValueError("this model has no MTP layer (num_nextn_predict_layers = 0)")
        layer = self.model.layers[self.config.num_hidden_layers]
        assert isinstance(layer, MTPLayer)
        return layer

    # The flat forward.
    def forward_tokens(
        self, ids_T: torch.Tensor, positions_T: torch.Tensor, batch: Batch, state: ModelState | None = None
    ) -> torch.Tensor:
        """ids, positions int64 [T] -> hidden [T, H] after the final norm. With a state, appends to it."""
        self._check_rows(batch, ids_T=ids_T, positions_T=positions_T)
        if state is not None:
            state.begin(batch, state.lengths)
        for router in self._routers():
            router.stats = None
        for dsa in self._sparse_layers():
            dsa.kl = None
        hidden_TH = self.trunk(ids_T, positions_T, batch, state)
        if state is not None:
            state.commit(batch, state.lengths)
        return hidden_TH

    def trunk(
        self, ids_T: torch.Tensor, positions_T: torch.Tensor, batch: Batch, state: ModelState | None
    ) -> torch.Tensor:
        """What forward_tokens computes, of tensors alone: the state's rows are taken and counted by others."""
        cos_sin = self._cos_sin(positions_T)
        stream = Stream(self.model.embed_tokens(ids_T))
        for index in range(self.config.num_hidden_layers):
            layer_state = None if state is None else state.layers[index]
            stream = self.model.layers[index](stream, cos_sin, batch, layer_state)
        hidden_TH, _ = stream.norm(self.model.norm)
        return hidden_TH

    def mtp_step(
        self,
        hidden_TH: torch.Tensor,
        next_ids_T: torch.Tensor,
        positions_T: torch.Tensor,
        batch: Batch,
        state: ModelState | None = None,
        selection: Selection | None = None,
    ) -> MTPStep:
        """One MTP step -> hidden [T, H] after shared_head.norm; `logits` of it predict the token after next_ids.

        Row t holds the hidden state of the token at positions[t] (forward_tokens' result, or this function's
        own for a further step) and the id of the token behind it. `positions` are forward_tokens': the layer
        rotates by positions + 1, the place of the embedded token, which is transformers' convention (vLLM
        uses positions; RoPE is relative, so only a cache must not mix the two). With a state, batch.seq_lens
        count the MTP layer's tokens (state.mtp_lengths). A `selection` of an earlier step is attended to as it
        is (config.index_share_for_mtp_iteration); index keys are written all the same.
        """
        self._check_rows(batch, hidden_TH=hidden_TH, next_ids_T=next_ids_T, positions_T=positions_T)
        if state is not None:
            state.begin(batch, state.mtp_lengths)
        step = self.mtp_trunk(hidden_TH, next_ids_T, positions_T + 1, batch, state, selection)
        if state is not None:
            state.commit(batch, state.mtp_lengths)
        return step

    def mtp_trunk(
        self,
        hidden_TH: torch.Tensor,
        next_ids_T: torch.Tensor,
        next_positions_T: torch.Tensor,
        batch: Batch,
        state: ModelState | None,
        selection: Selection | None,
    ) -> MTPStep:
        """What mtp_step computes, of tensors alone."""
        layer = self.mtp_layer
        embedding_TH = self.model.embed_tokens(next_ids_T)
        layer_state = None if state is None else state.layers[self.config.num_hidden_layers]
        cos_sin = self._cos_sin(next_positions_T)
        return MTPStep(*layer.predict(embedding_TH, hidden_TH, cos_sin, batch, layer_state, selection))

    def mtp_hidden(
        self,
        hidden_TH: torch.Tensor,
        next_ids_T: torch.Tensor,
        positions_T: torch.Tensor,
        batch: Batch,
        state: ModelState | None = None,
    ) -> torch.Tensor:
        """The hidden states of an `mtp_step` that selects its own keys."""
        return self.mtp_step(hidden_TH, next_ids_T, positions_T, batch, state).hidden

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """hidden [.., H] -> fp32 [.., V], unrounded."""
        return self.lm_head(hidden, out_dtype=torch.float32)

    # The padded call.
    def forward(
        self,
        input_ids: torch.Tensor,
        lengths: Sequence[int] | torch.Tensor | None = None,
        state: ModelState | None = None,
        logits_to_keep: int = 0,
        mtp: bool = False,
    ) -> Output:
        """input_ids int64 [B, T], padded on the right where `lengths` [B] says so -> Output.

        The ids may lie on any device, the results are on the model's. With a state, row b continues its sequence b.
        logits_to_keep = n > 0 computes the logits of the last n tokens of each row only, as [B, n, V]; a row with fewer
        tokens has zeros before them. Padding is never computed and its logits are zero. Raises ValueError for bad
        arguments.
        """
        rows = _row_lengths(input_ids, lengths)
        input_ids = input_ids.to(self.device)
        if logits_to_keep < 0:
            raise ValueError(f"logits_to_keep is {logits_to_keep}, expected 0 (all) or more")
        if mtp and (state is not None or logits_to_keep):
            raise ValueError("mtp=True goes with neither state nor logits_to_keep; call mtp_hidden instead")
        cached = [0] * len(rows) if state is None else state.lengths[: len(rows)]
        batch = Batch.from_lengths(rows)
        if state is not None:
            if len(rows) > state.num_sequences:
                raise ValueError(f"input_ids has {len(rows)} rows, the state {state.num_sequences} sequences")
            totals = [c + n for c, n in zip(cached, rows, strict=True)]
            batch = Batch(batch.cu_seqlens_q, totals, list(range(len(rows))))
        ids_T = torch.cat([input_ids[b, :n] for b, n in enumerate(rows)])
        spans = [torch.arange(c, c + n, device=ids_T.device) for c, n in zip(cached, rows, strict=True)]
        positions_T = torch.cat(spans)

        hidden_TH = self.forward_tokens(ids_T, positions_T, batch, state)
        width = logits_to_keep or input_ids.shape[1]
        kept = [min(n, width) for n in rows]
        last_TH = torch.cat([h[len(h) - n :] for h, n in zip(hidden_TH.split(rows), kept, strict=True)])
        right = bool(logits_to_keep)
        logits = _padded(self.logits(last_TH), kept, width, right)
        if not mtp:
            return Output(logits)

        known = [max(n - 1, 0) for n in rows]
        next_ids_T = torch.cat([input_ids[b, 1 : n + 1] for b, n in enumerate(known)])
        z_TH = self.mtp_hidden(
            torch.cat([h[:n] for h, n in zip(hidden_TH.split(rows), known, strict=True)]),
            next_ids_T,
            torch.cat([p[:n] for p, n in zip(spans, known, strict=True)]),
            Batch.from_lengths(known),
        )
        return Output(logits, _padded(self.logits(z_TH), known, width, right))

    # Beside the forward.
    def stored_weights(self) -> dict[str, StoredWeight]:
        """The weights that are held as a checkpoint stores them, by name; they are no parameters."""
        return {
            f"{prefix}.{name}": value
            for prefix, module in self.named_modules()
            for name, value in vars(module).items()
            if isinstance(value, StoredWeight)
        }

    def tensors(self) -> list[torch.Tensor]:
        """All that the model holds: parameters, buffers, stored weights with their scales."""
        stored = [part for weight in self.stored_weights().values() for pair in weight.matrices for part in pair]
        return [*self.parameters(), *self.buffers(), *(part for part in stored if part is not None)]

    def train(self, mode: bool = True) -> Decoder:
        """nn.Module.train. Raises ValueError where a weight is held as its checkpoint stores it."""
        if mode:
            self._only_parameters("train")
        return super().train(mode)

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """nn.Module.state_dict. Raises ValueError where it would lack weights, as `train` does."""
        self._only_parameters("state_dict")
        return super().state_dict(*args, **kwargs)

    def _only_parameters(self, what: str) -> None:
        held = self.stored_weights()
        if held:
            name, weight = next(iter(held.items()))
            raise ValueError(
                f"{what}: {name} is no parameter, it is held as its checkpoint stores it ({weight.format}); "
                "glmx.load(..., dequantize=True, mapped=False) makes parameters"
            )

    def new_state(self, num_sequences: int, max_tokens: int) -> ModelState:
        """An empty cache for `num_sequences` sequences of at most `max_tokens` tokens each."""
        planes = [layer.self_attn.planes for layer in self.model.layers if isinstance(layer, DecoderLayer)]
        return ModelState(planes, num_sequences, max_tokens, self.dtype, self.device)

    @torch.no_grad()
    def init_weights(self, seed: int = 0) -> None:
        """normal(0, initializer_range) for matrices, ones for norms, zeros for biases.

        A parameter's values depend on the seed, its name and its shape alone, not on the rest of the model.
        """
        self._only_parameters("init_weights")
        for name, parameter in self.named_parameters():
            if name.endswith(".bias"):
                parameter.zero_()
            elif parameter.dim() == 1:
                parameter.fill_(1.0)
            else:
                digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
                generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little", signed=True))
                values = torch.empty(parameter.shape, dtype=torch.float32)
                parameter.copy_(values.normal_(0.0, self.config.initializer_range, generator=generator))
        for router in self._routers():
            router.e_score_correction_bias.zero_()

    @property
    def collect_scores(self) -> bool:
        """Whether training forwards keep the routers' scores and ids for the aux loss."""
        return any(router.collect_scores for router in self._routers())

    @collect_scores.setter
    def collect_scores(self, value: bool) -> None:
        for router in self._routers():
            router.collect_scores = value

    def router_stats(self) -> list[RouterStats]:
        """Per MoE layer, the MTP layer last: what the last training forward routed.

        Layers that did not run since the last forward_tokens (the MTP layer, or all in eval mode) are absent.
        """
        return [router.stats for router in self._routers() if router.stats is not None]

    @property
    def collect_kl(self) -> bool:
        """Whether training forwards keep the indexers' losses, which nothing else trains them by."""
        return any(dsa.collect_kl for dsa in self._sparse_layers())

    @collect_kl.setter
    def collect_kl(self, value: bool) -> None:
        for dsa in self._sparse_layers():
            dsa.collect_kl = value

    @property
    def see_all_keys(self) -> bool:
        """Whether training forwards of a glm_moe_dsa attend to every key: the dense warm-up of its indexers."""
        return any(dsa.see_all_keys for dsa in self._sparse_layers())

    @see_all_keys.setter
    def see_all_keys(self, value: bool) -> None:
        for dsa in self._sparse_layers():
            dsa.see_all_keys = value

    def indexer_kl(self) -> list[torch.Tensor]:
        """Per DSA layer, the MTP layer last: fp32 [T], differentiable in the indexers' parameters alone.

        A layer that shares a list measures the list's owner, so the sum of a group's losses trains its indexer
        towards the mean of the group's attention. Layers that did not run since the last forward_tokens are absent.
        """
        return [dsa.kl for dsa in self._sparse_layers() if dsa.kl is not None]

    def _sparse_layers(self) -> list[DSA]:
        return [layer.self_attn for layer in self.model.layers if isinstance(layer.self_attn, DSA)]

    def _routers(self) -> list[Router]:
        return [layer.mlp.gate for layer in self.model.layers if isinstance(layer.mlp, MoE)]

    def _cos_sin(self, positions_T: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return ops.rope_cos_sin(positions_T, self.config.rotary_dim, self.config.rope_theta)

    def _check_rows(self, batch: Batch, **tensors: torch.Tensor) -> None:
        for name, tensor in tensors.items():
            if tensor.shape[0] != batch.num_tokens:
                raise ValueError(f"{name} has {tensor.shape[0]} rows, the batch {batch.num_tokens}")
            if tensor.device != self.device:
                raise ValueError(f"{name} is on {tensor.device}, the model on {self.device}")
            if name != "hidden_TH" and (tensor.dtype != torch.int64 or tensor.dim() != 1):
                raise ValueError(f"{name} is {tensor.dtype} {list(tensor.shape)}, expected int64 [T]")


def _row_lengths(input_ids: torch.Tensor, lengths: Sequence[int] | torch.Tensor | None) -> list[int]:
    if input_ids.dim() != 2 or input_ids.dtype != torch.int64 or not input_ids.shape[0]:
        raise ValueError(f"input_ids is {input_ids.dtype} {list(input_ids.shape)}, expected int64 [B, T]")
    B, T = input_ids.shape
    if lengths is None:
        return [T] * B
    rows = lengths.tolist() if isinstance(lengths, torch.Tensor) else [int(n) for n in lengths]
    if len(rows) != B or any(not 0 <= n <= T for n in rows):
        raise ValueError(f"lengths is {rows}, expected {B} values in 0..{T}")
    return rows


def _padded(rows_TV: torch.Tensor, lengths: list[int], width: int, right: bool) -> torch.Tensor:
    """Flat rows -> [B, width, V], each sequence's rows at the left (or right) end of its zeros."""
    if all(n == width for n in lengths):
        return rows_TV.view(len(lengths), width, -1)
    out = []
    for rows in rows_TV.split(lengths):
        zeros = rows.new_zeros(width - len(rows), rows.shape[1])
        out.append(torch.cat([zeros, rows] if right else [rows, zeros]))
    return torch.stack(out)
