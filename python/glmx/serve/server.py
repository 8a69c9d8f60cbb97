"""The server process: the listening socket, uvicorn, and what signals do.

SIGTERM or SIGINT (Ctrl-C) drains: new requests get 503 while those in flight are finished, then the process exits
with 0, or with 1 if the time ran out for some. A second signal stops at once.
"""

from __future__ import annotations

import asyncio
import errno
import os
import signal
import socket
import sys
import threading
from types import FrameType
from typing import TYPE_CHECKING, Any

import uvicorn

if TYPE_CHECKING:  # no more than that: `listen` should not wait for torch to be imported
    from glmx.serve.app import Api

# How long the last bytes of answers may take to reach clients that read slowly, once the engine is done.
FLUSH_S = 5
BACKLOG = 2048


def listen(host: str, port: int) -> socket.socket:
    """A listening socket on `host`:`port` (0: a free one).

    It is opened before the model is loaded: what is wrong with it shows at once, and clients that connect early
    wait instead of being refused. Raises OSError with one line that names the option.
    """
    if not 0 <= port <= 65535:
        raise ValueError(f"--port {port}: expected 0 to 65535 (0 takes a free one)")
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except (socket.gaierror, UnicodeError):
        raise OSError(f"--host {host}: no such host") from None
    family, _, _, _, address = found[0]
    listening = socket.socket(family, socket.SOCK_STREAM)
    try:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind(address)
        listening.listen(BACKLOG)
    except OSError as error:
        listening.close()
        raise OSError(_why_not(error, host, port)) from None
    listening.setblocking(False)
    return listening


def _why_not(error: OSError, host: str, port: int) -> str:
    if error.errno == errno.EADDRINUSE:
        return f"port {port} of {host} is in use: choose another with --port, or stop the program that has it"
    if error.errno == errno.EACCES:
        return f"--port {port}: no permission to listen there; ports from 1024 on need none"
    if error.errno == errno.EADDRNOTAVAIL:
        return f"--host {host}: not an address of this machine"
    return f"cannot listen on {host} port {port}: {error.strerror}"


def url_of(listening: socket.socket) -> str:
    """Where a client on this machine reaches the socket."""
    host, port = listening.getsockname()[:2]
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def serve(api: Api, listening: socket.socket, drain_timeout: float) -> int:
    """Serves until a signal ends it; returns the exit code. Call it on the main thread."""
    config = uvicorn.Config(
        api.app,
        loop="uvloop",
        http="httptools",
        ws="none",
        lifespan="off",
        log_config=_LOGGING,
        server_header=False,
        # Longer than a client's pause between questions, so that it finds its connection open.
        timeout_keep_alive=75,
        timeout_graceful_shutdown=FLUSH_S,
    )
    server = _Server(config, api, drain_timeout)
    server.run(sockets=[listening])
    return server.exit_code


class _Server(uvicorn.Server):
    """uvicorn's server, which on a signal first lets the worker finish."""

    def __init__(self, config: uvicorn.Config, api: Api, drain_timeout: float) -> None:
        super().__init__(config)
        self.api, self.drain_timeout = api, drain_timeout
        self.exit_code = 0

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        self.loop = asyncio.get_running_loop()
        await super().startup(sockets)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """A signal handler: on the main thread, between any two of its instructions."""
        name = signal.Signals(sig).name
        if self.api.draining:
            _say(f"{name}: stopping at once")
            os._exit(128 + sig)
        self.api.draining = True
        threading.Thread(target=self._drain, args=(name,), daemon=True).start()

    def _drain(self, name: str) -> None:
        worker = self.api.worker
        left = worker.running + worker.waiting
        if left:
            what = "1 request" if left == 1 else f"{left} requests"
            _say(f"{name}: finishing {what}, at most {self.drain_timeout:g} s")
        if not worker.drain(self.drain_timeout):
            self.exit_code = 1
            _say(f"requests were cut off after {self.drain_timeout:g} s")
        self.loop.call_soon_threadsafe(setattr, self, "should_exit", True)


def _say(text: str) -> None:
    print(f"glmx serve: {text}", file=sys.stderr, flush=True)


_LOGGING: dict[str, Any] = {
    "version": 1,
    "disable_existing_loggers": False,
    "formatters": {
        "plain": {"format": "%(asctime)s %(levelname)s %(message)s"},
        "access": {
            "()": "uvicorn.logging.AccessFormatter",
            "fmt": "%(asctime)s %(client_addr)s %(request_line)s %(status_code)s",
            "use_colors": False,
        },
    },
    "handlers": {
        "plain": {"class": "logging.StreamHandler", "formatter": "plain"},
        "access": {"class": "logging.StreamHandler", "formatter": "access"},
    },
    "loggers": {
        "uvicorn": {"handlers": ["plain"], "level": "WARNING", "propagate": False},
        "uvicorn.access": {"handlers": ["access"], "level": "INFO", "propagate": False},
        "glmx": {"handlers": ["plain"], "level": "WARNING", "propagate": False},
    },
}
