"""Draw docs/measured.png, the README's picture, from the tables of benchmarks/RESULTS.md.

    python -m benchmarks.picture

It measures nothing: run it again after a table has changed.
"""

from __future__ import annotations

from pathlib import Path

import matplotlib

matplotlib.use("agg")
import matplotlib.pyplot as plt

HERE = Path(__file__).resolve().parent
GREEN, GREY, RED = "#2a9d5c", "#9aa0a6", "#d1495b"


def rows(section: str) -> list[list[str]]:
    """Return the cells of every table row below the heading that starts with `section`."""
    text = (HERE / "RESULTS.md").read_text(encoding="utf-8").partition(f"\n## {section}")[2].partition("\n## ")[0]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line[:1] == "|"]


def number(cell: str) -> float:
    return float(cell.replace(",", ""))


def main() -> None:
    figure, (memory, faults, reading) = plt.subplots(1, 3, figsize=(12.5, 3.9), layout="constrained")

    table = [row for row in rows("Backpropagation") if len(row) == 8][2:]
    for mode, colour in (("stored", RED), ("checkpointed", GREY), ("invertible", GREEN)):
        kept = [number(row[5]) for row in table if row[1] == mode]
        memory.plot(("8", "32"), kept, "o-", color=colour, linewidth=2.5)
        memory.annotate(f"{mode}, {kept[-1]:g} MB", (1, kept[-1]), (-4, 7), textcoords="offset points", ha="right")
    memory.set(yscale="log", ylim=(0.4, 1500), xlabel="Glow steps a level", ylabel="MB kept for the backward pass")
    memory.set_title("Memory does not grow with depth")

    trials = [row for row in rows("Chaos") if row[1:3] == ["1", "1"] and row[5] == "1"]
    timed = sorted(((number(row[7]), row[0]) for row in trials if row[7] != "-"), reverse=True)[:10]
    faults.barh([name.removeprefix("at-") for _, name in timed], [seconds for seconds, _ in timed], color=GREEN)
    faults.tick_params(axis="y", labelsize=8)
    faults.invert_yaxis()
    faults.set(xlabel="seconds from the fault to the next new step\n(the ten slowest)")
    faults.set_title(f"{len(trials)} faults of {len(trials)} survived, weights equal")

    readers = ("eiwtrain stream", "LitData", "webdataset", "MosaicML")
    speed: dict[str, float] = {}  # the table of local files comes first
    for row in (row for row in rows("Reading") if row[:1] + row[2:4] == ["png", "own", "1"] and row[1] in readers):
        speed.setdefault(row[1].removesuffix(" stream"), number(row[4]))
    names = sorted(speed, key=lambda name: speed[name])
    bars = reading.barh(names, [speed[name] for name in names], color=[GREY] * (len(names) - 1) + [GREEN])
    reading.bar_label(bars, [f" {speed[name]:,.0f}" for name in names])
    reading.set(xticks=[], xlim=(0, 1.25 * speed[names[-1]]), xlabel="32-pixel PNG images/s on one CPU core")
    reading.set_title("The loader against its peers")

    for axes in (memory, faults, reading):
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(HERE.parent / "docs" / "measured.png", dpi=110)


if __name__ == "__main__":
    main()
