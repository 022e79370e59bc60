"""asyncio's interface on several loops: ``BEHAVIOUR --loop LOOP --style STYLE [--tls FILE]``."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import ssl
from collections.abc import Callable, Coroutine
from typing import Any, ClassVar, cast

from benchmarks.servers import control

CHUNK = control.CHUNK


class Echo(asyncio.Protocol):
    __slots__ = ("transport",)
    transport: asyncio.Transport

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)

    def data_received(self, data: bytes) -> None:
        self.transport.write(data)

    # Nothing is read while the peer does not take its answers, as everywhere here.

    def pause_writing(self) -> None:
        self.transport.pause_reading()

    def resume_writing(self) -> None:
        self.transport.resume_reading()


class SmallWrites(Echo):
    __slots__ = ()

    def data_received(self, data: bytes) -> None:
        write = self.transport.write
        write(b"a")
        write(b"b")
        write(b"c")
        write(b"d")
        write(b"e")


class FanOut(Echo):
    """A transport keeps what its peer does not take."""

    __slots__ = ()
    transports: ClassVar[set[asyncio.Transport]] = set()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        self.transports.add(self.transport)

    def data_received(self, data: bytes) -> None:
        for transport in self.transports:
            transport.write(data)

    def connection_lost(self, error: Exception | None) -> None:
        self.transports.discard(self.transport)


class Send(Echo):
    __slots__ = ("left", "paused")

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        self.left = 0
        self.paused = False

    def data_received(self, data: bytes) -> None:
        self.left = int.from_bytes(data[:8], "little")
        self.pour()

    def pour(self) -> None:
        while self.left and not self.paused:
            size = min(self.left, 65536)
            self.left -= size
            self.transport.write(CHUNK if size == 65536 else CHUNK[:size])

    def pause_writing(self) -> None:
        self.paused = True

    def resume_writing(self) -> None:
        self.paused = False
        self.pour()


class Receive(Echo):
    __slots__ = ("left",)

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        self.left = 0

    def data_received(self, data: bytes) -> None:
        if not self.left:
            self.left = int.from_bytes(data[:8], "little") + 8
        self.left -= len(data)
        if not self.left:
            self.transport.write(b".")


class Framed(Echo):
    """Finds the messages in what arrives, and sends each back by itself."""

    __slots__ = ("rest",)

    def __init__(self) -> None:
        self.rest = b""


class LineByLine(Framed):
    __slots__ = ()

    def data_received(self, data: bytes) -> None:
        *lines, self.rest = (self.rest + data).split(b"\n")
        for line in lines:
            self.transport.write(line + b"\n")


class LinesJoined(Framed):
    """The same with one write for all that has arrived."""

    __slots__ = ()

    def data_received(self, data: bytes) -> None:
        *lines, self.rest = (self.rest + data).split(b"\n")
        self.transport.write(b"".join([line + b"\n" for line in lines]))


def frames(data: bytes) -> tuple[list[bytes], bytes]:
    """The messages behind a length of four bytes each, and what is left."""
    found, start, size = [], 0, len(data)
    while size - start >= 4:
        end = start + 4 + int.from_bytes(data[start : start + 4], "big")
        if end > size:
            break
        found.append(data[start + 4 : end])
        start = end
    return found, data[start:]


class FrameByFrame(Framed):
    __slots__ = ()

    def data_received(self, data: bytes) -> None:
        found, self.rest = frames(self.rest + data)
        for frame in found:
            self.transport.write(len(frame).to_bytes(4, "big") + frame)


class FramesJoined(Framed):
    __slots__ = ()

    def data_received(self, data: bytes) -> None:
        found, self.rest = frames(self.rest + data)
        self.transport.write(b"".join([len(f).to_bytes(4, "big") + f for f in found]))


class Redis(Echo):
    """The example's requests and commands, with a write per reply."""

    __slots__ = ("requests",)
    example: ClassVar[Any]

    def __init__(self) -> None:
        self.requests = self.example.Requests()

    def data_received(self, data: bytes) -> None:
        self.requests.feed(data)
        while (request := self.requests.next()) is not None:
            self.transport.write(self.reply(request))

    @classmethod
    def reply(cls, request: list[bytes]) -> bytes:
        try:
            encoded: bytes = cls.example.encode(cls.example.answer(request), 2)
        except cls.example.CommandError as failure:
            encoded = cls.example.error(str(failure))
        return encoded


class RedisJoined(Redis):
    __slots__ = ()

    def data_received(self, data: bytes) -> None:
        self.requests.feed(data)
        replies = []
        while (request := self.requests.next()) is not None:
            replies.append(self.reply(request))
        self.transport.write(b"".join(replies))


class Buffer:
    """One for all connections, as long as the transport has sent what is in it.

    A transport may keep a view of what it did not send; then it keeps that buffer for itself.
    """

    view = memoryview(bytearray(262144))


class Buffered(asyncio.BufferedProtocol):
    __slots__ = ("transport",)
    transport: asyncio.Transport

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)

    def get_buffer(self, sizehint: int) -> memoryview:
        return Buffer.view

    def pause_writing(self) -> None:
        self.transport.pause_reading()

    def resume_writing(self) -> None:
        self.transport.resume_reading()


class BufferedEcho(Buffered):
    __slots__ = ()

    def buffer_updated(self, size: int) -> None:
        self.transport.write(Buffer.view[:size])
        if self.transport.get_write_buffer_size():
            Buffer.view = memoryview(bytearray(262144))


class BufferedReceive(Buffered):
    __slots__ = ("left",)

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        self.left = 0

    def buffer_updated(self, size: int) -> None:
        if not self.left:
            self.left = int.from_bytes(Buffer.view[:8], "little") + 8
        self.left -= size
        if not self.left:
            self.transport.write(b".")


Reader = asyncio.StreamReader
Writer = asyncio.StreamWriter
Behaviour = Callable[[Reader, Writer], Coroutine[Any, Any, None]]


async def echo(reader: Reader, writer: Writer) -> None:
    while data := await reader.read(65536):
        writer.write(data)
        await writer.drain()


async def small_writes(reader: Reader, writer: Writer) -> None:
    while await reader.read(65536):
        writer.write(b"a")
        writer.write(b"b")
        writer.write(b"c")
        writer.write(b"d")
        writer.write(b"e")
        await writer.drain()


async def lines(reader: Reader, writer: Writer) -> None:
    while line := await reader.readline():
        writer.write(line)
        await writer.drain()


async def length_prefixed(reader: Reader, writer: Writer) -> None:
    with contextlib.suppress(asyncio.IncompleteReadError):  # the peer has closed
        while True:
            prefix = await reader.readexactly(4)
            message = await reader.readexactly(int.from_bytes(prefix, "big"))
            writer.write(prefix + message)
            await writer.drain()


async def redis(reader: Reader, writer: Writer) -> None:
    requests = Redis.example.Requests()
    while data := await reader.read(65536):
        requests.feed(data)
        while (request := requests.next()) is not None:
            writer.write(Redis.reply(request))
            await writer.drain()


writers: set[Writer] = set()


async def fan_out(reader: Reader, writer: Writer) -> None:
    writers.add(writer)
    try:
        while data := await reader.read(65536):
            for each in writers:
                each.write(data)
    finally:
        writers.discard(writer)


async def send(reader: Reader, writer: Writer) -> None:
    while request := await reader.read(65536):
        left = int.from_bytes(request[:8], "little")
        while left:
            size = min(left, 65536)
            left -= size
            writer.write(CHUNK if size == 65536 else CHUNK[:size])
            await writer.drain()


async def receive(reader: Reader, writer: Writer) -> None:
    left = 0
    while data := await reader.read(65536):
        if not left:
            left = int.from_bytes(data[:8], "little") + 8
        left -= len(data)
        if not left:
            writer.write(b".")


def serving(behaviour: Behaviour) -> Behaviour:
    """Closes the connection behind the behaviour, also when its peer has broken it."""

    async def served(reader: Reader, writer: Writer) -> None:
        try:
            await behaviour(reader, writer)
        except ConnectionError:
            pass
        finally:
            writer.close()

    return served


PROTOCOLS = {
    "echo": Echo,
    "small_writes": SmallWrites,
    "fan_out": FanOut,
    "send": Send,
    "receive": Receive,
    "lines": LineByLine,
    "length_prefixed": FrameByFrame,
    "redis": Redis,
}
JOINED = {"lines": LinesJoined, "length_prefixed": FramesJoined, "redis": RedisJoined}
BUFFERED = {"echo": BufferedEcho, "receive": BufferedReceive}
STREAMS = {
    "echo": echo,
    "small_writes": small_writes,
    "fan_out": fan_out,
    "send": send,
    "receive": receive,
    "lines": lines,
    "length_prefixed": length_prefixed,
    "redis": redis,
}


LOOPS = ["asyncio", "uvloop", "aiofastnet", "uvsock"]


async def main(arguments: argparse.Namespace) -> None:
    loop = asyncio.get_running_loop()
    tls: ssl.SSLContext | None = control.context(arguments.tls)
    where: dict[str, Any] = {"host": "127.0.0.1", "port": 0, "backlog": 1024, "ssl": tls}
    server: Any
    if arguments.behaviour == "redis":
        Redis.example = control.example("redis_server")
    if arguments.style in {"streams", "asyncio-streams"}:
        start: Callable[..., Any] = asyncio.start_server
        if arguments.loop == "uvsock" and arguments.style == "streams":
            import uvsock

            start = uvsock.start_server
        server = await start(serving(STREAMS[arguments.behaviour]), **where)
    else:
        styles: dict[str, dict[str, Any]] = {
            "protocol": PROTOCOLS,
            "joined": JOINED,
            "buffered": BUFFERED,
        }
        factory: Callable[[], Any] = styles[arguments.style][arguments.behaviour]
        if arguments.loop == "aiofastnet":
            import aiofastnet

            server = await aiofastnet.create_server(loop, factory, **where)
        else:
            server = await loop.create_server(factory, **where)
    await control.serve(server.sockets[0].getsockname()[1])


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("behaviour", choices=PROTOCOLS)
    parser.add_argument("--loop", choices=LOOPS, required=True)
    # On uvsock's loop streams are uvsock's, asyncio-streams those of the standard library.
    styles = ["protocol", "joined", "buffered", "streams", "asyncio-streams"]
    parser.add_argument("--style", choices=styles, required=True)
    parser.add_argument("--tls")
    given = parser.parse_args()
    if given.loop == "asyncio":
        asyncio.run(main(given))
    elif given.loop == "uvsock":
        import uvsock

        with asyncio.Runner(loop_factory=uvsock.new_event_loop) as runner:
            runner.run(main(given))
    else:
        import uvloop

        uvloop.run(main(given))
