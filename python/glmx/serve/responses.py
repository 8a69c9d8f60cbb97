"""OpenAI's response bodies: one `Answer` per request turns the deltas of its choices into a body or into SSE chunks."""

from __future__ import annotations

import codecs
import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import msgspec

from glmx.data.tokenizer import Tokenizer
from glmx.serve.sampling import Logprob
from glmx.serve.worker import Delta

DONE = b"data: [DONE]\n\n"


def event(body: Any) -> bytes:
    """One server-sent event. JSON has no raw line ends, so a body is always one line."""
    return b"data: " + msgspec.json.encode(body) + b"\n\n"


@dataclass
class _Token:
    """A generated token, its log-probs, and where in the text it starts."""

    token_id: int
    found: dict[int, Logprob]
    offset: int


@dataclass
class _Choice:
    """One choice while it grows. `held` are tokens whose text is not shown yet, as the text itself is held back."""

    text: list[str] = field(default_factory=list)
    shown: int = 0
    finish_reason: str | None = None
    completion_tokens: int = 0
    held: list[_Token] = field(default_factory=list)
    tokens: list[_Token] = field(default_factory=list)
    decoder: Any = field(default_factory=lambda: codecs.getincrementaldecoder("utf-8")("replace"))
    decoded: int = 0


class Answer:
    """The answer to one request of `prompt_tokens` tokens with `choices` choices.

    kind      "chat" or "text": the two families of bodies
    logprobs  whether the request asked for them, and `top` for how many beside each token
    """

    def __init__(
        self,
        kind: str,
        *,
        model: str,
        fingerprint: str,
        tokenizer: Tokenizer,
        prompt_tokens: int,
        choices: int = 1,
        top: int | None = None,
    ) -> None:
        self.chat = kind == "chat"
        self.tokenizer = tokenizer
        self.prompt_tokens = prompt_tokens
        self.top = top
        self.choices = [_Choice() for _ in range(choices)]
        self.head = {
            "id": ("chatcmpl-" if self.chat else "cmpl-") + uuid.uuid4().hex,
            "object": "chat.completion" if self.chat else "text_completion",
            "created": int(time.time()),
            "model": model,
            "system_fingerprint": fingerprint,
        }
        self.chunk_head = {**self.head, "object": "chat.completion.chunk"} if self.chat else self.head

    def add(self, index: int, delta: Delta) -> list[_Token]:
        """Takes a delta of choice `index`; returns the tokens whose text, or a part of it, it shows."""
        choice = self.choices[index]
        choice.text.append(delta.text)
        choice.shown += len(delta.text)
        choice.completion_tokens += len(delta.token_ids)
        choice.finish_reason = delta.finish_reason
        for token_id, found in zip(delta.token_ids, delta.logprobs or (), strict=False):
            choice.held.append(_Token(token_id, found, choice.decoded))
            choice.decoded += len(choice.decoder.decode(self._bytes(token_id, shown_only=True)))
        if delta.finish_reason == "length":
            count = len(choice.held)
        elif isinstance(delta.stop_reason, int):
            count = max(len(choice.held) - 1, 0)  # the token that ended the text is no part of it
        else:
            count = sum(token.offset < choice.shown for token in choice.held)
        released, choice.held = choice.held[:count], choice.held[count:]
        choice.tokens += released
        return released

    # -- one body

    def body(self) -> bytes:
        """The whole answer, when every choice has finished."""
        choices = []
        for index, choice in enumerate(self.choices):
            text = "".join(choice.text)
            shown = (
                {"message": {"role": "assistant", "content": text, "refusal": None}} if self.chat else {"text": text}
            )
            choices.append(
                {
                    "index": index,
                    **shown,
                    "logprobs": self._logprobs(choice.tokens),
                    "finish_reason": choice.finish_reason,
                }
            )
        return msgspec.json.encode({**self.head, "choices": choices, "usage": self.usage()})

    def usage(self) -> dict[str, int]:
        completion = sum(choice.completion_tokens for choice in self.choices)
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": completion,
            "total_tokens": self.prompt_tokens + completion,
        }

    # -- chunks

    def opening(self) -> bytes:
        """A chat's first chunks, which name the role."""
        if not self.chat:
            return b""
        return b"".join(self._chunk(i, {"role": "assistant", "content": ""}) for i in range(len(self.choices)))

    def chunks(self, index: int, delta: Delta) -> bytes:
        """What a delta adds to the stream: nothing while text is held back, a finish_reason by itself in a chat."""
        logprobs = self._logprobs(self.add(index, delta))
        out = b""
        if self.chat:
            if delta.text or (logprobs and logprobs["content"]):
                out = self._chunk(index, {"content": delta.text}, logprobs)
            if delta.finish_reason:
                out += self._chunk(index, {}, None, delta.finish_reason)
        elif delta.text or delta.finish_reason or (logprobs and logprobs["tokens"]):
            out = self._chunk(index, delta.text, logprobs, delta.finish_reason)
        return out

    def usage_chunk(self) -> bytes:
        return event({**self.chunk_head, "choices": [], "usage": self.usage()})

    def _chunk(self, index: int, new: Any, logprobs: Any = None, finish_reason: str | None = None) -> bytes:
        part = {"delta": new} if self.chat else {"text": new}
        choice = {"index": index, **part, "logprobs": logprobs, "finish_reason": finish_reason}
        return event({**self.chunk_head, "choices": [choice]})

    # -- log-probs

    def _logprobs(self, tokens: Sequence[_Token]) -> dict[str, Any] | None:
        if self.top is None:
            return None
        if self.chat:
            return {"content": [self._chat_logprob(token) for token in tokens], "refusal": None}
        names = [self._name(token.token_id) for token in tokens]
        return {
            "tokens": names,
            "token_logprobs": [_finite(token.found[token.token_id].logprob) for token in tokens],
            "top_logprobs": [self._top_of(token) for token in tokens] if self.top else None,
            "text_offset": [token.offset for token in tokens],
        }

    def _chat_logprob(self, token: _Token) -> dict[str, Any]:
        best = sorted(token.found.items(), key=lambda item: item[1].rank)[: self.top]
        chosen = self._entry(token.token_id, token.found[token.token_id])
        return {**chosen, "top_logprobs": [self._entry(i, logprob) for i, logprob in best]}

    def _entry(self, token_id: int, logprob: Logprob) -> dict[str, Any]:
        return {
            "token": self._name(token_id),
            "logprob": _finite(logprob.logprob),
            "bytes": list(self._bytes(token_id)),
        }

    def _top_of(self, token: _Token) -> dict[str, float]:
        """The most likely tokens and, as OpenAI has it, the chosen one."""
        return {self._name(i): _finite(logprob.logprob) for i, logprob in token.found.items()}

    def _name(self, token_id: int) -> str:
        """A token as text; one that is a part of a character as "bytes:\\xe2\\x82", so that no two share a name."""
        data = self._bytes(token_id)
        try:
            return data.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)

    def _bytes(self, token_id: int, *, shown_only: bool = False) -> bytes:
        """b"" for rows that pad the embedding, and with `shown_only` for special tokens, which the text skips."""
        if token_id >= self.tokenizer.vocab_size or (shown_only and token_id in self.tokenizer.special_ids):
            return b""
        return self.tokenizer.token_bytes(token_id)


def _finite(logprob: float) -> float:
    """JSON has no infinity: OpenAI's number for "practically impossible"."""
    return max(logprob, -9999.0)
