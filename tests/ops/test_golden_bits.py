"""The bits of every op over the shared cases, recorded. They may change only together with the op's revision.

They are those of every backend, but for bf16 cases with a product: a backend with matrix units is held to the others.

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
from tests.ops.backends import SIMT
from tests.ops.cases import STEMS, cases, digest, evaluate

GOLDEN = pathlib.Path(__file__).with_name("golden.json")
LANDED = [stem for stem, names in STEMS.items() if all(name in ops.__all__ for name in names)]


def recorded() -> dict[str, dict]:
    return json.loads(GOLDEN.read_text()) if GOLDEN.exists() else {}


# The ops whose bf16 cases have a product that a GPU's matrix units compute.
PRODUCTS = {"grouped_gemm", "moe_mlp", "lm_head_logprob"}


def current(stem: str) -> dict:
    """The hash over all cases, and for an op with products over those in fp32 too; on a matrix unit only the latter."""
    every, exact = hashlib.sha256(), hashlib.sha256()
    for name in STEMS[stem]:
        for case in cases(name):
            in_fp32 = case.name.startswith("fp32")
            if SIMT and stem in PRODUCTS and not in_fp32:
                continue
            line = f"{case} {digest(evaluate(ops, case))};".encode()
            every.update(line)
            if in_fp32:
                exact.update(line)
    found = {"revision": _native.op_revisions()[stem], "sha256": every.hexdigest()}
    return {**found, "sha256_fp32": exact.hexdigest()} if stem in PRODUCTS else found


@pytest.mark.parametrize("stem", LANDED)
def test_bits_change_only_with_the_revision(stem: str) -> None:
    golden, now = recorded().get(stem), current(stem)
    if SIMT and stem in PRODUCTS:
        del golden["sha256"], now["sha256"]
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
    assert not SIMT, "the CPU's kernels write golden.json"
    GOLDEN.write_text(json.dumps({stem: current(stem) for stem in LANDED}, indent=2, sort_keys=True) + "\n")


if __name__ == "__main__":
    if sys.argv[1:] != ["--update"]:
        sys.exit("usage: python -m tests.ops.test_golden_bits --update")
    update()
