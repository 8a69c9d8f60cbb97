"""The command line: help without torch, one-line errors, exit codes."""

from __future__ import annotations

import subprocess
import sys

import numpy
import pytest
import torch
from tests.played_cuda import a_card

from glmx.cli import env
from glmx.cli import main as cli
from glmx.errors import CheckpointError


def test_help_loads_no_torch():
    code = (
        "import sys; from glmx.cli.main import main\n"
        "try: main(['--help'])\n"
        "except SystemExit as e: assert e.code == 0\n"
        "assert 'torch' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for command in cli.COMMANDS:
        assert command in done.stdout


@pytest.mark.parametrize(
    "argv, words",
    [
        ([], "COMMAND"),
        (["fly"], "invalid choice: 'fly'"),
        (["generate"], "MODEL"),
        (["generate", "m", "--prompt", "p", "--max-tokens", "many"], "'many'"),
    ],
)
def test_usage_errors_are_one_line(argv, words, capsys):
    with pytest.raises(SystemExit) as exit_info:
        cli.main(argv)
    assert exit_info.value.code == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and words in err


def test_generate_has_a_flag_for_every_rule_of_sampling(monkeypatch):
    from glmx.serve import llm

    seen = []

    class Recorder:
        def __init__(self, *args, **options): ...

        def stream(self, prompt, params):
            seen.append(params)
            return iter(())

    monkeypatch.setattr(llm, "LLM", Recorder)
    rules = {"max_tokens": 3, "temperature": 0.5, "top_p": 0.9, "top_k": 7, "min_p": 0.1, "seed": 5}
    rules |= {"repetition_penalty": 1.5, "presence_penalty": -0.5, "frequency_penalty": 0.25}
    flags = [word for name, value in rules.items() for word in ("--" + name.replace("_", "-"), str(value))]
    biases = ["--logit-bias", "5=3", "--logit-bias", "9=-2.5"]
    assert cli.main(["generate", "m", "--prompt", "p", *flags, *biases]) == 0
    assert cli.main(["generate", "m", "--prompt", "p"]) == 0
    assert seen[0] == llm.SamplingParams(**rules, logit_bias={5: 3.0, 9: -2.5})
    assert seen[1] == llm.SamplingParams(max_tokens=128, temperature=0.0, seed=0)


def test_a_users_mistake_is_one_line_and_traceback_is_on_request(monkeypatch, capsys):
    from glmx.cli import generate

    def fail(args):
        raise CheckpointError("no config.json in\n'nowhere'")

    monkeypatch.setattr(generate, "run", fail)
    argv = ["generate", "nowhere", "--prompt", "x"]
    assert cli.main(argv) == 2
    assert capsys.readouterr().err == "glmx generate: no config.json in 'nowhere'\n"
    with pytest.raises(CheckpointError):
        cli.main(["--traceback", *argv])


@pytest.mark.parametrize(
    "allocate, words",
    [
        (lambda: bytes(2**62), "out of memory"),
        (lambda: numpy.empty(2**48), "out of memory: Unable to allocate 2.00 PiB"),
        (lambda: torch.empty(2**60), f"out of memory: could not allocate {4 * 2**60} bytes"),
    ],
)
def test_no_memory_is_one_line(monkeypatch, capsys, allocate, words):
    from glmx.cli import env

    monkeypatch.setattr(env, "run", lambda args: allocate())
    assert cli.main(["env"]) == 2
    err = capsys.readouterr().err
    assert err.startswith(f"glmx env: {words}") and err.count("\n") == 1


def test_a_fault_of_the_program_keeps_its_traceback(monkeypatch):
    from glmx.cli import env

    monkeypatch.setattr(env, "run", lambda args: (_ for _ in ()).throw(RuntimeError("a bug")))
    with pytest.raises(RuntimeError, match="a bug"):
        cli.main(["env"])


def test_interrupt_exits_130(monkeypatch):
    from glmx.cli import generate

    def interrupt(args):
        raise KeyboardInterrupt

    monkeypatch.setattr(generate, "run", interrupt)
    assert cli.main(["generate", "m", "--prompt", "x"]) == 130


def test_the_demo_on_a_gpu_names_the_architecture_to_ask_for(tmp_path, capsys):
    with a_card():
        assert cli.main(["demo", "--device", "cuda", "--out", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert error == "glmx demo: --device cuda: glm_moe_dsa runs on cpu so far; add --arch glm4_moe\n"
    assert not (tmp_path / "out").exists()


def test_a_full_gpu_is_one_line(monkeypatch, capsys):
    """torch's own message goes on for a paragraph about its allocator."""
    words = (
        "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 139.80 GiB of which 1 is free."
    )

    def fails(args):
        raise torch.OutOfMemoryError(words)

    monkeypatch.setattr(env, "run", fails)
    assert cli.main(["env"]) == 2
    assert capsys.readouterr().err == "glmx env: out of memory: could not allocate 2.00 GiB\n"
