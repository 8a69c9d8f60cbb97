"""The bits of every op over the shared cases, recorded. They may change only together with the op's revision.

Whoever changes an op's bits raises its kXxxRevision in ops.h and runs
    python -m tests.ops.test_golden_bits --update
"""

from __future__ import annotations

import hashlib
import json
import pathlib
import sys

import pytest

from glmx import _native, ops
from tests.ops.cases import STEMS, cases, digest, evaluate

GOLDEN = pathlib.Path(__file__).with_name("golden.json")
LANDED = [stem for stem, names in STEMS.items() if all(name in ops.__all__ for name in names)]


def recorded() -> dict[str, dict]:
    return json.loads(GOLDEN.read_text()) if GOLDEN.exists() else {}


def current(stem: str) -> dict:
    sha = hashlib.sha256()
    for name in STEMS[stem]:
        for case in cases(name):
            sha.update(f"{case} {digest(evaluate(ops, case))};".encode())
    return {"revision": _native.op_revisions()[stem], "sha256": sha.hexdigest()}


@pytest.mark.parametrize("stem", LANDED)
def test_bits_change_only_with_the_revision(stem: str) -> None:
    golden, now = recorded().get(stem), current(stem)
    assert golden is not None, f"{stem} has no entry in golden.json: run this file with --update"
    if now == golden:
        return
    if now["revision"] == golden["revision"]:
        raise AssertionError(
            f"{stem}: the bits changed and the revision is still {now['revision']}: raise it in ops.h (or undo the "
            f"change, or, if only the cases changed, run this file with --update)"
        )
    raise AssertionError(
        f"{stem}: revision {now['revision']} is not the recorded {golden['revision']}: run this file with --update"
    )


def test_no_entry_without_an_op() -> None:
    assert set(recorded()) == set(LANDED)


def update() -> None:
    GOLDEN.write_text(json.dumps({stem: current(stem) for stem in LANDED}, indent=2, sort_keys=True) + "\n")


if __name__ == "__main__":
    if sys.argv[1:] != ["--update"]:
        sys.exit("usage: python -m tests.ops.test_golden_bits --update")
    update()
