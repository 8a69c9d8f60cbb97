"""The text a run trains on: the Python standard library found on this machine, or any directory of text.

    corpus = standard_library()                  # or directory(Path("my/text"))
    corpus.train, corpus.heldout                 # lists of Document(name, data)
    print(corpus.summary())                      # files, bytes, hash, what is held out

The list depends on the files' names and contents alone: names are sorted, compiled files, tests, encodings
and generated tables never enter, exact duplicates keep their first name, and files that are not UTF-8 are
counted and left out. Whole top-level modules are held out, chosen by a hash of their name, so that no
held-out file has a sibling of its own package in training and the same modules stay held out when the library
changes a little.
"""

from __future__ import annotations

import hashlib
import os
import re
import sysconfig
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from glmx.errors import ConfigError

MIN_BYTES = 3_000_000
# Aim of the held-out share and its ceiling. The walk in `_hold_out` stops between the two when it can.
HELDOUT_AIM, HELDOUT_MAX = 0.06, 0.08
# Pieces that a corpus of a few large files is cut into, so that it can be held out at all.
PIECE_BYTES = 64 * 1024

# Directories of the standard library that hold no source worth learning: tests, charmap tables, build
# records, packages of third parties, and documentation stored as one literal.
_STDLIB_SKIP_DIRS = {
    "test", "tests", "idle_test", "encodings", "pydoc_data", "site-packages", "dist-packages", "lib-dynload",
    "__pycache__", "__phello__", "msilib",
}  # fmt: skip
_STDLIB_SKIP_DIR_PREFIX = "config-"
# Generated tables, and files that a distribution or a site puts beside the library.
_STDLIB_SKIP_FILES = {
    "html/entities.py", "stringprep.py", "this.py", "__hello__.py", "sitecustomize.py", "usercustomize.py",
}  # fmt: skip
_STDLIB_SKIP_NAME = re.compile(r"^(_sysconfigdata.*|_sysconfig_vars.*|test_.*|.*_test)\.py$")
_DIR_SKIP = {"__pycache__", ".git", ".hg", ".svn", ".tox", ".venv", "node_modules"}


@dataclass(frozen=True)
class Document:
    """One file, or a piece of a large one; `name` is its path below the corpus root, with forward slashes."""

    name: str
    data: bytes

    @property
    def text(self) -> str:
        return self.data.decode("utf-8")


@dataclass(frozen=True)
class Corpus:
    """`files` and `bytes` count what was kept, held-out included; `sha256` covers names and contents."""

    source: str
    files: int
    bytes: int
    sha256: str
    train: list[Document] = field(repr=False)
    heldout: list[Document] = field(repr=False)
    heldout_groups: list[str]
    skipped_not_utf8: int
    duplicates: int

    @property
    def train_bytes(self) -> int:
        return sum(len(d.data) for d in self.train)

    @property
    def heldout_bytes(self) -> int:
        return sum(len(d.data) for d in self.heldout)

    def summary(self) -> str:
        """A few lines for the terminal."""
        share = 100 * self.heldout_bytes / self.bytes
        return "\n".join(
            (
                f"corpus    {self.source}: {self.files} files, {self.bytes:,} bytes, sha256 {self.sha256[:16]}",
                f"held out  {len(self.heldout)} documents, {self.heldout_bytes:,} bytes ({share:.1f} %), "
                f"{len(self.heldout_groups)} modules: {_shortened(self.heldout_groups)}",
                f"left out  {self.duplicates} exact duplicates, {self.skipped_not_utf8} not UTF-8",
            )
        )


def standard_library(root: str | os.PathLike[str] | None = None, *, min_bytes: int = MIN_BYTES) -> Corpus:
    """The `.py` sources of the running interpreter's standard library (or of the one at `root`).

    Raises ConfigError below `min_bytes`: some distributions ship the library without its sources.
    """
    base = Path(root) if root is not None else Path(sysconfig.get_path("stdlib"))
    return _build(f"python standard library {_version_of(base)}".rstrip(), base, _stdlib_names(base), min_bytes)


def directory(root: str | os.PathLike[str], *, min_bytes: int = MIN_BYTES) -> Corpus:
    """The `*.py` files below `root`; where there are none, every UTF-8 text. Raises ConfigError."""
    base = Path(root)
    if not base.is_dir():
        raise ConfigError(f"--corpus {base}: not a directory; give one that holds at least {min_bytes:,} bytes of text")
    names = sorted(_walk(base, lambda d: d not in _DIR_SKIP and not d.startswith("."), lambda n: True))
    python = [n for n in names if n.endswith(".py")]
    return _build(str(base.name or base), base, python or names, min_bytes)


def load(corpus_dir: str | os.PathLike[str] | None = None, *, min_bytes: int = MIN_BYTES) -> Corpus:
    """`directory(corpus_dir)` when it is given, else `standard_library()`."""
    return standard_library(min_bytes=min_bytes) if corpus_dir is None else directory(corpus_dir, min_bytes=min_bytes)


def _version_of(base: Path) -> str:
    match = re.search(r"(\d+\.\d+)$", base.name)
    return match.group(1) if match else ""


def _walk(base: Path, keep_dir: Callable[[str], bool], keep: Callable[[str], bool]) -> Iterator[str]:
    for folder, dirs, files in os.walk(base, onerror=_raise):
        dirs[:] = sorted(d for d in dirs if keep_dir(d))
        prefix = Path(folder).relative_to(base).as_posix()
        for name in sorted(files):
            path = name if prefix == "." else f"{prefix}/{name}"
            if keep(path) and (base / path).is_file():
                yield path


def _raise(error: OSError) -> None:
    raise error


def _stdlib_names(base: Path) -> list[str]:
    def keep_dir(name: str) -> bool:
        return name not in _STDLIB_SKIP_DIRS and not name.startswith(_STDLIB_SKIP_DIR_PREFIX)

    def keep(path: str) -> bool:
        name = path.rsplit("/", 1)[-1]
        return name.endswith(".py") and path not in _STDLIB_SKIP_FILES and not _STDLIB_SKIP_NAME.match(name)

    return sorted(_walk(base, keep_dir, keep))


def _build(source: str, base: Path, names: list[str], min_bytes: int) -> Corpus:
    documents, seen, not_utf8, duplicates = [], set(), 0, 0
    for name in names:
        data = (base / name).read_bytes()
        if not data.strip():
            continue
        if not _is_text(data):
            not_utf8 += 1
            continue
        digest = hashlib.sha256(data).digest()
        if digest in seen:
            duplicates += 1
            continue
        seen.add(digest)
        # A name that is not UTF-8 is shown, and hashed, with its odd bytes spelled out.
        documents.append(Document(os.fsencode(name).decode("utf-8", "backslashreplace"), data))
    total = sum(len(d.data) for d in documents)
    if total < min_bytes:
        odd = f" ({not_utf8} more are not UTF-8)" if not_utf8 else ""
        raise ConfigError(
            f"{source} at {base}: {total:,} bytes of text in {len(documents)} files{odd} is "
            f"too little to train on (at least {min_bytes:,} bytes); give another directory of text with --corpus DIR"
        )
    digest_all = hashlib.sha256()
    for d in documents:
        digest_all.update(f"{len(d.name.encode())} {len(d.data)} ".encode() + d.name.encode() + d.data)
    train, heldout, groups = _split(documents, total)
    return Corpus(
        source=source,
        files=len(documents),
        bytes=total,
        sha256=digest_all.hexdigest(),
        train=train,
        heldout=heldout,
        heldout_groups=groups,
        skipped_not_utf8=not_utf8,
        duplicates=duplicates,
    )


def _is_text(data: bytes) -> bool:
    if b"\0" in data:  # binary files of a --corpus directory are often valid UTF-8
        return False
    try:
        data.decode("utf-8")
    except UnicodeDecodeError:
        return False
    return True


def _split(documents: list[Document], total: int) -> tuple[list[Document], list[Document], list[str]]:
    """Hold out by top-level name; where those are too few, by deeper ones, by file, by piece of a file."""
    depth = max(d.name.count("/") for d in documents) + 1
    for level in range(1, depth + 1):
        groups = _hold_out(documents, total, partial(_top, level=level))
        if groups:
            break
    else:
        documents = [piece for d in documents for piece in _pieces(d)]
        groups = _hold_out(documents, total, lambda name: name)
        level = depth
        if not groups:
            raise ConfigError("the corpus cannot be divided: every held-out choice takes more than 8 % of its bytes")

    def is_out(name: str) -> bool:
        return name in groups or _top(name, level) in groups

    train = [d for d in documents if not is_out(d.name)]
    return train, [d for d in documents if is_out(d.name)], sorted(groups)


def _top(name: str, level: int) -> str:
    return "/".join(name.split("/")[:level])


def _hold_out(documents: list[Document], total: int, group_of: Callable[[str], str]) -> set[str]:
    """Groups in the order of their names' hash until HELDOUT_AIM; one that would pass HELDOUT_MAX is skipped.

    Returns the empty set when less than half the aim can be had.
    """
    sizes: dict[str, int] = {}
    for d in documents:
        sizes[group_of(d.name)] = sizes.get(group_of(d.name), 0) + len(d.data)
    chosen: set[str] = set()
    taken = 0
    for name in sorted(sizes, key=lambda n: hashlib.sha256(n.encode()).digest()):
        if taken + sizes[name] <= HELDOUT_MAX * total:
            chosen.add(name)
            taken += sizes[name]
        if taken >= HELDOUT_AIM * total:
            break
    return chosen if taken >= HELDOUT_AIM * total / 2 else set()


def _pieces(document: Document) -> Iterator[Document]:
    """The document cut at line borders into pieces of about PIECE_BYTES (a longer line stays whole)."""
    piece: list[bytes] = []
    size = count = 0
    for line in document.data.splitlines(keepends=True):
        piece.append(line)
        size += len(line)
        if size >= PIECE_BYTES:
            yield Document(f"{document.name}#{count}", b"".join(piece))
            piece, size, count = [], 0, count + 1
    if piece:
        yield Document(f"{document.name}#{count}", b"".join(piece))


def _shortened(names: list[str], limit: int = 12) -> str:
    shown = ", ".join(names[:limit])
    return shown if len(names) <= limit else f"{shown} and {len(names) - limit} more"
