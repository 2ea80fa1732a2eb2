"""A proxy that breaks HTTP on request: error answers, resets, slow and truncated bodies, silence.

All other requests pass unchanged, with their Host header, so that S3 signatures stay valid. One connection
serves one request. Not for anything but tests.
"""

from __future__ import annotations

import contextlib
import re
import socket
import socketserver
import struct
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

_CHUNK = 1 << 14
_CALM = 60.0  # seconds without a byte after which a connection is given up


@dataclass
class _Fault:
    pattern: re.Pattern[str]
    left: int
    apply: Callable[[_Exchange], None]


class _Exchange:
    """One request, already read, with the faults that it can suffer."""

    def __init__(
        self, client: socket.socket, upstream: tuple[str, int], request: bytes, stopped: threading.Event
    ) -> None:
        self.client, self._upstream, self._request, self.stopped = client, upstream, request, stopped
        self.method = request.split(b" ", 1)[0].decode()

    def reset(self) -> None:
        """Close the client's connection so that it sees a reset, not a regular end."""
        _linger_not(self.client)

    def cut(self, after: int) -> None:
        """Send the server a part of the request, then reset both connections."""
        with socket.create_connection(self._upstream, timeout=_CALM) as server:
            server.sendall(self._request[: self._request.index(b"\r\n\r\n") + 4 + after])
            time.sleep(0.05)  # until the sent bytes have arrived: a reset discards bytes that were not read
            _linger_not(server)
        self.reset()

    def forward(self, limit: int | None = None, bytes_per_second: float | None = None) -> None:
        """Pass the request on, and the answer back with at most `limit` bytes of its body."""
        with socket.create_connection(self._upstream, timeout=_CALM) as server:
            server.sendall(self._request)
            with server.makefile("rb") as answer:
                head = b""
                while (line := answer.readline()).strip():
                    if not line.lower().startswith(b"connection:"):
                        head += line
                self.client.sendall(head + b"Connection: close\r\n\r\n")
                sent = 0
                while limit is None or sent < limit:
                    size = _CHUNK if bytes_per_second is None else max(1, int(bytes_per_second / 10))
                    data = answer.read1(size if limit is None else min(size, limit - sent))
                    if not data:
                        return
                    self.client.sendall(data)
                    sent += len(data)
                    if bytes_per_second is not None and self.stopped.wait(len(data) / bytes_per_second):
                        return


class FaultyProxy:
    """Stands on the loopback interface in front of `upstream`; a context manager.

    Faults hit requests whose "METHOD /path?query" matches the regular expression `matching`, each a number of times,
    in the order in which they were asked for.

    Attributes:
        requests: how often each (method, path without query) was asked for.
    """

    def __init__(self, upstream: str) -> None:
        host, port = upstream.removeprefix("http://").split(":")
        self._upstream = (host, int(port))
        self._faults: list[_Fault] = []
        self._lock = threading.Lock()
        self._stopped = threading.Event()
        self.requests: Counter[tuple[str, str]] = Counter()
        self._server = _Server(("127.0.0.1", 0), _Handler)
        self._server.proxy = self
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True)

    @property
    def endpoint(self) -> str:
        """`http://127.0.0.1:port`."""
        return f"http://127.0.0.1:{self._server.server_address[1]}"

    def answer(self, status: int, code: str, times: int = 1, matching: str = "") -> None:
        """Answer the next requests by an S3 error, without asking the server."""
        body = f"<?xml version='1.0'?><Error><Code>{code}</Code><Message>on request</Message></Error>".encode()
        head = f"HTTP/1.1 {status} {code}\r\nContent-Type: application/xml\r\nContent-Length: {len(body)}\r\n"

        def apply(exchange: _Exchange) -> None:
            content = b"" if exchange.method == "HEAD" else body
            exchange.client.sendall(head.encode() + b"Connection: close\r\n\r\n" + content)

        self._add(apply, times, matching)

    def reset(self, after: int | None = None, times: int = 1, matching: str = "") -> None:
        """Reset the connection of the next requests: before any answer, or `after` bytes of the body."""

        def apply(exchange: _Exchange) -> None:
            if after is not None:
                exchange.forward(limit=after)
                time.sleep(0.05)  # until the sent bytes have arrived: a reset discards bytes that were not read
            exchange.reset()

        self._add(apply, times, matching)

    def cut_upload(self, after: int, times: int = 1, matching: str = "PUT") -> None:
        """Give the server the first `after` bytes of the body of the next requests, and reset both connections."""
        self._add(lambda exchange: exchange.cut(after), times, matching)

    def truncate(self, after: int, times: int = 1, matching: str = "") -> None:
        """Close the connection regularly `after` bytes of the body, whatever Content-Length has promised."""
        self._add(lambda exchange: exchange.forward(limit=after), times, matching)

    def slow(self, bytes_per_second: float, times: int = 1, matching: str = "") -> None:
        """Deliver the bodies of the next answers slowly."""
        self._add(lambda exchange: exchange.forward(bytes_per_second=bytes_per_second), times, matching)

    def stall(self, times: int = 1, matching: str = "") -> None:
        """Read the next requests and never answer."""
        self._add(lambda exchange: self._until_client_leaves(exchange), times, matching)

    def clear(self) -> None:
        """Forget all faults and counts."""
        with self._lock:
            self._faults.clear()
            self.requests.clear()

    @property
    def pending(self) -> int:
        """Faults that have not hit yet."""
        with self._lock:
            return sum(f.left for f in self._faults)

    def __enter__(self) -> FaultyProxy:
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._stopped.set()
        self._server.shutdown()
        self._server.server_close()

    def handle(self, client: socket.socket) -> None:
        """Serve one connection."""
        client.settimeout(_CALM)
        request = _read_request(client)
        if request is None:
            return
        head, body = request
        method, target = head.split(b" ", 2)[:2]
        what = f"{method.decode()} {target.decode()}"
        with self._lock:
            self.requests[method.decode(), target.decode().partition("?")[0]] += 1
            fault = next((f for f in self._faults if f.left and f.pattern.search(what)), None)
            if fault is not None:
                fault.left -= 1
        exchange = _Exchange(client, self._upstream, head + b"\r\n" + body, self._stopped)
        if fault is not None:
            fault.apply(exchange)
            return
        try:
            exchange.forward()
        except ConnectionRefusedError:  # the server is down: so is the proxy
            exchange.reset()

    def _add(self, apply: Callable[[_Exchange], None], times: int, matching: str) -> None:
        with self._lock:
            self._faults.append(_Fault(re.compile(matching), times, apply))

    def _until_client_leaves(self, exchange: _Exchange) -> None:
        exchange.client.settimeout(0.1)
        while not self._stopped.is_set():
            with contextlib.suppress(TimeoutError):
                if not exchange.client.recv(1):
                    return


class _Server(socketserver.ThreadingTCPServer):
    daemon_threads = True
    request_queue_size = 128
    proxy: FaultyProxy

    def shutdown_request(self, request: socket.socket | tuple[bytes, socket.socket]) -> None:
        assert isinstance(request, socket.socket)
        request.close()  # without the base class's shutdown, which would close a connection before it is reset

    def handle_error(self, request: object, client_address: object) -> None:
        """Ignore a client that leaves in the middle."""


class _Handler(socketserver.BaseRequestHandler):
    server: _Server

    def handle(self) -> None:
        self.server.proxy.handle(self.request)


def _linger_not(connection: socket.socket) -> None:
    """Make the closing of the connection a reset."""
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))


def _read_request(client: socket.socket) -> tuple[bytes, bytes] | None:
    """Return head and body, or None if no request came; the head asks to close the connection, and lacks its end."""
    with client.makefile("rb") as stream:
        head, length = stream.readline(), 0
        if not head.strip():
            return None
        while (line := stream.readline()).strip():
            name, _, value = line.partition(b":")
            if name.lower() == b"expect":
                client.sendall(b"HTTP/1.1 100 Continue\r\n\r\n")
                continue
            if name.lower() == b"connection":
                continue
            if name.lower() == b"transfer-encoding":
                raise NotImplementedError("a chunked request")
            if name.lower() == b"content-length":
                length = int(value)
            head += line
        return head + b"Connection: close\r\n", stream.read(length)
