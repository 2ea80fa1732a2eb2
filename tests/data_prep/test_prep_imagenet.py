"""ImageNet: every layout is told from the others, gives the right images and labels, and is called what it is."""

from __future__ import annotations

import gzip
import io
import pickle
import tarfile
import threading
import uuid
import zipfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
import scipy.io
from batches import python2_pickle
from PIL import Image

from data_prep import prepare
from data_prep.formats import ranges
from data_prep.items import Source
from data_prep.sources import imagenet as module
from data_prep.sources import read_source
from data_prep.sources.imagenet import VARIANTS, describe, imagenet
from data_prep.splits import apply_rule
from eiwtrain import storage
from eiwtrain.data.manifest import DataError, load_manifest, load_sidecar

SYNSETS = ["n01440764", "n01443537", "n02110341"]
TRAIN = [(synset, f"{synset}_{i}.JPEG") for synset in SYNSETS for i in (3, 10)]
VAL = [(SYNSETS[i % 2], f"ILSVRC2012_val_{i + 1:08d}.JPEG") for i in (2, 0, 1)]  # not in order
VAL_LABELS = {name: SYNSETS.index(synset) for synset, name in VAL}

Files = dict[str, bytes]


@pytest.fixture(autouse=True)
def _own_temporary_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "temporary"))


@pytest.fixture
def bucket() -> Iterator[str]:
    url = f"memory://{uuid.uuid4().hex}"
    yield url
    storage.delete(url)


def _image(name: str, form: str = "JPEG", side: int = 40) -> bytes:
    """An image whose bytes tell its name."""
    buffer = io.BytesIO()
    seed = int.from_bytes(name.encode(), "big") % 2**32
    pixels = np.random.default_rng(seed).integers(0, 256, (side, side, 3), np.uint8)
    Image.fromarray(pixels).save(buffer, form)
    return buffer.getvalue()


def _write(root: Path, files: Files) -> Path:
    root.mkdir(parents=True, exist_ok=True)
    for name, data in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    return root


def _below(name: str, files: Files) -> Files:
    return {f"{name}/{n}": d for n, d in files.items()}


def _tar(files: Files) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


def _zip(files: Files, method: int, level: int | None = None) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", method, compresslevel=level) as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    return buffer.getvalue()


def _read(path: Any, **options: Any) -> Source:
    """The source as a worker gets it."""
    source: Source = pickle.loads(pickle.dumps(apply_rule(imagenet(str(path), **options))))
    return source


# --- the original


def _class_folders(split: str, images: list[tuple[str, str]]) -> Files:
    return {f"{split}/{synset}/{name}": _image(name) for synset, name in images}


def _class_tars() -> Files:
    return {
        f"{synset}.tar": _tar({name: _image(name) for s, name in reversed(TRAIN) if s == synset})
        for synset in reversed(SYNSETS)
    }


def _flat(prefix: str = "") -> Files:
    return {prefix + name: _image(name) for _, name in VAL}


def _devkit() -> Files:
    """Its numbers are in another order than the sorted synsets, and it knows groups of classes as well."""
    order = [SYNSETS[2], SYNSETS[0], SYNSETS[1], "n00000001"]
    meta = np.zeros(4, [("ILSVRC2012_ID", object), ("WNID", object), ("words", object)])
    for i, synset in enumerate(order):
        meta[i] = (i + 1, synset, "dog, animal")
    buffer = io.BytesIO()
    scipy.io.savemat(buffer, {"synsets": meta[:, None]})
    numbers = "".join(f"{order.index(synset) + 1}\n" for synset, _ in sorted(VAL, key=lambda v: v[1]))
    return {
        "ILSVRC2012_devkit_t12/data/ILSVRC2012_validation_ground_truth.txt": numbers.encode(),
        "ILSVRC2012_devkit_t12/data/meta.mat": buffer.getvalue(),
    }


def _kaggle_csv() -> bytes:
    lines = [f"{name.removesuffix('.JPEG')},{synset} 1 2 3 4 {synset} 5 6 7 8 \n" for synset, name in VAL]
    return ("ImageId,PredictionString\n" + "".join(lines)).encode()


BESIDE = {"test/ILSVRC2012_test_00000001.JPEG": b"", "train/notes.txt": b"x", "train/n01440764/list.txt": b"x"}
ORIGINALS = {
    "class folders": _class_folders("train", TRAIN) | _class_folders("val", VAL) | BESIDE,
    "class tars": {f"train/{n}": d for n, d in _class_tars().items()} | _class_folders("val", VAL) | BESIDE,
    "some classes unpacked": {f"train/{n}": d for n, d in _class_tars().items()}
    | _class_folders("train", TRAIN[2:])
    | _class_folders("val", VAL),
    "the published tars": {
        "ILSVRC2012_img_train.tar": _tar(_class_tars()),
        "ILSVRC2012_img_val.tar": _tar(_flat()),
        "ILSVRC2012_devkit_t12.tar.gz": gzip.compress(_tar(_devkit())),
    },
    "the published tars, devkit unpacked": {
        "ILSVRC2012_img_train.tar": _tar(_class_tars()),
        "ILSVRC2012_img_val.tar": _tar(_flat()),
    }
    | _devkit(),
    "Kaggle": _class_folders("ILSVRC/Data/CLS-LOC/train", TRAIN)
    | _flat("ILSVRC/Data/CLS-LOC/val/")
    | {"LOC_val_solution.csv": _kaggle_csv(), "ILSVRC/Data/CLS-LOC/test/ILSVRC2012_test_00000001.JPEG": b""},
}


def _check_original(source: Source, val_labels: dict[str, int] = VAL_LABELS) -> None:
    assert source.params == {"variant": "original"}
    assert source.classes == tuple(SYNSETS)
    expected = {
        "train": [(f"{synset}/{name}", SYNSETS.index(synset)) for synset, name in sorted(TRAIN)],
        "val": [(name, val_labels[name]) for _, name in sorted(VAL, key=lambda v: v[1])],
    }
    assert {s: [(i.source, i.label) for i in items] for s, items in source.splits.items()} == expected
    for items in source.splits.values():
        for item in items:
            assert item.load() == _image(item.source.rpartition("/")[2])
            assert item.size == len(item.load())


@pytest.mark.parametrize("layout", ORIGINALS)
def test_every_layout_of_the_original_gives_the_same_items(tmp_path: Path, bucket: str, layout: str) -> None:
    source = _read(_write(tmp_path / "a", ORIGINALS[layout]))
    _check_original(source)
    assert source.protocol == (
        "ImageNet 2012, resized here (a subset: 6 training and 3 validation images; not comparable with the "
        "downsampled sets of others)"
    )
    assert not source.remote
    for name, data in ORIGINALS[layout].items():
        fsspec.filesystem("memory").pipe_file(f"{bucket}/a/{name}", data)
    source = _read(f"{bucket}/a")
    _check_original(source)
    assert source.remote


@pytest.mark.parametrize("layout", ORIGINALS)
def test_a_whole_layout_can_lie_in_a_tar(tmp_path: Path, layout: str) -> None:
    (tmp_path / "all.tar").write_bytes(_tar(ORIGINALS[layout]))
    _check_original(_read(tmp_path / "all.tar"))


@pytest.mark.parametrize("layout", ["class folders", "Kaggle"])
def test_class_folders_can_lie_in_a_zip_and_tars_cannot(tmp_path: Path, layout: str) -> None:
    for method in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        (tmp_path / "all.zip").write_bytes(_zip(ORIGINALS[layout], method))
        _check_original(_read(tmp_path / "all.zip"))
    (tmp_path / "tars.zip").write_bytes(_zip(ORIGINALS["class tars"], zipfile.ZIP_STORED))
    with pytest.raises(DataError, match=r"train/n\d+.tar: inside a zip it cannot be read in place; unpack the zip"):
        _read(tmp_path / "tars.zip")


def test_shards_are_the_same_bytes_from_every_layout(tmp_path: Path) -> None:
    written = {}
    for i, (layout, files) in enumerate(ORIGINALS.items()):
        output = tmp_path / str(i) / "set"
        prepare("imagenet", str(output), 32, path=str(_write(tmp_path / layout, files)), workers=1)
        written[layout] = {p.name: p.read_bytes() for p in output.iterdir()}
    assert {"train-000000.tar", "val-000000.tar"} < set(written["Kaggle"])
    assert all(files == written["Kaggle"] for files in written.values())
    assert load_manifest(str(output)).protocol.startswith("ImageNet 2012, resized here")


@pytest.mark.parametrize("form", ["synsets", "numbers", "csv"])
def test_val_labels_come_from_a_file(tmp_path: Path, form: str) -> None:
    ordered = [synset for synset, _ in sorted(VAL, key=lambda v: v[1])]
    lines = {"synsets": ordered, "numbers": [str(SYNSETS.index(s)) for s in ordered], "csv": [_kaggle_csv().decode()]}
    labels = tmp_path / "labels.txt"
    labels.write_text("\n".join(lines[form]) + "\n")
    path = _write(tmp_path / "a", _class_folders("train", TRAIN) | _flat("val/"))
    _check_original(_read(path, val_labels=str(labels)))
    _check_original(_read(path), dict.fromkeys(VAL_LABELS, -1))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("0\n1\n", "2 lines for 3 validation images"),
        ("1\n2\n3\n", r"number from 0 to 2 in the order of the sorted synsets, not the numbers from 1"),
        ("tench\n" * 3, "each line must be a synset"),
        ("n09999999\n" * 3, "n09999999, but there are no training images"),
        (
            "ImageId,PredictionString\nILSVRC2012_val_00000001,n01440764 1 2 3 4\n",
            "no line for ILSVRC2012_val_00000002",
        ),
        ("", "0 lines for 3"),
        (None, "cannot be read: No such file"),
    ],
)
def test_val_labels_that_do_not_fit_are_refused(tmp_path: Path, text: str | None, message: str) -> None:
    if text is not None:
        (tmp_path / "labels.txt").write_text(text)
    path = _write(tmp_path / "a", _class_folders("train", TRAIN) | _flat("val/"))
    with pytest.raises(DataError, match=message) as caught:
        _read(path, val_labels=str(tmp_path / "labels.txt"))
    assert "\n" not in str(caught.value)


# --- downsampled in 2017


def _pixels(name: str, side: int, images: int = 3) -> np.ndarray:
    """uint8 (images, 3, side, side)."""
    return np.random.default_rng(len(name) + ord(name[-1])).integers(0, 256, (images, 3, side, side), np.uint8)


def _batch(name: str, side: int) -> dict[str, Any]:
    """As the authors' script makes it."""
    data = _pixels(name, side).reshape(3, -1)
    return {"data": data, "labels": [1, 1000, 1 + ord(name[-1])], "mean": data.mean(0)}


def _pickled(side: int, protocol: int = 3, names: int = 2) -> Files:
    return {n: pickle.dumps(_batch(n, side), protocol) for n in _names(names)}


def _names(number: int) -> list[str]:
    return [f"train_data_batch_{i}" for i in range(1, number + 1)] + ["val_data"]


def _npz(side: int, save: Any = np.savez) -> Files:
    files = {}
    for name in _names(2):
        save(buffer := io.BytesIO(), **{k: np.asarray(v) for k, v in _batch(name, side).items()})
        files[f"{name}.npz"] = buffer.getvalue()
    return files


def _in_zips(
    files: Files, side: int, suffix: str = "", method: int = zipfile.ZIP_DEFLATED, level: int | None = None
) -> Files:
    """As image-net.org ships them: two parts for training, each in a folder of its own."""
    zips = {
        f"Imagenet{side}_train_part{i}{suffix}.zip": {n: d for n, d in files.items() if f"batch_{i}" in n}
        for i in (1, 2)
    }
    zips[f"Imagenet{side}_val{suffix}.zip"] = {n: d for n, d in files.items() if n.startswith("val")}
    return {name: _zip(_below(name[:-4], inside), method, level) for name, inside in zips.items()}


DOWNSAMPLED = {
    "pickles": _pickled(32),
    "pickles in folders": {f"Imagenet32_{n[:5]}/{n}": d for n, d in _pickled(32).items()},
    "pickles in folders with the names of 2016": {f"train_32x32/{n}": d for n, d in _pickled(32).items()},
    "pickles by protocol 2": _pickled(32, 2),
    "pickles by protocol 5": _pickled(32, 5),
    "pickles of Python 2": {
        n: python2_pickle({k: v for k, v in _batch(n, 32).items() if k != "mean"}) for n in _names(2)
    },
    "npz": _npz(32),
    "compressed npz": _npz(32, np.savez_compressed),
    "zips of pickles": _in_zips(_pickled(64), 64),
    "zips of npz": _in_zips(_npz(64), 64, "_npz"),
    "zips of compressed npz": _in_zips(_npz(64, np.savez_compressed), 64, "_npz"),
    "stored zips of npz": _in_zips(_npz(64), 64, "_npz", zipfile.ZIP_STORED),
}


def _check_downsampled(source: Source, side: int) -> None:
    assert source.params == {"variant": "downsampled-2017", "side": side}
    assert (source.classes[0], source.classes[-1], len(source.classes)) == ("1", "1000", 1000)
    assert [len(items) for items in source.splits.values()] == [6, 3]
    for split, names in (("train", _names(2)[:2]), ("val", ["val_data"])):
        expected = [(n, i, label) for n in names for i, label in enumerate(_batch(n, side)["labels"])]
        for item, (name, i, label) in zip(source.splits[split], expected, strict=True):
            assert (item.source, item.label, item.size) == (f"{name}/{i}", label - 1, 3 * side**2)
            assert np.array_equal(item.load(), _pixels(name, side)[i].transpose(1, 2, 0))


@pytest.mark.parametrize("layout", DOWNSAMPLED)
def test_every_layout_of_downsampled_batches_gives_the_same_pixels(tmp_path: Path, bucket: str, layout: str) -> None:
    side = 64 if "zips" in layout else 32
    _check_downsampled(source := _read(_write(tmp_path / "a", DOWNSAMPLED[layout])), side)
    assert source.protocol == (
        f"ImageNet {side}x{side} downsampled by Chrabaszcz et al. 2017 (a subset: 6 training and 3 validation images; "
        "not comparable with van den Oord et al. 2016)"
    )
    for name, data in DOWNSAMPLED[layout].items():
        fsspec.filesystem("memory").pipe_file(f"{bucket}/a/{name}", data)
    _check_downsampled(source := _read(f"{bucket}/a"), side)
    assert source.remote


def test_only_what_is_compressed_is_unpacked(tmp_path: Path) -> None:
    folder = tmp_path / "temporary"
    for layout in ("pickles", "npz", "stored zips of npz"):
        source = _read(_write(tmp_path / layout, DOWNSAMPLED[layout]))
        assert source.splits["train"][0].load().size
        assert not list(folder.iterdir())
    _read(_write(tmp_path / "b", DOWNSAMPLED["zips of pickles"]))
    assert len([p for p in folder.rglob("*") if p.is_file() and not p.suffix]) == 3


def test_labels_are_read_without_the_pixels_and_rows_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = np.random.default_rng(0).integers(0, 256, (2000, 12288), np.uint8)  # 24.6 MB
    batch = {"data": data, "labels": [1 + i % 1000 for i in range(2000)], "mean": data.mean(0)}
    np.savez(buffer := io.BytesIO(), **{k: np.asarray(v) for k, v in batch.items()})
    small = _pickled(64)["val_data"]
    path = _write(tmp_path / "a", {"train_data_batch_1": pickle.dumps(batch, 3), "val_data": small})
    zipped = _write(tmp_path / "b", {"train_data_batch_1.npz": buffer.getvalue(), "val_data": small})
    read: list[int] = []
    whole = storage.read_range
    monkeypatch.setattr(storage, "read_range", lambda url, *place: (read.append(place[1]), whole(url, *place))[1])
    for folder in (path, zipped):
        read.clear()
        items = _read(folder).splits["train"]
        assert sum(read) < data.nbytes / 2
        read.clear()
        loaded = items[1234].load()
        assert read == [12288]
        assert (items[1234].label, items[1999].label) == (234, 999)
        assert np.array_equal(loaded, data[1234].reshape(3, 64, 64).transpose(1, 2, 0))


def test_workers_that_come_together_unpack_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    items = _read(_write(tmp_path / "a", DOWNSAMPLED["zips of pickles"])).splits["train"]
    for path in (tmp_path / "temporary").rglob("*"):
        if path.is_file():
            path.unlink()
    done, another, unpack = [], threading.Semaphore(0), ranges._unpack

    def unpack_when_another_comes(packed: Any, out: Any) -> None:
        done.append(packed.member)
        another.release()
        if len(done) == 1:
            another.acquire()
            another.acquire(timeout=0.3)  # nobody may come while this one has not done
        unpack(packed, out)

    monkeypatch.setattr(ranges, "_unpack", unpack_when_another_comes)
    with ThreadPoolExecutor(8) as pool:
        loaded = list(pool.map(lambda i: items[i % 3].load(), range(24)))
    assert all(np.array_equal(loaded[i], loaded[i % 3]) for i in range(24))
    assert done == ["Imagenet64_train_part1/train_data_batch_1"]


def test_ten_batches_are_in_the_order_of_their_numbers(tmp_path: Path) -> None:
    source = _read(_write(tmp_path / "a", _pickled(32, names=10)))
    names = [f"train_data_batch_{n}/{i}" for n in range(1, 11) for i in range(3)]
    items = source.splits["train"]
    assert [item.source for item in items] == names
    assert [item.source for item in items[-4:]] == names[-4:]
    assert items[-1].source == names[-1]
    with pytest.raises(IndexError):
        items[30]


def test_prepared_shards_hold_the_rows(tmp_path: Path) -> None:
    output = tmp_path / "set"
    path = _write(tmp_path / "a", DOWNSAMPLED["zips of npz"])
    manifest = prepare("imagenet", str(output), 64, path=str(path), workers=1)
    assert manifest.preprocessing["params"]["source"]["variant"] == "downsampled-2017"
    side = load_sidecar(str(output), "val-000000.tar")
    data = (output / "val-000000.tar").read_bytes()
    for key, label, offset, size in zip(side.keys, side.labels, side.offsets, side.sizes, strict=True):
        with Image.open(io.BytesIO(data[offset : offset + size])) as image:
            assert np.array_equal(np.asarray(image), _pixels("val_data", 64)[int(key)].transpose(1, 2, 0))
        assert label == _batch("val_data", 64)["labels"][int(key)] - 1


def test_resized_once_more_they_are_refused(tmp_path: Path) -> None:
    path = _write(tmp_path / "a", DOWNSAMPLED["zips of npz"])
    with pytest.raises(DataError, match=r"downsampled to 64 pixels; use --resolution 64"):
        read_source("imagenet", 32, str(path))


# --- downsampled in 2016


def _small(side: int) -> dict[str, Files]:
    return {
        name: {f"{i:07d}.png": _image(f"{name}{i}", "PNG", side) for i in range(1, n + 1)}
        for name, n in ((f"train_{side}x{side}", 4), (f"valid_{side}x{side}", 2))
    }


SMALL = {
    "tars": {f"{name}.tar": _tar(_below(name, files)) for name, files in _small(32).items()},
    "folders": {n: d for name, files in _small(32).items() for n, d in _below(name, files).items()},
    "tars and what came out": {n: d for name, files in _small(32).items() for n, d in _below(name, files).items()}
    | {f"{name}.tar": _tar(_below(name, {"9.png": b""})) for name in _small(32)},
    "folders in folders": {n: d for k, files in _small(32).items() for n, d in _below(f"{k}/{k}", files).items()},
}


@pytest.mark.parametrize("layout", SMALL)
def test_every_layout_of_the_sets_of_2016_gives_the_same_images(tmp_path: Path, layout: str) -> None:
    source = _read(_write(tmp_path / "a", SMALL[layout]))
    assert source.params == {"variant": "pixelrnn-2016", "side": 32}
    assert source.classes == ()
    assert source.protocol == (
        "ImageNet 32x32 downsampled by van den Oord et al. 2016 (a subset: 4 training and 2 validation images; not "
        "comparable with Chrabaszcz et al. 2017)"
    )
    expected = _small(32)
    for split, name in (("train", "train_32x32"), ("val", "valid_32x32")):
        assert {i.source: i.load() for i in source.splits[split]} == expected[name]
        assert all(i.label == -1 for i in source.splits[split])


# --- which is which


def test_the_number_of_validation_images_tells_the_variants_apart() -> None:
    assert describe("downsampled-2017", 64, 1_281_167, 50_000) == (
        "ImageNet 64x64 downsampled by Chrabaszcz et al. 2017 (50,000 validation images; not comparable with van den "
        "Oord et al. 2016)"
    )
    assert describe("pixelrnn-2016", 32, 1_281_149, 49_999) == (
        "ImageNet 32x32 downsampled by van den Oord et al. 2016 (49,999 validation images; not comparable with "
        "Chrabaszcz et al. 2017)"
    )
    assert describe("original", None, 1_281_167, 50_000).startswith("ImageNet 2012, resized here (50,000 validation")
    assert "a subset: 128,116 training and 50,000 validation" in describe("downsampled-2017", 64, 128_116, 50_000)
    for variant, wrong, right in (
        ("downsampled-2017", 49_999, "50,000"),
        ("original", 49_999, "50,000"),
        ("pixelrnn-2016", 50_000, "49,999"),
    ):
        with pytest.raises(DataError, match=f"has {right} validation images, but there are {wrong:,}, as in another"):
            describe(variant, 32, 1_281_167, wrong)


def test_a_layout_with_the_number_of_another_variant_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        module, "VARIANTS", {name: v._replace(val=3 if v.val == 50_000 else 2) for name, v in VARIANTS.items()}
    )
    _check_downsampled(_read(_write(tmp_path / "a", _pickled(32))), 32)
    _read(_write(tmp_path / "b", SMALL["tars"]))
    one_more = _small(32)["valid_32x32"] | {"0000003.png": _image("x", "PNG")}
    wrong = SMALL["tars"] | {"valid_32x32.tar": _tar(one_more)}
    with pytest.raises(DataError, match="has 2 validation images, but there are 3"):
        _read(_write(tmp_path / "c", wrong))


def _saved(**arrays: Any) -> bytes:
    np.savez(buffer := io.BytesIO(), **arrays)
    return buffer.getvalue()


def _wrong_npz(data: Any, labels: Any) -> Files:
    return _npz(32) | {"val_data.npz": _saved(data=data, labels=labels)}


ROWS = np.zeros((2, 3072), np.uint8)
WRONG: dict[str, tuple[Files, str]] = {
    "nothing": ({}, "not a known layout of ImageNet; these are: the original"),
    "class folders of another set": ({"train/cat/1.png": b"", "val/cat/2.png": b""}, "not a known layout of ImageNet"),
    "no validation images": (
        _class_folders("train", TRAIN),
        "without validation images; add val or ILSVRC2012_img_v",
    ),
    "training images outside class folders": (
        _class_folders("train", TRAIN) | _class_folders("val", VAL) | {"train/1.JPEG": b""},
        "1 training images are in no class folder; the first: 1.JPEG",
    ),
    "validation images half unpacked": (
        _class_folders("train", TRAIN) | _class_folders("val", VAL[:1]) | _flat("val/"),
        "some validation images are in class folders and some are not",
    ),
    "a batch missing": (
        {n: d for n, d in _pickled(32, names=3).items() if "batch_2" not in n},
        "train_data_batch_2 is missing beside",
    ),
    "no val_data": ({"train_data_batch_1": _pickled(32)["train_data_batch_1"]}, "val_data is missing"),
    "a batch twice": (_pickled(32) | _npz(32), r"is there twice, in .*train_data_batch_1 and in"),
    "two sizes of batches": (_pickled(32) | {"val_data": _pickled(64)["val_data"]}, "32 pixels a side, val_data of 64"),
    "labels from 0": (
        _pickled(32) | {"val_data": pickle.dumps(_batch("val_data", 32) | {"labels": [0, 1, 2]})},
        "1 to 1000",
    ),
    "a pickle of something else": (
        _pickled(32) | {"val_data": pickle.dumps(partial(print))},
        "needs functools.partial",
    ),
    "a cut-off pickle": (_pickled(32) | {"val_data": _pickled(32)["val_data"][:-2000]}, "val_data: .*cut off"),
    "a cut-off npz": (_npz(32) | {"val_data.npz": _npz(32)["val_data.npz"][:-20]}, "val_data.npz: not a zip"),
    "an npz with labels of objects": (
        _wrong_npz(ROWS, np.array([1, None], object)),
        "it holds no plain arrays",
    ),
    "an npz with data of objects": (_wrong_npz(np.array([1, None], object), [1, 2]), r"its data is object \(2,\)"),
    "an npz of columns": (
        _wrong_npz(np.asfortranarray(ROWS), [1, 2]),
        "rows do not lie in one piece; save it again in C",
    ),
    "an npz of floats": (_wrong_npz(ROWS / 255, [1, 2]), r"its data is float64 \(2, 3072\) .*, not uint8"),
    "an npz without labels": (
        _npz(32) | {"val_data.npz": _saved(data=ROWS)},
        "it holds no 'labels.npy', only 'data.npy'",
    ),
    "two sizes of small images": ({"train_32x32/1.png": b"", "valid_64x64/1.png": b""}, "side by side"),
    "no valid_32x32": ({"train_32x32/1.png": b""}, "valid_32x32, a folder or a .tar with images, is missing"),
}


@pytest.mark.parametrize("what", WRONG)
def test_what_cannot_be_imagenet_is_refused_in_one_line(tmp_path: Path, what: str) -> None:
    files, message = WRONG[what]
    with pytest.raises(DataError, match=message) as caught:
        _read(_write(tmp_path / "a", files))
    assert "\n" not in str(caught.value)


def test_val_labels_play_no_part_where_labels_are_known(tmp_path: Path) -> None:
    for files in (ORIGINALS["class folders"], DOWNSAMPLED["npz"], SMALL["tars"]):
        with pytest.raises(DataError, match="val labels"):
            _read(_write(tmp_path / uuid.uuid4().hex, files), val_labels="labels.txt")


def test_a_changed_zip_is_unpacked_again(tmp_path: Path) -> None:
    for value in (0, 7):
        files = {n: pickle.dumps(_batch(n, 64) | {"data": np.full((3, 12288), value, np.uint8)}, 3) for n in _names(2)}
        path = _write(tmp_path / "a", _in_zips(files, 64, level=0))  # of the same size
        assert (_read(path).splits["val"][0].load() == value).all()
