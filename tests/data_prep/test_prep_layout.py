"""Splits and classes in folders: found at any depth, and refused where it is not clear which folders are splits."""

from __future__ import annotations

import pytest

from data_prep.layout import find_layout
from data_prep.split_names import split_in, split_name
from eiwtrain.data.manifest import DataError

TRAIN = ["train", "TRAIN", "Training", "training_set", "trainset", "TrainImages", "images-train", "trn"]
EVAL = ["test", "Test_Set", "testing", "val", "valid", "validation_set", "ValSet", "dev", "eval", "held-out", "HoldOut"]
VERSIONS = [
    "test2",
    "val2017",
    "trainA",
    "train_old",
    "trainval",
    "train_val",
    "Test (1)",
    "validation-small",
    "test copy",
]
CLASSES = ["cat", "valley", "trains", "testament", "trainer", "n01440764", "developer", "évaluation"]


def test_names_of_splits_are_known_in_any_form_and_no_others() -> None:
    assert {name for name in TRAIN if split_name(name)[:3:2] == ("train", True)} == {*TRAIN}
    assert {name for name in EVAL if split_name(name)[:3:2] == ("eval", True)} == {*EVAL}
    assert {name for name in VERSIONS if split_name(name)[2:4] == (False, True)} == {*VERSIONS}
    assert {name for name in CLASSES if split_name(name).kind is None} == {*CLASSES}
    for name in ("bullet train", "test_tube", "dev board"):
        assert split_name(name)[2:4] == (False, False)
    assert split_in("imagenet-validation-000012") == ("eval", "validation")


def placed(names: str) -> list[str]:
    """Return split:class of each image, "-" for those left out."""
    layout = find_layout("P", [tuple(name.split("/")) for name in names.split()])
    return ["-" if place is None else f"{place.split}:{place.label}" for place in layout.places]


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        ("ds/preview.png ds/train/cat/1 ds/test/cat/2", "- train:cat test:cat"),  # a stray file switches nothing off
        ("x.png a/y.png a/b/train/cat/1 a/b/val/cat/2", "- - train:cat test:cat"),
        ("ds/preview.png ds/cat/1 ds/dog/2", "train: train:cat train:dog"),
        ("train/a/1 dev/a/2", "train:a test:a"),
        ("training_set/a/1 test_set/a/2 validation_set/a/3", "train:a test:a validation:a"),
        ("train/1 eval/2", "train: test:"),
        ("val/1 test/2", "val: test:"),
        ("train2017/1 val2017/2", "train: test:"),  # as COCO
        ("bedroom_train/0/1/01a bedroom_val/2/3/23b", "train: test:"),  # as an LSUN that was exported
        ("train/train/1 test/test/2", "train: test:"),
        ("test/train/a/1 test/val/a/2", "train:a test:a"),  # all in a folder that happens to be called so
        ("val/a/1 val/b/2", "train:a train:b"),
        ("cat/train/1 cat/test/2 dog/train/3 dog/test/4", "train:cat test:cat train:dog test:dog"),
        ("cat/Train/1 cat/val/2 dog/train/3", "train:cat test:cat train:dog"),
        ("cat/train/1 dog/test/2", "train:cat test:dog"),
        ("train/images/1 val/images/2", "train: test:"),
        ("images/train/1 images/val/2", "train: test:"),
        ("train/n1/images/1 val/images/2 test/images/3", "train:n1 val: test:"),
        ("train/images/a/1 test/images/b/2", "train:a test:b"),
        ("images/1 images/2", "train: train:"),
        ("train/1 plane/2", "train:train train:plane"),
        ("bullet_train/1 cat/2 dog/3", "train:bullet_train train:cat train:dog"),
        ("train/valid/1 train/invalid/2 test/valid/3", "train:valid train:invalid test:valid"),
        ("train/train/1 train/bus/2 test/bus/3", "train:train train:bus test:bus"),
        ("0/1/2/012ab 3/4/5/345", "train: train:"),  # as an LSUN that was exported
        ("0/0_1 1/1_2 cat/cat_1", "train:0 train:1 train:cat"),
    ],
)
def test_splits_and_classes_are_found_at_any_depth(names: str, expected: str) -> None:
    assert placed(names) == expected.split()


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ("train/cat/1 test/cat/2 plane/3", "'train' and 'test' look like splits, but there are also images in 'plane'"),
        ("ds/train/1 ds/test/2 docs/3", "'train' and 'test' look like .* images in 'docs'"),
        ("train/1 val/2 test2/3", "'train' and 'val' look like .* images in 'test2'"),
        ("train/a/1 test2/a/2", "'test2', 'train' look like a split"),
        ("train/a/1 extra/a/2", "'train' looks like a split, and beside it 'extra'"),
        ("train2017/1 val2018/2", "'train2017', 'val2018' look like a split"),
        ("trainA/1 trainB/2 testA/3 testB/4", "'testA', 'testB', 'trainA', ... look like a split"),
        ("mine_train/a/1 your_test/a/2", "'mine_train', 'your_test' look like a split"),
        ("mine_train/a/1 mine_test/a/2 docs/3", "'mine_train' and 'mine_test' look like splits, but .* in 'docs'"),
        ("cat/1 dog/2 dev/3", "'dev' looks like a split, and beside it 'cat', 'dog'"),
        ("cat/1 dog/2 test2/3", "'test2' looks like a split"),
        ("train/1 training/2 val/3", "'train', 'training' would all be the split 'train'"),
        ("train/1 test/2 test_set/3", "'test', 'test_set' would all be the split 'test'"),
        ("a/train/x/1 a/test/x/2 b/train/x/3 b/test/x/4", "'a', 'b' hold splits of their own"),
        ("train/train/a/1 train/val/a/2 test/a/3", "'train' in a split holds splits of its own"),
        ("train/cat/1 train/dog/2 train/val/3", "'val', among the classes of 'train', looks like a split"),
        ("train/cat/1 train/test2/2 test/cat/3", "'test2', among the classes of 'train', looks like a split"),
        ("1 2 3 test/4", "'test' looks like a split, but 3 images are beside it"),
    ],
)
def test_what_is_not_clearly_a_split_is_refused_in_one_line(names: str, message: str) -> None:
    with pytest.raises(DataError, match=f"^source P: {message}") as caught:
        placed(names)
    assert "\n" not in str(caught.value)


def test_names_are_relative_to_the_classes_and_unique() -> None:
    layout = find_layout("P", [("ds", "1"), ("ds", "a", "1"), ("ds", "b", "1"), ("1",), ("ds", "a", "b", "1")])
    assert [place.name for place in layout.places if place] == ["1", "a/1", "b/1", "../1", "a/b/1"]


def test_folders_without_end_take_no_time_or_stack() -> None:
    deep = ("x",) * 100_000
    assert [place.split for place in find_layout("P", [(*deep, "1"), (*deep, "2")]).places if place] == ["train"] * 2
