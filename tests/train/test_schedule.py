"""The learning rate by its formula, at the points that matter."""

import math

import pytest

from glmx.train.schedule import learning_rate

PLAN = {"lr": 2.0, "min_lr": 0.2, "warmup_tokens": 100}


@pytest.mark.parametrize(
    ("tokens", "expected"),
    [
        (1, 0.02),
        (50, 1.0),
        (99, 1.98),
        (100, 2.0),
        (550, 1.1),
        (325, 0.2 + 0.9 * (1 + math.cos(math.pi / 4))),
        (1000, 0.2),
        (2000, 0.2),
    ],
)
def test_values(tokens, expected):
    assert learning_rate(tokens, 1000, **PLAN) == pytest.approx(expected, rel=1e-12)


def test_without_warmup_and_warmup_of_the_whole_run():
    assert learning_rate(0, 1000, lr=2.0, min_lr=0.2, warmup_tokens=0) == 2.0
    assert learning_rate(1000, 1000, lr=2.0, min_lr=0.2, warmup_tokens=1000) == 0.2
    assert learning_rate(500, 1000, lr=2.0, min_lr=0.2, warmup_tokens=1000) == 1.0
