"""The table of docs/gpu.md: what is known of each GPU kernel, and on which hardware it ran.

    python -m tests.gates.table            prints it
    python -m tests.gates.table --write    puts it into docs/gpu.md; after a change of a kernel: make dev, then this

Registers, shared memory and spills are read from the product's own build and from the HIP build of the gates;
mutations come from docs/gpu_mutants.json, runs on cards from docs/gpu_results*.jsonl (the rows of bench/gpu_check.sh).
"""

from __future__ import annotations

import argparse
import json
import pathlib
import re
import sys
from collections.abc import Iterable
from dataclasses import dataclass

from tests.build.tree import ROOT, output
from tests.gates.expect import EXPECTED
from tests.gates.kernels import (
    CUDA_CARDS,
    HIP_CARDS,
    Kernel,
    build_hip,
    cuda_kernels,
    cuda_missing,
    declared,
    declared_by_headers,
    hip_kernels,
    hip_missing,
    kernel_files,
)

DOC = ROOT / "docs" / "gpu.md"
BEGIN, END = "<!-- kernels: written by python -m tests.gates.table --write -->", "<!-- end of kernels -->"
MUTANTS = ROOT / "docs" / "gpu_mutants.json"
ORDERS = ("forward", "reverse", "random")
UNMEASURED = "not measured on hardware"
HOPPER = re.compile(r"\b(G?H[128]00|H20)\b")


@dataclass(frozen=True)
class Mutation:
    """One of tests/simt_mutants.py's: a kernel broken on purpose, and what noticed."""

    file: str  # below csrc/gpu
    kind: str  # "barrier removed"
    text: str  # the line that was changed
    caught: frozenset[str]  # of ORDERS
    equivalent: str  # why nothing could notice


def mutants() -> list[Mutation]:
    if not MUTANTS.exists():
        return []
    found = []
    for row in json.loads(MUTANTS.read_text()):
        caught = frozenset(order.split(":")[0] for order, how in row["caught"].items() if how)  # "random:1" is a seed
        found.append(Mutation(row["file"].removeprefix("gpu/"), row["kind"], row["text"], caught, row["equivalent"]))
    return found


def by_order(rows: list[Mutation]) -> list[int]:
    return [sum(order in row.caught for row in rows) for order in ORDERS]


def mutations_of(source: str) -> str:
    """`4 of 4: forward 1, reverse 4, random 3`: how many of those that matter each order of threads catches."""
    rows = [row for row in mutants() if row.file == source and not row.equivalent]
    if not rows:
        return "-"
    caught = sum(bool(row.caught) for row in rows)
    orders = ", ".join(f"{order} {count}" for order, count in zip(ORDERS, by_order(rows), strict=True))
    return f"{caught} of {len(rows)}: {orders}"


def mutation_table() -> list[str]:
    """Files, their headers too, and kinds of change; behind it what is no change, and why."""
    groups: dict[tuple[str, str], list[Mutation]] = {}
    for row in mutants():
        if not row.equivalent:
            groups.setdefault((row.file, row.kind), []).append(row)
    if not groups:
        return []
    lines = ["", f"| file | change | mutants | {' | '.join(ORDERS)} |", "|---|---|---|---|---|---|"]
    for (file, kind), rows in groups.items():
        counts = " | ".join(str(count) for count in by_order(rows))
        lines.append(f"| `{file}` | {kind} | {len(rows)} | {counts} |")
    same = [row for row in mutants() if row.equivalent]
    if same:
        lines += ["", "Changes that nothing can notice:", ""]
        lines += [f"- `{row.file}`, {row.kind}, `{row.text}`: {row.equivalent}" for row in same]
    return lines


def runs() -> list[dict]:
    """One per run of bench/gpu_check.sh, the newest of each card last: its card, commit and how tests/gpu went."""
    found: dict[str, dict] = {}
    for path in sorted((ROOT / "docs").glob("gpu_results*.jsonl")):
        run: dict = {}
        for line in path.read_text().splitlines():
            row = json.loads(line)
            if row.get("name") == "machine":
                run = {"card": row["card"], "commit": row["commit"][:12], "passed": 0, "failed": 0}
            elif row.get("name") == "tests" and run:
                run |= {"passed": row["passed"], "failed": row["failed"]}
                found.pop(run["card"], None)
                found[run["card"]] = run
    return list(found.values())


def hardware(source: str) -> str:
    told = []
    for run in runs():
        if not run["passed"] or (source.startswith("sm90/") and not HOPPER.search(run["card"])):
            continue
        failed = f", {run['failed']} tests failed" if run["failed"] else ""
        told.append(f"ran on {run['card']} at {run['commit']}{failed}")
    return "; ".join(told) or UNMEASURED


def cell(instances: Iterable[Kernel]) -> str:
    """`registers / bytes of shared memory / spills`: the most among the instances of a template."""
    instances = list(instances)
    if not instances:
        return "-"
    parts = (max(kernel.registers for kernel in instances), max(kernel.shared for kernel in instances))
    return f"{parts[0]} / {parts[1]} / {sum(kernel.spills for kernel in instances)}"


def names_of(source: str, kernels: list[Kernel]) -> list[str]:
    """In the order of the source; those of headers, as far as the file launches them, behind."""
    compiled = {kernel.function for kernel in kernels if kernel.source == source}
    extra = [name for name in dict.fromkeys(declared_by_headers(source)) if name in compiled]
    return [*declared(source), *extra]


def table(kernels: list[Kernel]) -> str:
    cards = (*CUDA_CARDS, *HIP_CARDS)
    head = ["kernel", *cards, "SASS", "mutations caught", "hardware"]
    lines = [f"| {' | '.join(head)} |", f"|{'---|' * len(head)}"]
    for source in kernel_files():
        for name in names_of(source, kernels):
            mine = [kernel for kernel in kernels if kernel.source == source and kernel.function == name]
            numbers = []
            for card in cards:
                foreign = source.startswith("sm90/") and card != "sm_90a"
                numbers.append("none" if foreign else cell(kernel for kernel in mine if kernel.card == card))
            sass = " ".join(EXPECTED.get(source, {}).get(name, ())) or "-"
            row = [f"`{source}` `{name}`", *numbers, sass, mutations_of(source), hardware(source)]
            lines.append(f"| {' | '.join(row)} |")
    lines += mutation_table()
    return "\n".join(lines)


def compilers() -> str:
    nvcc = re.search(r"release ([\d.]+)", output("nvcc", "--version"))
    clang = re.search(r"version ([\d.]+)", output("clang++-19", "--version"))
    return f"Compiled by nvcc {nvcc[1] if nvcc else '?'} and clang {clang[1] if clang else '?'}."


def block() -> str:
    """What stands between the two marks in docs/gpu.md."""
    missing = cuda_missing() + hip_missing()
    if missing:
        sys.exit(f"the table needs both toolchains; missing: {', '.join(missing)}")
    said = build_hip()
    if said:
        sys.exit(said)
    return f"{BEGIN}\n\n{compilers()}\n\n{table(cuda_kernels() + hip_kernels())}\n\n{END}"


def written() -> str:
    found = re.search(f"{re.escape(BEGIN)}.*{re.escape(END)}", DOC.read_text(), re.DOTALL)
    if found is None:
        sys.exit(f"{DOC} lacks the marks {BEGIN} and {END}")
    return found[0]


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.gates.table", description="the table of docs/gpu.md")
    parser.add_argument("--write", action="store_true", help="into docs/gpu.md")
    new = block()
    if parser.parse_args().write:
        DOC.write_text(DOC.read_text().replace(written(), new))
        print(f"written: {pathlib.Path(DOC).relative_to(ROOT)}")
    else:
        print(new)


if __name__ == "__main__":
    main()
