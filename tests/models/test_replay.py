"""Recorded forwards: their bits are those of ordinary ones, and what cannot be recorded is not."""

from __future__ import annotations

import logging
import random
import threading

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from glmx import ops
from glmx.layers.dsa import Selection
from glmx.layers.moe import MoE
from glmx.models import replay as replay_module
from glmx.models.batch import Batch
from glmx.models.recorder import Pool, RefusedError, is_free, record
from glmx.models.replay import Replay, Rules
from tiny_glm import CASES, FAMILIES, random_ids, random_model, tiny_config

DTYPES = [torch.float32, torch.bfloat16]
SLOTS, MAX_TOKENS = 4, 300


@pytest.fixture(autouse=True)
def no_grad():
    with torch.no_grad():
        yield


class Pair:
    """A state that is served by recordings, and its twin, served by plain forwards."""

    def __init__(self, model):
        self.model = model
        self.state, self.twin = (model.new_state(SLOTS, MAX_TOKENS) for _ in range(2))
        self.replay = Replay(model, self.state)

    def both(self, call):
        results = call(self.state), call(self.twin)
        assert results[0] == results[1]
        return results[0]

    def forward(self, new, rules=None):
        """One step of each slot in `new` -> the hidden states of all rows."""
        slots = sorted(new)
        ids = [new[s] for s in slots]
        hidden, logits, drawn = self.replay.forward(slots, ids, rules)
        batch = self.batch(slots, ids, self.twin.lengths)
        positions = self.positions(slots, ids, self.twin.lengths)
        expected = self.model.forward_tokens(torch.tensor(sum(ids, [])), positions, batch, self.twin)
        assert torch.equal(hidden, expected) and torch.equal(logits, self.model.logits(expected))
        self.check_drawn(drawn, logits, rules, ids)
        assert self.state.lengths == self.twin.lengths
        return expected

    @staticmethod
    def check_drawn(drawn, logits, rules, drafted=None):
        if rules is None:
            assert drawn is None
            return
        longs, floats = torch.tensor(rules.longs).view(3, -1), torch.tensor(rules.floats).view(3, -1)
        columns = dict(zip(replay_module.RULES, [*longs, *floats], strict=True))
        expected = ops.sample(logits, **columns)
        for ids, tokens in zip(drafted, expected.split([len(ids) for ids in drafted]), strict=True) if drafted else ():
            wrong = [j for j, token in enumerate(tokens[:-1].tolist()) if ids[j + 1] != token]
            tokens[wrong[0] + 1 if wrong else len(ids) :] = -1
        assert torch.equal(drawn, expected)

    def draft(self, slots, rows, ids, lists=None, rules=None):
        """One MTP step -> the hidden states and lists of each slot's last row."""
        out = self.replay.draft(slots, rows, ids, lists, rules)
        batch = self.batch(slots, ids, self.twin.mtp_lengths)
        positions = self.positions(slots, ids, self.twin.mtp_lengths)
        given = None if lists is None else Selection(lists)
        expected = self.model.mtp_step(rows, torch.tensor(sum(ids, [])), positions, batch, self.twin, given)
        last = torch.tensor(batch.cu_seqlens_q[1:]) - 1
        assert torch.equal(out.hidden, expected.hidden[last])
        assert torch.equal(out.logits, self.model.logits(expected.hidden[last]))
        self.check_drawn(out.ids, out.logits, rules)
        assert self.state.mtp_lengths == self.twin.mtp_lengths
        return out.hidden.clone(), None if out.topk_indices is None else out.topk_indices.clone()

    @staticmethod
    def batch(slots, ids, lengths):
        rows = Batch.from_lengths(list(map(len, ids))).cu_seqlens_q
        return Batch(rows, [lengths[s] + len(i) for s, i in zip(slots, ids, strict=True)], slots)

    @staticmethod
    def positions(slots, ids, lengths):
        return torch.cat([torch.arange(lengths[s], lengths[s] + len(i)) for s, i in zip(slots, ids, strict=True)])


def drawn_rules(draw, rows):
    """Rules of `rows` rows, of each kind."""
    longs = [[draw.randrange(-(2**63), 2**63)] * rows, range(rows), [draw.choice([0, 1, 5])] * rows]
    temperature, top_p = draw.choice([(0.0, 1.0), (1.0, 1.0), (0.7, 0.9)])
    return Rules([i for column in longs for i in column], [temperature] * rows + [top_p] * rows + [0.01] * rows)


def tokens(draw, model, n):
    return [draw.randrange(model.config.vocab_size) for _ in range(n)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", [*FAMILIES, "dsa_wide", "groups", "tied"])
def test_the_bits_are_those_of_plain_forwards(case, dtype):
    """Ragged batches with and without drafts, over page boundaries, behind truncate, fork and free; what the memory of
    recordings holds in between does not matter.
    """
    model, draw = random_model(tiny_config(**CASES[case]), 1, dtype), random.Random(case)
    pair = Pair(model)
    live = {pair.both(lambda s: s.allocate()): 0 for _ in range(3)}
    for step in range(240):
        for block in pair.replay._pool.blocks:
            if is_free(block):
                block.fill_(255)  # NaN of any dtype, ids outside of every table
        chosen = sorted(draw.sample(sorted(live), draw.randint(1, len(live))))
        new = {s: tokens(draw, model, draw.choice([1, 1, 1, 2, 3, 4])) for s in chosen}
        pair.forward(new, drawn_rules(draw, sum(map(len, new.values()))) if step % 3 else None)
        for s in chosen:
            if draw.random() < 0.5:
                cut = max(pair.state.lengths[s] - draw.randint(0, 3), 1)
                pair.both(lambda state, s=s, cut=cut: state.truncate(s, cut))
            if pair.state.lengths[s] > MAX_TOKENS - 5 or draw.random() < 0.01:
                pair.both(lambda state, s=s: state.free(s))
                del live[s]
        if step % 30 == 29 and len(live) < SLOTS:
            source = draw.choice(sorted(live)) if live else None
            live[pair.both(lambda s, source=source: s.allocate() if source is None else s.fork(source))] = 0
        if not live:
            live[pair.both(lambda s: s.allocate())] = 0
    assert pair.replay.replays > 60 and max(pair.state.lengths) > 128


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", [*FAMILIES, "dsa"])
def test_drafts_are_those_of_plain_mtp_steps(case, dtype):
    """Rows of several tokens for each sequence, then steps of one, with the first one's keys, which are taken back."""
    model, draw = random_model(tiny_config(**CASES[case]), 2, dtype), random.Random(case)
    pair = Pair(model)
    slots = [pair.both(lambda s: s.allocate()) for _ in range(3)]
    for _ in range(40):
        new = {s: tokens(draw, model, draw.randint(1, 3)) for s in slots}
        rows = pair.forward(new)
        ids = [[*new[s][1:], draw.randrange(model.config.vocab_size)] for s in slots]
        hidden, lists = pair.draft(slots, rows, ids)
        if not model.config.index_share_for_mtp_iteration:
            lists = None
        before = list(pair.state.mtp_lengths)
        for _ in range(2):
            ids = [[draw.randrange(model.config.vocab_size)] for _ in slots]
            hidden, _ = pair.draft(slots, hidden, ids, lists, drawn_rules(draw, len(slots)))
        for s in slots:
            pair.both(lambda state, s=s, length=before[s]: state.truncate_mtp(s, length))
    assert pair.replay.replays > 80


def test_a_primed_cache_is_that_of_plain_mtp_steps():
    model, draw = random_model(tiny_config(), 3), random.Random(0)
    pair = Pair(model)
    slot = pair.both(lambda s: s.allocate())
    for _ in range(6):
        new = tokens(draw, model, 4)
        rows = pair.forward({slot: new})
        pair.replay.prime(slot, rows[:3], new[1:])
        lengths = pair.twin.mtp_lengths
        batch, positions = pair.batch([slot], [new[1:]], lengths), pair.positions([slot], [new[1:]], lengths)
        model.mtp_step(rows[:3], torch.tensor(new[1:]), positions, batch, pair.twin)
        pair.draft([slot], rows[3:], [tokens(draw, model, 1)])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "function",
    [
        lambda x, y, rows: torch.cat([x, y], -1),
        lambda x, y, rows: torch.cat([x[:, :3], y[:2, 1:4], x[1:, 5:]]),
        lambda x, y, rows: torch.cat([x[:, None, ::2], y[:, None, 1::2]], 1),
        lambda x, y, rows: x[:, 2:5].contiguous(),
        lambda x, y, rows: x.view(3, 4, 2).transpose(0, 2).reshape(6, 4),
        lambda x, y, rows: x[:2].clone(),
        lambda x, y, rows: x[rows],
        lambda x, y, rows: x + y,
        lambda x, y, rows: x.contiguous() + (y + x),
        lambda x, y, rows: (x[0] + y[1])[None],
    ],
)
def test_loops_do_what_torch_does(function, dtype):
    """Contents change between recording and replay; values of every size, infinite ones and denormals among them."""
    values = torch.randn(2, 3, 8, generator=torch.Generator().manual_seed(0))
    values *= torch.tensor([1e-40, 1e-38, 1e-3, 1.0, 1.0, 3.0, 1e38, 3e38])
    x, y = torch.zeros(3, 8, dtype=dtype), torch.zeros(3, 8, dtype=dtype)
    rows = torch.tensor([0, 0, 0])
    recorded = record(lambda: function(x, y, rows), Pool())
    assert recorded.size >= 1
    for _ in range(2):
        x.copy_(values[0]), y.copy_(values[1]), rows.copy_(torch.tensor([2, 0, 2]))
        recorded.replay()
        mine, torchs = recorded.result, function(x, y, rows)
        assert torch.equal(mine.isnan(), torchs.isnan()) and torch.equal(mine.nan_to_num(), torchs.nan_to_num())
        values = values.flip(1)


def test_scale_does_what_torch_does():
    x = torch.zeros(5, 7)
    recorded = record(lambda: x * 0.1, Pool())
    x.copy_(torch.randn(5, 7, generator=torch.Generator().manual_seed(0)))
    recorded.replay()
    assert torch.equal(recorded.result, x * 0.1)


@pytest.mark.parametrize(
    "function, words",
    [
        (lambda x, rows: x.relu(), "aten::relu is neither a view"),
        (lambda x, rows: x + torch.tensor([1.0] * 8), "aten::lift_fresh"),
        (lambda x, rows: x + 1.0, "aten::add of these"),
        (lambda x, rows: x[rows, rows], "aten::index of these"),
        (lambda x, rows: x.zero_(), "aten::zero_"),
        (lambda x, rows: x * x, "aten::mul of these"),
        (lambda x, rows: x * float(x[0, 0]), "aten::_local_scalar_dense"),
        (lambda x, rows: torch.zeros(2) if x.shape[0] else x, "aten::zeros"),
        (lambda x, rows: torch.cat([x.bfloat16(), x]), "aten::_to_copy"),
        (lambda x, rows: torch.cat([x, x.double()]), "aten::_to_copy"),
        (lambda x, rows: ops.lm_head_logprob(x, x, rows[:3]).logprob, "1 ops were called, 0 of them"),
    ],
)
def test_what_cannot_be_recorded_is_refused_and_computed(function, words):
    x, rows = torch.ones(3, 8), torch.tensor([0, 2, 1])
    with pytest.raises(RefusedError, match=words) as refused:
        record(lambda: function(x, rows), Pool())
    assert torch.equal(refused.value.result, function(x, rows))


def test_a_recording_sees_whether_what_it_watches_has_moved():
    x, weight, other = torch.ones(3, 8), torch.ones(8), torch.ones(2)
    recorded = record(lambda: ops.rms_norm(x, weight, 1e-5), Pool(), [weight, other])
    x.copy_(torch.arange(24.0).view(3, 8))
    weight.mul_(2)
    assert recorded.replay() and torch.equal(recorded.result, ops.rms_norm(x, weight, 1e-5))
    other.data = other.data.clone()
    before = recorded.result.clone()
    x.zero_()
    assert not recorded.replay() and torch.equal(recorded.result, before)
    with pytest.raises(RuntimeError, match="watch: expected a recording in progress: got none"):
        torch.ops.glmx.watch([weight])


def test_another_threads_ops_are_not_recorded():
    x, weight = torch.ones(3, 8), torch.ones(8)

    def both():
        other = threading.Thread(target=ops.rms_norm, args=(x, weight, 1e-5))
        other.start()
        other.join()
        return ops.rms_norm(x, weight, 1e-5)

    assert record(both, Pool()).size == 1


def steps(pair, slot, n, seed=0):
    draw = random.Random(seed)
    for _ in range(n):
        pair.forward({slot: tokens(draw, pair.model, 1)})


def test_a_refused_forward_is_logged_once_and_computed(monkeypatch, caplog):
    forward = MoE.forward
    monkeypatch.setattr(MoE, "forward", lambda self, x_TH: forward(self, x_TH).abs().neg())
    pair = Pair(random_model(tiny_config(), 4))
    slot = pair.both(lambda s: s.allocate())
    with caplog.at_level(logging.WARNING):
        steps(pair, slot, 8)
    assert pair.replay.replays == 0 and len(caplog.records) == 1
    assert "('decoder', 1, 1, 1) are not recorded: aten::abs is neither" in caplog.text


def test_weights_that_change_are_seen(caplog):
    """In place at once; moved ones by new recordings, whichever way they were moved."""
    model = random_model(tiny_config(), 5)
    pair = Pair(model)
    slot = pair.both(lambda s: s.allocate())
    steps(pair, slot, 4)
    layer = model.model.layers[1]
    for change in (
        lambda: layer.mlp.experts.down_proj.mul_(0.5),
        lambda: setattr(layer.mlp.experts.down_proj, "data", layer.mlp.experts.down_proj.data * 2),
        lambda: setattr(layer.input_layernorm, "weight", torch.nn.Parameter(layer.input_layernorm.weight * 2)),
        lambda: setattr(layer.mlp.gate, "e_score_correction_bias", layer.mlp.gate.e_score_correction_bias.flip(0)),
    ):
        change()
        before = pair.replay.replays
        steps(pair, slot, 4, seed=1)
        assert pair.replay.replays >= before + 2
    with caplog.at_level(logging.INFO):
        model.lm_head.weight.data = model.lm_head.weight.data.clone()
        steps(pair, slot, 1)
    assert "weights have moved: 1 recordings are dropped" in caplog.text


def test_nothing_is_replayed_where_a_forward_is_watched():
    model = random_model(tiny_config(**CASES["dsa"]), 6)
    pair, seen = Pair(model), []
    slot = pair.both(lambda s: s.allocate())
    steps(pair, slot, 12)
    before = pair.replay.replays
    hook = model.model.layers[2].mlp.register_forward_hook(lambda *_: seen.append("hook"))
    steps(pair, slot, 1)
    hook.remove()
    model.model.layers[0].self_attn.observer = lambda *_: seen.append("observer")
    steps(pair, slot, 1)
    model.model.layers[0].self_attn.observer = None
    model.train()
    pair.replay.forward([slot], [[1]])
    model.eval()
    assert pair.replay.replays == before and seen == ["hook"] * 2 + ["observer"] * 2
    assert model.router_stats(), "training forwards keep their statistics"
    pair.both(lambda s: s.truncate(slot, 12))
    steps(pair, slot, 1)
    assert pair.replay.replays == before + 1


def test_an_error_in_a_replay_counts_no_tokens():
    pair = Pair(random_model(tiny_config(), 7))
    slot = pair.both(lambda s: s.allocate())
    steps(pair, slot, 4)
    with pytest.raises(ValueError, match="embedding: ids: expected 0 <= id < 96"):
        pair.replay.forward([slot], [[96]])
    assert pair.state.lengths[slot] == 4
    steps(pair, slot, 4)
    with pytest.raises(ValueError, match=f"would have {MAX_TOKENS + 1} tokens"):
        pair.replay.forward([slot], [[1] * (MAX_TOKENS - 7)])


def test_few_recordings_are_kept(monkeypatch):
    monkeypatch.setattr(replay_module, "MAX_RECORDINGS", 2)
    model = random_model(tiny_config(), 8)
    pair = Pair(model)
    slots = [pair.both(lambda s: s.allocate()) for _ in range(3)]
    for n in (1, 2, 3, 1, 2, 3):
        for _ in range(3):
            pair.forward({s: [5] for s in slots[:n]})
    assert [key[1] for key in pair.replay._recorded] == [2, 3] and pair.replay.replays >= 6
    assert pair.replay.replays + pair.replay.preparations == 18
    kept = pair.replay.nbytes
    monkeypatch.setattr(replay_module, "MAX_BYTES", kept // 2)
    for _ in range(3):
        pair.forward({slots[0]: [5, 6]})
    assert len(pair.replay._recorded) == 1 and pair.replay.nbytes < kept


def test_wide_forwards_are_not_recorded():
    pair = Pair(random_model(tiny_config(), 9))
    slot = pair.both(lambda s: s.allocate())
    for _ in range(3):
        pair.forward({slot: [1] * (replay_module.MAX_ROWS + 1)})
    assert not pair.replay._recorded and not pair.replay._seen


def test_layers_share_their_memory():
    """Twice the layers take no more than the few tensors that are alive at once."""
    sizes = []
    for layers in (2, 8):
        pair = Pair(random_model(tiny_config(num_hidden_layers=layers), 10))
        steps(pair, pair.both(lambda s: s.allocate()), 3)
        sizes.append(pair.replay.nbytes)
    assert sizes[0] == sizes[1] > 0


@pytest.mark.parametrize("case", FAMILIES)
def test_the_experts_of_a_layer_are_one_call_of_a_recording(case):
    class Names(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.append(func._schema.name)
            return func(*args, **(kwargs or {}))

    model, seen = random_model(tiny_config(**CASES[case]), 12), []
    pair = Pair(model)
    slot = pair.both(lambda s: s.allocate())
    steps(pair, slot, 1)
    with Names():
        pair.replay.forward([slot], [[1]])
    experts = sum(isinstance(layer.mlp, MoE) for layer in model.model.layers[: model.config.num_hidden_layers])
    assert len(pair.replay._recorded) == 1 and seen.count("glmx::moe_mlp") == experts > 1
    assert not {"glmx::expert_plan", "glmx::moe_combine"} & set(seen)


def test_off_means_off():
    model = random_model(tiny_config(), 11)
    state = model.new_state(1, 20)
    replay = Replay(model, state, enabled=False)
    ids = random_ids(model.config, 1, 10)
    state.allocate()
    rows = [replay.forward([0], [[i]])[1] for i in ids[0].tolist()]
    assert torch.equal(torch.cat(rows), model(ids).logits[0]) and not replay._recorded and not replay._seen
