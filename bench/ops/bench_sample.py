"""sample against torch's sort: GLM's vocabulary of 151,552 tokens, batches of 1, 16 and 64 rows.

    pytest bench/ops/bench_sample.py            (OMP_NUM_THREADS sets the threads)

The peer is how servers sample on a CPU: softmax, one descending sort, the running sum for top-p, masks; where top-k
alone is asked for, torch.topk in place of the sort; for greedy rows argmax. It draws by its running sum and one random
number a row: torch.multinomial, which takes one for each token, is many times slower. Logits are such that the most
likely tokens are as in text: the token of rank r has a probability of about 1 / r. `flat` rows are bell-shaped, so that
tens of thousands of tokens share a nucleus. The bytes counted are those of the logits, read once.
"""

from __future__ import annotations

import harness
import pytest
import torch

import glmx.ops

VOCABULARY = 151_552
RULES = {
    "greedy": {"temperature": 0.0},
    "temperature": {"temperature": 0.8},
    "top-p": {"temperature": 0.8, "top_p": 0.95},
    "top-k": {"temperature": 0.8, "top_k": 50},
    "top-k, top-p, min-p": {"temperature": 0.8, "top_k": 50, "top_p": 0.95, "min_p": 0.02},
    "flat, top-p": {"temperature": 1.0, "top_p": 0.95},
}


def zipf(rows: int, V: int) -> torch.Tensor:
    """Logits of -log(rank) and some noise, ranks in a random order, another one in each row."""
    g = torch.Generator().manual_seed(rows)
    ranks = torch.stack([torch.randperm(V, generator=g) for _ in range(rows)]) + 1.0
    return 12.0 - ranks.log() + 0.1 * torch.randn(rows, V, generator=g)


def flat(rows: int, V: int) -> torch.Tensor:
    return 3.0 * torch.randn(rows, V, generator=torch.Generator().manual_seed(rows))


def drawn(probs: torch.Tensor) -> torch.Tensor:
    """A place [rows, 1] in each row of probs [rows, n], which need not sum to 1."""
    sums = probs.cumsum(-1)
    return torch.searchsorted(sums, torch.rand(len(probs), 1) * sums[:, -1:], right=True).clamp(max=probs.shape[1] - 1)


def by_sort(logits: torch.Tensor, temperature: float, top_k: int = 0, top_p: float = 1.0, min_p: float = 0.0):
    if temperature == 0:
        return logits.argmax(-1)
    logits = logits / temperature
    if top_p == 1 and min_p == 0 and top_k == 0:
        return drawn(logits.softmax(-1))
    if top_p == 1 and min_p == 0:
        best, ids = logits.topk(top_k)
        return ids.gather(1, drawn(best.softmax(-1)))
    ordered, ids = logits.sort(descending=True)
    if top_k:
        ordered[:, top_k:] = float("-inf")
    probs = ordered.softmax(-1)
    if min_p:
        probs[probs < min_p * probs[:, :1]] = 0
    if top_p < 1:
        probs[probs.cumsum(-1) - probs >= top_p * probs.sum(-1, keepdim=True)] = 0
    return ids.gather(1, drawn(probs))


@pytest.mark.parametrize("rows", [1, 16, 64])
@pytest.mark.parametrize("rules", RULES)
def test_sample(benchmark, record_row, rules: str, rows: int) -> None:
    V = VOCABULARY
    if benchmark.disabled:
        V, rows = 3000, min(rows, 2)
    logits = (flat if rules.startswith("flat") else zipf)(rows, V)
    positions = torch.arange(rows)

    def ours() -> torch.Tensor:
        return glmx.ops.sample(logits, seeds=7, positions=positions, **RULES[rules])

    def peer() -> torch.Tensor:
        return by_sort(logits, **RULES[rules])

    if rules == "greedy":
        assert torch.equal(ours(), peer())
    else:  # what is drawn lies in the set that a sort keeps
        top_k, top_p = RULES[rules].get("top_k", 0), RULES[rules].get("top_p", 1.0)
        ordered, ids = (logits / RULES[rules]["temperature"]).sort(descending=True, stable=True)
        running = ordered.double().softmax(-1).cumsum(-1)
        rank = (ids == ours()[:, None]).long().argmax(-1)
        assert not top_k or int(rank.max()) < top_k
        assert top_k or bool(
            (running.gather(1, rank[:, None])[:, 0] - ordered.double().softmax(-1)[:, 0] <= top_p).all()
        )
    if benchmark.disabled:
        peer()
        return
    harness.compare(
        benchmark,
        record_row,
        f"sample {rules}, {rows} x {V}",
        "sample",
        ours,
        {"torch": peer},
        flop=0,
        touched=rows * V * 4,
        rounds=15,
    )
