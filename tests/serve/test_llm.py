"""LLM and the engine: results do not depend on the batch, sampling is reproducible, names are vLLM's."""

from __future__ import annotations

import json

import pytest
import torch

import glmx
from glmx.cli import main as cli
from glmx.data import tokenizer as tokenizers
from glmx.errors import CheckpointError
from glmx.models import checkpoint
from glmx.reference.sample import sample
from tiny_glm import random_ids, random_model, tiny_config

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
    assert out.cumulative_logprob == pytest.approx(
        sum(float(r[t]) for r, t in zip(expected, out.token_ids, strict=True)), abs=1e-3
    )


def test_stop_ids_end_the_text(llm):
    prompt = prompts(llm, 3)[2]
    ids = plain_greedy(llm.model, prompt, 8)
    stop = ids[4]
    params = glmx.SamplingParams(temperature=0, max_tokens=8, stop_token_ids=[stop], ignore_eos=True)
    out = llm.generate([prompt], params)[0].outputs[0]
    end = ids.index(stop) + 1
    assert out.token_ids == ids[:end] and out.finish_reason == "stop" and out.stop_reason == stop
    assert out.text == llm.tokenizer.decode([i for i in ids[: end - 1] if i < llm.tokenizer.vocab_size])


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
     ("top_k", -2), ("logprobs", -1)],
)  # fmt: skip
def test_sampling_params_are_checked(field, value):
    with pytest.raises(ValueError, match=f"{field} is {value}"):
        glmx.SamplingParams(**{field: value})


def test_without_a_tokenizer(directory, tmp_path):
    checkpoint.save(glmx.load(directory), tmp_path / "bare")
    llm = glmx.LLM(tmp_path / "bare")
    out = llm.generate([[1, 2, 3]], glmx.SamplingParams(temperature=0, max_tokens=3))[0].outputs[0]
    assert out.text == "" and out.token_ids
    with pytest.raises(CheckpointError, match="no tokenizer.json"):
        llm.generate("text")


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
        (["{}/ckpt", "--device", "cuda"], "'cuda'"),
        (["{}/ckpt", "--dtype", "fp8"], "'fp8'"),
        (["{}/ckpt", "--max-tokens", "4", "--prompt", "x" * 500], "max_model_len"),
    ],
)
def test_generate_command_errors(directory, argv, words, capsys):
    argv = [word.format(directory.parent) for word in argv]
    code, out, err = run(capsys, "--prompt", "x", *argv)
    assert code == 2 and err.count("\n") == 1 and words in err and err.startswith("glmx generate: ")
