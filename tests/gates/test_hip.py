"""The kernels compiled for AMD's cards, with GLMX_HIP=ON as a user of ROCm would. None has run on one."""

from __future__ import annotations

import re

import pytest

from tests.build.tree import ROOT, output
from tests.gates.kernels import (
    HIP_BUILD,
    HIP_CARDS,
    assembly,
    build_hip,
    declared,
    declared_by_headers,
    hip_kernels,
    hip_missing,
    hip_objects,
    kernel_files,
    needs,
    portable,
)

needs(hip_missing())

FILES = [source for source in kernel_files() if portable(source)]
LDS = 65536  # bytes of shared memory that a block can have


@pytest.fixture(scope="module")
def kernels():
    said = build_hip()
    if said:
        pytest.fail(said, pytrace=False)
    return hip_kernels()


@pytest.mark.parametrize("source", FILES)
def test_compiles_for_every_card(kernels, source):
    for card in HIP_CARDS:
        there = {kernel.function for kernel in kernels if (kernel.source, kernel.card) == (source, card)}
        assert set(declared(source)) <= there, f"{source} on {card}"
        assert there <= {*declared(source), *declared_by_headers(source)}, f"{source} on {card}"


@pytest.mark.parametrize("source", FILES)
def test_nothing_spills(kernels, source):
    for kernel in (kernel for kernel in kernels if kernel.source == source):
        what = f"{source}: {kernel.name} on {kernel.card}"
        assert kernel.spills == 0, f"{what} spills {kernel.spills} of {kernel.registers} registers"
        assert kernel.local == 0, f"{what} keeps {kernel.local} bytes a thread in memory"
        assert kernel.shared <= LDS and kernel.threads <= 1024, what


def test_waves_are_64_wide(kernels):
    """gx/hip.h takes a team for half a wave."""
    for source in FILES:
        for card in HIP_CARDS:
            widths = re.findall(r"\.wavefront_size: +(\d+)", assembly(source, card).read_text())
            assert set(widths) == {"64"}, f"{source} on {card}"


def test_numerics_of_the_compiler(kernels):
    """fp32 denormals are flushed, fp64's are kept, and an exact quotient is divided in full: v_div_fixup ends one."""
    text = "".join(assembly(source, card).read_text() for source in FILES for card in HIP_CARDS)
    assert set(re.findall(r"amdhsa_float_denorm_mode_32 (\d)", text)) == {"0"}
    assert set(re.findall(r"amdhsa_float_denorm_mode_16_64 (\d)", text)) == {"3"}
    assert "v_div_fixup_f32" in text


def test_links_against_the_runtime(kernels, tmp_path):
    """The host side too: nothing is undefined but what libamdhip64 has."""
    core = tmp_path / "backends.o"
    flags = ("-std=c++20", "-fPIC", f"-I{ROOT}/csrc", f"-I{ROOT}/csrc/include")
    output("g++", *flags, "-c", ROOT / "csrc/gpu/backends.cpp", "-o", core)
    objects = [*hip_objects().values(), HIP_BUILD / "hip/table.cu.o", HIP_BUILD / "hip/gx/hip.cu.o"]
    output("g++", "-shared", "-Wl,--no-undefined", *objects, core, "-o", tmp_path / "hip.so", "-lamdhip64")
