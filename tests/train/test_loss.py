"""Losses and their gradients: against plain autograd, over micro-batches, and at the borders of documents."""

import dataclasses

import pytest
import torch

from glmx.data.packing import IGNORE, PackedBatch, PackedRows
from glmx.data.shards import TokenShards
from glmx.models.batch import Batch
from glmx.train.balance import ExpertLoads
from glmx.train.loss import Denominators, Losses, forward_backward, mtp_passes, target_logprobs
from glmx.train.optim import AdamW
from glmx.train.run import build_model

SEQ = 24
# fp32 forward and backward of a model of a few layers: sums of some hundred terms, each rounded a few times.
CLOSE = {"rtol": 1e-4, "atol": 1e-6}


@pytest.fixture
def model(model_dir):
    model = build_model(model_dir, torch.float32, seed=1)
    with torch.no_grad():  # at the init range of 0.02 a tiny model's layers barely show in the loss
        for p in model.parameters():
            if p.dim() > 1:
                p.mul_(8.0)
    model.collect_scores = True
    return model.train()


def step_of(data_dir, micro_rows, mtp_steps=1):
    shards = TokenShards.open(data_dir, "train")
    rows = PackedRows(shards, seq_len=SEQ, batch_rows=4, micro_rows=micro_rows, seed=5, mtp_steps=mtp_steps)
    return rows.next_step()


def run(model, micro_batches, mtp_weight=0.3, aux_weight=0.05):
    optim = AdamW(model.named_parameters(), beta1=0.9, beta2=0.95, eps=1e-8, weight_decay=0.0)
    losses, loads, counts = Losses(), ExpertLoads(), Denominators.of(micro_batches, SEQ)
    for micro in micro_batches:
        forward_backward(
            model,
            micro,
            counts,
            seq_len=SEQ,
            mtp_weight=mtp_weight,
            aux_weight=aux_weight,
            losses=losses,
            loads=loads,
        )
        optim.fold_grads()
    grads = {name: p.main_grad.clone() for name, p in model.named_parameters()}
    return losses, loads.as_lists(), grads


@pytest.mark.parametrize("mtp_steps", [1, 3])
def test_gradients_equal_autograd_of_the_written_out_loss(model, data_dir, plain_sequence_loss, mtp_steps):
    """The MTP layer is one layer, however often it is applied: means of its losses, the sum of its loads."""
    (micro,) = step_of(data_dir, 4, mtp_steps)
    batch = Batch(micro.cu_seqlens)
    hidden = model.forward_tokens(micro.ids, micro.positions, batch)
    cross_entropy = torch.nn.functional.cross_entropy

    def sequence_loss():
        stats = model.router_stats()[-1]
        counts.append(stats.expert_counts.tolist())
        return plain_sequence_loss(stats.scores, stats.topk_ids, [SEQ] * 4) / 4

    main, counts = cross_entropy(hidden @ model.lm_head.weight.T, micro.targets, ignore_index=IGNORE), []
    aux, later, mtp_aux, z = sequence_loss(), [], 0.0, hidden
    for s in range(mtp_steps):
        z = model.mtp_hidden(z, micro.next_ids[s], micro.positions + s, batch)
        later.append(cross_entropy(z @ model.lm_head.weight.T, micro.mtp_targets[s], ignore_index=IGNORE))
        mtp_aux = mtp_aux + sequence_loss() / mtp_steps
    (main + 0.3 * sum(later) / mtp_steps + 0.05 * (aux + mtp_aux)).backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()

    losses, loads, grads = run(model, [micro])
    assert losses.main == pytest.approx(main.item(), rel=1e-5)
    assert losses.mtp == pytest.approx([loss.item() for loss in later], rel=1e-5)
    assert losses.mtp_mean == pytest.approx(sum(losses.mtp) / mtp_steps)
    assert losses.aux == pytest.approx((aux + mtp_aux).item() / 2, rel=1e-5)
    assert loads == [counts[0], [sum(experts) for experts in zip(*counts[1:], strict=True)]]
    for name, grad in grads.items():
        assert grad.abs().max() > 0, name
        torch.testing.assert_close(grad, expected[name], **CLOSE, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("mtp_steps", [1, 3])
def test_micro_batches_add_up_to_the_whole_batch(model, data_dir, mtp_steps):
    whole = run(model, step_of(data_dir, 4, mtp_steps))
    parts = run(model, step_of(data_dir, 1, mtp_steps))
    assert parts[0].main == pytest.approx(whole[0].main, rel=1e-6)
    assert parts[0].mtp == pytest.approx(whole[0].mtp, rel=1e-6)
    assert parts[0].aux == pytest.approx(whole[0].aux, rel=1e-6)
    assert parts[1] == whole[1]
    for name, grad in whole[2].items():
        torch.testing.assert_close(parts[2][name], grad, **CLOSE)


def test_a_packed_row_equals_its_documents_alone(model, data_dir):
    """Attention, positions, targets and MTP targets stop at the borders of documents."""
    (micro,) = step_of(data_dir, 4, mtp_steps=3)
    assert len(micro.cu_seqlens) > 6

    def logprobs(part):
        batch = Batch(part.cu_seqlens)
        hidden = model.forward_tokens(part.ids, part.positions, batch)
        steps = zip(mtp_passes(model, hidden, part, batch), part.mtp_targets, strict=True)
        later = [target_logprobs(model, step.hidden_TH, targets) for step, targets in steps]
        return [target_logprobs(model, hidden, part.targets), *later]

    def alone(start, end):
        tensors = {f.name: getattr(micro, f.name)[..., start:end] for f in dataclasses.fields(micro)[:-1]}
        return PackedBatch(**tensors, cu_seqlens=[0, end - start])

    packed = logprobs(micro)
    borders = list(zip(micro.cu_seqlens[:-1], micro.cu_seqlens[1:], strict=True))
    apart = [logprobs(alone(start, end)) for start, end in borders]
    for head in range(4):
        torch.testing.assert_close(packed[head], torch.cat([p[head] for p in apart]), rtol=0, atol=2e-5)

    shards = TokenShards.open(data_dir, "train")
    documents = [shards.document(i).tolist() for i in range(shards.num_documents)]
    for start, end in borders:  # no target comes from another document
        chain = micro.ids[start:end].tolist()
        chain += [t for t in (int(micro.targets[end - 1]), *micro.mtp_targets[:, end - 1].tolist()) if t >= 0]
        found = any(chain == d[i : i + len(chain)] for d in documents for i in range(len(d)))
        assert found, f"{chain} is no stretch of one document"


def test_without_mtp_and_aux_there_is_neither(model, data_dir):
    losses, loads, grads = run(model, step_of(data_dir, micro_rows=2), mtp_weight=0.0, aux_weight=0.0)
    assert (losses.mtp, losses.mtp_mean, losses.aux, len(loads)) == ([], 0.0, 0.0, 1)
    assert not any(grad.any() for name, grad in grads.items() if name.startswith("model.layers.2."))
