"""FP8 checkpoints: both released formats, partial blocks, a copy of the head, and what does not fit together."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

import glmx
from glmx.errors import CheckpointError, UnsupportedError
from glmx.models import checkpoint, fill, fp8, layout
from glmx.models.safetensors import INDEX, SINGLE
from tiny_glm import random_ids, random_model, tiny_config

E4M3 = torch.float8_e4m3fn
CHANNEL = {
    "quant_method": "compressed-tensors",
    "format": "float-quantized",
    "config_groups": {
        "group_0": {
            "targets": ["Linear"],
            "weights": {"num_bits": 8, "type": "float", "strategy": "channel", "symmetric": True, "dynamic": False},
            "input_activations": {"num_bits": 8, "type": "float", "strategy": "token", "dynamic": True},
        }
    },
    "ignore": ["lm_head"],
}
BLOCKS = {
    "quant_method": "fp8",
    "fmt": "e4m3",
    "activation_scheme": "dynamic",
    "weight_block_size": [128, 128],
    "modules_to_not_convert": ["lm_head", "model.layers.0.self_attn.indexers_proj"],
}


def quantised(weight, form):
    """(e4m3 values, scales, the bf16 weight they stand for), block by block and row by row, spelled out."""
    step = (1, weight.shape[1]) if form == "channel" else (128, 128)
    rows, columns = weight.shape
    q, exact = torch.empty(weight.shape, dtype=E4M3), torch.empty(weight.shape, dtype=torch.bfloat16)
    scales = torch.empty(-(-rows // step[0]), -(-columns // step[1]))
    for i in range(scales.shape[0]):
        for j in range(scales.shape[1]):
            block = (slice(i * step[0], (i + 1) * step[0]), slice(j * step[1], (j + 1) * step[1]))
            scales[i, j] = weight[block].abs().max() / 448
            q[block] = (weight[block] / scales[i, j]).to(E4M3)
            exact[block] = (q[block].float() * scales[i, j]).bfloat16()
    return q, scales, exact


def is_quantised(key):
    linear = key.endswith(("_proj.weight", "_with_mqa.weight", "_b.weight", "indexer.wk.weight"))
    return linear and "eh_proj" not in key and "weights_proj" not in key


def quantise(tensors, form):
    """Replaces the matrices that released checkpoints quantise; returns what the model must then hold."""
    expected = {}
    for key in [k for k in tensors if is_quantised(k)]:
        tensors[key], scale, expected[key] = quantised(tensors[key].float(), form)
        tensors[key + ("_scale" if form == "channel" else "_scale_inv")] = scale
    return expected


@pytest.fixture(scope="module", params=["glm4_moe", "glm_moe_dsa"])
def model(request):
    """Sizes that blocks of 128 do not divide: 160 wide, a shared expert of 40; attention of 4 x 48 = 192, or a latent
    row of 200, and index queries of 8 x 24.
    """
    sizes = {"hidden_size": 160, "intermediate_size": 272, "moe_intermediate_size": 40}
    if request.param == "glm4_moe":
        sizes["head_dim"] = 48
    else:
        sizes |= {
            "q_lora_rank": 136,
            "kv_lora_rank": 192,
            "qk_nope_head_dim": 40,
            "v_head_dim": 48,
            "index_head_dim": 24,
        }
    return random_model(tiny_config(model_type=request.param, **sizes, num_hidden_layers=2, n_routed_experts=3), 3)


@pytest.fixture
def write(model, tmp_path):
    """write(form, change): a quantised checkpoint, and the tensors that the model must hold."""
    checkpoint.save(model, tmp_path / "plain")

    def act(form, change=lambda tensors: None, shards=False):
        directory = tmp_path / form
        directory.mkdir()
        tensors = {k: v.bfloat16() if v.dim() > 1 else v for k, v in load_file(tmp_path / "plain" / SINGLE).items()}
        expected = {**tensors, **quantise(tensors, form)}
        change(tensors)
        tensors = {key: tensor.contiguous() for key, tensor in tensors.items()}
        if shards:  # scales apart from what they scale, and before it
            parts = {"a.safetensors": {}, "b.safetensors": {}}
            for key, tensor in tensors.items():
                parts["a.safetensors" if "_scale" in key else "b.safetensors"][key] = tensor
            for name, part in parts.items():
                save_file(part, directory / name)
            index = {"weight_map": {key: name for name, part in parts.items() for key in part}}
            (directory / INDEX).write_text(json.dumps(index))
        else:
            save_file(tensors, directory / SINGLE)
        config = {**model.config.to_dict(), "dtype": "bfloat16"}
        config["quantization_config"] = CHANNEL if form == "channel" else BLOCKS
        (directory / "config.json").write_text(json.dumps(config))
        return directory, expected

    return act


@pytest.mark.parametrize("piece", [2**20, 160 * 100])  # whole tensors; 100 rows of 160, across blocks
@pytest.mark.parametrize("form", ["channel", "blocks"])
@pytest.mark.parametrize("dtype", ["auto", "fp32"])
def test_weights_are_bf16_of_q_times_scale(write, form, dtype, piece, monkeypatch):
    monkeypatch.setattr(fill, "_PIECE", piece)
    directory, expected = write(form, shards=form == "blocks")
    loaded = glmx.load(directory, dtype=dtype, check_finite=True)
    assert loaded.dtype == (torch.float32 if dtype == "fp32" else torch.bfloat16)
    again = checkpoint.save(loaded, directory.parent / "again")
    held = load_file(again / SINGLE)
    assert held.keys() == expected.keys()
    assert all(torch.equal(held[key].float(), tensor.to(held[key].dtype).float()) for key, tensor in expected.items())
    assert "quantization_config" not in json.loads((again / "config.json").read_text())
    with torch.no_grad():
        assert loaded(random_ids(loaded.config, 1, 5)).logits.isfinite().all()


def test_576_rows_have_five_rows_of_scales():
    """kv_a_proj_with_mqa: 4.5 blocks; the last 64 rows have scales of their own."""
    weight = torch.randn(576, 200, generator=torch.Generator().manual_seed(1))
    weight[512:] *= 100
    q, scale, expected = quantised(weight, "blocks")
    assert scale.shape == (5, 2)
    name = "x.weight_scale_inv"
    assert torch.equal(fp8.dequantised(q, fp8.row_scales(scale, name, 0, q)), expected)
    part = q[500:530]
    assert torch.equal(fp8.dequantised(part, fp8.row_scales(scale, name, 500, part)), expected[500:530])
    assert (expected[512:].float().std() / expected[:512].float().std()) == pytest.approx(100, rel=0.2)


@pytest.mark.parametrize("form", ["channel", "blocks"])
def test_a_quantised_copy_of_the_head(write, form):
    """GLM-4.5's FP8 repositories quantise the MTP layer's copy of a head that is not quantised."""
    key = "model.layers.2.shared_head.head.weight"

    def add(by):
        def change(tensors):
            values, scale, _ = quantised(tensors["lm_head.weight"].float() + by, form)
            tensors.update({key: values, key + ("_scale" if form == "channel" else "_scale_inv"): scale})

        return change

    directory, expected = write(form, add(0))
    head = glmx.load(directory).lm_head.weight
    assert torch.equal(head, expected["lm_head.weight"])
    directory.rename(directory.with_name("good"))
    directory, _ = write(form, add(0.1))
    with pytest.raises(UnsupportedError, match=f"{key} differs"):
        glmx.load(directory)


def test_a_nan_in_fp8_is_found(write):
    key = "model.layers.1.mlp.experts.2.down_proj.weight"
    directory, _ = write("blocks", lambda tensors: tensors[key].view(torch.uint8)[3].fill_(0x7F))
    with pytest.raises(CheckpointError, match=f"tensor {key}: 40 of its 6400 values are NaN"):
        glmx.load(directory, check_finite=True)


KEY = "model.layers.0.self_attn.o_proj.weight"  # [160, 192]
EXPERTS = "model.layers.1.mlp.experts"


@pytest.mark.parametrize(
    "form, change, error, words",
    [
        ("channel", lambda t: t.pop(KEY + "_scale"), CheckpointError, f"{KEY} is F8_E4M3: .*, found neither"),
        ("blocks", lambda t: t.update({KEY + "_scale": torch.ones(160, 1)}), CheckpointError, "found both"),
        (
            "blocks",
            lambda t: t.update({KEY + "_scale_inv": torch.ones(1, 2)}),
            CheckpointError,
            rf"{KEY}_scale_inv has shape \[1, 2\], expected \[2, 2\] for a weight of \[160, 192\]",
        ),
        ("channel", lambda t: t.update({KEY + "_scale": torch.ones(160)}), CheckpointError, r"expected \[160, 1\] for"),
        ("channel", lambda t: t.update({KEY + "_scale": torch.ones(160, 1).half()}), UnsupportedError, "is F16, only"),
        ("blocks", lambda t: t.update({KEY: torch.ones(160, 192)}), CheckpointError, f"unknown {KEY}_scale_inv"),
        (
            "blocks",
            lambda t: t.update({"model.norm.weight": torch.ones(160).to(E4M3)}),
            UnsupportedError,
            r"model.norm.weight is F8_E4M3 \[160\], only matrices are",
        ),
        ("blocks", lambda t: t.update({KEY: t[KEY].to(torch.float8_e5m2)}), CheckpointError, "unknown"),
        ("blocks", lambda t: t.update({KEY: t[KEY].T}), CheckpointError, r"shape \[192, 160\], the config expects"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_named(write, form, change, error, words, monkeypatch):
    directory, _ = write(form, change)
    monkeypatch.setattr(checkpoint, "_allocated", lambda *_: pytest.fail("the model was allocated"))
    with pytest.raises(error, match=words):
        glmx.load(directory)


def without(table, *keys):
    return {key: value for key, value in table.items() if key not in keys}


@pytest.mark.parametrize(
    "table, words",
    [
        ({"quant_method": "awq"}, "quant_method = 'awq' is not supported, only 'fp8' and 'compressed-tensors'"),
        ({**BLOCKS, "weight_block_size": [64, 128]}, r"weight_block_size = \[64, 128\] is not .* only \[128, 128\]"),
        (without(BLOCKS, "weight_block_size"), "weight_block_size = None"),
        ({**BLOCKS, "fmt": "e5m2"}, "fmt = 'e5m2' is not supported, only 'e4m3'"),
        ({**BLOCKS, "activation_scheme": "static"}, "activation_scheme = 'static'"),
        ({**CHANNEL, "kv_cache_scheme": {"num_bits": 8}}, "kv_cache_scheme"),
        ({**CHANNEL, "format": "pack-quantized"}, "format = 'pack-quantized'"),
        (without(CHANNEL, "config_groups"), "weights = None is not supported"),
        ({**CHANNEL, "config_groups": {"g": {"weights": {"type": "float", "num_bits": 4}}}}, "num_bits = 4"),
        ({**CHANNEL, "config_groups": {"g": {"weights": {"type": "int", "num_bits": 8}}}}, "type = 'int'"),
        (
            {**CHANNEL, "config_groups": {"g": {"weights": {"type": "float", "num_bits": 8, "strategy": "tensor"}}}},
            "strategy = 'tensor' is not supported, only 'channel'",
        ),
    ],
)
def test_other_formats_are_refused_by_name(table, words):
    fp8.check_config(None)
    fp8.check_config(CHANNEL)
    fp8.check_config(BLOCKS)
    with pytest.raises(UnsupportedError, match=words):
        fp8.check_config(table)


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.mark.parametrize("stream, drawn", [(io.StringIO(), False), (Terminal(), True)], ids=["file", "terminal"])
def test_the_bar_is_drawn_on_a_terminal_after_a_second(stream, drawn):
    times = iter([0.0, 0.5, 1.0, 1.01])
    line = "\rloading [###############...............] 2.0 of 4.0 GiB, 2.0 GiB/s, 1 s left"
    with fill.Progress(4 * 2**30, stream, lambda: next(times)) as progress:
        progress.add(2**30)
        assert stream.getvalue() == ""
        progress.add(2**30)
        assert stream.getvalue() == (line if drawn else "")
        progress.add(1)
        assert stream.getvalue() == (line if drawn else ""), "ten lines a second at most"
    assert stream.getvalue() == (line + "\r" + " " * (len(line) - 1) + "\r" if drawn else "")


PEAK = """
import json, sys
import glmx.models.checkpoint
from pathlib import Path

def memory(field):
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line.split()[1] for line in lines if line.startswith(field))) * 1024

idle = memory("VmRSS")
model = glmx.load(sys.argv[1])
print(json.dumps([memory("VmHWM") - idle, sum(p.nbytes for p in model.parameters())]))
"""


def test_the_peak_is_the_models_own_size(tmp_path):
    """In a process of its own: shards of 67 MB and 34 MB (FP8) make a model of 135 MB, with 64 MB beside it at most."""
    config = tiny_config(vocab_size=2**17, hidden_size=256, dtype="bfloat16", num_hidden_layers=1)
    tensors = {key: torch.zeros(shape, dtype=torch.bfloat16) for key, shape in layout.tensors(config)}
    tensors["lm_head.weight"] = tensors["lm_head.weight"].to(E4M3)
    tensors["lm_head.weight_scale_inv"] = torch.ones(2**10, 2)
    head = {key: tensor for key, tensor in tensors.items() if key.startswith("lm_head")}
    save_file(head, tmp_path / "a.safetensors")
    save_file({key: tensor for key, tensor in tensors.items() if key not in head}, tmp_path / "b.safetensors")
    files = {key: "a.safetensors" if key in head else "b.safetensors" for key in tensors}
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": files}))
    (tmp_path / "config.json").write_text(json.dumps(config.to_dict()))
    done = subprocess.run([sys.executable, "-c", PEAK, tmp_path], capture_output=True, text=True, env=os.environ)
    assert done.returncode == 0, done.stderr
    peak, size = json.loads(done.stdout)
    print(f"peak {peak >> 20} MB above idle, model {size >> 20} MB")
    assert size > 130e6 and peak < size + 64 * 2**20
