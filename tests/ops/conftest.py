"""Op tests run with torch.empty and its relatives filled with NaN, so that an element nobody writes is
seen."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from tests.threads import every_op_shared_out


def _poisoned(function: Any) -> Any:
    def call(*args: Any, **kwargs: Any) -> torch.Tensor:
        out = function(*args, **kwargs)
        if isinstance(out, torch._subclasses.FakeTensor) or out.device.type != "cpu":
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
    for name in ("new_empty",):
        monkeypatch.setattr(torch.Tensor, name, _poisoned(getattr(torch.Tensor, name)))


@pytest.fixture
def restore_threads() -> Iterator[None]:
    """The test may set torch's thread count, and every op uses the threads, however small it is."""
    with every_op_shared_out():
        yield
