"""What a request's body may hold: every refusal is one line that names the field, its value and what is allowed."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from glmx.serve import app, protocol
from glmx.serve.protocol import ApiError, ChatRequest, CompletionRequest

CHAT = {"model": "m", "messages": [{"role": "user", "content": "x"}]}
TEXT = {"model": "m", "prompt": "x"}


def chat(**changes):
    return protocol.parse(ChatRequest, json.dumps({**CHAT, **changes}).encode())


def text(**changes):
    return protocol.parse(CompletionRequest, json.dumps({**TEXT, **changes}).encode())


def refusal(call):
    with pytest.raises(ApiError) as error:
        call()
    assert error.value.status == 400 and error.value.error["type"] == "invalid_request_error"
    return error.value.error["message"], error.value.error["param"]


def test_fields_reach_the_sampling_params():
    body = {"temperature": 0.5, "top_p": 0.9, "top_k": 4, "seed": -3, "stop": "a", "stop_token_ids": [1], "logprobs": 2}
    params = text(**body, ignore_eos=True, include_stop_str_in_output=True).sampling_params(9)
    assert (params.temperature, params.top_p, params.top_k, params.seed, params.max_tokens) == (0.5, 0.9, 4, -3, 9)
    assert params.stop == ("a",) and list(params.stop_token_ids) == [1] and params.logprobs == 2
    assert params.ignore_eos and params.include_stop_str_in_output
    plain = chat().sampling_params(5)
    assert (plain.temperature, plain.top_p, plain.seed, plain.logprobs) == (1.0, 1.0, None, None)
    assert chat(logprobs=True).sampling_params(1).logprobs == 0
    assert chat(logprobs=True, top_logprobs=3).sampling_params(1).logprobs == 3


def test_rules_of_sampling_reach_the_engine():
    rules = {"presence_penalty": 0.5, "frequency_penalty": -2, "repetition_penalty": 1.2, "min_p": 0.05}
    for call in (chat, text):
        params = call(**rules, logit_bias={"7": 100, "0": -1.5}).sampling_params(1)
        assert {name: getattr(params, name) for name in rules} == rules and params.penalised
        assert params.logit_bias == {7: 100, 0: -1.5}
        assert not call(presence_penalty=0, logit_bias={}).sampling_params(1).penalised


def test_the_limit_of_a_chat_has_two_names():
    assert chat().token_limit is None and chat(max_tokens=3).token_limit == 3
    assert chat(max_completion_tokens=4, max_tokens=3).token_limit == 4


def test_what_asks_for_nothing_is_accepted():
    nothing = {"n": 1, "best_of": 1, "echo": False, "tools": []}
    nothing |= {"response_format": {"type": "text"}, "tool_choice": "auto", "suffix": None}
    nothing |= dict.fromkeys(protocol.IGNORED, "anything") | dict.fromkeys(protocol.UNSUPPORTED)
    assert chat(**nothing) == chat() and text(**nothing) == text()


@pytest.mark.parametrize(
    "changes, message, param",
    [
        ({"max_token": 5}, "unknown field 'max_token': did you mean 'max_tokens'?", "max_token"),
        ({"n": 2}, "n is 2: not supported", "n"),
        ({"n": True}, "n is true: not supported", "n"),
        ({"tools": [{"type": "function"}]}, 'tools is [{"type":"function"}]: not supported', "tools"),
        (
            {"response_format": {"type": "json_object"}},
            'response_format is {"type":"json_object"}: not supported',
            "response_format",
        ),
        ({"presence_penalty": 2.5}, "presence_penalty is 2.5, expected -2 to 2", "presence_penalty"),
        ({"frequency_penalty": -3}, "frequency_penalty is -3.0, expected -2 to 2", "frequency_penalty"),
        ({"repetition_penalty": 0}, "repetition_penalty is 0.0, expected 1e-30 to 1e30", "repetition_penalty"),
        ({"min_p": 1.5}, "min_p is 1.5, expected 0 <= min_p <= 1", "min_p"),
        ({"min_p": "low"}, 'min_p is "low", expected float', "min_p"),
        ({"logit_bias": {"5": 101}}, "logit_bias[5] is 101.0, expected -100 to 100", "logit_bias"),
        ({"logit_bias": {"x": 1}}, 'logit_bias names "x", expected token ids', "logit_bias"),
        ({"logit_bias": {"-1": 1}}, 'logit_bias names "-1", expected token ids', "logit_bias"),
        ({"logit_bias": [5]}, "logit_bias is [5], expected object", "logit_bias"),
        ({"model": None}, "model is required", "model"),
        ({"model": 3}, "model is 3, expected str", "model"),
        ({"max_tokens": 0}, "max_tokens is 0, expected int >= 1", "max_tokens"),
        ({"max_tokens": True}, "max_tokens is true, expected int", "max_tokens"),
        ({"temperature": "hot"}, 'temperature is "hot", expected float', "temperature"),
        ({"temperature": -1}, "temperature is -1.0, expected 0 (greedy) or 1e-30 to 1e30", "temperature"),
        ({"top_p": 0}, "top_p is 0.0, expected 0 < top_p <= 1", "top_p"),
        ({"seed": 2**63}, "seed is 9223372036854775808, expected int <= 9223372036854775807", "seed"),
        ({"stop": 5}, "stop is 5, expected str or list", "stop"),
        ({"stop": ["a", 5]}, "stop[1]: expected str, got int", "stop[1]"),
        ({"stop": ["a"] * 17}, "stop has 17 strings, expected at most 16", "stop"),
        ({"stop": ""}, "stop is '', expected strings that are not empty", "stop"),
        ({"stream_options": {"include_usage": True}}, "stream_options needs stream: true", "stream_options"),
        (
            {"stream": True, "stream_options": {"usage": True}},
            "unknown field 'stream_options.usage': did you mean 'include_usage'?",
            "stream_options.usage",
        ),
    ],
)
def test_refusals_of_both(changes, message, param):
    for call in (chat, text):
        assert refusal(lambda call=call: call(**changes).sampling_params(1)) == (message, param)


@pytest.mark.parametrize(
    "prompt, message",
    [
        ([], "prompt is an empty list"),
        ([[]], "prompt[0] is an empty list"),
        ([1, "a"], "prompt: expected a string, strings, token ids, or lists of token ids"),
        ([True], "prompt: expected a string, strings, token ids, or lists of token ids"),
        ([[1], [None]], "prompt: expected a string, strings, token ids, or lists of token ids"),
        ({}, "prompt is {}, expected str or list"),
        (None, "prompt is required"),
        (["a"] * 129, "prompt has 129 prompts, at most 128 in a request"),
    ],
)
def test_refusals_of_prompts(prompt, message):
    assert refusal(lambda: text(prompt=prompt).prompts()) == (message, "prompt")


def test_prompts():
    assert text(prompt="a").prompts() == ["a"] and text(prompt=["a", ""]).prompts() == ["a", ""]
    assert text(prompt=[1, 2]).prompts() == [[1, 2]] and text(prompt=[[1], [2, 3]]).prompts() == [[1], [2, 3]]
    assert text(prompt=[5] * 500).prompts() == [[5] * 500]


@pytest.mark.parametrize(
    "messages, message, param",
    [
        ([], "messages is empty", "messages"),
        (["x"], "messages[0]: expected object, got str", "messages[0]"),
        (
            [{"content": "x"}],
            "messages[0].role is null, expected one of system, developer, user, assistant",
            "messages[0].role",
        ),
        (
            [{"role": ["user"], "content": "x"}],
            'messages[0].role is ["user"], expected one of system, developer, user, assistant',
            "messages[0].role",
        ),
        (
            [{"role": "user"}],
            "messages[0].content: expected a string or a list of text parts, got null",
            "messages[0].content",
        ),
        (
            [{"role": "user", "content": [{"type": "image_url"}]}],
            'messages[0].content[0].type is "image_url": only text is supported',
            "messages[0].content[0].type",
        ),
        (
            [{"role": "user", "content": [{"type": "text"}]}],
            "messages[0].content[0].text: expected a string",
            "messages[0].content[0].text",
        ),
        (
            [{"role": "user", "content": "x", "contents": "y"}],
            "unknown field 'messages[0].contents': did you mean 'content'?",
            "messages[0].contents",
        ),
        (
            [{"role": "assistant", "tool_calls": [{}]}],
            "messages[0].tool_calls is [{}]: not supported",
            "messages[0].tool_calls",
        ),
        ([{"role": "user", "content": "x", "name": 5}], "messages[0].name: expected a string", "messages[0].name"),
    ],
)
def test_refusals_of_messages(messages, message, param):
    assert refusal(lambda: chat(messages=messages).template_messages()) == (message, param)


def test_messages_as_a_template_reads_them():
    answer = {"role": "assistant", "content": None, "refusal": None, "tool_calls": None, "annotations": []}
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    messages = [{"role": "developer", "content": "d"}, {"role": "user", "content": parts, "name": "Kim"}, answer]
    assert chat(messages=messages).template_messages() == [
        {"role": "system", "content": "d"},
        {"role": "user", "content": "ab", "name": "Kim"},
        {"role": "assistant", "content": ""},
    ]


def test_other_refusals_of_a_chat():
    assert refusal(lambda: chat(top_logprobs=2).sampling_params(1))[1] == "top_logprobs"
    assert refusal(lambda: chat(top_logprobs=21))[0] == "top_logprobs is 21, expected int <= 20"
    assert refusal(lambda: chat(logprobs=5))[0] == "logprobs is 5, expected bool"
    reserved = chat(chat_template_kwargs={"messages": []})
    assert refusal(reserved.template_variables)[0] == "chat_template_kwargs.messages is set by the server"


@pytest.mark.parametrize(
    "body, words",
    [
        (b"", "the body is empty, expected JSON"),
        (b"{", "the body is not JSON: "),
        (b'{"a": NaN}', "the body is not JSON: "),
        (b"\xff\xfe", "the body is not JSON: "),
        (b'{"model": "\xff"}', "the body is not JSON: "),
        (b"[" * 100_000, "the body is not JSON: "),
        (b"[]", "the body is a list, expected a JSON object"),
        (b"null", "the body is null, expected a JSON object"),
    ],
)
def test_bodies_that_are_no_object(body, words):
    message, param = refusal(lambda: protocol.parse(ChatRequest, body))
    assert message.startswith(words) and "\n" not in message and param is None


def test_deep_nesting_is_a_refusal():
    """Around the depth at which reading just succeeds, naming the value in the refusal must too."""
    for depth in (100, *range(850, 1010)):
        body = b'{"model": "m", "prompt": "x", "tools": ' + b"[" * depth + b"]" * depth + b"}"
        refusal(lambda body=body: protocol.parse(CompletionRequest, body))


def test_the_page_lists_every_field_and_code():
    page = (Path(__file__).resolve().parents[2] / "docs/serve.md").read_text()
    sources = [Path(module.__file__).read_text() for module in (protocol, app)]
    codes = {code for source in sources for code in re.findall(r'code="(\w+)"|, "(context_length_exceeded)"', source)}
    names = {*ChatRequest.__struct_fields__, *CompletionRequest.__struct_fields__, *protocol.ROLES}
    names |= {*protocol.IGNORED, *protocol.UNSUPPORTED, *(first or second for first, second in codes)}
    names |= {f"stream_options.{name}" for name in protocol.StreamOptions.__struct_fields__} - {"stream_options"}
    missing = sorted(name for name in names if f"`{name}`" not in page and name != "stream_options")
    assert not missing and "context_length_exceeded" in names and len(names) > 50


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)
FIELDS = sorted({*ChatRequest.__struct_fields__, *CompletionRequest.__struct_fields__, *protocol.UNSUPPORTED})
MESSAGE = st.dictionaries(st.sampled_from(["role", "content", "name", "tool_calls", "refusal", "x"]), JSON)


@settings(max_examples=80, deadline=None, derandomize=True)
@given(st.dictionaries(st.sampled_from(FIELDS), JSON), st.lists(MESSAGE, min_size=1, max_size=2))
def test_any_body_is_a_request_or_a_refusal(fields, messages):
    for call, base in ((chat, {"messages": messages}), (text, {})):
        try:
            asked = call(**{**base, **fields})
            asked.sampling_params(1)
            for part in ("prompts", "template_messages", "template_variables"):
                getattr(asked, part, lambda: None)()
        except ApiError as error:
            assert error.status == 400 and error.error["message"] and json.loads(error.body())["error"] == error.error
