"""Engine: continuous batching over one ModelState, one flat forward per step.

Every step gives each running sequence the tokens that its cache lacks (a new one its whole prompt, the
others the token drawn last), in one batch, and draws one token for each. Since a sequence's logits and its
random numbers depend on itself alone, neither batch nor order shows in any result.

With speculation a sequence is given drafts of its next tokens too (glmx.serve.drafts). At each of their positions
the token is drawn as ever; while the drafts are what was drawn, the step has gained more than one token.

An engine belongs to one thread at a time: nothing here locks (glmx.serve.worker does).
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import accumulate
from typing import NamedTuple

import torch

from glmx import ops
from glmx.models.batch import Batch
from glmx.models.decoder import Decoder
from glmx.models.replay import MAX_ROWS, Replay
from glmx.serve.drafts import Drafter
from glmx.serve.rules import plain_rules, verify
from glmx.serve.sampling import Logprob, SamplingParams
from glmx.serve.speculation import KEPT, Speculation, Track
from glmx.serve.text import TextStream

log = logging.getLogger(__name__)

# Rows of hidden states that a sequence keeps for the MTP layer while it makes no drafts; then they are taken in. Where
# drafts do not pay that would be work for nothing: it forgets what it has of the sequence, and keeps KEPT rows for the
# next try to begin with.
MAX_HELD = 64


class ContextLengthError(ValueError):
    """A prompt, or a prompt and its max_tokens, that `limit` tokens (max_model_len) do not hold.

    max_tokens is None when the prompt alone is too long.
    """

    def __init__(self, prompt_tokens: int, max_tokens: int | None, limit: int) -> None:
        self.prompt_tokens, self.max_tokens, self.limit = prompt_tokens, max_tokens, limit
        more = "" if max_tokens is None else f" and max_tokens is {max_tokens}, {prompt_tokens + max_tokens} together"
        super().__init__(f"the prompt has {prompt_tokens} tokens{more}, max_model_len is {limit}")


class Rows(NamedTuple):
    """Some rows of a step's hidden states, not copied: mostly nobody asks for them."""

    hidden_TH: torch.Tensor
    start: int
    end: int


@dataclass(eq=False)
class Request:
    """A prompt on its way to being completed.

    pieces         the text that each token of token_ids made safe to show; joined: the text
    slot           its place in the state while it runs, else -1
    finish_reason  "stop", "length" or None; stop_reason: the id or the string that stopped it
    error          why it failed, in place of a finish_reason
    held           the hidden states that the MTP layer has yet to take in; None: no drafts are made
    mtp_start      the token that its first entry of the sequence is of: tokens before it are forgotten
    track          how well its drafts do
    """

    request_id: str
    prompt_token_ids: list[int]
    params: SamplingParams
    seed: int
    stop_ids: frozenset[int]
    text: TextStream
    token_ids: list[int] = field(default_factory=list)
    pieces: list[str] = field(default_factory=list)
    logprobs: list[dict[int, Logprob]] = field(default_factory=list)
    slot: int = -1
    finish_reason: str | None = None
    stop_reason: int | str | None = None
    error: Exception | None = None
    held: list[Rows] | None = None
    mtp_start: int = 0
    track: Track | None = None

    @cached_property
    def rule(self) -> tuple[int, int, float, float, float]:
        """seed, top_k, temperature, top_p and min_p as the op sample takes them."""
        p = self.params
        seed = (self.seed + 2**63) % 2**64 - 2**63  # 64 bits of it, signed
        # top_p: what fp32 can hold is one token all the same
        return seed, min(max(p.top_k, 0), 2**31), p.temperature, max(p.top_p, 1e-30), p.min_p

    @cached_property
    def plain(self) -> bool:
        """Whether its tokens are drawn without regard to those before them and without biases."""
        return not (self.params.penalised or self.params.logit_bias)

    @property
    def finished(self) -> bool:
        return self.finish_reason is not None or self.error is not None

    @property
    def num_tokens(self) -> int:
        return len(self.prompt_token_ids) + len(self.token_ids)

    def held_rows(self) -> torch.Tensor:
        """What it holds, [h, H]."""
        return _joined(self.held or [])

    def tokens_from(self, start: int) -> list[int]:
        prompt = self.prompt_token_ids
        return prompt[start:] + self.token_ids[max(start - len(prompt), 0) :]


class Engine:
    """Runs requests on a model; at most `max_num_seqs` at a time, each of at most `max_model_len` tokens.

    `max_num_batched_tokens` bounds a forward: prompts wait while others fill it, and one that is longer is computed in
    pieces, which changes no bits. So memory does not grow with a prompt, but for its cache (glmx.models.plan).
    `speculation` says how many drafts are made, None: none ever; `clock` (seconds) tells it what steps cost. `replay`:
    whether steps without prompts are recorded (glmx.models.replay); it changes no results.
    """

    def __init__(
        self,
        model: Decoder,
        max_num_seqs: int,
        max_model_len: int,
        max_num_batched_tokens: int = 8192,
        speculation: Speculation | None = None,
        clock: Callable[[], float] = time.perf_counter,
        replay: bool = True,
    ) -> None:
        self.model = model
        self.max_model_len = max_model_len
        self.max_num_batched_tokens = max_num_batched_tokens
        self.state = model.new_state(max_num_seqs, max_model_len)
        self.speculation = speculation
        self.clock = clock
        self.replay = Replay(model, self.state, replay)
        self._drafter = Drafter(self.replay, max_num_batched_tokens)
        self.waiting: deque[Request] = deque()
        self.running: list[Request] = []
        # The one thread that may add requests and step; None: whoever calls.
        self.owner: int | None = None

    @property
    def has_work(self) -> bool:
        return bool(self.waiting or self.running)

    @property
    def free_slots(self) -> int:
        """How many more requests could run at once."""
        return self.state.num_sequences - len(self.running) - len(self.waiting)

    def check(self, request: Request) -> None:
        """Raises ValueError for a prompt that cannot be run, ContextLengthError for one that is too long."""
        ids, vocab = request.prompt_token_ids, self.model.config.vocab_size
        if not ids:
            raise ValueError(f"the prompt of request {request.request_id} is empty")
        if len(ids) >= self.max_model_len:
            raise ContextLengthError(len(ids), None, self.max_model_len)
        if not all(0 <= i < vocab for i in ids):
            wrong = next(i for i in ids if not 0 <= i < vocab)
            raise ValueError(f"prompt token id {wrong} is outside the vocabulary 0..{vocab - 1}")
        if (request.params.logprobs or 0) > vocab:
            raise ValueError(f"logprobs is {request.params.logprobs}, the vocabulary has {vocab} tokens")
        for token in request.params.logit_bias or ():
            if token >= vocab:
                raise ValueError(f"logit_bias names token id {token}, outside the vocabulary 0..{vocab - 1}")

    def add(self, request: Request) -> None:
        """Queues a request; raises as `check` does, RuntimeError on a thread that does not own the engine."""
        if self.owner is not None and self.owner != threading.get_ident():
            raise RuntimeError("this engine runs on its worker's thread: submit to the worker, or drain it first")
        self.check(request)
        self.waiting.append(request)

    def step(self) -> list[Request]:
        """One forward, at least one new token for each running request; returns those requests.

        When the batch fails, each of its requests runs alone, which gives the same results: those that are
        sound go on, the others end with `error` set.
        """
        if not torch.is_grad_enabled():  # who makes many steps saves the context of each
            return self._step()
        with torch.no_grad():
            return self._step()

    def _step(self) -> list[Request]:
        self._admit()
        running = self.running
        batches = [running] if running else []
        while batches:
            batch = batches.pop()
            try:
                self._advance(batch)
            except Exception as error:
                if len(batch) == 1:
                    batch[0].error = error
                    self._release(batch[0])
                else:
                    log.warning("a step of %d requests failed, each now runs alone: %s", len(batch), error)
                    batches += [[request] for request in reversed(batch)]
        self.running = [request for request in running if not request.finished]
        return running

    def abort(self, request: Request) -> None:
        """Drops a request, waiting or running; its slot is free at once. One that is not here is no error."""
        if request in self.running:
            self.running.remove(request)
            self._release(request)
        elif request in self.waiting:
            self.waiting.remove(request)

    def _admit(self) -> None:
        tokens = len(self.running)
        while self.waiting and len(self.running) < self.state.num_sequences:
            tokens += (self.waiting[0].num_tokens - 1) % self.max_num_batched_tokens + 1  # what _shorten leaves
            if self.running and tokens > self.max_num_batched_tokens:
                return
            request = self.waiting.popleft()
            request.slot = self.state.allocate()
            if self.speculation is not None:
                request.track = self.speculation.track()
                if self._room(request) > 2:  # one comes with the prompt, and the last one needs no draft
                    request.held = []
            self.running.append(request)

    def _advance(self, batch: list[Request]) -> None:
        """Draws the next tokens of each request, or raises and leaves requests and state as they were."""
        slots = [request.slot for request in batch]
        lengths = [(self.state.lengths[slot], self.state.mtp_lengths[slot]) for slot in slots]
        try:
            for request in batch:
                self._shorten(request)
            asleep = self.speculation is None or self.speculation.sleeps(_tracks(batch))
            times, preparations = [self.clock()], self.replay.preparations
            drafts = [[] for _ in batch] if asleep else self._draft(batch)
            times.append(self.clock())
            cached = [self.state.lengths[slot] for slot in slots]
            known = [request.tokens_from(start) for request, start in zip(batch, cached, strict=True)]
            hidden_TH, hidden_RH, logits_RV, ids = self._forward(batch, known, drafts)
            gained = _verified(drafts, ids)
            logprobs = self._logprobs(batch, drafts, gained, hidden_RH, logits_RV)
            nothing: list[list[Rows] | None] = [None if request.held is None else [] for request in batch]
            held = nothing if asleep else self._settle(batch, known, drafts, gained, hidden_TH)
            times.append(self.clock())
        except BaseException:
            for slot, (length, mtp_length) in zip(slots, lengths, strict=True):
                self.state.truncate(slot, length)
                self.state.truncate_mtp(slot, mtp_length)
            raise
        if not asleep:
            self._learn(batch, known, drafts, gained, times, self.replay.preparations == preparations)
        for request, tokens, found, rows in zip(batch, gained, logprobs, held, strict=True):
            request.held = rows
            if rows:
                self._begin_at(request, rows)
            for token, logprob in zip(tokens, found, strict=True):
                if not request.finished:
                    self._append(request, token, logprob)

    def _shorten(self, request: Request) -> None:
        """Computes the head of a prompt that one forward does not hold, piece by piece."""
        slot, piece = request.slot, self.max_num_batched_tokens
        while request.num_tokens - (cached := self.state.lengths[slot]) > piece:
            ids = request.tokens_from(cached)
            hidden_TH = self._append_tokens([slot], [ids[:piece]])
            if request.held is not None:
                self._drafter.prime(slot, hidden_TH, ids[1 : piece + 1])

    def _draft(self, batch: Sequence[Request]) -> list[list[int]]:
        """Guesses of each request's next tokens; as many as it can still gain, and as the forward still holds."""
        assert self.speculation is not None
        if self.speculation.rests(_tracks(batch)):
            return [[] for _ in batch]
        rooms = [self._room(r) - 1 if r.held else 0 for r in batch]
        spare = self.max_num_batched_tokens - sum(r.num_tokens - self.state.lengths[r.slot] for r in batch)
        counts = []
        for count in self.speculation.counts(_tracks(batch), rooms):
            counts.append(min(count, max(spare, 0)))
            spare -= counts[-1]
        return self._drafter.draft(batch, counts)

    def _room(self, request: Request) -> int:
        """How many tokens a request may still gain."""
        left = self.max_model_len - request.num_tokens
        return min(request.params.max_tokens - len(request.token_ids), left)

    def _forward(
        self, batch: Sequence[Request], known: Sequence[list[int]], drafts: Sequence[list[int]]
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, list[int]]:
        """One forward over what each cache lacks, and over drafts: hidden [T, H].

        Then of the rows of each request's last known token and its drafts, one behind the other: hidden [R, H], logits
        [R, V], and the tokens behind them, drawn as without drafts; -1 behind a wrong draft.
        """
        slots = [request.slot for request in batch]
        new = [ids + guesses for ids, guesses in zip(known, drafts, strict=True)]
        seen = [range(len(guesses) + 1) for guesses in drafts]
        if all(len(ids) == 1 for ids in known):  # no prompts, of whose rows few need logits
            rules = plain_rules(batch, seen) if all(request.plain for request in batch) else None
            out = self.replay.forward(slots, new, rules)
            ids = verify(out.logits, batch, drafts) if out.ids is None else out.ids.tolist()
            return out.hidden, out.hidden, out.logits, ids
        hidden_TH = self._append_tokens(slots, new)
        ends = accumulate(map(len, new))
        places = [end - len(counts) + n for end, counts in zip(ends, seen, strict=True) for n in counts]
        hidden_RH = hidden_TH[torch.tensor(places, device=self.model.device)]
        logits_RV = self.model.logits(hidden_RH)
        return hidden_TH, hidden_RH, logits_RV, verify(logits_RV, batch, drafts)

    def _settle(
        self,
        batch: Sequence[Request],
        known: Sequence[list[int]],
        drafts: Sequence[list[int]],
        gained: Sequence[list[int]],
        hidden_TH: torch.Tensor,
    ) -> list[list[Rows] | None]:
        """Takes wrong drafts back; returns what each request holds for the MTP layer."""
        assert self.speculation is not None
        if len(hidden_TH) <= MAX_ROWS:
            hidden_TH = hidden_TH.clone()  # the replay's next call may write there
        held: list[list[Rows] | None] = []
        end = 0
        for request, ids, guesses, tokens in zip(batch, known, drafts, gained, strict=True):
            start, end = end, end + len(ids) + len(guesses)
            if wrong := 1 + len(guesses) - len(tokens):
                self.state.truncate(request.slot, self.state.lengths[request.slot] - wrong)
            track = request.track
            if request.held is None or track is None or self._room(request) - len(tokens) < 2:
                held.append(None)
                continue
            hopeful = bool(guesses) or self.speculation.hopeful(track)
            if not hopeful and self.speculation.steps_to_try(track) > KEPT:
                held.append([Rows(hidden_TH, end - wrong - 1, end - wrong)])  # enough to begin anew with
            else:
                before = [] if guesses else request.held  # drafts have taken it in
                held.append(self._hold(request, [*before, Rows(hidden_TH, start, end - wrong)], tokens, hopeful))
        return held

    def _hold(self, request: Request, held: list[Rows], tokens: Sequence[int], hopeful: bool) -> list[Rows]:
        """What the MTP layer has yet to take in of a request that gains `tokens`; more than MAX_HELD rows it takes."""
        count = _count(held)
        if count <= MAX_HELD:
            return held
        rows_TH = _joined(held)
        if not hopeful:
            return [Rows(rows_TH[-KEPT:].clone(), 0, KEPT)]
        # All but the last, out of which the first draft comes.
        next_ids = [*request.tokens_from(self.state.lengths[request.slot] - count + 1), *tokens][: count - 1]
        self._drafter.prime(request.slot, rows_TH[:-1], next_ids)
        return [Rows(rows_TH[-1:].clone(), 0, 1)]

    def _begin_at(self, request: Request, held: list[Rows]) -> None:
        """Where rows before those held are missing, the MTP layer begins anew; RoPE does not see what came before."""
        start = self.state.lengths[request.slot] - _count(held)
        if request.mtp_start + self.state.mtp_lengths[request.slot] != start:
            request.mtp_start = start
            if self.state.mtp_lengths[request.slot]:
                self.state.truncate_mtp(request.slot, 0)

    def _learn(
        self,
        batch: Sequence[Request],
        known: Sequence[Sequence[int]],
        drafts: Sequence[Sequence[int]],
        gained: Sequence[Sequence[int]],
        times: Sequence[float],
        typical: bool,
    ) -> None:
        """Tells the speculation how a step's drafts did, and what the step cost."""
        assert self.speculation is not None
        self.speculation.observe(_tracks(batch), list(map(len, drafts)), [len(tokens) - 1 for tokens in gained])
        if all(len(ids) == 1 for ids in known):
            began, drafted_at, ended = times
            if not any(drafts):
                self.speculation.observe_times(len(batch), ended - drafted_at, 0, 0, 0.0, typical=typical)
                return
            caught_up = [_count(r.held) for r, guesses in zip(batch, drafts, strict=True) if guesses and r.held]
            short = max(caught_up, default=0) <= self.speculation.limit + 1
            drafted = sum(map(len, drafts))
            self.speculation.observe_times(
                len(batch) + drafted,
                ended - drafted_at,
                drafted,
                max(map(len, drafts)),
                drafted_at - began,
                caught_up=short,
                typical=typical,
            )

    def _append_tokens(self, slots: Sequence[int], new: Sequence[Sequence[int]]) -> torch.Tensor:
        """One forward over the next tokens of each slot -> hidden [T, H]."""
        starts = [self.state.lengths[slot] for slot in slots]
        totals = [start + len(ids) for start, ids in zip(starts, new, strict=True)]
        batch = Batch(Batch.from_lengths([len(ids) for ids in new]).cu_seqlens_q, totals, slots)
        positions = [p for start, total in zip(starts, totals, strict=True) for p in range(start, total)]
        device = self.model.device
        return self.model.forward_tokens(
            torch.tensor([i for ids in new for i in ids], device=device),
            torch.tensor(positions, device=device),
            batch,
            self.state,
        )

    def _logprobs(
        self,
        batch: Sequence[Request],
        drafts: Sequence[Sequence[int]],
        gained: Sequence[Sequence[int]],
        hidden_RH: torch.Tensor,
        logits_RV: torch.Tensor,
    ) -> list[list[dict[int, Logprob] | None]]:
        """Of each token that a request gained, its own and the most likely ones; None where nobody asked.

        hidden and logits are _forward's. The log-probs are lm_head_logprob's, which are the trainer's; the logits give
        the rank alone.
        """
        found: list[list[dict[int, Logprob] | None]] = [[None] * len(tokens) for tokens in gained]
        if all(request.params.logprobs is None for request in batch):
            return found
        firsts = accumulate((len(guesses) + 1 for guesses in drafts), initial=0)
        asked = [
            (b, j, first + j, n)
            for b, (request, first) in enumerate(zip(batch, firsts, strict=False))
            if (n := request.params.logprobs) is not None
            for j in range(len(gained[b]))
        ]
        rows = torch.tensor([row for _, _, row, _ in asked], device=hidden_RH.device)
        ids_A = torch.tensor([gained[b][j] for b, j, _, _ in asked], device=hidden_RH.device)
        top_n = max(n for _, _, _, n in asked)
        out = ops.lm_head_logprob(hidden_RH[rows], self.model.lm_head.weight, ids_A, top_n=top_n)
        logprob_A, top_ids, top_logprobs = (x.tolist() for x in (out.logprob, out.top_ids, out.top_logprobs))
        for a, (b, j, row, n) in enumerate(asked):
            name, token, logits_V = batch[b].text.token_text, gained[b][j], logits_RV[row]
            rank = 1 + int((logits_V > logits_V[token]).sum())
            mine = {token: Logprob(logprob_A[a], rank, name(token))}
            tops = zip(top_ids[a][:n], top_logprobs[a][:n], strict=True)
            for place, (i, logprob) in enumerate(tops, 1):
                mine.setdefault(i, Logprob(logprob, place, name(i)))
            found[b][j] = mine
        return found

    def _append(self, request: Request, token: int, logprobs: dict[int, Logprob] | None) -> None:
        """Takes a drawn token in, with its text, and ends the request when that is due."""
        request.token_ids.append(token)
        if logprobs is not None:
            request.logprobs.append(logprobs)
        stopped = token in request.stop_ids
        full = len(request.token_ids) >= request.params.max_tokens or request.num_tokens >= self.max_model_len
        piece = "" if stopped else request.text.push([token])
        if stopped or full:
            piece += request.text.flush()
        request.pieces.append(piece)
        if request.text.stop_reason is not None:
            request.finish_reason, request.stop_reason = "stop", request.text.stop_reason
        elif stopped:
            request.finish_reason, request.stop_reason = "stop", token
        elif full:
            request.finish_reason = "length"
        if request.finished:
            self._release(request)

    def _release(self, request: Request) -> None:
        if request.slot >= 0:
            self.state.free(request.slot)
            request.slot = -1
        request.held = None


def _verified(drafts: Sequence[Sequence[int]], ids: list[int]) -> list[list[int]]:
    """The tokens that each request gains: one, and one more for each draft that was right. `ids` are _forward's."""
    gained, first = [], 0
    for guesses in drafts:
        tokens = ids[first : first + len(guesses) + 1]
        gained.append(tokens[: tokens.index(-1)] if tokens[-1] == -1 else tokens)
        first += len(guesses) + 1
    return gained


def _count(held: Sequence[Rows]) -> int:
    return sum(rows.end - rows.start for rows in held)


def _joined(held: Sequence[Rows]) -> torch.Tensor:
    pieces = [rows.hidden_TH[rows.start : rows.end] for rows in held]
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces)


def _tracks(batch: Sequence[Request]) -> list[Track]:
    return [request.track for request in batch if request.track is not None]
