"""The `glmx` command: runs one command module and turns a user's mistake into one line and exit code 2.

Each command is one thin module `glmx.cli.<name>` (an underscore for a dash) with two functions:

    add_arguments(parser: argparse.ArgumentParser) -> None
    run(args: argparse.Namespace) -> int

Only the module of the chosen command is imported, so `glmx --help` answers without loading torch.
"""

from __future__ import annotations

import argparse
import importlib
import os
import re
import sys
from collections.abc import Sequence
from typing import Any, NoReturn

from glmx import __version__
from glmx.cli import write_out
from glmx.errors import GlmxError

COMMANDS = {
    "env": "show devices, instruction sets, the build and the kernel table",
    "demo": "train a small GLM on this machine's Python sources and complete a prompt",
    "pretrain": "train a model from a TOML file",
    "generate": "complete a prompt with a checkpoint",
    "serve": "serve a checkpoint over HTTP, as OpenAI's API",
    "plan": "say how much memory a model and its cache take",
    "quantize": "write a checkpoint with int8 or int4 weights",
    "make-random": "write a checkpoint of random weights of any shape",
}


def _module(command: str) -> Any:
    return importlib.import_module(f"glmx.cli.{command.replace('-', '_')}")


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message} (see {self.prog} --help)\n")


def _build_parser(command: str | None) -> argparse.ArgumentParser:
    parser = _Parser(prog="glmx", description="Train and run GLM-class sparse models.")
    parser.add_argument("--version", action="version", version=f"glmx {__version__}")
    parser.add_argument("--traceback", action="store_true", help="show the full traceback of an error")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name, summary in COMMANDS.items():
        description = summary[0].upper() + summary[1:] + "."
        subparser = commands.add_parser(name, help=summary, description=description)
        if name == command:
            _module(name).add_arguments(subparser)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit code: 0 done, 1 failed, 2 the user's to fix, 130 interrupted."""
    argv = list(sys.argv[1:] if argv is None else argv)
    command = next((arg for arg in argv if not arg.startswith("-")), None)
    args = _build_parser(command).parse_args(argv)
    try:
        code = _module(args.command).run(args)
        write_out("")  # what is buffered, while a full disk can still be reported
        return code
    except BrokenPipeError:
        # The reader (head, less) has gone; without this the interpreter complains again while it shuts down.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except KeyboardInterrupt:
        return 130
    except (GlmxError, ValueError, TypeError, OSError, MemoryError, RuntimeError) as error:
        what = _explain(error)
        if args.traceback or what is None:
            raise
        print(f"glmx {args.command}: {what}", file=sys.stderr)
        return 2


def _explain(error: Exception) -> str | None:
    """The error in one line; None for what is no mistake of the user."""
    line = " ".join(str(error).split()) or type(error).__name__
    if isinstance(error, MemoryError):  # Python's has no text, numpy's says how much
        return "out of memory" if line == "MemoryError" else f"out of memory: {line}"
    if isinstance(error, RuntimeError):  # torch's allocator raises no type of its own
        wanted = re.search(r"can't allocate memory: you tried to allocate (\d+ bytes)", line)
        wanted = wanted or re.search(r"CUDA out of memory. Tried to allocate ([\d.]+ \w+)", line)
        return f"out of memory: could not allocate {wanted[1]}" if wanted else None
    return line


if __name__ == "__main__":
    sys.exit(main())
