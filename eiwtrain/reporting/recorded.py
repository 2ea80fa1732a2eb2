"""What MLflow has of a run: its command, commit and params, curves, and the samples of each evaluation.

Not for the run's own folder (`eiwtrain.reporting.facts`).
"""

from __future__ import annotations

import io
import re
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image

from eiwtrain.exporting import models, registry
from eiwtrain.tracking import record
from eiwtrain.tracking.store import TrackingError, cause_line, client

_SAMPLES = re.compile(r"images/samples\+step\+(\d{1,12})\+timestamp\+\d+\+[0-9a-f-]+\.png")
_MOST_PICTURES = 8
_MOST_PIXELS = 1 << 24


class Point(NamedTuple):
    """A point of a curve; time is Unix time in seconds."""

    step: int
    time: float
    value: float


Curves = Mapping[str, list[Point]]


class Picture(NamedTuple):
    """The samples that an evaluation has drawn, as a WebP file."""

    step: int
    webp: bytes


@dataclass(frozen=True)
class Recorded:
    """A run in MLflow; all is empty where MLflow does not have it."""

    name: str = ""
    params: dict[str, str] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)
    pictures: tuple[Picture, ...] = ()
    evaluations: int = 0
    """How many have logged samples; of more than eight, eight are in `pictures`."""
    notes: tuple[str, ...] = ()
    address: tuple[str, str] | None = None
    """URI of MLflow, and id of the run there."""

    def curves(self, names: Iterable[str]) -> Curves:
        """Return all points of these curves."""
        if self.address is None:
            return {}
        mlflow, run_id = client(self.address[0]), self.address[1]
        try:
            histories = {name: mlflow.get_metric_history(run_id, name) for name in names}
        except Exception as e:
            raise TrackingError.because(f"{self.address[0]} cannot be read", e) from None
        rows = {
            name: [Point(m.step, m.timestamp / 1000, m.value) for m in ms if abs(m.value) < 1e300]
            for name, ms in histories.items()
        }
        return {name: points for name, points in rows.items() if points}


def look(root: str, config: Mapping[str, Any], uri: str | None) -> Recorded:
    """Return what MLflow has of the run at `root`.

    Args:
        config: of the run, as its checkpoints have it.
        uri: of MLflow; None: where the run was recorded.

    Raises:
        TrackingError: MLflow cannot be used, or does not have the run.
        storage.StorageError: the run's identity cannot be read.
    """
    uri = uri or registry.store_of(root, config)
    try:
        run = record.find(uri, root)
        if run is None:
            raise TrackingError(f"{uri} does not have the run")
        pictures, evaluations, notes = _pictures(client(uri), run)
    except TrackingError:
        raise
    except Exception as e:
        raise TrackingError.because(f"{uri} cannot be read", e) from None
    return Recorded(
        str(run.info.run_name or ""),
        dict(run.data.params),
        dict(run.data.tags),
        tuple(pictures),
        evaluations,
        tuple(notes),
        (uri, run.info.run_id),
    )


def picture(content: bytes | None) -> bytes | None:
    """Return a PNG file as WebP, which is smaller and holds nothing but pixels; None if it is no such picture."""
    if content is None:
        return None
    file = io.BytesIO()
    try:
        with Image.open(io.BytesIO(content), formats=["PNG"]) as image:
            if image.width * image.height > _MOST_PIXELS:
                return None
            image.convert("RGB").save(file, "WEBP", lossless=True)
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):  # as Pillow reports damage
        return None
    return file.getvalue()


def _pictures(mlflow: Any, run: Any) -> tuple[list[Picture], int, list[str]]:
    """Return samples, of as many evaluations as are shown, how many evaluations there are, and what was not read."""
    models.check_source(run.info.artifact_uri, f"where MLflow keeps files of run {run.info.run_id}")
    try:
        there = [f.path for f in mlflow.list_artifacts(run.info.run_id, "images")]
        steps = {int(m[1]): path for path in sorted(there, reverse=True) if (m := _SAMPLES.fullmatch(path))}
        shown, found, notes = _spread(sorted(steps), _MOST_PICTURES), [], []
        with tempfile.TemporaryDirectory() as folder:
            for step in shown:
                file = Path(mlflow.download_artifacts(run.info.run_id, steps[step], folder))
                if (webp := picture(file.read_bytes())) is None:
                    notes.append(f"the samples of step {step:,} in MLflow are no picture")
                else:
                    found.append(Picture(step, webp))
        return found, len(steps), notes
    except Exception as e:  # points of curves go another way
        return [], 0, [f"the place where MLflow keeps files cannot be read: {cause_line(e)}"]


def _spread(steps: list[int], most: int) -> list[int]:
    """Return at most so many of the steps, evenly spread, with the first and the last."""
    if len(steps) <= most:
        return steps
    return [steps[round(i * (len(steps) - 1) / (most - 1))] for i in range(most)]
