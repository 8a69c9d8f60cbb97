"""Models whose weights stay as their checkpoint stores them, in its files or in memory: what they compute, X2 and X3
under each format, what they refuse, and a checkpoint of compressed-tensors' own.
"""

from __future__ import annotations

import copy
import io
import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_invariance import flat_logits, serve_in_pieces
from test_replay import Pair, tokens

import glmx
from glmx.models import checkpoint, layout
from glmx.models.batch import Batch
from glmx.models.safetensors import SINGLE
from glmx.ops import StoredWeight
from glmx.reference import stored_weight as oracle
from stored_glm import CONFIGS, E4M3, FORMATS, write
from tiny_glm import CASES, FAMILIES, random_ids, random_model, tiny_config

# Two groups of 128, the second partial, and widths that no block divides.
SIZES = {"hidden_size": 160, "intermediate_size": 272, "moe_intermediate_size": 136, "num_hidden_layers": 2}
MLA_SIZES = {"q_lora_rank": 136, "kv_lora_rank": 144, "qk_nope_head_dim": 40, "v_head_dim": 48, "index_head_dim": 24}
ALL_FORMATS = ("bf16", *FORMATS)


@pytest.fixture(autouse=True)
def no_grad():
    with torch.no_grad():
        yield


def sized(case):
    own = {"head_dim": 48} if case == "qk_norm_bias" else MLA_SIZES
    layers = {} if "indexer_types" in CASES[case] else SIZES
    sizes = {**SIZES, **layers, **{k: v for k, v in own.items() if case == "dsa_shared" or k != "index_head_dim"}}
    shared = {"num_hidden_layers": 2, "indexer_types": ("full", "shared")} if case == "dsa_shared" else {}
    return tiny_config(**{**CASES[case], **sizes, **shared, "n_routed_experts": 4})


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """checkpoints(case, format, **options of write): a directory, made once."""
    made = {}

    def act(case, format, **options):
        key = (case, format, *options)
        if key not in made:
            made[key] = tmp_path_factory.mktemp(case) / format
            write(random_model(sized(case), 3), made[key], format, **options)
        return made[key]

    return act


def logits(model, seed=0, n=23):
    out = model(random_ids(model.config, 2, n, seed), mtp=True)
    return torch.cat([out.logits, out.mtp_logits], -1)


every_case = pytest.mark.parametrize("case", FAMILIES)
every_format = pytest.mark.parametrize("format", FORMATS)


@every_case
@every_format
def test_what_stays_in_few_bits(checkpoints, case, format):
    """Every Linear and expert that the files have in few bits, but kv_b_proj, in the bytes that they take there."""
    directory = checkpoints(case, format)
    model = glmx.load(directory)
    held, headers = model.stored_weights(), load_file(directory / SINGLE)
    names = {name for name, _ in model.named_parameters()}
    prefix = "model.layers.1."
    assert {name.split(".")[-2] for name in names if name.startswith(prefix)} >= {"gate", "eh_proj"} - {"eh_proj"}
    assert all(weight.format == format for weight in held.values())
    assert {f"{prefix}mlp.experts.gate_up_proj", f"{prefix}mlp.experts.down_proj"} <= held.keys()
    assert {f"{prefix}self_attn.o_proj.weight", "model.layers.0.mlp.gate_up_proj.weight"} <= held.keys()
    assert f"{prefix}mlp.shared_experts.down_proj.weight" in held and f"{prefix}mlp.gate.weight" in names
    assert (f"{prefix}self_attn.kv_b_proj.weight" in names) == (case != "qk_norm_bias")
    assert ("model.layers.0.self_attn.indexer.wk.weight" in held) == (case == "dsa_shared" and format == "fp8_blocks")
    small = [k for k, v in headers.items() if v.dtype in (torch.int8, torch.int32, E4M3) or "_scale" in k]
    assert sum(w.nbytes for w in held.values()) == sum(headers[k].nbytes for k in small if "kv_b_proj" not in k)
    assert not any(parameter.requires_grad for parameter in model.parameters())


@every_case
@every_format
def test_logits_are_those_of_the_weights_they_stand_for(checkpoints, case, format):
    """Bit for bit. Scales of powers of two leave the order of rounding and scaling open for int8 and fp8."""
    directory = checkpoints(case, format, power_of_two=format in ("int8", "fp8"))
    model, dense = glmx.load(directory), glmx.load(directory, dequantize=True)
    assert model.stored_weights() and not dense.stored_weights()
    assert torch.equal(logits(model), logits(dense))


@every_format
def test_weights_are_the_oracles(checkpoints, format):
    """Each StoredWeight, expanded by the oracle, is the Parameter that dequantize makes, gate rows before up rows."""
    directory = checkpoints("qk_norm_bias", format)
    dense = glmx.load(directory, dequantize=True).state_dict()
    for mapped in (False, True):
        for name, weight in glmx.load(directory, mapped=mapped).stored_weights().items():
            values, factor = oracle.dense(weight)
            values = values if factor is None else (values.float() * factor[..., None]).bfloat16()
            assert torch.equal(values.view(dense[name].shape), dense[name]), name


@every_format
def test_a_linear_within_its_bound(checkpoints, format):
    """q_proj with its bias against fp64: an fp32 sum of K products of n-bit numbers, and one rounding to bf16."""
    layer = glmx.load(checkpoints("qk_norm_bias", format)).model.layers[0].self_attn.q_proj
    assert isinstance(layer.weight, StoredWeight) and layer.bias is not None
    x = torch.randn(9, 160, generator=torch.Generator().manual_seed(5)).bfloat16()
    w, factor = oracle.dense(layer.weight)
    w = w[0].double() if factor is None else w[0].double() * factor[0, :, None].double()
    exact, size = x.double() @ w.T + layer.bias.double(), x.double().abs() @ w.abs().T + layer.bias.double().abs()
    bound = exact.abs() * 2**-8 + size * 170 * 2**-24
    assert bool(((layer(x).double() - exact).abs() <= bound).all())


# X2 and X3
@every_case
@every_format
def test_other_sequences_do_not_show(checkpoints, case, format):
    model = glmx.load(checkpoints(case, format), mapped=True)
    lengths = [1, 2, 5, 17, 34, 64, 65, 0, 3]
    sequences = [random_ids(model.config, 1, n, seed=n)[0] for n in lengths]
    for alone, together in zip(sequences, flat_logits(model, sequences), strict=True):
        assert torch.equal(flat_logits(model, [alone])[0], together), len(alone)


@every_case
@every_format
def test_any_chunking_gives_the_bits_of_one_forward(checkpoints, case, format):
    """Prefill, chunks, single tokens, and verification with rollback."""
    model = glmx.load(checkpoints(case, format), mapped=True)
    for seed in range(3):
        lengths = [90, 33 + seed]
        sequences = [random_ids(model.config, 1, n, seed=seed + n)[0] for n in lengths]
        served = serve_in_pieces(model, sequences, seed)
        whole = model.forward_tokens(
            torch.cat(sequences), torch.cat([torch.arange(n) for n in lengths]), Batch.from_lengths(lengths)
        )
        assert torch.equal(torch.cat(served), whole)


@every_case
@every_format
def test_recorded_steps_give_the_bits_of_plain_ones(checkpoints, case, format):
    model, draw = glmx.load(checkpoints(case, format), mapped=True), random.Random(case)
    pair = Pair(model)
    slots = [pair.both(lambda s: s.allocate()) for _ in range(3)]
    for step in range(20):
        chosen = sorted(draw.sample(slots, draw.randint(1, 3)))
        new = {s: tokens(draw, model, draw.choice([1, 1, 2, 4])) for s in chosen}
        hidden = pair.forward(new)
        if step % 2:
            ends = Batch.from_lengths([len(new[s]) for s in chosen]).cu_seqlens_q
            pair.draft(chosen[:1], hidden[: ends[1]], [tokens(draw, model, ends[1])])
            pair.state.truncate(chosen[0], pair.state.lengths[chosen[0]])
    assert pair.replay.replays > 5


def test_a_weight_in_the_place_of_another_drops_recordings(checkpoints):
    model = glmx.load(checkpoints("qk_norm_bias", "int8"))
    pair = Pair(model)
    slot = pair.both(lambda s: s.allocate())
    for _ in range(4):
        pair.forward({slot: [1]})
    assert pair.replay.replays == 2
    first, second = (model.model.layers[0].self_attn.get_submodule(name) for name in ("k_proj", "v_proj"))
    first.weight, second.weight = second.weight, first.weight
    pair.forward({slot: [1]})  # compares with a plain forward
    assert pair.replay.replays == 2


@pytest.mark.parametrize("format", ALL_FORMATS)
def test_speculation_is_plain_greedy(checkpoints, format):
    directory = checkpoints("qk_norm_bias", format)
    params = glmx.SamplingParams(temperature=0, max_tokens=40, ignore_eos=True)
    prompts = [[1, 2, 3], list(range(40))]
    found = []
    for options in ({"num_speculative_tokens": 3}, {}, {"mapped": False}):
        llm = glmx.LLM(directory, max_num_seqs=2, **options)
        assert bool(llm.model.stored_weights()) == (options != {"mapped": False} or format != "bf16")
        found.append([out.outputs[0].token_ids for out in llm.generate(prompts, params)])
    assert found[0] == found[1] == found[2]
    ids, model = list(prompts[0]), glmx.load(directory)
    for _ in range(40):
        ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
    assert ids[3:] == found[0][0]


# Mapped files
def file_of(tensor):
    """The file that is mapped where a tensor lies, or ''."""
    for line in Path("/proc/self/maps").read_text().splitlines():
        span, _, _, _, _, *path = line.split(maxsplit=5)
        first, end = (int(part, 16) for part in span.split("-"))
        if first <= tensor.data_ptr() < end:
            return path[0].strip() if path and path[0].startswith("/") else ""
    return ""


def shifted(directory, by):
    """The same file with a header `by` bytes longer: tensors begin at other addresses."""
    content = (directory / SINGLE).read_bytes()
    n = int.from_bytes(content[:8], "little")
    (directory / SINGLE).write_bytes((n + by).to_bytes(8, "little") + content[8 : 8 + n] + b" " * by + content[8 + n :])


@every_case
@pytest.mark.parametrize("format", ALL_FORMATS)
def test_mapped_is_copied_bit_for_bit(checkpoints, tmp_path, case, format):
    write(random_model(sized(case), 3), tmp_path / format, format)
    for shift in (0, 1, 2, 4):
        shifted(tmp_path / format, shift)  # 1, 3 and 7 bytes in all
        copied, mapped = (glmx.load(tmp_path / format, mapped=mapped, check_finite=True) for mapped in (False, True))
        assert not any(map(file_of, copied.tensors()))
        names = {**dict(mapped.named_parameters()), **mapped.stored_weights()}
        assert names.keys() == {name for name, _ in copied.named_parameters()} | copied.stored_weights().keys()
        lies = {
            name: [file_of(part) for pair in held.matrices for part in pair if part is not None]
            if isinstance(held, StoredWeight)
            else [file_of(held)]
            for name, held in names.items()
        }
        expected = str((tmp_path / format / SINGLE).resolve())
        if shift == 0:
            # kv_b_proj is dequantised; norms in fp32 become bf16.
            rest = {name for name, files in lies.items() if set(files) != {expected}}
            assert all(name.endswith(("norm.weight", "norm.bias", "proj.bias", "kv_b_proj.weight")) for name in rest)
            assert format == "bf16" or case == "qk_norm_bias" or any("kv_b_proj" in name for name in rest)
        elif format not in ("int8", "fp8", "fp8_blocks"):
            assert not any(expected in files for files in lies.values())
        assert torch.equal(logits(copied), logits(mapped))


def test_experts_in_one_tensor_are_mapped_too(tmp_path):
    config = tiny_config(**SIZES)
    expected = write(random_model(config, 3), tmp_path / "ckpt", "bf16")
    tensors, prefix = load_file(tmp_path / "ckpt" / SINGLE), "model.layers.1.mlp.experts"
    experts = range(config.n_routed_experts)
    gate, up, down = ([tensors.pop(f"{prefix}.{e}.{p}_proj.weight") for e in experts] for p in ("gate", "up", "down"))
    tensors[f"{prefix}.gate_up_proj"] = torch.stack([torch.cat(pair) for pair in zip(gate, up, strict=True)])
    for both in (False, True):  # one of the two in the other spelling: moe_mlp takes two of a kind
        if both:
            tensors = {k: v for k, v in tensors.items() if f"{prefix}.0.down" not in k}
            tensors = {k: v for k, v in tensors.items() if not (k.startswith(prefix) and "down_proj.weight" in k)}
            tensors[f"{prefix}.down_proj"] = torch.stack(down)
        else:
            tensors |= {f"{prefix}.{e}.down_proj.weight": down[e] for e in experts}
        save_file(tensors, tmp_path / "ckpt" / SINGLE)
        mapped, copied = (glmx.load(tmp_path / "ckpt", mapped=mapped) for mapped in (True, False))
        experts_module = mapped.model.layers[1].mlp.experts
        assert file_of(experts_module.gate_up_proj) and isinstance(experts_module.gate_up_proj, torch.nn.Parameter)
        assert torch.equal(logits(mapped), logits(copied))
    assert torch.equal(experts_module.down_proj[1], expected[f"{prefix}.1.down_proj.weight"])


@pytest.mark.parametrize("mapped", [False, True])
def test_one_expert_alone(tmp_path, mapped):
    config = tiny_config(**SIZES, n_routed_experts=1, num_experts_per_tok=1)
    write(random_model(config, 3), tmp_path / "ckpt", "bf16")
    model = glmx.load(tmp_path / "ckpt", mapped=mapped)
    assert torch.equal(logits(model), logits(glmx.load(tmp_path / "ckpt")))


def test_experts_of_several_formats_become_parameters(checkpoints, tmp_path):
    """One expert in bf16, and in the next layer one matrix's scales in bf16: mixtures are computed all the same."""
    model = random_model(sized("qk_norm_bias"), 3)
    key = "model.layers.1.mlp.experts.2.up_proj.weight"
    plain = write(model, tmp_path / "plain", "bf16")

    def mix(tensors):
        del tensors[key], tensors[key + "_scale"]
        tensors[key] = plain[key]
        other = "model.layers.2.mlp.experts.1.down_proj.weight_scale"
        tensors[other] = tensors[other].bfloat16()

    expected = write(model, tmp_path / "mixed", "int8", mix, power_of_two=True)
    for mapped in (False, True):
        loaded = glmx.load(tmp_path / "mixed", mapped=mapped)
        gate_up = loaded.model.layers[1].mlp.experts.gate_up_proj
        assert torch.equal(gate_up[2].chunk(2)[1], plain[key])
        assert torch.equal(gate_up[1].chunk(2)[1], expected["model.layers.1.mlp.experts.1.up_proj.weight"])
        last = loaded.model.layers[2].mlp.experts
        assert last.down_proj.codes == last.gate_up_proj.codes and last.down_proj.scale_dtype == torch.float32
        assert torch.equal(logits(loaded), logits(glmx.load(tmp_path / "mixed", dequantize=True)))


@pytest.mark.parametrize("mapped", [False, True])
@every_format
def test_fp32_makes_parameters(checkpoints, format, mapped):
    directory = checkpoints("lite", format)
    model, dense = glmx.load(directory, dtype="fp32", mapped=mapped), glmx.load(directory, dequantize=True)
    assert not model.stored_weights()
    ours, theirs = model.state_dict(), dense.state_dict()  # vectors are fp32 in the files
    assert ours.keys() == theirs.keys()
    for key in ours:
        rounded = ours[key].to(theirs[key].dtype)
        assert torch.equal(rounded, theirs[key]) and (rounded.dim() == 1 or torch.equal(ours[key], rounded.float()))


@pytest.mark.parametrize("format, mapped", [("int4", False), ("bf16", True)])
def test_such_a_model_is_neither_trained_nor_saved(checkpoints, tmp_path, format, mapped):
    model = glmx.load(checkpoints("qk_norm_bias", format), mapped=mapped)
    words = rf": model.layers.\S+ is no parameter, .* \({format}\); glmx.load\(\.\.\., dequantize=True, mapped=False\)"
    for what, act in {
        "train": model.train,
        "state_dict": model.state_dict,
        "init_weights": model.init_weights,
        "state_dict ": lambda: checkpoint.save(model, tmp_path / "new"),
    }.items():
        with pytest.raises(ValueError, match=what.strip() + words) as error:
            act()
        assert "\n" not in str(error.value)
    assert not (tmp_path / "new").exists() and not list(tmp_path.glob(".tmp*")) and not model.training
    with torch.enable_grad():
        assert not model(random_ids(model.config, 1, 3)).logits.requires_grad


@pytest.mark.parametrize("format", ALL_FORMATS)
def test_a_copy_stands_on_its_own(checkpoints, format):
    """The addresses that ops compute with are those of the copy's tensors."""
    model = glmx.load(checkpoints("qk_norm_bias", format), mapped=True)
    expected = logits(model)
    file = io.BytesIO()
    torch.save(glmx.load(checkpoints("qk_norm_bias", format)), file)  # which does not save two dtypes of one mapping
    file.seek(0)
    for twin in (copy.deepcopy(model), torch.load(file, weights_only=False)):
        for weight in twin.stored_weights().values():
            assert weight.table.flatten()[0] == weight.matrices[0].values.data_ptr()
        assert not any(map(file_of, twin.tensors())) and torch.equal(logits(twin), expected)


def test_training_starts_from_parameters(checkpoints):
    from glmx.train.run import build_model

    model = build_model(checkpoints("qk_norm_bias", "int4"), torch.bfloat16, 0)
    assert not model.stored_weights() and all(p.requires_grad and not file_of(p) for p in model.parameters())


# Memory
PEAK = """
import json, sys
import glmx.models.checkpoint
from pathlib import Path

def memory(field):
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line.split()[1] for line in lines if line.startswith(field))) * 1024

idle = memory("RssAnon")
model = glmx.load(sys.argv[1], mapped=True)
print(json.dumps([memory("RssAnon") - idle, sum(t.nbytes for t in model.tensors())]))
"""


@pytest.mark.parametrize("format", ["bf16", "int4"])
def test_a_mapped_model_takes_no_memory_of_its_own(tmp_path, format):
    """Of 100 MB or 30 MB not a tenth is this process's alone."""
    config = tiny_config(hidden_size=512, intermediate_size=8192, dtype="bfloat16", num_hidden_layers=4,
                         first_k_dense_replace=4, num_nextn_predict_layers=0)  # fmt: skip
    tensors = {key: torch.zeros(shape, dtype=torch.bfloat16) for key, shape in layout.tensors(config)}
    if format == "int4":
        for key in [key for key in tensors if key.endswith("_proj.weight")]:
            rows, columns = tensors.pop(key).shape
            tensors[key + "_packed"] = torch.zeros(rows, columns // 8, dtype=torch.int32)
            tensors[key + "_scale"] = torch.ones(rows, -(-columns // 128), dtype=torch.bfloat16)
            tensors[key + "_shape"] = torch.tensor([rows, columns])
    save_file(tensors, tmp_path / SINGLE)
    (tmp_path / "config.json").write_text(json.dumps(config.to_dict()))
    done = subprocess.run([sys.executable, "-c", PEAK, tmp_path], capture_output=True, text=True, env=os.environ)
    assert done.returncode == 0, done.stderr
    own, size = json.loads(done.stdout)
    print(f"{own / 2**20:.1f} MB of its own, model {size / 2**20:.1f} MB")
    assert size > 25e6 and own < 3e6 + size / 100


def locked():
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line.split()[1] for line in lines if line.startswith("VmLck"))) * 1024


def test_locked_weights(checkpoints):
    """The kernel counts the whole model as locked, for as long as it is there."""
    directory = checkpoints("lite", "int4")
    size = sum(tensor.nbytes for tensor in glmx.load(directory).tensors())
    assert size < 2**22, "so that any machine's limit allows it"
    before = locked()
    model = glmx.load(directory, mapped=True, lock=True)
    assert size <= locked() - before < size + 2**20
    del model


LIMITED = """
import ctypes, resource, sys
from glmx.cli import main

resource.setrlimit(resource.RLIMIT_MEMLOCK, (20 << 12, 20 << 12))
header, no_rights = (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()
assert ctypes.CDLL(None).capset(header, no_rights) == 0  # root may lock as much as it likes
code = main.main(sys.argv[1:])
status = open("/proc/self/status").read().splitlines()
print(next(line.split()[1] for line in status if line.startswith("VmLck")))
sys.exit(code)
"""


def test_a_lock_that_is_refused(checkpoints):
    """One line with the limit and the size, before anything is generated; nothing stays locked."""
    command = [sys.executable, "-c", LIMITED, "generate", checkpoints("lite", "int4"), "--prompt", "x", "--lock"]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ)
    assert done.returncode == 2 and done.stdout.strip() == "0"
    words = "glmx generate: cannot lock the weights in memory: Cannot allocate memory; they take "
    assert done.stderr.startswith(words) and done.stderr.count("\n") == 1
    assert done.stderr.endswith(" KiB, and this process may lock 80 KiB (ulimit -l)\n")


# Of others
def tree(weights):
    """nn.Linears at the places that the keys name: what compressed-tensors works on."""
    root = torch.nn.Module()
    for key, weight in weights.items():
        *path, last = key.removesuffix(".weight").split(".")
        at = root
        for name in path:
            if not hasattr(at, name):
                at.add_module(name, torch.nn.Module())
            at = getattr(at, name)
        linear = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False, dtype=weight.dtype)
        linear.weight.data = weight
        at.add_module(last, linear)
    return root


@pytest.mark.parametrize("format", ["int4", "int8", "fp8"])
def test_a_checkpoint_of_compressed_tensors(tmp_path, format):
    """Quantised, written and described by the library; its own decompression is what we hold."""
    pytest.importorskip("compressed_tensors")
    from compressed_tensors.compressors import ModelCompressor
    from compressed_tensors.quantization import (
        QuantizationArgs,
        QuantizationConfig,
        QuantizationScheme,
        apply_quantization_config,
    )
    from compressed_tensors.quantization.utils import calculate_qparams

    config = tiny_config(hidden_size=128, intermediate_size=256, moe_intermediate_size=128, head_dim=32,
                         num_hidden_layers=2, n_routed_experts=3)  # fmt: skip
    tensors = write(random_model(config, 3), tmp_path / "ckpt", "bf16")
    own = CONFIGS[format]
    weights = {k: v.clone() for k, v in tensors.items() if k.endswith("_proj.weight") and "eh_proj" not in k}
    root = tree(weights)
    args = QuantizationArgs(**own["config_groups"]["group_0"]["weights"])
    scheme = QuantizationScheme(targets=["Linear"], weights=args)
    apply_quantization_config(root, QuantizationConfig(config_groups={"group_0": scheme}))
    for module in root.modules():
        if isinstance(module, torch.nn.Linear):
            blocks = module.weight.float().unflatten(1, (-1, 128 if format == "int4" else module.in_features))
            scale, _ = calculate_qparams(blocks.amin(-1), blocks.amax(-1), args)
            module.weight_scale.copy_(scale)
    compressor = ModelCompressor.from_pretrained_model(root, own["format"])
    compressor.compress_model(root)
    rest = {key: tensor for key, tensor in tensors.items() if key not in weights}
    stored = {key: tensor.contiguous().clone() for key, tensor in root.state_dict().items()}
    save_file({**rest, **stored}, tmp_path / "ckpt" / SINGLE)
    compressor.update_config(str(tmp_path / "ckpt"))
    assert json.loads((tmp_path / "ckpt/config.json").read_text())["quantization_config"]["format"] == own["format"]
    compressor.decompress_model(root)

    theirs = {key: tensor for key, tensor in root.state_dict().items() if key.endswith(".weight")}
    again = checkpoint.save(glmx.load(tmp_path / "ckpt", dequantize=True), tmp_path / "again")
    ours = load_file(again / SINGLE)
    assert theirs.keys() == weights.keys() and all(torch.equal(ours[key], theirs[key]) for key in theirs)
    model = glmx.load(tmp_path / "ckpt", mapped=True)
    assert {weight.format for weight in model.stored_weights().values()} == {format}
    ids = random_ids(config, 2, 9)
    if format == "int4":
        assert torch.equal(model(ids).logits, glmx.load(again)(ids).logits)
    assert model(ids).logits.isfinite().all()
