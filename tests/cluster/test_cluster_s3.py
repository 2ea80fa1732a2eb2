"""Storage, shards and `data_prep` on a real S3 server whose answers, connections and absence are broken on purpose."""

import logging
import multiprocessing
import os
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
from faults import FaultyProxy
from helpers import free_port, write_images
from s3fs import S3FileSystem

from eiwtrain import storage
from eiwtrain.data import ShardReader
from eiwtrain.data.manifest import DataError, load_manifest
from eiwtrain.storage import retry

pytestmark = pytest.mark.cluster

DATA = bytes(range(256)) * 1200


@pytest.fixture(scope="module")
def proxy_of_server(s3_server):
    with FaultyProxy(s3_server.endpoint) as proxy:
        yield proxy


@pytest.fixture
def proxy(proxy_of_server, s3, monkeypatch):
    """Reach the server through the proxy alone; at the end of the test all its faults have hit."""
    proxy_of_server.clear()
    monkeypatch.setenv("AWS_ENDPOINT_URL", proxy_of_server.endpoint)
    monkeypatch.setenv("EIWTRAIN_RETRY_SECONDS", "60")
    monkeypatch.setattr(retry, "_FIRST_WAIT", 0.1)
    yield proxy_of_server
    pending = proxy_of_server.pending
    proxy_of_server.clear()
    assert pending == 0


@pytest.fixture
def url(proxy, s3):
    """A file on the server, read through the proxy."""
    storage.write_bytes(f"{s3}/f", DATA)
    proxy.clear()
    return f"{s3}/f"


def direct(url, s3_server):
    """The bytes at `url` as the server has them, without the proxy."""
    keys = {"key": s3_server.env["AWS_ACCESS_KEY_ID"], "secret": s3_server.env["AWS_SECRET_ACCESS_KEY"]}
    return S3FileSystem(endpoint_url=s3_server.endpoint, skip_instance_cache=True, **keys).cat_file(url)


def wait_until(true, seconds=60.0):
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end
        time.sleep(0.02)


def read_all_ways(url, tmp_path):
    storage.get_file(url, tmp_path / "copy")
    assert (tmp_path / "copy").read_bytes() == DATA
    assert storage.read_bytes(url) == DATA
    assert storage.read_range(url, 1000, 200_000) == DATA[1000:201_000]


FAULTS = {
    "503": lambda p: p.answer(503, "SlowDown", matching="GET"),
    "503 of a HEAD": lambda p: p.answer(503, "SlowDown", matching="HEAD"),
    "500": lambda p: p.answer(500, "InternalError", matching="GET"),
    "reset before the answer": lambda p: p.reset(times=2, matching="GET"),  # aiohttp asks once more by itself
    "reset in the body": lambda p: p.reset(after=70_000, matching="GET"),
    "truncated body": lambda p: p.truncate(after=70_000, matching="GET"),
    "truncated after a byte": lambda p: p.truncate(after=1, matching="GET"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_read_rides_out(proxy, url, tmp_path, fault):
    for read in (
        lambda: storage.read_bytes(url),
        lambda: storage.read_range(url, 0, len(DATA)),
        lambda: (storage.get_file(url, tmp_path / "copy"), (tmp_path / "copy").read_bytes())[1],
    ):
        if fault == "503 of a HEAD" and not (proxy.clear(), read(), any(m == "HEAD" for m, _ in proxy.requests))[2]:
            continue  # a range is read without
        FAULTS[fault](proxy)
        before = storage.faults()
        assert read() == DATA
        assert proxy.pending == 0
        assert storage.faults() == before + 1


def test_listings_and_sizes_ride_out_errors_too(proxy, url):
    folder = url.removesuffix("/f")
    for call, expected in (
        (lambda: storage.listdir(folder), ["f"]),
        (lambda: storage.find(folder), [("f", len(DATA))]),
        (lambda: storage.exists(url), True),
        (lambda: storage.size(url), len(DATA)),
    ):
        proxy.answer(503, "SlowDown", times=2)
        proxy.reset(times=2)
        before = storage.faults()
        assert call() == expected
        assert storage.faults() == before + 3
    proxy.answer(503, "SlowDown", times=2)
    storage.delete(url)
    assert storage.find(folder) == []


def test_slow_answers_are_waited_for_and_silence_is_not(proxy, url, tmp_path, monkeypatch):
    monkeypatch.setattr(S3FileSystem, "read_timeout", 1)
    S3FileSystem.clear_instance_cache()
    proxy.slow(200_000, matching="GET")  # 1.5 s in all, but never a second without a byte
    before = storage.faults()
    assert storage.read_bytes(url) == DATA
    assert storage.faults() == before
    proxy.stall(matching="GET")
    read_all_ways(url, tmp_path)
    assert storage.faults() == before + 1


@pytest.mark.parametrize("fault", ["503", "reset", "cut"])
def test_a_write_rides_out(proxy, url, s3_server, fault):
    new = DATA[::-1]
    if fault == "503":
        proxy.answer(503, "SlowDown", matching="PUT")
    elif fault == "reset":
        proxy.reset(times=2, matching="PUT")
    else:
        proxy.cut_upload(after=100_000)
        proxy.cut_upload(after=0)  # once more by aiohttp itself
    before = storage.faults()
    storage.write_bytes(url, new)
    assert storage.faults() == before + 1
    assert direct(url, s3_server) == new


def test_a_write_that_breaks_off_leaves_the_old_bytes(proxy, url, s3, s3_server, tmp_path, monkeypatch):
    monkeypatch.setenv("EIWTRAIN_RETRY_SECONDS", "0")
    (tmp_path / "new").write_bytes(DATA * 2)
    for write in (lambda u: storage.write_bytes(u, DATA * 2), lambda u: storage.put_file(tmp_path / "new", u)):
        for target in (url, f"{s3}/new"):
            proxy.cut_upload(after=len(DATA), times=2)
            with pytest.raises(storage.StorageError, match=target):
                write(target)
            assert proxy.pending == 0
    assert direct(url, s3_server) == DATA
    assert storage.find(s3) == [("f", len(DATA))]


def test_only_the_part_of_a_large_file_that_failed_is_sent_again(proxy, s3, tmp_path):
    data = np.random.default_rng(0).bytes(1 << 20) * 110
    (tmp_path / "large").write_bytes(data)
    proxy.answer(503, "SlowDown", matching="PUT .*partNumber=2")
    storage.put_file(tmp_path / "large", f"{s3}/large")
    assert proxy.requests["PUT", f"/{s3.removeprefix('s3://')}/large"] == 3 + 1
    before = storage.faults()
    for read in (storage.read_bytes, lambda url: (storage.get_file(url, tmp_path / "copy"), tmp_path / "copy")[1]):
        proxy.truncate(after=1_000_000, times=2, matching="GET")  # s3fs asks once and hangs up, to learn the size
        got = read(f"{s3}/large")
        assert (got if isinstance(got, bytes) else got.read_bytes()) == data
    assert storage.faults() == before + 2
    storage.delete(f"{s3}/large")


def test_a_server_that_goes_away_and_returns_is_ridden_out(s3_server, s3, caplog):
    storage.write_bytes(f"{s3}/f", DATA)
    before = storage.faults()
    s3_server.stop()

    def come_back():
        wait_until(lambda: storage.faults() >= before + 3)
        s3_server.start()

    helper = threading.Thread(target=come_back)
    helper.start()
    try:
        with caplog.at_level(logging.WARNING, "eiwtrain.storage"):
            assert storage.read_bytes(f"{s3}/f") == DATA
    finally:
        helper.join()
    said = next(record for record in caplog.records if record.name == "eiwtrain.storage").getMessage()
    assert said.startswith(f"{s3}/f: EndpointConnectionError: ")
    assert "Connect call failed" in said
    assert "trying again for up to 300 s" in said


def test_a_server_that_does_not_return_is_one_line(s3_server, s3, monkeypatch):
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{free_port()}")
    monkeypatch.setenv("EIWTRAIN_RETRY_SECONDS", "0.5")
    with pytest.raises(storage.StorageError) as e:
        storage.read_bytes(f"{s3}/f")
    assert str(e.value).startswith(f"{s3}/f: EndpointConnectionError: Could not connect")
    assert "(tried for " in str(e.value)
    assert "\n" not in str(e.value)


def test_a_host_that_does_not_exist_is_one_line_soon_for_the_impatient(s3, monkeypatch):
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://no-such-host.invalid")
    began = time.monotonic()
    with storage.impatient(), pytest.raises(storage.StorageError, match=r"no-such-host\.invalid.*[Nn]ame"):
        storage.read_bytes(f"{s3}/f")
    assert time.monotonic() - began < 60  # seconds; the patient would wait for 300


CALLS = {
    "read_bytes": storage.read_bytes,
    "read_range": lambda url: storage.read_range(url, 0, 1),
    "get_file": lambda url: storage.get_file(url, os.devnull),
    "write_bytes": lambda url: storage.write_bytes(url, b"1"),
    "put_file": lambda url: storage.put_file(__file__, url),
    "exists": storage.exists,
    "listdir": storage.listdir,
    "find": storage.find,
    "size": storage.size,
    "delete": storage.delete,
    "check_writable": storage.check_writable,
}


def one_line(name, url):
    """What the call says when it fails for good, at once."""
    before = storage.faults()
    with pytest.raises(storage.StorageError) as e:
        CALLS[name](url)
    assert storage.faults() == before, name
    assert "\n" not in str(e.value)
    assert url in str(e.value)
    return str(e.value)


@pytest.mark.parametrize("wrong", ["AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"])
def test_wrong_credentials_are_named_at_once(s3, monkeypatch, wrong):
    monkeypatch.setenv(wrong, "wrong")
    for name in CALLS:
        said = one_line(name, f"{s3}/f")
        assert "the credentials are wrong" in said or "wrong credentials (403 " in said, name
        assert wrong in said


def test_a_missing_bucket_is_named_at_once(s3):
    for name in CALLS:
        assert "the bucket does not exist (404 NoSuchBucket" in one_line(name, "s3://no-such-bucket/f"), name


def test_no_credentials_are_named(s3, monkeypatch):
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    assert "look at AWS_ACCESS_KEY_ID" in one_line("read_bytes", f"{s3}/f")


def test_a_missing_key_is_a_missing_file(s3):
    storage.write_bytes(f"{s3}/f", b"1")
    for name in ("read_bytes", "read_range", "get_file", "size"):
        with pytest.raises(FileNotFoundError):
            CALLS[name](f"{s3}/absent")
    assert not storage.exists(f"{s3}/absent")
    assert storage.exists(s3)
    assert storage.listdir(f"{s3}/absent") == storage.find(f"{s3}/absent") == []
    storage.delete(f"{s3}/absent")
    with pytest.raises(storage.StorageError, match="it has 1 bytes, and bytes 0 to 4 were asked for"):
        storage.read_range(f"{s3}/f", 0, 5)


def test_a_key_is_no_pattern_and_no_chain(s3):
    keys = ["a::b/f", "v1/f", "v2/f", "v[12]/f"]
    for key in keys:
        storage.write_bytes(f"{s3}/{key}", key.encode())
    assert [name for name, _ in storage.find(s3)] == keys
    assert [storage.read_bytes(f"{s3}/{key}").decode() for key in keys] == keys
    storage.delete(f"{s3}/v[12]/f")
    assert [name for name, _ in storage.find(s3)] == keys[:3]
    storage.delete(s3)
    assert storage.find(s3) == []


def test_what_others_write_is_seen_at_once(s3):
    def other(code):
        subprocess.run([sys.executable, "-c", f"from eiwtrain import storage; {code}"], check=True)

    storage.write_bytes(f"{s3}/a", b"1")
    assert storage.listdir(s3) == ["a"]
    assert storage.find(s3) == [("a", 1)]
    assert not storage.exists(f"{s3}/sub/b")
    other(f"storage.write_bytes('{s3}/sub/b', b'22'); storage.write_bytes('{s3}/a', b'333')")
    assert storage.exists(f"{s3}/sub/b")
    assert storage.size(f"{s3}/a") == 3
    assert storage.listdir(s3) == ["a", "sub"]
    assert storage.find(s3) == [("a", 3), ("sub/b", 2)]
    other(f"storage.delete('{s3}/sub/b')")
    assert not storage.exists(f"{s3}/sub/b")
    assert storage.find(s3) == [("a", 3)]


def test_a_forked_process_reads_although_its_parent_did(s3):
    storage.write_bytes(f"{s3}/f", DATA)
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe()

    def read():
        theirs.send_bytes(storage.read_bytes(f"{s3}/f"))

    child = context.Process(target=read)
    child.start()
    try:
        assert ours.poll(60)
        assert ours.recv_bytes() == DATA
    finally:
        child.kill()
        child.join()


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    folder = tmp_path_factory.mktemp("images")
    write_images(folder, 80)
    return folder


@pytest.fixture(scope="module")
def prepared(images, tmp_path_factory):
    """The data set of the images in a local folder, made without interruption."""
    output = tmp_path_factory.mktemp("local") / "set"
    finish(prepare(images, output))
    return output


def prepare(images, output):
    """`python -m data_prep folder`, not waited for."""
    command = f"folder --source {images} --output {output} --resolution 8 --shard-size 8 --workers 1"
    return subprocess.Popen(
        [sys.executable, "-m", "data_prep", *command.split()],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def finish(process):
    """All it says until it ends by itself, without an error."""
    try:
        said = process.communicate(timeout=120)[0]
    finally:
        process.kill()
    assert process.returncode == 0, said


def files_of(url):
    return {name: storage.read_bytes(storage.join(str(url), name)) for name, _ in storage.find(str(url))}


def test_prep_killed_on_s3_and_run_again_gives_the_same_bytes(proxy, s3, images, prepared):
    output = f"{s3}/set"
    proxy.stall(matching=r"PUT .*-000004\.tar")
    killed = prepare(images, output)
    try:
        wait_until(lambda: proxy.pending == 0)
    finally:
        killed.kill()
        killed.communicate()
    names = {name for name, _ in storage.find(output)}
    assert any(name.endswith(".tar") for name in names)
    assert "manifest.json" not in names
    proxy.answer(503, "SlowDown", times=2)
    proxy.reset(after=10, matching=r"GET .*\.tar")
    proxy.cut_upload(after=100)
    finish(prepare(images, output))
    assert files_of(output) == files_of(prepared)


@pytest.fixture
def uploaded(s3, prepared):
    """The same data set on the server."""
    for name, data in files_of(prepared).items():
        storage.write_bytes(f"{s3}/set/{name}", data)
    return f"{s3}/set"


def test_a_reader_of_s3_gives_the_pixels_of_local_files(proxy, uploaded, prepared, tmp_path):
    local = ShardReader(str(prepared), load_manifest(str(prepared)), "train", tmp_path / "local")
    faults = [proxy.reset, proxy.truncate] * 2
    for i, fault in enumerate(faults):
        fault(after=1000 * i, matching=r"GET .*\.tar")
    proxy.answer(503, "SlowDown", times=2, matching=r"\.json")
    before = storage.faults()
    remote = ShardReader(uploaded, load_manifest(uploaded), "train", tmp_path / "cache")
    order = np.random.default_rng(0).permutation(len(local)).tolist()
    np.testing.assert_array_equal(remote.read(order), local.read(order))
    assert storage.faults() == before + len(faults) + 2


def test_a_shard_replaced_by_another_is_named(uploaded, prepared, tmp_path):
    manifest = load_manifest(uploaded)
    one, other = (s.name for s in manifest.split("train").shards[:2])
    storage.write_bytes(f"{uploaded}/{one}", (prepared / other).read_bytes())
    reader = ShardReader(uploaded, manifest, "train", tmp_path / "cache")
    with pytest.raises(DataError, match=f"shard {one} is damaged") as e:
        reader.read(range(len(reader)))
    assert "\n" not in str(e.value)


def test_a_missing_shard_is_named(uploaded, tmp_path):
    manifest = load_manifest(uploaded)
    name = manifest.split("train").shards[0].name
    storage.delete(f"{uploaded}/{name}")
    reader = ShardReader(uploaded, manifest, "train", tmp_path / "cache")
    with pytest.raises(DataError, match=f"shard {name} is missing from {uploaded}") as e:
        reader.read(range(len(reader)))
    assert "\n" not in str(e.value)


@pytest.mark.parametrize(
    ("environment", "bucket", "says"),
    [
        ({"AWS_SECRET_ACCESS_KEY": "wrong"}, "bucket", "AWS_SECRET_ACCESS_KEY"),
        ({}, "no-such-bucket", "the bucket does not exist"),
        ({"AWS_ENDPOINT_URL": "http://127.0.0.1:1"}, "bucket", "Could not connect"),
        ({}, "bucket", "no data set at"),
    ],
)
def test_the_command_ends_in_one_line(s3, monkeypatch, environment, bucket, says):
    for name, value in {"EIWTRAIN_RETRY_SECONDS": "0", **environment}.items():
        monkeypatch.setenv(name, value)
    done = subprocess.run(
        [sys.executable, "-m", "data_prep", "show", f"s3://{bucket}/absent"], capture_output=True, text=True
    )
    assert done.returncode == 2
    assert done.stderr.startswith("data_prep: ")
    assert done.stderr.count("\n") == 1
    assert says in done.stderr
