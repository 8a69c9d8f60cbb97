"""Token shards: documents as token ids in memory-mapped files, written once and read by every run.

    write_documents(out, "train", tokenizer, texts)         # out/train-00000-of-00001.bin
    shards = TokenShards.open(out, "train")
    shards.num_tokens, shards.num_documents, shards.document(7)

One file, little-endian:
    0     magic b"GLMXTOK1"
    8     u32 length of the JSON header, then the header, zeros to byte 4096
    4096  tokens: uint16 where the vocabulary allows, else uint32; zeros to a multiple of 8
    ...   uint64 [documents + 1]: where each document begins, in tokens; the last entry is the token count
The header holds format version, dtype, counts, vocab_size and the tokenizer's sha256. Files are written under
a temporary name, synced, and renamed when all shards of the set are complete; the count in the names tells a
reader that none is missing.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path
from typing import IO, Any

import numpy as np

from glmx.data.tokenizer import Tokenizer
from glmx.errors import CheckpointError

MAGIC = b"GLMXTOK1"
VERSION = 1
HEADER_BYTES = 4096  # one page, so that tokens start page-aligned
HASH_TOKENS = 1 << 18  # per block of tokens_sha256: in the cache between its two readings
DEFAULT_SHARD_TOKENS = 1 << 28  # half a GB of uint16: few files, each quick to copy
_DTYPES: dict[str, np.dtype[Any]] = {"uint16": np.dtype("<u2"), "uint32": np.dtype("<u4")}
_NAME = re.compile(r"-(\d{5})-of-(\d{5})\.bin$")


class ShardWriter:
    """Writes documents into `folder/name-XXXXX-of-XXXXX.bin`. A context manager: an exception leaves nothing
    behind.

    A document never spans two files; a file ends after the document that takes it past `shard_tokens`.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        name: str,
        *,
        vocab_size: int,
        tokenizer_sha256: str = "",
        shard_tokens: int = DEFAULT_SHARD_TOKENS,
    ) -> None:
        if vocab_size < 1 or vocab_size > 1 << 32:
            raise ValueError(f"vocab_size = {vocab_size}: expected 1 .. 2**32")
        self.folder, self.name = Path(folder), name
        self.folder.mkdir(parents=True, exist_ok=True)
        self.vocab_size, self.tokenizer_sha256, self.shard_tokens = vocab_size, tokenizer_sha256, shard_tokens
        self.dtype_name = "uint16" if vocab_size <= 1 << 16 else "uint32"
        self._temporary: list[Path] = []
        self._file: IO[bytes] | None = None
        self._offsets: list[int] = [0]

    def add(self, ids: Sequence[int] | np.ndarray) -> None:
        """Append one document. Raises ValueError for an empty one or an id outside the vocabulary."""
        tokens = np.asarray(ids, dtype=np.int64)
        if tokens.ndim != 1 or tokens.size == 0:
            raise ValueError(f"document: expected a non-empty list of ids, got shape {list(tokens.shape)}")
        low, high = int(tokens.min()), int(tokens.max())
        if low < 0 or high >= self.vocab_size:
            bad = low if low < 0 else high
            raise ValueError(f"document: token id {bad} is outside 0 <= id < vocab_size = {self.vocab_size}")
        if self._file is None:
            path = self.folder / f".tmp-{self.name}-{len(self._temporary):05d}-{os.getpid()}.bin"
            self._temporary.append(path)
            self._file = open(path, "wb")  # noqa: SIM115 (closed by _finish_file)
            self._file.write(bytes(HEADER_BYTES))
            self._offsets = [0]
        self._file.write(tokens.astype(_DTYPES[self.dtype_name]).tobytes())
        self._offsets.append(self._offsets[-1] + tokens.size)
        if self._offsets[-1] >= self.shard_tokens:
            self._finish_file()

    def close(self) -> list[Path]:
        """Complete the set: every file takes its name, files of an older set of that name go. Returns the
        paths."""
        self._finish_file()
        if not self._temporary:
            raise ValueError(f"shards {self.name!r}: no document was added")
        paths = []
        for i, temporary in enumerate(self._temporary):
            paths.append(self.folder / f"{self.name}-{i:05d}-of-{len(self._temporary):05d}.bin")
            os.replace(temporary, paths[-1])
        self._temporary = []
        for old in self.folder.glob(f"{self.name}-*-of-*.bin"):
            if old not in paths and _NAME.search(old.name):
                old.unlink()
        _sync_folder(self.folder)
        return paths

    def abort(self) -> None:
        """Remove what was written."""
        if self._file is not None:
            with contextlib.suppress(OSError):  # of a full disk: closing writes what is left in the buffer
                self._file.close()
            self._file = None
        for path in self._temporary:
            with contextlib.suppress(FileNotFoundError):
                path.unlink()
        self._temporary = []

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(self, kind: Any, value: Any, trace: Any) -> None:
        if kind is None:
            self.close()
        else:
            self.abort()

    def _finish_file(self) -> None:
        f = self._file
        if f is None:
            return
        count = self._offsets[-1]
        f.write(bytes(-count * _DTYPES[self.dtype_name].itemsize % 8))
        f.write(np.array(self._offsets, "<u8").tobytes())
        header = json.dumps(
            {
                "version": VERSION,
                "dtype": self.dtype_name,
                "tokens": count,
                "documents": len(self._offsets) - 1,
                "vocab_size": self.vocab_size,
                "tokenizer_sha256": self.tokenizer_sha256,
            }
        ).encode()
        f.seek(0)
        f.write(MAGIC + len(header).to_bytes(4, "little") + header)
        f.flush()
        os.fsync(f.fileno())
        f.close()
        self._file = None


def write_documents(
    folder: str | os.PathLike[str], name: str, tokenizer: Tokenizer, texts: Sequence[str], **options: Any
) -> TokenShards:
    """Tokenize `texts` (`Tokenizer.encode_document` each) into a shard set and open it."""
    with ShardWriter(
        folder, name, vocab_size=tokenizer.vocab_size, tokenizer_sha256=tokenizer.sha256, **options
    ) as writer:
        for ids in tokenizer.encode_documents(texts):
            writer.add(ids)
    return TokenShards.open(folder, name)


class TokenShards:
    """A shard set, read as one list of documents. Tokens stay on disk until they are touched."""

    def __init__(self, paths: Sequence[str | os.PathLike[str]]) -> None:
        if not paths:
            raise CheckpointError("token shards: no files given")
        self.paths = [Path(p) for p in paths]
        headers, self._tokens, offsets = [], [], []
        for path in self.paths:
            header, tokens, starts = _open_file(path)
            headers.append(header)
            self._tokens.append(tokens)
            offsets.append(starts)
        for path, header in zip(self.paths, headers, strict=True):
            for key in ("vocab_size", "tokenizer_sha256"):
                if header[key] != headers[0][key]:
                    raise CheckpointError(
                        f"{path}: {key} is {header[key]!r}, but {headers[0][key]!r} in {self.paths[0]}: "
                        f"the shards were made with different tokenizers"
                    )
        self.vocab_size: int = headers[0]["vocab_size"]
        self.tokenizer_sha256: str = headers[0]["tokenizer_sha256"]
        lengths = np.concatenate([np.diff(o) for o in offsets])
        #: int64 [documents + 1], over all files: where each document begins in the set.
        self.document_offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
        self.num_documents = len(lengths)
        self.num_tokens = int(self.document_offsets[-1])
        self._file_starts = np.concatenate([[0], np.cumsum([len(t) for t in self._tokens])]).astype(np.int64)

    @classmethod
    def open(cls, folder: str | os.PathLike[str], name: str = "train") -> TokenShards:
        """The shard set `name` in `folder`. Raises CheckpointError when files are missing or of two sets."""
        base = Path(folder)
        paths = sorted(p for p in base.glob(f"{name}-*.bin") if _NAME.search(p.name))
        if not paths:
            raise CheckpointError(f"{base}: no token shards {name}-00000-of-NNNNN.bin")
        totals = sorted({int(_NAME.search(p.name).group(2)) for p in paths})  # type: ignore[union-attr]
        expected = [base / f"{name}-{i:05d}-of-{totals[0]:05d}.bin" for i in range(totals[0])]
        if paths != expected:
            missing = [p.name for p in expected if p not in paths]
            raise CheckpointError(
                f"{base}: incomplete token shards {name!r}: "
                + (f"missing {', '.join(missing)}" if missing else f"files of several sets, of {totals} files each")
            )
        return cls(paths)

    def document(self, index: int) -> np.ndarray:
        """The ids of one document (a view of the mapped file)."""
        if not 0 <= index < self.num_documents:
            raise IndexError(f"document {index}: expected 0 <= index < {self.num_documents}")
        return self.slice(int(self.document_offsets[index]), int(self.document_offsets[index + 1]))

    def slice(self, start: int, end: int) -> np.ndarray:
        """Tokens `start` to `end` of the set; they must lie in one document (so in one file)."""
        file = int(np.searchsorted(self._file_starts, start, side="right")) - 1
        base = int(self._file_starts[file])
        return self._tokens[file][start - base : end - base]

    def document_lengths(self) -> np.ndarray:
        """int64 [documents]."""
        return np.diff(self.document_offsets)

    @cached_property
    def tokens_sha256(self) -> str:
        """Of every token and every document's place, however they lie in files. Reads them all: about 1.5 GB/s.

        Raises CheckpointError for a token outside the vocabulary.
        """
        digest = hashlib.sha256(self.document_offsets.astype("<i8").tobytes())
        for path, tokens in zip(self.paths, self._tokens, strict=True):
            for start in range(0, len(tokens), HASH_TOKENS):
                block = tokens[start : start + HASH_TOKENS]
                if (highest := int(block.max())) >= self.vocab_size:
                    raise CheckpointError(
                        f"{path}: damaged token shard: token {highest}, the vocabulary has {self.vocab_size}"
                    )
                digest.update(block.data)
        return digest.hexdigest()


def read_all(shards: TokenShards, documents: Iterable[int] | None = None) -> list[np.ndarray]:
    """The named documents (default: all) as views, in order."""
    return [shards.document(i) for i in (range(shards.num_documents) if documents is None else documents)]


def _open_file(path: Path) -> tuple[dict[str, Any], np.ndarray, np.ndarray]:
    try:
        size = path.stat().st_size
        with open(path, "rb") as f:
            head = f.read(HEADER_BYTES)
    except OSError as e:
        raise CheckpointError(f"{path}: cannot read token shard: {e.strerror}") from e
    if head[:7] != MAGIC[:7]:
        raise CheckpointError(f"{path}: not a token shard (it begins with {head[:8]!r}, expected {MAGIC!r})")
    if len(head) < HEADER_BYTES:
        raise CheckpointError(f"{path}: truncated token shard: {size} bytes, shorter than its header")
    try:
        header = json.loads(head[12 : 12 + int.from_bytes(head[8:12], "little")])
        version = header["version"]
        if version == VERSION:
            dtype = _DTYPES[header["dtype"]]
            count, documents = header["tokens"], header["documents"]
            for key in ("tokens", "documents", "vocab_size"):
                if type(header[key]) is not int or header[key] < 1:
                    raise ValueError(f"{key} is {header[key]!r}")
            header["tokenizer_sha256"]
    except (ValueError, KeyError, TypeError, RecursionError) as e:
        raise CheckpointError(f"{path}: damaged token shard header: {e!r}") from e
    if version != VERSION:
        raise CheckpointError(f"{path}: token shard version {version!r}; this glmx reads version {VERSION}")
    index_at = HEADER_BYTES + (count * dtype.itemsize + 7) // 8 * 8
    expected = index_at + 8 * (documents + 1)
    if size != expected:
        kind = "truncated" if size < expected else "damaged"
        raise CheckpointError(f"{path}: {kind} token shard: {size} bytes, its header says {expected}")
    tokens = np.memmap(path, dtype, "r", HEADER_BYTES, (count,))
    starts = np.array(np.memmap(path, "<u8", "r", index_at, (documents + 1,))).astype(np.int64)
    if starts[0] != 0 or starts[-1] != count or (np.diff(starts) <= 0).any():
        raise CheckpointError(f"{path}: damaged token shard: its document index does not cover its {count} tokens")
    return header, tokens, starts


def _sync_folder(folder: Path) -> None:
    fd = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
