"""What the safetensors files of a directory hold, checked before any of it is used.

The format: 8 bytes, little-endian, the length of the header; the header, a JSON object from tensor name to dtype,
shape and byte range in the data; the data, every byte of it in one tensor
(huggingface/safetensors, "Format"). Everything is decided from the header and the file's size, before
any tensor is read; then rows are read as they are asked for. models/mapped.py uses them where they lie instead.
"""

from __future__ import annotations

import math
import os
import stat
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import safetensors.torch
import torch

from glmx.errors import CheckpointError, listed, shown
from glmx.jsonfile import parse_object, read_json

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
MAX_HEADER = 100_000_000  # bytes; the format's own limit

# Bits per element. glmx computes with few of them, but a file is well-formed whatever it holds.
_BITS = {
    **dict.fromkeys(("F64", "I64", "U64", "C64"), 64),
    **dict.fromkeys(("F32", "I32", "U32"), 32),
    **dict.fromkeys(("F16", "BF16", "I16", "U16"), 16),
    **dict.fromkeys(("F8_E4M3", "F8_E5M2", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ", "I8", "U8", "BOOL"), 8),
    **dict.fromkeys(("F6_E2M3", "F6_E3M2"), 6),
    "F4": 4,
}

READABLE = ("BF16", "F32", "F16", "F8_E4M3")  # as weights
TORCH = {
    **dict(zip(READABLE, (torch.bfloat16, torch.float32, torch.float16, torch.float8_e4m3fn), strict=True)),
    "I8": torch.int8,
    "I32": torch.int32,
    "I64": torch.int64,
}
_MAX_OPEN = 4  # files; a weight and its scales may be in two


class Entry(NamedTuple):
    """One tensor of a file: dtype as safetensors names it, shape, and its bytes [start, end) in the data."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int


def save_file(tensors: dict[str, torch.Tensor], file: Path, metadata: dict[str, str] | None = None) -> None:
    """safetensors' own, with the permissions of any new file.

    The library's own (0.8.0) can be read by their owner alone: what one user trains no other could serve.
    """
    file.touch()
    mode = stat.S_IMODE(file.stat().st_mode)
    safetensors.torch.save_file(tensors, file, metadata=metadata)
    file.chmod(mode)


def read_header(file: Path, max_header: int = MAX_HEADER) -> dict[str, Entry]:
    """Tensor name -> Entry, for a file that is whole: its length, its JSON and every tensor's range add up.

    Raises CheckpointError naming the file, and the tensor where one is at fault.
    """
    try:
        if not stat.S_ISREG(os.stat(file).st_mode):  # a pipe would block
            raise CheckpointError(f"'{file}' is not a regular file")
        with open(file, "rb") as opened:
            size = os.fstat(opened.fileno()).st_size
            first = opened.read(9)
            length = int.from_bytes(first[:8], "little")
            if size < 8:
                raise CheckpointError(f"'{file}' is truncated: {size} bytes, a safetensors file has at least 10")
            if first == b"version h":
                raise CheckpointError(f"'{file}' is a Git LFS pointer, not the weights: fetch them with git lfs pull")
            if first[8:] not in (b"{", b"") or length < 2:
                raise CheckpointError(f"'{file}' is not a safetensors file: no header at its start")
            if length > max_header:
                raise CheckpointError(
                    f"'{file}' is not a safetensors file of this model: a header of {length} bytes, "
                    f"expected at most {max_header}"
                )
            if length > size - 8:
                raise CheckpointError(f"'{file}' is truncated: a header of {length} bytes in a file of {size}")
            raw = parse_object(b"{" + opened.read(length - 1), f"the header of '{file}'")
    except OSError as error:
        raise CheckpointError(f"cannot read '{file}': {error.strerror or error}") from None

    metadata = raw.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise CheckpointError(f"'{file}': __metadata__ is {shown(metadata)}, expected an object of strings")
    entries = {name: _entry(file, name, value) for name, value in raw.items()}
    _check_ranges(file, entries, size - 8 - length)
    return entries


def _entry(file: Path, name: str, value: Any) -> Entry:
    where = f"'{file}': tensor {listed([name])}"
    if not isinstance(value, dict) or value.keys() != {"dtype", "shape", "data_offsets"}:
        raise CheckpointError(f"{where} is {shown(value)}, expected dtype, shape and data_offsets")
    dtype, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
    if not isinstance(dtype, str) or dtype not in _BITS:
        raise CheckpointError(f"{where} has dtype {shown(dtype)}, expected one of {', '.join(sorted(_BITS))}")
    if not _naturals(shape):
        raise CheckpointError(f"{where} has shape {shown(shape)}, expected a list of sizes")
    if not _naturals(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise CheckpointError(f"{where} has data_offsets {shown(offsets)}, expected [start, end]")
    bits = math.prod(shape) * _BITS[dtype]
    if bits != 8 * (offsets[1] - offsets[0]):
        raise CheckpointError(
            f"{where} is {dtype} {shown(shape)}, {shown(-(-bits // 8))} bytes, "
            f"but its data_offsets {shown(offsets)} hold {shown(offsets[1] - offsets[0])}"
        )
    return Entry(dtype, tuple(shape), offsets[0], offsets[1])


def _naturals(value: Any) -> bool:
    # An integer beyond 64 bits is no size; without the bound a product of them would be slow to compute.
    return isinstance(value, list) and len(value) <= 64 and all(type(n) is int and 0 <= n < 2**63 for n in value)


def _check_ranges(file: Path, entries: dict[str, Entry], data: int) -> None:
    """The tensors cover the file's `data` bytes without a hole and without overlap."""
    position, before = 0, "the header"
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].start, item[1].end)):
        if entry.end > data:
            raise CheckpointError(
                f"'{file}' is truncated: tensor {listed([name])} ends at byte {entry.end} of the data, there are {data}"
            )
        if entry.start != position:
            what = "overlaps" if entry.start < position else "leaves a hole behind"
            raise CheckpointError(
                f"'{file}': tensor {listed([name])} {what} {before}: it begins at byte {entry.start} of the data, "
                f"expected {position}"
            )
        position, before = entry.end, listed([name])
    if position != data:
        raise CheckpointError(f"'{file}' has {data - position} bytes behind its last tensor")


class Files:
    """The safetensors files of a directory as one mapping; made from their headers alone.

    `headers` is tensor name -> Entry, `keys` the names. Raises CheckpointError for a missing, damaged or
    unknown file, an index that disagrees with the files, and a tensor that is in two of them.
    """

    def __init__(self, directory: Path, max_header: int = MAX_HEADER) -> None:
        self.headers: dict[str, Entry] = {}
        self._file_of: dict[str, Path] = {}
        self._open: dict[Path, tuple[BinaryIO, int]] = {}
        index = directory / INDEX
        if index.exists():
            expected = _read_index(index, max_header)
            for file in sorted(set(expected.values())):
                self._add(file, max_header)
            wrong = sorted({key for key, _ in expected.items() ^ self._file_of.items()})
            if wrong:
                raise CheckpointError(f"{INDEX} and the files in '{directory}' disagree on {listed(wrong)}")
        elif (directory / SINGLE).exists():
            self._add(directory / SINGLE, max_header)
        else:
            raise CheckpointError(f"no {SINGLE} or {INDEX} in '{directory}'")
        self.keys = set(self._file_of)

    def _add(self, file: Path, max_header: int) -> None:
        entries = read_header(file, max_header)
        for key in entries:
            if key in self._file_of:
                both = f"'{self._file_of[key].name}' and '{file.name}'"
                raise CheckpointError(f"tensor {listed([key])} is in two files of '{file.parent}': {both}")
            self._file_of[key] = file
        self.headers |= entries

    def file_of(self, key: str) -> Path:
        """The file that holds a tensor."""
        return self._file_of[key]

    def in_order(self) -> list[str]:
        """Every tensor's name, file by file, in the order of the bytes."""
        return sorted(self.headers, key=lambda key: (self._file_of[key], self.headers[key].start))

    def tensor(self, key: str) -> torch.Tensor:
        """The whole tensor, of a dtype in TORCH. Raises CheckpointError."""
        shape = self.headers[key].shape
        return self.rows(key, 0, math.prod(shape[:-1])).view(shape)

    def rows(self, key: str, first: int, count: int) -> torch.Tensor:
        """`count` rows of the tensor seen as [rows, last dim], from row `first`. Raises CheckpointError."""
        entry, file = self.headers[key], self._file_of[key]
        width = entry.shape[-1] if entry.shape else 1
        rows = torch.empty(count, width, dtype=TORCH[entry.dtype])
        if not rows.nbytes:
            return rows
        try:
            opened, data = self._opened(file)
            opened.seek(data + entry.start + first * width * rows.itemsize)
            read = opened.readinto(rows.view(torch.uint8).numpy())  # type: ignore[attr-defined]
        except OSError as error:
            raise CheckpointError(f"cannot read '{file}': {error.strerror or error}") from None
        if read != rows.nbytes:
            raise CheckpointError(f"'{file}' has become shorter since its header was read")
        return rows

    def _opened(self, file: Path) -> tuple[BinaryIO, int]:
        """The open file and where its data begins; the last few stay open."""
        if file not in self._open:
            while len(self._open) >= _MAX_OPEN:
                self._open.pop(next(iter(self._open)))[0].close()
            opened = open(file, "rb")  # noqa: SIM115 - closed by __exit__
            self._open[file] = (opened, 8 + int.from_bytes(opened.read(8), "little"))
        return self._open[file]

    def __enter__(self) -> Files:
        return self

    def __exit__(self, *error: object) -> None:
        """Closes what reading has opened."""
        for opened, _ in self._open.values():
            opened.close()
        self._open.clear()


def _read_index(index: Path, max_bytes: int) -> dict[str, Path]:
    """Tensor name -> file, as the index says; every file is there, in the index's own directory."""
    weight_map = read_json(index, max_bytes).get("weight_map")
    if not isinstance(weight_map, dict):
        raise CheckpointError(f"'{index}' is not an index: weight_map is {shown(weight_map)}, expected an object")
    for key, name in weight_map.items():
        # Also what a path outside the directory, or into the system's devices, would need.
        plain = isinstance(name, str) and name.endswith(".safetensors") and name.isprintable() and len(name) <= 200
        if not plain or "/" in name:
            raise CheckpointError(
                f"'{index}': tensor {listed([key])} is in {shown(name)}, expected a .safetensors file beside the index"
            )
    names = sorted(set(weight_map.values()))
    absent = [name for name in names if not (index.parent / name).exists()]
    if absent:
        raise CheckpointError(f"'{index.parent}' lacks {listed(absent)}, named in {INDEX}")
    return {key: index.parent / name for key, name in weight_map.items()}
