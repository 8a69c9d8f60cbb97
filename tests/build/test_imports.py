"""Imports go one way: cli -> {train, rl, serve, eval} -> models -> layers -> ops -> extension (DESIGN section 3)."""

from __future__ import annotations

import ast
import shutil
import subprocess
import sys

import pytest
from tests.build.tree import PACKAGE, output

# What each part may import besides itself. `errors` is free for all.
ALLOWED = {
    "cli": {"train", "rl", "serve", "eval", "data", "models", "ops", "runtime"},
    "train": {"data", "models", "layers", "ops", "runtime"},
    "rl": {"train", "serve", "data", "models", "layers", "ops", "runtime"},
    "serve": {"data", "models", "layers", "ops", "runtime"},
    "eval": {"serve", "data", "models", "layers", "ops"},
    "models": {"layers", "ops", "runtime", "jsonfile"},
    "layers": {"ops"},
    "ops": {"runtime"},
    "runtime": {"_native"},
    "data": {"jsonfile"},
    "jsonfile": set(),
    "reference": set(),
    "errors": set(),
    "__init__": set(),
    "__main__": {"cli"},
}
MODULES = sorted(path for path in PACKAGE.rglob("*.py"))


def part_of(module: str) -> str:
    """glmx.train.loop -> train; a public name of glmx -> the part that defines it."""
    import glmx

    pieces = module.split(".")
    if len(pieces) == 1 or pieces[1].startswith("__"):
        return "__init__"
    if pieces[1] in glmx._LAZY:
        return glmx._LAZY[pieces[1]].split(".")[1]
    return pieces[1]


def run_time_nodes(tree: ast.AST):
    """Every node but those under `if TYPE_CHECKING:`: the name of a type in an annotation loads nothing."""
    for child in ast.iter_child_nodes(tree):
        if isinstance(child, ast.If) and ast.unparse(child.test) == "TYPE_CHECKING":
            continue
        yield child
        yield from run_time_nodes(child)


def imported(path, nodes=run_time_nodes) -> list[tuple[int, str]]:
    """(line, dotted module) of every import in the file, those inside functions too."""
    package = ["glmx", *path.relative_to(PACKAGE).parent.parts]
    found = []
    for node in nodes(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found += [(node.lineno, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                base = ".".join([*package[: len(package) - node.level + 1], *([base] if base else [])])
            if base == "glmx":
                found += [(node.lineno, f"glmx.{alias.name}") for alias in node.names]
            else:
                found.append((node.lineno, base))
    return found


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.relative_to(PACKAGE).as_posix())
def test_imports_go_one_way(path):
    part = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    assert part in ALLOWED, f"glmx.{part} is new: say in ALLOWED what it may import"
    if part == "__init__":  # its lazy table is the public interface; TYPE_CHECKING imports repeat it
        return
    for line, module in imported(path):
        if module.split(".")[0] != "glmx":
            continue
        target = part_of(module)
        fine = target in ALLOWED[part] | {part, "errors", "__init__"}
        assert fine, f"{path.relative_to(PACKAGE)}:{line} imports {module}; {part} may import {sorted(ALLOWED[part])}"


@pytest.mark.parametrize("part, other", [("train", "serve"), ("serve", "train")])
def test_trainer_and_server_do_not_know_each_other(part, other):
    """Not even the names of their types: what both need is in models, and they cannot drift apart."""
    for path in (PACKAGE / part).glob("*.py"):
        for line, module in imported(path, nodes=ast.walk):
            known = module.startswith("glmx") and part_of(module) == other
            assert not known, f"{path.relative_to(PACKAGE)}:{line} imports {module}"


@pytest.mark.parametrize("path", sorted((PACKAGE / "reference").glob("*.py")), ids=lambda path: path.name)
def test_reference_imports_torch_alone(path):
    free = {"torch", "glmx", "__future__", *sys.stdlib_module_names}
    others = {module for _, module in imported(path) if module.split(".")[0] not in free}
    assert not others, f"an oracle imports torch alone, not {others}"


def test_importing_glmx_loads_nothing_heavy():
    code = "import sys; import glmx; glmx.__version__; print(*sys.modules)"
    loaded = set(output(sys.executable, "-c", code, env=_environment(PACKAGE.parent)).split())
    heavy = {"torch", "numpy", "transformers", "tokenizers", "safetensors", "matplotlib", "rich", "glmx._native"}
    assert not loaded & heavy, f"import glmx loaded {loaded & heavy}"


def test_help_loads_no_torch():
    code = (
        "import sys; from glmx.cli.main import main\n"
        "try: main(['--help'])\nexcept SystemExit: pass\nassert 'torch' not in sys.modules"
    )
    output(sys.executable, "-c", code, env=_environment(PACKAGE.parent))


@pytest.fixture(scope="module")
def without_libraries(tmp_path_factory):
    """A copy of the package with the three libraries removed."""
    copy = tmp_path_factory.mktemp("bare")
    shutil.copytree(PACKAGE, copy / "glmx", ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    return copy


def _environment(path) -> dict[str, str]:
    import os

    return {**os.environ, "PYTHONPATH": str(path), "PYTHONDONTWRITEBYTECODE": "1"}


def test_reference_needs_no_library(without_libraries):
    code = (
        "import torch, glmx.reference as r\n"
        "assert 'bare' in r.__file__, r.__file__\n"
        "y = r.rms_norm(torch.full((2, 8), 3.0), torch.ones(8), 1e-6)\n"
        "assert torch.allclose(y, torch.ones(2, 8))"
    )
    output(sys.executable, "-c", code, env=_environment(without_libraries), cwd=without_libraries)


def test_ops_without_the_library_say_what_to_do(without_libraries):
    done = subprocess.run(
        [sys.executable, "-c", "import glmx.ops"],
        env=_environment(without_libraries),
        cwd=without_libraries,
        capture_output=True,
        text=True,
    )
    assert done.returncode != 0
    last = done.stderr.strip().splitlines()[-1]
    assert "pip install ." in last and "glmx.reference" in last
