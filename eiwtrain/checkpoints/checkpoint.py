"""What a checkpoint holds, how one is found, verified and swept.

A checkpoint is a folder `step-00001200-<random>` of safetensors parts, one a rank, and a `manifest.json` that is
written last and names every part with its size and SHA-256, and its own: no manifest, no checkpoint. Tensors are whole
and keyed by name (`weights/...`, `ema/...`, `moments/...`), so a checkpoint loads at any world size and ZeRO stage.
Not for what the tensors mean, which is the business of `eiwtrain.train.state`, nor for writing: that is
`eiwtrain.checkpoints.saver`.
"""

from __future__ import annotations

import json
import logging
import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from eiwtrain import storage
from eiwtrain.config import Config, Model, flatten
from eiwtrain.testing import failpoints

if TYPE_CHECKING:
    from torch import Tensor

FORMAT = "eiwtrain-checkpoint/2"
MANIFEST = "manifest.json"
DAMAGED_MANIFEST = "manifest.damaged.json"  # what a manifest becomes when its parts are not as it says
_FOLDER = re.compile(r"step-(\d{8,})-[0-9a-f]{8}$")
_STRAY = re.compile(r"\.(.+\.[0-9a-f]{32}\.tmp|probe-[0-9a-f]{32})$")  # what `eiwtrain.storage` writes for a moment
_log = logging.getLogger(__name__)

# What shapes the weights or the sample order: another value is another run. How backward gets its activations is not.
FREE = ("model.preset", "model.backprop", "model.memory_budget", "model.anchor_every", "model.trunk_dtype")
FIXED = (
    "model",
    "data.resolution",
    "data.train_split",
    "data.flip",
    "data.lanes",
    "data.shuffle_block",
    "train.global_batch",
    "train.seed",
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
        """Of all parts."""
        return sum(part.bytes for part in self.parts)


@dataclass(frozen=True)
class Unreadable:
    """A folder with a manifest that is damaged, of another version or without all its parts; `why` is a line for the
    user."""

    url: str
    step: int
    why: str


def folder(root: str) -> str:
    """Where the checkpoints of the run at `root` live."""
    return storage.join(root, "checkpoints")


def survey(root: str) -> tuple[list[Checkpoint], list[Unreadable]]:
    """The run's committed checkpoints, and those that cannot be read; each newest first.

    Folders without a manifest were never committed and are in neither. Parts are there, but not read.
    """
    found: list[Checkpoint] = []
    unreadable: list[Unreadable] = []
    for name in storage.listdir(folder(root)):
        if match := _FOLDER.match(name):
            url = storage.join(folder(root), name)
            try:
                there = storage.listdir(url)
                if MANIFEST not in there:  # of one that is written just now parts could be missing in this list
                    continue
                found.append(_whole(_parse(url, storage.read_bytes(storage.join(url, MANIFEST))), there))
            except (FileNotFoundError, NotADirectoryError):
                continue
            except DamagedCheckpoint as e:
                unreadable.append(Unreadable(url, int(match[1]), str(e)))
    found.sort(key=lambda c: (c.step, c.state.get("saved_at", 0)), reverse=True)
    return found, sorted(unreadable, key=lambda u: u.step, reverse=True)


def committed(root: str) -> list[Checkpoint]:
    """The run's committed checkpoints, newest first."""
    return survey(root)[0]


def at(url: str) -> Checkpoint | None:
    """The committed checkpoint whose folder is `url`; None if that is none.

    Raises:
        DamagedCheckpoint: its manifest cannot be read.
    """
    if not _FOLDER.search(url.rstrip("/")):
        return None
    try:
        return _parse(url.rstrip("/"), storage.read_bytes(storage.join(url, MANIFEST)))
    except (FileNotFoundError, NotADirectoryError):
        return None


def newest(root: str) -> Checkpoint | None:
    """The run's newest committed checkpoint, None if there is none; its parts are not read."""
    return next(iter(committed(root)), None)


def render(new: Checkpoint) -> bytes:
    """Its manifest."""
    content = {
        "format": FORMAT,
        "step": new.step,
        "samples_seen": new.samples_seen,
        "parts": [vars(p) for p in new.parts],
        "state": new.state,
    }
    return json.dumps(content | {"sha256": _digest(content)}, indent=1).encode()


def load(checkpoint: Checkpoint) -> dict[str, Tensor]:
    """All tensors of a checkpoint by name, on CPU, every byte verified.

    Raises:
        DamagedCheckpoint: a part is missing or its bytes are not those that were written.
    """
    from safetensors.torch import load as from_bytes

    tensors: dict[str, Tensor] = {}
    for part in checkpoint.parts:
        url = storage.join(checkpoint.url, part.name)
        try:
            data = storage.read_bytes(url)
        except FileNotFoundError:
            raise DamagedCheckpoint(f"{url} is missing") from None
        if len(data) != part.bytes or storage.sha256_bytes(data) != part.sha256:
            raise DamagedCheckpoint(f"{url}: {len(data)} bytes that are not the {part.bytes} bytes written")
        tensors.update(from_bytes(data))
    return tensors


def section(tensors: dict[str, Tensor], name: str) -> dict[str, Tensor]:
    """The tensors called `name/...`, by the rest of their name."""
    return {key[len(name) + 1 :]: value for key, value in tensors.items() if key.startswith(name + "/")}


def condemn(checkpoint: Checkpoint) -> None:
    """Take a damaged checkpoint out of `committed`; its bytes stay until training has passed its step again."""
    manifest = storage.join(checkpoint.url, MANIFEST)
    storage.write_bytes(storage.join(checkpoint.url, DAMAGED_MANIFEST), storage.read_bytes(manifest))
    storage.delete(manifest)


def best(found: list[Checkpoint]) -> Checkpoint | None:
    """The one with the lowest held-out bits/dim; None if none was evaluated."""
    scored = [c for c in found if (bits := c.state.get("eval_bits_per_dim")) is not None and math.isfinite(bits)]
    return min(scored, key=lambda c: c.state["eval_bits_per_dim"], default=None)


def delete(url: str) -> None:
    """Delete the folder of a checkpoint; the manifest goes first, so that what is half deleted is none any more."""
    storage.delete(storage.join(url, MANIFEST))
    failpoints.reach("checkpoint.half-deleted")
    storage.delete(url)


def kept(found: list[Checkpoint], keep_last: int, keep_every: int) -> set[str]:
    """URLs of the checkpoints that stay: the newest `keep_last`, the best, and with `keep_every` = m > 0 the first in
    each window of m steps. Of several of one step only the newest counts.

    Args:
        found: newest first, as from `committed`.
    """
    newest = list({c.step: c for c in reversed(found)}.values())[::-1]
    keep = {c.url for c in newest[:keep_last]}
    if (b := best(newest)) is not None:
        keep.add(b.url)
    if keep_every:
        keep |= {c.url for c in {c.step // keep_every: c for c in newest}.values()}
    return keep


def sweep(root: str, keep_last: int, keep_every: int = 0, guard: Callable[[], None] = lambda: None) -> None:
    """Delete the checkpoints that are not `kept`, and all that `clean` deletes.

    Call it only where no commit is under way and nobody else writes the run.

    Args:
        guard: called first and before each deletion; what it raises ends the sweep.
    """
    guard()
    found, unreadable = survey(root)
    keep = kept(found, keep_last, keep_every)
    for old in found:
        if old.url not in keep:
            guard()
            delete(old.url)
    _clean(root, [c for c in found if c.url in keep], unreadable, guard)
    failpoints.reach("checkpoint.swept")


def clean(root: str, guard: Callable[[], None] = lambda: None, outwait: Callable[[], None] | None = None) -> None:
    """Delete what dead attempts left half written: parts without a manifest, temporary files, unfinished uploads.

    A checkpoint that is condemned or cannot be read stays until training has passed its step. Call it only where no
    commit is under way and nobody else writes the run.

    Args:
        guard: as for `sweep`.
        outwait: called where a folder would be deleted; a commit that a dead attempt completes meanwhile stays.
    """
    found, unreadable = survey(root)
    if outwait is not None and _unfinished(root, found, unreadable):
        outwait()
        found, unreadable = survey(root)
    _clean(root, found, unreadable, guard)


def differences(checkpoint: Checkpoint, config: Config, fingerprint: str | None) -> list[str]:
    """Why `config` on the data set `fingerprint` cannot go on from `checkpoint`, a line each; empty when it can."""
    lines = []
    # A field of the model that there was not yet had the effect of its default.
    then = flatten({"model": Model().model_dump(mode="json")}) | flatten(checkpoint.state["config"])
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


def _unfinished(root: str, found: list[Checkpoint], unreadable: list[Unreadable]) -> list[str]:
    passed = found[0].step if found else -1
    keep = {c.url for c in found} | {u.url for u in unreadable if u.step > passed}
    urls = []
    for name in storage.listdir(folder(root)):
        url = storage.join(folder(root), name)
        if (match := _FOLDER.match(name)) and url not in keep:
            condemned = int(match[1]) > passed and storage.exists(storage.join(url, DAMAGED_MANIFEST))
            if not condemned:
                urls.append(url)
    return urls


def _clean(root: str, found: list[Checkpoint], unreadable: list[Unreadable], guard: Callable[[], None]) -> None:
    for url in _unfinished(root, found, unreadable):
        guard()
        delete(url)
    for where in (folder(root), root):
        for name in storage.listdir(where):
            if _STRAY.match(name) and not name.startswith(".lease"):  # whose heartbeat goes on meanwhile
                guard()
                storage.delete(storage.join(where, name))
    guard()
    try:
        storage.abandon_uploads(folder(root))
    except storage.StorageError as e:  # not everybody may list them, nor is every store able to; they cost space alone
        _log.warning("unfinished uploads are not looked for: %s", e)


def _parse(url: str, data: bytes) -> Checkpoint:
    """Raises DamagedCheckpoint where `data` is not what was written, or was written in another format."""
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
    parts = tuple(Part(**p) for p in raw["parts"])
    return Checkpoint(url, raw["step"], raw["samples_seen"], parts, raw["state"])


def _whole(found: Checkpoint, there: list[str]) -> Checkpoint:
    """The checkpoint. Raises DamagedCheckpoint where it has not all its parts: a writer that was cut off may publish a
    manifest after another has swept them.

    Args:
        there: names in its folder.
    """
    for part in found.parts:
        url = storage.join(found.url, part.name)
        if part.name not in there and not storage.exists(url):
            raise DamagedCheckpoint(f"{url} is missing")
    return found


def _digest(content: dict[str, Any]) -> str:
    """Of a manifest without its own SHA-256."""
    return storage.sha256_bytes(json.dumps(content).encode())
