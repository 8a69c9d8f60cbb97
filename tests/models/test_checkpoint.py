"""Hugging Face directories: round trips, every spelling, transformers as the reader, and the errors."""

from __future__ import annotations

import json
import os
import stat

import pytest
import torch
from safetensors.torch import load_file, save_file

import glmx
from glmx.errors import CheckpointError, UnsupportedError
from glmx.models import checkpoint
from tiny_glm import CASES, FAMILIES, clear_cut, hf_twin, random_ids, random_model, tiny_config


def equal_models(a, b):
    first, second = a.state_dict(), b.state_dict()
    assert first.keys() == second.keys()
    return all(torch.equal(first[k], second[k]) and first[k].dtype == second[k].dtype for k in first)


@pytest.fixture
def saved(tmp_path):
    model = random_model(tiny_config(use_qk_norm=True, attention_bias=True), 1)
    return model, checkpoint.save(model, tmp_path / "ckpt")


def rewrite(directory, change):
    """Applies `change` to the dict of tensors of a one-file checkpoint."""
    file = directory / checkpoint.SINGLE
    tensors = load_file(file)
    change(tensors)
    save_file({k: v.contiguous() for k, v in tensors.items()}, file)


def reconfigure(directory, **values):
    file = directory / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("case", CASES)
def test_round_trip_is_bitwise(case, dtype, tmp_path):
    model = random_model(tiny_config(**CASES[case]), 2, dtype)
    checkpoint.save(model, tmp_path / "ckpt")
    loaded = glmx.load(tmp_path / "ckpt")
    assert loaded.dtype == dtype and not loaded.training and equal_models(model, loaded)
    names = {f.name for f in (tmp_path / "ckpt").iterdir()}
    assert names == {"config.json", "generation_config.json", "model.safetensors"}
    assert [f.name for f in tmp_path.iterdir()] == ["ckpt"]


@pytest.mark.parametrize("case", CASES)
def test_transformers_loads_what_we_save(case, tmp_path):
    transformers = pytest.importorskip("transformers")
    config = tiny_config(**CASES[case], eos_token_id=(3, 5), pad_token_id=0)
    model, _, ids = clear_cut(config, tokens=11, start=3)
    checkpoint.save(model, tmp_path / "ckpt")
    twin = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ckpt", attn_implementation="eager")
    assert twin.dtype == torch.float32
    assert twin.generation_config.eos_token_id == [3, 5] and twin.generation_config.pad_token_id == 0
    ours = hf_twin(model).state_dict()
    theirs = twin.state_dict()
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[k], theirs[k]) for k in ours)
    with torch.no_grad():
        assert (twin(ids).logits - model(ids).logits).abs().max() <= 1e-4


@pytest.mark.parametrize("case", FAMILIES)
def test_we_load_what_transformers_saves(case, tmp_path):
    pytest.importorskip("transformers")
    model = random_model(tiny_config(**CASES[case]), 4)
    hf_twin(model).save_pretrained(tmp_path)
    loaded = glmx.load(tmp_path)
    assert loaded.config.num_nextn_predict_layers == 0, "transformers saves no MTP layer"
    kept = model.state_dict()
    assert all(torch.equal(tensor, kept[name]) for name, tensor in loaded.state_dict().items())


def test_keys_on_disk_are_the_released_ones(saved):
    model, directory = saved
    tensors = load_file(directory / checkpoint.SINGLE)
    assert tensors["model.layers.1.mlp.experts.7.up_proj.weight"].shape == (24, 32)
    assert tensors["model.layers.0.mlp.gate_proj.weight"].shape == (48, 32)
    assert tensors["model.layers.3.eh_proj.weight"].shape == (32, 64)
    assert tensors["model.layers.3.mlp.gate.e_score_correction_bias"].dtype == torch.float32
    assert not any("gate_up" in key for key in tensors)


def test_sharded(saved, tmp_path):
    model, _ = saved
    checkpoint.save(model, tmp_path / "sharded", max_shard_bytes=100_000)
    files = sorted(f.name for f in (tmp_path / "sharded").glob("*.safetensors"))
    assert len(files) > 3 and files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    assert equal_models(model, glmx.load(tmp_path / "sharded"))
    transformers = pytest.importorskip("transformers")
    twin = transformers.Glm4MoeForCausalLM.from_pretrained(tmp_path / "sharded")
    assert torch.equal(twin.lm_head.weight, model.lm_head.weight)


def test_fused_experts_on_disk(saved):
    model, directory = saved

    def fuse(tensors):
        for layer in (1, 3):  # layer 2 stays per expert: both spellings in one checkpoint
            prefix = f"model.layers.{layer}.mlp.experts"
            for key in [k for k in tensors if k.startswith(prefix)]:
                del tensors[key]
            for part in ("gate_up_proj", "down_proj"):
                tensors[f"{prefix}.{part}"] = model.state_dict()[f"{prefix}.{part}"]

    rewrite(directory, fuse)
    assert equal_models(model, glmx.load(directory))


def test_copies_in_the_mtp_layer_are_optional_and_tied(saved):
    model, directory = saved
    keys = {
        "model.layers.3.embed_tokens.weight": model.model.embed_tokens.weight.detach(),
        "model.layers.3.shared_head.head.weight": model.lm_head.weight.detach(),
    }
    rewrite(directory, lambda tensors: tensors.update(keys))
    assert equal_models(model, glmx.load(directory))
    name = "model.layers.3.shared_head.head.weight"
    rewrite(directory, lambda tensors: tensors.update({name: keys[name] + 1}))
    with pytest.raises(UnsupportedError, match=name):
        glmx.load(directory)


def test_without_the_mtp_layer(saved):
    model, directory = saved
    rewrite(directory, lambda t: [t.pop(k) for k in list(t) if k.startswith("model.layers.3.")])
    loaded = glmx.load(directory)
    ids = random_ids(model.config, 1, 6)
    with torch.no_grad():
        assert torch.equal(loaded(ids).logits, model(ids).logits)
    with pytest.raises(ValueError, match="no MTP layer"):
        loaded(ids, mtp=True)


@pytest.mark.parametrize(
    "asked, expected",
    [("auto", torch.float32), ("bf16", torch.bfloat16), ("fp32", torch.float32), (torch.bfloat16,) * 2],
)
def test_dtype(saved, asked, expected):
    model, directory = saved
    loaded = glmx.load(directory, dtype=asked)
    assert {p.dtype for p in loaded.parameters()} == {expected}
    name = "model.layers.1.mlp.gate.e_score_correction_bias"
    assert torch.equal(loaded.state_dict()[name], model.state_dict()[name])
    assert torch.equal(loaded.lm_head.weight, model.lm_head.weight.to(expected))


def test_a_router_stored_in_fp32_stays_fp32(saved):
    model, directory = saved

    def halve(tensors):
        for key in tensors:
            if ".mlp.gate." not in key:
                tensors[key] = tensors[key].bfloat16()

    rewrite(directory, halve)
    reconfigure(directory, dtype="bfloat16")
    loaded = glmx.load(directory)
    assert loaded.dtype == torch.bfloat16
    gate = loaded.model.layers[1].mlp.gate
    assert torch.equal(gate.weight, model.model.layers[1].mlp.gate.weight)
    with torch.no_grad():
        assert loaded(random_ids(model.config, 1, 4)).logits.isfinite().all()
    checkpoint.save(loaded, directory.parent / "again")
    assert equal_models(loaded, glmx.load(directory.parent / "again"))


def test_casting_the_model_keeps_the_correction_bias(saved):
    model, _ = saved
    name = "model.layers.1.mlp.gate.e_score_correction_bias"
    before = model.state_dict()[name].clone()
    model.to(torch.bfloat16).to(torch.float32)
    after = model.state_dict()[name]
    assert after.dtype == torch.float32 and torch.equal(before, after)
    assert name not in dict(model.named_parameters())


LITE = {"model_type": "glm4_moe_lite", "num_key_value_heads": 4, "attention_bias": False, "partial_rotary_factor": 1.0}
LITE |= {"q_lora_rank": 8, "kv_lora_rank": 8, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8}
LITE |= {"rope_parameters": None}


def drop(key):
    return lambda directory: rewrite(directory, lambda t: t.pop(key))


def add(key, tensor):
    return lambda directory: rewrite(directory, lambda t: t.update({key: tensor}))


@pytest.mark.parametrize(
    "damage, error, words",
    [
        (drop("model.layers.2.mlp.experts.5.up_proj.weight"), CheckpointError, "lacks .*2.mlp.experts.5.up_proj"),
        (drop("model.layers.3.hnorm.weight"), CheckpointError, "lacks model.layers.3.hnorm.weight"),
        (add("model.layers.9.x", torch.ones(1)), CheckpointError, "unknown model.layers.9.x"),
        (add("model.norm.weight", torch.ones(31)), CheckpointError, r"model.norm.weight .*\[31\].*\[32\]"),
        (add("model.norm.weight", torch.ones(32).int()), UnsupportedError, "model.norm.weight is I32"),
        (lambda d: (d / "model.safetensors").write_bytes(b"x" * 99), CheckpointError, "not a safetensors file"),
        (lambda d: (d / "model.safetensors").unlink(), CheckpointError, "no model.safetensors"),
        (lambda d: (d / "config.json").unlink(), CheckpointError, "no config.json"),
        (lambda d: (d / "config.json").write_text("{"), CheckpointError, "not JSON"),
        (lambda d: reconfigure(d, model_type="llama"), UnsupportedError, "'llama'"),
        (lambda d: reconfigure(d, model_type="glm5_next"), UnsupportedError, "'glm5_next'"),
        (lambda d: reconfigure(d, **LITE), CheckpointError, "lacks .*kv_a_layernorm"),
        (lambda d: reconfigure(d, quantization_config={"bits": 8}), UnsupportedError, "quantization_config"),
        (
            lambda d: (d / checkpoint.INDEX).write_text('{"weight_map": {"a": "b.safetensors"}}'),
            CheckpointError,
            "lacks b.safetensors",
        ),
        (
            lambda d: (d / checkpoint.INDEX).write_text('{"weight_map": {"a": "model.safetensors"}}'),
            CheckpointError,
            "disagree on a, ",
        ),
        (lambda d: (d / checkpoint.INDEX).write_text("[]"), CheckpointError, "holds a JSON list, expected an object"),
        (
            lambda d: reconfigure(d, vocab_size=2**31 - 1),
            CheckpointError,
            r"\[96, 32\], the config expects \[2147483647, 32\]",
        ),
        (
            lambda d: reconfigure(d, num_hidden_layers=10**9),
            CheckpointError,
            "num_hidden_layers = 1000000000, expected 1..4096",
        ),
        (
            lambda d: reconfigure(d, num_hidden_layers=4096),
            CheckpointError,
            r"it has \d+, .*num_hidden_layers = 4096",
        ),
        (
            lambda d: reconfigure(d, n_routed_experts=512),
            CheckpointError,
            "lacks most of its .* n_routed_experts = 512",
        ),
        (lambda d: reconfigure(d, num_hidden_layers=2), CheckpointError, "lacks model.layers.2.eh_proj.weight, "),
        (lambda d: (d / "config.json").write_bytes(b"\xff\xfe{"), CheckpointError, "not JSON: 'utf-8' codec"),
        (
            lambda d: (d / "config.json").write_bytes(b" " * 2**23),
            CheckpointError,
            "8388608 bytes, expected at most 4194304",
        ),
        (add("x" * 300, torch.ones(1)), CheckpointError, r"unknown 'xxx+\.\.\.xxx+'$"),
        (add("a\nb", torch.ones(1)), CheckpointError, r"unknown 'a\\nb'$"),
    ],
)
def test_damaged_checkpoints_are_named(saved, damage, error, words, monkeypatch):
    damage(saved[1])
    # All of these are found before anything of the model's size is allocated.
    monkeypatch.setattr(checkpoint, "_allocated", lambda *_: pytest.fail("the model was allocated"))
    with pytest.raises(error, match=words):
        glmx.load(saved[1])


def test_a_header_longer_than_the_model_can_have(saved):
    rewrite(saved[1], lambda t: t.update({f"{'x' * 200}.{i}": torch.ones(1) for i in range(6000)}))
    with pytest.raises(CheckpointError, match=r"a header of \d{7} bytes, expected at most \d{7}$"):
        glmx.load(saved[1])


def test_a_model_that_memory_does_not_hold(saved, monkeypatch):
    def full(*_, **__):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 99 bytes.")

    monkeypatch.setattr(checkpoint, "allocate", full)
    with pytest.raises(CheckpointError, match=r"the model takes 0.0 GiB in float32, which is not free"):
        glmx.load(saved[1])


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("key", ["model.norm.weight", "model.layers.1.mlp.experts.7.up_proj.weight"])
def test_values_that_are_not_finite(saved, key, value):
    def spoil(tensors):
        tensors[key].view(-1)[5:7] = value

    model, directory = saved
    assert equal_models(model, glmx.load(directory, check_finite=True))
    rewrite(directory, spoil)
    glmx.load(directory)
    with pytest.raises(CheckpointError, match=rf"tensor {key}: 2 of its \d+ values are NaN or infinite"):
        glmx.load(directory, check_finite=True)


def test_values_that_overflow_the_compute_dtype(saved):
    rewrite(saved[1], lambda tensors: tensors["model.norm.weight"].fill_(3.4e38))
    with pytest.raises(CheckpointError, match="model.norm.weight: 32 of its 32 values"):
        glmx.load(saved[1], dtype="bf16", check_finite=True)


def test_bad_arguments(saved, tmp_path):
    with pytest.raises(ValueError, match="'int3'"):
        glmx.load(saved[1], dtype="int3")
    with pytest.raises(UnsupportedError, match="device 'cuda:99': "):
        glmx.load(saved[1], device="cuda:99")
    with pytest.raises(CheckpointError, match="hf download zai-org/GLM-4.5 --local-dir GLM-4.5"):
        glmx.load("zai-org/GLM-4.5")
    with pytest.raises(CheckpointError, match="no directory './here'"):
        glmx.load("./here")
    with pytest.raises(CheckpointError, match="name is empty"):
        glmx.load("")
    for path, words in (("x" * 300, "cannot read 'xxx.*File name too long"), ("a\0b", r"'a\\x00b'")):
        with pytest.raises(CheckpointError, match=words):
            glmx.load(path)
    with pytest.raises(CheckpointError, match="is a file"):
        glmx.load(saved[1] / "config.json")


def test_a_run_directory_names_its_latest_step(saved):
    model, directory = saved
    (directory.parent / "latest").write_text("ckpt\n")
    assert equal_models(model, glmx.load(directory.parent))


@pytest.mark.parametrize("content", ["gone", "", "../ckpt", "\0", "x" * 300])
def test_a_run_directory_whose_latest_step_is_gone(saved, content):
    (saved[1].parent / "latest").write_text(content)
    with pytest.raises(CheckpointError, match="latest' names .*, which is no directory"):
        glmx.load(saved[1].parent)


def test_a_hub_id_is_found_in_the_local_cache(saved, tmp_path, monkeypatch):
    hub = pytest.importorskip("huggingface_hub")
    repository = tmp_path / "hub" / "models--zai-org--tiny"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("abc")
    (repository / "snapshots").mkdir()
    saved[1].rename(repository / "snapshots" / "abc")
    monkeypatch.setattr(hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    assert equal_models(saved[0], glmx.load("zai-org/tiny"))
    with pytest.raises(CheckpointError, match="no such model in the local Hub cache.* hf download zai-org/other"):
        glmx.load("zai-org/other")


@pytest.mark.parametrize("mask", [0o022, 0o007])
def test_permissions_are_those_of_any_new_file(saved, tmp_path, mask):
    before = os.umask(mask)
    try:
        for name, limit in (("one", 10**9), ("shards", 50_000)):
            checkpoint.save(saved[0], tmp_path / name, max_shard_bytes=limit)
    finally:
        os.umask(before)
    files = [*(tmp_path / "one").iterdir(), *(tmp_path / "shards").iterdir()]
    assert len([file for file in files if file.suffix == ".safetensors"]) > 2
    assert {stat.S_IMODE(file.stat().st_mode) for file in files} == {0o666 & ~mask}


def test_saving_leaves_nothing_half_done(saved, tmp_path, monkeypatch):
    model, directory = saved
    with pytest.raises(CheckpointError, match="exists"):
        checkpoint.save(model, directory)
    (tmp_path / "empty").mkdir()
    checkpoint.save(model, tmp_path / "empty")

    def fail(*_, **__):
        raise OSError("disk full")

    monkeypatch.setattr(checkpoint, "save_file", fail)
    for overwrite, name in ((True, "ckpt"), (False, "fresh")):
        with pytest.raises(OSError, match="disk full"):
            checkpoint.save(model, tmp_path / name, overwrite=overwrite)
    monkeypatch.undo()
    assert {f.name for f in tmp_path.iterdir()} == {"ckpt", "empty"}
    assert equal_models(model, glmx.load(directory))
    other = random_model(model.config, 9)
    checkpoint.save(other, directory, overwrite=True)
    assert equal_models(other, glmx.load(directory))
    assert {f.name for f in tmp_path.iterdir()} == {"ckpt", "empty"}


def test_tokenizer_files_travel_along(saved, tmp_path):
    model, directory = saved
    source = tmp_path / "tokenizer"
    source.mkdir()
    (source / "tokenizer.json").write_text("{}")
    (source / "notes.txt").write_text("not ours")
    checkpoint.save(model, tmp_path / "with", tokenizer_files_from=source)
    names = {f.name for f in (tmp_path / "with").iterdir()}
    assert "tokenizer.json" in names and "notes.txt" not in names
