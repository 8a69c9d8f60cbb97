"""`glmx serve MODEL`: an OpenAI-compatible HTTP server for one checkpoint."""

from __future__ import annotations

import argparse
import importlib
import ipaddress
import json
import math
import shlex
from pathlib import Path
from typing import TYPE_CHECKING

from glmx.cli import DEVICES, add_weight_arguments, drafts
from glmx.errors import CheckpointError, ConfigError, UnsupportedError

if TYPE_CHECKING:
    from glmx.serve.llm import LLM

LIBRARIES = ("starlette", "uvicorn", "uvloop", "httptools")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("model", metavar="MODEL", help="a checkpoint directory in Hugging Face layout, or a run's")
    add("--host", default="127.0.0.1", metavar="H", help="address to listen on (default 127.0.0.1: this machine only)")
    add("--port", type=int, default=8000, metavar="P", help="port to listen on; 0 takes a free one (default 8000)")
    add("--api-key", metavar="K", help="clients must send Authorization: Bearer K")
    add(
        "--api-key-file", metavar="FILE", help="the same, with the key in a file, where a process list does not show it"
    )
    add("--served-model-name", metavar="NAME", help="the model's name in requests (default: the directory's name)")
    add(
        "--max-model-len",
        type=int,
        metavar="N",
        help="tokens of prompt and answer together (default: the model's, <= 8192)",
    )
    add("--max-num-seqs", type=int, default=16, metavar="N", help="requests computed at the same time (default 16)")
    add(
        "--max-num-batched-tokens",
        type=int,
        default=8192,
        metavar="N",
        help="tokens computed at a time; longer prompts take several forwards (default 8192)",
    )
    add(
        "--num-speculative-tokens",
        type=drafts,
        default=0,
        metavar="K",
        help="drafts of the MTP layer for each request and step, or auto; answers are the same (default 0)",
    )
    add(
        "--drain-timeout",
        type=float,
        default=30,
        metavar="S",
        help="seconds to finish requests in on SIGTERM (default 30)",
    )
    add_weight_arguments(add)
    add("--device", default="auto", metavar="D", help=DEVICES)
    add("--dtype", default="auto", help="auto, bf16 or fp32 (default auto: the checkpoint's)")


def run(args: argparse.Namespace) -> int:
    # Whatever can be known to be wrong without the weights is found before they are read.
    for library in LIBRARIES:
        try:
            importlib.import_module(library)
        except ImportError:
            raise UnsupportedError(f"{library} is not installed: pip install 'glmx[serve]'") from None
    if not (0 <= args.drain_timeout < math.inf):
        raise ConfigError(f"--drain-timeout {args.drain_timeout}: expected 0 or more seconds")
    for option in ("max_num_seqs", "max_num_batched_tokens"):
        if getattr(args, option) < 1:
            raise ConfigError(f"--{option.replace('_', '-')} {getattr(args, option)}: expected at least 1")
    key = _api_key(args)
    from glmx.models.device import choose, hardware
    from glmx.serve import server

    device = choose(args.device)

    with server.listen(args.host, args.port) as listening:
        from glmx.data.tokenizer import check_chat_template
        from glmx.models.checkpoint import resolve

        directory = resolve(args.model)
        if not (directory / "tokenizer.json").is_file():
            raise CheckpointError(f"no tokenizer.json in '{directory}': the server takes and gives text")
        check_chat_template(directory)
        print(f"loading {directory}", flush=True)
        from glmx import runtime
        from glmx.serve.app import Api
        from glmx.serve.llm import LLM
        from glmx.serve.worker import Worker

        try:
            llm = LLM(
                directory,
                device=device,
                dtype=args.dtype,
                max_model_len=args.max_model_len,
                max_num_seqs=args.max_num_seqs,
                max_num_batched_tokens=args.max_num_batched_tokens,
                num_speculative_tokens=args.num_speculative_tokens,
                mapped=args.mapped,
                lock=args.lock,
                check_finite=args.check_weights,
                dequantize=args.dequantize,
            )
        except RuntimeError as error:  # torch has no type of its own for it on the CPU
            if "allocate memory" not in str(error):  # a cache is there, whatever the model's device
                raise
            asked = f"--max-num-seqs {args.max_num_seqs}"
            raise ConfigError(f"no memory for a cache of {asked} requests: lower it, or --max-model-len") from None
        worker = Worker(llm)
        worker.start()
        name = args.served_model_name or _name(args.model)
        numerics = runtime.numerics_id(_dtype(llm), hardware(device))
        api = Api(llm, worker, model=name, fingerprint=numerics, api_key=key)
        _announce(args, llm, name, numerics, server.url_of(listening), key is not None)
        return server.serve(api, listening, args.drain_timeout)


def _api_key(args: argparse.Namespace) -> str | None:
    if args.api_key is not None and args.api_key_file is not None:
        raise ConfigError("--api-key and --api-key-file: give one of them")
    key, source = args.api_key, "--api-key"
    if args.api_key_file is not None:
        source = f"--api-key-file {args.api_key_file}"
        try:
            key = Path(args.api_key_file).read_text(encoding="utf-8").strip()
        except OSError as error:
            raise ConfigError(f"{source}: {error.strerror}") from None
        except UnicodeDecodeError:
            raise ConfigError(f"{source}: not a text file") from None
    # A header cannot carry anything else.
    if key is not None and not (key and key.isascii() and key.isprintable() and " " not in key):
        raise ConfigError(f"{source}: expected printable ASCII without spaces, at least one character")
    return key


def _name(model: str) -> str:
    """A directory's name; a Hub id as it is."""
    path = Path(model)
    return path.resolve().name if path.is_dir() else model


def _dtype(llm: LLM) -> str:
    return {"torch.bfloat16": "bf16", "torch.float32": "fp32"}[str(llm.model.dtype)]


def _announce(args: argparse.Namespace, llm: LLM, name: str, numerics: str, url: str, has_key: bool) -> None:
    """The start-up print: what runs, on which kernels, and a line to try it with."""
    from glmx import __version__
    from glmx.models.device import words

    config = llm.model.config
    parameters = _count(config.num_parameters())
    rows = {
        "model": f"{name} ({config.model_type}, {config.num_hidden_layers} layers, {parameters} parameters)",
        "weights": _weights(args, llm),
        "dtype": f"{_dtype(llm)}, numerics {numerics}",
        "device": words(llm.model.device),
        "kernels": "; ".join(f"{kernel}: {', '.join(ops)}" for kernel, ops in _kernels(llm).items()),
        "limits": f"{llm.engine.max_model_len} tokens a request, {args.max_num_seqs} requests at a time",
        "drafts": _drafts(llm),
        "API key": "required" if has_key else "none",
    }
    print(f"glmx {__version__}")
    for label, text in rows.items():
        print(f"  {label:<9}{text}")
    if not has_key and not _local(args.host):
        print(f"  warning  --host {args.host} without an API key: whoever reaches this machine can use the model")
    print(f"serving {url}/v1 (Ctrl-C finishes what runs, then stops); try:\n")
    print(f"{_curl(llm, name, url, has_key)}\n", flush=True)


def _weights(args: argparse.Namespace, llm: LLM) -> str:
    size = sum(tensor.nbytes for tensor in llm.model.tensors()) / 2**30
    small = {weight.format for weight in llm.model.stored_weights().values()} - {"bf16"}
    held = ("mapped" if args.mapped else "copied") + (", locked" if args.lock else "")
    return f"{size:.2f} GiB, {''.join(f'{format}, ' for format in sorted(small))}{held}"


def _drafts(llm: LLM) -> str:
    policy = llm.engine.speculation
    if policy is None:
        return "none"
    return f"up to {policy.limit} a step, as many as pay off" if policy.adaptive else f"{policy.limit} a step"


def _kernels(llm: LLM) -> dict[str, list[str]]:
    """Instruction set, or the GPU's name of a kernel -> the ops whose kernel for the model's dtype it is."""
    from glmx import runtime

    out: dict[str, list[str]] = {}
    on_gpu = llm.model.device.type == "cuda"
    for row in runtime.native().kernel_table():
        if row["variant"] in ("", _dtype(llm)):
            name = f"cuda/{row['gpu']}" if on_gpu and row["gpu"] != "none" else row["kernel"]
            out.setdefault(name, []).append(row["op"])
    return out


def _curl(llm: LLM, name: str, url: str, has_key: bool) -> str:
    assert llm.tokenizer is not None
    body: dict[str, object] = {"model": name, "max_tokens": 32}
    if llm.tokenizer.chat_template is not None:
        path, body["messages"] = "chat/completions", [{"role": "user", "content": "Hello"}]
    else:
        path, body["prompt"] = "completions", "Hello"
    words = ["curl", f"{url}/v1/{path}", "-H", "Content-Type: application/json"]
    if has_key:
        words += ["-H", "Authorization: Bearer YOUR_KEY"]
    return shlex.join([*words, "-d", json.dumps(body)])


def _count(number: int) -> str:
    for unit, size in (("B", 10**9), ("M", 10**6), ("k", 10**3)):
        if number >= size:
            return f"{number / size:.3g} {unit}"
    return str(number)


def _local(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
