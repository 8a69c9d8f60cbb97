"""ModelState and LayerState: everything a sequence leaves behind for its next token.

Step 1 backs a layer with contiguous rows per sequence. The interface is what stays: the forward appends,
`truncate` takes back (a rejected draft), `fork` copies (a shared prefix), `free` ends a sequence.
"""

from __future__ import annotations

import torch

from glmx.models.batch import Batch

PAGE = 64  # rows of a page, as in the ops that attend


class LayerState:
    """Keys (after RoPE) and values of one GQA layer: k, v [num_sequences * pages * 64, kv_heads, head_dim].

    Sequence i has the pages [i * pages, (i + 1) * pages): contiguous rows, one block table away from the ops.
    """

    def __init__(self, shape: tuple[int, int, int, int], dtype: torch.dtype, device: torch.device) -> None:
        num_sequences, max_tokens, *row = shape
        self.pages = -(-max_tokens // PAGE)
        # Uninitialised: no row is read before it was written, and the system backs only the pages touched.
        self.k = torch.empty(num_sequences * self.pages * PAGE, *row, dtype=dtype, device=device)
        self.v = torch.empty_like(self.k)
        self._table = torch.arange(num_sequences * self.pages, dtype=torch.int32).view(num_sequences, self.pages)

    def block_table(self, batch: Batch) -> torch.Tensor:
        """int32 [S, pages]: the pages of the batch's sequences."""
        assert batch.seq_ids is not None
        return self._table[list(batch.seq_ids)]

    def append(self, batch: Batch, k_TGd: torch.Tensor, v_TGd: torch.Tensor) -> None:
        """Writes the batch's rows behind each sequence's cached ones. Cached rows are constants: no gradient."""
        assert batch.seq_ids is not None
        bounds = zip(batch.cu_seqlens_q, batch.seq_ids, batch.cached_lens, batch.q_lens, strict=False)
        for row, seq, cached, new in bounds:
            at = self._first(seq) + cached
            self.k[at : at + new].copy_(k_TGd[row : row + new].detach())
            self.v[at : at + new].copy_(v_TGd[row : row + new].detach())

    def copy_sequence(self, source: int, target: int, length: int) -> None:
        a, b = self._first(source), self._first(target)
        self.k[b : b + length].copy_(self.k[a : a + length])
        self.v[b : b + length].copy_(self.v[a : a + length])

    def _first(self, seq: int) -> int:
        return seq * self.pages * PAGE


class ModelState:
    """One LayerState per layer (the MTP layer last) and the lengths of the sequences.

    lengths      [num_sequences] tokens that the decoder layers have seen
    mtp_lengths  [num_sequences] tokens that the MTP layer has seen; its entry t is made from token t+1 too,
                 so it trails `lengths` by one or more
    A slot is taken by `allocate`, by `fork`, or by a forward that names it, and given back by `free`.
    """

    def __init__(self, layers: list[LayerState], num_sequences: int, max_tokens: int) -> None:
        if num_sequences < 1 or max_tokens < 1:
            raise ValueError(f"expected num_sequences, max_tokens >= 1: got {num_sequences}, {max_tokens}")
        self.layers = layers
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

    def fork(self, seq: int) -> int:
        """A new sequence with the same tokens; later tokens of either do not show in the other."""
        self._check_live(seq)
        target = self.allocate()
        for layer in self.layers:
            layer.copy_sequence(seq, target, self.lengths[seq])
        self.lengths[target] = self.lengths[seq]
        self.mtp_lengths[target] = self.mtp_lengths[seq]
        return target

    def free(self, seq: int) -> None:
        """Ends a sequence; its slot may be taken again."""
        self._check_live(seq)
        self.lengths[seq] = self.mtp_lengths[seq] = 0
        self._taken[seq] = False

    def begin(self, batch: Batch, lengths: list[int]) -> None:
        """Checks a forward's batch against `lengths` (self.lengths or self.mtp_lengths), takes its slots."""
        if batch.seq_ids is None or batch.seq_lens is None:
            raise ValueError("a forward with a state needs a batch with seq_ids and seq_lens")
        for seq, cached, total in zip(batch.seq_ids, batch.cached_lens, batch.seq_lens, strict=True):
            if not 0 <= seq < self.num_sequences:
                raise ValueError(f"sequence {seq} is not one of the state's {self.num_sequences}")
            if cached != lengths[seq]:
                raise ValueError(f"sequence {seq} holds {lengths[seq]} tokens, the batch says {cached}")
            if total > self.max_tokens:
                raise ValueError(f"sequence {seq} would have {total} tokens, the state holds {self.max_tokens}")
        for seq in batch.seq_ids:
            self._taken[seq] = True

    def commit(self, batch: Batch, lengths: list[int]) -> None:
        """Counts the tokens that a finished forward has appended."""
        assert batch.seq_ids is not None and batch.seq_lens is not None
        for seq, total in zip(batch.seq_ids, batch.seq_lens, strict=True):
            lengths[seq] = total

    def _check_live(self, seq: int) -> None:
        if not 0 <= seq < self.num_sequences or not self._taken[seq]:
            live = [s for s, taken in enumerate(self._taken) if taken]
            raise ValueError(f"sequence {seq} is not live in this state: live are {live}")
