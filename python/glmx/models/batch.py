"""Batch: which rows of a flat forward belong to which sequence."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import TYPE_CHECKING, TypedDict

import torch

if TYPE_CHECKING:
    from glmx.models.state import LayerState


class Keys(TypedDict):
    """Where the attention ops find queries and keys, as their arguments: int32 tensors."""

    cu_seqlens_q: torch.Tensor
    seq_lens: torch.Tensor
    cu_seqlens_k: torch.Tensor | None
    block_table: torch.Tensor | None


@dataclass(frozen=True)
class Batch:
    """Flat sequences: rows [cu_seqlens_q[i], cu_seqlens_q[i+1]) are the new tokens of sequence i, in order.

    cu_seqlens_q  [S+1], starts at 0, ascending; its last entry is the number of rows.
    seq_lens      [S] total lengths, cached tokens included; None: nothing is cached (training).
    seq_ids       [S] the sequences' slots in a ModelState; None without one. No slot occurs twice.
    bounds        cu_seqlens_q and seq_lens as int32 tensors, where their contents are to count and not the lists'
    """

    cu_seqlens_q: Sequence[int]
    seq_lens: Sequence[int] | None = None
    seq_ids: Sequence[int] | None = None
    bounds: tuple[torch.Tensor, torch.Tensor] | None = None

    def __post_init__(self) -> None:
        cu = list(self.cu_seqlens_q)
        if not cu or cu[0] != 0 or any(a > b for a, b in pairwise(cu)):
            raise ValueError(f"cu_seqlens_q must start at 0 and ascend: got {cu}")
        for name in ("seq_lens", "seq_ids"):
            values = getattr(self, name)
            if values is not None and len(values) != len(cu) - 1:
                raise ValueError(f"expected len({name}) == {len(cu) - 1} sequences: got {len(values)}")
        if self.seq_ids is not None and len(set(self.seq_ids)) != len(self.seq_ids):
            raise ValueError(f"seq_ids name a slot twice: {list(self.seq_ids)}")
        if self.seq_lens is not None and any(s < q for s, q in zip(self.seq_lens, self.q_lens, strict=True)):
            raise ValueError(f"seq_lens {list(self.seq_lens)} below the query lengths {self.q_lens}")

    @classmethod
    def from_lengths(cls, lengths: Sequence[int]) -> Batch:
        """Sequences of the given lengths, one behind the other, nothing cached."""
        cu = [0]
        for length in lengths:
            cu.append(cu[-1] + length)
        return cls(cu)

    @property
    def num_tokens(self) -> int:
        return self.cu_seqlens_q[-1]

    @cached_property
    def q_lens(self) -> list[int]:
        """Number of new tokens per sequence."""
        return [b - a for a, b in pairwise(self.cu_seqlens_q)]

    @cached_property
    def cached_lens(self) -> list[int]:
        """Number of cached tokens per sequence."""
        if self.seq_lens is None:
            return [0] * (len(self.cu_seqlens_q) - 1)
        return [s - q for s, q in zip(self.seq_lens, self.q_lens, strict=True)]

    @cached_property
    def max_keys(self) -> int:
        """The longest sequence, cached tokens included."""
        return max(self.q_lens if self.seq_lens is None else self.seq_lens, default=0)

    def keys(self, state: LayerState | None, device: torch.device) -> Keys:
        """Keys in the pages of `state`, or without one in the batch's own rows; for attention on `device`."""
        cu_seqlens_q, seq_lens = self._bounds_on(device)
        return {
            "cu_seqlens_q": cu_seqlens_q,
            "seq_lens": seq_lens,
            "cu_seqlens_k": cu_seqlens_q if state is None else None,
            "block_table": None if state is None else state.block_table,
        }

    def _bounds_on(self, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        """Made once for all layers: on a GPU each of them would wait."""
        if self.bounds is not None:
            return self.bounds
        if device not in self._made:
            lengths = self.q_lens if self.seq_lens is None else self.seq_lens
            cu_seqlens_q = torch.tensor(self.cu_seqlens_q, dtype=torch.int32, device=device)
            self._made[device] = cu_seqlens_q, torch.tensor(lengths, dtype=torch.int32, device=device)
        return self._made[device]

    @cached_property
    def _made(self) -> dict[torch.device, tuple[torch.Tensor, torch.Tensor]]:
        return {}
