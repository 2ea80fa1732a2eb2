"""Where `RAY_ADDRESS` leads, with servers that answer as Ray's head does, or otherwise; no Ray runs."""

import contextlib
import os
import socket
import threading
import time
from types import SimpleNamespace

import psutil
import pytest
import ray
from helpers import free_port

from eiwtrain.on_ray import address, session
from eiwtrain.on_ray.address import RayError

SETTINGS = bytes([0, 0, 0, 4, 0, 0, 0, 0, 0])
HTTP = b"HTTP/1.1 400 Bad Request\r\n\r\n"
OUTER = "127.0.0.2"  # in place of this machine's address in a network


@pytest.fixture(autouse=True)
def environment(monkeypatch, tmp_path):
    for name in ("RAY_ADDRESS", "RAY_USE_TLS", address.CLUSTERS_OF_MANY):
        monkeypatch.setenv(name, "")  # so that it is taken back
        monkeypatch.delenv(name)
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
    monkeypatch.setattr(address, "_outer", lambda: OUTER)
    monkeypatch.setattr(address, "_CONNECT_SECONDS", 0.5)
    monkeypatch.setattr(psutil, "process_iter", lambda fields: [])


@contextlib.contextmanager
def server(answer, host="127.0.0.1", port=0):
    """Answer each connection with those bytes once it has sent something; return the port."""
    with socket.create_server((host, port)) as listener:

        def serve():
            with contextlib.suppress(OSError):
                while True:
                    connection, _ = listener.accept()
                    connection.recv(64)
                    for byte in answer:  # in pieces, as a network may bring them
                        connection.send(bytes([byte]))
                    if answer:
                        connection.close()

        threading.Thread(target=serve, daemon=True).start()
        yield listener.getsockname()[1]
        listener.shutdown(socket.SHUT_RDWR)


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost"])
def test_a_head_on_loopback_alone_is_dialled_there(monkeypatch, host):
    with server(SETTINGS) as port:
        monkeypatch.setenv("RAY_ADDRESS", f"{host}:{port}")
        session.check()
    assert os.environ[address.CLUSTERS_OF_MANY] == "0"


def test_a_head_on_the_outer_address_is_left_to_ray(monkeypatch):
    with server(SETTINGS) as port, server(SETTINGS, OUTER, port):
        for host in ("127.0.0.1", OUTER):
            monkeypatch.setenv("RAY_ADDRESS", f"{host}:{port}")
            session.check()
    assert address.CLUSTERS_OF_MANY not in os.environ


def test_where_ray_is_told_what_to_dial_that_address_is_looked_at(monkeypatch):
    with server(SETTINGS) as port:
        monkeypatch.setenv("RAY_ADDRESS", f"127.0.0.1:{port}")
        monkeypatch.setenv(address.CLUSTERS_OF_MANY, "1")
        with pytest.raises(RayError, match="nothing answers"):
            session.check()
        monkeypatch.setenv(address.CLUSTERS_OF_MANY, "0")
        session.check()


@pytest.mark.parametrize("answer", [b"", HTTP, SETTINGS[:5]], ids=["silence", "http", "half"])
def test_what_is_no_head_is_one_line_soon(monkeypatch, answer):
    with server(answer) as port:
        monkeypatch.setenv("RAY_ADDRESS", f"127.0.0.1:{port}")
        began = time.monotonic()
        with pytest.raises(RayError, match=rf"^RAY_ADDRESS: nothing answers at 127.0.0.1:{port} \(.+\); ") as e:
            session.check()
    assert time.monotonic() - began < 5
    assert "\n" not in str(e.value)


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ("host", "is not host:port"),
        ("127.0.0.1:", "is not host:port"),
        (":6379", "is not host:port"),
        ("127.0.0.1:999999", "nothing answers"),
        ("b..c:80", "nothing answers"),
        ("ray://127.0.0.1:10001", "is for `ray job submit`"),
        ("http://me:secret@127.0.0.1:8265", "is for `ray job submit`"),
        ("auto", "`auto` finds no Ray, as none runs here"),
    ],
)
def test_an_address_that_cannot_be_joined_is_one_line(monkeypatch, given, says):
    monkeypatch.setenv("RAY_ADDRESS", given)
    with pytest.raises(RayError, match=says) as e:
        session.check()
    assert "\n" not in str(e.value)
    assert "secret" not in str(e.value)


def raylets(*addresses):
    return lambda fields: [
        SimpleNamespace(info={"cmdline": ["/x/raylet", f"--gcs-address={each}", "--node_id=1"]}) for each in addresses
    ]


def test_auto_is_the_ray_that_runs_here_or_the_recorded_one(monkeypatch, tmp_path):
    record = tmp_path / "ray" / "ray_current_cluster"
    record.parent.mkdir()
    monkeypatch.setenv("RAY_ADDRESS", "auto")
    record.write_text(f"127.0.0.1:{free_port()}")
    with pytest.raises(RayError, match=f"nothing answers at 127.0.0.1:.*, which {record} names"):
        session.check()
    with server(SETTINGS) as port:
        monkeypatch.setattr(psutil, "process_iter", raylets(f"127.0.0.1:{port}"))
        session.check()
        monkeypatch.setattr(psutil, "process_iter", raylets("127.0.0.1:1", "127.0.0.1:2"))
        record.write_text(f"127.0.0.1:{port}\n")
        session.check()
        record.unlink()
        with pytest.raises(RayError, match=r"several run here: 127.0.0.1:1, 127.0.0.1:2"):
            session.check()
    assert os.environ[address.CLUSTERS_OF_MANY] == "0"


@pytest.mark.parametrize("given", ["", " ", "local"])
def test_without_a_cluster_ray_is_started_here(monkeypatch, given):
    monkeypatch.setenv("RAY_ADDRESS", given)
    monkeypatch.setenv("RAY_TMPDIR", "/tmp")
    assert not session.joins_cluster()
    session.check()


def test_a_folder_too_long_for_sockets_is_named_before_the_start(monkeypatch, tmp_path):
    monkeypatch.setattr(ray, "init", lambda **options: pytest.fail("it was started"))
    monkeypatch.delenv("RAY_TMPDIR")
    monkeypatch.setenv("TMPDIR", f"{tmp_path}/{'x' * 60}")
    with pytest.raises(RayError, match=r"^Ray cannot be started: sockets in /.* set RAY_TMPDIR"):
        session.start(1)
    monkeypatch.setenv("RAY_TMPDIR", "/tmp")
    session.check()


@pytest.mark.parametrize(
    "failure",
    [
        OSError(28, "No space left on device"), PermissionError(13, "Permission denied", "/tmp/ray"),
        TimeoutError("late"), ValueError("a\nb"), AssertionError(), KeyError("node"),
        ray.exceptions.RaySystemError("x"), ImportError("y"),
    ],
    ids=repr,
)  # fmt: skip
def test_whatever_ray_raises_at_its_start_is_one_line(monkeypatch, failure):
    def init(**options):
        raise failure

    monkeypatch.setenv("RAY_TMPDIR", "/tmp")
    monkeypatch.setattr(ray, "init", init)
    with pytest.raises(RayError, match=r"^Ray cannot be started: .") as e:
        session.start(1)
    assert "\n" not in str(e.value)
    assert ("RAY_TMPDIR" in str(e.value)) == (type(failure) in (OSError, PermissionError))
