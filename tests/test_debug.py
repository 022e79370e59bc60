"""asyncio's debug mode: whoever holds up the loop is named."""

from __future__ import annotations

import asyncio
import functools
import logging
from collections.abc import Callable
from typing import Any

import pytest
import uvloop

import uvsock
from conftest import Wire
from helpers import ignore, soon, until

LOOPS = {"uvsock": uvsock.new_event_loop, "uvloop": uvloop.new_event_loop}
uvsock_only = pytest.mark.asyncio(loop_factories=["uvsock"])


class Slow(logging.Handler):
    """The warnings of slow callbacks. All callbacks are slow here: no time is short enough."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []
        self.loop = asyncio.get_running_loop()
        self.loop.slow_callback_duration = 0

    def emit(self, record: logging.LogRecord) -> None:
        line = record.getMessage()
        if line.startswith("Executing") and "Timer" not in line:
            self.lines.append(line)

    def of(self, name: str) -> list[str]:
        return [line for line in self.lines if name in line]


@pytest.fixture
async def slow(monkeypatch: pytest.MonkeyPatch) -> Slow:
    slow = Slow()
    logger = logging.getLogger("asyncio")
    monkeypatch.setattr(logger, "handlers", [slow])
    monkeypatch.setattr(logger, "propagate", False)
    return slow


@pytest.fixture
async def debugging(slow: Slow) -> Slow:
    slow.loop.set_debug(True)
    return slow


def handler(name: str, does: Callable[[uvsock.Socket[Any]], object] = ignore) -> Callable[..., Any]:
    def call(socket: uvsock.Socket[Any], *arguments: Any) -> None:
        does(socket)

    call.__qualname__ = f"handler_of_{name}"
    return call


async def test_slow_handlers_are_named(wire: Wire, debugging: Slow) -> None:
    def fill(socket: uvsock.Socket[Any]) -> None:
        socket.timeout(0.005)
        while socket.write(bytes(100_000)) == 100_000:
            pass

    def fail(socket: uvsock.Socket[Any]) -> None:
        raise ZeroDivisionError

    does = {"open": fill, "data": fail}
    names = ["open", "data", "drain", "error", "end", "timeout", "close"]
    if wire.encrypted:
        names.append("handshake")
    listener = await wire.listen({name: handler(name, does.get(name, ignore)) for name in names})
    client = await wire.connect(listener, {"data": ignore})
    client.write(b"x")
    await until(lambda: debugging.of("handler_of_timeout") and debugging.of("handler_of_drain"))
    client.end()
    await soon(client.wait_closed())
    await until(lambda: debugging.of("handler_of_close"))
    for name in names:
        (line,) = debugging.of(f"handler_of_{name}")
        assert f"{__file__}:" in line
        assert "uvsock.Socket" in line
    listener.stop()
    await soon(listener.wait_closed())


async def test_a_slow_async_handler_is_named_as_its_task(wire: Wire, debugging: Slow) -> None:
    done: list[bytes] = []

    async def waiting_handler(socket: uvsock.Socket[Any], data: bytes) -> None:
        await asyncio.sleep(0)
        done.append(data)

    @functools.wraps(waiting_handler)
    def decorated(*arguments: Any) -> Any:
        return waiting_handler(*arguments)

    listener = await wire.listen({"data": decorated})
    client = await wire.connect(listener, {"data": ignore})
    client.write(b"x")
    await until(lambda: done)
    await until(lambda: any("<Task" in line for line in debugging.of("waiting_handler")))
    client.end()
    listener.stop()
    await soon(listener.wait_closed())


async def test_what_is_fast_enough_is_not_named(wire: Wire, debugging: Slow) -> None:
    debugging.loop.slow_callback_duration = 3600
    listener = await wire.listen({"data": handler("data"), "close": handler("close")})
    client = await wire.connect(listener, {"data": ignore})
    client.end(b"x")
    await soon(client.wait_closed())
    await until(lambda: not listener.connections)
    assert debugging.of("handler_of") == []
    listener.stop()
    await soon(listener.wait_closed())


async def test_nothing_is_named_without_debug_mode(wire: Wire, slow: Slow) -> None:
    listener = await wire.listen({"data": handler("data"), "close": handler("close")})
    client = await wire.connect(listener, {"data": ignore})
    client.end(b"x")
    await soon(client.wait_closed())
    await until(lambda: not listener.connections)
    assert slow.of("") == []
    listener.stop()
    await soon(listener.wait_closed())


async def test_debug_mode_counts_from_the_next_connection_on(wire: Wire, slow: Slow) -> None:
    listener = await wire.listen({"data": handler("data")})
    for debug in (True, False):
        slow.loop.set_debug(debug)
        slow.lines.clear()
        client = await wire.connect(listener, {"data": ignore})
        client.end(b"x")
        await soon(client.wait_closed())
        assert len(slow.of("handler_of_data")) == debug
    listener.stop()
    await soon(listener.wait_closed())


@uvsock_only
async def test_debug_mode_counts_at_once(wire: Wire, slow: Slow) -> None:
    """On uvsock's loop, for connections that are open."""
    listener = await wire.listen({"data": handler("data")})
    client = await wire.connect(listener, {"data": ignore})
    await until(lambda: listener.connections)
    for debug in (True, False, True):
        slow.loop.set_debug(debug)
        slow.lines.clear()
        read = listener.stats.bytes_read
        client.write(b"x")
        await until(lambda read=read: listener.stats.bytes_read > read)  # type: ignore[misc]
        assert len(slow.of("handler_of_data")) == debug
    client.end()
    await soon(client.wait_closed())
    listener.stop()
    await soon(listener.wait_closed())


class Named(asyncio.Protocol):
    """A protocol whose calls are counted."""

    lost: asyncio.Future[None]

    def connection_made(self, transport: Any) -> None:
        self.transport = transport
        self.lost = asyncio.get_running_loop().create_future()
        transport.set_write_buffer_limits(high=1000)

    def data_received(self, data: bytes) -> None:
        while not hasattr(self, "paused"):
            self.transport.write(bytes(100_000))

    def pause_writing(self) -> None:
        self.paused = True

    def resume_writing(self) -> None:
        self.transport.close()

    def eof_received(self) -> bool:
        return True

    def connection_lost(self, error: BaseException | None) -> None:
        self.lost.set_result(None)


class NamedBuffered(Named, asyncio.BufferedProtocol):
    """The same with a buffer of its own."""

    buffer = bytearray(100)

    def get_buffer(self, sizehint: int) -> bytearray:
        return self.buffer

    def buffer_updated(self, nbytes: int) -> None:
        self.data_received(self.buffer[:nbytes])


CALLS = ("connection_made", "pause_writing", "resume_writing", "eof_received", "connection_lost")


@uvsock_only
@pytest.mark.parametrize(
    ("kind", "calls"),
    [
        (Named, (*CALLS, "data_received")),
        (NamedBuffered, (*CALLS, "get_buffer", "buffer_updated")),
    ],
)
async def test_slow_calls_of_a_protocol_are_named(
    tcp_wire: Wire, debugging: Slow, kind: type[Any], calls: tuple[str, ...]
) -> None:
    made: list[Any] = []

    def slow_factory() -> Any:
        made.append(kind())
        return made[0]

    server = await debugging.loop.create_server(slow_factory, "127.0.0.1", 0)
    reader, writer = await uvsock.open_connection(*server.sockets[0].getsockname())
    writer.write(b"x")
    writer.write_eof()
    await soon(reader.read())
    writer.close()
    await soon(writer.wait_closed())
    await soon(made[0].lost)
    server.close()
    await soon(server.wait_closed())
    for call in calls:
        lines = debugging.of(f"Named.{call} at") + debugging.of(f"NamedBuffered.{call} at")
        assert lines, call
        assert all("uvsock.Transport" in line for line in lines)
    assert len(debugging.of("slow_factory at")) == 1


async def test_a_slow_task_of_a_stream_is_named(debugging: Slow) -> None:
    async def serving(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        async for line in reader:
            writer.write(line)
        writer.close()

    server = await uvsock.start_server(serving, "127.0.0.1", 0)
    reader, writer = await uvsock.open_connection(*server.sockets[0].getsockname())
    for _ in range(3):
        debugging.lines.clear()
        writer.write(b"line\n")
        assert await soon(reader.readline()) == b"line\n"
        await until(lambda: any("<Task" in line for line in debugging.of("serving()")))
        assert not debugging.of("_run_all")
    writer.close()
    await soon(writer.wait_closed())
    server.close()
    await soon(server.wait_closed())
