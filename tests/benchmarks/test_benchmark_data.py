"""The data benchmarks: they find lost and changed images; and one small run of each."""

from __future__ import annotations

import io
import json
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch.multiprocessing as mp
from PIL import Image

from benchmarks import data_prep, environments, images, loader
from benchmarks.data_peers import (
    CODECS,
    PACKAGES,
    Writing,
    decode_png,
    digest,
    epochs,
    key_of,
    read_back,
    square,
    write,
)

COUNT, SIDE, BATCH = 24, 16, 8


def installed(peer: str) -> bool:
    """Return whether this interpreter has the peer; otherwise the benchmark makes an environment for it."""
    return bool(environments.versions(PACKAGES[peer]))


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("made") / "images"
    images.make(folder, COUNT, 2 * SIDE, 1)
    return folder


@pytest.fixture(scope="module")
def expected(source: Path) -> dict[str, list[Any]]:
    return {
        key_of(name): [label, digest(np.asarray(square(str(source / name), SIDE)))]
        for name, label in images.entries(source)
    }


def test_made_images_are_the_same_whoever_makes_them(source: Path, tmp_path: Path) -> None:
    images.make(tmp_path, COUNT, 2 * SIDE, 2)
    assert images.entries(tmp_path) == images.entries(source)
    assert len(images.entries(source)) == COUNT
    for name, _ in images.entries(source):
        assert (tmp_path / name).read_bytes() == (source / name).read_bytes()


def test_images_are_taken_evenly_from_a_folder_and_from_its_tar(source: Path, tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for path in sorted(source.rglob("*")):  # a tar keeps the order in which it is filled
            tar.add(path, str(path.relative_to(source)), recursive=False)
    for i, where in enumerate((source, tmp_path / "a.tar")):
        assert images.take(where, tmp_path / str(i), 12) == 12
        taken = [(tmp_path / str(i) / name).read_bytes() for name, _ in sorted(images.entries(tmp_path / str(i)))]
        files = sorted(p for p in source.rglob("*.jpg"))
        assert sorted(taken) == sorted(p.read_bytes() for p in files[::2])
    assert images.take(source, tmp_path / "all", 1000) == COUNT


@pytest.mark.cluster  # processes of its own
@pytest.mark.parametrize(("encoding", "codec"), CODECS)
@pytest.mark.parametrize("peer", list(PACKAGES))
def test_a_peers_data_set_keeps_every_pixel_and_image(
    peer: str, encoding: str, codec: str, source: Path, expected: dict[str, list[Any]], tmp_path: Path
) -> None:
    if not installed(peer):
        pytest.skip(f"{peer} is not installed here")
    # in a process of its own: the peers fork, which is unsafe here, as earlier tests left threads in this process
    mp.start_processes(write_and_read_back, (peer, encoding, codec, source, expected, tmp_path), start_method="spawn")


def write_and_read_back(
    _: int, peer: str, encoding: str, codec: str, source: Path, expected: dict[str, list[Any]], tmp_path: Path
) -> None:
    folder = str(tmp_path / "data")
    write(Writing(peer, str(source), folder, SIDE, 2, encoding, codec, 4))
    found = {name: [label, digest(pixels)] for name, label, pixels in read_back(peer, folder, encoding, codec)}
    assert found == expected
    start = epochs(peer, folder, str(tmp_path / "cache"), encoding, codec, BATCH, 1)
    marks = loader.expected_marks(source, SIDE)
    assert [loader.wrong_with(start, marks), loader.wrong_with(start, marks)] == ["", ""]


def test_a_lost_and_a_changed_image_are_reported() -> None:
    good: dict[str, list[Any]] = {"a": [0, "1"], "b": [1, "2"]}
    assert data_prep.compare(good, dict(good)) == ""
    assert data_prep.compare(good, {"a": [0, "1"]}) == "1 lost (one: b)"
    assert data_prep.compare(good, good | {"c": [0, "3"]}) == "1 too many (one: c)"
    for other in ([0, "2"], [1, "3"]):
        assert data_prep.compare(good, good | {"b": other}) == "1 with another class or other pixels (one: b)"


def test_ours_is_read_by_tarfile_and_pillow(tmp_path: Path) -> None:
    pixels = np.arange(4 * 4 * 3, dtype=np.uint8).reshape(4, 4, 3)
    png, npy = io.BytesIO(), io.BytesIO()
    Image.fromarray(pixels).save(png, "PNG")
    np.save(npy, pixels)
    about = json.dumps({"label": 3, "source": "x/1.jpg"}).encode()
    for kind, data in (("png", png.getvalue()), ("npy", npy.getvalue())):
        (tmp_path / kind).mkdir()
        with tarfile.open(tmp_path / kind / "train-000000.tar", "w") as tar:
            for name, content in ((f"00000000.{kind}", data), ("00000000.json", about)):
                info = tarfile.TarInfo(name)
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
        assert data_prep.read_ours(tmp_path / kind, kind) == {"x/1": [3, digest(pixels)]}
    assert (decode_png(png.getvalue()) == pixels).all()
    assert (decode_png(memoryview(png.getvalue())) == pixels).all()


def test_start_time_and_rate_are_separated() -> None:
    assert data_prep.rates([((3.0, 1.0), (7.0, 5.0))], 100, 500) == {
        "images_per_second": 100.0,
        "cpu_us": 10_000.0,
        "start_seconds": 2.0,
        "total_seconds": 7.0,
    }
    rounds = [((3.0, 2.0), (9.0, 5.0)), ((4.0, 1.0), (7.0, 6.0))]  # the best of each
    assert data_prep.rates(rounds, 100, 500)["images_per_second"] == 100.0
    assert data_prep.rates(rounds, 100, 500)["cpu_us"] == 10_000.0
    assert data_prep.rates([((3.0, 1.0), (2.9, 1.0))], 100, 500)["images_per_second"] is None


def test_only_mirror_images_share_a_mark() -> None:
    image = np.random.default_rng(0).integers(0, 256, (3, 8, 8), np.uint8)
    other = image.copy()
    other[1, 2, 3] ^= 1
    assert loader.mark(image, 1) == loader.mark(image[:, :, ::-1], 1)
    marks = {loader.mark(a, label) for a in (image, other, image[:, ::-1], image[::-1]) for label in (1, 2)}
    assert len(marks) == 8


def test_lost_repeated_and_changed_images_of_an_epoch_are_reported() -> None:
    import torch

    pixels = np.random.default_rng(0).integers(0, 256, (6, 3, 4, 4), np.uint8)
    marks = [loader.mark(image, i) for i, image in enumerate(pixels)]

    def epoch(order: list[int], labels: list[int] | None = None) -> str:
        batch = torch.from_numpy(pixels[order]), torch.tensor(order if labels is None else labels)
        return loader.wrong_with(lambda: [batch], marks)

    assert epoch([3, 1, 0, 2, 5, 4]) == ""
    assert epoch([3, 1, 0, 2, 5]) == "1 of 6 lost"
    assert epoch([3, 1, 0, 2, 5, 4, 4, 1]) == "2 of 6 repeated"
    assert epoch([0, 1, 2, 3, 4, 4]) == "1 of 6 lost, 1 of 6 repeated"
    assert epoch([0, 1, 2, 3, 4, 5], [0, 1, 2, 3, 4, 4]) == "1 of 6 lost, 1 of 6 unknown"


def test_cpu_time_includes_all_processes_below_a_command() -> None:
    work = "import time\nwhile time.process_time() < 1: pass\ntime.sleep(0.5)"  # at least one look sees it asleep
    for _ in range(2):
        work = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {work!r}]); print('done')"
    out, seconds, cpu = environments.timed([sys.executable, "-c", work])
    assert out == "done\n" * 2
    assert 1 <= cpu < seconds + 1


def test_a_failed_command_gives_its_reason_in_a_line() -> None:
    with pytest.raises(environments.FailedError, match="exit code 1") as e:
        environments.run([sys.executable, "-c", "raise ValueError('no good\\n}')"])
    assert e.value.line == "ValueError: no good"


def test_an_environment_that_pip_cannot_make_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(environments, "REQUIREMENTS", ("no-such-package==1",))
    commands: list[list[str]] = []

    def run(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        commands.append(command)
        failed = "no-such-package==1" in command
        return subprocess.CompletedProcess(command, int(failed), str(tmp_path), "a\nERROR: none\n" if failed else "")

    monkeypatch.setattr(subprocess, "run", run)
    with pytest.raises(environments.NotInstalledError, match=r"^ERROR: none$"):
        environments.peers_python(tmp_path)
    assert any("torchvision" in command for command in commands)
    assert data_prep.pythons_of(["webdataset", "LitData"], tmp_path)[1] == {"LitData": "not installed: ERROR: none"}


@pytest.mark.cluster  # processes of its own
def test_the_loaders_run_and_each_of_ours_gives_each_image_once(tmp_path: Path) -> None:
    sizes = ["--images", "70", "--batch", "8", "--resolution", "16", "--seconds", "0.1"]
    out = ["--folder", str(tmp_path), "--json", str(tmp_path / "rows.json")]
    command = [sys.executable, "-m", "benchmarks.loader", "--quick", "--peers", *sizes, *out]
    done = subprocess.run(command, cwd=environments.ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    rows = json.loads((tmp_path / "rows.json").read_text())["rows"]
    assert [row["loader"] for row in rows] == list(loader.OURS)
    for row in rows:
        assert row["note"] == ""
        assert min(row[k] for k in ("warm_wall", "cold_wall", "first_seconds")) > 0
    assert done.stdout.count("| each once |") == 3


@pytest.mark.cluster  # processes of its own
def test_the_prep_runs_and_all_write_the_same(tmp_path: Path) -> None:
    sizes = ["--images", "24", "--shard-size", "4", "--processes", "1", "--resolution", "16"]
    out = ["--folder", str(tmp_path), "--json", str(tmp_path / "rows.json")]
    command = [sys.executable, "-m", "benchmarks.data_prep", "--quick", "--peers", "webdataset", *sizes, *out]
    done = subprocess.run(command, cwd=environments.ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "rows.json").read_text())
    assert [(row["writer"], row["encoding"], row["same"]) for row in report["rows"]] == [
        ("eiwtrain", "png", True),
        ("webdataset", "png", True),
    ]
    assert report["about"]["images"] == [4, 24]
