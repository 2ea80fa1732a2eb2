"""Files of a source: the same names, order and bytes from a folder, a tar and a zip, local and remote."""

from __future__ import annotations

import bz2
import contextlib
import gzip
import io
import lzma
import os
import pickle
import re
import struct
import tarfile
import warnings
import zipfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest
from containers import tar_of, zip_of
from hypothesis import given, settings
from hypothesis import strategies as st

from data_prep.formats.files import HIDDEN, LINK, LOST, REPLACED, SPECIAL, FoundFile, list_files, list_tar
from data_prep.formats.ranges import ByteRange
from eiwtrain import storage
from eiwtrain.data.manifest import DataError
from eiwtrain.storage import StorageError

FILES = {
    "b/2.png": b"two",
    "b/10.png": b"ten" * 1000,
    "b-c/1.JPG": b"",
    "B/1.webp": b"B",
    "deep/er/and/deeper/x.tiff": bytes(range(256)) * 20,
    "a name, with #spaces? 100%.png": b"spaces",
    "höhe/写真.jpeg": b"unicode",
    "folder.png/1.png": b"in a folder with the name of an image",
    "top.gif": b"gif",
}
OTHERS = {"b/.hidden.png": b"h", ".git/x.png": b"g", "__MACOSX/._2.png": b"m", "notes.txt": b"n", "png": b"p"}
IN_ORDER = sorted(FILES, key=lambda name: name.split("/"))
KINDS = ("folder", "tar", "zip", "deflated zip")


@pytest.fixture(params=["here", "memory", pytest.param("s3", marks=pytest.mark.cluster)])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """URL of an empty folder: local, in memory, on a real S3 server."""
    if request.param == "here":
        yield str(tmp_path / "place")
    elif request.param == "memory":
        url = f"memory://{tmp_path.name}"
        yield url
        storage.delete(url)
    else:
        yield request.getfixturevalue("s3")


def put(url: str, kind: str, files: dict[str, bytes]) -> str:
    """Write the files at the URL as a folder, tar or zip, in the order given."""
    if kind == "folder":
        for name, data in files.items():
            storage.write_bytes(storage.join(url, name), data)
    elif kind == "tar":
        storage.write_bytes(url, tar_of(files))
    else:
        storage.write_bytes(url, zip_of(files, zipfile.ZIP_DEFLATED if "deflated" in kind else zipfile.ZIP_STORED))
    return url


def names(entries: list[FoundFile]) -> list[str]:
    return ["/".join(entry.parts) for entry in entries]


def contents(entries: list[FoundFile]) -> dict[str, bytes]:
    assert len(set(names(entries))) == len(entries)
    return {"/".join(entry.parts): entry.load() for entry in entries}


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_and_place_gives_the_same_files(place: str, kind: str) -> None:
    entries = list_files(put(storage.join(place, "images"), kind, OTHERS | FILES))
    assert names(entries) == IN_ORDER
    assert [entry.size for entry in entries] == [len(FILES[name]) for name in IN_ORDER]
    assert contents(pickle.loads(pickle.dumps(entries))) == FILES


@pytest.mark.parametrize("kind", KINDS)
def test_only_files_with_the_suffixes_are_listed(tmp_path: Path, kind: str) -> None:
    url = put(str(tmp_path / "x"), kind, {"a.TAR": b"a", "b/c.tar": b"c", "d.tar.gz": b"d", "e.png": b"e"})
    assert names(list_files(url, (".tar",))) == ["a.TAR", "b/c.tar"]
    assert names(list_files(url, ("",))) == ["a.TAR", "b/c.tar", "d.tar.gz", "e.png"]


@pytest.mark.parametrize("write", [tar_of, zip_of])
def test_the_last_of_several_files_of_one_name_counts(
    tmp_path: Path, write: Callable[[dict[str, bytes]], bytes]
) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        (tmp_path / "x").write_bytes(write({"a.png": b"old", "b.png": b"b", "./a.png": b"new"}))
    assert contents(list_files(str(tmp_path / "x"))) == {"a.png": b"new", "b.png": b"b"}


letters = st.sampled_from(["a", "b", "B", "-", " ", "é", "🖼"])
some_names = st.lists(
    st.lists(st.text(letters, min_size=1, max_size=3), min_size=1, max_size=3), min_size=1, max_size=8
)


@settings(max_examples=50, deadline=None, derandomize=True)
@given(some_names, st.randoms(use_true_random=False))
def test_files_are_in_the_order_of_names_not_of_the_archive(lists: list[list[str]], random: Any) -> None:
    files = {"/".join(parts) + ".png": str(parts).encode() for parts in lists}
    expected = sorted(files, key=lambda name: name.split("/"))
    memory = fsspec.filesystem("memory")
    for write in (tar_of, zip_of):
        shuffled = random.sample(expected, len(expected))
        memory.pipe_file("/order/x", write({name: files[name] for name in shuffled}))
        entries = list_files("memory://order/x")
        assert names(entries) == expected
        assert contents(entries) == files


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_tars_of_all_formats_with_long_names(tmp_path: Path, form: int) -> None:
    files = {"n" * 60 + "/" + "m" * 90 + ".png": b"1", "a.png": b"2"}
    if form != tarfile.USTAR_FORMAT:
        files["ö" * 120 + "/" + "x" * 300 + ".png"] = b"3"
    (tmp_path / "x.tar").write_bytes(tar_of(files, form))
    assert contents(list_files(str(tmp_path / "x.tar"))) == files


def test_names_that_are_not_text_are_kept(tmp_path: Path) -> None:
    name = os.fsdecode(b"\xe9t\xe9.png")
    put(str(tmp_path / "folder"), "folder", {name: b"1"})
    with tarfile.open(tmp_path / "x.tar", "w", format=tarfile.GNU_FORMAT) as tar:
        tar.add(tmp_path / "folder" / name, name)
    for path in ("folder", "x.tar"):
        assert contents(list_files(str(tmp_path / path))) == {name: b"1"}


@pytest.mark.timeout(60)  # links that lead in a circle must not be followed forever
def test_links_in_a_folder_are_followed_but_not_forever(tmp_path: Path) -> None:
    root, outside = tmp_path / "root", tmp_path / "outside"
    put(str(root), "folder", {"a/1.png": b"1", "b/2.png": b"2"})
    put(str(outside), "folder", {"3.png": b"3", "4": b"4"})
    for link, target in {
        "a/up": root,
        "a/self.png": "self.png",
        "b/a": root / "a",
        "c": outside,
        "four.png": outside / "4",
        "nothing.png": tmp_path / "nothing",
    }.items():
        (root / link).symlink_to(target)
    os.mkfifo(root / "pipe.png")
    expected = {"a/1.png": b"1", "b/2.png": b"2", "b/a/1.png": b"1", "c/3.png": b"3", "four.png": b"4"}
    assert names(list_files(str(root))) == list(expected)  # reading the pipe would wait forever
    assert contents(list_files(str(root))) == expected
    (tmp_path / "link").symlink_to(root)
    assert contents(list_files(str(tmp_path / "link"))) == expected


def test_links_in_a_tar_are_followed(tmp_path: Path) -> None:
    files = {"./a/1.png": b"one", "blobs/77": b"77", "a/z.png": b"old"}
    links = {
        "hard.png": (tarfile.LNKTYPE, "./a/1.png"),
        "b/c/soft.png": (tarfile.SYMTYPE, "../../blobs/77"),
        "b/chain.png": (tarfile.SYMTYPE, "c/soft.png"),
        "b/end.png": (tarfile.SYMTYPE, "chain.png"),
        "a/z.png": (tarfile.SYMTYPE, "1.png"),
        "nothing.png": (tarfile.SYMTYPE, "/elsewhere/1.png"),
        "round.png": (tarfile.SYMTYPE, "round.png"),
    }
    (tmp_path / "x.tar").write_bytes(tar_of(files, links=links))
    expected = {"a/1.png": b"one", "a/z.png": b"one", "hard.png": b"one"}
    expected |= dict.fromkeys(("b/c/soft.png", "b/chain.png", "b/end.png"), b"77")
    assert contents(list_files(str(tmp_path / "x.tar"))) == expected


@pytest.mark.parametrize("place", ["here", "memory"], indirect=True)
def test_a_tar_inside_a_tar_is_listed_where_it_lies(place: str) -> None:
    inner = {"first.tar": {"1.png": b"1" * 700, "2.png": b"2"}, "second.tar": {"3.png": b"3"}}
    outer = put(storage.join(place, "outer.tar"), "tar", {name: tar_of(files) for name, files in inner.items()})
    for entry in list_files(outer, (".tar",)):
        assert isinstance(entry.load, ByteRange)
        found = list_tar(entry.load)
        assert contents(found) == inner["/".join(entry.parts)]
        with pytest.raises(DataError, match="a broken tar"):
            list_tar(entry.load.within(0, 600))
    with pytest.raises(DataError, match="a broken tar"):
        list_tar(ByteRange(outer, 100, storage.size(outer) - 100))


def test_of_a_remote_tar_little_more_than_headers_is_read(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    reads: list[int] = []
    read_range = storage.read_range

    def counted(url: str, start: int, length: int) -> bytes:
        reads.append(length)
        return read_range(url, start, length)

    monkeypatch.setattr(storage, "read_range", counted)
    for n, size, most_reads, most_bytes in [(60, 200_000, 70, 1_000_000), (5000, 400, 20, 10_000_000)]:
        url = put("memory://counted/x.tar", "tar", {f"{i}.png": bytes(size) for i in range(n)})
        reads.clear()
        entries = list_files(url)
        assert len(entries) == n
        assert len(reads) <= most_reads
        assert sum(reads) <= most_bytes
    storage.delete("memory://counted")


def test_zips_whose_local_headers_differ_from_the_directory(tmp_path: Path) -> None:
    for here, there in [(b"", b"\x99\x99\x04\0abcd"), (b"\x99\x99\xc8\0" + bytes(200), b"")]:
        with zipfile.ZipFile(tmp_path / "x.zip", "w") as archive:
            archive.writestr("first.png", b"first")
            info = zipfile.ZipInfo("last.png")
            info.extra = here
            archive.writestr(info, b"last" * 9)
            info.extra = there
        assert contents(list_files(str(tmp_path / "x.zip"))) == {"first.png": b"first", "last.png": b"last" * 9}


def test_names_in_a_zip_that_does_not_say_how_they_are_encoded(tmp_path: Path) -> None:
    name = b"a" * 40
    (tmp_path / "x.zip").write_bytes(zip_of({name.decode() + ".png": b"1"}).replace(name, b"\xb0" * 40))
    assert contents(list_files(str(tmp_path / "x.zip"))) == {"\u2591" * 40 + ".png": b"1"}  # as code page 437


def _with_name(encoded: bytes, extra: bytes = b"") -> bytes:
    """Make a zip of one file whose name is these bytes, without a mark of their encoding."""
    info = zipfile.ZipInfo("n" * len(encoded))
    info.extra = extra
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr(info, b"1")
    return buffer.getvalue().replace(b"n" * len(encoded), encoded)


def test_names_in_a_zip_that_are_utf_8_without_being_marked_are_read_as_such(tmp_path: Path) -> None:
    name = "caf\u00e9/写真.png"
    (tmp_path / "x.zip").write_bytes(_with_name(name.encode()))
    assert names(list_files(str(tmp_path / "x.zip"))) == [name]


def test_the_unicode_field_of_a_zip_counts_if_it_is_of_that_name(tmp_path: Path) -> None:
    encoded, name = "写真.png".encode("shift_jis"), "写真.png"
    for crc, expected in [(zlib.crc32(encoded), name), (0, encoded.decode("cp437"))]:
        field = b"\1" + struct.pack("<I", crc) + name.encode()
        (tmp_path / "x.zip").write_bytes(_with_name(encoded, struct.pack("<HH", 0x7075, len(field)) + field))
        assert names(list_files(str(tmp_path / "x.zip"))) == [expected]


BACKSLASHED = {"train\\cat\\1.png": b"1", ".\\train\\dog\\2.png": b"2", "notes.txt": b"n"}


@pytest.mark.parametrize("kind", KINDS)
def test_names_with_backslashes_are_in_folders(tmp_path: Path, kind: str) -> None:
    url = put(str(tmp_path / "x"), kind, BACKSLASHED)
    assert contents(list_files(url)) == {"train/cat/1.png": b"1", "train/dog/2.png": b"2"}


@pytest.mark.parametrize("kind", ["folder", "tar"])
def test_a_rare_backslash_outside_a_zip_is_part_of_a_name(tmp_path: Path, kind: str) -> None:
    url = put(str(tmp_path / "x"), kind, {"AC\\DC.png": b"1", "a/2.png": b"2", "a/3.png": b"3"})
    assert names(list_files(url)) == ["AC\\DC.png", "a/2.png", "a/3.png"]


@pytest.mark.parametrize("kind", KINDS)
def test_other_files_are_listed_as_such_and_hidden_folders_as_one(tmp_path: Path, kind: str) -> None:
    hidden = {"__MACOSX/a/._1.png": b"", "__MACOSX/._2.png": b"", ".git/x.png": b"", "a/.DS_Store": b""}
    url = put(str(tmp_path / "x"), kind, {"a/1.png": b"1", "a/1.txt": b"text", "b.tar": b"b", **hidden})
    others: list[FoundFile] = []
    assert names(list_files(url, others=others)) == ["a/1.png"]
    assert {"/".join(f.parts): f.flaw for f in others} == {
        ".git/": HIDDEN,
        "__MACOSX/": HIDDEN,
        "a/.DS_Store": HIDDEN,
        "a/1.txt": "",
        "b.tar": "",
    }
    assert [f.load() for f in others if not f.flaw] == [b"text", b"b"]


def test_links_to_nothing_pipes_and_replaced_files_are_listed_with_their_flaw(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "1.png").symlink_to(tmp_path / "nowhere")
    os.mkfifo(tmp_path / "folder" / "pipe.png")
    links = {"1.png": (tarfile.SYMTYPE, "nowhere"), "cats": (tarfile.SYMTYPE, "folder")}
    with tarfile.open(tmp_path / "x.tar", "w") as tar:
        for name, content in (("./2.png", b"old"), ("2.png", b"new")):
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
        for name, (info.type, info.linkname) in links.items():
            info.name, info.size = name, 0
            tar.addfile(info)
    for path, expected in {
        "folder": {"1.png": LOST, "pipe.png": SPECIAL},
        "x.tar": {"1.png": LOST, "cats": LINK, "2.png": REPLACED},
    }.items():
        others: list[FoundFile] = []
        assert len(list_files(str(tmp_path / path), others=others)) == (path == "x.tar")
        assert {"/".join(f.parts): f.flaw for f in others} == expected


def test_a_zip_beyond_four_gigabytes(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as archive:
        archive.writestr("first.png", b"first")
        archive.fp.seek(1 << 32, os.SEEK_CUR)  # a hole, which takes no room on the disk
        archive.start_dir = archive.fp.tell()
        with archive.open("last.png", "w", force_zip64=True) as member:
            member.write(b"last")
    assert contents(list_files(str(tmp_path / "x.zip"))) == {"first.png": b"first", "last.png": b"last"}


def test_a_damaged_zip_stops_the_work_and_gives_no_image(tmp_path: Path) -> None:
    path = tmp_path / "x.zip"
    for method in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        whole = zip_of({"a.png": b"abc" * 100}, method)
        for at in (0, 38, 40):  # the signature of the header, and inside the data
            path.write_bytes(whole)
            (entry,) = list_files(str(path))
            path.write_bytes(whole[:at] + bytes([whole[at] ^ 0x5A]) + whole[at + 1 :])
            with pytest.raises(DataError, match=r"x\.zip.* at byte 0"):
                entry.load()


def _sparse_tar() -> bytes:
    info = tarfile.TarInfo("a.png")
    info.type = tarfile.GNUTYPE_SPARSE
    return info.tobuf(tarfile.GNU_FORMAT) + bytes(1024)


def _encrypted_zip() -> bytes:
    data = bytearray(zip_of({"a.png": b"abc"}))
    data[data.index(b"PK\1\2") + 8] |= 1  # a flag in the directory
    return bytes(data)


def _astray_zip() -> bytes:
    data = bytearray(zip_of({"a.png": b"abc"}))
    data[data.index(b"PK\1\2") + 42] = 77  # the offset of the member in the directory
    return bytes(data)


TAR = tar_of({"a.png": b"a" * 2000, "b.png": b"b" * 2000})
ZIP = zip_of({"a.png": b"a"})
BROKEN = {
    "gzip": (gzip.compress(TAR), "compressed by gzip; uncompress it"),
    "bzip2": (bz2.compress(TAR), "compressed by bzip2; uncompress it"),
    "xz": (lzma.compress(TAR), "compressed by xz; uncompress it"),
    "zstd": (b"\x28\xb5\x2f\xfd" + bytes(600), "compressed by zstd; uncompress it"),
    "an image": (b"\x89PNG\r\n\x1a\n" + bytes(600), "a file, and neither"),
    "a text": (b"cat dog\n" * 200, "a file, and neither"),
    "nothing": (b"", "a file, and neither"),
    "a tar cut off in a member": (TAR[:4000], "a broken tar"),
    "a tar cut off in a header": (TAR[:2700], "a broken tar"),
    "a tar with a broken header": (TAR[:2560] + b"x" + TAR[2561:], "a broken tar"),
    "two tars in one": (TAR + TAR, "a broken tar, or several put together"),
    "a sparse tar": (_sparse_tar(), "'a.png' is packed as a sparse file"),
    "an encrypted zip": (_encrypted_zip(), "'a.png' is encrypted"),
    "a zip of bzip2": (
        zip_of({"a.png": b"a"}, zipfile.ZIP_BZIP2),
        "'a.png' is compressed by a method other than deflate",
    ),
    "a zip that points beyond its end": (_astray_zip(), "a broken zip: 'a.png' is said to lie outside it"),
    "a zip cut off": (ZIP[:-10], "a broken zip"),
    "a zip without its beginning": (ZIP[:4] + ZIP[60:], "a broken zip"),
}


@pytest.mark.parametrize("what", BROKEN)
@pytest.mark.parametrize("place", ["here", "memory"], indirect=True)
def test_files_not_readable_by_offset_are_refused_in_one_line(place: str, what: str) -> None:
    content, message = BROKEN[what]
    url = storage.join(place, "the source")
    storage.write_bytes(url, content)
    with pytest.raises(DataError, match=f"^{re.escape(f'source {url}: ')}{message}") as caught:
        list_files(url)
    assert "\n" not in str(caught.value)


def test_an_empty_tar_and_an_empty_zip_hold_nothing(tmp_path: Path) -> None:
    for data in (tar_of({}), zip_of({})):
        (tmp_path / "x").write_bytes(data)
        assert list_files(str(tmp_path / "x")) == []


@pytest.mark.parametrize("place", ["here", "memory", pytest.param("s3", marks=pytest.mark.cluster)], indirect=True)
def test_a_missing_source_is_named(place: str) -> None:
    with pytest.raises(DataError, match="no such folder, tar or zip") as caught:
        list_files(storage.join(place, "nowhere"))
    assert storage.join(place, "nowhere") in str(caught.value)


def test_a_folder_that_cannot_be_read_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put(str(tmp_path), "folder", {"a/1.png": b"1", "b/2.png": b"2"})
    scandir = os.scandir

    def locked(path: str) -> Any:
        if str(path).endswith("b"):
            raise PermissionError(13, "Permission denied", path)
        return scandir(path)

    monkeypatch.setattr(os, "scandir", locked)
    with pytest.raises(DataError, match=r"/b cannot be read: Permission denied"):
        list_files(str(tmp_path))


@settings(max_examples=200, deadline=None, derandomize=True)
@given(st.data())
def test_damage_anywhere_is_an_error_of_the_source_or_nothing(data: st.DataObject) -> None:
    files = {"a/1.png": b"1" * 100, "é" * 60 + "/" + "x" * 60 + ".png": b"2"}
    whole = data.draw(st.sampled_from([tar_of(files), tar_of(files, tarfile.GNU_FORMAT), zip_of(files)]))
    damaged = bytearray(whole)
    for _ in range(data.draw(st.integers(1, 3))):
        damaged[data.draw(st.integers(0, len(whole) - 1))] = data.draw(st.integers(0, 255))
    fsspec.filesystem("memory").pipe_file("/damaged/x", bytes(damaged))
    with storage.impatient(), contextlib.suppress(DataError, StorageError):
        contents(list_files("memory://damaged/x"))


def test_keys_that_differ_by_slashes_or_hold_colons_are_all_listed_and_read(monkeypatch: pytest.MonkeyPatch) -> None:
    keys = ["/0.jpg", "/c/0.jpg", "0.jpg", "c//0.jpg", "c/0.jpg", "c/a::b.jpg", "c/[0-1].jpg", "c/"]
    fs = storage.filesystem("s3://b/data")[0]
    there = {f"b/data/{key}": key.encode() for key in keys}
    listing = {name: {"size": len(data), "type": "file"} for name, data in there.items()}
    monkeypatch.setattr(fs, "info", lambda path: {"type": "directory"})
    monkeypatch.setattr(fs, "find", lambda path, detail: listing)
    monkeypatch.setattr(fs, "size", lambda path: len(there[path]))
    monkeypatch.setattr(fs, "cat_file", lambda path: there[path])
    found = list_files("s3://b/data")
    assert sorted(f.load() for f in found) == sorted(key.encode() for key in keys if key.endswith("jpg"))
    assert len({f.parts for f in found}) == len(found)
    assert {f.parts[0] for f in found if len(f.parts) > 1} == {"c"}
    assert {f.load() for f in found if "/".join(f.parts) == "c/0.jpg"} == {b"c/0.jpg"}
