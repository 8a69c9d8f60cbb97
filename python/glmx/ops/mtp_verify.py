"""mtp_verify: which of the drafts the model accepts, and its own token behind them."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from glmx.ops._library import check_dim, check_same_dtype, op
from glmx.ops.sample import Values, per_row, rule_tensors

_forward = op("mtp_verify")
MODES = ("greedy", "sample", "rejection")


class Verified(NamedTuple):
    """tokens int64 [B, K+1]: the accepted drafts, then one token of the model, then -1. accepted int64 [B]: how many
    drafts. packed_ids int64 [B * (K+1)]: the tokens of all sequences, those of sequence i at
    packed_offsets[i] : packed_offsets[i+1] (int32 [B+1]), then -1.
    """

    tokens: Tensor
    accepted: Tensor
    packed_ids: Tensor
    packed_offsets: Tensor


def mtp_verify(
    draft_ids: Tensor,
    logits: Tensor,
    *,
    seeds: Values,
    positions: Values,
    mode: str = "sample",
    draft_probs: Tensor | None = None,
    temperature: Values = 1.0,
    top_k: Values = 0,
    top_p: Values = 1.0,
    min_p: Values = 0.0,
    token_ids: Tensor | None = None,
    history: Tensor | None = None,
    repetition_penalty: Values | None = None,
    presence_penalty: Values | None = None,
    frequency_penalty: Values | None = None,
    bias_ids: Tensor | None = None,
    bias_values: Tensor | None = None,
    bias_spans: Tensor | None = None,
    row_offsets: Tensor | None = None,
) -> Verified:
    """Judges a chain of up to K drafts per sequence; each gains from 1 to K+1 tokens.

    Args:
        draft_ids: int64 [B, K] in [0, V); -1 ends a chain that is shorter.
        logits: fp32 [B, K+1, V]: row j judges draft j, row K is what follows the last draft. Rows behind the last token
            that is given out are not read.
        seeds: int64, one or [B], and positions: int64, one or [B]: the index in its sequence of the token that
            draft 0 stands for; row j draws at position + j.
        mode: "greedy": a draft is accepted if it has the largest logit (temperature counts as 0);
            "sample": if it is the token that `sample` draws at its position, so the text is that of plain sampling
            under the same seed, whatever was drafted; "rejection": with probability min(1, p / q), and else
            replaced by a token drawn from max(0, p - q): more is accepted, and the distribution is that of plain
            sampling if drafts were drawn from q, with coins of their own (`sample(..., draw=DRAW_DRAFT)`).
        draft_probs: fp32 [B, K, V], q, with "rejection"; None: drafts were chosen, not drawn (q is 1 for the draft).
        temperature, ..., bias_spans: as in `sample`, for rows [B, K+1]: each position may have its own. The history of
            row j holds the drafts before it.
        row_offsets: int32 [B+1], from 0 to R: chains of any lengths, one behind the other. Sequence i has the rows
            row_offsets[i] : row_offsets[i+1], at least one; then draft_ids are [R], of which the last of each sequence
            does not count, logits [R, V], draft_probs [R, V], and all rules, seeds and positions too, have rows [R].

    Returns:
        Verified(tokens, accepted, packed_ids, packed_offsets): 1 to K+1 tokens of each sequence, padded and packed.
        With row_offsets tokens and packed_ids are [R].

    Raises:
        ValueError: dtypes or shapes that do not fit, an unknown mode, or a value outside its range.

    No gradient. Sources: Leviathan et al. 2023, algorithm 1, and Chen et al. 2023 for "rejection".
    """
    check_same_dtype(draft_ids, "draft_ids", torch.int64)
    chains = row_offsets is not None
    check_dim(draft_ids, "draft_ids", 1 if chains else 2)
    check_dim(logits, "logits", 2 if chains else 3)
    if mode not in MODES:
        raise ValueError(f"mode: expected one of {', '.join(MODES)}: got {mode!r}")
    shape = list(draft_ids.shape) if chains else [draft_ids.shape[0], draft_ids.shape[1] + 1]
    if list(logits.shape[:-1]) != shape:
        raise ValueError(
            f"logits: expected shape {shape} + [V] for draft_ids {list(draft_ids.shape)}: got {list(logits.shape)}"
        )
    if row_offsets is not None:
        check_same_dtype(row_offsets, "row_offsets", torch.int32)
        check_dim(row_offsets, "row_offsets", 1)
        row_offsets = row_offsets.contiguous()
        B, R = row_offsets.shape[0] - 1, shape[0]
    else:
        B, R = shape[0], shape[0] * shape[1]
        rows = torch.Size([B])
        seeds = per_row(seeds, "seeds", rows, torch.int64)[:, None]
        positions = per_row(positions, "positions", rows, torch.int64)[:, None]
        positions = positions + torch.arange(shape[1], device=positions.device)
    rules = rule_tensors(
        logits,
        seeds=seeds,
        positions=positions,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        token_ids=token_ids,
        history=history,
        repetition_penalty=repetition_penalty,
        presence_penalty=presence_penalty,
        frequency_penalty=frequency_penalty,
        bias_ids=bias_ids,
        bias_values=bias_values,
        bias_spans=bias_spans,
    )
    out = Verified(
        draft_ids.new_empty(shape),
        draft_ids.new_empty(max(B, 0)),
        draft_ids.new_empty(R),
        draft_ids.new_empty(B + 1, dtype=torch.int32),
    )
    probs = None if draft_probs is None else draft_probs.detach().contiguous()
    _forward(*out, draft_ids.contiguous(), logits.detach().contiguous(), probs, *rules, row_offsets, MODES.index(mode))
    return out
