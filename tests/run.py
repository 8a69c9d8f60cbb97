"""`make test`: every check of the project in order, ending with one closing line in pytest's form.

    python tests/run.py [STAGE ...]        the stages below; all of them when none is named

lint      ruff, ruff format, clang-format, mypy
cpp       the C++ tests, as built for users and under ASan + UBSan
qemu      older CPUs, emulated: the C++ tests without AVX, the Python stack with AVX2 at most
tests     pytest on two workers, under this machine's best instruction set
simt      tests/ops on the GPU's kernels and a CPU that plays GPU, in three orders of threads; then broken kernels
gates     GPU kernels without a GPU: what nvcc and clang made of them for every card, and docs/gpu.md's table
isa       tests/ops and one model test again, under each lower instruction set that GLMX_ISA can pin
wheel     `make wheel`, installed and used in a second environment without compiler or sources
examples  the scripts in examples/, as a user runs them
bench     every benchmark once, on small shapes, for its results and not for its times
demo      glmx demo for a minute: checkpoint, plot, completion, and transformers on the checkpoint

A failing stage does not hide the ones after it. The exit status is 0 only when every stage passed.
"""

from __future__ import annotations

import os
import pathlib
import shutil
import subprocess
import sys
import time
import xml.etree.ElementTree as ET
from collections.abc import Callable
from dataclasses import dataclass

ROOT = pathlib.Path(__file__).resolve().parent.parent
BUILD = ROOT / "build"
RESULTS = BUILD / "test-results"
STRICT = os.environ.get("GLMX_STRICT") == "1"
WORKERS = "2"


@dataclass
class Count:
    passed: int = 0
    failed: int = 0
    skipped: int = 0

    def __add__(self, other: Count) -> Count:
        return Count(self.passed + other.passed, self.failed + other.failed, self.skipped + other.skipped)

    def __str__(self) -> str:
        parts = [(self.failed, "failed"), (self.passed, "passed"), (self.skipped, "skipped")]
        return ", ".join(f"{n} {word}" for n, word in parts if n) or "0 passed"


def say(text: str) -> None:
    print(text, flush=True)


def check(name: str, command: list[str], **kwargs) -> Count:
    """One command that passes or fails as a whole."""
    say(f"-- {name}")
    try:
        ok = subprocess.run(command, cwd=ROOT, **kwargs).returncode == 0
    except FileNotFoundError:
        say(f"{command[0]} is not installed: make dev")
        ok = False
    if not ok:
        say(f"FAILED: {name}: {' '.join(command[:12])}")
    return Count(passed=int(ok), failed=int(not ok))


def pytest(name: str, *args: str, **environment: str) -> Count:
    """A pytest run; its counts come from its JUnit report. A run that executes no test counts as failed."""
    RESULTS.mkdir(parents=True, exist_ok=True)
    report = RESULTS / f"{name}.xml"
    report.unlink(missing_ok=True)
    command = [sys.executable, "-m", "pytest", f"--junitxml={report}", "--durations=8", "-p", "no:cacheprovider", *args]
    env = {"OMP_NUM_THREADS": "1", **os.environ, **environment}
    code = subprocess.run(command, cwd=ROOT, env=env).returncode
    count = Count()
    if report.exists():
        for suite in ET.parse(report).getroot().iter("testsuite"):
            number = {key: int(suite.get(key, 0)) for key in ("tests", "failures", "errors", "skipped")}
            bad = number["failures"] + number["errors"]
            count += Count(max(0, number["tests"] - bad - number["skipped"]), bad, number["skipped"])
    if code != 0 and count.failed == 0:
        say(f"FAILED: {name}: pytest ended with status {code}")
        count.failed = 1
    return count


def tracked(*patterns: str) -> list[str]:
    out = subprocess.run(["git", "ls-files", *patterns], cwd=ROOT, capture_output=True, text=True)
    if out.returncode == 0:
        names = out.stdout.split()
    else:  # not a clone: an unpacked archive
        names = [str(p.relative_to(ROOT)) for pattern in patterns for p in (ROOT / "csrc").rglob(pattern)]
    return sorted(name for name in names if (ROOT / name).is_file())


def lint() -> Count:
    count = check("ruff check", ["ruff", "check", "."])
    count += check("ruff format", ["ruff", "format", "--check", "."])
    count += check("clang-format", ["clang-format", "--dry-run", "-Werror", *tracked("*.cpp", "*.h", "*.cu")])
    bodies = Count()
    for name in tracked("*.inl"):  # clang-format goes by the ending, and does not know this one
        command = ["clang-format", "--dry-run", "-Werror", f"--assume-filename={name}.h"]
        bodies += check(f"clang-format {name}", command, stdin=(ROOT / name).open())
    count += Count(passed=int(not bodies.failed), failed=bodies.failed)
    return count + check("mypy", ["mypy"])


def build_cpp(variant: str) -> Count:
    """Builds the C++ tests in build/cpp-<variant>: "plain" as for users, "sanitize" under ASan and UBSan."""
    where = BUILD / f"cpp-{variant}"
    configure = ["cmake", "-S", str(ROOT), "-B", str(where), "-DGLMX_PYTHON=OFF", "-DGLMX_TESTS=ON", "-DGLMX_CUDA=OFF"]
    configure.append(f"-DGLMX_SANITIZE={'ON' if variant == 'sanitize' else 'OFF'}")
    if shutil.which("ninja"):
        configure.append("-GNinja")
    quiet = {"stdout": subprocess.DEVNULL}
    built = check(f"configure {variant}", configure, **quiet)
    if not built.failed:
        built = check(f"build {variant}", ["cmake", "--build", str(where), "-j", str(os.cpu_count() or 1)], **quiet)
    return built


def cpp() -> Count:
    total = Count()
    for variant in ("plain", "sanitize"):
        built = build_cpp(variant)
        if built.failed:
            total += built
            continue
        report = RESULTS / f"ctest-{variant}.xml"
        RESULTS.mkdir(parents=True, exist_ok=True)
        command = ["ctest", "--test-dir", str(BUILD / f"cpp-{variant}"), "--output-on-failure", "--no-tests=error"]
        ran = check(f"ctest {variant}", [*command, "--output-junit", str(report)])
        suite = ET.parse(report).getroot()
        failed = int(suite.get("failures", 0))
        skipped = int(suite.get("skipped", 0)) + int(suite.get("disabled", 0))
        total += Count(int(suite.get("tests", 0)) - failed - skipped, failed or ran.failed, skipped)
    return total


def tests() -> Count:
    """Everything but the files that are a stage of their own."""
    own = [f"--ignore=tests/test_{stage}.py" for stage in ("qemu", "wheel", "examples", "demo")]
    own += ["--ignore=tests/gates"]
    return pytest("tests", "-n", WORKERS, "--dist=loadgroup", *own, "tests")


def qemu() -> Count:
    if not shutil.which("qemu-x86_64"):
        say(f"{'FAILED' if STRICT else 'SKIPPED'}: qemu-x86_64 is missing: apt-get install qemu-user")
        return Count(failed=1) if STRICT else Count(skipped=1)
    built = build_cpp("plain")
    return built if built.failed else pytest("qemu", "tests/test_qemu.py")


def gates() -> Count:
    """CUDA's side reads the objects of the product's build, HIP's compiles its own: one worker each."""
    return pytest("gates", "-n", WORKERS, "--dist=loadfile", "tests/gates")


def isa() -> Count:
    """The whole suite has run under the best level; the lower ones run what depends on the kernels."""
    from glmx import _native

    # tests/build holds the tables of every level, so that the levels which this machine lacks are checked too.
    chosen = [
        str(path.relative_to(ROOT))
        for path in (ROOT / "tests/ops", ROOT / "tests/models/test_decoder_parity.py")
        if path.exists()
    ]
    if not chosen:
        return Count(skipped=1)
    total = Count()
    for level in _native.supported_isas():
        if level == _native.active_isa():
            continue
        say(f"-- GLMX_ISA={level}")
        total += pytest(f"isa-{level}", "-n", WORKERS, "-m", "not slow", *chosen, GLMX_ISA=level)
    return total


def build_simt() -> Count:
    """build/simt/libglmx_simt.so, linked to the core that is in place."""
    where = BUILD / "simt"
    configure = ["cmake", "-S", str(ROOT), "-B", str(where), "-DGLMX_PYTHON=OFF", "-DGLMX_SIMT=ON", "-DGLMX_CUDA=OFF"]
    configure += [f"-DGLMX_OUT={where}", f"-DGLMX_CORE={ROOT / 'python/glmx/libglmx_core.so'}"]
    if shutil.which("ninja"):
        configure.append("-GNinja")
    quiet = {"stdout": subprocess.DEVNULL}
    built = check("configure simt", configure, **quiet)
    if not built.failed:
        built = check("build simt", ["cmake", "--build", str(where), "-j", str(os.cpu_count() or 1)], **quiet)
    return built


def simt() -> Count:
    """Every op that has a kernel for GPUs; what depends on the order of threads or on the card in all of them."""
    from glmx import _native

    total = build_simt()
    if total.failed:
        return total
    _native.load_simt(str(BUILD / "simt/libglmx_simt.so"))
    kernels = set(_native.gpu_kernels("simt"))
    ops = sorted(path for path in (ROOT / "tests/ops").glob("test_*.py") if path.stem.removeprefix("test_") in kernels)
    shared = [ROOT / f"tests/ops/test_{name}.py" for name in ("golden_bits", "promises", "grouped_gemm_properties")]
    products = [ROOT / f"tests/ops/test_{name}.py" for name in ("grouped_gemm", "moe_mlp", "lm_head_logprob")]
    for backend, chosen in (
        ("simt", [*shared, *ops]),
        ("simt:reverse", [*shared[:1], *products]),
        ("simt:random", [*shared[:1], *products]),
        ("simt:sm80", products),  # without Hopper's own kernels
    ):
        say(f"-- GLMX_BACKEND={backend}")
        name = backend.replace(":", "-")
        total += pytest(name, "-n", WORKERS, "-m", "not slow", *map(str, chosen), GLMX_BACKEND=backend)
    built = build_cpp("plain")  # the mutants run its cases
    if built.failed:
        return total + built
    return total + check("broken kernels", [sys.executable, "tests/simt_mutants.py", "--indices", "1"])


def wheel() -> Count:
    return pytest("wheel", "tests/test_wheel.py")


def examples() -> Count:
    return pytest("examples", "tests/test_examples.py", OMP_NUM_THREADS="2")


def bench() -> Count:
    return pytest("bench", "bench", "--benchmark-disable", OMP_NUM_THREADS="2")


def demo() -> Count:
    return pytest("demo", "tests/test_demo.py", OMP_NUM_THREADS=WORKERS)


IN_ORDER = (lint, cpp, qemu, tests, simt, gates, isa, wheel, examples, bench, demo)
STAGES: dict[str, Callable[[], Count]] = {stage.__name__: stage for stage in IN_ORDER}


def main(names: list[str]) -> int:
    unknown = [name for name in names if name not in STAGES]
    if unknown:
        say(f"unknown stage {unknown[0]!r}; expected some of {', '.join(STAGES)}")
        return 2
    os.environ["PATH"] = os.pathsep.join([str(pathlib.Path(sys.executable).parent), os.environ["PATH"]])
    sys.path.insert(0, str(ROOT / "python"))
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT / "python"), os.environ.get("PYTHONPATH")]))
    start, total, rows = time.monotonic(), Count(), []
    for name in names or STAGES:
        say(f"\n== {name}")
        began = time.monotonic()
        try:
            count = STAGES[name]()
        except Exception as error:  # a stage that breaks is a failed stage; the others still run
            say(f"FAILED: {name}: {type(error).__name__}: {error}")
            count = Count(failed=1)
        rows.append(f"{name:9} {time.monotonic() - began:7.1f} s   {count}")
        total += count
    say("\n== stages\n" + "\n".join(rows))
    failed = [row.split()[0] for row in rows if " failed" in row]
    if failed:
        say(f"FAILED stages: {', '.join(failed)}")
    say(f"==== {total} in {time.monotonic() - start:.2f}s ====")
    return 1 if total.failed or not total.passed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
