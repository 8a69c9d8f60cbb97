"""The HTTP application: OpenAI's routes over a Worker.

    GET  /health   /v1/models   /v1/models/{id}
    POST /v1/completions   /v1/chat/completions

The event loop reads, answers and streams; the worker's thread computes. What ties them is `_Deltas`: the worker
puts, the loop gets. A request whose client goes away cancels its jobs, whatever it is doing at the time.
"""

from __future__ import annotations

import asyncio
import difflib
import hmac
import logging
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import asdict
from functools import partial
from typing import Any

import msgspec
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.requests import Request as HttpRequest
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from glmx.errors import GlmxError
from glmx.serve import protocol, responses
from glmx.serve.llm import LLM
from glmx.serve.protocol import ApiError, ChatRequest, CompletionRequest, bad_request
from glmx.serve.worker import ContextLengthError, Delta, Job, QueueFullError, ShuttingDownError, Worker

# A million token ids as JSON, the longest prompt of any GLM, take half of it.
MAX_BODY_BYTES = 16 * 2**20
RETRY_AFTER_S = 1  # a place in the queue becomes free whenever a request ends
COMPLETION_TOKENS = 16  # OpenAI's default of max_tokens for /v1/completions

log = logging.getLogger(__name__)


class Api:
    """The routes. `draining` makes /health and new requests answer 503 while the last ones are served."""

    def __init__(self, llm: LLM, worker: Worker, *, model: str, fingerprint: str, api_key: str | None = None) -> None:
        if llm.tokenizer is None:
            raise ValueError("the server needs a checkpoint with a tokenizer")
        self.llm, self.worker, self.tokenizer = llm, worker, llm.tokenizer
        self.model, self.fingerprint = model, fingerprint
        self.created = int(time.time())
        self.draining = False
        self.app = Starlette(
            routes=[
                Route("/health", self.health, methods=["GET"]),
                Route("/v1/models", self.models, methods=["GET"]),
                Route("/v1/models/{model:path}", self.one_model, methods=["GET"]),
                Route("/v1/completions", self.completions, methods=["POST"]),
                Route("/v1/chat/completions", self.chat, methods=["POST"]),
            ],
            exception_handlers={
                ApiError: _error_response,
                HTTPException: self._http_error,
                ClientDisconnect: lambda request, error: Response(status_code=499),  # nobody reads it
                Exception: _internal_error,
            },
        )
        self.app.router.redirect_slashes = False
        if api_key is not None:
            self.app.add_middleware(RequireKey, key=api_key)

    # -- routes

    async def health(self, request: HttpRequest) -> Response:
        self._check_running()
        state = {"status": "ok", "running": self.worker.running, "waiting": self.worker.waiting}
        drafts = self.llm.speculation
        return _json(state if drafts is None else {**state, "speculation": asdict(drafts)})

    async def models(self, request: HttpRequest) -> Response:
        return _json({"object": "list", "data": [self._model_card()]})

    async def one_model(self, request: HttpRequest) -> Response:
        self._check_model(request.path_params["model"])
        return _json(self._model_card())

    async def completions(self, request: HttpRequest) -> Response:
        asked = protocol.parse(CompletionRequest, await _body(request))
        self._check_model(asked.model)
        return await self._generate("text", asked, request, partial(self._completion_prompts, asked))

    async def chat(self, request: HttpRequest) -> Response:
        asked = protocol.parse(ChatRequest, await _body(request))
        self._check_model(asked.model)
        return await self._generate("chat", asked, request, partial(self._chat_prompts, asked))

    def _model_card(self) -> dict[str, Any]:
        return {
            "id": self.model,
            "object": "model",
            "created": self.created,
            "owned_by": "glmx",
            "max_model_len": self.llm.engine.max_model_len,
        }

    def _check_running(self) -> None:
        if self.draining:
            raise _shutting_down()
        if not self.worker.alive:
            raise ApiError(503, "the engine has stopped", type="server_error", code="engine_stopped")

    def _check_model(self, name: str) -> None:
        if name != self.model:
            message = f"the model '{name}' does not exist; this server has '{self.model}'"
            raise ApiError(404, message, param="model", code="model_not_found")

    def _http_error(self, request: HttpRequest, error: Exception) -> Response:
        """Starlette's own refusals: no such route, or not with this method."""
        assert isinstance(error, HTTPException)
        path, method = request.url.path, request.method
        if error.status_code == 405:
            allowed = (error.headers or {}).get("Allow", "")
            message = f"{path} does not take {method}, only {allowed}"
        else:
            known = [route.path for route in self.app.routes if isinstance(route, Route)]
            near = difflib.get_close_matches(path, known, n=1, cutoff=0.0)
            message = f"there is no {method} {path[:200]}; did you mean {near[0]}?"
        code = "method_not_allowed" if error.status_code == 405 else "unknown_route"
        headers = dict(error.headers or {})
        return _error_response(request, ApiError(error.status_code, message, code=code, headers=headers))

    # -- prompts: run on a thread, as a long text takes long to encode

    def _completion_prompts(self, asked: CompletionRequest) -> list[list[int]]:
        return [self.llm.encode(p) if isinstance(p, str) else p for p in asked.prompts()]

    def _chat_prompts(self, asked: ChatRequest) -> list[list[int]]:
        variables = asked.template_variables()
        return [self.llm.encode_chat(asked.template_messages(), chat_template_kwargs=variables)]

    # -- generating

    async def _generate(
        self,
        kind: str,
        asked: CompletionRequest | ChatRequest,
        request: HttpRequest,
        prompts: Callable[[], list[list[int]]],
    ) -> Response:
        self._check_running()
        deltas = _Deltas(self.worker)
        try:
            ids = await asyncio.to_thread(self._submit, deltas, kind, asked, prompts)
            answer = responses.Answer(
                kind,
                model=self.model,
                fingerprint=self.fingerprint,
                tokenizer=self.tokenizer,
                prompt_tokens=sum(map(len, ids)),
                choices=len(ids),
                top=asked.top_logprobs_wanted,
            )
        except BaseException:
            deltas.cancel()
            raise
        if asked.stream:
            return EventStream(_events(answer, deltas, asked.include_usage), deltas.cancel)
        try:
            if await _while_connected(request.receive, _collect(answer, deltas)):
                return Response(answer.body(), media_type="application/json")
            raise ClientDisconnect
        finally:
            deltas.cancel()

    def _submit(
        self,
        deltas: _Deltas,
        kind: str,
        asked: CompletionRequest | ChatRequest,
        prompts: Callable[[], list[list[int]]],
    ) -> list[list[int]]:
        """Encodes and submits every prompt; returns their ids. Raises ApiError."""
        prompt_param = "messages" if kind == "chat" else "prompt"
        limit = self.llm.engine.max_model_len
        try:
            all_ids = prompts()
            for ids in all_ids:
                room = max(limit - len(ids), 1)
                default = room if kind == "chat" else min(room, COMPLETION_TOKENS)
                params = asked.sampling_params(asked.token_limit or default)
                deltas.submit(ids, params)
        except ContextLengthError as error:
            raise _too_long(error, prompt_param) from None
        except QueueFullError as error:
            headers = {"Retry-After": str(RETRY_AFTER_S)}
            raise ApiError(429, str(error), type="rate_limit_error", code="queue_full", headers=headers) from None
        except ShuttingDownError:
            raise _shutting_down() from None
        except (GlmxError, ValueError, TypeError) as error:
            raise bad_request(" ".join(str(error).split()), prompt_param) from None
        return all_ids


class _Deltas:
    """The deltas of one request's jobs, from the worker's thread to the event loop."""

    def __init__(self, worker: Worker) -> None:
        self._worker = worker
        self._loop = asyncio.get_running_loop()
        self._queue: asyncio.Queue[tuple[int, Delta]] = asyncio.Queue()
        self._jobs: list[Job] = []
        self._cancelled = False

    def submit(self, prompt_token_ids: list[int], params: Any) -> None:
        """On any thread. What was cancelled meanwhile is not submitted."""
        if not self._cancelled:
            self._jobs.append(self._worker.submit(prompt_token_ids, params, partial(self._put, len(self._jobs))))

    def _put(self, index: int, delta: Delta) -> None:
        # RuntimeError: the loop is closed, as the process is being stopped.
        try:
            self._loop.call_soon_threadsafe(self._queue.put_nowait, (index, delta))
        except RuntimeError:
            log.debug("a delta came after the event loop had ended")

    async def __aiter__(self) -> AsyncIterator[list[tuple[int, Delta]]]:
        """What has come since the last time, in order, until every job has ended.

        Raises ApiError for a job that failed, after what came before its failure.
        """
        left = len(self._jobs)
        while left:
            batch = [await self._queue.get()]
            while not self._queue.empty():
                batch.append(self._queue.get_nowait())
            failed = next((i for i, (_, delta) in enumerate(batch) if delta.error is not None), len(batch))
            if failed:
                yield batch[:failed]
            if failed < len(batch):
                raise ApiError(500, batch[failed][1].error or "", type="server_error", code="internal_error")
            left -= sum(delta.finish_reason is not None for _, delta in batch)

    def cancel(self) -> None:
        """Takes back what has not ended; jobs that have are none of the worker's any more."""
        self._cancelled = True
        for job in self._jobs:
            self._worker.cancel(job)


async def _collect(answer: responses.Answer, deltas: _Deltas) -> None:
    async for batch in deltas:
        for index, delta in batch:
            answer.add(index, delta)


async def _events(answer: responses.Answer, deltas: _Deltas, include_usage: bool) -> AsyncIterator[bytes]:
    """The events of a stream; an error after its start is an event too, the last but [DONE]."""
    try:
        yield answer.opening()
        async for batch in deltas:
            yield b"".join(answer.chunks(index, delta) for index, delta in batch)
        if include_usage:
            yield answer.usage_chunk()
    except ApiError as error:
        yield responses.event({"error": error.error})
    yield responses.DONE


class EventStream(Response):
    """Server-sent events; `on_close` runs at the end, also when the client goes away before it."""

    media_type = "text/event-stream"

    def __init__(self, events: AsyncIterator[bytes], on_close: Callable[[], None]) -> None:
        super().__init__(headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        del self.headers["content-length"]
        self.events, self.on_close = events, on_close

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
            await _while_connected(receive, self._send_all(send))
        finally:
            self.on_close()

    async def _send_all(self, send: Send) -> None:
        async for data in self.events:
            if data:
                await send({"type": "http.response.body", "body": data, "more_body": True})
        await send({"type": "http.response.body", "body": b""})


class RequireKey:
    """Refuses whatever lies under /v1 without `Authorization: Bearer KEY`."""

    def __init__(self, app: ASGIApp, key: str) -> None:
        self.app, self.expected = app, b"Bearer " + key.encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["path"].startswith("/v1"):
            given = dict(scope["headers"]).get(b"authorization", b"")
            if not hmac.compare_digest(given, self.expected):
                what = "is not this server's" if given else "is missing: send Authorization: Bearer KEY"
                error = ApiError(
                    401, f"the API key {what}", code="invalid_api_key", headers={"WWW-Authenticate": "Bearer"}
                )
                await _error_response(None, error)(scope, receive, send)
                return
        await self.app(scope, receive, send)


async def _while_connected(receive: Receive, work: Any) -> bool:
    """Runs a coroutine to its end, or cancels it when the client goes away; says whether it ended."""
    task = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(_disconnected(receive))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            task.result()  # raises what the work raised
            return True
        return False
    finally:
        for future in (task, gone):
            future.cancel()
        await asyncio.gather(task, gone, return_exceptions=True)


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _body(request: HttpRequest) -> bytes:
    """The request's body. Raises ApiError (413) for one that is too large, before it is in memory."""
    declared = request.headers.get("content-length", "0")
    size, parts = 0, []
    if int(declared) <= MAX_BODY_BYTES:
        async for part in request.stream():
            size += len(part)
            if size > MAX_BODY_BYTES:
                break
            parts.append(part)
        else:
            return b"".join(parts)
    raise ApiError(413, f"the body is larger than {MAX_BODY_BYTES} bytes", code="request_too_large")


def _too_long(error: ContextLengthError, param: str) -> ApiError:
    more = "" if error.max_tokens is None else f" and {error.max_tokens} are to be generated"
    advice = f"shorten the {param}" + ("" if error.max_tokens is None else " or ask for fewer tokens")
    message = f"this model's context holds {error.limit} tokens; {param} has {error.prompt_tokens}{more}: {advice}"
    return bad_request(message, param, "context_length_exceeded")


def _shutting_down() -> ApiError:
    return ApiError(503, "the server is shutting down", type="server_error", code="shutting_down")


def _json(content: Any) -> Response:
    return Response(msgspec.json.encode(content), media_type="application/json")


def _error_response(request: HttpRequest | None, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    return Response(error.body(), error.status, error.headers, "application/json")


def _internal_error(request: HttpRequest, error: Exception) -> Response:
    """What nobody foresaw: uvicorn logs the traceback, the client gets a body that it can read."""
    body = ApiError(500, f"internal error: {type(error).__name__}", type="server_error", code="internal_error")
    return _error_response(request, body)
