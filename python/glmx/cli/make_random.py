"""`glmx make-random CONFIG --to FORMAT --out DIR`: a checkpoint of random weights, of any shape, that is never held."""

from __future__ import annotations

import argparse
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("config", metavar="CONFIG", help="a config.json, or a directory that has one (no weights are needed)")
    add("--to", choices=["bf16", "int8", "int4"], required=True, help="format of the projections")
    add("--out", type=Path, required=True, metavar="DIR", help="directory of the new checkpoint; it must not exist")
    add("--seed", type=int, default=0, metavar="S", help="of the random values (default 0)")


def run(args: argparse.Namespace) -> int:
    from glmx.data.tokenizer import bytes_only
    from glmx.models import random_weights
    from glmx.models.checkpoint import TOKENIZER_FILES, copy_files, write_json, writing
    from glmx.models.quantize import config_json

    raw, config, directory = random_weights.read_config(args.config)
    with writing(args.out) as folder:
        size = random_weights.write(config, folder, args.to, seed=args.seed)
        write_json(folder / "config.json", config_json(raw, args.to))
        copy_files((*TOKENIZER_FILES, "generation_config.json"), directory, folder)
        tokenizer = bytes_only()
        if not (folder / "tokenizer.json").exists() and tokenizer.vocab_size <= config.vocab_size:
            tokenizer.save(folder)
    print(f"{args.out}: {config.num_parameters() / 1e6:,.0f} M random parameters in {args.to}, {size / 1e6:,.0f} MB")
    return 0
