"""Engine: continuous batching over one ModelState, one flat forward per step.

Every step gives each running sequence the tokens that its cache lacks (a new one its whole prompt, the
others the token drawn last), in one batch, and draws one token for each. Since a sequence's logits and its
random numbers depend on itself alone, neither batch nor order shows in any result.

An engine belongs to one thread at a time: nothing here locks (glmx.serve.worker does).
"""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate

import torch

from glmx import ops
from glmx.models.batch import Batch
from glmx.models.decoder import Decoder
from glmx.ops import sample
from glmx.serve.rules import sampling_rules
from glmx.serve.sampling import Logprob, SamplingParams
from glmx.serve.text import TextStream

log = logging.getLogger(__name__)


class ContextLengthError(ValueError):
    """A prompt, or a prompt and its max_tokens, that `limit` tokens (max_model_len) do not hold.

    max_tokens is None when the prompt alone is too long.
    """

    def __init__(self, prompt_tokens: int, max_tokens: int | None, limit: int) -> None:
        self.prompt_tokens, self.max_tokens, self.limit = prompt_tokens, max_tokens, limit
        more = "" if max_tokens is None else f" and max_tokens is {max_tokens}, {prompt_tokens + max_tokens} together"
        super().__init__(f"the prompt has {prompt_tokens} tokens{more}, max_model_len is {limit}")


@dataclass(eq=False)
class Request:
    """A prompt on its way to being completed.

    pieces         the text that each token of token_ids made safe to show; joined: the text
    slot           its place in the state while it runs, else -1
    finish_reason  "stop", "length" or None; stop_reason: the id or the string that stopped it
    error          why it failed, in place of a finish_reason
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

    @property
    def finished(self) -> bool:
        return self.finish_reason is not None or self.error is not None

    @property
    def num_tokens(self) -> int:
        return len(self.prompt_token_ids) + len(self.token_ids)

    def tokens_from(self, start: int) -> list[int]:
        prompt = self.prompt_token_ids
        return prompt[start:] + self.token_ids[max(start - len(prompt), 0) :]


class Engine:
    """Runs requests on a model; at most `max_num_seqs` at a time, each of at most `max_model_len` tokens.

    `max_num_batched_tokens` bounds a forward: prompts wait while others fill it, and one that is longer is computed in
    pieces, which changes no bits. So memory does not grow with a prompt, but for its cache (glmx.models.plan).
    """

    def __init__(
        self, model: Decoder, max_num_seqs: int, max_model_len: int, max_num_batched_tokens: int = 8192
    ) -> None:
        self.model = model
        self.max_model_len = max_model_len
        self.max_num_batched_tokens = max_num_batched_tokens
        self.state = model.new_state(max_num_seqs, max_model_len)
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

    @torch.no_grad()
    def step(self) -> list[Request]:
        """One forward, one new token for each running request; returns those requests.

        When the batch fails, each of its requests runs alone, which gives the same results: those that are
        sound go on, the others end with `error` set.
        """
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
            self.running.append(request)

    def _advance(self, batch: list[Request]) -> None:
        """Draws one token for each request, or raises and leaves requests and state as they were."""
        slots = [request.slot for request in batch]
        cached = [self.state.lengths[slot] for slot in slots]
        try:
            for request in batch:
                self._shorten(request)
            hidden_BH = self._forward(batch, slots)
            logits_BV = self.model.logits(hidden_BH)
            ids_B = sample(logits_BV, **sampling_rules(batch))
            logprobs = self._logprobs(batch, hidden_BH, logits_BV, ids_B)
        except BaseException:
            for slot, length in zip(slots, cached, strict=True):
                self.state.truncate(slot, length)
            raise
        for request, token, found in zip(batch, ids_B.tolist(), logprobs, strict=True):
            self._append(request, token, found)

    def _shorten(self, request: Request) -> None:
        """Computes the head of a prompt that one forward does not hold, piece by piece."""
        slot, piece = request.slot, self.max_num_batched_tokens
        while request.num_tokens - (cached := self.state.lengths[slot]) > piece:
            self._append_tokens([slot], [request.tokens_from(cached)[:piece]])

    def _forward(self, running: Sequence[Request], slots: Sequence[int]) -> torch.Tensor:
        """The hidden state [B, H] of each request's last token."""
        starts = [self.state.lengths[slot] for slot in slots]
        new = [request.tokens_from(start) for request, start in zip(running, starts, strict=True)]
        hidden_TH = self._append_tokens(slots, new)
        ends = list(accumulate(map(len, new)))
        return hidden_TH[torch.tensor(ends, device=self.model.device) - 1]

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
        self, batch: Sequence[Request], hidden_BH: torch.Tensor, logits_BV: torch.Tensor, ids_B: torch.Tensor
    ) -> list[dict[int, Logprob] | None]:
        """Per request the drawn token and the most likely ones, None where nobody asked.

        The log-probs are lm_head_logprob's, which are the trainer's; the logits give the rank alone.
        """
        top_n = max((r.params.logprobs for r in batch if r.params.logprobs is not None), default=None)
        if top_n is None:
            return [None] * len(batch)
        out = ops.lm_head_logprob(hidden_BH, self.model.lm_head.weight, ids_B, top_n=top_n)
        result: list[dict[int, Logprob] | None] = []
        for b, request in enumerate(batch):
            if request.params.logprobs is None:
                result.append(None)
                continue
            name = request.text.token_text
            token = int(ids_B[b])
            rank = 1 + int((logits_BV[b] > logits_BV[b, token]).sum())
            found = {token: Logprob(float(out.logprob[b]), rank, name(token))}
            top_ids = out.top_ids[b, : request.params.logprobs].tolist()
            top_logprobs = out.top_logprobs[b, : request.params.logprobs].tolist()
            for place, (i, logprob) in enumerate(zip(top_ids, top_logprobs, strict=True), 1):
                found.setdefault(i, Logprob(logprob, place, name(i)))
            result.append(found)
        return result

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
