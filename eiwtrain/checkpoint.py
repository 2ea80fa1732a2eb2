"""What a checkpoint holds, how one is committed, found, verified and swept.

A checkpoint is a folder `step-00001200-<attempt>` of safetensors parts, one a rank, and a `manifest.json` that is
written last and names every part with its size and SHA-256: no manifest, no checkpoint. Tensors are whole and keyed
by name (`weights/...`, `ema/...`, `moments/...`), so a checkpoint loads at any world size and ZeRO stage.
Not for what the tensors mean: that is the business of `eiwtrain.state`.
"""

from __future__ import annotations

import json
import re
import uuid
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from eiwtrain import storage
from eiwtrain.config import Config, Model, flatten

if TYPE_CHECKING:
    from torch import Tensor

FORMAT = "eiwtrain-checkpoint/1"
MANIFEST = "manifest.json"
DAMAGED_MANIFEST = "manifest.damaged.json"  # what a manifest becomes when its parts are not as it says
_FOLDER = re.compile(r"step-(\d{8,})-[0-9a-f]{8}$")

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
    """A part of a committed checkpoint is missing or has other bytes than its manifest says."""


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


def folder(root: str) -> str:
    """Where the checkpoints of the run at `root` live."""
    return storage.join(root, "checkpoints")


def committed(root: str) -> list[Checkpoint]:
    """The run's committed checkpoints, newest first; folders without a readable manifest are passed over."""
    found = []
    for name in storage.listdir(folder(root)):
        if not _FOLDER.match(name):
            continue
        url = storage.join(folder(root), name)
        try:
            found.append(_parse(url, storage.read_bytes(storage.join(url, MANIFEST))))
        except (FileNotFoundError, ValueError, KeyError, TypeError):
            continue
    return sorted(found, key=lambda c: (c.step, c.state.get("saved_at", 0)), reverse=True)


def newest(root: str) -> Checkpoint | None:
    """The run's newest committed checkpoint, None if there is none; its parts are not read."""
    return next(iter(committed(root)), None)


def save(
    root: str,
    step: int,
    samples_seen: int,
    tensors: Iterable[tuple[str, Tensor]],
    state: dict[str, Any],
) -> Checkpoint:
    """Commit a checkpoint. Collective: every rank calls it with the same names and writes its share of the bytes.

    The parts go to a folder of their own, are checked for their size, and the manifest is published last.

    Args:
        root: URL of the run.
        tensors: (name, whole tensor) in the same order on every rank; iterated once, by all ranks together.
        state: JSON data; rank 0's is kept.
    """
    import torch.distributed as dist
    from safetensors.torch import save as to_bytes

    rank, world_size = dist.get_rank(), dist.get_world_size()
    attempt = [uuid.uuid4().hex[:8]]
    dist.broadcast_object_list(attempt, src=0)
    url = storage.join(folder(root), f"step-{step:08d}-{attempt[0]}")

    data = to_bytes(_share(tensors, rank, world_size))
    part = Part(f"part-{rank:05d}-of-{world_size:05d}.safetensors", len(data), storage.sha256_bytes(data))
    storage.write_bytes(storage.join(url, part.name), data)

    parts: list[Any] = [None] * world_size
    dist.all_gather_object(parts, part)  # every part is in place before the manifest says so
    if rank == 0:
        for p in parts:
            try:
                found = storage.size(storage.join(url, p.name))
            except FileNotFoundError:
                raise storage.StorageError(
                    f"{url}/{p.name}: another worker wrote it and it is not here; several nodes need shared storage"
                ) from None
            if found != p.bytes:
                raise storage.StorageError(f"{url}/{p.name}: {found} bytes where {p.bytes} were written")
        manifest = {
            "format": FORMAT,
            "step": step,
            "samples_seen": samples_seen,
            "parts": [vars(p) for p in parts],
            "state": state,
        }
        storage.write_bytes(storage.join(url, MANIFEST), json.dumps(manifest, indent=1).encode())
    dist.barrier()  # no rank goes on as if it were saved before it is
    return Checkpoint(url, step, samples_seen, tuple(parts), state)


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
    scored = [c for c in found if c.state.get("eval_bits_per_dim") is not None]
    return min(scored, key=lambda c: c.state["eval_bits_per_dim"], default=None)


def sweep(root: str, keep_last: int) -> None:
    """Delete all but the newest `keep_last` checkpoints and the best, and what dead attempts left half written.

    Call it only after a commit, when no other is under way. The manifest goes first, so that what is half deleted is
    no checkpoint any more.
    """
    found = committed(root)
    if not found:
        return
    keep = {c.url for c in found[:keep_last]}
    if (b := best(found)) is not None:
        keep.add(b.url)
    for name in storage.listdir(folder(root)):
        url = storage.join(folder(root), name)
        match = _FOLDER.match(name)
        if match is None or url in keep or int(match[1]) > found[0].step:
            continue
        storage.delete(storage.join(url, MANIFEST))
        storage.delete(url)


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


def _share(tensors: Iterable[tuple[str, Tensor]], rank: int, world_size: int) -> dict[str, Tensor]:
    """This rank's share: each tensor goes to the rank with the fewest bytes so far."""
    share: dict[str, Tensor] = {}
    load = [0] * world_size
    for name, tensor in tensors:
        owner = load.index(min(load))
        load[owner] += tensor.nbytes
        if owner == rank:
            share[name] = tensor.detach().cpu().contiguous()
    return share


def _parse(url: str, data: bytes) -> Checkpoint:
    raw = json.loads(data)
    if raw["format"] != FORMAT:
        raise ValueError(f"{url}: format {raw['format']!r}")
    parts = tuple(Part(**p) for p in raw["parts"])
    return Checkpoint(url, raw["step"], raw["samples_seen"], parts, raw["state"])
