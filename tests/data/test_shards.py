from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from glmx.data.shards import HEADER_BYTES, MAGIC, ShardWriter, TokenShards, write_documents
from glmx.errors import CheckpointError

DOCS = [[1, 2, 3], [4], [5, 6, 7, 8, 9], [99_999 % 60_000, 0], [11] * 7]


def write(folder, docs=DOCS, vocab_size=60_000, **options):
    with ShardWriter(folder, "train", vocab_size=vocab_size, tokenizer_sha256="abc", **options) as w:
        for d in docs:
            w.add(d)
    return TokenShards.open(folder, "train")


@settings(max_examples=40, deadline=None)
@given(
    docs=st.lists(st.lists(st.integers(0, 69_999), min_size=1, max_size=20), min_size=1, max_size=12),
    shard_tokens=st.sampled_from([1, 10, 1000]),
)
def test_documents_read_back(tmp_path_factory, docs, shard_tokens):
    s = write(tmp_path_factory.mktemp("s"), docs, vocab_size=70_000, shard_tokens=shard_tokens)
    assert [s.document(i).tolist() for i in range(s.num_documents)] == docs
    assert s.num_tokens == sum(map(len, docs)) and s.document_lengths().tolist() == [len(d) for d in docs]
    assert s.document(0).dtype == np.uint32


def test_small_vocabularies_take_two_bytes_and_stay_mapped(tmp_path):
    s = write(tmp_path)
    assert s.document(2).dtype == np.uint16 and isinstance(s.document(2), np.memmap)
    assert not s.document(2).flags.writeable
    assert s.vocab_size == 60_000 and s.tokenizer_sha256 == "abc"


def test_write_documents_is_the_tokenizers_encoding(tok, tmp_path):
    texts = ["def f():\n    pass\n", "x = 'é'\n"]
    s = write_documents(tmp_path, "train", tok, texts)
    assert [s.document(i).tolist() for i in range(2)] == [tok.encode_document(t) for t in texts]
    assert s.tokenizer_sha256 == tok.sha256


def test_a_failed_write_leaves_the_old_set(tmp_path):
    write(tmp_path)
    with pytest.raises(ValueError, match=r"token id 60000 is outside 0 <= id < vocab_size = 60000"):
        write(tmp_path, [[1], [60_000]], shard_tokens=1)
    assert TokenShards.open(tmp_path).num_documents == len(DOCS)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["train-00000-of-00001.bin"]


def test_nothing_has_its_name_before_close(tmp_path):
    writer = ShardWriter(tmp_path, "train", vocab_size=100, shard_tokens=1)
    writer.add([1])
    writer.add([2])
    assert not list(tmp_path.glob("train*"))
    assert [p.name for p in writer.close()] == ["train-00000-of-00002.bin", "train-00001-of-00002.bin"]


def test_a_new_set_replaces_one_of_another_size(tmp_path):
    write(tmp_path, shard_tokens=1)
    assert len(list(tmp_path.iterdir())) == len(DOCS)
    assert write(tmp_path, [[1]]).num_documents == 1


def test_missing_files_are_named(tmp_path):
    with pytest.raises(CheckpointError, match="no token shards train-00000"):
        TokenShards.open(tmp_path)
    write(tmp_path, shard_tokens=1)
    (tmp_path / "train-00003-of-00005.bin").unlink()
    with pytest.raises(CheckpointError, match="missing train-00003-of-00005.bin"):
        TokenShards.open(tmp_path)
    with pytest.raises(CheckpointError, match="cannot read"):
        TokenShards([tmp_path / "train-00003-of-00005.bin"])


def test_damage_is_named(tmp_path):
    path = write(tmp_path).paths[0]
    good = path.read_bytes()
    cases = {
        "truncated token shard: ": good[:-3],
        "truncated token shard: 100 bytes": good[:100],
        "damaged token shard: ": good + b"\0",
        "not a token shard": b"PK" + good[2:],
        "damaged token shard header": good[:12] + b"[" + good[13:],
        "document index": good[:-8] + (10**6).to_bytes(8, "little"),
    }
    for message, data in cases.items():
        path.write_bytes(data)
        with pytest.raises(CheckpointError, match=message):
            TokenShards([path])


def test_other_versions_are_refused(tmp_path):
    path = write(tmp_path).paths[0]
    data = path.read_bytes()
    header = json.loads(data[12 : 12 + int.from_bytes(data[8:12], "little")]) | {"version": 2}
    encoded = json.dumps(header).encode()
    head = MAGIC + len(encoded).to_bytes(4, "little") + encoded
    path.write_bytes(head.ljust(HEADER_BYTES, b"\0") + data[HEADER_BYTES:])
    with pytest.raises(CheckpointError, match="version 2; this glmx reads version 1"):
        TokenShards([path])


def test_shards_of_two_tokenizers_do_not_mix(tmp_path):
    a = write(tmp_path / "a").paths[0]
    b = write(tmp_path / "b", [[1]], vocab_size=50).paths[0]
    with pytest.raises(CheckpointError, match="vocab_size is 50, but 60000"):
        TokenShards([a, b])
