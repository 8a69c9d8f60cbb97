"""glmx.LLM: generation in process, with vLLM's names.

llm = glmx.LLM("out/step-00001200")
for out in llm.generate(["def main():"], glmx.SamplingParams(temperature=0, max_tokens=64)):
    print(out.outputs[0].text)
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from glmx.data.tokenizer import PREFIX, Tokenizer
from glmx.errors import CheckpointError, UnsupportedError
from glmx.models.checkpoint import load, resolve
from glmx.models.device import choose
from glmx.serve.engine import Engine, Request
from glmx.serve.sampling import CompletionOutput, Logprob, RequestOutput, SamplingParams
from glmx.serve.speculation import Counters, check_drafts, speculation
from glmx.serve.text import TextStream

__all__ = ["LLM", "CompletionOutput", "Logprob", "RequestOutput", "SamplingParams"]

Prompt = str | Sequence[int]


class LLM:
    """A checkpoint, its tokenizer and an engine.

    model          a checkpoint directory, or a training run's (its latest step)
    max_model_len  tokens of prompt and completion together; None: the config's max_position_embeddings, at
                   most 8192
    max_num_seqs   requests that run at the same time
    max_num_batched_tokens  tokens computed at a time: longer prompts take several forwards, with the same results
    mapped         use the checkpoint's files in place, where they hold what the model needs (glmx.load); they must not
                   be cut short meanwhile. False: copy the weights
    lock           keep the weights in memory, as the system's limit (ulimit -l) allows
    check_finite   look for NaN and infinity in the weights while they are read
    dequantize     weights in few bits become bf16, in the memory that takes: what a GPU needs (glmx.load)
    num_speculative_tokens  drafts of the MTP layer that a step verifies, for each request: K, or "auto", as many as pay
                   off, measured; 0: none. The results are the same, to the bit
    seed           where requests without a seed of their own get one from
    """

    def __init__(
        self,
        model: str | Path,
        *,
        device: str | torch.device = "auto",
        dtype: str | torch.dtype = "auto",
        max_model_len: int | None = None,
        max_num_seqs: int = 16,
        max_num_batched_tokens: int = 8192,
        num_speculative_tokens: int | str = 0,
        seed: int = 0,
        mapped: bool = True,
        lock: bool = False,
        check_finite: bool = False,
        dequantize: bool = False,
    ) -> None:
        check_drafts(num_speculative_tokens)
        device = choose(device)
        directory = resolve(model)
        self.directory = directory
        has_tokenizer = (directory / "tokenizer.json").exists()
        self.tokenizer = Tokenizer.from_dir(directory) if has_tokenizer else None
        self.model = load(
            directory, device, dtype, dequantize=dequantize, mapped=mapped, lock=lock, check_finite=check_finite
        )
        limit = self.model.config.max_position_embeddings
        if max_model_len is not None and not 2 <= max_model_len <= limit:
            raise ValueError(f"max_model_len is {max_model_len}, expected 2..{limit} (max_position_embeddings)")
        if max_num_batched_tokens < 1:
            raise ValueError(f"max_num_batched_tokens is {max_num_batched_tokens}, expected at least 1")
        drafts = speculation(num_speculative_tokens, self.model.config.num_nextn_predict_layers > 0)
        length = max_model_len or min(limit, 8192)
        self.engine = Engine(self.model, max_num_seqs, length, max_num_batched_tokens, drafts)
        self.eos_ids = frozenset(self.tokenizer.eos_ids if self.tokenizer else self.model.config.eos_token_ids)
        self._seed = seed
        self._numbers = itertools.count()  # next() is one step, so any thread may make requests

    @torch.no_grad()
    def generate(
        self, prompts: str | Sequence[Prompt], sampling_params: SamplingParams | Sequence[SamplingParams] | None = None
    ) -> list[RequestOutput]:
        """Completes every prompt; results are in the prompts' order.

        A text prompt is encoded behind GLM's `[gMASK]<sop>`, unless it begins with it or the tokenizer lacks
        it; token ids are taken as they are. `sampling_params` is one for all or one per prompt. Raises
        ValueError and TypeError for a bad prompt, CheckpointError for text without a tokenizer, and whatever
        stopped the forward of any of them.
        """
        listed: list[str | Sequence[int]] = [prompts] if isinstance(prompts, str) else list(prompts)
        params = sampling_params if sampling_params is not None else SamplingParams()
        each = [params] * len(listed) if isinstance(params, SamplingParams) else list(params)
        if len(each) != len(listed):
            raise ValueError(f"{len(each)} sampling_params for {len(listed)} prompts")
        requests = [self.make_request(prompt, one) for prompt, one in zip(listed, each, strict=True)]
        try:
            for request in requests:
                self.engine.add(request)
            while not all(request.finished for request in requests):
                self.engine.step()
                for request in requests:
                    if request.error is not None:
                        raise request.error
        finally:
            for request in requests:
                self.engine.abort(request)
        return [self._output(prompt, request) for prompt, request in zip(listed, requests, strict=True)]

    def chat(
        self,
        messages: Sequence[Mapping[str, Any]] | Sequence[Sequence[Mapping[str, Any]]],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        tools: Sequence[dict[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        chat_template_kwargs: Mapping[str, Any] | None = None,
    ) -> list[RequestOutput]:
        """Answers one conversation, a list of {"role": ..., "content": ...}, or each of a list of them.

        The checkpoint's chat template turns it into the prompt; raises as `encode_chat` and `generate` do.
        """
        several = bool(messages) and not isinstance(messages[0], Mapping)
        conversations: list[Any] = list(messages) if several else [messages]
        prompts = [
            self.encode_chat(
                one, tools=tools, add_generation_prompt=add_generation_prompt, chat_template_kwargs=chat_template_kwargs
            )
            for one in conversations
        ]
        return self.generate(prompts, sampling_params)

    def stream(self, prompt: Prompt, params: SamplingParams | None = None) -> Iterator[str | RequestOutput]:
        """Completes one prompt: yields pieces of text as they become complete, then the RequestOutput.

        The pieces joined are the output's text.
        """
        request = self.make_request(prompt, params or SamplingParams())
        shown = 0
        try:
            self.engine.add(request)
            # Another generation in between may have advanced this one too: what counts is what was not yet shown.
            while shown < len(request.pieces) or not request.finished:
                if shown == len(request.pieces):
                    self.engine.step()
                if request.error is not None:
                    raise request.error
                pieces, shown = request.pieces[shown:], len(request.pieces)
                if self.tokenizer is not None:
                    yield "".join(pieces)
        finally:
            self.engine.abort(request)
        yield self._output(prompt, request)

    @property
    def speculation(self) -> Counters | None:
        """How many drafts were made and accepted so far, by their place in a step; None without speculation."""
        return None if self.engine.speculation is None else self.engine.speculation.counters

    def encode(self, prompt: str) -> list[int]:
        """The token ids that `generate` makes of a text."""
        if self.tokenizer is None:
            raise CheckpointError(f"'{self.directory}' has no tokenizer.json: prompts must be token ids")
        ids = self.tokenizer.encode(prompt)
        return ids if prompt.startswith(PREFIX[0]) else [*self.tokenizer.prefix_ids, *ids]

    def encode_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[dict[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        chat_template_kwargs: Mapping[str, Any] | None = None,
    ) -> list[int]:
        """The token ids that `chat` makes of a conversation: the template's text, nothing added.

        `chat_template_kwargs` go to the template (`enable_thinking=False`). Raises CheckpointError without a
        tokenizer, UnsupportedError without a chat template, ValueError for messages that it refuses.
        """
        if self.tokenizer is None:
            raise CheckpointError(f"'{self.directory}' has no tokenizer.json: a chat needs one")
        extra = dict(chat_template_kwargs or {})
        for name in ("messages", "tools", "add_generation_prompt"):
            if name in extra:
                raise ValueError(f"chat_template_kwargs has '{name}', which is an argument of its own")
        if not messages or not all(isinstance(message, Mapping) for message in messages):
            raise ValueError("messages: expected a list of at least one {'role': ..., 'content': ...}")
        text = self.tokenizer.apply_chat_template(
            [dict(message) for message in messages],
            tools=tools,
            add_generation_prompt=add_generation_prompt,
            **extra,
        )
        return self.tokenizer.encode(text)

    def make_request(self, prompt: Prompt, params: SamplingParams) -> Request:
        """A request for the engine, with a seed of its own when `params` has none. Any thread may call this."""
        if params.stop and self.tokenizer is None:
            raise UnsupportedError(
                f"stop is {params.stop!r}, but '{self.directory}' has no tokenizer.json: use stop_token_ids"
            )
        if isinstance(prompt, str):
            ids = self.encode(prompt)
        elif isinstance(prompt, Sequence) and all(isinstance(i, int) for i in prompt):
            ids = [int(i) for i in prompt]
        else:
            raise TypeError(f"a prompt is a {type(prompt).__name__}, expected str or a list of token ids")
        number = next(self._numbers)
        if params.seed is not None:
            seed = params.seed
        else:
            digest = hashlib.sha256(f"{self._seed}/{number}".encode()).digest()
            seed = int.from_bytes(digest[:8], "little", signed=True)
        eos = frozenset() if params.ignore_eos else self.eos_ids
        stop_ids = eos | set(params.stop_token_ids)
        return Request(str(number), ids, params, seed, stop_ids, TextStream(self.tokenizer, params))

    def _output(self, prompt: Prompt, request: Request) -> RequestOutput:
        out = CompletionOutput(
            text="".join(request.pieces),
            token_ids=list(request.token_ids),
            finish_reason=request.finish_reason,
            stop_reason=request.stop_reason,
        )
        if request.params.logprobs is not None:
            out.logprobs = request.logprobs
            pairs = zip(request.logprobs, request.token_ids, strict=True)
            out.cumulative_logprob = sum(found[token].logprob for found, token in pairs)
        text = prompt if isinstance(prompt, str) else None
        return RequestOutput(
            request.request_id, text, request.prompt_token_ids, [out], request.finish_reason is not None
        )
