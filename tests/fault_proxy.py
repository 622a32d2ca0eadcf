"""A bad network in one object: an HTTP/1.1 proxy that fails on purpose, from a seed.

It understands just enough of HTTP to lose a response after its request was carried out, to
carry out a request twice, and to send a response twice: what a plain TCP proxy cannot do.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import socket
import struct
import threading
from collections import Counter
from collections.abc import Coroutine, Iterator
from dataclasses import dataclass
from typing import Any

CHUNK_BYTES = 1024
RESET = struct.pack("ii", 1, 0)  # SO_LINGER on, 0 s: close sends RST


@dataclass(frozen=True, slots=True, kw_only=True)
class Faults:
    """How bad it is: the probability of each fault per request, and what always holds.

    `delay_s`: up to so much before each answer. `reset`: the connection is reset before the
    request gets through; `cut`: in the middle of the response. `half_open`: nothing more is
    heard on the connection. `swallowed`: the request is carried out, its response is lost.
    `repeated`: the request is carried out twice. `doubled`: the response is sent twice.
    `bytes_per_s`: what the line carries, each way.
    """

    delay_s: float = 0.0
    reset: float = 0.0
    cut: float = 0.0
    half_open: float = 0.0
    swallowed: float = 0.0
    repeated: float = 0.0
    doubled: float = 0.0
    bytes_per_s: float | None = None

    def draw(self, chance: random.Random) -> str:
        """Which fault, if any, meets the next request."""
        names = ("reset", "cut", "half_open", "swallowed", "repeated", "doubled")
        shares = [getattr(self, name) for name in names]
        return chance.choices([*names, "none"], [*shares, 1 - sum(shares)])[0]


class FaultProxy:
    """Carries requests to `upstream`; `met` counts the faults that there were.

    Without `faults` it is a perfect line, until it is given some.
    """

    def __init__(self, upstream: tuple[str, int], *, seed: int) -> None:
        self.faults = Faults()
        self.met: Counter[str] = Counter()
        self.port = 0
        self._upstream = upstream
        self._chance = random.Random(seed)
        self._is_partitioned = False
        self._connections: set[asyncio.Task[None]] = set()
        self._silent: list[asyncio.StreamWriter] = []
        self._loop = asyncio.new_event_loop()

    @contextlib.contextmanager
    def listening(self, host: str = "127.0.0.1") -> Iterator[FaultProxy]:
        """Listen on a free port of this address until the block ends."""
        thread = threading.Thread(target=self._loop.run_forever, name="proxy")
        thread.start()
        server = self._run(asyncio.start_server(self._serve, host, 0))
        self.port = server.sockets[0].getsockname()[1]
        try:
            yield self
        finally:
            self._run(self._close(server))
            self._loop.call_soon_threadsafe(self._loop.stop)
            thread.join()
            self._loop.close()

    def part(self) -> None:
        """From now on nothing gets through; connections do not close, they fall silent."""
        self._run(self._part())

    def heal(self) -> None:
        """New connections get through again; the silent ones never speak any more."""
        self._is_partitioned = False

    def _run(self, work: Coroutine[Any, Any, Any]) -> Any:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(30)

    async def _part(self) -> None:
        self._is_partitioned = True
        self.met["partition"] += 1
        for task in self._connections:
            task.cancel()

    async def _close(self, server: asyncio.Server) -> None:
        server.close()
        for task in self._connections:
            task.cancel()
        await asyncio.gather(*self._connections, return_exceptions=True)
        for writer in self._silent:
            writer.close()
            with contextlib.suppress(OSError):
                await writer.wait_closed()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._connections.add(task)
        try:
            if not self._is_partitioned and await self._speak(reader, writer):
                writer.close()
                return
        except asyncio.CancelledError:
            pass  # a partition, or the end
        except (OSError, asyncio.IncompleteReadError):
            writer.close()
            return
        finally:
            self._connections.discard(task)
        self._silent.append(writer)  # neither closed nor read: half open

    async def _speak(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        """Carry requests until a fault ends it; False where the connection is to fall silent."""
        while True:
            request = await self._message(reader, slowly=True)
            fault = self.faults.draw(self._chance)
            self.met[fault] += 1
            await asyncio.sleep(self._chance.uniform(0, self.faults.delay_s))
            if fault == "half_open":
                return False
            if fault == "reset":
                return reset(writer)
            answer = await self._exchange(request)
            if fault == "repeated":
                answer = await self._exchange(request)
            if fault == "swallowed":
                return False
            if fault == "cut":
                await self._send(writer, answer[: len(answer) // 2])
                return reset(writer)
            await self._send(writer, answer * 2 if fault == "doubled" else answer)

    async def _exchange(self, request: bytes) -> bytes:
        reader, writer = await asyncio.open_connection(*self._upstream)
        try:
            writer.write(request)
            return await self._message(reader)
        finally:
            writer.close()

    async def _message(self, reader: asyncio.StreamReader, *, slowly: bool = False) -> bytes:
        head = await reader.readuntil(b"\r\n\r\n")
        fields = dict(line.lower().split(b": ", 1) for line in head.split(b"\r\n")[1:-2])
        left, body = int(fields.get(b"content-length", 0)), b""
        while left > 0:
            part = await reader.readexactly(min(left, CHUNK_BYTES if slowly else left))
            await self._crawl(part if slowly else b"")
            body, left = body + part, left - len(part)
        return head + body

    async def _send(self, writer: asyncio.StreamWriter, content: bytes) -> None:
        for start in range(0, len(content), CHUNK_BYTES):
            part = content[start : start + CHUNK_BYTES]
            await self._crawl(part)
            writer.write(part)
            await writer.drain()

    async def _crawl(self, part: bytes) -> None:
        if self.faults.bytes_per_s is not None:
            await asyncio.sleep(len(part) / self.faults.bytes_per_s)


def reset(writer: asyncio.StreamWriter) -> bool:
    """Close with an RST instead of a FIN."""
    writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
    writer.transport.abort()
    return True
