"""Breaks every GPU kernel on purpose and sees whether the CPU that plays GPU notices.

    python tests/simt_mutants.py [--build DIR] [--jobs N] [--indices N] [--json FILE] [STEM ...]

A mutant is a kernel file with one change: a barrier, wait, commit or fence that is missing, a wait that waits for
less, a stage that is given back too early, a byte or arrival count that is wrong, an index that is off by one. Each
is compiled alone, linked with the other kernels and run over its ops' cases (tests/cpp/simt/cases.cpp) in forward,
reverse and random order of threads; a mutant that survives those meets more seeds. It is caught by other bits, by an
error of the launch, by a crash or by not ending. The exit status is 1 if one survives without a reason in EQUIVALENT.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field

ROOT = pathlib.Path(__file__).resolve().parent.parent
CSRC = ROOT / "csrc"
FLAGS = ["-std=c++20", "-xc++", "-DGX_SIMT", "-O1", "-w", "-fPIC", "-fvisibility=hidden"]
FLAGS += ["-ffp-contract=off", "-fno-fast-math", "-mavx2", "-mfma"]
ORDERS = ("forward", "reverse", "random:1")
MORE_ORDERS = tuple(f"random:{seed}" for seed in range(2, 9))
SECONDS = 60  # of one run: a case takes milliseconds, and a kernel whose threads poll in vain gives up after 20 s

# Changes that change nothing, or nothing that this machine can show: (file, the line and one beside it) -> the reason.
ORDERED = "a shuffle or ballot stands between the two accesses, and on this machine these order memory"
EITHER = "scans begin and end with a barrier; between two of them one is enough"
EMPTY = "the groups of copies that are still open are empty: every step has been waited for"
CHECKED = "it moves a check of indices, and bad ones are refused by the host before a CPU plays GPU"
EQUIVALENT = {
    ("gpu/embedding.cu", "gx::team_barrier();\nif (lane < n) p.order[own.begin + rank] = token;"): ORDERED,
    ("gpu/expert_plan.cu", "gx::team_barrier();\nif (here) p.row_token[row]"): ORDERED,
    ("gpu/expert_plan.cu", "gx::barrier();\nif (gx::lane() == gx::kTeam - 1) sums[gx::team()]"): EITHER,
    ("gpu/expert_plan.cu", "gx::barrier();\nreturn before + inclusive - v;"): EITHER,
    ("gpu/grouped_gemm.cu", "gx::wait<0>();\ngx::barrier();  // the stages are free"): EMPTY,
    (
        "gpu/gemm_tiles.h",
        "for (int64_t i = int64_t{blockIdx.x} * blockDim.x + threadIdx.x; i < rows; i += step) gx::require(",
    ): CHECKED,
    ("gpu/lm_head_logprob.cu", "gx::team_barrier();\nread_least();"): ORDERED,
    ("gpu/route_topk.cu", "gx::team_barrier();  // the next strip writes them again"): ORDERED,
}


@dataclass
class Mutant:
    file: str  # relative to csrc
    line: int
    kind: str
    text: str  # the line as it is
    change: str  # the line as the mutant has it
    caught: dict[str, str] = field(default_factory=dict)  # order -> how
    equivalent: str = ""


def statement(call: str) -> re.Pattern[str]:
    """A call that is a statement, with the guard before it if there is one."""
    return re.compile(rf"(?:if \([\w ]+\) )?gx::{call}(?:<[^;]*?>)?\([^;]*\);")


# kind -> (what, with which text, None: removed)
RULES: list[tuple[str, re.Pattern[str], str | None]] = [
    ("barrier removed", statement("(?:barrier|team_barrier)"), None),
    ("wait removed", statement("(?:wait|wgmma_wait|mbarrier_wait)"), None),
    ("commit removed", statement("(?:commit|wgmma_commit)"), None),
    ("fence removed", statement("(?:fence_async|wgmma_fence|mbarrier_init_done)"), None),
    ("waits for less", re.compile(r"gx::(wait|wgmma_wait)<([^;]*?)>\(\)"), r"gx::\1<\2 + 1>()"),
    ("stage freed early", re.compile(r"(mbarrier_arrive\(&empty)\[before\]"), r"\1[ring.stage]"),
    ("arrival removed", statement("(?:mbarrier_arrive|mbarrier_arrive_copies)"), None),
    ("16 bytes more", re.compile(r"(mbarrier_expect\(&\w+\[[^\]]+\], )([^;]*)\);"), r"\1(\2) + 16);"),
    ("16 bytes fewer", re.compile(r"(mbarrier_expect\(&\w+\[[^\]]+\], )([^;]*)\);"), r"\1(\2) - 16);"),
    ("one arrival more", re.compile(r"(mbarrier_init\(&\w+\[\w+\], )([^;]*)\);"), r"\1(\2) + 1);"),
]

INDEX = re.compile(r"(?<=[\w\])])\[([^\[\]&=]+)\]")  # not a lambda's captures
NO_INDEX = re.compile(r"^\s*(//|#|static_assert|template|__shared__|constexpr|inline constexpr)|__shared__")
DECLARATION = re.compile(r"^\s*(?!return)(const )?[\w:]+(<[\w, ]+>)?\*? [\w, \[\]]*\w\[[^=]*\]( = .*)?;")


def mutants(name: str, indices: int) -> Iterator[Mutant]:
    lines = (CSRC / name).read_text().splitlines()
    candidates = []
    for number, line in enumerate(lines, 1):
        code = line.split("//")[0]
        for kind, pattern, replacement in RULES:
            changed = pattern.sub(";" if replacement is None else replacement, code, count=1)
            if changed != code:
                yield Mutant(name, number, kind, line.strip(), changed.strip())
        if not NO_INDEX.search(code) and not DECLARATION.search(code):
            for match in INDEX.finditer(code):
                changed = code[: match.start()] + f"[{match.group(1)} + 1]" + code[match.end() :]
                candidates.append(Mutant(name, number, "index off by one", line.strip(), changed.strip()))
    count = min(indices, len(candidates))
    yield from (candidates[(2 * i + 1) * len(candidates) // (2 * count)] for i in range(count))


def sources() -> list[str]:
    return sorted(str(p.relative_to(CSRC)) for folder in ("gpu", "gpu/sm90") for p in (CSRC / folder).glob("*.cu"))


def reached(name: str) -> set[str]:
    """The headers of csrc/gpu that a file includes, directly or not."""
    found: set[str] = set()
    todo = [name]
    while todo:
        for header in re.findall(r'#include "(gpu/[\w/]+\.h)"', (CSRC / todo.pop()).read_text()):
            if header not in found and not header.startswith("gpu/gx/"):
                found.add(header)
                todo.append(header)
    return found


def ops_of(source: str) -> list[str]:
    """The cases that run a kernel file, by the name of the file."""
    stem = pathlib.Path(source).stem
    if stem.startswith("grouped_gemm"):
        return ["grouped_gemm", "grouped_gemm_dgrad", "grouped_gemm_wgrad", "grouped_gemm_bias_grad"]
    return [stem]


class Workshop:
    """Compiles kernel files, links them into libraries, runs the cases on these."""

    def __init__(self, build: pathlib.Path, where: pathlib.Path):
        self.cases = build / "tests" / "cpp" / "simt" / "glmx_simt_cases"
        self.core = build / "out"
        self.where = where
        if not self.cases.exists():
            sys.exit(f"{self.cases} is not built: python tests/run.py cpp")

    def compile(self, path: pathlib.Path, out: pathlib.Path, *include: pathlib.Path) -> bool:
        flags = [f"-I{p}" for p in (*include, CSRC, CSRC / "include")]
        return (
            subprocess.run(["g++", *FLAGS, *flags, "-c", str(path), "-o", str(out)], capture_output=True).returncode
            == 0
        )

    def object(self, source: str) -> pathlib.Path:
        return self.where / (source.replace("/", "_") + ".o")

    def link(self, out: pathlib.Path, replaced: dict[str, pathlib.Path]) -> None:
        objects = [str(replaced.get(s, self.object(s))) for s in self.all]
        libraries = [f"-L{self.core}", "-lglmx_core", f"-Wl,-rpath,{self.core}"]
        subprocess.run(["g++", "-shared", *objects, "-o", str(out), *libraries], check=True)

    def prepare(self, jobs: int) -> None:
        self.all = [*sources(), *(str(p.relative_to(CSRC)) for p in sorted((CSRC / "gpu/gx").glob("*simt*.cpp")))]
        with ThreadPoolExecutor(jobs) as pool:
            if not all(pool.map(lambda s: self.compile(CSRC / s, self.object(s)), self.all)):
                sys.exit("the kernels as they are do not compile")
        self.link(self.where / "right.so", {})
        for card in ("sm90", "sm80"):
            for order in ORDERS:
                mode = "write" if order == "forward" else "compare"
                how = self.run(self.where / "right.so", card, order, [], mode)
                if how:
                    sys.exit(f"the kernels as they are fail on {card} in {order} order: {how}")

    def run(self, library: pathlib.Path, card: str, order: str, ops: list[str], mode: str = "compare") -> str:
        """How a library fails, or nothing."""
        value = "simt:" + ("sm80:" if card == "sm80" else "") + order
        command = [str(self.cases), str(library), mode, str(self.where / f"{card}.txt"), *ops]
        try:
            done = subprocess.run(command, env={"GLMX_BACKEND": value}, capture_output=True, text=True, timeout=SECONDS)
        except subprocess.TimeoutExpired:
            return "does not end"
        if done.returncode < 0:
            return f"crash: signal {-done.returncode}"
        if done.returncode == 0:
            return ""
        first = (done.stdout.splitlines() or ["no output"])[0]
        return (
            "wrong bits" if "bits" in first else "error: " + re.sub(r"0x[0-9a-f]+", "ADDRESS", first.split(": ", 2)[-1])
        )

    def test(self, mutant: Mutant, number: int) -> Mutant | None:
        """None: not a program."""
        overlay = self.where / f"mutant{number}"
        target = overlay / mutant.file
        target.parent.mkdir(parents=True)
        lines = (CSRC / mutant.file).read_text().splitlines()
        lines[mutant.line - 1] = mutant.change
        target.write_text("\n".join(lines) + "\n")
        changed = [s for s in sources() if s == mutant.file or mutant.file in reached(s)]
        replaced = {}
        for source in changed:
            path = target if source == mutant.file else CSRC / source
            replaced[source] = overlay / (source.replace("/", "_") + ".o")
            if not self.compile(path, replaced[source], overlay):
                return None
        library = overlay / "mutant.so"
        self.link(library, replaced)
        ops = sorted({op for source in changed for op in ops_of(source)})
        cards = ["sm90"] if mutant.file.startswith("gpu/sm90/") or "grouped_gemm" not in ops else ["sm80"]
        if mutant.file.endswith(".h") and "grouped_gemm" in ops:
            cards = ["sm80", "sm90"]
        for order in (*ORDERS, *MORE_ORDERS):
            if order in MORE_ORDERS and any(mutant.caught.values()):
                break
            mutant.caught[order] = next(filter(None, (self.run(library, card, order, ops) for card in cards)), "")
        library.unlink()
        return mutant


def reason(mutant: Mutant) -> str:
    lines = [line.strip() for line in (CSRC / mutant.file).read_text().splitlines()]
    here = "\n".join(lines[mutant.line - 1 : mutant.line + 1])
    return next((why for (file, part), why in EQUIVALENT.items() if file == mutant.file and here.startswith(part)), "")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--build", type=pathlib.Path, default=ROOT / "build" / "cpp-plain", help="of the C++ tests")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--indices", type=int, default=3, help="mutants of indices in each file")
    parser.add_argument("--json", type=pathlib.Path)
    parser.add_argument("stems", nargs="*", help="files by their stem; none: all")
    args = parser.parse_args()
    headers = sorted(set().union(*(reached(s) for s in sources())) - {"gpu/kernels.h"})
    files = [f for f in [*sources(), *headers] if not args.stems or pathlib.Path(f).stem in args.stems]
    planned = [m for f in files for m in mutants(f, args.indices)]
    with tempfile.TemporaryDirectory() as folder:
        workshop = Workshop(args.build.resolve(), pathlib.Path(folder))
        workshop.prepare(args.jobs)
        done, survivors = [], 0
        with ThreadPoolExecutor(args.jobs) as pool:
            for m in filter(None, pool.map(workshop.test, planned, range(len(planned)))):
                how = {order: what for order, what in m.caught.items() if what}
                m.equivalent = "" if how else reason(m)
                survivors += not how and not m.equivalent
                orders = ", ".join(f"{order} ({what[:60]})" for order, what in how.items())
                verdict = orders or (f"equivalent: {m.equivalent}" if m.equivalent else "SURVIVES")
                print(f"{m.file}:{m.line}: {m.kind}: {m.text[:80]}: {verdict}", flush=True)
                done.append(m)
    print(f"{len(done)} mutants, {sum(any(m.caught.values()) for m in done)} caught, {survivors} survive")
    if args.json:
        args.json.write_text(json.dumps([asdict(m) for m in done], indent=1) + "\n")
    return int(survivors > 0 or not done)


if __name__ == "__main__":
    sys.exit(main())
