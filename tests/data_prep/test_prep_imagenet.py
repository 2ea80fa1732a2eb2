"""ImageNet: every layout is recognised, gives the right images and labels, and is called what it is."""

from __future__ import annotations

import json
import uuid
import zipfile
from pathlib import Path

import fsspec
import pytest
from containers import Files, tar_of, write_files, zip_of
from imagenet_files import (
    DOWNSAMPLED,
    ORIGINALS,
    SMALL,
    SYNSETS,
    TRAIN,
    VAL,
    VAL_LABELS,
    class_folders,
    flat_folder,
    image_file,
    kaggle_csv,
    pickled_batches,
    read_imagenet,
    small_images,
)

from data_prep import prepare
from data_prep.items import Source
from data_prep.sources import imagenet as module
from data_prep.sources.imagenet import VARIANTS, describe
from eiwtrain.data.manifest import DataError, load_manifest

pytestmark = pytest.mark.usefixtures("temporary_folder")


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
            assert item.load() == image_file(item.source.rpartition("/")[2])
            assert item.size == len(item.load())


@pytest.mark.parametrize("layout", ORIGINALS)
def test_every_layout_of_the_original_gives_the_same_items(tmp_path: Path, bucket: str, layout: str) -> None:
    source = read_imagenet(write_files(tmp_path / "a", ORIGINALS[layout]))
    _check_original(source)
    assert source.protocol == (
        "ImageNet 2012, resized here (a subset: 6 training and 3 validation images; not comparable with the "
        "downsampled sets of others)"
    )
    assert not source.remote
    for name, data in ORIGINALS[layout].items():
        fsspec.filesystem("memory").pipe_file(f"{bucket}/a/{name}", data)
    source = read_imagenet(f"{bucket}/a")
    _check_original(source)
    assert source.remote


@pytest.mark.parametrize("layout", ORIGINALS)
def test_a_whole_layout_can_lie_in_a_tar(tmp_path: Path, layout: str) -> None:
    (tmp_path / "all.tar").write_bytes(tar_of(ORIGINALS[layout]))
    _check_original(read_imagenet(tmp_path / "all.tar"))


@pytest.mark.parametrize("layout", ["class folders", "Kaggle"])
def test_class_folders_can_lie_in_a_zip_but_tars_cannot(tmp_path: Path, layout: str) -> None:
    for method in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        (tmp_path / "all.zip").write_bytes(zip_of(ORIGINALS[layout], method))
        _check_original(read_imagenet(tmp_path / "all.zip"))
    (tmp_path / "tars.zip").write_bytes(zip_of(ORIGINALS["class tars"], zipfile.ZIP_STORED))
    with pytest.raises(DataError, match=r"train/n\d+.tar: inside a zip it cannot be read in place; unpack the zip"):
        read_imagenet(tmp_path / "tars.zip")


def test_shards_are_the_same_bytes_from_every_layout(tmp_path: Path) -> None:
    written = {}
    for i, (layout, files) in enumerate(ORIGINALS.items()):
        output = tmp_path / str(i) / "set"
        prepare("imagenet", str(output), 32, path=str(write_files(tmp_path / layout, files)), workers=1)
        written[layout] = {p.name: p.read_bytes() for p in output.iterdir()}
        manifest = json.loads(written[layout]["manifest.json"])
        written[layout]["manifest.json"] = manifest | {"left_out": []}  # files that other layouts do not have
    assert {"train-000000.tar", "val-000000.tar"} < set(written["Kaggle"])
    assert all(files == written["Kaggle"] for files in written.values())
    assert load_manifest(str(output)).protocol.startswith("ImageNet 2012, resized here")


@pytest.mark.parametrize("form", ["synsets", "numbers", "csv"])
def test_val_labels_come_from_a_file(tmp_path: Path, form: str) -> None:
    ordered = [synset for synset, _ in sorted(VAL, key=lambda v: v[1])]
    lines = {"synsets": ordered, "numbers": [str(SYNSETS.index(s)) for s in ordered], "csv": [kaggle_csv().decode()]}
    labels = tmp_path / "labels.txt"
    labels.write_text("\n".join(lines[form]) + "\n")
    path = write_files(tmp_path / "a", class_folders("train", TRAIN) | flat_folder("val/"))
    _check_original(read_imagenet(path, val_labels=str(labels)))
    _check_original(read_imagenet(path), dict.fromkeys(VAL_LABELS, -1))


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
    path = write_files(tmp_path / "a", class_folders("train", TRAIN) | flat_folder("val/"))
    with pytest.raises(DataError, match=message) as caught:
        read_imagenet(path, val_labels=str(tmp_path / "labels.txt"))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("layout", SMALL)
def test_every_layout_of_the_sets_of_2016_gives_the_same_images(tmp_path: Path, layout: str) -> None:
    source = read_imagenet(write_files(tmp_path / "a", SMALL[layout]))
    assert source.params == {"variant": "pixelrnn-2016", "side": 32}
    assert source.classes == ()
    assert source.protocol == (
        "ImageNet 32x32 downsampled by van den Oord et al. 2016 (a subset: 4 training and 2 validation images; not "
        "comparable with Chrabaszcz et al. 2017)"
    )
    expected = small_images(32)
    for split, name in (("train", "train_32x32"), ("val", "valid_32x32")):
        assert {i.source: i.load() for i in source.splits[split]} == expected[name]
        assert all(i.label == -1 for i in source.splits[split])


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
    read_imagenet(write_files(tmp_path / "a", pickled_batches(32)))
    read_imagenet(write_files(tmp_path / "b", SMALL["tars"]))
    one_more = small_images(32)["valid_32x32"] | {"0000003.png": image_file("x", "PNG")}
    wrong = SMALL["tars"] | {"valid_32x32.tar": tar_of(one_more)}
    with pytest.raises(DataError, match="has 2 validation images, but there are 3"):
        read_imagenet(write_files(tmp_path / "c", wrong))


WRONG: dict[str, tuple[Files, str]] = {
    "nothing": ({}, "not a known layout of ImageNet; these are: the original"),
    "class folders of another set": ({"train/cat/1.png": b"", "val/cat/2.png": b""}, "not a known layout of ImageNet"),
    "no validation images": (
        class_folders("train", TRAIN),
        "without validation images; add val or ILSVRC2012_img_v",
    ),
    "training images outside class folders": (
        class_folders("train", TRAIN) | class_folders("val", VAL) | {"train/1.JPEG": b""},
        "1 training images are in no class folder; the first: 1.JPEG",
    ),
    "validation images half unpacked": (
        class_folders("train", TRAIN) | class_folders("val", VAL[:1]) | flat_folder("val/"),
        "some validation images are in class folders and some are not",
    ),
    "two sizes of small images": ({"train_32x32/1.png": b"", "valid_64x64/1.png": b""}, "side by side"),
    "no valid_32x32": ({"train_32x32/1.png": b""}, "valid_32x32, a folder or a .tar with images, is missing"),
}


@pytest.mark.parametrize("what", WRONG)
def test_what_is_not_imagenet_is_refused_in_one_line(tmp_path: Path, what: str) -> None:
    files, message = WRONG[what]
    with pytest.raises(DataError, match=message) as caught:
        read_imagenet(write_files(tmp_path / "a", files))
    assert "\n" not in str(caught.value)


def test_val_labels_are_refused_where_labels_are_known(tmp_path: Path) -> None:
    for files in (ORIGINALS["class folders"], DOWNSAMPLED["npz"], SMALL["tars"]):
        with pytest.raises(DataError, match="val labels"):
            read_imagenet(write_files(tmp_path / uuid.uuid4().hex, files), val_labels="labels.txt")


def test_images_that_no_class_folder_holds_directly_are_counted(tmp_path: Path) -> None:
    strays = {
        f"train/{SYNSETS[0]} copy/a.JPEG": image_file("a"),
        f"train/{SYNSETS[0]}/deeper/b.JPEG": image_file("b"),
        f"val/{SYNSETS[0]}/.DS_Store": b"",
    }
    source = read_imagenet(write_files(tmp_path / "a", ORIGINALS["class folders"] | strays))
    _check_original(source)
    assert {(kind.suffix, kind.reason, kind.files) for kind in source.left_out} == {
        (".jpeg", "an image outside the layout", 3),
        (".txt", "no suffix of an image", 2),
        ("", "hidden", 1),
    }
    assert source.notes == (
        f"2 files are not in the folder of a class, and are left out; the first: train/{SYNSETS[0]}/deeper/b.JPEG",
    )


def test_links_to_nothing_are_rejects_and_a_class_that_is_one_stops_the_work(tmp_path: Path) -> None:
    root = write_files(tmp_path / "a", ORIGINALS["class folders"])
    (root / "train" / SYNSETS[0] / "gone.JPEG").symlink_to("nowhere")
    flaws = {item.source: item.flaw for item in read_imagenet(root).splits["train"] if item.flaw}
    assert flaws == {f"{SYNSETS[0]}/gone.JPEG": "a link to a file that is not there"}
    (root / "train" / "n09999999").symlink_to("nowhere")
    with pytest.raises(DataError, match="train/n09999999 is a link to a file that is not there"):
        read_imagenet(root)


def test_another_layout_with_images_is_sent_to_the_folder_source(tmp_path: Path) -> None:
    tiny = {f"train/{SYNSETS[0]}/images/{SYNSETS[0]}_0.JPEG": b"", "val/images/val_0.JPEG": b""}
    with pytest.raises(DataError, match=r"not a known layout.* python -m data_prep folder --source"):
        read_imagenet(write_files(tmp_path / "a", tiny))


def test_labels_can_begin_with_a_byte_order_mark(tmp_path: Path) -> None:
    files = ORIGINALS["Kaggle"] | {"LOC_val_solution.csv": b"\xef\xbb\xbf" + kaggle_csv()}
    _check_original(read_imagenet(write_files(tmp_path / "a", files)))
