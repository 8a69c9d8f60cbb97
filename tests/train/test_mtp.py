"""Several steps of the MTP layer: against plain torch in fp64, at borders, the lists they share, whole runs."""

import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from plain_mtp import mtp_chain
from safetensors.torch import load_file

from glmx import ops
from glmx.data.packing import PackedBatch, _batch
from glmx.errors import ConfigError
from glmx.train import checkpoint
from glmx.train.balance import ExpertLoads
from glmx.train.config import make_config
from glmx.train.loop import pretrain
from glmx.train.loss import Denominators, Losses, forward_backward, mtp_passes
from glmx.train.optim import AdamW, part_of
from tiny_glm import CASES, FAMILIES, hf_twin, random_ids, random_model, tiny_config

S = 3
# (tokens of the document from a row's first on, of which the row holds so many): one is cut, one is shorter than S.
PIECES = [(11, 11), (2, 2), (12, 9), (5, 5), (1, 1)]


def packed(config, mtp_steps=S) -> tuple[list[torch.Tensor], PackedBatch]:
    """The pieces' tokens, with up to mtp_steps + 1 behind the row's, and the micro-batch of them."""
    documents = random_ids(config, 1, sum(tokens for tokens, _ in PIECES), 2)[0].split([n for n, _ in PIECES])
    segments = [(d.numpy(), length, 0) for d, (_, length) in zip(documents, PIECES, strict=True)]
    return list(documents), _batch(segments, mtp_steps)


def gradients(model, micro, kl_weight=0.0):
    optim = AdamW(model.named_parameters(), beta1=0.9, beta2=0.95, eps=1e-8, weight_decay=0.0)
    losses, counts = Losses(), Denominators.of([micro], micro.num_tokens)
    forward_backward(
        model, micro, counts, seq_len=micro.num_tokens, mtp_weight=0.3, aux_weight=0.0, kl_weight=kl_weight,
        losses=losses, loads=ExpertLoads(),
    )  # fmt: skip
    optim.fold_grads()
    return losses, {name: p.main_grad.clone() for name, p in model.named_parameters()}


@pytest.mark.parametrize("case", [*FAMILIES, "dsa"])
def test_losses_and_gradients_against_plain_torch_in_fp64(case):
    """Each document alone, by transformers and the plain MTP layer; rows that would need a token behind the document's
    last do not exist there. `dsa_shared` attends to the first step's keys, `dsa` selects in every step."""
    pytest.importorskip("transformers")
    model = random_model(tiny_config(**CASES[case]), 11)
    config, prefix = model.config, f"model.layers.{model.config.num_hidden_layers}."
    twin = hf_twin(model).double()
    twin.config._experts_implementation = "eager"  # the default one has no fp64
    documents, micro = packed(config)
    mtp = {
        k.removeprefix(prefix): v.double().requires_grad_("correction_bias" not in k)
        for k, v in model.state_dict().items()
        if k.startswith(prefix)
    }
    logprobs: list[list[torch.Tensor]] = [[] for _ in range(S + 1)]
    embed, head = twin.model.embed_tokens.weight, twin.lm_head.weight
    for ids, (_, length) in zip(documents, PIECES, strict=True):
        hidden = twin.model(ids[None, :length]).last_hidden_state[0]
        for s, z in enumerate([hidden, *mtp_chain(mtp, embed, config, hidden, ids, S)]):
            targets = ids[s + 1 : s + 1 + len(z)]
            logprobs[s].append(-F.cross_entropy(z[: len(targets)] @ head.T, targets, reduction="none"))
    main, *later = (-torch.cat(each).mean() for each in logprobs)
    (main + 0.3 * sum(later) / S).backward()
    theirs = {name: p.grad for name, p in twin.named_parameters()} | {prefix + k: v.grad for k, v in mtp.items()}

    losses, ours = gradients(model.train(), micro)
    assert losses.main == pytest.approx(main.item(), abs=1e-5)
    assert losses.mtp == pytest.approx([loss.item() for loss in later], abs=1e-5)
    for name, grad in ours.items():
        if part_of(name) == "indexer":
            assert not grad.any()
            continue
        expected = theirs.get(name)
        if expected is None:
            pair = [theirs[name.replace("gate_up_proj", part)] for part in ("gate_proj", "up_proj")]
            expected = torch.cat(pair)
        assert expected.norm() > 0, f"{name} takes no part in the loss"
        error = (grad - expected).norm() / expected.norm()
        assert error < 1e-4, f"{name}: {error}"


def test_the_tokens_of_the_next_document_do_not_show():
    """Bit for bit: a row's losses are the same whatever stands behind its document."""
    for case in FAMILIES:
        model = random_model(tiny_config(**CASES[case]), 3)
        found = []
        for seed in (1, 2):
            ids = torch.cat([random_ids(model.config, 1, 8)[0], random_ids(model.config, 1, 9, seed)[0]]).numpy()
            _, counts, grads = None, None, None
            micro = _batch([(ids[:8], 8, 0), (ids[8:], 9, 0)], S)
            found.append(micro)
        assert not torch.equal(found[0].ids, found[1].ids)
