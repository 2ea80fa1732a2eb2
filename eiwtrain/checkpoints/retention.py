"""Which checkpoints of a run stay, and how the others and what dead attempts left are deleted."""

from __future__ import annotations

import logging
import math
import re
from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Any

from eiwtrain import storage
from eiwtrain.checkpoints.format import (
    DAMAGED_MANIFEST,
    FOLDER,
    MANIFEST,
    Checkpoint,
    Survey,
    Unreadable,
    age,
    folder,
    survey,
)
from eiwtrain.testing import failpoints

_STRAY = re.compile(r"\.(.+\.[0-9a-f]{32}\.tmp|probe-[0-9a-f]{32})$")  # temporary files of `eiwtrain.storage`
_log = logging.getLogger(__name__)


def best(found: list[Checkpoint]) -> Checkpoint | None:
    """Return the checkpoint with the lowest held-out bits/dim, among those that were evaluated as the last one was
    (`_evaluation`); None if none was evaluated.

    Args:
        found: newest first, as from `committed`.
    """
    return next(iter(_best_of_each(found)), None)


def _best_of_each(found: list[Checkpoint]) -> list[Checkpoint]:
    """Return the best checkpoint of each kind of evaluation, that of the last evaluation first."""
    alike: defaultdict[tuple[Any, ...], list[Checkpoint]] = defaultdict(list)
    for c in found:
        if (bits := c.state.get("eval_bits_per_dim")) is not None and math.isfinite(bits):
            alike[_evaluation(c)].append(c)
    return [min(scored, key=lambda c: c.state["eval_bits_per_dim"]) for scored in alike.values()]


def _evaluation(c: Checkpoint) -> tuple[Any, ...]:
    """Return what two scores must have in common to be compared: the images, their split and their data set."""
    score, config = c.state.get("score") or {}, c.state.get("config") or {}
    return score.get("images"), config.get("data", {}).get("eval_split"), c.state.get("data_fingerprint")


def condemn(checkpoint: Checkpoint) -> None:
    """Take a damaged checkpoint out of `committed`; its bytes stay until training has passed its step again."""
    manifest = storage.join(checkpoint.url, MANIFEST)
    storage.write_bytes(storage.join(checkpoint.url, DAMAGED_MANIFEST), storage.read_bytes(manifest))
    storage.delete(manifest)


def delete(url: str) -> None:
    """Delete the folder of a checkpoint. The manifest goes first, so that a half-deleted folder is no checkpoint."""
    storage.delete(storage.join(url, MANIFEST))
    failpoints.reach("checkpoint.half-deleted")
    storage.delete(url)


def kept(found: list[Checkpoint], keep_last: int, keep_every: int) -> set[str]:
    """Return the URLs of the checkpoints that stay: the newest `keep_last`, the best (of each kind of evaluation, where
    it has changed), and with `keep_every` = m > 0 the first in each window of m steps. Of several checkpoints of one
    step only the newest counts.

    Args:
        found: newest first, as from `committed`.
    """
    newest = list({c.step: c for c in reversed(found)}.values())[::-1]
    keep = {c.url for c in newest[:keep_last]}
    keep |= {c.url for c in _best_of_each(newest)}
    if keep_every:
        keep |= {c.url for c in {c.step // keep_every: c for c in newest}.values()}
    return keep


def sweep(
    root: str,
    keep_last: int,
    keep_every: int = 0,
    guard: Callable[[], None] = lambda: None,
    known: Checkpoint | None = None,
) -> None:
    """Delete the checkpoints that are not `kept`, and all that `clean` deletes.

    Call it only where no commit is under way and no other process writes the run.

    Args:
        guard: called first and before each deletion; the sweep ends with what it raises.
        known: a checkpoint that this process has committed; it counts though a listing may not show it yet.
    """
    guard()
    found, unreadable = survey(root)
    if known is not None and known.url not in {c.url for c in found}:
        found = sorted([known, *found], key=age, reverse=True)
        unreadable = [u for u in unreadable if u.url != known.url]
    keep = kept(found, keep_last, keep_every)
    for old in found:
        if old.url not in keep:
            guard()
            delete(old.url)
    _clean(root, [c for c in found if c.url in keep], unreadable, guard)
    failpoints.reach("checkpoint.swept")


def clean(
    root: str,
    guard: Callable[[], None] = lambda: None,
    outwait: Callable[[], None] | None = None,
    known: Iterable[Checkpoint] = (),
) -> Survey:
    """Delete what dead attempts left half written: parts without a manifest, temporary files, unfinished uploads.
    Return what is there then.

    A checkpoint that is condemned or cannot be read stays until training has passed its step. Call it only where no
    commit is under way and no other process writes the run.

    Args:
        guard: as for `sweep`.
        outwait: called if a folder would be deleted; a commit that a dead attempt completes meanwhile stays.
        known: as for `survey`.
    """
    found, unreadable = survey(root, known)
    if outwait is not None and _unfinished(root, storage.listdir(folder(root)), found, unreadable):
        outwait()
        found, unreadable = survey(root, found)
    _clean(root, found, unreadable, guard)
    return found, [u for u in unreadable if u.step > _passed(found)]


def _unfinished(root: str, names: list[str], found: list[Checkpoint], unreadable: list[Unreadable]) -> list[str]:
    """Return the folders among `names` that are neither checkpoints nor damaged ones that training has yet to pass."""
    passed = _passed(found)
    keep = {c.url for c in found} | {u.url for u in unreadable if u.step > passed}
    bad, urls = {u.url for u in unreadable}, []
    for name in names:
        url = storage.join(folder(root), name)
        if (match := FOLDER.match(name)) and url not in keep:
            condemned = int(match[1]) > passed and storage.exists(storage.join(url, DAMAGED_MANIFEST))
            # a listing may be late: only a look at the manifest itself tells that it was never written
            if not condemned and (url in bad or not storage.exists(storage.join(url, MANIFEST))):
                urls.append(url)
    return urls


def _passed(found: list[Checkpoint]) -> int:
    """Return the step that training has reached for sure: what is damaged up to there is of no use."""
    return found[0].step if found else -1


def _clean(root: str, found: list[Checkpoint], unreadable: list[Unreadable], guard: Callable[[], None]) -> None:
    names = storage.listdir(folder(root))
    for url in _unfinished(root, names, found, unreadable):
        guard()
        delete(url)
    for where, there in ((folder(root), names), (root, storage.listdir(root))):
        for name in there:
            if _STRAY.match(name) and not name.startswith(".lease"):  # the lease's heartbeat writes meanwhile
                guard()
                storage.delete(storage.join(where, name))
    guard()
    try:
        storage.abandon_uploads(folder(root))
    except storage.StorageError as e:  # listing them may be forbidden, or unknown to the store; they only cost space
        _log.warning("unfinished uploads are not looked for: %s", e)
