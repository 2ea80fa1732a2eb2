import errno
import logging
import os
from pathlib import Path

import pytest
from storage_helpers import Clock, refusal, retried

from eiwtrain import storage
from eiwtrain.storage import files, retry


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(retry, "time", clock)
    monkeypatch.delenv("EIWTRAIN_RETRY_SECONDS", raising=False)
    return clock


def tries(error):
    """How often a call that fails so is made, and the message in the end."""
    calls, final = retried(error)
    return calls, str(final)


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


def test_a_range_is_exactly_the_bytes_asked_for(root):
    url = storage.join(root, "f")
    storage.write_bytes(url, bytes(range(100)))
    assert storage.read_range(url, 10, 5) == bytes(range(10, 15))
    assert storage.read_range(url, 0, 100) == bytes(range(100))
    assert storage.read_range(url, 99, 1) == b"c"
    assert storage.read_range(url, 7, 0) == b""
    with pytest.raises(FileNotFoundError):
        storage.read_range(storage.join(root, "absent"), 0, 1)


def test_all_files_are_found_however_deep(root):
    for name in ("b/x/y.bin", "a.txt", "b/x.txt", ".hidden/z", "b/x/a"):
        storage.write_bytes(storage.join(root, name), b"1" * len(name))
    expected = [".hidden/z", "a.txt", "b/x.txt", "b/x/a", "b/x/y.bin"]
    assert storage.find(root) == [(name, len(name)) for name in expected]
    assert storage.find(storage.join(root, "b", "x")) == [("a", 5), ("y.bin", 9)]
    assert storage.find(storage.join(root, "absent")) == []
    assert storage.find(storage.join(root, "a.txt")) == []


def test_links_are_followed_and_those_to_nothing_left_out(tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "f").write_bytes(b"12")
    (tmp_path / "top").mkdir()
    (tmp_path / "top" / "folder").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "top" / "file").symlink_to(tmp_path / "elsewhere" / "f")
    (tmp_path / "top" / "broken").symlink_to(tmp_path / "nowhere")
    assert storage.find(str(tmp_path / "top")) == [("file", 2), ("folder/f", 2)]


def test_a_folder_that_cannot_be_read_is_not_taken_for_empty(tmp_path, monkeypatch):
    (tmp_path / "closed").mkdir()
    scandir = os.scandir

    def refuse(path):
        if str(path).endswith("closed"):
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(storage.StorageError, match="closed: PermissionError: Permission denied"):
        storage.find(str(tmp_path))


def test_a_range_that_passes_the_end_is_an_error_at_once(root, clock):
    url = storage.join(root, "f")
    storage.write_bytes(url, b"0123456789")
    with pytest.raises(storage.StorageError, match="f: it has 10 bytes, and bytes 8 to 10 were asked for"):
        storage.read_range(url, 8, 3)
    assert clock.slept == []


def test_an_answer_that_is_too_short_is_never_taken_for_the_file(monkeypatch, clock, tmp_path):
    url, data = "memory://short/f", b"x" * 1000
    storage.write_bytes(url, data)
    left = {"cat": 0, "get": 0}
    fs = type(storage.filesystem(url)[0])
    cat_file, get_file = fs.cat_file, fs.get_file

    def short_cat(self, *args, **kwargs):
        left["cat"] -= 1
        return cat_file(self, *args, **kwargs)[: -1 if left["cat"] >= 0 else None]

    def short_get(self, path, local, **kwargs):
        get_file(self, path, local, **kwargs)
        left["get"] -= 1
        if left["get"] >= 0:
            os.truncate(local, 999)

    monkeypatch.setattr(fs, "cat_file", short_cat)
    monkeypatch.setattr(fs, "get_file", short_get)
    before = storage.faults()
    for read in (lambda: storage.read_bytes(url), lambda: storage.read_range(url, 100, 900)):
        left["cat"] = 2
        assert read() == data[-len(read()) :]
    left["get"] = 2
    storage.get_file(url, tmp_path / "f")
    assert (tmp_path / "f").read_bytes() == data
    assert storage.faults() == before + 6
    left["cat"] = 10**6
    with pytest.raises(storage.StorageError, match="f: ConnectionError: 999 bytes came where there should be 1000"):
        storage.read_bytes(url)
    assert clock.now > 1290


def test_a_local_name_means_nothing_to_fsspec(tmp_path):
    storage.write_bytes(str(tmp_path / "a::b"), b"1")
    assert storage.read_bytes(str(tmp_path / "a::b")) == b"1"


def test_what_follows_a_scheme_is_a_path_and_no_chain(monkeypatch):
    path = storage.filesystem("s3://bucket/a::b/zip::c.jpg")[1]
    assert path == "bucket/a::b/zip::c.jpg"
    for chained in ("simplecache::memory://x", "zip://a.txt::memory://x.zip", "reference://x::http://127.0.0.1:9/"):
        with pytest.raises(storage.StorageError, match=r"^\S+://.*: "):
            storage.read_bytes(chained)
    assert not storage.is_local("s3://b/x")
    assert storage.is_local("/data/a://b")
    assert storage.is_local("./a://b")


PATTERNS = ("v[12]", "v*", "v?", "**", "{v1,v2}", "v[!1]", "~", "v%31", "v#1")


@pytest.mark.parametrize("name", PATTERNS)
def test_a_name_is_no_pattern(root, tmp_path, name):
    others = ["v1", "v2", "v", "w/v1", *(p for p in PATTERNS if p != name)]
    for folder in (*others, name):
        storage.write_bytes(storage.join(root, folder, "f"), folder.encode())
    url = storage.join(root, name)
    storage.get_file(storage.join(url, "f"), tmp_path / "copy")
    assert (tmp_path / "copy").read_bytes() == storage.read_bytes(storage.join(url, "f")) == name.encode()
    assert storage.read_range(storage.join(url, "f"), 0, 1) == name[:1].encode()
    assert storage.find(url) == [("f", len(name))]
    assert storage.listdir(url) == ["f"]
    assert storage.size(storage.join(url, "f")) == len(name)
    storage.put_file(tmp_path / "copy", storage.join(url, "sub", "g"))
    storage.delete(url)
    assert not storage.exists(url)
    assert [f for f, _ in storage.find(root)] == sorted(f"{other}/f" for other in others)


def test_a_file_is_deleted_by_its_exact_name(root):
    for name in ("v1/model.safetensors", "v2/model.safetensors", "v[12]/model.safetensors"):
        storage.write_bytes(storage.join(root, name), b"1")
    storage.delete(storage.join(root, "v[12]", "model.safetensors"))
    assert [f for f, _ in storage.find(root)] == ["v1/model.safetensors", "v2/model.safetensors"]


def test_a_link_to_a_folder_is_deleted_and_the_folder_stays(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "real" / "f").write_bytes(b"1")
    (tmp_path / "link").symlink_to(tmp_path / "real")
    storage.delete(str(tmp_path / "link"))
    assert storage.find(str(tmp_path)) == [("real/f", 1)]


def test_a_name_that_no_file_can_have_is_one_line(tmp_path):
    for name in ("x" * 300, "a\0b", "~nobody-of-this-name\0"):
        with pytest.raises(storage.StorageError):
            storage.check_writable(str(tmp_path / name))
    assert storage.absolute("~nobody-of-this-name/x").endswith("/~nobody-of-this-name/x")


def test_what_a_store_has_cached_is_not_trusted(root):
    fs, _ = storage.filesystem(root)
    invalidated = []
    fs.invalidate_cache = lambda path=None: invalidated.append(path)
    try:
        for call in (storage.exists, storage.listdir, storage.find):
            call(storage.join(root, "absent"))
    finally:
        del fs.invalidate_cache
    assert len(invalidated) >= 3 or storage.is_local(root)  # where nothing is cached


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


def test_transient_failures_are_tried_again_and_final_ones_named(clock):
    calls, before = [], storage.faults()

    def flaky():
        calls.append(1)
        if len(calls) < 3:
            raise ConnectionResetError("reset")
        return "ok"

    assert storage.retrying("s3://b/x", flaky) == "ok"
    assert storage.faults() == before + 2
    for error in (PermissionError("denied"), ValueError("wrong key"), OSError(errno.ENOSPC, "No space left")):
        assert tries(error)[0] == 1
        assert tries(error)[1].startswith(f"s3://b/x: {type(error).__name__}: ")
    assert storage.faults() == before + 2


def test_the_clients_network_errors_are_transient_though_no_os_errors(clock):
    from aiohttp import ClientPayloadError
    from botocore.exceptions import EndpointConnectionError, NoCredentialsError, ReadTimeoutError, SSLError

    for passing in (
        EndpointConnectionError(endpoint_url="http://x"),
        ReadTimeoutError(endpoint_url="http://x"),
        ClientPayloadError("not completed"),
        ConnectionResetError(),
    ):
        assert tries(passing)[0] > 20
        with storage.impatient():
            began = clock.now
            assert tries(passing)[0] > 1
            assert clock.now - began < 4
    assert tries(SSLError(endpoint_url="https://x", error="certificate"))[0] == 1
    count, message = tries(NoCredentialsError())
    assert count == 1
    assert "AWS_ACCESS_KEY_ID" in message


@pytest.mark.parametrize(
    ("status", "code"),
    [
        (503, "SlowDown"),
        (503, "503"),  # of a HEAD, which has no body
        (500, "InternalError"),
        (502, "BadGateway"),
        (504, "GatewayTimeout"),
        (429, "TooManyRequests"),
        (408, "408"),
        (400, "RequestTimeout"),
        (400, "XAmzContentSHA256Mismatch"),
        (409, "OperationAborted"),
        (404, "NoSuchUpload"),
    ],
)
def test_what_a_server_says_when_it_is_busy_may_pass(clock, status, code):
    count, message = tries(refusal(status, code))
    assert count > 20
    assert f"{status} " in message
    assert "as the server says" in message


@pytest.mark.parametrize(
    ("status", "code", "says"),
    [
        (403, "InvalidAccessKeyId", "wrong credentials"),
        (403, "SignatureDoesNotMatch", "wrong credentials"),
        (400, "ExpiredToken", "wrong credentials"),
        (403, "403", "access is refused"),
        (403, "AccessDenied", "access is refused"),
        (404, "NoSuchBucket", "the bucket does not exist"),
        (400, "InvalidBucketName", "400 InvalidBucketName: as the server says"),
        (416, "InvalidRange", "416 InvalidRange: as the server says"),
        (501, "NotImplemented", "501 NotImplemented: as the server says"),
    ],
)
def test_what_a_server_refuses_is_final_and_one_line(clock, status, code, says):
    count, message = tries(refusal(status, code, "as the\nserver says"))
    assert count == 1
    assert message.startswith(f"s3://b/x: {says}")
    assert "\n" not in message
    assert ("AWS_SECRET_ACCESS_KEY" in message) == (status == 403 or code == "ExpiredToken")


def test_a_missing_key_is_a_missing_file(clock):
    def call():
        raise refusal(404, "NoSuchKey")

    with pytest.raises(FileNotFoundError):
        storage.retrying("s3://b/x", call)


def test_waits_grow_at_random_up_to_ten_seconds_and_end_at_the_deadline(clock):
    assert "(tried for 300 s)" in tries(TimeoutError("no answer"))[1]
    assert clock.now == pytest.approx(1300)
    assert all(wait <= min(10, 0.5 * 2**i) for i, wait in enumerate(clock.slept))
    assert max(clock.slept) > 5
    assert len(set(clock.slept)) == len(clock.slept)


def test_the_deadline_counts_from_the_first_failure(clock):
    def call():
        clock.now += 1000  # a long download, which fails at its end
        raise TimeoutError

    with pytest.raises(storage.StorageError):
        storage.retrying("s3://b/x", call)
    assert len(clock.slept) == 1


@pytest.mark.parametrize(("seconds", "end"), [("7.5", 7.5), ("0", 0)])
def test_the_environment_sets_the_deadline(clock, monkeypatch, seconds, end):
    monkeypatch.setenv("EIWTRAIN_RETRY_SECONDS", seconds)
    tries(TimeoutError())
    assert clock.now == pytest.approx(1000 + end)


@pytest.mark.parametrize("value", ["soon", "-1", "nan"])
def test_a_deadline_that_is_none_is_named(clock, monkeypatch, value):
    monkeypatch.setenv("EIWTRAIN_RETRY_SECONDS", value)
    assert tries(TimeoutError())[1] == f"EIWTRAIN_RETRY_SECONDS must be a number of seconds, not '{value}'"


def test_trying_again_is_logged_at_first_and_then_every_ten_seconds(clock, caplog):
    with caplog.at_level(logging.WARNING, "eiwtrain.storage"):
        tries(TimeoutError("no answer"))
    lines = [r.getMessage() for r in caplog.records]
    assert lines[0] == "s3://b/x: TimeoutError: no answer; trying again for up to 300 s"
    assert 15 <= len(lines) <= 30


def test_a_missing_bucket_is_a_storage_error(monkeypatch):
    class Store:
        def pipe_file(self, path, data):
            raise FileNotFoundError("The specified bucket does not exist")

    monkeypatch.setattr(files, "filesystem", lambda url, tries: (Store(), "b/x"))
    with pytest.raises(storage.StorageError, match="s3://b/x: The specified bucket does not exist"):
        storage.write_bytes("s3://b/x", b"")


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


def test_check_file_writable_wants_a_place_for_a_file_and_leaves_nothing(root, tmp_path):
    storage.check_file_writable(storage.join(root, "new", "x.json"))
    storage.check_file_writable("memory://x.json")
    assert not storage.exists(root)
    (tmp_path / "taken").mkdir()
    with pytest.raises(storage.StorageError, match="taken: this is a folder; give the name of a file"):
        storage.check_file_writable(str(tmp_path / "taken"))
    with pytest.raises(storage.StorageError, match="/proc/nowhere"):
        storage.check_file_writable("/proc/nowhere/x.json")


def test_an_unknown_scheme_is_one_line():
    with pytest.raises(storage.StorageError, match="nosuch://x"):
        storage.exists("nosuch://x")


def test_absolute_and_join():
    assert storage.absolute("s3://b/x/") == "s3://b/x"
    assert storage.absolute("x").startswith("/")
    assert storage.join("s3://b/", "/x/", "y") == "s3://b/x/y"
