"""The examples run as a user runs them, from the root of the clone."""

from __future__ import annotations

import os
import pathlib
import re
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[1]

pytestmark = pytest.mark.xdist_group("examples")


def example(name: str, *args: str | os.PathLike) -> str:
    command = [sys.executable, f"examples/{name}.py", *map(str, args)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> tuple[pathlib.Path, str]:
    """The output folder of a short pretraining run, and what it printed."""
    folder = tmp_path_factory.mktemp("pretrain")
    options = ["--out", folder / "run", "--data.shards", folder / "data", "--train.tokens", "16384"]
    options += ["--eval.tokens", "2000", "--optim.warmup_tokens", "4096"]
    return folder / "run", example("pretrain", *options)


def test_moe_block_matches_transformers_learns_and_keeps_its_promises():
    out = example("moe_block")
    away = re.findall(r"transformers' Glm4MoeMoE, (\w+) +[\w ]+? +differs by (\S+) of the norm", out)
    assert len(away) == 8 and all(float(share) <= (1e-5 if dtype == "float32" else 2e-2) for dtype, share in away), out
    losses = [float(loss) for loss in re.findall(r"loss ([\d.]+)", out)]
    assert losses[-1] < 0.7 * losses[0], out
    busiest = [float(ratio) for ratio in re.findall(r"busiest expert ([\d.]+)", out)]
    assert busiest[-1] < 1.5, out
    assert out.count("True") == 2 and "False" not in out, out


def test_ops_take_arrays_of_cupy_or_numpy():
    out = example("cupy_arrays")
    assert re.search(r"^(cupy|numpy): ndarray \(33, 256\)", out, re.MULTILINE), out
    assert "skipped: CuPy" in out or "the same bits on another stream: True" in out, out


def test_a_needle_is_found_by_a_trained_indexer_alone():
    """Chance is 1/8, and a fresh indexer lists the needle in one of 16 cases. At 128 questions the standard deviation
    of either is below 4 %, so 35 % is over 4 of them away.
    """
    out = example("needle")
    found = {who: float(share) for who, share in re.findall(r"^(\w.*?)\s+([\d.]+)% of needles", out, re.MULTILINE)}
    assert len(found) == 3 and found["the trained indexer"] >= 95, out
    assert max(share for who, share in found.items() if who != "the trained indexer") <= 35, out


def test_pretrain_from_toml_leaves_a_checkpoint(run):
    folder, out = run
    assert "16,384 tokens" in out
    step = folder / (folder / "latest").read_text().strip()
    assert (step / "config.json").is_file() and (step / "tokenizer.json").is_file() and list(step.glob("*.safetensors"))


def test_generate_completes_from_the_run(run):
    out = example("generate", run[0], "def main():", "--max-tokens", "12")
    assert "12 tokens, length" in out or "tokens, stop" in out, out
    assert out.strip().endswith("alone and in a batch: equal")
