"""Losses and their gradients: against plain autograd, over micro-batches, and at the borders of documents."""

import dataclasses

import pytest
import torch

from glmx.data.packing import IGNORE, PackedBatch, PackedRows
from glmx.data.shards import TokenShards
from glmx.models.batch import Batch
from glmx.train.balance import ExpertLoads
from glmx.train.loss import Denominators, Losses, forward_backward, target_logprobs
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


def step_of(data_dir, micro_rows):
    shards = TokenShards.open(data_dir, "train")
    return PackedRows(shards, seq_len=SEQ, batch_rows=4, micro_rows=micro_rows, seed=5).next_step()


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


def test_gradients_equal_autograd_of_the_written_out_loss(model, data_dir, plain_sequence_loss):
    (micro,) = step_of(data_dir, micro_rows=4)
    batch = Batch(micro.cu_seqlens)
    hidden = model.forward_tokens(micro.ids, micro.positions, batch)
    mtp = model.mtp_hidden(hidden, micro.next_ids, micro.positions, batch)
    cross_entropy = torch.nn.functional.cross_entropy
    main = cross_entropy(hidden @ model.lm_head.weight.T, micro.targets, ignore_index=IGNORE)
    second = cross_entropy(mtp @ model.lm_head.weight.T, micro.mtp_targets, ignore_index=IGNORE)
    stats = model.router_stats()
    assert len(stats) == 2
    aux = sum(plain_sequence_loss(s.scores, s.topk_ids, [SEQ] * 4) for s in stats) / 4
    (main + 0.3 * second + 0.05 * aux).backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()

    losses, _, grads = run(model, [micro])
    assert losses.main == pytest.approx(main.item(), rel=1e-5)
    assert losses.mtp == pytest.approx(second.item(), rel=1e-5)
    assert losses.aux == pytest.approx(aux.item() / 2, rel=1e-5)
    for name, grad in grads.items():
        assert grad.abs().max() > 0, name
        torch.testing.assert_close(grad, expected[name], **CLOSE, msg=lambda m, n=name: f"{n}: {m}")


def test_micro_batches_add_up_to_the_whole_batch(model, data_dir):
    whole = run(model, step_of(data_dir, micro_rows=4))
    parts = run(model, step_of(data_dir, micro_rows=1))
    assert parts[0].main == pytest.approx(whole[0].main, rel=1e-6)
    assert parts[0].mtp == pytest.approx(whole[0].mtp, rel=1e-6)
    assert parts[0].aux == pytest.approx(whole[0].aux, rel=1e-6)
    assert parts[1] == whole[1]
    for name, grad in whole[2].items():
        torch.testing.assert_close(parts[2][name], grad, **CLOSE)


def test_a_packed_row_equals_its_documents_alone(model, data_dir):
    """Attention, positions, targets and MTP targets stop at the borders of documents."""
    (micro,) = step_of(data_dir, micro_rows=4)
    assert len(micro.cu_seqlens) > 6

    def logprobs(part):
        batch = Batch(part.cu_seqlens)
        hidden = model.forward_tokens(part.ids, part.positions, batch)
        mtp = model.mtp_hidden(hidden, part.next_ids, part.positions, batch)
        return target_logprobs(model, hidden, part.targets), target_logprobs(model, mtp, part.mtp_targets)

    def alone(start, end):
        tensors = {f.name: getattr(micro, f.name)[start:end] for f in dataclasses.fields(micro)[:-1]}
        return PackedBatch(**tensors, cu_seqlens=[0, end - start])

    packed = logprobs(micro)
    borders = list(zip(micro.cu_seqlens[:-1], micro.cu_seqlens[1:], strict=True))
    apart = [logprobs(alone(start, end)) for start, end in borders]
    for head in (0, 1):
        torch.testing.assert_close(packed[head], torch.cat([p[head] for p in apart]), rtol=0, atol=2e-5)

    shards = TokenShards.open(data_dir, "train")
    documents = [shards.document(i).tolist() for i in range(shards.num_documents)]
    for start, end in borders:  # no target comes from another document
        chain = micro.ids[start:end].tolist()
        chain += [t for t in (int(micro.targets[end - 1]), int(micro.mtp_targets[end - 1])) if t >= 0]
        found = any(chain == d[i : i + len(chain)] for d in documents for i in range(len(d)))
        assert found, f"{chain} is no stretch of one document"


def test_without_mtp_and_aux_there_is_neither(model, data_dir):
    losses, loads, grads = run(model, step_of(data_dir, micro_rows=2), mtp_weight=0.0, aux_weight=0.0)
    assert (losses.mtp, losses.aux, len(loads)) == (0.0, 0.0, 1)
    assert not any(grad.any() for name, grad in grads.items() if name.startswith("model.layers.2."))
