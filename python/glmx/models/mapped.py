"""Weights where they lie in their files: read-only mappings that share the page cache's memory, and locks on memory.

A weight of a mapped file is neither read nor copied before a product needs it, and a second process that serves the
same files needs no memory for them. The price: a file that is cut short while it is mapped ends the process (SIGBUS).
So a checkpoint in use is never changed in place; glmx writes under another name and renames, which leaves the files
that are mapped alone.
"""

from __future__ import annotations

import ctypes
import functools
import mmap
import os
import resource
import warnings
from collections.abc import Iterable
from pathlib import Path

import torch

from glmx.errors import CheckpointError, UnsupportedError
from glmx.models.safetensors import TORCH, Files

# Of a longer range some kernels read ahead a part only: as much as the device takes at once, at least this.
_ADVICE = 128 * 2**10


class Mapped:
    """The tensors of `files` as parts of mappings; each file is mapped when the first of its tensors is asked for.

    A mapping lives as long as one of its tensors.
    """

    def __init__(self, files: Files) -> None:
        self._files = files
        self._bytes: dict[Path, tuple[torch.Tensor, int]] = {}  # the whole file, and where its data begins

    def tensor(self, key: str) -> torch.Tensor | None:
        """The tensor, not to be written to; None if it does not begin at a multiple of its element's size."""
        entry, file = self._files.headers[key], self._files.file_of(key)
        if file not in self._bytes:
            self._bytes[file] = _mapping(file)
        content, data = self._bytes[file]
        if data + entry.end > len(content):
            raise CheckpointError(f"'{file}' has become shorter since its header was read")
        dtype = TORCH[entry.dtype]
        if (data + entry.start) % dtype.itemsize:
            return None
        return content[data + entry.start : data + entry.end].view(dtype).view(entry.shape)


def _mapping(file: Path) -> tuple[torch.Tensor, int]:
    try:
        with open(file, "rb") as opened:
            mapping = mmap.mmap(opened.fileno(), 0, flags=mmap.MAP_SHARED, prot=mmap.PROT_READ)
    except (OSError, ValueError) as error:  # ValueError: it has become empty
        raise CheckpointError(f"cannot map '{file}': {getattr(error, 'strerror', None) or error}") from None
    with warnings.catch_warnings():  # torch has no tensors that may only be read, and says so
        warnings.filterwarnings("ignore", message="The given buffer is not writable")
        return torch.frombuffer(mapping, dtype=torch.uint8), 8 + int.from_bytes(mapping[:8], "little")


def fetch(tensor: torch.Tensor) -> None:
    """Has a mapped tensor's bytes read into the page cache, where they are not there yet: in order, not by faults."""
    first = tensor.data_ptr() // mmap.PAGESIZE * mmap.PAGESIZE
    end = tensor.data_ptr() + tensor.nbytes
    for start in range(first, end, _ADVICE):
        _libc().madvise(ctypes.c_void_p(start), ctypes.c_size_t(min(_ADVICE, end - start)), mmap.MADV_WILLNEED)


def lock_memory(tensors: Iterable[torch.Tensor]) -> int:
    """Keeps the memory of tensors, mapped or not, from being paged out; returns its size in bytes, in whole pages.

    Raises UnsupportedError where the system does not allow it; then nothing is locked.
    """
    spans: list[list[int]] = []
    for first, end in sorted((t.data_ptr(), t.data_ptr() + t.nbytes) for t in tensors if t.nbytes):
        first, end = first // mmap.PAGESIZE * mmap.PAGESIZE, -(-end // mmap.PAGESIZE) * mmap.PAGESIZE
        if spans and first <= spans[-1][1]:
            spans[-1][1] = max(spans[-1][1], end)
        else:
            spans.append([first, end])
    size = sum(end - first for first, end in spans)
    for number, (first, end) in enumerate(spans):
        if _libc().mlock(ctypes.c_void_p(first), ctypes.c_size_t(end - first)):
            reason = os.strerror(ctypes.get_errno())
            for first, end in spans[:number]:
                _libc().munlock(ctypes.c_void_p(first), ctypes.c_size_t(end - first))
            limit, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
            allowed = "unlimited" if limit == resource.RLIM_INFINITY else f"{limit >> 10} KiB"
            raise UnsupportedError(
                f"cannot lock the weights in memory: {reason}; they take {size >> 10} KiB, "
                f"and this process may lock {allowed} (ulimit -l)"
            )
    return size


@functools.cache
def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None, use_errno=True)
