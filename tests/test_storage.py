import os
from pathlib import Path

import pytest

from eiwtrain import storage


@pytest.fixture(params=["local", "memory"])
def root(request, tmp_path):
    return str(tmp_path / "store") if request.param == "local" else f"memory://{tmp_path.name}"


def test_what_is_written_is_read_back(root):
    url = storage.join(root, "a", "b.bin")
    storage.write_bytes(url, b"one")
    storage.write_bytes(url, b"two")
    assert storage.read_bytes(url) == b"two"
    assert storage.exists(url)
    assert storage.size(url) == 3


def test_a_reader_of_the_old_bytes_never_sees_the_new_ones(tmp_path):
    url = str(tmp_path / "f")
    storage.write_bytes(url, b"old")
    with open(url, "rb") as reader:
        storage.write_bytes(url, b"new")
        assert reader.read() == b"old"
    assert storage.read_bytes(url) == b"new"


def test_files_are_copied_both_ways(root, tmp_path):
    (tmp_path / "in").write_bytes(b"x" * 3_000_000)
    storage.put_file(tmp_path / "in", storage.join(root, "f"))
    storage.get_file(storage.join(root, "f"), tmp_path / "sub" / "out")
    assert (tmp_path / "sub" / "out").read_bytes() == b"x" * 3_000_000


def test_listing_gives_names_and_nothing_for_what_is_absent(root):
    for name in ("b/x", "a/x", "c"):
        storage.write_bytes(storage.join(root, name), b"1")
    assert storage.listdir(root) == ["a", "b", "c"]
    assert storage.listdir(storage.join(root, "absent")) == []


def test_deleting_what_is_absent_is_fine(root):
    storage.write_bytes(storage.join(root, "d", "x"), b"1")
    storage.delete(storage.join(root, "d"))
    storage.delete(storage.join(root, "d"))
    assert storage.listdir(storage.join(root, "d")) == []


def test_absent_is_told_from_broken(root):
    with pytest.raises(FileNotFoundError):
        storage.read_bytes(storage.join(root, "absent"))
    with pytest.raises(FileNotFoundError):
        storage.size(storage.join(root, "absent"))


def test_a_write_that_fails_leaves_the_old_bytes_and_no_temporary_file(tmp_path, monkeypatch):
    url = str(tmp_path / "f")
    storage.write_bytes(url, b"old")

    def fail(fd):
        raise OSError("disk full")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(storage.StorageError, match="f: OSError: disk full"):
        storage.write_bytes(url, b"new")
    assert storage.read_bytes(url) == b"old"
    assert [p.name for p in tmp_path.iterdir()] == ["f"]


def test_transient_failures_are_tried_again_and_final_ones_named(monkeypatch):
    monkeypatch.setattr(storage.time, "sleep", lambda s: None)
    calls = []

    def flaky():
        calls.append(1)
        if len(calls) < 3:
            raise ConnectionResetError("reset")
        return "ok"

    assert storage.retrying("s3://b/x", flaky) == "ok"
    for error in (PermissionError("denied"), ValueError("wrong key")):
        calls.clear()

        def final(error=error):
            calls.append(1)
            raise error

        with pytest.raises(storage.StorageError, match=f"s3://b/x: {type(error).__name__}"):
            storage.retrying("s3://b/x", final)
        assert len(calls) == 1


def test_the_clients_network_errors_are_transient_though_no_os_errors(monkeypatch):
    from botocore.exceptions import EndpointConnectionError, NoCredentialsError

    monkeypatch.setattr(storage.time, "sleep", lambda s: None)

    def count(error):
        calls = []

        def call():
            calls.append(1)
            raise error

        with pytest.raises(storage.StorageError):
            storage.retrying("s3://b/x", call)
        return len(calls)

    assert count(EndpointConnectionError(endpoint_url="http://x")) > 3
    assert count(NoCredentialsError()) == 1
    with storage.impatient():
        assert count(EndpointConnectionError(endpoint_url="http://x")) == 1
    assert count(ConnectionResetError()) > 3


def test_a_missing_bucket_is_a_storage_error(monkeypatch):
    class Store:
        def pipe_file(self, path, data):
            raise FileNotFoundError("The specified bucket does not exist")

    monkeypatch.setattr(storage, "filesystem", lambda url: (Store(), "b/x"))
    with pytest.raises(storage.StorageError, match="s3://b/x: The specified bucket does not exist"):
        storage.write_bytes("s3://b/x", b"")


def test_giving_up_names_the_cause(monkeypatch):
    monkeypatch.setattr(storage.time, "sleep", lambda s: None)

    def broken():
        raise TimeoutError("no answer")

    with pytest.raises(storage.StorageError, match="s3://b/x: TimeoutError: no answer"):
        storage.retrying("s3://b/x", broken)


def test_check_writable_leaves_nothing(root):
    storage.check_writable(storage.join(root, "a", "b"))
    assert storage.listdir(root) == []
    assert not Path(root).exists()


def test_check_writable_names_what_is_wrong(tmp_path):
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(storage.StorageError, match="file/below"):
        storage.check_writable(str(tmp_path / "file" / "below"))


def test_a_write_where_no_folder_can_be_is_a_storage_error():
    with pytest.raises(storage.StorageError, match="/proc/nowhere"):
        storage.write_bytes("/proc/nowhere/x", b"")


def test_a_remote_folder_can_be_had_as_a_local_one(root):
    storage.write_bytes(storage.join(root, "m", "config.json"), b"1")
    storage.write_bytes(storage.join(root, "m", "model.safetensors"), b"2")
    with storage.local_folder(storage.join(root, "m")) as folder:
        assert {p.name: p.read_bytes() for p in Path(folder).iterdir()} == {
            "config.json": b"1",
            "model.safetensors": b"2",
        }
    with (
        pytest.raises(storage.StorageError, match="absent"),
        storage.local_folder(f"memory://{Path(root).name}/absent"),
    ):
        pass


def test_an_unknown_scheme_is_one_line():
    with pytest.raises(storage.StorageError, match="nosuch://x"):
        storage.exists("nosuch://x")


def test_absolute_and_join():
    assert storage.absolute("s3://b/x/") == "s3://b/x"
    assert storage.absolute("x").startswith("/")
    assert storage.join("s3://b/", "/x/", "y") == "s3://b/x/y"
