"""ImageNet as downsampled in 2017: every layout of its batch files gives the same pixels and labels."""

from __future__ import annotations

import io
import os
import pickle
import threading
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
from containers import Files, write_files
from imagenet_files import (
    DOWNSAMPLED,
    batch,
    batch_names,
    batch_pixels,
    in_zips,
    npz_batches,
    pickled_batches,
    read_imagenet,
)
from PIL import Image

from data_prep import prepare
from data_prep.formats import ranges
from data_prep.items import Source
from data_prep.sources import read_source
from eiwtrain import storage
from eiwtrain.data.manifest import DataError, load_sidecar

pytestmark = pytest.mark.usefixtures("temporary_folder")


def _check_downsampled(source: Source, side: int) -> None:
    assert source.params == {"variant": "downsampled-2017", "side": side}
    assert (source.classes[0], source.classes[-1], len(source.classes)) == ("1", "1000", 1000)
    assert [len(items) for items in source.splits.values()] == [6, 3]
    for split, names in (("train", batch_names(2)[:2]), ("val", ["val_data"])):
        expected = [(n, i, label) for n in names for i, label in enumerate(batch(n, side)["labels"])]
        for item, (name, i, label) in zip(source.splits[split], expected, strict=True):
            assert (item.source, item.label, item.size) == (f"{name}/{i}", label - 1, 3 * side**2)
            assert np.array_equal(item.load(), batch_pixels(name, side)[i].transpose(1, 2, 0))


@pytest.mark.parametrize("layout", DOWNSAMPLED)
def test_every_layout_of_downsampled_batches_gives_the_same_pixels(tmp_path: Path, bucket: str, layout: str) -> None:
    side = 64 if "zips" in layout else 32
    _check_downsampled(source := read_imagenet(write_files(tmp_path / "a", DOWNSAMPLED[layout])), side)
    assert source.protocol == (
        f"ImageNet {side}x{side} downsampled by Chrabaszcz et al. 2017 (a subset: 6 training and 3 validation images; "
        "not comparable with van den Oord et al. 2016)"
    )
    for name, data in DOWNSAMPLED[layout].items():
        fsspec.filesystem("memory").pipe_file(f"{bucket}/a/{name}", data)
    _check_downsampled(source := read_imagenet(f"{bucket}/a"), side)
    assert source.remote


def test_only_compressed_files_are_unpacked(tmp_path: Path, temporary_folder: Path) -> None:
    for layout in ("pickles", "npz", "stored zips of npz"):
        source = read_imagenet(write_files(tmp_path / layout, DOWNSAMPLED[layout]))
        assert source.splits["train"][0].load().size
        assert not list(temporary_folder.iterdir())
    read_imagenet(write_files(tmp_path / "b", DOWNSAMPLED["zips of pickles"]))
    assert len([p for p in temporary_folder.rglob("*") if p.is_file() and not p.suffix]) == 3


def test_labels_are_read_without_pixels_and_rows_one_by_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = np.random.default_rng(0).integers(0, 256, (2000, 12288), np.uint8)  # 24.6 MB
    large = {"data": data, "labels": [1 + i % 1000 for i in range(2000)], "mean": data.mean(0)}
    np.savez(buffer := io.BytesIO(), **{k: np.asarray(v) for k, v in large.items()})
    small = pickled_batches(64)["val_data"]
    path = write_files(tmp_path / "a", {"train_data_batch_1": pickle.dumps(large, 3), "val_data": small})
    zipped = write_files(tmp_path / "b", {"train_data_batch_1.npz": buffer.getvalue(), "val_data": small})
    read: list[int] = []
    whole = storage.read_range
    monkeypatch.setattr(storage, "read_range", lambda url, *place: (read.append(place[1]), whole(url, *place))[1])
    for folder in (path, zipped):
        read.clear()
        items = read_imagenet(folder).splits["train"]
        assert sum(read) < data.nbytes / 2
        read.clear()
        loaded = items[1234].load()
        assert read == [12288]
        assert (items[1234].label, items[1999].label) == (234, 999)
        assert np.array_equal(loaded, data[1234].reshape(3, 64, 64).transpose(1, 2, 0))


def test_workers_that_start_together_unpack_once(
    tmp_path: Path, temporary_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    items = read_imagenet(write_files(tmp_path / "a", DOWNSAMPLED["zips of pickles"])).splits["train"]
    for path in temporary_folder.rglob("*"):
        if path.is_file():
            path.unlink()
    done, another, unpack = [], threading.Semaphore(0), ranges._unpack

    def unpack_when_another_comes(packed: Any, out: Any) -> None:
        done.append(packed.member)
        another.release()
        if len(done) == 1:
            another.acquire()
            another.acquire(timeout=0.3)  # no other may come before this one is done
        unpack(packed, out)

    monkeypatch.setattr(ranges, "_unpack", unpack_when_another_comes)
    with ThreadPoolExecutor(8) as pool:
        loaded = list(pool.map(lambda i: items[i % 3].load(), range(24)))
    assert all(np.array_equal(loaded[i], loaded[i % 3]) for i in range(24))
    assert done == ["Imagenet64_train_part1/train_data_batch_1"]


def test_a_folder_of_somebody_else_is_not_unpacked_to(
    tmp_path: Path, temporary_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_files(tmp_path / "a", DOWNSAMPLED["zips of pickles"])
    owner = os.getuid()
    (folder := temporary_folder / f"eiwtrain-unpacked-{owner + 1}").mkdir(mode=0o700)
    if owner == 0:  # a folder of root is accepted
        os.chown(folder, owner + 2, -1)
    monkeypatch.setattr(os, "getuid", lambda: owner + 1)
    with pytest.raises(storage.StorageError, match=r"TMPDIR: .*/eiwtrain-unpacked-\d+ belongs to somebody else"):
        read_imagenet(path).splits["train"][0].load()


def test_ten_batches_are_in_the_order_of_their_numbers(tmp_path: Path) -> None:
    source = read_imagenet(write_files(tmp_path / "a", pickled_batches(32, names=10)))
    names = [f"train_data_batch_{n}/{i}" for n in range(1, 11) for i in range(3)]
    items = source.splits["train"]
    assert [item.source for item in items] == names
    assert [item.source for item in items[-4:]] == names[-4:]
    assert items[-1].source == names[-1]
    with pytest.raises(IndexError):
        items[30]


def test_prepared_shards_hold_the_rows(tmp_path: Path) -> None:
    output = tmp_path / "set"
    path = write_files(tmp_path / "a", DOWNSAMPLED["zips of npz"])
    manifest = prepare("imagenet", str(output), 64, path=str(path), workers=1)
    assert manifest.preprocessing["params"]["source"]["variant"] == "downsampled-2017"
    side = load_sidecar(str(output), "val-000000.tar")
    data = (output / "val-000000.tar").read_bytes()
    for key, label, offset, size in zip(side.keys, side.labels, side.offsets, side.sizes, strict=True):
        with Image.open(io.BytesIO(data[offset : offset + size])) as image:
            assert np.array_equal(np.asarray(image), batch_pixels("val_data", 64)[int(key)].transpose(1, 2, 0))
        assert label == batch("val_data", 64)["labels"][int(key)] - 1


def test_downsampled_images_are_not_resized_again(tmp_path: Path) -> None:
    path = write_files(tmp_path / "a", DOWNSAMPLED["zips of npz"])
    with pytest.raises(DataError, match=r"downsampled to 64 pixels; use --resolution 64"):
        read_source("imagenet", 32, str(path))


def test_a_changed_zip_is_unpacked_again(tmp_path: Path) -> None:
    for value in (0, 7):
        files = {
            n: pickle.dumps(batch(n, 64) | {"data": np.full((3, 12288), value, np.uint8)}, 3) for n in batch_names(2)
        }
        path = write_files(tmp_path / "a", in_zips(files, 64, level=0))  # of the same size
        assert (read_imagenet(path).splits["val"][0].load() == value).all()


def _saved(**arrays: Any) -> bytes:
    np.savez(buffer := io.BytesIO(), **arrays)
    return buffer.getvalue()


def _wrong_npz(data: Any, labels: Any) -> Files:
    return npz_batches(32) | {"val_data.npz": _saved(data=data, labels=labels)}


ROWS = np.zeros((2, 3072), np.uint8)
WRONG: dict[str, tuple[Files, str]] = {
    "a batch missing": (
        {n: d for n, d in pickled_batches(32, names=3).items() if "batch_2" not in n},
        "train_data_batch_2 is missing beside",
    ),
    "no val_data": ({"train_data_batch_1": pickled_batches(32)["train_data_batch_1"]}, "val_data is missing"),
    "a batch twice": (pickled_batches(32) | npz_batches(32), r"is there twice, in .*train_data_batch_1 and in"),
    "two sizes of batches": (
        pickled_batches(32) | {"val_data": pickled_batches(64)["val_data"]},
        "32 pixels a side, val_data of 64",
    ),
    "labels from 0": (
        pickled_batches(32) | {"val_data": pickle.dumps(batch("val_data", 32) | {"labels": [0, 1, 2]})},
        "1 to 1000",
    ),
    "a pickle of something else": (
        pickled_batches(32) | {"val_data": pickle.dumps(partial(print))},
        "needs functools.partial",
    ),
    "a cut-off pickle": (
        pickled_batches(32) | {"val_data": pickled_batches(32)["val_data"][:-2000]},
        "val_data: .*cut off",
    ),
    "a cut-off npz": (
        npz_batches(32) | {"val_data.npz": npz_batches(32)["val_data.npz"][:-20]},
        "val_data.npz: not a zip",
    ),
    "an npz with labels of objects": (
        _wrong_npz(ROWS, np.array([1, None], object)),
        "its labels are not 2 integers",
    ),
    "an npz with data of objects": (_wrong_npz(np.array([1, None], object), [1, 2]), r"its data is object \(2,\)"),
    "an npz of columns": (
        _wrong_npz(np.asfortranarray(ROWS), [1, 2]),
        "rows do not lie in one piece; save it again in C",
    ),
    "an npz of floats": (_wrong_npz(ROWS / 255, [1, 2]), r"its data is float64 \(2, 3072\) .*, not uint8"),
    "an npz without labels": (
        npz_batches(32) | {"val_data.npz": _saved(data=ROWS)},
        "it holds no 'labels.npy', only 'data.npy'",
    ),
}


@pytest.mark.parametrize("what", WRONG)
def test_wrong_batches_are_refused_in_one_line(tmp_path: Path, what: str) -> None:
    files, message = WRONG[what]
    with pytest.raises(DataError, match=message) as caught:
        read_imagenet(write_files(tmp_path / "a", files))
    assert "\n" not in str(caught.value)
