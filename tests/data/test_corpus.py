from __future__ import annotations

import py_compile
from pathlib import Path

import pytest

from glmx.data import corpus
from glmx.errors import ConfigError


def fake_library(root: Path, modules: int = 40, size: int = 2000) -> Path:
    root.mkdir()
    for i in range(modules):
        (root / f"mod{i}.py").write_text(f"# module {i}\n" + f"x{i} = {i}\n" * (size // 10))
    package = root / "pack"
    package.mkdir()
    for name in ("__init__.py", "core.py", "test_core.py", "core_test.py"):
        (package / name).write_text(f"# {name}\nvalue = {name!r}\n")
    for folder in (
        "test",
        "pack/tests",
        "encodings",
        "site-packages",
        "pydoc_data",
        "__pycache__",
        "config-3.11-x",
    ):
        (root / folder).mkdir()
        (root / folder / "inside.py").write_text(f"left_out = {folder!r}\n")
    (root / "_sysconfigdata__linux.py").write_text("build_time_vars = {}\n")
    return root


def names(c: corpus.Corpus) -> set[str]:
    return {d.name for d in c.train + c.heldout}


def test_tests_and_generated_files_stay_out(tmp_path):
    c = corpus.standard_library(fake_library(tmp_path / "lib"), min_bytes=0)
    assert names(c) == {f"mod{i}.py" for i in range(40)} | {"pack/__init__.py", "pack/core.py"}
    assert (c.files, c.bytes) == (42, sum(len(d.data) for d in c.train + c.heldout))


def test_compiled_files_change_nothing(tmp_path):
    root = fake_library(tmp_path / "lib")
    before = corpus.standard_library(root, min_bytes=0)
    for source in root.glob("*.py"):
        py_compile.compile(str(source))
    (root / "mod0.pyc").write_bytes(b"x")
    assert corpus.standard_library(root, min_bytes=0) == before


def test_duplicates_and_other_encodings_are_counted_and_left_out(tmp_path):
    root = fake_library(tmp_path / "lib")
    plain = corpus.standard_library(root, min_bytes=0)
    (root / "zz_copy.py").write_bytes((root / "mod7.py").read_bytes())
    (root / "latin.py").write_bytes(b"# -*- coding: latin-1 -*-\nname = '\xe9'\n")
    (root / "empty.py").write_bytes(b"\n")
    c = corpus.standard_library(root, min_bytes=0)
    assert (c.duplicates, c.skipped_not_utf8) == (1, 1)
    assert names(c) == names(plain) and c.sha256 == plain.sha256


def test_hash_covers_names_and_contents(tmp_path):
    root = fake_library(tmp_path / "lib")
    a = corpus.standard_library(root, min_bytes=0).sha256
    (root / "mod39.py").rename(root / "mod3x.py")  # same length, same place in the order
    b = corpus.standard_library(root, min_bytes=0).sha256
    (root / "mod4.py").write_text((root / "mod4.py").read_text().replace("x4", "y4"))
    assert len({a, b, corpus.standard_library(root, min_bytes=0).sha256}) == 3


def test_whole_modules_are_held_out(stdlib):
    out = {d.name.split("/")[0] for d in stdlib.heldout}
    assert out == set(stdlib.heldout_groups)
    assert not out & {d.name.split("/")[0] for d in stdlib.train}
    assert 0.05 <= stdlib.heldout_bytes / stdlib.bytes <= 0.08
    assert [d.name for d in stdlib.train] == sorted(d.name for d in stdlib.train)


def test_held_out_choice_survives_a_changed_file(tmp_path):
    root = fake_library(tmp_path / "lib")
    before = corpus.standard_library(root, min_bytes=0).heldout_groups
    (root / "mod1.py").write_text((root / "mod1.py").read_text() + "y = 2\n")
    assert corpus.standard_library(root, min_bytes=0).heldout_groups == before


def test_real_library_has_no_tests(stdlib):
    parts = {p for d in stdlib.train + stdlib.heldout for p in d.name.split("/")[:-1]}
    assert not parts & {"test", "tests", "idle_test", "encodings", "site-packages", "pydoc_data"}


def test_too_small_names_the_option(tmp_path):
    with pytest.raises(ConfigError, match=r"3,000,000.*--corpus DIR"):
        corpus.standard_library(fake_library(tmp_path / "lib"))
    with pytest.raises(ConfigError, match="not a directory"):
        corpus.directory(tmp_path / "nothing")


def test_directory_prefers_python_and_falls_back_to_text(tmp_path):
    for i in range(40):
        (tmp_path / f"note{i}.txt").write_text(f"note {i}\n" * 50)
    (tmp_path / "binary.dat").write_bytes(b"\0\1\2")
    c = corpus.directory(tmp_path, min_bytes=0)
    assert len(c.train) + len(c.heldout) == 40 and c.skipped_not_utf8 == 1
    (tmp_path / "a.py").write_text("x = 1\n" * 100)
    for i in range(40):
        (tmp_path / f"b{i}.py").write_text(f"y = {i}\n" * 100)
    assert all(n.endswith(".py") for n in names(corpus.directory(tmp_path, min_bytes=0)))


def test_one_large_file_is_cut_into_pieces(tmp_path):
    text = "".join(f"line {i}\n" for i in range(300_000))
    (tmp_path / "input.txt").write_text(text)
    c = corpus.directory(tmp_path)
    assert 0.03 <= c.heldout_bytes / c.bytes <= 0.08
    order = sorted(c.train + c.heldout, key=lambda d: int(d.name.split("#")[1]))
    assert b"".join(d.data for d in order).decode() == text


def test_one_package_is_divided_below_its_top(tmp_path):
    for i in range(40):
        folder = tmp_path / "src" / f"sub{i}"
        folder.mkdir(parents=True)
        (folder / "a.py").write_text(f"a{i} = {i}\n" * 50)
        (folder / "b.py").write_text(f"b{i} = {i}\n" * 50)
    c = corpus.directory(tmp_path, min_bytes=0)
    assert all(g.count("/") == 1 for g in c.heldout_groups)
    assert {d.name.rsplit("/", 1)[0] for d in c.heldout} == set(c.heldout_groups)
