"""How benchmarks of a training step measure: turns, ratios, allocated bytes, tables. Not for what they measure."""

from __future__ import annotations

import json
import statistics
import tempfile
import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch

K = TypeVar("K", bound=Hashable)


class Ratio(NamedTuple):
    """The median over rounds of a ratio within a round, and its quartiles."""

    median: float
    low: float
    high: float


def take_turns(candidates: Mapping[K, Callable[[], float]], seconds: float, least: int = 3) -> dict[K, list[float]]:
    """Return what each candidate returns, its seconds, by round, for about `seconds` in all.

    In a round each has one turn, and every other round goes backwards: what slows the machine down, or comes with the
    place in a round, then meets all alike.

    Args:
        least: the number of rounds that are made in any case.
    """
    times: dict[K, list[float]] = {name: [] for name in candidates}
    began, rounds = time.perf_counter(), 0
    while rounds < least or (time.perf_counter() - began) * (1 + 1 / rounds) < seconds:
        for name in reversed(candidates) if rounds % 2 else candidates:
            times[name].append(candidates[name]())
        rounds += 1
    return times


def ratio(times: Sequence[float], to: Sequence[float]) -> Ratio:
    """Return the ratio of the times of two candidates that took turns, the first to the second."""
    ratios = [a / b for a, b in zip(times, to, strict=True)]
    if len(ratios) < 2:
        return Ratio(ratios[0], ratios[0], ratios[0])
    low, median, high = statistics.quantiles(ratios, n=4, method="inclusive")
    return Ratio(median, low, high)


def allocated(work: Callable[[], Any], device: torch.device) -> tuple[int, int]:
    """Return bytes of torch's allocator above the level before: while the result is alive, and at the peak."""
    if device.type == "cuda":
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        result = work()
        left, peak = torch.cuda.memory_allocated() - before, torch.cuda.max_memory_allocated() - before
    else:
        # Not torch.profiler.profile, which takes seconds to import torch.compile.
        with torch.autograd.profiler.profile(profile_memory=True) as profile:
            result = work()
        with tempfile.TemporaryDirectory() as folder:
            trace = Path(folder) / "trace.json"
            profile.export_chrome_trace(str(trace))
            events = json.loads(trace.read_text())["traceEvents"]
        changes = sorted((e["ts"], e["args"]["Bytes"]) for e in events if e.get("name") == "[memory]")
        totals = list(accumulate((change for _, change in changes), initial=0))
        left, peak = totals[-1], max(totals)
    del result
    return left, peak


def now(device: torch.device) -> float:
    """Return the clock of a device, in seconds: CPU time of this process, as others may share the machine; or once a
    GPU is done, the time by the clock."""
    if device.type == "cpu":
        return time.process_time()
    torch.cuda.synchronize(device)
    return time.perf_counter()


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a table in Markdown: names to the left, numbers to the right."""
    rule = ["---"] + ["--:"] * (len(header) - 1)
    return "\n".join(f"| {' | '.join(line)} |" for line in (header, rule, *rows))
