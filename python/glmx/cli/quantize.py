"""`glmx quantize MODEL --to FORMAT --out DIR`: a checkpoint in few bits, as compressed-tensors spells it."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from glmx.models.config import ModelConfig
    from glmx.models.quantize import Calibration, Error, Report

TOKENS, LEAST_TOKENS = 16_384, 512
_BLOCKS = {"attention": "self_attn", "mlp": "mlp", "shared experts": "mlp.shared_experts", "experts": "mlp.experts"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("model", metavar="MODEL", help="a checkpoint directory of bf16, fp32, fp16 or FP8 weights, or a Hub id")
    add("--to", choices=["int8", "int4"], required=True, help="8 bits and a scale a row, or 4 and one for 128 columns")
    add("--out", type=Path, required=True, metavar="DIR", help="directory of the new checkpoint; it must not exist")
    add(
        "--calibrate",
        type=Path,
        metavar="TEXTFILE",
        help="round for least error of the outputs on this text, not of the weights; loads the model whole",
    )
    add("--calibrate-tokens", type=int, metavar="N", help=f"about so many tokens of it (default {TOKENS:,})")


def run(args: argparse.Namespace) -> int:
    from glmx.errors import ConfigError
    from glmx.models.quantize import quantize

    tokens = TOKENS if args.calibrate_tokens is None else args.calibrate_tokens
    if tokens < LEAST_TOKENS:
        raise ConfigError(f"--calibrate-tokens {tokens}: expected at least {LEAST_TOKENS}")
    if args.calibrate is None and args.calibrate_tokens is not None:
        raise ConfigError(f"--calibrate-tokens {tokens}: it goes with --calibrate TEXTFILE")
    text = None if args.calibrate is None else _text(args.calibrate)
    calibration = None if text is None else lambda *model: _calibration(args.calibrate, text, tokens, *model)
    report = quantize(args.model, args.out, args.to, calibration)
    print_report(report, args.out)
    return 0


def _text(file: Path) -> str:
    from glmx.errors import ConfigError

    try:
        return file.read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"--calibrate '{file}': {error.strerror or error}") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"--calibrate '{file}': not UTF-8 text at byte {error.start}") from None


def _calibration(file: Path, text: str, tokens: int, directory: Path, config: ModelConfig) -> Calibration:
    """Nine tenths of the text to calibrate on; bits per byte are measured on the last."""
    import torch

    from glmx.data.tokenizer import Tokenizer
    from glmx.errors import ConfigError
    from glmx.eval.bits_per_byte import bits_per_byte
    from glmx.models.quantize import Calibration

    tokenizer = Tokenizer.from_dir(directory)
    cut = len(text) * 9 // 10
    ids = torch.tensor(tokenizer.encode_document(text[:cut]))
    if len(ids) < LEAST_TOKENS:
        raise ConfigError(
            f"--calibrate '{file}': nine tenths of it are {len(ids)} tokens, expected at least {LEAST_TOKENS}"
        )
    if int(ids.max()) >= config.vocab_size:
        raise ConfigError(
            f"--calibrate '{file}': token id {int(ids.max())}, the model's vocab_size is {config.vocab_size}"
        )
    return Calibration(ids, tokens, lambda model: bits_per_byte(model, tokenizer, text[cut:]))


def print_report(report: Report, out: Path) -> None:
    """Relative error of weights, and of outputs where they are known, for each layer."""
    from rich.console import Console
    from rich.table import Table

    console = Console(highlight=False)
    title = "relative error of weights" + (", of outputs" if report.calibration_tokens else "")
    table = Table("layer", *_BLOCKS, title=f"{title}, in %", title_justify="left")
    for layer, kinds in sorted(report.errors.items()):
        table.add_row(str(layer), *(_words(kinds, block) for block in _BLOCKS.values()))
    table.add_row("all", _percent(report.total()), style="bold")
    console.print(table)
    before, after = report.bytes_before, report.bytes_after
    console.print(f"{before / 1e6:,.0f} MB before, {after / 1e6:,.0f} MB after ({before / max(after, 1):.2f}x)")
    if report.bits_per_byte is not None:
        original, nearest, written = report.bits_per_byte
        change = f"{written:.4f} after ({written / original - 1:+.2%})"
        plain = f"{nearest:.4f} if only rounded to nearest ({nearest / original - 1:+.2%})"
        console.print(
            f"bits per byte on the last tenth of the text: {original:.4f} before, {change}; {plain}", soft_wrap=True
        )
    console.print(f"{out} and {out}/quantization.json", markup=False, soft_wrap=True)


def _words(kinds: dict[str, Error], block: str) -> str:
    from glmx.models.quantize import Error

    total = Error()
    for kind, error in kinds.items():
        if kind.rpartition(".")[0] == block:
            total += error
    return _percent(total) if total.weights else ""


def _percent(error: Error) -> str:
    return ", ".join(f"{100 * value:.2f}" for value in error.relative().values())
