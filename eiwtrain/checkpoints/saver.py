"""Writes checkpoints: in the background, on every rank, one at a time, while training goes on.

Training waits only for the copy of its tensors to CPU memory; a thread a rank writes them. All ranks write their parts
to a folder that is new, then rank 0 publishes the manifest: until then there is no checkpoint, whatever dies. Not for
what a checkpoint is (`eiwtrain.checkpoints.checkpoint`), nor for when one is due (`eiwtrain.train.pace`).
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

from eiwtrain import storage
from eiwtrain.checkpoints import checkpoint
from eiwtrain.terminal.lines import one_line
from eiwtrain.testing import failpoints

FAILPOINTS = (
    "checkpoint.before-part",
    "checkpoint.part-half-written",
    "checkpoint.part-written",
    "checkpoint.agreed",
    "checkpoint.before-manifest",
    "checkpoint.manifest-half-written",
    "checkpoint.manifest-written",
    "checkpoint.half-deleted",
    "checkpoint.swept",
)
"""Every boundary of a save at which a process may die (`eiwtrain.testing.failpoints`), in order."""

_TIMEOUT = timedelta(hours=1)  # of one rank's wait for another's write; longer than any patience with storage
_DTYPES = {  # of PyTorch, as safetensors calls them
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
    """The ranks could not talk about a checkpoint. Their process group is of no use after that: none can be written
    any more before the workers have started again."""


@dataclass(frozen=True)
class Outcome:
    """How a save ended; the same on every rank, but for the times, and for the deletion of old ones: rank 0 knows."""

    checkpoint: checkpoint.Checkpoint | None
    """What was committed; None if nothing was."""
    exception: Exception | None
    """What failed. With a checkpoint: it is committed, and what it makes superfluous could not be deleted."""
    stall: float
    """Seconds for which training was held."""
    seconds: float
    """From the beginning to the commit, or to the failure."""
    bytes: int
    """Of all parts; 0 without a checkpoint."""

    @property
    def error(self) -> str | None:
        """The text of `exception`."""
        return None if self.exception is None else str(self.exception) or type(self.exception).__name__


class Saver:
    """Writes the checkpoints of the run at `root`.

    Its threads talk through a process group of their own, so that their collectives never mix with training's. They
    are daemons: a process that ends does not wait for them.
    """

    def __init__(self, root: str, keep_last: int, keep_every: int, guard: Callable[[], None]) -> None:
        """Collective.

        Args:
            root: URL of the run.
            keep_last, keep_every: see `checkpoint.kept`.
            guard: raises where this process may not write the run any more; called by rank 0's thread before a
                manifest is published and before each old checkpoint is deleted. What it raises is the outcome's.
        """
        self._root, self._keep, self._guard = root, (keep_last, keep_every), guard
        self._rank, self._world_size = dist.get_rank(), dist.get_world_size()
        self._group = dist.new_group(backend="gloo", timeout=_TIMEOUT)
        self._thread: threading.Thread | None = None
        self._outcome: Outcome | None = None

    @property
    def busy(self) -> bool:
        """Whether a save is under way on this rank."""
        return self._thread is not None and self._thread.is_alive()

    def begin(
        self, step: int, samples_seen: int, tensors: Iterable[tuple[str, Tensor]], state: dict[str, Any]
    ) -> Outcome | None:
        """Begin to commit a checkpoint, as soon as the one under way has ended; returns when `tensors` may change.
        Collective.

        Args:
            tensors: (name, whole tensor), the same names in the same order on every rank; iterated once.
            state: JSON data; rank 0's is kept. Not to be changed afterwards.

        Returns:
            The outcome of the save before, where `poll` has not given it.
        """
        began = time.perf_counter()
        before = self.wait()
        share = snapshot(tensors, self._rank, self._world_size)
        stall = time.perf_counter() - began
        self._thread = threading.Thread(
            target=self._save, args=(step, samples_seen, share, state, began, stall), daemon=True, name="saver"
        )
        self._thread.start()
        return before

    def poll(self) -> Outcome | None:
        """The outcome of the save that was begun last, once, when it has ended; else None."""
        if self.busy:
            return None
        outcome, self._outcome = self._outcome, None
        return outcome

    def wait(self, seconds: float | None = None) -> Outcome | None:
        """Wait until no save is under way on this rank, no longer than `seconds`; returns what `poll` then does."""
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
        except Exception as e:  # a rank's storage, the guard, or a rank that is gone
            failure = e
        seconds = time.perf_counter() - began
        if saved is not None and self._rank == 0:
            try:
                checkpoint.sweep(self._root, *self._keep, guard=self._guard)
            except Exception as e:
                failure = e
        self._outcome = Outcome(saved, failure, stall, seconds, saved.bytes if saved else 0)


def snapshot(tensors: Iterable[tuple[str, Tensor]], rank: int, world_size: int) -> dict[str, Tensor]:
    """A copy of this rank's share in CPU memory; each tensor goes to the rank with the fewest bytes so far.

    Args:
        tensors: (name, whole tensor) in the same order on every rank; iterated once. If that is collective, so is this.
    """
    share: dict[str, Tensor] = {}
    load, on_gpu = [0] * world_size, False
    for name, tensor in tensors:
        owner = load.index(min(load))
        load[owner] += tensor.nbytes
        if owner == rank:
            on_gpu |= tensor.is_cuda
            share[name] = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
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
) -> checkpoint.Checkpoint:
    """Write a checkpoint and publish its manifest. Collective over `group`, a gloo group of all ranks.

    The parts go to a folder of their own, rank 0 looks at their sizes, and the manifest comes last. What fails on one
    rank is raised on all, and what was written is deleted as far as storage answers.

    A rank that was cut off and comes back may find that its parts were swept while it published the manifest: rank 0
    looks once more.

    Args:
        share: what `snapshot` gave; emptied when it is written.
        state: JSON data; rank 0's is kept.
        guard: called by rank 0 right before each try to publish the manifest; what it raises leaves it unpublished.

    Raises:
        storage.StorageError: a rank could not write; the message says which and why.
        RanksApartError: as it says; whether there is a checkpoint is not known. Not on all ranks at the same time: one
            whose connection is silent learns of it by the group's timeout alone.
    """
    rank, world_size = dist.get_rank(group), dist.get_world_size(group)
    name = [f"step-{step:08d}-{uuid.uuid4().hex[:8]}"]
    with _together():
        dist.broadcast_object_list(name, src=0, group=group)
    url = storage.join(checkpoint.folder(root), name[0])

    failpoints.reach("checkpoint.before-part")
    written: checkpoint.Part | Exception
    try:
        written = _write_part(url, f"part-{rank:05d}-of-{world_size:05d}.safetensors", share)
    except Exception as e:  # the others are not to wait for ever
        written = _portable(e)
    share.clear()
    failpoints.reach("checkpoint.part-written")
    parts: list[Any] = [None] * world_size
    with _together():
        dist.all_gather_object(parts, written, group=group)  # every part is in place before the manifest says so
    failpoints.reach("checkpoint.agreed")

    new = checkpoint.Checkpoint(url, step, samples_seen, tuple(parts), state)
    result = [_publish(new, guard) if rank == 0 else None]
    with _together():
        dist.broadcast_object_list(result, src=0, group=group)  # no rank goes on as if it were saved before it is
    if isinstance(result[0], Exception):
        raise result[0]
    return new


@contextlib.contextmanager
def _together() -> Iterator[None]:
    try:
        yield
    except Exception as e:  # a rank that is gone, a connection that was cut, a timeout
        raise RanksApartError(f"the workers lost one another at a checkpoint: {one_line(e)}") from e


def _write_part(url: str, name: str, share: dict[str, Tensor]) -> checkpoint.Part:
    """Publish `share` as the safetensors file `url/name`, without a second copy of it in memory."""
    # by falling size of their elements, so that each is aligned
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
    storage.write_pieces(storage.join(url, name), lambda: _reaching("checkpoint.part-half-written", pieces))
    return checkpoint.Part(name, sum(len(p) for p in pieces), digest.hexdigest())


def _reaching(failpoint: str, pieces: list[Any]) -> Iterator[Any]:
    """The pieces, and the fail point after the first."""
    yield pieces[0]
    failpoints.reach(failpoint)
    yield from pieces[1:]


def _publish(new: checkpoint.Checkpoint, guard: Callable[[], None]) -> Exception | None:
    """Publish the manifest, or else delete the parts and return why."""
    try:
        _check_parts(new)
        _write_manifest(new, guard)
        _check_parts(new)
        failpoints.reach("checkpoint.manifest-written")
        return None
    except Exception as e:
        with contextlib.suppress(Exception), storage.impatient():  # whatever comes, the other ranks wait for the answer
            checkpoint.delete(new.url)  # a manifest whose publication seemed to fail may be there
        return _portable(e)


def _check_parts(new: checkpoint.Checkpoint) -> None:
    for rank, part in enumerate(new.parts):
        if isinstance(part, Exception):
            raise storage.StorageError(f"rank {rank}: {part}")
    there = dict(storage.find(new.url))
    for part in new.parts:
        if part.name not in there:
            raise storage.StorageError(
                f"{new.url}/{part.name}: another worker wrote it and it is not here; several nodes need shared storage"
            )
        if there[part.name] != part.bytes:
            raise storage.StorageError(
                f"{new.url}/{part.name}: {there[part.name]} bytes where {part.bytes} were written"
            )


def _write_manifest(new: checkpoint.Checkpoint, guard: Callable[[], None]) -> None:
    data = checkpoint.render(new)
    half = len(data) // 2
    refused: list[Exception] = []

    def pieces() -> Iterator[bytes]:  # anew at each try
        try:
            guard()
        except Exception as e:
            refused.append(e)
            raise
        failpoints.reach("checkpoint.before-manifest")
        yield from _reaching("checkpoint.manifest-half-written", [data[:half], data[half:]])

    try:
        storage.write_pieces(storage.join(new.url, checkpoint.MANIFEST), pieces)
    except Exception:
        if refused:  # storage may have wrapped it
            raise refused[0] from None
        raise


def _portable(e: Exception) -> Exception:
    """The exception, or one of the same text where it cannot be sent to other ranks."""
    try:
        return pickle.loads(pickle.dumps(e))
    except Exception:
        return RuntimeError(f"{type(e).__name__}: {e}")
