"""A real `glmx serve` process, spoken to with OpenAI's own client."""

from __future__ import annotations

import json
import shlex
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import httpx
import openai
import pytest

import glmx
from serving import PYTHON, Server, tiny_checkpoint

pytestmark = pytest.mark.xdist_group("http")  # one worker, so one server
KEY = "sk-test"
CHAT = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Café?"}]


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return tiny_checkpoint(tmp_path_factory.mktemp("http"))


@pytest.fixture(scope="module")
def llm(directory):
    return glmx.LLM(directory)


@pytest.fixture(scope="module")
def server(directory, tmp_path_factory):
    key = tmp_path_factory.mktemp("key") / "key"
    key.write_text(KEY + "\n")
    limits = ["--max-num-seqs", "4", "--max-model-len", "16384"]
    running = Server(directory, "--api-key-file", str(key), *limits)
    yield running
    running.stop()


def connect(server, key=KEY):
    return openai.OpenAI(base_url=server.url + "/v1", api_key=key, max_retries=0, timeout=120)


@pytest.fixture(scope="module")
def client(server):
    with connect(server) as connected:
        yield connected


def params(**changes):
    return glmx.SamplingParams(**{"temperature": 1.0, "seed": 7, "max_tokens": 24, "ignore_eos": True, **changes})


ASK = {"model": "tiny", "seed": 7, "max_tokens": 24, "extra_body": {"ignore_eos": True}}


def health(server):
    return httpx.get(server.url + "/health").json()


def wait_for_health(server, **expected):
    deadline = time.monotonic() + 30
    while any(health(server)[key] != value for key, value in expected.items()):
        assert time.monotonic() < deadline, health(server)
        time.sleep(0.05)


# -- what the issue lists


def test_list_and_retrieve(client):
    (model,) = client.models.list().data
    assert (model.id, model.object, model.owned_by) == ("tiny", "model", "glmx")
    assert client.models.retrieve("tiny") == model and model.model_extra["max_model_len"] == 16384


def test_completion(client, llm):
    for prompt, given in (("def add(", "def add("), ([5, 6, 7], [5, 6, 7])):
        answer = client.completions.create(prompt=prompt, **ASK)
        (out,) = llm.generate([given], params())
        (choice,) = answer.choices
        assert choice.text == out.outputs[0].text and choice.finish_reason == "length" and choice.logprobs is None
        prompt_tokens = len(out.prompt_token_ids)
        assert answer.usage.to_dict() == {
            "prompt_tokens": prompt_tokens,
            "completion_tokens": 24,
            "total_tokens": prompt_tokens + 24,
        }
        assert answer.object == "text_completion" and answer.model == "tiny" and answer.id.startswith("cmpl-")


@pytest.mark.parametrize("prompts", [["def", "class Café"], [[5, 6], [7]]])
def test_completions_of_several_prompts(client, llm, prompts):
    expected = [out.outputs[0].text for out in llm.generate(prompts, params())]
    answer = client.completions.create(prompt=prompts, **ASK)
    assert [choice.index for choice in answer.choices] == [0, 1]
    assert [choice.text for choice in answer.choices] == expected
    assert answer.usage.completion_tokens == 48
    streamed = ["", ""]
    for chunk in client.completions.create(prompt=prompts, stream=True, **ASK):
        for choice in chunk.choices:
            streamed[choice.index] += choice.text
    assert streamed == expected


def test_chat(client, llm):
    answer = client.chat.completions.create(messages=CHAT, **ASK)
    (out,) = llm.chat(CHAT, params())
    (choice,) = answer.choices
    assert choice.message.content == out.outputs[0].text and choice.message.role == "assistant"
    assert choice.finish_reason == "length" and answer.object == "chat.completion"
    assert answer.usage.prompt_tokens == len(out.prompt_token_ids)
    assert answer.system_fingerprint.startswith("x86-") and answer.system_fingerprint.endswith("-fp32")


def test_chat_reads_text_parts_and_template_variables(client, llm):
    parts = [{"role": "developer", "content": [{"type": "text", "text": "Be "}, {"type": "text", "text": "brief."}]}]
    body = {"ignore_eos": True, "chat_template_kwargs": {"enable_thinking": False}}
    answer = client.chat.completions.create(messages=[*parts, CHAT[1]], **{**ASK, "extra_body": body})
    (out,) = llm.chat(CHAT, params(), chat_template_kwargs={"enable_thinking": False})
    assert answer.choices[0].message.content == out.outputs[0].text
    assert answer.usage.prompt_tokens == len(out.prompt_token_ids)


def test_chat_without_max_tokens_ends_at_the_end_of_the_turn(client, llm):
    """Greedily the model may never end, so a stop id that comes soon stands for the end of the turn."""
    ids = llm.chat(CHAT, params(temperature=0))[0].outputs[0].token_ids
    answer = client.chat.completions.create(
        model="tiny", messages=CHAT, temperature=0, extra_body={"stop_token_ids": [ids[9]]}
    )
    assert answer.choices[0].finish_reason == "stop" and answer.usage.completion_tokens == ids.index(ids[9]) + 1


def test_completion_streamed(client, llm):
    expected = llm.generate("class", params())[0]
    *chunks, last = client.completions.create(
        prompt="class", stream=True, stream_options={"include_usage": True}, **ASK
    )
    assert "".join(chunk.choices[0].text for chunk in chunks) == expected.outputs[0].text and len(chunks) > 5
    assert [chunk.choices[0].finish_reason for chunk in chunks] == [None] * (len(chunks) - 1) + ["length"]
    assert last.choices == [] and last.usage.completion_tokens == 24
    assert last.usage.prompt_tokens == len(expected.prompt_token_ids)
    assert len({chunk.id for chunk in [*chunks, last]}) == 1


def test_chat_streamed(client, llm):
    expected = llm.chat(CHAT, params())[0]
    first, *chunks, end, last = client.chat.completions.create(
        messages=CHAT, stream=True, stream_options={"include_usage": True}, **ASK
    )
    assert first.choices[0].delta.role == "assistant" and first.object == "chat.completion.chunk"
    assert "".join(chunk.choices[0].delta.content for chunk in chunks) == expected.outputs[0].text
    assert all(chunk.choices[0].finish_reason is None for chunk in [first, *chunks])
    assert end.choices[0].finish_reason == "length" and not end.choices[0].delta.content
    assert last.choices == [] and last.usage.total_tokens == len(expected.prompt_token_ids) + 24


def test_the_bytes_of_a_stream(server):
    """Without the client: events, blank lines, usage only when it is asked for, [DONE] last."""
    body = {"model": "tiny", "messages": CHAT, "max_tokens": 3, "stream": True}
    headers = {"Authorization": f"Bearer {KEY}"}
    answer = httpx.post(server.url + "/v1/chat/completions", json=body, headers=headers)
    assert answer.headers["content-type"].startswith("text/event-stream")
    *events, done, rest = answer.text.split("\n\n")
    assert done == "data: [DONE]" and rest == "" and "usage" not in answer.text
    assert all(json.loads(event.removeprefix("data: "))["id"].startswith("chatcmpl-") for event in events)


def test_stop_strings_do_not_leak_across_chunks(client, llm):
    text = llm.generate("import", params(max_tokens=60))[0].outputs[0].text
    for start, length in ((30, 9), (17, 5), (40, 3)):
        stop = text[start : start + length]
        shown = text[: text.index(stop)]
        ask = {**ASK, "prompt": "import", "max_tokens": 60, "stop": ["never in it", stop]}
        answer = client.completions.create(**ask)
        assert answer.choices[0].text == shown and answer.choices[0].finish_reason == "stop"
        assert answer.usage.completion_tokens < 60
        chunks = list(client.completions.create(stream=True, **ask))
        assert "".join(chunk.choices[0].text for chunk in chunks) == shown
        assert chunks[-1].choices[0].finish_reason == "stop"
    ask["extra_body"] = {"ignore_eos": True, "include_stop_str_in_output": True}
    assert client.completions.create(**ask).choices[0].text == shown + stop
    chat = llm.chat(CHAT, params())[0].outputs[0].text
    stopped = client.chat.completions.create(messages=CHAT, stop=chat[12:15], **ASK).choices[0]
    assert stopped.message.content == chat[: chat.index(chat[12:15])] and stopped.finish_reason == "stop"


def test_seed(client, llm):
    def text(**changes):
        return client.completions.create(prompt="x = ", **{**ASK, "top_p": 0.9, **changes}).choices[0].text

    assert text(seed=1) == text(seed=1) == llm.generate("x = ", params(seed=1, top_p=0.9))[0].outputs[0].text
    assert text(seed=1) != text(seed=2)
    assert text(temperature=0) == llm.generate("x = ", params(temperature=0))[0].outputs[0].text
    assert text(seed=None) != text(seed=None)


def test_logprobs_of_a_completion(client, llm):
    out = llm.generate("def", params(logprobs=2))[0].outputs[0]
    whole = client.completions.create(prompt="def", logprobs=2, **ASK).choices[0].logprobs
    assert whole.token_logprobs == pytest.approx(
        [found[i].logprob for found, i in zip(out.logprobs, out.token_ids, strict=True)]
    )
    assert len(whole.tokens) == 24 and all(2 <= len(top) <= 3 for top in whole.top_logprobs)
    for token, logprob, top in zip(whole.tokens, whole.token_logprobs, whole.top_logprobs, strict=True):
        assert top[token] == logprob
    special = {llm.tokenizer.decode([i]) for i in llm.tokenizer.special_ids}
    plain = [
        (token, at)
        for token, at in zip(whole.tokens, whole.text_offset, strict=True)
        if token not in special and not token.startswith("bytes:")
    ]
    # A character that was never completed shows as U+FFFD when the next token comes.
    assert plain and all(out.text[at:].lstrip("\ufffd").startswith(token) for token, at in plain)
    chunks = [c.choices[0] for c in client.completions.create(prompt="def", logprobs=2, stream=True, **ASK)]
    assert [t for c in chunks if c.logprobs for t in c.logprobs.tokens] == whole.tokens
    assert [t for c in chunks if c.logprobs for t in c.logprobs.text_offset] == whole.text_offset


def test_logprobs_of_a_chat(client, llm):
    out = llm.chat(CHAT, params(logprobs=3))[0].outputs[0]
    whole = client.chat.completions.create(messages=CHAT, logprobs=True, top_logprobs=3, **ASK).choices[0]
    entries = whole.logprobs.content
    assert [e.logprob for e in entries] == pytest.approx(
        [found[i].logprob for found, i in zip(out.logprobs, out.token_ids, strict=True)]
    )
    assert all(len(e.top_logprobs) == 3 for e in entries)
    assert all(e.top_logprobs[0].logprob >= e.top_logprobs[1].logprob >= e.top_logprobs[2].logprob for e in entries)
    special = {llm.tokenizer.decode([i]) for i in llm.tokenizer.special_ids}
    shown = b"".join(bytes(e.bytes) for e in entries if e.token not in special)
    assert shown.decode("utf-8", "replace") == out.text == whole.message.content
    none = client.chat.completions.create(messages=CHAT, logprobs=True, **ASK).choices[0].logprobs.content
    assert [e.logprob for e in none] == [e.logprob for e in entries] and all(e.top_logprobs == [] for e in none)
    chunks = client.chat.completions.create(messages=CHAT, logprobs=True, top_logprobs=3, stream=True, **ASK)
    streamed = [e for c in chunks if c.choices[0].logprobs for e in c.choices[0].logprobs.content]
    assert streamed == entries


def test_logprobs_are_those_of_the_text_that_is_shown(client, llm):
    text = llm.generate("def", params(max_tokens=40))[0].outputs[0].text
    stop = text[20:24]
    ask = {**ASK, "prompt": "def", "max_tokens": 40, "stop": stop, "logprobs": 0}
    choice = client.completions.create(**ask).choices[0]
    assert choice.text == text[: text.index(stop)]
    assert all(at < len(choice.text) for at in choice.logprobs.text_offset) and choice.logprobs.top_logprobs is None
    chunks = [c.choices[0] for c in client.completions.create(stream=True, **ask)]
    assert [t for c in chunks if c.logprobs for t in c.logprobs.tokens] == choice.logprobs.tokens


# -- errors


def refused(error):
    body = error.value.response.json()["error"]
    assert set(body) == {"message", "type", "param", "code"} and "\n" not in body["message"]
    return error.value.status_code, body


def test_bad_json_is_400(client):
    with pytest.raises(openai.BadRequestError) as error:
        client.post("/chat/completions", content=b'{"model": "tiny", ', cast_to=object)
    status, body = refused(error)
    assert status == 400 and body["message"].startswith("the body is not JSON: ")


def test_wrong_type_is_400(client):
    with pytest.raises(openai.BadRequestError) as error:
        client.completions.create(model="tiny", prompt="x", max_tokens="many")
    assert refused(error)[1]["message"] == 'max_tokens is "many", expected int' and error.value.param == "max_tokens"


@pytest.mark.parametrize("max_tokens", [None, 16380])
def test_too_long_is_400_context_length_exceeded(client, max_tokens):
    prompt = [5] * (20000 if max_tokens is None else 5)
    with pytest.raises(openai.BadRequestError) as error:
        client.completions.create(model="tiny", prompt=prompt, max_tokens=max_tokens)
    status, body = refused(error)
    assert error.value.code == "context_length_exceeded" and body["param"] == "prompt"
    assert str(len(prompt)) in body["message"] and "16384" in body["message"]
    with pytest.raises(openai.BadRequestError) as error:
        client.chat.completions.create(model="tiny", messages=[{"role": "user", "content": "ab " * 20000}])
    assert error.value.code == "context_length_exceeded" and error.value.param == "messages"


@pytest.mark.parametrize("key", ["sk-wrong", "sk-tes", "sk-test2"])
def test_wrong_key_is_401(server, key):
    with connect(server, key) as other, pytest.raises(openai.AuthenticationError) as error:
        other.models.list()
    assert refused(error)[1]["code"] == "invalid_api_key" and KEY not in refused(error)[1]["message"].split()
    answer = httpx.post(server.url + "/v1/completions", content=b"{")
    assert answer.status_code == 401 and "Authorization: Bearer" in answer.json()["error"]["message"]
    assert answer.headers["www-authenticate"] == "Bearer"


def test_unknown_model_is_404(client):
    for call in (
        lambda: client.models.retrieve("org/other"),
        lambda: client.chat.completions.create(model="org/other", messages=CHAT),
        lambda: client.completions.create(model="org/other", prompt="x"),
    ):
        with pytest.raises(openai.NotFoundError) as error:
            call()
        assert error.value.code == "model_not_found" and "'org/other'" in refused(error)[1]["message"]


def test_unknown_route_is_404(client):
    with pytest.raises(openai.NotFoundError) as error:
        client.embeddings.create(model="tiny", input="x")
    assert refused(error)[1]["code"] == "unknown_route" and "/v1/embeddings" in refused(error)[1]["message"]
    with pytest.raises(openai.NotFoundError, match="did you mean /v1/completions") as error:
        client.post("/completions/", body={}, cast_to=object)


def test_wrong_method_is_405(client):
    with pytest.raises(openai.APIStatusError) as error:
        client.get("/chat/completions", cast_to=object)
    status, body = refused(error)
    assert status == 405 and body["message"] == "/v1/chat/completions does not take GET, only POST"
    assert error.value.response.headers["allow"] == "POST"


def test_too_large_is_413(client):
    """Said once, by its length or while it comes; the connection can be used again."""
    for _ in range(2):
        with pytest.raises(openai.APIStatusError) as error:
            client.completions.create(model="tiny", prompt="x" * (16 * 2**20 + 1))
        status, body = refused(error)
        assert status == 413 and body["code"] == "request_too_large" and "16777216" in body["message"]
    chunks = (b" " * 2**20 for _ in range(17))
    with pytest.raises(openai.APIStatusError) as error:
        client.post("/completions", content=chunks, cast_to=object)
    assert refused(error)[0] == 413
    assert client.models.list().data[0].id == "tiny"


# -- many clients, and clients that go away


def test_sixteen_clients_at_once_get_sixteen_right_answers(server, llm):
    prompts = [f"def f{i}(x):" + " " * i for i in range(16)]
    each = [params(seed=i, max_tokens=12 + i) for i in range(16)]
    expected = [out.outputs[0].text for out in llm.generate(prompts, each)]

    def ask(i):
        with connect(server) as own:
            asked = {**ASK, "prompt": prompts[i], "seed": i, "max_tokens": 12 + i}
            if i % 2:
                return own.completions.create(**asked).choices[0].text
            return "".join(chunk.choices[0].text for chunk in own.completions.create(stream=True, **asked))

    with ThreadPoolExecutor(16) as pool:
        assert list(pool.map(ask, range(16))) == expected
    wait_for_health(server, running=0, waiting=0)


@pytest.mark.parametrize("streaming", [True, False])
def test_a_client_that_hangs_up_frees_the_worker(server, streaming):
    """Seven requests that would take minutes fill four places and the queue; all of them are given up."""
    long = {**ASK, "prompt": "x", "max_tokens": 16000, "stream": streaming}
    clients = [connect(server) for _ in range(7)]

    def ask(own):
        try:
            return own.completions.create(timeout=1, **long)
        except openai.APITimeoutError:
            return None

    with ThreadPoolExecutor(7) as pool:
        streams = list(pool.map(ask, clients))
    if streaming:
        wait_for_health(server, running=4, waiting=3)
        for stream in streams:
            stream.close()
    wait_for_health(server, running=0, waiting=0)
    with connect(server) as own:
        assert own.completions.create(prompt="x", **ASK).usage.completion_tokens == 24


# -- start-up and shut-down


def test_the_start_up_print(server, directory):
    text = "".join(server.lines)
    for words in (
        "tiny (glm4_moe, 3 layers",
        "weights  0.00 GiB, mapped\n",
        "dtype    fp32, numerics x86-",
        "grouped_gemm",
        "API key  required",
    ):
        assert words in text
    assert str(directory) in text and KEY not in text
    command = shlex.split(server.lines[-1].replace("YOUR_KEY", KEY))
    headers = dict(word.split(": ", 1) for word in command[3:-1:2])
    assert command[0] == "curl" and set(headers) == {"Content-Type", "Authorization"}
    answer = httpx.post(command[1], content=command[-1], headers=headers, timeout=60)
    assert answer.status_code == 200 and answer.json()["choices"][0]["message"]["role"] == "assistant"


def test_a_second_server_on_the_port_is_one_line_at_once(server, tmp_path):
    port = server.url.rsplit(":", 1)[1]
    command = [sys.executable, "-m", "glmx", "serve", str(tmp_path / "nowhere"), "--port", port]
    done = subprocess.run(command, capture_output=True, text=True, env={"PYTHONPATH": str(PYTHON)})
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr == (
        f"glmx serve: port {port} of 127.0.0.1 is in use: choose another with --port, or stop the program that has it\n"
    )


def test_sigterm_finishes_what_runs_and_refuses_the_rest(directory, llm):
    running = Server(directory, "--max-num-seqs", "1", "--max-model-len", "2048")
    try:
        with connect(running) as own, connect(running) as other, httpx.Client(base_url=running.url) as plain:
            assert plain.get("/health").json() == {"status": "ok", "running": 0, "waiting": 0}
            ask = {**ASK, "prompt": "x", "max_tokens": 2000}
            stream = iter(own.completions.create(stream=True, **ask))
            text = next(stream).choices[0].text
            running.process.send_signal(signal.SIGTERM)
            while plain.get("/health").status_code == 200:
                time.sleep(0.01)
            with pytest.raises(openai.InternalServerError) as error:
                other.completions.create(prompt="y", **ASK)
            status, body = refused(error)
            assert status == 503 and body["code"] == "shutting_down"
            text += "".join(chunk.choices[0].text for chunk in stream)
        assert text == llm.generate("x", params(max_tokens=2000))[0].outputs[0].text
        assert running.process.wait(60) == 0
        assert "SIGTERM: finishing 1 request" in running.output()
    finally:
        running.stop()


@pytest.mark.parametrize(
    "signals, code, words",
    [((signal.SIGINT,), 1, "cut off after 0.5 s"), ((signal.SIGTERM, signal.SIGINT), 130, "SIGINT: stopping at once")],
)
def test_a_server_that_cannot_finish_stops_all_the_same(directory, signals, code, words):
    running = Server(directory, "--drain-timeout", "0.5" if len(signals) == 1 else "600", "--max-model-len", "16384")
    try:
        with connect(running) as own:
            stream = iter(own.completions.create(prompt="x", stream=True, **{**ASK, "max_tokens": 16000}))
            next(stream)
            for sent in signals:
                running.process.send_signal(sent)
                time.sleep(0.2)
            with pytest.raises((openai.APIError, httpx.RemoteProtocolError)) as error:
                list(stream)
        if len(signals) == 1:
            assert "shut down" in str(error.value)
        assert running.process.wait(60) == code
        assert words in running.output()
    finally:
        running.stop()
