"""Rules for which images are trained on and which are held out, if the source has no splits or others are needed."""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
import numpy.typing as npt

from data_prep.items import Item, LazyItems, Source, join_items
from eiwtrain.data.manifest import DataError

TRAIN, TEST = "train", "test"
AUTO_SHARE = 0.1  # held out of a source without a split for evaluation
_NAMED = 3  # classes in a note
_COPY = re.compile(r"(.+?)[ _-]*(?:copy(?: \d+)?|\(\d+\))")  # as systems call copies of a folder
RULES = "auto, own, hash:SHARE, last:N or all"


def apply_rule(source: Source, rule: str = "auto", only: Sequence[str] = ()) -> Source:
    """Return the source with splits made by a rule; only those named in `only`, unless it is empty.

    - `own`: as the source has them.
    - `auto`: the same; if `train` is the only split, a tenth of it is held out as by `hash`.
    - `hash:SHARE`: that share of `train` becomes `test`, chosen by a hash of the name: an image stays on its side when
      others are added or removed.
    - `last:N`: the last n images of `train`, in the source's order, become `test`.
    - `all`: the images of all splits become `train`.

    Raises:
        DataError: there is no such rule; it would hold out images of a source that has a split for evaluation; a split
            would be empty; or `only` names a split that is not there.
    """
    kind, _, value = rule.partition(":")
    splits = dict(source.splits)
    if kind == "all" and not value:
        splits = {TRAIN: join_items(list(splits.values()))}
    elif (rule == "auto" and list(splits) == [TRAIN]) or kind in ("hash", "last"):
        splits = _held_out(source, rule)
    elif rule not in ("own", "auto"):
        raise DataError(f"split must be {RULES}, not '{rule}'")
    for name in only:
        if name not in splits:
            raise DataError(f"there is no split '{name}' to write; there are {', '.join(splits)}")
    kept = {name: items for name, items in splits.items() if not only or name in only}
    if empty := [name for name, items in kept.items() if not items]:
        raise DataError(f"split '{empty[0]}' would have no images")
    return replace(source, splits=kept)


def notes_on_labels(
    labels: Mapping[str, Mapping[int, int]], classes: Sequence[str], unlabelled: Mapping[str, str]
) -> list[str]:
    """Return what is unusual about the labels of a data set, a line each.

    Args:
        labels: by split, how many images have each label, -1 for none.
        classes: names of the labels.
        unlabelled: by split, the first image without a label.
    """
    if not classes:
        return []
    notes = []
    labelled = {split: {label for label in counts if label >= 0} for split, counts in labels.items()}
    for split, counts in labels.items():
        bare, total = counts.get(-1, 0), sum(counts.values())
        if bare == total:
            notes.append(f"split '{split}' has no labels")
        elif bare:
            first = f"the others have; the first: {unlabelled[split]}"
            notes.append(f"{bare:,} of {total:,} images of split '{split}' have no label, {first}")
    known = {split: found for split, found in labelled.items() if found}
    for split, found in known.items():
        others = set().union(*(other for name, other in known.items() if name != split))
        if len(known) > 1 and (alone := sorted(found - others)):
            names = ", ".join(repr(classes[label]) for label in alone[:_NAMED]) + (", ..." if alone[_NAMED:] else "")
            which = "a class has" if len(alone) == 1 else f"{len(alone):,} of {len(classes):,} classes have"
            notes.append(f"{which} images in split '{split}' alone: {names}")
    by_case: dict[str, str] = {}
    for name in classes:
        if (other := by_case.setdefault(name.casefold(), name)) != name:
            notes.append(f"'{other}' and '{name}' are two classes, whose names differ by case only")
            break
    for name in classes:
        if (copy := _COPY.fullmatch(name)) and copy[1] in classes:
            notes.append(f"'{name}' is a class beside '{copy[1]}'; is it a copy?")
            break
    return notes


def _choose(items: Sequence[Item], numbers: Sequence[int] | npt.NDArray[np.int64]) -> LazyItems:
    return LazyItems(items.__getitem__, numbers)


def _held_out(source: Source, rule: str) -> dict[str, Sequence[Item]]:
    """Divide `train` in two; without `test` if `auto` finds so few images that none is chosen."""
    kind, _, value = rule.partition(":")
    if list(source.splits) != [TRAIN]:
        raise DataError(
            f"--split {rule} would hold images out of 'train', but the source has splits of its own: "
            f"{', '.join(source.splits)}; use own or all"
        )
    items = source.splits[TRAIN]
    if kind == "last":
        if not value.isdecimal() or not 1 <= int(value) < len(items):
            raise DataError(f"--split last:N needs a number from 1 to below {len(items)}, the images, not '{value}'")
        first = len(items) - int(value)
        return {TRAIN: _choose(items, range(first)), TEST: _choose(items, range(first, len(items)))}
    share = AUTO_SHARE if kind == "auto" else _number(value)
    if not 0 < share < 1:
        raise DataError(f"--split hash:SHARE needs a share above 0 and below 1, not '{value}'")
    held = np.fromiter((_share(item.source) < share for item in items), bool, len(items))
    splits = {TRAIN: _choose(items, np.flatnonzero(~held)), TEST: _choose(items, np.flatnonzero(held))}
    return {TRAIN: items} if kind == "auto" and not splits[TEST] else dict(splits)


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return math.nan


def _share(name: str) -> float:
    """Return a number in [0, 1) that depends on the name alone."""
    return int.from_bytes(hashlib.sha256(name.encode("utf-8", "surrogateescape")).digest()[:8], "big") / 2**64
