"""mtp_verify against plain torch: GLM's vocabulary of 151,552 tokens, three drafts, 1 and 16 sequences.

    pytest bench/ops/bench_mtp_verify.py            (OMP_NUM_THREADS sets the threads)

The peer does what a few lines of torch do, on all rows at once: argmax for greedy; else softmax, with top-p a sort and
a running sum, bench_sample's draw, gather and where for the drafts. Logits are those of bench_sample.py, at
temperature 0.8. Drafts are all accepted, or the first is refused: then we leave out the rows behind it, which the peer
cannot know. The bytes counted are those of the rows of logits and draft_probs that have to be read, once.
"""

from __future__ import annotations

import harness
import pytest
import torch
from bench.ops.bench_sample import VOCABULARY, drawn, zipf

import glmx.ops

K, TEMPERATURE = 3, 0.8
MODES = {
    "greedy": {"mode": "greedy"},
    "sample": {"mode": "sample", "temperature": TEMPERATURE},
    "sample, top-p": {"mode": "sample", "temperature": TEMPERATURE, "top_p": 0.95},
    "rejection": {"mode": "rejection", "temperature": TEMPERATURE},
}


def by_rows(mode: str, draft_ids: torch.Tensor, logits: torch.Tensor, q: torch.Tensor | None, top_p: float):
    """(tokens [B, K+1], accepted [B])."""
    if mode == "greedy":
        return by_own_tokens(draft_ids, logits.argmax(-1))
    scaled = logits / TEMPERATURE
    if top_p < 1:
        ordered, ids = scaled.sort(descending=True)
        probs = ordered.softmax(-1)
        probs[probs.cumsum(-1) - probs >= top_p] = 0
        probs = torch.zeros_like(probs).scatter_(-1, ids, probs)
    else:
        probs = scaled.softmax(-1)
    if mode == "sample":
        return by_own_tokens(draft_ids, drawn(probs.flatten(0, 1)).view(logits.shape[:2]))
    assert q is not None
    b, j = torch.arange(len(draft_ids)), torch.arange(K + 1)
    p_draft, q_draft = (x.gather(-1, draft_ids[..., None])[..., 0] for x in (probs[:, :K], q))
    accepted = (torch.rand_like(p_draft) * q_draft < p_draft).long().cumprod(-1).sum(-1)
    rest = (probs[b, accepted] - q[b, accepted.clamp(max=K - 1)]).clamp(min=0)
    rest = torch.where((accepted == K)[:, None], probs[b, accepted], rest)
    last = drawn(rest)
    tokens = torch.where(j < accepted[:, None], torch.cat((draft_ids, last), 1), last)
    return torch.where(j <= accepted[:, None], tokens, -1), accepted


def by_own_tokens(draft_ids: torch.Tensor, own: torch.Tensor):
    accepted = (own[:, :K] == draft_ids).long().cumprod(-1).sum(-1)
    return torch.where(torch.arange(K + 1) <= accepted[:, None], own, -1), accepted


@pytest.mark.parametrize("B", [1, 16])
@pytest.mark.parametrize("drafts", ["accepted", "refused"])
@pytest.mark.parametrize("name", MODES)
def test_mtp_verify(benchmark, record_row, name: str, drafts: str, B: int) -> None:
    V = VOCABULARY
    if benchmark.disabled:
        V, B = 3000, min(B, 2)
    logits, seeds, rules = zipf(B * (K + 1), V).view(B, K + 1, V), torch.arange(B), MODES[name]
    mode, top_p = rules["mode"], rules.get("top_p", 1.0)
    if drafts == "accepted":
        same = {"temperature": rules.get("temperature", 0.0), "top_p": top_p}
        draft_ids = glmx.ops.sample(logits, seeds=seeds[:, None], positions=torch.arange(K + 1) + 40, **same)[:, :K]
    else:
        draft_ids = logits[:, :K].argmin(-1)
    q = None
    if mode == "rejection":  # of a draft 0, so that it is always accepted, or 1
        q = (logits[:, :K] / (2 * TEMPERATURE)).softmax(-1)
        q = q.scatter(-1, draft_ids[..., None], 0.0 if drafts == "accepted" else 1.0)

    def ours() -> glmx.ops.Verified:
        return glmx.ops.mtp_verify(draft_ids, logits, seeds=seeds, positions=40, draft_probs=q, **rules)

    def peer():
        return by_rows(mode, draft_ids, logits, q, top_p)

    out, (tokens, accepted) = ours(), peer()
    assert out.accepted.tolist() == [K if drafts == "accepted" else 0] * B
    if mode != "sample" or drafts == "refused":  # the peer's coins are others: it draws other tokens
        assert torch.equal(accepted, out.accepted)
    assert mode != "greedy" or torch.equal(tokens, out.tokens)
    if benchmark.disabled:
        return
    read = K + 1 if drafts == "accepted" else 1 if q is None else 2
    harness.compare(
        benchmark,
        record_row,
        f"mtp_verify {name}, drafts {drafts}, {B} x {K + 1} x {V}",
        "mtp_verify",
        ours,
        {"torch": peer},
        flop=0,
        touched=B * read * V * 4,
        rounds=15,
    )
