"""CelebA: the official splits, the two squares in use, and downloads with parts missing or mixed up."""

from __future__ import annotations

import io
import json
import re
import tarfile
from collections.abc import Callable, Mapping
from pathlib import Path

import fsspec
import numpy as np
import pytest
from containers import write_files, zip_of
from PIL import Image

from data_prep import prepare
from data_prep.sources import celeba as module
from data_prep.sources.celeba import celeba
from eiwtrain.data.manifest import DataError

SPLITS = {"train": [1, 2, 5, 8], "val": [3, 7], "test": [4, 6, 9]}
NUMBERS = sorted(n for numbers in SPLITS.values() for n in numbers)
TEXT = "list_eval_partition.txt"


def _name(number: int) -> str:
    return f"{number:06d}.jpg"


def _face(number: int, size: tuple[int, int] = (178, 218)) -> bytes:
    """Make an image of blots that depends only on its number."""
    coarse = np.random.default_rng(number).integers(0, 256, (9, 7, 3), np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(coarse).resize(size, Image.Resampling.BILINEAR).save(buffer, "JPEG", quality=95)
    return buffer.getvalue()


def _partition(suffix: str) -> bytes:
    of = {n: i for i, numbers in enumerate(SPLITS.values()) for n in numbers}
    if suffix == ".csv":
        return ("image_id,partition\r\n" + "".join(f"{_name(n)},{of[n]}\r\n" for n in NUMBERS)).encode()
    return "".join(f"{_name(n)} {of[n]}\n" for n in NUMBERS).encode()


def _faces(folder: str) -> dict[str, bytes]:
    return {f"{folder}/{_name(n)}": _face(n) for n in NUMBERS}


def _folder(root: Path) -> Path:
    write_files(root, {**_faces("img_align_celeba"), TEXT: _partition(".txt")})
    return root / "img_align_celeba"


def _above(root: Path) -> Path:
    return _folder(root).parent


def _archive(root: Path) -> Path:
    write_files(root, {TEXT: _partition(".txt")})
    files = {**_faces("img_align_celeba"), "__MACOSX/._000001.jpg": b"junk"}
    return write_files(root, {"img_align_celeba.zip": zip_of(files)}) / "img_align_celeba.zip"


def _official(root: Path) -> Path:
    write_files(root, {f"Eval/{TEXT}": _partition(".txt")})
    zipped = {"img_align_celeba.zip": zip_of(_faces("img_align_celeba"))}
    return write_files(root / "Img", zipped) / "img_align_celeba.zip"


def _kaggle(root: Path) -> Path:
    csv = {"list_eval_partition.csv": _partition(".csv"), "list_attr_celeba.csv": b"image_id,Bald\n"}
    zipped = {"archive.zip": zip_of({**_faces("img_align_celeba/img_align_celeba"), **csv})}
    return write_files(root, zipped) / "archive.zip"


def _kaggle_unpacked(root: Path) -> Path:
    csv = {"list_eval_partition.csv": _partition(".csv")}
    write_files(root, {**_faces("img_align_celeba/img_align_celeba"), **csv})
    return root / "img_align_celeba" / "img_align_celeba"


LAYOUTS = [_folder, _above, _archive, _official, _kaggle, _kaggle_unpacked]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_official_splits_in_every_layout(tmp_path: Path, layout: Callable[[Path], Path]) -> None:
    source = celeba(str(layout(tmp_path)))
    assert list(source.splits) == ["train", "val", "test"]
    for split, items in source.splits.items():
        assert [item.source for item in items] == [_name(n) for n in SPLITS[split]]
        assert [item.load() for item in items] == [_face(n) for n in SPLITS[split]]
        assert [item.size for item in items] == [len(_face(n)) for n in SPLITS[split]]
        assert {item.label for item in items} == {-1}
    assert source.classes == ()
    assert not source.remote


@pytest.mark.parametrize(("crop", "top"), [("center", 35), ("realnvp", 40)])
def test_the_square_of_148_pixels_is_resized(tmp_path: Path, crop: str, top: int) -> None:
    path, output = _archive(tmp_path / "celeba"), tmp_path / "out"
    manifest = prepare("celeba", str(output), 64, path=str(path), of_source={"crop": crop}, workers=1)
    assert {name: split.samples for name, split in manifest.splits.items()} == {"train": 4, "val": 2, "test": 3}
    assert manifest.protocol == f"CelebA, 148 pixels from 15,{top} ({crop}), subset of 9 images"
    assert tuple(manifest.preprocessing["params"]["box"]) == (15, top, 163, top + 148)
    for split, numbers in SPLITS.items():
        with tarfile.open(output / f"{split}-000000.tar") as tar:
            members = tar.getmembers()
            assert len(members) == 2 * len(numbers)
            for image, about in zip(members[::2], members[1::2], strict=True):
                number = numbers[int(image.name.removesuffix(".png"))]
                assert json.load(tar.extractfile(about)) == {"label": -1, "source": _name(number)}  # type: ignore[arg-type]
                square = Image.open(io.BytesIO(_face(number))).crop((15, top, 163, top + 148))
                expected = np.asarray(square.resize((64, 64), Image.Resampling.BOX), int)
                with Image.open(tar.extractfile(image)) as made:  # type: ignore[arg-type]
                    assert np.abs(np.asarray(made, int) - expected).max() <= 2


def test_the_two_squares_differ(tmp_path: Path) -> None:
    path = str(_folder(tmp_path))
    assert celeba(path).box == celeba(path, "realnvp").box
    assert celeba(path).box != celeba(path, "center").box
    with pytest.raises(DataError, match=r"crop must be one of realnvp, center, not 'middle'$"):
        celeba(path, "middle")


def test_a_whole_celeba_is_no_subset(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "IMAGES", len(NUMBERS))
    source = celeba(str(_folder(tmp_path)))
    assert source.protocol == "CelebA, 148 pixels from 15,40 (realnvp)"
    assert source.params == {}


def test_absent_images_make_a_subset_that_is_named(tmp_path: Path) -> None:
    path = _folder(tmp_path)
    for number in SPLITS["val"]:
        (path / _name(number)).unlink()
    source = celeba(str(path))
    assert {split: len(items) for split, items in source.splits.items()} == {"train": 4, "test": 3}
    assert source.protocol.endswith(", subset of 7 images")
    assert source.params == {"absent": 2, "first_absent": _name(SPLITS["val"][0])}


def test_a_bucket_is_read_with_its_split_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_files(tmp_path / "memory:", {TEXT: _partition(".txt")})
    monkeypatch.chdir(tmp_path)  # a folder that must not be taken for what lies above a bucket
    bucket = fsspec.filesystem("memory")
    bucket.put(str(_above(tmp_path / "here")), "/celeba", recursive=True)
    try:
        for path in ("memory://celeba", "memory://celeba/img_align_celeba/"):
            source = celeba(path)
            assert source.remote
            assert [item.load() for item in source.splits["test"]] == [_face(n) for n in SPLITS["test"]]
        bucket.rm(f"/celeba/{TEXT}")
        with pytest.raises(DataError, match=f"{TEXT} is neither in it nor beside it"):
            celeba("memory://celeba")
    finally:
        bucket.rm("/celeba", recursive=True)


def test_a_wrong_celeba_is_refused_in_one_line(tmp_path: Path) -> None:
    def changed(name: str, files: Mapping[str, bytes]) -> str:
        _folder(tmp_path / name)
        write_files(tmp_path / name, files)
        return str(tmp_path / name)

    lost = _folder(tmp_path / "x" / "y" / "lost")
    (lost.parent / TEXT).unlink()
    write_files(tmp_path / "empty", {TEXT: _partition(".txt"), "a.png": b""})
    for path, message in [
        (str(lost), f"{TEXT} is neither in it nor beside it"),
        (str(tmp_path / "empty"), r"it holds no images \(000001.jpg"),
        (changed("strange", {"img_align_celeba/me.jpg": _face(0), "img_align_celeba/you.jpg": _face(0)}),
         "2 images are not named in the split file, the first of them me.jpg"),
        (changed("twice", {f"img_celeba/{_name(4)}": _face(4)}),
         "two images have one name, img_align_celeba/000004.jpg and img_celeba/000004.jpg"),
        (changed("wild", {f"img_align_celeba/{_name(1)}": _face(1, (409, 687))}),
         "000001.jpg is 409x687 pixels, not 178x218: give img_align_celeba"),
        (changed("line", {TEXT: _partition(".txt") + b"000010.jpg 3\n"}),
         f"{TEXT}, line 10: '000010.jpg 3' is not the name of an image and 0, 1 or 2"),
    ]:  # fmt: skip
        with pytest.raises(DataError, match=message) as caught:
            celeba(path)
        assert "\n" not in str(caught.value)


def test_a_broken_or_too_small_image_is_a_reject(tmp_path: Path) -> None:
    path = _folder(tmp_path / "celeba")
    (path / _name(1)).write_bytes(b"no image")
    (path / _name(2)).write_bytes(_face(2, (100, 100)))
    manifest = prepare("celeba", str(tmp_path / "out"), 16, path=str(path), max_rejects=0.5)
    assert manifest.splits["train"].samples == 2


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
def test_the_split_file_can_begin_with_a_mark_of_its_encoding(tmp_path: Path, encoding: str) -> None:
    folder = _folder(tmp_path)
    (tmp_path / TEXT).write_bytes(_partition(".txt").decode().encode(encoding))
    assert {split: len(items) for split, items in celeba(str(folder)).splits.items()} == {
        split: len(numbers) for split, numbers in SPLITS.items()
    }


@pytest.mark.parametrize(
    ("beside", "hint"),
    [
        (
            {"img_align_celeba.zip": b"PK", "img_celeba.7z": b"7z"},
            "packed: use --source {x}/img_align_celeba.zip",
        ),
        ({"Img/img_align_celeba.zip": b"PK", "Anno/a.txt": b""}, "use --source {x}/Img/img_align_celeba.zip"),
        ({"img_align_celeba.7z": b"7z"}, "unpack {x}/img_align_celeba.7z and give the folder of the images"),
    ],
)
def test_the_official_download_still_packed_is_named_with_what_works(
    tmp_path: Path, beside: dict[str, bytes], hint: str
) -> None:
    write_files(tmp_path, {TEXT: _partition(".txt"), **beside})
    with pytest.raises(DataError, match=f"no images .*{re.escape(hint.format(x=tmp_path))}$"):
        celeba(str(tmp_path))


def test_faces_that_are_only_links_are_rejects_and_other_files_are_counted(tmp_path: Path) -> None:
    folder = _folder(tmp_path)
    write_files(folder, {"notes.txt": b""})
    (folder / _name(1)).unlink()
    (folder / _name(1)).symlink_to("../.git/annex/objects/nowhere")
    source = celeba(str(folder))
    assert [item.flaw != "" for item in source.splits["train"]] == [True, False, False, False]
    assert [(kind.suffix, kind.files) for kind in source.left_out] == [(".txt", 1)]
    assert "git annex get" in source.notes[0]
