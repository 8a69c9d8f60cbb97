"""The benchmark harness: alternated medians, saved ratios, and a planted slowdown that must be flagged."""

from __future__ import annotations

import dataclasses
import subprocess
import sys

import pytest
import torch
from tests.build.tree import ROOT

sys.path.insert(0, str(ROOT / "bench"))
import harness


def row(ratio: float, **changes) -> harness.Row:
    base = harness.Row("gemm", "a machine", "avx2", 2, 3, 0.1, 50.0, "GFLOP/s", "tree_avx2", 0.5, {"peer": ratio})
    return dataclasses.replace(base, **changes)


def test_the_ratio_is_the_median_of_the_rounds():
    """A round in which the machine halved its speed for both leaves the ratio alone."""
    assert harness.median_ratios([1.0, 2.0, 1.0], {"peer": [3.0, 6.0, 90.0]}) == {"peer": 3.0}


def test_a_planted_slowdown_is_flagged_and_not_saved(tmp_path):
    path = tmp_path / "results.jsonl"
    harness.save([row(1.4)], path)
    twice_as_slow = harness.median_ratios([2.0, 2.0, 2.0], {"peer": [1.4, 1.4, 1.4]})
    slow = row(twice_as_slow["peer"])
    slow.flagged = harness.flag(slow, harness.last_saved(path)[harness.key(slow)])
    assert slow.flagged == ["peer: 0.70x, was 1.40x"]
    assert "SLOWER THAN BEFORE  gemm" in harness.table([slow])
    harness.save([slow], path)
    assert harness.last_saved(path)[harness.key(slow)].ratio == {"peer": 1.4}


@pytest.mark.parametrize("ratio", [1.4, 1.25, 3.0])
def test_noise_is_not_flagged(ratio):
    assert harness.flag(row(ratio), row(1.4)) == []


def test_a_peer_that_computes_something_else_is_not_timed():
    ids, x = torch.arange(5), harness.values(5, 64)
    harness.agree("peer", (ids.int(), x.float()), (ids, x))
    with pytest.raises(AssertionError, match="peer, result 0: other integers"):
        harness.agree("peer", ids, ids.flip(0))
    for other in (x * 1.02, x.clone().fill_(float("nan"))):
        with pytest.raises(AssertionError, match="peer, result 1: .* away from glmx"):
            harness.agree("peer", (ids, x), (ids, other))
    with pytest.raises(AssertionError, match=r"result 0: \[5, 32\], glmx has \[5, 64\]"):
        harness.agree("peer", x, x[:, :32])


def test_rows_of_another_machine_or_kernel_are_not_compared():
    assert len({harness.key(row(1.0)), harness.key(row(1.0, machine="b")), harness.key(row(1.0, kernel="amx"))}) == 3


def test_the_document_has_a_line_for_each_row():
    text = harness.document([row(1.4), row(0.9, name="attention", unfit={"other": 5}, note="said")], "pytest bench")
    numbers = "avx2 | 2 | 3 | 100 | 50.0 GFLOP/s | 50 % of tree_avx2"
    assert f"| gemm | {numbers} | peer 1.40x |" in text
    assert f"| attention | {numbers} | peer 0.90x, other does not fit: 5 bytes, said |" in text


def test_a_command_replaces_its_own_table_alone():
    first = harness.document([row(1.4)], "pytest bench")
    both = harness.document([row(1.2, name="attention")], "pytest bench -k attention", first)
    assert both.startswith(first.rstrip()) and both.count("## ") == 2 and "| attention |" in both
    again = harness.document([row(1.6)], "pytest bench", both)
    assert again == both.replace("peer 1.40x", "peer 1.60x")


def test_the_quick_selection_names_benchmarks_that_exist():
    options = [
        "bench",
        "--quick",
        "--threads",
        "1,2",
        "--collect-only",
        "-o",
        "addopts=",
        "--import-mode=importlib",
        "-q",
    ]
    done = subprocess.run([sys.executable, "-m", "pytest", *options], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "bench_moe.py::test_forward[1-small-1-15]" in done.stdout
    assert "wide" not in done.stdout
