"""Headers, shards and indexes: what is well-formed is read as the safetensors library reads it, the rest is named."""

from __future__ import annotations

import json
import os

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from glmx.errors import CheckpointError
from glmx.models.safetensors import INDEX, SINGLE, Files, read_header


def blob(header, data=b"", length=None):
    """A file's bytes from a header (an object, or its text) and the data behind it."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text + data


def entry(dtype="F32", shape=(2,), start=0, end=8):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [start, end]}


def test_reads_what_the_library_writes(tmp_path):
    dtypes = (torch.bfloat16, torch.float32, torch.float64, torch.int64, torch.uint8, torch.bool, torch.float8_e4m3fn)
    tensors = {f"t.{dtype}": torch.zeros(3, 5).to(dtype) for dtype in dtypes}
    tensors |= {"scalar": torch.tensor(1.0), "empty": torch.empty(0, 4), "käse \u4e2d": torch.ones(1)}
    file = tmp_path / "x.safetensors"
    save_file(tensors, file, metadata={"format": "pt"})
    entries = read_header(file)
    assert entries.keys() == tensors.keys()
    with safe_open(file, "pt") as opened:
        for key, found in entries.items():
            header = opened.get_slice(key)
            assert (found.dtype, list(found.shape)) == (header.get_dtype(), header.get_shape())
            assert found.end - found.start == tensors[key].nbytes


GOOD = {"a": entry(), "b": entry("BF16", (2, 2), 8, 16)}
DATA = bytes(16)


@pytest.mark.parametrize(
    "content, words",
    [
        (b"", "truncated: 0 bytes"),
        (b"\x00" * 7, "truncated: 7 bytes"),
        (b"\x00" * 64, "no header at its start"),
        (b"version https://git-lfs.github.com/spec/v1\noid", "a Git LFS pointer"),
        (b"\x89PNG\r\n\x1a\n" + bytes(99), "not a safetensors file"),
        (blob(GOOD, DATA)[:20], r"truncated: a header of \d+ bytes in a file of 20"),
        (blob(GOOD, DATA)[:-1], "truncated: tensor b ends at byte 16 of the data, there are 15"),
        (blob(GOOD, DATA + b"\x00"), "1 bytes behind its last tensor"),
        (blob(GOOD, DATA, length=100_000_001), "header of 100000001 bytes, expected at most 100000000"),
        (blob(GOOD, DATA, length=2**64 - 1), "header of 18446744073709551615 bytes"),
        (blob(b'{"a": nope}'), "not JSON"),
        (blob(b'{"\xff": 1}'), "not JSON: 'utf-8' codec"),
        (blob(b'{"a":' + b"[" * 100_000), "nested too deeply"),
        (blob(b'{"a": ' + b"9" * 5000 + b"}"), "not JSON"),
        (blob(f'{{"a": {json.dumps(entry())}, "a": {json.dumps(entry())}}}'.encode(), bytes(8)), "the key 'a' twice"),
        (blob({"__metadata__": {"n": 1}}), "__metadata__ is {'n': 1}"),
        (blob({"__metadata__": []}), r"__metadata__ is \[\]"),
        (blob({"a": 1}), "tensor a is 1, expected dtype, shape and data_offsets"),
        (blob({"a": {**entry(), "x": 0}}, bytes(8)), "tensor a is .*expected dtype, shape and data_offsets"),
        (blob({"a": entry("F33")}, bytes(8)), "tensor a has dtype 'F33', expected one of BF16, BOOL"),
        (blob({"a": entry(["F32"])}, bytes(8)), r"tensor a has dtype \['F32'\]"),
        (blob({"a": entry(shape=(-2,))}, bytes(8)), r"tensor a has shape \[-2\]"),
        (blob({"a": entry(shape=(True, 2))}, bytes(8)), r"tensor a has shape \[True, 2\]"),
        (blob({"a": entry(shape=(2.0,))}, bytes(8)), r"tensor a has shape \[2.0\]"),
        (blob({"a": entry(shape=(2**63,))}, bytes(8)), "tensor a has shape"),
        (blob({"a": entry(shape=(2**62, 4))}, bytes(8)), "73786976294838206464 bytes"),
        (blob({"a": entry(shape=(3,))}, bytes(8)), r"tensor a is F32 \[3\], 12 bytes, .* \[0, 8\] hold 8"),
        (blob({"a": entry("F4", (3,), 0, 1)}, bytes(1)), r"tensor a is F4 \[3\]"),
        (blob({"a": entry(start=8, end=0)}, bytes(8)), r"tensor a has data_offsets \[8, 0\]"),
        (blob({"a": {**entry(), "data_offsets": [0]}}, bytes(8)), r"tensor a has data_offsets \[0\]"),
        (blob({"a": entry(), "b": entry(start=4, end=12)}, bytes(12)), "tensor b overlaps a: .*byte 4 .*expected 8"),
        (blob({"a": entry(), "b": entry(start=12, end=20)}, bytes(20)), "tensor b leaves a hole behind a"),
        (blob({"a": entry(start=4, end=12)}, bytes(12)), "tensor a leaves a hole behind the header"),
        (blob({"x\ny": 1}), r"tensor 'x\\ny' is 1"),
        (blob({"k" * 500: 1}), "tensor 'kkk.*\\.\\.\\.k*' is 1"),
    ],
)
def test_a_damaged_file_is_named(tmp_path, content, words):
    file = tmp_path / "x.safetensors"
    file.write_bytes(content)
    with pytest.raises(CheckpointError, match=words) as caught:
        read_header(file)
    message = str(caught.value)
    assert str(file) in message and "\n" not in message and len(message) < 1000


def test_what_is_no_regular_file_is_not_opened(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for name, words in (("pipe", "not a regular file"), (".", "not a regular file"), ("none", "No such file")):
        with pytest.raises(CheckpointError, match=words):
            read_header(tmp_path / name)


def sharded(directory, weight_map, **files):
    """Shards of one-element tensors: one="ab" writes tensors a and b to one.safetensors."""
    for name, keys in files.items():
        tensors = {key: torch.ones(1) for key in keys}
        save_file(tensors, directory / f"{name}.safetensors")
    (directory / INDEX).write_text(json.dumps({"weight_map": weight_map}))


ONE, TWO = "one.safetensors", "two.safetensors"


def test_shards(tmp_path):
    sharded(tmp_path, {"a": ONE, "b": ONE, "c": TWO}, one="ab", two="c")
    files = Files(tmp_path)
    assert files.keys == {"a", "b", "c"} and files.in_order() == ["a", "b", "c"]
    with files:
        assert files.tensor("c").item() == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn])
def test_rows_are_those_that_were_written(tmp_path, dtype):
    values = torch.randn(7, 5, 3).to(dtype)
    save_file({"first": torch.ones(3), "x": values, "empty": values[:0]}, tmp_path / SINGLE)
    with Files(tmp_path) as files:
        assert torch.equal(files.tensor("x").view(torch.uint8), values.view(torch.uint8))
        rows = files.rows("x", 4, 9)  # of [35, 3]
        assert rows.dtype == dtype and torch.equal(rows.float(), values.view(-1, 3)[4:13].float())
        assert files.tensor("empty").shape == (0, 5, 3)


def test_many_shards_are_read_with_few_files_open(tmp_path):
    names = [f"{i:02d}" for i in range(30)]
    sharded(tmp_path, {name: f"{name}.safetensors" for name in names}, **{name: [name] for name in names})
    with Files(tmp_path) as files:
        before = len(os.listdir("/proc/self/fd"))
        assert all(files.tensor(name).item() == 1 for name in reversed(names))
        assert len(os.listdir("/proc/self/fd")) <= before + 4
    assert len(os.listdir("/proc/self/fd")) <= before


def test_a_file_that_shrinks_after_its_header_was_read(tmp_path):
    save_file({"x": torch.ones(4, 4)}, tmp_path / SINGLE)
    with Files(tmp_path) as files:
        os.truncate(tmp_path / SINGLE, os.path.getsize(tmp_path / SINGLE) - 1)
        with pytest.raises(CheckpointError, match="model.safetensors' has become shorter"):
            files.tensor("x")


@pytest.mark.parametrize(
    "weight_map, files, words",
    [
        ({"a": ONE, "b": TWO}, {"one": "a"}, "lacks two.safetensors, named in"),
        ({"a": ONE, "b": TWO}, {"one": "ab", "two": "b"}, "tensor b is in two files.*'one.*' and 'two"),
        ({"a": ONE, "b": TWO}, {"one": "a", "two": "bc"}, "disagree on c"),
        ({"a": ONE, "b": TWO, "c": TWO}, {"one": "a", "two": "b"}, "disagree on c"),
        ({"a": TWO, "b": ONE}, {"one": "a", "two": "b"}, "disagree on a, b"),
        ({"a": "../one.safetensors"}, {"one": "a"}, "tensor a is in '../one.safetensors', expected a .safetensors"),
        ({"a": "/dev/zero"}, {"one": "a"}, "tensor a is in '/dev/zero'"),
        ({"a": "one\x00.safetensors"}, {"one": "a"}, r"tensor a is in 'one\\x00.safetensors'"),
        ({"a": "o" * 300 + ".safetensors"}, {"one": "a"}, "tensor a is in 'ooo"),
        ({"a": 7}, {"one": "a"}, "tensor a is in 7"),
        ([], {"one": "a"}, r"weight_map is \[\]"),
    ],
)
def test_a_bad_index_is_named(tmp_path, weight_map, files, words):
    sharded(tmp_path, weight_map, **files)
    with pytest.raises(CheckpointError, match=words):
        Files(tmp_path)
