"""The CUDA backend as built: every card has every kernel, it fits its registers, and is the code that was meant."""

from __future__ import annotations

import re

import pytest

from tests.build.tree import PACKAGE, ROOT, output
from tests.gates.expect import EXPECTED, FORBIDDEN
from tests.gates.kernels import (
    CUDA_CARDS,
    cuda_kernels,
    cuda_missing,
    cuda_objects,
    cuobjdump,
    declared,
    declared_by_headers,
    kernel_files,
    needs,
    portable,
)

needs(cuda_missing())

REGISTERS = 65536  # of a multiprocessor, on every card since sm_60
FILES = kernel_files()


def cards(source: str) -> tuple[str, ...]:
    return CUDA_CARDS if portable(source) else ("sm_90a",)


@pytest.fixture(scope="module")
def kernels():
    if not cuda_objects():
        pytest.fail("nvcc is here, and no build in build/ has an object of a kernel: run `make dev`", pytrace=False)
    return cuda_kernels()


def of_file(kernels, source):
    found = [kernel for kernel in kernels if kernel.source == source]
    assert found, f"{source}: no object, or no kernel in it"
    return found


@pytest.mark.parametrize("source", FILES)
def test_compiled_for_every_card(kernels, source):
    for card in cards(source):
        there = {kernel.function for kernel in of_file(kernels, source) if kernel.card == card}
        assert set(declared(source)) <= there, f"{source} on {card}"
        assert there <= {*declared(source), *declared_by_headers(source)}, f"{source} on {card}"


@pytest.mark.parametrize("source", FILES)
def test_fits_its_registers(kernels, source):
    """A kernel says how many threads its block has at most, and that many of them can start."""
    for kernel in of_file(kernels, source):
        assert kernel.threads, f"{source}: {kernel.name} has no __launch_bounds__"
        granted = -(-kernel.registers // 8) * 8
        assert granted * kernel.threads <= REGISTERS, f"{source}: {kernel.name} on {kernel.card}: {kernel.registers}"


@pytest.mark.parametrize("source", FILES)
def test_nothing_lives_in_local_memory(kernels, source):
    """Neither spilled registers nor arrays with running indices."""
    for kernel in of_file(kernels, source):
        what = f"{source}: {kernel.name} on {kernel.card}: {kernel.local} bytes a thread, {kernel.spills} LDL and STL"
        assert kernel.local == 0 and kernel.spills == 0, what


@pytest.mark.parametrize("source", FILES)
def test_no_forbidden_instruction(kernels, source):
    for kernel in of_file(kernels, source):
        for pattern, why in FORBIDDEN.items():
            found = [opcode for opcode in kernel.opcodes if re.match(pattern, opcode)]
            assert not found, f"{source}: {kernel.name} on {kernel.card} has {found[0]}: {why}"


@pytest.mark.parametrize("source", EXPECTED)
def test_expected_instructions(kernels, source):
    for function, wanted in EXPECTED[source].items():
        for card in cards(source):
            found = [
                kernel
                for kernel in kernels
                if (kernel.source, kernel.function, kernel.card) == (source, function, card)
            ]
            assert found, f"{source}: no {function} on {card}"
            for kernel in found:
                for opcode in wanted:
                    has = any(mine.startswith(opcode) for mine in kernel.opcodes)
                    assert has, f"{source}: {kernel.name} on {card} has no {opcode}"


def test_matrix_units_are_expected():
    """The table of expect.py is complete: who calls for a matrix product is in it."""
    for source in FILES:
        code = (ROOT / "csrc/gpu" / source).read_text()
        assert source in EXPECTED or not re.search(r"gx::(mma|wgmma)\b", code), f"{source} is missing in EXPECTED"


def test_core_holds_the_kernels():
    """The library that users get: cubins for every card, every kernel's entry, and no CUDA library asked for."""
    core = PACKAGE / "libglmx_core.so"
    cubins = re.findall(r"\.(sm_\w+)\.cubin", cuobjdump("-lelf", core))
    for card in CUDA_CARDS:
        wanted = sum(card in cards(source) for source in FILES)
        assert cubins.count(card) >= wanted, (
            f"{core.name} holds {cubins.count(card)} cubins for {card}: {wanted} files have kernels"
        )
    entries = re.findall(r"^  X\((\w+), \w+\)", (ROOT / "csrc/gpu/kernels.h").read_text(), re.MULTILINE)
    assert len(entries) >= 20
    defined = set(re.findall(r" [TtW] glmx::gpu::(\w+)\(", output("nm", "-C", "--defined-only", core)))
    assert set(entries) <= defined, f"{core.name} has no kernel for {sorted(set(entries) - defined)}"
    needed = re.findall(r"NEEDED.*\[(.*)\]", output("readelf", "-d", core))
    assert not [name for name in needed if re.match(r"lib(cuda|cudart|torch|c10|nv)", name)], needed
    undefined = output("nm", "-D", "--undefined-only", core)
    assert not re.search(r" (cuda|cu|__cuda)[A-Z]\w*", undefined), "cudart is not inside"
