"""Worker: one thread that owns the engine of an LLM and runs what other threads submit.

worker = Worker(llm)
worker.start()
job = worker.submit(llm.encode("def main():"), glmx.SamplingParams(max_tokens=64), print)
worker.drain(30)

Jobs wait in one queue, first come first served, and join the engine's batch between its steps. A step is
never cancelled midway.
"""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch

from glmx.serve.engine import ContextLengthError, Request
from glmx.serve.llm import LLM
from glmx.serve.sampling import Logprob, SamplingParams

__all__ = ["ContextLengthError", "Delta", "Job", "QueueFullError", "ShuttingDownError", "Worker"]

log = logging.getLogger(__name__)


class QueueFullError(RuntimeError):
    """As many jobs wait as are allowed to."""


class ShuttingDownError(RuntimeError):
    """The worker takes no new jobs: it drains, has stopped, or was never started."""


@dataclass(frozen=True)
class Delta:
    """What one token added to a job, however many a step gained. The last one has a finish_reason or an error.

    text           what became safe to show: may be empty while more is held back (see TextStream)
    token_ids      the new token, also one of a stop string and a stop id
    logprobs       one dict for it; None unless asked for
    finish_reason  "stop" or "length"; stop_reason is the stop id or string
    error          one line: why the job failed
    """

    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[dict[int, Logprob]] | None = None
    finish_reason: str | None = None
    stop_reason: int | str | None = None
    error: str | None = None


@dataclass(eq=False)
class Job:
    """A submitted request and who wants its deltas."""

    request: Request
    on_delta: Callable[[Delta], None]
    # Held while on_delta runs, so that none begins or is under way once `cancel` has returned. Reentrant:
    # on_delta may cancel its own job.
    lock: threading.RLock = field(default_factory=threading.RLock)
    closed: bool = False
    sent: int = 0

    def deliver(self, error: str | None = None) -> None:
        """Calls on_delta with each token that the request has gained since, or with the error that ends it."""
        with self.lock:
            if error is not None and not self.closed:
                self.closed = True
                self.on_delta(Delta(error=error))
            request = self.request
            while not self.closed and self.sent < len(request.token_ids):
                n = self.sent
                self.sent += 1
                last = request.finished and self.sent == len(request.token_ids)
                self.closed = last
                self.on_delta(
                    Delta(
                        request.pieces[n],
                        request.token_ids[n : n + 1],
                        request.logprobs[n : n + 1] if request.params.logprobs is not None else None,
                        request.finish_reason if last else None,
                        request.stop_reason if last else None,
                    )
                )


class Worker:
    """Runs an LLM's engine on a thread of its own.

    llm          its engine is the worker's alone from `start` to the end of `drain`
    max_waiting  jobs that may wait for a place in the engine's batch, beside those that run
    """

    def __init__(self, llm: LLM, *, max_waiting: int = 256) -> None:
        if max_waiting < 1:
            raise ValueError(f"max_waiting is {max_waiting}, expected at least 1")
        self._llm = llm
        self._engine = llm.engine
        self._max_waiting = max_waiting
        self._thread: threading.Thread | None = None
        # Guards everything below; notified when there may be something to do. Never held during a step, nor
        # while a job's own lock is waited for.
        self._changed = threading.Condition()
        self._queue: deque[Job] = deque()
        self._running: dict[str, Job] = {}
        self._cancelled: list[Job] = []
        self._draining = False
        self._stop = False
        self._all_done = True

    def start(self) -> None:
        """Starts the thread; a worker is started once. RuntimeError when it, or another, has the engine."""
        if self._thread is not None or self._engine.owner is not None or self._engine.has_work:
            raise RuntimeError("this worker was started before, or its engine is in use")
        self._engine.owner = -1  # nobody, until the thread is there and knows its own number
        # A daemon: a step that hangs must not keep the process from exiting.
        self._thread = threading.Thread(target=self._run, name="glmx-engine", daemon=True)
        self._thread.start()

    @property
    def alive(self) -> bool:
        """Whether the thread runs; False before `start`, after `drain`, and when it died."""
        return self._thread is not None and self._thread.is_alive()

    @property
    def running(self) -> int:
        """Jobs that the engine has."""
        with self._changed:
            return len(self._running)

    @property
    def waiting(self) -> int:
        """Jobs that wait for a place in the engine's batch."""
        with self._changed:
            return len(self._queue)

    def submit(self, prompt_token_ids: Sequence[int], params: SamplingParams, on_delta: Callable[[Delta], None]) -> Job:
        """Queues a prompt, from any thread.

        `on_delta` is called on the worker's thread, once per token, and must not block it. Raises, before any
        work: ValueError and TypeError (bad prompt or params), ContextLengthError (prompt and max_tokens do not
        fit into max_model_len together), QueueFullError, ShuttingDownError.
        """
        request = self._llm.make_request(prompt_token_ids, params)
        tokens, limit = len(request.prompt_token_ids), self._engine.max_model_len
        if tokens < limit < tokens + params.max_tokens:
            raise ContextLengthError(tokens, params.max_tokens, limit)
        self._engine.check(request)
        job = Job(request, on_delta)
        with self._changed:
            if self._draining or not self.alive:
                raise ShuttingDownError("no new requests are taken: shutting down")
            if len(self._queue) >= self._max_waiting:
                raise QueueFullError(f"{len(self._queue)} requests wait already, at most {self._max_waiting} may")
            self._queue.append(job)
            self._changed.notify_all()
        return job

    def cancel(self, job: Job) -> None:
        """Drops a job, from any thread; one that has ended is no error.

        A waiting job never reaches the engine; a running one's slot is free after the step in progress. When
        this returns, no on_delta of the job is running, and none will.
        """
        with self._changed:
            if job.request.request_id in self._running:
                self._cancelled.append(job)
            elif job in self._queue:
                self._queue.remove(job)
            self._changed.notify_all()
        with job.lock:
            job.closed = True

    def drain(self, timeout_s: float) -> bool:
        """Takes no new jobs, waits up to `timeout_s` for those it has, then stops the thread.

        Returns whether all of them came to their end. Those that did not get an error; the step in progress
        is waited for. May be called again.
        """
        with self._changed:
            self._draining = True
            self._changed.notify_all()
        if self._thread is None:
            return True
        self._thread.join(max(timeout_s, 0))
        with self._changed:
            self._stop = True
            self._changed.notify_all()
        self._thread.join()
        return self._all_done

    @torch.no_grad()
    def _run(self) -> None:
        self._engine.owner = threading.get_ident()
        reason = "the server was shut down before the request was done"
        try:
            while self._next_turn():
                self._step()
        except BaseException:
            reason = "the engine has stopped"
            log.exception("the engine's thread ends")
        finally:
            self._close(reason)

    def _next_turn(self) -> bool:
        """Waits for work and moves jobs into the engine; False when the thread should end."""
        with self._changed:
            while True:
                for job in self._cancelled:
                    self._engine.abort(job.request)
                    self._running.pop(job.request.request_id, None)
                self._cancelled.clear()
                if self._stop:
                    return False
                while self._queue and self._engine.free_slots > 0:
                    job = self._queue.popleft()
                    self._running[job.request.request_id] = job
                    self._engine.add(job.request)
                if self._running:
                    return True
                if self._draining:
                    return False
                self._changed.wait()

    def _step(self) -> None:
        """One step of the engine; what goes wrong in it ends the jobs concerned and nothing else."""
        try:
            stepped = self._engine.step()
        except Exception as error:
            # Not a failure of some request's forward, which the engine has caught: all that run are concerned.
            log.exception("the engine's step failed")
            with self._changed:
                concerned = list(self._running.values())
                self._running.clear()
            for job in concerned:
                self._engine.abort(job.request)
                self._deliver(job, _one_line(error))
            return
        for request in stepped:
            with self._changed:
                job = self._running[request.request_id]
                if request.finished:
                    del self._running[request.request_id]
            if request.error is None:
                self._deliver(job)
            else:
                log.error("request %s failed", request.request_id, exc_info=request.error)
                self._deliver(job, _one_line(request.error))

    def _deliver(self, job: Job, error: str | None = None) -> None:
        try:
            job.deliver(error)
        except Exception:
            log.exception("on_delta of request %s failed: the request is dropped", job.request.request_id)
            self.cancel(job)

    def _close(self, reason: str) -> None:
        """Ends what is left with an error and gives the engine back."""
        with self._changed:
            self._draining = True
            left = [*self._running.values(), *self._queue]
            self._running.clear()
            self._queue.clear()
            self._all_done = all(job.closed for job in left)
        for job in left:
            self._deliver(job, reason)
        for job in left:
            self._engine.abort(job.request)
        self._engine.owner = None


def _one_line(error: Exception) -> str:
    text = " ".join(str(error).split())
    return f"the engine failed: {type(error).__name__}" + (f": {text}" if text else "")
