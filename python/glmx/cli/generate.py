"""`glmx generate MODEL --prompt TEXT`: completes one prompt and streams it to the terminal."""

from __future__ import annotations

import argparse
import dataclasses
import json

from glmx.cli import DEVICES, add_weight_arguments, drafts


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("model", metavar="MODEL", help="a checkpoint directory, or a Hub id in the local cache")
    add("--prompt", required=True, metavar="TEXT", help="the text to complete")
    add("--max-tokens", type=int, default=128, metavar="N", help="stop after N tokens (default 128)")
    add("--temperature", type=float, default=0.0, metavar="T", help="0 is greedy (default 0)")
    add("--top-p", type=float, default=1.0, metavar="P", help="keep the smallest set with mass P (default 1)")
    add("--top-k", type=int, default=0, metavar="K", help="keep the K best tokens; 0 keeps all (default 0)")
    add(
        "--min-p",
        type=float,
        default=0.0,
        metavar="P",
        help="keep tokens with P times the best one's chance (default 0)",
    )
    add("--repetition-penalty", type=float, default=1.0, metavar="R", help="against tokens seen so far; 1 is none")
    add(
        "--presence-penalty",
        type=float,
        default=0.0,
        metavar="X",
        help="against tokens of the answer, -2 to 2; 0 is none",
    )
    add(
        "--frequency-penalty", type=float, default=0.0, metavar="X", help="the same for each time they occur; 0 is none"
    )
    add(
        "--logit-bias",
        type=bias,
        action="append",
        default=[],
        metavar="ID=X",
        help="add X (-100 to 100) to the logit of token ID; may be given several times",
    )
    add("--seed", type=int, default=0, metavar="S", help="seed of the sampler (default 0)")
    add(
        "--num-speculative-tokens",
        type=drafts,
        default=0,
        metavar="K",
        help="drafts of the MTP layer in each step, or auto; the text is the same (default 0)",
    )
    add("--json", action="store_true", help="print one JSON object instead of text")
    add("--device", default="auto", metavar="D", help=DEVICES)
    add_weight_arguments(add)
    add("--dtype", default="auto", help="auto, bf16 or fp32 (default auto: the checkpoint's)")


def bias(text: str) -> tuple[int, float]:
    """--logit-bias for argparse."""
    try:
        token, value = text.split("=")
        return int(token), float(value)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r}: expected a token id and a number, as in 42=-1.5") from None


def run(args: argparse.Namespace) -> int:
    from glmx.cli import write_out
    from glmx.errors import ConfigError
    from glmx.serve.llm import LLM, RequestOutput, SamplingParams

    try:
        args.prompt.encode()
    except UnicodeEncodeError as error:  # bytes of the command line that Python could not decode
        raise ConfigError(f"--prompt {ascii(args.prompt)}: not UTF-8 text at character {error.start}") from None

    params = SamplingParams(
        max_tokens=args.max_tokens,
        temperature=args.temperature,
        top_p=args.top_p,
        top_k=args.top_k,
        min_p=args.min_p,
        repetition_penalty=args.repetition_penalty,
        presence_penalty=args.presence_penalty,
        frequency_penalty=args.frequency_penalty,
        logit_bias=dict(args.logit_bias) or None,
        seed=args.seed,
    )
    llm = LLM(
        args.model,
        device=args.device,
        dtype=args.dtype,
        max_num_seqs=1,
        num_speculative_tokens=args.num_speculative_tokens,
        mapped=args.mapped,
        lock=args.lock,
        check_finite=args.check_weights,
        dequantize=args.dequantize,
    )
    if args.json:
        (out,) = llm.generate([args.prompt], params)
        print(json.dumps(dataclasses.asdict(out), ensure_ascii=False))
        return 0
    write_out(args.prompt)
    try:
        for piece in llm.stream(args.prompt, params):
            if not isinstance(piece, RequestOutput):
                write_out(piece)
    finally:
        write_out("\n")
    return 0
