"""glmx quantize: what is written, read by compressed-tensors and by glmx's oracle; what calibrating gains; refusals."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from compressed_tensors.compressors.naive_quantized.base import NaiveQuantizationCompressor
from compressed_tensors.compressors.pack_quantized.base import PackedQuantizationCompressor
from compressed_tensors.quantization import QuantizationConfig
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from glmx.errors import CheckpointError, UnsupportedError
from glmx.models import calibrate, checkpoint, compressed, layout
from glmx.models.quantize import REPORT, Calibration, quantize
from glmx.models.safetensors import INDEX, SINGLE, Planned, StreamedFiles, read_header
from glmx.reference import stored_weight
from stored_glm import CONFIGS, is_quantised
from stored_glm import quantised as in_few_bits
from tiny_glm import CASES, FAMILIES, hf_twin, random_ids, random_model, tiny_config

# Groups that are whole and partial: of 160 (32 left), 272 (16), 40, 200 (72), 136 (8).
SIZES = {"hidden_size": 160, "intermediate_size": 272, "moe_intermediate_size": 40, "num_hidden_layers": 2}
OF_FAMILY = {
    "glm4_moe": {"head_dim": 48, "attention_bias": True, "use_qk_norm": True},
    "glm4_moe_lite": {"q_lora_rank": 136, "kv_lora_rank": 200, "qk_nope_head_dim": 40, "v_head_dim": 48},
    "glm_moe_dsa": {"q_lora_rank": 136, "kv_lora_rank": 200, "qk_nope_head_dim": 40, "v_head_dim": 48},
}
FORMATS = ("int4", "int8")


def odd_model(model_type, dtype=torch.bfloat16, seed=3):
    config = tiny_config(model_type=model_type, **SIZES, **OF_FAMILY[model_type], n_routed_experts=3)
    return random_model(config, seed, dtype)


@pytest.fixture(scope="module", params=OF_FAMILY)
def source(request, tmp_path_factory):
    return checkpoint.save(odd_model(request.param), tmp_path_factory.mktemp("source") / "bf16")


def contents(directory):
    return {key: tensor for file in directory.glob("*.safetensors") for key, tensor in load_file(file).items()}


def scheme(directory):
    table = json.loads((directory / "config.json").read_text())["quantization_config"]
    assert table["quant_method"] == "compressed-tensors" and table["quantization_status"] == "compressed"
    return table["format"], QuantizationConfig.model_validate(table).config_groups["group_0"]


def decompressed(tensors, key, form, scheme):
    """What compressed-tensors makes of a matrix. It refuses a partial group, which is made whole for it with zeros."""
    name = key.removesuffix("weight")
    state = {part.removeprefix(name): tensor for part, tensor in tensors.items() if part.startswith(key)}
    if form == "int-quantized":
        return NaiveQuantizationCompressor.decompress(state, scheme)["weight"]
    assert state.keys() == {"weight_packed", "weight_scale", "weight_shape"}
    rows, columns = state["weight_shape"].tolist()
    whole = -(-columns // 128) * 128
    filled = torch.full((rows, whole // 8), 0x88888888 - 2**32, dtype=torch.int32)
    filled[:, : state["weight_packed"].shape[1]] = state["weight_packed"]
    state |= {"weight_packed": filled, "weight_shape": torch.tensor([rows, whole])}
    return PackedQuantizationCompressor.decompress(state, scheme)["weight"][:, :columns]


@pytest.mark.parametrize("to", FORMATS)
def test_compressed_tensors_and_our_oracle_agree_on_what_is_written(source, to, tmp_path):
    quantize(source, tmp_path / "q", to)
    before, after = contents(source), contents(tmp_path / "q")
    form, args = scheme(tmp_path / "q")
    matrices = [key for key in before if is_quantised(key, to)]
    assert len(matrices) > 20 and any(before[key].shape[1] % 128 for key in matrices)
    for key in matrices:
        values, scale = after[key + ("_packed" if to == "int4" else "")], after[f"{key}_scale"]
        weight, factor = stored_weight.matrix(to, values, scale, before[key].shape[1])
        meant = weight.float() if factor is None else weight.float() * factor[:, None]
        theirs = decompressed(after, key, form, args)
        assert torch.equal(theirs.float(), meant)

        # Half a step; int4's scale is rounded to bf16 (2^-8 of 7.5 steps at most), and so is the product (of 8 steps).
        steps = scale.float().repeat_interleave(128 if to == "int4" else meant.shape[1], 1)[:, : meant.shape[1]]
        most = 0.5 + 15.5 * 2**-8 if to == "int4" else 0.5001
        assert ((meant - before[key].float()).abs() <= most * steps).all(), key
        for part in ("", "_packed", "_scale", "_shape"):
            after.pop(key + part, None)
    rest = {key: tensor for key, tensor in before.items() if key not in matrices}
    assert rest.keys() == after.keys(), "what is not quantised has its name, and nothing else is there"
    assert all(torch.equal(tensor, after[key]) and tensor.dtype == after[key].dtype for key, tensor in rest.items())


@pytest.mark.parametrize("to", FORMATS)
def test_what_is_written_loads(source, to, tmp_path):
    """As parameters with the weights that compressed-tensors finds, and as it is stored; but it is quantised once."""
    quantize(source, tmp_path / "q", to)
    after, (form, args) = contents(tmp_path / "q"), scheme(tmp_path / "q")
    held = checkpoint.views(checkpoint.load(tmp_path / "q", dequantize=True))
    for key in filter(compressed.is_quantised, held):
        assert torch.equal(held[key], decompressed(after, key, form, args).bfloat16()), key
    loaded = checkpoint.load(tmp_path / "q", mapped=True)
    with torch.no_grad():
        assert loaded(random_ids(loaded.config, 1, 5)).logits.isfinite().all()
    broken(tmp_path / "q", quantization_config=None)
    with pytest.raises(UnsupportedError, match="is quantised already, expected bf16"):
        quantize(tmp_path / "q", tmp_path / "again", "int4")


def test_what_is_not_quantised():
    keys = [key for key, _ in layout.tensors(odd_model("glm_moe_dsa").config) if not compressed.is_quantised(key)]
    names = {re.sub(r"model\.layers\.\d\.", "", key) for key in keys}
    indexer = {"wq_b.weight", "wk.weight", "k_norm.weight", "k_norm.bias", "weights_proj.weight"}
    assert names == {f"self_attn.indexer.{name}" for name in indexer} | {
        "model.embed_tokens.weight", "model.norm.weight", "lm_head.weight", "mlp.gate.weight", layout.CORRECTION_BIAS,
        "input_layernorm.weight", "post_attention_layernorm.weight", "self_attn.q_a_layernorm.weight",
        "self_attn.kv_a_layernorm.weight", "enorm.weight", "hnorm.weight", "eh_proj.weight", "shared_head.norm.weight",
    }  # fmt: skip


@pytest.mark.parametrize("columns", [1, 7, 8, 100, 128, 203, 256])
def test_partial_words_and_groups(columns):
    weight = torch.randn(5, columns, generator=torch.Generator().manual_seed(columns))
    weight[:, -1] *= 100  # the last group's scale is its own
    quantised = compressed.rounded(weight, "int4")
    words = compressed.packed(quantised.q)
    assert words.shape == (5, -(-columns // 8)) and quantised.scale.shape == (5, -(-columns // 128))
    assert torch.equal(stored_weight.int4_values(words, columns), quantised.q)
    assert quantised.q.min() >= -8 and quantised.q.max() <= 7
    assert torch.equal(quantised.scale, quantised.scale.bfloat16().float())


def test_the_largest_value_is_half_a_step_from_either_end():
    q, scale = compressed.rounded(torch.tensor([[-7.51, 3.2, 7.51, -0.4]]), "int4")
    assert scale.item() == 1 and q.tolist() == [[-8, 3, 7, 0]]
    q, scale = compressed.rounded(torch.tensor([[-127.0, 3.2, 100.4]]), "int8")
    assert scale.item() == 1 and q.tolist() == [[-127, 3, 100]]


@pytest.mark.parametrize("to", FORMATS)
def test_zeros_and_specks_have_a_scale(to):
    weight = torch.randn(4, 300, generator=torch.Generator().manual_seed(1))
    weight[1] = 0
    weight[2, 128:256] = 0
    weight[3] = 1e-44  # a subnormal: bf16 of its scale, or its 127th part, is 0
    moments = calibrate.Moments(torch.eye(300))
    for quantised in (compressed.rounded(weight, to), calibrate.compensated(weight, moments, to)):
        assert quantised.scale.isfinite().all() and (quantised.scale > 0).all()
        meant = compressed.dequantised(quantised, to)
        assert (meant[1] == 0).all() and (meant[2, 128:256] == 0).all() and meant[3].abs().max() < 1e-40


@pytest.mark.parametrize("form", ["fp8", "fp8_blocks", "fused", "fp16", "shards"])
def test_other_spellings_of_the_source_give_the_same(form, tmp_path, monkeypatch):
    """FP8 is what its bf16 weights are, also where it is copied (an indexer's); fused experts are experts."""
    monkeypatch.setattr("glmx.models.quantize._PIECE", 160 * 20)
    model = odd_model("glm_moe_dsa")
    checkpoint.save(model, tmp_path / "plain")
    tensors = load_file(tmp_path / "plain" / SINGLE)
    other, config = tmp_path / "other", {**model.config.to_dict(), "dtype": "bfloat16"}
    other.mkdir()
    if form in CONFIGS:
        written = dict(tensors)
        for key in [key for key in tensors if is_quantised(key, "fp8_blocks")]:
            parts, tensors[key] = in_few_bits(written.pop(key).float(), form)
            written |= {key + behind: tensor for behind, tensor in parts.items()}
        config["quantization_config"] = CONFIGS[form]
    elif form == "fused":
        written = {key: tensor for key, tensor in tensors.items() if ".mlp.experts." not in key}
        names = [name for name in model.state_dict() if ".mlp.experts." in name]
        written |= {name: model.state_dict()[name] for name in names}
    else:
        key = "model.layers.1.mlp.experts.1.down_proj.weight"
        tensors[key] = (tensors[key] * 2**8).round().clamp(-128, 127)  # in both
        written = {**tensors, key: tensors[key].half()} if form == "fp16" else tensors
    save_file({key: tensor.contiguous() for key, tensor in written.items()}, other / SINGLE)
    save_file(tensors, tmp_path / "plain" / SINGLE)
    for directory, table in ((other, config), (tmp_path / "plain", {**config, "quantization_config": None})):
        (directory / "config.json").write_text(json.dumps(table))
    quantize(tmp_path / "plain", tmp_path / "expected", "int4")
    quantize(other, tmp_path / "found", "int4", max_shard_bytes=60_000 if form == "shards" else 2**30)
    expected, found = contents(tmp_path / "expected"), contents(tmp_path / "found")
    assert expected.keys() == found.keys() and all(torch.equal(expected[key], found[key]) for key in expected)
    assert (tmp_path / "found" / "config.json").read_bytes() == (tmp_path / "expected" / "config.json").read_bytes()
    if form == "shards":
        index = json.loads((tmp_path / "found" / INDEX).read_text())["weight_map"]
        assert len(set(index.values())) > 3
        pairs = [(key, key.replace("_packed", "_scale")) for key in index if key.endswith("_packed")]
        assert all(index[values] == index[scale] for values, scale in pairs), "a matrix lies in one file"


@pytest.mark.parametrize("tied", [False, True])
def test_a_copy_of_the_head_in_fp8_is_the_head(tied, tmp_path):
    """As GLM-4.5's FP8 repositories have it; bf16 of the rounded copy would be another matrix than the head."""
    model = random_model(tiny_config(tie_word_embeddings=tied), 2, torch.bfloat16)
    checkpoint.save(model, tmp_path / "fp8")
    key, head = "model.layers.3.shared_head.head.weight", model.lm_head.weight.detach()
    parts, rounded = in_few_bits(head.float(), "fp8")
    broken(tmp_path / "fp8", lambda t: t.update({key + behind: tensor for behind, tensor in parts.items()}))
    broken(tmp_path / "fp8", quantization_config=CONFIGS["fp8"])
    quantize(tmp_path / "fp8", tmp_path / "q", "int4")
    found = contents(tmp_path / "q")
    assert torch.equal(found[key], head) and not torch.equal(rounded, head)
    assert f"{key}_scale" not in found and ("lm_head.weight" in found) != tied


def test_a_model_in_fp32_becomes_one_in_bf16_but_for_its_routers(tmp_path):
    checkpoint.save(odd_model("glm4_moe", torch.float32), tmp_path / "fp32")
    quantize(tmp_path / "fp32", tmp_path / "q", "int8")
    dtypes = {key: tensor.dtype for key, tensor in contents(tmp_path / "q").items()}
    fp32 = {key for key, dtype in dtypes.items() if dtype == torch.float32 and not key.endswith("_scale")}
    assert fp32 == {key for key in dtypes if ".mlp.gate." in key} and torch.bfloat16 in dtypes.values()
    assert json.loads((tmp_path / "q" / "config.json").read_text())["dtype"] == "bfloat16"


def test_streamed_files_are_what_the_library_reads_and_aligned(tmp_path):
    planned = [
        [Planned("a.weight_packed", torch.int32, (3, 32)), Planned("a.weight_shape", torch.int64, (2,))],
        [Planned("odd", torch.int8, (3, 7)), Planned("b.weight", torch.bfloat16, (64, 96))],
        [
            Planned("scalar", torch.float32, ()),
            Planned("c", torch.bfloat16, (5,)),
            Planned("empty", torch.int8, (0, 4)),
        ],
    ]
    flat = [tensor for group in planned for tensor in group]
    generator = torch.Generator().manual_seed(0)
    wanted = {t.name: torch.randint(-99, 99, t.shape, generator=generator).to(t.dtype) for t in flat}
    with StreamedFiles(tmp_path, planned, 2**30) as files:
        for tensor in reversed(flat):  # in any order, and in pieces
            rows = wanted[tensor.name].split(2) if tensor.name == "b.weight" else [wanted[tensor.name]]
            for piece in rows:
                files.write(tensor.name, piece)
    with safe_open(tmp_path / SINGLE, "pt") as opened:
        assert set(opened.keys()) == wanted.keys() and opened.metadata() == {"format": "pt"}
        assert all(torch.equal(opened.get_tensor(name), tensor) for name, tensor in wanted.items())
    data = 8 + int.from_bytes((tmp_path / SINGLE).read_bytes()[:8], "little")
    starts = {name: data + entry.start for name, entry in read_header(tmp_path / SINGLE).items()}
    assert data % 64 == 0 and starts["a.weight_packed"] % 64 == 0 and starts["b.weight"] % 64 == 0
    assert starts["a.weight_shape"] % 8 == 0 and starts["scalar"] % 4 == 0 and starts["c"] % 2 == 0


def test_a_file_that_is_not_written_to_its_end_is_no_result(tmp_path):
    with (
        pytest.raises(AssertionError, match="not every tensor"),
        StreamedFiles(tmp_path, [[Planned("a", torch.int8, (4, 4))]], 2**30) as files,
    ):
        files.write("a", torch.zeros(3, 4, dtype=torch.int8))


@pytest.mark.parametrize("model_type", OF_FAMILY)
@pytest.mark.parametrize("to", FORMATS)
def test_values_lie_at_multiples_of_64_in_the_file(to, model_type, tmp_path):
    checkpoint.save(odd_model(model_type), tmp_path / "bf16")
    quantize(tmp_path / "bf16", tmp_path / "q", to)
    file = tmp_path / "q" / SINGLE
    data = 8 + int.from_bytes(file.read_bytes()[:8], "little")
    for name, entry in read_header(file).items():
        if (entry.end - entry.start) % 64 == 0:
            assert (data + entry.start) % 64 == 0, name


# Calibration.
def uneven(model):
    """Activations as trained models have them: some channels of every norm are many times the others."""
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if name.endswith("norm.weight"):
                tensor[:: max(len(tensor) // 5, 1)] *= 20
    return model


@pytest.mark.parametrize("case", FAMILIES)
def test_moments_are_those_of_the_inputs_of_transformers(case):
    """Of every matrix outside the MTP layer: what transformers' modules are given, and what its experts compute."""
    model = random_model(tiny_config(**CASES[case]), 5)
    config, twin = model.config, hf_twin(model)
    ids = random_ids(config, 3, 9, seed=2)
    seen: dict[str, torch.Tensor] = {}

    def keep(name):
        def hook(module, args):
            seen[name] = args[0].reshape(-1, args[0].shape[-1])
            if name.endswith(".experts"):
                seen[f"{name}.ids"] = args[1]

        return hook

    for name, module in twin.named_modules():
        if isinstance(module, torch.nn.Linear) or name.endswith(".experts"):
            module.register_forward_pre_hook(keep(name))
    twin.requires_grad_(False)(ids)
    inputs = calibrate.Inputs(model, list(ids))
    checked = 0
    for key, _ in layout.tensors(config):
        if not compressed.is_quantised(key) or key.startswith(f"model.layers.{config.num_hidden_layers}."):
            continue
        name = key.removesuffix(".weight")
        if ".mlp.experts." in name:
            experts, e, part = name.rsplit(".", 2)
            x = seen[experts][(seen[f"{experts}.ids"] == int(e)).any(1)]
            every = [seen[experts][(seen[f"{experts}.ids"] == i).any(1)] for i in range(config.n_routed_experts)]
            if part == "down_proj":
                both = twin.get_submodule(experts).gate_up_proj
                gate_up = [rows @ both[i].T for i, rows in enumerate(every)]
                every = [F.silu(rows.chunk(2, -1)[0]) * rows.chunk(2, -1)[1] for rows in gate_up]
                x = every[int(e)]
            mean = torch.cat(every).T @ torch.cat(every) / len(torch.cat(every))
            expected = (x.T @ x + 64 * mean) / (len(x) + 64)
        else:
            expected = seen[name].T @ seen[name] / len(seen[name])
        found = inputs.moments(key).mean_KK
        assert torch.allclose(found, expected, rtol=1e-3, atol=1e-4 * float(expected.diagonal().max())), key
        checked += 1
    assert checked > 20


def test_an_expert_that_saw_nothing_has_the_mean_of_its_layer():
    model = random_model(tiny_config(num_hidden_layers=2), 1)
    with torch.no_grad():
        model.model.layers[1].mlp.gate.e_score_correction_bias[3] = -100.0
    inputs = calibrate.Inputs(model, list(random_ids(model.config, 2, 16)))
    for part in ("gate", "down"):
        name = f"model.layers.1.mlp.experts.{{}}.{part}_proj.weight"
        unseen, other = (inputs.moments(name.format(e)).mean_KK for e in (3, 4))
        assert unseen.diagonal().min() > 0 and not torch.equal(unseen, other)
        quantised = calibrate.compensated(torch.randn(4, len(unseen)), inputs.moments(name.format(3)), "int4")
        assert quantised.scale.isfinite().all()


@pytest.mark.parametrize("to", FORMATS)
def test_compensating_loses_less_of_the_output(to):
    """Inputs of uneven size that go together, as behind a norm: three fifths of the loss at most."""
    generator = torch.Generator().manual_seed(4)
    weight = torch.randn(64, 300, generator=generator)
    x = torch.randn(2000, 40, generator=generator) @ torch.randn(40, 300, generator=generator)
    x = (x + torch.randn(2000, 300, generator=generator)) * torch.rand(300, generator=generator).exp2_().pow_(3)
    moments = calibrate.Moments(x.T @ x / len(x))
    lost = {}
    for name, quantised in (
        ("nearest", compressed.rounded(weight, to)),
        ("compensated", calibrate.compensated(weight, moments, to)),
    ):
        lost[name] = weight - compressed.dequantised(quantised, to)
        assert moments.norm2(lost[name]) == pytest.approx(float((x @ lost[name].T).square().sum() / len(x)), rel=1e-3)
    assert moments.norm2(lost["compensated"]) < 0.6**2 * moments.norm2(lost["nearest"])
    assert lost["compensated"].norm() >= lost["nearest"].norm(), "which it pays for in weights"


@pytest.mark.parametrize("model_type", OF_FAMILY)
def test_calibrated_beats_nearest_on_a_model_with_uneven_activations(model_type, tmp_path):
    model = uneven(odd_model(model_type))
    checkpoint.save(model, tmp_path / "bf16")
    ids = random_ids(model.config, 1, 1200)[0]
    asked = Calibration(ids, 1024, lambda model: 1.0)
    report = quantize(tmp_path / "bf16", tmp_path / "q", "int4", lambda directory, config: asked)
    assert report.calibration_tokens == 1024
    inputs = calibrate.Inputs(checkpoint.load(tmp_path / "bf16"), calibrate.windows(ids, 1024))
    before, after = contents(tmp_path / "bf16"), contents(tmp_path / "q")
    form, args = scheme(tmp_path / "q")
    nearest = written = 0.0
    for key in filter(compressed.is_quantised, before):
        weight, moments = before[key].float(), inputs.moments(key)
        written += moments.norm2(decompressed(after, key, form, args).float() - weight)
        nearest += moments.norm2(compressed.dequantised(compressed.rounded(weight, "int4"), "int4") - weight)
    assert written < 0.6**2 * nearest
    assert report.total().outputs_lost == pytest.approx(written, rel=1e-3)


def test_the_report_says_what_was_lost(tmp_path):
    model = odd_model("glm_moe_dsa")
    checkpoint.save(model, tmp_path / "bf16")
    (tmp_path / "bf16" / "tokenizer.json").write_text("{}")
    nearest, logits, ids = {}, [], random_ids(model.config, 1, 600)

    def bits(model):
        if len(logits) == 1:
            nearest.update({key: view.clone() for key, view in checkpoint.views(model).items()})
        logits.append(model(ids[:, :40]).logits)
        return float(len(logits))

    asked = Calibration(ids[0], 600, bits)
    report = quantize(tmp_path / "bf16", tmp_path / "q", "int4", lambda *_: asked)
    said = json.loads((tmp_path / "q" / REPORT).read_text())
    assert said == report.to_dict() and said["bits_per_byte"] == {"before": 1.0, "nearest": 2.0, "after": 3.0}
    before, after = contents(tmp_path / "bf16"), contents(tmp_path / "q")
    form, args = scheme(tmp_path / "q")
    held = checkpoint.views(checkpoint.load(tmp_path / "q", dequantize=True))
    with torch.no_grad():
        assert torch.equal(logits[2], checkpoint.load(tmp_path / "q")(ids[:, :40]).logits), (
            "what is written is measured"
        )
    experts = [key for key in before if key.startswith("model.layers.1.mlp.experts.") and "down_proj" in key]
    for key in filter(compressed.is_quantised, before):
        assert torch.equal(held[key], decompressed(after, key, form, args))
        plain = compressed.dequantised(compressed.rounded(before[key].float(), "int4"), "int4")
        assert torch.equal(nearest[key].float(), plain)
    lost = sum((held[key].float() - before[key].float()).square().sum() for key in experts)
    size = sum(before[key].float().square().sum() for key in experts)
    found = said["layers"]["1"]["mlp.experts.down_proj"]
    assert found["weights"] == pytest.approx(float((lost / size).sqrt()), rel=1e-3) and 0 < found["outputs"] < 1
    assert said["bytes"] == {
        "before": sum(tensor.nbytes for tensor in before.values()),
        "after": sum(tensor.nbytes for tensor in after.values()),
    }
    assert (tmp_path / "q" / "tokenizer.json").read_text() == "{}" and (tmp_path / "q/generation_config.json").exists()


# What is refused, and what is left of it: nothing.
KEY = "model.layers.1.mlp.experts.2.up_proj.weight"


def broken(directory, change=None, **values):
    tensors = load_file(directory / SINGLE)
    if change:
        change(tensors)
    save_file(tensors, directory / SINGLE)
    file = directory / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}))


@pytest.mark.parametrize(
    "plant, error, words",
    [
        (lambda d: (d.parent / "q").mkdir() or (d.parent / "q/x").touch(), CheckpointError, "q' exists; choose"),
        (lambda d: broken(d, lambda t: t[KEY][1, :2].fill_(float("nan"))), CheckpointError, f"{KEY}: 2 of its 6400"),
        (lambda d: broken(d, lambda t: t.pop(KEY)), CheckpointError, f"lacks {KEY}"),
        (lambda d: (d / SINGLE).unlink(), CheckpointError, "no model.safetensors"),
        (lambda d: (d / "config.json").unlink(), CheckpointError, "no config.json in"),
        (lambda d: broken(d, model_type="llama"), UnsupportedError, "'llama' is not supported"),
        (
            lambda d: broken(d, quantization_config=compressed.config("int4")),
            UnsupportedError,
            "quantised already .*format = 'pack-quantized'.*, expected bf16, fp32, fp16 or FP8 weights",
        ),
        (lambda d: broken(d, quantization_config=compressed.config("int8")), UnsupportedError, "'int-quantized'"),
        (lambda d: broken(d, quantization_config={"quant_method": "awq"}), UnsupportedError, "quant_method = 'awq'"),
    ],
)  # fmt: skip
def test_refusals_leave_nothing(plant, error, words, tmp_path):
    checkpoint.save(odd_model("glm4_moe"), tmp_path / "bf16")
    plant(tmp_path / "bf16")
    there = sorted(tmp_path.rglob("*"))
    with pytest.raises(error, match=words):
        quantize(tmp_path / "bf16", tmp_path / "q", "int4")
    assert sorted(tmp_path.rglob("*")) == there


def test_another_format_is_refused(tmp_path):
    with pytest.raises(ValueError, match="to is 'int3', expected int8 or int4"):
        quantize(tmp_path, tmp_path / "q", "int3")


def test_a_disk_that_is_too_small_is_said_first(source, tmp_path, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": 1000})())
    with pytest.raises(CheckpointError, match=r"takes 0\.0 GB, the disk of '.*' has 0\.0 GB left"):
        quantize(source, tmp_path / "q", "int8")
    assert not [*tmp_path.iterdir()]


PEAK = """
import json, sys
from pathlib import Path
import glmx.models.quantize as quantize

def memory(field):
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line.split()[1] for line in lines if line.startswith(field))) * 1024

idle = memory("VmRSS")
report = quantize.quantize(sys.argv[1], sys.argv[2], "int4")
print(json.dumps([memory("VmHWM") - idle, report.bytes_before]))
"""


def test_a_few_matrices_are_all_that_is_held(tmp_path):
    """In a process of its own: 400 MB, 67 of them an embedding, go through 128, torch's own included."""
    from glmx.models import random_weights

    config = tiny_config(
        vocab_size=2**15, hidden_size=1024, moe_intermediate_size=512, intermediate_size=3072, n_routed_experts=24,
        dtype="bfloat16",
    )  # fmt: skip
    (tmp_path / "bf16").mkdir()
    random_weights.write(config, tmp_path / "bf16", "bf16")
    (tmp_path / "bf16" / "config.json").write_text(json.dumps({**config.to_dict(), "dtype": "bfloat16"}))
    command = [sys.executable, "-c", PEAK, tmp_path / "bf16", tmp_path / "q"]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ)
    assert done.returncode == 0, done.stderr
    peak, size = json.loads(done.stdout)
    print(f"peak {peak >> 20} MB above idle, checkpoint {size >> 20} MB")
    assert size > 350e6 and peak < 128 * 2**20
