"""The folder source loses nothing without a word: every file is an image, a reject, or counted with its reason."""

from __future__ import annotations

import io
import json
import re
import unicodedata
from pathlib import Path

import pytest
from containers import Files, tar_of, write_files, zip_of
from PIL import Image

from data_prep import prepare
from data_prep.__main__ import main
from data_prep.items import Source
from data_prep.sources import read_source
from eiwtrain.data.left_out import FOLDER, LeftOut, count_left_out, left_out_table
from eiwtrain.data.manifest import DataError, load_manifest, load_sidecar, manifest_from_json

SHOWN = ("left out:", "no suffix of an image", "hidden")


def _image(kind: str = "PNG", value: int = 0) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), (value, 9, 9)).save(buffer, kind)
    return buffer.getvalue()


def _images(*names: str) -> Files:
    return {name: _image(value=n) for n, name in enumerate(names)}


def _read(path: Path, split: str = "own") -> Source:
    return read_source("folder", 8, str(path), split=split)


def _labels(source: Source) -> dict[str, list[str]]:
    """Return the class of each image by split, "" for none."""
    return {
        split: [source.classes[item.label] if item.label >= 0 else "" for item in items]
        for split, items in source.splits.items()
    }


def _counted(source: Source) -> dict[str, tuple[int, str]]:
    return {kind.suffix: (kind.files, kind.reason) for kind in source.left_out}


MIXED = {
    "cat/1.jpg": _image("JPEG"),
    "cat/2.jfif": _image("JPEG"),
    "cat/3.JP2": _image("JPEG2000"),
    "cat/4.pgm": _image("PPM"),
    "cat/5.tif": _image("TIFF"),
    "dog/6.HEIC": b"\0\0\0\x18ftypheic" + bytes(99),
    "dog/7.nef": _image("TIFF"),  # Pillow would take the small preview in it for the photograph
    "dog/notes.txt": b"n",
    "dog/LICENSE": b"n",
    "dog/Thumbs.db": b"n",
    "dog/.DS_Store": b"n",
    "__MACOSX/dog/._6.HEIC": b"n",
    "more.zip": zip_of(_images("a.png")),
}


@pytest.mark.parametrize("kind", ["folder", "tar", "zip"])
def test_every_file_is_an_image_a_reject_or_counted(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "x"
    if kind == "folder":
        write_files(path, MIXED)
    else:
        path.write_bytes(tar_of(MIXED) if kind == "tar" else zip_of(MIXED))
    source = _read(path)
    flaws = {item.source: item.flaw for item in source.splits["train"]}
    assert [name for name, flaw in flaws.items() if not flaw] == [name for name in sorted(MIXED) if name[:3] == "cat"]
    assert {name: flaw for name, flaw in flaws.items() if flaw} == {
        "dog/6.HEIC": ".heic is no format that is read here",
        "dog/7.nef": ".nef is no format that is read here",
    }
    assert [(kind.suffix, kind.reason, kind.files, kind.first) for kind in source.left_out] == [
        ("", "hidden", 1, "dog/.DS_Store"),
        ("", "no suffix of an image", 1, "dog/LICENSE"),
        (".db", "no suffix of an image", 1, "dog/Thumbs.db"),
        (".txt", "no suffix of an image", 1, "dog/notes.txt"),
        (".zip", "an archive in the source", 1, "more.zip"),
        (FOLDER, "hidden", 1, "__MACOSX/"),
    ]
    assert sum(kind.files for kind in source.left_out) + len(flaws) == len(MIXED)
    assert any("archives are in the source" in note for note in source.notes)


def test_the_manifest_keeps_what_was_left_out_and_the_sidecars_the_rejects(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_files(tmp_path / "in", MIXED)
    (tmp_path / "in" / "cat" / "gone.png").symlink_to("nowhere.png")
    command = ["folder", "--source", str(tmp_path / "in"), "--output", str(tmp_path / "out"), "--resolution", "8"]
    assert main([*command, "--workers", "1"]) == 2
    assert "3 of 8 images cannot be decoded" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()  # what is known is refused before anything is written
    assert main([*command, "--workers", "1", "--max-rejects", "0.5", "--split", "all"]) == 0
    shown = capsys.readouterr().out
    assert all(text in shown for text in SHOWN)
    manifest = load_manifest(str(tmp_path / "out"))
    assert manifest.left_out == _read(tmp_path / "in").left_out
    assert manifest.splits["train"].samples == 5
    rejects = load_sidecar(str(tmp_path / "out"), "train-000000.tar").rejects
    reasons = {entry["source"]: entry["reason"] for entry in rejects}
    assert reasons == {
        "cat/gone.png": "a link to a file that is not there",
        "dog/6.HEIC": ".heic is no format that is read here",
        "dog/7.nef": ".nef is no format that is read here",
    }
    before = (tmp_path / "out" / "manifest.json").read_bytes()
    content = json.loads(before)
    del content["left_out"]  # as earlier versions wrote it
    assert manifest_from_json(json.dumps(content).encode(), "x").left_out == ()
    assert main([*command, "--workers", "1", "--max-rejects", "0.5", "--split", "all", "--shard-size", "1000"]) == 0
    assert (tmp_path / "out" / "manifest.json").read_bytes() == before


def test_counts_do_not_depend_on_the_order_and_stay_small() -> None:
    files = [(f"{n % 7}/{n}.x{n % 300}", "why") for n in range(3000)] + [(f"a.{n}", "r") for n in range(500)]
    counted = count_left_out(files)
    assert counted == count_left_out(reversed(files))
    assert len(counted) <= 100
    assert sum(kind.files for kind in counted) == len(files)
    assert counted[0] == LeftOut(".0", "r", 500, "a.0")
    assert len(left_out_table(counted)) < 20
    assert left_out_table(()) == []


def test_a_stray_file_beside_the_splits_is_left_out_by_name(tmp_path: Path) -> None:
    names = ("ds/preview.png", "ds/train/cat/1.png", "ds/train/dog/2.png", "ds/test/cat/3.png")
    for path in (write_files(tmp_path / "folder", _images(*names)), tmp_path / "x.zip"):
        if path.suffix:
            path.write_bytes(zip_of(_images(*names)))
        source = _read(path)
        assert _labels(source) == {"train": ["cat", "dog"], "test": ["cat"]}
        assert source.left_out == (LeftOut(".png", "an image outside the layout", 1, "ds/preview.png"),)
        assert "ds/preview.png" in source.notes[0]


def test_backslashes_in_a_zip_separate_folders(tmp_path: Path) -> None:
    names = ("ds\\train\\cat\\1.png", "ds\\train\\dog\\2.png", "ds\\test\\cat\\3.png")
    (tmp_path / "x.zip").write_bytes(zip_of(_images(*names)))
    source = _read(tmp_path / "x.zip")
    assert _labels(source) == {"train": ["cat", "dog"], "test": ["cat"]}


TINY = _images(
    *("tiny/train/n1/images/n1_0.JPEG", "tiny/train/n2/images/n2_0.JPEG", "tiny/val/images/val_0.JPEG"),
    *("tiny/val/images/val_1.JPEG", "tiny/test/images/test_0.JPEG"),
) | {"tiny/wnids.txt": b"n1\nn2\n", "tiny/train/n1/n1_boxes.txt": b"n1_0.JPEG\t0\t0\t9\t9\n"}


@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
def test_tiny_imagenets_validation_images_have_the_classes_of_its_file(tmp_path: Path, mark: bytes) -> None:
    about = mark + b"val_1.JPEG\tn1\t0\t0\t9\t9\r\nval_0.JPEG\tn2\t0\t0\t9\t9\r\n"
    (tmp_path / "x.zip").write_bytes(zip_of(TINY | {"tiny/val/val_annotations.txt": about}))
    source = _read(tmp_path / "x.zip")
    assert _labels(source) == {"train": ["n1", "n2"], "test": [""], "val": ["n2", "n1"]}
    assert source.classes == ("n1", "n2")
    (tmp_path / "y.zip").write_bytes(zip_of(TINY | {"tiny/val/val_annotations.txt": b"val_0.JPEG n1\n"}))
    with pytest.raises(DataError, match=r"val_annotations\.txt, line 1: 'val_0\.JPEG n1' is not a name and a class"):
        _read(tmp_path / "y.zip")
    (tmp_path / "z.zip").write_bytes(zip_of(TINY))
    assert _labels(_read(tmp_path / "z.zip"))["val"] == ["", ""]


def test_unusual_labels_are_reported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names = [f"train/{name}/1.png" for name in ("ant", "Bee", "bee", "cat")] + ["train/2.png", "val/ant/1.png"]
    write_files(tmp_path / "in", _images(*names, "val/elk/1.png", "test/1.png"))
    command = ["folder", "--source", str(tmp_path / "in"), "--output", str(tmp_path / "out"), "--resolution", "8"]
    assert main([*command, "--dry-run"]) == 0
    said = capsys.readouterr().err.splitlines()
    assert said == [
        "data_prep: 1 of 5 images of split 'train' have no label, the others have; the first: 2.png",
        "data_prep: split 'test' has no labels",
        "data_prep: 3 of 5 classes have images in split 'train' alone: 'Bee', 'bee', 'cat'",
        "data_prep: a class has images in split 'val' alone: 'elk'",
        "data_prep: 'Bee' and 'bee' are two classes, whose names differ by case only",
    ]


def test_a_copy_of_a_class_and_classes_with_names_of_other_things_are_reported(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    names = ("train/n1/1.png", "train/n1 copy/2.png", "train/images/4.png", "train/test tube/5.png")
    write_files(tmp_path / "in", _images(*names))
    command = ["folder", "--source", str(tmp_path / "in"), "--output", str(tmp_path / "out"), "--resolution", "8"]
    assert main([*command, "--split", "own", "--dry-run"]) == 0
    assert capsys.readouterr().err.splitlines() == [
        "data_prep: 'images' is taken as a class, like 'n1', 'n1 copy', 'test tube'",
        "data_prep: 'test tube' is taken as a class, like 'images', 'n1', 'n1 copy'",
        "data_prep: 'n1 copy' is a class beside 'n1'; is it a copy?",
    ]


def test_names_that_differ_by_unicode_form_only_are_one_class(tmp_path: Path) -> None:
    composed, split = unicodedata.normalize("NFC", "é"), unicodedata.normalize("NFD", "é")
    (tmp_path / "x.tar").write_bytes(tar_of(_images(f"train/{composed}/1.png", "train/a/2.png", f"val/{split}/3.png")))
    source = _read(tmp_path / "x.tar")
    assert source.classes == ("a", composed)
    assert _labels(source) == {"train": ["a", composed], "test": [composed]}
    assert any("two forms of Unicode" in note for note in source.notes)


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"a.png": b"", "a.cls": b"1"}, "a.cls holds the class of the image beside it.* data_prep webdataset "),
        ({"a.jpg": b"", "a.json": b'{"label": 3}'}, "a.json holds the class"),
        ({"x/a.jpg": b"", "x/a.cls": b"1"}, "x/a.cls holds the class"),
    ],
)
def test_samples_of_a_webdataset_are_refused_with_the_command_that_reads_them(
    tmp_path: Path, files: Files, message: str
) -> None:
    (tmp_path / "x.tar").write_bytes(tar_of(files))
    write_files(tmp_path / "x", files)
    for path, hint in [("x.tar", f"--source {tmp_path / 'x.tar'}$"), ("x", "with a tar of these files")]:
        with pytest.raises(DataError, match=f"{message}.*{hint}"):
            _read(tmp_path / path)


def test_json_files_that_hold_no_label_are_counted(tmp_path: Path) -> None:
    write_files(tmp_path / "x", {"a.jpg": _image("JPEG"), "a.json": b'{"shapes": []}'})
    assert _counted(_read(tmp_path / "x")) == {".json": (1, "no suffix of an image")}


@pytest.mark.parametrize(
    ("names", "command"),
    [
        (["img_align_celeba.zip", "list_eval_partition.txt"], "data_prep celeba --source {x}/img_align_celeba.zip"),
        (["Img/img_align_celeba.zip", "a.txt"], "data_prep celeba --source {x}/Img/img_align_celeba.zip"),
        (["a.tar", "b.tar"], "data_prep webdataset --source {x}, else give one of them: --source {x}/a.tar"),
        (["sub/images.zip", "readme.md"], "give an archive itself: --source {x}/sub/images.zip"),
        (["sub/images.zip"], "--source {x}/sub/images.zip"),
        (["church_train_lmdb/data.mdb", "church_train_lmdb/lock.mdb"], "data_prep lsun --source {x}"),
        (["data_batch_1", "test_batch"], "data_prep cifar10 --source {x}"),
        (["images.dvc"], "dvc pull"),
        (["ILSVRC2012_img_train.tar", "ILSVRC2012_img_val.tar"], "data_prep imagenet --source {x}"),
        (["a.txt", "b.npy"], "only files of other kinds (1 .txt, 1 .npy)"),
    ],
)
def test_a_source_without_images_says_what_it_holds_and_what_reads_that(
    tmp_path: Path, names: list[str], command: str
) -> None:
    write_files(tmp_path / "x", dict.fromkeys(names, b"PK"))
    with pytest.raises(DataError, match=f"holds no images.*{re.escape(command.format(x=tmp_path / 'x'))}"):
        _read(tmp_path / "x")


def test_prepare_counts_as_the_command_does(tmp_path: Path) -> None:
    write_files(tmp_path / "x", _images("1.png", "2.png") | {"readme.md": b""})
    manifest = prepare("folder", str(tmp_path / "out"), 8, path=str(tmp_path / "x"), of_source={"split": "all"})
    assert manifest.left_out == (LeftOut(".md", "no suffix of an image", 1, "readme.md"),)


def test_archives_in_an_archive_are_named(tmp_path: Path) -> None:
    (tmp_path / "x.zip").write_bytes(zip_of({"train.zip": b"PK", "test.zip": b"PK"}))
    with pytest.raises(DataError, match=r"2 \.zip\); unpack it, and give what is in it"):
        _read(tmp_path / "x.zip")
