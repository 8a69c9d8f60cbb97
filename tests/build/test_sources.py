"""Rules of the C++ tree that a compiler does not enforce: who sees torch, which flags, what a kernel header says."""

from __future__ import annotations

import re

import pytest
from tests.build.tree import ROOT, relative, sources, stems

# Bodies that kernels share; they hold no kernel of their own.
SHARED = {"vec_math.inl", "rows.inl", "rms_row.inl", "sizes.inl", "math64.inl"}
SHARED |= {"gemm_tile.inl", "gemm_driver.inl", "gemm_epilogue.inl"}
SHARED |= {
    "attend.inl",
    "key_rows.inl",
    "key_lists.inl",
    "index_score.inl",
    "largest.inl",
    "pieces.inl",
    "words.inl",
    "fetch_rows.inl",
    "meanwhile.inl",
    "stored_matrix.inl",
    "stored_weight.inl",
}
SHARED |= {"mass.inl", "philox.inl", "sample_row.inl"}
FIELDS = ("Contract", "Shapes", "Layout", "Numerics", "Algorithm", "Work/bytes", "Measured", "Limits")


def test_torch_is_included_in_csrc_torch_alone():
    pattern = re.compile(r'^\s*#\s*include\s*[<"](torch|ATen|c10|Python\.h|pybind11)', re.MULTILINE)
    for path in sources(".cpp", ".h", ".inl", ".cu"):
        folder = path.relative_to(ROOT / "csrc").parts[0]
        found = set(pattern.findall(path.read_text()))
        if folder == "torch":
            found -= {"torch"}
        if folder == "native":
            found -= {"pybind11"}
        assert not found, f"{relative(path)} includes {', '.join(found)}"


def test_only_the_stable_headers_of_torch():
    allowed = (
        "torch/csrc/stable/",
        "torch/headeronly/",
        "torch/bind.h",
        "torch/sample_rules.h",
    )  # the last two are ours
    for path in sources(".cpp", ".h", under="csrc/torch"):
        for name in re.findall(r'#\s*include\s*[<"](torch/[^>"]+)', path.read_text()):
            assert name.startswith(allowed), f"{relative(path)}: {name} is not part of torch's stable ABI"


def test_no_flag_for_the_builders_own_cpu():
    forbidden = re.compile(r"-m(arch|tune|cpu)=native|-ffast-math|-Ofast|/fp:fast")
    paths = [ROOT / name for name in ("CMakeLists.txt", "setup.py", "Makefile", "pyproject.toml")]
    paths += [*sources(".cmake", ".py", ".sh", under="cmake"), *sources(".cpp", ".h", ".inl", ".txt")]
    for path in paths:
        code = "\n".join(re.split(r"#(?!\s*(include|pragma))|//", line)[0] for line in path.read_text().splitlines())
        found = forbidden.search(code)
        assert not found, f"{relative(path)}: {found[0]}: a wheel runs on machines that its builder never saw"


def test_shared_bodies_exist():
    assert {path.name for path in sources(".inl")} >= SHARED, "SHARED names a file that is gone"


KERNELS = [path for path in sources(".inl") if path.name not in SHARED] + sources(".cpp", under="csrc/cpu/amx")
GPU_KERNELS = [path for path in sources(".cu", under="csrc/gpu") if path.parent.name != "gx" and path.stem != "table"]
KERNELS += GPU_KERNELS


@pytest.mark.parametrize("path", KERNELS, ids=relative)
def test_kernel_header(path):
    """STYLE: every kernel opens with what it computes, its contract, its oracle, its cost and its limits."""
    header = []
    for line in path.read_text().splitlines():
        if not line.startswith("//"):
            break
        header.append(line)
    text = "\n".join(header)
    if path.suffix == ".inl":
        assert path.stem in stems(), f"{relative(path)} is no op's body: name it in SHARED if kernels share it"
    assert re.match(rf"// {path.stem}\b.*: ", header[0] if header else ""), "the first line says what is computed"
    missing = [field for field in FIELDS if not re.search(rf"^// {field} ", text, re.MULTILINE)]
    assert not missing, f"{relative(path)}: its header lacks {', '.join(missing)}"
    # A GPU's kernel with the CPU's tree may name that as its oracle: bits are what it is held to.
    for field, folders in (("Oracle", ("python/glmx", "csrc")), ("Doc", ("",))):
        named = re.search(rf"\b{field}\s+([\w./]+)", text)
        found = named and any((ROOT / folder / named[1].rstrip(".")).is_file() for folder in folders)
        assert found, f"{relative(path)}: {field} names no file"
    assert 8 <= len(header) <= 30, f"{relative(path)}: {len(header)} lines of header; 10 to 25 are aimed at"


def test_raw_amx_intrinsics_live_in_tile_h():
    """gcc 12's own tile intrinsics drop stores at -O2 (docs/log.md): tile.h wraps them with memory clobbers."""
    raw = re.compile(
        r"\b_{1,2}tile_\w+|\btile(load|store|zero|release)\w*\s+|\btdp(bf16ps|bssd|buud|busd|bsud)\b|ldtilecfg"
    )
    for path in sources(".cpp", ".h", ".inl"):
        if relative(path) == "csrc/cpu/amx/tile.h":
            continue
        code = re.sub(r"//[^\n]*", "", path.read_text())
        found = raw.search(code)
        assert not found, f"{relative(path)}: {found[0].strip()}: tiles are touched through cpu/amx/tile.h"


def without_comments(path) -> str:
    return re.sub(r"//[^\n]*", "", path.read_text())


def test_a_vendors_own_words_live_in_gx():
    """A kernel is written once, in gx's vocabulary: PTX, intrinsics and builtins of one vendor are behind it."""
    raw = re.compile(
        r"\basm\b|\b__(shfl|ballot|any|all|match|syncwarp|syncthreads|ldg|stg|ldcs|stcs|cvta|nanosleep|trap)\w*"
        r"|\batomic[A-Z]\w*|\b__(fmaf?|f[a-z]+|d[a-z]+)_r[nzud]\b|\b__(CUDA_ARCH|HIP)\w*|\b__builtin_amdgcn\w*"
        r"|\b(cuda|hip)[A-Z]\w*|\bwarpSize\b|<<<"
    )
    for path in sources(".cu", ".h", under="csrc/gpu"):
        if path.parent.name == "gx":
            continue
        found = raw.search(without_comments(path))
        assert not found, f"{relative(path)}: {found[0]}: only csrc/gpu/gx says it"


def test_assembly_is_in_four_files_of_gx():
    """CUDA's halves of gx. The fibers of the CPU that plays GPU switch stacks in assembly of their own."""
    found = {
        relative(path)
        for path in sources(".cu", ".h", ".cpp", under="csrc/gpu")
        if re.search(r"\basm\b", without_comments(path))
    }
    assert found == {f"csrc/gpu/gx/{name}" for name in ("cuda.h", "hopper_cuda.h", "simt.h", "simt.cpp")}


def test_gpu_kernels_do_not_read_tensors_on_the_host():
    """ops/<op>.cpp knows whether the host may look; a file of kernels never does."""
    for path in GPU_KERNELS:
        assert "host_reads" not in path.read_text(), (
            f"{relative(path)} asks what the host reads: that is ops/'s to check"
        )


def test_isa_folders_use_no_stl():
    headers = {"cstdint", "cstring", "cmath", "cstddef", "immintrin.h", "emmintrin.h", "xmmintrin.h", "utility"}
    for path in [*sources(".cpp", ".h", ".inl", under="csrc/cpu")]:
        named = set(re.findall(r"#\s*include\s*<([^>]+)>", path.read_text()))
        assert named <= headers, f"{relative(path)} includes {named - headers}: an ISA folder uses no STL"


def test_file_sizes():
    """STYLE aims at 300 lines and looks again at 500; above 800 the first line says why."""
    for path in [
        *sources(".cpp", ".h", ".inl", ".cu"),
        *sources(".py", under="python"),
        *sources(".py", under="tests"),
    ]:
        lines = path.read_text().splitlines()
        assert len(lines) <= 800 or "lines" in lines[0], f"{relative(path)} has {len(lines)} lines"


def test_bindings_are_thin():
    for path in sources(".cpp", under="csrc/torch"):
        if path.stem in stems():
            lines = len(path.read_text().splitlines())
            assert lines <= 80, f"{relative(path)} has {lines} lines: unpack and call, nothing else"
