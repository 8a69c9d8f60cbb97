"""Under GLMX_STRICT=1 a skip because a module is missing (pytest.importorskip) is a failure: CI installs them all.

A skip for what a machine cannot have (AVX-512) stays one; for tools there is `unavailable` in tests/build/tree.py.
"""

from __future__ import annotations

import os
from collections.abc import Generator
from typing import Any

import pytest

STRICT = os.environ.get("GLMX_STRICT") == "1"


def _fail_if_a_module_is_missing(report: Any) -> None:
    if STRICT and report.skipped and "could not import" in str(report.longrepr):
        report.outcome, report.longrepr = "failed", f"GLMX_STRICT=1: {report.longrepr}"


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report() -> Generator[None, Any, Any]:
    report = yield
    _fail_if_a_module_is_missing(report)
    return report


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Generator[None, Any, Any]:
    report = yield
    _fail_if_a_module_is_missing(report)
    return report
