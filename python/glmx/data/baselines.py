"""What a model's held-out bits per byte are compared with: gzip -9, xz -9 and a token 5-gram.

    compressors([d.data for d in corpus.heldout])     # per file and concatenated
    ngram_bits_per_byte(train_docs, heldout_docs, tokenizer.byte_lengths)

All figures are bits per byte of the same held-out text. The compressors' container headers count, as they do
on disk.
"""

from __future__ import annotations

import gzip
import lzma
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import numpy as np

# `xz -9` has a dictionary of 64 MiB. One that covers the whole input finds the same matches and needs no 674
# MB of memory per call; below 4 KiB the format has no smaller one.
_XZ_DICT_MIN, _XZ_DICT_MAX = 1 << 12, 1 << 26


@dataclass(frozen=True)
class Compressors:
    """Bits per byte. "per file" compresses each document alone, as a model reads it; "concatenated" all as
    one."""

    gzip_per_file: float
    gzip_concatenated: float
    xz_per_file: float
    xz_concatenated: float

    def to_dict(self) -> dict[str, float]:
        return asdict(self)


def compressors(documents: Sequence[bytes]) -> Compressors:
    """gzip -9 and xz -9 of `documents`. Raises ValueError when there is nothing to compress."""
    total = sum(map(len, documents))
    if total == 0:
        raise ValueError("documents: expected at least one byte of held-out text")
    joined = b"".join(documents)

    def rate(size: int) -> float:
        return 8 * size / total

    return Compressors(
        gzip_per_file=rate(sum(len(_gzip(d)) for d in documents)),
        gzip_concatenated=rate(len(_gzip(joined))),
        xz_per_file=rate(sum(len(_xz(d)) for d in documents)),
        xz_concatenated=rate(len(_xz(joined))),
    )


def _gzip(data: bytes) -> bytes:
    # zlib's; the gzip program, which ends its blocks elsewhere, comes out within 0.5 % of it.
    return gzip.compress(data, 9, mtime=0)


def _xz(data: bytes) -> bytes:
    size = min(max(1 << max(len(data) - 1, 1).bit_length(), _XZ_DICT_MIN), _XZ_DICT_MAX)
    filters = [{"id": lzma.FILTER_LZMA2, "preset": 9, "dict_size": size}]
    return lzma.compress(data, format=lzma.FORMAT_XZ, check=lzma.CHECK_CRC64, filters=filters)


def ngram_bits_per_byte(
    train: Sequence[np.ndarray],
    heldout: Sequence[np.ndarray],
    byte_lengths: np.ndarray,
    *,
    order: int = 5,
    max_train_tokens: int | None = None,
) -> float:
    """Held-out bits per byte of a token n-gram, over the targets a model is scored on (all but a document's
    first).

    `train`, `heldout`: token ids per document; `byte_lengths` [vocabulary]: bytes of each token, 0 for
    special ones. `max_train_tokens` takes a random part of the training text, to compare at a model's token budget.
    """
    if max_train_tokens is not None:
        train = _first_tokens(train, max_train_tokens)
    model = NGram(train, vocab_size=len(byte_lengths), order=order)
    total_bytes = sum(int(byte_lengths[d[1:]].sum()) for d in heldout)
    if total_bytes == 0:
        raise ValueError("heldout: expected at least one byte of text")
    return float(model.nats(heldout)) / math.log(2) / total_bytes


def _first_tokens(documents: Sequence[np.ndarray], limit: int) -> list[np.ndarray]:
    """Documents in a fixed random order (a run reads them so, too) up to `limit` tokens, the last one cut."""
    kept: list[np.ndarray] = []
    for i in np.random.Generator(np.random.PCG64(0)).permutation(len(documents)):
        if limit <= 0:
            break
        kept.append(documents[i][:limit])
        limit -= len(kept[-1])
    return kept


class NGram:
    """Interpolated modified Kneser-Ney (Chen and Goodman 1998), every order a few sorts of the whole text.

    An n-gram's id at order n is its rank among the distinct pairs (id of its first n-1 tokens, last token).
    Contexts stop at document borders: each document is preceded by order-1 begin marks, which are never
    predicted.
    """

    def __init__(self, train: Sequence[np.ndarray], *, vocab_size: int, order: int = 5) -> None:
        if order < 1:
            raise ValueError(f"order = {order}: at least 1")
        if not len(train) or max(map(len, train)) < 2:
            raise ValueError("train: expected at least one document of two tokens")
        self.vocab_size, self.order = vocab_size, order
        tokens, predicted = self._line(train)
        ids = np.zeros(len(tokens), np.int64)  # id of the order-0 gram: there is one
        # Per order: keys, count as seen, a place where each gram ends.
        raw: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []
        per_place = []
        for _ in range(order):
            keys = _before(ids) * (vocab_size + 1) + tokens
            unique, place, ids = np.unique(keys, return_index=True, return_inverse=True)
            raw.append((unique, np.bincount(ids, weights=predicted, minlength=len(unique)), place))
            per_place.append(ids)
        self._keys = [keys for keys, _, _ in raw]
        self._levels = []
        for n in range(order):
            keys, seen, _ = raw[n]
            if n + 1 < order:  # a lower order counts in how many contexts a gram appears, not how often
                _, longer_seen, longer_place = raw[n + 1]
                counted = per_place[n][longer_place[longer_seen > 0]]
                count = np.bincount(counted, minlength=len(keys)).astype(np.float64)
            else:
                count = seen
            contexts = int(keys[-1] // (vocab_size + 1)) + 1 if n == 0 else len(self._keys[n - 1])
            self._levels.append(_Level.of(count, keys // (vocab_size + 1), contexts))

    def nats(self, documents: Sequence[np.ndarray]) -> float:
        """-log probability of every token but the first of each document, summed."""
        tokens, predicted = self._line(documents)
        p = np.full(len(tokens), 1.0 / self.vocab_size)
        ids = np.zeros(len(tokens), np.int64)
        for keys, level in zip(self._keys, self._levels, strict=True):
            context = _before(ids)
            known = context >= 0
            key = np.where(known, context * (self.vocab_size + 1) + tokens, -1)
            ids = np.minimum(np.searchsorted(keys, key), len(keys) - 1)
            ids = np.where(keys[ids] == key, ids, -1)
            p = level.probability(p, ids, np.where(known, context, -1))
        return float(-np.log(p[predicted]).sum())

    def _line(self, documents: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
        """All documents as one line with begin marks between them, and which tokens are predicted."""
        marks = max(self.order - 1, 1)
        total = sum(len(d) + marks for d in documents)
        tokens = np.full(total, self.vocab_size, np.int64)
        predicted = np.zeros(total, bool)
        at = 0
        for d in documents:
            at += marks
            tokens[at : at + len(d)] = d
            predicted[at + 1 : at + len(d)] = True
            at += len(d)
        return tokens, predicted


def _before(ids: np.ndarray) -> np.ndarray:
    """The id one place earlier; 0 at the first place, which is always a begin mark."""
    shifted = np.empty_like(ids)
    shifted[0], shifted[1:] = 0, ids[:-1]
    return shifted


@dataclass(frozen=True)
class _Level:
    """One order: discounted counts per gram, and per context the total and the mass that goes to the order
    below."""

    discounted: np.ndarray
    total: np.ndarray
    backoff: np.ndarray

    @staticmethod
    def of(count: np.ndarray, context: np.ndarray, contexts: int) -> _Level:
        # Discounts from how many grams were seen once to four times; a text too small for that takes the
        # usual 0.75.
        n1, n2, n3, n4 = (float((count == k).sum()) for k in (1, 2, 3, 4))
        discounts = np.full(3, 0.75)
        if n1 and n2 and n3 and n4:
            y = n1 / (n1 + 2 * n2)
            estimate = np.array([1 - 2 * y * n2 / n1, 2 - 3 * y * n3 / n2, 3 - 4 * y * n4 / n3])
            discounts = np.clip(estimate, 0.05, [0.95, 1.95, 2.95])
        discount = np.where(count > 0, discounts[np.clip(count, 1, 3).astype(np.int64) - 1], 0.0)
        return _Level(
            discounted=count - discount,
            total=np.bincount(context, weights=count, minlength=contexts),
            backoff=np.bincount(context, weights=discount, minlength=contexts),
        )

    def probability(self, lower: np.ndarray, ids: np.ndarray, context: np.ndarray) -> np.ndarray:
        """Interpolate with the order below; where the context was never followed by anything, that order
        alone."""
        total = np.where(context >= 0, self.total[context], 0.0)
        use = total > 0
        gram = np.where(ids >= 0, self.discounted[ids], 0.0)
        mixed = (gram + self.backoff[context] * lower) / np.where(use, total, 1.0)
        return np.where(use, mixed, lower)
