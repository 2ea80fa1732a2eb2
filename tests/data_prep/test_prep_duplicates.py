"""Images with the same pixels: found in all shards and splits, always reported, left out of training on request."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from data_prep import prepare, writer
from data_prep.__main__ import main
from data_prep.duplicates import find_duplicates
from data_prep.verify import verify
from eiwtrain.data import ShardReader, load_manifest
from eiwtrain.data.manifest import Manifest, Sidecar, load_sidecar
from eiwtrain.data.shards import Shard


def _sidecar(keys: list[str], digests: list[str], dropped: tuple[dict[str, str], ...] = ()) -> Sidecar:
    n = len(keys)
    return Sidecar(Shard("s", n, 0, ""), "", (), tuple(keys), (0,) * n, (0,) * n, (0,) * n, tuple(digests), dropped)


@given(st.lists(st.lists(st.integers(0, 9), max_size=8), max_size=4), st.lists(st.integers(0, 9), max_size=12))
def test_all_but_one_of_equal_images_are_duplicates(train: list[list[int]], test: list[int]) -> None:
    number = iter(range(100))
    shards = [_sidecar([f"{next(number):08d}" for _ in shard], [str(d) for d in shard]) for shard in train]
    held_out = _sidecar([f"{i:08d}" for i in range(len(test))], [str(d) for d in test])
    found = find_duplicates({"train": shards, "val": [held_out]})
    distinct = {d for shard in train for d in shard} | set(test)
    assert len(found) == sum(map(len, train)) + len(test) - len(distinct)
    assert sum(d.split == "val" for d in found) == len(test) - len(
        set(test)
    )  # no held-out image is a duplicate of one for training
    assert len({(d.split, d.key) for d in found}) == len(found)
    assert not {f"{d.split}/{d.key}" for d in found} & {d.first for d in found}


def test_a_dropped_image_is_still_one_of_its_kind() -> None:
    gone = ({"key": "00000001", "digest": "a", "source": "", "reason": ""},)
    once = find_duplicates({"train": [_sidecar(["00000000", "00000002"], ["a", "b"], gone)]})
    assert [(d.key, d.first) for d in once] == [("00000001", "train/00000000")]


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """A folder of 30 images for training, five of them twice and one held out; ten for the test, two of them equal."""
    rng = np.random.default_rng(0)
    images = [Image.fromarray(rng.integers(0, 256, (8, 8, 3), np.uint8)) for _ in range(39)]
    train = [*images[:24], *images[:5], images[30]]
    test = [*images[30:39], images[38]]
    for split, members in (("train", train), ("test", test)):
        (tmp_path / "pictures" / split).mkdir(parents=True)
        for n, image in enumerate(members):
            suffix = "png" if n % 2 else "bmp"  # pixels are compared, not files
            image.save(tmp_path / "pictures" / split / f"{n:03d}.{suffix}")
    return tmp_path / "pictures"


def _prepare(pictures: Path, output: Path, **options: Any) -> Manifest:
    return prepare("folder", str(output), 8, path=str(pictures), shard_size=4, **options)


def _bytes(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in sorted(folder.iterdir())}


def _images(folder: Path, split: str) -> list[bytes]:
    reader = ShardReader(str(folder), load_manifest(str(folder)), split, folder.parent / "cache")
    return [image.tobytes() for image in reader.read(range(len(reader)))]


def test_duplicates_are_counted_and_kept_unless_asked(pictures: Path, tmp_path: Path) -> None:
    manifest = _prepare(pictures, tmp_path / "set")
    assert manifest.duplicates == {"train": 6, "test": 1}
    assert {name: split.samples for name, split in manifest.splits.items()} == {"train": 30, "test": 10}


def test_duplicates_are_dropped_only_from_training(pictures: Path, tmp_path: Path) -> None:
    manifest = _prepare(pictures, tmp_path / "set", drop_duplicates=True)
    assert manifest.duplicates == {"train": 6, "test": 1}
    assert {name: split.samples for name, split in manifest.splits.items()} == {"train": 24, "test": 10}
    train, test = _images(tmp_path / "set", "train"), _images(tmp_path / "set", "test")
    assert len(set(train)) == 24
    assert not set(train) & set(test)
    sidecars = [load_sidecar(str(tmp_path / "set"), shard.name) for shard in manifest.splits["train"].shards]
    dropped = [entry for sidecar in sidecars for entry in sidecar.dropped]
    assert len(dropped) == 6
    assert all(entry["reason"].startswith("same pixels as t") for entry in dropped)
    assert verify(str(tmp_path / "set")) == []


def test_a_rerun_after_a_kill_between_the_passes_gives_the_same_bytes(
    pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = tmp_path / "whole" / "set"
    _prepare(pictures, whole, drop_duplicates=True)
    for cut in range(1, 18):  # tasks that are done before the end: shards first, then those that are written again
        run_task, done, folder = writer.run_task, [], tmp_path / str(cut) / "set"

        def some(task: Any, run_task: Any = run_task, done: list[Any] = done, cut: int = cut) -> Any:
            if len(done) == cut:
                raise KeyboardInterrupt
            done.append(task)
            return run_task(task)

        monkeypatch.setattr(writer, "run_task", some)
        try:
            _prepare(pictures, folder, drop_duplicates=True)
        except KeyboardInterrupt:
            assert not (folder / "manifest.json").exists()
        monkeypatch.undo()
        _prepare(pictures, folder, drop_duplicates=True)
        assert _bytes(folder) == _bytes(whole)
    times = {p.name: p.stat().st_mtime_ns for p in whole.iterdir()}
    _prepare(pictures, whole, drop_duplicates=True)
    assert {p.name: p.stat().st_mtime_ns for p in whole.iterdir()} == times


def test_a_set_without_duplicates_is_another_data_set(pictures: Path, tmp_path: Path) -> None:
    kept, dropped = (_prepare(pictures, tmp_path / str(n) / "set", drop_duplicates=bool(n)) for n in range(2))
    assert kept.plan != dropped.plan
    assert kept.fingerprint != dropped.fingerprint


def test_the_command_prints_what_it_found_and_dropped(
    pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = ["folder", "--source", str(pictures), "--resolution", "8", "--workers", "1", "--output"]
    assert main([*base, str(tmp_path / "kept")]) == 0
    assert "7 images have the same pixels as another" in (out := capsys.readouterr().out)
    assert "none dropped" in out
    assert main([*base, str(tmp_path / "dropped"), "--drop-duplicates"]) == 0
    assert "6 dropped" in capsys.readouterr().out
