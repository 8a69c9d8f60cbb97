"""What the safetensors files of a directory hold, checked before any of it is used.

The format: 8 bytes, little-endian, the length of the header; the header, a JSON object from tensor name to dtype,
shape and byte range in the data; the data, every byte of it in one tensor
(huggingface/safetensors, "Format"). Everything is decided from the header and the file's size, before
any tensor is read; then rows are read as they are asked for; models/mapped.py uses them where they lie instead.
`StreamedFiles` writes shards of tensors that nobody holds.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import shutil
import stat
from collections.abc import Iterable, Sequence
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

_NAMES = {dtype: name for name, dtype in TORCH.items()}
_ALIGNMENT = 64  # bytes: a cache line, and the widest vector


class Entry(NamedTuple):
    """One tensor of a file: dtype as safetensors names it, shape, and its bytes [start, end) in the data."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int


def save_file(tensors: dict[str, torch.Tensor], file: Path, metadata: dict[str, str] | None = None) -> None:
    """safetensors' own, with the permissions of any new file; tensors may lie on any device.

    The library's own (0.8.0) can be read by their owner alone: what one user trains no other could serve.
    """
    file.touch()
    mode = stat.S_IMODE(file.stat().st_mode)
    safetensors.torch.save_file({name: tensor.cpu() for name, tensor in tensors.items()}, file, metadata=metadata)
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


class Planned(NamedTuple):
    """A tensor that will be written: its name, dtype and shape."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def check_free(directory: Path, size: int) -> None:
    """Raises CheckpointError when the disk that holds `directory` has less than `size` bytes left."""
    free = shutil.disk_usage(directory).free
    if free < size:
        raise CheckpointError(
            f"the checkpoint takes {size / 1e9:.1f} GB, the disk of '{directory.parent}' has {free / 1e9:.1f} GB left"
        )


class StreamedFiles:
    """The safetensors files of a directory, written piece by piece: a context manager, which ends with the index.

    Tensors are spread over shards in the order given, those of a group into the same one. In a shard those whose size
    is a multiple of 64 bytes come first, each at a multiple of 64 in the file: a weight can then be used where it lies
    in a mapped file. Raises CheckpointError for what the disk refuses.
    """

    def __init__(self, directory: Path, groups: Iterable[Sequence[Planned]], max_shard_bytes: int) -> None:
        shards: list[list[Planned]] = [[]]
        size = self.total = 0
        for group in groups:
            nbytes = sum(tensor.nbytes for tensor in group)
            if shards[-1] and size + nbytes > max_shard_bytes:
                shards.append([])
                size = 0
            shards[-1] += group
            size += nbytes
            self.total += nbytes
        names = [f"model-{n:05d}-of-{len(shards):05d}.safetensors" for n in range(1, len(shards) + 1)]
        names = names if len(shards) > 1 else [SINGLE]
        self._directory = directory
        self._shards = dict(zip(names, shards, strict=True))
        self._weight_map = {tensor.name: name for name, shard in self._shards.items() for tensor in shard}
        self._places: dict[str, tuple[int, int]] = {}  # name -> where its next bytes go in its file, where they end
        self._open: dict[str, BinaryIO] = {}
        self._left = {name: sum(tensor.nbytes for tensor in shard) for name, shard in self._shards.items()}

    def write(self, name: str, piece: torch.Tensor) -> None:
        """The next bytes of a tensor: whole, or rows behind those written before."""
        file = self._weight_map[name]
        try:
            if file not in self._open:
                self._open[file] = open(self._directory / file, "wb")  # noqa: SIM115 - closed when full
                self._begin(file)
            start, end = self._places[name]
            assert start + piece.nbytes <= end, f"{name}: {start + piece.nbytes - end} bytes too many"
            self._open[file].seek(start)
            self._open[file].write(piece.contiguous().flatten().view(torch.uint8).numpy().data)
            self._places[name] = (start + piece.nbytes, end)
            self._left[file] -= piece.nbytes
            if not self._left[file]:
                self._open[file].close()
        except OSError as error:
            raise CheckpointError(f"cannot write '{self._directory / file}': {error.strerror or error}") from None

    def _begin(self, file: str) -> None:
        """Writes the header, and decides where each tensor goes."""
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        offset = 0
        # By the largest power of two in its size, up to 64: what follows a tensor is then aligned for itself too.
        for tensor in sorted(self._shards[file], key=lambda t: -min(t.nbytes & -t.nbytes or _ALIGNMENT, _ALIGNMENT)):
            end = offset + tensor.nbytes
            entry = {"dtype": _NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [offset, end]}
            header[tensor.name] = entry
            self._places[tensor.name] = (offset, end)
            offset = end
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-(8 + len(text)) % _ALIGNMENT)
        self._open[file].write(len(text).to_bytes(8, "little") + text)
        for tensor in self._shards[file]:
            start, end = self._places[tensor.name]
            self._places[tensor.name] = (8 + len(text) + start, 8 + len(text) + end)

    def __enter__(self) -> StreamedFiles:
        return self

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
        for opened in self._open.values():
            with contextlib.suppress(OSError):  # of what a full disk has refused before
                opened.close()
        if kind is None:
            unwritten = [name for name, left in self._left.items() if left]
            assert not unwritten, f"not every tensor of {', '.join(unwritten)} was written"
            if len(self._shards) > 1:
                index = {"metadata": {"total_size": self.total}, "weight_map": self._weight_map}
                (self._directory / INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")
