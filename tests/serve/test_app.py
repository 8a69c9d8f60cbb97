"""The application over a scripted worker: what a real one does too rarely to wait for."""

from __future__ import annotations

import asyncio
import json
import threading

import httpx
import openai
import pytest

import glmx
from glmx.serve.app import Api
from glmx.serve.responses import Answer
from glmx.serve.sampling import Logprob
from glmx.serve.worker import Delta, QueueFullError, ShuttingDownError
from serving import tiny_checkpoint

CHAT = {"model": "tiny", "messages": [{"role": "user", "content": "x"}]}
TEXT = {"model": "tiny", "prompt": "x"}


@pytest.fixture(scope="module")
def llm(tmp_path_factory):
    return glmx.LLM(tiny_checkpoint(tmp_path_factory.mktemp("app"), max_position_embeddings=64))


class Script:
    """A worker that answers every job with the same deltas, on a thread of its own as the real one does."""

    alive, running, waiting = True, 0, 0

    def __init__(self, *deltas, refuse=None, after=10**9, at_once=False):
        self.deltas, self.refuse, self.after, self.at_once = deltas, refuse, after, at_once
        self.submitted, self.cancelled = [], []

    def submit(self, prompt_token_ids, params, on_delta):
        if self.refuse is not None and len(self.submitted) >= self.after:
            raise self.refuse
        self.submitted.append((list(prompt_token_ids), params))
        thread = threading.Thread(target=lambda: [on_delta(delta) for delta in self.deltas])
        thread.start()
        if self.at_once:  # all deltas are there before the first is looked at
            thread.join()
        return len(self.submitted)

    def cancel(self, job):
        self.cancelled.append(job)


def call(llm, worker, send, key=None):
    """Runs `send(client)` with OpenAI's asynchronous client on an application over `worker`."""
    api = Api(llm, worker, model="tiny", fingerprint="x86-test", api_key=key)

    async def run():
        transport = httpx.ASGITransport(api.app, raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport) as http:
            options = {"base_url": "http://127.0.0.1/v1", "api_key": "k", "max_retries": 0, "http_client": http}
            return await send(openai.AsyncOpenAI(**options), api)

    return asyncio.run(run())


def refusal(llm, worker, send):
    with pytest.raises(openai.APIStatusError) as error:
        call(llm, worker, send)
    body = error.value.response.json()["error"]
    assert set(body) == {"message", "type", "param", "code"}
    return error.value.status_code, body["code"], error.value.response.headers


def complete(client, api):
    return client.completions.create(**TEXT)


def test_a_full_queue_is_429_with_retry_after(llm):
    worker = Script(refuse=QueueFullError("256 requests wait already"), after=0)
    status, code, headers = refusal(llm, worker, complete)
    assert (status, code, headers["retry-after"]) == (429, "queue_full", "1")


def test_what_was_submitted_before_the_queue_was_full_is_taken_back(llm):
    worker = Script(refuse=QueueFullError("full"), after=2)
    status, _, _ = refusal(llm, worker, lambda client, api: client.completions.create(model="tiny", prompt=["a"] * 3))
    assert status == 429 and worker.cancelled == [1, 2]


def test_a_worker_that_shuts_down_is_503(llm):
    assert refusal(llm, Script(refuse=ShuttingDownError("no"), after=0), complete)[:2] == (503, "shutting_down")


def test_a_draining_server_is_503_and_still_names_its_model(llm):
    worker = Script()

    async def drained(client, api):
        api.draining = True
        assert (await client.models.list()).data[0].id == "tiny"
        health = await client._client.get("http://127.0.0.1/health")
        assert health.status_code == 503 and health.json()["error"]["code"] == "shutting_down"
        await complete(client, api)

    assert refusal(llm, worker, drained)[:2] == (503, "shutting_down") and not worker.submitted


def test_a_dead_engine_is_503(llm):
    worker = Script()
    worker.alive = False
    assert refusal(llm, worker, complete)[:2] == (503, "engine_stopped")
    assert refusal(llm, worker, lambda client, api: client.get("/../health", cast_to=object))[0] == 503


def test_a_failed_job_is_500_and_the_others_are_taken_back(llm):
    worker = Script(Delta("a", [1]), Delta(error="the engine failed: RuntimeError: no memory"))
    with pytest.raises(openai.InternalServerError, match="no memory") as error:
        call(llm, worker, lambda client, api: client.completions.create(model="tiny", prompt=["a", "b"]))
    assert error.value.code == "internal_error" and worker.cancelled == [1, 2]


@pytest.mark.parametrize("at_once", [True, False])
def test_an_error_in_a_stream_is_its_last_event(llm, at_once):
    worker = Script(Delta("abc", [1]), Delta(error="the engine failed"), at_once=at_once)
    seen = []

    async def stream(client, api):
        async for chunk in await client.chat.completions.create(stream=True, **CHAT):
            seen.append(chunk.choices[0].delta.content)

    with pytest.raises(openai.APIError, match="the engine failed"):
        call(llm, worker, stream)
    assert seen == ["", "abc"] and worker.cancelled == [1]

    async def raw(client, api):
        return (await client._client.post("http://127.0.0.1/v1/chat/completions", json={**CHAT, "stream": True})).text

    *_, error, done, rest = call(llm, worker, raw).split("\n\n")
    assert json.loads(error.removeprefix("data: ")) == {
        "error": {"message": "the engine failed", "type": "server_error", "param": None, "code": "internal_error"}
    }
    assert done == "data: [DONE]" and rest == ""


def test_what_nobody_foresaw_is_500_without_its_words(llm):
    with pytest.raises(openai.InternalServerError) as error:
        call(llm, Script(refuse=RuntimeError("secret path"), after=0), complete)
    assert error.value.code == "internal_error" and error.value.response.json()["error"]["message"] == (
        "internal error: RuntimeError"
    )


def test_default_max_tokens(llm):
    worker = Script(Delta("a", [1], finish_reason="stop", stop_reason=0))
    call(llm, worker, complete)
    call(llm, worker, lambda client, api: client.completions.create(model="tiny", prompt=[1] * 60))
    call(llm, worker, lambda client, api: client.chat.completions.create(**CHAT))
    prompts, limits = zip(*((ids, params.max_tokens) for ids, params in worker.submitted), strict=True)
    assert limits == (16, 4, 64 - len(prompts[2]))


def test_a_template_that_refuses_is_400(llm, monkeypatch):
    def refuse(*args, **kwargs):
        raise ValueError("messages: the chat template refuses them: no\nsystem turn")

    monkeypatch.setattr(llm, "encode_chat", refuse)
    with pytest.raises(openai.BadRequestError, match="refuses them: no system turn") as error:
        call(llm, Script(), lambda client, api: client.chat.completions.create(**CHAT))
    assert error.value.param == "messages"


def test_health_is_open_and_v1_is_not(llm):
    async def look(client, api):
        statuses = []
        for path in ("/health", "/v1/models", "/v1/nothing", "/nothing"):
            statuses.append((await client._client.get("http://127.0.0.1" + path)).status_code)
        header = {"Authorization": "Bearer k\xe9y".encode("latin-1")}
        statuses.append((await client._client.get("http://127.0.0.1/v1/models", headers=header)).status_code)
        statuses.append(len((await client.models.list()).data))
        return statuses

    assert call(llm, Script(), look, key="k") == [200, 401, 401, 404, 401, 1]


@pytest.mark.parametrize("before", [True, False])
@pytest.mark.parametrize("streaming", [True, False])
def test_a_client_that_goes_away_cancels_its_job(llm, streaming, before):
    """At the bottom, where the server says that the connection is gone: before the first delta or after it."""
    worker = Script(*([] if before else [Delta("a", [1])]))
    api = Api(llm, worker, model="tiny", fingerprint="x86-test")
    sent = []

    async def run():
        body = json.dumps({**TEXT, "stream": streaming}).encode()
        messages = [{"type": "http.request", "body": body, "more_body": False}]

        async def receive():
            if messages:
                return messages.pop()
            while not worker.submitted or (streaming and len(sent) < 2 - before):
                await asyncio.sleep(0)
            return {"type": "http.disconnect"}

        async def send(message):
            sent.append(message)

        path = "/v1/completions"
        scope = {"type": "http", "method": "POST", "path": path, "raw_path": path.encode(), "query_string": b""}
        await api.app({**scope, "headers": [], "http_version": "1.1", "scheme": "http"}, receive, send)

    asyncio.run(asyncio.wait_for(run(), 60))
    assert worker.cancelled == [1]


# -- bodies


def found(token_id, logprob=-1.0, rank=1):
    return {token_id: Logprob(logprob, rank)}


def test_logprobs_wait_for_their_text(llm):
    """A token is reported when a part of its text is shown, one that only served to stop never."""
    a, b, c, d = (llm.tokenizer.encode(letter)[0] for letter in "abcd")
    eos = llm.tokenizer.eos_id
    answer = Answer("text", model="m", fingerprint="f", tokenizer=llm.tokenizer, prompt_tokens=1, top=0)
    assert answer.add(0, Delta("", [a], [found(a)])) == []
    assert [t.token_id for t in answer.add(0, Delta("a", [b], [found(b)]))] == [a]
    assert [t.token_id for t in answer.add(0, Delta("b", [c, d], [found(c), found(d)], "stop", "cd"))] == [b]
    answer = Answer("text", model="m", fingerprint="f", tokenizer=llm.tokenizer, prompt_tokens=1, top=0)
    assert [t.token_id for t in answer.add(0, Delta("a", [a, eos], [found(a), found(eos)], "stop", eos))] == [a]
    assert json.loads(answer.body())["usage"]["completion_tokens"] == 2


def test_tokens_that_are_parts_of_a_character_have_names_of_their_own(llm):
    ids = [next(i for i in range(300) if llm.tokenizer.token_bytes(i) == bytes([byte])) for byte in "é€".encode()]
    assert len(ids) == 5
    answer = Answer("text", model="m", fingerprint="f", tokenizer=llm.tokenizer, prompt_tokens=1, top=1)
    for number, i in enumerate(ids):
        text = {1: "é", 4: "€"}.get(number, "")
        finish = "length" if number == 4 else None
        answer.add(0, Delta(text, [i], [{**found(i), **found(303, float("-inf"), 2)}], finish))
    (choice,) = json.loads(answer.body())["choices"]
    assert choice["logprobs"]["tokens"] == [f"bytes:\\x{byte:02x}" for byte in "é€".encode()]
    assert choice["logprobs"]["text_offset"] == [0, 0, 1, 1, 1] and choice["text"] == "é€"
    assert choice["logprobs"]["top_logprobs"][0] == {"bytes:\\xc3": -1.0, "": -9999.0}
