"""Writes checkpoints in the background, on every rank, one at a time, while training continues.

Training waits only for the copy of its tensors to CPU memory; a thread on each rank writes them. All ranks write their
parts to a new folder, then rank 0 publishes the manifest: until then there is no checkpoint, whatever dies. Not for
what a checkpoint is (`eiwtrain.checkpoints.format`), nor for when one is due (`eiwtrain.train.pace`).
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import pickle
import threading
import time
import uuid
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from eiwtrain import checkpoints, storage
from eiwtrain.checkpoints import Checkpoint, Part
from eiwtrain.checkpoints.pinned import PinnedMemory
from eiwtrain.terminal.lines import one_line
from eiwtrain.testing import failpoints

_TIMEOUT = timedelta(hours=1)  # of a rank that waits for another to write; longer than any patience with storage
_DTYPES = {  # PyTorch's names, and those of safetensors
    "float64": "F64",
    "float32": "F32",
    "float16": "F16",
    "bfloat16": "BF16",
    "int64": "I64",
    "int32": "I32",
    "int16": "I16",
    "int8": "I8",
    "uint8": "U8",
    "bool": "BOOL",
}


class RanksApartError(RuntimeError):
    """The ranks could not agree on a checkpoint. Their process group is unusable after that: no checkpoint can be
    written before the workers have been restarted."""


@dataclass(frozen=True)
class SaveResult:
    """How a save ended. It is the same on every rank, except the times, and a failure to delete old checkpoints, which
    only rank 0 knows of."""

    checkpoint: Checkpoint | None
    """The checkpoint that was committed; None if none was."""
    exception: Exception | None
    """What failed. If there is a checkpoint too, it is committed, and an old one could not be deleted."""
    stall: float
    """Seconds for which training was held up."""
    seconds: float
    """Seconds from the beginning to the commit, or to the failure."""
    bytes: int
    """Size of all parts; 0 without a checkpoint."""

    @property
    def error(self) -> str | None:
        """Text of `exception`; None where nothing failed."""
        return None if self.exception is None else str(self.exception) or type(self.exception).__name__


class CheckpointWriter:
    """Writer of the checkpoints of one run.

    Its threads use a process group of their own, so that their collectives never mix with training's. They are
    daemons: a process that exits does not wait for them.
    """

    def __init__(self, root: str, keep_last: int, keep_every: int, guard: Callable[[], None]) -> None:
        """Collective.

        Args:
            root: URL of the run.
            keep_last, keep_every: see `checkpoints.kept`.
            guard: raises if this process may not write the run any more; called by rank 0's thread before a
                manifest is published and before each old checkpoint is deleted. What it raises is in the result.
        """
        self._root, self._keep, self._guard = root, (keep_last, keep_every), guard
        self._rank, self._world_size = dist.get_rank(), dist.get_world_size()
        self._group = dist.new_group(backend="gloo", timeout=_TIMEOUT)
        self._pinned = PinnedMemory()
        self._thread: threading.Thread | None = None
        self._result: SaveResult | None = None

    @property
    def busy(self) -> bool:
        """Whether a save is under way on this rank."""
        return self._thread is not None and self._thread.is_alive()

    def begin(
        self, step: int, samples_seen: int, tensors: Iterable[tuple[str, Tensor]], state: dict[str, Any]
    ) -> SaveResult | None:
        """Begin to commit a checkpoint as soon as the save under way has ended; return when `tensors` may change.
        Collective.

        Args:
            tensors: (name, whole tensor), the same names in the same order on every rank; iterated once.
            state: JSON data; rank 0's is kept. The caller must not change it afterwards.

        Returns:
            The result of the previous save, if `poll` has not returned it.
        """
        began = time.perf_counter()
        before = self.wait()
        share = snapshot(tensors, self._rank, self._world_size, self._pinned)
        stall = time.perf_counter() - began
        self._thread = threading.Thread(
            target=self._save,
            args=(step, samples_seen, share, state, began, stall),
            daemon=True,
            name="checkpoint-writer",
        )
        self._thread.start()
        return before

    def poll(self) -> SaveResult | None:
        """Return the result of the last save once, when it has ended; else None."""
        if self.busy:
            return None
        result, self._result = self._result, None
        return result

    def wait(self, seconds: float | None = None) -> SaveResult | None:
        """Wait until no save is under way on this rank, at most `seconds`; return what `poll` then returns."""
        if self._thread is not None:
            self._thread.join(seconds)
        return self.poll()

    def _save(
        self,
        step: int,
        samples_seen: int,
        share: dict[str, Tensor],
        state: dict[str, Any],
        began: float,
        stall: float,
    ) -> None:
        saved, failure = None, None
        try:
            saved = commit(self._root, step, samples_seen, share, state, self._group, self._guard)
        except Exception as e:  # from a rank's storage, the guard, or a rank that is gone
            failure = e
        seconds = time.perf_counter() - began
        if saved is not None and self._rank == 0:
            try:
                checkpoints.sweep(self._root, *self._keep, guard=self._guard, known=saved)
            except Exception as e:
                failure = e
        self._result = SaveResult(saved, failure, stall, seconds, saved.bytes if saved else 0)


def snapshot(
    tensors: Iterable[tuple[str, Tensor]], rank: int, world_size: int, pinned: PinnedMemory | None = None
) -> dict[str, Tensor]:
    """Copy this rank's share to CPU memory; each tensor goes to the rank with the fewest bytes so far.

    Args:
        tensors: (name, whole tensor) in the same order on every rank; iterated once. If that is collective, so is this.
        pinned: memory for tensors of a GPU, whose previous content is no longer needed.
    """
    pinned = pinned or PinnedMemory()
    pinned.clear()
    share: dict[str, Tensor] = {}
    load, on_gpu = [0] * world_size, False
    for name, tensor in tensors:
        owner = load.index(min(load))
        load[owner] += tensor.nbytes
        if owner == rank:
            on_gpu |= tensor.is_cuda
            share[name] = pinned.take(tensor) if tensor.is_cuda else torch.empty(tensor.shape, dtype=tensor.dtype)
            share[name].copy_(tensor.detach(), non_blocking=True)
    if on_gpu:
        torch.cuda.synchronize()
    return share


def commit(
    root: str,
    step: int,
    samples_seen: int,
    share: dict[str, Tensor],
    state: dict[str, Any],
    group: Any = None,
    guard: Callable[[], None] = lambda: None,
) -> Checkpoint:
    """Write a checkpoint and publish its manifest. Collective over `group`, a gloo group of all ranks.

    The parts go to a new folder, rank 0 checks their sizes, and the manifest comes last. What fails on one rank is
    raised on all, and what was written is deleted as far as storage answers. A process that was cut off and comes back
    may publish the manifest after others have swept its parts, so rank 0 checks them once more afterwards.

    Args:
        share: result of `snapshot`; emptied once it is written.
        state: JSON data; rank 0's is kept.
        guard: called by rank 0 right before each try to publish the manifest; if it raises, nothing is published.

    Raises:
        storage.StorageError: a rank could not write; the message says which and why.
        RanksApartError: the ranks lost one another; whether there is a checkpoint is not known. A rank whose connection
            is silent raises it only after the group's timeout.
    """
    rank, world_size = dist.get_rank(group), dist.get_world_size(group)
    name = [f"step-{step:08d}-{uuid.uuid4().hex[:8]}"]
    with _together():
        dist.broadcast_object_list(name, src=0, group=group)
    url = storage.join(checkpoints.folder(root), name[0])

    failpoints.reach("checkpoint.before-part")
    written: Part | Exception
    try:
        written = _write_part(url, f"part-{rank:05d}-of-{world_size:05d}.safetensors", share)
    except Exception as e:  # the others must not wait forever
        written = _portable(e)
    share.clear()
    failpoints.reach("checkpoint.part-written")
    parts: list[Any] = [None] * world_size
    with _together():
        dist.all_gather_object(parts, written, group=group)  # every part is in place before the manifest says so
    failpoints.reach("checkpoint.agreed")

    new = Checkpoint(url, step, samples_seen, tuple(parts), state)
    result = [_publish(new, guard) if rank == 0 else None]
    with _together():
        dist.broadcast_object_list(result, src=0, group=group)  # no rank takes it for saved before it is
    if isinstance(result[0], Exception):
        raise result[0]
    return new


@contextlib.contextmanager
def _together() -> Iterator[None]:
    """Raise RanksApartError in place of what a collective raises."""
    try:
        yield
    except Exception as e:  # a rank that is gone, a connection that was cut, a timeout
        raise RanksApartError(f"the workers lost one another at a checkpoint: {one_line(e)}") from e


def _write_part(url: str, name: str, share: dict[str, Tensor]) -> Part:
    """Publish `share` as the safetensors file `url/name`, without a second copy of it in memory."""
    # sorted by falling element size, so that each tensor is aligned
    names = sorted(share, key=lambda n: (-share[n].element_size(), n))
    entries, end = {}, 0
    for n in names:
        tensor = share[n]
        dtype = _DTYPES[str(tensor.dtype).removeprefix("torch.")]
        offsets = [end, end := end + tensor.nbytes]
        entries[n] = {"dtype": dtype, "shape": list(tensor.shape), "data_offsets": offsets}
    text = json.dumps(entries).encode()
    text += b" " * (-len(text) % 8)
    pieces: list[Any] = [len(text).to_bytes(8, "little") + text]
    pieces += [share[n].flatten().view(torch.uint8).numpy().data for n in names]

    digest = hashlib.sha256()
    for piece in pieces:
        digest.update(piece)
    storage.write_pieces(storage.join(url, name), lambda: pieces)
    return Part(name, sum(len(p) for p in pieces), digest.hexdigest())


def _publish(new: Checkpoint, guard: Callable[[], None]) -> Exception | None:
    """Publish the manifest; if that fails, delete the parts and return the cause."""
    try:
        _check_parts(new)
        _write_manifest(new, guard)
        _check_parts(new)
        failpoints.reach("checkpoint.manifest-written")
        return None
    except Exception as e:
        with contextlib.suppress(Exception), storage.impatient():  # the other ranks wait for the answer
            checkpoints.delete(new.url)  # a manifest whose publication seemed to fail may be there
        return _portable(e)


def _check_parts(new: Checkpoint) -> None:
    """Raise StorageError unless every rank wrote its part and storage has it in full."""
    for rank, part in enumerate(new.parts):
        if isinstance(part, Exception):
            raise storage.StorageError(f"rank {rank}: {part}")
    there = dict(storage.find(new.url))
    for part in new.parts:
        url = storage.join(new.url, part.name)
        try:
            size = there[part.name] if part.name in there else storage.size(url)  # a listing may be late
        except FileNotFoundError:
            raise storage.StorageError(
                f"{url}: another worker wrote it and it is not here; several nodes need shared storage"
            ) from None
        if size != part.bytes:
            raise storage.StorageError(f"{url}: {size} bytes where {part.bytes} were written")


def _write_manifest(new: Checkpoint, guard: Callable[[], None]) -> None:
    data = checkpoints.render(new)
    refused: list[Exception] = []

    def pieces() -> list[bytes]:  # called again at each try
        try:
            guard()
        except Exception as e:
            refused.append(e)
            raise
        failpoints.reach("checkpoint.before-manifest")
        return [data]

    try:
        storage.write_pieces(storage.join(new.url, checkpoints.MANIFEST), pieces)
    except Exception:
        if refused:  # storage may have wrapped it
            raise refused[0] from None
        raise
    _look(storage.join(new.url, checkpoints.MANIFEST), data)


def _look(url: str, data: bytes) -> None:
    """Raise StorageError unless `data` can be read at `url`: a store may lose what it has said it took."""
    try:
        found = storage.read_bytes(url)
        found = found if found == data else storage.read_bytes(url)  # the first read may have been at fault
    except FileNotFoundError:
        raise storage.StorageError(f"{url}: it was written, and is not there") from None
    if found != data:
        raise storage.StorageError(f"{url}: {len(found)} bytes that are not the {len(data)} bytes written")


def _portable(e: Exception) -> Exception:
    """Return the exception, or one with the same text if it cannot be pickled for other ranks."""
    try:
        return pickle.loads(pickle.dumps(e))
    except Exception:
        return RuntimeError(f"{type(e).__name__}: {e}")
