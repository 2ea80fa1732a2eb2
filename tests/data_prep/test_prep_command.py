"""The command line: exit codes, and errors of one line that are found before anything is written."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from data_prep import prepare
from data_prep.__main__ import main
from eiwtrain.data import ShardReader, load_manifest


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """Twenty images without classes."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    for n in range(20):
        Image.new("RGB", (9, 9), (n, n, n)).save(folder / f"{n}.png")
    return folder


def _run(*args: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "data_prep", *map(str, args)], capture_output=True, text=True)


def test_an_error_is_one_line_and_code_2_and_writes_nothing(tmp_path: Path) -> None:
    output = tmp_path / "set"
    run = _run("folder", "--source", tmp_path / "nowhere", "--output", output, "--resolution", 8)
    assert run.returncode == 2
    assert run.stderr == f"data_prep: source {tmp_path / 'nowhere'}: no such folder, tar or zip\n"
    assert run.stdout == ""
    assert not output.exists()


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (["--shard-size", "0"], "shard size must be at least 1"),
        (["--workers", "0"], "workers must be at least 1"),
        (["--max-rejects", "2"], "max rejects is a share"),
        (["--split", "hash:2"], "needs a share above 0 and below 1"),
        (["--only", "val"], "there is no split 'val' to write"),
        (["--only", "train", "--drop-duplicates"], "leave --only out"),
        (["--short-side", "7"], "short side must be at least the resolution"),
        (["--resolution", "0"], "resolution must be"),
        (["--output", "nosuch://bucket/set"], "nosuch"),
    ],
)
def test_wrong_settings_are_named(
    pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], extra: list[str], message: str
) -> None:
    base = ["folder", "--source", str(pictures), "--output", str(tmp_path / "set"), "--resolution", "8"]
    assert main(base + extra) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert message in err
    assert err.count("\n") == 1
    assert not (tmp_path / "set").exists()


def test_an_empty_output_is_refused(pictures: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:  # argparse's
        main(["folder", "--source", str(pictures), "--output", "", "--resolution", "8"])
    assert caught.value.code == 2
    assert "a path or a URL is needed" in capsys.readouterr().err


def test_an_output_that_cannot_be_written_is_one_line(
    pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("in the way")
    output = tmp_path / "file" / "set"
    code = main(["folder", "--source", str(pictures), "--output", str(output), "--resolution", "8", "--workers", "1"])
    err = capsys.readouterr().err
    assert code == 2
    assert str(output) in err
    assert "probe" not in err
    assert err.count("\n") == 1


def test_a_dry_run_prints_the_plan_and_writes_nothing(
    pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "set"
    base = ["folder", "--source", str(pictures), "--output", str(output), "--resolution", "8", "--shard-size", "5"]
    assert main([*base, "--split", "all", "--dry-run"]) == 0
    out = capsys.readouterr().out
    assert "train: 20 images in 4 shards" in out
    assert "MB, from encoding 20 of them" in out
    assert not output.exists()


def test_a_complete_data_set_is_left_alone_shown_and_verified(
    pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    base = ["folder", "--source", "pictures", "--output", "set", "--resolution", "8"]
    assert main([*base, "--workers", "1"]) == 0
    assert capsys.readouterr().out.startswith("wrote ")
    assert main([*base, "--workers", "1"]) == 0
    assert capsys.readouterr().out.startswith("already complete: ")
    assert main(["show", "set"]) == 0
    shown = capsys.readouterr().out
    manifest = load_manifest("set")
    for part in (manifest.fingerprint, "center-crop-resize v3", f"train: {manifest.splits['train'].samples} images"):
        assert part in shown
    with Image.open("contact-sheet.png") as sheet:
        assert sheet.width > 16 * 8
    assert main(["verify", "set", "--workers", "1"]) == 0
    assert capsys.readouterr().out.startswith("sound: ")
    with open("set/train-000000.tar", "r+b") as shard:
        shard.seek(600)
        shard.write(b"x")
    assert main(["verify", "set", "--workers", "1"]) == 1
    assert "train-000000.tar: has another SHA-256" in capsys.readouterr().out
    assert main(["show", str(tmp_path)]) == 2
    assert "no data set at" in capsys.readouterr().err


def test_the_embedded_photographs_become_a_readable_data_set(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    manifest = prepare("photos", str(tmp_path / "set"), 32)
    assert capsys.readouterr() == ("", "")
    assert load_manifest(str(tmp_path / "set")) == manifest
    for split in ("train", "test"):
        reader = ShardReader(str(tmp_path / "set"), manifest, split, tmp_path / "cache")
        assert reader.read(range(100)).std() > 30  # pictures, not a constant


def test_the_workers_of_the_writer_do_not_import_torch() -> None:
    code = "import sys, data_prep.writer, data_prep.sources; print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "False\n"
