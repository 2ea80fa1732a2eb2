"""The checkpoint that a run resumes from, read once by all ranks together: each part by one of them, from a copy on its
machine if there is one.

Not for what the tensors mean (`eiwtrain.train.state`), nor for what a copy is (`eiwtrain.checkpoints.near`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from eiwtrain import checkpoints, storage
from eiwtrain.checkpoints import near


@dataclass(frozen=True)
class _Reading:
    """What a rank has read of a checkpoint."""

    parts: dict[int, bytes]
    """Its parts by their number."""
    damage: str | None
    """What is wrong with the checkpoint; None if nothing is."""
    near: int
    """Bytes that came from copies on its machine."""
    bad: int
    """Copies that were not what was written."""


def newest_intact(
    root: str,
    device: torch.device,
    note: Callable[[str], None],
    good: bool,
    there: checkpoints.Survey | None,
    near_folder: str | None = None,
) -> tuple[checkpoints.Checkpoint | None, dict[str, Tensor]]:
    """Return the newest checkpoint whose every byte is as written, and its tensors on CPU, the same on all ranks;
    (None, {}) for a new run. Collective.

    Args:
        root: URL of the run.
        device: where ranks can send one another tensors.
        note: prints a line for the user.
        good: pass over checkpoints that were saved while steps were skipped, if there are others.
        there: the run's checkpoints, the same on every rank; None: rank 0 looks.
        near_folder: local folder in which copies of parts may be; None: there are no copies.

    Raises:
        checkpoints.DamagedCheckpoint: there are checkpoints and none is intact; on every rank.
    """
    if there is None:
        found: list[Any] = [checkpoints.survey(root) if dist.get_rank() == 0 else None]
        dist.broadcast_object_list(found, src=0)
        there = found[0]
    committed, unreadable = there
    for bad in unreadable:
        note(f"checkpoint passed over: {bad.why}")
    if good:
        committed = [c for c in committed if not c.state["skipped_in_row"]] or committed
    copies = _folder_of_copies(near_folder, root)
    damaged: list[checkpoints.Checkpoint] = []
    for saved in committed:
        held = near.held(copies, saved) if copies is not None else []
        readers = _readers(saved, _gathered(held))
        reading = _read(saved, readers, copies, held)
        whys, sizes, refused = zip(*_gathered((reading.damage, reading.near, reading.bad)), strict=True)
        if bad_copies := sum(refused):
            note(f"checkpoint.near: {bad_copies} copies were not what was written, and were not used")
        if all(why is None for why in whys):
            tensors = _shared(saved, readers, reading.parts, device)
            note(f"resuming from step {saved.step:,}: {saved.url}{_origin(saved, sum(sizes), near_folder)}")
            if dist.get_rank() == 0:
                for one in damaged:  # or they would count as the newest, and a sweep would prefer them to good ones
                    checkpoints.condemn(one)
            return saved, tensors
        note(f"damaged checkpoint passed over: {next(why for why in whys if why)}")
        damaged.append(saved)
    if damaged or unreadable:
        last = max([*damaged, *unreadable], key=lambda c: c.step)
        raise checkpoints.DamagedCheckpoint(
            f"{checkpoints.folder(root)}: no checkpoint is intact, the last is {last.url}; "
            "delete the folder to begin again"
        )
    return None, {}


def _folder_of_copies(near_folder: str | None, root: str) -> Path | None:
    """Return the folder in which this machine has copies of the run's parts; None if it cannot be used."""
    if near_folder is None:
        return None
    try:
        return near.open_folder(near_folder, root)
    except storage.StorageError:  # reported when copies are to be left there
        return None


def _origin(saved: checkpoints.Checkpoint, copied: int, near_folder: str | None) -> str:
    """Return how much of a checkpoint came from copies, in words; empty where there are no copies."""
    if near_folder is None:
        return ""
    return f" ({copied / 1e6:,.1f} of {saved.bytes / 1e6:,.1f} MB from copies on the workers' machines)"


def _gathered(value: Any) -> list[Any]:
    """Return each rank's value. Collective."""
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def _readers(saved: checkpoints.Checkpoint, held: Sequence[Sequence[int]]) -> list[int]:
    """Return the rank that reads each part: of those whose machine holds a copy, or else of all, the one that reads the
    fewest bytes so far.

    Args:
        held: numbers of the parts of which each rank's machine holds a copy.
    """
    load, readers = [0] * len(held), []
    for number, part in enumerate(saved.parts):
        holders = [rank for rank, numbers in enumerate(held) if number in numbers] or range(len(held))
        reader = min(holders, key=load.__getitem__)
        load[reader] += part.bytes
        readers.append(reader)
    return readers


def _read(saved: checkpoints.Checkpoint, readers: Sequence[int], copies: Path | None, held: Sequence[int]) -> _Reading:
    """Return the parts that this rank is to read: from a copy if its machine holds a good one, else from storage."""
    own = [number for number, reader in enumerate(readers) if reader == dist.get_rank()]
    parts: dict[int, bytes] = {}
    copied = bad = 0
    for number in own:
        part = saved.parts[number]
        if copies is not None and number in held:
            if (data := near.read(copies, saved, part)) is not None:
                parts[number] = data
                copied += part.bytes
                continue
            bad += 1
        try:
            parts[number] = checkpoints.read_part(saved, part)
        except checkpoints.DamagedCheckpoint as e:
            return _Reading({}, str(e), copied, bad)
    return _Reading(parts, None, copied, bad)


def _shared(
    saved: checkpoints.Checkpoint, readers: Sequence[int], own: dict[int, bytes], device: torch.device
) -> dict[str, Tensor]:
    """Return all tensors of a checkpoint, on CPU, from the parts that each rank has read. Collective."""
    tensors: dict[str, Tensor] = {}
    for number, part in enumerate(saved.parts):
        if number in own:
            data = torch.frombuffer(bytearray(own.pop(number)), dtype=torch.uint8).to(device)
        else:
            data = torch.empty(part.bytes, dtype=torch.uint8, device=device)
        dist.broadcast(data, src=readers[number])
        tensors |= checkpoints.tensors_of(data.cpu().numpy().tobytes())
    return tensors
