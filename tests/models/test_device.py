"""--device's words, and a model on a GPU that this CPU plays: the CPU's bits, no tensor on the wrong side."""

from __future__ import annotations

import pytest
import torch
from tests.played_cuda import CUDA, Played, a_card, played

import glmx
from glmx import runtime
from glmx.data.packing import Documents, HeldoutRows
from glmx.errors import UnsupportedError
from glmx.models import acceptance, checkpoint, device, likelihood
from glmx.models.batch import Batch
from glmx.models.decoder import Decoder
from stored_glm import FORMATS, write
from tiny_glm import CASES, random_ids, random_model, tiny_config

GQA = [name for name, changes in CASES.items() if "model_type" not in changes]
MLA = sorted(CASES.keys() - set(GQA))


def saved(tmp_path, case, dtype=torch.bfloat16):
    model = random_model(tiny_config(**CASES[case]), 1, dtype)
    checkpoint.save(model, tmp_path / "ckpt")
    return model, tmp_path / "ckpt"


def inner(tensor):
    assert isinstance(tensor, Played), "expected a tensor on the GPU"
    return tensor.inner


def test_the_words_of_a_cpu():
    assert device.choose("auto") == device.choose("cpu") == device.choose(torch.device("cpu")) == torch.device("cpu")
    for word in ("gpu", "cuda:", "cuda:x", "cuda:-1", "meta", "", "cpu:0", "cuda:0 "):
        with pytest.raises(UnsupportedError, match=rf"^device {word!r}: expected auto, cpu, cuda or cuda:N$"):
            device.choose(word)


def test_what_is_missing_is_named(monkeypatch):
    """A build without kernels, torch without CUDA, no card, no such card, too old a card; in this order."""
    cpu_build = {**runtime.native().build_info(), "cuda": None}
    monkeypatch.setattr(runtime.native(), "build_info", lambda: cpu_build)
    with pytest.raises(UnsupportedError, match=r"device 'cuda': this build of glmx has no CUDA backend, only cpu"):
        device.choose("cuda")
    with a_card(), monkeypatch.context() as patch:
        patch.setattr(torch.version, "cuda", None)
        with pytest.raises(UnsupportedError, match=r"device 'cuda:0': torch .* is built without CUDA"):
            device.choose("cuda:0")
    with a_card(count=0), pytest.raises(UnsupportedError, match=r"device 'cuda:1': CUDA finds no GPU on this machine"):
        device.choose("cuda:1")
    with a_card(count=2):
        both = r"cuda:0 \(Played GPU\), cuda:1 \(Played GPU\)"
        with pytest.raises(UnsupportedError, match=rf"^device 'cuda:2': this machine has {both}$"):
            device.choose("cuda:2")
        assert device.choose("cuda") == CUDA and device.choose("cuda:1") == torch.device("cuda", 1)
        assert device.choose("auto") == torch.device("cpu")  # until a GPU runs all of a model
    with a_card(capability=(7, 5)), pytest.raises(UnsupportedError, match=r"Played GPU has compute capability 7\.5"):
        device.choose("cuda")


def test_a_driver_that_does_not_answer(monkeypatch):
    def fails():
        raise RuntimeError("The NVIDIA driver on your system is too old\nand more")

    with a_card():
        monkeypatch.setattr(torch.cuda, "current_device", fails)
        with pytest.raises(UnsupportedError, match=r"^device 'cuda': The NVIDIA driver on your system is too old$"):
            device.choose("cuda")


def test_numerics_ids_of_devices():
    with a_card():
        assert device.hardware(torch.device("cpu")) == "x86" and device.hardware(CUDA) == "sm90"
        assert device.words(CUDA) == "cuda:0: Played GPU"
    x86, sm90 = runtime.numerics_id("bf16"), runtime.numerics_id("bf16", "sm90")
    assert x86 == "x86-" + sm90.removeprefix("sm90-") and sm90.startswith("sm90-")


@pytest.mark.parametrize("case", MLA)
def test_other_families_are_refused_by_name(case, tmp_path):
    model, path = saved(tmp_path, case)
    words = rf"^device 'cuda:0': {model.config.model_type} runs on cpu so far, on a GPU only glm4_moe does$"
    with a_card():
        with pytest.raises(UnsupportedError, match=words):
            glmx.load(path, "cuda")
        with pytest.raises(UnsupportedError, match=words):
            Decoder(model.config, torch.float32, CUDA)


@torch.no_grad()
def results(model):
    """Whole and padded, with MTP; over a cache, in pieces, taken back and forked."""
    ids = random_ids(model.config, 3, 80)
    whole, padded = model(ids, mtp=True), model(ids, lengths=torch.tensor([3, 80, 0]))
    state = model.new_state(4, 90)
    pieces = [model(piece, state=state).logits for piece in ids.split([70, 1, 9], 1)]
    state.truncate(1, 7)
    state.fork(0)
    lengths = list(state.lengths)
    batch = Batch([0, 2, 3], [lengths[0] + 2, lengths[1] + 1], [3, 1])
    places = torch.tensor([lengths[0], lengths[0] + 1, lengths[1]], device=model.device)
    forked = model.logits(model.forward_tokens(ids[0, :3].to(model.device), places, batch, state))
    last = model(ids[:, :4], logits_to_keep=1)
    return [whole.logits, whole.mtp_logits, padded.logits, *pieces, forked, last.logits]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("case", GQA)
def test_a_forward_there_is_one_here(case, dtype, tmp_path):
    """And the model that was loaded there is saved as the same files."""
    model, path = saved(tmp_path, case, dtype)
    with played():
        there = glmx.load(path, "cuda", mapped=True, check_finite=True)
        assert there.device == CUDA and all(isinstance(tensor, Played) for tensor in there.tensors())
        got = results(there)
        checkpoint.save(there, tmp_path / "again")
    for here, value in zip(results(model), got, strict=True):
        assert torch.equal(here, inner(value))
    for file in path.iterdir():
        assert (tmp_path / "again" / file.name).read_bytes() == file.read_bytes()


def test_fresh_weights_are_the_same_there():
    config = tiny_config(**CASES["qk_norm_bias"])
    here = Decoder(config, torch.bfloat16)
    here.init_weights(3)
    with played():
        there = Decoder(config, torch.bfloat16, CUDA)
        there.init_weights(3)
        for mine, tensor in zip(here.tensors(), there.tensors(), strict=True):
            assert torch.equal(mine, inner(tensor))


def test_rows_on_the_wrong_side_are_named(tmp_path):
    _, path = saved(tmp_path, "plain")
    ids, places, batch = torch.tensor([1, 2]), torch.arange(2), Batch([0, 2])
    with played():
        model = glmx.load(path, "cuda")
        with pytest.raises(ValueError, match="^ids_T is on cpu, the model on cuda:0$"):
            model.forward_tokens(ids, places.to(CUDA), batch)
        with pytest.raises(ValueError, match="^positions_T is on cpu, the model on cuda:0$"):
            model.forward_tokens(ids.to(CUDA), places, batch)


def test_a_decode_step_brings_over_its_own_rows_alone(tmp_path):
    """Neither weights nor what the cache holds: per layer q, k, v and out of two rows, and what says where they are."""
    _, path = saved(tmp_path, "qk_norm_bias")
    with played() as copies, torch.no_grad():
        model = glmx.load(path, "cuda")
        config, state = model.config, model.new_state(2, 500)
        ids = random_ids(config, 2, 401)
        model(ids[:, :400], state=state)
        copies.number = copies.nbytes = 0
        model(ids[:, 400:], state=state)
    heads = 2 * config.num_attention_heads + 2 * config.num_key_value_heads
    rows = config.num_hidden_layers * 2 * heads * config.head_dim * 2
    assert copies.nbytes <= rows + 2 * 8 * 2 and copies.number <= 4 * config.num_hidden_layers + 3


@pytest.mark.parametrize("format", FORMATS)
def test_weights_in_few_bits_are_refused_unless_asked_for_as_bf16(format, tmp_path):
    model = random_model(tiny_config(hidden_size=128, moe_intermediate_size=128), 1)
    expected = write(model, tmp_path / "small", format)
    with played():
        words = (
            rf"^device 'cuda:0': .* holds weights in {format} \(tensor .*_proj.weight\), which only the cpu computes"
        )
        with pytest.raises(UnsupportedError, match=words):
            glmx.load(tmp_path / "small", "cuda", mapped=True)
        there = glmx.load(tmp_path / "small", "cuda", dequantize=True, mapped=True)
        for name, tensor in checkpoint.views(there).items():
            assert torch.equal(inner(tensor), expected[name].to(tensor.dtype)), name
        assert inner(glmx.load(tmp_path / "small", "cuda", "fp32").lm_head.weight).dtype == torch.float32


def test_memory_of_a_gpu_is_not_locked(tmp_path):
    _, path = saved(tmp_path, "plain")
    with a_card(), pytest.raises(UnsupportedError, match="lock is True and device 'cuda:0'"):
        glmx.load(path, "cuda", lock=True)


def test_a_copy_that_differs_is_found_there_too(tmp_path):
    from safetensors.torch import load_file, save_file

    model, path = saved(tmp_path, "tied")
    file = path / "model.safetensors"
    tensors = load_file(file)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, file)
    with played():
        glmx.load(path, "cuda")
        tensors["lm_head.weight"][5, 5] += 1
        save_file(tensors, file)
        with pytest.raises(UnsupportedError, match=r"lm_head\.weight differs"):
            glmx.load(path, "cuda")


def test_measurements_there_are_those_here(tmp_path):
    """Accepted drafts and the likelihood of a text."""
    model, path = saved(tmp_path, "qk_norm_bias")
    ids = random_ids(model.config, 1, 60)[0]
    rows = HeldoutRows(Documents([ids.tolist()]), seq_len=24, batch_tokens=48, context=6)
    lengths = torch.arange(model.config.vocab_size)
    here = acceptance.measure(model, [(ids, Batch([0, 20, 60]))], 3), likelihood.measure(model, rows, lengths)
    assert here[1].bytes > 0 and here[0].places == 58
    with played():
        there = glmx.load(path, "cuda")
        assert acceptance.measure(there, [(ids, Batch([0, 20, 60]))], 3) == here[0]
        assert likelihood.measure(there, rows, lengths) == here[1]
