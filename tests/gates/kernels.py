"""The kernels of csrc/gpu as compilers left them: which file, which card, how many registers, which instructions."""

from __future__ import annotations

import os
import pathlib
import re
import shutil
import subprocess
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import pytest

from tests.build.tree import ROOT, SITE, output

GPU = ROOT / "csrc" / "gpu"
HIP_BUILD = ROOT / "build" / "gates-hip"
CUDA_CARDS = ("sm_80", "sm_90a")
HIP_CARDS = ("gfx90a", "gfx942")
DEBIAN_DEVICE_LIBRARIES = pathlib.Path("/usr/lib/x86_64-linux-gnu/amdgcn/bitcode")


@dataclass(frozen=True)
class Kernel:
    source: str  # below csrc/gpu: "grouped_gemm.cu", "sm90/grouped_gemm.cu"
    name: str  # as in the source, a template with its arguments: "bias_gradient<float>"
    card: str  # "sm_80", "gfx942"
    registers: int  # of a thread; on AMD the vector registers
    shared: int  # bytes of a block that are known when it is compiled
    local: int  # bytes of a thread that live in memory: arrays with running indices, and spills
    spills: int  # CUDA: instructions that read or write local memory; AMD: vector registers spilled
    threads: int  # the launch bound; 0: none
    opcodes: frozenset[str] = frozenset()  # CUDA alone: "HMMA.16816.F32.BF16"

    @property
    def function(self) -> str:
        return self.name.split("<")[0]


def kernel_files() -> list[str]:
    """The files below csrc/gpu that hold kernels; gx/ is the vocabulary."""
    found = [path for path in GPU.rglob("*.cu") if path.relative_to(GPU).parts[0] != "gx"]
    return sorted(path.relative_to(GPU).as_posix() for path in found if "__global__" in path.read_text())


def portable(source: str) -> bool:
    return "/" not in source


def declared(source: str) -> list[str]:
    """The names of a file's __global__ functions, in its order."""
    code = re.sub(r"//[^\n]*", "", (GPU / source).read_text())
    code = re.sub(r"__launch_bounds__\s*\((?:[^()]|\([^()]*\))*\)", "", code)
    return re.findall(r"__global__\s+void\s+(\w+)\s*\(", code)


def declared_by_headers(source: str) -> list[str]:
    """Those of the headers that a file includes; as templates, they are compiled where they are launched."""
    headers = re.findall(r'#include "gpu/(\w+\.h)"', (GPU / source).read_text())
    return [name for header in headers for name in (*declared(header), *declared_by_headers(header))]


def needs(missing: list[str]) -> None:
    """One skip for a module whose toolchain is not there; under GLMX_STRICT=1 a failure."""
    if not missing:
        return
    if os.environ.get("GLMX_STRICT") == "1":
        pytest.fail(f"GLMX_STRICT=1: missing: {', '.join(missing)}", pytrace=False)
    pytest.skip(f"missing: {', '.join(missing)}", allow_module_level=True)


def demangled(names: Iterable[str]) -> dict[str, str]:
    """`void glmx::gpu::(anonymous namespace)::bias_gradient<float>(glmx::...)` -> `bias_gradient<float>`."""
    names = list(names)
    full = output("c++filt", *names).splitlines() if names else []
    short = {}
    for mangled, text in zip(names, full, strict=True):
        text = re.sub(r"\(anonymous namespace\)::|\bglmx::|\bgpu::", "", text).removeprefix("void ")
        depth, end = 0, len(text)
        for i, c in enumerate(text):  # up to the parenthesis of the arguments, which may stand inside none of <>
            depth += (c == "<") - (c == ">")
            if c == "(" and depth == 0:
                end = i
                break
        short[mangled] = text[:end].replace("unsigned short", "bf16")
    return short


# CUDA


def cuda_tool(name: str) -> str | None:
    """PyPI's nvidia-cuda-cuobjdump and nvidia-cuda-nvdisasm put them outside of PATH."""
    beside = SITE / "nvidia" / "cu13" / "bin" / name
    return str(beside) if beside.exists() else shutil.which(name)


def cuda_missing() -> list[str]:
    missing = [] if shutil.which("nvcc") else ["nvcc (CUDA 13's compiler)"]
    tools = [name for name in ("cuobjdump", "nvdisasm") if cuda_tool(name) is None]
    return missing + [f"{name} (pip install nvidia-cuda-{name})" for name in tools]


def cuobjdump(*arguments: str | pathlib.Path) -> str:
    folder = pathlib.Path(cuda_tool("nvdisasm")).parent  # cuobjdump calls nvdisasm by name
    env = {**os.environ, "PATH": f"{folder}{os.pathsep}{os.environ['PATH']}"}
    return output(cuda_tool("cuobjdump"), *arguments, env=env)


def cuda_objects() -> dict[str, pathlib.Path]:
    """The product's own object of each kernel file, of the newest build that has any."""
    builds = []
    for cache in (ROOT / "build").glob("cmake-*/CMakeCache.txt"):
        objects = {}
        for path in cache.parent.rglob("*.cu.o"):
            match = re.search(r"/csrc/gpu/(.+\.cu)\.o$", path.as_posix())
            if match and match[1] in kernel_files():
                objects[match[1]] = path
        if objects:
            builds.append(objects)
    return max(builds, key=lambda objects: max(path.stat().st_mtime for path in objects.values()), default={})


def by_card(text: str) -> list[tuple[str, str]]:
    parts = re.split(r"^arch = (\w+)$", text, flags=re.MULTILINE)
    return list(zip(parts[1::2], parts[2::2], strict=True))


def read_cubins(source: str, path: pathlib.Path) -> list[Kernel]:
    usage, bounds, code = {}, {}, {}
    for card, text in by_card(cuobjdump("-res-usage", path)):
        for name, values in re.findall(r"Function (\S+):\n\s+(.*)", text):
            usage[card, name] = {
                key: int(value) for key, value in re.findall(r"(REG|STACK|SHARED|LOCAL):(\d+)", values)
            }
    for card, text in by_card(cuobjdump("-elf", path)):
        for name, section in re.findall(r"^\.nv\.info\.(\S+)\n(.*?)\n\n", text, re.MULTILINE | re.DOTALL):
            bound = re.search(r"EIATTR_(?:MAX_THREADS|REQNTID)\s+Format:\s+\w+\s+Value:\s+0x(\w+)", section)
            bounds[card, name] = int(bound[1], 16) if bound else 0
    for card, text in by_card(cuobjdump("-sass", path)):
        parts = re.split(r"^\s*Function : (\S+)$", text, flags=re.MULTILINE)
        for name, body in zip(parts[1::2], parts[2::2], strict=True):
            code[card, name] = re.findall(r"^\s*/\*\w{4,}\*/\s+(?:@!?U?P\w+ )?([A-Z][\w.]*)", body, re.MULTILINE)
    short = demangled({name for _, name in usage})
    kernels = []
    for (card, name), used in usage.items():
        opcodes = frozenset(code[card, name])
        spills = sum(opcode.split(".")[0] in ("LDL", "STL") for opcode in code[card, name])
        local, threads = used["STACK"] + used["LOCAL"], bounds.get((card, name), 0)
        shared = used["SHARED"]
        if card == "sm_90a" and shared >= 1024:
            shared -= 1024  # Hopper's own, of every block that uses shared memory
        kernels.append(Kernel(source, short[name], card, used["REG"], shared, local, spills, threads, opcodes))
    return kernels


def cuda_kernels() -> list[Kernel]:
    with ThreadPoolExecutor(2) as pool:
        found = pool.map(lambda item: read_cubins(*item), cuda_objects().items())
        return sorted((kernel for group in found for kernel in group), key=lambda k: (k.source, k.name, k.card))


# HIP


def hip_missing() -> list[str]:
    missing = []
    for program, package in (
        ("clang++-19", "clang-19"),
        ("lld-19", "lld-19"),
        ("clang-offload-bundler-19", "clang-tools-19"),
    ):
        missing += [] if shutil.which(program) else [package]
    missing += [] if pathlib.Path("/usr/include/hip/hip_runtime.h").exists() else ["libamdhip64-dev"]
    missing += [] if DEBIAN_DEVICE_LIBRARIES.exists() else ["rocm-device-libs"]
    return [f"{package} (apt-get install {package})" for package in missing]


def device_libraries() -> pathlib.Path:
    """Debian's, and the constant for gfx942 that its release of them is too old to have."""
    folder = HIP_BUILD / "device-libs"
    folder.mkdir(parents=True, exist_ok=True)
    for path in DEBIAN_DEVICE_LIBRARIES.glob("*.bc"):
        link = folder / path.name
        if not link.is_symlink():
            link.symlink_to(path)
    constant = folder / "oclc_isa_version_942.bc"
    if not constant.exists():
        text = 'target triple = "amdgcn-amd-amdhsa"\n@__oclc_ISA_version = linkonce_odr hidden local_unnamed_addr '
        source = constant.with_suffix(".ll")
        source.write_text(text + "addrspace(4) constant i32 9402, align 4\n")
        target = "--target=amdgcn-amd-amdhsa"
        output("clang-19", "-x", "ir", "-nogpulib", "-c", "-emit-llvm", target, source, "-o", constant)
    return folder


def build_hip() -> str:
    """Compiles every kernel file for every card, as GLMX_HIP=ON does; "" or what the compiler said."""
    # The assembly that -save-temps leaves behind holds the kernels' metadata.
    flags = f"-save-temps=obj --rocm-device-lib-path={device_libraries()}"
    configure = ["cmake", "-S", str(ROOT), "-B", str(HIP_BUILD), "-DGLMX_PYTHON=OFF", "-DGLMX_CUDA=OFF"]
    configure += ["-DGLMX_HIP=ON", f"-DGLMX_HIP_ARCHS={';'.join(HIP_CARDS)}"]
    configure += ["-DGLMX_HIP_COMPILER=clang++-19", f"-DGLMX_HIP_FLAGS={flags}"]
    if shutil.which("ninja"):
        configure.append("-GNinja")
    for command in (configure, ["cmake", "--build", str(HIP_BUILD), "--target", "glmx_hip", "-j", "2"]):
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        if done.returncode != 0:
            return done.stdout[-4000:] + done.stderr[-4000:]
    return ""


def hip_objects() -> dict[str, pathlib.Path]:
    return {source: HIP_BUILD / "hip" / f"{source}.o" for source in kernel_files() if portable(source)}


def assembly(source: str, card: str) -> pathlib.Path:
    return HIP_BUILD / "hip" / f"{source.removesuffix('.cu')}-hip-amdgcn-amd-amdhsa-{card}.s"


def read_assembly(source: str, card: str) -> list[Kernel]:
    """From the metadata that the compiler writes behind the code of a file."""
    text = assembly(source, card).read_text()
    metadata = re.search(r"^\s*\.amdgpu_metadata\n(.*)^\s*\.end_amdgpu_metadata", text, re.MULTILINE | re.DOTALL)
    if metadata is None:
        return []
    entries = []
    for text in re.split(r"^  - ", metadata[1].split("amdhsa.target")[0], flags=re.MULTILINE)[1:]:
        entries.append(dict(re.findall(r"^\s*\.(\w+): +(\S+)$", text, re.MULTILINE)))
    entries = [entry for entry in entries if "symbol" in entry]
    short = demangled(entry["symbol"].removesuffix(".kd") for entry in entries)
    return [
        Kernel(
            source,
            short[entry["symbol"].removesuffix(".kd")],
            card,
            int(entry["vgpr_count"]),
            int(entry["group_segment_fixed_size"]),
            int(entry["private_segment_fixed_size"]),
            int(entry["vgpr_spill_count"]),
            int(entry["max_flat_workgroup_size"]),
        )
        for entry in entries
    ]


def hip_kernels() -> list[Kernel]:
    found = [kernel for source in hip_objects() for card in HIP_CARDS for kernel in read_assembly(source, card)]
    return sorted(found, key=lambda k: (k.source, k.name, k.card))
