from __future__ import annotations

import gzip
import lzma
import math
import shutil
import subprocess
from collections import Counter, defaultdict

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from glmx.data.baselines import NGram, compressors, ngram_bits_per_byte

VOCAB = 5


def naive_kneser_ney(train: list[list[int]], order: int):
    """p(word | context tuple) with dictionaries, straight from Chen and Goodman 1998, section 3."""
    begin = ("^",) * max(order - 1, 1)
    raw: list[Counter] = [Counter() for _ in range(order + 1)]
    for d in train:
        line = begin + tuple(d)
        for i in range(len(begin) + 1, len(line)):
            for n in range(1, order + 1):
                raw[n][line[i - n + 1 : i + 1]] += 1
    counts: list[Counter] = [Counter() for _ in range(order + 1)]
    counts[order] = raw[order]
    for n in range(1, order):
        for gram in raw[n + 1]:
            counts[n][gram[1:]] += 1
    tables = []
    for n in range(1, order + 1):
        m = Counter(counts[n].values())
        d = [0.75] * 3
        if all(m[k] for k in (1, 2, 3, 4)):
            y = m[1] / (m[1] + 2 * m[2])
            d = [k - (k + 1) * y * m[k + 1] / m[k] for k in (1, 2, 3)]
            d = [min(max(x, 0.05), top) for x, top in zip(d, (0.95, 1.95, 2.95), strict=True)]
        total, left = defaultdict(float), defaultdict(float)
        for gram, c in counts[n].items():
            total[gram[:-1]] += c
            left[gram[:-1]] += d[min(c, 3) - 1]
        tables.append((counts[n], d, total, left))

    def probability(word: int, context: tuple) -> float:
        p = 1 / VOCAB
        for n, (count, d, total, left) in enumerate(tables):
            ctx = context[len(context) - n :]
            if total[ctx]:
                c = count[(*ctx, word)]
                p = ((c - d[min(c, 3) - 1] if c else 0) + left[ctx] * p) / total[ctx]
        return p

    return probability, begin


documents = st.lists(st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=30), min_size=1, max_size=6)


@settings(max_examples=60, deadline=None)
@given(train=documents.filter(lambda x: max(map(len, x)) > 1), heldout=documents, order=st.integers(1, 5))
def test_ngram_is_kneser_ney(train, heldout, order):
    probability, begin = naive_kneser_ney(train, order)
    expected = 0.0
    for d in heldout:
        line = begin + tuple(d)
        for i in range(len(begin) + 1, len(line)):
            expected -= math.log(probability(line[i], line[i - order + 1 : i] if order > 1 else ()))
    model = NGram([np.array(d) for d in train], vocab_size=VOCAB, order=order)
    assert model.nats([np.array(d) for d in heldout]) == pytest.approx(expected, rel=1e-9)


@settings(max_examples=30, deadline=None)
@given(train=documents.filter(lambda x: max(map(len, x)) > 1), context=st.lists(st.integers(0, VOCAB - 1), min_size=1))
def test_ngram_probabilities_sum_to_one(train, context):
    model = NGram([np.array(d) for d in train], vocab_size=VOCAB, order=5)
    base = model.nats([np.array(context)])
    p = [math.exp(base - model.nats([np.array([*context, w])])) for w in range(VOCAB)]
    assert sum(p) == pytest.approx(1, rel=1e-9)


def test_ngram_learns_and_the_budget_cuts():
    rng = np.random.default_rng(0)
    pattern = np.tile(np.arange(VOCAB), 200)
    lengths = np.ones(VOCAB, np.int32)
    learned = ngram_bits_per_byte([pattern], [pattern[:50]], lengths)
    noise = ngram_bits_per_byte([rng.integers(0, VOCAB, 1000)], [rng.integers(0, VOCAB, 500)], lengths)
    assert learned < 0.05 and math.log2(VOCAB) - 0.1 < noise < math.log2(VOCAB) + 0.5
    assert ngram_bits_per_byte([pattern], [pattern[:50]], lengths, max_train_tokens=20) > learned
    # The bytes are those of the targets: the first token of a document, here one of 100 bytes, is given.
    once = np.arange(VOCAB)
    long_first = np.array([100, 1, 1, 1, 1])
    assert ngram_bits_per_byte([pattern], [once], long_first) == ngram_bits_per_byte([pattern], [once], lengths)
    assert ngram_bits_per_byte([pattern], [pattern[:50]], lengths * 2) == pytest.approx(learned / 2)


def test_compressors_are_the_programs(tmp_path, stdlib):
    files = [d.data for d in stdlib.heldout[:4]]
    ours = compressors(files)
    total = sum(map(len, files))
    assert ours.xz_concatenated * total / 8 == len(lzma.compress(b"".join(files), preset=9))
    assert ours.gzip_per_file * total / 8 == sum(len(gzip.compress(d, 9)) for d in files)
    assert ours.xz_per_file > ours.xz_concatenated and ours.gzip_per_file > ours.gzip_concatenated
    for name, figure in (("gzip", ours.gzip_concatenated), ("xz", ours.xz_concatenated)):
        if shutil.which(name):
            out = subprocess.run([name, "-9", "-c"], input=b"".join(files), capture_output=True, check=True).stdout
            assert len(out) == pytest.approx(figure * total / 8, rel=0.005)
    with pytest.raises(ValueError, match="at least one byte"):
        compressors([])
