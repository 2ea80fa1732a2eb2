"""The folder of an exported model: assembled on this machine, then published in an order that leaves no half model.

Not for the Model Registry (`eiwtrain.exporting.registry`).
"""

from __future__ import annotations

import contextlib
import json
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from eiwtrain import data, flow, storage
from eiwtrain.checkpoints import Checkpoint
from eiwtrain.data.manifest import Manifest
from eiwtrain.exporting import model_card, models, onnx, registry
from eiwtrain.exporting.pyfunc import MLMODEL, note_size, package
from eiwtrain.sampling import pictures
from eiwtrain.scoring.yardsticks import CODERS, Yardsticks
from eiwtrain.tracking import TrackedRun

_SAMPLES, _TEMPERATURES, _SEED = 16, (0.7, 1.0), 0
_EXAMPLES = 2


@contextlib.contextmanager
def assembled(
    model: flow.EIWFlow,
    metadata: Mapping[str, Any],
    manifest: Manifest | None = None,
    yardsticks: Yardsticks | None = None,
    with_onnx: bool = False,
) -> Iterator[Path]:
    """Yield the folder of an exported model, which is on this machine until the context ends.

    Args:
        metadata: JSON data, as `models.metadata_of` returns it; it goes into config.json and the model card.
        manifest: of the data set, if it can be read.
        yardsticks: of the first images of the held-out score.
        with_onnx: write the encoder as an ONNX graph, too.

    Raises:
        ValueError: there can be no ONNX graph of this flow.
    """
    described = dict(metadata)
    if manifest is not None and model.config.classes:
        described["class_names"] = list(manifest.classes)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch, "model")
        # samples, not images of the data set, which may not be passed on
        examples = _samples(model, _EXAMPLES, 1.0).permute(0, 2, 3, 1).contiguous().numpy()
        package(folder, model, examples, described)
        flow.save(model, folder, described)
        panels = [(f"samples, temperature {t:g}", _samples(model, _SAMPLES, t)) for t in _TEMPERATURES]
        pictures.grid(panels).save(folder / model_card.SAMPLES_FILE)
        parameters = sum(p.numel() for p in model.parameters())
        card = model_card.render(model.config, parameters, described, manifest, yardsticks)
        (folder / model_card.CARD_FILE).write_text(card, encoding="utf-8")
        if with_onnx:
            onnx.write(model, folder / onnx.ONNX_FILE)
        note_size(folder)
        yield folder


def publish(folder: Path, url: str) -> None:
    """Copy an assembled folder to a folder or URL.

    The weights are copied last, except for the file that MLflow looks for, and the weights of another model that are
    there are deleted first: a folder that was left half written is not a model to `flow.load`, nor to MLflow.
    """
    first, last = [flow.CONFIG_FILE], [flow.MODEL_FILE, MLMODEL]  # first: it says which model the files belong to
    names = first + [name for name, _ in storage.find(str(folder)) if name not in first + last]
    for name in reversed(last):
        storage.delete(storage.join(url, name))
    for name in [*names, *last]:
        storage.put_file(folder / name, storage.join(url, name))


def place(root: str, saved: Checkpoint) -> str:
    """Return the default URL for the export of a checkpoint: a folder of its own under the run's root."""
    return storage.join(root, "exported", models.name_of(saved))


def check_place(url: str, saved: Checkpoint, overwrite: bool = False) -> None:
    """Check that a folder or URL is empty.

    Args:
        overwrite: allow an export of this checkpoint to be replaced.

    Raises:
        ValueError: it holds another model, to which a registered version may refer, or files of the user.
    """
    if not storage.listdir(url):
        return
    try:
        there = json.loads(storage.read_bytes(storage.join(url, flow.CONFIG_FILE)))["metadata"].get("checkpoint")
    except (FileNotFoundError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise ValueError(f"{url} is not empty; name another folder") from None
    if there != models.name_of(saved):
        raise ValueError(f"{url} holds another model; name another folder, or delete it first")
    if not overwrite:
        raise ValueError(f"{url} holds an export of this checkpoint; name another folder, or --overwrite to replace it")


def manifest_of(saved: Checkpoint) -> Manifest | None:
    """Return the manifest of a checkpoint's data set, or None if that is not there any more, or has changed."""
    try:
        path = storage.foreign(saved.state["config"]["data"]["path"], f"the data set's URL in {saved.url}")
        manifest = data.load_manifest(path)
        return manifest if manifest.fingerprint == saved.state["data_fingerprint"] else None
    except (data.DataError, storage.StorageError, OSError, KeyError, TypeError):
        return None


def yardsticks_of(root: str, saved: Checkpoint) -> Yardsticks | None:
    """Return the yardsticks in a run's summary, or None if it has none for the images of the checkpoint's score."""
    try:
        summary = json.loads(storage.read_bytes(storage.join(root, "summary.json")))
        if summary["test_images"] == (saved.state["score"] or {}).get("images"):
            bits = {coder: float(summary[f"{coder}_bits_per_dim"]) for coder in CODERS}
            return Yardsticks(int(summary["yardstick_images"]), bits)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError, storage.StorageError):
        pass
    return None


def register(
    folder: Path, name: str, root: str, saved: Checkpoint, tracked: TrackedRun, model: flow.EIWFlow
) -> registry.Registered:
    """Register the assembled model of a run's last checkpoint, when the run ends.

    The version does not refer to the run's own folder of the model, which is written again if the run is resumed.

    Raises:
        TrackingError: MLflow cannot be used.
        StorageError: the run's storage cannot be used.
    """
    url = root
    if not storage.is_local(root):
        url = place(root, saved)
        publish(folder, url)
    return registry.register(name, folder, url, tracked.uri, tracked.run_id, model, models.metadata_of(saved))


def _samples(model: flow.EIWFlow, n: int, temperature: float) -> torch.Tensor:
    """Draw n images, uint8 (n, C, H, W), the same ones each time."""
    generator = torch.Generator(device=next(model.parameters()).device).manual_seed(_SEED)
    return model.to_images(model.sample(n, temperature, generator)).cpu()
