"""Collects the rows of a benchmark run, prints them as one table and saves their ratios (build/bench/results.jsonl).

pytest bench --quick --threads 1,2         five minutes, as `make bench`
pytest bench --quick --threads 1,2 --write docs/performance.md
"""

from __future__ import annotations

import pathlib
import shlex
import sys

import pytest

sys.path.insert(0, str(pathlib.Path(__file__).parent))

import harness

ROWS: list[harness.Row] = []
# What --quick runs: the beginnings of tests' names.
QUICK = (
    "bench_moe.py::test_forward[small-",
    "bench_moe.py::test_backward[256-",
    "bench_moe_stored.py::test_forward[small-int",
    "bench_moe_routing.py::test_share[",
    "bench_attention.py::test_decode[4096-",
    "bench_indexer_topk.py::test_prefill[512-4096-",
    "bench_dsa.py::test_core[1-131072-",
    "bench_dsa.py::test_layer[1-4096-",
    "bench_sample.py::test_sample[top-p-16]",
    "bench_decode.py::test_synthetic_large[1-0.5]",
    "bench_model.py::test_decode[glm4_moe-96-",
    "bench_model.py::test_prefill[glm4_moe-2048-",
    "bench_model.py::test_train_step",
    "bench_model_stored.py::test_decode[",
)


def thread_counts(text: str) -> list[int]:
    counts = sorted({int(part) for part in text.split(",")})
    if counts[0] < 1:
        raise ValueError(text)
    return counts


def pytest_addoption(parser) -> None:
    parser.addoption("--decode-model", metavar="RUN", help="what bench_decode.py decodes with: a run of glmx demo")
    parser.addoption("--capacity-model", metavar="DIR", type=pathlib.Path, help="the checkpoint of bench_capacity.py")
    parser.addoption("--quick", action="store_true", help="a selection of five minutes")
    parser.addoption("--threads", type=thread_counts, default=None, metavar="N,N", help="numbers of threads, in turns")
    parser.addoption("--write", type=pathlib.Path, metavar="FILE", help="also write the table there, as Markdown")


def pytest_generate_tests(metafunc) -> None:
    counts = metafunc.config.getoption("--threads")
    if counts:
        metafunc.parametrize("threads", counts, indirect=True, scope="session")


def name_of(item) -> str:
    """file.py::test[case], without the number of threads that --threads puts before the case."""
    name = item.nodeid.rpartition("/")[2]
    start, bracket, case = name.partition("[")
    return start + bracket + (case.partition("-")[2] if item.config.getoption("--threads") else case)


def pytest_collection_modifyitems(config, items) -> None:
    if not config.getoption("--quick"):
        return
    names = [name_of(item) for item in items]
    gone = [start for start in QUICK if not any(name.startswith(start) for name in names)]
    if gone:
        raise pytest.UsageError(f"QUICK: no benchmark's name begins with {', '.join(gone)}")
    kept = [item for item, name in zip(items, names, strict=True) if name.startswith(QUICK)]
    config.hook.pytest_deselected(items=[item for item in items if item not in kept])
    items[:] = kept


@pytest.fixture(scope="session", autouse=True)
def threads(request):
    """The number of threads of this turn; torch's own without --threads."""
    import torch

    if hasattr(request, "param"):
        torch.set_num_threads(request.param)
    return torch.get_num_threads()


@pytest.fixture
def record_row():
    """Call it with a Row: it is compared with the last saved one of its name and shown at the end."""
    before = harness.last_saved()

    def record(row: harness.Row) -> None:
        row.flagged = harness.flag(row, before.get(harness.key(row)))
        ROWS.append(row)

    return record


def pytest_terminal_summary(terminalreporter, config) -> None:
    if ROWS:
        harness.save(ROWS)
        terminalreporter.write_line("\n" + harness.table(ROWS))
        out = config.getoption("--write")
        if out:
            words = [word for word in config.invocation_params.args if word not in ("--write", str(out), "-q")]
            # Where a model lies is this machine's own.
            models = {str(config.getoption(name)) for name in ("--decode-model", "--capacity-model")}
            words = ["DIR" if word in models else word for word in words]
            before = out.read_text() if out.exists() else ""
            out.write_text(harness.document(ROWS, shlex.join(["pytest", *words]), before))
