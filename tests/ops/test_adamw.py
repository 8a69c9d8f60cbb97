"""adamw: bit for bit the chain of its contract, near torch.optim.AdamW and fp64, the same for any threads; errors."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from glmx import ops, reference
from glmx.reference.gemm_tree import flush32
from tests.ops.cases import BF16, F32, Case, cases, same_bits, values
from tests.ops.checks import F64

STATE = ("master", "exp_avg", "exp_avg_sq", "grad")


def chain(param, master, exp_avg, exp_avg_sq, grad, *, updates, lr, beta1, beta2, eps, weight_decay, grad_scale=1.0):
    """The update in fp64, each operation rounded to fp32: an fp64 sum, product, quotient or root of two fp32, rounded
    again, is what fp32 gives (53 >= 2 * 24 + 2 bits)."""

    def scalar(value: float) -> torch.Tensor:
        return torch.tensor(value, dtype=F32).to(F64)

    def rounded(x: torch.Tensor) -> torch.Tensor:
        return flush32(x.to(F32).to(F64))

    master, m, v, g = (flush32(x.to(F64)) for x in (master, exp_avg, exp_avg_sq, grad))
    g = rounded(g * scalar(grad_scale))
    m = rounded(rounded(m * scalar(beta1)) + rounded(g * scalar(1.0 - beta1)))
    v = rounded(rounded(v * scalar(beta2)) + rounded(rounded(g * g) * scalar(1.0 - beta2)))
    root = scalar(1.0 / math.sqrt(1.0 - beta2**updates))
    down = rounded(rounded(rounded(v.sqrt()) * root) + scalar(eps))
    step = rounded(rounded(m / down) * scalar(lr / (1.0 - beta1**updates)))
    master = rounded(rounded(master * scalar(1.0 - lr * weight_decay)) - step)
    return {
        "param": master.to(F32).to(param.dtype),
        "master": master,
        "exp_avg": m,
        "exp_avg_sq": v,
        "grad": 0.0 * grad,
    }


@pytest.mark.parametrize("case", cases("adamw"), ids=str)
def test_bits_of_the_contract(case: Case) -> None:
    given = case.make()
    want = chain(**case.make())
    ops.adamw(**given)
    for name in ("param", *STATE[:3]):
        expected = want[name].to(given[name].dtype)
        nan = expected.isnan()
        assert torch.equal(given[name].isnan(), nan), name
        assert same_bits(given[name][~nan], expected[~nan]), name
    assert not given["grad"].any()


@pytest.mark.parametrize("case", cases("adamw", wild=False), ids=str)
def test_against_fp64(case: Case) -> None:
    given, before = case.make(), case.make()
    exact = {name: v.to(F64) if isinstance(v, torch.Tensor) else v for name, v in case.make().items()}
    ops.adamw(**given)
    reference.adamw(**exact)
    u, beta1, beta2 = 2**-24, before["beta1"], before["beta2"]
    # Of an element: so many roundings of each term, of the factors too. A first moment may cancel, nothing else does.
    m = 4 * u * (beta1 * before["exp_avg"].abs() + (1 - beta1) * before["grad"].abs())
    v = 6 * u * exact["exp_avg_sq"]
    corrected = (exact["exp_avg_sq"] / (1 - beta2 ** before["updates"])).sqrt() + before["eps"]
    rate = before["lr"] / (1 - beta1 ** before["updates"])
    master = 3 * u * before["master"].abs() + rate / corrected * (m + 12 * u * exact["exp_avg"].abs())
    for name, bound in {"exp_avg": m, "exp_avg_sq": v, "master": master}.items():
        assert bool(((given[name] - exact[name]).abs() <= bound + 2**-126).all()), name
    assert same_bits(given["param"], given["master"].to(given["param"].dtype))


def test_against_torch() -> None:
    p = torch.nn.Parameter(values(300, seed=1))
    peer = torch.optim.AdamW([p], lr=0.02, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.3)
    param = p.detach().clone()
    master, m, v = param.clone(), torch.zeros(300), torch.zeros(300)
    for step in range(1, 21):
        p.grad = values(300, seed=step)
        grad = p.grad.clone()
        peer.step()
        ops.adamw(param, master, m, v, grad, updates=step, lr=0.02, beta1=0.9, beta2=0.95, eps=1e-8, weight_decay=0.3)
        # Ten roundings a step on values of order 1.
        torch.testing.assert_close(param, p.detach(), rtol=0, atol=10 * step * 2**-23 * 4)


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_threads(threads: int, restore_threads: None) -> None:
    torch.set_num_threads(threads)
    case = next(c for c in cases("adamw") if c.name == "bf16-40001")
    given, want = case.make(), chain(**case.make())
    ops.adamw(**given)
    assert same_bits(given["param"], want["param"])


GOOD: dict[str, Any] = {
    "updates": 1, "lr": 0.1, "beta1": 0.9, "beta2": 0.95, "eps": 1e-8, "weight_decay": 0.0,
}  # fmt: skip


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"param": torch.zeros(4, dtype=torch.float16)}, "param: expected dtype"),
        ({"grad": torch.zeros(4, dtype=BF16)}, "grad: expected dtype torch.float32: got torch.bfloat16"),
        ({"master": torch.zeros(5)}, r"master: expected shape \[4\] \(param.shape\): got \[5\]"),
        ({"exp_avg": torch.zeros(8)[::2]}, r"exp_avg: expected a contiguous tensor: got strides \[2\]"),
        ({"updates": 0}, "updates: expected 1 or more, this one included: got 0"),
        ({"beta2": 1.0}, r"beta2: expected a value in \[0, 1\): got 1.0"),
    ],
)
def test_errors(change: dict[str, Any], message: str) -> None:
    arguments = {"param": torch.zeros(4), **{name: torch.zeros(4) for name in STATE}, **GOOD, **change}
    with pytest.raises(ValueError, match=message):
        ops.adamw(**arguments)
    assert not any(arguments[name].any() for name in STATE)
