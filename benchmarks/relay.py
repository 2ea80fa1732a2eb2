"""A relay in front of a server on this machine that makes it as far away as a bucket is, and counts what it sends."""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from collections.abc import Iterator

_CHUNK = 1 << 18  # bytes


class Relay:
    """Passes connections on to a port of the loopback interface.

    Attributes:
        port: the port to connect to instead.
        sent: bytes that the server has sent so far.
    """

    def __init__(self, upstream: int, latency: float, bytes_per_second: float) -> None:
        self._upstream, self._latency, self._rate = upstream, latency, bytes_per_second
        self.port = self.sent = 0
        self._started = threading.Event()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._run, daemon=True, name="relay")
        self._thread.start()
        self._started.wait()

    def close(self) -> None:
        """Close all connections."""
        self._loop.call_soon_threadsafe(self._main.cancel)
        self._thread.join()

    def _run(self) -> None:
        self._main = self._loop.create_task(self._serve())
        with contextlib.suppress(asyncio.CancelledError):
            self._loop.run_until_complete(self._main)
        self._loop.run_until_complete(self._end_connections())
        self._loop.close()

    async def _end_connections(self) -> None:
        await asyncio.sleep(0.05)  # a server that is closed would leave open what it has just taken
        self._server.close()
        connections = asyncio.all_tasks() - {asyncio.current_task()}
        for connection in connections:
            connection.cancel()
        await asyncio.gather(*connections, return_exceptions=True)
        await asyncio.sleep(0)  # in which what was closed is let go

    async def _serve(self) -> None:
        self._server = await asyncio.start_server(self._connected, "127.0.0.1", 0, limit=_CHUNK)
        self.port = self._server.sockets[0].getsockname()[1]
        self._started.set()
        await asyncio.Event().wait()  # until it is canceled

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            with contextlib.suppress(OSError, asyncio.CancelledError):
                up, down = await asyncio.open_connection("127.0.0.1", self._upstream, limit=_CHUNK)
                await asyncio.gather(self._pass(reader, down, False), self._pass(up, writer, True))
        finally:  # also where the relay ends while the server has not answered yet
            writer.close()

    async def _pass(self, source: asyncio.StreamReader, to: asyncio.StreamWriter, counted: bool) -> None:
        """Pass bytes on: the beginning of a request after the latency, all at the rate of one connection."""
        last = 0.0
        try:
            while data := await source.read(_CHUNK):
                begins = not counted and time.monotonic() - last > self._latency
                await asyncio.sleep(len(data) / self._rate + self._latency * begins)
                last = time.monotonic()
                self.sent += len(data) * counted
                to.write(data)
                await to.drain()
        except OSError:  # one side has gone
            pass
        finally:
            to.close()


@contextlib.contextmanager
def relayed(upstream: int, latency: float, bytes_per_second: float) -> Iterator[Relay]:
    """Yield a relay that is closed with the block."""
    relay = Relay(upstream, latency, bytes_per_second)
    try:
        yield relay
    finally:
        relay.close()
