"""OpenAI's requests and errors: what a body may hold, and the one error body that everything answers with.

A field that OpenAI's API does not know is refused with the nearest name, one that it knows and this server does
not support is refused unless its value changes nothing, one that changes no text is ignored. `null` is "not given".
"""

from __future__ import annotations

import difflib
import re
from typing import Annotated, Any, TypeVar

import msgspec
from msgspec import Meta, Struct

from glmx.serve.sampling import SamplingParams

MAX_TOP_LOGPROBS = 20
MAX_PROMPTS = 128
_Int64 = Annotated[int, Meta(ge=-(2**63), le=2**63 - 1)]
_Count = Annotated[int, Meta(ge=1)]
_Top = Annotated[int, Meta(ge=0, le=MAX_TOP_LOGPROBS)]

# Accepted and without effect: they do not reach the text.
IGNORED = ("user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key", "parallel_tool_calls")
# Known fields that are not supported, each with the values that ask for nothing.
UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    "n": (1,),
    "best_of": (1,),
    "echo": (False,),
    "suffix": ("",),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
    "audio": (),
    "prediction": (),
    "reasoning_effort": (),
    "verbosity": (),
    "web_search_options": (),
}
# In a message: what a client sends back from an earlier answer, empty.
_MESSAGE_UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    "tool_calls": ([],),
    "function_call": (),
    "tool_call_id": (),
    "audio": (),
}
_MESSAGE_IGNORED = ("refusal", "annotations")
ROLES = ("system", "developer", "user", "assistant")
_TEMPLATE_OWN = ("messages", "tools", "add_generation_prompt", "eos_token", "pad_token", "self")


class ApiError(Exception):
    """An error as OpenAI's API reports it: an HTTP status and `{"error": {message, type, param, code}}`."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        type: str = "invalid_request_error",
        param: str | None = None,
        code: str | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.error = {"message": message, "type": type, "param": param, "code": code}
        self.headers = headers or {}

    def body(self) -> bytes:
        return msgspec.json.encode({"error": self.error})


class StreamOptions(Struct):
    include_usage: bool = False
    include_obfuscation: bool = False


class Request(Struct, kw_only=True):
    """The fields that completions and chat share; the last six are vLLM's."""

    model: str
    max_tokens: _Count | None = None
    temperature: float | None = None
    top_p: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    logit_bias: dict[str, float] | None = None
    seed: _Int64 | None = None
    stop: str | list[str] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    top_k: _Int64 | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    ignore_eos: bool | None = None
    stop_token_ids: list[_Int64] | None = None
    include_stop_str_in_output: bool | None = None

    @property
    def token_limit(self) -> int | None:
        return self.max_tokens

    @property
    def top_logprobs_wanted(self) -> int | None:
        raise NotImplementedError

    @property
    def include_usage(self) -> bool:
        return self.stream_options is not None and self.stream_options.include_usage

    def biases(self) -> dict[int, float] | None:
        """logit_bias by token id: JSON's keys are texts."""
        if self.logit_bias is None:
            return None
        for key in self.logit_bias:
            if not re.fullmatch(r"[0-9]{1,9}", key):
                raise bad_request(f"logit_bias names {_shown(key)}, expected token ids", "logit_bias")
        return {int(key): value for key, value in self.logit_bias.items()}

    def sampling_params(self, max_tokens: int) -> SamplingParams:
        """Raises ApiError naming the field whose value is not allowed."""
        given: dict[str, Any] = {
            "temperature": self.temperature,
            "top_p": self.top_p,
            "top_k": self.top_k,
            "min_p": self.min_p,
            "repetition_penalty": self.repetition_penalty,
            "presence_penalty": self.presence_penalty,
            "frequency_penalty": self.frequency_penalty,
            "logit_bias": self.biases(),
            "seed": self.seed,
            "stop": self.stop,
            "stop_token_ids": self.stop_token_ids,
            "ignore_eos": self.ignore_eos,
            "include_stop_str_in_output": self.include_stop_str_in_output,
            "logprobs": self.top_logprobs_wanted,
        }
        try:
            return SamplingParams(max_tokens=max_tokens, **{k: v for k, v in given.items() if v is not None})
        except ValueError as error:
            raise bad_request(str(error), _first_word(str(error), given)) from None


class CompletionRequest(Request, kw_only=True):
    prompt: str | list[Any]
    logprobs: _Top | None = None

    @property
    def top_logprobs_wanted(self) -> int | None:
        return self.logprobs

    def prompts(self) -> list[str] | list[list[int]]:
        """str, [str], [int] and [[int]] as a list of texts or a list of token ids."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        if not self.prompt:
            raise bad_request("prompt is an empty list", "prompt")
        if all(type(item) is int for item in self.prompt):
            return [self.prompt]
        if len(self.prompt) > MAX_PROMPTS:
            raise bad_request(f"prompt has {len(self.prompt)} prompts, at most {MAX_PROMPTS} in a request", "prompt")
        texts = all(type(item) is str for item in self.prompt)
        ids = all(type(item) is list and all(type(i) is int for i in item) for item in self.prompt)
        if not texts and not ids:
            raise bad_request("prompt: expected a string, strings, token ids, or lists of token ids", "prompt")
        if [] in self.prompt:
            raise bad_request(f"prompt[{self.prompt.index([])}] is an empty list", "prompt")
        return self.prompt


class ChatRequest(Request, kw_only=True):
    messages: list[dict[str, Any]]
    max_completion_tokens: _Count | None = None
    logprobs: bool | None = None
    top_logprobs: _Top | None = None
    chat_template_kwargs: dict[str, Any] | None = None

    @property
    def token_limit(self) -> int | None:
        return self.max_completion_tokens if self.max_completion_tokens is not None else self.max_tokens

    @property
    def top_logprobs_wanted(self) -> int | None:
        if self.top_logprobs and not self.logprobs:
            raise bad_request("top_logprobs needs logprobs: true", "top_logprobs")
        return (self.top_logprobs or 0) if self.logprobs else None

    def template_variables(self) -> dict[str, Any]:
        variables = self.chat_template_kwargs or {}
        for name in _TEMPLATE_OWN:
            if name in variables:
                raise bad_request(f"chat_template_kwargs.{name} is set by the server", "chat_template_kwargs")
        return variables

    def template_messages(self) -> list[dict[str, Any]]:
        """The messages as a chat template reads them: a role, and a content that is one string."""
        if not self.messages:
            raise bad_request("messages is empty", "messages")
        return [_message(message, f"messages[{i}]") for i, message in enumerate(self.messages)]


def _message(message: dict[str, Any], where: str) -> dict[str, Any]:
    known = ("role", "content", "name", "reasoning_content")
    message = _known_only(message, known, _MESSAGE_IGNORED, _MESSAGE_UNSUPPORTED, f"{where}.")
    role = message.get("role")
    if role not in ROLES:
        raise bad_request(f"{where}.role is {_shown(role)}, expected one of {', '.join(ROLES)}", f"{where}.role")
    for name in ("name", "reasoning_content"):
        if not isinstance(message.get(name, ""), str):
            raise bad_request(f"{where}.{name}: expected a string", f"{where}.{name}")
    content = message.get("content")
    if content is None and role == "assistant":
        content = ""
    # "developer" is the newer name of "system", which the templates know.
    return {**message, "role": "system" if role == "developer" else role, "content": _text(content, f"{where}.content")}


def _text(content: Any, where: str) -> str:
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise bad_request(f"{where}: expected a string or a list of text parts, got {_type(content)}", where)
    texts = []
    for i, part in enumerate(content):
        kind = part.get("type") if isinstance(part, dict) else None
        if kind != "text":
            raise bad_request(f"{where}[{i}].type is {_shown(kind)}: only text is supported", f"{where}[{i}].type")
        if not isinstance(part.get("text"), str):
            raise bad_request(f"{where}[{i}].text: expected a string", f"{where}[{i}].text")
        texts.append(part["text"])
    return "".join(texts)


R = TypeVar("R", bound=Request)


def parse(kind: type[R], body: bytes) -> R:
    """Reads a request's body. Raises ApiError (400) naming the field, its value and what is allowed."""
    try:
        raw = msgspec.json.decode(body)
    except (ValueError, RecursionError) as error:  # msgspec.DecodeError, UnicodeDecodeError
        why = str(error).split(" - at ")[0]
        raise bad_request(f"the body is not JSON: {why}" if body else "the body is empty, expected JSON") from None
    if not isinstance(raw, dict):
        raise bad_request(f"the body is {_type(raw)}, expected a JSON object")
    fields = [info.name for info in msgspec.structs.fields(kind)]
    raw = _known_only(raw, fields, IGNORED, UNSUPPORTED)
    options = raw.get("stream_options")
    if isinstance(options, dict):
        raw["stream_options"] = _known_only(options, StreamOptions.__struct_fields__, (), {}, "stream_options.")
        if not raw.get("stream"):
            raise bad_request("stream_options needs stream: true", "stream_options")
    try:
        return msgspec.convert(raw, kind)
    except msgspec.ValidationError as error:
        raise _explain(str(error), raw) from None


def _known_only(
    given: dict[str, Any],
    known: tuple[str, ...] | list[str],
    ignored: tuple[str, ...],
    unsupported: dict[str, tuple[Any, ...]],
    where: str = "",
) -> dict[str, Any]:
    """`given` without nulls and without the fields that mean nothing here."""
    kept = {}
    for name, value in given.items():
        if value is None or name in ignored:
            continue
        if name in known:
            kept[name] = value
        elif name not in unsupported:
            near = difflib.get_close_matches(name[:64], [*known, *ignored, *unsupported], n=1, cutoff=0.0)
            shown = where + name[:64]
            raise bad_request(f"unknown field '{shown}': did you mean '{near[0]}'?", shown)
        elif not any(value == neutral and type(value) is not bool or value is neutral for neutral in unsupported[name]):
            raise bad_request(f"{where}{name} is {_shown(value)}: not supported", where + name)
    return kept


def _explain(text: str, raw: dict[str, Any]) -> ApiError:
    """msgspec's "Expected `int | null`, got `str` - at `$.seed`" as "seed is "x", expected int"."""
    what, _, path = text.partition(" - at `$")
    path = path.rstrip("`").lstrip(".")
    missing = re.fullmatch(r"Object missing required field `(\w+)`", what)
    if missing:
        return bad_request(f"{missing[1]} is required", missing[1])
    what = what.replace("`", "").replace(" | null", "").replace("str | array", "str or list")
    if path in raw:  # not for what lies deeper: msgspec writes all keys of a mapping as [...]
        return bad_request(f"{path} is {_shown(raw[path])}, e{what.split(', got')[0][1:]}", path)
    return bad_request(f"{path}: e{what[1:]}", path)


def bad_request(message: str, param: str | None = None, code: str | None = None) -> ApiError:
    return ApiError(400, message, param=param, code=code)


def _first_word(message: str, names: dict[str, Any]) -> str | None:
    word = re.match(r"\w+", message)
    return word[0] if word and word[0] in (*names, "max_tokens") else None


def _shown(value: Any) -> str:
    text = msgspec.json.encode(value).decode()
    return text if len(text) <= 64 else f"{text[:60]} ..."


def _type(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "a string", bool: "a boolean", int: "a number", float: "a number"}
    return names.get(type(value), "null")
