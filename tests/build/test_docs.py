"""docs/install.md quotes every error of an install as the user sees it; the two cannot drift apart."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import tomllib

import pytest
from tests.build.tree import OPS_H, ROOT, stems

GUIDE = (ROOT / "docs/install.md").read_text()
QUOTED = {line[2:].strip() for line in GUIDE.splitlines() if line.startswith("> ")}


def backend():
    spec = importlib.util.spec_from_file_location("glmx_backend", ROOT / "cmake/glmx_backend.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def toolchain_messages() -> set[str]:
    text = (ROOT / "cmake/toolchain.sh").read_text()
    messages = re.findall(r'^\s+echo "(\S+ [^"]+)"$', text, re.MULTILINE)
    names = {"$(uname -s)-$(uname -m)": "{platform}", "$python": "{python}"}
    for shell, name in names.items():
        messages = [message.replace(shell, name) for message in messages]
    return set(messages)


def pattern(template: str) -> re.Pattern:
    return re.compile(re.sub(r"\\\{\w+\\\}", ".+", re.escape(template)))


@pytest.mark.parametrize("name", list(backend().ERRORS))
def test_every_error_of_setup_is_explained(name):
    assert backend().ERRORS[name] in QUOTED, f"docs/install.md does not quote the error {name!r} word by word"


def test_every_line_of_the_toolchain_check_is_explained():
    messages = toolchain_messages()
    assert len(messages) == 4 and messages <= QUOTED, messages - QUOTED


def test_every_quoted_error_exists():
    known = set(backend().ERRORS.values()) | toolchain_messages()
    sources = [ROOT / "python/glmx/errors.py", ROOT / "csrc/core/features.cpp"]
    # Literals that the language joins, joined; what stands between them is a value.
    text = "\n".join(re.sub(r'"\s*f?"', "", path.read_text()) for path in sources)
    for quoted in QUOTED - known:
        pieces = [re.escape(piece) for piece in re.split(r"\{\w+\}|libglmx_torch\.so", quoted)]
        assert re.search(".{1,20}".join(pieces), text), f"docs/install.md quotes an error that nothing prints: {quoted}"


def test_torch_range_is_the_same_everywhere():
    setup = backend()
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    (low, high) = (".".join(map(str, bound)) for bound in (setup.TORCH_MIN, setup.TORCH_BELOW))
    assert f"torch>={low},<{high}" in project["project"]["dependencies"]
    assert f"torch>={low},<{high}" in setup.ERRORS["torch_version"]
    assert not any(word.startswith("torch") for word in project["build-system"]["requires"])
    assert f"TORCH ?= {setup.TORCH_PIN}\n" in (ROOT / "Makefile").read_text()
    major, minor = setup.TORCH_MIN
    assert f"TORCH_TARGET_VERSION=0x{major:02X}{minor:02X}" in (ROOT / "cmake/GlmxTorch.cmake").read_text()


def test_versions_agree():
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    assert f'__version__ = "{version}"' in (ROOT / "python/glmx/__init__.py").read_text()
    assert f"project(glmx VERSION {version} " in (ROOT / "CMakeLists.txt").read_text()


def test_links_between_documents_work():
    names = subprocess.run(["git", "ls-files", "*.md"], cwd=ROOT, capture_output=True, text=True).stdout.split()
    for name in names or ["docs/install.md"]:
        page = ROOT / name
        for target in re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", page.read_text()):
            assert "://" not in target and (page.parent / target).exists(), f"{name} links to {target}"


@pytest.mark.parametrize("stem", stems())
def test_doc_page_of_an_op(stem):
    path = ROOT / f"docs/ops/{stem}.md"
    text = path.read_text()
    assert text.startswith(f"# {stem}") and "```python" in text, f"{path.name}: a title and an example"
    for topic, words in (("shapes", r"\[\w+"), ("numerics", r"numeric|round"), ("the backward", r"backward|gradient")):
        found = re.search(words, text, re.IGNORECASE) or (topic, stem) == ("the backward", "expert_plan")  # integers
        assert found, f"{path.name} says nothing about {topic}"


def test_no_addresses_and_no_machine_paths():
    """The tree names no registry and no path of a machine that it was written on."""
    names = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True).stdout.split()
    bad = re.compile(
        r"https?://(?!www\.apache\.org|git-lfs\.github\.com/spec|127\.0\.0\.1|localhost|[\[{])|/(work|root|home)/\w|/tmp/\w"
    )
    for name in names:
        path = ROOT / name
        if name == "LICENSE" or path.suffix in (".png", ".bin", ".safetensors") or not path.is_file():
            continue
        found = bad.search(path.read_text(encoding="utf-8", errors="replace"))
        assert not found or name == "tests/build/test_docs.py", f"{name}: {found[0]}"


def test_contract_file_is_the_one_that_docs_name():
    assert OPS_H.is_file() and "csrc/include/glmx/ops.h" in (ROOT / "docs/architecture.md").read_text()


def test_pre_commit_needs_no_network():
    """Every hook is local, and the two of our own find what they are for."""
    text = (ROOT / ".pre-commit-config.yaml").read_text()
    assert re.findall(r"repo: (\S+)", text) == ["local"] and set(re.findall(r"language: (\S+)", text)) == {
        "system",
        "pygrep",
    }
    torch_include, native = (re.compile(entry) for entry in re.findall(r"entry: '(.+)'", text))
    assert torch_include.search("#include <torch/library.h>") and torch_include.search('# include "c10/core/Device.h"')
    assert not torch_include.search('#include "core/torch_free.h"')
    assert native.search("  -O2 -march=native") and not native.search("# never -march=native")
