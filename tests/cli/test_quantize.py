"""glmx quantize as a command: its table, its report on disk, and one line for every mistake."""

from __future__ import annotations

import json

import pytest
import torch

from glmx.cli import main as cli
from glmx.data import tokenizer as tokenizers
from glmx.models import checkpoint
from tiny_glm import random_model, tiny_config

WORDS = "the quick brown fox jumps over the lazy dog, \n"


@pytest.fixture
def model(tmp_path):
    """A checkpoint with a tokenizer, and a text beside it."""
    tokenizer = tokenizers.bytes_only()
    tokenizer.save(tmp_path / "tokenizer")
    config = tiny_config(vocab_size=tokenizer.vocab_size, use_qk_norm=True)
    checkpoint.save(random_model(config, 1, torch.bfloat16), tmp_path / "bf16", tmp_path / "tokenizer")
    (tmp_path / "text.txt").write_text(WORDS * 60)
    return tmp_path


def run(model, *options, source="bf16", to="int4"):
    return cli.main(["quantize", str(model / source), "--to", to, "--out", str(model / "q"), *map(str, options)])


def test_rounded_to_nearest(model, capsys):
    assert run(model, to="int8") == 0
    out = capsys.readouterr().out
    assert "relative error of weights, in %" in out and "bits per byte" not in out
    said = json.loads((model / "q" / "quantization.json").read_text())
    assert said["to"] == "int8" and said["rounding"] == "nearest" and said["layers"].keys() == {"0", "1", "2", "3"}
    layer = [line for line in out.splitlines() if line.startswith("│ 1 ")][0].split("│")
    kinds = said["layers"]["1"]
    attention = [kinds[f"self_attn.{p}_proj"]["weights"] for p in "qkvo"]
    assert min(attention) <= float(layer[2]) / 100 + 1e-4 and float(layer[2]) / 100 <= max(attention) + 1e-4
    assert not layer[3].strip() and layer[4].strip() and layer[5].strip(), "a MoE layer has no dense MLP"
    kept = {"config.json", "generation_config.json", "model.safetensors", "quantization.json"}
    assert {file.name for file in (model / "q").iterdir()} >= kept | {"tokenizer.json", "tokenizer_config.json"}


def test_calibrated(model, capsys):
    assert run(model, "--calibrate", model / "text.txt", "--calibrate-tokens", 1024) == 0
    out = capsys.readouterr().out
    said = json.loads((model / "q" / "quantization.json").read_text())
    bits = said["bits_per_byte"]
    assert "relative error of weights, of outputs, in %" in out and said["calibration_tokens"] == 1024
    assert f"bits per byte on the last tenth of the text: {bits['before']:.4f} before, {bits['after']:.4f} after" in out
    assert f"{bits['nearest']:.4f} if only rounded to nearest" in out

    import glmx
    from glmx.eval.bits_per_byte import bits_per_byte

    tokenizer, text = tokenizers.Tokenizer.from_dir(model / "bf16"), WORDS * 60
    expected = bits_per_byte(glmx.load(model / "bf16"), tokenizer, text[len(text) * 9 // 10 :])
    assert bits["before"] == expected and 0 < abs(bits["after"] - expected) < abs(bits["nearest"] - expected)


@pytest.mark.parametrize(
    "options, words",
    [
        (["--calibrate", "nowhere"], "--calibrate 'nowhere': No such file or directory"),
        (
            ["--calibrate", "short.txt"],
            "--calibrate 'short.txt': nine tenths of it are 7 tokens, expected at least 512",
        ),
        (["--calibrate", "bytes.txt"], "--calibrate 'bytes.txt': not UTF-8 text at byte 2"),
        (["--calibrate", "text.txt", "--calibrate-tokens", "99"], "--calibrate-tokens 99: expected at least 512"),
        (["--calibrate-tokens", "1000"], "--calibrate-tokens 1000: it goes with --calibrate TEXTFILE"),
        (["--calibrate", "text.txt", "-"], "bf16: no tokenizer.json"),
    ],
)
def test_mistakes_are_one_line_and_leave_nothing(model, options, words, capsys, monkeypatch):
    monkeypatch.chdir(model)
    (model / "short.txt").write_text("hello")
    (model / "bytes.txt").write_bytes(b"ab\xff")
    if options[-1] == "-":
        (model / "bf16" / "tokenizer.json").unlink()
        options = options[:-1]
    there = sorted(model.rglob("*"))
    assert run(model, *options) == 2
    said = capsys.readouterr().err
    assert said.startswith("glmx quantize: ") and words in said and said.count("\n") == 1
    assert sorted(model.rglob("*")) == there


def test_a_tokenizer_of_another_model_is_named(model, capsys):
    config = json.loads((model / "bf16" / "config.json").read_text())
    other = random_model(tiny_config(vocab_size=96), 1, torch.bfloat16)
    checkpoint.save(other, model / "other", model / "tokenizer")
    assert config["vocab_size"] > 96 and run(model, "--calibrate", model / "text.txt", source="other") == 2
    assert "the model's vocab_size is 96" in capsys.readouterr().err


@pytest.mark.parametrize("to", ["int3", "fp8"])
def test_other_formats_are_usage_errors(model, to, capsys):
    with pytest.raises(SystemExit):
        run(model, to=to)
    assert f"argument --to: invalid choice: '{to}' (choose from" in capsys.readouterr().err
