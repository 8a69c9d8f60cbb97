"""What the benchmarks of this folder share: rows as JSON lines, ours and peers in turns, CUDA events, medians.

A row's calls are lists, one call for each of several input sets that together exceed the L2 cache. Short ones are
captured in a CUDA graph, whose replay is what is timed: a launch from Python takes longer than many of them. Every peer
is compared with glmx before anything is timed. A shape that does not fit is a row that says so; so is one that fails.

    python bench/gpu/route_topk.py --ceilings out/gpu_check.jsonl [--quick] [--seconds 30]

--device cpu tries a benchmark out, on small shapes, on a machine without a card.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

Calls = Sequence[Callable[[], Any]]
GRAPH_SECONDS = 3e-4  # a graph is filled with so much work, that its launch does not show


@dataclass
class Options:
    device: torch.device
    quick: bool
    ends: float  # time.monotonic() at which the last row begins
    ceilings: dict[str, float]

    @property
    def small(self) -> bool:
        return self.device.type != "cuda"


def read_ceilings(path: str | None) -> dict[str, float]:
    """The rates of the ceilings stage: "matmul" in TFLOP/s, "copy" and "read" in TB/s."""
    if path is None or not pathlib.Path(path).exists():
        return {}
    rows = [json.loads(line) for line in pathlib.Path(path).read_text().splitlines()]
    return {row["name"]: row["rate"] for row in rows if row.get("stage") == "ceilings" and "rate" in row}


def options(about: str) -> Options:
    parser = argparse.ArgumentParser(description=about.split("\n")[0])
    parser.add_argument("--ceilings", help="a JSON-lines file with the rows of bench/gpu/ceilings.py")
    parser.add_argument("--quick", action="store_true", help="a third of the shapes")
    parser.add_argument("--seconds", type=float, default=120, help="no new row after so long")
    parser.add_argument("--device", default="cuda")
    given = parser.parse_args()
    torch.manual_seed(0)
    ends = time.monotonic() + given.seconds
    return Options(torch.device(given.device), given.quick, ends, read_ceilings(given.ceilings))


def say(**row: Any) -> None:
    print(json.dumps(row), flush=True)


def chosen(shapes: Sequence[Any], run: Options) -> list[Any]:
    """All, or with --quick the first, the middle and the last."""
    if not run.quick or len(shapes) <= 3:
        return list(shapes)
    return [shapes[0], shapes[len(shapes) // 2], shapes[-1]]


def sets(touched: float, run: Options, most: int = 16) -> int:
    """How many input sets of so many bytes exceed the L2 cache three times."""
    if run.small:
        return 2
    cache = torch.cuda.get_device_properties(run.device).L2_cache_size
    return int(min(most, max(2, -(-3 * cache // max(1, int(touched))))))


def normal(*shape: int, run: Options, dtype: torch.dtype = torch.bfloat16, scale: float = 1.0) -> torch.Tensor:
    return torch.empty(shape, device=run.device, dtype=dtype).normal_(0, scale)


def tensors(result: Any) -> list[torch.Tensor]:
    if isinstance(result, torch.Tensor):
        return [result]
    return [tensor for tensor in result if isinstance(tensor, torch.Tensor)]


def disagreement(found: Any, expected: Any, bound: float) -> str | None:
    """What is wrong with a peer's floats, by norms; integers are the tests' to compare."""
    for i, (mine, theirs) in enumerate(zip(tensors(found), tensors(expected), strict=False)):
        if not mine.is_floating_point():
            continue
        if mine.shape != theirs.shape:
            return f"result {i}: {list(theirs.shape)}, glmx has {list(mine.shape)}"
        error = apart(mine, theirs)
        if not error <= bound:
            return f"result {i}: {error:.2e} of the norm away from glmx"
    return None


def apart(mine: torch.Tensor, theirs: torch.Tensor) -> float:
    """The norm of the difference over the norm, piece by piece: fp32 copies of a stack of weights need not fit."""
    error = norm = 0.0
    for a, b in zip(mine.flatten().split(1 << 26), theirs.flatten().split(1 << 26), strict=True):
        b = b.float()
        error += float((a.float() - b).norm() ** 2)
        norm += float(b.norm() ** 2)
    return (error / norm) ** 0.5 if norm else error**0.5


class Timed:
    """One contender: its calls, or the graph that holds them often enough, and the times of its rounds."""

    def __init__(self, calls: Calls, run: Options, graph: bool) -> None:
        self.calls, self.seconds, self._next = calls, [], 0
        self._device = run.device
        self.repeats, self._graph = 1, None
        for call in calls[:2]:
            call()
        if graph and not run.small:
            self._capture()

    def _capture(self) -> None:
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            begun = self._clocked(lambda: [call() for call in self.calls])
        torch.cuda.current_stream().wait_stream(stream)
        rounds = max(1, min(16, round(GRAPH_SECONDS / max(begun, 1e-7))))
        self._graph, self.repeats = torch.cuda.CUDAGraph(), rounds * len(self.calls)
        with torch.cuda.graph(self._graph):
            for _ in range(rounds):
                for call in self.calls:
                    call()
        self._graph.replay()

    def _clocked(self, call: Callable[[], Any]) -> float:
        if self._device.type != "cuda":
            begun = time.perf_counter()
            call()
            return time.perf_counter() - begun
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda._sleep(200_000)  # the card is busy for 0.1 ms, in which the host gets ahead of it
        begin.record()
        call()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1e3

    def turn(self) -> float:
        """Seconds of one call."""
        if self._graph is not None:
            seconds = self._clocked(self._graph.replay) / self.repeats
        else:
            self._next = (self._next + 1) % len(self.calls)
            seconds = self._clocked(self.calls[self._next])
        self.seconds.append(seconds)
        return seconds


def measure(
    run: Options,
    table: str,
    op: str,
    shape: dict[str, Any],
    make: Callable[[], dict[str, Calls]],
    *,
    flop: float = 0,
    touched: float = 0,
    ceiling: str,
    graph: bool,
    bound: float = 2**-6,
    note: str = "",
    grad: bool = False,
) -> None:
    """One row. `make()` gives each contender's calls, glmx first; what they need is freed when the row is done.

    ceiling: "matmul" (flop counts) or "copy" or "read" (touched counts, bytes). bound: of the norm, for peers.
    """
    row: dict[str, Any] = {"table": table, "op": op, "shape": shape}
    if time.monotonic() > run.ends:
        say(**row, skipped="out of time")
        return
    try:
        with torch.set_grad_enabled(grad):
            calls = make()
            ours = calls["glmx"][0]()
            wrong = {}
            for peer in [name for name in calls if name != "glmx"]:
                try:
                    said = disagreement(ours, calls[peer][0](), bound)
                except Exception as error:
                    torch.cuda.empty_cache()
                    said = f"{type(error).__name__}: {str(error).splitlines()[0][:120]}"
                if said:
                    wrong[peer] = said
                    calls.pop(peer)
            del ours
            timed = {}
            for name in list(calls):
                try:
                    timed[name] = Timed(calls[name], run, graph)
                except Exception as error:
                    if name == "glmx":
                        raise
                    wrong[name] = f"{type(error).__name__}: {str(error).splitlines()[0][:120]}"
            once = sum(each.turn() * each.repeats for each in timed.values())
            rounds = int(min(25, max(5, 0.4 / max(once, 1e-9)))) if not run.small else 2
            for each in timed.values():
                each.seconds.clear()
            for _ in range(rounds):
                for each in timed.values():
                    each.turn()
    except torch.OutOfMemoryError as error:
        say(**row, skipped=f"does not fit: {str(error).splitlines()[0][:120]}")
        torch.cuda.empty_cache()
        return
    except Exception as error:
        say(**row, error=f"{type(error).__name__}: {str(error).splitlines()[0][:300] if str(error) else ''}")
        return
    mine = timed["glmx"].seconds
    seconds = statistics.median(mine)
    row |= {"us": round(seconds * 1e6, 2), "rounds": rounds}
    if flop:
        row["tflops"] = round(flop / seconds / 1e12, 2)
    if touched:
        row["tb_per_s"] = round(touched / seconds / 1e12, 4)
    rate = flop / seconds / 1e12 if ceiling == "matmul" else touched / seconds / 1e12
    top = run.ceilings.get(ceiling)
    row |= {"ceiling": ceiling, "share": round(rate / top, 3) if top else None}
    row["peers_us"] = {
        name: round(statistics.median(each.seconds) * 1e6, 2) for name, each in timed.items() if name != "glmx"
    }
    row["ratio"] = {  # above 1: glmx is faster
        name: round(statistics.median(a / b for a, b in zip(each.seconds, mine, strict=True)), 3)
        for name, each in timed.items()
        if name != "glmx"
    }
    if wrong:
        row["peers_not_timed"] = wrong
    if note:
        row["note"] = note
    say(**row)
    del calls, timed
    if not run.small:
        torch.cuda.empty_cache()
