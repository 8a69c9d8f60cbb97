"""`glmx serve`: what is wrong with a command line is one line and exit code 2, before any model is loaded."""

from __future__ import annotations

import argparse
import errno
import socket
import sys
from pathlib import Path

import pytest

from glmx.cli import main as cli
from glmx.cli import serve
from glmx.serve import server


def run(capsys, *argv):
    code = cli.main(["serve", *map(str, argv)])
    captured = capsys.readouterr()
    assert captured.err.count("\n") == 1 and captured.err.startswith("glmx serve: ")
    return code, captured.out, captured.err


@pytest.mark.parametrize(
    "options, words",
    [
        (["--port", "65536"], "--port 65536: expected 0 to 65535"),
        (["--port", "-1"], "--port -1: expected 0 to 65535"),
        (["--host", "no-such-host.invalid"], "--host no-such-host.invalid: no such host"),
        (["--host", "a" * 70], "no such host"),
        (["--host", "192.0.2.1"], "--host 192.0.2.1: not an address of this machine"),
        (["--api-key", ""], "--api-key: expected printable ASCII without spaces, at least one character"),
        (["--api-key", "a b"], "--api-key: expected printable ASCII"),
        (["--api-key", "a", "--api-key-file", "b"], "--api-key and --api-key-file: give one of them"),
        (["--api-key-file", "{}/nowhere"], "nowhere: No such file or directory"),
        (["--api-key-file", "{}/binary"], "binary: not a text file"),
        (["--api-key-file", "{}/empty"], "empty: expected printable ASCII"),
        (["--drain-timeout", "-1"], "--drain-timeout -1.0: expected 0 or more seconds"),
        (["--drain-timeout", "nan"], "--drain-timeout nan: expected 0 or more seconds"),
        (["--max-num-seqs", "0"], "--max-num-seqs 0: expected at least 1"),
        (["--max-num-batched-tokens", "0"], "--max-num-batched-tokens 0: expected at least 1"),
        (["--port", "0"], "no tokenizer.json in"),
    ],
)
def test_a_wrong_option_is_one_line(options, words, tmp_path, capsys):
    (tmp_path / "binary").write_bytes(b"\xff\xfe")
    (tmp_path / "empty").write_text("\n")
    (tmp_path / "model").mkdir()
    code, out, err = run(capsys, tmp_path / "model", *(option.format(tmp_path) for option in options))
    assert code == 2 and words in err and out == ""


def test_a_port_in_use(tmp_path, capsys):
    with server.listen("127.0.0.1", 0) as taken:
        port = taken.getsockname()[1]
        code, _, err = run(capsys, tmp_path, "--port", port)
        assert code == 2 and f"port {port} of 127.0.0.1 is in use: choose another with --port" in err


def test_a_port_is_free_again_at_once():
    """Although the kernel keeps the ends of connections that the server closed for a minute."""
    with server.listen("127.0.0.1", 0) as first, socket.create_connection(first.getsockname()) as client:
        port = first.getsockname()[1]
        first.setblocking(True)
        first.accept()[0].close()
        assert client.recv(1) == b""
    with server.listen("127.0.0.1", port) as again:
        assert server.url_of(again).endswith(f":{port}")


def test_other_reasons_not_to_listen(monkeypatch):
    class Refusing(socket.socket):
        number = errno.EACCES

        def bind(self, address):
            raise OSError(self.number, "why")

    monkeypatch.setattr(server.socket, "socket", Refusing)
    with pytest.raises(OSError, match="--port 80: no permission to listen there; ports from 1024 on need none"):
        server.listen("127.0.0.1", 80)
    Refusing.number = errno.ENOBUFS
    with pytest.raises(OSError, match="cannot listen on 127.0.0.1 port 80: why"):
        server.listen("127.0.0.1", 80)


def test_a_missing_library_is_named(monkeypatch, tmp_path, capsys):
    monkeypatch.setitem(sys.modules, "uvloop", None)
    assert run(capsys, tmp_path)[2] == "glmx serve: uvloop is not installed: pip install 'glmx[serve]'\n"


@pytest.mark.parametrize("host, url", [("0.0.0.0", "127.0.0.1"), ("::", "[::1]"), ("::1", "[::1]")])
def test_the_url_is_one_that_can_be_opened(host, url):
    try:
        listening = server.listen(host, 0)
    except OSError:
        assert ":" in host, "only IPv6 may be missing"
        pytest.skip("no IPv6 on this machine")
    with listening:
        assert server.url_of(listening) == f"http://{url}:{listening.getsockname()[1]}"


def test_the_page_lists_every_option():
    page = (Path(__file__).resolve().parents[2] / "docs/serve.md").read_text()
    parser = argparse.ArgumentParser()
    serve.add_arguments(parser)
    options = [word for action in parser._actions for word in action.option_strings if word not in ("-h", "--help")]
    assert len(options) > 10 and [option for option in options if f"`{option}`" not in page] == []


def test_no_memory_for_the_cache_is_one_line(monkeypatch, tmp_path, capsys):
    from glmx.serve import llm

    def refuse(*args, **kwargs):
        raise RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 6 TB")

    monkeypatch.setattr(llm, "LLM", refuse)
    (tmp_path / "tokenizer.json").touch()
    code, _, err = run(capsys, tmp_path, "--port", "0", "--max-num-seqs", "1000000")
    assert code == 2 and "no memory" in err and "--max-num-seqs 1000000" in err


def test_names_and_numbers_of_the_start_up_print(tmp_path):
    (tmp_path / "GLM-4.5-Air").mkdir()
    assert serve._name(str(tmp_path / "GLM-4.5-Air")) == "GLM-4.5-Air"
    assert serve._name("zai-org/GLM-4.5-Air") == "zai-org/GLM-4.5-Air"
    assert [serve._count(n) for n in (12, 114_000, 3_400_000, 355 * 10**9)] == ["12", "114 k", "3.4 M", "355 B"]
    assert [serve._local(host) for host in ("127.0.0.1", "localhost", "::1", "0.0.0.0", "::", "10.0.0.1")] == (
        [True] * 3 + [False] * 3
    )
