"""AdamW on masters: torch.optim.AdamW's numbers in fp32, one rounding in bf16, the same bits for any thread
count.
"""

import pytest
import torch
from torch import nn

from glmx.train.optim import AdamW, clip_factor, decays

ADAM = {"beta1": 0.9, "beta2": 0.95, "eps": 1e-8}


def tiny(dtype, seed=0):
    torch.manual_seed(seed)
    shapes = {"embed_tokens.weight": (50, 7), "a.weight": (33, 70), "norm.weight": (7,), "experts": (3, 5, 9)}
    return {name: nn.Parameter(torch.randn(shape).to(dtype)) for name, shape in shapes.items()}


def test_equals_torch_adamw_in_fp32():
    ours, theirs = tiny(torch.float32), tiny(torch.float32)
    optim = AdamW(ours.items(), **ADAM, weight_decay=0.3)
    peer = torch.optim.AdamW(
        [
            {"params": [p for n, p in theirs.items() if decays(n, p)], "weight_decay": 0.3},
            {"params": [p for n, p in theirs.items() if not decays(n, p)], "weight_decay": 0.0},
        ],
        betas=(0.9, 0.95),
        eps=1e-8,
    )
    for step in range(20):
        lr = 0.01 * (1 + step % 3)
        optim.zero_grad()
        for name in ours:
            grad = torch.randn(ours[name].shape, generator=torch.Generator().manual_seed(step))
            ours[name].main_grad += grad
            theirs[name].grad = grad
        optim.step(lr)
        for group in peer.param_groups:
            group["lr"] = lr
        peer.step()
        for name in ours:
            # Per step about ten roundings of relative size eps on values of order 1; they add up over the
            # steps.
            torch.testing.assert_close(ours[name], theirs[name], rtol=0, atol=10 * (step + 1) * 2**-23 * 4)


def test_decay_is_on_matrices_only():
    params = tiny(torch.float32)
    kept = {name: p.detach().clone() for name, p in params.items()}
    optim = AdamW(params.items(), **ADAM, weight_decay=0.5)
    optim.step(0.1)  # zero gradients: only the decay moves anything
    for name in params:
        factor = 0.95 if name in ("a.weight", "experts") else 1.0
        torch.testing.assert_close(params[name].detach(), kept[name] * factor)


def test_parameters_are_the_rounded_masters_and_small_updates_add_up():
    params = {"w.weight": nn.Parameter(torch.ones(4, 4, dtype=torch.bfloat16))}
    optim = AdamW(params.items(), **ADAM, weight_decay=0.0)
    for _ in range(64):  # each update is 2**-10, below half a bf16 step at 1.0: without masters nothing would move
        optim.zero_grad()
        params["w.weight"].main_grad += 1.0
        optim.step(2**-10)
    master = optim.state_dict()["master.w.weight"]
    torch.testing.assert_close(master, torch.full((4, 4), 1 - 64 * 2**-10), rtol=0, atol=1e-5)
    assert torch.equal(params["w.weight"], master.bfloat16())
    assert params["w.weight"].data_ptr() % 64 == 0


def test_grads_of_ops_without_main_grad_are_folded_in():
    params = tiny(torch.bfloat16)
    optim = AdamW(params.items(), **ADAM, weight_decay=0.0)
    for _ in range(2):
        params["norm.weight"].sum().backward()
        optim.fold_grads()
    assert params["norm.weight"].grad is None
    assert torch.equal(params["norm.weight"].main_grad, torch.full((7,), 2.0))
    assert not params["a.weight"].main_grad.any()
    optim.step(0.1)
    assert not params["norm.weight"].main_grad.any()
    params["norm.weight"].main_grad.fill_(1.0)
    optim.zero_grad()
    assert not params["norm.weight"].main_grad.any()


def test_state_round_trip_and_its_errors():
    one, two = tiny(torch.bfloat16), tiny(torch.bfloat16, seed=1)
    optim, other = (AdamW(p.items(), **ADAM, weight_decay=0.1) for p in (one, two))
    for p in one.values():
        p.main_grad += torch.randn(p.shape)
    optim.step(0.1)
    other.load_state_dict({k: v.clone() for k, v in optim.state_dict().items()}, optim.updates)
    for p, q in zip(one.values(), two.values(), strict=True):
        assert torch.equal(p, q)
        q.main_grad.copy_(p.main_grad)
    optim.step(0.1)
    other.step(0.1)
    assert all(torch.equal(a, b) for a, b in zip(one.values(), two.values(), strict=True))
    state = optim.state_dict()
    with pytest.raises(ValueError, match="exp_avg.a.weight is missing"):
        other.load_state_dict({k: v for k, v in state.items() if k != "exp_avg.a.weight"}, 1)
    with pytest.raises(ValueError, match="zzz is unknown"):
        other.load_state_dict({**state, "zzz": torch.zeros(1)}, 1)
    with pytest.raises(ValueError, match=r"master.norm.weight has shape \(1,\), expected \(7,\)"):
        other.load_state_dict({**state, "master.norm.weight": torch.zeros(1)}, 1)
    with pytest.raises(ValueError, match="x is torch.float16"):
        AdamW([("x", nn.Parameter(torch.zeros(2, dtype=torch.float16)))], **ADAM, weight_decay=0.0)


def test_clip_factor():
    assert clip_factor(4.0, 1.0) == 0.25
    assert clip_factor(0.5, 1.0) == 1.0
    assert clip_factor(4.0, 0.0) == 1.0


def test_bits_do_not_depend_on_the_thread_count():
    def states(threads):
        torch.set_num_threads(threads)
        g = torch.Generator().manual_seed(0)
        n = 136_071  # odd and over several work items
        p = nn.Parameter(torch.randn(1, n, generator=g).bfloat16())
        optim = AdamW([("w.weight", p)], **ADAM, weight_decay=0.1)
        for _ in range(3):
            scale = 10.0 ** (torch.rand(1, n, generator=g) * -22)  # down to where the second moment is denormal
            optim.zero_grad()
            p.main_grad += torch.randn(1, n, generator=g) * scale
            optim.step(0.01, {"model": 0.7})
        return optim.state_dict()

    before = torch.get_num_threads()
    try:
        one, *others = [states(threads) for threads in (1, 2, 3)]
    finally:
        torch.set_num_threads(before)
    for other in others:
        assert all(torch.equal(one[name], other[name]) for name in one)
