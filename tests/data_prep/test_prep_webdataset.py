"""The webdataset source, on tars that webdataset's own writers made: labels, patterns, folders, splits, odd samples."""

from __future__ import annotations

import io
import json
import pickle
import re
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
import webdataset
from PIL import Image

from data_prep import prepare
from data_prep.__main__ import main
from data_prep.items import Source
from data_prep.pixels import Preprocess
from data_prep.sources import read_source
from data_prep.splits import apply_rule
from data_prep.verify import verify
from data_prep.writer import make_plan
from eiwtrain import storage
from eiwtrain.data.manifest import DataError, load_manifest, load_sidecar


def _image(value: int, kind: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (6, 5), (value, 2 * value % 256, 7)).save(buffer, kind)
    return buffer.getvalue()


def _write(path: Path, *samples: dict[str, Any]) -> Path:
    """Write samples with webdataset's TarWriter, keys numbered where they are not given."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with webdataset.TarWriter(str(path)) as sink:
        for n, sample in enumerate(samples):
            sink.write({"__key__": f"{n:04d}"} | sample)
    return path


def _read(path: object, **options: Any) -> Source:
    return read_source("webdataset", 4, str(path), split="own", **options)


def _labels(source: Source, split: str = "train") -> list[tuple[str, int]]:
    return [(item.source, item.label) for item in source.splits[split]]


def test_every_kind_of_image_is_read_as_it_lies_in_the_tar(tmp_path: Path) -> None:
    files = {"jpg": "JPEG", "jpeg": "JPEG", "png": "PNG", "webp": "WEBP"}
    images = [_image(n, kind) for n, kind in enumerate(files.values())]
    path = _write(tmp_path / "a.tar", *({kind: image} for kind, image in zip(files, images, strict=True)))
    source = pickle.loads(pickle.dumps(_read(path)))
    assert [item.load() for item in source.splits["train"]] == images
    assert [item.size for item in source.splits["train"]] == [len(image) for image in images]
    assert _labels(source) == [(f"{n:04d}", -1) for n in range(4)]
    assert (source.classes, source.notes, source.remote) == ((), (), False)


@pytest.mark.parametrize(
    ("labels", "members", "classes", "numbers"),
    [
        ("auto", [{"cls": 2}, {"cls": 0}], ("0", "1", "2"), [2, 0]),
        ("auto", [{"cls": b"dog\n"}, {"cls": b"cat"}], ("cat", "dog"), [1, 0]),
        ("auto", [{"cls": b"dog"}, {"cls": 3}], ("3", "dog"), [1, 0]),
        ("auto", [{"json": {"label": 1, "source": "x"}}, {"json": {"cls": 0}}], ("0", "1"), [1, 0]),
        ("auto", [{"json": {"label": "b"}}, {"json": {"label": "a"}}], ("a", "b"), [1, 0]),
        ("auto", [{"cls": 1, "json": {"label": 5}}, {"cls": 0, "json": {"label": 6}}], ("0", "1"), [1, 0]),
        ("json", [{"cls": 1, "json": {"label": "x"}}, {"cls": 0, "json": {"label": "x"}}], ("x",), [0, 0]),
        ("auto", [{"txt": "a dog"}, {"txt": "a cat"}], (), [-1, -1]),
        ("txt", [{"txt": "dog"}, {"txt": "cat"}], ("cat", "dog"), [1, 0]),
        ("none", [{"cls": 1}, {"cls": 0}], (), [-1, -1]),
        ("auto", [{"json": {"label": -1}}, {"json": {"label": -1}}], (), [-1, -1]),
        ("auto", [{"json": {"label": True}}, {"json": [1]}], (), [-1, -1]),
    ],
)
def test_labels_are_numbers_or_names(
    tmp_path: Path, labels: str, members: list[dict[str, Any]], classes: tuple[str, ...], numbers: list[int]
) -> None:
    path = _write(tmp_path / "a.tar", *({"png": _image(n), **member} for n, member in enumerate(members)))
    source = _read(path, labels=labels)
    assert source.classes == classes
    assert [label for _, label in _labels(source)] == numbers
    assert source.notes == ()
    assert source.params == {"labels": labels}


def test_images_without_label_among_labelled_ones_are_counted(tmp_path: Path) -> None:
    path = _write(tmp_path / "a.tar", {"png": _image(0), "cls": 1}, {"png": _image(1)}, {"png": _image(2), "json": "x"})
    source = _read(path)
    assert [label for _, label in _labels(source)] == [1, -1, -1]
    plan = make_plan(apply_rule(source, "own"), str(tmp_path / "set"), Preprocess(4))
    assert plan.notes == ("2 of 3 images of split 'train' have no label, the others have; the first: 0001",)


def test_labels_that_are_no_classes_are_refused(tmp_path: Path) -> None:
    path = _write(tmp_path / "a.tar", {"png": _image(0), "cls": 10**9})
    with pytest.raises(DataError, match=r"its labels would be 1,000,000,001 classes; use --labels none"):
        _read(path)
    long = _write(tmp_path / "b.tar", {"png": _image(0), "txt": "a caption " * 30})
    assert _read(long, labels="txt").classes == ()
    with pytest.raises(DataError, match="labels must be one of auto, cls"):
        _read(path, labels="label")


def test_samples_without_an_image_and_repeated_keys_are_counted(tmp_path: Path) -> None:
    samples = [{"png": _image(0)}, {"npy": np.zeros(2)}, {"__key__": "0000", "jpg": _image(1, "JPEG")}, {"x": b""}]
    source = _read(_write(tmp_path / "a.tar", *samples))
    assert [name for name, _ in _labels(source)] == ["a.tar/0000", "a.tar/0000#2"]
    assert source.notes == (
        "2 samples have no image (jpg, jpeg, png, webp) and are left out; the first: a.tar/0001",
        "1 keys come more than once in a tar; all are kept; the first: a.tar/0000",
    )
    with pytest.raises(DataError, match=r"no images in its 1 samples \(members jpg, jpeg, png, webp\)"):
        _read(_write(tmp_path / "b.tar", {"npy": np.zeros(2)}))
    with pytest.raises(DataError, match=r"sample 0000 has two images, \.jpg and \.png"):
        _read(_write(tmp_path / "c.tar", {"png": _image(0), "jpg": _image(0, "JPEG")}))


def test_any_image_is_taken_where_there_is_no_usual_one_and_other_members_are_counted(tmp_path: Path) -> None:
    samples = [
        {"gif": _image(0, "GIF"), "cls": 1, "txt": "a caption"},
        {"jpg": _image(1, "JPEG"), "tiff": _image(2, "TIFF"), "cls": 0, "seg.png": b"mask"},
        {"heic": b"x" * 99, "cls": 1},
    ]
    _write(tmp_path / "a.tar", *samples)
    (tmp_path / "notes.txt").write_text("n")
    (tmp_path / "b.tar.gz").write_bytes(b"")
    source = _read(tmp_path)
    assert [(i.source, i.label, i.flaw) for i in source.splits["train"]] == [
        ("0000", 1, ""),
        ("0001", 0, ""),
        ("0002", 1, ".heic is no format that is read here"),
    ]
    assert {(kind.suffix, kind.reason, kind.first) for kind in source.left_out} == {
        (".txt", "not an image or a label", "a.tar/0000.txt"),
        (".png", "not an image or a label", "a.tar/0001.seg.png"),
        (".tiff", "not an image or a label", "a.tar/0001.tiff"),
        (".txt", "no suffix of an image", "notes.txt"),
        (".gz", "an archive in the source", "b.tar.gz"),
    }
    (tmp_path / "c.tar").symlink_to("nowhere")
    with pytest.raises(DataError, match=r"c\.tar is a link to a file that is not there"):
        _read(tmp_path)


def test_keys_that_repeat_across_tars_are_told_apart(tmp_path: Path) -> None:
    for name in ("a.tar", "b.tar"):
        _write(tmp_path / name, {"png": _image(0)}, {"__key__": f"only-{name[0]}", "png": _image(1)})
    source = _read(tmp_path)
    assert [name for name, _ in _labels(source)] == ["a.tar/0000", "only-a", "b.tar/0000", "only-b"]
    assert source.notes == ()


@pytest.mark.parametrize("remote", [False, True])
def test_a_pattern_and_a_folder_give_the_same_images_at_any_url(tmp_path: Path, remote: bool) -> None:
    folder = tmp_path / "tars"
    folder.mkdir()
    named = f"{tmp_path}/a {{set}} [1]"  # a folder whose name could be a pattern
    with webdataset.ShardWriter(str(folder / "x-%06d.tar"), maxcount=3, verbose=0) as sink:
        for n in range(10):
            sink.write({"__key__": f"{n:05d}", "png": _image(n), "cls": n % 3})
    where = str(folder)
    if remote:
        fsspec.filesystem("memory").put(str(folder), f"/{tmp_path.name}/tars", recursive=True)
        where, named = f"memory://{tmp_path.name}/tars", f"memory://{tmp_path.name}/a {{set}} [1]"
    for name, _ in storage.find(where):
        storage.write_bytes(f"{named}/{name}", storage.read_bytes(f"{where}/{name}"))
    expected = [(f"{n:05d}", n % 3) for n in range(10)]
    for path in (where, named, where + "/x-{000000..000003}.tar", where + "/x-00000{0,1,2,3}.tar"):
        source = _read(path)
        assert _labels(source) == expected
        assert [item.load() for item in source.splits["train"]] == [_image(n) for n in range(10)]
        assert source.remote == remote
    assert _labels(_read(where + "/x-000001.tar")) == expected[3:6]
    assert _labels(_read(where + "/x-{000003,000000}.tar")) == expected[9:] + expected[:3]


@pytest.mark.parametrize(
    ("names", "splits"),
    [
        (["train/0.tar", "val/0.tar"], {"train": ["train/0.tar"], "test": ["val/0.tar"]}),
        (["in-train-0.tar", "in-test-0.tar"], {"train": ["in-train-0.tar"], "test": ["in-test-0.tar"]}),
        (["in-0.tar", "in-val-0.tar"], {"train": ["in-0.tar"], "test": ["in-val-0.tar"]}),
        (["train.tar", "val.tar", "test.tar"], {"train": ["train.tar"], "test": ["test.tar"], "val": ["val.tar"]}),
        (["val-0.tar", "val-1.tar"], {"train": ["val-0.tar", "val-1.tar"]}),
        (["0.tar", "train.tar"], {"train": ["0.tar", "train.tar"]}),
        (["trained.tar", "retest.tar"], {"train": ["retest.tar", "trained.tar"]}),
    ],
)
def test_a_tar_is_of_the_split_that_its_name_says(
    tmp_path: Path, names: list[str], splits: dict[str, list[str]]
) -> None:
    top = tmp_path / "train"  # the name of a folder above all of them says nothing
    for name in names:
        _write(top / name, {"__key__": name.replace(".", "_"), "png": _image(1)})
    for path in (top, f"{top}/{{{','.join(sorted(names))}}}"):
        source = _read(path)
        found = {split: [name for name, _ in _labels(source, split)] for split in source.splits}
        assert found == {split: [name.replace(".", "_") for name in tars] for split, tars in splits.items()}


def test_a_tar_of_no_split_beside_both_splits_is_refused(tmp_path: Path) -> None:
    for name in ("train-0", "val-0", "more-0"):
        _write(tmp_path / f"{name}.tar", {"png": _image(0)})
    with pytest.raises(DataError, match=r"'more-0\.tar' is named for no split, unlike other tars"):
        _read(tmp_path)


def test_a_missing_tar_is_one_line_and_code_2(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _write(tmp_path / "x-0.tar", {"png": _image(0)})
    (tmp_path / "empty").mkdir()
    pattern = str(tmp_path / "x-{0..2}.tar")
    command = ["webdataset", "--output", str(tmp_path / "set"), "--resolution", "4", "--source"]
    for source, problem in (
        (pattern, f"2 of 3 tars are missing; the first: {tmp_path}/x-1.tar"),
        (str(tmp_path / "none"), "no such folder or tar"),
        (str(tmp_path / "x-{0.tar"), "a wrong pattern: .*"),
        (str(tmp_path / "empty"), r"no \.tar is in this folder or below it"),
    ):
        assert main([*command, source]) == 2
        err = capsys.readouterr().err
        assert err.startswith(f"data_prep: source {source}: ")
        assert err.count("\n") == 1
        assert re.fullmatch(problem, err.rpartition(f"{source}: ")[2].strip())
    assert not (tmp_path / "set").exists()


def test_a_broken_or_compressed_tar_is_named(tmp_path: Path) -> None:
    (tmp_path / "x.tar.gz").write_bytes(b"")
    with pytest.raises(DataError, match=r"x\.tar\.gz: uncompress it"):
        _read(tmp_path / "x.tar.gz")
    (tmp_path / "a.tar").write_bytes(b"no tar" * 200)
    with pytest.raises(DataError, match=rf"source {tmp_path}/a\.tar: a broken tar"):
        _read(tmp_path)


def test_the_command_writes_a_data_set_and_prints_what_was_left_out(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train = [{"png": _image(n), "json": {"label": ["ant", "bee"][n % 2]}} for n in range(6)]
    _write(tmp_path / "tars" / "train-0.tar", *train, {"txt": "no image"}, {"jpg": b"cut off"})
    _write(tmp_path / "tars" / "val-0.tar", {"__key__": "v", "webp": _image(9, "WEBP"), "json": {"label": "bee"}})
    output = str(tmp_path / "set")
    command = ["webdataset", "--source", str(tmp_path / "tars" / "{train,val}-0.tar"), "--output", output]
    assert main([*command, "--resolution", "4", "--workers", "1", "--max-rejects", "0.2"]) == 0
    out, err = capsys.readouterr()
    assert err.startswith("data_prep: 1 samples have no image (jpg, jpeg, png, webp) and are left out; the first: ")
    assert "left out 1 images; the first: 0007" in out
    assert verify(output) == []
    manifest = load_manifest(output)
    assert manifest.classes == ("ant", "bee")
    assert {name: split.samples for name, split in manifest.splits.items()} == {"train": 6, "test": 1}
    assert sorted(load_sidecar(output, "train-000000.tar").labels) == [0, 0, 0, 1, 1, 1]
    assert load_sidecar(output, "test-000000.tar").labels == (1,)


def test_a_data_set_of_our_own_can_be_a_source(tmp_path: Path) -> None:
    _write(tmp_path / "tars" / "0.tar", *({"png": _image(n), "cls": n % 2} for n in range(20)))
    first = prepare("webdataset", str(tmp_path / "a"), 5, path=str(tmp_path / "tars"), workers=1)
    again = prepare("webdataset", str(tmp_path / "b"), 5, path=str(tmp_path / "a"), workers=1)
    assert {name: split.samples for name, split in again.splits.items()} == {
        name: split.samples for name, split in first.splits.items()
    }
    digests = [sorted(load_sidecar(str(tmp_path / name), "train-000000.tar").digests) for name in "ab"]
    assert digests[0] == digests[1]
    assert json.loads(json.dumps(again.preprocessing))["params"]["source"] == {"name": "webdataset", "labels": "auto"}
