"""ModelState and LayerState: everything a sequence leaves behind for its next token.

Rows lie in pages of 64. A sequence has one table of pages, which holds for every plane of every layer; forked sequences
share pages until one of them writes. The forward appends, `truncate` takes back (a rejected draft), `fork` shares (a
common prefix), `free` ends a sequence.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from glmx import ops
from glmx.models.batch import Batch
from glmx.models.device import of_attention
from glmx.models.pages import PAGE, Changes, Pages

Planes = Mapping[str, tuple[int, ...]]  # the shape of one token's row in each plane of a layer


@dataclass
class Placement:
    """Where the rows of the forward in progress lie; `ModelState.begin` writes it, every layer reads it."""

    slot_mapping: torch.Tensor  # int64 [T]: the row of each new token
    block_table: torch.Tensor  # int32 [S, blocks]: the pages of each sequence of the batch; both where the cache lies


class LayerState:
    """One layer's cache: named planes [pages * 64, *row], such as keys (after RoPE) and values."""

    def __init__(
        self, planes: Planes, num_pages: int, placement: Placement, dtype: torch.dtype, device: torch.device
    ) -> None:
        # Uninitialised: a page is zeroed when it is first taken, and the system backs only the pages touched.
        self.planes = {
            name: torch.empty(num_pages * PAGE, *row, dtype=dtype, device=device) for name, row in planes.items()
        }
        self.device = device
        self._placement = placement

    @property
    def block_table(self) -> torch.Tensor:
        """int32 [S, blocks]: the pages of the batch's sequences."""
        return self._placement.block_table

    def append(self, **rows: torch.Tensor) -> dict[str, torch.Tensor]:
        """Writes the batch's rows [T, *row] of the named planes, and returns the planes. Rows may come from another
        device. Cached ones are constants: no gradient.
        """
        for name, new in rows.items():
            new = new.detach().to(self.device)
            ops.cache_append(self.planes[name].flatten(1), new.flatten(1), self._placement.slot_mapping)
        return {name: self.planes[name] for name in rows}

    def change(self, changes: Changes) -> None:
        """Zeroes fresh pages, so that no row is ever read that was not written; copies those that were shared."""
        for plane in self.planes.values():
            pages = plane.view(-1, PAGE, *plane.shape[1:])
            for page in changes.fresh:
                pages[page].zero_()
            for source, target in changes.copies:
                pages[target].copy_(pages[source])


class ModelState:
    """One LayerState per layer (the MTP layer last) and the lengths of the sequences.

    lengths      [num_sequences] tokens that the decoder layers have seen
    mtp_lengths  [num_sequences] tokens that the MTP layer has seen; its entry t is made from token t+1 too,
                 so between steps it trails `lengths` by one or more
    A slot is taken by `allocate`, by `fork`, or by a forward that names it, and given back by `free`.
    `device` is the model's; the rows lie where attention over them runs (models/device.py).
    """

    def __init__(
        self,
        planes: Sequence[Planes],
        num_sequences: int,
        max_tokens: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        if num_sequences < 1 or max_tokens < 1:
            raise ValueError(f"expected num_sequences, max_tokens >= 1: got {num_sequences}, {max_tokens}")
        self.pages = Pages(num_sequences, max_tokens)
        self.device = where = of_attention(device)
        self._placement = Placement(
            torch.empty(0, dtype=torch.int64, device=where), torch.empty(0, 0, dtype=torch.int32, device=where)
        )
        self.layers = [LayerState(rows, self.pages.total, self._placement, dtype, where) for rows in planes]
        self.num_sequences = num_sequences
        self.max_tokens = max_tokens
        self.lengths = [0] * num_sequences
        self.mtp_lengths = [0] * num_sequences
        self._taken = [False] * num_sequences

    def allocate(self) -> int:
        """Takes the lowest free slot; ValueError when there is none."""
        for seq, taken in enumerate(self._taken):
            if not taken:
                self._taken[seq] = True
                return seq
        raise ValueError(f"no free sequence: all {self.num_sequences} of this state are taken")

    def truncate(self, seq: int, length: int) -> None:
        """Forgets every token of `seq` from `length` on."""
        self._check_live(seq)
        if not 0 <= length <= self.lengths[seq]:
            raise ValueError(f"expected 0 <= length <= {self.lengths[seq]}, sequence {seq}'s: got {length}")
        if length < self.lengths[seq]:
            # MTP entry length-1 was made with the token at `length`, which is one of those forgotten.
            self.mtp_lengths[seq] = min(self.mtp_lengths[seq], max(length - 1, 0))
            self.lengths[seq] = length
            self.pages.truncate(seq, max(length, self.mtp_lengths[seq]))

    def truncate_mtp(self, seq: int, length: int) -> None:
        """Forgets the entries of `seq` from `length` on in the MTP layer alone: those that drafts have made."""
        self._check_live(seq)
        if not 0 <= length <= self.mtp_lengths[seq]:
            raise ValueError(f"expected 0 <= length <= {self.mtp_lengths[seq]}, the MTP layer's of {seq}: got {length}")
        self.mtp_lengths[seq] = length
        self.pages.truncate(seq, max(self.lengths[seq], length))

    def fork(self, seq: int) -> int:
        """A new sequence with the same tokens; later tokens of either do not show in the other."""
        self._check_live(seq)
        target = self.allocate()
        self.pages.share(seq, target)
        self.lengths[target] = self.lengths[seq]
        self.mtp_lengths[target] = self.mtp_lengths[seq]
        return target

    def free(self, seq: int) -> None:
        """Ends a sequence; its slot may be taken again."""
        self._check_live(seq)
        self.lengths[seq] = self.mtp_lengths[seq] = 0
        self.pages.truncate(seq, 0)
        self._taken[seq] = False

    def begin(self, batch: Batch, lengths: list[int]) -> None:
        """Checks a forward's batch against `lengths` (self.lengths or self.mtp_lengths), takes its slots and pages."""
        if batch.seq_ids is None or batch.seq_lens is None:
            raise ValueError("a forward with a state needs a batch with seq_ids and seq_lens")
        slots, tables = self.take(batch.seq_ids, batch.cached_lens, batch.seq_lens, lengths)
        width = max(map(len, tables), default=0)
        padded = [table + [0] * (width - len(table)) for table in tables]
        table = torch.tensor(padded, dtype=torch.int32, device=self.device).view(len(tables), width)
        self.place(torch.tensor(slots, dtype=torch.int64, device=self.device), table)

    def place(self, slot_mapping: torch.Tensor, block_table: torch.Tensor) -> None:
        """Tells the layers where the rows of the next forward go (see Placement)."""
        self._placement.slot_mapping, self._placement.block_table = slot_mapping, block_table

    def take(
        self, seqs: Sequence[int], starts: Sequence[int], totals: Sequence[int], lengths: list[int]
    ) -> tuple[list[int], list[list[int]]]:
        """Slots and pages for the tokens [start, total) of each sequence -> the row of each, and the sequences' pages.

        A forward that fails leaves the pages it took with their sequences, for the next one.
        """
        for seq, cached, total in zip(seqs, starts, totals, strict=True):
            if not 0 <= seq < self.num_sequences:
                raise ValueError(f"sequence {seq} is not one of the state's {self.num_sequences}")
            if cached != lengths[seq]:
                raise ValueError(f"sequence {seq} holds {lengths[seq]} tokens, the batch says {cached}")
            if total > self.max_tokens:
                raise ValueError(f"sequence {seq} would have {total} tokens, the state holds {self.max_tokens}")
        slots: list[int] = []
        for seq, cached, total in zip(seqs, starts, totals, strict=True):
            self._taken[seq] = True
            changes = self.pages.prepare(seq, cached, total)
            if changes.fresh or changes.copies:
                for layer in self.layers:
                    layer.change(changes)
            slots += self.pages.slots(seq, cached, total)
        return slots, [self.pages.tables[seq] for seq in seqs]

    def commit(self, batch: Batch, lengths: list[int]) -> None:
        """Counts the tokens that a finished forward has appended."""
        assert batch.seq_ids is not None and batch.seq_lens is not None
        for seq, total in zip(batch.seq_ids, batch.seq_lens, strict=True):
            lengths[seq] = total

    def _check_live(self, seq: int) -> None:
        if not 0 <= seq < self.num_sequences or not self._taken[seq]:
            live = [s for s, taken in enumerate(self._taken) if taken]
            raise ValueError(f"sequence {seq} is not live in this state: live are {live}")
