"""CIFAR-10: the python and the binary batches, as archives and as folders, give the same images and labels."""

from __future__ import annotations

import gzip
import io
import pickle
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
from batches import python2_pickle
from containers import Files, below, tar_of, write_files
from PIL import Image

from data_prep import prepare
from data_prep.formats import ranges
from data_prep.formats.unpickle import load_batch
from data_prep.sources import read_source
from eiwtrain.data.manifest import DataError, load_sidecar
from eiwtrain.storage import StorageError

NAMES = [f"data_batch_{n}" for n in range(1, 6)] + ["test_batch"]
CLASSES = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
IMAGES = 4  # a batch

pytestmark = pytest.mark.usefixtures("temporary_folder")


def _pixels(name: str) -> np.ndarray:
    """Return uint8 (IMAGES, 3, 32, 32), which depend only on the batch's name."""
    return np.random.default_rng(NAMES.index(name)).integers(0, 256, (IMAGES, 3, 32, 32), np.uint8)


def _labels(name: str) -> list[int]:
    return [(3 * NAMES.index(name) + i) % 10 for i in range(IMAGES)]


def _python(make: Any = python2_pickle, order: Any = "C") -> Files:
    files = {
        name: make(
            {
                "batch_label": "a batch",
                "labels": _labels(name),
                "data": np.asarray(_pixels(name).reshape(IMAGES, -1), order=order),
                "filenames": [f"{i}.png" for i in range(IMAGES)],
            }
        )
        for name in NAMES
    }
    return files | {"batches.meta": make({"label_names": CLASSES, "num_vis": 3072}), "readme.html": b"<html>"}


def _binary() -> Files:
    files = {
        f"{name}.bin": b"".join(
            bytes([label]) + image.tobytes() for label, image in zip(_labels(name), _pixels(name), strict=True)
        )
        for name in NAMES
    }
    return files | {"batches.meta.txt": "\n".join(CLASSES).encode() + b"\n\n", "readme.html": b"<html>"}


def _check(path: str, remote: bool = False) -> None:
    """Check every row of every batch, as a worker gets it."""
    source = pickle.loads(pickle.dumps(read_source("cifar10", 32, path)))
    assert list(source.splits) == ["train", "test"]
    assert (source.classes, source.remote) == (tuple(CLASSES), remote)
    items = [*source.splits["train"], *source.splits["test"]]
    rows = [(name, i) for name in NAMES for i in range(IMAGES)]
    assert len(source.splits["train"]) == 5 * IMAGES
    for item, (name, i) in zip(items, rows, strict=True):
        assert (item.source, item.label, item.size) == (f"{name}/{i}", _labels(name)[i], 3072)
        loaded = item.load()
        assert loaded.shape == (32, 32, 3)
        assert np.array_equal(loaded, _pixels(name)[i].transpose(1, 2, 0))


LAYOUTS = {
    "cifar-10-batches-py": _python(),
    "cifar-10-batches-bin": _binary(),
    "pickled again by protocol 2": _python(lambda batch: pickle.dumps(batch, 2)),
    "pickled again by protocol 5": _python(lambda batch: pickle.dumps(batch, 5)),
    "keys of bytes": _python(lambda batch: pickle.dumps({k.encode(): v for k, v in batch.items()}, 4)),
    "columns in one piece": _python(order="F"),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_gives_the_same_images_in_folders_and_archives(tmp_path: Path, layout: str) -> None:
    files = LAYOUTS[layout]
    _check(str(write_files(tmp_path / "inside", files)))
    _check(str(write_files(tmp_path / "above" / "cifar-10-batches", files).parent))
    tar = tar_of(below("cifar-10-batches", files))
    _check(str(write_files(tmp_path / "a", {"cifar10.tar": tar}) / "cifar10.tar"))
    name = "cifar-10-binary.tar.gz" if layout.endswith("bin") else "cifar-10-python.tar.gz"
    zipped = write_files(tmp_path / "b", {name: gzip.compress(tar)})
    _check(str(zipped / name))
    _check(str(zipped))


@pytest.mark.parametrize("layout", ["cifar-10-batches-py", "cifar-10-batches-bin"])
def test_batches_and_archives_are_read_from_any_url(bucket: str, layout: str) -> None:
    fs = fsspec.filesystem("memory")
    for name, data in LAYOUTS[layout].items():
        fs.pipe_file(f"{bucket}/folder/{layout}/{name}", data)
    fs.pipe_file(f"{bucket}/c.tar.gz", gzip.compress(tar_of(below(layout, LAYOUTS[layout]))))
    _check(f"{bucket}/folder", remote=True)
    _check(f"{bucket}/c.tar.gz", remote=True)


def test_an_archive_is_unpacked_once_a_machine_and_again_if_changed(tmp_path: Path, temporary_folder: Path) -> None:
    path = tmp_path / "c.tar.gz"
    path.write_bytes(gzip.compress(tar_of(below("py", _python()))))
    item = read_source("cifar10", 32, str(path)).splits["train"][0]
    (unpacked,) = [p for p in temporary_folder.rglob("*") if p.is_file() and not p.suffix]
    before = unpacked.stat().st_mtime_ns
    _check(str(path))
    assert unpacked.stat().st_mtime_ns == before
    unpacked.unlink()  # as on another machine
    assert np.array_equal(item.load(), _pixels("data_batch_1")[0].transpose(1, 2, 0))
    path.write_bytes(gzip.compress(tar_of(below("bin", _binary())), compresslevel=0))
    _check(str(path))


@pytest.mark.parametrize("planted", ["before", "a flipped bit", "emptied", "a link", "a link for the part"])
def test_a_file_in_place_of_an_unpacked_one_is_not_its_content(
    tmp_path: Path, temporary_folder: Path, planted: str
) -> None:
    path = tmp_path / "c.tar.gz"
    path.write_bytes(gzip.compress(tar_of(below("py", _python()))))
    read_source("cifar10", 32, str(path))
    (unpacked,) = [p for p in temporary_folder.rglob("*") if p.is_file() and not p.suffix]
    ranges._known.clear()  # as in another process
    data = unpacked.read_bytes()
    (precious := tmp_path / "precious").write_bytes(bytes(len(data)))
    if planted == "before":
        unpacked.with_suffix(".sha256").unlink()
        unpacked.write_bytes(bytes(len(data)))
    elif planted == "a flipped bit":
        unpacked.write_bytes(data[:2000] + bytes([data[2000] ^ 1]) + data[2001:])
    elif planted == "emptied":
        unpacked.write_bytes(b"")
    else:
        unpacked.unlink()
        unpacked.with_suffix(".part" if "part" in planted else "").symlink_to(precious)
    _check(str(path))
    assert unpacked.read_bytes() == data
    assert not unpacked.is_symlink()
    assert precious.read_bytes() == bytes(len(data))


def test_a_changed_batch_of_columns_is_unpacked_again(tmp_path: Path) -> None:
    for value in (0, 7):
        data = np.full((3072, IMAGES), value, np.uint8).T
        files = _python() | {"test_batch": python2_pickle({"data": data, "labels": [0] * IMAGES})}
        item = read_source("cifar10", 32, str(write_files(tmp_path / "c", files))).splits["test"][0]
        assert (item.load() == value).all()


@pytest.mark.parametrize("layout", ["cifar-10-batches-py", "cifar-10-batches-bin"])
def test_prepared_shards_hold_the_pixels_and_labels(tmp_path: Path, layout: str) -> None:
    path = write_files(tmp_path / layout, LAYOUTS[layout])
    output = tmp_path / "set"
    manifest = prepare("cifar10", str(output), 32, path=str(path), workers=1)
    assert {name: split.samples for name, split in manifest.splits.items()} == {"train": 5 * IMAGES, "test": IMAGES}
    assert manifest.classes == tuple(CLASSES)
    side = load_sidecar(str(output), "test-000000.tar")
    data = (output / "test-000000.tar").read_bytes()
    for key, label, offset, size in zip(side.keys, side.labels, side.offsets, side.sizes, strict=True):
        number = int(key)
        with Image.open(io.BytesIO(data[offset : offset + size])) as image:
            assert np.array_equal(np.asarray(image), _pixels("test_batch")[number].transpose(1, 2, 0))
        assert label == _labels("test_batch")[number]


def _without(files: Files, name: str) -> Files:
    return {n: data for n, data in files.items() if n != name}


def _changed(name: str, **values: Any) -> Files:
    files = _python()
    batch = load_batch(files[name], name)
    return files | {name: python2_pickle(batch | values)}


WRONG: dict[str, tuple[Files, str]] = {
    "nothing": ({"notes.txt": b"x"}, r"it holds no batches of CIFAR-10, .*cifar-10-python.tar.gz"),
    "a batch missing": (_without(_python(), "data_batch_3"), "data_batch_3 is missing"),
    "no names": (_without(_binary(), "batches.meta.txt"), "batches.meta.txt is missing"),
    "the test batch missing": (_without(_binary(), "test_batch.bin"), "test_batch.bin is missing"),
    "a cut-off binary batch": (
        _binary() | {"data_batch_2.bin": bytes(3073 + 100)},
        "3173 bytes are not a whole",
    ),
    "a short binary batch": (_binary() | {"data_batch_2.bin": bytes(3073)}, "data_batch_2 1, .*is one cut off"),
    "a cut-off python batch": (
        _python() | {"data_batch_2": _python()["data_batch_2"][:5000]},
        "data_batch_2: .*damaged",
    ),
    "a label too large": (_changed("test_batch", labels=[0, 1, 2, 10]), "test_batch: labels from 0 to 10"),
    "too few labels": (_changed("test_batch", labels=[0, 1, 2]), "its labels are not 4 integers"),
    "labels of lists": (_changed("test_batch", labels=[[0], [1, 2], [], []]), "its labels are not 4 integers"),
    "labels of text": (_changed("test_batch", labels=["a"] * 4), "its labels are not 4 integers"),
    "other pixels": (_changed("test_batch", data=np.zeros((4, 12288), np.uint8)), "images of 64x64 pixels"),
    "an odd width": (_changed("test_batch", data=np.zeros((4, 3000), np.uint8)), r"not uint8 \(N, 3 \* side \* side\)"),
    "no data": (_python() | {"test_batch": python2_pickle({"labels": [1]})}, "it holds no 'data', only 'labels'"),
    "nine names": (_changed("batches.meta", label_names=CLASSES[:9]), "does not hold the names of 10 classes"),
    "a pickle of something else": (_python() | {"test_batch": pickle.dumps(Path("x"))}, "needs pathlib"),
}


@pytest.mark.parametrize("what", WRONG)
def test_what_is_not_cifar10_is_refused_in_one_line(tmp_path: Path, what: str) -> None:
    files, message = WRONG[what]
    with pytest.raises(DataError, match=message) as caught:
        read_source("cifar10", 32, str(write_files(tmp_path / "c", files)))
    assert "\n" not in str(caught.value)


def test_broken_archives_are_refused_in_one_line(tmp_path: Path) -> None:
    whole = gzip.compress(tar_of(below("py", _python())))
    for data in (
        b"",
        b"no archive at all, but long enough",
        whole[: len(whole) // 2],
        whole[:5000] + bytes(9) + whole[5009:],
    ):
        (tmp_path / "c.tar.gz").write_bytes(data)
        with pytest.raises((DataError, StorageError), match=r"c.tar.gz: (not a gzip file|the gzip file is damaged)"):
            read_source("cifar10", 32, str(tmp_path / "c.tar.gz"))
    with pytest.raises(DataError, match="no such file"):
        read_source("cifar10", 32, str(tmp_path / "absent.tar.gz"))


@pytest.mark.parametrize("protocol", [2, 4, 5])
def test_batches_that_python_3_has_pickled_again_with_bytes_as_names(tmp_path: Path, protocol: int) -> None:
    def again(batch: dict[str, Any]) -> bytes:
        """Pickle as after loading with encoding="bytes"."""
        asbytes = {
            key.encode(): [v.encode() if isinstance(v, str) else v for v in value] if isinstance(value, list) else value
            for key, value in batch.items()
        }
        return pickle.dumps(asbytes, protocol)

    source = read_source("cifar10", 32, str(write_files(tmp_path, _python(again))))
    assert source.classes == tuple(CLASSES)
    assert [item.label for item in source.splits["test"]] == _labels("test_batch")
    assert [(kind.suffix, kind.first) for kind in source.left_out] == [(".html", "readme.html")]
