"""LSUN: what an LMDB holds and where, whatever its tree; categories and splits by name; damage named in one line."""

from __future__ import annotations

import io
import json
import pickle
import random
import re
import shutil
import struct
import tarfile
import tempfile
import zipfile
from mmap import PAGESIZE as PAGE  # which LMDB makes its own
from pathlib import Path
from typing import Any

import fsspec
import lmdb
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from data_prep import prepare
from data_prep.formats.lmdb_values import list_values
from data_prep.formats.ranges import ByteRange
from data_prep.sources import lsun as module
from data_prep.sources import read_source
from data_prep.sources.lsun import lsun
from eiwtrain import storage
from eiwtrain.data.manifest import DataError, load_sidecar


def _image(seed: int, kind: str) -> bytes:
    """Make an image of blots, 40x30."""
    coarse = np.random.default_rng(seed).integers(0, 256, (3, 4, 3), np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(coarse).resize((40, 30), Image.Resampling.BILINEAR).save(buffer, kind, quality=90)
    return buffer.getvalue()


def _write(folder: Path, values: dict[bytes, bytes], **options: Any) -> Path:
    folder.mkdir(parents=True)
    with lmdb.open(str(folder), map_size=1 << 26, **options) as env, env.begin(write=True) as transaction:
        for key, value in values.items():
            transaction.put(key, value)
    return folder


def _file(folder: Path) -> ByteRange:
    return ByteRange(str(folder / "data.mdb"), 0, (folder / "data.mdb").stat().st_size)


def _read(file: ByteRange) -> dict[bytes, bytes]:
    """Return all keys and values, in the order of the listing."""
    values = list_values(file)
    data = Path(file.url()).read_bytes()
    places = zip(values.starts, values.sizes, strict=True)
    return {values.key(row): data[start : start + size] for row, (start, size) in enumerate(places)}


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two categories, of 7 and 5 images for training and 2 and 1 for validation, and LSUN's test images."""
    root = tmp_path_factory.mktemp("lsun")
    for name, number, kind in [
        ("tower_train_lmdb", 7, "JPEG"),
        ("tower_val_lmdb", 2, "WEBP"),
        ("bedroom_train_lmdb", 5, "WEBP"),
        ("bedroom_val_lmdb", 1, "JPEG"),
        ("test_lmdb", 3, "JPEG"),
    ]:
        seeds = range(100 * len(name), 100 * len(name) + number)
        _write(root / name, {b"%040x" % (seed * 7919 % 1009): _image(seed, kind) for seed in seeds})
    return root


def test_images_labels_and_order_are_those_of_the_lmdbs(scenes: Path, tmp_path: Path) -> None:
    manifest = prepare("lsun", str(tmp_path), 10, path=str(scenes), workers=1)
    assert manifest.classes == ("bedroom", "tower")
    assert {name: split.samples for name, split in manifest.splits.items()} == {"train": 12, "val": 3}
    for split in ("train", "val"):
        expected: list[tuple[str, int, bytes]] = []
        for label, category in enumerate(manifest.classes):
            with (
                lmdb.open(str(scenes / f"{category}_{split}_lmdb"), readonly=True, lock=False) as env,
                env.begin() as t,
            ):
                expected += [(f"{category}_{split}/{key.decode()}", label, value) for key, value in t.cursor()]
        kinds = {value[:4] for _, _, value in expected}
        assert len(kinds) == 2  # JPEG and WebP
        with tarfile.open(tmp_path / f"{split}-000000.tar") as tar:
            for member in tar.getmembers()[::2]:
                number = int(member.name.removesuffix(".png"))
                name, label, value = expected[number]
                about = json.load(tar.extractfile(f"{number:08d}.json"))  # type: ignore[arg-type]
                assert about == {"label": label, "source": name}
                with Image.open(tar.extractfile(member)) as made, Image.open(io.BytesIO(value)) as image:  # type: ignore[arg-type]
                    square = image.convert("RGB").resize((10, 10), Image.Resampling.BOX, box=(5, 0, 35, 30))
                    assert np.abs(np.asarray(made, int) - np.asarray(square, int)).max() <= 2


def test_categories_are_chosen_and_a_missing_one_is_named(scenes: Path) -> None:
    source = lsun(str(scenes), ["tower"])
    assert source.classes == ("tower",)
    assert {name: len(items) for name, items in source.splits.items()} == {"train": 7, "val": 2}
    assert {item.label for items in source.splits.values() for item in items} == {0}
    with pytest.raises(DataError, match=r"there is no category 'kitchen', only bedroom, tower$"):
        lsun(str(scenes), ["tower", "kitchen"])


@pytest.mark.parametrize("path", ["tower_train_lmdb", "tower_train_lmdb/", "tower_train_lmdb/data.mdb"])
def test_a_single_lmdb_is_a_source(scenes: Path, path: str) -> None:
    source = lsun(f"{scenes}/{path}")
    assert list(source.splits) == ["train"]
    assert list(source.splits["train"]) == list(lsun(str(scenes), ["tower"]).splits["train"])
    assert not source.remote


def test_lmdbs_in_a_tar_and_in_a_bucket_are_read_in_place(scenes: Path, tmp_path: Path) -> None:
    here = lsun(str(scenes)).splits
    with tarfile.open(tmp_path / "lsun.tar", "w") as tar:
        tar.add(scenes, "lsun")
    bucket = fsspec.filesystem("memory")
    bucket.put(str(scenes), "/lsun", recursive=True)
    try:
        for path, remote in ((str(tmp_path / "lsun.tar"), False), ("memory://lsun", True)):
            source = lsun(path)
            assert source.remote == remote
            for split, items in source.splits.items():
                pairs = list(zip(items, here[split], strict=True))
                assert all((a.source, a.label, a.size) == (b.source, b.label, b.size) for a, b in pairs)
                assert all(pickle.loads(pickle.dumps(a)).load() == b.load() for a, b in pairs)
    finally:
        bucket.rm("/lsun", recursive=True)


def test_a_zip_must_be_unpacked_unless_it_already_is(scenes: Path, tmp_path: Path) -> None:
    archive = tmp_path / "bedroom_train_lmdb.zip"
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as packed:
        packed.write(scenes / "bedroom_train_lmdb" / "data.mdb", "bedroom_train_lmdb/data.mdb")
    for path in (archive, tmp_path):
        with pytest.raises(DataError, match=f"unpack it first: unzip .*{archive.name}$"):
            lsun(str(path))
    shutil.copytree(scenes / "bedroom_train_lmdb", tmp_path / "bedroom_train_lmdb")
    assert len(lsun(str(tmp_path)).splits["train"]) == 5


def test_a_wrong_lsun_is_refused_in_one_line(scenes: Path, tmp_path: Path) -> None:
    def linked(folder: str, *names: str) -> str:
        for name in names:
            (tmp_path / folder / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / folder / name).symlink_to(scenes / Path(name).name)
        return str(tmp_path / folder)

    (tmp_path / "tower_val_lmdb").mkdir()
    (tmp_path / "tower_val_lmdb" / "data.mdb").write_bytes(b"no LMDB" * 1000)
    small = _write(tmp_path / "a" / "bedroom_val_lmdb", {}) / "data.mdb"
    small.write_bytes(small.read_bytes()[:100])
    named = tmp_path / "pets_train_lmdb"
    with lmdb.open(str(named), max_dbs=1) as env, env.begin(write=True, db=env.open_db(b"cats")) as transaction:
        transaction.put(b"1", b"2")
    for path, message in [
        (linked("test", "test_lmdb"), "it holds no LMDB of LSUN: folders called CATEGORY_train_lmdb"),
        (str(scenes / "bedroom_val_lmdb" / "other.mdb"), "other.mdb: no such file"),
        (
            linked("lame", "tower_train_lmdb", "tower_val_lmdb", "bedroom_train_lmdb"),
            "tower has a val LMDB and bedroom",
        ),
        (
            linked("twice", "tower_train_lmdb", "x/tower_train_lmdb"),
            "tower_train_lmdb is there twice: tower_train_lmdb/",
        ),
        (str(tmp_path / "tower_val_lmdb"), "not the data file of an LMDB"),
        (str(small.parent), "100 bytes are too few for the data file of an LMDB"),
        (str(named), "more than single values with their keys"),
    ]:
        with pytest.raises(DataError, match=message) as caught:
            lsun(path)
        assert "\n" not in str(caught.value)


def test_a_value_that_is_not_an_image_is_a_reject(tmp_path: Path) -> None:
    values = {b"%d" % n: _image(n, "JPEG") for n in range(5)} | {b"3": b"\xff\xd8\xff no image", b"4": b""}
    _write(tmp_path / "bedroom_val_lmdb", values)
    output = tmp_path / "out"
    with pytest.raises(DataError, match="cannot be decoded"):
        prepare("lsun", str(output), 8, path=str(tmp_path / "bedroom_val_lmdb"))
    manifest = prepare("lsun", str(output), 8, path=str(tmp_path / "bedroom_val_lmdb"), max_rejects=0.5)
    assert manifest.splits["val"].samples == 3
    rejects = load_sidecar(str(output), "val-000000.tar").rejects
    assert sorted(reject["source"] for reject in rejects) == ["bedroom_val/3", "bedroom_val/4"]


def test_the_protocol_names_categories_and_missing_images(scenes: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert lsun(str(scenes)).protocol == "LSUN bedroom, tower, 12 of 3,741,306 images for training"
    monkeypatch.setitem(module.TRAIN_IMAGES, "tower", 7)
    assert lsun(str(scenes), ["tower"]).protocol == "LSUN tower"
    monkeypatch.delitem(module.TRAIN_IMAGES, "tower")
    assert lsun(str(scenes)).protocol == "LSUN bedroom, tower"


@given(st.slices(12), st.integers(-12, 11))
@settings(max_examples=50, deadline=None)
def test_images_are_a_sequence(scenes: Path, part: slice, index: int) -> None:
    images = lsun(str(scenes)).splits["train"]
    items = list(images)
    assert len(items) == len(images) == 12
    assert list(images[part]) == items[part]
    assert images[index] == items[index]
    with pytest.raises(IndexError):
        images[12]


_TRANSACTIONS = st.lists(
    st.dictionaries(
        st.binary(min_size=1, max_size=511),
        st.none() | st.integers(0, 20_000).map(lambda size: random.Random(size).randbytes(size)),
        max_size=40,
    ),
    min_size=1,
    max_size=4,
)


@given(_TRANSACTIONS)
@settings(max_examples=60, deadline=None)
def test_values_put_and_deleted_are_listed_as_lmdb_does(transactions: list[dict[bytes, bytes | None]]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        expected: dict[bytes, bytes] = {}
        with lmdb.open(folder, map_size=1 << 26, sync=False) as env:
            for changes in transactions:
                with env.begin(write=True) as transaction:
                    for key, value in changes.items():
                        if value is None:
                            transaction.delete(key)
                            expected.pop(key, None)
                        else:
                            transaction.put(key, value)
                            expected[key] = value
        found = _read(_file(Path(folder)))
        assert list(found.items()) == sorted(expected.items())


def test_a_deep_tree_is_walked_and_no_value_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    values = {b"%0400d" % (n * 7919 % 10_007): bytes([n % 256]) * 9000 for n in range(3000)}
    folder = _write(tmp_path / "deep", values)
    with lmdb.open(str(folder), readonly=True) as env:
        assert env.stat()["depth"] >= 4
    read = storage.read_range
    lengths: list[int] = []

    def counted(url: str, start: int, length: int) -> bytes:
        lengths.append(length)
        return read(url, start, length)

    monkeypatch.setattr(storage, "read_range", counted)
    found = _read(_file(folder))
    assert list(found.items()) == sorted(values.items())
    assert sum(lengths) < 0.15 * sum(map(len, values.values()))


ENTRIES = 150


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """A data file with values inside its leaves and on pages of their own."""
    values = {b"%0100d" % n: random.Random(n).randbytes(100 + 1237 * n % (PAGE + 900)) for n in range(ENTRIES)}
    return (_write(tmp_path_factory.mktemp("whole") / "x", values) / "data.mdb").read_bytes()


def _listed_or_refused(content: bytes) -> str:
    """Return the message if the file is refused; otherwise check that all that is listed lies in it."""
    with tempfile.TemporaryDirectory() as folder:
        (file := Path(folder, "data.mdb")).write_bytes(content)
        try:
            values = list_values(ByteRange(str(file), 0, len(content)))
        except DataError as e:
            message = str(e)
        else:
            ends = [start + size for start, size in zip(values.starts, values.sizes, strict=True)]
            assert max(ends, default=0) <= len(content)
            return ""
        assert message.startswith(f"{file}: ")
        assert "\n" not in message
        return message.removeprefix(f"{file}: ")


@given(st.floats(0, 1, exclude_max=True))
@settings(max_examples=60, deadline=None)
def test_a_file_cut_off_anywhere_is_refused_or_complete(whole: bytes, share: float) -> None:
    end = int(share * len(whole))
    assert _listed_or_refused(whole[:end]) or end > len(whole) - PAGE


def test_a_cut_off_lmdb_is_named_as_such(scenes: Path, tmp_path: Path) -> None:
    shutil.copytree(scenes / "tower_train_lmdb", folder := tmp_path / "tower_train_lmdb")
    with open(folder / "data.mdb", "rb+") as f:
        f.truncate((folder / "data.mdb").stat().st_size // 2)
    with pytest.raises(DataError, match=r"the LMDB is cut off: it continues beyond its [\d,]+ bytes; fetch it again$"):
        lsun(str(folder))


def _pages(content: bytes) -> tuple[list[bytes], list[int]]:
    """Return all pages, and the numbers of leaves, branches and meta pages."""
    pages = [content[start : start + PAGE] for start in range(0, len(content), PAGE)]
    tree = [n for n, page in enumerate(pages) if page[:8] == n.to_bytes(8, "little") and page[10] in (1, 2, 8)]
    return pages, sorted(tree, key=lambda n: pages[n][10] != 2)


def _with_number(page: bytes, at: int, number: int) -> bytes:
    """Return the page with two of its bytes changed."""
    return page[:at] + struct.pack("<H", number) + page[at + 2 :]


def _nodes(page: bytes) -> tuple[int, ...]:
    """Return where they begin in the page."""
    (end,) = struct.unpack_from("<H", page, 12)
    return struct.unpack(f"<{(end - 16) // 2}H", page[16:end])


def test_what_is_wrong_with_a_tree_is_named(whole: bytes) -> None:
    pages, tree = _pages(whole)
    a, b = tree[:2]
    leaf, (root,) = pages[a], (n for n in tree if pages[n][10] == 1)
    big, small = (next(at for at in _nodes(leaf) if leaf[at + 4] == flag) for flag in (1, 0))
    loop = pages[root]
    for at in _nodes(loop):
        loop = _with_number(loop, at, root)
    meta = {depth: {n: _with_number(pages[n], 94, depth) for n in (0, 1)} for depth in (3, 5, 60_000)}
    for changed, message in [
        ({a: pages[b], b: leaf}, rf"a damaged LMDB \(page {a}\); fetch it again"),
        (
            {a: _with_number(leaf, 12, 2 * len(_nodes(leaf)) + 14)},
            rf".*\({ENTRIES - 1} entries, not {ENTRIES} as it says.*",
        ),
        ({a: _with_number(leaf, 12, 8)}, rf".*\(page {a}\).*"),
        ({a: _with_number(leaf, 16, 0xFFFF)}, rf".*\(page {a}\).*"),
        ({a: _with_number(leaf, big + 6, 0xFFF0)}, rf".*\(page {a}: its nodes overlap\).*"),
        ({a: _with_number(leaf, small + 6, 0xFFF0)}, rf".*\(page {a}: its nodes overlap\).*"),
        (meta[3], r"a damaged LMDB \(page \d+\).*"),
        (meta[5] | {root: loop}, rf".*\(page {root} is in its tree twice\).*"),
        (meta[60_000] | {root: loop}, r".*\(a tree of 60,000 levels\).*"),
        ({n: _with_number(pages[n], 40, 0) for n in (0, 1)}, r".*\(pages of 0 bytes\).*"),
    ]:
        content = b"".join(changed.get(n, page) for n, page in enumerate(pages))
        assert re.fullmatch(message, _listed_or_refused(content))


def test_entries_that_share_a_large_value_are_refused(tmp_path: Path) -> None:
    values = {b"%03d" % n: bytes(500_000 if n == 0 else 1) for n in range(100)}
    content = (_write(tmp_path / "x", values) / "data.mdb").read_bytes()
    pages, tree = _pages(content)
    (a,) = (n for n in tree if pages[n][10] == 2)
    count = len(_nodes(pages[a]))
    pages[a] = pages[a][:16] + pages[a][16:18] * count + pages[a][16 + 2 * count :]
    assert "its values overlap" in _listed_or_refused(b"".join(pages))


@given(st.data())
@settings(max_examples=150, deadline=None)
def test_a_damaged_tree_is_an_error_of_one_line_or_harmless(whole: bytes, data: st.DataObject) -> None:
    pages, tree = _pages(whole)
    page, other = data.draw(st.sampled_from(tree)), pages[data.draw(st.sampled_from(tree))]
    keep = data.draw(st.sampled_from([0, 8, 10, 12, 16, 64, 2000]))
    rest = data.draw(st.sampled_from([bytes(PAGE), b"\xff" * PAGE, other, random.Random(keep).randbytes(PAGE)]))
    pages[page] = pages[page][:keep] + rest[keep:]
    _listed_or_refused(b"".join(pages))


def test_exported_images_are_named_with_the_source_that_reads_them(tmp_path: Path) -> None:
    for name in ("012abc", "345def"):
        folder = tmp_path / "tower_train" / "/".join(name[:3])
        folder.mkdir(parents=True)
        (folder / f"{name}.webp").write_bytes(_image(1, "WEBP"))
    with pytest.raises(DataError, match=re.escape(f"python -m data_prep folder --source {tmp_path}")):
        lsun(str(tmp_path))
    source = read_source("folder", 8, str(tmp_path / "tower_train"), split="own")
    assert [item.label for item in source.splits["train"]] == [-1, -1]  # 0 and 3 are no classes


def test_an_lmdb_that_is_only_a_link_stops_the_work(scenes: Path, tmp_path: Path) -> None:
    shutil.copytree(scenes, tmp_path / "copy")
    (tmp_path / "copy" / "ferry_train_lmdb").symlink_to("nowhere")
    with pytest.raises(DataError, match="ferry_train_lmdb is a link to a file that is not there; fetch or remove it"):
        lsun(str(tmp_path / "copy"))
