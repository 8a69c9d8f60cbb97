"""500 prompts in each family: with drafts, tokens, texts and log-probs are those of plain decoding, greedy and sampled.

Models are trained here, by glmx.train, until the MTP layer's drafts are right more often than not: on functions made by
a small grammar, whose names and arguments repeat but cannot all be foreseen. The mean accepted length is that of the
drafts alone: accepted drafts over verifications, a verification being a sequence in a step in which it has drafts. The
token that the model adds each time is not counted. `pytest -s` prints a line for each family.
"""

from __future__ import annotations

import json
import random
from collections import Counter

import pytest

import glmx
from glmx.data import tokenizer as tokenizers
from glmx.data.shards import write_documents
from glmx.serve.speculation import Speculation
from glmx.train.config import make_config
from glmx.train.loop import pretrain
from tiny_glm import CASES, FAMILIES, tiny_config

PROMPTS, SLOTS, K = 500, 24, 4
VOCAB = 352
STEPS = 160  # the loss is at its floor after 120; with twice the learning rate a glm_moe_dsa may diverge
VERBS = ["add", "read", "sort", "parse", "merge", "find", "split", "count", "write", "copy"]
NOUNS = ["rows", "names", "pages", "items", "words", "lines", "files", "paths"]
ARGS = ["first", "second", "left", "right", "value", "other", "total", "limit"]


def function(draw: random.Random) -> str:
    """A function of a few lines, and a call of it."""
    noun, a, b = draw.choice(NOUNS), *draw.sample(ARGS, 2)
    name = f"{draw.choice(VERBS)}_{noun}"
    lines = [f'"""The {noun} — {draw.randrange(100)} of them."""'] * (draw.random() < 0.3)
    for _ in range(draw.randrange(1, 4)):
        lines += draw.choice(
            [
                [f"{noun} = {draw.choice(VERBS)}_{draw.choice(NOUNS)}({draw.choice((a, b))})"],
                [f"if {a} {draw.choice('<>')} {b}:", f"    return {draw.choice((a, b, noun))}"],
                [f"for {b} in {a}.{noun}:", f"    {draw.choice(VERBS)}({b})"],
            ]
        )
    lines.append(f"return {draw.choice((f'{a} + {b}', f'{noun}[{b}]', noun))}")
    body = "".join(f"    {line}\n" for line in lines)
    return f"def {name}({a}, {b}):\n{body}\n\n{name}({draw.randrange(10)}, {draw.randrange(10)})\n"


def documents(count: int, seed: int) -> list[str]:
    draw = random.Random(seed)
    return ["\n\n".join(function(draw) for _ in range(draw.randrange(1, 4))) for _ in range(count)]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Token shards with their tokenizer beside them."""
    folder, texts = tmp_path_factory.mktemp("data"), documents(700, seed=0)
    tokenizer = tokenizers.train(texts, VOCAB)
    tokenizer.save(folder)
    write_documents(folder, "train", tokenizer, texts)
    return folder


def trained(case: str, data, folder) -> str:
    """A checkpoint of the family, after a short run in which the MTP layer is applied three times, as in GLM-5's."""
    sizes = {"hidden_size": 64, "intermediate_size": 128, "moe_intermediate_size": 48, "num_hidden_layers": 2}
    if case == "dsa_shared":
        sizes |= {"indexer_types": ("full", "shared"), "index_topk": 24}
    tokens = {"vocab_size": VOCAB, "eos_token_id": tokenizers.Tokenizer.from_dir(data).eos_ids}
    config = tiny_config(
        **{**CASES[case], **sizes, **tokens, "max_position_embeddings": 192, "first_k_dense_replace": 1}
    )
    model = folder / "model"
    model.mkdir()
    (model / "config.json").write_text(json.dumps(config.to_dict()))
    raw = {
        "model": str(model),
        "out": str(folder / "run"),
        "data": {"shards": str(data), "seq_len": 128},
        "optim": {"lr": 5e-3, "min_lr": 1e-3, "warmup_tokens": 20_000},
        "train": {"steps": STEPS, "batch_rows": 8, "micro_rows": 8, "seed": 1},
        "checkpoint": {"every_steps": 0},
        "mtp_steps": 3,
        "mtp_loss_weight": 1.0,
    }
    return str(pretrain(make_config(raw), quiet=True).checkpoint)


class Counted(Speculation):
    """Counts what each step drafted and accepted of a sequence: (drafted, accepted) -> how often."""

    def __init__(self, limit: int) -> None:
        super().__init__(limit)
        self.seen: Counter[tuple[int, int]] = Counter()

    def observe(self, tracks, drafted, accepted):
        self.seen.update((d, a) for d, a in zip(drafted, accepted, strict=True) if d)
        super().observe(tracks, drafted, accepted)

    def summary(self) -> tuple[int, float, list[int]]:
        """(verifications, mean accepted length, [with none, some, all accepted])."""
        steps = sum(self.seen.values())
        outcomes = (lambda d, a: a == 0, lambda d, a: 0 < a < d, lambda d, a: a == d)
        kinds = [sum(n for pair, n in self.seen.items() if is_one(*pair)) for is_one in outcomes]
        return steps, sum(a * n for (_, a), n in self.seen.items()) / steps, kinds


def prompts(tokenizer: tokenizers.Tokenizer) -> list[list[int]]:
    """Beginnings of other functions, from one token to some eighty, cut anywhere, in a word too."""
    draw, found = random.Random(7), []
    for text in documents(PROMPTS, seed=1):
        ids = tokenizer.encode_document(text)
        found.append(list(ids[: draw.randrange(1, min(len(ids), 80))]))
    return found


def params(i: int, sampled: bool) -> glmx.SamplingParams:
    """Other rules for every prompt; some texts end at a stop string, and some at the end of the document."""
    rules = {"temperature": 0, "max_tokens": 8 + i % 41, "logprobs": (None, 0, None, 2)[i % 4]}
    if sampled:
        rules |= {"temperature": (0.7, 1.0, 1.2)[i % 3], "top_p": (0.9, 1.0, 0.8, 0.95)[i % 4], "seed": 1000 + i}
    if i % 5 == 2:
        rules["stop"] = ["return", "):"][i % 2]
    if i % 7 == 3:
        rules |= {"presence_penalty": 0.5, "logit_bias": {i % VOCAB: 3.0}}
    return glmx.SamplingParams(**rules)


@pytest.mark.slow
@pytest.mark.parametrize("case", FAMILIES)
def test_500_prompts_give_what_plain_decoding_gives(case, data, tmp_path):
    checkpoint = trained(case, data, tmp_path)
    plain, drafting = (glmx.LLM(checkpoint, max_num_seqs=SLOTS) for _ in range(2))
    asked, family = prompts(plain.tokenizer), plain.model.config.model_type
    for sampled in (False, True):
        counted = drafting.engine.speculation = Counted(K)
        each = [params(i, sampled) for i in range(PROMPTS)]
        expected, found = ([out.outputs[0] for out in llm.generate(asked, each)] for llm in (plain, drafting))
        steps, mean, (none, some, every) = counted.summary()
        line = f"{family}, {'sampled' if sampled else 'greedy'}: {PROMPTS} prompts, {steps} verifications, "
        line += f"mean accepted length {mean:.2f} of {K}, none {none}, some {some}, all {every}"
        print("\n" + line, end="")
        different = [i for i, (one, other) in enumerate(zip(expected, found, strict=True)) if one != other]
        assert not different, f"{line}; other results for prompts {different[:9]}"
        assert min(none, some, every) >= 100 and (sampled or mean >= 1.5), line
        ended = Counter(type(out.stop_reason) for out in found)  # int: at an end token; str: at a stop string
        assert min(ended[int], ended[str], ended[type(None)]) >= 20, (line, ended)
