"""Worker: jobs from any thread get what they would get alone; cancelling, failing and draining leave nothing behind."""

from __future__ import annotations

import queue
import threading

import pytest

import glmx
from glmx.data import tokenizer as tokenizers
from glmx.models import checkpoint
from glmx.serve.worker import Worker
from tiny_glm import random_ids, random_model, tiny_config

TEXT = "def add(first, second):\n    return first + second\n\n\nclass Café:\n    pass\n" * 4
WAIT_S = 60  # for a deadlock, not for speed


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    base = tmp_path_factory.mktemp("worker")
    tokenizer = tokenizers.train([TEXT], 300)
    tokenizer.save(base / "tokenizer")
    config = tiny_config(vocab_size=304, eos_token_id=tokenizer.eos_ids, max_position_embeddings=128)
    return checkpoint.save(random_model(config, 1), base / "ckpt", tokenizer_files_from=base / "tokenizer")


@pytest.fixture
def llm(directory):
    return glmx.LLM(directory, max_num_seqs=2)


@pytest.fixture
def worker(llm):
    worker = Worker(llm, max_waiting=3)
    worker.start()
    yield worker
    worker.drain(0)


class Deltas:
    """Collects a job's deltas; `hold` stops the worker inside the first one until `go` is set."""

    def __init__(self, hold=False):
        self.all, self.queue = [], queue.Queue()
        self.entered, self.go = threading.Event(), threading.Event()
        if not hold:
            self.go.set()

    def __call__(self, delta):
        self.all.append(delta)
        self.entered.set()
        assert self.go.wait(WAIT_S)
        self.queue.put(delta)

    def wait(self):
        """The last delta."""
        while True:
            delta = self.queue.get(timeout=WAIT_S)
            if delta.finish_reason or delta.error:
                return delta


def prompts(llm, count):
    return [random_ids(llm.model.config, 1, 3 + 4 * n, seed=n)[0].tolist() for n in range(count)]


def params(**kwargs):
    return glmx.SamplingParams(**{"temperature": 1.3, "seed": 7, "max_tokens": 12, "ignore_eos": True} | kwargs)


def test_jobs_get_what_generate_gives(directory, llm, worker):
    each = [
        params(logprobs=2),
        params(seed=8),
        params(temperature=0),
        params(seed=9, stop=["e", "Ã©"]),
        params(max_tokens=1),
    ]
    expected = glmx.LLM(directory).generate(prompts(llm, 5), each)
    for prompt, one, out in zip(prompts(llm, 5), each, expected, strict=True):
        deltas = Deltas()
        worker.submit(prompt, one, deltas)
        last, out = deltas.wait(), out.outputs[0]
        assert "".join(d.text for d in deltas.all) == out.text
        assert [i for d in deltas.all for i in d.token_ids] == out.token_ids
        assert (last.finish_reason, last.stop_reason, last.error) == (out.finish_reason, out.stop_reason, None)
