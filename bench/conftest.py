"""Collects the rows of a benchmark run, prints them as one table and saves their ratios (build/bench/results.jsonl)."""

from __future__ import annotations

import pathlib
import sys

import pytest

sys.path.insert(0, str(pathlib.Path(__file__).parent))

import harness

ROWS: list[harness.Row] = []


def pytest_addoption(parser) -> None:
    parser.addoption("--decode-model", metavar="RUN", help="what bench_decode.py decodes with: a run of glmx demo")


@pytest.fixture
def record_row():
    """Call it with a Row: it is compared with the last saved one of its name and shown at the end."""
    before = harness.last_saved()

    def record(row: harness.Row) -> None:
        row.flagged = harness.flag(row, before.get(harness.key(row)))
        ROWS.append(row)

    return record


def pytest_terminal_summary(terminalreporter) -> None:
    if ROWS:
        harness.save(ROWS)
        terminalreporter.write_line("\n" + harness.table(ROWS))
