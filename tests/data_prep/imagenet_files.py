"""Every layout of ImageNet, in small: the original, and as downsampled in 2017 and in 2016."""

from __future__ import annotations

import gzip
import io
import pickle
import zipfile
from typing import Any

import numpy as np
import scipy.io
from batches import python2_pickle
from containers import Files, below, tar_of, zip_of
from PIL import Image

from data_prep.items import Source
from data_prep.sources.imagenet import imagenet
from data_prep.splits import apply_rule

SYNSETS = ["n01440764", "n01443537", "n02110341"]
TRAIN = [(synset, f"{synset}_{i}.JPEG") for synset in SYNSETS for i in (3, 10)]
VAL = [(SYNSETS[i % 2], f"ILSVRC2012_val_{i + 1:08d}.JPEG") for i in (2, 0, 1)]  # not in order
VAL_LABELS = {name: SYNSETS.index(synset) for synset, name in VAL}


def image_file(name: str, form: str = "JPEG", side: int = 40) -> bytes:
    """Make an image that depends only on its name."""
    buffer = io.BytesIO()
    seed = int.from_bytes(name.encode(), "big") % 2**32
    pixels = np.random.default_rng(seed).integers(0, 256, (side, side, 3), np.uint8)
    Image.fromarray(pixels).save(buffer, form)
    return buffer.getvalue()


def class_folders(split: str, images: list[tuple[str, str]]) -> Files:
    return {f"{split}/{synset}/{name}": image_file(name) for synset, name in images}


def class_tars() -> Files:
    return {
        f"{synset}.tar": tar_of({name: image_file(name) for s, name in reversed(TRAIN) if s == synset})
        for synset in reversed(SYNSETS)
    }


def flat_folder(prefix: str = "") -> Files:
    return {prefix + name: image_file(name) for _, name in VAL}


def devkit() -> Files:
    """Make a development kit; its numbers are not in the order of the sorted synsets, and it also has groups."""
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


def kaggle_csv() -> bytes:
    lines = [f"{name.removesuffix('.JPEG')},{synset} 1 2 3 4 {synset} 5 6 7 8 \n" for synset, name in VAL]
    return ("ImageId,PredictionString\n" + "".join(lines)).encode()


BESIDE = {"test/ILSVRC2012_test_00000001.JPEG": b"", "train/notes.txt": b"x", "train/n01440764/list.txt": b"x"}
ORIGINALS = {
    "class folders": class_folders("train", TRAIN) | class_folders("val", VAL) | BESIDE,
    "class tars": {f"train/{n}": d for n, d in class_tars().items()} | class_folders("val", VAL) | BESIDE,
    "some classes unpacked": {f"train/{n}": d for n, d in class_tars().items()}
    | class_folders("train", TRAIN[2:])
    | class_folders("val", VAL),
    "the published tars": {
        "ILSVRC2012_img_train.tar": tar_of(class_tars()),
        "ILSVRC2012_img_val.tar": tar_of(flat_folder()),
        "ILSVRC2012_devkit_t12.tar.gz": gzip.compress(tar_of(devkit())),
    },
    "the published tars, devkit unpacked": {
        "ILSVRC2012_img_train.tar": tar_of(class_tars()),
        "ILSVRC2012_img_val.tar": tar_of(flat_folder()),
    }
    | devkit(),
    "Kaggle": class_folders("ILSVRC/Data/CLS-LOC/train", TRAIN)
    | flat_folder("ILSVRC/Data/CLS-LOC/val/")
    | {"LOC_val_solution.csv": kaggle_csv(), "ILSVRC/Data/CLS-LOC/test/ILSVRC2012_test_00000001.JPEG": b""},
}


def batch_pixels(name: str, side: int, images: int = 3) -> np.ndarray:
    """Return uint8 (images, 3, side, side), which depend only on the batch's name."""
    return np.random.default_rng(len(name) + ord(name[-1])).integers(0, 256, (images, 3, side, side), np.uint8)


def batch(name: str, side: int) -> dict[str, Any]:
    """Make a batch as the authors' script does."""
    data = batch_pixels(name, side).reshape(3, -1)
    return {"data": data, "labels": [1, 1000, 1 + ord(name[-1])], "mean": data.mean(0)}


def pickled_batches(side: int, protocol: int = 3, names: int = 2) -> Files:
    return {n: pickle.dumps(batch(n, side), protocol) for n in batch_names(names)}


def batch_names(number: int) -> list[str]:
    return [f"train_data_batch_{i}" for i in range(1, number + 1)] + ["val_data"]


def npz_batches(side: int, save: Any = np.savez) -> Files:
    files = {}
    for name in batch_names(2):
        save(buffer := io.BytesIO(), **{k: np.asarray(v) for k, v in batch(name, side).items()})
        files[f"{name}.npz"] = buffer.getvalue()
    return files


def in_zips(
    files: Files, side: int, suffix: str = "", method: int = zipfile.ZIP_DEFLATED, level: int | None = None
) -> Files:
    """Zip batches as image-net.org ships them: two parts for training, each in a folder of its own."""
    zips = {
        f"Imagenet{side}_train_part{i}{suffix}.zip": {n: d for n, d in files.items() if f"batch_{i}" in n}
        for i in (1, 2)
    }
    zips[f"Imagenet{side}_val{suffix}.zip"] = {n: d for n, d in files.items() if n.startswith("val")}
    return {name: zip_of(below(name[:-4], inside), method, level) for name, inside in zips.items()}


DOWNSAMPLED = {
    "pickles": pickled_batches(32),
    "pickles in folders": {f"Imagenet32_{n[:5]}/{n}": d for n, d in pickled_batches(32).items()},
    "pickles in folders with the names of 2016": {f"train_32x32/{n}": d for n, d in pickled_batches(32).items()},
    "pickles by protocol 2": pickled_batches(32, 2),
    "pickles by protocol 5": pickled_batches(32, 5),
    "pickles of Python 2": {
        n: python2_pickle({k: v for k, v in batch(n, 32).items() if k != "mean"}) for n in batch_names(2)
    },
    "npz": npz_batches(32),
    "compressed npz": npz_batches(32, np.savez_compressed),
    "zips of pickles": in_zips(pickled_batches(64), 64),
    "zips of npz": in_zips(npz_batches(64), 64, "_npz"),
    "zips of compressed npz": in_zips(npz_batches(64, np.savez_compressed), 64, "_npz"),
    "stored zips of npz": in_zips(npz_batches(64), 64, "_npz", zipfile.ZIP_STORED),
}


def small_images(side: int) -> dict[str, Files]:
    return {
        name: {f"{i:07d}.png": image_file(f"{name}{i}", "PNG", side) for i in range(1, n + 1)}
        for name, n in ((f"train_{side}x{side}", 4), (f"valid_{side}x{side}", 2))
    }


SMALL = {
    "tars": {f"{name}.tar": tar_of(below(name, files)) for name, files in small_images(32).items()},
    "folders": {n: d for name, files in small_images(32).items() for n, d in below(name, files).items()},
    "tars and what came out": {n: d for name, files in small_images(32).items() for n, d in below(name, files).items()}
    | {f"{name}.tar": tar_of(below(name, {"9.png": b""})) for name in small_images(32)},
    "folders in folders": {n: d for k, files in small_images(32).items() for n, d in below(f"{k}/{k}", files).items()},
}


def read_imagenet(path: Any, **options: Any) -> Source:
    """Return the source as a worker gets it."""
    source: Source = pickle.loads(pickle.dumps(apply_rule(imagenet(str(path), **options))))
    return source
