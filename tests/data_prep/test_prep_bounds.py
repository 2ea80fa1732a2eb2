"""Archives and batches of strangers: what is cut off is found, and a small file costs little, whatever it claims."""

from __future__ import annotations

import copy
import gzip
import io
import os
import pickle
import struct
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest
import scipy.io
from batches import python2_pickle
from containers import tar_of, zip_of

from data_prep.formats import ranges
from data_prep.formats.files import list_files
from data_prep.formats.matlab import load_matlab
from data_prep.formats.ranges import ByteRange
from data_prep.formats.rows import gunzipped, npz_batch, pickled_batch, zip_members
from data_prep.formats.unpickle import load_batch
from data_prep.sources.webdataset import webdataset
from eiwtrain.data.manifest import DataError

BLOCK = tarfile.BLOCKSIZE
MEMBERS = {f"{n}.png": bytes([65 + n]) * (700 * n + 1) for n in range(6)}


@pytest.fixture(autouse=True)
def _unpack_here(temporary_folder: Path) -> None:
    """Unpack nothing outside the folder of the test."""


def _file(folder: Path, content: bytes) -> ByteRange:
    path = folder / "file"
    path.write_bytes(content)
    return ByteRange(str(path), 0, len(content))


def _listed(folder: Path, content: bytes) -> list[str]:
    return ["/".join(found.parts) for found in list_files(_file(folder, content).url())]


def _whole(members: dict[str, bytes]) -> bytes:
    """Make a tar that ends with its mark and nothing else, as Go's library and many others write it."""
    tar = tar_of(members)
    end = len(tar.rstrip(b"\0"))
    return tar[: -(-end // BLOCK) * BLOCK] + bytes(2 * BLOCK)


def test_a_tar_cut_off_anywhere_is_refused_or_complete(tmp_path: Path) -> None:
    for whole in (tar_of(MEMBERS), _whole(MEMBERS)):
        assert _listed(tmp_path, whole) == sorted(MEMBERS)
        complete = 0
        for end in range(BLOCK, len(whole), BLOCK):
            try:
                complete += _listed(tmp_path, whole[:end]) == sorted(MEMBERS)
            except DataError:
                continue
            assert _listed(tmp_path, whole[:end]) == sorted(MEMBERS), end
        assert complete <= 1  # what is left of the zeros is a whole mark


def test_a_tar_whose_download_broke_off_is_refused_though_zeros_fill_it(tmp_path: Path) -> None:
    members = MEMBERS | {"z.png": b"z" * 40_000}
    for whole in (tar_of(members), _whole(members)):
        for kept in (1, 3, 5):
            cut = sum(BLOCK * (1 + -(-len(data) // BLOCK)) for data in list(members.values())[:kept])
            with pytest.raises(DataError, match="zeros"):
                _listed(tmp_path, whole[:cut] + bytes(len(whole) - cut))


def test_tars_of_other_programs_are_whole(tmp_path: Path) -> None:
    data = _whole(MEMBERS)[: -2 * BLOCK]
    for record in (1, 8, 20, 64, 2048):
        size = -(-(len(data) // BLOCK + 2) // record) * record * BLOCK
        assert _listed(tmp_path, data + bytes(size - len(data))) == sorted(MEMBERS)


def test_folders_too_deep_to_follow_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for _ in range(210):  # step by step, as the whole path is long
        Path("a").mkdir()
        os.chdir("a")
    with pytest.raises(DataError, match="folders are more than 200 deep"):
        list_files(str(tmp_path))


def _header(name: bytes, kind: bytes, size: int) -> bytes:
    header = bytearray(tarfile.TarInfo(name.decode()).tobuf())
    header[156:157] = kind
    header[124:136] = b"%011o\0" % size if size >= 0 else b"\xff" + (size & ((1 << 88) - 1)).to_bytes(11, "big")
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    return bytes(header)


def test_tars_that_lead_back_or_down_without_end_are_refused(tmp_path: Path) -> None:
    end = bytes(2 * BLOCK)
    for broken in (
        _header(b"a.png", b"0", 0) + _header(b"b.png", b"0", -2 * BLOCK) + end,
        _header(b"a.png", b"0", 0) + _header(b"b.png", b"0", -BLOCK) + end,
        (_header(b"././@LongLink", b"L", 5) + b"name\0".ljust(BLOCK, b"\0")) * 3_000 + end,
    ):
        with pytest.raises(DataError, match="a broken tar"):
            _listed(tmp_path, broken)


def _claiming(content: bytes, size: int) -> bytes:
    """Return a zip whose members claim to unpack to that size."""
    parts = content.split(b"PK\1\2")
    return b"PK\1\2".join([parts[0], *(part[:20] + struct.pack("<I", size) + part[24:] for part in parts[1:])])


def _overlapping(count: int) -> bytes:
    """Make a zip of so many members that are all the same bytes."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("0.png", bytes(100_000))
        first = archive.filelist[0]
        for n in range(1, count):
            archive.filelist.append(info := copy.copy(first))
            info.filename = f"{n}.png"
    return buffer.getvalue()


ZIPS = {
    "that unpacks to gigabytes": (_claiming(zip_of({"a.png": b"a", "b.png": b"b"}), 3_100_000_000), "unpack to 6,2"),
    "of members that overlap": (_overlapping(1_000), "its members overlap"),
}


@pytest.mark.parametrize("what", ZIPS)
def test_a_zip_is_refused_before_it_is_unpacked(tmp_path: Path, what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    content, message = ZIPS[what]
    with pytest.raises(DataError, match=message):
        _listed(tmp_path, content)
    with pytest.raises(DataError, match=message):
        zip_members(_file(tmp_path, content))


def test_members_that_need_a_password_or_much_memory_are_refused(tmp_path: Path) -> None:
    encrypted = bytearray(zip_of({"data.npy": b"a"}))
    for signature, at in ((b"PK\3\4", 6), (b"PK\1\2", 8)):
        encrypted[encrypted.index(signature) + at] |= 1
    for content in (bytes(encrypted), zip_of({"data.npy": b"a"}, zipfile.ZIP_LZMA)):
        with pytest.raises(DataError, match=r"'data.npy' is encrypted, or not compressed by deflate"):
            npz_batch(_file(tmp_path, content), "val_data")


def test_a_gzip_file_is_unpacked_within_a_bound_and_leaves_nothing(
    tmp_path: Path, temporary_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ranges, "_AT_ONCE", 1 << 16)
    monkeypatch.setattr(ranges.check_unpacked, "__defaults__", (20, 1 << 20))
    bomb = gzip.compress(bytes(1 << 24))
    with pytest.raises(DataError, match="unpack to"):
        gunzipped(_file(tmp_path, bomb))
    assert sum(path.stat().st_size for path in temporary_folder.rglob("*") if path.is_file()) == 0
    assert gunzipped(_file(tmp_path, gzip.compress(bytes(1 << 20)))).size == 1 << 20


ROWS = np.zeros((2, 3072), np.uint8)


NESTED = {
    "labels": b"\x80\x02}(U\x06labels" + b")" + b"\x85" * 450 + b"u.",
    "a dtype": b"\x80\x02}(U\x04datacnumpy\ndtype\n)" + b"\x85" * 240 + b"K\x00K\x01\x87Ru.",
    "a key": b"\x80\x02})" + b"\x85" * 100_000 + b"K\x01s.",
    "lists": b"\x80\x02}U\x06labels" + b"]" * 500 + b"a" * 499 + b"s.",
    "dicts": b"\x80\x02}" + b"U\x01a}" * 500 + b"s" * 501 + b".",
    "a state": b"\x80\x02}U\x06labels" + b"cnumpy\ndtype\n(U\x02u1K\x00K\x01tR)" + b"\x85" * 500 + b"bs.",
}


@pytest.mark.parametrize("what", NESTED)
def test_pickles_that_nest_deeply_are_refused_before_they_are_loaded(what: str) -> None:
    with pytest.raises(DataError, match=r"^x: it nests values more than \d+ deep; it is not loaded$"):
        load_batch(NESTED[what], "x")


def test_a_batch_of_many_labels_is_not_deep() -> None:
    for protocol in range(2, 6):
        labels = [np.int64(n) for n in range(1_500)]
        assert load_batch(pickle.dumps({"labels": labels}, protocol), "x")["labels"] == list(range(1_500))


def test_labels_that_would_grow_in_memory_are_refused(tmp_path: Path) -> None:
    """One long text and many short ones are an array of all texts at the length of the longest."""
    text = ["x" * 1_000_000] + ["y"] * 4_999
    rows = np.zeros((len(text), 3), np.uint8)
    for labels in (text, [[n] * 3 for n in range(len(text))], [1 << 70] * len(text), [True] * len(text)):
        file = _file(tmp_path, pickle.dumps({"data": rows, "labels": labels}, 4))
        with pytest.raises(DataError, match="its labels are not 5000 integers"):
            pickled_batch(file, "val_data")


def test_numbers_too_large_for_a_shape_are_refused() -> None:
    good = python2_pickle({"data": np.zeros((5, 7), np.uint8)})
    huge = b"\x8b" + struct.pack("<i", 100_000) + b"\1" * 100_000
    bad = good.replace(b"J\x05\x00\x00\x00", b"K\0").replace(b"J\x07\x00\x00\x00", huge)
    bad = bad.replace(b"T" + struct.pack("<i", 35) + bytes(35), b"T" + struct.pack("<i", 0))
    with pytest.raises(DataError, match="an array without a shape"):
        load_batch(bad, "x")


def _npy(header: str, content: bytes = b"") -> bytes:
    text = header.encode() + b"\n"
    return b"\x93NUMPY\1\0" + struct.pack("<H", len(text)) + text + content


LABELS = {
    "more than there are rows": _npy("{'descr': '<i8', 'fortran_order': False, 'shape': (1000000000000,), }"),
    "of a huge dtype": _npy("{'descr': '|V2000000000', 'fortran_order': False, 'shape': (2,), }"),
    "of text": _npy("{'descr': '<U500000000', 'fortran_order': False, 'shape': (2,), }"),
    "with a header that nests": _npy("(" * 5_000),
    "with a header of many signs": _npy("-" * 9_000 + "1"),
    "that are cut off": _npy("{'descr': '<i8', 'fortran_order': False, 'shape': (2,), }", bytes(9)),
}


@pytest.mark.parametrize("what", LABELS)
def test_an_npz_whose_labels_are_no_labels_is_refused_in_one_line(tmp_path: Path, what: str) -> None:
    data = io.BytesIO()
    np.save(data, ROWS)
    file = _file(tmp_path, zip_of({"data.npy": data.getvalue(), "labels.npy": LABELS[what]}))
    with pytest.raises(DataError, match=r"its labels are not 2 integers|holds no plain arrays") as caught:
        npz_batch(file, "val_data")
    assert "\n" not in str(caught.value)


def test_a_sample_whose_json_nests_without_end_has_no_label(tmp_path: Path) -> None:
    (tmp_path / "x.tar").write_bytes(tar_of({"a.jpg": b"", "a.json": b"[" * 200_000, "b.jpg": b"", "b.cls": b"0"}))
    source = webdataset(str(tmp_path / "x.tar"))
    assert [item.label for item in source.splits["train"]] == [-1, 0]


def _matlab(content: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    scipy.io.savemat(buffer, {"synsets": content}, do_compression=True)
    return buffer.getvalue()


def test_a_matlab_file_of_far_too_much_is_refused_before_it_is_loaded() -> None:
    assert load_matlab(_matlab(np.arange(3)), "meta.mat")["synsets"].tolist() == [0, 1, 2]
    large = _matlab(np.zeros(1 << 27, np.uint8))
    assert len(large) < 1 << 18
    with pytest.raises(DataError, match=r"^meta.mat: its [0-9,]+ bytes unpack to over"):
        load_matlab(large, "meta.mat")
    for broken in (b"", bytes(500), large[:1000], b"MATLAB 5.0".ljust(124) + b"\0\1IM" + b"\xff" * 99):
        with pytest.raises(DataError, match=r"^meta.mat is damaged") as caught:
            load_matlab(broken, "meta.mat")
        assert "\n" not in str(caught.value)
