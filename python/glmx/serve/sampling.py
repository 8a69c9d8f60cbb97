"""SamplingParams and the results of a generation, with vLLM's field names."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class SamplingParams:
    """How to choose each next token of one request.

    max_tokens   tokens to generate at most (>= 1)
    temperature  0 is greedy; otherwise logits are divided by it
    top_p        keep the most likely tokens up to this probability mass (0 < top_p <= 1)
    top_k        keep the k most likely tokens; 0 or -1 keeps all
    seed         the token at a position is a function of its logits, the seed and the position, not of the
                 batch; None: the LLM gives every request a seed of its own
    logprobs     None, or the number of most likely tokens to report beside each generated one
    stop_token_ids  ids that end the generation, beside the checkpoint's own
    ignore_eos   do not stop at the checkpoint's end-of-sequence ids

    Raises ValueError naming the field, its value and what is allowed.
    """

    max_tokens: int = 16
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int | None = None
    logprobs: int | None = None
    stop_token_ids: tuple[int, ...] | list[int] = ()
    ignore_eos: bool = False

    def __post_init__(self) -> None:
        if self.max_tokens < 1:
            raise ValueError(f"max_tokens is {self.max_tokens}, expected at least 1")
        if not 0 <= self.temperature < float("inf"):
            raise ValueError(f"temperature is {self.temperature}, expected 0 (greedy) or more")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p is {self.top_p}, expected 0 < top_p <= 1")
        if self.top_k < -1:
            raise ValueError(f"top_k is {self.top_k}, expected 0 or -1 (all) or at least 1")
        if self.logprobs is not None and self.logprobs < 0:
            raise ValueError(f"logprobs is {self.logprobs}, expected None or at least 0")


@dataclass
class Logprob:
    """A token's natural log-probability at temperature 1 and its rank (1 is the most likely)."""

    logprob: float
    rank: int
    decoded_token: str | None = None


@dataclass
class CompletionOutput:
    """One generated text.

    token_ids include the token that ended the generation; text does not. logprobs hold one dict per token,
    by token id: the generated token and the most likely ones. finish_reason is "stop", "length" or, while
    the generation is running, None; stop_reason is the id that ended it.
    """

    index: int = 0
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    cumulative_logprob: float | None = None
    logprobs: list[dict[int, Logprob]] | None = None
    finish_reason: str | None = None
    stop_reason: int | None = None


@dataclass
class RequestOutput:
    """A prompt and what was generated for it."""

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    finished: bool = True
