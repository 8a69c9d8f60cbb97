"""What bench/gpu_check.sh runs: stages, each with a time limit; one JSON-lines file with every row; one table.

A stage that fails, or takes too long, is a row, and the next one runs. Nothing changes the card's settings.
  machine    the card, its driver, compiler, torch, the commit
  install    pip install --no-build-isolation --no-deps into a folder of its own, from this checkout
  env        what glmx env says
  ceilings   matrix product, copy, read, gather, launch
  bits       bits.cu: whether mma, wgmma and swapped wgmma agree; divisions.cu: whether gx divides without branches
  tests      tests/gpu on this card
  examples   examples/moe_block.py and cupy_arrays.py on the card
  bench      route_topk, moe_combine, grouped_gemm, moe_layer, decode: each a stage, "bench_<name>"
  memcheck, racecheck   compute-sanitizer on tests/gpu/sanitize.py
"""

from __future__ import annotations

import argparse
import json
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import time
import xml.etree.ElementTree as ET
from collections.abc import Callable
from typing import Any

ROOT = pathlib.Path(__file__).resolve().parents[2]
HERE = ROOT / "bench" / "gpu"
TOTAL = 520  # seconds for everything: the promise is nine minutes
# Seconds of each stage, in order; what is left of TOTAL may be less. The benchmarks end by themselves a little earlier.
LIMITS = {
    "machine": 20,
    "install": 200,
    "env": 30,
    "ceilings": 60,
    "bits": 60,
    "tests": 150,
    "bench_grouped_gemm": 60,
    "bench_route_topk": 35,
    "bench_decode": 45,
    "bench_moe_layer": 50,
    "bench_moe_combine": 40,
    "examples": 60,
    "memcheck": 90,
    "racecheck": 90,
}
QUICK = {"tests": 100, "memcheck": 60, "racecheck": 60}


class Check:
    def __init__(self, args: argparse.Namespace) -> None:
        self.args, self.begun = args, time.monotonic()
        self.out = pathlib.Path(args.out).resolve()
        self.out.mkdir(parents=True, exist_ok=True)
        self.path = self.out / "gpu_check.jsonl"
        self.path.write_text("")
        self.rows: list[dict[str, Any]] = []
        self.site = ROOT / "build" / "gpu_check" / "site"
        self.binaries = self.site.parent
        self.binaries.mkdir(parents=True, exist_ok=True)
        self.env = {**os.environ, "PYTHONPATH": str(self.site), "OMP_NUM_THREADS": "4", "PYTHONDONTWRITEBYTECODE": "1"}
        self.stage = ""

    def row(self, **values: Any) -> None:
        row = {"stage": self.stage, **values}
        self.rows.append(row)
        with self.path.open("a") as file:
            file.write(json.dumps(row) + "\n")

    def left(self) -> float:
        return TOTAL - (time.monotonic() - self.begun)

    def limit(self) -> float:
        own = QUICK.get(self.stage) if self.args.quick else None
        return min(own or LIMITS[self.stage], self.left())

    def run(self, *command: str | pathlib.Path, env: dict[str, str] | None = None) -> str:
        """The output of a command, errors included; raises what went wrong. Its process group ends with it."""
        words = [str(word) for word in command]
        limit = max(1.0, self.limit() - (time.monotonic() - self.stage_begun))
        with (self.out / f"{self.stage}.log").open("a+") as log:
            log.write(f"$ {' '.join(words)}\n")
            log.flush()
            at = log.tell()
            process = subprocess.Popen(
                words, cwd=ROOT, env=env or self.env, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
            )
            try:
                code, late = process.wait(limit), False
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                code, late = process.wait(), True
            log.seek(at)
            text = log.read()
        if late:
            raise Failed(f"took longer than {limit:.0f} s", text)
        if code != 0:
            raise Failed(f"status {code}", text)
        return text

    def do(self, stage: str, work: Callable[[], None]) -> bool:
        self.stage, self.stage_begun = stage, time.monotonic()
        if self.left() < 8:
            self.row(name="stage", ok=False, error="no time left")
            return False
        print(f"-- {stage} (at most {self.limit():.0f} s)", flush=True)
        error = None
        try:
            work()
        except Failed as failure:
            error, tail = str(failure), failure.text.strip().splitlines()[-12:]
        except Exception as failure:
            error, tail = f"{type(failure).__name__}: {failure}", []
        seconds = round(time.monotonic() - self.stage_begun, 1)
        if error is None:
            self.row(name="stage", ok=True, seconds=seconds)
        else:
            self.row(name="stage", ok=False, seconds=seconds, error=error, tail=tail)
            print(f"   {error}\n   " + "\n   ".join(line[:200] for line in tail[-4:]), flush=True)
        return error is None

    # --- stages

    def machine(self) -> None:
        fields = "name,driver_version,memory.total,clocks.max.sm,power.limit"
        told = self.run("nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader").strip().splitlines()[0]
        values = [value.strip() for value in told.split(",")]
        code = (
            "import json, sys, torch; print(json.dumps(dict(torch=torch.__version__, cuda=torch.version.cuda, "
            "python=sys.version.split()[0], cards=torch.cuda.device_count())))"
        )
        torch = json.loads(self.run(sys.executable, "-c", code).strip().splitlines()[-1])
        nvcc = re.search(r"release (\S+),", self.run("nvcc", "--version"))
        card = dict(zip(("card", "driver", "memory", "clock", "power"), values, strict=False))
        now = time.strftime("%Y-%m-%dT%H:%MZ", time.gmtime())
        self.row(name="machine", commit=commit(self.args), at=now, nvcc=nvcc and nvcc[1], **card, **torch)

    def install(self) -> None:
        """--target: no environment is touched, and one that its system manages does not refuse."""
        shutil.rmtree(self.site, ignore_errors=True)
        flags = ("--no-build-isolation", "--no-deps", "--no-index", "--disable-pip-version-check", "-q")
        env = {**os.environ, "MAX_JOBS": str(os.cpu_count() or 1)}
        self.run(sys.executable, "-m", "pip", "install", *flags, "--target", self.site, ".", env=env)

    def env_stage(self) -> None:
        told = self.run(sys.executable, "-m", "glmx", "env", "--json")
        facts = json.loads(told[told.index("{") :])
        self.row(name="env", **{key: facts[key] for key in facts if key not in ("kernels", "environment")})
        rows = facts.get("kernels", [])
        served = {f"{row['op']} {row['variant']}".strip(): row.get("gpu", "none") for row in rows}
        self.row(name="kernels", on_the_card=served)

    def lines(self, text: str) -> None:
        for line in text.splitlines():
            if line.startswith("{"):
                self.row(**json.loads(line))

    def probe(self, name: str, *flags: str) -> None:
        binary = self.binaries / name
        self.run("nvcc", "-std=c++20", "-O3", *flags, HERE / f"{name}.cu", "-o", binary)
        self.lines(self.run(binary))

    def ceilings(self) -> None:
        try:
            self.probe("ceilings", "-arch=native")
        finally:
            self.lines(self.run(sys.executable, HERE / "ceilings.py"))

    def bits(self) -> None:
        self.probe("bits", "-gencode=arch=compute_90a,code=sm_90a")
        product = ("-fmad=false", "-ftz=true", "-prec-div=true", "-Icsrc", "-Icsrc/include")
        self.probe("divisions", "-arch=native", *product)

    def tests(self) -> None:
        report = self.out / "tests.xml"
        report.unlink(missing_ok=True)
        command = [sys.executable, "-m", "pytest", "tests/gpu", f"--junitxml={report}", "-p", "no:cacheprovider", "-v"]
        command += ["--continue-on-collection-errors"]  # a module that a missing package stops is one failure
        # The checkout's python/ holds no libraries: what is installed is tested.
        command += ["-o", "pythonpath=. tests tests/models", "--tb=line", "--maxfail=400"]
        if has_module("xdist"):
            command += ["-n", str(min(8, os.cpu_count() or 1))]
        if has_module("pytest_timeout"):  # a kernel that hangs ends its process, and is one failure
            command += ["--timeout=60", "--timeout-method=thread"]
        try:
            self.run(*command, env={**self.env, "OMP_NUM_THREADS": "1"})
            text, failure = "", None
        except Failed as failed:
            text, failure = failed.text, failed
        results = junit(report) if report.exists() else from_log(text)
        self.row(name="tests", **{key: sum(r[1] == key for r in results) for key in ("passed", "failed", "skipped")})
        of_op: dict[str, dict[str, int]] = {}
        said: dict[str, list[str]] = {}
        for test, result, words in results:
            op = next((op for op in PORTED if test.startswith(f"test_{op}_")), None)
            if op:
                count = of_op.setdefault(op, {"passed": 0, "failed": 0, "skipped": 0})
                count[result] += 1
            if result == "failed":
                said.setdefault(test.partition("[")[0], []).append(f"{test}: {words[:300]}")
        for op, count in of_op.items():
            self.row(name="op", op=op, **count)
        for test, messages in sorted(said.items(), key=lambda item: -len(item[1])):
            self.row(name="failures", test=test, failed=len(messages), first=messages[:4])
        if failure:
            raise failure

    def examples(self) -> None:
        failure = None
        for name, flags in (("moe_block", ["--device", "cuda"]), ("cupy_arrays", [])):
            try:
                text = self.run(sys.executable, ROOT / "examples" / f"{name}.py", *flags)
                self.row(name=name, said=text.strip().splitlines()[-24:])
            except Failed as failed:
                failure = failed
        if failure:
            raise failure

    def bench(self, name: str) -> Callable[[], None]:
        def work() -> None:
            command = [sys.executable, HERE / f"{name}.py", "--ceilings", self.path]
            command += ["--seconds", str(round(self.limit() * 0.7, 1)), *(["--quick"] if self.args.quick else [])]
            try:
                self.lines(self.run(*command))
            except Failed as failed:
                self.lines(failed.text)
                raise

        return work

    def sanitizer(self, tool: str) -> Callable[[], None]:
        def work() -> None:
            found = shutil.which("compute-sanitizer")
            if not found:
                self.row(name=tool, answer="compute-sanitizer is not installed")
                return
            try:
                told = self.run(found, "--help")
            except Failed as failed:
                told = failed.text
            only = next((option for option in ("--kernel-name", "--kernel-regex") if f"{option} " in told), None)
            command = [found, "--tool", tool, "--error-exitcode", "9", "--print-limit", "20"]
            command += [only, "kns=glmx"] if only else []
            names = (
                ["route_topk", "expert_plan", "grouped_gemm", "moe_combine", "moe_mlp"] if tool == "racecheck" else []
            )
            # Without torch's cache of memory each tensor is an allocation, whose ends the sanitizer knows.
            env = {**self.env, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
            try:
                text = self.run(*command, sys.executable, "-m", "tests.gpu.sanitize", *names, env=env)
            except Failed as failed:
                summary = re.findall(r"=+ ?(.*SUMMARY.*)", failed.text)
                errors = [line[:200] for line in failed.text.splitlines() if line.startswith("=====")][:12]
                self.row(name=tool, answer=summary[-1] if summary else str(failed), found=errors)
                raise
            summary = re.findall(r"=+ ?(.*SUMMARY.*)", text)
            ran = re.findall(r"^\d+ cases on .*", text, re.MULTILINE)
            self.row(name=tool, answer=summary[-1] if summary else "no summary", ran=ran[-1] if ran else "nothing")

        return work

    def all(self, names: list[str]) -> None:
        work: dict[str, Callable[[], None]] = {
            "machine": self.machine,
            "install": self.install,
            "env": self.env_stage,
            "ceilings": self.ceilings,
            "bits": self.bits,
            "tests": self.tests,
            "examples": self.examples,
            "memcheck": self.sanitizer("memcheck"),
            "racecheck": self.sanitizer("racecheck"),
        }
        work |= {f"bench_{name}": self.bench(name) for name in BENCHES}
        installed = False
        for name in names:
            if installed or name in WITHOUT_GLMX:
                installed |= self.do(name, work[name]) and name == "install"
            else:
                self.stage = name
                self.row(name="stage", ok=False, error="glmx is not installed")


BENCHES = ("grouped_gemm", "route_topk", "decode", "moe_layer", "moe_combine")
# Longer names first: a test is of the first that it begins with.
PORTED = (
    "add_rms_norm",
    "rms_norm",
    "layer_norm",
    "route_topk",
    "expert_plan",
    "grouped_gemm",
    "moe_combine",
    "moe_mlp",
)
PORTED += ("rope", "silu_mul", "embedding", "lm_head_logprob")
BENCH_STAGES = tuple(f"bench_{name}" for name in BENCHES)
WITHOUT_GLMX = ("machine", "install", "ceilings", "bits")


class Failed(Exception):
    def __init__(self, why: str, text: str) -> None:
        super().__init__(why)
        self.text = text


def planned(only: str | None) -> list[str]:
    """The stages to run, in order: all, or those named with what they need."""
    wanted = [word for word in (only or "").split(",") if word]
    for word in wanted:
        if word not in (*LIMITS, "bench"):
            sys.exit(f"gpu_check: --only {word}: expected some of {', '.join(LIMITS)}, bench")
    named = [name for name in LIMITS if not wanted or name in wanted or (name in BENCH_STAGES and "bench" in wanted)]
    needed = {"machine"}
    if any(name not in WITHOUT_GLMX for name in named):
        needed.add("install")
    if any(name in BENCH_STAGES for name in named):
        needed.add("ceilings")
    return [name for name in LIMITS if name in named or name in needed]


def junit(report: pathlib.Path) -> list[tuple[str, str, str]]:
    """(test, result, what it said) of each test in a JUnit report."""
    found = []
    for case in ET.parse(report).getroot().iter("testcase"):
        bad = [child for child in case if child.tag in ("failure", "error")]
        result = "failed" if bad else "skipped" if any(child.tag == "skipped" for child in case) else "passed"
        words = ((bad[0].get("message") or bad[0].text or "") if bad else "").strip().splitlines()
        found.append((case.get("name", ""), result, words[0] if words else ""))
    return found


def from_log(text: str) -> list[tuple[str, str, str]]:
    """The same from the lines of pytest -v, for a run that was ended before it wrote its report."""
    states = {"PASSED": "passed", "SKIPPED": "skipped", "FAILED": "failed", "ERROR": "failed"}
    lines = re.findall(r"^\[gw\d+\] \[ *\d+%\] (\w+) \S+::(.+)$", text, re.MULTILINE)
    return [(test, states[state], "see tests.log") for state, test in lines if state in states]


def has_module(name: str) -> bool:
    import importlib.util

    return importlib.util.find_spec(name) is not None


def commit(args: argparse.Namespace) -> str:
    """--commit, GLMX_COMMIT, or what git says; a copy of a working tree has no .git."""
    if args.commit:
        return args.commit
    done = subprocess.run(["git", "rev-parse", "--short=12", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    return done.stdout.strip() if done.returncode == 0 else "unknown"


def shape_of(row: dict[str, Any]) -> str:
    return " ".join(str(value) if key == "name" else f"{key}={value}" for key, value in row["shape"].items())


def table(rows: list[dict[str, Any]]) -> str:
    """Everything on one screen and a half."""
    lines = []
    for row in rows:
        stage, name = row["stage"], row.get("name")
        if name == "machine":
            words = (row.get(key) for key in ("card", "driver", "torch", "nvcc", "commit"))
            lines.append(" | ".join(str(word) for word in words))
        elif stage == "ceilings" and "rate" in row:
            lines.append(f"ceiling {name} {row['rate']} {row['unit']}")
        elif stage == "bits" and str(name).startswith("bits_"):
            lines.append(f"{name}: all equal {row['all_equal']}, worst {row['max_error_over_sum_abs']:.1e}")
        elif name == "tests":
            lines.append(f"tests: {row['passed']} passed, {row['failed']} failed, {row['skipped']} skipped")
        elif name == "failures":
            lines.append(f"  FAILED {row['failed']}x {row['first'][0][:150]}")
        elif name in ("memcheck", "racecheck"):
            lines.append(f"{name}: {row['answer']}; {row.get('ran', row.get('found', ''))}"[:200])
    lines = compact(lines)
    lines.append(f"{'row':4} {'op and shape':62} {'us':>9} {'rate':>13} {'share':>5} ratio to peers")
    for row in rows:
        if "table" not in row:
            continue
        what = f"{row['op']} {shape_of(row)}"[:62]
        if "us" not in row:
            lines.append(f"{row['table']:4} {what:62} {row.get('skipped', row.get('error', ''))[:90]}")
            continue
        rate = f"{row['tflops']} TFLOP/s" if row["ceiling"] == "matmul" else f"{row['tb_per_s']} TB/s"
        share = f"{100 * row['share']:.0f}%" if row["share"] is not None else "-"
        ratio = " ".join(f"{peer} {value:.2f}x" for peer, value in row["ratio"].items())
        ratio += "".join(f" {peer}: not timed" for peer in row.get("peers_not_timed", {}))
        lines.append(f"{row['table']:4} {what:62} {row['us']:>9} {rate:>13} {share:>5} {ratio}")
    for row in rows:
        if row.get("name") == "stage":
            state = "ok" if row["ok"] else f"FAILED: {row['error']}"
            lines.append(f"stage {row['stage']:20} {row.get('seconds', 0):6} s  {state}")
    return "\n".join(lines)


def compact(lines: list[str]) -> list[str]:
    """The ceilings on one line."""
    ceilings = [line.removeprefix("ceiling ") for line in lines if line.startswith("ceiling ")]
    others = [line for line in lines if not line.startswith("ceiling ")]
    return [*others[:1], "ceilings: " + ", ".join(ceilings), *others[1:]] if ceilings else others


def main() -> None:
    parser = argparse.ArgumentParser(prog="bench/gpu_check.sh", description=__doc__.split("\n")[0])
    parser.add_argument("--out", default=str(ROOT / "build" / "gpu_check"), help="where gpu_check.jsonl and logs go")
    parser.add_argument(
        "--quick", action="store_true", help="a third of the benchmarks' shapes, shorter sanitizer runs"
    )
    parser.add_argument("--only", help="stages, by commas: " + ", ".join(LIMITS) + ", bench")
    parser.add_argument("--commit", default=os.environ.get("COMMIT"), help="what is checked, where there is no .git")
    args = parser.parse_args()
    stages = planned(args.only)
    check = Check(args)
    check.all(stages)
    print(table(check.rows), flush=True)
    print(f"rows: {check.path}   {time.monotonic() - check.begun:.0f} s", flush=True)
    sys.exit(0 if all(row["ok"] for row in check.rows if row.get("name") == "stage") else 1)


if __name__ == "__main__":
    main()
