"""`glmx generate MODEL --prompt TEXT`: completes one prompt and streams it to the terminal."""

from __future__ import annotations

import argparse

from glmx.errors import UnsupportedError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("model", metavar="MODEL", help="a checkpoint directory in Hugging Face layout")
    add("--prompt", required=True, metavar="TEXT", help="the text to complete")
    add("--max-tokens", type=int, default=128, metavar="N", help="stop after N tokens (default 128)")
    add("--temperature", type=float, default=0.0, metavar="T", help="0 is greedy (default 0)")
    add("--top-p", type=float, default=1.0, metavar="P", help="keep the smallest set with mass P (default 1)")
    add("--top-k", type=int, default=0, metavar="K", help="keep the K best tokens; 0 keeps all (default 0)")
    add("--seed", type=int, default=0, metavar="S", help="seed of the sampler (default 0)")
    add("--json", action="store_true", help="print one JSON object instead of text")
    add("--device", default="auto", help="auto, cpu, cuda or cuda:N (default auto)")
    add("--dtype", default="auto", help="auto, bf16 or fp32 (default auto: the checkpoint's)")


def run(args: argparse.Namespace) -> int:
    raise UnsupportedError("generate has not landed yet")
