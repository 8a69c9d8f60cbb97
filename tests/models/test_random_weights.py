"""glmx make-random: shapes, spread and place of what is written, and a checkpoint that runs."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file

import glmx
from glmx.data.tokenizer import Tokenizer
from glmx.errors import CheckpointError
from glmx.models import checkpoint, compressed, layout, random_weights
from glmx.models.safetensors import INDEX, SINGLE, read_header
from glmx.reference import stored_weight
from tiny_glm import CASES, FAMILIES, tiny_config

SIZES = {"hidden_size": 256, "intermediate_size": 200, "moe_intermediate_size": 136}  # partial groups of 72 and 8


def written(config, directory, to, **options):
    directory.mkdir()
    size = random_weights.write(config, directory, to, **options)
    tensors = {key: tensor for file in directory.glob("*.safetensors") for key, tensor in load_file(file).items()}
    assert size == sum(tensor.nbytes for tensor in tensors.values())
    return tensors


@pytest.mark.parametrize("to", ["bf16", "int8", "int4"])
@pytest.mark.parametrize("case", FAMILIES)
def test_names_shapes_and_spread(case, to, tmp_path):
    config = tiny_config(**CASES[case], **SIZES, initializer_range=0.05)
    tensors = written(config, tmp_path / to, to)
    seen = set()
    for key, shape in layout.tensors(config):
        few = compressed.is_quantised(key) and to != "bf16"
        if few and to == "int4":
            words, scale, size = (tensors[key + part] for part in ("_packed", "_scale", "_shape"))
            assert size.tolist() == list(shape) and words.dtype == torch.int32 and scale.dtype == torch.bfloat16
            seen |= {key + part for part in ("_packed", "_scale", "_shape")}
            weight, _ = stored_weight.matrix("int4", words, scale, shape[1])
        elif few:
            assert tensors[key].dtype == torch.int8
            weight = tensors[key] * tensors[f"{key}_scale"]
            seen |= {key, f"{key}_scale"}
        else:
            weight = tensors[key]
            seen |= {key}
            assert weight.dtype == (torch.float32 if key.endswith(layout.CORRECTION_BIAS) else torch.bfloat16)
        assert weight.shape == shape, key
        if len(shape) == 1:
            assert (weight == (1.0 if key.endswith("norm.weight") else 0.0)).all(), key
        elif weight.numel() > 10_000:
            assert weight.float().std().item() == pytest.approx(0.05, rel=0.05), key
            assert len(weight.unique(dim=0)) == len(weight), f"{key} has equal rows"
    assert seen == tensors.keys()
    names = [f"model.layers.1.mlp.experts.{e}.up_proj.weight" + ("_packed" if to == "int4" else "") for e in (0, 1)]
    assert not torch.equal(*(tensors[name] for name in names)), "experts differ"


def test_aligned_sharded_and_longer_than_a_block(tmp_path, monkeypatch):
    config = tiny_config(model_type="glm4_moe_lite", **SIZES)
    whole = written(config, tmp_path / "whole", "int4", seed=7)
    file = tmp_path / "whole" / SINGLE
    data = 8 + int.from_bytes(file.read_bytes()[:8], "little")
    large = {name: entry for name, entry in read_header(file).items() if (entry.end - entry.start) % 64 == 0}
    assert len(large) > 50 and all((data + entry.start) % 64 == 0 for entry in large.values())

    shards = written(config, tmp_path / "shards", "int4", seed=7, max_shard_bytes=100_000)
    index = json.loads((tmp_path / "shards" / INDEX).read_text())
    assert len(set(index["weight_map"].values())) > 5 and index["weight_map"].keys() == whole.keys()
    assert all(torch.equal(whole[key], shards[key]) for key in whole)
    other = written(config, tmp_path / "other", "int4", seed=8)
    assert any(not torch.equal(whole[key], other[key]) for key in whole)

    monkeypatch.setattr(random_weights, "_BLOCK", 2**12)  # shorter than most matrices
    short = written(config, tmp_path / "short", "int4", seed=7)
    assert {key: (t.dtype, t.shape) for key, t in short.items()} == {
        key: (t.dtype, t.shape) for key, t in whole.items()
    }


def make(config, tmp_path, *options):
    from glmx.cli import main as cli

    (tmp_path / "config.json").write_text(json.dumps(config))
    return cli.main(["make-random", str(tmp_path / "config.json"), "--out", str(tmp_path / "out"), *options])


def test_the_command_writes_what_loads_and_generates(tmp_path, capsys):
    """An FP8 repository's config.json; what it says of its weights is not true of ours."""
    config = tiny_config(**CASES["lite"], vocab_size=400, dtype="bfloat16", eos_token_id=(3, 5))
    table = {**config.to_dict(), "torch_dtype": "bfloat16", "quantization_config": {"quant_method": "fp8"}, "zai": 1}
    assert make(table, tmp_path, "--to", "bf16") == 0
    assert capsys.readouterr().out.startswith(f"{tmp_path}/out: 0 M random parameters in bf16, ")
    kept = json.loads((tmp_path / "out" / "config.json").read_text())
    assert "quantization_config" not in kept and "torch_dtype" not in kept and kept["zai"] == 1
    llm = glmx.LLM(tmp_path / "out")
    (out,) = llm.generate(["hi"], glmx.SamplingParams(max_tokens=4, temperature=0, ignore_eos=True))
    assert len(out.outputs[0].token_ids) == 4 and llm.tokenizer.eos_ids == (3, 5)
    assert llm.tokenizer.decode(llm.tokenizer.encode("käse\n")) == "käse\n"
    assert "<|user|>" in llm.tokenizer.apply_chat_template([{"role": "user", "content": "hi"}])


def test_the_tokenizer_beside_the_config_is_kept(tmp_path):
    from glmx.data import tokenizer as tokenizers

    own = tokenizers.train(["abcabcabc" * 9], 285)
    own.save(tmp_path)
    assert make(tiny_config(vocab_size=400).to_dict(), tmp_path, "--to", "int4") == 0
    assert Tokenizer.from_dir(tmp_path / "out").sha256 == own.sha256
    kept = json.loads((tmp_path / "out" / "config.json").read_text())
    assert kept["quantization_config"] == compressed.config("int4") and kept["dtype"] == "bfloat16"


def test_a_vocabulary_without_room_for_bytes_has_no_tokenizer(tmp_path):
    assert make(tiny_config(vocab_size=96).to_dict(), tmp_path, "--to", "int8") == 0
    assert {file.name for file in (tmp_path / "out").iterdir()} == {"config.json", SINGLE}


def test_refusals_leave_nothing(tmp_path, monkeypatch, capsys):
    config = tiny_config().to_dict()
    there = ["config.json"]
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": 1000})())
    assert make(config, tmp_path, "--to", "int4") == 2
    said = capsys.readouterr().err
    assert said == (
        f"glmx make-random: the checkpoint takes 0.0 GB, the disk of '{tmp_path}' has 0.0 GB left\n"
    ) and there == [file.name for file in tmp_path.iterdir()]
    assert make({**config, "hidden_size": "big"}, tmp_path, "--to", "int4") == 2
    assert "hidden_size = 'big', expected an integer" in capsys.readouterr().err
    assert there == [file.name for file in tmp_path.iterdir()]
    with pytest.raises(SystemExit):
        make(config, tmp_path, "--to", "int3")
    assert "argument --to: invalid choice: 'int3' (choose from" in capsys.readouterr().err
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "x").touch()
    assert make(config, tmp_path, "--to", "int4") == 2 and "exists; choose another name" in capsys.readouterr().err


def test_a_write_that_fails_is_named(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / SINGLE).symlink_to("/dev/full")
    with pytest.raises(CheckpointError, match=rf"cannot write '.*{SINGLE}': No space left on device"):
        random_weights.write(tiny_config(), tmp_path / "out", "bf16")
    assert checkpoint.SHARD_BYTES == 5 * 2**30
