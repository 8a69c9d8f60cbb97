"""`glmx` commands as processes of their own, started in milliseconds: a server that has imported torch forks each.

    with Warm() as warm:
        child = warm.start(["pretrain", "run.toml"], cwd=folder)
        os.kill(child.pid, signal.SIGKILL)              # or not
        code, out, err = child.wait()                   # as of subprocess: -9 when killed

What a command would do otherwise only because of its imports (the environment variables of glmx.runtime are read in
one) needs a process from scratch. `BEFORE` below is what a job may ask of its child.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import json
import os
import resource
import signal
import subprocess
import sys
import tempfile
import threading
import traceback
from pathlib import Path
from typing import Any

HANGS_S = 300  # far beyond what any of the tests' commands takes
PACKAGES = Path(__file__).resolve().parent.parent / "python"


class Child:
    def __init__(self, warm: Warm, pid: int, files: list[Any]) -> None:
        self.warm, self.pid, self.files = warm, pid, files

    def wait(self) -> tuple[int, str, str]:
        """(exit code, standard output, standard error); the code is negative for a signal."""
        code = self.warm.read()["code"]
        texts = []
        for file in self.files:
            file.seek(0)
            texts.append(file.read().decode("utf-8", "replace"))
            file.close()
        return code, *texts


class Warm:
    """One command at a time. A context manager."""

    def __init__(self) -> None:
        env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([str(PACKAGES), *_inherited()])}
        for name in [name for name in env if name.startswith("GLMX_")]:
            del env[name]
        self.server = subprocess.Popen(
            [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=env, text=True
        )
        self.read()

    def __enter__(self) -> Warm:
        return self

    def __exit__(self, *error: object) -> None:
        assert self.server.stdin
        self.server.stdin.close()
        self.server.wait()

    def start(self, argv: list[str], cwd: Path, **before: Any) -> Child:
        """Runs `glmx *argv` in the directory `cwd`."""
        assert self.server.stdin
        files = [tempfile.NamedTemporaryFile() for _ in range(2)]  # noqa: SIM115 - closed by wait
        job = {"argv": argv, "cwd": str(cwd), "files": [f.name for f in files], "before": before}
        self.server.stdin.write(json.dumps(job) + "\n")
        self.server.stdin.flush()
        return Child(self, self.read()["pid"], files)

    def run(self, argv: list[str], cwd: Path, **before: Any) -> tuple[int, str, str]:
        """A command that ends by itself; one that does not is killed, and its code is -9."""
        child = self.start(argv, cwd, **before)
        timer = threading.Timer(HANGS_S, os.kill, (child.pid, signal.SIGKILL))
        timer.start()
        try:
            return child.wait()
        finally:
            timer.cancel()

    def read(self) -> dict[str, Any]:
        assert self.server.stdout
        line = self.server.stdout.readline()
        assert line, "the server of warm processes has died"
        return json.loads(line)


def _inherited() -> list[str]:
    return [path for path in (os.environ.get("PYTHONPATH"),) if path]


# What a child does before the command, by the keyword that asks for it.
def import_from(folder: str) -> None:
    """A directory whose modules hide those of the same name."""
    sys.path.insert(0, folder)


def largest_file(size: int) -> None:
    """No file may grow beyond `size` bytes: writes fail as on a full disk."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


def standard_output(path: str) -> None:
    os.dup2(os.open(path, os.O_WRONLY), 1)


def call(source: str) -> None:
    """Python that changes the program: to plant what no input can."""
    exec(source, {})


def obey_permissions(_: bool) -> None:
    """Root loses CAP_DAC_OVERRIDE and CAP_DAC_READ_SEARCH, so that permission bits hold for it too."""
    libc = ctypes.CDLL(None, use_errno=True)
    header = (ctypes.c_uint32 * 2)(0x20080522, 0)  # _LINUX_CAPABILITY_VERSION_3, this process
    data = (ctypes.c_uint32 * 6)()  # twice: effective, permitted, inheritable
    if libc.capget(header, data) != 0:
        raise OSError(ctypes.get_errno(), "capget")
    for i in range(3):
        data[i] &= ~0b110
    if libc.capset(header, data) != 0:
        raise OSError(ctypes.get_errno(), "capset")


BEFORE = (import_from, largest_file, standard_output, call, obey_permissions)


# Everything that a command imports, so that a fork starts with it. matplotlib and httptools are not: faults hide them.
PRELOADED = (
    *(f"glmx.cli.{command}" for command in ("demo", "env", "generate", "pretrain", "serve")),
    *("glmx.data.packing", "glmx.models.checkpoint", "glmx.serve.llm", "glmx.train.loop"),
    *("starlette.applications", "uvicorn", "uvloop"),
)


def serve() -> None:
    for module in PRELOADED:
        importlib.import_module(module)
    from glmx.cli.main import main

    def say(**message: Any) -> None:
        os.write(1, (json.dumps(message) + "\n").encode())

    say(ready=True)
    for line in sys.stdin:
        job = json.loads(line)
        pid = os.fork()
        if pid == 0:
            os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
            for number, name in enumerate(job["files"], 1):
                os.dup2(os.open(name, os.O_WRONLY), number)
            os.chdir(job["cwd"])
            for function in BEFORE:
                if function.__name__ in job["before"]:
                    function(job["before"][function.__name__])
            exit_with(main, job["argv"])
        say(pid=pid)
        say(code=os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))


def exit_with(main: Any, argv: list[str]) -> None:
    """Ends the process without Python's own clean-up, which takes a second where torch is loaded."""
    code: Any = 1
    try:
        code = main(argv)
    except SystemExit as end:
        code = end.code
    except BaseException:
        traceback.print_exc()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError):
            stream.flush()
    os._exit(code)


if __name__ == "__main__":
    serve()
