"""Rules for splits: each image is in exactly one, and stays there when others are added or removed."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_prep.formats.ranges import ByteRange
from data_prep.items import Item, Source
from data_prep.splits import apply_rule
from eiwtrain.data.manifest import DataError

some = settings(max_examples=100, deadline=None, derandomize=True)
counts = st.integers(2, 60)


class Made(Sequence[Item]):
    """Items that are made when they are asked for, and counted."""

    def __init__(self, names: Sequence[str]) -> None:
        self.names, self.made = names, 0

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> Item:  # type: ignore[override]
        name = self.names[index]
        self.made += 1
        return Item(-1, name, 1, ByteRange(name))


def _source(**splits: Sequence[str]) -> Source:
    return Source("made", {name: Made(names) for name, names in splits.items()})


def _names(source: Source) -> dict[str, list[str]]:
    return {split: [item.source for item in items] for split, items in source.splits.items()}


def _numbered(count: int, prefix: str = "") -> list[str]:
    return [f"{prefix}{n}.png" for n in range(count)]


@some
@given(counts, st.floats(0, 1, exclude_min=True, exclude_max=True))
def test_hash_puts_every_image_on_one_side_in_order(count: int, share: float) -> None:
    names = _numbered(count)
    try:
        splits = _names(apply_rule(_source(train=names), f"hash:{share!r}"))
    except DataError as e:  # a side would be empty
        assert "would have no images" in str(e)  # noqa: PT017
        return
    assert list(splits) == ["train", "test"]
    assert sorted(splits["train"] + splits["test"], key=names.index) == names
    assert all(part == sorted(part, key=names.index) for part in splits.values())


@some
@given(st.sets(st.integers(0, 500), min_size=30), st.sets(st.integers(0, 500), min_size=30))
def test_hash_keeps_an_image_on_its_side_when_others_change(one: set[int], other: set[int]) -> None:
    sides: list[dict[str, str]] = []
    for numbers in (sorted(one), sorted(other, reverse=True)):
        source = apply_rule(_source(train=[f"{n}.png" for n in numbers]), "hash:0.5")
        sides.append({name: split for split, names in _names(source).items() for name in names})
    assert all(sides[0][name] == sides[1][name] for name in sides[0].keys() & sides[1].keys())


def test_hash_holds_out_the_requested_share() -> None:
    for share in (0.1, 0.5, 0.9):
        held = len(apply_rule(_source(train=_numbered(10_000)), f"hash:{share}").splits["test"])
        assert abs(held - 10_000 * share) < 4 * (10_000 * share * (1 - share)) ** 0.5  # four standard deviations


def test_the_side_of_a_name_never_changes() -> None:
    held = _names(apply_rule(_source(train=_numbered(40)), "hash:0.1"))["test"]
    assert held == ["0.png", "6.png", "8.png", "33.png"]  # other images would mix the splits of existing data sets


def test_a_larger_share_holds_out_the_same_images_and_more() -> None:
    held = [set(_names(apply_rule(_source(train=_numbered(500)), f"hash:{s}"))["test"]) for s in (0.1, 0.3, 0.8)]
    assert held[0] < held[1] < held[2]


@some
@given(counts, st.data())
def test_last_holds_out_the_last(count: int, data: st.DataObject) -> None:
    names = _numbered(count)
    held = data.draw(st.integers(1, count - 1))
    assert _names(apply_rule(_source(train=names), f"last:{held}")) == {"train": names[:-held], "test": names[-held:]}


@some
@given(st.lists(st.integers(0, 20), min_size=1, max_size=4).filter(any))
def test_all_joins_the_images_of_all_splits(counts: list[int]) -> None:
    splits = {f"part{n}": _numbered(count, f"{n}/") for n, count in enumerate(counts)}
    joined = apply_rule(_source(**splits), "all").splits["train"]
    expected = [name for names in splits.values() for name in names]
    assert [item.source for item in joined] == expected
    assert [joined[i].source for i in range(-len(expected), 0)] == expected
    assert [item.source for item in joined[1:-1]] == expected[1:-1]
    for outside in (len(expected), -len(expected) - 1):
        with pytest.raises(IndexError):
            joined[outside]


def test_splits_of_the_source_are_kept() -> None:
    splits = {"train": _numbered(20), "test": _numbered(3, "t")}
    for rule in ("auto", "own"):
        assert _names(apply_rule(_source(**splits), rule)) == splits
    assert _names(apply_rule(_source(train=splits["train"]), "own")) == {"train": splits["train"]}


def test_auto_holds_out_a_tenth_if_train_is_the_only_split() -> None:
    names = _numbered(200)
    assert _names(apply_rule(_source(train=names))) == _names(apply_rule(_source(train=names), "hash:0.1"))
    few = ["1.png", "2.png"]  # whose hashes are above a tenth
    assert _names(apply_rule(_source(train=few))) == {"train": few}
    validation = {"validation": names}
    assert _names(apply_rule(_source(**validation))) == validation


def test_only_some_splits_are_kept() -> None:
    splits = {"train": _numbered(20), "test": _numbered(3, "t")}
    assert _names(apply_rule(_source(**splits), "own", ["test"])) == {"test": splits["test"]}
    assert list(apply_rule(_source(train=splits["train"]), "last:5", ["train"]).splits) == ["train"]


def test_items_are_not_made_before_they_are_asked_for() -> None:
    for rule, looked_at in [("own", 0), ("last:7", 0), ("all", 0), ("hash:0.3", 100)]:
        made = Made(_numbered(100))
        splits = apply_rule(Source("made", {"train": made}), rule).splits
        assert sum(map(len, splits.values())) == 100
        assert made.made == looked_at
        assert [items[len(items) - 1].label for items in splits.values()] == [-1] * len(splits)
        assert made.made == looked_at + len(splits)


@pytest.mark.parametrize(
    ("rule", "only", "message"),
    [
        ("half", [], "split must be auto, own, hash:SHARE, last:N or all, not 'half'"),
        ("auto:1", [], "split must be .* not 'auto:1'"),
        ("own:1", [], "split must be .* not 'own:1'"),
        ("all:1", [], "split must be .* not 'all:1'"),
        ("", [], "split must be"),
        ("hash", [], "needs a share above 0 and below 1, not ''"),
        ("hash:0", [], "needs a share above 0 and below 1, not '0'"),
        ("hash:1", [], "needs a share above 0 and below 1, not '1'"),
        ("hash:nan", [], "needs a share above 0 and below 1, not 'nan'"),
        ("hash:tenth", [], "needs a share above 0 and below 1, not 'tenth'"),
        ("hash:0.000001", [], "split 'test' would have no images"),
        ("hash:0.999999", [], "split 'train' would have no images"),
        ("last", [], "needs a number from 1 to below 9, the images, not ''"),
        ("last:0", [], "needs a number .* not '0'"),
        ("last:9", [], "needs a number .* not '9'"),
        ("last:-1", [], "needs a number .* not '-1'"),
        ("last:2.5", [], "needs a number .* not '2.5'"),
        ("own", ["val"], "there is no split 'val' to write; there are train"),
        ("auto", ["train", "val"], "there is no split 'val'"),
    ],
)
def test_wrong_rules_are_refused_in_one_line(rule: str, only: list[str], message: str) -> None:
    with pytest.raises(DataError, match=message) as caught:
        apply_rule(_source(train=_numbered(9)), rule, only)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("rule", ["hash:0.1", "last:1"])
def test_nothing_is_held_out_of_a_source_with_splits(rule: str) -> None:
    with pytest.raises(DataError, match=f"--split {rule} would hold .* splits of its own: train, val; use own or all"):
        apply_rule(_source(train=["a"], val=["b"]), rule)


def test_a_split_without_images_is_refused() -> None:
    with pytest.raises(DataError, match="split 'test' would have no images"):
        apply_rule(_source(train=["a"], test=[]), "own")
    assert list(apply_rule(_source(train=["a"], test=[]), "own", ["train"]).splits) == ["train"]
