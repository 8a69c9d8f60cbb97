"""A needle far beyond index_topk: a trained indexer finds it, a window of the same size cannot.

    python examples/needle.py             # about ten seconds of one core

A one-layer GLM-5 (MLA and its sparse attention) reads 255 tokens of filler with one needle somewhere among them, then a
question; the answer is the needle. It learns with dense attention, while its indexer learns from indexer_kl which keys
that attention wants. Then every row attends to 16 keys: those of the indexer, the last 16, those of a fresh indexer.
"""

import torch

from glmx import ops
from glmx.data.packing import PackedBatch
from glmx.models.batch import Batch
from glmx.models.config import ModelConfig
from glmx.models.decoder import Decoder
from glmx.train.balance import ExpertLoads
from glmx.train.loss import Denominators, Losses, forward_backward
from glmx.train.optim import AdamW, clip_factor, part_of

NEEDLES, QUESTION = 8, 40  # ids 0..7 are needles, 8..39 filler
TOP_K, SEQ_LEN, STEPS = 16, 256, 150
LENGTHS = [8, 16, 32, 64, 128, SEQ_LEN] * 4  # of a training batch: in the short ones the needle is soon found

CONFIG = ModelConfig(
    model_type="glm_moe_dsa", vocab_size=QUESTION + 1, hidden_size=32, num_hidden_layers=1, num_attention_heads=2,
    num_key_value_heads=2, q_lora_rank=16, kv_lora_rank=16, qk_nope_head_dim=12, qk_rope_head_dim=4, v_head_dim=16,
    index_n_heads=4, index_head_dim=8, index_topk=TOP_K, intermediate_size=32, moe_intermediate_size=16,
    n_routed_experts=2, num_experts_per_tok=1, num_nextn_predict_layers=0, initializer_range=0.08,
)  # fmt: skip


def haystacks(lengths: list[int], generator: torch.Generator, beyond: int = 0) -> PackedBatch:
    """Sequences of these lengths, the question last; a needle is at least `beyond` tokens before it."""
    ids, targets, borders = [], [], [0]
    for length in lengths:
        ids.append(torch.randint(NEEDLES, QUESTION, (length,), generator=generator))
        needle, place = (int(torch.randint(n, (), generator=generator)) for n in (NEEDLES, length - 1 - beyond))
        ids[-1][place], ids[-1][-1] = needle, QUESTION
        targets += [-1] * (length - 1) + [needle]
        borders.append(borders[-1] + length)
    positions = torch.cat([torch.arange(length) for length in lengths])
    unused = torch.zeros(1, borders[-1], dtype=torch.int64)  # the MTP layer's; there is none
    return PackedBatch(torch.cat(ids), positions, torch.tensor(targets), unused, unused - 1, borders)


def train(model: Decoder, generator: torch.Generator) -> None:
    """Dense attention, and the indexer's KL over all keys."""
    model.train()
    model.see_all_keys = model.collect_kl = True
    optim = AdamW(model.named_parameters(), beta1=0.9, beta2=0.95, eps=1e-8, weight_decay=0.0)
    for step in range(STEPS):
        batch, losses = haystacks(LENGTHS, generator), Losses()
        optim.zero_grad()
        counts = Denominators.of([batch], batch.num_tokens)
        forward_backward(
            model, batch, counts, seq_len=batch.num_tokens, mtp_weight=0.0, aux_weight=0.0, kl_weight=1.0,
            losses=losses, loads=ExpertLoads(),
        )  # fmt: skip
        optim.fold_grads()
        rate = 0.02 * min(1.0, (step + 1) / 10, (STEPS - step) / 50)
        optim.step(rate, {part: clip_factor(norm, 1.0) for part, norm in optim.grad_norms().items()})
        if step % 25 == 0 or step == STEPS - 1:
            print(f"step {step + 1:3}  loss {losses.main:.4f}  indexer KL {losses.indexer_kl:.4f}")


@torch.no_grad()
def accuracy(model: Decoder, batch: PackedBatch) -> float:
    """The share of questions answered. In eval mode attention is sparse."""
    hidden = model.eval().forward_tokens(batch.ids, batch.positions, Batch(batch.cu_seqlens))
    asked = batch.targets >= 0
    return (model.logits(hidden[asked]).argmax(-1) == batch.targets[asked]).float().mean().item()


def last_keys(q, weights, k, cu_seqlens_q, seq_lens, top_k, **keys) -> torch.Tensor:
    """In place of indexer_topk: the last `top_k` keys of every row, int32 [T, top_k]."""
    positions = torch.cat([torch.arange(n) for n in seq_lens.tolist()])[:, None]
    lists = (positions - top_k + 1).clamp(min=0) + torch.arange(top_k)
    return torch.where(lists <= positions, lists, -1).to(torch.int32)


def main() -> dict[str, float]:
    generator = torch.Generator().manual_seed(0)
    model = Decoder(CONFIG, torch.float32)
    model.init_weights(seed=0)
    train(model, generator)

    unseen = haystacks([SEQ_LEN] * 128, generator, beyond=TOP_K)
    found = {"the trained indexer": accuracy(model, unseen)}
    indexer_topk, ops.indexer_topk = ops.indexer_topk, last_keys
    found[f"a window of {TOP_K}"] = accuracy(model, unseen)
    ops.indexer_topk = indexer_topk

    fresh = Decoder(CONFIG, torch.float32)
    fresh.init_weights(seed=1)
    own = {name: tensor for name, tensor in model.state_dict().items() if part_of(name) == "model"}
    fresh.load_state_dict(own, strict=False)
    found["an untrained indexer"] = accuracy(fresh, unseen)
    return found


if __name__ == "__main__":
    for name, share in main().items():
        print(f"{name:20}  {share:.1%} of needles found")
