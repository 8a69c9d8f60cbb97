"""What every benchmark shares: alternating rounds, rows, saved ratios.

A row compares one call with its peers in the same run: peers and ours take turns, round by round, and the median of the
rounds' ratios is what counts. Ratios survive a machine that changes speed; times do not.
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import json
import pathlib
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

RESULTS = pathlib.Path(__file__).resolve().parent.parent / "build" / "bench" / "results.jsonl"
PEER_BYTES = 16 << 30  # a peer that needs more is not run
REGRESSION = 0.85  # a row below this share of its last saved ratio is flagged


@dataclass
class Row:
    """One line of the table. `rate` in `unit`, `ceiling` the measured bound it is a share of, `ratio` per peer."""

    name: str
    machine: str
    kernel: str
    threads: int
    rounds: int
    seconds: float
    rate: float
    unit: str
    ceiling: str
    share: float
    ratio: dict[str, float]
    flagged: list[str] = dataclasses.field(default_factory=list)
    unfit: dict[str, int] = dataclasses.field(default_factory=dict)  # peers that were not run: the bytes they need
    note: str = ""


class OneAtATime:
    """make(*key), kept until another key is asked for: what was made before is ended, and gone, first."""

    def __init__(self, make: Callable[..., Any], end: Callable[[Any], object] = lambda made: None) -> None:
        self._make, self._end = make, end
        self._made: dict[tuple[Any, ...], Any] = {}

    def __call__(self, *key: Any) -> Any:
        if key not in self._made:
            self.close()
            self._made[key] = self._make(*key)
        return self._made[key]

    def close(self) -> None:
        while self._made:
            self._end(self._made.popitem()[1])


def values(*shape: int, scale: float = 1.0, dtype: torch.dtype = torch.bfloat16, seed: int = 0) -> torch.Tensor:
    """Bell-shaped values: a million of them repeated, since drawing them all takes longer than the benchmark."""
    n = torch.Size(shape).numel()
    few = (torch.randn(min(n, 999_983), generator=torch.Generator().manual_seed(n + seed)) * scale).to(dtype)
    return few.repeat(-(-n // few.numel()))[:n].view(shape)


def backward(
    call: Callable[[], Any], leaves: Sequence[torch.Tensor], *d_outs: torch.Tensor
) -> Callable[[], tuple[torch.Tensor, ...]]:
    """A call that makes the leaves' gradients from one forward, again and again; d_outs: of its first outputs."""
    outs = tensors(call())[: len(d_outs)]
    return lambda: torch.autograd.grad(outs, leaves, d_outs, retain_graph=True)


def tensors(result: Any) -> tuple[torch.Tensor, ...]:
    return (result,) if isinstance(result, torch.Tensor) else tuple(result)


def agree(peer: str, found: Any, expected: Any, bound: float | None = None) -> None:
    """Integers are equal, floats within `bound` by norms.

    Its default: results in bf16 were rounded at other places, sums in fp32 added up in another order.
    """
    for i, (mine, theirs) in enumerate(zip(tensors(found), tensors(expected), strict=True)):
        assert mine.shape == theirs.shape, f"{peer}, result {i}: {list(theirs.shape)}, glmx has {list(mine.shape)}"
        if not mine.is_floating_point():
            assert torch.equal(mine.long(), theirs.long()), f"{peer}, result {i}: other integers than glmx"
            continue
        allowed = bound or (2**-7 if torch.bfloat16 in (mine.dtype, theirs.dtype) else 2**-18)
        error, norm = (mine.float() - theirs.float()).norm(), theirs.float().norm()
        assert error <= allowed * norm, f"{peer}, result {i}: {error / norm:.2e} away from glmx, allowed {allowed:.2e}"


@contextlib.contextmanager
def kept_memory() -> Iterator[None]:
    """What is freed stays with the process, for ours and peers alike.

    glibc gives large blocks back to the system at once. Then each new result pays page faults for its every 4 KB, which
    take longer than most ops that are bound by memory, and favour whoever allocates less.
    """
    libc, trim, mmap_threshold, mmap_max = ctypes.CDLL(None), -1, -3, -4  # the numbers of malloc.h
    libc.mallopt(mmap_max, 0)
    libc.mallopt(trim, -1)
    try:
        yield
    finally:
        libc.mallopt(mmap_max, 65536)
        libc.mallopt(mmap_threshold, 32 << 20)  # where glibc's own, which it moves up as blocks are freed, end
        libc.mallopt(trim, 64 << 20)
        libc.malloc_trim(0)


def timed(call: Callable[[], object]) -> float:
    begun = time.perf_counter()
    call()
    return time.perf_counter() - begun


def median_ratios(ours: list[float], peers: dict[str, list[float]]) -> dict[str, float]:
    """How many times as fast as each peer: the median over rounds of peer time / our time."""
    return {
        peer: statistics.median(theirs / mine for theirs, mine in zip(times, ours, strict=True))
        for peer, times in peers.items()
    }


def compare(
    benchmark: Any,
    record_row: Callable[[Row], None],
    name: str,
    op: str,
    ours: Callable[[], object],
    peers: dict[str, Callable[[], object]],
    *,
    flop: float,
    touched: float,
    rounds: int,
    dtype: str = "bf16",
    warmup_rounds: int = 1,
    keep_memory: bool = False,
    unfit: dict[str, int] | None = None,
    rest: dict[str, float] | None = None,
    also: Callable[[float, dict[str, float]], str] | None = None,
) -> None:
    """Times `ours` and its peers in alternating rounds and records the row, with ceilings measured after them.

    flop and touched (bytes): what a call must do. Whichever takes longer at its ceiling is what it runs against.
    op, dtype: which kernel serves it. keep_memory: see kept_memory. unfit: peers that were not run, with their bytes.
    rest: the pause in seconds after a call of a peer whose threads go on turning. also(seconds, ceilings): more words
    for the row's name.
    """
    import pytest
    import roofline

    from glmx import _native, runtime

    times: dict[str, list[float]] = {peer: [] for peer in peers}

    def setup() -> None:
        for peer, call in peers.items():
            times[peer].append(timed(call))
            time.sleep((rest or {}).get(peer, 0.0))

    with kept_memory() if keep_memory else contextlib.nullcontext():
        benchmark.pedantic(ours, setup=setup, rounds=rounds, warmup_rounds=warmup_rounds)
    mine = benchmark.stats.stats.data
    seconds, threads = sorted(mine)[len(mine) // 2], torch.get_num_threads()
    row = runtime.kernel_of(op, dtype)
    assert row is not None, f"no kernel for {op} {dtype}"
    if _native.active_isa() == "base":
        pytest.skip("base is the oracle, not a fast path: it has no ceiling of its own")
    isa = row["kernel"]
    measured = roofline.ceilings(threads)
    unit, ceiling, bound, work = "GB/s", "read", measured["read"], touched
    # base serves every CPU where there is no arithmetic for vectors: sorts of integers, copies. Bytes bound them.
    if isa != "base":
        name_of_gemm, gemm = roofline.gemm_ceiling(measured, isa)
        if flop / gemm >= touched / bound:
            unit, ceiling, bound, work = "GFLOP/s", name_of_gemm, gemm, flop
    rate = work / seconds / 1e9
    row = Row(
        name=name + (also(seconds, measured) if also else ""),
        machine=_native.cpu_model(),
        kernel=isa,
        threads=threads,
        rounds=len(mine),
        seconds=seconds,
        rate=rate,
        unit=unit,
        ceiling=ceiling,
        share=rate / bound,
        ratio=median_ratios(mine, {peer: each[-len(mine) :] for peer, each in times.items()}),
        unfit=unfit or {},
    )
    benchmark.extra_info.update(rate=rate, unit=unit, share=row.share, ceiling=ceiling, **row.ratio)
    record_row(row)


def measure(
    benchmark: Any,
    record_row: Callable[[Row], None],
    name: str,
    op: str,
    ours: Callable[[], Any],
    peers: dict[str, Callable[[], Any]],
    *,
    touched: float,
    flop: float = 0,
    bound: float | None = None,
    rounds: int | None = None,
    dtype: str = "bf16",
) -> None:
    """compare() with keep_memory, after a check that each peer computes what ours does (agree; bound is for it).

    rounds: by default as many as take ours half a second, 3 to 200.
    """
    for peer, call in peers.items():
        agree(peer, ours(), call(), bound)
    if benchmark.disabled:
        return
    compare(
        benchmark,
        record_row,
        name,
        op,
        ours,
        peers,
        flop=flop,
        touched=touched,
        rounds=rounds or min(200, max(3, int(0.5 / timed(ours)))),
        dtype=dtype,
        keep_memory=True,
    )


def key(row: Row) -> tuple[str, str, str, int]:
    return row.machine, row.name, row.kernel, row.threads


def last_saved(path: pathlib.Path = RESULTS) -> dict[tuple[str, str, str, int], Row]:
    """The newest saved row of each key."""
    if not path.exists():
        return {}
    rows = [Row(**json.loads(line)) for line in path.read_text().splitlines()]
    return {key(row): row for row in rows}


def flag(row: Row, before: Row | None) -> list[str]:
    """A word for each peer against which `row` does worse than REGRESSION times its last saved ratio."""
    if before is None:
        return []
    return [
        f"{peer}: {ratio:.2f}x, was {before.ratio[peer]:.2f}x"
        for peer, ratio in row.ratio.items()
        if peer in before.ratio and ratio < REGRESSION * before.ratio[peer]
    ]


def save(rows: list[Row], path: pathlib.Path = RESULTS) -> None:
    """Adds rows that are not flagged: a slow run does not become what the next one is compared with."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a") as file:
        for row in rows:
            if not row.flagged:
                file.write(json.dumps(dataclasses.asdict(row)) + "\n")


def table(rows: list[Row]) -> str:
    """The rows as text, one line each, regressions below."""
    peers = sorted({peer for row in rows for peer in (*row.ratio, *row.unfit)})
    width = max(len(row.name) for row in rows)
    lines = [
        f"{'row':{width}} {'kernel':>7} {'thr':>3} {'ms':>9} {'rate':>14} {'share of ceiling':>22}  ratio to peers"
    ]
    for row in rows:
        said = {peer: f"{peer} {ratio:.2f}x" for peer, ratio in row.ratio.items()}
        said.update({peer: f"{peer} does not fit: {size} bytes" for peer, size in row.unfit.items()})
        ratios = "  ".join(said[peer] for peer in peers if peer in said)
        share = f"{100 * row.share:.0f} % of {row.ceiling}"
        rate = f"{row.rate:.1f} {row.unit}"
        milliseconds = f"{1e3 * row.seconds:.3f}"
        lines.append(
            f"{row.name:{width}} {row.kernel:>7} {row.threads:>3} {milliseconds:>9} {rate:>14} {share:>22}  {ratios}"
            + f"  ({row.note})" * bool(row.note)
        )
    lines += [f"SLOWER THAN BEFORE  {row.name}: {'; '.join(row.flagged)}" for row in rows if row.flagged]
    return "\n".join(lines)


ABOUT = """# Performance

Each table is written by the command above it, with `--write docs/performance.md`. `make bench` runs a selection in some
minutes, `pytest bench` everything.

A row compares one call of glmx with its peers, round by round in turns; a ratio is the median over the rounds of a
peer's time divided by glmx's: above 1, glmx is faster. "Share": of the ceiling that the row runs against, measured in
the same test. `read` is memory read by as many threads; `tree_*` the order of additions that gives every x86 the same
bits, run from registers and L1 (`bench/roofline.py`). Each file in `bench/` says what its rows and peers are. Times
are of one machine in one minute: ratios and shares are what to compare.
"""


def document(rows: list[Row], command: str, before: str = "") -> str:
    """The rows as a section of a Markdown document, in the place of the command's section if `before` has one."""
    title = f"## `{command}`\n"
    sections = {part.partition("\n")[0]: "## " + part for part in before.split("\n## ")[1:]}
    sections[title[3:-1]] = title + "\n" + section(rows)
    return ABOUT + "".join("\n" + text.rstrip("\n") + "\n" for text in sections.values())


def section(rows: list[Row]) -> str:
    lines = [f"Machine: {rows[0].machine}.", ""]
    lines += ["| row | kernel | threads | rounds | ms | rate | share | against |", "|---|---|---|---|---|---|---|---|"]
    for row in rows:
        ratios = [f"{peer} {ratio:.2f}x" for peer, ratio in row.ratio.items()]
        ratios += [f"{peer} does not fit: {size} bytes" for peer, size in row.unfit.items()]
        ratios += [row.note] * bool(row.note)
        cells = [
            row.name,
            row.kernel,
            row.threads,
            row.rounds,
            f"{1e3 * row.seconds:.3g}",
            f"{row.rate:.1f} {row.unit}",
        ]
        cells += [f"{100 * row.share:.0f} % of {row.ceiling}", ", ".join(ratios)]
        lines.append("| " + " | ".join(str(cell) for cell in cells) + " |")
    return "\n".join(lines) + "\n"
