"""The table and the picture of `benchmarks.backprop`, both from the same rows. Not for measuring them.

python -m benchmarks.backprop --rows benchmarks/backprop.json --plot docs/backprop.png
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from benchmarks.backprop_subject import METHODS
from eiwtrain.flow.config import BACKPROP_MODES

Row = dict[str, Any]

COLUMNS: dict[str, tuple[str, Callable[[Any], str]]] = {
    "seconds": ("s/step", "{:.3f}".format),
    "to_stored": ("to stored", "{:.2f}".format),
    "peak_bytes": ("peak MB", lambda n: f"{n / 1e6:.3g}"),
    "saved_bytes": ("saved MB", lambda n: f"{n / 1e6:.3g}"),
    "rss_bytes": ("RSS MB", lambda n: f"{n / 1e6:.3g}"),
    "flops": ("GFLOP", lambda n: f"{n / 1e9:.3g}"),
    "flops_to_stored": ("to stored", "{:.3f}".format),
    "conditioner_forwards": ("forwards", "{:.2f}".format),
    "gradient_error": ("grad error", "{:.0e}".format),
}
"""What a row's value is called in the table, and how it is written."""


def tables(rows: Sequence[Row], budget: float) -> str:
    """Return the rows as text: one table by depth, and one by budget at the last depth."""
    last = max(r["depth"] for r in rows)
    by_depth = [r for r in rows if r["budget"] in (None, budget)]
    by_budget = [r for r in rows if r["budget"] is not None and r["depth"] == last]
    return f"{_table(by_depth)}\n\n{_table(by_budget)}" if len(by_budget) > 1 else _table(by_depth)


def _table(rows: Sequence[Row]) -> str:
    lines = [f"{'allocator':17} {'depth':>5} {'mode':18}" + "".join(f"{name:>11}" for name, _ in COLUMNS.values())]
    for r in rows:
        mode = r["mode"] if r["budget"] is None else f"{r['mode']}, {r['budget']:.0%}"
        values = [(r.get(key), text) for key, (_, text) in COLUMNS.items()]
        cells = ["-" if v is None else text(v) for v, text in values]
        lines.append(f"{r.get('allocator', ''):17} {r['depth']:>5} {mode:18}" + "".join(f"{c:>11}" for c in cells))
    return "\n".join(lines)


def plot(rows: Sequence[Row], budget: float, path: str) -> None:
    """Draw memory and time against depth, and time against memory at the last depth, under the first allocator."""
    from matplotlib.figure import Figure

    rows = [r for r in rows if r.get("allocator") == rows[0].get("allocator")]
    depths = sorted({r["depth"] for r in rows})
    figure = Figure(figsize=(13, 4.5), layout="constrained")
    memory, seconds, both = figure.subplots(1, 3)
    for mode in dict.fromkeys(mode for modes in METHODS.values() for mode in modes):
        line = [r for r in rows if r["mode"] == mode and r["budget"] in (None, budget)]
        last = [r for r in rows if r["mode"] == mode and r["depth"] == depths[-1]]
        if not line:
            continue
        style = "o-" if mode in BACKPROP_MODES else "x--"  # the authors' way is not ours
        label = f"{mode} (left and middle: {budget:.0%} budget)" if mode == "auto" else mode
        steps = [r["depth"] for r in line]
        memory.plot(steps, [r["peak_bytes"] / 1e6 for r in line], style, label=label)
        seconds.plot(steps, [r["to_stored"] for r in line], style)
        both.plot([r["peak_bytes"] / 1e6 for r in last], [r["to_stored"] for r in last], style)
        for r in last:
            if r["budget"] is not None:
                place = (r["peak_bytes"] / 1e6, r["to_stored"])
                both.annotate(f"{r['budget']:.0%}", place, xytext=(3, 6), textcoords="offset points")
    for mode, shift in (("stored", (-30, -4)), ("invertible", (-4, 8))):
        end = next(r for r in rows if r["mode"] == mode and r["depth"] == depths[-1])
        megabytes = end["peak_bytes"] / 1e6
        name = f"{mode} {megabytes:.0f} MB"
        memory.annotate(name, (depths[-1], megabytes), xytext=shift, textcoords="offset points", ha="right")
    memory.set(title="Peak memory of a training step", xlabel="couplings", ylabel="MB", ylim=(0, None))
    seconds.set(title="Time of a training step", xlabel="couplings", ylabel="ratio to stored", ylim=(0, None))
    both.set(title=f"Both, at {depths[-1]} couplings", xlabel="peak memory, MB", ylabel="time, ratio to stored")
    both.set(xlim=(0, 1.1 * both.get_xlim()[1]), ylim=(0, None))
    for axes in (memory, seconds):
        axes.set_xticks(depths)
    figure.legend(loc="outside lower center", ncols=6)
    figure.savefig(path, dpi=110)
