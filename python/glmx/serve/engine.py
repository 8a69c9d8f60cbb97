"""Engine: continuous batching over one ModelState, one flat forward per step.

Every step gives each running sequence the tokens that its cache lacks (a new one its whole prompt, the
others the token drawn last), in one batch, and draws one token for each. Since a sequence's logits and its
random numbers depend on itself alone, neither batch nor order shows in any result.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from glmx import ops
from glmx.models.batch import Batch
from glmx.models.decoder import Decoder
from glmx.reference.sample import sample
from glmx.serve.sampling import Logprob, SamplingParams


@dataclass
class Request:
    """A prompt on its way to being completed. `slot` is its place in the state while it runs, else -1."""

    request_id: str
    prompt_token_ids: list[int]
    params: SamplingParams
    seed: int
    stop_ids: frozenset[int]
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[dict[int, Logprob]] = field(default_factory=list)
    slot: int = -1
    finish_reason: str | None = None

    @property
    def num_tokens(self) -> int:
        return len(self.prompt_token_ids) + len(self.token_ids)

    def tokens_from(self, start: int) -> list[int]:
        prompt = self.prompt_token_ids
        return prompt[start:] + self.token_ids[max(start - len(prompt), 0) :]


class Engine:
    """Runs requests on a model; at most `max_num_seqs` at a time, each of at most `max_model_len` tokens.

    `max_num_batched_tokens` bounds a step: prompts wait while others fill it, but a prompt alone may exceed it.
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

    @property
    def has_work(self) -> bool:
        return bool(self.waiting or self.running)

    def add(self, request: Request) -> None:
        """Queues a request. Raises ValueError for a prompt that cannot be run."""
        ids, vocab = request.prompt_token_ids, self.model.config.vocab_size
        if not ids:
            raise ValueError(f"the prompt of request {request.request_id} is empty")
        if not all(0 <= i < vocab for i in ids):
            wrong = next(i for i in ids if not 0 <= i < vocab)
            raise ValueError(f"prompt token id {wrong} is outside the vocabulary 0..{vocab - 1}")
        if len(ids) >= self.max_model_len:
            raise ValueError(f"the prompt has {len(ids)} tokens, max_model_len is {self.max_model_len}")
        if (request.params.logprobs or 0) > vocab:
            raise ValueError(f"logprobs is {request.params.logprobs}, the vocabulary has {vocab} tokens")
        self.waiting.append(request)

    @torch.no_grad()
    def step(self) -> list[Request]:
        """One forward, one new token for each running request; returns those requests."""
        self._admit()
        running = self.running
        if not running:
            return []
        slots = [request.slot for request in running if request.slot is not None]  # all of them have one
        hidden_BH = self._forward(running, slots)
        logits_BV = self.model.logits(hidden_BH)
        ids_B = sample(
            logits_BV,
            seeds=[request.seed for request in running],
            positions=[request.num_tokens for request in running],
            temperature=[request.params.temperature for request in running],
            top_k=[max(request.params.top_k, 0) for request in running],
            top_p=[request.params.top_p for request in running],
        )
        self._record_logprobs(running, hidden_BH, logits_BV, ids_B)
        for request, token in zip(running, ids_B.tolist(), strict=True):
            request.token_ids.append(token)
            self._finish_if_done(request, token)
        self.running = [request for request in running if request.finish_reason is None]
        return running

    def abort(self) -> None:
        """Drops every request."""
        for request in self.running:
            self._release(request)
        self.running = []
        self.waiting.clear()

    def _admit(self) -> None:
        tokens = len(self.running)
        while self.waiting and len(self.running) < self.state.num_sequences:
            tokens += self.waiting[0].num_tokens
            if self.running and tokens > self.max_num_batched_tokens:
                return
            request = self.waiting.popleft()
            request.slot = self.state.allocate()
            self.running.append(request)

    def _forward(self, running: Sequence[Request], slots: Sequence[int]) -> torch.Tensor:
        """The hidden state [B, H] of each request's last token."""
        cached = [self.state.lengths[slot] for slot in slots]
        new = [request.tokens_from(start) for request, start in zip(running, cached, strict=True)]
        totals = [request.num_tokens for request in running]
        batch = Batch(Batch.from_lengths([len(ids) for ids in new]).cu_seqlens_q, totals, slots)
        positions = [p for start, total in zip(cached, totals, strict=True) for p in range(start, total)]
        device = self.model.device
        hidden_TH = self.model.forward_tokens(
            torch.tensor([i for ids in new for i in ids], device=device),
            torch.tensor(positions, device=device),
            batch,
            self.state,
        )
        last = torch.tensor(batch.cu_seqlens_q[1:], device=device) - 1
        return hidden_TH[last]

    def _record_logprobs(
        self,
        running: Sequence[Request],
        hidden_BH: torch.Tensor,
        logits_BV: torch.Tensor,
        ids_B: torch.Tensor,
    ) -> None:
        """The log-probs are lm_head_logprob's, which are the trainer's; the logits give the rank alone."""
        top_n = max((r.params.logprobs for r in running if r.params.logprobs is not None), default=None)
        if top_n is None:
            return
        out = ops.lm_head_logprob(hidden_BH, self.model.lm_head.weight, ids_B, top_n=top_n)
        for b, request in enumerate(running):
            if request.params.logprobs is None:
                continue
            token = int(ids_B[b])
            rank = 1 + int((logits_BV[b] > logits_BV[b, token]).sum())
            found = {token: Logprob(float(out.logprob[b]), rank)}
            top_ids = out.top_ids[b, : request.params.logprobs].tolist()
            top_logprobs = out.top_logprobs[b, : request.params.logprobs].tolist()
            for place, (i, logprob) in enumerate(zip(top_ids, top_logprobs, strict=True), 1):
                found.setdefault(i, Logprob(logprob, place))
            request.logprobs.append(found)

    def _finish_if_done(self, request: Request, token: int) -> None:
        if token in request.stop_ids:
            request.finish_reason = "stop"
        elif len(request.token_ids) >= request.params.max_tokens or request.num_tokens >= self.max_model_len:
            request.finish_reason = "length"
        if request.finish_reason is not None:
            self._release(request)

    def _release(self, request: Request) -> None:
        if request.slot >= 0:
            self.state.free(request.slot)
            request.slot = -1
