"""Replay: the small forwards of serving, each shape recorded once and from then on run by one native call.

A decode step is some hundred op calls over a few rows. On a small model Python and torch take several times as long
for them as the kernels do. Here a forward's shape is (rows, sequences, width of the block table); all that changes
from step to step, ids, positions, pages, lengths, also which rows belong to which sequence, is the contents of tensors
that a recording reads. So one recording serves every step of its shape (glmx.models.recorder says how), and computes
the same bits, since it makes the same calls.

A shape is recorded when it comes for the second time. What cannot be recorded is logged once and computed as ever.
Recordings are dropped when a weight moves, and not used while the model trains or somebody watches it by hooks.

Legend: T rows, B sequences, W blocks of a sequence, H hidden, V vocabulary.
"""

from __future__ import annotations

import logging
from array import array
from collections import OrderedDict
from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import Any, NamedTuple

import torch

from glmx import ops, runtime
from glmx.layers.dsa import DSA, Selection
from glmx.models.batch import Batch
from glmx.models.decoder import Decoder
from glmx.models.pages import PAGE
from glmx.models.recorder import Pool, Recorded, RefusedError, record
from glmx.models.state import ModelState
from glmx.ops.stored_weight import StoredWeight

log = logging.getLogger(__name__)

MAX_ROWS = 64  # 16 sequences with 3 drafts each. Wider forwards take so long that their calls do not matter
MAX_RECORDINGS = 256
MAX_BYTES = 256 << 20  # of what recordings compute into; logits are most of it. The oldest go first

Key = tuple[Any, ...]
Compute = Callable[[Sequence[torch.Tensor], Sequence[torch.Tensor]], Any]  # of _Numbers as tensors, and of tensors
Draw = Callable[[torch.Tensor], torch.Tensor | None]  # the ids of logits


class Rules(NamedTuple):
    """By what `sample` draws the token of each row, where that takes no histories and no biases.

    longs   seeds, then positions, then top_k of all rows;  floats: temperature, top_p, min_p
    """

    longs: list[int]
    floats: list[float]


class Forward(NamedTuple):
    """hidden [T, H] and logits fp32 [T, V] of every row; ids int64 [T], drawn by the Rules that were given.

    A row's id is what follows it, -1 where the rows before it were not to be followed so.
    """

    hidden: torch.Tensor
    logits: torch.Tensor
    ids: torch.Tensor | None


class Drafted(NamedTuple):
    """A draft step's last row of each sequence: hidden [B, H], logits fp32 [B, V], and its lists [B, k] or None.

    ids int64 [B] are drawn by the Rules that were given.
    """

    hidden: torch.Tensor
    logits: torch.Tensor
    topk_indices: torch.Tensor | None
    ids: torch.Tensor | None


class _Numbers(NamedTuple):
    """What a step computes from, beside tensors of others."""

    longs: list[int]
    ints: list[int]
    floats: list[float]


class _Inputs:
    """Tensors at fixed addresses, and the means to fill them fast."""

    def __init__(self, numbers: _Numbers, tensors: Sequence[torch.Tensor]) -> None:
        self._longs, self._ints = array("q", numbers.longs), array("i", numbers.ints)
        self._floats = array("f", numbers.floats or [0.0])  # a buffer of nothing makes no tensor
        arrays = self._longs, self._ints, self._floats
        self.numbers = [torch.frombuffer(mine, dtype=dtype) for mine, dtype in zip(arrays, _DTYPES, strict=True)]
        self.numbers[2] = self.numbers[2][: len(numbers.floats)]
        self.tensors = [tensor.clone() for tensor in tensors]

    def fill(self, numbers: _Numbers, tensors: Sequence[torch.Tensor]) -> None:
        self._longs[:] = array("q", numbers.longs)
        self._ints[:] = array("i", numbers.ints)
        self._floats[: len(numbers.floats)] = array("f", numbers.floats)
        for mine, given in zip(self.tensors, tensors, strict=True):
            mine.copy_(given)


_DTYPES = torch.int64, torch.int32, torch.float32
RULES = "seeds", "positions", "top_k", "temperature", "top_p", "min_p"


class Replay:
    """Forwards of `model` over `state`. Results lie in memory that the next call writes again, whichever it is.

    `enabled` false: nothing is recorded, and results are the same. `replays` counts the calls that were replayed,
    `preparations` those that were not but will be: they say nothing about the time of later ones.
    """

    def __init__(self, model: Decoder, state: ModelState, enabled: bool = True) -> None:
        # What is recorded is calls of the CPU's kernels.
        self.model, self.state, self.enabled = model, state, enabled and model.device.type == "cpu"
        self.replays = self.preparations = 0
        self._pool = Pool()
        self._recorded: OrderedDict[Key, tuple[_Inputs, Recorded]] = OrderedDict()
        self._seen: OrderedDict[Key, bool] = OrderedDict()  # shapes that came once; True: refused
        modules = list(model.modules())
        self._tables: list[dict[str, Any]] = []  # where the modules keep their weights, once for each name
        self._names: list[str] = []
        for module in modules:
            tensors = [(table, torch.Tensor) for table in (module._parameters, module._buffers)]
            for table, kind in [*tensors, (vars(module), StoredWeight)]:
                names = [name for name, value in table.items() if isinstance(value, kind)]
                self._names += names
                self._tables += [table] * len(names)
        self._weights = self._current_weights()
        self._hooks = [hooks for module in modules for hooks in (module._forward_hooks, module._forward_pre_hooks)]
        self._sparse = [module for module in modules if isinstance(module, DSA)]
        self._native = runtime.native()

    @property
    def nbytes(self) -> int:
        """What recordings keep for themselves."""
        return self._pool.nbytes

    def forward(self, slots: Sequence[int], new: Sequence[Sequence[int]], rules: Rules | None = None) -> Forward:
        """The next tokens of each slot. Appends to the state. `rules` [T] draw the token behind each row.

        A slot's tokens behind its first are drafts of what follows the one before (ops.mtp_verify).
        """
        model, state = self.model, self.state

        def compute(ids_T: torch.Tensor, positions_T: torch.Tensor, batch: Batch, _: Any, draw: Draw) -> Forward:
            hidden_TH = model.trunk(ids_T, positions_T, batch, state)
            logits_TV = model.logits(hidden_TH)
            return Forward(hidden_TH, logits_TV, draw(logits_TV))

        return self._step("decoder", slots, new, state.lengths, 0, (), compute, rules)

    def draft(
        self,
        slots: Sequence[int],
        hidden_TH: torch.Tensor,
        next_ids: Sequence[Sequence[int]],
        lists_Tk: torch.Tensor | None = None,
        rules: Rules | None = None,
    ) -> Drafted:
        """One MTP step (Decoder.mtp_step) over the rows of each slot, and what follows its last row.

        `lists` int32 [T, k] of an earlier draft step are attended to as they are. `rules` [B] draw what follows.
        """
        model, state = self.model, self.state
        tensors = (hidden_TH,) if lists_Tk is None else (hidden_TH, lists_Tk)

        def compute(ids_T, positions_T, batch: Batch, last_B, draw: Draw, hidden_TH, lists_Tk=None) -> Drafted:
            given = None if lists_Tk is None else Selection(lists_Tk)
            out = model.mtp_trunk(hidden_TH, ids_T, positions_T, batch, state, given)
            z_BH = out.hidden[last_B]
            logits_BV = model.logits(z_BH)
            found = out.selection.topk_indices if out.selection is not None and given is None else None
            return Drafted(z_BH, logits_BV, None if found is None else found[last_B], draw(logits_BV))

        # The layer rotates by the place of the token that it embeds.
        return self._step("mtp", slots, next_ids, state.mtp_lengths, 1, tensors, compute, rules)

    def prime(self, slot: int, hidden_TH: torch.Tensor, next_ids: Sequence[int]) -> None:
        """One MTP step for what it leaves in the cache alone."""

        def compute(ids_T, positions_T, batch: Batch, last_B, draw: Draw, hidden_TH) -> None:
            self.model.mtp_trunk(hidden_TH, ids_T, positions_T, batch, self.state, None)

        self._step("prime", [slot], [next_ids], self.state.mtp_lengths, 1, (hidden_TH,), compute, None)

    def _step(
        self,
        kind: str,
        slots: Sequence[int],
        new: Sequence[Sequence[int]],
        lengths: list[int],
        shift: int,
        tensors: Sequence[torch.Tensor],
        compute: Callable[..., Any],
        rules: Rules | None,
    ) -> Any:
        starts = [lengths[slot] for slot in slots]
        ends = list(accumulate(map(len, new)))
        totals = [start + len(ids) for start, ids in zip(starts, new, strict=True)]
        model = self.model
        rows, tables = self.state.take(slots, starts, totals, lengths)
        B, T = len(slots), ends[-1]
        # A power of two, so that few shapes serve any length. Lists of keys are as wide as the sequences may be long.
        W = min(1 << (max(map(len, tables)) - 1).bit_length(), self.state.pages.per_sequence)
        longs = [i for ids in new for i in ids]
        for start, total in zip(starts, totals, strict=True):
            longs += range(start + shift, total + shift)
        longs += [end - 1 for end in ends]
        longs += rows
        ints = [0, *ends, *totals]
        for table in tables:
            ints += table
            ints += [0] * (W - len(table))
        floats: list[float] = []
        drawn = verified = 0
        if rules is not None:
            drawn, floats = len(rules.longs) // 3, rules.floats
            longs += rules.longs
            if kind == "decoder":
                verified = T
                for ids in new:
                    longs += ids[1:]
                    longs.append(-1)

        def call(numbers: Sequence[torch.Tensor], tensors: Sequence[torch.Tensor]) -> Any:
            longs, ints, floats = numbers
            # The model has its rows, attention what says where keys are; tokens are drawn on the CPU.
            ids_T, positions_T, last_B = longs[: 2 * T + B].to(model.device).split([T, T, B])
            slots_T, *whole, drafts_T = longs[2 * T + B :].split([T, drawn, drawn, drawn, verified])
            cu_seqlens_q, seq_lens, table = ints.to(self.state.device).split([B + 1, B, B * W])
            self.state.place(slots_T.to(self.state.device), table.view(B, W))
            batch = Batch([0, *ends], [W * PAGE] * B, slots, (cu_seqlens_q, seq_lens))
            columns = dict(zip(RULES, (*whole, *floats.split([drawn] * 3)), strict=True))

            def draw(logits: torch.Tensor) -> torch.Tensor | None:
                if verified:
                    return ops.mtp_verify(drafts_T, logits.cpu(), **columns, row_offsets=ints[: B + 1]).tokens
                return ops.sample(logits.cpu(), **columns) if drawn else None

            return compute(ids_T, positions_T, batch, last_B, draw, *tensors)

        key = (kind, T, B, W, drawn, *(tensor.shape for tensor in tensors))
        result = self._run(key, T, _Numbers(longs, ints, floats), tensors, call)
        for slot, total in zip(slots, totals, strict=True):
            lengths[slot] = total
        return result

    def _run(self, key: Key, rows: int, numbers: _Numbers, tensors: Sequence[torch.Tensor], call: Compute) -> Any:
        usable = rows <= MAX_ROWS and self._usable()
        if usable and key in self._recorded:
            self._recorded.move_to_end(key)
            inputs, recorded = self._recorded[key]
            inputs.fill(numbers, tensors)
            if recorded.replay():
                self.replays += 1
                return recorded.result
            self._drop()
        self.preparations += usable and not self._seen.get(key)
        if usable and self._seen.get(key) is False:
            return self._record(key, _Inputs(numbers, tensors), call)
        if usable:
            self._seen.setdefault(key, False)
            while len(self._seen) > 16 * MAX_RECORDINGS:
                self._seen.popitem(last=False)
        given = [torch.tensor(values, dtype=dtype) for values, dtype in zip(numbers, _DTYPES, strict=True)]
        return call(given, tensors)

    def _record(self, key: Key, inputs: _Inputs, call: Compute) -> Any:
        try:
            recorded = record(lambda: call(inputs.numbers, inputs.tensors), self._pool, self._moving)
        except RefusedError as refused:
            self._seen[key] = True
            log.warning("forwards of %s are not recorded: %s", key[:4], refused)
            return refused.result
        self._recorded[key] = inputs, recorded
        while len(self._recorded) > 1 and (len(self._recorded) > MAX_RECORDINGS or self.nbytes > MAX_BYTES):
            self._recorded.popitem(last=False)
        line = "{} step of {} rows, {} sequences, {} blocks -> recorded, {} calls".format(*key[:4], recorded.size)
        log.info(line)
        if runtime.settings.log_kernels:
            runtime.log_once(line)
        return recorded.result

    def _usable(self) -> bool:
        """Whether recordings may be used, and show all that somebody wants to see of a forward."""
        if not self.enabled or self.model.training or not self._native.all_empty(self._hooks):
            return False
        for dsa in self._sparse:
            if dsa.observer is not None:
                return False
        if not self._native.same_objects(self._tables, self._names, self._weights):
            self._drop()
        return True

    def _drop(self) -> None:
        """Forgets what was recorded: weights have moved. Memory that moved inside of a tensor is seen by the replay."""
        log.info("weights have moved: %d recordings are dropped", len(self._recorded))
        self._weights = self._current_weights()
        self._recorded.clear()
        self._seen.clear()

    def _current_weights(self) -> list[torch.Tensor | StoredWeight]:
        return [table[name] for table, name in zip(self._tables, self._names, strict=True)]

    @property
    def _moving(self) -> list[torch.Tensor]:
        """The weights that may be given new memory; that of stored ones stays where it is."""
        return [weight for weight in self._weights if isinstance(weight, torch.Tensor)]
