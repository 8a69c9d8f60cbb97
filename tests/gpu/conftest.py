"""On the device, too, torch.empty and its relatives come filled with NaN; and a process whose card has failed ends."""

from __future__ import annotations

import os

import pytest

from tests.gpu.device import DEVICE, context_is_dead
from tests.poison import poison_empty


@pytest.fixture(autouse=True)
def poisoned_empty(monkeypatch: pytest.MonkeyPatch) -> None:
    if DEVICE is not None:
        poison_empty(monkeypatch, DEVICE.type)


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
