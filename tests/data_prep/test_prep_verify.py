"""Verify: a sound data set has no problems, and every damage in a data set is named."""

from __future__ import annotations

import gzip
import io
import json
import pickle
import re
import shutil
import tarfile
import uuid
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from data_prep import prepare
from data_prep.pixels import encode
from data_prep.shard_check import ShardCheck, ShardFound, verify_shard
from data_prep.verify import verify
from eiwtrain import storage
from eiwtrain.data.fingerprint import fingerprint
from eiwtrain.data.manifest import DataError
from eiwtrain.data.shards import Shard, Split

Members = list[tuple[str, bytes]]


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """40 images of 12x10 pixels in three classes and two splits; three are copies, and one is no image."""
    root = tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(0)
    for n in range(40):
        folder = root / ("test" if n % 4 == 0 else "train") / ["ant", "bee", "cat"][n % 3]
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (10, 12, 3), np.uint8)).save(folder / f"{n:03d}.png")
    shutil.copy(root / "train" / "bee" / "001.png", root / "train" / "ant" / "copy.png")
    shutil.copy(root / "test" / "ant" / "000.png", root / "train" / "ant" / "copy2.png")
    shutil.copy(root / "test" / "ant" / "000.png", root / "test" / "cat" / "copy.png")
    (root / "train" / "ant" / "none.png").write_bytes(b"no image")
    return root


def _prepare(images: Path, output: str, **options: Any) -> None:
    prepare("folder", output, 8, path=str(images), **({"shard_size": 12, "max_rejects": 0.1} | options))


@pytest.fixture(scope="module")
def sound(images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sound data set: three shards for training and one for testing. Read only."""
    output = tmp_path_factory.mktemp("sound") / "set"
    _prepare(images, str(output))
    return output


@pytest.fixture
def folder(sound: Path, tmp_path: Path) -> Path:
    """A copy that may be damaged."""
    return Path(shutil.copytree(sound, tmp_path / "set"))


def _edit(path: Path, change: Callable[[Any], Any]) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def _seal(folder: Path) -> None:
    """Make all checksums, sizes and the fingerprint those of the files, so that only their content is wrong."""

    def seal_manifest(manifest: dict[str, Any]) -> None:
        for split in manifest["splits"].values():
            for shard in split["shards"]:
                tar, sidecar = folder / shard["name"], folder / shard["name"].replace(".tar", ".json")
                facts = {"bytes": tar.stat().st_size, "sha256": storage.sha256_file(tar)}
                _edit(sidecar, lambda content, facts=facts: content.update(facts))
                shard |= facts | {"sidecar_sha256": storage.sha256_file(sidecar)}
        splits = {n: Split(n, 0, tuple(Shard(**s) for s in split["shards"])) for n, split in manifest["splits"].items()}
        manifest["fingerprint"] = fingerprint(splits, manifest["preprocessing"], manifest["classes"])

    _edit(folder / "manifest.json", seal_manifest)


def _members(path: Path) -> Members:
    with tarfile.open(path) as tar:
        return [(m.name, tar.extractfile(m).read()) for m in tar]  # type: ignore[union-attr]


def _rewrite(folder: Path, name: str, members: Members, header: dict[str, Any] | None = None) -> None:
    """Rewrite the tar, and make the index and all checksums fit it."""
    buffer, places = io.BytesIO(), {}
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for member, data in members:
            info = tarfile.TarInfo(member)
            info.size = len(data)
            for field, value in (header or {}).items():
                setattr(info, field, value)
            places[member] = (buffer.tell() + 512, len(data))
            tar.addfile(info, io.BytesIO(data))
    (folder / name).write_bytes(buffer.getvalue())

    def reindex(sidecar: dict[str, Any]) -> None:
        index = sidecar["index"]
        for i, key in enumerate(index["key"]):
            index["offset"][i], index["size"][i] = places.get(f"{key}.png", (index["offset"][i], index["size"][i]))

    _edit(folder / name.replace(".tar", ".json"), reindex)
    _seal(folder)


def _file(pixels: np.ndarray, kind: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, kind)
    return buffer.getvalue()


def _expect(found: list[str], *patterns: str) -> None:
    """Assert that exactly these problems were found, in this order."""
    assert len(found) == len(patterns), found
    for line, pattern in zip(found, patterns, strict=True):
        assert re.fullmatch(pattern, line), line


SHARD, SIDECAR = "train-000001.tar", "train-000001.json"


@pytest.mark.parametrize("options", [{}, {"preprocess": {"encoding": "npy"}}, {"drop_duplicates": True}])
def test_a_sound_data_set_has_no_problems(images: Path, tmp_path: Path, options: dict[str, Any]) -> None:
    _prepare(images, str(tmp_path / "set"), **options)
    (tmp_path / "set" / "notes.txt").write_text("mine")
    assert verify(str(tmp_path / "set")) == []


def test_the_helpers_of_these_tests_leave_a_data_set_sound(folder: Path) -> None:
    _rewrite(folder, SHARD, _members(folder / SHARD))
    assert verify(str(folder)) == []


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_any_changed_bit_is_found_and_its_file_named(sound: Path, data: st.DataObject) -> None:
    name = data.draw(st.sampled_from(sorted(p.name for p in sound.iterdir() if p.name != "manifest.json")))
    content = bytearray((sound / name).read_bytes())
    content[data.draw(st.integers(0, len(content) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    url = f"memory://{uuid.uuid4().hex}/set"
    for path in sound.iterdir():
        storage.write_bytes(f"{url}/{path.name}", path.read_bytes())
    storage.write_bytes(f"{url}/{name}", bytes(content))
    try:
        assert any(line.startswith(f"{name}: has another SHA-256") for line in verify(url))
    finally:
        storage.delete(url)


def test_a_changed_byte_of_an_image_names_the_image(folder: Path) -> None:
    sidecar = json.loads((folder / SIDECAR).read_text())
    data = bytearray((folder / SHARD).read_bytes())
    data[sidecar["index"]["offset"][3]] ^= 255  # of the PNG's magic number
    (folder / SHARD).write_bytes(data)
    _expect(
        verify(str(folder)),
        rf"{SHARD}: has another SHA-256 than the manifest says",
        rf"{SHARD}: {sidecar['index']['key'][3]}\.png is no PNG",
    )


def test_two_shards_that_changed_places_are_named(folder: Path) -> None:
    first, second = folder / "train-000000.tar", folder / SHARD
    (folder / "x").write_bytes(first.read_bytes())
    first.write_bytes(second.read_bytes())
    second.write_bytes((folder / "x").read_bytes())
    problems = verify(str(folder))
    for name in (first.name, second.name):
        about = [line for line in problems if line.startswith(f"{name}: ")]
        assert any(re.search("bytes, in the manifest|another SHA-256", line) for line in about)
        assert any("in the index and not in the tar (and " in line for line in about)
    assert all(line.startswith((first.name, second.name)) for line in problems)


def test_shards_listed_in_another_order_are_named(folder: Path) -> None:
    def swap(manifest: dict[str, Any]) -> None:
        manifest["splits"]["train"]["shards"].reverse()

    _edit(folder / "manifest.json", swap)
    _seal(folder)
    _expect(
        verify(str(folder)),
        r"manifest\.json: shard 0 of split 'train' is train-000002\.tar, not train-000000\.tar",
        r"manifest\.json: shard 2 of split 'train' is train-000000\.tar, not train-000002\.tar",
    )


@pytest.mark.parametrize("name", [SHARD, SIDECAR])
def test_a_missing_file_is_named_and_the_rest_still_checked(folder: Path, name: str) -> None:
    (folder / name).unlink()
    (folder / "test-000000.tar").write_bytes(b"")
    _expect(
        verify(str(folder)),
        rf"{name}: is not there",
        r"test-000000\.tar: has 0 bytes, in the manifest [\d,]+",
        r"test-000000\.tar: cannot be followed after 0 members \(empty file\)",
        r"test-000000\.tar: \d{8}\.png is in the index and not in the tar \(and \d+ more like it\)",
        r"test-000000\.tar: does not end as a tar does: it is cut off",
    )


def test_a_truncated_shard_is_named_with_what_it_lacks(folder: Path) -> None:
    data = (folder / SHARD).read_bytes()
    (folder / SHARD).write_bytes(data[: len(data) // 2 // 512 * 512 + 100])
    problems = verify(str(folder))
    assert f"{SHARD}: has {len(data) // 2 // 512 * 512 + 100:,} bytes, in the manifest {len(data):,}" in problems
    assert any("in the index and not in the tar" in line for line in problems)
    assert all(line.startswith(SHARD) for line in problems)


def test_a_shard_cut_off_after_its_last_member_is_named(folder: Path) -> None:
    with tarfile.open(folder / SHARD) as tar:
        last = tar.getmembers()[-1]
    data = (folder / SHARD).read_bytes()
    (folder / SHARD).write_bytes(data[: last.offset_data + 512])
    _seal(folder)
    _expect(verify(str(folder)), rf"{SHARD}: does not end as a tar does: it is cut off")


def test_bytes_after_the_last_member_are_named(folder: Path) -> None:
    data = bytearray((folder / SHARD).read_bytes())
    data[-1] = 1
    (folder / SHARD).write_bytes(data)
    _seal(folder)
    _expect(verify(str(folder)), rf"{SHARD}: has bytes after its last member that are no member, from byte \d+ on")


@pytest.mark.parametrize(("index_too", "label"), [(True, 3), (True, -2), (False, 2)])
def test_a_wrong_label_is_named(folder: Path, index_too: bool, label: int) -> None:
    members = _members(folder / SHARD)
    number = next(n for n, (_, data) in enumerate(members) if b'"label": 0' in data)
    name, data = members[number]
    members[number] = (name, data.replace(b'"label": 0', b'"label": %d' % label))
    if index_too:
        _edit(folder / SIDECAR, lambda s: s["index"]["label"].__setitem__(number // 2, label))
    _rewrite(folder, SHARD, members)
    _expect(
        verify(str(folder)),
        rf"{SHARD}: {name} has label {label}, but there are 3 classes"
        if index_too
        else rf"{SHARD}: {name} has label 2, in the index 0",
    )


@pytest.mark.parametrize("about", [b"{}", b"[]", b"\xff", b'{"label": 0}', b'{"label": "0", "source": "x"}'])
def test_an_image_without_label_or_source_is_named(folder: Path, about: bytes) -> None:
    members = _members(folder / SHARD)
    members[1] = (members[1][0], about)
    _rewrite(folder, SHARD, members)
    _expect(verify(str(folder)), rf"{SHARD}: {members[1][0]} has no label and source")


def test_other_pixels_are_named_though_checksums_match(folder: Path) -> None:
    members = _members(folder / SHARD)
    with Image.open(io.BytesIO(members[4][1])) as image:
        pixels = np.array(image)
    members[4] = (members[4][0], _file(pixels))
    _rewrite(folder, SHARD, members)
    assert verify(str(folder)) == []  # the same pixels in another encoder's bytes
    pixels[7, 7, 2] ^= 1
    members[4] = (members[4][0], encode(pixels, "png"))
    _rewrite(folder, SHARD, members)
    _expect(verify(str(folder)), rf"{SHARD}: {members[4][0]} has other pixels than those of the digest in the index")


@pytest.mark.parametrize(
    ("data", "problem"),
    [
        (_file(np.zeros((8, 8), np.uint8)), "has mode L, not RGB"),
        (_file(np.zeros((8, 9, 3), np.uint8)), "is 9x8 pixels, not 8x8"),
        (_file(np.arange(192, dtype=np.uint8).reshape(8, 8, 3) * 7)[:80], r"cannot be decoded \(.+\)"),
        (_file(np.zeros((8, 8, 3), np.uint8), "BMP"), "is no PNG"),
    ],
    ids=["gray", "too wide", "cut off", "another format"],
)
def test_an_image_of_a_wrong_form_is_named(folder: Path, data: bytes, problem: str) -> None:
    members = _members(folder / SHARD)
    members[0] = (members[0][0], data)
    _rewrite(folder, SHARD, members)
    _expect(verify(str(folder)), rf"{SHARD}: {members[0][0]} {problem}")


@pytest.mark.parametrize(
    ("array", "problem"),
    [
        (np.zeros((8, 8, 3), np.uint8), "has other pixels than those of the digest in the index"),
        (np.zeros((8, 8, 3), np.int8), r"is int8 \(8, 8, 3\), not uint8 \(8, 8, 3\)"),
        (np.array([[[{}]]]), r"cannot be decoded \(ValueError: .*allow_pickle=False\)"),
    ],
    ids=["other pixels", "another type", "a pickle"],
)
def test_a_wrong_npy_is_named(images: Path, tmp_path: Path, array: np.ndarray, problem: str) -> None:
    folder = tmp_path / "set"
    _prepare(images, str(folder), preprocess={"encoding": "npy"})
    sidecar = json.loads((folder / SIDECAR).read_text())
    buffer = io.BytesIO()
    np.save(buffer, array)
    data = bytearray((folder / SHARD).read_bytes())
    start, size = sidecar["index"]["offset"][0], sidecar["index"]["size"][0]
    data[start : start + size] = buffer.getvalue()[:size].ljust(size, b"\0")
    (folder / SHARD).write_bytes(data)
    _seal(folder)
    _expect(verify(str(folder)), rf"{SHARD}: {sidecar['index']['key'][0]}\.npy {problem}")


def test_headers_that_are_not_normalised_are_named(folder: Path) -> None:
    _rewrite(folder, SHARD, _members(folder / SHARD), {"mtime": 5, "uname": "me"})
    _expect(
        verify(str(folder)),
        rf"{SHARD}: \d{{8}}\.png has mtime 5 in its header, not 0 \(and 21 more like it\)",
        rf"{SHARD}: \d{{8}}\.png has uname 'me' in its header, not '' \(and 21 more like it\)",
    )


def test_members_that_other_readers_skip_are_named(folder: Path) -> None:
    members, buffer = _members(folder / SHARD), io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for n, (member, data) in enumerate(members):
            if n == 3:  # an empty folder is no file: only the position of the next one shows it
                extra = tarfile.TarInfo("folder")
                extra.type = tarfile.DIRTYPE
                tar.addfile(extra)
            info = tarfile.TarInfo(member)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    (folder / SHARD).write_bytes(buffer.getvalue())
    _seal(folder)
    _expect(verify(str(folder)), rf"{SHARD}: has no plain header of {members[3][0]} at byte \d+")


def test_members_that_differ_from_the_index_are_named(folder: Path) -> None:
    members = _members(folder / SHARD)
    names = [name for name, _ in members]
    _rewrite(folder, SHARD, [members[1], members[0], *members[2:]])
    _expect(
        verify(str(folder)), rf"{SHARD}: members are in another order than in the index: {names[1]} where {names[0]} .*"
    )
    _rewrite(folder, SHARD, [*members[:2], *members[3:]])
    _expect(verify(str(folder)), rf"{SHARD}: {names[2]} is in the index and not in the tar")
    _rewrite(folder, SHARD, [*members, ("readme", b"")])
    _expect(verify(str(folder)), rf"{SHARD}: readme is in the tar more often than in the index")
    _rewrite(folder, SHARD, [*members, members[1]])
    _expect(verify(str(folder)), rf"{SHARD}: {names[1]} is in the tar more often than in the index")


@pytest.mark.parametrize("column", ["offset", "size"])
def test_an_index_that_points_elsewhere_is_named(folder: Path, column: str) -> None:
    def shift(sidecar: dict[str, Any]) -> None:
        sidecar["index"][column][2] += 1

    _edit(folder / SIDECAR, shift)
    _seal(folder)
    _expect(verify(str(folder)), rf"{SHARD}: \d{{8}}\.png has \d+ bytes at \d+, in the index \d+ at \d+")


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"plan": "another"}, "is of another plan than the manifest"),
        ({"name": "train-000000.tar"}, r"name is train-000000\.tar, in the manifest train-000001\.tar"),
        ({"format": "other"}, "format is 'other', this version reads .*"),
        ({"samples": 3}, r"field 'index\.key' has 11 entries, not 3"),
        ({"rejects": [{"key": "x"}]}, r"field 'rejects\[0\]\.source' is missing"),
        ({"dropped": [{"key": "x"}]}, r"field 'dropped\[0\]\.source' is missing"),
    ],
)
def test_a_sidecar_that_is_not_of_its_shard_is_named(folder: Path, change: dict[str, Any], problem: str) -> None:
    _edit(folder / SIDECAR, lambda sidecar: sidecar.update(change))
    _seal(folder)
    _expect(verify(str(folder)), rf"{SIDECAR}: {problem}")


def test_a_key_that_comes_twice_in_a_split_is_named(folder: Path) -> None:
    sidecar = json.loads((folder / "train-000000.json").read_text())
    old = json.loads((folder / SIDECAR).read_text())["index"]["key"][5]
    new = sidecar["index"]["key"][0]
    _edit(folder / SIDECAR, lambda s: s["index"]["key"].__setitem__(5, new))
    members = _members(folder / SHARD)
    members[10:12] = [(name.replace(old, new), data) for name, data in members[10:12]]
    _rewrite(folder, SHARD, members)
    _expect(verify(str(folder)), rf"{SIDECAR}: key {new} is there also in train-000000\.tar")


def test_a_key_that_is_both_there_and_rejected_is_named(folder: Path) -> None:
    def reject(sidecar: dict[str, Any]) -> None:
        sidecar["rejects"].append({"key": sidecar["index"]["key"][0], "source": "x", "reason": "x"})

    _edit(folder / SIDECAR, reject)
    _seal(folder)
    _expect(verify(str(folder)), rf"{SIDECAR}: key \d{{8}} is there twice")


def test_figures_of_the_manifest_that_are_wrong_are_all_named(folder: Path) -> None:
    def change(manifest: dict[str, Any]) -> None:
        manifest["splits"]["train"]["samples"] += 1
        manifest["fingerprint"] = "0" * 64
        manifest["duplicates"]["train"] = 7

    _edit(folder / "manifest.json", change)
    (folder / SHARD).unlink()
    _expect(
        verify(str(folder)),
        r"manifest\.json: split 'train' has 33 images, its shards 32",
        r"manifest\.json: the fingerprint is not that of shards, sidecars, classes, preprocessing",
        rf"{SHARD}: is not there",
        r"manifest\.json: split 'train' has 2 duplicates, the manifest says 7",
    )


def test_an_unusable_manifest_is_a_problem_an_absent_one_an_error(folder: Path) -> None:
    (folder / "manifest.json").write_text("{")
    _expect(verify(str(folder)), r"manifest\.json: not JSON \(.*\)")
    (folder / "manifest.json").write_text('{"format": "eiwtrain-data-2", "splits": {"train": 3}}')
    _expect(verify(str(folder)), r"manifest\.json: .*field .*")
    (folder / "manifest.json").unlink()
    with pytest.raises(DataError, match="no data set at"):
        verify(str(folder))


def test_files_that_belong_to_no_shard_are_named(folder: Path) -> None:
    for name in (
        "train-000009.tar",
        "val-000000.json",
        f".train-000000.tar.{'a' * 32}.tmp",
        f".probe-{'b' * 32}",
        "x.png",
    ):
        (folder / name).write_bytes(b"x")
    _expect(
        verify(str(folder)),
        r"\.probe-b+: left over from a write that was cut short; it can be deleted",
        r"\.train-000000\.tar\.a+\.tmp: left over from a write that was cut short; it can be deleted",
        r"train-000009\.tar: belongs to no shard of the manifest",
        r"val-000000\.json: belongs to no shard of the manifest",
    )


def test_workers_elsewhere_in_any_order_find_the_same(folder: Path) -> None:
    (folder / SHARD).unlink()
    (folder / "test-000000.json").unlink()

    def elsewhere(call: Callable[[ShardCheck], ShardFound], checks: Iterable[ShardCheck]) -> list[ShardFound]:
        sent = [pickle.loads(pickle.dumps((call, check))) for check in reversed(list(checks))]
        return [pickle.loads(pickle.dumps(call(check))) for call, check in sent]

    problems = verify(str(folder), run=elsewhere)
    assert len(problems) == 2
    assert problems == verify(str(folder))


def test_progress_counts_every_image(
    sound: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("data_prep.progress._LINE_EVERY", 0.0)
    assert verify(str(sound), quiet=False) == []
    assert capsys.readouterr().err.splitlines()[-1].startswith("43 of 43 images, ")
    assert verify(str(sound)) == []
    assert capsys.readouterr() == ("", "")


def test_a_remote_data_set_is_checked_as_a_local_one(sound: Path, folder: Path) -> None:
    url = f"memory://{uuid.uuid4().hex}/set"
    fs = fsspec.filesystem("memory")
    for path in sound.iterdir():
        fs.pipe_file(f"{url}/{path.name}", path.read_bytes())
    assert verify(url) == []
    (folder / SHARD).write_bytes((sound / SHARD).read_bytes()[:20_000])
    fs.pipe_file(f"{url}/{SHARD}", (folder / SHARD).read_bytes())
    fs.rm(f"{url}/train-000000.tar")
    (folder / "train-000000.tar").unlink()
    problems = verify(url)
    assert len(problems) > 2
    assert problems == verify(str(folder))
    fs.rm(url, recursive=True)


def test_a_shard_that_cannot_be_read_is_a_problem_like_others(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: Any) -> str:
        if Path(path).name == SHARD:
            raise PermissionError(13, "Permission denied", SHARD)
        return storage.sha256_bytes(Path(path).read_bytes())

    monkeypatch.setattr("data_prep.shard_check.storage.sha256_file", refuse)
    _expect(verify(str(folder)), rf"{SHARD}: cannot be read \(.*Permission denied.*\)")


def test_a_shard_check_returns_what_the_whole_needs(sound: Path) -> None:
    checks: list[ShardCheck] = []

    def note(call: Callable[[ShardCheck], ShardFound], given: Iterable[ShardCheck]) -> Iterable[ShardFound]:
        checks.extend(given)
        return map(call, checks)

    verify(str(sound), run=note)
    found = verify_shard(checks[0])
    assert found.check == checks[0]
    assert found.problems == ()
    assert found.sidecar is not None
    assert len(found.sidecar.digests) == checks[0].shard.samples


def test_files_of_brackets_are_problems_of_one_line(folder: Path) -> None:
    (folder / SHARD.replace(".tar", ".json")).write_bytes(b"[" * 200_000)
    _expect(
        verify(str(folder))[:2],
        r"train-000001.json: has another SHA-256 than the manifest says",
        r"train-000001.json: not JSON that can be read .*",
    )
    (folder / "manifest.json").write_bytes(b'{"splits":' * 100_000)
    _expect(verify(str(folder)), r"manifest.json: not JSON that can be read .*")


def test_a_compressed_shard_is_not_unpacked(folder: Path) -> None:
    (folder / SHARD).write_bytes(gzip.compress((folder / SHARD).read_bytes()))
    _expect(
        verify(str(folder)),
        rf"{SHARD}: has .* bytes, in the manifest .*",
        rf"{SHARD}: is compressed, and no plain tar",
    )


def test_names_in_a_shard_do_not_command_a_terminal(folder: Path) -> None:
    members = _members(folder / SHARD)
    _rewrite(folder, SHARD, [("\x1b[2Jx.png", b""), *members])
    assert all(line.isprintable() for line in verify(str(folder)))
