"""The `celeba` source: CelebA's aligned and cropped faces (img_align_celeba, 178x218 JPEG) and its official splits."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterable, Sequence

from PIL import Image

from data_prep.formats.files import FoundFile, list_files
from data_prep.items import Item, Source
from data_prep.listing import ARCHIVES, count_others, flaw_of, notes_on_lost, take_lost
from data_prep.text import decode_text
from eiwtrain import storage
from eiwtrain.data.image_formats import image_formats
from eiwtrain.data.left_out import suffix_of
from eiwtrain.data.manifest import DataError

CROPS = {"realnvp": (15, 40, 163, 188), "center": (15, 35, 163, 183)}
SPLITS = ("train", "val", "test")
IMAGES = 202_599  # 162,770 for training, 19,867 for validation, 19,962 for the test
_SIZE = (178, 218)  # width and height, in pixels
_SPLIT_FILES = ("list_eval_partition.txt", "list_eval_partition.csv")


def celeba(path: str, crop: str = "realnvp") -> Source:
    """List the faces in the order of their names, without labels; a square of 148 pixels of each is used.

    Two squares are in use, 5 pixels apart; bits/dim on one are not comparable with those on the other:

    - `center`: left 15, top 35, as torchvision's CenterCrop(148) cuts (github.com/AntixK/PyTorch-VAE, dataset.py).
    - `realnvp`: left 15, top 40, as in RealNVP (github.com/tensorflow/models,
      research/real_nvp/real_nvp_multiscale_dataset.py), VAE/GAN (github.com/andersbll/autoencoding_beyond_pixels,
      dataset/celeba.py) and NVAE (github.com/NVlabs/NVAE, datasets.py, CropCelebA64).

    Args:
        path: the folder, tar or zip of the images, at any URL: `img_align_celeba`, `img_align_celeba.zip`, or Kaggle's
            archive. The official split file (0 train, 1 val, 2 test), `list_eval_partition.txt` or Kaggle's `.csv`, is
            in it, beside it, or, as in the official folders, under `Eval` next to `Img`.
        crop: a key of `CROPS`.

    Raises:
        DataError: there are no images, or not the aligned ones; there is no split file, or it does not name all of the
            images (images that it names can be absent; the protocol then says so).
        StorageError: the path cannot be reached.
    """
    if crop not in CROPS:
        raise DataError(f"crop must be one of {', '.join(CROPS)}, not '{crop}'")
    path = storage.absolute(path)
    others: list[FoundFile] = []
    entries, rest = take_lost(list_files(path, (".jpg", *_SPLIT_FILES), others), others)
    images = _by_name(path, [entry for entry in entries if entry.parts[-1] not in _SPLIT_FILES], rest)
    split_of = _read_splits(*_split_file(path, (entry for entry in entries if entry.parts[-1] in _SPLIT_FILES)))
    if strange := sorted(images.keys() - split_of.keys()):
        raise DataError(
            f"source {path}: {len(strange):,} images are not named in the split file, the first of them {strange[0]}"
        )
    _check_aligned(path, images)
    splits: dict[str, list[Item]] = {split: [] for split in SPLITS}
    for name, entry in sorted(images.items()):
        splits[split_of[name]].append(Item(-1, name, entry.size, entry.load, flaw_of(entry)))
    left, top, *_ = CROPS[crop]
    protocol = f"CelebA, 148 pixels from {left},{top} ({crop})"
    if len(images) != IMAGES:
        protocol += f", subset of {len(images):,} images"
    absent = sorted(split_of.keys() - images.keys())
    return Source(
        "celeba",
        {split: items for split, items in splits.items() if items},
        protocol=protocol,
        box=CROPS[crop],
        remote=not storage.is_local(path),
        params={"absent": len(absent), "first_absent": absent[0]} if absent else {},
        notes=tuple(notes_on_lost(images.values())),
        left_out=count_others(rest),
    )


def _by_name(path: str, entries: Sequence[FoundFile], others: Sequence[FoundFile]) -> dict[str, FoundFile]:
    images: dict[str, FoundFile] = {}
    for entry in entries:
        same = images.setdefault(entry.parts[-1], entry)
        if same is not entry:
            both = f"{'/'.join(same.parts)} and {'/'.join(entry.parts)}"
            raise DataError(f"source {path}: two images have one name, {both}; give the folder of the aligned images")
    if not images:
        raise DataError(f"source {path}: it holds no images (000001.jpg and so on){_packed(path, others)}")
    return images


def _packed(path: str, others: Iterable[FoundFile]) -> str:
    """Return which of the archives in the source to give instead, if there are any."""
    packed = sorted(("/".join(file.parts) for file in others if suffix_of(file.parts[-1]) in ARCHIVES), key=_unlikely)
    if not packed:
        return ""
    url = storage.join(path, packed[0])
    if packed[0].endswith((".zip", ".tar")):
        return f"; they are still packed: use --source {url}"
    return f"; unpack {url} and give the folder of the images"


def _unlikely(name: str) -> tuple[bool, bool, str]:
    """Return a key by which the archive of the aligned images comes first."""
    return not name.rpartition("/")[2].startswith("img_align_celeba"), not name.endswith((".zip", ".tar")), name


def _split_file(path: str, inside: Iterable[FoundFile]) -> tuple[str, bytes]:
    """Return the name of the split file and its content."""
    for entry in inside:
        return "/".join(entry.parts), entry.load()
    for folder in (path.rsplit("/", n)[0] for n in (1, 2)):
        if storage.is_local(folder) != storage.is_local(path):
            break  # there is nothing above a bucket
        for name in _SPLIT_FILES:
            for url in (storage.join(folder, name), storage.join(folder, "Eval", name)):
                with contextlib.suppress(FileNotFoundError):
                    return url, storage.read_bytes(url)
    raise DataError(
        f"source {path}: {_SPLIT_FILES[0]} is neither in it nor beside it; this file of CelebA defines the splits"
    )


def _read_splits(where: str, text: bytes) -> dict[str, str]:
    """Return the split of every image that the file names."""
    split_of = {}
    for number, line in enumerate(decode_text(text, where).replace(",", " ").splitlines(), 1):
        match line.split():
            case [name, ("0" | "1" | "2") as split]:
                split_of[name] = SPLITS[int(split)]
            case [] | ["image_id", "partition"]:
                pass
            case _:
                raise DataError(f"{where}, line {number}: '{line:.60}' is not the name of an image and 0, 1 or 2")
    return split_of


def _check_aligned(path: str, images: dict[str, FoundFile]) -> None:
    """Check the size of the first image: of the photographs that the faces come from, the crop would cut anything."""
    name = min((name for name, file in images.items() if not file.flaw), default="")
    if not name:
        return
    try:
        with Image.open(io.BytesIO(images[name].load()), formats=image_formats()) as image:
            size = image.size
    except OSError:  # not an image: a reject
        return
    if size != _SIZE:
        raise DataError(
            f"source {path}: {name} is {size[0]}x{size[1]} pixels, not {_SIZE[0]}x{_SIZE[1]}: give img_align_celeba, "
            "the aligned and cropped images"
        )
