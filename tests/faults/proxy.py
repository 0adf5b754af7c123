"""A TCP proxy on loopback that makes the network bad: slow, thin, cut, silent, closed.

    with FaultProxy(("127.0.0.1", 8000), latency=2.0) as proxy:
        connect(("127.0.0.1", proxy.port))
        proxy.half_open = True

Settings may be changed while it runs. The kernel answers a TCP handshake itself, so a connection
opens at once whatever the latency; the first byte, TLS's greeting, is the first that is late.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import struct
import threading
from types import TracebackType
from typing import Literal

Way = Literal["up", "down"]

CHUNK = 16 * 1024
HOST = "127.0.0.1"
_WAIT = 10.0
_TICK = 0.02
_LINGER_NONE = struct.pack("ii", 1, 0)


class _Connection:
    """A client's connection and its continuation to the target."""

    def __init__(self, *writers: asyncio.StreamWriter) -> None:
        self.writers = writers
        # Bytes were swallowed: what follows them would be garbage, so nothing passes any more.
        self.lost = False

    def close(self) -> None:
        """End both sides."""
        for writer in self.writers:
            writer.close()

    def reset(self) -> None:
        """End both sides with RST instead of FIN."""
        for writer in self.writers:
            peer = writer.get_extra_info("socket")
            with contextlib.suppress(OSError):
                peer.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _LINGER_NONE)
            writer.transport.abort()


class FaultProxy:
    """Passes bytes between its port and the target, with faults.

    Attributes:
        latency: seconds that each byte takes each way. Delays, but does not thin: up to
            ``buffer`` bytes are on their way at once.
        bandwidth: bit/s each way, over all connections together; None is unbounded.
        reset_every: seconds after which all open connections are reset, again and again.
        half_open: bytes of both directions vanish and connections stay open, new ones too. A
            connection that lost bytes stays silent after this is set back.
        connections: accepted so far.
        open_connections: now.
        delivered: bytes handed on, by way ("up" is towards the target).
        swallowed: bytes that vanished.
        resets: connections that were reset.
        port: to connect to, on 127.0.0.1.
    """

    def __init__(
        self,
        target: tuple[str, int],
        *,
        latency: float = 0.0,
        bandwidth: float | None = None,
        reset_every: float | None = None,
        half_open: bool = False,
        refuse: bool = False,
        buffer: int = 16 * 1024 * 1024,
    ) -> None:
        self.latency = latency
        self.bandwidth = bandwidth
        self.reset_every = reset_every
        self.half_open = half_open
        self.connections = 0
        self.delivered: dict[Way, int] = {"up": 0, "down": 0}
        self.swallowed = 0
        self.resets = 0
        self.port = 0
        self._target = target
        self._refuse = refuse
        self._in_flight = max(1, buffer // CHUNK)
        # When the line will have sent what was given to it so far, by way.
        self._line_free: dict[Way, float] = {"up": 0.0, "down": 0.0}
        self._open: set[_Connection] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._server: asyncio.Server | None = None
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="fault-proxy")

    @property
    def refuse(self) -> bool:
        """Whether the port is closed: new connections are refused, open ones go on."""
        return self._refuse

    @refuse.setter
    def refuse(self, value: bool) -> None:
        self._refuse = value
        self._call(self._close() if value else self._listen())

    @property
    def open_connections(self) -> int:
        """Connections that are open now."""
        return len(self._open)

    def reset(self) -> None:
        """Reset all open connections once."""
        self._call(self._reset())

    def __enter__(self) -> FaultProxy:
        self._thread.start()
        self._call(self._begin())
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._call(self._end())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(_WAIT)
        self._loop.close()

    def _call(self, coroutine: object) -> None:
        assert asyncio.iscoroutine(coroutine)
        asyncio.run_coroutine_threadsafe(coroutine, self._loop).result(_WAIT)

    async def _begin(self) -> None:
        await self._listen()
        if self._refuse:
            await self._close()
        self._spawn(self._reset_regularly())

    async def _end(self) -> None:
        await self._close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        # A task that was cancelled before its first step has closed nothing.
        for connection in self._open:
            connection.close()
        self._open.clear()
        # The transports close in callbacks of their own, one of them calling the next.
        for _ in range(3):
            await asyncio.sleep(0)

    async def _listen(self) -> None:
        if self._server is None:
            self._server = await asyncio.start_server(self._accept, HOST, self.port)
            self.port = self._server.sockets[0].getsockname()[1]

    async def _close(self) -> None:
        if self._server is not None:
            self._server.close()
            self._server = None

    def _spawn(self, coroutine: object) -> None:
        assert asyncio.iscoroutine(coroutine)
        task = self._loop.create_task(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _reset(self) -> None:
        for connection in tuple(self._open):
            connection.reset()
            self.resets += 1

    async def _reset_regularly(self) -> None:
        last = self._loop.time()
        while True:
            await asyncio.sleep(_TICK)
            if self.reset_every is None:
                last = self._loop.time()
            elif self._loop.time() - last >= self.reset_every:
                last = self._loop.time()
                await self._reset()

    def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        connection = _Connection(writer)
        self._open.add(connection)
        self._spawn(self._serve(reader, writer, connection))

    async def _serve(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, connection: _Connection
    ) -> None:
        try:
            if self.half_open:
                connection.lost = True
                await self._take(reader, None, connection, "up")
                return
            async with asyncio.timeout(_WAIT):
                far_reader, far_writer = await asyncio.open_connection(*self._target)
            connection.writers = (writer, far_writer)
            async with asyncio.TaskGroup() as group:
                ways: tuple[tuple[asyncio.StreamReader, asyncio.StreamWriter, Way], ...] = (
                    (reader, far_writer, "up"),
                    (far_reader, writer, "down"),
                )
                for source, sink, way in ways:
                    queue: _Queue = asyncio.Queue(self._in_flight)
                    group.create_task(self._take(source, queue, connection, way))
                    group.create_task(self._give(queue, sink, connection, way))
        except* (OSError, TimeoutError):
            # One side was reset, or the target refuses: the other side hears the same.
            connection.reset()
        finally:
            self._open.discard(connection)
            connection.close()

    async def _take(
        self,
        source: asyncio.StreamReader,
        queue: _Queue | None,
        connection: _Connection,
        way: Way,
    ) -> None:
        try:
            while data := await source.read(CHUNK):
                if self._swallows(connection) or queue is None:
                    self.swallowed += len(data)
                    continue
                await self._send_on_line(len(data), way)
                await queue.put((self._loop.time() + self.latency, data))
        except OSError:
            if not self._swallows(connection):
                raise
        if queue is not None:
            await queue.put((self._loop.time() + self.latency, b""))

    async def _give(
        self, queue: _Queue, sink: asyncio.StreamWriter, connection: _Connection, way: Way
    ) -> None:
        while True:
            due, data = await queue.get()
            await self._sleep_until(due)
            if self._swallows(connection):
                self.swallowed += len(data)
                if not data:
                    return
            elif data:
                sink.write(data)
                await sink.drain()
                self.delivered[way] += len(data)
            else:
                sink.write_eof()
                return

    def _swallows(self, connection: _Connection) -> bool:
        connection.lost = connection.lost or self.half_open
        return connection.lost

    async def _send_on_line(self, size: int, way: Way) -> None:
        if self.bandwidth is None:
            return
        begin = max(self._loop.time(), self._line_free[way])
        self._line_free[way] = begin + size * 8 / self.bandwidth
        await self._sleep_until(self._line_free[way])

    async def _sleep_until(self, due: float) -> None:
        if (left := due - self._loop.time()) > 0:
            await asyncio.sleep(left)


_Queue = asyncio.Queue[tuple[float, bytes]]
