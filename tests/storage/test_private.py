"""Folders in the temporary folder, where anybody may have put something before."""

import os
import tempfile

import pytest

from eiwtrain import storage
from eiwtrain.data import cache
from eiwtrain.storage.private import file_lock, private_folder


@pytest.fixture
def temporary(tmp_path, monkeypatch):
    """The temporary folder, empty."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


def test_the_folder_is_for_its_owner_alone(temporary):
    before = os.umask(0)
    try:
        folder = cache.default_cache_dir()
    finally:
        os.umask(before)
    assert folder.parent == temporary
    assert folder.stat().st_mode & 0o777 == 0o700
    assert cache.default_cache_dir() == folder


def test_a_folder_of_somebody_else_is_refused(temporary, monkeypatch):
    folder, owner = cache.default_cache_dir(), os.getuid()
    monkeypatch.setattr(os, "getuid", lambda: owner + 1)
    folder.rename(other := temporary / f"eiwtrain-cache-{owner + 1}")  # it now belongs to another user
    if owner == 0:  # a folder of root is accepted: root creates the volumes of pods
        assert cache.default_cache_dir() == other
        os.chown(other, owner + 2, -1)
    with pytest.raises(storage.StorageError, match=f"data.cache_dir: {other} belongs to somebody else"):
        cache.default_cache_dir()


def test_a_folder_that_others_can_read_is_closed_to_them(temporary):
    folder = private_folder("x", "TMPDIR")
    folder.chmod(0o755)
    assert private_folder("x", "TMPDIR").stat().st_mode & 0o777 == 0o700


@pytest.mark.parametrize("mode", [0o777, 0o770, 0o1777, 0o702])
def test_a_folder_that_others_can_write_is_refused(temporary, mode):
    folder = private_folder("x", "TMPDIR")
    folder.chmod(mode)
    with pytest.raises(storage.StorageError, match=f"TMPDIR: others may write to {folder}"):
        private_folder("x", "TMPDIR")


@pytest.mark.parametrize("what", ["a link", "a dangling link", "a file"])
def test_a_link_or_a_file_in_its_place_is_refused(temporary, what):
    place = temporary / f"x-{os.getuid()}"
    (temporary / "elsewhere").mkdir(mode=0o700)
    if what == "a file":
        place.write_bytes(b"")
    else:
        place.symlink_to(temporary / ("elsewhere" if what == "a link" else "nowhere"))
    with pytest.raises(storage.StorageError, match=f"TMPDIR: {place} is a link or a file"):
        private_folder("x", "TMPDIR")
    assert not (temporary / "nowhere").exists()


def test_a_temporary_folder_that_is_not_there_is_one_line(temporary, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(temporary / "nowhere"))
    with pytest.raises(storage.StorageError, match=r"TMPDIR: .*nowhere.* cannot be made or opened: "):
        private_folder("x", "TMPDIR")


def test_a_lock_follows_no_link_and_empties_no_file(tmp_path):
    (tmp_path / "precious").write_bytes(b"precious")
    (tmp_path / "lock").symlink_to(tmp_path / "precious")
    with pytest.raises(OSError, match="symbolic links"), file_lock(tmp_path / "lock"):
        pass
    with file_lock(tmp_path / "precious"):
        assert (tmp_path / "precious").read_bytes() == b"precious"
