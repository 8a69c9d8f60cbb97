"""route_topk: selection exactly as the total order of its own scores, weights and gradients against the fp64 oracle."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from glmx import ops, reference
from glmx.reference.route_topk import select_experts
from tests.ops.cases import BF16, NAN, Case, cases, cotangent, evaluate, same_bits, ties, values
from tests.ops.checks import F64, TINY, U32, assert_within
from tests.ops.properties import check_rows_stand_alone

SIGMOID_UNITS = 6  # exp within 1.5 ulp (3 units), the sum, the division


def full(kwargs: dict[str, Any]) -> dict[str, Any]:
    return {"n_group": 1, "topk_group": 1, "norm_topk_prob": True, "routed_scaling_factor": 1.0, **kwargs}


@pytest.mark.parametrize("case", cases("route_topk"), ids=str)
def test_selection_is_the_total_order_of_the_scores(case: Case) -> None:
    kwargs = full(case.make())
    weights, ids, counts, scores = ops.route_topk(**{**kwargs, "return_scores": True})
    assert (weights.dtype, scores.dtype) == (torch.float32, torch.float32)
    assert (ids.dtype, counts.dtype) == (torch.int32, torch.int32)
    want = select_experts(scores + kwargs["bias"], kwargs["top_k"], kwargs["n_group"], kwargs["topk_group"])
    assert torch.equal(ids.long(), want)
    assert torch.equal(counts.long(), torch.bincount(want.flatten(), minlength=scores.shape[1]))


def weights_exact(kwargs: dict[str, Any], ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The exact weights of the chosen ids, and their bound."""
    scores = torch.sigmoid(kwargs["logits"].to(F64))
    picked = scores.gather(1, ids.long())
    K = ids.shape[1]
    units = SIGMOID_UNITS + 2
    if kwargs["norm_topk_prob"]:
        picked = picked / (picked.sum(1, keepdim=True) + 1e-20)
        units += SIGMOID_UNITS + K + 3
    exact = picked * kwargs["routed_scaling_factor"]
    return exact, units * U32 * exact + TINY


@pytest.mark.parametrize("case", cases("route_topk", wild=False), ids=str)
def test_weights_scores_and_ids_against_the_oracle(case: Case) -> None:
    kwargs = full(case.make())
    weights, ids, _, scores = ops.route_topk(**{**kwargs, "return_scores": True})
    exact_scores = torch.sigmoid(kwargs["logits"].to(F64))
    assert_within(scores, exact_scores, SIGMOID_UNITS * U32 * exact_scores + TINY, "scores")
    exact, bound = weights_exact(kwargs, ids)
    assert_within(weights, exact, bound, "weights")
    assert torch.equal(ids, reference.route_topk(**kwargs)[1])
    plain = ops.route_topk(**{**kwargs, "return_scores": False})
    assert len(plain) == 3 and same_bits(plain[0], weights) and torch.equal(plain[1], ids)


@pytest.mark.parametrize("use", ["weights", "scores", "both"])
@pytest.mark.parametrize("case", [c for c in cases("route_topk", wild=False) if c.grads], ids=str)
def test_gradients_against_the_oracle(case: Case, use: str) -> None:
    kwargs = {**full(case.make()), "return_scores": True}
    ids = ops.route_topk(**kwargs)[1].long()
    leaf = kwargs["logits"].clone().requires_grad_()
    weights, _, _, scores = ops.route_topk(**{**kwargs, "logits": leaf})
    d_weights, d_scores = cotangent("w", weights), cotangent("s", scores)
    exact_leaf = kwargs["logits"].to(F64).requires_grad_()
    exact_scores = torch.sigmoid(exact_leaf)
    picked = exact_scores.gather(1, ids)
    total = picked.sum(1, keepdim=True) + 1e-20
    exact_weights = (picked / total if kwargs["norm_topk_prob"] else picked) * kwargs["routed_scaling_factor"]
    pairs = [(weights, exact_weights, d_weights), (scores, exact_scores, d_scores)]
    pairs = {"weights": pairs[:1], "scores": pairs[1:], "both": pairs}[use]
    torch.autograd.backward([a for a, _, _ in pairs], [d for _, _, d in pairs])
    torch.autograd.backward([b for _, b, _ in pairs], [d.to(F64) for _, _, d in pairs])
    # d_logit = s (1 - s) (d_score + factor / S (d_w - sum_j d_w_j w_j)).
    # 1 - s costs an absolute unit, hence s and not s (1 - s) in the bound.
    s, K = exact_scores.detach(), ids.shape[1]
    units = (3 * SIGMOID_UNITS + K + 16) * U32
    size = torch.zeros_like(s)
    if use != "scores":
        d = d_weights.to(F64).abs()
        if kwargs["norm_topk_prob"]:
            share = (picked / total).detach()
            d = (d + (d * share).sum(1, keepdim=True)) / total.detach()
        size.scatter_add_(1, ids, d * kwargs["routed_scaling_factor"])
    if use != "weights":
        size += d_scores.to(F64).abs()
    assert_within(leaf.grad, exact_leaf.grad, units * s * size + 10 * TINY, "logits")


def test_the_bias_gets_no_gradient_and_moves_no_weight() -> None:
    logits, bias = values(4, 8).requires_grad_(), values(8, seed=1).requires_grad_()
    weights, ids, _ = ops.route_topk(logits, bias, 2)
    weights.sum().backward()
    assert bias.grad is None
    exact, bound = weights_exact(full({"logits": logits.detach()}), ids)
    assert_within(weights, exact, bound)


def test_ties_go_to_the_lower_id() -> None:
    logits = torch.zeros(3, 9)
    assert (ops.route_topk(logits, torch.zeros(9), 4)[1] == torch.arange(4, dtype=torch.int32)).all()
    ids = ops.route_topk(logits, torch.zeros(9), 2, n_group=3, topk_group=1)[1]
    assert (ids == torch.arange(2, dtype=torch.int32)).all()


def test_nan_counts_as_minus_infinity_and_minus_zero_as_zero() -> None:
    logits = torch.tensor([[NAN, 0.0, 1.0, NAN], [0.0, 0.0, 0.0, 0.0]])
    ids = ops.route_topk(logits, torch.zeros(4), 3)[1]
    assert ids[0].tolist() == [2, 1, 0]
    bias = torch.tensor([-0.5, -0.5, -0.5, NAN])  # 0.5 - 0.5 is +0 or -0: equal
    assert ops.route_topk(logits[1:], bias, 4)[1].tolist() == [[0, 1, 2, 3]]


@given(st.integers(1, 12), st.integers(1, 6), st.integers(1, 4), st.integers(0, 999), st.booleans())
@settings(max_examples=40, deadline=None)
def test_x2_a_token_does_not_see_the_others(T: int, groups: int, per_group: int, seed: int, tied: bool) -> None:
    E = groups * per_group
    logits = ties(T, E, seed=seed) if tied else values(T, E, seed=seed)
    bias = values(E, seed=seed + 1, scale=0.2)
    kept = 1 + seed % groups
    top_k = 1 + seed % (kept * per_group)

    def route(logits: torch.Tensor) -> tuple[torch.Tensor, ...]:
        weights, ids, _, scores = ops.route_topk(
            logits, bias, top_k, n_group=groups, topk_group=kept, return_scores=True
        )
        return weights, ids, scores

    check_rows_stand_alone(route, {"logits": logits}, seed, ("logits",))


def test_counts_over_many_tokens(restore_threads: None) -> None:
    logits = values(3000, 33)
    for threads in (1, 3):
        torch.set_num_threads(threads)
        _, ids, counts = ops.route_topk(logits, torch.zeros(33), 4)
        assert torch.equal(counts.long(), torch.bincount(ids.flatten().long(), minlength=33))


@pytest.mark.parametrize("E", [128, 160, 256])
def test_x2_many_tokens_and_few(E: int) -> None:
    """GPUs serve many tokens of the released models' expert counts by a kernel of their own."""
    logits, bias = values(4099, E), values(E, seed=1, scale=0.2)
    logits[::5] = ties(len(logits[::5]), E)
    logits[7, 3], logits[8, :] = NAN, NAN
    bias[E - 1] = -float("inf")
    many = ops.route_topk(logits, bias, 8, routed_scaling_factor=2.5, return_scores=True)
    for rows in (slice(0, 40), slice(4060, 4099)):
        few = ops.route_topk(logits[rows], bias, 8, routed_scaling_factor=2.5, return_scores=True)
        for i in (0, 1, 3):
            assert same_bits(many[i][rows], few[i])
    assert torch.equal(many[2].long(), torch.bincount(many[1].flatten().long(), minlength=E))


def test_case_gradients_are_finite() -> None:
    for case in cases("route_topk", wild=False):
        if case.grads:
            assert evaluate(ops, case)["d_logits"].isfinite().all()


@pytest.mark.parametrize(
    ("change", "name"),
    [
        ({"logits": torch.zeros(8)}, "logits"),
        ({"logits": torch.zeros(2, 8, dtype=BF16)}, "logits"),
        ({"logits": torch.zeros(2, 513), "bias": torch.zeros(513)}, "512|E"),
        ({"bias": torch.zeros(7)}, "bias"),
        ({"bias": torch.zeros(8, dtype=BF16)}, "bias"),
        ({"top_k": 0}, "top_k"),
        ({"top_k": 9}, "top_k"),
        ({"n_group": 3}, "n_group"),
        ({"n_group": 4, "topk_group": 5}, "topk_group"),
        ({"n_group": 4, "topk_group": 0}, "topk_group"),
        ({"n_group": 4, "topk_group": 1, "top_k": 3}, "top_k|topk_group"),
    ],
)
def test_bad_arguments_are_refused(change: dict, name: str) -> None:
    with pytest.raises(ValueError, match=name):
        ops.route_topk(**{"logits": torch.zeros(2, 8), "bias": torch.zeros(8), "top_k": 2, **change})
