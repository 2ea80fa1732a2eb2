"""Finds the splits and the classes in the names of images: at which depth of the folders they begin.

Not for reading folders or labels in files: that is in `data_prep.sources.folder`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

from data_prep.split_names import SplitName, split_name
from eiwtrain.data.manifest import DataError

Parts = tuple[str, ...]

_DEEPEST = 12  # levels of folders that are looked at
_NAMED = 3  # folders in an error
# Folders that hold all images of a split and mean nothing, as in YOLO's and Tiny ImageNet's layouts.
_CONTAINERS = ("image", "images", "img", "imgs", "jpegimages", "pictures", "photos", "jpg", "jpeg", "png", "data")
_SHARD_OF_NAMES = 2  # characters of a folder that only repeats the beginning of a file's name


class Place(NamedTuple):
    """Where an image belongs: its split, its class ("" for none), and the name that it keeps on any machine."""

    split: str
    label: str
    name: str


class Layout(NamedTuple):
    """The place of each image (None outside the splits), what the user should know, and the folder of each split."""

    places: list[Place | None]
    notes: list[str]
    splits: dict[Parts, str]


class _Tree:
    """The folders that images are in: which are in which, and how many images are in each and below it."""

    def __init__(self, names: Iterable[Parts]) -> None:
        self.folders: dict[Parts, dict[str, None]] = {}
        self.direct: Counter[Parts] = Counter()
        self.total: Counter[Parts] = Counter()
        for folder, count in Counter(parts[:-1] for parts in names).items():
            self.direct[folder] += count
            for depth in range(min(len(folder), _DEEPEST) + 1):
                self.total[folder[:depth]] += count
                if depth < len(folder):
                    self.folders.setdefault(folder[:depth], {})[folder[depth]] = None

    def below(self, folder: Parts) -> list[str]:
        """Return the names of the folders in a folder, sorted."""
        return sorted(self.folders.get(folder, ()))

    def known(self, folder: Parts) -> dict[str, SplitName]:
        """Return the folders in a folder that are splits beyond doubt, also if all have the same words with them."""
        named = {name: about for name in self.below(folder) if (about := split_name(name)).kind}
        sure = {name: about for name, about in named.items() if about.sure}
        alike = len({about.rest for about in named.values()}) == 1 and all(about.rest for about in named.values())
        return named if alike and len({about.kind for about in named.values()}) > 1 else sure

    def is_level(self, folder: Parts) -> bool:
        """Return whether the folders in a folder are splits: one for training and others, or only others."""
        known = self.known(folder)
        evals = [name for name, about in known.items() if about.kind == "eval"]
        return bool(evals) and (len(known) > len(evals) or len(self.below(folder)) == len(evals) > 1)


def find_layout(path: str, names: Sequence[Parts]) -> Layout:
    """Find the split and the class of each image.

    - Splits are folders side by side of which one is named for training and one for evaluation, at whatever depth; or
      a single folder so named. They are called `train` and `test`; several for evaluation keep their words. If each
      class has such folders of its own, the class is the folder above them.
    - The class is the first folder below the split; without splits, the first one below the folders that all images
      are in. A folder that only holds the images of a split (`images`) is no class.

    Args:
        path: of the source, for errors.
        names: the parts of the name of each image.

    Raises:
        DataError: it is not clear which folders are splits, or images are in folders beside them.
    """
    tree = _Tree(names)
    layout = _find(path, names, tree)
    layout.notes.extend(_doubtful(path, layout.places))
    return layout


def _doubtful(path: str, places: Iterable[Place | None]) -> Iterator[str]:
    """Yield a note on each class whose name is mostly that of something else.

    Raises:
        DataError: its name is that of a split, and no other split has this class.
    """
    splits: dict[str, set[str]] = {}
    for place in places:
        if place and place.label:
            splits.setdefault(place.label, set()).add(place.split)
    for label in sorted(splits):
        about = split_name(label)
        if about.only and label.lower() != "train" and len(splits[label]) == 1:
            raise DataError(
                f"source {path}: '{label}', among the classes of '{splits[label].pop()}', looks like a split; move it "
                "beside the folder of that split, or rename it if it is a class"
            )
        if about.kind or label.lower() in _CONTAINERS:
            others = _list(other for other in splits if other != label)
            yield f"'{label}' is taken as a class" + (f", like {others}" if others else "")


def _find(path: str, names: Sequence[Parts], tree: _Tree) -> Layout:
    levels: list[Parts] = []
    for folder in sorted(tree.folders, key=len):
        if tree.is_level(folder) and not any(folder[: len(level)] == level for level in levels):
            levels.append(folder)
    if levels and _classes_have_splits(tree, levels[0][:-1], levels):
        return _of_classes(path, names, tree, levels[0][:-1])
    if len(levels) > 1:
        raise DataError(
            f"source {path}: {_list('/'.join(level) for level in levels)} hold splits of their own; give one of them"
        )
    if levels:
        return _of_splits(path, names, tree, levels[0])
    return _without_level(path, names, tree)


def _of_splits(path: str, names: Sequence[Parts], tree: _Tree, level: Parts) -> Layout:
    """Place images by the splits in the folder `level`; images in other folders are refused, single ones left out."""
    known = tree.known(level)
    called = _called(path, known)
    splits = {(*level, name): split for name, split in called.items()}
    depth = len(level) + 1
    outside = [folder for folder in tree.direct if folder[:depth] not in splits]
    if folders := {folder[: _common(folder, level) + 1] for folder in outside if folder != level[: len(folder)]}:
        both = " and ".join(repr(name) for name in list(dict.fromkeys([*_first(known, "train"), *known]))[:2])
        raise DataError(
            f"source {path}: {both} look like splits, but there are also images in "
            f"{_list('/'.join(folder) for folder in folders)}; move them away, or rename what is a split to train, "
            "val or test"
        )
    classes = {name for folder in splits if len(tree.below(folder)) > 1 for name in tree.below(folder)}
    tops = {folder: _class_level(tree, folder, classes) for folder in splits}
    if nested := [folder for folder in tops.values() if tree.is_level(folder)]:
        raise DataError(f"source {path}: {'/'.join(nested[0])!r} in a split holds splits of its own; give one of them")

    def place(folder: Parts) -> Place | None:
        top = tops.get(folder[:depth])
        if top is None:
            return None
        label = folder[len(top)] if len(folder) > len(top) else ""
        return Place(splits[folder[:depth]], label, _prefix(folder[depth:]))

    places, notes = _place_all(names, place)
    return Layout(_unsharded(places, notes), notes, splits)


def _place_all(names: Iterable[Parts], place: Callable[[Parts], Place | None]) -> tuple[list[Place | None], list[str]]:
    """Return the place of each image, and a note on those without.

    Args:
        place: returns the place of a folder, whose name is what the names of its images begin with.
    """
    known: dict[Parts, Place | None] = {}
    places: list[Place | None] = []
    strays = []
    for parts in names:
        folder = parts[:-1]
        if folder not in known:
            known[folder] = place(folder)
        of_folder = known[folder]
        if of_folder is None:
            strays.append(parts)
        places.append(of_folder and Place(of_folder.split, of_folder.label, of_folder.name + parts[-1]))
    if not strays:
        return places, []
    first = "/".join(min(strays))
    return places, [f"{len(strays):,} images outside the splits are left out; the first: {first}"]


def _prefix(folder: Parts) -> str:
    return "".join(f"{part}/" for part in folder)


def _without_level(path: str, names: Sequence[Parts], tree: _Tree) -> Layout:
    """Place images where no two folders side by side are splits."""
    node: Parts = ()
    while len(below := tree.below(node)) == 1:
        child = (*node, below[0])
        about = split_name(below[0])
        if about.sure:
            if (beside := tree.direct[node]) and (about.kind == "eval" or 2 * beside >= tree.total[node]):
                raise DataError(
                    f"source {path}: '{below[0]}' looks like a split, but {beside:,} images are beside it; move them "
                    "into a folder 'train', or away"
                )
            layout = _of_splits(path, names, tree, node)
            if about.kind == "eval":
                layout.notes.append(f"'{below[0]}' is the only split: its images are used as if it were 'train'")
            return layout
        strays = tree.direct[node] + tree.direct[child]
        means_nothing = below[0].lower() in _CONTAINERS or about.only
        if not (tree.folders.get(child) and 2 * strays < tree.total[node]) and not means_nothing:
            break
        node = child
    if _classes_have_splits(tree, node, []):
        return _of_classes(path, names, tree, node)
    if len(below) > 1:
        _check_no_splits(path, tree, node)
    depth = len(node)

    def place(folder: Parts) -> Place:
        if folder[:depth] != node:  # a folder above
            return Place("train", "", "../" * (depth - len(folder)))
        return Place("train", folder[depth] if len(folder) > depth else "", _prefix(folder[depth:]))

    places, notes = _place_all(names, place)
    return Layout(_unsharded(places, notes), notes, {(): "train"})


def _check_no_splits(path: str, tree: _Tree, node: Parts) -> None:
    """Check that classes whose names sound like splits can only be classes, as a train among other vehicles."""
    below = tree.below(node)
    about = {name: found for name in below if (found := split_name(name)).kind}
    clear = [name for name, found in about.items() if found.only]
    vehicles = [name for name in clear if name.lower() == "train" and (*node, name) in tree.direct]
    both = len({found.kind for found in about.values()}) > 1 and 2 * len(about) >= len(below)
    if clear != vehicles or both or len(about) == len(below):
        others = [name for name in below if name not in about]
        beside = f", and beside it {_list(others)}" if others else ""
        raise DataError(
            f"source {path}: {_list(about)} look{'s' if len(about) == 1 else ''} like a split{beside}; name folders "
            "that are splits train and val or test, side by side and with nothing else, and classes otherwise"
        )


def _classes_have_splits(tree: _Tree, above: Parts, levels: Sequence[Parts]) -> bool:
    """Return whether each folder in `above` is a class with folders for the splits, which have no folders in them."""
    classes = [(*above, name) for name in tree.below(above)]
    return (
        all(level[:-1] == above and level for level in levels)
        and len(classes) > 1
        and all(
            tree.known(folder).keys() == tree.folders.get(folder, {}).keys() != set()
            and not tree.direct[folder]
            and not any(tree.folders.get((*folder, split)) for split in tree.below(folder))
            for folder in classes
        )
    )


def _of_classes(path: str, names: Sequence[Parts], tree: _Tree, above: Parts) -> Layout:
    """Place images of classes that have the splits in them."""
    known = {name: about for folder in tree.below(above) for name, about in tree.known((*above, folder)).items()}
    called = _called(path, known, merge=True)
    depth = len(above)

    def place(folder: Parts) -> Place | None:
        inside = len(folder) > depth + 1
        return Place(called[folder[depth + 1]], folder[depth], _prefix(folder[depth:])) if inside else None

    places, notes = _place_all(names, place)
    return Layout(places, ["the classes are the folders that the splits are in", *notes], {})


def _called(path: str, known: dict[str, SplitName], merge: bool = False) -> dict[str, str]:
    """Return what each split is called in the data set; two folders may be one split only if `merge`."""
    evals = {about.word for about in known.values() if about.kind == "eval"}
    if len(known) == 1:
        return dict.fromkeys(known, "train")
    called = {
        name: "train" if about.kind == "train" else "test" if len(evals) == 1 else about.word
        for name, about in known.items()
    }
    for split in called.values():
        if len(same := [name for name in called if called[name] == split]) > 1 and not merge:
            raise DataError(f"source {path}: {_list(same)} would all be the split '{split}'; put them into one folder")
    return called


def _class_level(tree: _Tree, split: Parts, classes: set[str]) -> Parts:
    """Return the folder below a split in which its classes are: itself, or one that is no class of other splits."""
    node = split
    while len(below := tree.below(node)) == 1 and not tree.direct[node]:
        if below[0] in classes or (below[0].lower() not in _CONTAINERS and not split_name(below[0]).only):
            break
        node = (*node, below[0])
    return node


def _unsharded(places: list[Place | None], notes: list[str]) -> list[Place | None]:
    """Remove classes that only repeat the beginnings of the files' names, as folders of an exported LSUN do."""
    labelled = [place for place in places if place is not None and place.label]
    if not labelled or not all(map(_repeats, labelled)):
        return places
    notes.append("the folders repeat the beginnings of the names in them, so they are no classes")
    return [None if place is None else place._replace(label="") for place in places]


def _repeats(place: Place) -> bool:
    """Return whether two folders or more, of a few characters each, are the beginning of the name of the file."""
    *folders, name = place.name.split("/")
    return len(folders) > 1 and max(map(len, folders)) <= _SHARD_OF_NAMES and name.startswith("".join(folders))


def _common(one: Parts, other: Parts) -> int:
    """Return how many parts at the beginning are the same."""
    return next((n for n, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))


def _first(known: dict[str, SplitName], kind: str) -> list[str]:
    return [name for name, about in known.items() if about.kind == kind][:1]


def _list(names: Iterable[str]) -> str:
    """Name the first few, in order."""
    found = sorted(names)
    return ", ".join(repr(name) for name in found[:_NAMED]) + (", ..." if found[_NAMED:] else "")
