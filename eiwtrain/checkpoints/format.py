"""What a checkpoint holds, and how one is found, read and verified.

A checkpoint is a folder `step-00001200-<random>` of safetensors parts, one for each rank, and a `manifest.json` that is
written last. The manifest names every part with its size and SHA-256, and holds its own SHA-256: without a manifest
there is no checkpoint. Tensors are whole and keyed by name (`weights/...`, `ema/...`, `moments/...`), so a checkpoint
loads at any world size and ZeRO stage.

Not for what the tensors mean (`eiwtrain.train.state`), nor for writing (`eiwtrain.checkpoints.writer`).
"""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from eiwtrain import storage
from eiwtrain.config import Config, Model, Train, flatten

if TYPE_CHECKING:
    from torch import Tensor

FORMAT = "eiwtrain-checkpoint/2"
MANIFEST = "manifest.json"
DAMAGED_MANIFEST = "manifest.damaged.json"  # the new name of a manifest whose parts are not as it says
FOLDER = re.compile(r"step-(\d{8,})-[0-9a-f]{8}$")

# Fields that shape the weights or the sample order: another value is another run. FREE are the exceptions: they decide
# only how the backward pass gets its activations.
FREE = ("model.preset", "model.backprop", "model.memory_budget", "model.anchor_every", "model.trunk_dtype")
FIXED = (
    "model",
    "data.resolution",
    "data.train_split",
    "data.augment",
    "data.lanes",
    "data.shuffle_block",
    "train.global_batch",
    "train.seed",
    "train.optimizer",  # its moments are not those of another
)


class DamagedCheckpoint(RuntimeError):
    """A committed checkpoint is not as it was written: a part is missing or altered, or its manifest cannot be read."""


@dataclass(frozen=True)
class Part:
    """One safetensors file of a checkpoint."""

    name: str
    bytes: int
    sha256: str


@dataclass(frozen=True)
class Checkpoint:
    """A committed checkpoint; `state` is plain JSON data (config, data fingerprint, metrics, clock)."""

    url: str
    step: int
    samples_seen: int
    parts: tuple[Part, ...]
    state: dict[str, Any]

    @property
    def bytes(self) -> int:
        """Size of all parts."""
        return sum(part.bytes for part in self.parts)


@dataclass(frozen=True)
class Unreadable:
    """A folder whose manifest is damaged, of another version, or lists a part that is missing; `why` is one line for
    the user."""

    url: str
    step: int
    why: str


def folder(root: str) -> str:
    """Return the URL of the folder in which the run at `root` keeps its checkpoints."""
    return storage.join(root, "checkpoints")


Survey = tuple[list[Checkpoint], list[Unreadable]]
"""A run's committed checkpoints, and those that cannot be read; each newest first."""


def survey(root: str, known: Iterable[Checkpoint] = ()) -> Survey:
    """Return what is there of the run's checkpoints.

    Folders without a manifest were never committed and are in neither list. Parts are looked for, but not read.

    Args:
        known: checkpoints of an earlier survey, whose manifests are not read again: they never change.
    """
    parsed = {c.url: c for c in known}
    files: defaultdict[str, set[str]] = defaultdict(set)
    for path, _ in storage.find(folder(root)):
        name, _, file = path.partition("/")
        files[name].add(file)
    found: list[Checkpoint] = []
    unreadable: list[Unreadable] = []
    for name, there in files.items():
        if not (match := FOLDER.match(name)) or MANIFEST not in there:
            continue
        url = storage.join(folder(root), name)
        try:
            found.append(_whole(parsed.get(url) or _read_manifest(url), there))
        except (FileNotFoundError, NotADirectoryError):  # deleted since it was listed
            continue
        except DamagedCheckpoint as e:
            unreadable.append(Unreadable(url, int(match[1]), str(e)))
    found.sort(key=age, reverse=True)
    return found, sorted(unreadable, key=lambda u: u.step, reverse=True)


def age(c: Checkpoint) -> tuple[int, float]:
    """Return a key that sorts checkpoints by step, and those of one step by when they were saved."""
    return c.step, c.state.get("saved_at", 0)


def committed(root: str) -> list[Checkpoint]:
    """Return the run's committed checkpoints, newest first."""
    return survey(root)[0]


def at(url: str) -> Checkpoint | None:
    """Return the committed checkpoint in the folder `url`; None if there is none.

    Raises:
        DamagedCheckpoint: its manifest cannot be read.
    """
    if not FOLDER.search(url.rstrip("/")):
        return None
    try:
        return _read_manifest(url.rstrip("/"))
    except (FileNotFoundError, NotADirectoryError):
        return None


def newest(root: str) -> Checkpoint | None:
    """Return the run's newest committed checkpoint, None if there is none; its parts are not read."""
    return next(iter(committed(root)), None)


def render(new: Checkpoint) -> bytes:
    """Return the content of a checkpoint's manifest, with null in its state for each number that is not finite."""
    content = {
        "format": FORMAT,
        "step": new.step,
        "samples_seen": new.samples_seen,
        "parts": [vars(p) for p in new.parts],
        "state": storage.without_nan(new.state),
    }
    return json.dumps(content | {"sha256": _digest(content)}, indent=1, allow_nan=False).encode()


def load(checkpoint: Checkpoint) -> dict[str, Tensor]:
    """Return all tensors of a checkpoint by name, on CPU, with every byte verified.

    Raises:
        DamagedCheckpoint: a part is missing or its bytes are not those that were written.
    """
    tensors: dict[str, Tensor] = {}
    for part in checkpoint.parts:
        tensors.update(tensors_of(read_part(checkpoint, part)))
    return tensors


def read_part(checkpoint: Checkpoint, part: Part) -> bytes:
    """Return the bytes of one part, verified. Raises DamagedCheckpoint as `load`."""
    return storage.read_twice(DamagedCheckpoint, partial(_read_part, storage.join(checkpoint.url, part.name), part))


def tensors_of(part: bytes) -> dict[str, Tensor]:
    """Return the tensors by name, on CPU, of the bytes of a part."""
    from safetensors.torch import load as from_bytes

    return from_bytes(part)


def section(tensors: dict[str, Tensor], name: str) -> dict[str, Tensor]:
    """Return the tensors called `name/...`, keyed by the rest of their name."""
    return {key[len(name) + 1 :]: value for key, value in tensors.items() if key.startswith(name + "/")}


def differences(checkpoint: Checkpoint, config: Config, fingerprint: str | None) -> list[str]:
    """Return why `config` cannot resume from `checkpoint` on the data set `fingerprint`, one line for each reason;
    empty when it can."""
    lines = []
    # A field that was not there then acted as its default does now.
    defaults = {"model": Model().model_dump(mode="json"), "train": Train().model_dump(mode="json")}
    then = flatten(defaults) | flatten(checkpoint.state["config"])
    if "data.flip" in then:  # the field before there was more to choose
        then["data.augment"] = "flip" if then["data.flip"] else "none"
    now = flatten(config.model_dump(mode="json"))
    for name in now:
        fixed = name not in FREE and any(name == f or name.startswith(f + ".") for f in FIXED)
        if fixed and name in then and then[name] != now[name]:
            lines.append(
                f"{name}: {now[name]!r} here, but the run began with {then[name]!r}; "
                "set it back or use another run.name"
            )
    if fingerprint is not None and fingerprint != checkpoint.state["data_fingerprint"]:
        lines.append(
            f"data.path: the data set at {config.data.path} is not the one the run began with "
            f"(fingerprint {fingerprint[:12]}, was {checkpoint.state['data_fingerprint'][:12]}); use another run.name"
        )
    return lines


def _read_part(url: str, part: Part) -> bytes:
    try:
        data = storage.read_bytes(url)
    except FileNotFoundError:
        raise DamagedCheckpoint(f"{url} is missing") from None
    if len(data) != part.bytes or storage.sha256_bytes(data) != part.sha256:
        raise DamagedCheckpoint(f"{url}: {len(data)} bytes that are not the {part.bytes} bytes written")
    return data


def _read_manifest(url: str) -> Checkpoint:
    return storage.read_twice(DamagedCheckpoint, lambda: _parse(url, storage.read_bytes(storage.join(url, MANIFEST))))


def _parse(url: str, data: bytes) -> Checkpoint:
    """Return the checkpoint that the manifest `data` describes.

    Raises:
        DamagedCheckpoint: `data` is not what was written, or was written in another format.
    """
    manifest = storage.join(url, MANIFEST)
    try:
        raw = json.loads(data)
        written_as, digest = str(raw["format"]), raw.pop("sha256", None)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise DamagedCheckpoint(f"{manifest}: {len(data)} bytes that are not those written") from None
    if written_as != FORMAT:
        raise DamagedCheckpoint(
            f"{manifest}: its format is {written_as!r}, and this version of eiwtrain reads {FORMAT!r}"
        )
    if digest != _digest(raw):
        raise DamagedCheckpoint(f"{manifest}: {len(data)} bytes that are not those written")
    try:
        parts = tuple(Part(**p) for p in raw["parts"])
        found = Checkpoint(url, int(raw["step"]), int(raw["samples_seen"]), parts, dict(raw["state"]))
        names = [p.name for p in parts if p.name in (".", "..") or {"/", "\\"} & set(p.name) or "::" in p.name]
    except (KeyError, TypeError, ValueError, OverflowError):
        raise DamagedCheckpoint(f"{manifest}: it does not describe a checkpoint") from None
    if names:  # a place elsewhere
        raise DamagedCheckpoint(f"{manifest}: {names[0]!r:.80} names no file of this folder")
    return found


def _whole(found: Checkpoint, there: set[str]) -> Checkpoint:
    """Return the checkpoint if it has all its parts. A writer that was cut off may publish a manifest after another
    process has swept the parts.

    Args:
        there: names of the files in its folder. While a checkpoint is being written a listing may lack some of them,
            so each is looked for once more.

    Raises:
        DamagedCheckpoint: a part is missing.
    """
    for part in found.parts:
        url = storage.join(found.url, part.name)
        if part.name not in there and not storage.exists(url):
            raise DamagedCheckpoint(f"{url} is missing")
    return found


def _digest(content: dict[str, Any]) -> str:
    """Return the SHA-256 of a manifest's content without the digest itself."""
    return storage.sha256_bytes(json.dumps(content).encode())
