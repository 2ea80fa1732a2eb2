"""Finds the address that `RAY_ADDRESS` stands for, and looks whether a Ray cluster answers there.

This comes before Ray is imported: `ray.init` waits for ten minutes at an address where nothing answers, and hears no
signal meanwhile. Not for joining the cluster, which is `eiwtrain.on_ray.session`.
"""

from __future__ import annotations

import contextlib
import os
import socket
from pathlib import Path

from eiwtrain.terminal.lines import one_line
from eiwtrain.terminal.redact import redact

_CONNECT_SECONDS = 5.0
_LOOPBACK = ("127.0.0.1", "::1", "localhost")  # in place of which Ray dials this machine's outer address
_RECORD = "ray_current_cluster"  # the file in which `ray start` leaves its address

# Off, and 127.0.0.1 stays what it is: else Ray puts this machine's outer address in its place, and a Ray of another
# address than that listens on all interfaces.
CLUSTERS_OF_MANY = "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"

# What opens an HTTP/2 connection, as gRPC uses it, and the type of the frame with which any server of it answers.
_PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes([0, 0, 0, 4, 0, 0, 0, 0, 0])
_HEADER_BYTES, _TYPE_AT, _SETTINGS = 9, 3, 4


class RayError(RuntimeError):
    """Ray cannot be joined or started; the message is one line."""


def given() -> str:
    """Return what `RAY_ADDRESS` says; empty where it names no cluster. Ray's word `local` is for a Ray of one's own."""
    address = os.environ.get("RAY_ADDRESS", "").strip()
    return "" if address == "local" else address


def find() -> None:
    """Check that a Ray cluster answers where `RAY_ADDRESS` says, and set what Ray needs to dial that address.

    A head that listens on loopback alone is reached by `CLUSTERS_OF_MANY`, which Ray reads when it is imported.

    Raises:
        RayError: there is none.
    """
    address = given()
    if "://" in address:
        raise RayError(
            f"RAY_ADDRESS: {one_line(redact(address))} is for `ray job submit` or Ray Client; unset it to run on this "
            "machine, or give host:port of the cluster's head on a machine of the cluster"
        )
    where = address
    if address == "auto":
        address, where = _running()
    host, _, port = address.rpartition(":")
    host = host.strip("[]")
    if not host or not port.isdigit():
        raise RayError(f"RAY_ADDRESS: {one_line(address)} is not host:port of a cluster's head, `auto` or `local`")
    dialled = [host] if host not in _LOOPBACK else _dialled(host)
    failures: list[str] = []
    for each in dialled:
        try:
            _look(each, int(port))
        except (OSError, OverflowError, UnicodeError) as e:  # UnicodeError: no host's name
            failures.append(one_line(e))
        else:
            if host in _LOOPBACK and each == dialled[-1]:
                os.environ.setdefault(CLUSTERS_OF_MANY, "0")
            return
    raise RayError(
        f"RAY_ADDRESS: nothing answers at {where} ({failures[-1]}); start the cluster, or unset it to run on this "
        "machine"
    )


def _dialled(host: str) -> list[str]:
    """Return the addresses that Ray dials for this loopback address: the outer one of this machine where it is left to
    itself, and the loopback address if `CLUSTERS_OF_MANY` is off."""
    loopback = "::1" if ":" in host else "127.0.0.1"
    if CLUSTERS_OF_MANY in os.environ:
        on = os.environ[CLUSTERS_OF_MANY].lower() in ("1", "true")
        return [_outer()] if on else [loopback]
    return [_outer(), loopback]


def _outer() -> str:
    """Return the address of this machine in its network, as Ray finds it; nothing is sent."""
    with contextlib.suppress(OSError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as s:
        s.connect(("8.8.8.8", 53))
        return str(s.getsockname()[0])
    with contextlib.suppress(OSError):
        return socket.gethostbyname(socket.gethostname())
    return "127.0.0.1"


def _look(host: str, port: int) -> None:
    """Return if a gRPC server answers, as Ray's head is one.

    Raises:
        OSError: it does not.
    """
    with socket.create_connection((host, port), timeout=_CONNECT_SECONDS) as connection:
        if os.environ.get("RAY_USE_TLS", "").lower() in ("1", "true"):
            return
        connection.sendall(_PREFACE)
        answer = b""
        while len(answer) < _HEADER_BYTES:
            if not (part := connection.recv(_HEADER_BYTES - len(answer))):
                break
            answer += part
        if len(answer) < _HEADER_BYTES or answer[_TYPE_AT] != _SETTINGS:
            raise OSError("what listens there is not Ray")


def _running() -> tuple[str, str]:
    """Return the address of the Ray on this machine that `auto` stands for, and a text that says where it was found.

    Raises:
        RayError: there is none, or not one alone.
    """
    import psutil

    running = set()
    for process in psutil.process_iter(["cmdline"]):
        words = process.info["cmdline"] or []
        if words and Path(words[0]).name == "raylet":
            running |= {word.partition("=")[2] for word in words if word.startswith("--gcs-address=")}
    record = folder() / _RECORD
    recorded = ""
    with contextlib.suppress(OSError, UnicodeDecodeError):
        recorded = record.read_text().strip()
    if recorded and len(running) != 1:
        return recorded, f"{recorded}, which {record} names"
    if len(running) == 1:
        (address,) = running
        return address, address
    why = f"several run here: {', '.join(sorted(running))}" if running else "none runs here"
    raise RayError(f"RAY_ADDRESS: `auto` finds no Ray, as {why}; give host:port, or unset it to run on this machine")


def folder() -> Path:
    """Return the folder in which Ray keeps its files on this machine."""
    return Path(os.environ.get("RAY_TMPDIR") or os.environ.get("TMPDIR") or "/tmp", "ray")
