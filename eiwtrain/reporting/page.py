"""The page of one run, as a single HTML file that loads nothing. Not for several runs: that is `comparison`."""

from __future__ import annotations

import base64
import shlex
import time
from collections.abc import Iterable, Sequence
from datetime import datetime, timezone
from importlib import resources

import yaml

from eiwtrain import __version__
from eiwtrain.config import flatten
from eiwtrain.reporting.charts import Series, line_chart, time_bar
from eiwtrain.reporting.facts import Run, whole
from eiwtrain.reporting.markup import Child, Html, el, joined
from eiwtrain.storage.holdings import Holding
from eiwtrain.terminal.console import duration, money
from eiwtrain.tracking import curves
from eiwtrain.train.goodput import LOSSES

_POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
_MOST_JOBS = 40
_MOST_CLASSES = 20
_ALIVE_SECONDS = 60.0  # after which a driver that gave no sign of life may be gone
_CHARTS = (
    ("Images a second, all workers", "speed", curves.IMAGES_PER_SECOND),
    ("Learning rate", "rate", curves.LR),
    ("Goodput so far, share of wall time", "goodput", curves.GOODPUT),
    ("Workers", "workers", curves.WORKERS),
)
_CODERS = {"png": "PNG", "webp": "WebP"}
_OUTCOMES = {
    "running": "running",
    "finished": "finished",
    "stopped": "stopped; the same command resumes it",
    "failed": "failed",
    "died": "died; the same command resumes it",
}


def render(run: Run) -> str:
    """Return the page of a run."""
    title = f"{run.name}: report of a run"
    return document(
        title,
        el("header", el("h1", run.name), el("p", _subtitle(run), class_="quiet")),
        notes(run.notes),
        _tiles(run),
        section("Curves", el("div", *_charts(run), class_="charts")),
        section("Samples over time", *_samples(run)),
        section("Where the time went", *_time(run)),
        section("Jobs that trained it", *_jobs(run)),
        section("Data", rows(_data(run))),
        section("Model and score", rows(_model(run))),
        section("Published figures", _published(run)),
        section("Exported model", *_exports(run)),
        section("To repeat it", *_repeat(run)),
    )


def document(title: str, *children: Child) -> str:
    """Return a whole page: nothing in it is loaded from elsewhere, nor may be."""
    style = resources.files(__package__).joinpath("style.css").read_text(encoding="utf-8")
    head = el(
        "head",
        el("meta", charset="utf-8"),
        el("meta", http_equiv="Content-Security-Policy", content=_POLICY),
        el("meta", name="viewport", content="width=device-width, initial-scale=1"),
        el("title", title),
        el("style", Html(style)),
    )
    written = f"Written {moment(time.time())} by eiwtrain {__version__}."
    body = el("body", el("main", *children, el("p", written, class_="quiet")))
    return f"<!DOCTYPE html>\n{el('html', head, body, lang='en')}\n"


def section(title: str, *children: Child) -> Html:
    """Return a part of the page."""
    return el("section", el("h2", title), *children)


def notes(lines: Sequence[str]) -> Html | None:
    """Return a part with what a reader should know first; None if there is nothing."""
    return el("section", el("ul", *[el("li", line) for line in lines]), class_="notes") if lines else None


def rows(pairs: Iterable[tuple[str, Child]]) -> Html:
    """Return a list of names and values, without those that are None or empty."""
    return el("dl", *[joined(el("dt", name), el("dd", value)) for name, value in pairs if value])


def table(head: Sequence[str], lines: Iterable[Sequence[Child]], class_: str = "scroll") -> Html:
    """Return a table that scrolls by itself where it is wider than the page.

    Args:
        class_: "stack" has each cell on a line of its own there, instead.
    """
    body = [
        el("tr", *[el("td", cell, data_name=name) for name, cell in zip(head, line, strict=True)]) for line in lines
    ]
    columns = el("tr", *[el("th", name) for name in head])
    return el("div", el("table", el("thead", columns), el("tbody", *body)), class_=class_)


def moment(seconds: float) -> str:
    """Return a Unix time as a date with its time in UTC."""
    try:
        return datetime.fromtimestamp(seconds, timezone.utc).strftime("%Y-%m-%d %H:%M:%S UTC")
    except (ValueError, OverflowError, OSError):
        return "unknown"


def state_of(run: Run) -> str:
    """Say whether a run trains, or how it ended."""
    if not run.holdings:
        return "there is no record of a job"
    last = run.holdings[-1]
    silent = time.time() - last.ended
    if last.outcome == "running" and silent > _ALIVE_SECONDS:
        return f"not ended, and without a sign of life since {moment(last.ended)}"
    return _OUTCOMES[last.outcome]


def score_of(run: Run) -> str:
    """Return the best score with its error; empty where there is none."""
    best = run.best
    error = "" if best is None or best.standard_error is None else f" ± {best.standard_error:.4f}"
    return f"{best.bits_per_dim:.4f}{error}" if best else ""


def _subtitle(run: Run) -> str:
    of = whole(run.fields.get("train.max_steps", ""))
    size = f"{run.parameters:,} parameters" if run.parameters else ""
    at = f"step {run.step:,}" + (f" of {of:,}" if of else "")
    if not run.step:
        at = "no step made yet"
    return " · ".join(filter(None, [run.data, size, state_of(run), at]))


def _tiles(run: Run) -> Html:
    found = [
        ("best held-out bits/dim", score_of(run)),
        ("steps", f"{run.step:,}"),
        ("images trained on", f"{run.images:,}" if run.images is not None else ""),
        ("wall time", duration(wall(run)) if run.holdings else ""),
        ("goodput", f"{run.time.goodput:.0%}" if run.time else ""),
        ("cost", money(run.cost) if run.cost is not None else ""),
    ]
    return el("div", *[el("div", el("b", shown), el("span", name, class_="quiet")) for name, shown in found if shown],
              class_="tiles")  # fmt: skip


def _charts(run: Run) -> list[Html]:
    def of(curve: str) -> list[tuple[float, float]]:
        return [(float(p.step), p.value) for p in run.curves.get(curve, ())]

    coders = [(_CODERS.get(coder, coder), of(curve)[-1:]) for coder, curve in curves.CODER_BITS_PER_DIM.items()]
    bits = [
        Series("training", of(curves.BITS_PER_DIM), 0, faint=True),
        Series("held-out", of(curves.HELD_OUT_BITS_PER_DIM), 1, marked=True),
    ]
    levels = [(coder, value) for coder, last in coders for _, value in last]
    found = [line_chart("Bits/dim (lower is better)", bits, "steps", levels)]
    for color, (title, name, curve) in enumerate(_CHARTS, 2):
        points = of(curve)
        if curve != curves.WORKERS or len({count for _, count in points}) > 1:
            found.append(line_chart(title, [Series(name, points, color)], "steps"))
    return found


def _samples(run: Run) -> list[Html]:
    pictures = [(f"step {p.step:,}", p.webp) for p in run.recorded.pictures]
    if not pictures and run.overview:
        pictures = [("left at the end of the run", run.overview)]
    if not pictures:
        return [el("p", "No evaluation has drawn samples that can be read from here.", class_="quiet")]
    figures = [el("figure", _image(data, f"samples, {when}"), el("figcaption", when)) for when, data in pictures]
    found = [el("div", *figures, class_="pictures")]
    if run.recorded.evaluations > len(pictures):
        found.append(el("p", f"{len(pictures)} of {run.recorded.evaluations:,} evaluations.", class_="quiet"))
    return found


def _image(webp: bytes, words: str) -> Html:
    return el("img", src=Html(f"data:image/webp;base64,{base64.b64encode(webp).decode()}"), alt=words)


def _time(run: Run) -> list[Html]:
    if run.time is None:
        return [el("p", "No step was made that the time could be counted by.", class_="quiet")]
    words = {"productive": "steps that count"} | LOSSES
    bar = time_bar([(words[kind], run.time.seconds.get(kind, 0.0)) for kind in words])
    said = [f"Wall time of all jobs up to step {run.time.step:,}: {duration(run.time.wall)}."]
    if run.cost is not None:
        wasted = f", of which {money(run.wasted)} for start-up, waiting and lost work" if run.wasted is not None else ""
        said.append(f"Cost of all jobs: {money(run.cost)}{wasted}.")
    return [bar, el("p", " ".join(said), class_="quiet")]


def wall(run: Run) -> float:
    """Return the wall time of all jobs of a run, seconds."""
    return run.before + sum(max(0.0, h.ended - h.began) for h in run.holdings)


def _jobs(run: Run) -> list[Html]:
    if not run.holdings:
        return [el("p", "There is no record of the jobs that trained this run.", class_="quiet")]
    first = max(0, len(run.holdings) - _MOST_JOBS)
    priced = ["cost"] if run.cost is not None else []
    shown = run.holdings[first:]
    found = [table(["began", "lasted", "ended", "why", *priced], [_job(h, bool(priced)) for h in shown], "stack")]
    if first or run.before:
        found.append(el("p", f"Earlier jobs are left out; all took {duration(wall(run))}.", class_="quiet"))
    return found


def _job(h: Holding, priced: bool) -> list[Child]:
    failures = f"{h.failures:,} {'restart' if h.failures == 1 else 'restarts'} of the workers" if h.failures else ""
    ended = {"running": f"running, last sign of life {moment(h.ended)}"}.get(h.outcome, h.outcome)
    why = "; ".join(filter(None, [failures, h.why]))
    cost = [money(h.cost)] if priced else []
    return [moment(h.began), duration(h.ended - h.began), ended, why, *cost]


def _data(run: Run) -> list[tuple[str, Child]]:
    found: list[tuple[str, Child]] = [("data set", run.data), ("place", run.fields.get("data.path", ""))]
    if (m := run.manifest) is not None:
        made = m.preprocessing
        found += [
            ("images", ", ".join(f"{name} {split.samples:,}" for name, split in m.splits.items())),
            ("size", f"{m.resolution} x {m.resolution} pixels, {m.channels} channels"),
            ("preprocessing", f"{made['name']}, version {made['version']}"),
            ("settings", ", ".join(f"{name} {value}" for name, value in flatten(made["params"]).items())),
        ]
    found.append(("fingerprint", el("code", run.fingerprint) if run.fingerprint else None))
    names = ", ".join(run.classes[:_MOST_CLASSES])
    more = f" and {len(run.classes) - _MOST_CLASSES:,} more" if len(run.classes) > _MOST_CLASSES else ""
    return [*found, (f"{len(run.classes):,} classes", names + more)]


def _model(run: Run) -> list[tuple[str, Child]]:
    preset = run.fields.get("model.preset", "None")
    found: list[tuple[str, Child]] = [
        ("preset", "" if preset == "None" else preset),
        ("parameters", f"{run.parameters:,}" if run.parameters else ""),
        ("construction", run.construction),
        ("estimator", f"{run.estimator}, for each image" if run.estimator else ""),
    ]
    if (best := run.best) is not None:
        split = run.fields.get("data.eval_split", "")
        where = f"bits/dim at step {best.step:,}, on {best.images:,} held-out images of split {split}"
        found.append(("best kept score", f"{score_of(run)} {where}"))
    else:
        found.append(("best kept score", "no evaluation yet"))
    return found


def _published(run: Run) -> Html:
    """Return the figures that the score can be compared with, the best last and then its own, or why there are none."""
    found = run.published.figures
    if not found or run.best is None or run.estimator is None:
        return el("p", *run.published.lines())
    lines: list[list[Child]] = [
        [f.model, f"{f.bits_per_dim:.2f}", f.estimator, f"{f.parameters:,}" if f.parameters else "", f.source]
        for f in found
    ]
    own = [run.name, score_of(run), run.estimator.name, f"{run.parameters:,}" if run.parameters else "", "this run"]
    head = [found[0].protocol, "bits/dim", "estimator", "parameters", "source"]
    return table(head, [*lines, [el("b", cell) for cell in own]], "stack")


def _exports(run: Run) -> list[Html]:
    if run.exports:
        lines = [(f"{e.bytes / 1e6:,.1f} MB", joined(el("code", e.url), f" {e.checkpoint}")) for e in run.exports]
        load = "from eiwtrain import flow\nmodel = flow.load('path/to/a/copy/of/it')"
        return [rows(lines), el("p", "It loads with torch and safetensors alone:"), el("pre", load)]
    if run.best is None:
        return [el("p", "No model was exported, and no checkpoint has a score yet.", class_="quiet")]
    command = shlex.join(["python", "-m", "eiwtrain.export", "best", "--run", run.root, "--output", "FOLDER"])
    return [el("p", "There is no model in the run's folder yet. To export the best:"), el("pre", command)]


def _repeat(run: Run) -> list[Html | None]:
    tags = run.recorded.tags
    commit = tags.get("mlflow.source.git.commit", "")
    changed = ", with changes that were not committed" if tags.get("mlflow.source.git.dirty") == "true" else ""
    given = tags.get("eiwtrain.command")
    command = shlex.join(["python", "-m", "eiwtrain.run", "config.yaml", f"run.name={run.name}-again"])
    found = [
        rows(
            [
                ("commit", joined(el("code", commit), changed) if commit else None),
                ("run's folder", el("code", run.root)),
            ]
        ),
        joined(el("p", "It was started and resumed by:"), el("pre", given)) if given else None,
    ]
    if run.config is None:
        listed = "\n".join(f"{name}={value}" for name, value in sorted(run.fields.items()))
        return [*found, el("details", el("summary", "its fields"), el("pre", listed)) if listed else None]
    text = yaml.safe_dump(run.config, sort_keys=False, allow_unicode=True)
    return [
        *found,
        el("p", "From nothing, with the config below saved as config.yaml:"),
        el("pre", command),
        el("details", el("summary", "config.yaml"), el("pre", text)),
    ]
