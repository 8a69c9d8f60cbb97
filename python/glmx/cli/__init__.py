"""The `glmx` command, one module per subcommand."""

import argparse
import sys


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
