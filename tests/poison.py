"""torch.empty and its relatives filled with NaN, so that an element nobody writes is seen."""

from __future__ import annotations

from typing import Any

import pytest
import torch


def _poisoned(function: Any, device_type: str) -> Any:
    def call(*args: Any, **kwargs: Any) -> torch.Tensor:
        out = function(*args, **kwargs)
        if isinstance(out, torch._subclasses.FakeTensor) or out.device.type != device_type:
            return out
        with torch.no_grad():
            if out.is_floating_point():
                out.detach().fill_(float("nan"))
            elif out.dtype in (torch.int32, torch.int64):
                out.fill_(-(2**30))
        return out

    return call


def poison_empty(monkeypatch: pytest.MonkeyPatch, device_type: str) -> None:
    """For the test that monkeypatch belongs to, on tensors of one type of device."""
    for owner, name in ((torch, "empty"), (torch, "empty_like"), (torch.Tensor, "new_empty")):
        monkeypatch.setattr(owner, name, _poisoned(getattr(owner, name), device_type))
