"""`glmx plan MODEL`: how much memory a model takes, before any of it is allocated."""

from __future__ import annotations

import argparse
import dataclasses
import json


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add(
        "model",
        metavar="MODEL",
        help="a directory with a config.json (no weights are needed), or a Hub id in the cache",
    )
    add("--tokens", type=int, metavar="N", help="tokens of a sequence (default: the model's longest)")
    add("--sequences", type=int, default=1, metavar="B", help="sequences at the same time (default 1)")
    add("--chunk", type=int, default=8192, metavar="C", help="tokens computed at a time (default 8192)")
    add("--drafts", type=int, default=0, metavar="K", help="num_speculative_tokens of the server (default 0)")
    add("--dtype", choices=["auto", "bf16", "fp32"], default="auto", help="default auto: the checkpoint's")
    add("--json", action="store_true", help="print one JSON object, in bytes")


def run(args: argparse.Namespace) -> int:
    import torch

    from glmx.models.checkpoint import resolve
    from glmx.models.config import ModelConfig
    from glmx.models.plan import memory_plan, stored_weights

    directory = resolve(args.model)
    config = ModelConfig.from_dir(directory)
    name = {"auto": config.dtype, "bf16": "bfloat16", "fp32": "float32"}[args.dtype]
    formats, weights = stored_weights(config, getattr(torch, name), directory)
    tokens = config.max_position_embeddings if args.tokens is None else args.tokens
    plan = memory_plan(
        config,
        getattr(torch, name),
        tokens,
        sequences=args.sequences,
        chunk=args.chunk,
        drafts=args.drafts,
        weights=weights,
    )
    if args.json:
        print(json.dumps({**dataclasses.asdict(plan), "total": plan.total}))
        return 0
    kept = " and ".join([name, *sorted(formats)])
    many = f"{args.sequences} sequences" if args.sequences > 1 else "1 sequence"
    rows = {
        "weights": (plan.weights, f"{config.num_parameters() / 1e9:,.3g} B parameters in {kept}, MTP layer included"),
        "cache": (plan.cache, f"{many} of {tokens:,} tokens, {plan.cache_per_token:,} bytes a token"),
        "activations": (plan.activations, f"at most, {min(args.chunk, tokens * args.sequences):,} tokens at a time"),
        "total": (plan.total, ""),
    }
    print(f"{config.model_type}, {config.num_hidden_layers} layers")
    for label, (size, words) in rows.items():
        print(f"  {label:<12}{_shown(size):>12}   {words}".rstrip())
    return 0


def _shown(size: int) -> str:
    for unit, least in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if size >= least:
            return f"{size / least:,.2f} {unit}"
    return f"{size} B"
