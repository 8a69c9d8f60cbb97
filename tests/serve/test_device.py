"""glmx.LLM on a GPU that this CPU plays: the texts, log-probs and drafts of the CPU."""

from __future__ import annotations

import pytest
from tests.played_cuda import CUDA, played

import glmx
from glmx.data import tokenizer as tokenizers
from glmx.errors import UnsupportedError
from glmx.models import checkpoint
from tiny_glm import CASES, random_ids, random_model, tiny_config

TEXT = "def add(first, second):\n    return first + second\n" * 8


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    base = tmp_path_factory.mktemp("llm")
    tokenizer = tokenizers.train([TEXT], 300)
    tokenizer.save(base / "tokenizer")
    config = tiny_config(**CASES["qk_norm_bias"], vocab_size=304, eos_token_id=tokenizer.eos_ids)
    return checkpoint.save(random_model(config, 1), base / "ckpt", tokenizer_files_from=base / "tokenizer")


PARAMS = [
    glmx.SamplingParams(temperature=0, max_tokens=12, ignore_eos=True, logprobs=3),
    glmx.SamplingParams(temperature=0.8, top_p=0.9, top_k=20, seed=5, max_tokens=12, ignore_eos=True),
    glmx.SamplingParams(temperature=1.0, min_p=0.01, repetition_penalty=1.3, max_tokens=9, logit_bias={7: 3.0}),
    glmx.SamplingParams(temperature=0, max_tokens=70, ignore_eos=True),
]


def completions(llm):
    prompts = [random_ids(llm.model.config, 1, 5 + 9 * n, seed=n)[0].tolist() for n in range(len(PARAMS))]
    found = []
    for params in (PARAMS, PARAMS[:1] * 4, PARAMS[1:2] * 4):
        found += [(out.outputs[0].token_ids, out.outputs[0].logprobs) for out in llm.generate(prompts, params)]
    return found


@pytest.mark.parametrize("drafts", [0, 3])
def test_a_batch_there_is_one_here(directory, drafts):
    """Greedy, sampled, with penalties and biases, longer than what the MTP layer holds back; long prompts in pieces."""
    options = {"num_speculative_tokens": drafts, "max_num_seqs": 3, "max_num_batched_tokens": 16, "max_model_len": 128}
    here = glmx.LLM(directory, **options)
    expected = completions(here)
    assert here.engine.replay.replays > 0
    with played():
        there = glmx.LLM(directory, device="cuda", **options)
        assert there.model.device == CUDA and there.engine.state.device.type == "cpu"
        assert completions(there) == expected
        assert there.engine.replay.replays == 0  # what is recorded is calls of the CPU's kernels
        text = "".join(piece for piece in there.stream("def add(", PARAMS[0]) if isinstance(piece, str))
    assert text == here.generate("def add(", PARAMS[0])[0].outputs[0].text
    if drafts:
        assert there.speculation == here.speculation and here.speculation.num_drafts > 0


def test_the_device_is_looked_at_first(tmp_path):
    """Before the model is: nothing of it needs to be there."""
    for word in ("cuda:99", "gpu"):
        with pytest.raises(UnsupportedError, match=f"^device '{word}'"):
            glmx.LLM(tmp_path / "nowhere", device=word)
