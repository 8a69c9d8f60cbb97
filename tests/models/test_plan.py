"""The memory plan: what it says against what is allocated."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch

import glmx
from glmx.cli import main as cli
from glmx.models import checkpoint
from glmx.models.plan import memory_plan
from stored_glm import FORMATS, write
from tiny_glm import CASES, random_model, tiny_config


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("case", CASES)
def test_weights_and_cache_are_what_is_allocated(case, dtype):
    config = tiny_config(**CASES[case])
    model = random_model(config, 0, dtype)
    plan = memory_plan(config, dtype, tokens=100, sequences=3, chunk=50)
    assert plan.weights == sum(parameter.nbytes for parameter in model.parameters())
    state = model.new_state(3, 100)
    assert plan.cache == sum(plane.nbytes for layer in state.layers for plane in layer.planes.values())
    assert plan.total == plan.weights + plan.cache + plan.activations


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("case", ["qk_norm_bias", "lite", "dsa_shared"])
def test_weights_of_a_quantised_checkpoint(case, format, tmp_path, capsys):
    """Scales and the MTP layer included; the correction biases are no weights. Without the files the config says it."""
    config = tiny_config(**CASES[case])
    write(random_model(config), tmp_path / "ckpt", format)
    model = glmx.load(tmp_path / "ckpt")
    expected = sum(t.nbytes for t in model.tensors()) - sum(buffer.nbytes for buffer in model.buffers())

    def planned(*options):
        assert cli.main(["plan", str(tmp_path / "ckpt"), "--tokens", "100", *options]) == 0
        return capsys.readouterr().out

    assert json.loads(planned("--json"))["weights"] == expected
    assert f"parameters in bfloat16 and {format}, MTP layer included" in planned()
    assert json.loads(planned("--json", "--dtype", "fp32"))["weights"] == 4 * config.num_parameters()
    (tmp_path / "ckpt" / checkpoint.SINGLE).unlink()
    assert json.loads(planned("--json"))["weights"] == expected


def test_activations_grow_with_the_chunk_and_not_with_the_context():
    config = tiny_config(**CASES["dsa"])
    sizes = [memory_plan(config, torch.float32, 10**6, chunk=chunk).activations for chunk in (1000, 2000, 3000)]
    assert sizes[0] < sizes[1] < sizes[2] and sizes[2] - sizes[1] == sizes[1] - sizes[0]
    short, long = (memory_plan(config, torch.float32, tokens, chunk=1000) for tokens in (10**4, 10**6))
    assert short.activations == long.activations and short.cache < long.cache
    one, five = (memory_plan(config, torch.float32, 1000, sequences=n, chunk=10) for n in (1, 5))
    assert five.activations - one.activations >= 4 * 4 * config.vocab_size, "fp32 logits of each sequence"
    drafted = memory_plan(config, torch.float32, 1000, sequences=5, chunk=10, drafts=3)
    assert drafted.activations - five.activations >= 5 * 3 * 4 * config.vocab_size, "and of each draft"


def test_bad_numbers():
    for name in ("tokens", "sequences", "chunk"):
        with pytest.raises(ValueError, match=f"{name} is 0, expected at least 1"):
            memory_plan(tiny_config(), torch.float32, **{"tokens": 1, name: 0})
    with pytest.raises(ValueError, match="drafts is -1, expected at least 0"):
        memory_plan(tiny_config(), torch.float32, 1, drafts=-1)


def test_the_command_needs_a_config_alone(tmp_path, capsys):
    config = replace(tiny_config(**CASES["dsa_shared"]), max_position_embeddings=300)
    directory = checkpoint.save(random_model(config), tmp_path / "ckpt")
    (directory / checkpoint.SINGLE).unlink()
    assert cli.main(["plan", str(directory), "--json"]) == 0
    plan = memory_plan(config, torch.float32, 300)
    assert json.loads(capsys.readouterr().out) == {
        "weights": plan.weights,
        "cache": plan.cache,
        "activations": plan.activations,
        "cache_per_token": plan.cache_per_token,
        "total": plan.total,
    }
    assert cli.main(["plan", str(directory), "--tokens", "128", "--sequences", "2", "--dtype", "bf16"]) == 0
    out = capsys.readouterr().out
    assert "glm_moe_dsa, 4 layers" in out and "2 sequences of 128 tokens" in out and "bfloat16" in out
    assert cli.main(["plan", str(directory), "--tokens", "0"]) == 2
    assert "tokens is 0, expected at least 1" in capsys.readouterr().err
