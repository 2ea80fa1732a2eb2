"""The reader: correct pixels from local and remote shards, errors that name the damage, a bounded cache."""

from __future__ import annotations

import contextlib
import gc
import os
import pickle
import shutil
import threading
import time
import uuid
from dataclasses import replace
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
from helpers import write_images

import data_prep
from eiwtrain import storage
from eiwtrain.data import cache as cache_module
from eiwtrain.data import stream as stream_module
from eiwtrain.data.fingerprint import fingerprint
from eiwtrain.data.manifest import (
    DataError,
    Sidecar,
    load_manifest,
    load_sidecar,
    manifest_to_json,
    sidecar_to_json,
)
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
def test_every_image_is_read_as_it_was_written(data_set: Path, tmp_path: Path, image_of: Any, split: str) -> None:
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


def test_a_pickled_reader_has_no_open_shards(data_set: Path, tmp_path: Path) -> None:
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


def test_the_cache_is_bounded_and_drops_the_least_recently_used(
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
        assert len(reader._open) <= 3  # evicted shards are unmapped too, or the disk would stay full
    assert not list(tmp_path.glob("*.part"))


def test_a_reader_keeps_the_indices_of_open_shards_only(
    tmp_path: Path, image_of: Any, new_data_set: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stream_module, "_OPEN_SHARDS", 2)
    new_data_set(str(tmp_path / "data"), {"train": [5] * 6})
    reader = _reader(tmp_path / "data", "train", tmp_path / "cache")

    def indices() -> int:
        gc.collect()
        return sum(isinstance(o, stream_module._Index) for o in gc.get_objects())

    others = indices()
    for i in (*range(0, 30, 4), 0):  # and one whose index was dropped
        assert np.array_equal(reader[i], image_of("train", i).transpose(2, 0, 1))
    assert 0 < indices() - others <= 2
    reader.close()
    assert indices() == others


def test_a_bound_below_one_shard_still_reads(remote: str, tmp_path: Path, image_of: Any, new_data_set: Any) -> None:
    new_data_set(remote, {"train": [5, 5]})
    reader = _reader(remote, "train", tmp_path, cache_bytes=1)
    for i in (0, 9, 1, 8):
        assert np.array_equal(reader[i], image_of("train", i).transpose(2, 0, 1))
        assert len(list(tmp_path.glob("*.tar"))) == 1


def test_partial_downloads_of_killed_processes_are_removed(remote: str, tmp_path: Path, new_data_set: Any) -> None:
    new_data_set(remote, {"train": [2]})
    old, new = (tmp_path / f"{c * 64}.tar.{c * 32}.part" for c in "ab")
    for path in (old, new):
        path.write_bytes(b"x")
    os.utime(old, (1, 1))
    _reader(remote, "train", tmp_path)[0]
    assert not old.exists()
    assert new.exists()


def test_a_damaged_remote_shard_is_named_and_not_cached(remote: str, tmp_path: Path, new_data_set: Any) -> None:
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


def test_damage_after_a_first_check_is_found_too(data_set: Path, tmp_path: Path) -> None:
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


def test_a_sidecar_of_other_bytes_is_named(data_set: Path, remote: str, tmp_path: Path, new_data_set: Any) -> None:
    copy = _copy(data_set, tmp_path)
    new_data_set(remote, {"train": [5]})
    fs = fsspec.filesystem("memory")
    for sidecar, write in (
        (copy / "train-000000.json", lambda text: (copy / "train-000000.json").write_bytes(text)),
        (f"{remote}/train-000000.json", lambda text: fs.pipe_file(f"{remote}/train-000000.json", text)),
    ):
        text = storage.read_bytes(str(sidecar))
        write(text.replace(b'"label":[0,1', b'"label":[1,0'))
        with pytest.raises(DataError, match=r"train-000000\.tar: its sidecar is not the one of the manifest"):
            _reader(str(sidecar).rpartition("/")[0], "train", tmp_path / "cache")[0]


def test_a_download_that_arrives_damaged_is_repeated_once(
    remote: str, tmp_path: Path, image_of: Any, new_data_set: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    new_data_set(remote, {"train": [5]})
    get_file, asked = cache_module.storage.get_file, []

    def damaging_the_first(url: str, local: Path) -> None:
        get_file(url, local)
        if url not in asked:
            _damage(local)
        asked.append(url)

    monkeypatch.setattr(cache_module.storage, "get_file", damaging_the_first)
    assert np.array_equal(_reader(remote, "train", tmp_path)[0], image_of("train", 0).transpose(2, 0, 1))
    assert len(asked) == 4  # the sidecar and the shard, twice each


def test_sidecars_count_in_the_bound_and_are_evicted_too(remote: str, tmp_path: Path, new_data_set: Any) -> None:
    manifest = new_data_set(remote, {"train": [5] * 4})
    reader = _reader(remote, "train", tmp_path, cache_bytes=manifest.splits["train"].shards[0].bytes)
    for index in (0, 5, 10, 15):
        reader[index]
        for age, path in enumerate(sorted(tmp_path.glob("*.[tj]*"), key=os.path.getmtime, reverse=True)):
            os.utime(path, (time.time() - 10 * age - 10,) * 2)
    assert len(list(tmp_path.glob("*.json"))) <= 2


@pytest.mark.parametrize("damage", [None, "header", "length"])
def test_uncompressed_images_equal_the_compressed_ones(tmp_path: Path, damage: str | None) -> None:
    write_images(tmp_path / "images", 6)
    options: dict[str, Any] = {"path": str(tmp_path / "images"), "of_source": {"split": "all"}}
    png, npy = (
        data_prep.prepare("folder", str(tmp_path / e), 8, preprocess={"encoding": e}, **options) for e in ("png", "npy")
    )
    assert (png.encoding, npy.encoding) == ("png", "npy")
    if damage:
        change = (b"|u1", b"|i1") if damage == "header" else (b"(8, 8, 3)", b"(8, 9, 3)")
        shard = tmp_path / "npy" / "train-000000.tar"
        shard.write_bytes(shard.read_bytes().replace(*change, 1))
        _update_checksums(tmp_path / "npy")
        with pytest.raises(DataError, match=r"train-000000\.tar: image 0 cannot be decoded \(not a .npy file of uint8"):
            _reader(tmp_path / "npy", "train", tmp_path / "cache")[0]
        return
    one, other = (_reader(tmp_path / e, "train", tmp_path / "cache").read(range(6)) for e in ("png", "npy"))
    assert np.array_equal(one, other)
    assert len(np.unique(one)) > 10


def _update_checksums(folder: Path) -> None:
    """Write the checksums of the one shard as it is now into its sidecar and the manifest."""
    manifest = load_manifest(str(folder))
    (shard,) = manifest.splits["train"].shards
    data = (folder / shard.name).read_bytes()
    sidecar = load_sidecar(str(folder), shard.name)
    new = replace(sidecar.shard, bytes=len(data), sha256=storage.sha256_bytes(data))
    text = sidecar_to_json(replace(sidecar, shard=new))
    (folder / "train-000000.json").write_bytes(text)
    shards = (replace(new, sidecar_sha256=storage.sha256_bytes(text)),)
    splits = {"train": replace(manifest.splits["train"], shards=shards)}
    changed = replace(
        manifest, splits=splits, fingerprint=fingerprint(splits, manifest.preprocessing, manifest.classes)
    )
    (folder / "manifest.json").write_bytes(manifest_to_json(changed))


def test_a_cache_that_cannot_be_written_does_not_stop_local_reading(data_set: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a folder")
    _reader(data_set, "train", tmp_path / "file")[0]


@pytest.mark.parametrize("where", ["a file", "/proc/nowhere"])
def test_a_cache_that_cannot_be_used_is_one_line(remote: str, tmp_path: Path, new_data_set: Any, where: str) -> None:
    new_data_set(remote, {"train": [5]})
    (tmp_path / "a file").write_text("in the way")
    folder = tmp_path / where  # an absolute path replaces tmp_path
    with pytest.raises(storage.StorageError, match=rf"data.cache_dir {folder} cannot be used: "):
        _reader(remote, "train", folder)[0]


def test_waiting_for_another_process_counts_as_retry_time(
    remote: str, tmp_path: Path, new_data_set: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Otherwise all that need one shard of a lost store would wait one after the other."""
    manifest = new_data_set(remote, {"train": [5]})
    monkeypatch.setenv("EIWTRAIN_RETRY_SECONDS", "2")
    monkeypatch.setattr(storage, "get_file", lambda url, local: storage.retrying(url, _refused))
    began = time.monotonic()
    shard = manifest.splits["train"].shards[0]
    threads = [
        threading.Thread(target=lambda: _suppressed(cache_module.ShardCache(tmp_path, 1 << 20), remote, shard))
        for _ in range(6)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert time.monotonic() - began < 6 * 2


def _refused() -> None:
    raise ConnectionRefusedError


def _suppressed(cache: Any, url: str, shard: Any) -> None:
    with contextlib.suppress(storage.StorageError):
        cache.fetch(url, shard)


def _flip(path: Path, where: int) -> None:
    """Flip a bit of a file in place, and leave its times as they are."""
    about = path.stat()
    with open(path, "rb+") as f:
        f.seek(where)
        byte = f.read(1)[0]
        f.seek(where)
        f.write(bytes([byte ^ 1]))
    os.utime(path, ns=(about.st_atime_ns, about.st_mtime_ns))


def _truncate(path: Path, size: int) -> None:
    os.truncate(path, size)


def _remove(path: Path, where: int) -> None:
    path.unlink()


@pytest.fixture(params=["png", "npy"])
def images(request: pytest.FixtureRequest, remote: str, tmp_path: Path) -> Any:
    """A remote data set of one shard, a cache that has it, and its pixels."""
    write_images(tmp_path / "images", 6)
    options: dict[str, Any] = {"path": str(tmp_path / "images"), "of_source": {"split": "all"}}
    data_prep.prepare("folder", remote, 8, preprocess={"encoding": request.param}, **options)
    reader = _reader(remote, "train", tmp_path / "cache")
    pixels = reader.read(range(6))
    reader.close()
    return remote, tmp_path / "cache", pixels


@pytest.mark.parametrize("is_open", [False, True])
@pytest.mark.parametrize("damage", [_flip, _truncate, _remove])
def test_what_a_disk_does_to_a_cached_shard_is_found_and_it_is_fetched_again(
    images: Any, damage: Any, is_open: bool, caplog: pytest.LogCaptureFixture
) -> None:
    url, cache, pixels = images
    (path,), (sidecar,) = cache.glob("*.tar"), cache.glob("*.json")
    places = load_sidecar(url, "train-000000.tar")
    for number, where in ((0, 0), (2, places.offsets[2] + places.sizes[2] - 20), (5, places.offsets[5] + 150)):
        reader = _reader(url, "train", cache)
        if is_open:
            reader[number]
        damage(path, where)
        before = storage.faults()
        assert np.array_equal(reader.read(range(6)), pixels)
        assert np.array_equal(reader.read(range(6)), pixels)
        if damage is not _remove and where:
            assert storage.faults() > before
            assert str(path) in caplog.text
            assert storage.sha256_file(path) == path.stem
        reader.close()
        reader.fetch(0)  # where it was removed and is open, it was still there to read
    assert sidecar.exists()


@pytest.mark.parametrize("damage", [_flip, _truncate])
def test_a_cached_sidecar_is_checked_whenever_it_is_read(images: Any, damage: Any) -> None:
    url, cache, pixels = images
    (sidecar,) = cache.glob("*.json")
    for where in (sidecar.read_bytes().index(b'"label":[') + 9, 0):
        damage(sidecar, where)
        before = storage.faults()
        assert np.array_equal(_reader(url, "train", cache).read(range(6)), pixels)
        assert storage.faults() == before + 1
        assert storage.sha256_file(sidecar) == sidecar.stem


@pytest.mark.parametrize("is_open", [False, True])
def test_a_local_shard_that_is_replaced_is_found_whatever_its_size_and_time(
    data_set: Path, tmp_path: Path, is_open: bool
) -> None:
    copy = _copy(data_set, tmp_path)
    shard = copy / "train-000000.tar"
    reader = _reader(copy, "train", tmp_path / "cache")
    assert np.array_equal(reader[3], _reader(data_set, "train", tmp_path / "cache")[3])
    if not is_open:
        reader.close()
    places = load_sidecar(str(copy), shard.name)
    _flip(shard, places.offsets[3] + places.sizes[3] - 20)
    with pytest.raises(DataError, match=r"shard train-000000\.tar is damaged or replaced: sha256"):
        reader[3]
    _truncate(shard, 0)
    with pytest.raises(DataError, match=r"shard train-000000\.tar is damaged or replaced: 0 bytes"):
        reader[0]


def test_one_bad_read_of_a_whole_shard_is_read_again(
    data_set: Path, tmp_path: Path, image_of: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    pread, bad, before = os.pread, [True], storage.faults()

    def bad_at_first(*args: int) -> bytes:
        return b"\0" * args[1] if bad.pop(0) else pread(*args)

    bad.extend([False] * 9)
    monkeypatch.setattr(os, "pread", bad_at_first)
    assert np.array_equal(_reader(data_set, "train", tmp_path)[1], image_of("train", 1).transpose(2, 0, 1))
    assert storage.faults() == before + 1


def test_one_bad_read_of_a_checksum_stops_nothing(
    data_set: Path, tmp_path: Path, image_of: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("sha256_file", "sha256_bytes"):
        right, seen = getattr(storage, name), set()

        def wrong_at_first(of: Any, right: Any = right, seen: set[Any] = seen) -> str:
            first = of not in seen
            seen.add(of)
            return "0" * 64 if first else right(of)

        monkeypatch.setattr(storage, name, wrong_at_first)
    before = storage.faults()
    assert np.array_equal(_reader(data_set, "train", tmp_path)[1], image_of("train", 1).transpose(2, 0, 1))
    assert storage.faults() == before + 2


def test_a_cached_shard_that_cannot_be_opened_is_one_line(
    remote: str, tmp_path: Path, new_data_set: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    new_data_set(remote, {"train": [5]})
    reader = _reader(remote, "train", tmp_path)
    monkeypatch.setattr(reader.cache, "fetch", lambda url, shard: tmp_path / "evicted.tar")
    with pytest.raises(storage.StorageError, match=r"evicted.tar cannot be opened: No such file"):
        reader[0]


def _resealed(folder: Path, there: Sidecar, **changes: Any) -> None:
    """Change the sidecar of the first training shard, and make the checksums of the whole fit."""
    manifest = load_manifest(str(folder))
    train = manifest.splits["train"]
    text = sidecar_to_json(replace(there, **changes))
    (folder / "train-000000.json").write_bytes(text)
    shards = (replace(train.shards[0], sidecar_sha256=storage.sha256_bytes(text)), *train.shards[1:])
    splits = {**manifest.splits, "train": replace(train, shards=shards)}
    made = fingerprint(splits, manifest.preprocessing, manifest.classes)
    (folder / "manifest.json").write_bytes(manifest_to_json(replace(manifest, splits=splits, fingerprint=made)))


def test_a_sidecar_that_does_not_fit_its_shard_is_named(data_set: Path, tmp_path: Path, image_of: Any) -> None:
    copy = _copy(data_set, tmp_path)
    there = load_sidecar(str(copy), "train-000000.tar")
    changed: tuple[tuple[dict[str, Any], str], ...] = (
        ({"digests": there.digests[::-1]}, "image 0 is not the one that was written"),
        ({"digests": ("xyz", *there.digests[1:])}, "its sidecar has digests of another kind"),
        ({"labels": (1_000, *there.labels[1:])}, "its sidecar has label 1000, but"),
        ({"labels": (-2, *there.labels[1:])}, "its sidecar has label -2, but"),
    )
    for changes, problem in changed:
        _resealed(copy, there, **changes)
        with pytest.raises(DataError, match=rf"shard train-000000\.tar: {problem}"):
            _reader(copy, "train", tmp_path / "cache")[0]
    _resealed(copy, there, digests=("",) * 20)  # as other programs may write it
    assert np.array_equal(_reader(copy, "train", tmp_path / "cache")[0], image_of("train", 0).transpose(2, 0, 1))


def test_other_files_in_the_cache_folder_are_left_alone(remote: str, tmp_path: Path, new_data_set: Any) -> None:
    new_data_set(remote, {"train": [5, 5]})
    mine = [tmp_path / name for name in ("photos.tar", "config.json", "old.part", "notes.tmp")]
    for path in mine:
        path.write_bytes(b"mine")
        os.utime(path, (1, 1))
    reader = _reader(remote, "train", tmp_path, cache_bytes=1)
    reader.read([0, 9, 0])
    assert all(path.read_bytes() == b"mine" for path in mine)


def test_a_link_in_the_cache_folder_is_not_followed(remote: str, tmp_path: Path, new_data_set: Any) -> None:
    manifest = new_data_set(remote, {"train": [5]})
    (tmp_path / "precious").write_bytes(b"precious")
    (tmp_path / "cache").mkdir()
    lock = f"fetch-{manifest.splits['train'].shards[0].sidecar_sha256[:3]}.lock"
    (tmp_path / "cache" / lock).symlink_to(tmp_path / "precious")
    with pytest.raises(storage.StorageError, match=r"data\.cache_dir .* cannot be used: "):
        _reader(remote, "train", tmp_path / "cache")[0]
    assert (tmp_path / "precious").read_bytes() == b"precious"
