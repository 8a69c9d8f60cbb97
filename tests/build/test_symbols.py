"""What the built files export and import, read with nm: no wide-vector code behind a weak name, no C++ of torch."""

from __future__ import annotations

import pathlib
import re
import shutil

import pytest
from tests.build.tree import PACKAGE, isa_objects, output, unavailable

ALLOWLIST = pathlib.Path(__file__).with_name("torch_symbols.txt")


@pytest.fixture(scope="module", autouse=True)
def nm():
    if not shutil.which("nm"):
        unavailable("nm is missing: apt-get install binutils")


def library(name: str) -> pathlib.Path:
    path = PACKAGE / name
    if not path.exists():
        unavailable(f"{name} is not built in place: run `make dev`")
    return path


def test_isa_objects_define_no_weak_symbol():
    """The linker keeps one copy of a weak symbol. If it keeps the one compiled for AVX-512, older CPUs crash."""
    for path in isa_objects():
        for line in output("nm", "-C", "--defined-only", path).splitlines():
            kind, name = line[17:].split(" ", 1)
            assert kind not in "WVu", f"{path.parent.name}/{path.name} defines the weak symbol {name}"


def test_isa_objects_export_their_own_namespace_alone():
    for path in isa_objects():
        isa = path.parent.name
        for line in output("nm", "-C", "--defined-only", "--extern-only", path).splitlines():
            name = line[17:].split(" ", 1)[1]
            assert name.startswith(f"glmx::cpu::{isa}::"), f"{isa}/{path.name} exports {name}"


def undefined(path: pathlib.Path) -> list[str]:
    return [line.split()[-1] for line in output("nm", "-D", "--undefined-only", path).splitlines()]


def test_op_library_needs_only_the_stable_shims_of_torch():
    """Each name in torch_symbols.txt is exported by torch 2.11 and later: one binary serves all of them."""
    allowed = {line for line in ALLOWLIST.read_text().split("\n") if line and not line.startswith("#")}
    system = re.compile(
        r"@(GLIBC|GLIBCXX|CXXABI|GCC)_|^_ZN[KO]*R?K?O?S[tosia]|^_ZS[t]|^_ZN[KO]?R?S|^_ITM_|^__gmon_start__$"
    )
    core = re.compile(r"^_Z(N|NK|TI|TS|TV)N?4glmx")
    for name in undefined(library("libglmx_torch.so")):
        assert not re.search(r"2at\d?|3c10|5torch|N2at|Py[A-Z_]", name) or name in allowed, (
            f"C++ or Python symbol {name}"
        )
        fine = name in allowed or system.search(name) or core.match(name)
        assert fine, f"{name} is neither in {ALLOWLIST.name} nor of the system nor of glmx's core"


def test_core_needs_neither_torch_nor_python():
    for name in undefined(library("libglmx_core.so")):
        assert not re.match(r"(aoti_)?torch_|Py[A-Z_]|_Py", name), f"libglmx_core.so needs {name}"
    needed = output("readelf", "-d", library("libglmx_core.so"))
    assert "torch" not in needed and "c10" not in needed and "python" not in needed


def test_native_module_needs_no_torch():
    native = next(PACKAGE.glob("_native*.so"), None) or library("_native.so")
    needed = output("readelf", "-d", native)
    assert "libglmx_core.so" in needed and "libtorch" not in needed and "libc10" not in needed


def test_libraries_carry_no_path_of_this_machine():
    for path in PACKAGE.glob("*.so"):
        runpath = re.findall(r"R(?:UN)?PATH.*\[(.*)\]", output("readelf", "-d", path))
        assert all(entry == "$ORIGIN" for entry in runpath), f"{path.name}: {runpath}"
