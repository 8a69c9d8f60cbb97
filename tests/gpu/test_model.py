"""A glm4_moe on a GPU: the CPU's bits in fp32, close to them in bf16; X1 to X4; runs that resume to the same bits.

The model has several tiles of everything: 384 wide, 32 experts of 192, four layers and an MTP layer. Its attention, its
draws and its optimizer run on the CPU (docs/device.md).
"""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import glmx
from glmx import ops
from glmx.models import checkpoint
from glmx.models.batch import Batch
from glmx.models.decoder import Decoder
from tests.gpu.device import ON_CUDA, need_device
from tiny_glm import random_ids, random_model, tiny_config

DEVICE = need_device()
SIZES = {
    "vocab_size": 1100,
    "hidden_size": 384 if ON_CUDA else 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 64 if ON_CUDA else 16,
    "intermediate_size": 500,
    "moe_intermediate_size": 192 if ON_CUDA else 24,
    "n_routed_experts": 32,
    "num_experts_per_tok": 4,
    "use_qk_norm": True,
    "attention_bias": True,
    "routed_scaling_factor": 1.5,
}
CONFIG = tiny_config(**SIZES)
both = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)


@pytest.fixture(scope="module")
def paths(tmp_path_factory: pytest.TempPathFactory) -> dict[torch.dtype, Path]:
    base = tmp_path_factory.mktemp("models")
    return {
        dtype: checkpoint.save(scaled(random_model(CONFIG, 1, dtype)), base / str(dtype))
        for dtype in (torch.bfloat16, torch.float32)
    }


@torch.no_grad()
def scaled(model: Decoder) -> Decoder:
    """Matrices as wide as these keep values near 1: random_model's are made for 32 columns."""
    for name, tensor in model.state_dict().items():
        if tensor.dim() > 1 and "embed" not in name:
            tensor.mul_(tensor.shape[-1] ** -0.5 / 0.2)
    return model


@torch.no_grad()
def forward(model: Decoder, ids: torch.Tensor) -> torch.Tensor:
    """Logits of the decoder and of its MTP layer, [B, T, 2 V]."""
    out = model(ids, mtp=True)
    assert out.mtp_logits is not None and out.logits.device == model.device
    return torch.cat([out.logits, out.mtp_logits], -1)


def load(paths: dict[torch.dtype, Path], dtype: torch.dtype, device: Any = DEVICE) -> Decoder:
    return glmx.load(paths[dtype], device, mapped=True)


def test_fp32_is_the_cpus_to_the_bit(paths: dict[torch.dtype, Path]) -> None:
    """Every op has one tree for all hardware, but for products of bf16."""
    ids = random_ids(CONFIG, 3, 150)
    here, there = forward(load(paths, torch.float32, "cpu"), ids), forward(load(paths, torch.float32), ids).cpu()
    assert there.isfinite().all()
    assert torch.equal(here, there), f"{int((here != there).sum())} of {here.numel()} logits differ"


def test_bf16_is_as_close_to_fp32_as_the_cpus(paths: dict[torch.dtype, Path]) -> None:
    """The same weights in fp32 are what both round. Medians: an expert that a rounding swaps is no fault."""
    ids = random_ids(CONFIG, 8, 150)
    exact = forward(glmx.load(paths[torch.bfloat16], "cpu", "fp32"), ids).double()

    def error(model: Decoder) -> torch.Tensor:
        rows = (forward(model, ids).cpu().double() - exact).norm(dim=-1) / exact.norm(dim=-1)
        assert rows[:, :-1].isfinite().all()  # the MTP layer has no last row
        return rows[:, :-1].flatten()

    here, there = error(load(paths, torch.bfloat16, "cpu")), error(load(paths, torch.bfloat16))
    assert 0 < there.median() < 1.25 * here.median(), f"median {there.median():.2e}, the CPU's is {here.median():.2e}"
    assert there.quantile(0.9) < 1.5 * here.quantile(0.9)


@both
def test_repeats(paths: dict[torch.dtype, Path], dtype: torch.dtype) -> None:
    model, ids = load(paths, dtype), random_ids(CONFIG, 4, 100)
    first = forward(model, ids)
    for _ in range(3):
        assert torch.equal(forward(model, ids), first)


@both
def test_other_sequences_do_not_show(paths: dict[torch.dtype, Path], dtype: torch.dtype) -> None:
    """X2: each of 9 ragged sequences alone, and all of them together."""
    model = load(paths, dtype)
    lengths = [1, 2, 7, 63, 64, 65, 129, 0, 33]
    ids = random_ids(CONFIG, len(lengths), max(lengths))
    with torch.no_grad():
        together = model(ids, lengths=lengths).logits
        for b, n in enumerate(lengths):
            if n:
                assert torch.equal(model(ids[b : b + 1, :n]).logits[0], together[b, :n]), f"{n} tokens"
            assert not together[b, n:].any()


@both
@torch.no_grad()
def test_one_shot_chunks_and_decode_agree(paths: dict[torch.dtype, Path], dtype: torch.dtype) -> None:
    """X3, over the MTP layer too."""
    model, T = load(paths, dtype), 140 if ON_CUDA else 70
    ids = random_ids(CONFIG, 1, T)[0].to(model.device)
    places = torch.arange(T, device=model.device)

    def in_pieces(sizes: list[int]) -> torch.Tensor:
        state, found, at = model.new_state(1, T), [], 0
        slot = state.allocate()
        for size in sizes:
            span, batch = slice(at, at + size), Batch([0, size], [at + size], [slot])
            hidden = model.forward_tokens(ids[span], places[span], batch, state)
            known = min(at + size, T - 1) - at  # rows whose next token there is
            ahead, entry = Batch([0, known], [at + known], [slot]), slice(at + 1, at + 1 + known)
            z = model.mtp_hidden(hidden[:known], ids[entry], places[at : at + known], ahead, state)
            found += [model.logits(hidden), model.logits(z)]
            at += size
        return torch.cat(found[::2] + found[1::2])

    one_shot = in_pieces([T])
    assert one_shot.isfinite().all()
    assert torch.equal(one_shot[:T], model(ids[None]).logits[0]), "over a cache and without one"
    for sizes in ([64, T - 64], [1, 5, 32, T - 38], [7] * (T // 7), [1] * T):
        assert torch.equal(in_pieces(sizes), one_shot), f"in pieces of {sizes[:4]}"


def test_the_trainer_and_the_server_give_the_same_logprobs(paths: dict[torch.dtype, Path]) -> None:
    """X4, with gradients asked for on the one side, and a batch of decode steps on the other."""
    llm = glmx.LLM(paths[torch.bfloat16], device=DEVICE, max_num_seqs=4, max_model_len=128)
    prompts = [random_ids(CONFIG, 1, 3 + 20 * n, seed=n)[0].tolist() for n in range(4)]
    params = glmx.SamplingParams(temperature=1.0, seed=3, max_tokens=24, ignore_eos=True, logprobs=0)
    served = [out.outputs[0] for out in llm.generate(prompts, params)]
    model = glmx.load(paths[torch.bfloat16], DEVICE).train()
    rows = [prompt + out.token_ids for prompt, out in zip(prompts, served, strict=True)]
    batch = Batch.from_lengths([len(row) - 1 for row in rows])
    ids = torch.tensor([i for row in rows for i in row[:-1]], device=model.device)
    targets = torch.tensor([i for row in rows for i in row[1:]], device=model.device)
    places = torch.cat([torch.arange(n, device=model.device) for n in batch.q_lens])
    hidden = model.forward_tokens(ids, places, batch)
    assert hidden.requires_grad
    trained = ops.lm_head_logprob(hidden, model.lm_head.weight, targets).logprob.detach().cpu().split(batch.q_lens)
    for row, out, logprobs in zip(rows, served, trained, strict=True):
        theirs = [found[token].logprob for found, token in zip(out.logprobs, out.token_ids, strict=True)]
        assert theirs == logprobs[len(row) - 1 - len(theirs) :].tolist()


def test_drafts_and_batches_do_not_show(paths: dict[torch.dtype, Path]) -> None:
    """Greedy and sampled texts are the same with speculation, and alone."""
    prompts = [random_ids(CONFIG, 1, 4 + 9 * n, seed=n)[0].tolist() for n in range(5)]
    params = [
        glmx.SamplingParams(temperature=t, seed=n, max_tokens=20, ignore_eos=True) for n, t in enumerate([0, 1] * 3)
    ]

    def texts(drafts: int, seqs: int) -> list[list[int]]:
        llm = glmx.LLM(
            paths[torch.bfloat16], device=DEVICE, max_num_seqs=seqs, max_model_len=96, num_speculative_tokens=drafts
        )
        return [out.outputs[0].token_ids for out in llm.generate(prompts, params[:5])]

    plain = texts(0, 5)
    assert texts(0, 1) == texts(3, 5) == texts(2, 2) == plain


# Training.
TINY_RUN = {**SIZES, "vocab_size": 512, "num_hidden_layers": 2}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A run of 4 steps, saved every second: fresh weights, documents that count upwards."""
    pytest.importorskip("msgspec")
    from glmx.data.shards import ShardWriter

    base, rng = tmp_path_factory.mktemp("run"), np.random.default_rng(0)
    (base / "model").mkdir()
    (base / "model" / "config.json").write_text(json.dumps(tiny_config(**TINY_RUN).to_dict()))
    with ShardWriter(base, "train", vocab_size=512) as writer:
        for length in rng.integers(3, 300, size=80):
            writer.add((rng.integers(512) + np.cumsum(1 + (rng.random(length) < 0.2))) % 512)
    return {
        "model": str(base / "model"),
        "data": {"shards": str(base), "seq_len": 64},
        "optim": {"lr": 1e-2, "min_lr": 1e-3},
        "train": {"steps": 4, "batch_rows": 8, "micro_rows": 4, "dtype": "bf16", "seed": 3, "device": str(DEVICE)},
        "checkpoint": {"every_steps": 2},
    }


def trained(run: dict[str, Any], out: Path, steps: int = 4, **train: Any) -> dict[str, torch.Tensor]:
    """All that the last checkpoint of `steps` steps holds."""
    from safetensors.torch import load_file

    from glmx.train.config import make_config
    from glmx.train.loop import pretrain, train_step
    from glmx.train.run import Run

    raw = copy.deepcopy(run) | {"out": str(out)}
    raw["train"] |= train
    if steps < raw["train"]["steps"]:  # stopped at a checkpoint, as Ctrl-C stops
        started = Run.start(make_config(raw))
        for _ in range(steps):
            train_step(started)
        started.save()
        started.close()
    else:
        pretrain(make_config(raw), quiet=True)
    last = out / f"step-{steps:08d}"
    return {**load_file(last / "model.safetensors"), **load_file(last / "trainer" / "state.safetensors")}


def differing(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> list[str]:
    assert a.keys() == b.keys() and len(a) > 50
    return [name for name in a if not torch.equal(a[name], b[name])]


def test_a_run_repeats_and_resumes_to_the_same_bits(run: dict[str, Any], tmp_path: Path) -> None:
    whole = trained(run, tmp_path / "whole")
    assert all(tensor.isfinite().all() for tensor in whole.values() if tensor.is_floating_point())
    assert not differing(whole, trained(run, tmp_path / "again"))
    trained(run, tmp_path / "resumed", steps=2)
    assert not differing(whole, trained(run, tmp_path / "resumed"))


def test_an_fp32_run_is_the_cpus_to_the_bit(run: dict[str, Any], tmp_path: Path) -> None:
    """Forward, gradients, balance and optimizer."""
    there = trained(run, tmp_path / "there", dtype="fp32")
    here = trained(run, tmp_path / "here", dtype="fp32", device="cpu")
    assert not (names := differing(here, there)), f"{len(names)} of {len(here)} tensors, first {names[:4]}"


def test_a_bf16_run_has_about_the_losses_of_the_cpus(run: dict[str, Any], tmp_path: Path) -> None:
    def losses(out: Path) -> list[float]:
        return [json.loads(line)["loss"] for line in (out / "log.jsonl").read_text().splitlines()]

    trained(run, tmp_path / "there")
    trained(run, tmp_path / "here", device="cpu")
    here, there = losses(tmp_path / "here"), losses(tmp_path / "there")
    assert len(here) == 4 and there == pytest.approx(here, rel=5e-3)
