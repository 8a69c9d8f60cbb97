"""`glmx pretrain RUN.toml [--a.b value]`: trains a model, or goes on where the run in `out` was cut short."""

from __future__ import annotations

import argparse
import signal


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.description = (
        "Train a model from a TOML file. Any key can be overridden: --optim.lr 1e-3.\n"
        "The same command goes on where the run in `out` was cut short (Ctrl-C saves)."
    )
    parser.add_argument("config", metavar="RUN.toml", help="the run's configuration; see examples/pretrain.toml")
    parser.add_argument(
        "overrides", nargs=argparse.REMAINDER, metavar="--a.b value", help="overrides; also --dtype and --device"
    )


def run(args: argparse.Namespace) -> int:
    from glmx.train.config import load_config

    config = load_config(args.config, _spelled_out(args.overrides))
    from glmx.train.loop import pretrain

    reason = pretrain(config).reason
    return 128 + signal.Signals[reason] if reason.startswith("SIG") else 0


def _spelled_out(overrides: list[str]) -> list[str]:
    """--dtype and --device, which every command takes, in terms of configuration keys."""
    rest: list[str] = []
    words = iter(overrides)
    for word in words:
        name, equals, value = word.partition("=")
        if name == "--dtype":
            value = value if equals else next(words, "")
            rest += [] if value == "auto" else ["--train.dtype", value]
        elif name == "--device":
            rest += ["--train.device", value if equals else next(words, "")]
        else:
            rest.append(word)
    return rest
