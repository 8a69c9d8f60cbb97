"""What every op promises, over the shared cases: X1 (repeatable, any thread count), X5 (one x86), and its
registration with torch (opcheck of torch.ops.glmx.*, shapes under fake tensors).
"""

from __future__ import annotations

import os
import pathlib
import subprocess
import sys
from functools import cache
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from glmx import _native, ops
from tests.ops.backends import cpu_only
from tests.ops.cases import STEMS, Case, canonical, cases, evaluate, results, same_bits, with_grad

ROOT = pathlib.Path(__file__).resolve().parents[2]
LANDED = [name for names in STEMS.values() for name in names if name in ops.__all__]
ALL_CASES = [case for name in LANDED for case in cases(name)]


def assert_same_bits(got: dict[str, torch.Tensor], want: dict[str, torch.Tensor], what: str) -> None:
    assert got.keys() == want.keys(), what
    for name in want:
        if not same_bits(got[name], want[name]):
            a, b = got[name], want[name]
            assert a.shape == b.shape and a.dtype == b.dtype, f"{what}: {name}"
            differ = canonical(a) != canonical(b)
            i = tuple(torch.nonzero(differ)[0].tolist())
            raise AssertionError(
                f"{what}: {name} differs in {int(differ.sum())} of {differ.numel()} elements, "
                f"first at {i}: {float(a[i])!r} and {float(b[i])!r}"
            )


def test_every_public_function_has_cases() -> None:
    functions = {n for n in ops.__all__ if callable(getattr(ops, n)) and not isinstance(getattr(ops, n), type)}
    assert functions <= {name for names in STEMS.values() for name in names}
    assert all(cases(name) for name in LANDED)


@pytest.mark.parametrize("case", ALL_CASES, ids=str)
def test_x1_same_bits_for_any_thread_count_and_any_run(case: Case, restore_threads: None) -> None:
    torch.set_num_threads(1)
    want = evaluate(ops, case)
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        assert_same_bits(evaluate(ops, case), want, f"{threads} threads")


@pytest.mark.parametrize("name", LANDED)
def test_x4_the_same_bits_where_gradients_are_off(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def run(case: Case) -> dict[str, torch.Tensor]:
        kwargs = with_grad(case.make(), case.grads)
        return {key: out.detach() for key, out in results(getattr(ops, name), kwargs).items()}

    def autograd(*_args: Any) -> None:
        raise AssertionError("autograd's bookkeeping, with nothing to differentiate")

    trained = [run(case) for case in cases(name)]
    monkeypatch.setattr(torch.autograd.Function, "apply", autograd)
    for case, want in zip(cases(name), trained, strict=True):
        with torch.no_grad():
            assert_same_bits(run(case), want, str(case))


@cache
def results_under(isa: str, directory: str) -> dict[str, dict[str, torch.Tensor]]:
    path = pathlib.Path(directory) / f"{isa}.pt"
    env = {**os.environ, "GLMX_ISA": isa, "OMP_NUM_THREADS": "1"}
    env["PYTHONPATH"] = os.pathsep.join([str(ROOT), *filter(None, [env.get("PYTHONPATH")])])
    command = [sys.executable, "-m", "tests.ops.isa_worker", str(path), *LANDED]
    done = subprocess.run(command, env=env, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return torch.load(path)


@pytest.fixture(scope="session")
def isa_directory(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tmp_path_factory.mktemp("isa"))


@cpu_only
@pytest.mark.parametrize("op", LANDED)
@pytest.mark.parametrize("isa", [isa for isa in _native.supported_isas() if isa != "base"])
def test_x5_every_isa_gives_the_bits_of_base(isa: str, op: str, isa_directory: str) -> None:
    base, got = results_under("base", isa_directory), results_under(isa, isa_directory)
    for case in cases(op):
        assert_same_bits(got[str(case)], base[str(case)], f"{case} under {isa} and base")


def test_x5_the_pin_reaches_the_worker(isa_directory: str) -> None:
    code = "from glmx import _native; print(_native.active_isa())"
    for isa in _native.supported_isas():
        env = {**os.environ, "GLMX_ISA": isa}
        done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
        assert done.stdout.strip() == isa, done.stderr[-500:]


class Recorder(TorchDispatchMode):
    """Keeps every call of a torch.ops.glmx op with copies of its arguments."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, tuple, dict]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if func.namespace == "glmx":
            copy = lambda a: a.clone() if isinstance(a, torch.Tensor) else a
            self.calls.append((func, tuple(map(copy, args)), {k: copy(v) for k, v in (kwargs or {}).items()}))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", LANDED)
def test_opcheck(name: str) -> None:
    seen = set()
    for case in cases(name, wild=False):
        with Recorder() as recorder:
            evaluate(ops, case)
        assert recorder.calls, f"{name} ran no torch.ops.glmx op"
        for func, args, kwargs in recorder.calls:
            form = (func, tuple(a is None for a in args))
            if form in seen:
                continue
            seen.add(form)
            torch.library.opcheck(func, args, kwargs, test_utils=("test_schema", "test_faketensor"))


@pytest.mark.parametrize("name", LANDED)
def test_shapes_and_dtypes_under_fake_tensors(name: str) -> None:
    for case in cases(name, wild=False)[:4]:
        kwargs = case.make()
        want = results(getattr(ops, name), kwargs)
        with FakeTensorMode(allow_non_fake_inputs=False) as mode:

            def fake(v: Any, mode: FakeTensorMode = mode) -> Any:
                if isinstance(v, list):
                    return [fake(u) for u in v]
                return mode.from_tensor(v) if isinstance(v, torch.Tensor) else v

            got = results(getattr(ops, name), {k: fake(v) for k, v in kwargs.items()})
        for key in want:
            assert (got[key].shape, got[key].dtype) == (want[key].shape, want[key].dtype), (str(case), key)
