from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from glmx.data.packing import HeldoutRows, PackedRows
from glmx.data.shards import ShardWriter, TokenShards
from glmx.errors import CheckpointError, ConfigError


def make_shards(folder, lengths, **options) -> TokenShards:
    """Every token of the set is a different number, so a token tells its place."""
    with ShardWriter(folder, "train", vocab_size=sum(lengths) + 1, **options) as w:
        at = 1
        for n in lengths:
            w.add(range(at, at + n))
            at += n
    return TokenShards.open(folder)


@pytest.fixture
def shards(tmp_path):
    return make_shards(tmp_path, [37, 1, 2, 90, 5, 64, 3, 3, 41, 200], shard_tokens=100)


def check_borders(shards, batch, *, scored=None, mtp_steps=1):
    """Every rule of a batch, from the tokens themselves: document i owns the numbers offsets[i]+1 ..
    offsets[i+1]."""
    assert batch.next_ids.shape == batch.mtp_targets.shape == (mtp_steps, batch.num_tokens)
    last = set(shards.document_offsets[1:].tolist())
    ids = batch.ids.tolist()
    cu = batch.cu_seqlens
    assert cu[0] == 0 and cu[-1] == len(ids) and all(a < b for a, b in zip(cu, cu[1:], strict=False))
    for a, b in zip(cu, cu[1:], strict=False):
        assert ids[a:b] == list(range(ids[a], ids[a] + b - a))  # consecutive, so of one place in the text
        assert not last & set(ids[a : b - 1])  # and of one document
        assert batch.positions[a:b].tolist() == list(range(b - a))
    for i, x in enumerate(ids):
        # Of the tokens ahead, those of the same document.
        ahead = [x + j if not last & set(range(x, x + j)) else -1 for j in range(1, mtp_steps + 2)]
        assert batch.next_ids[:, i].tolist() == [max(token, 0) for token in ahead[:-1]]
        if scored is None or scored[i]:
            assert [int(batch.targets[i]), *batch.mtp_targets[:, i].tolist()] == ahead


@settings(max_examples=60, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 40), min_size=1, max_size=15).filter(lambda x: sum(x) >= 40),
    seq_len=st.integers(2, 20),
    seed=st.integers(0, 5),
    mtp_steps=st.integers(1, 4),
)
def test_rows_keep_document_borders(tmp_path_factory, lengths, seq_len, seed, mtp_steps):
    shards = make_shards(tmp_path_factory.mktemp("s"), lengths)
    rows = PackedRows(shards, seq_len=seq_len, batch_rows=3, seed=seed, mtp_steps=mtp_steps)
    for _ in range(4):
        (batch,) = rows.next_step()
        assert batch.num_tokens == 3 * seq_len
        assert {seq_len, 2 * seq_len} <= set(batch.cu_seqlens)  # a segment never crosses a row
        check_borders(shards, batch, mtp_steps=mtp_steps)


def test_an_epoch_reads_each_token_once(shards):
    rows = PackedRows(shards, seq_len=16, batch_rows=1, seed=3)
    for epoch in range(3):
        assert rows.epoch == epoch or rows.row == rows.rows_per_epoch
        seen = [x for _ in range(rows.rows_per_epoch) for x in rows.next_step()[0].ids.tolist()]
        assert len(seen) == len(set(seen)) == rows.rows_per_epoch * 16
        assert shards.num_tokens - len(seen) < 2 * 16


def test_epochs_and_seeds_differ_and_repeat(shards):
    def stream(seed, steps=12):
        rows = PackedRows(shards, seq_len=16, batch_rows=4, seed=seed)
        return [rows.next_step()[0].ids.tolist() for _ in range(steps)]

    assert stream(0) == stream(0)
    assert stream(0) != stream(1)
    rows = PackedRows(shards, seq_len=16, batch_rows=1, seed=0)
    epochs = [[rows.next_step()[0].ids.tolist() for _ in range(rows.rows_per_epoch)] for _ in range(2)]
    assert epochs[0] != epochs[1]


def test_rows_of_one_document_spread_over_the_epoch(tmp_path):
    shards = make_shards(tmp_path, [400, 400, 400, 400])
    rows = PackedRows(shards, seq_len=16, batch_rows=16, seed=0)
    (batch,) = rows.next_step()
    assert len({(x - 1) // 400 for x in batch.ids.tolist()}) == 4


@settings(max_examples=25, deadline=None)
@given(steps=st.integers(0, 30), more=st.integers(1, 5))
def test_cursor_continues_exactly(tmp_path_factory, steps, more):
    shards = make_shards(tmp_path_factory.mktemp("s"), [37, 1, 90, 5, 64])
    a = PackedRows(shards, seq_len=8, batch_rows=4, micro_rows=2, seed=7)
    for _ in range(steps):
        a.next_step()
    state = json.loads(json.dumps(a.state_dict()))
    b = PackedRows(shards, seq_len=8, batch_rows=4, micro_rows=2, seed=7)
    b.load_state_dict(state)
    for _ in range(more):
        for x, y in zip(a.next_step(), b.next_step(), strict=True):
            assert x.ids.equal(y.ids) and x.targets.equal(y.targets) and x.cu_seqlens == y.cu_seqlens
    assert a.state_dict() == b.state_dict()


def test_a_cursor_of_other_data_is_refused(shards, tmp_path):
    state = PackedRows(shards, seq_len=16, batch_rows=4, seed=0).state_dict()
    with pytest.raises(CheckpointError, match="seed was 0 in the checkpoint, is 1 now"):
        PackedRows(shards, seq_len=16, batch_rows=4, seed=1).load_state_dict(state)
    other = make_shards(tmp_path / "other", [300])
    with pytest.raises(CheckpointError, match="num_tokens was 446 in the checkpoint, is 300 now"):
        PackedRows(other, seq_len=16, batch_rows=4).load_state_dict(state)


def test_the_split_does_not_change_the_rows(shards):
    def step(**split):
        rows = PackedRows(shards, seq_len=16, batch_rows=8, seed=1, **split)
        rows.next_step()
        return [b.ids for b in rows.next_step()]

    whole = step()[0].tolist()
    assert [x for b in step(micro_rows=2) for x in b.tolist()] == whole
    ranks = [x for r in range(2) for b in step(micro_rows=2, rank=r, world_size=2) for x in b.tolist()]
    assert ranks == whole
    assert len(step(micro_rows=2, rank=1, world_size=2)) == 2


def test_impossible_settings_are_refused(shards):
    for message, options in {
        "batch_rows = 6 must be a multiple": {"batch_rows": 6, "micro_rows": 4},
        "seq_len = 1": {"seq_len": 1},
        "the shards hold 446 tokens": {"seq_len": 300},
        "rank = 2": {"rank": 2, "world_size": 2},
    }.items():
        with pytest.raises(ConfigError, match=message):
            PackedRows(shards, **({"seq_len": 16, "batch_rows": 4} | options))


@settings(max_examples=60, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 60), min_size=1, max_size=10),
    seq_len=st.integers(2, 20),
    data=st.data(),
)
def test_held_out_tokens_are_scored_once(tmp_path_factory, lengths, seq_len, data):
    shards = make_shards(tmp_path_factory.mktemp("s"), lengths)
    context = data.draw(st.integers(0, seq_len - 1))
    batch_tokens = seq_len + data.draw(st.integers(0, 40))
    scored = []
    for batch in HeldoutRows(shards, seq_len=seq_len, batch_tokens=batch_tokens, context=context):
        assert batch.num_tokens <= batch_tokens
        hit = batch.ids[batch.targets >= 0].tolist()
        check_borders(shards, batch, scored=(batch.targets >= 0).tolist())
        fresh = {int(o) + 1 for o in shards.document_offsets[:-1]}
        for i in np.flatnonzero(batch.targets.numpy() >= 0):
            segment_first = max(c for c in batch.cu_seqlens if c <= i)
            before = batch.ids[segment_first:i].tolist()
            assert len(before) >= context or int(batch.ids[segment_first]) in fresh
        assert (batch.mtp_targets[:, batch.targets < 0] == -1).all()
        scored += hit
    starts = {int(o) for o in shards.document_offsets[1:]}
    assert scored == [x for x in range(1, sum(lengths) + 1) if x not in starts]


def test_every_takes_each_nth_window_of_all_of_the_text(shards):
    scored = {
        every: [(b.targets >= 0).tolist() for b in HeldoutRows(shards, seq_len=16, batch_tokens=16, every=every)]
        for every in (1, 3)
    }
    assert sum(map(sum, scored[1])) == shards.num_tokens - shards.num_documents
    assert sum(map(sum, scored[3])) < sum(map(sum, scored[1])) / 2
    with pytest.raises(ConfigError, match="every = 0"):
        HeldoutRows(shards, seq_len=16, batch_tokens=16, every=0)
