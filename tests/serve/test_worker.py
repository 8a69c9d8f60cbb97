"""Worker: jobs from any thread get what they would get alone; cancelling, failing and draining leave nothing behind."""

from __future__ import annotations

import queue
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

import glmx
from glmx import ops
from glmx.data import tokenizer as tokenizers
from glmx.models import checkpoint
from glmx.serve.worker import ContextLengthError, QueueFullError, ShuttingDownError, Worker
from tiny_glm import random_ids, random_model, tiny_config

TEXT = "def add(first, second):\n    return first + second\n\n\nclass Café:\n    pass\n" * 4
WAIT_S = 60  # until a deadlock is called one; nothing here depends on speed
HOURS = 3600  # a drain that has nothing to wait for must not use its time up
SLOTS = 2


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    base = tmp_path_factory.mktemp("worker")
    tokenizer = tokenizers.train([TEXT], 300)
    tokenizer.save(base / "tokenizer")
    config = tiny_config(vocab_size=304, eos_token_id=tokenizer.eos_ids, max_position_embeddings=128)
    return checkpoint.save(random_model(config, 1), base / "ckpt", tokenizer_files_from=base / "tokenizer")


@pytest.fixture(scope="module")
def alone(directory):
    """What one prompt gives in an LLM of its own."""
    llm = glmx.LLM(directory, max_num_seqs=1)
    return lambda prompt, params: llm.generate([prompt], params)[0].outputs[0]


@pytest.fixture
def llm(directory):
    return glmx.LLM(directory, max_num_seqs=SLOTS)


@pytest.fixture
def worker(llm):
    worker = Worker(llm, max_waiting=3)
    worker.start()
    yield worker
    finish(worker, 0)
    assert not llm.engine.has_work and llm.engine.state.lengths == [0] * SLOTS and llm.engine.owner is None


def finish(worker, timeout_s=HOURS):
    """drain; a worker that does not end fails the test instead of hanging it."""
    result = []
    thread = threading.Thread(target=lambda: result.append(worker.drain(timeout_s)), daemon=True)
    thread.start()
    thread.join(2 * WAIT_S)
    assert result, "the worker does not end"
    return result[0]


class Deltas:
    """Collects the deltas of a job. With `hold` the worker waits inside the first one until `go` is set."""

    def __init__(self, hold=False):
        self.all, self.last = [], queue.Queue()
        self.entered, self.go = threading.Event(), threading.Event()
        if not hold:
            self.go.set()

    def __call__(self, delta):
        self.all.append(delta)
        self.entered.set()
        assert self.go.wait(WAIT_S)
        if delta.finish_reason or delta.error:
            self.last.put(delta)

    def wait(self):
        return self.last.get(timeout=WAIT_S)

    @property
    def token_ids(self):
        return [i for delta in self.all for i in delta.token_ids]


def prompts(llm, count):
    return [random_ids(llm.model.config, 1, 3 + 4 * n, seed=n)[0].tolist() for n in range(count)]


def params(**kwargs):
    return glmx.SamplingParams(**{"temperature": 1.3, "seed": 7, "max_tokens": 12, "ignore_eos": True} | kwargs)


def held(worker, prompt=(1, 2, 3), **kwargs):
    """A job whose first delta holds the worker up."""
    deltas = Deltas(hold=True)
    job = worker.submit(list(prompt), params(**kwargs), deltas)
    assert deltas.entered.wait(WAIT_S)
    return job, deltas


def test_a_job_gets_what_generate_gives(llm, worker, alone):
    text = alone(prompts(llm, 5)[4], params(seed=9)).text
    each = [
        params(logprobs=2),
        params(seed=8),
        params(temperature=0),
        params(max_tokens=1),
        params(seed=9, stop=text[4:6]),
    ]
    for prompt, one in zip(prompts(llm, 5), each, strict=True):
        deltas, out = Deltas(), alone(prompt, one)
        worker.submit(prompt, one, deltas)
        last = deltas.wait()
        assert "".join(delta.text for delta in deltas.all) == out.text
        assert deltas.token_ids == out.token_ids
        assert (last.finish_reason, last.stop_reason, last.error) == (out.finish_reason, out.stop_reason, None)
        logprobs = [found for delta in deltas.all for found in delta.logprobs or []]
        assert logprobs == (out.logprobs or []) and len(logprobs) == (12 if one.logprobs else 0)
        assert all(delta.finish_reason is None for delta in deltas.all[:-1])
    assert last.stop_reason == text[4:6]


def test_many_threads_at_once(directory, alone):
    llm = glmx.LLM(directory, max_num_seqs=4)
    worker = Worker(llm)
    worker.start()
    work = [(prompt, params(seed=n)) for n, prompt in enumerate(prompts(llm, 16))]

    def client(one):
        deltas = Deltas()
        worker.submit(*one, deltas)
        deltas.wait()
        return deltas.token_ids

    with ThreadPoolExecutor(16) as pool:
        found = list(pool.map(client, work))
    assert finish(worker) and found == [alone(*one).token_ids for one in work]


def test_first_come_first_served_and_a_full_queue(llm, worker):
    order = []

    def client(number):
        return lambda delta: order.append(number) if delta.finish_reason else None

    _, first = held(worker, max_tokens=1)
    for number in range(3):
        worker.submit([1, 2], params(max_tokens=2), client(number))
    assert (worker.running, worker.waiting) == (0, 3)
    with pytest.raises(QueueFullError, match="3 requests wait already, at most 3 may"):
        worker.submit([1, 2], params(), client(3))
    first.go.set()
    assert finish(worker) and order == [0, 1, 2]


def test_a_cancelled_job_that_waits_never_reaches_the_engine(llm, worker, monkeypatch):
    added, add = [], llm.engine.add
    monkeypatch.setattr(llm.engine, "add", lambda request: (added.append(request), add(request)))
    running, first = held(worker)
    waiting, deltas = worker.submit([4, 5], params(), kept := Deltas()), Deltas()
    dropped = worker.submit([6, 7], params(), deltas)
    assert worker.waiting == 2
    worker.cancel(dropped)
    worker.cancel(dropped)
    assert worker.waiting == 1
    first.go.set()
    kept.wait()
    assert added == [running.request, waiting.request] and deltas.all == []


def test_a_cancelled_job_that_runs_gives_its_slot_back(llm, worker, alone):
    """Cancelled by its own delta: the neighbour's tokens are what they are alone, and nothing more is told."""
    told, done = [], threading.Event()

    def hang_up(delta):
        told.append(delta)
        worker.cancel(job)
        done.set()

    (prompt,), neighbour = prompts(llm, 1), Deltas()
    _, gate = held(worker, max_tokens=1)
    worker.submit(prompt, params(max_tokens=40), neighbour)
    job = worker.submit([9, 8, 7], params(max_tokens=100), hang_up)
    gate.go.set()
    assert done.wait(WAIT_S)
    neighbour.wait()
    assert len(told) == 1 and neighbour.token_ids == alone(prompt, params(max_tokens=40)).token_ids
    assert worker.running == 0 and len(job.request.token_ids) <= 2


def test_no_delta_comes_after_cancel_has_returned(llm, worker):
    """Called from another thread, cancel waits for the delta that is on its way."""
    job, deltas = held(worker)
    cancelled = threading.Event()
    thread = threading.Thread(target=lambda: (worker.cancel(job), cancelled.set()))
    thread.start()
    assert not cancelled.wait(0.05)  # may miss a fault, never invents one
    deltas.go.set()
    thread.join(WAIT_S)
    assert cancelled.is_set() and finish(worker) and len(deltas.all) == 1


def test_what_cannot_run_is_refused_at_once(llm, worker):
    limit = llm.engine.max_model_len
    with pytest.raises(
        ContextLengthError, match=f"100 tokens and max_tokens is 29, 129 together, max_model_len is {limit}"
    ) as e:
        worker.submit([1] * 100, params(max_tokens=29), print)
    assert (e.value.prompt_tokens, e.value.max_tokens, e.value.limit) == (100, 29, 128)
    with pytest.raises(ContextLengthError, match="the prompt has 128 tokens, max_model_len is 128") as e:
        worker.submit([1] * 128, params(max_tokens=1), print)
    assert e.value.max_tokens is None
    for prompt, options, error, words in [
        ([], {}, ValueError, "is empty"),
        ([304], {}, ValueError, "304 is outside the vocabulary"),
        ([-1], {}, ValueError, "-1 is outside the vocabulary"),
        ([1], {"logprobs": 305}, ValueError, "logprobs is 305"),
        ([1.5], {}, TypeError, "a prompt is a list"),
    ]:
        with pytest.raises(error, match=words):
            worker.submit(prompt, params(**options), print)
    assert (worker.running, worker.waiting) == (0, 0)
    fits = Deltas()
    worker.submit([1] * 100, params(max_tokens=28), fits)
    assert fits.wait().finish_reason == "length" and len(fits.token_ids) == 28


@pytest.mark.parametrize("where", ["forward", "verify"])
def test_a_request_that_fails_does_not_take_the_others_along(llm, worker, alone, monkeypatch, where, caplog):
    """Before the state has counted the step's tokens, and after."""
    if where == "forward":
        forward = llm.model.forward_tokens

        def broken(ids, *args):
            if 13 in ids.tolist():
                raise RuntimeError("out of\nmemory")
            return forward(ids, *args)

        monkeypatch.setattr(llm.model, "forward_tokens", broken)
    else:
        mtp_verify = ops.mtp_verify

        def broken(*given, top_p, **rules):
            if 0.5 in top_p:
                raise RuntimeError("out of\nmemory")
            return mtp_verify(*given, top_p=top_p, **rules)

        monkeypatch.setattr(ops, "mtp_verify", broken)
    _, gate = held(worker, max_tokens=1)
    good, bad = Deltas(), Deltas()
    worker.submit([20, 21, 22], params(temperature=0), good)
    worker.submit([11, 13], params(top_p=0.5), bad)
    gate.go.set()
    assert bad.wait().error == "the engine failed: RuntimeError: out of memory" and len(bad.all) == 1
    good.wait()
    monkeypatch.undo()
    assert good.token_ids == alone([20, 21, 22], params(temperature=0)).token_ids and 13 not in good.token_ids
    again = Deltas()
    worker.submit([11, 13], params(top_p=0.5), again)
    assert again.wait().finish_reason == "length" and worker.alive
    assert "a step of 2 requests failed" in caplog.text


def test_a_step_that_fails_as_a_whole_ends_what_runs_and_nothing_else(llm, worker, monkeypatch):
    admit = llm.engine._admit

    def broken():
        monkeypatch.setattr(llm.engine, "_admit", admit)
        raise KeyError("slots")

    _, gate = held(worker, max_tokens=1)
    jobs = [Deltas() for _ in range(3)]
    for deltas in jobs:
        worker.submit([1, 2], params(), deltas)
    monkeypatch.setattr(llm.engine, "_admit", broken)
    gate.go.set()
    assert [deltas.wait().error for deltas in jobs] == ["the engine failed: KeyError: 'slots'"] * SLOTS + [None]
    assert worker.alive and worker.running == 0


def test_a_client_that_fails_is_dropped(llm, worker, caplog):
    called = threading.Event()

    def broken(delta):
        called.set()
        raise OSError("connection reset")

    job = worker.submit([1, 2, 3], params(max_tokens=100), broken)
    assert called.wait(WAIT_S)
    after = Deltas()
    worker.submit([1, 2], params(), after)
    assert after.wait().finish_reason == "length" and worker.running == 0 and len(job.request.token_ids) < 100
    assert "connection reset" in caplog.text


def test_a_dead_thread_tells_everybody(llm, monkeypatch):
    worker = Worker(llm)
    worker.start()
    _, deltas = held(worker)
    waiting = [Deltas() for _ in range(3)]
    for one in waiting:
        worker.submit([1, 2], params(), one)
    monkeypatch.setattr(worker, "_next_turn", lambda: 1 / 0)
    deltas.go.set()
    assert [one.wait().error for one in [deltas, *waiting]] == ["the engine has stopped"] * 4
    assert not finish(worker) and not worker.alive and not llm.engine.has_work
    with pytest.raises(ShuttingDownError):
        worker.submit([1, 2], params(), print)


def test_drain_lets_all_jobs_end(llm, worker):
    _, first = held(worker)
    jobs = [Deltas() for _ in range(3)]
    for deltas in jobs:
        worker.submit([1, 2], params(), deltas)
    drained = []
    thread = threading.Thread(target=lambda: drained.append(worker.drain(HOURS)), daemon=True)
    thread.start()
    with worker._changed:
        assert worker._changed.wait_for(lambda: worker._draining, WAIT_S)
    with pytest.raises(ShuttingDownError, match="shutting down"):
        worker.submit([1, 2], params(), print)
    assert worker.alive
    first.go.set()
    thread.join(WAIT_S)
    assert drained == [True] and not worker.alive and worker.drain(0)
    assert [deltas.wait().finish_reason for deltas in jobs] == ["length"] * 3


def test_drain_gives_up_after_its_time(llm, worker):
    _, first = held(worker, max_tokens=100)
    second = Deltas()
    worker.submit([1, 2], params(max_tokens=100), second)
    dropped = Deltas()
    worker.cancel(worker.submit([1, 2], params(max_tokens=100), dropped))
    drained = []
    thread = threading.Thread(target=lambda: drained.append(worker.drain(0)))
    thread.start()
    with worker._changed:
        assert worker._changed.wait_for(lambda: worker._stop, WAIT_S)
    first.go.set()
    thread.join(WAIT_S)
    assert drained == [False] and not worker.alive and dropped.all == []
    for deltas in (first, second):
        assert deltas.wait().error == "the server was shut down before the request was done"


def test_the_engine_is_the_workers_alone(llm, worker):
    with pytest.raises(RuntimeError, match="runs on its worker's thread"):
        llm.generate([[1, 2]], params())
    with pytest.raises(RuntimeError, match="in use"):
        Worker(llm).start()
    with pytest.raises(RuntimeError, match="started before"):
        worker.start()
    finish(worker)
    assert len(llm.generate([[1, 2]], params())[0].outputs[0].token_ids) == 12
    with pytest.raises(ShuttingDownError):
        Worker(llm).submit([1, 2], params(), print)
    with pytest.raises(ValueError, match="max_waiting is 0"):
        Worker(llm, max_waiting=0)
