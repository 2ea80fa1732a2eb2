"""Curves and a bar of time, as SVG and HTML in the colors of the page. Not for what they show."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from eiwtrain.reporting.markup import Html, el, joined
from eiwtrain.terminal.console import duration

_WIDTH, _HEIGHT = 480, 270
_LEFT, _RIGHT, _TOP, _BOTTOM = 48, 14, 10, 40
_MOST_POINTS = 240  # of a curve: more than there are pixels between two
_OUTLIERS = 0.02  # of the values may lie above the axis, if it would be twice as long with them
COLORS = 8
"""How many colors the style sheet has."""

Points = Sequence[tuple[float, float]]
Place = Callable[[float, float], tuple[float, float]]


@dataclass(frozen=True)
class Series:
    """A line of a chart.

    Attributes:
        color: number of its color.
        marked: has a mark at each point, which says its value.
        faint: is drawn thin, behind others.
    """

    name: str
    points: Points
    color: int = 0
    marked: bool = False
    faint: bool = False


def line_chart(title: str, series: Iterable[Series], x_label: str, levels: Sequence[tuple[str, float]] = ()) -> Html:
    """Return a figure with these lines; lines without points are left out, and without any it says so.

    Args:
        levels: names and values of dashed horizontal lines.
    """
    shown = [s for s in series if s.points]
    if not shown:
        return el("figure", el("figcaption", title), el("p", "no points", class_="quiet"), class_="chart")
    thinned = [(s, s.points if s.marked else thin(s.points)) for s in shown]
    xs = [x for _, points in thinned for x, _ in points]
    ys = [y for _, points in thinned for _, y in points] + [value for _, value in levels]
    low, high, cut = _limits(ys)
    x_ticks, y_ticks = _ticks(0.0 if min(xs) >= 0 else min(xs), max(xs)), _ticks(low, high)
    x_span, y_span = (x_ticks[0], max(x_ticks[-1], max(xs))), (min(y_ticks[0], low), max(y_ticks[-1], high))

    def at(x: float, y: float) -> tuple[float, float]:
        right = (x - x_span[0]) / (x_span[1] - x_span[0] or 1.0)
        up = (y - y_span[0]) / (y_span[1] - y_span[0] or 1.0)
        place = _LEFT + right * (_WIDTH - _LEFT - _RIGHT), _HEIGHT - _BOTTOM - min(up, 1.0) * (_HEIGHT - _TOP - _BOTTOM)
        return round(place[0], 1), round(place[1], 1)

    lines = [_level(name, at(x_span[0], value), at(x_span[1], value)) for name, value in levels]
    for s, points in sorted(thinned, key=lambda pair: not pair[0].faint):
        lines.append(_line(s, [at(x, y) for x, y in points], points, x_label))
    drawing = el(
        "svg",
        *_axes(x_ticks, y_ticks, at, x_label),
        *lines,
        viewBox=f"0 0 {_WIDTH} {_HEIGHT}",
        role="img",
        aria_label=title,
    )
    legend = [el("li", _swatch(s), f"{s.name}: {value(s.points[-1][1])} at the end") for s in shown]
    said = [
        f"each point of {s.name} is the mean of {len(s.points) / len(p):.3g}" for s, p in thinned if p is not s.points
    ]
    said += [f"values above {value(high)} are drawn at the top"] if cut else []
    note = el("p", "; ".join(said), class_="quiet") if said else None
    return el("figure", el("figcaption", title), el("ul", *legend, class_="legend"), drawing, note, class_="chart")


def time_bar(seconds: Sequence[tuple[str, float]]) -> Html:
    """Return a bar whose parts are as long as their times, with a list of them; the first part is the good one."""
    total = sum(s for _, s in seconds) or 1.0
    parts = [(name, s, color) for color, (name, s) in enumerate(seconds) if s > 0]
    bar = [el("span", class_=f"t{color}", style=f"width:{100 * s / total:.2f}%") for _, s, color in parts]
    keys = [
        el("li", el("i", class_=f"swatch t{color}"), f"{name} ", el("b", f"{s / total:.1%}"), f" {duration(s)}")
        for name, s, color in parts
    ]
    return joined(el("div", *bar, class_="bar"), el("ul", *keys, class_="legend"))


def thin(points: Points) -> Points:
    """Return at most `_MOST_POINTS` points: means of as many neighbours each, in place of all."""
    if len(points) <= _MOST_POINTS:
        return points
    each = math.ceil(len(points) / _MOST_POINTS)
    groups = [points[i : i + each] for i in range(0, len(points), each)]
    return [(math.fsum(x for x, _ in g) / len(g), math.fsum(y for _, y in g) / len(g)) for g in groups]


def value(number: float) -> str:
    """Return a number as an axis has it: `0.005`, `4.02`, `120`, `1.5M`."""
    for unit, size in (("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if abs(number) >= 10 * size or (abs(number) >= size and size > 1e3):
            return f"{number / size:.4g}{unit}"
    return f"{number:.4g}"


def _limits(values: list[float]) -> tuple[float, float, bool]:
    """Return the ends of an axis, and whether values above it are cut off, as those of the first steps."""
    ordered = sorted(values)
    low, high, most = ordered[0], ordered[-1], ordered[math.ceil((1 - _OUTLIERS) * len(ordered)) - 1]
    cut = high - low > 2 * (most - low) > 0
    high = most if cut else high
    return (low, high, cut) if high > low else (low - (abs(low) or 1.0) / 10, high + (abs(high) or 1.0) / 10, cut)


def _ticks(low: float, high: float) -> list[float]:
    """Return some four to seven round numbers, from at or below `low` to at or below `high`, at least two."""
    high = high if high > low else low + 1.0
    rough = (high - low) / 5
    size = 10.0 ** math.floor(math.log10(rough))
    step = next(m * size for m in (1, 2, 5, 10) if m * size >= rough * 0.999)
    first = math.floor(low / step)
    ticks = list(itertools.takewhile(lambda t: t <= high + step / 1e6, ((first + i) * step for i in range(12))))
    return ticks if len(ticks) > 1 else [*ticks, ticks[0] + step]


def _axes(x_ticks: list[float], y_ticks: list[float], at: Place, x_label: str) -> list[Html]:
    right, bottom, found = _WIDTH - _RIGHT, _HEIGHT - _BOTTOM, []
    for tick in y_ticks:
        y = at(x_ticks[0], tick)[1]
        found.append(el("line", class_="grid", x1=_LEFT, x2=right, y1=y, y2=y))
        found.append(el("text", value(tick), x=_LEFT - 6, y=y + 4, text_anchor="end"))
    for tick in x_ticks:
        x = at(tick, y_ticks[0])[0]
        found.append(el("text", value(tick), x=x, y=bottom + 16, text_anchor="middle"))
    found.append(el("line", class_="axis", x1=_LEFT, x2=right, y1=bottom, y2=bottom))
    return [*found, el("text", x_label, x=right, y=_HEIGHT - 6, text_anchor="end", class_="label")]


def _level(name: str, begin: tuple[float, float], end: tuple[float, float]) -> Html:
    line = el("line", class_="level", x1=begin[0], y1=begin[1], x2=end[0], y2=end[1])
    return joined(line, el("text", name, x=end[0], y=end[1] - 4, text_anchor="end"))


def _line(s: Series, places: list[tuple[float, float]], points: Points, x_label: str) -> Html:
    color = f"c{s.color % COLORS}" + (" dashed" if s.color >= COLORS else "") + (" faint" if s.faint else "")
    path = el("path", class_=color, d="M" + "L".join(f"{x} {y}" for x, y in places))
    marks = [
        el("circle", el("title", f"{s.name}: {y:.4f} at {x:,.6g} {x_label}"), class_=color, cx=cx, cy=cy, r=3)
        for (cx, cy), (x, y) in zip(places, points, strict=True)
        if s.marked or len(places) == 1
    ]
    return joined(path, *marks)


def _swatch(s: Series) -> Html:
    return el("i", class_=f"swatch c{s.color % COLORS}" + (" faint" if s.faint else ""))
