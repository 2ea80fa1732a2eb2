"""The table and the plot of `benchmarks.density`, both from the same rows. Not for measuring them."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import Any

from benchmarks import measuring

Row = dict[str, Any]


def table(rows: Sequence[Row], variants: Sequence[str]) -> str:
    """Return the rows as a Markdown table by budget, in the order of the variants; differences are to the first."""
    draws = {row["iwbo"] for row in rows if "iwbo_bits_per_dim" in row}
    bound = [f"IWBO({k})" for k in draws]
    lines = []
    for seconds in sorted({row["seconds"] for row in rows}):
        of_budget = [row for row in rows if row["seconds"] == seconds]
        first = {row["seed"]: row["bits_per_dim"] for row in of_budget if row["variant"] == variants[0]}
        for name in variants:
            own = {row["seed"]: row for row in of_budget if row["variant"] == name}
            if not own:
                continue
            bits = [row["bits_per_dim"] for row in own.values()]
            tighter = [row["iwbo_bits_per_dim"] for row in own.values() if "iwbo_bits_per_dim" in row]
            pairs = [(row["bits_per_dim"], first[seed]) for seed, row in own.items() if seed in first]
            paired = [None if None in pair else pair[0] - pair[1] for pair in pairs]
            row = next(iter(own.values()))
            steps = statistics.mean(row["steps"] for row in own.values())
            cells = [name, f"{seconds:g}", f"{len(own)}", f"{row['parameters']:,}", f"{steps:,.0f}"]
            cells += [row["estimator"].partition(",")[0], _mean(bits)]
            cells += [_mean(tighter)] if bound else []
            lines.append([*cells, _mean(paired, "+")])
    header = ("variant", "seconds", "seeds", "parameters", "steps", "estimator", "bits/dim", *bound)
    return measuring.markdown((*header, f"difference to {variants[0]}"), lines)


def _mean(values: Sequence[float | None], sign: str = "") -> str:
    """Return the mean and its standard error over seeds."""
    finite = [value for value in values if value is not None]
    if len(finite) < len(values):
        return "not finite"
    if not finite:
        return ""
    error = f" ± {statistics.stdev(finite) / math.sqrt(len(finite)):.3f}" if len(finite) > 1 else ""
    return f"{statistics.mean(finite):{sign}.3f}{error}"


def plot(rows: Sequence[Row], variants: Sequence[str], title: str, path: str) -> None:
    """Draw bits/dim against the budget, a line for each variant, with the standard error over seeds."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    budgets = sorted({row["seconds"] for row in rows})
    for name in variants:
        points = []
        for seconds in budgets:
            own = {row["seed"]: row for row in rows if row["variant"] == name and row["seconds"] == seconds}
            bits = [row["bits_per_dim"] for row in own.values()]
            if bits and None not in bits:
                error = statistics.stdev(bits) / math.sqrt(len(bits)) if len(bits) > 1 else 0.0
                estimator = next(iter(own.values()))["estimator"].partition(",")[0]
                points.append((seconds, statistics.mean(bits), error, estimator))
        if points:
            times, means, errors, estimators = zip(*points, strict=True)
            style = "x--" if any(row["variant"] == name and "peer" in row["fields"] for row in rows) else "o-"
            axes.errorbar(times, means, errors, fmt=style, capsize=3, label=f"{name}, {estimators[0]}")
    unit = "CPU seconds of one thread" if rows[0]["device"] == "cpu" else "GPU seconds"
    axes.set(title=title, xlabel=unit, ylabel="bits/dim of held-out images")
    if len(budgets) > 1:
        axes.set_xscale("log")
        axes.set_xticks(budgets, [f"{seconds:g}" for seconds in budgets])
        axes.minorticks_off()
    axes.legend()
    figure.savefig(path, dpi=110)
