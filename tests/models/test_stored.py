"""Checkpoints with weights in few bits, as parameters: four formats, partial blocks, a copy of the head, and what does
not fit together. Weights that stay in few bits: test_stored_models.py.
"""

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
from glmx.models import checkpoint, fill, layout, stored
from glmx.models.safetensors import INDEX, SINGLE
from glmx.models.stored import Stored
from glmx.reference import stored_weight as oracle
from stored_glm import CONFIGS, E4M3, FORMATS, quantised
from stored_glm import write as write_checkpoint
from tiny_glm import random_ids, random_model, tiny_config

PARTS = {format: list(quantised(torch.ones(2, 2), format)[0]) for format in FORMATS}


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
    """write(format, change): a quantised checkpoint, and the tensors that the model must hold."""

    def act(format, change=lambda tensors: None, shards=False):
        return tmp_path / format, write_checkpoint(model, tmp_path / format, format, change, shards=shards)

    return act


@pytest.mark.parametrize("piece", [2**20, 160 * 100])  # whole tensors; 100 rows of 160, across blocks
@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("dtype", ["auto", "fp32"])
def test_weights_are_bf16_of_q_times_scale(write, format, dtype, piece, monkeypatch):
    monkeypatch.setattr(fill, "_PIECE", piece)
    directory, expected = write(format, shards="fp8" not in format)
    loaded = glmx.load(directory, dtype=dtype, dequantize=dtype == "auto", check_finite=True)
    assert loaded.dtype == (torch.float32 if dtype == "fp32" else torch.bfloat16)
    again = checkpoint.save(loaded, directory.parent / "again")
    held = load_file(again / SINGLE)
    assert held.keys() == expected.keys()
    assert all(torch.equal(held[key].float(), tensor.to(held[key].dtype).float()) for key, tensor in expected.items())
    assert "quantization_config" not in json.loads((again / "config.json").read_text())
    with torch.no_grad():
        assert loaded(random_ids(loaded.config, 1, 5)).logits.isfinite().all()


@pytest.mark.parametrize("format", FORMATS)
def test_576_rows_of_200_columns(format):
    """kv_a_proj_with_mqa: 4.5 blocks of rows, the last 64 with scales of their own; a group of 72 columns."""
    weight = torch.randn(576, 200, generator=torch.Generator().manual_seed(1))
    weight[512:] *= 100
    parts, expected = quantised(weight, format)
    values, scale = list(parts.values())[:2]
    assert scale.shape == {"int4": (576, 2), "fp8_blocks": (5, 2)}.get(format, (576, 1))
    how = Stored(format, "x", "x_scale", (576, 200))
    for first, end in ((0, 576), (500, 530)):
        part = stored.dequantised(how, values[first:end], stored.row_scales(how, scale, first, end - first))
        assert torch.equal(part, expected[first:end])
    theirs, factor = oracle.matrix(format, values, scale, 200)
    exact = theirs if factor is None else (theirs.float() * factor[:, None]).bfloat16()
    assert torch.equal(exact, expected)
    assert (expected[512:].float().std() / expected[:512].float().std()) == pytest.approx(100, rel=0.2)


@pytest.mark.parametrize("format", FORMATS)
def test_a_quantised_copy_of_the_head(write, format):
    """GLM-4.5's FP8 repositories quantise the MTP layer's copy of a head that is not quantised."""
    key = "model.layers.2.shared_head.head.weight"

    def add(by):
        def change(tensors):
            parts, _ = quantised(tensors["lm_head.weight"].float() + by, format)
            tensors.update({key + behind: tensor for behind, tensor in parts.items()})

        return change

    directory, expected = write(format, add(0))
    head = glmx.load(directory).lm_head.weight
    assert torch.equal(head, expected["lm_head.weight"])
    directory.rename(directory.with_name("good"))
    directory, _ = write(format, add(0.1))
    with pytest.raises(UnsupportedError, match=f"{key} differs"):
        glmx.load(directory)


@pytest.mark.parametrize("options", [{"dequantize": True}, {}, {"mapped": True}], ids=str)
def test_a_nan_in_fp8_is_found(write, options):
    key = "model.layers.1.mlp.experts.2.down_proj.weight"
    directory, _ = write("fp8_blocks", lambda tensors: tensors[key].view(torch.uint8)[3].fill_(0x7F))
    with pytest.raises(CheckpointError, match=f"tensor {key}: 40 of its 6400 values are NaN"):
        glmx.load(directory, check_finite=True, **options)


@pytest.mark.parametrize("value", [float("nan"), float("-inf"), 3e38])
@pytest.mark.parametrize("options", [{"dequantize": True}, {}, {"mapped": True}], ids=str)
@pytest.mark.parametrize("format", FORMATS)
def test_scales_that_make_no_numbers_are_found(write, format, options, value):
    """3e38 times the largest value overflows bf16."""
    key = "model.layers.1.mlp.experts.2.down_proj.weight"
    values, scale = (key + behind for behind in PARTS[format][:2])
    directory, _ = write(format, lambda tensors: tensors[scale].fill_(value))
    at_fault = values if "dequantize" in options else scale
    with pytest.raises(CheckpointError, match=rf"tensor {at_fault}: \d+ of its \d+ values are NaN or infinite"):
        glmx.load(directory, check_finite=True, **options)
    glmx.load(directory, **options)


KEY = "model.layers.0.self_attn.o_proj.weight"  # [160, 192]
EXPERTS = "model.layers.1.mlp.experts"


PACKED, SCALE, SHAPE = (KEY + behind for behind in ("_packed", "_scale", "_shape"))


@pytest.mark.parametrize(
    "format, change, error, words",
    [
        ("fp8", lambda t: t.pop(SCALE), CheckpointError, f"{KEY} is F8_E4M3: .*, found neither"),
        ("fp8_blocks", lambda t: t.update({SCALE: torch.ones(160, 1)}), CheckpointError, "found both"),
        (
            "fp8_blocks",
            lambda t: t.update({KEY + "_scale_inv": torch.ones(1, 2)}),
            CheckpointError,
            rf"{KEY}_scale_inv has shape \[1, 2\], expected \[2, 2\] for a weight of \[160, 192\]",
        ),
        ("fp8", lambda t: t.update({SCALE: torch.ones(160)}), CheckpointError, r"expected \[160, 1\] for"),
        ("fp8", lambda t: t.update({SCALE: torch.ones(160, 1).half()}), UnsupportedError, "is F16, only F32, BF16 are"),
        ("fp8_blocks", lambda t: t.update({KEY: torch.ones(160, 192)}), CheckpointError, f"unknown {KEY}_scale_inv"),
        (
            "fp8_blocks",
            lambda t: t.update({"model.norm.weight": torch.ones(160).to(E4M3)}),
            UnsupportedError,
            r"model.norm.weight is F8_E4M3 \[160\], only matrices are",
        ),
        ("fp8_blocks", lambda t: t.update({KEY: t[KEY].to(torch.float8_e5m2)}), CheckpointError, "unknown"),
        ("fp8_blocks", lambda t: t.update({KEY: t[KEY].T}), CheckpointError, r"shape \[192, 160\], the config expects"),
        ("int8", lambda t: t.pop(SCALE), CheckpointError, f"{KEY} is I8: expected its _scale, found none"),
        ("int8", lambda t: t.update({SCALE: torch.ones(1, 1)}), CheckpointError, r"\[1, 1\], expected \[160, 1\] for"),
        (
            "int8",
            lambda t: t.update({"model.norm.weight": torch.ones(160).to(torch.int8)}),
            UnsupportedError,
            "model.norm.weight is I8, only BF16, F32, F16, F8_E4M3 are supported",
        ),
        (
            "int8",
            lambda t: t.update({KEY + "_zero_point": torch.zeros(160, 1).to(torch.int8)}),
            UnsupportedError,
            f"tensor {KEY}_zero_point: asymmetric weights are not supported",
        ),
        (
            "int4",
            lambda t: t.update({KEY + "_g_idx": torch.zeros(192).int()}),
            UnsupportedError,
            rf"tensor {KEY}_g_idx: .* \(actorder\) are not supported",
        ),
        ("int4", lambda t: t.pop(PACKED), CheckpointError, f"lacks {KEY}$"),
        ("int4", lambda t: t.pop(SCALE), CheckpointError, f"tensor {PACKED} lacks {SCALE} beside it"),
        ("int4", lambda t: t.pop(SHAPE), CheckpointError, f"tensor {PACKED} lacks {SHAPE} beside it"),
        ("int4", lambda t: t.update({KEY: torch.ones(160, 192)}), CheckpointError, f"{KEY}, {PACKED} are both there"),
        ("int4", lambda t: t.update({PACKED: t[PACKED].long()}), UnsupportedError, "is I64 .*, only I32 matrices are"),
        (
            "int4",
            lambda t: t.update({SHAPE: torch.tensor([160, 200])}),
            CheckpointError,
            rf"{SHAPE} is \[160, 200\], which {PACKED} of \[160, 24\] is not",
        ),
        ("int4", lambda t: t.update({SHAPE: torch.tensor([-1, 192])}), CheckpointError, r"is \[-1, 192\], which"),
        ("int4", lambda t: t.update({SHAPE: torch.tensor([160.0, 192])}), UnsupportedError, r"is F32 \[2\], only I64"),
        (
            "int4",
            lambda t: t.update({SCALE: torch.ones(160, 6).bfloat16()}),
            CheckpointError,
            r"shape \[160, 6\], expected \[160, 2\] for a weight of \[160, 192\]",
        ),
        ("int4", lambda t: t.update({SCALE: t[SCALE].half()}), UnsupportedError, "is F16, only F32, BF16 are"),
        (
            "int4",
            lambda t: t.update({PACKED: t[PACKED][:, :16], SCALE: t[SCALE][:, :1], SHAPE: torch.tensor([160, 128])}),
            CheckpointError,
            rf"tensor {KEY} has shape \[160, 128\], the config expects \[160, 192\]",
        ),
        (
            "int4",
            lambda t: t.update({"x." + key: t[key].clone() for key in (PACKED, SCALE, SHAPE)}),
            CheckpointError,
            f"unknown x.{PACKED}, x.{SCALE}, x.{SHAPE}",
        ),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_named(write, format, change, error, words, monkeypatch):
    directory, _ = write(format, change)
    monkeypatch.setattr(checkpoint, "_allocated", lambda *_: pytest.fail("the model was allocated"))
    for options in ({}, {"mapped": True}, {"dequantize": True}):
        with pytest.raises(error, match=words):
            glmx.load(directory, **options)


def without(table, *keys):
    return {key: value for key, value in table.items() if key not in keys}


def of_weights(format, group=None, **changes):
    """The format's config with other `weights`, and other keys of their group."""
    table = json.loads(json.dumps(CONFIGS[format]))
    table["config_groups"]["group_0"]["weights"].update(changes)
    table["config_groups"]["group_0"].update(group or {})
    return table


BLOCKS, CHANNEL = CONFIGS["fp8_blocks"], CONFIGS["fp8"]
ALL_THREE = "only 'int-quantized', 'pack-quantized', 'float-quantized'"


@pytest.mark.parametrize(
    "table, words",
    [
        ({"quant_method": "awq"}, "quant_method = 'awq' is not supported, only 'fp8' and 'compressed-tensors'"),
        ({**BLOCKS, "weight_block_size": [64, 128]}, r"weight_block_size = \[64, 128\] is not .* only \[128, 128\]"),
        (without(BLOCKS, "weight_block_size"), "weight_block_size = None"),
        ({**BLOCKS, "fmt": "e5m2"}, "fmt = 'e5m2' is not supported, only 'e4m3'"),
        ({**BLOCKS, "activation_scheme": "static"}, "activation_scheme = 'static'"),
        ({**CHANNEL, "kv_cache_scheme": {"num_bits": 8}}, "kv_cache_scheme"),
        ({**CHANNEL, "format": "nvfp4-pack-quantized"}, f"= 'nvfp4-pack-quantized' is not supported, {ALL_THREE}"),
        ({**CHANNEL, "format": "mixed-precision"}, f"= 'mixed-precision' is not supported, {ALL_THREE}"),
        ({**CHANNEL, "format": ["int-quantized"]}, "format = "),
        (without(CHANNEL, "config_groups"), "weights = None is not supported"),
        ({**CHANNEL, "config_groups": {"g": {"weights": {"type": "float", "num_bits": 4}}}}, "num_bits = 4"),
        ({**CHANNEL, "config_groups": {"g": {"weights": {"type": "int", "num_bits": 8}}}}, "type = 'int'"),
        (of_weights("fp8", strategy="tensor"), "strategy = 'tensor' is not supported, only 'channel'"),
        (of_weights("int8", strategy="group", group_size=128), "strategy = 'group' is not supported, only 'channel'"),
        (of_weights("int8", symmetric=False), "symmetric = False is not supported, only True"),
        (of_weights("int8", dynamic=True), "dynamic = True is not supported, only False"),
        (of_weights("int8", {"input_activations": {"dynamic": False}}), "dynamic = False is not supported, only True"),
        (of_weights("int8", {"output_activations": {"dynamic": True}}), "output_activations = .* only None"),
        (of_weights("int4", num_bits=8), "num_bits = 8 is not supported, only 4"),
        (of_weights("int4", type="float"), "type = 'float' is not supported, only 'int'"),
        (of_weights("int4", group_size=32), "group_size = 32 is not supported, only 128"),
        (of_weights("int4", strategy="channel", group_size=None), "= 'channel' is not supported, only 'group'"),
        (of_weights("int4", symmetric=False), "symmetric = False"),
        (of_weights("int4", actorder="group"), "actorder = 'group' is not supported, only None"),
        (of_weights("int4", {"format": "int-quantized"}), "format = 'int-quantized' is not .* only 'pack-quantized'"),
        (
            {**CONFIGS["int4"], "config_groups": {str(n): CONFIGS[format]["config_groups"]["group_0"]
                                                  for n, format in enumerate(("int4", "int8"))}},
            "num_bits = 8 is not supported, only 4",
        ),
        ({**CONFIGS["int4"], "transform_config": {"config_groups": {"R1": {}}}}, "transform_config = .* only None"),
        ({**CONFIGS["int4"], "sparsity_config": {"format": "sparse-24-bitmask"}}, "sparsity_config = "),
    ],
)  # fmt: skip
def test_other_formats_are_refused_by_name(table, words):
    assert stored.check_config(None) is None
    for format, config in CONFIGS.items():
        assert stored.check_config(config) == format
    with pytest.raises(UnsupportedError, match=words):
        stored.check_config(table)


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
print(json.dumps([memory("VmHWM") - idle, sum(p.nbytes for p in model.parameters()), "sympy" in sys.modules]))
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
    peak, size, sympy = json.loads(done.stdout)
    assert not sympy, "some of torch's calls on meta tensors import it: half a second and 30 MB"
    print(f"peak {peak >> 20} MB above idle, model {size >> 20} MB")
    assert size > 130e6 and peak < size + 64 * 2**20
