"""Training rows from token shards: documents packed end to end, borders kept, order fixed by the seed alone.

    rows = PackedRows(shards, seq_len=512, batch_rows=32, micro_rows=8, seed=0)
    for batch in rows.next_step(): ...               # the micro-batches of one optimizer step
    state = rows.state_dict()                        # a few numbers; load_state_dict continues exactly

An epoch shuffles the documents, lays them end to end, cuts the line at every `seq_len` tokens from a random
phase, and shuffles the rows, so that the rows of one long file spread over the epoch and each epoch cuts
elsewhere. Nothing is padded. A row is seq_len inputs; targets look past the row's end into the same document,
so no token is lost to a cut. Attention, positions, targets and MTP targets stop at document borders
(`cu_seqlens`); a document that continues from the row before starts again at position 0.

Legend: T tokens of a micro-batch (rows * seq_len), flat; S steps of the MTP layer.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, islice
from typing import Any

import numpy as np
import torch

from glmx.data.shards import TokenShards
from glmx.errors import CheckpointError, ConfigError

IGNORE = -1


@dataclass(frozen=True)
class PackedBatch:
    """One flat micro-batch; all tensors int64, [T] or [S, T], made on the CPU. -1 marks a target that does not exist.

    `next_ids` [S, T] is what MTP embeds: in step s (0 the first) the token s + 1 ahead where the document has one, else
    0, and then `mtp_targets` [S, T], the token s + 2 ahead, is -1.
    `cu_seqlens` has one segment per document and row: segment s is tokens cu_seqlens[s] to cu_seqlens[s + 1].
    """

    ids: torch.Tensor
    positions: torch.Tensor
    targets: torch.Tensor
    next_ids: torch.Tensor
    mtp_targets: torch.Tensor
    cu_seqlens: list[int]

    @property
    def num_tokens(self) -> int:
        return self.ids.numel()

    def to(self, device: torch.device) -> PackedBatch:
        """The same with its tensors on `device`."""
        return PackedBatch(
            ids=self.ids.to(device),
            positions=self.positions.to(device),
            targets=self.targets.to(device),
            next_ids=self.next_ids.to(device),
            mtp_targets=self.mtp_targets.to(device),
            cu_seqlens=self.cu_seqlens,
        )


def _batch(segments: list[tuple[np.ndarray, int, int]], mtp_steps: int = 1) -> PackedBatch:
    """The flat batch of `segments`: (tokens and up to mtp_steps + 1 beyond, length, first target that counts)."""
    total = sum(length for _, length, _ in segments)
    ids = np.empty(total, np.int64)
    positions = np.empty(total, np.int64)
    ahead = np.full((mtp_steps + 1, total), IGNORE, np.int64)  # ahead[j]: the token j + 1 behind each
    counted = np.ones(total, bool)
    cu_seqlens = [0]
    for tokens, length, first in segments:
        at = cu_seqlens[-1]
        ids[at : at + length] = tokens[:length]
        positions[at : at + length] = np.arange(length)
        for j, row in enumerate(ahead, 1):
            known = tokens[j : j + length]
            row[at : at + len(known)] = known
        counted[at : at + first] = False
        cu_seqlens.append(at + length)
    # What MTP embeds exists also where the target is read but not counted.
    targets = np.where(counted, ahead, IGNORE)
    return PackedBatch(
        ids=torch.from_numpy(ids),
        positions=torch.from_numpy(positions),
        targets=torch.from_numpy(targets[0]),
        next_ids=torch.from_numpy(np.maximum(ahead[:-1], 0)),
        mtp_targets=torch.from_numpy(targets[1:]),
        cu_seqlens=cu_seqlens,
    )


class PackedRows:
    """The training stream. `batch_rows` rows make one optimizer step, over all ranks and micro-batches.

    Every rank holds the same cursor and takes its own `batch_rows / world_size` consecutive rows of the step,
    in micro-batches of `micro_rows`; which rows a step has does not depend on either number. Batches have targets for
    `mtp_steps` steps of an MTP layer.
    """

    def __init__(
        self,
        shards: TokenShards,
        *,
        seq_len: int,
        batch_rows: int,
        micro_rows: int | None = None,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
        mtp_steps: int = 1,
    ) -> None:
        micro_rows = micro_rows or batch_rows // world_size
        if seq_len < 2:
            raise ConfigError(f"seq_len = {seq_len}: at least 2")
        if not 0 <= rank < world_size:
            raise ConfigError(f"rank = {rank}: expected 0 <= rank < world_size = {world_size}")
        if batch_rows < 1 or micro_rows < 1 or batch_rows % (micro_rows * world_size):
            raise ConfigError(
                f"batch_rows = {batch_rows} must be a multiple of micro_rows * world_size = {micro_rows} * {world_size}"
            )
        if shards.num_tokens < 2 * seq_len:
            raise ConfigError(
                f"seq_len = {seq_len}: the shards hold {shards.num_tokens} tokens, two rows are the least"
            )
        self.shards, self.seq_len, self.seed = shards, seq_len, seed
        self.batch_rows, self.micro_rows = batch_rows, micro_rows
        self.rank, self.world_size, self.mtp_steps = rank, world_size, mtp_steps
        # The phase takes up to seq_len - 1 tokens, and the number of rows must not depend on it.
        self.rows_per_epoch = (shards.num_tokens - (seq_len - 1)) // seq_len
        self.tokens_sha256 = shards.tokens_sha256
        self.epoch = 0
        self.row = 0
        self._plan(0)

    @property
    def tokens_per_step(self) -> int:
        return self.batch_rows * self.seq_len

    def next_step(self) -> list[PackedBatch]:
        """This rank's micro-batches of the next optimizer step; the cursor moves past the whole global batch.

        A step may begin in one epoch and end in the next.
        """
        step: list[list[tuple[np.ndarray, int, int]]] = []
        for _ in range(self.batch_rows):
            if self.row == self.rows_per_epoch:
                self._plan(self.epoch + 1)
            step.append(self._row(int(self._row_order[self.row])))
            self.row += 1
        local = self.batch_rows // self.world_size
        mine = step[self.rank * local : (self.rank + 1) * local]
        return [
            _batch([segment for row in mine[i : i + self.micro_rows] for segment in row], self.mtp_steps)
            for i in range(0, local, self.micro_rows)
        ]

    def __iter__(self) -> Iterator[list[PackedBatch]]:
        while True:
            yield self.next_step()

    def state_dict(self) -> dict[str, Any]:
        """The cursor, and what it is only valid for. Plain JSON values."""
        return {"epoch": self.epoch, "row": self.row, **self._identity()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where `state` was taken. Raises CheckpointError when data, seed or row length differ."""
        for key, value in self._identity().items():
            if state.get(key) != value:
                raise CheckpointError(
                    f"the data has changed: {key} was {state.get(key)!r} in the checkpoint, is {value!r} now"
                )
        for key, limit in (("row", self.rows_per_epoch), ("epoch", 2**63 - 1)):
            if type(state.get(key)) is not int or not 0 <= state[key] <= limit:
                raise CheckpointError(f"data cursor: {key} is {state.get(key)!r}, expected 0 .. {limit}")
        if state["epoch"] != self.epoch:
            self._plan(state["epoch"])
        self.row = state["row"]

    def _identity(self) -> dict[str, Any]:
        return {
            "seed": self.seed,
            "seq_len": self.seq_len,
            "num_tokens": self.shards.num_tokens,
            "num_documents": self.shards.num_documents,
            "tokenizer_sha256": self.shards.tokenizer_sha256,
            "tokens_sha256": self.tokens_sha256,
        }

    def _plan(self, epoch: int) -> None:
        # PCG64 keyed by (seed, epoch): an epoch's plan needs no earlier one, so restoring a cursor costs
        # nothing.
        rng = np.random.Generator(np.random.PCG64([self.seed, epoch]))
        self._document_order = rng.permutation(self.shards.num_documents)
        lengths = self.shards.document_lengths()[self._document_order]
        self._line = np.concatenate([[0], np.cumsum(lengths)])
        self._phase = int(rng.integers(self.seq_len))
        self._row_order = rng.permutation(self.rows_per_epoch)
        self.epoch, self.row = epoch, 0

    def _row(self, index: int) -> list[tuple[np.ndarray, int, int]]:
        start = self._phase + index * self.seq_len
        end = start + self.seq_len
        segments = []
        place = int(np.searchsorted(self._line, start, side="right")) - 1
        while start < end:
            document = self.shards.document(int(self._document_order[place]))
            inside = start - int(self._line[place])
            length = min(end, int(self._line[place + 1])) - start
            segments.append((document[inside : inside + length + 1 + self.mtp_steps], length, 0))
            start += length
            place += 1
        return segments


class Documents:
    """Documents in memory, as HeldoutRows reads those of TokenShards."""

    def __init__(self, documents: Sequence[Sequence[int]]) -> None:
        self._documents = [np.asarray(document, dtype=np.int64) for document in documents]
        self.num_documents = len(self._documents)

    def document(self, index: int) -> np.ndarray:
        return self._documents[index]


class HeldoutRows:
    """Batches that score every token of a shard set exactly once, in order, the same on every iteration.

    A document is read in windows of `seq_len`; windows overlap by `context` tokens, which are read but not
    scored again (targets -1), so that no scored token but the first ones of a document has less than
    `context` tokens before it. Windows of several documents share a batch of at most `batch_tokens` tokens,
    each its own segment. `every` = n takes each n-th window only: a sample from all of the text.
    """

    def __init__(
        self, shards: TokenShards | Documents, *, seq_len: int, batch_tokens: int, context: int = 0, every: int = 1
    ) -> None:
        if not 0 <= context < seq_len:
            raise ConfigError(f"context = {context}: expected 0 <= context < seq_len = {seq_len}")
        if batch_tokens < seq_len:
            raise ConfigError(f"batch_tokens = {batch_tokens}: at least seq_len = {seq_len}")
        if every < 1:
            raise ConfigError(f"every = {every}: expected 1 or more")
        self.shards, self.seq_len, self.batch_tokens, self.context = shards, seq_len, batch_tokens, context
        self.every = every

    def __iter__(self) -> Iterator[PackedBatch]:
        waiting: list[tuple[np.ndarray, int, int]] = []
        size = 0
        documents = map(self.shards.document, range(self.shards.num_documents))
        windows = chain.from_iterable(map(self._windows, documents))
        for segment in islice(windows, 0, None, self.every):
            if size + segment[1] > self.batch_tokens:
                yield _batch(waiting)
                waiting, size = [], 0
            waiting.append(segment)
            size += segment[1]
        if waiting:
            yield _batch(waiting)

    def _windows(self, document: np.ndarray) -> Iterator[tuple[np.ndarray, int, int]]:
        scored = 0  # inputs whose target has been scored
        inputs = len(document) - 1  # the last token is only ever a target
        while scored < inputs:
            start = max(0, scored - self.context)
            length = min(self.seq_len, inputs - start)
            yield document[start : start + length + 2], length, scored - start
            scored = start + length
