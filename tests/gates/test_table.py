"""docs/gpu.md's table is current: always its kernels, mutations and hardware; its numbers where both compilers are."""

from __future__ import annotations

import re

import pytest

from tests.gates import table
from tests.gates.kernels import (
    GPU,
    cuda_missing,
    cuda_objects,
    declared,
    declared_by_headers,
    hip_missing,
    kernel_files,
)

STALE = "docs/gpu.md is stale: make dev, then python -m tests.gates.table --write"


def rows() -> dict[tuple[str, str], list[str]]:
    found = {}
    for line in table.written().splitlines():
        match = re.match(r"\| `([\w/]+\.cu)` `(\w+)` \| (.*) \|$", line)
        if match:
            found[match[1], match[2]] = match[3].split(" | ")
    return found


@pytest.mark.parametrize("source", kernel_files())
def test_names_every_kernel(source):
    named = {name for file, name in rows() if file == source}
    assert set(declared(source)) <= named <= {*declared(source), *declared_by_headers(source)}, STALE


def test_names_no_other_kernel():
    assert {file for file, _ in rows()} == set(kernel_files()), STALE


def test_mutations_and_hardware():
    for (source, _), cells in rows().items():
        assert cells[-2:] == [table.mutations_of(source), table.hardware(source)], STALE


def test_every_mutation_is_caught():
    """A change that breaks a kernel and that no order of threads shows is a hole in the tests."""
    rows = table.mutants()
    assert rows, f"no {table.MUTANTS}: python tests/simt_mutants.py --json docs/gpu_mutants.json"
    for row in rows:
        assert (GPU / row.file).is_file(), f"docs/gpu_mutants.json is stale: {row.file}"
        assert (row.caught and row.caught <= set(table.ORDERS)) or row.equivalent, row


def test_every_mechanism_is_broken_once():
    """A file that orders its threads has mutants of that."""
    calls = r"gx::(barrier|team_barrier|wait|commit|mbarrier_wait|mbarrier_arrive|wgmma_wait)\b"
    broken = {row.file for row in table.mutants() if row.kind != "index off by one"}
    for source in kernel_files():
        if re.search(calls, (GPU / source).read_text()):
            assert source in broken, f"docs/gpu_mutants.json has no mutant of {source}"


def test_headers_say_the_same_of_hardware():
    """A kernel file that claims no measurement, and a table that names none, or neither."""
    for source in kernel_files():
        measured = table.UNMEASURED not in (table.ROOT / "csrc/gpu" / source).read_text()
        assert not measured or table.runs(), f"{source} claims a measurement; docs/ has no results of a card"


def test_numbers():
    missing = cuda_missing() + hip_missing()
    if missing or not cuda_objects():
        pytest.skip(f"missing: {', '.join(missing) or 'a build with the CUDA backend'}")
    if table.compilers() not in table.written():
        pytest.skip(f"docs/gpu.md was written with other compilers; here: {table.compilers()}")
    assert table.written() == table.block(), STALE
