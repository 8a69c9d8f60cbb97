"""Op tests run with torch.empty and its relatives filled with NaN, so that an element nobody writes is
seen."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.poison import poison_empty
from tests.threads import every_op_shared_out


@pytest.fixture(autouse=True)
def poisoned_empty(monkeypatch: pytest.MonkeyPatch) -> None:
    poison_empty(monkeypatch, "cpu")


@pytest.fixture
def restore_threads() -> Iterator[None]:
    """The test may set torch's thread count, and every op uses the threads, however small it is."""
    with every_op_shared_out():
        yield
