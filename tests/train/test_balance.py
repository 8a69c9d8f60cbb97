"""Expert balance: the bias update in a routing simulation, the sequence loss against plain torch, MaxVio."""

import pytest
import torch

from glmx.reference.route_topk import route_topk
from glmx.train.balance import ExpertLoads, sequence_balance, update_biases

E, K, T = 32, 4, 1024


def simulate(rate, steps=250):
    """Mean MaxVio of the last fifth of a run: router logits with a fixed skew per expert, noise per token."""
    g = torch.Generator().manual_seed(0)
    skew = torch.randn(E, generator=g)
    bias, vios = torch.zeros(E), []
    for _ in range(steps):
        logits = torch.randn(T, E, generator=g) + skew
        loads = ExpertLoads()
        for half in logits.chunk(2):  # two micro-batches: the update sees their sum
            loads.add([route_topk(half, bias, K)[2]])
        update_biases([bias], loads, rate)
        vios.append(loads.max_vio()[0])
    return sum(vios[-steps // 5 :]) / (steps // 5)


def test_bias_update_balances_and_its_sign_matters():
    without = simulate(0.0, steps=20)
    balanced = simulate(4e-3)
    # Noise floor: a load of 128 expected tokens has a standard deviation of about 11, so the largest of 32
    # lies near 0.2 above the mean. A flipped sign drives the routing onto the experts that lead already.
    assert without > 3.5
    assert balanced < 0.3
    assert simulate(-4e-3) > 4.0


def test_bias_moves_by_rate_towards_the_mean_and_equal_loads_stay():
    biases = [torch.zeros(4), torch.zeros(2)]
    loads = ExpertLoads()
    loads.add([torch.tensor([5, 1, 3, 3]), torch.tensor([6, 6])])
    loads.add([torch.tensor([5, 1, 3, 3]), torch.tensor([6, 6])])
    update_biases(biases, loads, 0.25)
    assert biases[0].tolist() == [-0.25, 0.25, 0, 0]
    assert biases[1].tolist() == [0, 0]
    assert loads.as_lists() == [[10, 2, 6, 6], [12, 12]]
    assert loads.max_vio() == pytest.approx([10 / 6 - 1, 0])


def test_sequence_loss_and_its_gradient(plain_sequence_loss):
    g = torch.Generator().manual_seed(1)
    lengths = [7, 64, 33]
    logits = torch.randn(sum(lengths), E, generator=g)
    _, ids, _, scores = route_topk(logits, torch.zeros(E), K, return_scores=True)
    exact = scores.double().detach().requires_grad_()
    expected = plain_sequence_loss(exact, ids, lengths)
    expected.backward()
    value, grad = sequence_balance(scores, ids, lengths)
    # fp32 sums of up to 64 positive terms: 64 eps relative on each of the factors.
    assert value == pytest.approx(expected.item(), rel=200 * 2**-24)
    torch.testing.assert_close(grad.double(), exact.grad, rtol=0, atol=300 * 2**-24 * exact.grad.abs().max().item())


def test_sequence_loss_is_one_when_balanced_and_e_over_k_when_collapsed():
    scores = torch.full((E, E), 0.5)
    even = (torch.arange(E)[:, None] + torch.arange(K)) % E
    assert sequence_balance(scores, even.int(), [E])[0] == pytest.approx(1.0, rel=1e-6)
    peaked = torch.zeros(E, E)
    peaked[:, :K] = 1.0
    same = torch.arange(K).expand(E, K).int()
    assert sequence_balance(peaked, same, [E])[0] == pytest.approx(E / K, rel=1e-6)
