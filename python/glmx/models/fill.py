"""Filling a model from its files: one pass over the shards, piece by piece, so that the peak is the model's own size.

Every tensor's bytes are read once, in the files' order, a few MB at a time, converted (or dequantised, see stored) and
copied to their place. Beside the model there are one piece, what it is converted through, and a weight's scales. What
is mapped is fetched into the page cache, unless it is there.
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from typing import TextIO

import torch

from glmx.errors import CheckpointError, UnsupportedError
from glmx.models import stored
from glmx.models.allocate import Place
from glmx.models.mapped import fetch
from glmx.models.safetensors import Files
from glmx.models.stored import Stored

_PIECE = 2**20  # values; in fp32 4 MB, of which a piece of a weight in few bits goes through a few
_QUIET_S = 1.0  # what takes less is not worth a line
_REDRAW_S = 0.1


@torch.no_grad()
def fill(
    places: Mapping[str, Place],
    copies: Mapping[str, torch.Tensor],
    found: Mapping[str, Stored],
    files: Files,
    check_finite: bool,
) -> None:
    """Brings every tensor of the files to its place; `copies` name the weights that repeat another one.

    Names, shapes and dtypes are known to fit. Raises CheckpointError for values that are not finite (with
    `check_finite`) and for files that cannot be read, UnsupportedError for a copy that differs.
    """
    repeated = {found[key].values if key in found else key: key for key in copies}
    repeated = {tensor: repeated[tensor] for tensor in sorted(repeated) if tensor in files.headers}
    keys = [key for key in files.in_order() if key in places] + list(repeated)  # when what they copy is there
    total = sum(files.headers[key].end - files.headers[key].start for key in keys)
    with files, Progress(total) as progress:
        for key in keys:
            if key in places:
                _fill_one(places[key], key, files, check_finite, progress.add)
            else:
                weight = repeated[key]
                _compare(copies[weight], weight, found.get(weight), files, progress.add)


def _fill_one(place: Place, key: str, files: Files, check_finite: bool, count: Callable[[int], None]) -> None:
    target, bad = place.tensor.view(-1, place.tensor.shape[-1]), 0
    if place.mapped:
        for rows in target.split(max(1, _PIECE // target.shape[1])):
            fetch(rows)
            count(rows.nbytes)
            bad += place.not_finite(rows) if check_finite else 0
    else:
        for first, rows, _ in _pieces(key, place.how, files, count):
            held = target[first : first + len(rows)]
            held.copy_(rows)
            bad += place.not_finite(held) if check_finite else 0
    if bad:
        raise CheckpointError(f"tensor {key}: {bad} of its {target.numel()} values are NaN or infinite")


def _compare(original: torch.Tensor, key: str, how: Stored | None, files: Files, count: Callable[[int], None]) -> None:
    """A quantised copy of what is not quantised is one if it is its rounding; others are equal to the bit."""
    target = original.view(-1, original.shape[-1])
    for first, rows, scale in _pieces(key, how, files, count):
        wanted = target[first : first + len(rows)].cpu()
        same = torch.equal(rows.to(wanted.dtype), wanted)
        if not same and (how is None or scale is None or not stored.rounds_to(how, rows, wanted, scale)):
            raise UnsupportedError(f"tensor {key} differs from the tensor it copies; glmx ties them")


def _pieces(
    key: str, how: Stored | None, files: Files, count: Callable[[int], None]
) -> Iterator[tuple[int, torch.Tensor, torch.Tensor | None]]:
    """(first row, rows [n, width], their scales if they were quantised), one after the other."""
    values = key if how is None else how.values
    shape = files.headers[values].shape
    width = max(shape[-1] if how is None else how.shape[1], 1)
    total = math.prod(shape[:-1])
    step = max(1, _PIECE // width)
    scale = None if how is None else files.tensor(how.scale)
    for first in range(0, total, step):
        rows = files.rows(values, first, min(step, total - first))
        count(rows.nbytes)
        if how is None or scale is None:
            yield first, rows, None
        else:
            row_scales = stored.row_scales(how, scale, first, len(rows))
            yield first, stored.dequantised(how, rows, row_scales), row_scales


class Progress:
    """A line on a terminal that says how much is done; nothing elsewhere, and nothing for what is quick."""

    def __init__(
        self,
        total_bytes: int,
        stream: TextIO | None = None,
        clock: Callable[[], float] = time.monotonic,
        word: str = "loading",
    ) -> None:
        self._stream = sys.stderr if stream is None else stream
        self._clock, self._begun = clock, clock()
        self._next = self._begun + _QUIET_S
        self._total, self._done, self._width, self._word = total_bytes, 0, 0, word
        self._shown = self._stream is not None and self._stream.isatty()

    def __enter__(self) -> Progress:
        return self

    def add(self, count: int) -> None:
        """`count` more bytes are done."""
        self._done += count
        now = self._clock()
        if not self._shown or now < self._next:
            return
        self._next = now + _REDRAW_S
        speed = self._done / (now - self._begun)
        left = (self._total - self._done) / speed if speed else 0.0
        filled = 30 * self._done // max(self._total, 1)
        line = (
            f"{self._word} [{'#' * filled}{'.' * (30 - filled)}] "
            f"{self._done / 2**30:.1f} of {self._total / 2**30:.1f} GiB, {speed / 2**30:.1f} GiB/s, {left:.0f} s left"
        )
        self._stream.write("\r" + line.ljust(self._width))
        self._stream.flush()
        self._width = len(line)

    def __exit__(self, *error: object) -> None:
        if self._width:  # the next line, an error's perhaps, takes the place of the bar
            self._stream.write("\r" + " " * self._width + "\r")
            self._stream.flush()
