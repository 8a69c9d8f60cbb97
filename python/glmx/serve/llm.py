"""glmx.LLM: generation in process, with vLLM's names.

llm = glmx.LLM("out/step-00001200")
for out in llm.generate(["def main():"], glmx.SamplingParams(temperature=0, max_tokens=64)):
    print(out.outputs[0].text)
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from glmx.data.tokenizer import PREFIX, Tokenizer
from glmx.errors import CheckpointError
from glmx.models.checkpoint import load, resolve
from glmx.serve.engine import Engine, Request
from glmx.serve.sampling import CompletionOutput, Logprob, RequestOutput, SamplingParams

__all__ = ["LLM", "CompletionOutput", "Logprob", "RequestOutput", "SamplingParams"]

Prompt = str | Sequence[int]


class LLM:
    """A checkpoint, its tokenizer and an engine.

    model          a checkpoint directory, or a training run's (its latest step)
    max_model_len  tokens of prompt and completion together; None: the config's max_position_embeddings, at
                   most 8192
    max_num_seqs   requests that run at the same time
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
        seed: int = 0,
    ) -> None:
        directory = resolve(model)
        self.model = load(directory, device=device, dtype=dtype)
        self.directory = directory
        has_tokenizer = (directory / "tokenizer.json").exists()
        self.tokenizer = Tokenizer.from_dir(directory) if has_tokenizer else None
        limit = self.model.config.max_position_embeddings
        if max_model_len is not None and not 2 <= max_model_len <= limit:
            raise ValueError(f"max_model_len is {max_model_len}, expected 2..{limit} (max_position_embeddings)")
        self.engine = Engine(self.model, max_num_seqs, max_model_len or min(limit, 8192))
        self.eos_ids = frozenset(self.tokenizer.eos_ids if self.tokenizer else self.model.config.eos_token_ids)
        self._seed = seed
        self._requests = 0

    def generate(
        self, prompts: str | Sequence[Prompt], sampling_params: SamplingParams | Sequence[SamplingParams] | None = None
    ) -> list[RequestOutput]:
        """Completes every prompt; results are in the prompts' order.

        A text prompt is encoded behind GLM's `[gMASK]<sop>`, unless it begins with it or the tokenizer lacks
        it; token ids are taken as they are. `sampling_params` is one for all or one per prompt. Raises
        ValueError and TypeError for a bad prompt, CheckpointError for text without a tokenizer.
        """
        listed: list[str | Sequence[int]] = [prompts] if isinstance(prompts, str) else list(prompts)
        params = sampling_params if sampling_params is not None else SamplingParams()
        each = [params] * len(listed) if isinstance(params, SamplingParams) else list(params)
        if len(each) != len(listed):
            raise ValueError(f"{len(each)} sampling_params for {len(listed)} prompts")
        requests = [self._request(prompt, one) for prompt, one in zip(listed, each, strict=True)]
        try:
            for request in requests:
                self.engine.add(request)
            while self.engine.has_work:
                self.engine.step()
        finally:
            self.engine.abort()
        return [self._output(prompt, request) for prompt, request in zip(listed, requests, strict=True)]

    def stream(self, prompt: Prompt, params: SamplingParams | None = None) -> Iterator[str | RequestOutput]:
        """Completes one prompt: yields pieces of text as they become complete, then the RequestOutput.

        The pieces joined are the output's text.
        """
        request = self._request(prompt, params or SamplingParams())
        detokenizer = self.tokenizer.detokenizer() if self.tokenizer else None
        try:
            self.engine.add(request)
            while request.finish_reason is None:
                self.engine.step()
                if detokenizer and request.finish_reason != "stop":
                    yield detokenizer.push(self._known(request.token_ids[-1:]))
            if detokenizer:
                yield detokenizer.flush()
        finally:
            self.engine.abort()
        yield self._output(prompt, request)

    def encode(self, prompt: str) -> list[int]:
        """The token ids that `generate` makes of a text."""
        if self.tokenizer is None:
            raise CheckpointError(f"'{self.directory}' has no tokenizer.json: prompts must be token ids")
        ids = self.tokenizer.encode(prompt)
        return ids if prompt.startswith(PREFIX[0]) else [*self.tokenizer.prefix_ids, *ids]

    def _request(self, prompt: Prompt, params: SamplingParams) -> Request:
        if isinstance(prompt, str):
            ids = self.encode(prompt)
        elif isinstance(prompt, Sequence) and all(isinstance(i, int) for i in prompt):
            ids = [int(i) for i in prompt]
        else:
            raise TypeError(f"a prompt is a {type(prompt).__name__}, expected str or a list of token ids")
        number = self._requests
        self._requests += 1
        if params.seed is not None:
            seed = params.seed
        else:
            digest = hashlib.sha256(f"{self._seed}/{number}".encode()).digest()
            seed = int.from_bytes(digest[:8], "little", signed=True)
        eos = frozenset() if params.ignore_eos else self.eos_ids
        return Request(str(number), ids, params, seed, eos | set(params.stop_token_ids))

    def _output(self, prompt: Prompt, request: Request) -> RequestOutput:
        stopped = request.finish_reason == "stop"
        out = CompletionOutput(
            text=self._text(request.token_ids[: -1 if stopped else None]),
            token_ids=list(request.token_ids),
            finish_reason=request.finish_reason,
            stop_reason=request.token_ids[-1] if stopped else None,
        )
        if request.params.logprobs is not None:
            out.logprobs = request.logprobs
            pairs = zip(request.logprobs, request.token_ids, strict=True)
            out.cumulative_logprob = sum(found[token].logprob for found, token in pairs)
            for found in request.logprobs:
                for token, logprob in found.items():
                    logprob.decoded_token = self._text([token])
        text = prompt if isinstance(prompt, str) else None
        return RequestOutput(
            request.request_id, text, request.prompt_token_ids, [out], request.finish_reason is not None
        )

    def _text(self, ids: Sequence[int]) -> str:
        return self.tokenizer.decode(self._known(ids), skip_special_tokens=True) if self.tokenizer else ""

    def _known(self, ids: Sequence[int]) -> list[int]:
        """Without the rows that pad an embedding beyond the tokenizer's vocabulary; they stand for no text."""
        assert self.tokenizer is not None
        return [i for i in ids if i < self.tokenizer.vocab_size]
