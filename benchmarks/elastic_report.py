"""The tables and the picture of `benchmarks.elastic`, from its rows. Not for measuring them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

from benchmarks.environments import describe

Row = dict[str, Any]


def gap(curve: Row, base: Row) -> float:
    """Return the largest difference between the losses of two runs at a step."""
    return max(abs(a - b) for a, b in zip(curve["loss"], base["loss"], strict=True))


def table(result: Mapping[str, Any]) -> str:
    """Return the rows as two Markdown tables, each only if it has rows, and what was refused."""
    parts = [part for part in (curves(result["curves"]), counts(result["counts"], result["versions"])) if part]
    return "\n\n".join([*parts, describe(result["machine"], {})])


def curves(rows: Sequence[Row]) -> str:
    """Return the table of the runs."""
    if not rows:
        return ""
    lines = ["| workers | first loss | last loss | largest difference to 1 worker | lost | repeated |"]
    lines.append("|---|--:|--:|--:|--:|--:|")
    for row in rows:
        ends = f"{row['loss'][0]:.4f} | {row['loss'][-1]:.4f} | {gap(row, rows[0]):.1e}"
        lines.append(f"| {name(row)} | {ends} | {row['lost']} | {row['repeated']} |")
    return "\n".join(lines)


def name(row: Row) -> str:
    """Return the numbers of workers of a run, in their order: 4 → 3 → 2."""
    return " → ".join(str(workers) for workers, _ in groupby(row["workers"]))


def counts(rows: Sequence[Row], versions: Mapping[str, Sequence[str]]) -> str:
    """Return the table of the loaders: lost / repeated / steps with other samples; refusals by number below it."""
    if not rows:
        return ""
    peers = [peer for peer in versions if any(row["peer"] == peer for row in rows)]
    heads = [", ".join(versions[peer]).replace("==", " ") or peer for peer in peers]
    lines = [f"| what happens | state saved every | {' | '.join(heads)} |", f"|---|--:|{'---|' * len(peers)}"]
    notes: list[str] = []
    for scenario, every in dict.fromkeys((row["scenario"], row["every"]) for row in rows):
        cells = []
        for peer in peers:
            found = [r for r in rows if (r["peer"], r["scenario"], r["every"]) == (peer, scenario, every)]
            cells.append(_cell(found[0], notes) if found else "-")
        lines.append(f"| {scenario} | {every} steps | {' | '.join(cells)} |")
    return "\n".join([*lines, *([""] if notes else []), *(f"[{i}] {note}" for i, note in enumerate(notes, 1))])


def _cell(row: Row, notes: list[str]) -> str:
    if not row["note"]:
        return f"{row['lost']} / {row['repeated']} / {row['other_steps']}"
    if row["note"] not in notes:
        notes.append(row["note"])
    return f"{'refused' if row['note'].startswith('refused') else 'failed'} [{notes.index(row['note']) + 1}]"


def plot(rows: Sequence[Row], path: Path) -> None:
    """Draw the losses on top of each other, below them their differences to the first run, and the last's workers."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5.6), layout="constrained")
    losses, gaps, workers = figure.subplots(3, 1, sharex=True, height_ratios=(5, 3, 1.3))
    steps = range(1, len(rows[0]["loss"]) + 1)
    for i, row in enumerate(rows):
        label = f"{name(row)} worker{'' if name(row) == '1' else 's'}"
        losses.plot(steps, row["loss"], color=f"C{i}", linewidth=9 - 1.8 * i, label=label)
        difference = [abs(a - b) or math.nan for a, b in zip(row["loss"], rows[0]["loss"], strict=True)]
        gaps.plot(steps, difference, ".", color=f"C{i}", markersize=3.5)
    workers.step(steps, rows[-1]["workers"], where="mid", color=f"C{len(rows) - 1}", linewidth=2)
    losses.set(ylabel="loss, bits/dim", title="The same run at several numbers of workers, and changing")
    losses.legend()
    gaps.set(yscale="log", ylabel="difference\nto 1 worker")
    workers.set(xlabel="step", ylabel="workers", ylim=(0, 5), yticks=range(1, 5))
    workers.tick_params(axis="y", labelsize="x-small")
    figure.savefig(path, dpi=90)
