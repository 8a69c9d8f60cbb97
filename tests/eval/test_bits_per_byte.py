"""Bits per byte of a text against a sum over torch's log-softmax, token by token, each with all it may see."""

from __future__ import annotations

import math

import pytest
import torch

from glmx.data.tokenizer import bytes_only
from glmx.eval import bits_per_byte as module
from tiny_glm import random_model, tiny_config

TEXT = "".join(f"line {i} of käse\n" for i in range(9))


@pytest.mark.parametrize("seq_len, context", [(512, 128), (48, 16)])
def test_every_byte_counts_once(seq_len, context, monkeypatch):
    monkeypatch.setattr(module, "SEQ_LEN", seq_len)
    monkeypatch.setattr(module, "CONTEXT", context)
    tokenizer = bytes_only()
    model = random_model(tiny_config(vocab_size=tokenizer.vocab_size), 3)
    ids = tokenizer.encode_document(TEXT)
    nats, scored = 0.0, 0
    while scored < len(ids) - 1:
        start = max(0, scored - context)
        window = torch.tensor([ids[start : start + seq_len]])
        with torch.no_grad():
            logprobs = model(window).logits[0].double().log_softmax(-1)
        last = min(start + seq_len, len(ids) - 1)
        nats -= sum(float(logprobs[i - start, ids[i + 1]]) for i in range(scored, last))
        scored = last
    expected = nats / math.log(2) / len(TEXT.encode())
    assert module.bits_per_byte(model, tokenizer, TEXT) == pytest.approx(expected, rel=1e-5)


def test_no_text_has_no_bits():
    tokenizer = bytes_only()
    model = random_model(tiny_config(vocab_size=tokenizer.vocab_size), 3)
    with pytest.raises(ValueError, match="no bits per byte of an empty text"):
        module.bits_per_byte(model, tokenizer, "")
