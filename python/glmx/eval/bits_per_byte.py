"""Bits per byte of a text under a model: what an ideal coder would need that asks the model for the next token."""

from __future__ import annotations

import torch

from glmx.data.packing import Documents, HeldoutRows
from glmx.data.tokenizer import Tokenizer
from glmx.models import likelihood
from glmx.models.decoder import Decoder

SEQ_LEN, CONTEXT = 512, 128  # the demo's rows, and what its held-out tokens have before them at least
_BATCH_TOKENS = 4 * SEQ_LEN


def bits_per_byte(model: Decoder, tokenizer: Tokenizer, text: str) -> float:
    """Of the text as one document, in windows of SEQ_LEN tokens that overlap by CONTEXT. ValueError without text."""
    lengths = torch.from_numpy(tokenizer.byte_lengths).long()
    document = Documents([tokenizer.encode_document(text)])
    batches = HeldoutRows(document, seq_len=SEQ_LEN, batch_tokens=_BATCH_TOKENS, context=CONTEXT)
    found = likelihood.measure(model, batches, lengths).bits_per_byte
    if found is None:
        raise ValueError("there are no bits per byte of an empty text")
    return found
