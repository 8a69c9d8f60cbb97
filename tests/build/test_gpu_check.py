"""bench/gpu_check.sh without a GPU: what it asks for, stages that fail or hang, what it makes of reports, its table.

A program that answers like nvidia-smi stands in for the card.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import time

import pytest
from tests.build.tree import ROOT

CARD = "NVIDIA Test, 580.1, 1 MiB, 1 MHz, 1 W"


@pytest.fixture(scope="module")
def check():
    spec = importlib.util.spec_from_file_location("gpu_check", ROOT / "bench/gpu/check.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def fake(tmp_path):
    """An environment in which nvidia-smi and nvcc answer: the first like a card's, the second like a compiler."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for name, answer in (("nvidia-smi", CARD), ("nvcc", "Cuda compilation tools, release 13.0, V13.0.88")):
        (folder / name).write_text(f"#!/bin/sh\necho '{answer}'\n")
        (folder / name).chmod(0o755)
    return {**os.environ, "PATH": f"{folder}{os.pathsep}{os.environ['PATH']}", "PYTHON": sys.executable}


def run(env, *args):
    command = [str(ROOT / "bench/gpu_check.sh"), *map(str, args)]
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=120)


def rows(folder):
    return [json.loads(line) for line in (folder / "gpu_check.jsonl").read_text().splitlines()]


def test_what_is_missing_is_named(tmp_path):
    (tmp_path / "dirname").symlink_to("/usr/bin/dirname")
    done = run({"PATH": str(tmp_path), "PYTHON": sys.executable})
    assert done.returncode in (2, 127), "a machine without bash in its PATH cannot start it"
    done = subprocess.run(
        ["/bin/bash", str(ROOT / "bench/gpu_check.sh")],
        env={"PATH": str(tmp_path), "PYTHON": sys.executable},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2 and "nvidia-smi is not on the PATH" in done.stderr


def test_a_stage_that_fails_is_a_row_and_the_next_one_runs(fake, tmp_path):
    """nvcc compiles nothing here, so that neither probe can start."""
    done = run(fake, "--only", "ceilings,bits", "--commit", "abc123", "--out", tmp_path / "out")
    assert done.returncode == 1
    found = rows(tmp_path / "out")
    machine = next(row for row in found if row["name"] == "machine")
    assert (machine["card"], machine["driver"], machine["commit"], machine["nvcc"]) == (
        "NVIDIA Test",
        "580.1",
        "abc123",
        "13.0",
    )
    stages = {row["stage"]: row["ok"] for row in found if row["name"] == "stage"}
    assert stages == {"machine": True, "ceilings": False, "bits": False}
    assert all(row["error"] for row in found if row["name"] == "stage" and not row["ok"])
    assert "NVIDIA Test | 580.1" in done.stdout and "FAILED" in done.stdout


def test_an_unknown_stage_is_refused(fake, tmp_path):
    done = run(fake, "--only", "everything", "--out", tmp_path)
    assert done.returncode != 0 and "--only everything: expected some of machine, install" in done.stderr


@pytest.fixture
def made(check, tmp_path):
    return check.Check(check.argparse.Namespace(out=tmp_path, quick=False, only=None, commit="x"))


def test_a_stage_that_hangs_ends_with_its_children(check, made, monkeypatch, tmp_path):
    monkeypatch.setitem(check.LIMITS, "bits", 1)
    mark = tmp_path / "alive"
    script = f"sh -c 'sleep 4; touch {mark}' & sleep 30"
    begun = time.monotonic()
    assert not made.do("bits", lambda: made.run("sh", "-c", script))
    assert time.monotonic() - begun < 5 and "took longer than 1 s" in made.rows[-1]["error"]
    time.sleep(max(0, begun + 4.5 - time.monotonic()))
    assert not mark.exists(), "a child of the stage lived on"


def test_stages_without_glmx_run_and_the_others_say_why(check, made, monkeypatch):
    ran = []
    for name in ("machine", "ceilings", "bits", "install"):
        monkeypatch.setattr(made, name, lambda name=name: ran.append(name) if name != "install" else made.run("false"))
    made.all(["machine", "install", "ceilings", "bits", "tests", "bench_decode"])
    assert ran == ["machine", "ceilings", "bits"]
    said = {row["stage"]: row.get("error") for row in made.rows if row["name"] == "stage"}
    assert said["tests"] == said["bench_decode"] == "glmx is not installed" and said["install"] == "status 1"


def test_stages_come_with_what_they_need(check):
    assert check.planned(None) == list(check.LIMITS)
    assert check.planned("bits") == ["machine", "bits"]
    assert check.planned("tests") == ["machine", "install", "tests"]
    assert check.planned("bench_decode") == ["machine", "install", "ceilings", "bench_decode"]
    assert set(check.planned("bench")) == {"machine", "install", "ceilings", *check.BENCH_STAGES}


def test_it_fits_in_nine_minutes(check, made, monkeypatch):
    assert check.TOTAL < 540
    made.begun -= check.TOTAL - 20
    made.stage = "tests"
    assert made.limit() <= 20
    made.begun -= 20
    assert not made.do("bits", lambda: pytest.fail("ran"))
    assert made.rows[-1]["error"] == "no time left"


def test_reports_of_tests(check, tmp_path):
    report = tmp_path / "r.xml"
    report.write_text(
        "<testsuites><testsuite><testcase name='test_a[1]'/><testcase name='test_b'><failure message='boom&#10;more'/>"
        "</testcase><testcase name='test_c'><skipped message='no'/></testcase></testsuite></testsuites>"
    )
    assert check.junit(report) == [("test_a[1]", "passed", ""), ("test_b", "failed", "boom"), ("test_c", "skipped", "")]
    log = "[gw3] [ 12%] PASSED tests/gpu/x.py::test_a[1 b] \n[gw0] [100%] FAILED tests/gpu/x.py::test_b\nnoise\n"
    assert [(name.strip(), state) for name, state, _ in check.from_log(log)] == [
        ("test_a[1 b]", "passed"),
        ("test_b", "failed"),
    ]


def test_the_table_has_a_line_for_each_row(check):
    row = {"stage": "bench_decode", "table": "R7", "op": "moe_mlp", "shape": {"name": "GLM-5", "T": 4}}
    timed = {**row, "us": 12.5, "tb_per_s": 2.1, "ceiling": "read", "share": 0.49, "ratio": {"grouped_mm": 1.5}}
    said = check.table([timed, {**row, "skipped": "does not fit: 9 GB"}, {**row, "error": "ValueError: no"}])
    assert "moe_mlp GLM-5 T=4" in said and "2.1 TB/s" in said and "49%" in said and "grouped_mm 1.50x" in said
    assert "does not fit: 9 GB" in said and "ValueError: no" in said


def test_every_benchmark_runs_on_small_shapes(check):
    """On the CPU, for its results: a peer that disagrees, and an op that fails, are rows that say so."""
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT / "python"), os.environ.get("PYTHONPATH", "")])}
    for name in (*check.BENCHES, "ceilings"):
        command = [sys.executable, str(ROOT / f"bench/gpu/{name}.py"), "--device", "cpu"]
        done = subprocess.run(command, env=env, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-2000:]
        found = [json.loads(line) for line in done.stdout.splitlines()]
        assert found
        for row in found if name != "ceilings" else ():
            assert "us" in row and row["ratio"] and not row.get("peers_not_timed"), row
