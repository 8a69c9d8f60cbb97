"""The trainer killed by SIGKILL at twenty or more random moments of real time: each time it resumes to the same bits.

A run that nobody disturbs keeps all its checkpoints. A second run of the same configuration is killed and started
again, over and over; whenever it is dead, every checkpoint it shows must equal the undisturbed run's, byte for byte
(weights, masters, moments, torch's RNG state, data cursor), and so must the log up to there. Two kills of three strike
after a random time, which covers the start, the resume and the steps; the others wait for the temporary directory of a
checkpoint and strike within its write. When a run gets to its end between two kills, another begins.

The trainer itself draws from no generator of torch: its order of data is a function of (seed, epoch), and there is no
dropout. So the children here draw a factor of the learning rate at each step; a state of the RNG that was saved or
restored wrongly shows in the weights.
"""

import contextlib
import hashlib
import json
import os
import random
import signal
import time

import pytest

from glmx.train import checkpoint
from glmx.train.config import FREE_ON_RESUME, flatten
from warm import Warm

KILLS, IN_WRITE, STEPS, SEED = 20, 3, 20, 20  # kills: at least so many, of which in a write
DRAW = """
import torch
from glmx.train import loop
plain = loop.learning_rate
loop.learning_rate = lambda *args, **kwargs: plain(*args, **kwargs) * (0.5 + torch.rand(()).item())
"""


@pytest.fixture(scope="module")
def warm():
    with Warm() as server:
        yield server


def command(raw, out, **changed):
    """`glmx pretrain` with the configuration `raw`, keys changed, as the words of a command line."""
    flat = {**flatten(raw), "out": str(out), **changed}
    return ["pretrain", os.devnull, *(word for key, value in flat.items() for word in (f"--{key}", str(value)))]


def identity(path):
    """What must be equal of a checkpoint: hashes of its files, the trainer's state without its clock."""
    hashes = {
        str(file.relative_to(path)): hashlib.sha256(file.read_bytes()).hexdigest()
        for file in sorted(path.rglob("*"))
        if file.is_file() and file.name != "state.json"
    }
    assert {"model.safetensors", "config.json", "trainer/state.safetensors"} <= hashes.keys()
    state = json.loads((path / "trainer" / "state.json").read_text())
    seconds, config = state.pop("seconds"), flatten(state.pop("config"))
    assert seconds > 0
    return hashes, state, {key: value for key, value in config.items() if not key.startswith(FREE_ON_RESUME)}


def records(out, step):
    """The whole lines of log.jsonl up to `step`, without their clocks."""
    found = []
    for line in (out / "log.jsonl").read_bytes().splitlines(keepends=True):
        record = json.loads(line) if line.endswith(b"\n") else {"step": step + 1}
        if record["step"] <= step:
            found.append({key: value for key, value in record.items() if key not in ("time_s", "tokens_per_s")})
    return found


def wait_for_a_write(child, out, step, before):
    """Until `child` writes a checkpoint of at least `step` (not one of the names in `before`), or has ended."""
    with contextlib.suppress(ProcessLookupError):
        while not any(name >= f".tmp-step-{step:08d}" for name in unfinished(out) - before):
            os.kill(child.pid, 0)
            time.sleep(0.0005)


def unfinished(out):
    """The temporary files and directories in `out`. A killed run leaves them; the next start removes them."""
    return {name for name in listing(out) if name.startswith(".tmp-")}


def listing(out):
    return os.listdir(out) if out.is_dir() else []


def test_twenty_kills_resume_to_the_same_bits(raw, tmp_path, warm):
    raw["train"]["steps"], raw["eval"] = STEPS, {"every_steps": 5, "tokens": 40}
    raw["checkpoint"] = {"every_steps": 1, "keep": 1000}
    whole = tmp_path / "whole"
    begun = time.monotonic()
    code, _, err = warm.run(command(raw, whole), tmp_path, call=DRAW)
    seconds = time.monotonic() - begun
    assert code == 0, err
    expected = {path.name: identity(path) for path in whole.glob("step-*")}
    assert len(expected) == STEPS

    rng, out, runs = random.Random(SEED), tmp_path / "killed-0", 1
    kills = in_write = resumed = 0
    compared, finished = set(), False
    while (killing := kills < KILLS or in_write < IN_WRITE) or not finished:
        assert kills < 3 * KILLS, f"{in_write} of {kills} kills in a write"
        in_a_write = kills % 3 == 2 or kills >= KILLS
        before, step = (
            unfinished(out),
            max((int(name[5:]) for name in listing(out) if name.startswith("step-")), default=0),
        )
        # In a write with old checkpoints to drop: all of them have been compared.
        child = warm.start(
            command(raw, out, **{"checkpoint.keep": 3 if in_a_write and killing else 1000}), tmp_path, call=DRAW
        )
        if killing:
            if in_a_write:
                wait_for_a_write(child, out, step + rng.randint(2, 3), before)
                time.sleep(rng.choice((0, 0, 0.005, 0.02)))
            else:
                time.sleep(rng.uniform(0, seconds / 4))
            with contextlib.suppress(ProcessLookupError):  # the run has come to its end meanwhile
                os.kill(child.pid, signal.SIGKILL)
        code, _, err = child.wait()
        assert code in (0, -signal.SIGKILL), err
        finished = code == 0
        resumed += "resumed" in err
        in_write += not finished and bool(unfinished(out) - before)
        kills += not finished

        last = checkpoint.latest(out) if out.is_dir() else None
        for path in out.glob("step-*"):
            if path not in compared:
                assert identity(path) == expected[path.name], f"{path.name} after {kills} kills"
                compared.add(path)
        if last:
            reached = int(last.name[5:])
            assert records(out, reached) == records(whole, reached)
        if finished:
            assert last.name == checkpoint.step_name(STEPS)
            assert not unfinished(out)
            if kills < KILLS or in_write < IN_WRITE:
                out, runs = tmp_path / f"killed-{runs}", runs + 1
    print(f"{kills} kills, {in_write} in a write, {resumed} resumes, {runs} runs, {len(compared)} checkpoints compared")
    assert resumed >= 3
