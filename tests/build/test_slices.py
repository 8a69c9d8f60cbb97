"""Every op of ops.h is a whole vertical slice: the same stem in every layer. A half-added op fails here."""

from __future__ import annotations

import importlib
import inspect
import re

import pytest
from tests.build.tree import OPS_H, ROOT, relative, sources, stems

# Ops without vector work: one plain kernel serves every instruction set. Each says why.
BASE_ONLY = {
    "expert_plan": "a counting sort of int32: no arithmetic that a wider vector would speed up",
    "cache_append": "copies: memcpy is the C library's, which picks its own vectors",
}
# Ops without a kernel: their host function calls other ops'.
COMPOSED = {"moe_mlp"}
# Ops with a kernel for GPUs, by csrc/gpu/kernels.h: gradients are in the file of their op.
GPU_KERNELS = re.findall(r"^  X\((\w+), ", (ROOT / "csrc/gpu/kernels.h").read_text(), re.MULTILINE)
GPU = {stem for stem in stems() if stem in GPU_KERNELS}
# Files beside the slices: tables of them, and what their bindings share.
NO_OPS = {"registry", "library", "call", "table", "backends"}


@pytest.fixture(params=stems())
def stem(request) -> str:
    return request.param


def test_ops_h_names_ops():
    assert len(stems()) == len(set(stems())) and "rms_norm" in stems()


def test_files_of_the_slice(stem):
    wanted = [f"csrc/ops/{stem}.cpp", f"csrc/torch/{stem}.cpp"]
    if stem not in COMPOSED:
        wanted.append(f"csrc/cpu/base/{stem}.cpp")
    if stem not in BASE_ONLY and stem not in COMPOSED:
        wanted += [f"csrc/cpu/avx2/{stem}.cpp", f"csrc/cpu/avx512/{stem}.cpp", f"csrc/cpu/inl/{stem}.inl"]
    wanted += [f"python/glmx/ops/{stem}.py", f"python/glmx/reference/{stem}.py"]
    wanted += [f"tests/ops/test_{stem}.py", f"docs/ops/{stem}.md", f"bench/ops/bench_{stem}.py"]
    if stem in GPU:
        wanted.append(f"csrc/gpu/{stem}.cu")
    missing = [name for name in wanted if not (ROOT / name).is_file()]
    assert not missing, f"{stem} is in ops.h, but its slice lacks {', '.join(missing)}"


def test_every_gpu_kernel_is_an_ops():
    assert len(GPU) >= 11 and "rms_norm" in GPU
    for name in GPU_KERNELS:
        assert any(name == stem or name.startswith(f"{stem}_") for stem in GPU), name


def test_contract_names_params_and_function(stem):
    camel = "".join(word.capitalize() for word in stem.split("_"))
    text = OPS_H.read_text()
    if stem == "rope":
        assert "struct RopeParams" in text and "struct RopeCosSinParams" in text
    assert f"struct {camel}Params {{" in text and f"void {stem}(const {camel}Params& p);" in text


def test_registry_knows_it(stem):
    for name in ("registry.h", "registry.cpp"):
        text = (ROOT / "csrc/ops" / name).read_text()
        assert re.search(rf"\b{stem}_info\(", text), f"csrc/ops/{name} has no line for {stem}"


def test_registry_is_in_the_order_of_ops_h():
    from glmx import _native

    rows = list(dict.fromkeys(row["op"] for row in _native.kernel_table()))
    assert rows == stems(), "the table that glmx env prints lists the ops of ops.h, in its order"


def test_public_function_and_oracle(stem):
    import glmx.ops
    import glmx.reference

    public, oracle = getattr(glmx.ops, stem), getattr(glmx.reference, stem)
    assert public.__module__ == f"glmx.ops.{stem}" and oracle.__module__ == f"glmx.reference.{stem}"
    assert "Raises" in inspect.getdoc(public) and "Returns" in inspect.getdoc(public), "the docstring is the contract"
    ours, theirs = inspect.signature(public).parameters, inspect.signature(oracle).parameters
    assert list(ours) == [name for name in theirs if name in ours], "the oracle takes the op's arguments, in its order"
    assert set(theirs) - set(ours) <= {"exact"}
    assert importlib.import_module(f"glmx.ops.{stem}").__doc__


def test_torch_op_is_registered(stem):
    import torch

    import glmx.ops  # noqa: F401  loads the library

    names = [name for name in torch._C._dispatch_get_all_op_names() if name.startswith("glmx::")]
    assert any(name.split("::")[1].split(".")[0].startswith(stem) for name in names), f"no torch op for {stem}"


def test_no_kernel_without_a_contract():
    """Delete the stem and the op is gone: no file is left behind in a kernel or binding folder."""
    left = []
    for path in sources(".cpp", ".cu"):
        folder = path.parent.relative_to(ROOT / "csrc").as_posix()
        kernel_folder = folder.startswith("cpu/") or folder in ("gpu", "gpu/sm90", "ops", "torch")
        of_an_op = any(path.stem == stem or path.stem.startswith(f"{stem}_") for stem in stems())
        if kernel_folder and not of_an_op and path.stem not in NO_OPS:
            left.append(relative(path))
    assert not left, f"{', '.join(left)}: no stem of ops.h has that name"
