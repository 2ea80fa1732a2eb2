"""The page that compares runs: their curves by images and by hours of workers, and the fields in which they differ."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from eiwtrain.reporting import page
from eiwtrain.reporting.charts import Points, Series, line_chart
from eiwtrain.reporting.facts import Run, whole
from eiwtrain.reporting.markup import Child, Html, el
from eiwtrain.reporting.recorded import Point
from eiwtrain.storage.holdings import Holding
from eiwtrain.terminal.console import duration, money
from eiwtrain.tracking import curves

_NAMES = ("run.name",)  # it heads the columns


def render(runs: Sequence[Run]) -> str:
    """Return the page that compares these runs."""
    names = _names(runs)
    title = f"Comparison of {len(runs)} runs"
    lines = [f"{name}: {note}" for name, run in zip(names, runs, strict=True) for note in run.notes]
    by_images = [_by_images(run) for run in runs]
    by_hours = [_by_hours(run) for run in runs]
    hours = _hours_of(runs)
    return page.document(
        title,
        el("header", el("h1", title), el("p", ", ".join(names), class_="quiet")),
        page.notes([*_not_alike(runs), *lines]),
        page.section("Runs", page.table(["", *names], _facts(runs, hours))),
        page.section(
            "Curves",
            el(
                "div",
                *_charts(names, by_images, "images"),
                *_charts(names, by_hours, hours),
                class_="charts",
            ),
            el("p", f"{hours.capitalize()}: wall time of all jobs, with start-up and lost work, by workers.",
               class_="quiet"),
        ),
        page.section("Fields of the config that differ", *_differences(names, runs)),
    )  # fmt: skip


def differing(runs: Sequence[Run]) -> dict[str, list[str]]:
    """Return the config's fields in which the runs differ, each with its value in every run; "" where it has none."""
    fields = dict.fromkeys(name for run in runs for name in run.fields if name not in _NAMES)
    values = {name: [run.fields.get(name, "") for run in runs] for name in fields}
    return {name: found for name, found in values.items() if len(set(found)) > 1}


def worker_hours(points: Sequence[Point], workers: Sequence[Point], holdings: Sequence[Holding], usual: int) -> Points:
    """Return (worker-hours until then, value) of each point: the wall time of jobs until then, by their workers.

    Args:
        workers: curve of the number of workers; a point counts for the time since the one before it.
        usual: workers where that curve has no point yet.
    """
    times, hours, count, following = [0.0], [0.0], float(usual), 0

    def count_until(time: float, number: float) -> None:
        times.append(max(time, times[-1]))  # clocks of machines differ
        hours.append(hours[-1] + (times[-1] - times[-2]) * number / 3600)

    for job in sorted(holdings, key=lambda h: h.began):
        count_until(job.began, 0.0)
        while following < len(workers) and workers[following].time <= job.ended:
            count = workers[following].value
            count_until(workers[following].time, count)
            following += 1
        count_until(job.ended, count)
    spent = np.interp([p.time for p in points], times, hours).tolist()
    return [(until, p.value) for until, p in zip(spent, points, strict=True)]


def _by_images(run: Run) -> Callable[[str], Points]:
    batch = run.global_batch or 0
    return lambda name: [(float(p.step * batch), p.value) for p in run.curves.get(name, []) if batch]


def _by_hours(run: Run) -> Callable[[str], Points]:
    usual = whole(run.fields.get("workers.min", "")) or 1
    workers = run.curves.get(curves.WORKERS, [])
    return lambda name: worker_hours(run.curves.get(name, []), workers, run.holdings, usual) if run.holdings else []


def _charts(names: Sequence[str], of: Sequence[Callable[[str], Points]], label: str) -> list[Html]:
    def overlay(curve: str, marked: bool) -> list[Series]:
        pairs = enumerate(zip(names, of, strict=True))
        return [Series(name, points(curve), color, marked=marked) for color, (name, points) in pairs]

    return [
        line_chart(f"Held-out bits/dim by {label}", overlay(curves.HELD_OUT_BITS_PER_DIM, True), label),
        line_chart(f"Training bits/dim by {label}", overlay(curves.BITS_PER_DIM, False), label),
    ]


def _hours_of(runs: Sequence[Run]) -> str:
    """Return the name of the unit: hours of GPUs if each worker of all runs has one."""
    return "GPU-hours" if all(run.fields.get("workers.gpus") == "1" for run in runs) else "worker-hours"


def _names(runs: Sequence[Run]) -> list[str]:
    names = [run.name for run in runs]
    return [run.name if names.count(run.name) == 1 else run.root for run in runs]


def _facts(runs: Sequence[Run], hours: str) -> list[list[Child]]:
    def row(name: str, of: Callable[[Run], str]) -> list[Child]:
        return [name, *[of(run) for run in runs]]

    def spent(run: Run) -> str:
        found = _by_hours(run)(curves.BITS_PER_DIM)
        return f"{found[-1][0]:,.3g}" if found else ""

    lines = [
        row("state", page.state_of),
        row("data set", lambda run: run.data),
        row("parameters", lambda run: f"{run.parameters:,}" if run.parameters else ""),
        row("steps", lambda run: f"{run.step:,}"),
        row("images trained on", lambda run: f"{run.images:,}" if run.images is not None else ""),
        row("best held-out bits/dim", page.score_of),
        row("at step", lambda run: f"{run.best.step:,}" if run.best else ""),
        row("estimator", lambda run: run.estimator.name if run.estimator else ""),
        row(hours, spent),
        row("wall time", lambda run: duration(page.wall(run)) if run.holdings else ""),
        row("goodput", lambda run: f"{run.time.goodput:.0%}" if run.time else ""),
        row("cost", lambda run: money(run.cost) if run.cost is not None else ""),
        row("folder", lambda run: run.root),
    ]
    return [line for line in lines if any(line[1:])]


def _differences(names: Sequence[str], runs: Sequence[Run]) -> list[Html]:
    found = differing(runs)
    if not found:
        return [el("p", "No field differs.")]
    return [page.table(["field", *names], [[el("code", name), *values] for name, values in found.items()])]


def _not_alike(runs: Sequence[Run]) -> list[str]:
    """Return a line about why the scores of the runs do not compare; empty where they do."""
    kinds: dict[str, Callable[[Run], object]] = {
        "data set": lambda run: run.fingerprint,
        "held-out split": lambda run: run.fields.get("data.eval_split"),
        "number of held-out images": lambda run: run.best and run.best.images,
        "bits per channel": lambda run: run.flow and run.flow.n_bits,
        "classes": lambda run: run.flow and run.flow.classes,
    }
    known = {name: {of(run) for run in runs} - {None, ""} for name, of in kinds.items()}
    apart = [name for name, values in known.items() if len(values) > 1]
    return [f"Bits/dim of these runs do not compare: they differ in {', '.join(apart)}."] if apart else []
