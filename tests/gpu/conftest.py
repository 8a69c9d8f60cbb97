"""On the device, too, torch.empty and its relatives come filled with NaN; and a process whose card has failed ends."""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch

from tests.gpu.device import DEVICE, context_is_dead


def _poisoned(function: Any) -> Any:
    def call(*args: Any, **kwargs: Any) -> torch.Tensor:
        out = function(*args, **kwargs)
        if DEVICE is None or out.device.type != DEVICE.type or isinstance(out, torch._subclasses.FakeTensor):
            return out
        with torch.no_grad():
            if out.is_floating_point():
                out.detach().fill_(float("nan"))
            elif out.dtype in (torch.int32, torch.int64):
                out.fill_(-(2**30))
        return out

    return call


@pytest.fixture(autouse=True)
def poisoned_empty(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("empty", "empty_like"):
        monkeypatch.setattr(torch, name, _poisoned(getattr(torch, name)))
    monkeypatch.setattr(torch.Tensor, "new_empty", _poisoned(torch.Tensor.new_empty))


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    def kept(item: pytest.Item) -> bool:
        wanted = getattr(getattr(item, "module", None), "for_the_device", None)
        case = getattr(item, "callspec", None) and item.callspec.params.get("case")
        return wanted is None or case is None or wanted(item.originalname, case)

    dropped = [item for item in items if not kept(item)]
    if dropped:
        config.hook.pytest_deselected(items=dropped)
        items[:] = [item for item in items if kept(item)]


def pytest_runtest_setup(item: pytest.Item) -> None:
    """After a test that killed the context: under xdist a new worker takes over, which costs this one test."""
    if not context_is_dead():
        return
    if "PYTEST_XDIST_WORKER" in os.environ:
        os._exit(70)
    pytest.exit(f"the card's context did not survive the test before {item.nodeid}", returncode=70)
