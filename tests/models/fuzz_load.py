"""Feeds glmx.load random checkpoints and prints one JSON line of what came of it: run by test_fuzz.py, or by hand.

    PYTHONPATH=python:tests python tests/models/fuzz_load.py DIR CONFIGS HEADERS BOTH TOKENIZERS [SEED]

Each example must load or raise a GlmxError of one short line. Anything else ends the process with hypothesis' smallest
example; a crash or a hang ends it with the Python stack. Without SEED the examples are the same in every run.

Two processes: hypothesis makes the examples here, and a child that does nothing else loads them, so that its memory is
glmx's alone.
"""

from __future__ import annotations

import collections
import faulthandler
import json
import re
import shutil
import subprocess
import sys
import traceback
from pathlib import Path

import hypothesis
import torch
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import glmx
from glmx.data import tokenizer as tokenizers
from glmx.errors import GlmxError
from glmx.models import checkpoint
from glmx.models.safetensors import INDEX, SINGLE, read_header
from tiny_glm import random_model, tiny_config

HANG_S = 30.0  # a load of these files takes milliseconds
COUNTS: collections.Counter[str] = collections.Counter()


def outcome(act) -> dict:
    """What came of `act`: {"loaded": its result}, {"refused": kind of error}, or {"wrong": what must not be}."""
    faulthandler.dump_traceback_later(HANG_S, exit=True)
    try:
        return {"loaded": act()}
    except GlmxError as error:
        message = str(error)
        if not (message.isprintable() and 0 < len(message) < 1000):
            return {"wrong": f"not a one-line message: {message!r}"}
        # What is left without names and numbers tells one kind of error from another.
        return {"refused": re.sub(r"'.*?'|[\d.]+|\[.*?\]|{.*?}|\S*[._]\S*", "", message)[:40]}
    except Exception:
        return {"wrong": traceback.format_exc()}
    finally:
        faulthandler.cancel_dump_traceback_later()


def load_once(directory: Path, dtype: str, check_finite: bool, mapped: bool) -> None:
    model = glmx.load(directory, dtype=dtype, check_finite=check_finite, mapped=mapped)
    held = sum(t.nbytes for t in model.tensors())
    there = sum(f.stat().st_size for f in directory.glob("*.safetensors"))
    assert held <= 2 * there, f"{held} bytes allocated for {there} bytes of files"


def same_as_the_library(file: Path) -> None:
    """A header that glmx takes, the safetensors library takes too, and reads the same from it."""
    entries = read_header(file)
    with safe_open(file, "pt") as opened:
        assert set(opened.keys()) == entries.keys()
        for key, entry in entries.items():
            theirs = opened.get_slice(key)
            assert (theirs.get_dtype(), tuple(theirs.get_shape())) == (entry.dtype, entry.shape)


def read_tokenizer(directory: Path) -> None:
    tokenizers.Tokenizer.from_dir(directory)


ACTS = {act.__name__: act for act in (load_once, same_as_the_library, read_tokenizer)}


def loader_main() -> None:
    """Carries out a line [act, path, arguments...] of standard input at a time; the first answer is the idle memory."""
    print(json.dumps(memory("VmRSS")), flush=True)
    for line in sys.stdin:
        act, path, *arguments = json.loads(line)
        answer = outcome(lambda: ACTS[act](Path(path), *arguments))  # noqa: B023 - called at once
        print(json.dumps({**answer, "peak_mb": memory("VmHWM")}), flush=True)


class Loader:
    """The process that loads. `above_idle_mb` is its highest memory so far above what it had after its imports."""

    def __init__(self) -> None:
        command = [sys.executable, __file__, "loader"]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.idle_mb = self._answer()
        self.above_idle_mb = 0

    def run(self, act: str, path: Path, *arguments) -> None:
        print(json.dumps([act, str(path), *arguments]), file=self.process.stdin, flush=True)
        answer = self._answer()
        assert "wrong" not in answer, answer["wrong"]
        self.above_idle_mb = answer["peak_mb"] - self.idle_mb
        if act == "same_as_the_library":
            return
        COUNTS["loaded" if "loaded" in answer else "refused"] += 1
        if "refused" in answer:
            COUNTS["kind " + answer["refused"]] += 1

    def _answer(self):
        line = self.process.stdout.readline()
        if not line:
            sys.exit(f"the loading process ended with {self.process.wait()}: a crash or a hang; its stack is above")
        return json.loads(line)


# What to put in the place of something else. Most of it is picked from lists: hypothesis takes milliseconds to build a
# nested value, a load of these files takes one.
NUMBERS = [0, -1, 1, 2, 3, 7, 8, 512, 513, 2**31 - 1, 2**31, 2**53, 2**63, 2**64, 10**30, -(10**30), 10**400]
FLOATS = [0.5, -0.0, 1e-45, 1e308, 1e30, float("nan"), float("inf"), float("-inf")]
TEXTS = [
    "",
    "x",
    "a\nb",
    "\0",
    "\u4e2d\U0001f600",
    "x" * 5000,
    "glm4_moe",
    "glm5_next",
    "bfloat16",
    "sigmoid",
    "F32",
    "1",
]
NESTED = [
    [],
    [[]],
    [1],
    [None],
    [1, 2, "x"],
    [True] * 70,
    [2**62] * 64,
    list(range(500)),
    {},
    {"a": 1},
    {"rope_type": "yarn"},
]
NESTED += [
    {"rope_theta": float("nan")},
    {"rope_type": []},
    json.loads("[" * 90 + "]" * 90),
    {"x" * 500: ["y" * 500] * 50},
]
FIXED_JUNK = [None, True, False, *NUMBERS, *FLOATS, *TEXTS, *NESTED]
JUNK = st.one_of(st.sampled_from(FIXED_JUNK), st.sampled_from(NUMBERS), st.integers(), st.floats(), st.text(max_size=8))
SPOILS = st.tuples(
    st.sampled_from(["cut", "insert", "overwrite"]), st.integers(0, 10**5), st.binary(min_size=1, max_size=4)
)


def spoiled(data: bytes, spoil) -> bytes:
    if spoil is None:
        return data
    how, place, new = spoil
    place %= len(data) + 1
    if how == "cut":
        return data[:place]
    return data[:place] + new + data[place + (len(new) if how == "overwrite" else 0) :]


@st.composite
def rarely(draw, strategy):
    return draw(strategy) if draw(st.integers(0, 9)) == 0 else None


# Configs.
BASE = {**tiny_config(vocab_size=16, hidden_size=8, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
        head_dim=4, intermediate_size=8, moe_intermediate_size=4, n_routed_experts=2, num_experts_per_tok=1).to_dict(),
        "num_mtp_layers": 1, "rope_scaling": None, "scoring_func": "sigmoid", "moe_layer_freq": 1, "layer_types": None,
        "quantization_config": None, "torch_dtype": "float32"}  # fmt: skip
# The other families: glmx.load refuses them after their configs are read, those that are none before.
LITE = {**BASE, "model_type": "glm4_moe_lite", "num_key_value_heads": 2, "attention_bias": False,
        "partial_rotary_factor": None, "rope_parameters": None, "q_lora_rank": 4, "kv_lora_rank": 4,
        "qk_nope_head_dim": 2, "qk_rope_head_dim": 2, "qk_head_dim": 4, "v_head_dim": 4, "rope_interleave": True,
        "mlp_layer_types": ["dense", "sparse"], "mla_norm_eps": 1e-6}  # fmt: skip
DSA = {**LITE, "model_type": "glm_moe_dsa", "index_n_heads": 2, "index_head_dim": 4, "index_topk": 2,
       "layer_types": None, "index_topk_freq": 2, "index_skip_topk_offset": 1, "index_topk_pattern": None,
       "indexer_types": None, "indexer_rope_interleave": True, "index_share_for_mtp_iteration": False}  # fmt: skip
FP8 = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}
INT4_WEIGHTS = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 128, "symmetric": True,
                "dynamic": False, "actorder": None}  # fmt: skip
INT4_GROUP = {"weights": INT4_WEIGHTS, "input_activations": None, "output_activations": None, "format": None}
INT4 = {"quant_method": "compressed-tensors", "format": "pack-quantized", "kv_cache_scheme": None}


def int4(where: str, changes: dict) -> dict:
    """The config of an int4 checkpoint, changed at its top, in its group or in what that says of weights."""
    parts = {"top": INT4, "group": INT4_GROUP, "weights": INT4_WEIGHTS}
    parts[where] = {**parts[where], **changes}
    group = {**parts["group"], **({} if "weights" in changes else {"weights": parts["weights"]})}
    return {"config_groups": {"group_0": group}, **parts["top"]}


# Changes that leave many a config valid, so that its tensors are compared too.
MILD = [(key, value) for key in BASE for value in (*range(10), True, False) if type(value) is type(BASE[key])]
MILD += [(key, value) for key in BASE for value in (0.25, 1.0, 2.5, 1e4) if type(value) is type(BASE[key])]
MILD_CHANGES = st.lists(st.sampled_from(MILD), max_size=4).map(dict)
# Every size at every number, one at a time: chance leaves some of these out.
ONE_SIZE = [
    {**base, key: number}
    for base in (BASE, DSA)
    for key, value in base.items()
    if type(value) is int
    for number in NUMBERS
]
CONFIGS = st.one_of(
    st.tuples(st.just(BASE), MILD_CHANGES),
    st.tuples(st.just(BASE), st.dictionaries(st.sampled_from(sorted(BASE)), JUNK, min_size=1, max_size=3)),
    st.tuples(st.sampled_from([LITE, DSA]), st.dictionaries(st.sampled_from(sorted(DSA)), JUNK, max_size=2)),
    st.tuples(
        st.just(BASE),
        st.dictionaries(st.sampled_from(sorted(FP8)), JUNK, max_size=1).map(
            lambda changes: {"quantization_config": {**FP8, **changes}}
        ),
    ),
    st.tuples(
        st.just(BASE),
        st.tuples(
            st.sampled_from(["top", "group", "weights"]),
            st.dictionaries(st.sampled_from([*INT4, "config_groups", *INT4_GROUP, *INT4_WEIGHTS]), JUNK, max_size=1),
        ).map(lambda how: {"quantization_config": int4(*how)}),
    ),
    st.tuples(st.just({"model_type": "glm4_moe"}), st.lists(st.sampled_from(MILD), min_size=9, max_size=25).map(dict)),
    st.tuples(st.just(BASE), st.dictionaries(st.text(max_size=6), JUNK, max_size=2)),
)
CONFIG_BYTES = st.tuples(CONFIGS, rarely(SPOILS)).map(
    lambda parts: spoiled(json.dumps({**parts[0][0], **parts[0][1]}).encode(), parts[1])
) | JUNK.map(lambda value: json.dumps(value).encode())


# Headers: lists of (name, entry), so that a name can be there twice.
DTYPES = ["F32", "BF16", "F16", "F64", "I8", "I32", "F8_E4M3", "BOOL", "F4", "f32"]
KEYS = st.sampled_from(["dtype", "shape", "data_offsets", "extra"])
NAMES = ["lm_head.weight", "model.norm.weight", "model.layers.1.mlp.experts.gate_up_proj", "a\nb", "", "__metadata__"]
NAMES += ["model.layers.0.mlp.down_proj.weight" + behind for behind in ("_packed", "_scale", "_shape", "_zero_point")]
ANY_ENTRY = st.integers(0, 99)
HEADER_CHANGES = st.lists(
    st.one_of(
        st.tuples(st.just("set"), ANY_ENTRY, st.tuples(KEYS, JUNK)),
        st.tuples(st.just("set"), ANY_ENTRY, st.tuples(st.just("dtype"), st.sampled_from(DTYPES))),
        st.tuples(st.just("set"), ANY_ENTRY, st.tuples(st.just("shape"), st.lists(st.integers(-1, 32), max_size=4))),
        st.tuples(st.just("set"), ANY_ENTRY, st.tuples(KEYS, st.lists(st.integers(0, 2500), min_size=2, max_size=2))),
        st.tuples(st.just("replace"), ANY_ENTRY, JUNK),
        st.tuples(st.sampled_from(["drop", "repeat"]), ANY_ENTRY, st.none()),
        st.tuples(st.just("rename"), ANY_ENTRY, st.sampled_from(NAMES) | st.text(max_size=8)),
        st.tuples(st.just("shift"), ANY_ENTRY, st.integers(-9, 9)),
        st.tuples(st.just("metadata"), st.just(0), JUNK | st.just({"format": "pt"})),
        st.tuples(st.just("swap"), ANY_ENTRY, ANY_ENTRY),
    ),
    max_size=3,
)
MADE_UP = st.lists(
    st.tuples(st.text(max_size=6), st.sampled_from(DTYPES), st.lists(st.integers(0, 4), max_size=3)), max_size=5
)


def changed(entries, changes):
    """The header's entries after `changes`; what is out of range wraps around."""
    entries = [(name, dict(entry)) for name, entry in entries]
    for what, at, how in changes:
        if what == "metadata":
            entries.insert(0, ("__metadata__", how))
            continue
        if not entries:
            break
        at %= len(entries)
        name, entry = entries[at]
        if what == "drop":
            del entries[at]
        elif what == "repeat":
            entries.append(entries[at])
        elif what == "rename":
            entries[at] = (how, entry)
        elif what == "replace":
            entries[at] = (name, how)
        elif what == "swap":
            other = how % len(entries)
            entries[at], entries[other] = (name, entries[other][1]), (entries[other][0], entry)
        elif isinstance(entry, dict):
            if what == "set":
                entry[how[0]] = how[1]
            elif isinstance(entry.get("data_offsets"), list) and all(type(n) is int for n in entry["data_offsets"]):
                entry["data_offsets"] = [n + how for n in entry["data_offsets"]]
    return entries


def made_up(tensors):
    """Entries of well-formed tensors one after the other, and the length of their data."""
    bits = {"F32": 32, "BF16": 16, "F16": 16, "F64": 64, "F4": 4}
    entries, end = [], 0
    for name, dtype, shape in tensors:
        start, end = end, end + int(torch.Size(shape).numel()) * bits.get(dtype, 8) // 8
        entries.append((name, {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}))
    return entries, end


def file_bytes(entries, data, length, spoil):
    text = "{" + ",".join(f"{json.dumps(name)}:{json.dumps(entry)}" for name, entry in entries) + "}"
    header = text.encode()
    return spoiled((len(header) if length is None else length % 2**64).to_bytes(8, "little") + header + data, spoil)


WEIGHT_MAP = st.sampled_from(["one.safetensors", "two.safetensors", "../x.safetensors", "", "/dev/zero", SINGLE]) | JUNK


def quantise(file):
    """Makes one matrix FP8 in blocks, one FP8 per channel, a layer's experts int4, and its shared expert int8."""
    tensors = load_file(file)
    for layer, suffix, shape in ((0, "_scale_inv", (1, 1)), (1, "_scale", (8, 1))):
        key = f"model.layers.{layer}.self_attn.o_proj.weight"
        tensors |= {key: tensors[key].to(torch.float8_e4m3fn), key + suffix: torch.ones(shape)}
    for key in [key for key in tensors if key.startswith("model.layers.1.mlp.") and key.endswith("_proj.weight")]:
        weight = tensors.pop(key)
        rows, columns = weight.shape
        if ".experts." in key:
            tensors |= {key + "_packed": torch.full((rows, -(-columns // 8)), -1999844148, dtype=torch.int32),
                        key + "_scale": torch.ones(rows, 1, dtype=torch.bfloat16),
                        key + "_shape": torch.tensor([rows, columns])}  # fmt: skip
        else:
            tensors |= {key: weight.to(torch.int8), key + "_scale": torch.ones(rows, 1)}
    save_file(tensors, file)


def main(directory: Path, configs: int, headers: int, both: int, tokenizer_files: int, seed: int | None) -> None:
    loader = Loader()

    def load(path: Path, dtype: str = "auto", check_finite: bool = False, mapped: bool = False) -> None:
        loader.run("load_once", path, dtype, check_finite, mapped)

    config = glmx.models.config.ModelConfig.from_dict(BASE)
    good = checkpoint.save(random_model(config), directory / "good")
    quantise(good / SINGLE)
    entries = [
        (name, {"dtype": e.dtype, "shape": list(e.shape), "data_offsets": [e.start, e.end]})
        for name, e in read_header(good / SINGLE).items()
    ]
    data = (good / SINGLE).read_bytes()[-max(entry["data_offsets"][1] for _, entry in entries) :]
    work = directory / "work"
    shutil.copytree(good, work)

    def fuzz(examples, *strategies):
        """Runs the decorated function on `examples` examples, at once."""
        settings = hypothesis.settings(
            max_examples=max(examples, 1),
            derandomize=seed is None,
            database=None,
            deadline=None,
            suppress_health_check=list(hypothesis.HealthCheck),
            phases=[hypothesis.Phase.generate, hypothesis.Phase.shrink],
        )

        def run(body):
            test = settings(hypothesis.given(*strategies)(body))
            (test if seed is None else hypothesis.seed(seed)(test))()

        return run if examples else lambda body: None

    header_bytes = st.tuples(
        HEADER_CHANGES, rarely(MADE_UP), rarely(st.sampled_from(NUMBERS) | st.integers(0, 9999)), rarely(SPOILS)
    ).map(
        lambda parts: file_bytes(
            changed(made_up(parts[1])[0] if parts[1] else entries, parts[0]),
            bytes(made_up(parts[1])[1]) if parts[1] else data,
            parts[2],
            parts[3],
        )
    )

    for change in ONE_SIZE:
        (work / "config.json").write_text(json.dumps(change))
        load(work)

    @fuzz(configs, CONFIG_BYTES)
    def _(content):
        (work / "config.json").write_bytes(content)
        load(work)

    shutil.copy(good / "config.json", work)

    @fuzz(headers, header_bytes)
    def _(content):
        (work / SINGLE).write_bytes(content)
        loader.run("same_as_the_library", work / SINGLE)
        load(work)
        load(work, "bf16", check_finite=True, mapped=True)

    halves = ([e for e in entries if e[0] < "model.layers.1"], [e for e in entries if e[0] >= "model.layers.1"])
    good_map = {
        name: f"{file}.safetensors" for file, half in zip(("one", "two"), halves, strict=True) for name, _ in half
    }
    split = []
    for half in halves:
        packed, chunks, end = [], [], 0
        for name, entry in half:
            start, stop = entry["data_offsets"]
            packed.append((name, {**entry, "data_offsets": [end, end + stop - start]}))
            chunks.append(data[start:stop])
            end += stop - start
        split.append((packed, b"".join(chunks)))
    (work / SINGLE).unlink()

    @fuzz(
        both,
        rarely(CONFIG_BYTES) | MILD_CHANGES.map(lambda changes: json.dumps({**BASE, **changes}).encode()),
        st.just([]) | HEADER_CHANGES,
        rarely(SPOILS),
        rarely(st.dictionaries(st.sampled_from(sorted(good_map)) | st.text(max_size=4), WEIGHT_MAP, max_size=2)),
        rarely(SPOILS),
        st.sampled_from(["auto", "bf16", "fp32"]),
        st.booleans(),
        st.booleans(),
    )
    def _(config_bytes, changes, spoil, moved, index_spoil, dtype, check_finite, mapped):
        (work / "config.json").write_bytes(config_bytes or json.dumps(BASE).encode())
        for number, (name, (half, values)) in enumerate(zip(("one", "two"), split, strict=True)):
            content = file_bytes(changed(half, changes if number else []), values, None, spoil if number else None)
            (work / f"{name}.safetensors").write_bytes(content)
        index = json.dumps({"weight_map": {**good_map, **(moved or {})}}).encode()
        (work / INDEX).write_bytes(spoiled(index, index_spoil))
        load(work, dtype, check_finite, mapped)

    texts = directory / "tokenizer"
    tokenizers.train(["def f(x):\n    return x + 1\n"] * 3, 256 + 24 + 8).save(texts)
    (texts / "generation_config.json").write_text('{"eos_token_id": [1, 2]}')
    originals = {file.name: file.read_bytes() for file in texts.iterdir()}

    @fuzz(
        tokenizer_files,
        st.sampled_from(sorted(originals)),
        SPOILS,
        st.none()
        | st.tuples(st.sampled_from(["eos_token", "chat_template", "eos_token_id", "model", "decoder"]), JUNK),
    )
    def _(name, spoil, change):
        content = originals[name]
        if change is not None and name.endswith(".json"):
            content = json.dumps({**json.loads(content), change[0]: change[1]}).encode()
        (texts / name).write_bytes(spoiled(content, spoil) if change is None else content)
        try:
            loader.run("read_tokenizer", texts)
        finally:
            (texts / name).write_bytes(originals[name])

    kinds = sum(key.startswith("kind ") for key in COUNTS)
    report = {"loaded": COUNTS["loaded"], "refused": COUNTS["refused"], "kinds": kinds}
    print(json.dumps({**report, "idle_mb": loader.idle_mb, "above_idle_mb": loader.above_idle_mb}))


def memory(field: str) -> int:
    """MB of this process: VmRSS now, VmHWM at its highest."""
    status = Path("/proc/self/status").read_text()
    return int(next(line.split()[1] for line in status.splitlines() if line.startswith(field))) // 1024


if __name__ == "__main__":
    faulthandler.enable()
    if sys.argv[1:] == ["loader"]:
        loader_main()
        sys.exit()
    numbers = [int(n) for n in sys.argv[2:]]
    main(Path(sys.argv[1]), *numbers[:4], seed=numbers[4] if len(numbers) > 4 else None)
