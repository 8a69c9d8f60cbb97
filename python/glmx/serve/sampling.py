"""SamplingParams and the results of a generation, with vLLM's field names."""

from __future__ import annotations

from dataclasses import dataclass, field

# Each stop string costs a comparison per character on the engine's thread; OpenAI allows 4, vLLM any number.
MAX_STOP = 16


@dataclass(frozen=True)
class SamplingParams:
    """How to choose each next token of one request.

    max_tokens   tokens to generate at most (>= 1)
    temperature  0 is greedy; otherwise logits are divided by it, in fp32 (so 1e-30 to 1e30)
    top_p        keep the most likely tokens up to this probability mass (0 < top_p <= 1)
    top_k        keep the k most likely tokens; 0 or -1 keeps all
    min_p        keep tokens at least this likely in relation to the most likely one (0 <= min_p <= 1)
    repetition_penalty  logits of tokens seen in prompt or answer, if positive, are divided by it, else multiplied
                 (1 changes nothing)
    presence_penalty    taken from the logits of tokens that the answer has (-2 to 2)
    frequency_penalty   the same, for each time that it has them (-2 to 2)
    logit_bias   {token id: what is added to its logit, -100 to 100}, before everything else
    seed         the token at a position is a function of its logits, the seed and the position, not of the
                 batch; None: the LLM gives every request a seed of its own
    logprobs     None, or the number of most likely tokens to report beside each generated one
    stop         strings that end the generation, at most 16, none empty; one may be given by itself
    stop_token_ids  ids that end the generation, beside the checkpoint's own
    ignore_eos   do not stop at the checkpoint's end-of-sequence ids
    include_stop_str_in_output  keep the stop string at the end of the text, which otherwise ends before it

    Raises ValueError naming the field, its value and what is allowed, TypeError for a `stop` that is not text.
    """

    max_tokens: int = 16
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: dict[int, float] | None = None
    seed: int | None = None
    logprobs: int | None = None
    stop: tuple[str, ...] | list[str] | str = ()
    stop_token_ids: tuple[int, ...] | list[int] = ()
    ignore_eos: bool = False
    include_stop_str_in_output: bool = False

    def __post_init__(self) -> None:
        if self.max_tokens < 1:
            raise ValueError(f"max_tokens is {self.max_tokens}, expected at least 1")
        # What fp32 cannot hold would divide by zero or by infinity.
        if not (self.temperature == 0 or 1e-30 <= self.temperature <= 1e30):
            raise ValueError(f"temperature is {self.temperature}, expected 0 (greedy) or 1e-30 to 1e30")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p is {self.top_p}, expected 0 < top_p <= 1")
        if self.top_k < -1:
            raise ValueError(f"top_k is {self.top_k}, expected 0 or -1 (all) or at least 1")
        if not 0 <= self.min_p <= 1:
            raise ValueError(f"min_p is {self.min_p}, expected 0 <= min_p <= 1")
        if not 1e-30 <= self.repetition_penalty <= 1e30:
            raise ValueError(f"repetition_penalty is {self.repetition_penalty}, expected 1e-30 to 1e30")
        for name in ("presence_penalty", "frequency_penalty"):
            if not -2 <= getattr(self, name) <= 2:
                raise ValueError(f"{name} is {getattr(self, name)}, expected -2 to 2")
        for token, bias in (self.logit_bias or {}).items():
            if type(token) is not int or token < 0:
                raise ValueError(f"logit_bias names {token!r}, expected token ids, at least 0")
            if not -100 <= bias <= 100:
                raise ValueError(f"logit_bias[{token}] is {bias}, expected -100 to 100")
        if self.logprobs is not None and self.logprobs < 0:
            raise ValueError(f"logprobs is {self.logprobs}, expected None or at least 0")
        stop = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)
        if not all(isinstance(text, str) for text in stop):
            raise TypeError(f"stop is {self.stop!r}, expected a string or a list of strings")
        if len(stop) > MAX_STOP:
            raise ValueError(f"stop has {len(stop)} strings, expected at most {MAX_STOP}")
        if "" in stop:
            raise ValueError(f"stop is {self.stop!r}, expected strings that are not empty")
        object.__setattr__(self, "stop", stop)

    @property
    def penalised(self) -> bool:
        """Whether earlier tokens change the logits."""
        return self.repetition_penalty != 1 or self.presence_penalty != 0 or self.frequency_penalty != 0


@dataclass
class Logprob:
    """A token's natural log-probability at temperature 1 and its rank (1 is the most likely).

    decoded_token  the token by itself: special tokens by name, U+FFFD for a part of a character; None without
                   a tokenizer
    """

    logprob: float
    rank: int
    decoded_token: str | None = None


@dataclass
class CompletionOutput:
    """One generated text.

    token_ids include those that ended the generation, by id or by a stop string; text does not. logprobs
    hold one dict per token, by token id: the generated token and the most likely ones. finish_reason is
    "stop", "length" or, while the generation is running, None; stop_reason is the id or the stop string that
    ended it.
    """

    index: int = 0
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    cumulative_logprob: float | None = None
    logprobs: list[dict[int, Logprob]] | None = None
    finish_reason: str | None = None
    stop_reason: int | str | None = None


@dataclass
class RequestOutput:
    """A prompt and what was generated for it."""

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    finished: bool = True
