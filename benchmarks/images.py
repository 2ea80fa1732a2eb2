"""Provide the images of the data benchmarks: a folder of class folders, from any folder or tar, or made here.

The made ones are crops of the photographs inside scikit-image and scikit-learn, saved as JPEG: the same everywhere.
"""

from __future__ import annotations

import random
import shutil
import tarfile
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path, PurePosixPath
from typing import Any

QUALITY = 90  # of the made JPEGs
SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".webp", ".gif", ".tif", ".tiff", ".ppm")

Entry = tuple[str, int]
"""A pair of (path below the folder, number of the class)."""


def entries(folder: str | Path) -> list[Entry]:
    """Return every image, in an order that mixes the classes and is the same on every machine."""
    paths = sorted(p.relative_to(folder) for p in Path(folder).rglob("*.*"))
    classes = {name: i for i, name in enumerate(sorted({p.parts[0] for p in paths}))}
    found = [(str(p), classes[p.parts[0]]) for p in paths]
    random.Random(0).shuffle(found)
    return found


def make(folder: Path, count: int, side: int, processes: int) -> None:
    """Write `count` square crops of `side` pixels as JPEGs, at places that are the same on every machine."""
    with ProcessPoolExecutor(processes) as pool:
        list(pool.map(_make, *zip(*((folder, i, processes, count, side) for i in range(processes)), strict=True)))


def _make(folder: Path, first: int, step: int, count: int, side: int) -> None:
    from data_prep.items import photograph
    from data_prep.sources.photos import PHOTOGRAPHS, _find

    found = {name: path for name, where in PHOTOGRAPHS.items() if (path := _find(*where)) is not None}
    if not found:
        raise FileNotFoundError("no photographs: install scikit-image and scikit-learn, which ship them")
    names = sorted(found)
    for number in range(first, count, step):
        name = names[number % len(names)]
        image = photograph(str(found[name]), False)
        place = random.Random(number)
        left, top = (place.randrange(size - side + 1) for size in image.size)
        path = folder / name / f"{number:06d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        image.crop((left, top, left + side, top + side)).save(path, quality=QUALITY)


def take(source: Path, folder: Path, count: int) -> int:
    """Copy up to `count` images of a folder or an uncompressed tar, evenly spread; return their number.

    The class of an image is the name of its folder.
    """
    if source.is_dir():
        paths = sorted(p for p in source.rglob("*") if _is_image(p.name))
        for number, path in enumerate(chosen := _spread(paths, count)):
            shutil.copyfile(path, _target(folder, number, path.parent.name, path.suffix))
        return len(chosen)
    with tarfile.open(source, "r:") as tar:
        members = [m for m in tar if m.isreg() and _is_image(m.name)]
        for number, member in enumerate(chosen_members := _spread(members, count)):
            name = PurePosixPath(member.name)
            data = tar.extractfile(member)
            assert data is not None
            _target(folder, number, name.parent.name, name.suffix).write_bytes(data.read())
        return len(chosen_members)


def limit(folder: Path, other: Path, count: int) -> None:
    """Link the first `count` entries of `folder` into `other`."""
    for name, _ in entries(folder)[:count]:
        (other / name).parent.mkdir(parents=True, exist_ok=True)
        (other / name).hardlink_to(folder / name)


def _spread(things: list[Any], count: int) -> list[Any]:
    return [things[i * len(things) // count] for i in range(count)] if count < len(things) else things


def _target(folder: Path, number: int, parent: str, suffix: str) -> Path:
    path = folder / f"class-{parent}" / f"{number:06d}{suffix.lower()}"
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


def _is_image(name: str) -> bool:
    return name.lower().endswith(SUFFIXES) and not PurePosixPath(name).name.startswith(".")
