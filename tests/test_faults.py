"""Every fault of the table in docs/errors.md, planted again: the message, the exit code, and nothing half-written."""

import shutil

import pytest

from fault_rows import faults
from faults import PAGE, Fault, inject, make_world, rows_of
from warm import Warm

pytestmark = pytest.mark.xdist_group("faults")  # one world, one server of warm processes
FAULTS = faults()
ROWS = rows_of(PAGE.read_text())


@pytest.fixture(scope="module")
def warm():
    with Warm() as server:
        yield server


@pytest.fixture(scope="module")
def world(warm, tmp_path_factory):
    return make_world(tmp_path_factory.mktemp("faults") / "world", warm)


def test_the_page_lists_these_faults():
    assert list(ROWS) == [fault.id for fault in FAULTS], "run: python tests/faults.py"
    assert len(ROWS) >= 25


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.id)
def test_one_line_exit_code_2_and_nothing_half_written(fault: Fault, world, warm, tmp_path):
    seen = inject(fault, world, tmp_path / "place", warm)
    assert (seen.code, seen.changed) == (2, []), seen
    assert "\n" not in seen.err and seen.err.startswith("glmx"), seen.err
    for name in fault.names:
        assert name in seen.err
    said, written = seen.err, ROWS[fault.id][2]
    if fault.library:
        said, written = said.rpartition(": ")[0], written.rpartition(": ")[0]
    assert said == written, "run: python tests/faults.py"
    assert ROWS[fault.id][3] == "2" and ROWS[fault.id][1] == fault.command
    shutil.rmtree(tmp_path / "place")


def test_after_a_full_disk_the_run_goes_on(world, warm, tmp_path):
    """The same directory, with room again."""
    fault = next(fault for fault in FAULTS if fault.id.endswith("a-full-disk-while-a-checkpoint-is-saved"))
    shutil.copytree(world, tmp_path / "place")
    code, _, err = warm.run(fault.argv, tmp_path / "place", largest_file=40_000)
    assert code == 2 and "step-00000003" in err
    code, _, err = warm.run(fault.argv, tmp_path / "place")
    assert code == 0 and "resumed run/step-00000002" in err, err
    assert (tmp_path / "place" / "run" / "latest").read_text() == "step-00000004\n"
