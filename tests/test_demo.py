"""The main job, end to end on a small budget: `glmx demo` in a subprocess, then everything it must leave behind.

The checkpoint is compared with transformers on held-out text, as a user would load it.
"""

from __future__ import annotations

import ast
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tiny_glm import index_scores

TOKENS = 40_960  # twenty steps
SNIPPETS = 50


def demo(out: Path, *options: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "glmx.cli.main", "demo", "--out", str(out), *options]
    return subprocess.run(command, capture_output=True, text=True, timeout=900)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """(OUT, what the demo printed)."""
    out = tmp_path_factory.mktemp("demo") / "out"
    done = demo(out, "--tokens", str(TOKENS))
    assert done.returncode == 0, done.stdout + done.stderr
    return out, done.stdout


@pytest.fixture(scope="module")
def checkpoint(finished: tuple[Path, str]) -> Path:
    run = finished[0] / "run"
    return run / (run / "latest").read_text().strip()


@pytest.fixture(scope="module")
def snippets(checkpoint: Path) -> list[list[int]]:
    """Fifty held-out pieces of 16 to 512 tokens."""
    from glmx.data import corpus
    from glmx.data.tokenizer import Tokenizer

    tokenizer = Tokenizer.from_dir(checkpoint)
    ids = [i for document in corpus.load().heldout[:40] for i in tokenizer.encode(document.text)]
    lengths = [16 + round(496 * i / (SNIPPETS - 1)) for i in range(SNIPPETS)]
    starts = [i * (len(ids) - 512) // SNIPPETS for i in range(SNIPPETS)]
    return [ids[start : start + length] for start, length in zip(starts, lengths, strict=True)]


def test_it_leaves_a_checkpoint_a_plot_and_a_completion(finished: tuple[Path, str], checkpoint: Path) -> None:
    out, printed = finished
    assert (out / "demo.png").read_bytes().startswith(b"\x89PNG")
    for name in ("config.json", "tokenizer.json", "chat_template.jinja", "trainer"):
        assert (checkpoint / name).exists(), name
    tokens = re.search(r"a completion of (\d+) tokens", printed)
    assert tokens and int(tokens[1]) >= 64
    for phrase in ("held-out bits per byte", "gzip -9", "xz -9", "5-gram", "of 20 completions", "sha256", "MaxVio"):
        assert phrase in printed, phrase
    assert f"{TOKENS:,} tokens" in printed
    check_drafts(printed)
    check_speed(printed)


def check_speed(printed: str) -> None:
    """Tokens per second without drafts, with one, with an adapted number, and their ratios."""
    found = re.search(
        r"decoding +([\d,]+) tokens/s without drafts, ([\d,]+) with one a step \(([\d.]+)x\), "
        r"([\d,]+) with as many as pay off \(([\d.]+)x\): medians of 5 rounds in turns, 128 tokens each",
        printed,
    )
    assert found, printed
    plain, one, of_one, auto, of_auto = (float(value.replace(",", "")) for value in found.groups())
    assert plain > 0 and abs(one / plain - of_one) < 0.02 and abs(auto / plain - of_auto) < 0.02


def check_drafts(printed: str) -> None:
    """Shares of three drafts, none above the one before, and what they make of a forward."""
    found = re.search(
        r"accepts draft 1, 2, 3 .* at ([\d.]+)%, ([\d.]+)%, ([\d.]+)% of ([\d,]+) places .*: ([\d.]+) tokens", printed
    )
    assert found and int(found[4].replace(",", "")) > 4000, printed
    shares = [float(share) / 100 for share in found.groups()[:3]]
    assert 1 > shares[0] >= shares[1] >= shares[2] >= 0
    assert abs(float(found[5]) - 1 - sum(shares)) < 0.01


def test_the_same_command_resumes_and_adds_nothing(finished: tuple[Path, str]) -> None:
    out, _ = finished
    log = (out / "run" / "log.jsonl").read_text()
    again = demo(out, "--tokens", str(TOKENS))
    assert again.returncode == 0, again.stdout + again.stderr
    assert (out / "run" / "log.jsonl").read_text() == log


def test_its_attention_was_sparse(finished: tuple[Path, str]) -> None:
    out, printed = finished
    config = json.loads((out / "model" / "config.json").read_text())
    assert config["model_type"] == "glm_moe_dsa" and config["index_topk"] == 64
    found = re.search(r"sparsity +(\d+)% of [\d,]+ held-out tokens .* hold ([\d.]+)% of their attention", printed)
    assert found and int(found[1]) > 50 and 10 < float(found[2]) < 100, printed
    kl = [
        json.loads(line)["indexer_kl"] for line in (out / "run" / "log.jsonl").read_text().splitlines() if "mtp" in line
    ]
    assert len(kl) == 20 and all(value > 0 for value in kl)


def test_its_mtp_layer_was_trained_in_three_steps(finished: tuple[Path, str]) -> None:
    log = [json.loads(line) for line in (finished[0] / "run" / "log.jsonl").read_text().splitlines()]
    first, last = (record["mtp_step_losses"] for record in (log[0], [r for r in log if "loss" in r][-1]))
    assert len(first) == 3 and all(b < a for a, b in zip(first, last, strict=True))


def check_against_transformers(checkpoint: Path, snippets: list[list[int]], monkeypatch: pytest.MonkeyPatch) -> int:
    """fp32 logits to 1e-4 and equal greedy ids on every snippet. Returns how many rows selected keys.

    Among the scores of hundreds of keys there are near ties, which either side's rounding decides. So transformers
    attends to the keys that we selected, after each of them was found to belong there by its own scores: none is
    below its own k-th best by more than 1e-4 of the row's largest score.
    """
    from transformers import AutoModelForCausalLM

    import glmx
    from glmx import ops

    theirs = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).eval()
    ours = glmx.load(checkpoint, dtype="fp32")
    made: list[torch.Tensor] = []
    select = ops.indexer_topk
    monkeypatch.setattr(ops, "indexer_topk", lambda *args, **kwargs: made.append(select(*args, **kwargs)) or made[-1])
    rows = 0

    def use_ours(indexer: torch.nn.Module, args: tuple, output: torch.Tensor) -> torch.Tensor:
        nonlocal rows
        T, k = output.shape[1:]
        if not made:  # as short as the lists: every key is selected
            assert k >= T
            return output
        lists = made.pop(0).long()
        scores = index_scores(indexer, *args[:3])[0]
        for t in range(k, T):
            seen = scores[t, : t + 1]
            assert len(lists[t].unique()) == k and int(lists[t].max()) <= t
            assert seen.sort(descending=True).values[k - 1] - seen[lists[t]].min() <= 1e-4 * seen.abs().max()
            rows += 1
        return torch.where(lists < 0, lists[:, :1], lists)[None].to(output.dtype)

    for layer in theirs.model.layers:
        if getattr(layer.self_attn, "indexer", None) is not None:
            layer.self_attn.indexer.register_forward_hook(use_ours)
    worst = 0.0
    with torch.no_grad():
        for ids in snippets:
            input_ids = torch.tensor([ids])
            found = ours(input_ids).logits
            expected = theirs(input_ids).logits
            assert not made, "transformers has fewer indexers"
            worst = max(worst, (expected - found).abs().max().item())
            assert torch.equal(expected.argmax(-1), found.argmax(-1))
    assert worst <= 1e-4, worst
    return rows


def test_transformers_computes_the_same_logits(
    checkpoint: Path, snippets: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = check_against_transformers(checkpoint, snippets, monkeypatch)
    assert rows == 2 * sum(max(len(ids) - 64, 0) for ids in snippets), "two of the four layers select"


def test_the_small_glm_4_5(tmp_path: Path, snippets: list[list[int]], monkeypatch: pytest.MonkeyPatch) -> None:
    """--arch glm4_moe: five steps, and transformers computes the same logits."""
    done = demo(tmp_path / "out", "--arch", "glm4_moe", "--tokens", "10240")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "glm4_moe" in done.stdout and "sparsity" not in done.stdout and "indexer" not in done.stdout
    check_drafts(done.stdout)
    run = tmp_path / "out" / "run"
    assert check_against_transformers(run / (run / "latest").read_text().strip(), snippets, monkeypatch) == 0
    assert len(json.loads((run / "log.jsonl").read_text().splitlines()[0])["mtp_step_losses"]) == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--corpus", "EMPTY"], "--corpus"),
        (["--tokens", "5"], "--tokens 5: expected at least"),
        (["--minutes", "-1"], "--minutes -1: expected 0"),
        (["--device", "cuda:99"], "device 'cuda:99': "),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(tmp_path: Path, options: list[str], message: str) -> None:
    options = [str(tmp_path) if option == "EMPTY" else option for option in options]
    failed = demo(tmp_path / "out", *options)
    assert failed.returncode == 2
    assert message in failed.stderr and len(failed.stderr.strip().splitlines()) == 1
    assert not (tmp_path / "out").exists() or not any((tmp_path / "out").iterdir())


def test_a_run_cut_short_says_which_token_count_it_reached(tmp_path: Path) -> None:
    """On a corpus of its own, which is smaller and so is measured sooner."""
    size = 0
    for file in sorted(Path(ast.__file__).parent.glob("*.py")):
        if size < 3_200_000:
            (tmp_path / "corpus").mkdir(exist_ok=True)
            size += (tmp_path / "corpus" / file.name).write_bytes(file.read_bytes())
    cut = demo(tmp_path / "out", "--minutes", "0.05", "--corpus", str(tmp_path / "corpus"))
    assert cut.returncode == 0, cut.stdout + cut.stderr
    reached = json.loads((tmp_path / "out" / "run" / "log.jsonl").read_text().splitlines()[-1])["tokens"]
    assert f"glmx after {reached:,} tokens" in cut.stdout
