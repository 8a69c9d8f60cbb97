"""Speculative decoding gives the results of plain decoding, whatever the drafts, their number and the batch."""

from __future__ import annotations

import asyncio
import dataclasses
import functools
import json
import random
import re

import httpx
import pytest
import torch

import glmx
from glmx import ops
from glmx.cli import main as cli
from glmx.data import tokenizer as tokenizers
from glmx.errors import UnsupportedError
from glmx.layers.dsa import Selection
from glmx.models import checkpoint
from glmx.models.batch import Batch
from glmx.serve import drafts as drafts_module
from glmx.serve import engine as engine_module
from glmx.serve.app import Api
from glmx.serve.speculation import Speculation
from glmx.serve.worker import Worker
from tiny_glm import CASES, FAMILIES, random_ids, random_model, tiny_config

TEXT = "def add(first, second):\n    return first + second\n\n\nclass Café:\n    pass\n" * 4
SLOTS = 3


def agreeing_model(config, seed, share):
    """The decoder's layers and the MTP layer's block add a `share` of theirs to an embedding.

    So the MTP layer, which sees the embedding that the decoder will see next, is often right where they add little.
    """
    model, H = random_model(config, seed), config.hidden_size
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if name.endswith(("o_proj.weight", "down_proj.weight", "down_proj")):
                tensor.mul_(share)
            if name.endswith("eh_proj.weight"):
                tensor.copy_(torch.cat([torch.eye(H), share * torch.eye(H)], 1))
            if name == "lm_head.weight":
                tensor.mul_(4)  # clear favourites, so that sampled drafts are right now and then
    return model


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    """The checkpoint of a case and a share."""
    base = tmp_path_factory.mktemp("drafts")
    tokenizer = tokenizers.train([TEXT], 300)
    tokenizer.save(base / "tokenizer")
    sizes = {"vocab_size": 304, "eos_token_id": tokenizer.eos_ids, "max_position_embeddings": 160}

    @functools.cache
    def of(case, share):
        model = agreeing_model(tiny_config(**CASES[case], **sizes), 1, share)
        return checkpoint.save(model, base / f"{case}-{share}", tokenizer_files_from=base / "tokenizer")

    return of


@pytest.fixture(scope="module")
def open_llm(directory):
    def opened(case=FAMILIES[0], speculation=None, share=0.07, **options):
        llm = glmx.LLM(directory(case, share), **{"max_num_seqs": SLOTS, **options})
        llm.engine.speculation = speculation
        return llm

    return opened


@pytest.fixture(scope="module")
def plain(open_llm):
    """Of each family: an LLM that makes no drafts."""
    return {case: open_llm(case) for case in FAMILIES}


class Recorded(Speculation):
    """Keeps what every step drafted and accepted: (drafted, accepted) of each of its sequences."""

    def __init__(self, limit, adaptive=False):
        super().__init__(limit, adaptive)
        self.steps = []

    def observe(self, tracks, drafted, accepted):
        self.steps.append(list(zip(drafted, accepted, strict=True)))
        super().observe(tracks, drafted, accepted)

    def seen(self, wanted):
        return sum(wanted(*pair) for step in self.steps for pair in step if pair[0])


class Whim(Recorded):
    """Another number of drafts for every sequence and step, and now and then none for a while."""

    def __init__(self, limit, seed):
        super().__init__(limit)
        self.random = random.Random(seed)

    def counts(self, tracks, rooms):
        if len(self.steps) % 30 < 20:
            return [0] * len(rooms)
        return [self.random.choice([0, 0, *range(min(room, self.limit) + 1)]) for room in rooms]


def prompts(llm, lengths):
    return [random_ids(llm.model.config, 1, n, seed=n)[0].tolist() for n in lengths]


def params(**changes):
    return glmx.SamplingParams(**{"temperature": 0, "max_tokens": 40, "ignore_eos": True, "seed": 7, **changes})


def outputs(llm, asked, each):
    return [out.outputs[0] for out in llm.generate(asked, each)]


def test_what_is_not_kept_up_begins_anew(open_llm, plain, monkeypatch):
    """Without hope the MTP layer sees the last rows alone; texts are the same, and drafts still hit."""
    monkeypatch.setattr(engine_module, "MAX_HELD", 8)
    monkeypatch.setattr(engine_module, "KEPT", 4)
    for case in FAMILIES:
        whim = Whim(3, seed=1)
        whim.hopeful = lambda track: False
        llm, starts = open_llm(case, whim), []
        widths = []
        llm.engine.replay.enabled = False  # every step is to be seen
        step = llm.model.mtp_trunk

        def recorded(rows, *args, step=step, widths=widths, llm=llm, starts=starts):
            widths.append(len(rows))
            starts.extend(request.mtp_start for request in llm.engine.running)
            return step(rows, *args)

        monkeypatch.setattr(llm.model, "mtp_trunk", recorded)
        begun, draft = [], llm.engine._drafter.draft

        def looked_at(requests, counts, llm=llm, begun=begun, draft=draft):
            # Who begins anew begins with the hidden state of the last token in the cache.
            for request, count in zip(requests, counts, strict=True):
                if count and len(request.held_rows()) == 1:
                    ids = torch.tensor(request.tokens_from(0)[:-1])
                    whole = Batch.from_lengths([len(ids)])
                    begun.append(llm.model.forward_tokens(ids, torch.arange(len(ids)), whole)[-1:])
                    assert torch.equal(request.held_rows(), begun[-1])
            return draft(requests, counts)

        monkeypatch.setattr(llm.engine._drafter, "draft", looked_at)
        asked, each = prompts(llm, [30, 5, 60]), [params(max_tokens=40, temperature=0.3, seed=s) for s in range(3)]
        assert outputs(llm, asked, each) == outputs(plain[case], asked, each)
        assert max(starts) >= 56 and max(widths) <= 3 * (8 + 4), "prompts are taken in"
        assert llm.speculation.num_accepted_tokens > 5 and len(begun) > 5 and is_empty(llm.engine)


def test_rules_of_a_history_see_the_drafts_before_them(open_llm, plain):
    """Penalties count what a step itself has drafted: short texts that repeat, with and without rules."""
    recorded = Recorded(4)
    llm = open_llm(speculation=recorded)
    asked = prompts(llm, [3, 17, 70, 1])
    each = [params(temperature=0.7, seed=s) for s in range(4)]
    each[0] = dataclasses.replace(each[0], presence_penalty=0.5, frequency_penalty=0.3)
    each[1] = dataclasses.replace(each[1], logit_bias={5: 3.0, 9: 2.0}, min_p=0.01)
    each[3] = dataclasses.replace(each[3], repetition_penalty=1.1, logit_bias={7: 4.0})
    assert outputs(llm, asked, each) == outputs(plain[FAMILIES[0]], asked, each)
    assert recorded.seen(lambda d, a: a >= 2) >= 10


def is_empty(engine):
    state = engine.state
    return not engine.has_work and not any(state.lengths + state.mtp_lengths) and not state.pages.in_use


@pytest.mark.parametrize("temperature", [0, 1.0])
@pytest.mark.parametrize("case", FAMILIES)
def test_results_are_those_of_plain_decoding(open_llm, plain, case, temperature):
    """Tokens, texts and log-probs of more requests than slots, with no, some and all drafts right many times each."""
    recorded = Recorded(4)
    llm = open_llm(case, recorded)
    asked = prompts(llm, [3, 17, 70, 1, 29, 8])
    each = [
        params(temperature=temperature, seed=s, logprobs=2 if s % 2 else None, max_tokens=80 - 3 * s) for s in range(6)
    ]
    each[4] = dataclasses.replace(each[4], top_k=20, top_p=0.9)
    assert outputs(llm, asked, each) == outputs(plain[case], asked, each)
    assert is_empty(llm.engine)
    outcomes = (lambda d, a: a == 0, lambda d, a: 0 < a < d, lambda d, a: a == d)
    none, some, every = (recorded.seen(wanted) for wanted in outcomes)
    assert min(none, some, every) >= 10, (none, some, every)
    counters = llm.engine.speculation.counters
    assert counters.num_drafts == recorded.seen(lambda d, a: True)
    for j in range(4):
        assert counters.num_draft_tokens_per_pos[j] == recorded.seen(lambda d, a, j=j: d > j)
        assert counters.num_accepted_tokens_per_pos[j] == recorded.seen(lambda d, a, j=j: a > j)


def drafts_of_the_whole(model, ids, count, request):
    """The drafts behind `ids`, from forwards over the whole sequence, without any cache."""
    n = len(ids)
    positions = torch.arange(n - 1 + count)
    with torch.no_grad():
        rows = model.forward_tokens(torch.tensor(ids), torch.arange(n), Batch.from_lengths([n]))[: n - 1]
        next_ids, lists, found = list(ids[1:]), None, []
        for _ in range(count):
            T = len(rows)
            given = None if lists is None else Selection(torch.cat([lists, lists[-1:].expand(T - len(lists), -1)]))
            whole = Batch.from_lengths([T])
            out = model.mtp_step(rows, torch.tensor(next_ids), positions[:T], whole, selection=given)
            if lists is None and model.config.index_share_for_mtp_iteration:
                lists = out.selection.topk_indices
            one = request.params
            found += ops.sample(
                model.logits(out.hidden[-1:]),
                seeds=request.seed,
                positions=n + len(found),
                temperature=one.temperature,
                top_k=one.top_k,
                top_p=one.top_p,
            ).tolist()
            rows, next_ids = torch.cat([rows, out.hidden[-1:]]), [*next_ids, found[-1]]
    return found


@pytest.mark.parametrize("held", [2, 64])
@pytest.mark.parametrize("case", [*FAMILIES, "dsa"])
def test_drafts_are_those_of_a_forward_over_everything(open_llm, case, held, monkeypatch):
    """The MTP layer's cache: primed over prompts in pieces, behind steps without drafts, and rolled back each time.
    No forward of either exceeds max_num_batched_tokens, and sequences with and without drafts share them.
    """
    monkeypatch.setattr(engine_module, "MAX_HELD", held)
    whim = Whim(3, seed=held)
    llm, reference = open_llm(case, whim, share=0.5, max_num_batched_tokens=9), open_llm(case, share=0.5)
    llm.engine.replay.enabled = False
    widths, made = [], []
    for name in ("trunk", "mtp_trunk"):
        function = getattr(llm.model, name)

        def recorded(rows, *args, function=function):
            widths.append(len(rows))
            return function(rows, *args)

        monkeypatch.setattr(llm.model, name, recorded)
    draft = drafts_module.Drafter.draft

    def kept(drafter, requests, counts):
        drafts = draft(drafter, requests, counts)
        made.extend((r, [*r.prompt_token_ids, *r.token_ids], d) for r, d in zip(requests, drafts, strict=True))
        return drafts

    monkeypatch.setattr(drafts_module.Drafter, "draft", kept)
    asked = prompts(llm, [5, 40, 20])
    each = [params(max_tokens=50, temperature=0.8, top_k=9), params(max_tokens=60), params(max_tokens=25)]
    found = outputs(llm, asked, each)
    monkeypatch.undo()
    assert max(widths) <= 9 and found == outputs(reference, asked, each)
    assert any(len({bool(drafted) for drafted, _ in step}) == 2 for step in whim.steps), "no mixed batch"
    assert sum(len(drafts) == 3 for *_, drafts in made) > 3
    for request, ids, drafts in made:
        assert drafts == drafts_of_the_whole(reference.model, ids, len(drafts), request)


@pytest.mark.parametrize("include", [False, True])
def test_what_ends_a_text_may_lie_inside_an_accepted_run(open_llm, plain, include):
    """Stop strings, stop ids and end tokens at every place of a text, most of it accepted drafts."""
    recorded = Recorded(5)
    llm, reference = open_llm(speculation=recorded), plain[FAMILIES[0]]
    free = params(max_tokens=30, logprobs=0, include_stop_str_in_output=include)
    (full,) = outputs(reference, ["class"], free)
    stops = [{"stop": full.text[start : start + 3]} for start in range(len(full.text) - 3)]
    stops += [{"stop_token_ids": [token]} for token in full.token_ids]
    each = [dataclasses.replace(free, **stop) for stop in stops]
    early = 0  # texts that ended before their step's last right draft
    for one, expected in zip(each, outputs(reference, ["class"] * len(each), each), strict=True):
        *pieces, out = llm.stream("class", one)
        assert out.outputs[0] == expected and "".join(pieces) == expected.text
        early += len(out.outputs[0].token_ids) < 1 + sum(
            1 + accepted for step in recorded.steps for _, accepted in step
        )
        recorded.steps.clear()
    assert is_empty(llm.engine) and {out.finish_reason for out in outputs(llm, ["class"], free)} == {"length"}
    assert early > 10
    # The end token of the checkpoint, as a draft that is right and as one that is never drawn.
    ends = next(t for t in full.token_ids[3:] if t not in full.token_ids[:3])
    ids = [frozenset({ends}), frozenset({next(t for t in range(304) if t not in full.token_ids)})]
    for eos in ids:
        results = []
        for one in (llm, reference):
            before, one.eos_ids = one.eos_ids, eos
            results.append(outputs(one, ["class"], dataclasses.replace(free, ignore_eos=False)))
            one.eos_ids = before
        assert results[0] == results[1]
    assert len(results[0][0].token_ids) == 30


@pytest.mark.parametrize("case", FAMILIES)
def test_the_last_page_and_the_last_token(open_llm, plain, case):
    """Contexts that end at every place around a page's border, with more drafts than there is room for."""
    for limit in (12, 63, 64, 65, 66):
        recorded = Recorded(7)
        llm = open_llm(case, recorded, max_model_len=limit)
        asked = prompts(llm, [5, limit - 7, limit - 1])
        each = params(max_tokens=100)
        found, expected = (outputs(one, asked, each) for one in (llm, open_llm(case, max_model_len=limit)))
        assert found == expected and [len(out.token_ids) for out in found] == [limit - 5, 7, 1]
        assert is_empty(llm.engine)


def test_more_drafts_than_tokens_are_left(open_llm, plain):
    llm, asked = open_llm(speculation=Recorded(16)), prompts(plain[FAMILIES[0]], [5] * 9)
    each = [params(max_tokens=n) for n in range(1, 10)]
    assert outputs(llm, asked, each) == outputs(plain[FAMILIES[0]], asked, each)
    most = [max((d for step in llm.engine.speculation.steps for d, _ in step), default=0)]
    assert most == [7]  # of 9 tokens the first comes with the prompt, and the last needs no draft


def test_a_seed_means_the_same_in_every_batch_and_with_any_drafts(open_llm, plain):
    one = params(temperature=1.0, seed=21, top_p=0.95, max_tokens=24)
    (prompt,) = prompts(plain[FAMILIES[0]], [11])
    (expected,) = outputs(plain[FAMILIES[0]], [prompt], one)
    others = prompts(plain[FAMILIES[0]], [4, 30])
    for limit in (1, 2, 5, 16):
        llm = open_llm(speculation=Speculation(limit))
        assert outputs(llm, [prompt], one) == [expected]
        for row in range(3):
            batch = [*others[:row], prompt, *others[row:]]
            each = [params(temperature=1.3, seed=s) for s in (1, 2)]
            assert outputs(llm, batch, [*each[:row], one, *each[row:]])[row] == expected


def test_a_dropped_request_leaves_the_others_alone(open_llm, plain):
    llm, (first, second) = open_llm(speculation=Speculation(4)), prompts(plain[FAMILIES[0]], [9, 21])
    (expected,) = outputs(plain[FAMILIES[0]], [first], params())
    kept, dropped = llm.stream(first, params()), llm.stream(second, params())
    next(kept), next(dropped), next(kept)
    dropped.close()
    *_, out = kept
    assert out.outputs[0] == expected and is_empty(llm.engine)
    request = llm.make_request(second, params())
    llm.engine.add(request)
    llm.engine.step()
    assert len(request.held_rows()) == len(second)
    llm.engine.abort(request)
    assert request.held is None and is_empty(llm.engine)


def snapshot(engine):
    return (
        (list(engine.state.lengths), list(engine.state.mtp_lengths)),
        [
            (r.slot, list(r.token_ids), list(r.pieces), r.held and r.held_rows().tolist(), r.track.idle)
            for r in engine.running
        ],
        engine.speculation.counters.num_draft_tokens,
    )


@pytest.mark.parametrize("where", ["mtp_trunk", "trunk", "logits", "sample", "mtp_verify", "lm_head_logprob"])
def test_a_step_that_fails_leaves_everything_as_it_was(open_llm, plain, where, monkeypatch):
    """Steps are done again and again, each time failing one call later, until they succeed."""
    llm = open_llm(speculation=Speculation(3), max_num_batched_tokens=80)
    llm.engine.replay.enabled = False
    asked, each = prompts(llm, [5, 70, 3]), params(logprobs=1, max_tokens=40)
    requests = [llm.make_request(prompt, each) for prompt in asked]
    for request in requests:
        llm.engine.add(request)
    owner = ops if where in ("sample", "mtp_verify", "lm_head_logprob") else llm.model
    function, failures = getattr(owner, where), [0] * 6
    llm.engine._admit()
    for step in range(6):
        before = snapshot(llm.engine)
        for done in range(100):
            calls = iter(range(100))

            def broken(*args, calls=calls, done=done, **kwargs):
                if next(calls) == done:
                    raise RuntimeError("out of memory")
                return function(*args, **kwargs)

            try:
                with monkeypatch.context() as patch, torch.no_grad():
                    patch.setattr(owner, where, broken)
                    llm.engine._advance(llm.engine.running)
                break
            except RuntimeError:
                failures[step] += 1
                assert snapshot(llm.engine) == before
    # Prompts make no drafts, and the MTP layer takes the long one's rows in; then there are three drafts a step.
    expected = {
        "mtp_trunk": [1, *[3] * 5],
        "logits": [1, *[4] * 5],
        "sample": [0, *[3] * 5],
    }
    assert failures == expected.get(where, [1] * 6)
    while llm.engine.has_work:
        llm.engine.step()
    assert [r.token_ids for r in requests] == [out.token_ids for out in outputs(plain[FAMILIES[0]], asked, each)]


@pytest.mark.parametrize("where", ["mtp_trunk", "trunk", "sample"])
def test_a_batch_that_fails_is_done_one_by_one(open_llm, plain, where, monkeypatch):
    """Whatever several sequences do together fails: each alone gives what it would have given."""
    llm = open_llm(speculation=Speculation(3))
    llm.engine.replay.enabled = False
    owner = ops if where == "sample" else llm.model
    function, failed = getattr(owner, where), []

    def alone_only(*args, **kwargs):
        several = set(kwargs["seeds"].tolist()) if where == "sample" else args[3 if where == "mtp_trunk" else 2].q_lens
        if len(several) > 1:
            failed.append(several)
            raise RuntimeError("out of memory")
        return function(*args, **kwargs)

    monkeypatch.setattr(owner, where, alone_only)
    asked, each = prompts(llm, [5, 70, 9]), [params(seed=s, temperature=1.0) for s in range(3)]
    found = outputs(llm, asked, each)
    monkeypatch.undo()
    assert failed and found == outputs(plain[FAMILIES[0]], asked, each) and is_empty(llm.engine)


@pytest.mark.parametrize("case", FAMILIES)
def test_adapting_to_any_clock_changes_no_text(open_llm, plain, case):
    adaptive = Recorded(6, adaptive=True)
    llm = open_llm(case, adaptive)
    clock = random.Random(5)
    llm.engine.clock = lambda: clock.random()
    asked = prompts(llm, [3, 40, 9, 11])
    each = [params(max_tokens=60, temperature=t) for t in (0, 0, 1.0, 0)]
    assert outputs(llm, asked, each) == outputs(plain[case], asked, each)
    assert len({drafted for step in adaptive.steps for drafted, _ in step}) > 3


def streamed(llm, bodies):
    """What the server sends for each body, without ids and times; and its /health afterwards."""
    worker = Worker(llm)
    worker.start()
    app = Api(llm, worker, model="tiny", fingerprint="x").app

    async def run():
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://127.0.0.1") as client:
            answers = [client.post("/v1/completions", json={"model": "tiny", **body}) for body in bodies]
            texts = [answer.text for answer in await asyncio.gather(*answers)]
            return texts, (await client.get("/health")).json()

    try:
        texts, health = asyncio.run(run())
        return [re.sub(r'"(id|created)":("[^"]*"|\d+)', "", text) for text in texts], health
    finally:
        worker.drain(0)


def test_the_server_sends_the_same_events(open_llm):
    """Event by event, not only the text: one for each token, however many a step gains."""
    ask = {"stream": True, "max_tokens": 30, "ignore_eos": True, "stream_options": {"include_usage": True}}
    bodies = [
        {**ask, "prompt": "def add(", "temperature": 0},
        {**ask, "prompt": "class Café", "seed": 3, "logprobs": 2},
        {**ask, "prompt": "first", "seed": 4, "temperature": 0.7, "stop": ["a"]},
        {**ask, "prompt": "second", "temperature": 0, "stream": False, "stream_options": None, "logprobs": 1},
    ]
    recorded = Recorded(4)
    (expected, plain), (found, health) = (streamed(llm, bodies) for llm in (open_llm(), open_llm(speculation=recorded)))
    assert expected == found and recorded.seen(lambda d, a: a > 1) > 3
    assert "speculation" not in plain and health["speculation"] == dataclasses.asdict(recorded.counters)
    assert expected[0].count("data: ") > 20 and json.loads(expected[3].replace("{,", "{").replace(",,", ","))


def test_options(directory, tmp_path):
    path = directory(FAMILIES[0], 0.07)
    assert glmx.LLM(path, num_speculative_tokens=0).speculation is None
    llm = glmx.LLM(path, num_speculative_tokens=3)
    llm.generate([[1, 2, 3]], params(max_tokens=8))
    counters = llm.speculation
    assert counters.num_drafts > 0 and len(counters.num_accepted_tokens_per_pos) == 3
    assert counters.num_draft_tokens >= counters.num_accepted_tokens == sum(counters.num_accepted_tokens_per_pos)
    assert glmx.LLM(path, num_speculative_tokens="auto").engine.speculation.adaptive
    for value in (-1, 17, "many", 1.5):
        with pytest.raises(ValueError, match=re.escape(f"num_speculative_tokens is {value!r}, expected 'auto' or 0")):
            glmx.LLM(path, num_speculative_tokens=value)
    bare = tiny_config(num_nextn_predict_layers=0)
    checkpoint.save(random_model(bare), tmp_path / "bare")
    for value in (2, "auto"):
        with pytest.raises(UnsupportedError, match=f"num_speculative_tokens is {value!r}, but .* no MTP layer"):
            glmx.LLM(tmp_path / "bare", num_speculative_tokens=value)
    assert glmx.LLM(tmp_path / "bare").speculation is None


def test_generate_command(directory, plain, capsys):
    path = directory(FAMILIES[0], 0.07)
    (expected,) = outputs(plain[FAMILIES[0]], ["def add("], params(max_tokens=12, ignore_eos=False))
    for value in ("0", "3", "auto"):
        argv = ["generate", str(path), "--prompt", "def add(", "--max-tokens", "12", "--num-speculative-tokens", value]
        assert cli.main(argv) == 0 and capsys.readouterr().out == f"def add({expected.text}\n"


@pytest.mark.parametrize("case", FAMILIES)
def test_recorded_steps_change_no_result(open_llm, plain, case):
    """Engines with and without recordings: texts, log-probs and how drafts did, of ragged batches."""
    found, whims, asked = [], [], prompts(plain[case], [5, 70, 9, 64, 1, 33])
    each = [params(seed=s, temperature=0.5 * (s % 2), logprobs=2, max_tokens=60) for s in range(len(asked))]
    for enabled in (True, False):
        whims.append(Whim(3, seed=2))
        llm = open_llm(case, whims[-1])
        llm.engine.replay.enabled = enabled
        found.append(outputs(llm, asked, each))
        assert (llm.engine.replay.replays > 100) == enabled and is_empty(llm.engine)
    assert found[0] == found[1] == outputs(plain[case], asked, each) and whims[0].steps == whims[1].steps


def test_recorded_steps_draw_their_own_tokens(open_llm, plain, monkeypatch):
    """Of a batch whose tokens depend on nothing before them; one request that asks for more is drawn for by itself."""
    drawn = []
    for name in ("sample", "mtp_verify"):
        op = getattr(ops, name)
        monkeypatch.setattr(ops, name, lambda *given, op=op, **rules: drawn.append(op) or op(*given, **rules))
    asked = prompts(plain[FAMILIES[0]], [5, 9])
    for value in (0.0, 0.5):
        each = [params(temperature=0.8, max_tokens=60), params(seed=8, presence_penalty=value)]
        llm, steps, calls = open_llm(speculation=Speculation(2)), [], []
        step = llm.engine.step

        def counted(step=step, llm=llm, steps=steps, calls=calls):
            before, preparations = len(drawn), llm.engine.replay.preparations
            done = step()
            if llm.engine.replay.preparations == preparations:
                steps.append(len(done))
                calls.append(len(drawn) - before)
            return done

        monkeypatch.setattr(llm.engine, "step", counted)
        assert outputs(llm, asked, each) == outputs(plain[FAMILIES[0]], asked, each)
        both = [n for n, sequences in zip(calls, steps, strict=True) if sequences == 2][1:]  # behind the prompts
        alone = [n for n, sequences in zip(calls, steps, strict=True) if sequences == 1]
        assert len(both) > 4 and max(both) == (3 if value else 0), "two drafts, and what verifies them"
        assert len(alone) > 4 and max(alone) == 0


@pytest.mark.parametrize("kind", ["decoder", "mtp"])
def test_a_replay_that_fails_leaves_everything_as_it_was(open_llm, plain, kind, monkeypatch):
    """Steps that replay are done twice: the first time the replay stops behind its last call."""
    llm = open_llm(speculation=Speculation(2))
    asked, each = prompts(llm, [5, 70, 3]), params(max_tokens=40)
    requests = [llm.make_request(prompt, each) for prompt in asked]
    for request in requests:
        llm.engine.add(request)
    for _ in range(6):
        llm.engine.step()
    failures = 0
    for _ in range(8):
        before, recordings = snapshot(llm.engine), llm.engine.replay._recorded
        with monkeypatch.context() as patch, torch.no_grad():
            for key, (_, recorded) in recordings.items():
                if key[0] == kind:
                    replay = recorded.replay
                    patch.setattr(recorded, "replay", lambda replay=replay: (replay(), 1 / 0))
            try:
                llm.engine._advance(llm.engine.running)
            except ZeroDivisionError:
                failures += 1
                assert snapshot(llm.engine) == before
    while llm.engine.has_work:
        llm.engine.step()
    assert failures == 8
    assert [r.token_ids for r in requests] == [out.token_ids for out in outputs(plain[FAMILIES[0]], asked, each)]


def test_steps_that_record_are_not_typical(open_llm):
    """A policy that took them for what steps cost would make no drafts where they pay."""
    seen = []

    class Watched(Speculation):
        def observe_times(self, *args, typical, **kwargs):
            seen.append(typical)
            super().observe_times(*args, typical=typical, **kwargs)

    llm = open_llm(speculation=Watched(1))
    step, prepared = llm.engine.step, []

    def watched():
        before = (llm.engine.replay.preparations, len(seen))
        done = step()
        if llm.engine.replay.preparations > before[0]:
            prepared.append(any(seen[before[1] :]))
        return done

    llm.engine.step = watched
    outputs(llm, prompts(llm, [9]), params(max_tokens=60))
    assert len(prepared) >= 4 and not any(prepared) and sum(seen) > 20
