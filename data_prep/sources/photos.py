"""The `photos` source: patches of the photographs that ship inside scikit-image and scikit-learn.

A data set of real photographs without a download, small enough for a laptop: for the quick start and for tests,
not for results. The photographs, none of which is shipped with this package:

- astronaut: Eileen Collins, NASA Great Images, public domain (scikit-image)
- chelsea: Stefan van der Walt, CC0 (scikit-image)
- coffee: Rachel Michetti, courtesy of Pikolo Espresso Bar, CC0 (scikit-image)
- motorcycle: left image of the Middlebury 2014 stereo benchmark, D. Scharstein et al., "High-resolution stereo
  datasets with subpixel-accurate ground truth", GCPR 2014 (scikit-image)
- rocket: launch of DSCOVR, SpaceX, public domain (scikit-image)
- china: danielbuechele, https://www.flickr.com/photos/danielbuechele/6061409035, CC BY 2.0 (scikit-learn)
- flower: vultilion, https://www.flickr.com/photos/vultilion/6056698931, CC BY 2.0 (scikit-learn)
"""

from __future__ import annotations

from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

from data_prep.items import Item, Patch, Source, photograph
from eiwtrain.data.manifest import DataError

PHOTOGRAPHS = {
    "astronaut": ("skimage", "data/astronaut.png"),
    "chelsea": ("skimage", "data/chelsea.png"),
    "china": ("sklearn", "datasets/images/china.jpg"),
    "coffee": ("skimage", "data/coffee.png"),
    "flower": ("sklearn", "datasets/images/flower.jpg"),
    "motorcycle": ("skimage", "data/motorcycle_left.png"),
    "rocket": ("skimage", "data/rocket.jpg"),
}
TEST_SHARE = 0.25  # of the width, rounded up to whole patches: over 256 test patches at 32 pixels
_MIN_ROWS = 3  # a JPEG is halved, which removes its block artefacts, if at least this many rows of patches remain


def photos(resolution: int) -> Source:
    """Cut patches of `resolution` x `resolution` pixels; the label is the photograph.

    The right quarter of each photograph is the test region, cut into patches that do not overlap. The rest is for
    training, cut with a stride of half a patch. No pixel is in both.

    Raises:
        DataError: neither package is installed with its photographs, or patches of this size fit into none of them.
    """
    found = {name: path for name in PHOTOGRAPHS if (path := _find(*PHOTOGRAPHS[name])) is not None}
    if not found:
        raise DataError("there are no photographs: install scikit-image and scikit-learn, which ship them")
    splits: dict[str, list[Item]] = {"train": [], "test": []}
    classes: list[str] = []
    for name, path in found.items():
        cut = {split: list(patches) for split, patches in _cut(path, resolution).items()}
        if not all(cut.values()):
            continue
        for split, patches in cut.items():
            for patch in patches:
                source = f"{name}@{patch.left},{patch.top}"
                splits[split].append(Item(len(classes), source, path.stat().st_size, patch))
        classes.append(name)
    if not classes:
        raise DataError(f"resolution {resolution}: the photographs are too small for patches of that size")
    params = {"stride": _stride(resolution), "test_share": TEST_SHARE, "halved": "jpeg"}
    return Source("photos", splits, tuple(classes), params=params)


def _cut(path: Path, side: int) -> dict[str, Iterator[Patch]]:
    jpeg = path.suffix == ".jpg"
    full = photograph(str(path), False)
    halve = jpeg and min(full.size) // 2 >= _MIN_ROWS * side
    width, height = photograph(str(path), halve).size
    columns = -(-int(TEST_SHARE * width) // side)  # whole test patches, rounded up
    border = width - columns * side  # first column of the test region
    return {
        "train": _grid(path, halve, 0, border, height, side, _stride(side)),
        "test": _grid(path, halve, border, width, height, side, side),
    }


def _grid(path: Path, halve: bool, left: int, right: int, height: int, side: int, stride: int) -> Iterator[Patch]:
    for top in range(0, height - side + 1, stride):
        for x in range(left, right - side + 1, stride):
            yield Patch(str(path), halve, x, top, side)


def _stride(side: int) -> int:
    return max(1, side // 2)


def _find(package: str, name: str) -> Path | None:
    """Find a file inside an installed package, without importing it, which could download."""
    spec = find_spec(package)
    for folder in (spec.submodule_search_locations or []) if spec is not None else []:
        if (path := Path(folder, name)).is_file():
            return path
    return None
