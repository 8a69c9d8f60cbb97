"""The `glmx` command, one module per subcommand."""

import argparse
import sys
from collections.abc import Callable


def write_out(text: str) -> None:
    """Text to standard output at once. Raises OSError, which names it: a full disk behind a redirection."""
    try:
        sys.stdout.write(text)
        sys.stdout.flush()
    except BrokenPipeError:
        raise
    except OSError as error:
        raise OSError(error.errno, error.strerror, "standard output") from error


def drafts(text: str) -> int | str:
    """The value of --num-speculative-tokens: a number, or "auto"."""
    if text == "auto" or text.removeprefix("-").isdecimal():
        return text if text == "auto" else int(text)
    raise argparse.ArgumentTypeError(f"expected a number or auto: got {text!r}")


DEVICES = "auto, cpu, cuda or cuda:N (default auto: cpu)"


def add_weight_arguments(add: Callable[..., object]) -> None:
    """How the weights are held, for commands that generate."""
    add("--no-mapped", dest="mapped", action="store_false", help="copy the weights instead of using the files in place")
    add("--dequantize", action="store_true", help="weights in int8, int4 and fp8 become bf16, as a GPU needs them")
    add("--lock", action="store_true", help="keep the weights in memory, as far as ulimit -l allows")
    add("--check-weights", action="store_true", help="refuse weights with NaN or infinity in them")
