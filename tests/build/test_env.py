"""`glmx env`, the four environment variables and GLMX_LOG=kernels, each in a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
from tests.build.tree import PACKAGE, output

from glmx import _native, runtime
from glmx.errors import ConfigError, UnsupportedError


def environment(**variables: str) -> dict[str, str]:
    clean = {name: value for name, value in os.environ.items() if name not in runtime.VARIABLES}
    return {**clean, "PYTHONPATH": str(PACKAGE.parent), **variables}


def facts(**variables: str) -> dict:
    return json.loads(output(sys.executable, "-m", "glmx", "env", "--json", env=environment(**variables)))


def failure(**variables: str) -> str:
    command = [sys.executable, "-m", "glmx", "env"]
    done = subprocess.run(command, env=environment(**variables), capture_output=True, text=True)
    assert done.returncode == 2 and done.stdout == "" and done.stderr.count("\n") == 1, done.stderr
    return done.stderr


@pytest.mark.parametrize("isa", _native.supported_isas())
def test_json_names_the_build_the_machine_and_the_kernels(isa):
    got = facts(GLMX_ISA=isa, GLMX_BACKEND="cpu")
    assert got["glmx"] == _native.build_info() and got["backend"] == "cpu"
    assert got["isa"] == {"active": isa, "machine": _native.machine_isa(), "supported": _native.supported_isas()}
    assert got["environment"] == {"GLMX_BACKEND": "cpu", "GLMX_ISA": isa, "GLMX_LOG": None, "GLMX_STRICT": None}
    assert got["kernels"] == _native.kernel_table(isa)
    assert got["devices"][0]["device"] == "cpu" and got["devices"][0]["threads"] >= 1
    assert got["numerics_id"] == runtime.numerics_id(), "one id for every instruction set: they give the same bits"


def test_text_shows_the_same(capsys):
    from glmx.cli.main import main

    assert main(["env"]) == 0
    text = capsys.readouterr().out
    for word in (_native.cpu_model(), _native.active_isa(), runtime.numerics_id(), *runtime.VARIABLES):
        assert word in text
    for row in _native.kernel_table():
        assert row["op"] in text


def test_numerics_id_follows_the_revisions(monkeypatch):
    before = runtime.numerics_id()
    assert before.startswith("x86-") and runtime.numerics_id("bf16") == f"{before}-bf16"
    changed = {**_native.op_revisions(), "rms_norm": 99}
    monkeypatch.setattr(_native, "op_revisions", lambda: changed)
    assert runtime.numerics_id() != before
    with pytest.raises(ValueError, match="dtype.*fp16"):
        runtime.numerics_id("fp16")


class Core:
    """glmx._native of a build that has `built` and sees `cards`."""

    def __init__(self, built=(), cards=()):
        self.backends, self.gpu_devices = (lambda: ["cpu", *built]), (lambda: list(cards))
        self.loaded = []
        self.load_simt = self.loaded.append


def test_a_backend_that_is_not_here_is_refused_by_name_and_reason(monkeypatch, tmp_path):
    card = {"device": "cuda:0", "name": "NVIDIA H200", "architecture": 90}
    with pytest.raises(UnsupportedError, match="^GLMX_BACKEND=hip: this build has no hip backend$"):
        runtime.check_backend("hip", Core(["cuda"], [card]))
    with pytest.raises(UnsupportedError, match="^GLMX_BACKEND=cuda: this build has it, but finds no GPU"):
        runtime.check_backend("cuda", Core(["cuda"]))
    runtime.check_backend("cuda", Core(["cuda"], [card]))
    for wanted in (None, "auto", "cpu"):
        runtime.check_backend(wanted, Core())
    monkeypatch.setattr(runtime, "_SIMT", tmp_path / "libglmx_simt.so")
    core = Core()
    with pytest.raises(UnsupportedError, match="^GLMX_BACKEND=simt:reverse: .*libglmx_simt.so is not built"):
        runtime.check_backend("simt:reverse", core)
    runtime._SIMT.touch()
    runtime.check_backend("simt:reverse", core)
    assert core.loaded == [str(runtime._SIMT)]


@pytest.mark.parametrize("value", ["simt", "simt:reverse", "simt:random", "simt:sm80", "simt:random:sm80"])
def test_simt_names_an_order_of_threads_and_a_card(value):
    assert runtime.read_settings({"GLMX_BACKEND": value}).backend == value


@pytest.mark.parametrize(
    "wanted, built, cards, gpu, force",
    [
        (None, ["cuda"], [1], "cuda", "cuda"),
        (None, ["cuda"], [], "cuda", "cpu"),
        ("cpu", ["cuda"], [1], None, "cpu"),
        (None, [], [], None, "cpu"),
        ("simt", ["cuda", "simt"], [], "cuda", "simt"),
    ],
)
def test_the_backend_in_force(monkeypatch, wanted, built, cards, gpu, force):
    monkeypatch.setattr(runtime, "native", lambda: Core(built, cards))
    monkeypatch.setattr(runtime, "settings", runtime.read_settings({"GLMX_BACKEND": wanted or ""}))
    assert runtime.gpu_backend() == gpu and runtime.backend() == force


@pytest.mark.parametrize(
    "name, value", [("GLMX_BACKEND", "tpu"), ("GLMX_BACKEND", "simt:up"), ("GLMX_LOG", "all"), ("GLMX_STRICT", "yes")]
)
def test_unknown_values_are_refused_with_the_known_ones(name, value):
    with pytest.raises(ConfigError, match=f"{name}={value}: expected one of "):
        runtime.read_settings({name: value})


def test_empty_is_unset():
    assert runtime.read_settings(dict.fromkeys(runtime.VARIABLES, "")) == runtime.read_settings({})


def test_the_command_prints_one_line_and_exits_2():
    assert "GLMX_BACKEND=hip" in failure(GLMX_BACKEND="hip")
    assert "GLMX_ISA=sse9" in failure(GLMX_ISA="sse9")


def test_ops_refuse_a_backend_before_any_op_runs():
    code = "import glmx.ops"
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment(GLMX_BACKEND="hip"), capture_output=True, text=True
    )
    assert done.returncode != 0 and "UnsupportedError: GLMX_BACKEND=hip" in done.stderr


CALLS = """
import torch
from glmx import ops
for dtype in (torch.float32, torch.bfloat16, torch.bfloat16):
    x = torch.ones(2, 8, dtype=dtype, requires_grad=True)
    ops.rms_norm(x, torch.ones(8, dtype=dtype), 1e-5).sum().backward()
    ops.linear(torch.ones(2, 8, dtype=dtype), torch.ones(3, 8, dtype=dtype))
ops.expert_plan(torch.zeros(2, 1, dtype=torch.int32), 1)
"""


def test_log_names_each_kernel_once():
    environ = environment(GLMX_LOG="kernels", GLMX_ISA="base")
    done = subprocess.run([sys.executable, "-c", CALLS], env=environ, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    lines = [line for line in done.stderr.splitlines() if line.startswith("glmx: ")]
    ops = ("expert_plan", "grouped_gemm bf16", "grouped_gemm fp32", "rms_norm", "rms_norm_backward")
    assert sorted(lines) == [f"glmx: {op} -> cpu/base" for op in ops]
    quiet = subprocess.run([sys.executable, "-c", CALLS], env=environment(), capture_output=True, text=True)
    assert quiet.returncode == 0 and "glmx:" not in quiet.stderr


def test_every_torch_op_finds_its_kernel():
    import torch

    import glmx.ops  # noqa: F401

    names = {
        name.split("::")[1].split(".")[0] for name in torch._C._dispatch_get_all_op_names() if name.startswith("glmx::")
    }
    assert "rope_cos_sin" in names
    for name in names - {"watch"}:  # what a recording asks about, no computation
        row = runtime.kernel_of(name, "bf16")
        assert row is not None and name.startswith(row["op"]), name
    assert runtime.kernel_of("rope_cos_sin", "fp32")["op"] == "rope"
    assert runtime.kernel_of("add_rms_norm", "fp32")["op"] == "add_rms_norm"
