"""Writes checkpoints in the background, on every rank, one at a time, while training continues.

Training waits only for the copy of its tensors to CPU memory; a thread on each rank writes them. All ranks write their
parts to a new folder, then rank 0 publishes the manifest: until then there is no checkpoint, whatever dies. Not for
what a checkpoint is (`eiwtrain.checkpoints.format`), nor for when one is due (`eiwtrain.train.pace`).
"""

from __future__ import annotations

import contextlib
import pickle
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch.distributed as dist
from torch import Tensor

from eiwtrain import checkpoints, storage
from eiwtrain.checkpoints import Checkpoint, Part, near
from eiwtrain.checkpoints.pinned import PinnedMemory
from eiwtrain.checkpoints.share import digest_of, pieces_of, snapshot
from eiwtrain.terminal.lines import one_line
from eiwtrain.testing import failpoints

_TIMEOUT = timedelta(hours=1)  # of a rank that waits for another to write; longer than any patience with storage


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
    near: str | None = None
    """Why a rank could not leave its copies on its machine; None if all could, or none should."""

    @property
    def error(self) -> str | None:
        """Text of `exception`; None where nothing failed."""
        return None if self.exception is None else str(self.exception) or type(self.exception).__name__


class CheckpointWriter:
    """Writer of the checkpoints of one run.

    Its threads use a process group of their own, so that their collectives never mix with training's. They are
    daemons: a process that exits does not wait for them.
    """

    def __init__(
        self,
        root: str,
        keep_last: int,
        keep_every: int,
        guard: Callable[[], None],
        near_folder: str | None = None,
        nodes: Sequence[str] = (),
    ) -> None:
        """Collective.

        Args:
            root: URL of the run.
            keep_last, keep_every: see `checkpoints.kept`.
            guard: raises if this process may not write the run any more; called by rank 0's thread before a
                manifest is published and before each old checkpoint is deleted. What it raises is in the result.
            near_folder: local folder in which each rank leaves a copy of its own part, and of the part of a rank on
                another node (`near.ward`), once a checkpoint is committed; None: no copies.
            nodes: a name of the node of each rank.
        """
        self._root, self._keep, self._guard, self._near = root, (keep_last, keep_every), guard, near_folder
        self._rank, self._world_size = dist.get_rank(), dist.get_world_size()
        ward = near.ward(nodes, self._rank) if near_folder is not None else None
        self._copied = [self._rank] if ward is None else [self._rank, ward]
        """The ranks whose shares this one takes."""
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
        shares = snapshot(tensors, self._copied, self._world_size, self._pinned)
        stall = time.perf_counter() - began
        self._thread = threading.Thread(
            target=self._save,
            args=(step, samples_seen, shares, state, began, stall),
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
        shares: list[dict[str, Tensor]],
        state: dict[str, Any],
        began: float,
        stall: float,
    ) -> None:
        saved, failure, missing = None, None, None
        share = shares[0]
        if self._near is not None:
            shares[0] = dict(share)  # or it would be empty once it is written
        try:
            saved = commit(self._root, step, samples_seen, share, state, self._group, self._guard)
        except Exception as e:  # from a rank's storage, the guard, or a rank that is gone
            failure = e
        seconds = time.perf_counter() - began
        if saved is not None and self._near is not None:  # before the sweep: until then a restart reads from storage
            try:
                missing = self._leave_copies(saved, shares, self._near)
            except RanksApartError as e:
                failure = e
        if saved is not None and self._rank == 0:
            try:
                checkpoints.sweep(self._root, *self._keep, guard=self._guard, known=saved)
            except Exception as e:
                failure = failure or e
        self._result = SaveResult(saved, failure, stall, seconds, saved.bytes if saved else 0, missing)

    def _leave_copies(self, saved: Checkpoint, shares: list[dict[str, Tensor]], folder: str) -> str | None:
        """Leave copies of a committed checkpoint on this machine in place of those of the one before; return why a rank
        could not, if any could not. Collective."""
        found: list[Any] = [None] * self._world_size
        problem = None
        try:
            place = near.open_folder(folder, self._root)
            near.keep_only(place, saved)
            for rank, share in zip(self._copied, shares, strict=True):
                part, pieces = saved.parts[rank], pieces_of(share)
                if rank != self._rank and digest_of(pieces) != part.sha256:  # as all ranks hold the same state
                    raise OSError(f"the state of rank {rank} is another here")
                near.write(place, saved, part, pieces)
        except Exception as e:  # the others must not wait forever
            problem = f"rank {self._rank} on {socket.gethostname()}: {getattr(e, 'strerror', None) or e}"
        with _together():
            dist.all_gather_object(found, problem, group=self._group)
        return next((each for each in found if each is not None), None)


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
        share: this rank's, from `snapshot`; emptied once it is written.
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
    pieces = pieces_of(share)
    part = Part(name, sum(len(p) for p in pieces), digest_of(pieces))
    storage.write_pieces(storage.join(url, name), lambda: pieces)
    return part


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
