"""LLM and the engine: results do not depend on the batch, sampling is reproducible, names are vLLM's."""

from __future__ import annotations

import dataclasses
import json
import re

import pytest
import torch

import glmx
from glmx.cli import main as cli
from glmx.data import tokenizer as tokenizers
from glmx.errors import CheckpointError, UnsupportedError
from glmx.models import checkpoint
from glmx.reference.sample import sample
from tiny_glm import CASES, FAMILIES, random_ids, random_model, tiny_config

TEXT = "def add(first, second):\n    return first + second\n\n\nclass Café:\n    pass\n" * 4


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    """A random model with a tokenizer; its vocabulary is padded beyond the tokenizer's."""
    base = tmp_path_factory.mktemp("llm")
    tokenizer = tokenizers.train([TEXT], 300)
    tokenizer.save(base / "tokenizer")
    config = tiny_config(vocab_size=304, eos_token_id=tokenizer.eos_ids, max_position_embeddings=128)
    return checkpoint.save(random_model(config, 1), base / "ckpt", tokenizer_files_from=base / "tokenizer")


@pytest.fixture(scope="module")
def llm(directory):
    return glmx.LLM(directory, max_num_seqs=3)


def plain_greedy(model, ids, count):
    """No cache, no engine: the whole sequence again for each token."""
    ids = list(ids)
    with torch.no_grad():
        for _ in range(count):
            ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
    return ids[-count:]


def prompts(llm, count):
    return [random_ids(llm.model.config, 1, 3 + 4 * n, seed=n)[0].tolist() for n in range(count)]


def test_greedy_equals_the_plain_loop(llm):
    params = glmx.SamplingParams(temperature=0, max_tokens=10, ignore_eos=True)
    outs = llm.generate(prompts(llm, 5), params)  # five requests over three slots
    for prompt, out in zip(prompts(llm, 5), outs, strict=True):
        assert out.prompt_token_ids == prompt and out.prompt is None and out.finished
        assert out.outputs[0].token_ids == plain_greedy(llm.model, prompt, 10)
        assert out.outputs[0].finish_reason == "length" and out.outputs[0].stop_reason is None
    assert not llm.engine.has_work and llm.engine.state.lengths == [0, 0, 0]


@pytest.mark.parametrize("case", FAMILIES)
def test_pieces_of_a_prompt_change_nothing(case, tmp_path, monkeypatch):
    """No forward exceeds max_num_batched_tokens, and prompts that do are completed as the plain loop does."""
    checkpoint.save(random_model(tiny_config(**CASES[case]), 1), tmp_path / "ckpt")
    llm = glmx.LLM(tmp_path / "ckpt", max_num_seqs=3, max_num_batched_tokens=8)
    llm.engine.replay.enabled = False  # every forward is to be seen
    widths, forward = [], llm.model.trunk

    def recorded(ids_T, *args):
        widths.append(len(ids_T))
        return forward(ids_T, *args)

    monkeypatch.setattr(llm.model, "trunk", recorded)
    asked = [random_ids(llm.model.config, 1, n, seed=n)[0].tolist() for n in (3, 29, 8, 16, 1)]
    outs = llm.generate(asked, glmx.SamplingParams(temperature=0, max_tokens=6, ignore_eos=True))
    monkeypatch.undo()
    assert max(widths) == 8
    for prompt, out in zip(asked, outs, strict=True):
        assert out.outputs[0].token_ids == plain_greedy(llm.model, prompt, 6)


def test_a_seeded_sample_does_not_depend_on_the_batch(llm):
    params = glmx.SamplingParams(temperature=1.5, top_p=0.9, top_k=50, seed=7, max_tokens=12, ignore_eos=True)
    together = [out.outputs[0].token_ids for out in llm.generate(prompts(llm, 5), params)]
    alone = [llm.generate([prompt], params)[0].outputs[0].token_ids for prompt in prompts(llm, 5)]
    assert together == alone
    other = llm.generate(prompts(llm, 1), glmx.SamplingParams(temperature=1.5, seed=8, max_tokens=12))
    assert other[0].outputs[0].token_ids != alone[0]


def test_each_token_is_the_samplers_at_its_position(llm):
    prompt = prompts(llm, 2)[1]
    params = glmx.SamplingParams(temperature=1.4, top_k=60, top_p=0.95, seed=21, max_tokens=8, ignore_eos=True)
    token_ids = llm.generate([prompt], params)[0].outputs[0].token_ids
    with torch.no_grad():
        logits = llm.model(torch.tensor([prompt + token_ids])).logits[0, len(prompt) - 1 : -1]
    positions = list(range(len(prompt), len(prompt) + 8))
    expected = sample(logits, seeds=21, positions=positions, temperature=1.4, top_k=60, top_p=0.95)
    assert token_ids == expected.tolist()


def test_penalties_and_biases_are_the_samplers(llm):
    """Each token is the oracle's for the text so far; a batch mixes requests with rules and without."""
    rules = {"repetition_penalty": 1.3, "presence_penalty": 0.7, "frequency_penalty": -0.4, "min_p": 0.02}
    bias = {9: 2.5, 30: -100.0, 11: 1.0}
    asked = prompts(llm, 3)
    params = [
        glmx.SamplingParams(temperature=1.2, seed=3, max_tokens=10, ignore_eos=True),
        glmx.SamplingParams(temperature=1.2, seed=4, max_tokens=10, ignore_eos=True, logit_bias=bias, **rules),
        glmx.SamplingParams(temperature=0, max_tokens=10, ignore_eos=True, frequency_penalty=2.0),
    ]
    outs = [out.outputs[0].token_ids for out in llm.generate(asked, params)]
    for prompt, ids, p in zip(asked, outs, params, strict=True):
        with torch.no_grad():
            logits = llm.model(torch.tensor([prompt + ids])).logits[0, len(prompt) - 1 : -1]
        ends = torch.arange(len(prompt), len(prompt) + 10)
        expected = sample(
            logits,
            seeds=p.seed or 0,
            positions=ends,
            temperature=p.temperature,
            min_p=p.min_p,
            token_ids=torch.tensor(prompt + ids),
            history=torch.stack((torch.zeros_like(ends), torch.full_like(ends, len(prompt)), ends), -1),
            repetition_penalty=p.repetition_penalty,
            presence_penalty=p.presence_penalty,
            frequency_penalty=p.frequency_penalty,
            bias_ids=torch.tensor(list(p.logit_bias or {0: 0})),
            bias_values=torch.tensor(list((p.logit_bias or {0: 0}).values()), dtype=torch.float32),
            bias_spans=torch.tensor([0, len(p.logit_bias or {0: 0})]),
        )
        assert ids == expected.tolist()
    assert len(set(outs[2])) == 10, "greedy repeats itself, and a frequency penalty of 2 stops that"


def test_a_bias_for_a_token_that_is_not_there(llm):
    with pytest.raises(ValueError, match=r"logit_bias names token id 304, outside the vocabulary 0..303"):
        llm.generate([[5, 6]], glmx.SamplingParams(logit_bias={304: 1.0}))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("min_p", float("nan")),
        ("min_p", -0.1),
        ("repetition_penalty", 0.0),
        ("repetition_penalty", float("inf")),
        ("presence_penalty", 2.1),
        ("frequency_penalty", float("nan")),
        ("logit_bias", {-1: 0.0}),
        ("logit_bias", {"7": 0.0}),
        ("logit_bias", {7: 101}),
        ("logit_bias", {7: float("nan")}),
    ],
)
def test_rules_outside_their_range(field, value):
    with pytest.raises(ValueError, match=f"^{field}.* expected "):
        glmx.SamplingParams(**{field: value})


@pytest.mark.parametrize(("seed", "top_p"), [(2**63, 1.0), (-(2**70) + 3, 0.9), (5, 1e-60)])
def test_seeds_and_masses_of_any_size(llm, seed, top_p):
    params = glmx.SamplingParams(seed=seed, top_p=top_p, max_tokens=3, ignore_eos=True)
    first, again = (llm.generate([[5, 6]], params)[0].outputs[0].token_ids for _ in range(2))
    assert first == again and len(first) == 3


def test_requests_without_a_seed_differ_and_repeat(directory):
    params = glmx.SamplingParams(temperature=2.0, max_tokens=12, ignore_eos=True)

    def run(seed):
        llm = glmx.LLM(directory, seed=seed)
        return [out.outputs[0].token_ids for out in llm.generate([[5, 6, 7]] * 2, params)]

    assert run(0)[0] != run(0)[1] and run(0) == run(0) and run(0) != run(1)


def test_logprobs(llm):
    params = glmx.SamplingParams(temperature=1.0, seed=3, max_tokens=6, logprobs=3, ignore_eos=True)
    plain = glmx.SamplingParams(temperature=1.0, seed=3, max_tokens=6, ignore_eos=True)
    prompt = prompts(llm, 2)[1]
    out, without = (out.outputs[0] for out in llm.generate([prompt, prompt], [params, plain]))
    assert without.logprobs is None and without.cumulative_logprob is None
    assert out.token_ids == without.token_ids
    with torch.no_grad():
        logits = llm.model(torch.tensor([prompt + out.token_ids])).logits[0, len(prompt) - 1 : -1]
    expected = logits.double().log_softmax(-1)
    for row, token, found in zip(expected, out.token_ids, out.logprobs, strict=True):
        top = row.topk(3).indices.tolist()
        assert set(found) == {token, *top}
        for i, logprob in found.items():
            assert logprob.logprob == pytest.approx(float(row[i]), abs=1e-4)
            assert logprob.rank == 1 + int((row > row[i]).sum())
            assert logprob.decoded_token == (llm.tokenizer.decode([i]) if i < llm.tokenizer.vocab_size else "")
    assert out.cumulative_logprob == pytest.approx(
        sum(float(r[t]) for r, t in zip(expected, out.token_ids, strict=True)), abs=1e-3
    )


def test_no_step_keeps_anything_for_gradients(llm, monkeypatch):
    advance, seen = llm.engine._advance, []
    monkeypatch.setattr(llm.engine, "_advance", lambda batch: seen.append(torch.is_grad_enabled()) or advance(batch))
    each = glmx.SamplingParams(max_tokens=3, ignore_eos=True)
    llm.generate([[5, 6]], each)
    list(llm.stream([5, 6], each))
    request = llm.make_request([5, 6], each)
    llm.engine.add(request)
    while llm.engine.has_work:
        llm.engine.step()
    assert seen == [False] * 9 and torch.is_grad_enabled()


def test_stop_ids_end_the_text(llm):
    prompt = prompts(llm, 3)[2]
    ids = plain_greedy(llm.model, prompt, 8)
    stop = ids[4]
    params = glmx.SamplingParams(temperature=0, max_tokens=8, stop_token_ids=[stop], ignore_eos=True)
    out = llm.generate([prompt], params)[0].outputs[0]
    end = ids.index(stop) + 1
    assert out.token_ids == ids[:end] and out.finish_reason == "stop" and out.stop_reason == stop
    assert out.text == llm.tokenizer.decode([i for i in ids[: end - 1] if i < llm.tokenizer.vocab_size])


def test_stop_strings_end_the_text(llm):
    """Whatever part of the text is the stop string: it ends there, streamed or not, and so does the work."""
    free = glmx.SamplingParams(temperature=1.3, seed=5, max_tokens=40, ignore_eos=True)
    full = llm.generate("class Café", free)[0].outputs[0]
    assert len(full.text) > 20 and full.stop_reason is None
    for start in range(0, 20, 3):
        stop = full.text[start : start + 4]
        for include in (False, True):
            params = dataclasses.replace(
                free, stop=["never found", stop], include_stop_str_in_output=include, logprobs=0
            )
            *pieces, out = llm.stream("class Café", params)
            end = full.text.index(stop) + (len(stop) if include else 0)
            assert "".join(pieces) == out.outputs[0].text == full.text[:end]
            (again,) = llm.generate(["class Café"], params)
            assert again.outputs[0].text == full.text[:end]
            for one in (out.outputs[0], again.outputs[0]):
                assert (one.finish_reason, one.stop_reason) == ("stop", stop)
                count = len(one.token_ids)
                assert one.token_ids == full.token_ids[:count] and len(one.logprobs) == count
                assert stop in llm.tokenizer.decode(one.token_ids[:count], skip_special_tokens=True)
                assert stop not in llm.tokenizer.decode(one.token_ids[: count - 1], skip_special_tokens=True)


def test_a_stop_string_that_is_only_begun_is_text(llm):
    free = glmx.SamplingParams(temperature=1.3, seed=5, max_tokens=40, ignore_eos=True)
    text = llm.generate("class Café", free)[0].outputs[0].text
    *pieces, out = llm.stream("class Café", dataclasses.replace(free, stop=text[-3:] + "never"))
    assert "".join(pieces) == out.outputs[0].text == text
    assert (out.outputs[0].finish_reason, out.outputs[0].stop_reason) == ("length", None)


def test_streams_may_be_interleaved(llm):
    params = [glmx.SamplingParams(temperature=1.3, seed=s, max_tokens=20, ignore_eos=True) for s in (5, 6)]
    expected = [llm.generate("def", one)[0].outputs[0] for one in params]
    first, second = (llm.stream("def", one) for one in params)
    begun = next(first)
    *pieces, out = second
    assert "".join(pieces) == out.outputs[0].text == expected[1].text
    assert "".join([begun, *(pieces := list(first))[:-1]]) == expected[0].text
    assert pieces[-1].outputs[0].token_ids == expected[0].token_ids
    left = llm.stream("def", params[0])
    next(left)
    left.close()
    assert not llm.engine.has_work and llm.engine.state.lengths == [0, 0, 0]


def test_chat(llm):
    messages = [{"role": "user", "content": "def add(first"}]
    params = glmx.SamplingParams(temperature=0, max_tokens=4, ignore_eos=True)
    text = "[gMASK]<sop><|user|>\ndef add(first<|assistant|>"
    (out,) = llm.chat(messages, params)
    assert out.prompt_token_ids == llm.tokenizer.encode(text)
    assert out.outputs[0] == llm.generate([text], params)[0].outputs[0]
    quiet, loud = llm.chat([messages, messages[:1]], params, chat_template_kwargs={"enable_thinking": False})
    assert (
        quiet.prompt_token_ids
        == loud.prompt_token_ids
        == llm.encode_chat(messages, chat_template_kwargs={"enable_thinking": False})
    )
    assert llm.tokenizer.decode(quiet.prompt_token_ids).endswith("/nothink<|assistant|>\n<think></think>")
    (open_,) = llm.chat(messages, params, add_generation_prompt=False)
    assert llm.tokenizer.decode(open_.prompt_token_ids) == "[gMASK]<sop><|user|>\ndef add(first"


@pytest.mark.parametrize(
    "messages, options, words",
    [
        ([], {}, "messages: expected a list of at least one"),
        ([[]], {}, "messages: expected a list of at least one"),
        (["hi"], {}, "messages: expected a list of at least one"),
        ([{"role": "robot", "content": "hi"}], {}, "unknown role robot"),
        ([{"role": "assistant", "content": "x", "tool_calls": 5}], {}, "the chat template fails on them: TypeError"),
        ([{"role": "user", "content": "hi"}], {"tools": []}, "chat_template_kwargs has 'tools'"),
    ],
)
def test_bad_chats(llm, messages, options, words):
    with pytest.raises(ValueError, match=words):
        llm.chat(messages, glmx.SamplingParams(max_tokens=1), chat_template_kwargs=options)


def test_text_prompts_begin_with_the_models_prefix(llm):
    prefix = list(llm.tokenizer.prefix_ids)
    params = glmx.SamplingParams(temperature=0, max_tokens=2)
    (out,) = llm.generate("def add(", params)
    assert out.prompt == "def add(" and out.prompt_token_ids == prefix + llm.tokenizer.encode("def add(")
    (again,) = llm.generate(["[gMASK]<sop>def add("], params)
    assert again.prompt_token_ids == out.prompt_token_ids


def test_stream_equals_generate(llm):
    params = glmx.SamplingParams(temperature=1.3, seed=5, max_tokens=40)
    *pieces, out = llm.stream("class Café", params)
    assert "".join(pieces) == out.outputs[0].text == llm.generate("class Café", params)[0].outputs[0].text
    assert len(pieces) > 5


def test_the_context_ends_a_generation(directory):
    llm = glmx.LLM(directory, max_model_len=12)
    out = llm.generate([[1] * 9], glmx.SamplingParams(temperature=0, max_tokens=50, ignore_eos=True))[0].outputs[0]
    assert len(out.token_ids) == 3 and out.finish_reason == "length"
    with pytest.raises(ValueError, match="12 tokens, max_model_len is 12"):
        llm.generate([[1] * 12])


@pytest.mark.parametrize(
    "arguments, error, words",
    [
        (([[]],), ValueError, "is empty"),
        (([[1, 304]],), ValueError, r"304 is outside the vocabulary 0\.\.303"),
        (([[-1]],), ValueError, "-1 is outside"),
        (([[1, 2], [-1]],), ValueError, "-1 is outside"),
        (([1.5],), TypeError, "a prompt is a float"),
        ((["a", "b"], [glmx.SamplingParams()]), ValueError, "1 sampling_params for 2 prompts"),
        (([[1]], glmx.SamplingParams(logprobs=305)), ValueError, "logprobs is 305"),
    ],
)
def test_bad_requests_leave_the_engine_usable(llm, arguments, error, words):
    with pytest.raises(error, match=words):
        llm.generate(*arguments)
    assert not llm.engine.has_work
    assert len(llm.generate([[1, 2]], glmx.SamplingParams(max_tokens=1))) == 1


@pytest.mark.parametrize(
    "field, value",
    [("max_tokens", 0), ("temperature", -1.0), ("temperature", float("nan")), ("top_p", 0.0), ("top_p", 1.1),
     ("temperature", 1e-46), ("temperature", float("inf")), ("top_k", -2), ("logprobs", -1), ("stop", ""),
     ("stop", ["a", ""])],
)  # fmt: skip
def test_sampling_params_are_checked(field, value):
    with pytest.raises(ValueError, match=re.escape(f"{field} is {value!r}")):
        glmx.SamplingParams(**{field: value})


def test_stop_is_text_and_not_too_much_of_it():
    assert glmx.SamplingParams(stop="ab").stop == ("ab",) and glmx.SamplingParams(stop=["a"] * 16).stop == ("a",) * 16
    with pytest.raises(ValueError, match="stop has 17 strings, expected at most 16"):
        glmx.SamplingParams(stop=["a"] * 17)
    with pytest.raises(TypeError, match=r"stop is \[5\]"):
        glmx.SamplingParams(stop=[5])


@pytest.mark.parametrize("temperature", [1e-30, 1e30])
def test_extreme_temperatures_sample_what_they_say(llm, temperature):
    """The coldest is greedy; the hottest draws evenly, so in 40 draws of 304 no token comes ten times."""
    prompt = prompts(llm, 2)[1]
    params = glmx.SamplingParams(temperature=temperature, seed=1, max_tokens=40, ignore_eos=True)
    ids = llm.generate([prompt], params)[0].outputs[0].token_ids
    if temperature < 1:
        assert ids == plain_greedy(llm.model, prompt, 40)
    else:
        assert max(ids.count(i) for i in ids) < 10


def test_an_absurd_top_k_keeps_all(llm):
    wide, plain = (glmx.SamplingParams(temperature=1.5, seed=3, top_k=k, max_tokens=8) for k in (10**30, 0))
    prompt = prompts(llm, 1)
    assert llm.generate(prompt, wide)[0].outputs[0].token_ids == llm.generate(prompt, plain)[0].outputs[0].token_ids


def test_a_failed_forward_is_raised_and_leaves_the_engine_usable(llm, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(llm.model, "forward_tokens", lambda *_: 1 / 0)
        for run in (lambda: llm.generate([[1, 2], [3, 4]]), lambda: list(llm.stream([1, 2]))):
            with pytest.raises(ZeroDivisionError):
                run()
            assert not llm.engine.has_work and llm.engine.state.lengths == [0, 0, 0]
    assert len(llm.generate([[1, 2]], glmx.SamplingParams(max_tokens=1))) == 1


def test_without_a_tokenizer(directory, tmp_path):
    checkpoint.save(glmx.load(directory), tmp_path / "bare")
    llm = glmx.LLM(tmp_path / "bare")
    out = llm.generate([[1, 2, 3]], glmx.SamplingParams(temperature=0, max_tokens=3))[0].outputs[0]
    assert out.text == "" and out.token_ids
    with pytest.raises(CheckpointError, match="no tokenizer.json"):
        llm.generate("text")
    with pytest.raises(CheckpointError, match="no tokenizer.json"):
        llm.chat([{"role": "user", "content": "text"}])
    with pytest.raises(UnsupportedError, match=r"stop is \('x',\), but .* no tokenizer.json: use stop_token_ids"):
        llm.generate([[1, 2]], glmx.SamplingParams(stop="x"))
    (found,) = llm.generate([[1, 2]], glmx.SamplingParams(logprobs=1, max_tokens=1))[0].outputs[0].logprobs
    assert {logprob.decoded_token for logprob in found.values()} == {None}


# glmx generate
def run(capsys, *argv):
    code = cli.main(["generate", *map(str, argv)])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_generate_command(directory, llm, capsys):
    code, out, _ = run(capsys, directory, "--prompt", "def add(", "--max-tokens", 8)
    expected = llm.generate("def add(", glmx.SamplingParams(temperature=0, max_tokens=8))[0]
    assert code == 0 and out == "def add(" + expected.outputs[0].text + "\n"


def test_generate_command_json(directory, llm, capsys):
    options = ["--max-tokens", 6, "--temperature", 1.2, "--top-p", 0.8, "--top-k", 40, "--seed", 11]
    code, out, _ = run(capsys, directory, "--prompt", "class", *options, "--json", "--dtype", "fp32")
    params = glmx.SamplingParams(temperature=1.2, top_p=0.8, top_k=40, seed=11, max_tokens=6)
    (expected,) = llm.generate("class", params)
    found = json.loads(out)
    assert code == 0 and found["prompt"] == "class"
    assert found["outputs"][0]["token_ids"] == expected.outputs[0].token_ids
    assert found["outputs"][0]["text"] == expected.outputs[0].text
    assert found["outputs"][0]["finish_reason"] == expected.outputs[0].finish_reason


@pytest.mark.parametrize(
    "argv, words",
    [
        (["zai-org/GLM-4.5-Air"], "hf download zai-org/GLM-4.5-Air"),
        (["{}/nowhere"], "no directory"),
        (["{}"], "no config.json"),
        (["{}/ckpt", "--max-tokens", "0"], "max_tokens is 0"),
        (["{}/ckpt", "--temperature", "-1"], "temperature is -1.0"),
        (["{}/ckpt", "--device", "cuda:99"], "device 'cuda:99': "),
        (["{}/ckpt", "--dtype", "fp8"], "'fp8'"),
        (["{}/ckpt", "--max-tokens", "4", "--prompt", "x" * 500], "max_model_len"),
    ],
)
def test_generate_command_errors(directory, argv, words, capsys):
    argv = [word.format(directory.parent) for word in argv]
    code, out, err = run(capsys, "--prompt", "x", *argv)
    assert code == 2 and err.count("\n") == 1 and words in err and err.startswith("glmx generate: ")
