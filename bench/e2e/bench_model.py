"""Whole models of random weights: decoding, prompts and training steps, beside transformers and llama.cpp.

    pytest bench/e2e/bench_model.py            (OMP_NUM_THREADS sets the threads; with 8 GB of memory)

A glm4_moe of 240 M parameters and a glm_moe_dsa of 244 M, bf16. Serving is one sequence, greedy. Ours is the engine,
with no drafts: a prompt's step, or the steps behind it. transformers has the same weights, its grouped_mm experts and a
DynamicCache; its decoding is a plain loop, one forward and one argmax a token, without generate(). llama.cpp
(e2e/llama_cpp.py: glm4_moe alone, where it is installed) decodes likewise through its C interface. All make the logits
of the last position alone, and each goes on with its own tokens: bf16 rounds differently in each, and the choices of
random weights are close calls. So what is compared before is the logits of most positions, and that the token behind
the prompt is among the best of ours.

A decode round is the next tokens of a sequence that goes on; its bound is the bytes that the steps must read
(random_models.Bytes). A training step is 2 x 256 tokens: ours glmx.train.loop's, with fp32 masters and sums of
gradients, clipping, the balance loss and the log's record; theirs forward, backward and torch's fused AdamW on bf16
weights, without clipping.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import harness
import pytest
import torch
from e2e import llama_cpp
from e2e.random_models import GLM4, GLM5, TINY, Bytes, forward_flop, random_model

from glmx.data.packing import PackedBatch
from glmx.models import config_json
from glmx.models.decoder import Decoder
from glmx.serve.engine import Engine, Request
from glmx.serve.sampling import SamplingParams
from glmx.serve.text import TextStream
from glmx.train.config import Data, Optim, PretrainConfig, Train
from glmx.train.loop import train_step
from glmx.train.run import Run
from tiny_glm import hf_state_dict

SHAPES = {shape["model_type"]: shape for shape in (GLM4, GLM5)}
SHORT = 96  # tokens of the prompt of a short context
CHECKED, KEPT = 256, 16  # tokens of the prompt whose last logits are compared


class Ours:
    """One sequence of at most `max_tokens` tokens, by the engine."""

    def __init__(self, model: Decoder, max_tokens: int) -> None:
        self.model, self.engine = model, Engine(model, 1, max_tokens)
        self.params = SamplingParams(temperature=0, max_tokens=max_tokens)

    def begin(self, ids: list[int]) -> int:
        """The token behind a prompt; what ran before ends."""
        for request in self.engine.running[:]:
            self.engine.abort(request)
        self.request = Request("0", ids, self.params, 0, frozenset(), TextStream(None, self.params))
        self.engine.add(self.request)
        self.advance(1)
        return self.request.token_ids[0]

    def advance(self, tokens: int) -> None:
        """The next tokens of the sequence."""
        before = len(self.request.token_ids)
        for _ in range(tokens):
            self.engine.step()
        assert self.request.error is None, self.request.error
        assert len(self.request.token_ids) == before + tokens


class Transformers:
    def __init__(self, twin: Any) -> None:
        self.twin = twin

    def logits(self, ids: list[int], keep: int) -> torch.Tensor:
        return self.twin(torch.tensor([ids]), logits_to_keep=keep).logits[0].float()

    def begin(self, ids: list[int]) -> int:
        from transformers.cache_utils import DynamicCache

        self.cache = DynamicCache(config=self.twin.config)
        self.last = torch.tensor([ids])
        self.advance(1)
        return int(self.last)

    def advance(self, tokens: int) -> None:
        for _ in range(tokens):
            out = self.twin(self.last, past_key_values=self.cache, use_cache=True, logits_to_keep=1)
            self.last = out.logits[:, -1].argmax(-1, keepdim=True)


def transformers_twin(model: Decoder, weights: dict[str, torch.Tensor]) -> Any:
    """transformers' model over the given tensors themselves."""
    import transformers

    family = config_json.FAMILIES[model.config.model_type][0]
    kind = getattr(transformers, family.replace("ForCausalLM", "Config"))
    config = kind.from_dict(json.loads(json.dumps(model.config.to_dict())))
    config._experts_implementation = "grouped_mm"
    with torch.device("meta"):
        twin = getattr(transformers, family)(config)
    assert twin.config._experts_implementation == "grouped_mm"
    twin.load_state_dict(weights, assign=True)
    twin.model.rotary_emb = type(twin.model.rotary_emb)(config)  # no checkpoint has its tables
    return twin.eval()


@pytest.fixture(scope="session")  # one for all numbers of threads
def world() -> Callable[[str, bool], SimpleNamespace]:
    """world(family, small): a model, `peers`, each a function of LlamaCpp's arguments, and `note`; compared once."""
    made: dict[tuple[str, bool], SimpleNamespace] = {}

    def make(family: str, small: bool) -> SimpleNamespace:
        if (family, small) not in made:
            made[family, small] = compared(family, small)
        return made[family, small]

    return make


def of_shape(family: str, small: bool) -> Decoder:
    """Without an MTP layer."""
    shape = {**SHAPES[family], "num_nextn_predict_layers": 0}
    if small:
        shape |= TINY
        if "index_topk" in shape:
            shape["index_topk"] = 32
    return random_model(shape)


def name_of(model: Decoder) -> str:
    return f"{model.config.model_type} {model.config.num_parameters() / 1e6:.0f} M"


@torch.no_grad()
def compared(family: str, small: bool) -> SimpleNamespace:
    model = of_shape(family, small)
    twin = transformers_twin(model, hf_state_dict(model))
    peers: dict[str, Callable[..., Any]] = {"transformers": lambda *_: Transformers(twin)}
    if llama_cpp.installed() and model.config.model_type == "glm4_moe":
        weights = llama_cpp.Weights(model)
        peers["llama.cpp bf16"] = lambda *args: llama_cpp.LlamaCpp(weights, *args)
    ids = prompt(model, CHECKED)
    expected = model(torch.tensor([ids]), logits_to_keep=KEPT).logits[0]
    for peer, make in peers.items():
        found = make(CHECKED).logits(ids, KEPT)
        error = ((found - expected).norm(dim=-1) / expected.norm(dim=-1)).sort().values
        # A few experts and keys are chosen by the last bit: most rows must agree, none be far away.
        assert error[len(error) // 2] < 2**-4 and error[-1] < 0.5, f"{peer}: {error} away from glmx"
    return SimpleNamespace(model=model, peers=peers, note="")


def prompt(model: Decoder, tokens: int) -> list[int]:
    return torch.randint(model.config.vocab_size, (tokens,), generator=torch.Generator().manual_seed(tokens)).tolist()


def begun(
    w: SimpleNamespace, ids: list[int], max_tokens: int, flash: bool = True, within: float = 1.0
) -> dict[str, Any]:
    """All of them, with the prompt computed: "glmx" and the peers, whose tokens are `within` so much of the best."""
    runners = {"glmx": Ours(w.model, max_tokens), **{peer: make(max_tokens, flash) for peer, make in w.peers.items()}}
    logits_V = w.model(torch.tensor([ids]), logits_to_keep=1).logits[0, -1]
    for name, runner in runners.items():
        token = runner.begin(ids)
        below = float((logits_V.max() - logits_V[token]) / logits_V.std())
        # In deviations. The best of 32,000 are four above the mean.
        assert below <= within * (name != "glmx"), f"{name} goes on with token {token}, {below} below the best"
    return runners


def peers_of(runners: dict[str, Any], call: Callable[[Any], object]) -> dict[str, Callable[[], object]]:
    return {name: lambda runner=runner: call(runner) for name, runner in runners.items() if name != "glmx"}


def with_rate(
    record_row: Callable, tokens: int, words: str = "", per_token: bool = False
) -> Callable[[harness.Row], None]:
    """record_row for rounds of `tokens` tokens, with a note; `per_token`: the row's time is one token's."""

    def record(row: harness.Row) -> None:
        seconds = row.seconds / tokens if per_token else row.seconds
        note = "; ".join(filter(None, [f"{tokens / row.seconds:.0f} tok/s", words]))
        record_row(dataclasses.replace(row, seconds=seconds, note=note))

    return record


def decode(
    benchmark, record_row, w: SimpleNamespace, name: str, keys: int, tokens: int, rounds: int, **begin: Any
) -> None:
    """A row of `tokens` more tokens a round, behind a prompt of `keys`; `begin` is for `begun`."""
    keys, tokens = (min(keys, 128), 2) if benchmark.disabled else (keys, tokens)
    # Of ours also the round that is counted: the context of the others is a little longer.
    runners = begun(w, prompt(w.model, keys), keys + 1 + tokens * (rounds + 2), **begin)
    with Bytes(w.model) as counted:
        runners["glmx"].advance(tokens)
    if benchmark.disabled:
        for runner in runners.values():
            runner.advance(tokens)
        return
    words = "; ".join(filter(None, [f"{counted.total / tokens / 1e6:.0f} MB a token", w.note]))
    harness.compare(
        benchmark,
        with_rate(record_row, tokens, words, per_token=True),
        f"{name}, decode at {keys} tokens",
        "grouped_gemm",
        lambda: runners["glmx"].advance(tokens),
        peers_of(runners, lambda runner: runner.advance(tokens)),
        flop=2.0 * tokens * w.model.config.num_active_parameters(),
        touched=counted.total,
        rounds=rounds,
    )


def prefill(benchmark, record_row, w: SimpleNamespace, name: str, tokens: int, rounds: int, **begin: Any) -> None:
    """A row of a prompt of `tokens`."""
    tokens = min(tokens, 128) if benchmark.disabled else tokens
    ids = prompt(w.model, tokens)
    runners = begun(w, ids, tokens + 1, **begin)
    if benchmark.disabled:
        return
    harness.compare(
        benchmark,
        with_rate(record_row, tokens, w.note),
        f"{name}, prefill of {tokens}",
        "grouped_gemm",
        lambda: runners["glmx"].begin(ids),
        peers_of(runners, lambda runner: runner.begin(ids)),
        flop=forward_flop(w.model.config, tokens, 1),
        touched=float(sum(tensor.nbytes for tensor in w.model.tensors())),
        rounds=rounds,
        warmup_rounds=0,
    )


@torch.no_grad()
@pytest.mark.parametrize(
    ("family", "keys", "tokens", "rounds"),
    [("glm4_moe", SHORT, 16, 7), ("glm4_moe", 4096, 16, 7), ("glm_moe_dsa", 4096, 4, 5)],
)
def test_decode(benchmark, record_row, world, family: str, keys: int, tokens: int, rounds: int) -> None:
    w = world(family, benchmark.disabled)
    decode(benchmark, record_row, w, name_of(w.model), keys, tokens, rounds, flash=keys < 4096 or benchmark.disabled)


@torch.no_grad()
@pytest.mark.parametrize(
    ("family", "tokens", "rounds"),
    [("glm4_moe", 256, 5), ("glm4_moe", 2048, 3), ("glm_moe_dsa", 2048, 3)],
)
def test_prefill(benchmark, record_row, world, family: str, tokens: int, rounds: int) -> None:
    w = world(family, benchmark.disabled)
    prefill(benchmark, record_row, w, name_of(w.model), tokens, rounds)


ROWS, SEQ_LEN = 2, 256


def test_train_step(benchmark, record_row) -> None:
    small = benchmark.disabled
    model = of_shape("glm4_moe", small)
    config, seq_len = model.config, 16 if small else SEQ_LEN
    twin = transformers_twin(model, {key: tensor.clone() for key, tensor in hf_state_dict(model).items()}).train()
    ids = torch.tensor([prompt(model, ROWS * seq_len)]).view(ROWS, seq_len)
    adamw = torch.optim.AdamW(twin.parameters(), lr=1e-4, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    run = trainer(model, ids)

    def theirs() -> float:
        adamw.zero_grad()
        loss = twin(ids, labels=ids, use_cache=False).loss
        loss.backward()
        adamw.step()
        return loss.item()

    # The second losses show that both have learned from the first; later ones drift apart.
    for _ in range(2):
        mine, other = train_step(run)["loss"], theirs()
        assert abs(mine - other) < 2**-8 * other, f"loss {mine}, of transformers {other}"
    if small:
        return
    read = 2 * 2 + 4 * 4  # of a weight forward and backward; its gradient, master and moments
    harness.compare(
        benchmark,
        with_rate(record_row, ids.numel()),
        f"{name_of(model)}, training step of {ROWS} x {seq_len}",
        "grouped_gemm",
        lambda: train_step(run),
        {"transformers": theirs},
        flop=3.0 * ROWS * forward_flop(config, seq_len, seq_len),
        touched=1.0 * read * config.num_parameters(),
        rounds=3,
        warmup_rounds=0,
    )


def trainer(model: Decoder, ids: torch.Tensor) -> Run:
    """A run whose every step is of the same rows, as transformers sees them: a row's last token has no target."""
    rows, seq_len = ids.shape
    none = torch.full((rows, 1), -1)
    batch = PackedBatch(
        ids=ids.flatten(),
        positions=torch.arange(seq_len).repeat(rows),
        targets=torch.cat([ids[:, 1:], none], 1).flatten(),
        next_ids=torch.zeros(1, ids.numel(), dtype=torch.int64),
        mtp_targets=torch.full((1, ids.numel()), -1),
        cu_seqlens=[row * seq_len for row in range(rows + 1)],
    )
    config = PretrainConfig(
        model="",
        out="",
        data=Data(shards="", seq_len=seq_len),
        optim=Optim(lr=1e-4, min_lr=1e-4),
        train=Train(steps=1 << 20, batch_rows=rows, micro_rows=rows),
    )
    return Run(config, model, None, SimpleNamespace(next_step=lambda: [batch]))
