"""The faults of docs/errors.md: what is wrong, the command, and what its message must contain.

`run` is a run of four steps that was stopped after two (fault_world.py makes it); `fresh` does not exist.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fault_world import change_json, cut, edit_tensors, make_corpus, shard_in_two
from faults import Fault

STEP = "run/step-00000002"
CONFIG, WEIGHTS, TOKENIZER = f"{STEP}/config.json", f"{STEP}/model.safetensors", f"{STEP}/tokenizer.json"
TEMPLATE = f"{STEP}/chat_template.jinja"
STATE, MOMENTS = f"{STEP}/trainer/state.json", f"{STEP}/trainer/state.safetensors"
SHARD, START = "data/train-00000-of-00001.bin", "config/config.json"
NORM = "model.norm.weight"
INT4 = {"quant_method": "compressed-tensors", "format": "pack-quantized"}
Q_PROJ = "model.layers.0.self_attn.q_proj.weight"
MTP = "model.layers.2."  # the layer behind the two of the decoder
DRAFTS = ["--num-speculative-tokens"]
GENERATE = ["generate", "run", "--prompt", "hi"]
SERVE = ["serve", "run", "--port", "0"]
FRESH = ["pretrain", "run.toml", "--out", "fresh"]
AGAIN = ["pretrain", "run.toml"]
DEMO = ["demo", "--out", "fresh"]
TO_INT4 = ["--to", "int4", "--out", "fresh"]
QUANTIZE = ["quantize", "run", *TO_INT4]
RANDOM = ["make-random", "config", *TO_INT4]
ON_CORPUS = [*DEMO, "--corpus", "corpus"]

Plant = Callable[[Path], dict[str, Any] | None]


# Plants: each makes one fault in a world.
def no_matplotlib(world: Path) -> dict[str, Any]:
    (world / "hide").mkdir()
    (world / "hide" / "matplotlib.py").write_text("raise ImportError('hidden')\n")
    return {"import_from": str(world / "hide")}


def no_httptools(world: Path) -> dict[str, Any]:
    (world / "hide").mkdir()
    (world / "hide" / "httptools.py").write_text("raise ImportError('hidden')\n")
    return {"import_from": str(world / "hide")}


def no_hub_cache(world: Path) -> dict[str, Any]:
    return {"call": f"import os; os.environ['HF_HOME'] = {str(world / 'hub')!r}"}


def no_permission(path: str) -> Plant:
    def plant(world: Path) -> dict[str, Any]:
        (world / path).chmod(0o500 if (world / path).is_dir() else 0)
        return {"obey_permissions": True} if os.geteuid() == 0 else {}

    return plant


def text(path: str, content: str | bytes) -> Plant:
    def plant(world: Path) -> None:
        (world / path).write_bytes(content if isinstance(content, bytes) else content.encode())

    return plant


def corpus(*contents: bytes) -> Plant:
    def plant(world: Path) -> None:
        (world / "corpus").mkdir()
        for number, content in enumerate(contents):
            (world / "corpus" / f"{number}.txt").write_bytes(content)

    return plant


def unreadable_corpus(world: Path) -> dict[str, Any] | None:
    corpus(b"hello")(world)
    return no_permission("corpus/0.txt")(world)


def large_corpus(world: Path) -> None:
    make_corpus(world / "corpus")


def removed(path: str) -> Plant:
    def plant(world: Path) -> None:
        shutil.rmtree(world / path) if (world / path).is_dir() else (world / path).unlink()

    return plant


def renamed(path: str, name: str) -> Plant:
    def plant(world: Path) -> None:
        (world / path).rename(world / name)

    return plant


def shorter(path: str, size: int) -> Plant:
    return lambda world: cut(world / path, size)


def values(path: str, **changed: Any) -> Plant:
    return lambda world: change_json(world / path, **changed)


def tensors(**changes: str) -> Plant:
    return lambda world: edit_tensors(world / WEIGHTS, **changes)


def two_shards(**how: bool) -> Plant:
    return lambda world: shard_in_two(world / STEP, **how)


def wrong_section(world: Path) -> None:
    run = world / "run.toml"
    run.write_text(run.read_text().replace("[train]", "[train]\nseq_len = 16"))


def token(content: bytes) -> Plant:
    """The first token of the shard becomes another."""

    def plant(world: Path) -> None:
        shard = bytearray((world / SHARD).read_bytes())
        assert shard[4096:4098] != content
        shard[4096:4098] = content
        (world / SHARD).write_bytes(shard)

    return plant


def full_output(world: Path) -> dict[str, Any]:
    return {"standard_output": "/dev/full"}


def room_for(size: int) -> Plant:
    return lambda world: {"largest_file": size}


OTHER_TOKENIZER = values(
    "data/tokenizer.json",
    truncation={"direction": "Right", "max_length": 9, "strategy": "LongestFirst", "stride": 0},
)
BAD_PROMPT, LONG_PROMPT = "caf\udcff", "x y " * 600


class Table:
    """Collects rows: table("glmx demo")("an empty corpus", argv, names, plant)."""

    def __init__(self) -> None:
        self.faults: list[Fault] = []

    def __call__(self, section: str) -> Callable[..., None]:
        def add(what: str, argv: list[str], names: str, plant: Plant | None = None, **more: Any) -> None:
            self.faults.append(Fault(section, what, argv, tuple(names.split()), plant or (lambda world: None), **more))

        return add


def faults() -> list[Fault]:
    table = Table()

    any_command = table("Any command")
    any_command("a command that does not exist", ["fly"], "'fly'", library=True)
    any_command("an option that does not exist", ["env", "--jsn"], "--jsn")

    env = table("glmx env")
    env("a typing error in GLMX_ISA", ["env"], "GLMX_ISA=avx3 avx2", environment={"GLMX_ISA": "avx3"})
    env("a backend that this build lacks", ["env"], "GLMX_BACKEND=hip", environment={"GLMX_BACKEND": "hip"})
    env("a kind of log that does not exist", ["env"], "GLMX_LOG=all kernels", environment={"GLMX_LOG": "all"})

    add = table("glmx generate")
    hub_id = "zai-org/GLM-4.5-Air"
    add("no such directory", ["generate", "nowhere", "--prompt", "hi"], "nowhere")
    add("MODEL is a file", ["generate", "run.toml", "--prompt", "hi"], "run.toml file")
    add("a Hub id, not here", ["generate", hub_id, "--prompt", "hi"], f"{hub_id} hf download", no_hub_cache)
    add("a directory without a model", ["generate", "data", "--prompt", "hi"], "data config.json")
    add("`latest` names nothing", GENERATE, "run/latest step-9", text("run/latest", "step-9\n"))
    add("another architecture", GENERATE, "llama glm4_moe", values(CONFIG, model_type="llama"))
    add("GLM-5.3-Flash", GENERATE, "glm5_next", values(CONFIG, model_type="glm5_next"))
    add("config.json cut short", GENERATE, CONFIG, shorter(CONFIG, 100), library=True)
    add("a word for a number in config.json", GENERATE, "hidden_size 'big'", values(CONFIG, hidden_size="big"))
    awq = values(CONFIG, quantization_config={"quant_method": "awq"})
    add("a quantisation that glmx lacks", GENERATE, "quant_method awq fp8 compressed-tensors", awq)
    add("no weights", GENERATE, f"{STEP} model.safetensors", removed(WEIGHTS))
    add("weights cut short", GENERATE, WEIGHTS, shorter(WEIGHTS, -1000))
    add("weights that are no safetensors file", GENERATE, WEIGHTS, text(WEIGHTS, b"PK\x03\x04" + bytes(200)))
    add("a missing shard", GENERATE, "model-00002-of-00002.safetensors", two_shards(missing=True))
    add("a tensor in two shards", GENERATE, "lm_head.weight", two_shards(twice=True))
    add("a missing tensor", GENERATE, NORM, tensors(remove=NORM))
    add("an unknown tensor", GENERATE, "model.norm.wieght", tensors(add="model.norm.wieght"))
    add("a tensor of another shape", GENERATE, f"{NORM} [31] [32]", tensors(shorten=NORM))
    add("a tensor of integers", GENERATE, f"{NORM} I32", tensors(integers=NORM))
    add("NaN in the weights", [*GENERATE, "--check-weights"], NORM, tensors(nan=NORM))
    add("no permission to read the weights", GENERATE, f"{WEIGHTS} Permission", no_permission(WEIGHTS))
    add("a damaged tokenizer.json", GENERATE, TOKENIZER, text(TOKENIZER, "{}"), library=True)
    add("a device that is none", [*GENERATE, "--device", "gpu"], "device 'gpu' auto cpu cuda:N")
    add("a dtype that glmx lacks", [*GENERATE, "--dtype", "fp16"], "fp16 bf16")
    add("a negative temperature", [*GENERATE, "--temperature", "-1"], "temperature -1")
    add("no probability to draw from", [*GENERATE, "--top-p", "0"], "top_p 0")
    add("a min-p above 1", [*GENERATE, "--min-p", "1.5"], "min_p 1.5")
    add("a penalty that divides by zero", [*GENERATE, "--repetition-penalty", "0"], "repetition_penalty 0")
    add("a penalty beyond its range", [*GENERATE, "--presence-penalty", "3"], "presence_penalty 3 -2 2")
    add("the other one", [*GENERATE, "--frequency-penalty", "-3"], "frequency_penalty -3 -2 2")
    add("a bias without a number", [*GENERATE, "--logit-bias", "42"], "--logit-bias '42' 42=-1.5")
    add("a bias beyond its range", [*GENERATE, "--logit-bias", "42=200"], "logit_bias 42 200 -100 100")
    add("no tokens to generate", [*GENERATE, "--max-tokens", "0"], "max_tokens 0")
    add("a word for a number", [*GENERATE, "--max-tokens", "many"], "--max-tokens 'many'")
    add("more drafts than a step takes", [*GENERATE, *DRAFTS, "17"], "num_speculative_tokens 17 auto 16")
    add("drafts without an MTP layer", [*GENERATE, *DRAFTS, "2"], "num_speculative_tokens 2 MTP", tensors(remove=MTP))
    shell = "glmx generate run --prompt"
    add("a prompt that is not UTF-8", [*GENERATE[:-1], BAD_PROMPT], "--prompt udcff", shell=f"{shell} $'caf\\xff'")
    add("a prompt beyond the context", [*GENERATE[:-1], LONG_PROMPT], "512", shell=f"{shell} TEXT-OF-1200-WORDS")
    add("a full disk behind the output", GENERATE, "standard output", full_output, shell=f"{shell} hi > /dev/full")

    add = table("glmx pretrain")
    add("no such file", ["pretrain", "fast.toml"], "fast.toml")
    add("not TOML", FRESH, "run.toml line", text("run.toml", "[optim\n"), library=True)
    add("TOML that is not UTF-8", FRESH, "run.toml utf-8", text("run.toml", b'model = "\xff"\n'), library=True)
    add("an unknown key", [*FRESH, "--optim.weigth_decay", "0.1"], "optim.weigth_decay optim.weight_decay")
    add("a key in the wrong section", FRESH, "train.seq_len data.seq_len", wrong_section)
    add("a word for a number", [*FRESH, "--optim.lr", "fast"], "optim.lr 'fast'")
    add("an infinite learning rate", [*FRESH, "--optim.lr", "inf"], "optim.lr inf")
    add("both a token and a step budget", [*FRESH, "--train.tokens", "9"], "train.tokens train.steps")
    add("a device that is none", [*FRESH, "--device", "gpu"], "device 'gpu' auto cpu cuda:N")
    add("a dtype that glmx lacks", [*FRESH, "--dtype", "fp16"], "train.dtype 'fp16' bf16")
    add("no shards", FRESH, "data train-00000", removed("data"))
    add("a missing shard", FRESH, "train-00001-of-00002.bin", renamed(SHARD, "data/train-00000-of-00002.bin"))
    add("a shard cut short", FRESH, f"{SHARD} truncated", shorter(SHARD, -100))
    add("a shard that is none", FRESH, f"{SHARD} GLMXTOK1", text(SHARD, "hello"))
    add("a token outside the vocabulary", FRESH, f"{SHARD} 65535", token(b"\xff\xff"))
    add("fewer tokens than two rows", [*FRESH, "--data.seq_len", "4096"], "seq_len 4096")
    add("more tokens than the model knows", FRESH, "vocab 300 256", values(START, vocab_size=256))
    no_mtp = values(START, num_nextn_predict_layers=0)
    add("MTP steps without an MTP layer", [*FRESH, "--mtp_steps", "3"], "mtp_steps 3 MTP", no_mtp)
    add("shards of another tokenizer", FRESH, "data/tokenizer.json", OTHER_TOKENIZER)
    add("no such model", [*FRESH, "--model", "nowhere"], "model 'nowhere'")
    add("a model of another architecture", FRESH, "llama", values(START, model_type="llama"))
    add("`out` is a file", [*AGAIN, "--out", "run.toml"], "run.toml")
    add("no permission to write to `out`", AGAIN, "run Permission", no_permission("run"))
    add("`out` where nothing can be made", [*AGAIN, "--out", "/proc/fresh"], "/proc/fresh")
    add("another process trains there", AGAIN, "run another process", held="run")
    add("a changed key", [*AGAIN, "--optim.lr", "0.02"], "optim.lr 0.02 0.01")
    add("changed tokens", AGAIN, "tokens_sha256", token(b"\x07\x00"))
    add("a damaged cursor", AGAIN, f"{STATE} cursor", values(STATE, cursor=3))
    add("a checkpoint of another glmx", AGAIN, f"{STATE} format 1", values(STATE, format=1))
    add("optimizer state cut short", AGAIN, MOMENTS, shorter(MOMENTS, -1000), library=True)
    add("`latest` names nothing", AGAIN, f"run/latest step-9 {STEP[4:]}", text("run/latest", "step-9\n"))
    add(
        "a full disk while a checkpoint is saved",
        AGAIN,
        f"run/step-00000003 space {STEP}",
        full_disk="run",
        trains=True,
        leaves=("run/log.jsonl",),
    )
    logs = ("fresh", "fresh/log.jsonl")
    add("a full disk while the log is written", FRESH, "fresh/log.jsonl space", room_for(300), leaves=logs)

    add = table("glmx serve")
    add("a port in use", [*SERVE, "--port", "PORT"], "PORT in use")
    add("a port that is none", [*SERVE, "--port", "70000"], "--port 70000")
    add("a host that does not exist", [*SERVE, "--host", "nowhere.invalid"], "nowhere.invalid", library=True)
    add("a host that is not this machine", [*SERVE, "--host", "192.0.2.1"], "192.0.2.1")
    add("no such directory", ["serve", "nowhere", "--port", "0"], "nowhere")
    add("a Hub id, not here", ["serve", hub_id, "--port", "0"], f"{hub_id} hf download", no_hub_cache)
    add("no tokenizer", SERVE, TOKENIZER.rpartition("/")[2], removed(TOKENIZER))
    add("a chat template that is none", SERVE, f"{TEMPLATE} line 1", text(TEMPLATE, "{% for %}"), library=True)
    add("weights cut short", SERVE, WEIGHTS, shorter(WEIGHTS, -1000))
    add("infinity in the weights", [*SERVE, "--check-weights"], NORM, tensors(infinity=NORM))
    add("a device that is none", [*SERVE, "--device", "gpu"], "device 'gpu' auto cpu cuda:N")
    add("more tokens than the model takes", [*SERVE, "--max-model-len", "9999"], "max_model_len 9999 512")
    add("no requests at a time", [*SERVE, "--max-num-seqs", "0"], "--max-num-seqs 0")
    add("a word for a number of drafts", [*SERVE, *DRAFTS, "many"], "--num-speculative-tokens auto 'many'")
    add("a time that is none", [*SERVE, "--drain-timeout", "nan"], "--drain-timeout nan")
    add("an API key of two words", [*SERVE, "--api-key", "a b"], "--api-key", shell="glmx serve run --api-key 'a b'")
    add("no file with the API key", [*SERVE, "--api-key-file", "key.txt"], "--api-key-file key.txt")
    add("no httptools", SERVE, "httptools glmx[serve]", no_httptools)

    add = table("glmx demo")
    add("no such corpus", [*DEMO, "--corpus", "nowhere"], "--corpus nowhere")
    add("an empty corpus", ON_CORPUS, "corpus", corpus())
    add("a tiny corpus", ON_CORPUS, "corpus 5", corpus(b"hello"))
    add("a corpus that is not UTF-8", ON_CORPUS, "corpus 2 UTF-8", corpus(b"\xff\xfe" * 9, b"a\0b"))
    add("no permission to read the corpus", ON_CORPUS, "corpus/0.txt Permission", unreadable_corpus)
    add("no matplotlib", DEMO, "matplotlib glmx[train]", no_matplotlib)
    add("a budget of less than a step", [*DEMO, "--tokens", "5"], "--tokens 5")
    add("a time that is none", [*DEMO, "--minutes", "nan"], "--minutes nan")
    add("a negative rate", [*DEMO, "--balance-rate", "-1"], "balance.rate -1")
    add("a device that is none", [*DEMO, "--device", "gpu"], "device 'gpu' auto cpu cuda:N")
    add("`--out` is a file", ["demo", "--out", "run.toml"], "run.toml")
    add("another demo works there", DEMO, "fresh another process", held="fresh")
    add("a full disk while tokens are written", ON_CORPUS, "fresh/data space", large_corpus, full_disk="fresh")

    add = table("glmx quantize")
    add("no such directory", ["quantize", "nowhere", *TO_INT4], "nowhere")
    add("a format that glmx lacks", ["quantize", "run", "--to", "int3", "--out", "fresh"], "--to int3 int8 int4")
    add("`--out` is there", ["quantize", "run", "--to", "int4", "--out", "data"], "data exists")
    add("no permission to write there", [*QUANTIZE[:-1], "data/fresh"], "data/fresh Permission", no_permission("data"))
    add("weights in few bits already", QUANTIZE, "pack-quantized already", values(CONFIG, quantization_config=INT4))
    add("NaN in the weights", QUANTIZE, Q_PROJ, tensors(nan=Q_PROJ))
    add("a missing tensor", QUANTIZE, NORM, tensors(remove=NORM))
    add("no text to calibrate on", [*QUANTIZE, "--calibrate", "text.txt"], "--calibrate text.txt")
    add("too short a text", [*QUANTIZE, "--calibrate", "text.txt"], "text.txt 512", text("text.txt", "hello"))
    add("a text that is not UTF-8", [*QUANTIZE, "--calibrate", "text.txt"], "text.txt 1", text("text.txt", b"a\xff"))
    add("tokens of no text", [*QUANTIZE, "--calibrate-tokens", "4096"], "--calibrate-tokens 4096 --calibrate")

    add = table("glmx make-random")
    add("no such config", ["make-random", "nowhere", *TO_INT4], "nowhere")
    add("a word for a number", RANDOM, "hidden_size 'big'", values(START, hidden_size="big"))
    add("another architecture", RANDOM, "llama", values(START, model_type="llama"))
    add("a format that glmx lacks", ["make-random", "config", "--to", "q4_0", "--out", "fresh"], "--to q4_0 int4")
    add("`--out` is there", ["make-random", "config", "--to", "int4", "--out", "data"], "data exists")
    return table.faults
