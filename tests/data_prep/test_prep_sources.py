"""The folder and photos sources: images, splits and labels; regions without a shared pixel."""

from __future__ import annotations

import io
import pickle
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
from containers import Files, tar_of, write_files, zip_of
from PIL import Image

from data_prep.items import Patch, Source, photograph
from data_prep.sources import read_source
from eiwtrain import storage
from eiwtrain.data.manifest import DataError


def _png(value: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (4, 4), (value, 0, 0)).save(buffer, "PNG")
    return buffer.getvalue()


def _files(names: list[str]) -> Files:
    return {name: _png(n) for n, name in enumerate(names)}


def _folder(root: Path, names: list[str]) -> Path:
    return write_files(root, _files(names))


def _everywhere(folder: Path, names: list[str]) -> list[Path]:
    """Write the images as a folder, as a tar and as a zip."""
    packed = {"images.tar": tar_of(_files(names)), "images.zip": zip_of(_files(names))}
    return [_folder(folder / "images", names), *(write_files(folder, packed) / name for name in packed)]


def _read(path: Path, split: str = "own") -> Source:
    return read_source("folder", 4, str(path), split=split)


def _names(source: Source) -> dict[str, list[tuple[str, int]]]:
    return {split: [(i.source, i.label) for i in items] for split, items in source.splits.items()}


NAMES = ["dog/b.png", "cat/a.png", "dog/a.jpeg", "cat/deep/er/c.PNG", "cat/notes.txt", "dog/.hidden.png"]
EXPECTED = {"train": [("cat/a.png", 0), ("cat/deep/er/c.PNG", 0), ("dog/a.jpeg", 1), ("dog/b.png", 1)]}


def test_class_folders_give_labels_in_the_order_of_their_names(tmp_path: Path) -> None:
    for path in _everywhere(tmp_path, NAMES):
        source = _read(path)
        assert _names(source) == EXPECTED
        assert source.classes == ("cat", "dog")


def test_a_single_top_folder_is_looked_into(tmp_path: Path) -> None:
    for path in _everywhere(tmp_path, [f"./pets/{n}" for n in NAMES]):
        source = pickle.loads(pickle.dumps(_read(path)))
        assert _names(source) == EXPECTED
        assert [item.load() for item in source.splits["train"]] == [_png(NAMES.index(n)) for n, _ in EXPECTED["train"]]
        assert not source.remote


def test_remote_images_are_the_same_and_marked_as_remote(tmp_path: Path) -> None:
    url = f"memory://{tmp_path.name}"
    for path in _everywhere(tmp_path, NAMES):
        fsspec.filesystem("memory").put(str(path), f"/{tmp_path.name}/{path.name}", recursive=True)
        source = read_source("folder", 4, f"{url}/{path.name}", split="own")
        assert _names(source) == EXPECTED
        assert [item.load() for item in source.splits["train"]] == [_png(NAMES.index(n)) for n, _ in EXPECTED["train"]]
        assert source.remote
    storage.delete(url)


def test_flat_images_have_no_label(tmp_path: Path) -> None:
    source = _read(_folder(tmp_path, ["b.png", "a.png"]))
    assert _names(source) == {"train": [("a.png", -1), ("b.png", -1)]}
    assert source.classes == ()


@pytest.mark.parametrize("name", ["test", "val", "valid", "validation", "eval", "Test"])
def test_split_folders_are_the_splits(tmp_path: Path, name: str) -> None:
    for path in _everywhere(tmp_path, ["train/cat/1.png", f"{name}/cat/2.png", f"{name}/eel/3.png"]):
        source = _read(path, split="auto")
        assert _names(source) == {"train": [("cat/1.png", 0)], "test": [("cat/2.png", 0), ("eel/3.png", 1)]}


def test_several_evaluation_folders_keep_their_names(tmp_path: Path) -> None:
    source = _read(_folder(tmp_path, ["train/1.png", "val/2.png", "test/3.png"]))
    assert {split: len(items) for split, items in source.splits.items()} == {"train": 1, "test": 1, "val": 1}


@pytest.mark.parametrize("name", ["train", "val"])
@pytest.mark.parametrize("deeper", ["", "cat/", "cat/deep/"])
def test_a_single_split_folder_is_for_training(tmp_path: Path, name: str, deeper: str) -> None:
    source = _read(_folder(tmp_path, [f"{name}/{deeper}1.png", f"{name}/{deeper}2.png"]))
    label = 0 if deeper else -1
    assert _names(source) == {"train": [(f"{deeper}1.png", label), (f"{deeper}2.png", label)]}


def test_a_class_called_train_among_others_is_a_class(tmp_path: Path) -> None:
    source = _read(_folder(tmp_path, ["train/1.png", "plane/2.png"]))
    assert source.classes == ("plane", "train")


@pytest.mark.parametrize("top", ["", "train/"])
def test_without_split_folders_a_hash_of_the_name_chooses(tmp_path: Path, top: str) -> None:
    names = [f"{top}c{n % 3}/{n}.png" for n in range(600)]
    source = _read(_folder(tmp_path / "a", names), "hash:0.2")
    test = {i.source for i in source.splits["test"]}
    assert 80 < len(test) < 160  # four standard deviations about 120
    assert not test & {i.source for i in source.splits["train"]}
    fewer = _read(_folder(tmp_path / "b", names[:300]), "hash:0.2")
    assert {i.source for i in fewer.splits["test"]} == test & {n.removeprefix(top) for n in names[:300]}


def test_wrong_sources_are_refused_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    _folder(tmp_path / "one", ["1.png"])
    one = str(tmp_path / "one")
    refused: list[tuple[tuple[Any, ...], dict[str, Any], str]] = [
        (("folder", 4, str(tmp_path / "nowhere")), {}, "no such folder, tar or zip"),
        (("folder", 4, str(tmp_path / "empty")), {}, "it holds no images"),
        (("folder", 4, None), {}, "needs a path"),
        (("folder", 4, one), {"split": "half"}, "split must be auto, own"),
        (("folder", 4, one), {"only": ["test"]}, "there is no split 'test'"),
        (("photos", 8, "x"), {}, "takes no path"),
        (("photos", 512, None), {}, "too small"),
        (("fotos", 8, None), {}, "there is no source 'fotos'; choose one of imagenet, .*folder, .*photos"),
    ]
    for arguments, options, message in refused:
        with pytest.raises(DataError, match=message) as caught:
            read_source(*arguments, **options)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("resolution", [20, 32, 64])
def test_no_pixel_of_a_photograph_is_in_train_and_test(resolution: int) -> None:
    source = read_source("photos", resolution)
    used: dict[tuple[str, bool], dict[str, np.ndarray]] = {}
    for split, items in source.splits.items():
        for item in items:
            patch = item.load
            assert isinstance(patch, Patch)
            size = photograph(patch.path, patch.halve).size
            maps = used.setdefault((patch.path, patch.halve), {s: np.zeros(size[::-1], int) for s in source.splits})
            assert 0 <= patch.left <= size[0] - resolution
            assert 0 <= patch.top <= size[1] - resolution
            maps[split][patch.top : patch.top + resolution, patch.left : patch.left + resolution] += 1
    assert len(used) == len(source.classes) == len({path for path, _ in used})  # no photograph at two sizes
    for maps in used.values():
        assert not (maps["train"].astype(bool) & maps["test"].astype(bool)).any()
        assert maps["test"].max() == 1  # test patches do not overlap each other
        assert maps["train"].mean() > 1  # overlapping
    assert all(item.load().size == (resolution, resolution) for item in source.splits["test"][:10])


def test_photographs_are_enough_for_a_quick_start() -> None:
    source = read_source("photos", 32)
    assert 3000 <= len(source.splits["train"]) <= 6000
    assert len(source.splits["test"]) >= 256
    assert len({i.source for i in source.splits["train"]}) == len(source.splits["train"])
