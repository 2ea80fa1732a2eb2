"""The writer: the same bytes from any workers, reruns that repair and skip, no data set before it is complete."""

from __future__ import annotations

import io
import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import time
import uuid
from dataclasses import replace
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
import webdataset
from PIL import Image

from data_prep import prepare, writer
from data_prep.pixels import Preprocess, fit
from data_prep.progress import Progress
from data_prep.verify import verify
from eiwtrain import storage
from eiwtrain.data.fingerprint import first_fingerprint
from eiwtrain.data.manifest import DataError, load_manifest, load_sidecar, manifest_to_json


@pytest.fixture(scope="session")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of 60 PNGs of 12x10 noise in three class folders."""
    root = tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(0)
    for n in range(60):
        folder = root / ["ant", "bee", "cat"][n % 3]
        folder.mkdir(exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (10, 12, 3), np.uint8)).save(folder / f"{n:03d}.png")
    return root


def _prepare(images: Path, output: Any, preprocess: dict[str, Any] | None = None, **options: Any) -> Any:
    return prepare("folder", str(output), 8, path=str(images), preprocess=preprocess, **({"shard_size": 16} | options))


def _bytes(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in sorted(folder.iterdir())}


def _times(folder: Path) -> dict[str, int]:
    return {p.name: p.stat().st_mtime_ns for p in folder.iterdir()}


@pytest.mark.cluster
def test_bytes_are_the_same_at_any_number_of_workers(images: Path, tmp_path: Path) -> None:
    one = _prepare(images, tmp_path / "1" / "set")
    two = _prepare(images, tmp_path / "2" / "set", workers=2)
    assert one == two
    assert _bytes(tmp_path / "1" / "set") == _bytes(tmp_path / "2" / "set")
    assert sum(s.samples for s in one.splits.values()) == 60
    assert one.classes == ("ant", "bee", "cat")


def test_a_shard_is_not_all_of_one_class(images: Path, tmp_path: Path) -> None:
    _prepare(images, tmp_path)
    assert len(set(load_sidecar(str(tmp_path), "train-000000.tar").labels)) == 3


def test_the_index_points_at_every_png(images: Path, tmp_path: Path) -> None:
    manifest = _prepare(images, tmp_path)
    for split in manifest.splits.values():
        for shard in split.shards:
            sidecar = load_sidecar(str(tmp_path), shard.name)
            data = (tmp_path / shard.name).read_bytes()
            assert len(data) == shard.bytes
            with tarfile.open(tmp_path / shard.name) as tar:
                members = tar.getmembers()
                assert all((m.mtime, m.uid, m.gid, m.mode) == (0, 0, 0, 0o644) for m in members)
                assert [m.name for m in members[::2]] == [f"{k}.png" for k in sidecar.keys]
            for offset, size in zip(sidecar.offsets, sidecar.sizes, strict=True):
                with Image.open(io.BytesIO(data[offset : offset + size])) as image:
                    assert (image.size, image.mode, image.format) == ((8, 8), "RGB", "PNG")


def test_plain_webdataset_reads_the_tars(images: Path, tmp_path: Path) -> None:
    manifest = _prepare(images, tmp_path)
    urls = [str(tmp_path / s.name) for s in manifest.splits["train"].shards]
    samples = list(webdataset.WebDataset(urls, shardshuffle=False).decode("rgb8").to_tuple("png", "json", "__key__"))
    assert len(samples) == manifest.splits["train"].samples
    for image, about, key in samples:
        assert image.shape == (8, 8, 3)
        assert about["source"].startswith(manifest.classes[about["label"]])
        assert "." not in key


@pytest.mark.parametrize("remove", ["train-000001.tar", "train-000001.json", "manifest.json"])
def test_deleted_shards_come_back_and_others_are_untouched(images: Path, tmp_path: Path, remove: str) -> None:
    _prepare(images, tmp_path)
    before, times = _bytes(tmp_path), _times(tmp_path)
    (tmp_path / remove).unlink()
    _prepare(images, tmp_path)
    assert _bytes(tmp_path) == before
    changed = {name for name, when in _times(tmp_path).items() if when != times[name]}
    stem = remove.split(".")[0]
    assert changed == ({f"{stem}.tar", f"{stem}.json"} if "train" in remove else {remove})


@pytest.mark.parametrize("damaged", ["train-000000.tar", "train-000000.json"])
def test_damaged_shards_are_written_again(images: Path, tmp_path: Path, damaged: str) -> None:
    _prepare(images, tmp_path)
    before, times = _bytes(tmp_path), _times(tmp_path)
    data = bytearray(before[damaged])
    data[len(data) // 2] ^= 255
    (tmp_path / damaged).write_bytes(data)
    _prepare(images, tmp_path)
    assert _bytes(tmp_path)["train-000000.tar"] == before["train-000000.tar"]
    assert _times(tmp_path)["train-000001.tar"] == times["train-000001.tar"]
    if damaged.endswith(".tar"):
        assert _bytes(tmp_path) == before


def test_a_changed_sidecar_is_written_again_if_a_manifest_has_it(images: Path, tmp_path: Path) -> None:
    _prepare(images, tmp_path)
    before = _bytes(tmp_path)
    sidecar = json.loads(before["train-000000.json"])
    sidecar["index"]["label"][0] += 1
    (tmp_path / "train-000000.json").write_text(json.dumps(sidecar))
    _prepare(images, tmp_path)
    assert _bytes(tmp_path) == before


def test_without_a_manifest_there_is_no_data_set_until_a_rerun(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_task, done = writer.run_task, []

    def stop_after_two(*args: Any) -> Any:
        if len(done) == 2:
            raise KeyboardInterrupt
        done.append(run_task(*args))
        return done[-1]

    monkeypatch.setattr(writer, "run_task", stop_after_two)
    with pytest.raises(KeyboardInterrupt):
        _prepare(images, tmp_path)
    with pytest.raises(DataError, match="no data set"):
        load_manifest(str(tmp_path))
    times = _times(tmp_path)
    assert len(times) == 4
    monkeypatch.undo()
    _prepare(images, tmp_path)
    load_manifest(str(tmp_path))
    assert {name: _times(tmp_path)[name] for name in times} == times


@pytest.mark.cluster
@pytest.mark.parametrize(("number", "code"), [(signal.SIGKILL, -9), (signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_killed_command_leaves_no_data_set_and_resumes(tmp_path: Path, number: signal.Signals, code: int) -> None:
    pictures, output, whole = tmp_path / "pictures", tmp_path / "a" / "set", tmp_path / "b" / "set"
    pictures.mkdir()
    noise = np.random.default_rng(0).integers(0, 256, (200, 200, 3), np.uint8)
    for n in range(80):
        Image.fromarray(np.roll(noise, n, 0)).save(pictures / f"{n}.png", compress_level=0)
    for n in range(80, 2500):
        (pictures / f"{n}.png").hardlink_to(pictures / f"{n % 80}.png")
    command = [sys.executable, "-m", "data_prep", "folder", "--source", str(pictures), "--resolution", "16"]
    command += ["--shard-size", "100", "--workers", "2", "--output"]
    process = subprocess.Popen([*command, str(output)], stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 60
    while not list(output.glob("*.json")):
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(number)
    _, err = process.communicate(timeout=60)
    assert process.returncode == code
    assert "Traceback" not in err
    assert not (output / "manifest.json").exists()
    for tar in output.glob("*.tar"):
        tarfile.open(tar).close()  # a file with a shard's name is whole
    subprocess.run([*command, str(output)], check=True, capture_output=True)
    prepare("folder", str(whole), 16, path=str(pictures), shard_size=100)
    assert _bytes(whole) == {n: b for n, b in _bytes(output).items() if not n.endswith(".tmp")}


def test_another_data_set_is_overwritten_only_on_request(images: Path, tmp_path: Path) -> None:
    _prepare(images, tmp_path)
    before = _bytes(tmp_path)
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(DataError, match=r"holds another data set \('.*', 8 pixels, .*--overwrite"):
        _prepare(images, tmp_path, {"resample": "lanczos"})
    (tmp_path / "manifest.json").unlink()
    with pytest.raises(DataError, match="holds unfinished shards of another data set"):
        _prepare(images, tmp_path, shard_size=50)
    manifest = _prepare(images, tmp_path, shard_size=50, overwrite=True)
    assert load_manifest(str(tmp_path)) == manifest
    names = {s.name for split in manifest.splits.values() for s in split.shards}
    assert {p.name for p in tmp_path.glob("*.tar")} == names
    assert len(names) < len([n for n in before if n.endswith(".tar")])
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_other_pixels_of_the_same_size_are_another_data_set(tmp_path: Path) -> None:
    source = tmp_path / "source"
    for shade in (0, 1):
        for n in range(40):
            source.mkdir(exist_ok=True)
            Image.new("RGB", (8, 8), (n, shade, 0)).save(source / f"{n:02d}.bmp")
        if shade == 0:
            _prepare(source, tmp_path / "set")
    with pytest.raises(DataError, match="another data set"):
        _prepare(source, tmp_path / "set")


def test_leftovers_of_another_attempt_are_removed(images: Path, tmp_path: Path) -> None:
    (tmp_path / "set").mkdir()
    mine = {"backup-202601.tar": b"mine", "notes-000001.json": b"mine too"}
    for name, data in ({"train-000099.tar": b"killed before its sidecar"} | mine).items():
        (tmp_path / "set" / name).write_bytes(data)
    _prepare(images, tmp_path / "set")
    assert not (tmp_path / "set" / "train-000099.tar").exists()
    _prepare(images, tmp_path / "set", shard_size=20, overwrite=True)
    assert {name: (tmp_path / "set" / name).read_bytes() for name in mine} == mine
    assert verify(str(tmp_path / "set")) == []


def test_a_changed_source_is_another_data_set(images: Path, tmp_path: Path) -> None:
    source = Path(shutil.copytree(images, tmp_path / "source"))
    _prepare(source, tmp_path / "set")
    shutil.copy(source / "ant" / "000.png", source / "ant" / "new.png")
    with pytest.raises(DataError, match="another data set"):
        _prepare(source, tmp_path / "set")


def test_an_object_store_gets_the_same_bytes_and_repairs(images: Path, tmp_path: Path) -> None:
    url = f"memory://{uuid.uuid4().hex}/set"
    _prepare(images, tmp_path / "set")
    manifest = _prepare(images, url)
    fs = fsspec.filesystem("memory")
    assert load_manifest(url) == manifest
    assert {name: fs.cat_file(f"{url}/{name}") for name in _bytes(tmp_path / "set")} == _bytes(tmp_path / "set")
    fs.pipe_file(f"{url}/train-000000.tar", b"damaged")
    _prepare(images, url)
    assert fs.cat_file(f"{url}/train-000000.tar") == (tmp_path / "set" / "train-000000.tar").read_bytes()
    fs.rm(url, recursive=True)


def test_rejects_are_left_out_and_kept_with_their_reasons(images: Path, tmp_path: Path) -> None:
    source = Path(shutil.copytree(images, tmp_path / "source"))
    (source / "ant" / "000.png").write_bytes(b"no image")
    whole = (source / "bee" / "001.png").read_bytes()
    (source / "bee" / "001.png").write_bytes(whole[: len(whole) // 2])
    Image.fromarray(np.zeros((9, 9), np.uint16)).save(source / "cat" / "002.png")
    with pytest.raises(
        DataError, match=r"of 60 images cannot be decoded, more than --max-rejects 0.01 allows; the first"
    ):
        _prepare(source, tmp_path / "set")
    assert not (tmp_path / "set" / "manifest.json").exists()
    manifest = _prepare(source, tmp_path / "set", max_rejects=0.05)
    assert sum(s.samples for s in manifest.splits.values()) == 57
    shards = [s.name for split in manifest.splits.values() for s in split.shards]
    rejects = [r for name in shards for r in load_sidecar(str(tmp_path / "set"), name).rejects]
    assert {r["source"] for r in rejects} == {"ant/000.png", "bee/001.png", "cat/002.png"}
    assert all(r["reason"] and str(tmp_path) not in r["reason"] for r in rejects)  # no path of this machine


def test_images_are_upright_cropped_and_resized() -> None:
    wide = np.zeros((20, 60, 3), np.uint8)
    wide[:, 20:40] = 200  # the central square
    wide[:10, 20:40, 0] = 100
    rotated = Image.fromarray(wide).transpose(Image.Transpose.ROTATE_90)
    exif = Image.Exif()
    exif[0x0112] = 6  # "turn 90 degrees clockwise to see it upright"
    buffer = io.BytesIO()
    rotated.save(buffer, "PNG", exif=exif)
    for loaded in (wide, Image.fromarray(wide), buffer.getvalue()):
        made = fit(loaded, "x", Preprocess(4))
        assert made.shape == (4, 4, 3)
        assert (made[:2, :, 0] == 100).all()
        assert (made[2:] == 200).all()


def test_images_of_the_right_size_keep_their_pixels() -> None:
    gray = np.random.default_rng(0).integers(0, 256, (8, 8), np.uint8)
    assert np.array_equal(fit(Image.fromarray(gray), "x", Preprocess(8, "lanczos")), np.repeat(gray[:, :, None], 3, 2))


def test_progress_is_lines_without_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr("data_prep.progress.time.monotonic", lambda: now[0])
    stream = io.StringIO()
    with Progress(10_000, stream) as progress:
        now[0] += 6
        progress.update(1000, skipped=True)
        for _ in range(12):
            now[0] += 1
            progress.update(100)
    assert stream.getvalue().splitlines() == [
        "1,000 of 10,000 images",
        "1,500 of 10,000 images, 100 images/s, 1:25 left",
        "2,000 of 10,000 images, 100 images/s, 1:20 left",
    ]


def test_progress_is_a_bar_on_a_terminal() -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    stream = Terminal()
    with Progress(10, stream) as progress:
        progress.update(10)
    assert "10/10" in stream.getvalue()
    assert "images/s" in stream.getvalue()


def test_a_manifest_does_not_depend_on_the_machine(images: Path, tmp_path: Path) -> None:
    moved = Path(shutil.copytree(images, tmp_path / "elsewhere"))
    for path in moved.rglob("*.png"):
        os.utime(path, (1, 1))
    _prepare(images, tmp_path / "a" / "set")
    _prepare(moved, tmp_path / "b" / "set")
    assert _bytes(tmp_path / "a" / "set") == _bytes(tmp_path / "b" / "set")
    assert str(tmp_path) not in json.dumps(json.loads((tmp_path / "a" / "set" / "manifest.json").read_text()))


def test_a_rerun_leaves_a_data_set_of_an_earlier_version_as_it_is(images: Path, tmp_path: Path) -> None:
    made = _prepare(images, tmp_path)
    old = replace(made, fingerprint=first_fingerprint(made.splits, made.preprocessing))
    (tmp_path / "manifest.json").write_bytes(manifest_to_json(old))
    before = _bytes(tmp_path)
    assert _prepare(images, tmp_path).fingerprint == old.fingerprint != made.fingerprint
    assert _bytes(tmp_path) == before
    assert verify(str(tmp_path)) == []


def test_a_manifest_that_storage_lost_is_an_error(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = storage.write_bytes
    monkeypatch.setattr(storage, "write_bytes", lambda url, data: "manifest" in url or write(url, data))
    with pytest.raises(DataError, match=r"manifest\.json is not there"):
        _prepare(images, tmp_path)


def test_another_data_set_is_seen_though_a_listing_is_late(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _prepare(images, tmp_path)
    monkeypatch.setattr(storage, "listdir", lambda url: [])
    with pytest.raises(DataError, match="holds another data set"):
        _prepare(images, tmp_path, shard_size=20)
