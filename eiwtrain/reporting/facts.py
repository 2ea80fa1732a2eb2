"""What is known of a run, from its folder and from MLflow, as plain data. Not for how a page shows it.

Checkpoints hold the config, the score and the clock; `lease.json` every job that trained; `metrics.jsonl` the curves.
MLflow (`recorded`) adds the command, the commit and the pictures, and stands in for what the folder lacks.
"""

from __future__ import annotations

import json
import stat
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

from eiwtrain import checkpoints, flow, storage
from eiwtrain.checkpoints import Checkpoint
from eiwtrain.config import Config, flatten
from eiwtrain.config.construction import construction
from eiwtrain.data.manifest import Manifest
from eiwtrain.exporting import assemble, models
from eiwtrain.reporting import recorded
from eiwtrain.reporting.recorded import Curves, Point, Recorded
from eiwtrain.scoring.estimator import Estimator, estimator_of
from eiwtrain.scoring.published import Published, Scored, comparable
from eiwtrain.storage import holdings
from eiwtrain.storage.holdings import Holding, HoldingState, Record
from eiwtrain.terminal.lines import one_line
from eiwtrain.tracking import TrackingError, curves, journal
from eiwtrain.train.finish import METRICS
from eiwtrain.train.goodput import KINDS, WASTED

_MOST_BYTES = 1 << 26  # of a file, which somebody else may have written
_MOST_STEPS = 1 << 48
_OUTCOMES = get_args(HoldingState)
_SHOWN = (
    *(curves.BITS_PER_DIM, curves.HELD_OUT_BITS_PER_DIM, *curves.CODER_BITS_PER_DIM.values(), curves.LR),
    *(curves.IMAGES_PER_SECOND, curves.WORKERS, curves.GOODPUT, *curves.LOST_TIME.values()),
)


@dataclass(frozen=True)
class Best:
    """The best held-out score among the checkpoints that the run has kept."""

    bits_per_dim: float
    standard_error: float | None
    images: int
    step: int


@dataclass(frozen=True)
class TimeSpent:
    """Where the wall time of a run went, up to a step: seconds by kind of `goodput.KINDS`, and "other"."""

    seconds: dict[str, float]
    wall: float
    step: int

    @property
    def goodput(self) -> float:
        """Share of the wall time in steps that count, 0..1."""
        return self.seconds["productive"] / max(self.wall, 1e-9)


@dataclass(frozen=True)
class Export:
    """An exported model: its URL, the bytes of its weights, the checkpoint it was made of where that is known."""

    url: str
    bytes: int
    checkpoint: str


@dataclass(frozen=True)
class Run:
    """All that a page says of a run. Texts are as they were found, and may be anything."""

    root: str
    name: str
    config: dict[str, Any] | None
    """As the newest checkpoint has it; None without a checkpoint."""
    fields: dict[str, str]
    """The config's fields by dotted name; without a checkpoint those that MLflow has."""
    global_batch: int | None
    step: int
    images: int | None
    """Images trained on; None where the batch is not known."""
    best: Best | None
    flow: flow.FlowConfig | None
    construction: str
    estimator: Estimator | None
    parameters: int | None
    data: str
    fingerprint: str
    classes: tuple[str, ...]
    manifest: Manifest | None
    published: Published
    holdings: tuple[Holding, ...]
    """The jobs that trained the run, oldest first; of very many, the newest."""
    before: float
    """Wall time of the jobs before these, seconds."""
    time: TimeSpent | None
    cost: float | None
    wasted: float | None
    curves: Curves
    recorded: Recorded
    overview: bytes | None
    """A picture of samples that the run left at its end, as a WebP file."""
    exports: tuple[Export, ...]
    notes: tuple[str, ...]
    """What could not be read, a line each."""


def gather(root: str, tracking_uri: str | None = None) -> Run:
    """Return what is known of the run at `root`.

    Args:
        tracking_uri: of MLflow; None: where the run was recorded.

    Raises:
        ValueError: there is no run, or its files do not describe one.
        storage.StorageError: they cannot be read.
    """
    try:
        return _gather(root, tracking_uri)
    except NotADirectoryError:
        raise ValueError(f"{root}: this is a file; give the folder or URL of a run") from None
    except (KeyError, TypeError, AttributeError, OverflowError, RecursionError) as e:
        raise ValueError(f"{root}: its files do not describe a run ({one_line(repr(e))})") from None


def _gather(root: str, tracking_uri: str | None) -> Run:
    found, unreadable = checkpoints.survey(root)
    notes = [bad.why for bad in unreadable]
    record = _record(root, notes)
    if not found and not unreadable and record is None and not storage.exists(storage.join(root, "run.json")):
        raise ValueError(f"{root}: there is no run; give its folder or URL, or its name under --storage")
    newest = found[0] if found else None
    state = newest.state if newest else {}
    config: dict[str, Any] = state.get("config") or {}
    points = _curves(root)
    try:
        of_mlflow = recorded.look(root, config, tracking_uri)
        points = points or of_mlflow.curves(_SHOWN)
    except (TrackingError, storage.StorageError) as e:
        of_mlflow = Recorded()
        notes.append(f"MLflow could not be read, which has the command and the samples of each evaluation: {e}")
    notes += of_mlflow.notes
    if newest and not points:
        notes.append(f"its curves are neither in {METRICS} of its folder nor in MLflow")
    score = checkpoints.best(found)
    manifest = assemble.manifest_of(newest) if newest else None
    model = _flow(newest, notes)
    summary = _json(storage.join(root, "summary.json"))
    if newest is None or str(summary.get("checkpoint")).rpartition("/")[2] != models.name_of(newest):
        summary = {}  # of an earlier end of the run, which was resumed since
    best = _best(score) if score else None
    fields = _fields(config) or of_mlflow.params
    priced = fields.get("workers.price_per_hour", "None") != "None"
    batch = whole(fields.get("train.global_batch", ""))
    clock = state.get("clock") or {}
    costs = clock.get("costs") or {}
    at = max([newest.step if newest else 0, *(p.step for p in points.get(curves.BITS_PER_DIM, ())[-1:])])
    return Run(
        root=root,
        name=str((config.get("run") or {}).get("name") or of_mlflow.name or root.rpartition("/")[2]),
        config=config or None,
        fields=fields,
        global_batch=batch,
        step=at,
        images=newest.samples_seen if newest and newest.step == at else at * batch if batch else None,
        best=best,
        flow=model,
        construction="; ".join(construction(model)).replace("`", "") if model else "",
        estimator=estimator_of(model) if model else None,
        parameters=state.get("parameters") if isinstance(state.get("parameters"), int) else None,
        data=str(state.get("data") or of_mlflow.tags.get("eiwtrain.data", "")),
        fingerprint=str(state.get("data_fingerprint") or of_mlflow.tags.get("eiwtrain.data_fingerprint", "")),
        classes=tuple(str(name) for name in state.get("class_names") or ()),
        manifest=manifest,
        published=_published(score, best, model, manifest),
        holdings=(*record.earlier, record.last) if record else (),
        before=record.folded_seconds if record else 0.0,
        time=_time(summary, newest, points, record),
        cost=_spent(record) if priced else None,
        wasted=sum(number(costs.get(kind)) or 0.0 for kind in WASTED) if priced and costs else None,
        curves=points,
        recorded=of_mlflow,
        overview=recorded.picture(_bytes(storage.join(root, "samples.png"))),
        exports=tuple(_exports(root)),
        notes=tuple(notes),
    )


def number(value: object) -> float | None:
    """Return a finite number that a file has, or None for anything else."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not -1e300 < value < 1e300:
        return None
    return float(value)


def whole(text: str) -> int | None:
    """Return the whole number above 0 that a text is, or None."""
    return int(text) if text.isascii() and text.isdecimal() and len(text) < 12 and int(text) else None


def _record(root: str, notes: list[str]) -> Record | None:
    """Return the content of the run's lease, if all of it has the right types."""
    url = storage.join(root, holdings.FILE)
    record = holdings.read_record(root)
    if (record is None and storage.exists(url)) or (record is not None and not _is_whole(record)):
        notes.append(f"{url} does not list the jobs of the run as it should")
        return None
    return record


def _is_whole(record: Record) -> bool:
    sums = record.folded_seconds, record.folded_cost
    return all(number(n) is not None for n in sums) and all(
        all(number(n) is not None for n in (h.began, h.ended, h.failures, h.cost))
        and isinstance(h.why, str)
        and h.outcome in _OUTCOMES
        for h in (*record.earlier, record.holding)
    )


def _fields(config: Mapping[str, Any]) -> dict[str, str]:
    """Return a config's fields as texts. A field that was not there then acted as its default does now."""
    if not config:
        return {}
    parts = {name: part.default for name, part in Config.model_fields.items() if not part.is_required()}
    defaults = {name: part.model_dump(mode="json") for name, part in parts.items()}
    return {name: str(value) for name, value in (flatten(defaults) | flatten(dict(config))).items()}


def _curves(root: str) -> Curves:
    """Return the points of the run's own file of curves, by curve; empty where there is none."""
    url = storage.join(root, METRICS)
    found: dict[str, list[Point]] = {name: [] for name in _SHOWN}
    with tempfile.TemporaryDirectory() as folder:
        file = Path(storage.absolute(url)) if storage.is_local(url) else Path(folder, METRICS)
        if not storage.is_local(url) and storage.exists(url):
            storage.get_file(url, file)
        if not file.exists() or not stat.S_ISREG(file.stat().st_mode):  # a pipe would block
            return {}
        for row in journal.read(file):
            for name in row.values.keys() & found.keys():
                if (value := number(row.values[name])) is not None and 0 <= row.step < _MOST_STEPS:
                    found[name].append(Point(row.step, row.time / 1000, value))
    return {name: points for name, points in found.items() if points}


def _best(saved: Checkpoint) -> Best | None:
    score = saved.state.get("score") or {}
    bits, error, images = (number(score.get(name)) for name in ("bits_per_dim", "standard_error", "images"))
    return None if bits is None or images is None else Best(bits, error, int(images), saved.step)


def _flow(saved: Checkpoint | None, notes: list[str]) -> flow.FlowConfig | None:
    try:
        return None if saved is None else flow.FlowConfig.from_dict(saved.state["flow"])
    except ValueError as e:
        notes.append(f"{saved.url if saved else ''}: its model is not known to this version of eiwtrain: {e}")
        return None


def _published(
    saved: Checkpoint | None, best: Best | None, model: flow.FlowConfig | None, manifest: Manifest | None
) -> Published:
    """Return the published figures that the best score can be compared with, or the reason for none."""
    if saved is None or best is None or model is None:
        return Published((), "the run was not scored yet")
    if manifest is None:
        return Published((), "the data set that the run began with cannot be read from here")
    of_data = saved.state["config"]["data"]
    trained_on = saved.state["data_fingerprint"], of_data["train_split"]
    scored = Scored(manifest, of_data["eval_split"], best.images, trained_on, model.n_bits, model.classes)
    return comparable(scored, [estimator_of(model).name])


def _time(
    summary: Mapping[str, Any], newest: Checkpoint | None, points: Curves, record: Record | None
) -> TimeSpent | None:
    """Return where the time went: as the run's summary says, or its newest checkpoint, or the last point of curves."""
    wall, shares = number(summary.get("wall_seconds")), summary.get("goodput_shares")
    if wall is not None and (known := _by_kind(shares, (*KINDS, "other"))):
        return TimeSpent({kind: wall * share for kind, share in known.items()}, wall, newest.step if newest else 0)
    clock = (newest.state.get("clock") if newest else None) or {}
    if newest and (wall := number(clock.get("wall"))) is not None and (known := _by_kind(clock.get("seconds"), KINDS)):
        return TimeSpent(known | {"other": max(0.0, wall - sum(known.values()))}, wall, newest.step)
    if record is not None and (good := points.get(curves.GOODPUT)):
        wall = record.folded_seconds + holdings.seconds_of((*record.earlier, record.last))
        last = {kind: points[name][-1].value for kind, name in curves.LOST_TIME.items() if name in points}
        return TimeSpent({k: wall * v for k, v in ({"productive": good[-1].value} | last).items()}, wall, good[-1].step)
    return None


def _by_kind(values: Any, kinds: Iterable[str]) -> dict[str, float] | None:
    """Return the number of each kind, or None where one is missing."""
    found = {kind: number(values.get(kind)) for kind in kinds} if isinstance(values, dict) else {"": None}
    return {kind: value for kind, value in found.items() if value is not None} if None not in found.values() else None


def _spent(record: Record | None) -> float | None:
    return record.folded_cost + sum(h.cost for h in (*record.earlier, record.last)) if record else None


def _exports(root: str) -> list[Export]:
    exported = storage.join(root, "exported")
    urls = [storage.join(root, "model"), *(storage.join(exported, name) for name in storage.listdir(exported))]
    found = []
    for url in urls:
        weights = storage.join(url, flow.MODEL_FILE)
        if storage.exists(weights):
            about = _json(storage.join(url, flow.CONFIG_FILE)).get("metadata")
            of = about.get("checkpoint") if isinstance(about, dict) else None
            found.append(Export(url, storage.size(weights), str(of or "")))
    return found


def _json(url: str) -> dict[str, Any]:
    """Return the object in a file; empty where there is no such file, or it holds something else."""
    try:
        content = json.loads(_bytes(url) or b"{}")
    except (ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}


def _bytes(url: str) -> bytes | None:
    try:
        return storage.read_bytes(url, _MOST_BYTES)
    except (FileNotFoundError, NotADirectoryError):
        return None
