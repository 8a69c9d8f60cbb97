"""The table of faults: each a mistake or a mishap, planted in a fresh directory, and the command that meets it.

    python tests/faults.py          runs every one, and writes docs/errors.md from what the commands said

The rows are in tests/fault_rows.py. tests/test_faults.py runs them again: one line on standard error that names the
thing and is the table's, exit code 2, and no file made or changed but those that the fault names. A new fault is a row
and a run of this script.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "errors.md"
sys.path[:0] = [str(ROOT / "python"), str(ROOT / "tests")]

from fault_world import make_world  # noqa: E402
from warm import PACKAGES, Warm  # noqa: E402

SECTIONS = {
    "Any command": "",
    "glmx env": "",
    "glmx generate": "`run` is the directory of a run.",
    "glmx pretrain": "`run.toml` describes a run that was stopped half-way in `run`; `fresh` does not exist yet.",
    "glmx serve": "`run` is the directory of a run.",
    "glmx demo": "",
    "glmx quantize": "`run` is the directory of a run.",
    "glmx make-random": "",
}
DISK_FULL = 40_000  # bytes that fit: the log and a config do, weights and shards do not


@dataclass(frozen=True)
class Fault:
    """`plant(world)` makes the fault and returns what the child needs before it starts (see warm.py).

    names    what the message must contain
    leaves   files that the command may make or change: patterns of Path.match
    shell    what the table shows, where `glmx *argv` is not what a user would type
    trains   progress comes before the message, which is the last line
    library  the message ends, behind its last colon, in words of a library, which change with its version
    """

    section: str
    what: str
    argv: list[str]
    names: tuple[str, ...]
    plant: Callable[[Path], dict[str, Any] | None] = lambda world: None
    environment: dict[str, str] = field(default_factory=dict)
    leaves: tuple[str, ...] = ()
    shell: str = ""
    trains: bool = False
    library: bool = False
    full_disk: str = ""  # directory of the world that lies on a full disk
    held: str = ""  # directory that another process is training in
    # A word PORT in argv is a port that somebody listens on.

    @property
    def id(self) -> str:
        return re.sub(r"[^a-z0-9]+", "-", f"{self.section} {self.what}".lower()).strip("-")

    @property
    def command(self) -> str:
        return self.shell or " ".join([*(f"{k}={v}" for k, v in self.environment.items()), "glmx", *self.argv])


@dataclass(frozen=True)
class Seen:
    """What a command did. `changed`: files made, changed or removed that the fault does not name."""

    code: int
    out: str
    err: str
    changed: list[str]


def inject(fault: Fault, world: Path, place: Path, warm: Warm) -> Seen:
    """Plants the fault in a copy of `world` at `place` and runs its command there."""
    shutil.copytree(world, place)
    with contextlib.ExitStack() as stack:
        before = dict(fault.plant(place) or {})
        if fault.full_disk:
            before |= stack.enter_context(full_disk(place / fault.full_disk))
        if fault.held:
            stack.enter_context(held(place / fault.held))
        argv, port = fault.argv, ""
        if "PORT" in argv:
            port = stack.enter_context(port_in_use())
            argv = [port if word == "PORT" else word for word in argv]
        earlier = snapshot(place)
        if fault.environment:
            code, out, err = from_scratch(fault, place)
        else:
            code, out, err = warm.run(argv, place, **before)
        later = snapshot(place)
    changed = sorted(name for name in earlier.keys() | later.keys() if earlier.get(name) != later.get(name))
    changed = [name for name in changed if not any(Path(name).match(pattern) for pattern in fault.leaves)]
    err = plain(err, place)
    err = re.sub(rf"\b{port}\b", "PORT", err) if port else err
    return Seen(code, out, err.splitlines()[-1] if fault.trains and err else err, changed)


def from_scratch(fault: Fault, place: Path) -> tuple[int, str, str]:
    env = {**os.environ, "PYTHONPATH": str(PACKAGES), **fault.environment}
    command = [sys.executable, "-m", "glmx.cli.main", *fault.argv]
    done = subprocess.run(command, cwd=place, env=env, capture_output=True, text=True)
    return done.returncode, done.stdout, done.stderr


@contextlib.contextmanager
def full_disk(folder: Path) -> Iterator[dict[str, Any]]:
    """`folder` on a file system with DISK_FULL bytes left; without the right to mount one, a limit of file sizes."""
    folder.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as aside:
        shutil.copytree(folder, aside, dirs_exist_ok=True)
        used = sum(-(-file.stat().st_size // 4096) * 4096 for file in folder.rglob("*"))
        options = f"size={used + DISK_FULL + 20 * 4096}"  # its directories take pages too
        mount = ["mount", "-t", "tmpfs", "-o", options, "glmx-test", str(folder)]
        if subprocess.run(mount, capture_output=True).returncode != 0:
            yield {"largest_file": DISK_FULL}
            return
        try:
            shutil.copytree(aside, folder, dirs_exist_ok=True)
            yield {}
        finally:
            subprocess.run(["umount", str(folder)], check=True)


@contextlib.contextmanager
def held(folder: Path) -> Iterator[None]:
    folder.mkdir(exist_ok=True)
    handle = os.open(folder, os.O_RDONLY)
    fcntl.flock(handle, fcntl.LOCK_EX)
    yield
    os.close(handle)


@contextlib.contextmanager
def port_in_use() -> Iterator[str]:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        yield str(taken.getsockname()[1])


def snapshot(place: Path) -> dict[str, str]:
    """Every file and directory with a hash of its content."""
    return {
        path.relative_to(place).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else "dir"
        for path in place.rglob("*")
    }


def plain(text: str, place: Path) -> str:
    """Without what differs from one machine or moment to another."""
    text = text.replace(str(place), "...").replace("File too large", "No space left on device")
    return re.sub(r"\b[0-9a-f]{64}\b", "HASH", text).strip()


# -- the page


def row(fault: Fault, seen: Seen) -> str:
    cells = [fault.what, code(fault.command), code(seen.err), str(seen.code)]
    return "| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in cells) + " |"


def code(text: str) -> str:
    return f"`` {text} ``" if "`" in text else f"`{text}`"


def rows_of(page: str) -> dict[str, list[str]]:
    """Fault's id -> [what, command, message, exit code], of the page's tables."""
    found, section = {}, ""
    for line in page.splitlines():
        if line.startswith("## "):
            section = line[3:]
        elif line.startswith("| ") and not line.startswith(("| what", "|---")):
            cells = [cell.strip().replace("\\|", "|") for cell in re.split(r"(?<!\\)\|", line)[1:-1]]
            found[Fault(section, cells[0], [], ()).id] = [
                cells[0],
                *(re.sub(r"^`` | ``$|^`|`$", "", cell) for cell in cells[1:]),
            ]
    return found


HEAD = """# What glmx says when something is wrong

A user's mistake, a damaged file or a full disk gets one line on standard error that names the thing, exit code 2, and
leaves nothing half-written. `glmx --traceback COMMAND` shows where it was raised. The tables are written by
`python tests/faults.py`, which plants each fault and runs the command; the tests run all of them again. `HASH` stands
for 64 hexadecimal digits. A checkpoint is written under another name and renamed when it is whole, so what a failed
run leaves can always be resumed.
"""


def main() -> None:
    from fault_rows import faults

    table: dict[str, list[str]] = {section: [] for section in SECTIONS}
    wrong = []
    with tempfile.TemporaryDirectory() as folder, Warm() as warm:
        world = make_world(Path(folder) / "world", warm)
        for number, fault in enumerate(faults()):
            place = Path(folder) / str(number)
            seen = inject(fault, world, place, warm)
            table[fault.section].append(row(fault, seen))
            missing = [name for name in fault.names if name not in seen.err]
            if seen.code != 2 or "\n" in seen.err or seen.changed or missing:
                wrong.append(f"{fault.id}: missing {missing}: {seen}")
            shutil.rmtree(place)
    lines = [HEAD]
    for section, words in SECTIONS.items():
        lines += [f"## {section}\n", *([words + "\n"] if words else [])]
        lines += ["| what is wrong | command | message | exit code |", "|---|---|---|---|", *table[section], ""]
    PAGE.write_text("\n".join(lines))
    print(f"{sum(map(len, table.values()))} faults -> {PAGE.relative_to(ROOT)}")
    sys.exit("\n".join(wrong) or None)


if __name__ == "__main__":
    main()
