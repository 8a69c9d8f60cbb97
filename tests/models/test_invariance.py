"""X1 to X4 of the model: a sequence's bits are the same every time, whatever stands beside it, however it is cut."""

from __future__ import annotations

import random
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.threads import every_op_shared_out

from glmx import ops
from glmx.models.batch import Batch
from glmx.ops import attention
from glmx.reference.attention import key_rows
from tiny_glm import CASES, FAMILIES, random_ids, random_model, tiny_config

DTYPES = [torch.float32, torch.bfloat16]
# A GLM-5 selects 6 keys here: nearly every row of a sequence is sparse, and the first ones are not.
MODELS = {(case, dtype): random_model(tiny_config(**CASES[case]), 1, dtype) for case in FAMILIES for dtype in DTYPES}
every_model = pytest.mark.parametrize(
    "model", [pytest.param(model, id=f"{case}-{str(dtype)[6:]}") for (case, dtype), model in MODELS.items()]
)
FP32 = MODELS["qk_norm_bias", torch.float32]


def flat_logits(model, sequences):
    batch = Batch.from_lengths([len(ids) for ids in sequences])
    positions = torch.cat([torch.arange(len(ids)) for ids in sequences])
    with torch.no_grad():
        hidden = model.forward_tokens(torch.cat(sequences), positions, batch)
        z = model.mtp_hidden(hidden, torch.cat([ids.roll(-1) for ids in sequences]), positions, batch)
        both = torch.cat([model.logits(hidden), model.logits(z)], -1)
    return both.split(batch.q_lens)


@every_model
@settings(max_examples=8, deadline=None)
@given(lengths=st.lists(st.integers(0, 40), min_size=1, max_size=5), place=st.integers(0, 5), n=st.integers(1, 40))
def test_other_sequences_do_not_show(model, lengths, place, n):
    probe = random_ids(model.config, 1, n, seed=n)[0]
    others = [random_ids(model.config, 1, length, seed=1000 + length)[0] for length in lengths]
    place = min(place, len(others))
    alone = flat_logits(model, [probe])[0]
    together = flat_logits(model, [*others[:place], probe, *others[place:]])[place]
    assert torch.equal(alone, together)


@every_model
def test_a_ragged_batch_of_17(model):
    """X2 as it stands in the design: each of 17 sequences alone, and all of them together."""
    lengths = [1, 2, 5, 6, 7, 8, 13, 21, 34, 55, 63, 64, 65, 70, 0, 3, 40]
    sequences = [random_ids(model.config, 1, n, seed=n)[0] for n in lengths]
    for alone, together in zip(sequences, flat_logits(model, sequences), strict=True):
        assert torch.equal(flat_logits(model, [alone])[0], together), len(alone)


@every_model
def test_padding_does_not_show(model):
    ids = random_ids(model.config, 3, 20)
    with torch.no_grad():
        out = model(ids, lengths=[7, 20, 0], mtp=True)
        alone = model(ids[:1, :7], mtp=True)
    assert torch.equal(out.logits[0, :7], alone.logits[0]) and torch.equal(out.mtp_logits[0, :7], alone.mtp_logits[0])
    assert not out.logits[0, 7:].any() and not out.logits[2].any()
    assert not out.mtp_logits[0, 6:].any() and not out.mtp_logits[1, 19:].any()
    assert out.logits.shape == out.mtp_logits.shape == (3, 20, model.config.vocab_size)


@every_model
def test_repeats_for_any_thread_count(model):
    ids = random_ids(model.config, 3, 33)
    with torch.no_grad():
        first = model(ids).logits
        with every_op_shared_out():
            for count in (1, 2, 3):
                torch.set_num_threads(count)
                assert torch.equal(model(ids).logits, first)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", ["groups", *FAMILIES])
def test_training_mode_computes_the_same_bits(case, dtype):
    """X4's model half: what the trainer runs, with all that it measures, is what the server runs."""
    model = random_model(tiny_config(**CASES[case]), 2, dtype)
    ids = random_ids(model.config, 2, 15)
    with torch.no_grad():
        served = model(ids, mtp=True)
    model.train()
    model.collect_scores = model.collect_kl = True
    trained = model(ids, mtp=True)
    assert trained.logits.requires_grad
    assert torch.equal(trained.logits, served.logits) and torch.equal(trained.mtp_logits, served.mtp_logits)


def feed(model, state, pieces):
    """Appends each slot's tokens in one forward -> the hidden states of each."""
    seqs = sorted(pieces)
    batch = Batch(
        Batch.from_lengths([len(pieces[s]) for s in seqs]).cu_seqlens_q,
        [state.lengths[s] + len(pieces[s]) for s in seqs],
        seqs,
    )
    positions = torch.cat([torch.arange(state.lengths[s], state.lengths[s] + len(pieces[s])) for s in seqs])
    hidden = model.forward_tokens(torch.cat([pieces[s] for s in seqs]), positions, batch, state)
    return dict(zip(seqs, hidden.split(batch.q_lens), strict=True))


def serve_in_pieces(model, sequences, seed):
    """Serves the sequences side by side, cut at random: long and short chunks, single tokens, and verifications of
    K drafts with some of them rejected -> the hidden states of every token that stayed.
    """
    draw = random.Random(seed)
    state = model.new_state(len(sequences), max(map(len, sequences)) + 8)
    kept = [[] for _ in sequences]
    for _ in sequences:
        state.allocate()
    while any(state.lengths[i] < len(ids) for i, ids in enumerate(sequences)):
        pieces, accepted = {}, {}
        for i, ids in enumerate(sequences):
            at = state.lengths[i]
            left = len(ids) - at
            if left == 0 or draw.random() < 0.2:
                continue
            n = min(left, draw.choice([1, 1, 1, 2, 3, 7, 30, 64, 65, 100]))
            drafts = draw.choice([0, 0, 2, 4])  # tokens that will turn out wrong
            wrong = random_ids(model.config, 1, drafts, seed=draw.randrange(10**6))[0]
            pieces[i], accepted[i] = torch.cat([ids[at : at + n], wrong]), n
        if not pieces:
            continue
        for i, hidden in feed(model, state, pieces).items():
            kept[i].append(hidden[: accepted[i]])
            state.truncate(i, state.lengths[i] - (len(pieces[i]) - accepted[i]))
    return [torch.cat(parts) for parts in kept]


def check_chunk_invariance(model, lengths, seed):
    sequences = [random_ids(model.config, 1, n, seed=seed + n)[0] for n in lengths]
    with torch.no_grad():
        served = serve_in_pieces(model, sequences, seed)
    positions = torch.cat([torch.arange(n) for n in lengths])
    model.train()  # the trainer's own forward
    trained = model.forward_tokens(torch.cat(sequences), positions, Batch.from_lengths(lengths)).detach()
    model.eval()
    W = model.lm_head.weight.detach()
    for ids, mine, theirs in zip(sequences, served, trained.split(lengths), strict=True):
        assert torch.equal(mine, theirs), "hidden states differ"
        assert torch.equal(model.logits(mine), model.logits(theirs))
        one_by_one = torch.cat(
            [ops.lm_head_logprob(mine[t : t + 1], W, ids[t : t + 1]).logprob for t in range(len(ids))]
        )
        assert torch.equal(one_by_one, ops.lm_head_logprob(theirs, W, ids).logprob)


@every_model
@settings(max_examples=12, deadline=None)
@given(lengths=st.lists(st.integers(1, 150), min_size=1, max_size=3), seed=st.integers(0, 10**6))
def test_any_chunking_gives_the_trainers_bits(model, lengths, seed):
    """X3 and X4: prefill, chunks, single tokens, and verification with rollback, against the trainer's forward."""
    check_chunk_invariance(model, lengths, seed)


@every_model
@settings(max_examples=6, deadline=None)
@given(n=st.integers(2, 100), seed=st.integers(0, 10**6))
def test_any_chunking_of_the_mtp_layer(model, n, seed):
    """X3 of the MTP layer's own cache: in pieces, some of them taken back and done again."""
    draw, ids = random.Random(seed), random_ids(model.config, 1, n + 1, seed=seed)[0]
    positions, whole = torch.arange(n), Batch.from_lengths([n])
    with torch.no_grad():
        hidden = model.forward_tokens(ids[:n], positions, whole)
        expected = model.mtp_hidden(hidden, ids[1:], positions, whole)
        state = model.new_state(1, n + 1)
        model.forward_tokens(ids, torch.arange(n + 1), Batch([0, n + 1], [n + 1], [0]), state)
        rows: list[torch.Tensor] = []
        while len(rows) < n:
            begin = len(rows)
            end = min(n, begin + draw.choice([1, 1, 2, 5, 30, 64]))
            batch = Batch([0, end - begin], [end], [0])
            rows += model.mtp_hidden(
                hidden[begin:end], ids[begin + 1 : end + 1], positions[begin:end], batch, state
            ).unbind()
            if draw.random() < 0.3:
                kept = draw.randrange(begin, end + 1)
                state.truncate(0, kept + 1)
                if kept < n:
                    again = Batch([0, n - kept], [n + 1], [0])
                    model.forward_tokens(ids[kept + 1 :], torch.arange(kept + 1, n + 1), again, state)
                del rows[kept:]
    assert torch.equal(torch.stack(rows), expected)


def split_keys(q, k, v, cu_seqlens_q, seq_lens, *, cu_seqlens_k=None, block_table=None):
    """What fast decoding does elsewhere: a single query token's keys are cut in two, and the halves are combined."""
    out = []
    for i, n in enumerate(seq_lens.tolist()):
        rows = key_rows(i, n, cu_seqlens_k, block_table)
        mine = q[cu_seqlens_q[i] : cu_seqlens_q[i + 1]]
        cuts = [rows] if len(mine) > 1 or n < 2 else [rows[: n // 2], rows[n // 2 :]]
        halves = []
        for cut in cuts:
            bounds = [torch.tensor([0, x], dtype=torch.int32) for x in (len(mine), len(cut))]
            lens = bounds[1][1:]
            halves.append(attention(mine, k[cut], v[cut], bounds[0], lens, cu_seqlens_k=bounds[1], return_lse=True))
        share = torch.stack([half.lse for half in halves]).softmax(0)[..., None]
        out.append((share * torch.stack([half.out for half in halves])).sum(0).to(q.dtype))
    return torch.cat(out)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_kernel_that_is_not_invariant_is_caught(dtype, monkeypatch):
    monkeypatch.setattr(ops, "attention", split_keys)
    with pytest.raises(AssertionError, match="hidden states differ"):
        for seed in range(6):
            check_chunk_invariance(MODELS["qk_norm_bias", dtype], [130, 40], seed)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_selection_that_is_not_invariant_is_caught(dtype, monkeypatch):
    """An indexer that sees one key less when it decodes a single token: selections differ, and it must show."""
    select = ops.indexer_topk

    def nearsighted(q, weights, k, cu_seqlens_q, seq_lens, top_k, **keys):
        lists = select(q, weights, k, cu_seqlens_q, seq_lens, top_k, **keys)
        for first, end in pairwise(cu_seqlens_q.tolist()):
            if end - first == 1 and lists[first, -1] >= 0:
                lists[first] = torch.cat([lists[first, 1:], lists.new_tensor([-1])])
        return lists

    monkeypatch.setattr(ops, "indexer_topk", nearsighted)
    with pytest.raises(AssertionError, match="hidden states differ"):
        for seed in range(6):
            check_chunk_invariance(MODELS["dsa_shared", dtype], [130, 40], seed)


def test_logits_to_keep():
    model = FP32
    ids = random_ids(model.config, 3, 9)
    with torch.no_grad():
        full = model(ids).logits
        assert torch.equal(model(ids, logits_to_keep=2).logits, full[:, -2:])
        assert torch.equal(model(ids, logits_to_keep=50).logits[:, -9:], full)
        kept = model(ids, lengths=[2, 9, 0], logits_to_keep=3).logits
    assert torch.equal(kept[1], full[1, 6:]) and not kept[2].any()
    assert torch.equal(kept[0, 1:], full[0, :2]) and not kept[0, 0].any()


@pytest.mark.parametrize(
    "call, words",
    [
        (lambda m: m(torch.zeros(3).long()), r"int64 \[3\], expected int64 \[B, T\]"),
        (lambda m: m(torch.zeros(1, 3)), "float32"),
        (lambda m: m(torch.zeros(1, 3).long(), lengths=[4]), r"0\.\.3"),
        (lambda m: m(torch.zeros(1, 3).long(), lengths=[1, 2]), "expected 1 values"),
        (lambda m: m(torch.zeros(1, 3).long(), logits_to_keep=-1), "logits_to_keep is -1"),
        (lambda m: m(torch.zeros(1, 3).long(), state=m.new_state(1, 4), mtp=True), "mtp=True"),
        (lambda m: m.forward_tokens(torch.zeros(2).long(), torch.zeros(2), Batch([0, 2])), "positions_T"),
        (lambda m: m.forward_tokens(torch.zeros(2).long(), torch.zeros(2).long(), Batch([0, 3])), "2 rows"),
    ],
)
def test_bad_arguments(call, words):
    with pytest.raises(ValueError, match=words):
        call(FP32)
