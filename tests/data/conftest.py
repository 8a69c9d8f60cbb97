"""One small corpus and tokenizer for all data tests."""

from __future__ import annotations

import pytest

from glmx.data import corpus, tokenizer
from glmx.data.corpus import Corpus
from glmx.data.tokenizer import Tokenizer


@pytest.fixture(scope="session")
def stdlib() -> Corpus:
    return corpus.standard_library(min_bytes=100_000)


@pytest.fixture(scope="session")
def tok(stdlib: Corpus) -> Tokenizer:
    texts = [d.text for d in stdlib.train[:60]]
    return tokenizer.train(texts, vocab_size=640)
