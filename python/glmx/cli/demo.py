"""glmx demo: the main job on one page. Trains a small GLM on this machine's Python sources and uses it.

    corpus -> tokenizer -> token shards -> pre-training -> held-out bits per byte, accepted drafts, speed
    -> checkpoint, plot -> completions

Everything it makes is under --out; the same command goes on where it was stopped.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import json
import math
import os
import shutil
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from glmx.cli import DEVICES
from glmx.cli.demo_models import MODELS, VOCAB
from glmx.errors import ConfigError, UnsupportedError

if TYPE_CHECKING:
    import torch

    from glmx.cli.demo_speed import Speed
    from glmx.data.corpus import Corpus
    from glmx.data.tokenizer import Tokenizer
    from glmx.models.acceptance import Acceptance
    from glmx.models.batch import Batch
    from glmx.serve.llm import LLM
    from glmx.train.config import PretrainConfig

TOKENS = 600_000  # the full demo's budget; gzip's bits per byte are passed at about two thirds of it
# Ten times GLM-4.5's rate: its run has ten thousand times the steps in which to balance the experts.
BALANCE_RATE = 1e-2
COMPLETIONS, COMPLETION_TOKENS = 20, 64
SPARSITY_TOKENS = 15_000
DRAFTS, DRAFT_PLACES = 3, 5_000
PROMPT = "def read_config(path):\n"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--minutes", type=float, default=0.0, help="bound on the wall time of training (default: none)")
    parser.add_argument("--out", type=Path, default=Path("demo-out"), help="directory of everything the demo makes")
    parser.add_argument("--corpus", type=Path, help="train on this directory of text instead of the standard library")
    parser.add_argument(
        "--arch",
        choices=list(MODELS),
        default="glm_moe_dsa",
        help="glm_moe_dsa: a small GLM-5, its attention sparse (default); glm4_moe: a small GLM-4.5",
    )
    parser.add_argument("--tokens", type=int, default=TOKENS, help=f"token budget (default {TOKENS:,})")
    parser.add_argument(
        "--balance-rate", type=float, default=BALANCE_RATE, help="expert bias update rate; 0 turns it off"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the initial weights and the order of the data")
    parser.add_argument("--device", default="auto", metavar="D", help=f"{DEVICES}; a GPU takes --arch glm4_moe")
    parser.add_argument("--dtype", choices=["auto", "bf16", "fp32"], default="auto", help="default auto: bf16")


def run(args: argparse.Namespace) -> int:
    from rich.console import Console

    from glmx.models.device import ON_A_GPU, choose
    from glmx.train.checkpoint import lock, making
    from glmx.train.loop import pretrain
    from glmx.train.plot import require_matplotlib

    if args.tokens < MODELS[args.arch].tokens_per_step:
        raise ConfigError(f"--tokens {args.tokens}: expected at least one step, {MODELS[args.arch].tokens_per_step}")
    if not 0 <= args.minutes < math.inf:
        raise ConfigError(f"--minutes {args.minutes:g}: expected 0 (no bound) or more")
    device = choose(args.device)
    if device.type == "cuda" and args.arch not in ON_A_GPU:
        raise UnsupportedError(
            f"--device {args.device}: {args.arch} runs on cpu so far; add --arch {' or '.join(ON_A_GPU)}"
        )
    require_matplotlib()
    config = run_config(args)
    console = Console(highlight=False)
    begun = time.monotonic()
    with making(args.out):
        handle = lock(args.out)
        corpus, tokenizer = prepare(args, console)
    console.rule("training")
    result = pretrain(config)
    if result.reason.startswith("SIG"):
        return 128 + signal.Signals[result.reason]
    console.rule("results")
    drafts = accepted_drafts(args, result.checkpoint)
    speed = decoding_speed(args, corpus, result.checkpoint)
    report(args, console, corpus, tokenizer, result, config.indexer.dense_tokens or 0, drafts, speed)
    if args.arch == "glm_moe_dsa":
        console.print(sparsity_words(args, result.checkpoint), soft_wrap=True)
    complete(args, console, corpus, result.checkpoint)
    console.rule(f"done in {(time.monotonic() - begun) / 60:.1f} minutes")
    next_steps(args, console, result.checkpoint)
    os.close(handle)
    return 0


def prepare(args: argparse.Namespace, console: Any) -> tuple[Corpus, Tokenizer]:
    """Corpus, tokenizer and token shards under OUT/data, and OUT/model/config.json. What is there already is reused."""
    from glmx.data import corpus as corpora
    from glmx.data import tokenizer as tokenizers
    from glmx.data.shards import TokenShards
    from glmx.models.config import ModelConfig

    corpus = corpora.load(args.corpus)
    console.print(corpus.summary(), markup=False, soft_wrap=True)
    data = args.out / "data"
    made_of = json.dumps({"corpus": corpus.sha256, "vocab_size": VOCAB})
    stamp = data / "made-of.json"
    if not (stamp.is_file() and stamp.read_bytes() == made_of.encode()):
        begun = time.monotonic()
        tokenizer = tokenizers.train([document.text for document in corpus.train], VOCAB)
        write_data(data, corpus, tokenizer, made_of)
        console.print(f"tokenizer {VOCAB} tokens, trained in {time.monotonic() - begun:.0f} s")
    tokenizer = tokenizers.Tokenizer.from_dir(data)
    shards = TokenShards.open(data, "train")
    console.print(
        f"tokens    {shards.num_tokens:,} to train on, {corpus.train_bytes / shards.num_tokens:.2f} bytes each; "
        f"budget {args.tokens:,}"
    )
    config = ModelConfig.from_dict(
        {**MODELS[args.arch].config, "eos_token_id": list(tokenizer.eos_ids), "pad_token_id": tokenizer.eos_id}
    )
    total, active = config.num_parameters(), config.num_active_parameters()
    console.print(f"model     {args.arch}: {total / 1e6:.1f} M parameters, {active / 1e6:.1f} M work on a token")
    with writing(args.out / "model") as folder:
        (folder / "config.json").write_text(json.dumps(config.to_dict(), indent=2) + "\n")
    return corpus, tokenizer


def write_data(data: Path, corpus: Corpus, tokenizer: Tokenizer, made_of: str) -> None:
    from glmx.data.shards import write_documents

    with writing(data) as folder:
        tokenizer.save(folder)
        for name, documents in (("train", corpus.train), ("heldout", corpus.heldout)):
            write_documents(folder, name, tokenizer, [document.text for document in documents])
        (folder / "made-of.json").write_text(made_of)


@contextlib.contextmanager
def writing(folder: Path) -> Iterator[Path]:
    """A directory to fill, which takes the place of `folder` when it is complete. Raises ConfigError."""
    temporary = folder.with_name(f".tmp-{folder.name}")
    try:
        shutil.rmtree(temporary, ignore_errors=True)  # of a killed demo
        temporary.mkdir()
        yield temporary
        if folder.exists():
            shutil.rmtree(folder)
        temporary.rename(folder)
    except OSError as error:
        raise ConfigError(f"could not write {folder}: {error.strerror}") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def run_config(args: argparse.Namespace) -> PretrainConfig:
    """The run itself, under OUT/run; an ordinary `glmx pretrain` configuration."""
    from glmx.train.config import make_config

    model = MODELS[args.arch]
    indexer = {"indexer": {"dense_tokens": int(model.dense_share * args.tokens)}} if model.dense_share else {}
    return make_config(
        {
            **indexer,
            "mtp_steps": model.mtp_steps,
            "model": str(args.out / "model"),
            "out": str(args.out / "run"),
            "data": {
                "shards": str(args.out / "data"),
                "train": "train",
                "heldout": "heldout",
                "seq_len": model.seq_len,
            },
            "optim": {"lr": 4e-3, "min_lr": 2e-4, "warmup_tokens": min(40_000, args.tokens // 10), "weight_decay": 0.1},
            "train": {
                "tokens": args.tokens,
                "batch_rows": model.batch_rows,
                "micro_rows": model.batch_rows,
                "seed": args.seed,
                "minutes": args.minutes,
                "dtype": "bf16" if args.dtype == "auto" else args.dtype,
                "device": args.device,
            },
            "balance": {"rate": args.balance_rate},
            "checkpoint": {"every_steps": 200},
            "eval": {"every_steps": 50, "tokens": 15_000},
        }
    )


def report(
    args: argparse.Namespace,
    console: Any,
    corpus: Corpus,
    tokenizer: Tokenizer,
    result: Any,
    dense_tokens: int,
    drafts: Acceptance,
    speed: Speed,
) -> None:
    """Held-out bits per byte beside what compressors and a token 5-gram make of the same bytes; the plot."""
    from rich.table import Table

    from glmx.data import baselines
    from glmx.data.shards import TokenShards, read_all
    from glmx.train.plot import plot_run, read_log

    log = args.out / "run" / "log.jsonl"
    steps, heldout = read_log(log)

    train_docs, heldout_docs = (read_all(TokenShards.open(args.out / "data", name)) for name in ("train", "heldout"))
    packed = baselines.compressors([document.data for document in corpus.heldout])
    ngram = baselines.ngram_bits_per_byte(
        train_docs, heldout_docs, tokenizer.byte_lengths, max_train_tokens=result.tokens
    )
    rows = {
        "gzip -9, per file": packed.gzip_per_file,
        "gzip -9, concatenated": packed.gzip_concatenated,
        "xz -9, per file": packed.xz_per_file,
        "xz -9, concatenated": packed.xz_concatenated,
        f"token 5-gram of {result.tokens:,} tokens": ngram,
    }
    table = Table(
        "held-out bits per byte",
        "",
        title=f"{corpus.heldout_bytes:,} bytes of modules never trained on",
        title_justify="left",
    )
    table.add_row(f"glmx after {result.tokens:,} tokens", f"{heldout[-1]['heldout_bpb']:.3f}", style="bold")
    for name, bits in rows.items():
        table.add_row(name, f"{bits:.3f}")
    console.print(table)
    console.print(
        f"experts   MaxVio per MoE layer over the last 20 % of the steps: {final_max_vio(steps)}", soft_wrap=True
    )
    if kl_words := indexer_kl(steps):
        console.print(kl_words, soft_wrap=True)
    console.print(drafts_words(drafts), soft_wrap=True)
    console.print(speed.words, soft_wrap=True)
    shown = {"gzip -9, per file": packed.gzip_per_file, "token 5-gram": ngram}
    picture = plot_run(
        log,
        args.out / "demo.png",
        title=f"glmx demo, {args.arch}",
        baselines=shown,
        dense_tokens=dense_tokens,
        accepted=drafts.shares,
        decoding=speed.rates,
    )
    console.print(f"plot      {picture}", soft_wrap=True)


def final_max_vio(steps: list[dict[str, Any]]) -> str:
    """The mean of max load / mean load - 1 over the last fifth of the steps, for each MoE layer."""
    last = steps[-max(1, len(steps) // 5) :]
    means = [sum(layer) / len(last) for layer in zip(*(record["max_vio"] for record in last), strict=True)]
    return ", ".join(f"{mean:.2f}" for mean in means)


def indexer_kl(steps: list[dict[str, Any]]) -> str:
    """How far index scores are from attention, first and last; empty without indexers."""
    if steps[-1]["indexer_kl"] is None:
        return ""
    first, last = steps[0]["indexer_kl"], steps[-1]["indexer_kl"]
    return (
        f"indexer   its KL to the attention it selects for: {first:.3f} nats at the first step, {last:.3f} at the last"
    )


def heldout_sample(args: argparse.Namespace, tokens: int) -> Iterator[tuple[torch.Tensor, Batch]]:
    """About so many tokens of held-out text, in windows from all of it."""
    from glmx.data.packing import HeldoutRows
    from glmx.data.shards import TokenShards
    from glmx.models.batch import Batch

    heldout, seq_len = TokenShards.open(args.out / "data", "heldout"), MODELS[args.arch].seq_len
    every = -(-heldout.num_tokens // tokens)
    for micro in HeldoutRows(heldout, seq_len=seq_len, batch_tokens=4 * seq_len, every=every):
        yield micro.ids, Batch(micro.cu_seqlens)


def accepted_drafts(args: argparse.Namespace, checkpoint: Path) -> Acceptance:
    """How many drafts of the MTP layer greedy decoding accepts on held-out text."""
    import glmx
    from glmx.models.acceptance import measure

    return measure(glmx.load(checkpoint, args.device), heldout_sample(args, DRAFT_PLACES), DRAFTS)


def drafts_words(drafts: Acceptance) -> str:
    numbers = ", ".join(str(draft) for draft in range(1, DRAFTS + 1))
    shares = ", ".join(f"{share:.1%}" for share in drafts.shares)
    return (
        f"drafts    greedy decoding accepts draft {numbers} of the MTP layer at {shares} of {drafts.places:,} "
        f"places of held-out text: {drafts.tokens_per_step:.2f} tokens per forward of the model"
    )


def decoding_speed(args: argparse.Namespace, corpus: Corpus, checkpoint: Path) -> Speed:
    """Tokens per second on heads of held-out functions, with and without drafts."""
    from glmx.cli.demo_speed import measure
    from glmx.serve.llm import LLM

    return measure(LLM(checkpoint, device=args.device, max_num_seqs=1), heldout_prompts(corpus))


def sparsity_words(args: argparse.Namespace, checkpoint: Path) -> str:
    """How much of held-out text was attended to sparsely, and what the lists hold of dense attention."""
    import glmx
    from glmx.models.sparsity import measure

    model = glmx.load(checkpoint, args.device)
    found, top_k = measure(model, heldout_sample(args, SPARSITY_TOKENS)), model.config.index_topk
    return (
        f"sparsity  {found.sparse_tokens / found.tokens:.0%} of {found.tokens:,} held-out tokens had more than {top_k} "
        f"keys; the {top_k} selected ones hold {found.selected:.1%} of their attention, the last {top_k} would hold "
        f"{found.window:.1%}"
    )


def complete(args: argparse.Namespace, console: Any, corpus: Corpus, checkpoint: Path) -> None:
    """One completion to read, and how many of twenty held-out completions are Python that parses."""
    from glmx.serve.llm import LLM, SamplingParams

    llm = LLM(checkpoint, device=args.device)
    greedy = SamplingParams(temperature=0.0, max_tokens=96, ignore_eos=True)
    output = llm.generate(PROMPT, greedy)[0].outputs[0]
    console.rule(f"a completion of {len(output.token_ids)} tokens, greedy")
    console.print(PROMPT + output.text, markup=False, soft_wrap=True)
    parsed = parsing_completions(llm, corpus)
    console.print(
        f"{parsed} of {COMPLETIONS} completions of held-out functions parse as Python "
        f"({COMPLETION_TOKENS} tokens each, cut after their last whole line)",
        soft_wrap=True,
    )


def parsing_completions(llm: LLM, corpus: Corpus) -> int:
    from glmx.serve.llm import SamplingParams

    prompts = heldout_prompts(corpus)
    outputs = llm.generate(prompts, SamplingParams(temperature=0.0, max_tokens=COMPLETION_TOKENS))
    texts = [prompt + output.outputs[0].text for prompt, output in zip(prompts, outputs, strict=True)]
    return sum(parses(text[: text.rfind("\n") + 1]) for text in texts)


def heldout_prompts(corpus: Corpus) -> list[str]:
    """The heads of held-out module-level functions, one per file where that is enough, in the corpus's order."""
    prompts = []
    for document in corpus.heldout:
        heads = [line for line in document.text.splitlines() if line.startswith("def ") and line.rstrip().endswith(":")]
        prompts += [head.rstrip() + "\n" for head in heads[:2]]
    if len(prompts) < COMPLETIONS:
        prompts += [f"def f{i}(x):\n" for i in range(COMPLETIONS - len(prompts))]
    return prompts[:COMPLETIONS]


def parses(source: str) -> bool:
    try:
        ast.parse(source)
    except (SyntaxError, ValueError):
        return False
    return True


def next_steps(args: argparse.Namespace, console: Any, checkpoint: Path) -> None:
    console.print(
        f"checkpoint  {checkpoint} (a Hugging Face directory)\n"
        f"try next    glmx generate {checkpoint} --prompt 'import os' --max-tokens 64\n"
        f"            glmx serve {checkpoint}\n"
        f"            glmx demo --arch {args.arch} --tokens {2 * TOKENS} --out longer-run",
        markup=False,
        soft_wrap=True,
    )
