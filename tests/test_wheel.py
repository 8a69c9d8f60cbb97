"""The wheel of `make wheel` where it is used: no compiler, no sources and none of the tests' packages.

The second environment sees what the wheel's own metadata asks for and nothing else, so a module that glmx imports and
does not declare is found here. Then a user's first hour: `glmx env`, a tokenizer and shards, `glmx pretrain`,
`glmx generate`, `glmx serve`.
"""

from __future__ import annotations

import importlib.metadata
import json
import pathlib
import re
import signal
import subprocess
import sys
import urllib.request
import zipfile
from collections.abc import Iterator

import pytest
from packaging.requirements import Requirement

from tests.build.tree import PACKAGE, ROOT, SITE, clean_environment, output, unavailable

EXTRA = "serve"
CONFIG = {
    "model_type": "glm4_moe",
    "vocab_size": 300,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "intermediate_size": 48,
    "moe_intermediate_size": 16,
    "n_routed_experts": 8,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "first_k_dense_replace": 1,
    "num_nextn_predict_layers": 1,
    "max_position_embeddings": 256,
}
RUN = """
model = "model"
out = "run"
[data]
shards = "data"
heldout = "heldout"
seq_len = 32
[optim]
lr = 1e-2
min_lr = 1e-3
warmup_tokens = 128
[train]
tokens = 512
batch_rows = 4
micro_rows = 4
"""
# As examples/pretrain.py does: text, tokenizer, shards.
PREPARE = """
import pathlib, sys
import glmx
from glmx import _native, ops
from glmx.data import shards, tokenizer
for module in (glmx, _native, ops):
    assert pathlib.Path(module.__file__).is_relative_to(sys.prefix), module.__file__
text = "import os\\n\\n\\ndef name(path):\\n    return os.path.basename(path)\\n"
vocabulary = tokenizer.train([text] * 4, 300)
shards.write_documents("data", "train", vocabulary, [text] * 20)
shards.write_documents("data", "heldout", vocabulary, [text] * 4)
vocabulary.save("data")
"""


@pytest.fixture(scope="module")
def wheel() -> pathlib.Path:
    """What `make wheel` writes. The environment of this run takes the place of .venv, which --old-file leaves alone."""
    python = pathlib.Path(sys.executable)
    make = ["make", "--no-print-directory", "--old-file=.venv/.glmx", f"BIN={python.parent}", "wheel"]
    printed = output(*make, cwd=ROOT, env=clean_environment(MAKEFLAGS="", MAKELEVEL=""))
    found = list((ROOT / "dist").glob("glmx-*.whl"))
    assert len(found) == 1 and f"dist/{found[0].name}" in printed
    return found[0]


def declared(wheel: pathlib.Path) -> Iterator[importlib.metadata.Distribution]:
    """Every distribution that the wheel's metadata leads to, as it is installed beside the tests."""
    name = next(name for name in zipfile.ZipFile(wheel).namelist() if name.endswith(".dist-info/METADATA"))
    metadata = zipfile.ZipFile(wheel).read(name).decode()
    todo = [(line, EXTRA) for line in re.findall(r"^Requires-Dist: (.+)$", metadata, re.MULTILINE)]
    seen = set()
    while todo:
        line, extra = todo.pop()
        requirement = Requirement(line)
        if (line, extra) in seen or requirement.marker and not requirement.marker.evaluate({"extra": extra}):
            continue
        seen.add((line, extra))
        distribution = importlib.metadata.distribution(requirement.name)
        yield distribution
        todo += [(more, wanted) for more in distribution.requires or [] for wanted in ("", *requirement.extras)]


@pytest.fixture(scope="module")
def venv(wheel, tmp_path_factory) -> pathlib.Path:
    """A second environment with the wheel in it, installed without an index: what it asks for must be all it needs."""
    if not list(SITE.glob("torch-*.dist-info")):
        unavailable(f"torch is not installed in {SITE}")
    folder = tmp_path_factory.mktemp("user") / "venv"
    output(sys.executable, "-m", "venv", "--without-pip", folder)
    site = next((folder / "lib").glob("python3*/site-packages"))
    for distribution in declared(wheel):
        tops = {file.parts[0] for file in distribution.files or [] if file.parts[0] not in ("..", "__pycache__")}
        for top in tops:
            if not (site / top).exists():
                (site / top).symlink_to(distribution.locate_file(top))
    pip = [sys.executable, "-m", "pip", "--python", folder / "bin/python", "install", "--no-index"]
    output(*pip, f"{wheel}[{EXTRA}]", cwd=folder.parent, env=clean_environment())
    return folder


@pytest.fixture(scope="module")
def home(venv) -> pathlib.Path:
    """Where the user works: nothing but the files that the tests below make."""
    folder = venv.parent / "home"
    (folder / "model").mkdir(parents=True)
    (folder / "model/config.json").write_text(json.dumps(CONFIG))
    (folder / "run.toml").write_text(RUN)
    return folder


def environment(venv: pathlib.Path) -> dict[str, str]:
    return clean_environment(PATH=str(venv / "bin"), HOME=str(venv.parent), OMP_NUM_THREADS="1")


def user(venv: pathlib.Path, home: pathlib.Path, command: str, *args: str) -> str:
    """A command of the second environment, whose bin folder is all of PATH."""
    return output(venv / "bin" / command, *args, cwd=home, env=environment(venv))


def test_what_is_in_the_wheel(wheel):
    version = f"cp{sys.version_info.major}{sys.version_info.minor}"
    assert f"-{version}-{version}-linux_x86_64" in wheel.name, "the Python module ties a wheel to its Python"
    names = zipfile.ZipFile(wheel).namelist()
    libraries = sorted(name for name in names if ".so" in name)
    assert len(libraries) == 3 and libraries[0].startswith("glmx/_native."), libraries
    assert libraries[1:] == ["glmx/libglmx_core.so", "glmx/libglmx_torch.so"]
    modules = {f"glmx/{path.relative_to(PACKAGE)}" for path in PACKAGE.rglob("*.py")}
    rest = {name for name in names if name.startswith("glmx/")} - modules - set(libraries)
    templates = {f"glmx/data/{path.name}" for path in PACKAGE.glob("data/*.jinja")}
    assert len(templates) == 2 and modules <= set(names) and rest == {"glmx/py.typed", *templates}
    strays = [name for name in names if not name.startswith(("glmx/", "glmx-"))]
    assert not strays, strays


def test_env(venv, home):
    assert not {"g++", "cc", "cmake", "ninja", "git"} & {path.name for path in (venv / "bin").iterdir()}
    assert user(venv, home, "glmx", "--version").startswith("glmx 0.")
    facts = json.loads(user(venv, home, "glmx", "env", "--json"))
    assert facts["isa"]["active"] == facts["isa"]["machine"] and len(facts["kernels"]) > 10


def test_pretrain_and_generate(venv, home):
    user(venv, home, "python", "-c", PREPARE)
    user(venv, home, "glmx", "pretrain", "run.toml")
    latest = (home / "run/latest").read_text().strip()
    assert (home / "run" / latest / "model.safetensors").is_file()
    out = user(venv, home, "glmx", "generate", "run", "--prompt", "import", "--max-tokens", "4", "--json")
    assert 1 <= len(json.loads(out)["outputs"][0]["token_ids"]) <= 4


def test_serve_answers_one_request(venv, home):
    """Runs after the training above."""
    command = [venv / "bin/glmx", "serve", "run", "--port", "0"]
    with subprocess.Popen(command, cwd=home, env=environment(venv), stdout=subprocess.PIPE, text=True) as server:
        try:
            url = next(found[1] for line in server.stdout if (found := re.search(r"(http://[\d.:]+)/v1", line)))
            body = json.dumps({"model": "run", "prompt": "import", "max_tokens": 4}).encode()
            request = urllib.request.Request(f"{url}/v1/completions", body, {"Content-Type": "application/json"})
            with urllib.request.urlopen(request, timeout=60) as response:
                answer = json.load(response)
            assert 1 <= answer["usage"]["completion_tokens"] <= 4 and answer["choices"][0]["finish_reason"]
        finally:
            server.send_signal(signal.SIGTERM)
    assert server.returncode == 0
