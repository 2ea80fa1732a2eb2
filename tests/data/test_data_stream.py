"""The reader: right pixels from local and remote shards, damage named, the cache within its bound."""

from __future__ import annotations

import os
import pickle
import shutil
import time
import uuid
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest

from eiwtrain.data import cache as cache_module
from eiwtrain.data.manifest import DataError, load_manifest
from eiwtrain.data.stream import ShardReader


@pytest.fixture
def remote() -> Any:
    """An empty folder of fsspec's in-process object store."""
    url = f"memory://{uuid.uuid4().hex}"
    yield url
    fsspec.filesystem("memory").rm(url, recursive=True)


def _reader(url: Any, split: str, cache: Path, **options: Any) -> ShardReader:
    return ShardReader(str(url), load_manifest(str(url)), split, cache, **options)


def _copy(data_set: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(data_set, tmp_path / "copy"))


def _damage(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("split", ["train", "test"])
def test_every_image_comes_back_as_it_was(data_set: Path, tmp_path: Path, image_of: Any, split: str) -> None:
    reader = _reader(data_set, split, tmp_path)
    assert reader.image_shape == (3, 8, 8)
    for i in range(len(reader)):
        image = reader[i]
        assert image.dtype == np.uint8
        assert np.array_equal(image, image_of(split, i).transpose(2, 0, 1))
    assert not list(tmp_path.glob("*.tar"))  # local shards are read in place


def test_an_index_outside_the_split_is_refused(data_set: Path, tmp_path: Path) -> None:
    reader = _reader(data_set, "test", tmp_path)
    for index in (-1, 23):
        with pytest.raises(IndexError):
            reader[index]


def test_a_reader_travels_unopened(data_set: Path, tmp_path: Path) -> None:
    reader = _reader(data_set, "train", tmp_path)
    first = reader[7]
    other = pickle.loads(pickle.dumps(reader))
    assert not other._open
    assert np.array_equal(other[7], first)


def test_remote_shards_are_fetched_once_and_equal_local_ones(
    remote: str, tmp_path: Path, image_of: Any, new_data_set: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    new_data_set(remote, {"train": [5, 6]})
    fetched = []
    get_file = cache_module.storage.get_file
    monkeypatch.setattr(
        cache_module.storage, "get_file", lambda url, local: (fetched.append(url), get_file(url, local))
    )
    for reader in (_reader(remote, "train", tmp_path), _reader(remote, "train", tmp_path)):
        for i in range(11):
            assert np.array_equal(reader[i], image_of("train", i).transpose(2, 0, 1))
    assert len(fetched) == len(set(fetched)) == 4  # two shards and their sidecars


def test_the_cache_stays_within_its_bound_and_drops_the_least_recently_used(
    remote: str, tmp_path: Path, image_of: Any, new_data_set: Any
) -> None:
    manifest = new_data_set(remote, {"train": [5] * 6})
    size = manifest.splits["train"].shards[0].bytes
    reader = _reader(remote, "train", tmp_path, cache_bytes=int(3.5 * size))
    for number in (0, 1, 2):
        reader.read([5 * number])
        for age, path in enumerate(sorted(tmp_path.glob("*.tar"), key=os.path.getmtime, reverse=True)):
            os.utime(path, (time.time() - 10 * age - 10,) * 2)
    for number in (3, 4, 5, 0, 1):
        assert np.array_equal(reader[5 * number], image_of("train", 5 * number).transpose(2, 0, 1))
        assert sum(p.stat().st_size for p in tmp_path.glob("*.tar")) <= 3.5 * size
        assert len(reader._open) <= 3  # what is evicted is unmapped too, or the disk would stay full
    assert not list(tmp_path.glob("*.part"))


def test_a_bound_below_one_shard_still_reads(remote: str, tmp_path: Path, image_of: Any, new_data_set: Any) -> None:
    new_data_set(remote, {"train": [5, 5]})
    reader = _reader(remote, "train", tmp_path, cache_bytes=1)
    for i in (0, 9, 1, 8):
        assert np.array_equal(reader[i], image_of("train", i).transpose(2, 0, 1))
        assert len(list(tmp_path.glob("*.tar"))) == 1


def test_partial_downloads_of_killed_processes_are_removed(remote: str, tmp_path: Path, new_data_set: Any) -> None:
    new_data_set(remote, {"train": [2]})
    old, new = tmp_path / "a.part", tmp_path / "b.part"
    for path in (old, new):
        path.write_bytes(b"x")
    os.utime(old, (1, 1))
    _reader(remote, "train", tmp_path)[0]
    assert not old.exists()
    assert new.exists()


def test_a_damaged_remote_shard_is_named_and_not_kept(remote: str, tmp_path: Path, new_data_set: Any) -> None:
    new_data_set(remote, {"train": [5]})
    fs = fsspec.filesystem("memory")
    data = bytearray(fs.cat_file(f"{remote}/train-000000.tar"))
    data[700] ^= 1
    fs.pipe_file(f"{remote}/train-000000.tar", bytes(data))
    with pytest.raises(DataError, match=r"shard train-000000\.tar is damaged or replaced: sha256"):
        _reader(remote, "train", tmp_path)[0]
    assert not list(tmp_path.glob("*.tar"))
    assert not list(tmp_path.glob("*.part"))


def test_a_damaged_local_shard_is_named_and_the_others_read(data_set: Path, tmp_path: Path) -> None:
    copy = _copy(data_set, tmp_path)
    _damage(copy / "train-000002.tar")
    reader = _reader(copy, "train", tmp_path / "cache")
    reader[0]
    with pytest.raises(
        DataError, match=r"shard train-000002\.tar is damaged or replaced: sha256 is \w+\.\.\., the manifest"
    ):
        reader[25]


def test_damage_that_comes_after_a_first_check_is_seen_too(data_set: Path, tmp_path: Path) -> None:
    copy = _copy(data_set, tmp_path)
    _reader(copy, "train", tmp_path / "cache")[0]
    _damage(copy / "train-000000.tar")
    with pytest.raises(DataError, match=r"train-000000\.tar"):
        _reader(copy, "train", tmp_path / "cache")[0]


def test_a_short_or_missing_shard_or_sidecar_is_named(data_set: Path, tmp_path: Path) -> None:
    copy = _copy(data_set, tmp_path)
    shard = copy / "test-000000.tar"
    shard.write_bytes(shard.read_bytes()[:-512])
    with pytest.raises(DataError, match=r"test-000000\.tar is damaged or replaced: \d+ bytes, the manifest says \d+"):
        _reader(copy, "test", tmp_path / "cache")[0]
    shard.unlink()
    with pytest.raises(DataError, match=r"test-000000\.tar is missing"):
        _reader(copy, "test", tmp_path / "cache")[0]
    (copy / "test-000001.json").unlink()
    with pytest.raises(DataError, match=r"test-000001\.tar: its sidecar .* is not there"):
        _reader(copy, "test", tmp_path / "cache")[12]


def test_a_cache_that_cannot_be_written_does_not_stop_local_reading(data_set: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a folder")
    _reader(data_set, "train", tmp_path / "file")[0]
