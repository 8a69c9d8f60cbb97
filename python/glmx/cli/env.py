"""`glmx env`: what this machine and this build are, and which kernel runs each op."""

from __future__ import annotations

import argparse
import json
from typing import Any


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of tables")


def run(args: argparse.Namespace) -> int:
    from glmx import runtime

    facts = runtime.describe()
    if args.json:
        print(json.dumps(facts, indent=2))
    else:
        _print(facts)
    return 0


def _print(facts: dict[str, Any]) -> None:
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console(highlight=False)
    build, isa = facts["glmx"], facts["isa"]
    gpu = ", ".join(f"{name} {build[name]}" for name in ("cuda", "hip") if build[name]) or "no GPU backend"
    lines = {
        "glmx": f"{build['version']} ({build['compiler']}, {build['build_type']}, {gpu})",
        "python": facts["python"],
        "torch": facts["torch"],
        "backend": facts["backend"],
        "isa": f"{isa['active']} (this machine runs {', '.join(isa['supported'])})",
        "numerics_id": f"{facts['numerics_id']} (then -{' or -'.join(facts['dtypes'])}, the dtype of the model)",
    }
    for device in facts["devices"]:
        if device["device"] == "cpu":
            lines["cpu"] = f"{device['name']}, {device['cores']} cores, {device['threads']} threads in use"
        else:
            lines[device["device"]] = f"{device['name']}, architecture {device['architecture']}"
    for name, value in facts["environment"].items():
        lines[name] = "(not set)" if value is None else value
    width = max(map(len, lines)) + 2
    for name, value in lines.items():
        console.print(Text(f"{name:<{width}}{value}"), soft_wrap=True)

    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    for column in ("op", "variant", "kernel", "on a GPU", "revision"):
        table.add_column(column, justify="right" if column == "revision" else "left")
    for row in facts["kernels"]:
        gpu = "cpu (copies)" if row["gpu"] == "none" else row["gpu"]
        table.add_row(row["op"], row["variant"], row["kernel"], gpu, str(row["revision"]))
    console.print(table)
