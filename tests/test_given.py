"""What can be handed in to be written: the same, whichever way it is written."""

from __future__ import annotations

import array
import asyncio
import ctypes
import inspect
import mmap
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pickle import PickleBuffer
from typing import Any

import pytest

import uvsock
from conftest import SERVER_NAME, Recorder, Wire, soon, until
from uvsock import BufferSink, Lines
from uvsock._framing import FrameReader

# The transports and streams below are uvsock's.
LOOPS = {"uvsock": uvsock.new_event_loop}
Way = Callable[[Any, Any], Any]


class Octets(bytes):
    """A subclass of ``bytes``: not what the fast path looks for."""


class Pair(ctypes.Structure):
    _fields_ = (("a", ctypes.c_uint32), ("b", ctypes.c_uint16))


def written() -> BufferSink:
    sink = BufferSink()
    sink.write("of a sink")
    return sink


def mapped() -> mmap.mmap:
    memory = mmap.mmap(-1, 6)
    memory[:] = b"mapped"
    return memory


# What makes each of them, and the bytes that it is.
BUFFERS: dict[str, tuple[Callable[[], Any], bytes]] = {
    "bytes": (lambda: b"bytes", b"bytes"),
    "no bytes": (lambda: b"", b""),
    "subclass": (lambda: Octets(b"octets"), b"octets"),
    "bytearray": (lambda: bytearray(b"array"), b"array"),
    "empty bytearray": (bytearray, b""),
    "part": (lambda: memoryview(b"xviewx")[1:-1], b"view"),
    "one item": (lambda: memoryview(b"strided")[1:2:2], b"t"),  # without gaps
    "numbers": (lambda: array.array("I", [1, 2]), array.array("I", [1, 2]).tobytes()),
    "two dimensions": (lambda: memoryview(b"abcdef").cast("B", [2, 3]), b"abcdef"),
    "no rows": (((ctypes.c_uint16 * 3) * 0), b""),
    "rows": (
        lambda: ((ctypes.c_uint16 * 1) * 2)((1,), (2,)),
        array.array("H", [1, 2]).tobytes(),
    ),
    "structure": (lambda: Pair(1, 2), bytes(Pair(1, 2))),
    "wrapped": (lambda: PickleBuffer(b"wrapped"), b"wrapped"),
    "memory map": (mapped, b"mapped"),
    "sink": (written, b"of a sink"),
}
TEXTS: dict[str, tuple[Callable[[], Any], bytes]] = {
    "text": (lambda: "é €", "é €".encode()),
    "no text": (lambda: "", b""),
}
# A PickleBuffer, which is no memoryview, asks what it wraps, as other exporters do.
GAPS: dict[str, tuple[Callable[[], Any], bytes]] = {
    "strided": (lambda: memoryview(b"a-b-c-")[::2], b"abc"),
    "backwards": (lambda: memoryview(b"abc")[::-1], b"cba"),
    "wide items": (
        lambda: memoryview(array.array("H", [1, 2, 3]))[::2],
        array.array("H", [1, 3]).tobytes(),
    ),
    "wrapped": (lambda: PickleBuffer(memoryview(b"a-b-c-")[::2]), b"abc"),
}


def by_sink(socket: uvsock.Socket[Any], data: Any) -> None:
    sink = BufferSink()
    sink.write(data)
    sink.flush_to(socket)


SOCKETS: dict[str, Way] = {
    "write": lambda socket, data: socket.write(data),
    "write a part": lambda socket, data: socket.write(data, length=len(bytes(data))),
    "end": lambda socket, data: socket.end(data),
    "write_frame": lambda socket, data: socket.write_frame(data),
    "send_all": lambda socket, data: socket.send_all(data),
    "sink": by_sink,
}
STREAMS: dict[str, Way] = {
    "transport.write": lambda writer, data: writer.transport.write(data),
    "transport.writelines": lambda writer, data: writer.transport.writelines([data]),
    "writer.write": lambda writer, data: writer.write(data),
    "writer.writelines": lambda writer, data: writer.writelines([data]),
}
# They read bytes of a user's, and send none.
READERS: dict[str, Callable[[Any], Any]] = {
    "wrap": lambda data: Lines().wrap(data),
    "find": lambda data: Lines().find(data),
    "split": lambda data: FrameReader(Lines()).split(data),
    "feed_data": lambda data: uvsock.StreamReader().feed_data(data),
}


def each(table: dict[str, Any]) -> Any:
    return [pytest.param(value, id=name) for name, value in table.items()]


async def hand_in(way: Way, target: Any, data: Any) -> None:
    result = way(target, data)
    if inspect.isawaitable(result):
        await soon(result)


@asynccontextmanager
async def connected(wire: Wire, *, streams: bool) -> AsyncIterator[tuple[Any, bytearray]]:
    """A socket with framing, or a writer, and what its peer receives."""
    peer = Recorder()
    async with await wire.listen(peer.table()) as listener:
        if not streams:
            socket = await wire.connect(listener, {"data": print}, framing=Lines())
            yield socket, peer.received
            socket.end()
            await soon(socket.wait_closed())
            return
        if wire.kind == "unix":
            _, writer = await uvsock.open_unix_connection(listener.unix)
        else:
            options: dict[str, Any] = {}
            if wire.encrypted:
                options["ssl"] = wire.authority.client_context()
                options["server_hostname"] = SERVER_NAME
            _, writer = await uvsock.open_connection(listener.hostname, listener.port, **options)
        yield writer, peer.received
        writer.close()
        await soon(writer.wait_closed())


@pytest.mark.parametrize("way", each(SOCKETS))
async def test_a_socket_takes_text_and_every_contiguous_buffer(wire: Wire, way: Way) -> None:
    behind = b"\n" if way is SOCKETS["write_frame"] else b""
    for make, expected in (BUFFERS | TEXTS).values():
        if isinstance(make(), str) and way is SOCKETS["write a part"]:
            continue
        async with connected(wire, streams=False) as (socket, received):
            await hand_in(way, socket, make())
            socket.end()
            await until(lambda: socket.ready_state == 0)
            assert received == expected + behind


@pytest.mark.parametrize("way", each(STREAMS))
async def test_a_stream_takes_every_buffer_also_with_gaps(wire: Wire, way: Way) -> None:
    async with connected(wire, streams=True) as (writer, received):
        everything = b""
        for make, expected in (*BUFFERS.values(), *GAPS.values()):
            await hand_in(way, writer, make())
            everything += expected
        await until(lambda: len(received) >= len(everything))
        assert received == everything


@pytest.mark.parametrize("way", each(SOCKETS))
@pytest.mark.parametrize("make", each({name: make for name, (make, _) in GAPS.items()}))
async def test_a_socket_refuses_gaps(tcp_wire: Wire, way: Way, make: Callable[[], Any]) -> None:
    async with connected(tcp_wire, streams=False) as (socket, received):
        data = make()
        with pytest.raises(TypeError, match="^(data|chunk): must be a C-contiguous buffer$"):
            await hand_in(way, socket, data)
        data.release()  # what failed has let go of it
        assert socket.write(b"goes on") == 7
        await until(lambda: received == b"goes on")


@pytest.mark.parametrize("way", each(SOCKETS))
@pytest.mark.parametrize("wrong", [None, 5, ["x"]])
async def test_a_socket_refuses_all_else(tcp_wire: Wire, way: Way, wrong: Any) -> None:
    if way is SOCKETS["write a part"]:
        way = lambda socket, data: socket.write(data, 0, 0)  # noqa: E731
    given = "None" if wrong is None else type(wrong).__name__
    text = f"^(data|chunk): must be str or a bytes-like object, not {given}$"
    async with connected(tcp_wire, streams=False) as (socket, received):
        with pytest.raises(TypeError, match=text):
            await hand_in(way, socket, wrong)
        assert socket.write(b"goes on") == 7
        await until(lambda: received == b"goes on")


@pytest.mark.parametrize("way", each(STREAMS))
@pytest.mark.parametrize("wrong", ["text", None, 5])
async def test_a_stream_refuses_all_else_as_asyncio(tcp_wire: Wire, way: Way, wrong: Any) -> None:
    kind = type(wrong).__name__
    text = (
        f"^(data argument must be a bytes-like object, not '{kind}'"
        f"|sequence item 0: expected a bytes-like object, {kind} found)$"
    )
    async with connected(tcp_wire, streams=True) as (writer, received):
        with pytest.raises(TypeError, match=text):
            await hand_in(way, writer, wrong)
        writer.write(b"goes on")
        await until(lambda: received == b"goes on")


@pytest.mark.parametrize("way", each(SOCKETS | STREAMS))
@pytest.mark.parametrize(
    "make", each({"memoryview": lambda: memoryview(b"x"), "other": lambda: PickleBuffer(b"x")})
)
async def test_a_released_view_is_called_that(
    tcp_wire: Wire, way: Way, make: Callable[[], Any]
) -> None:
    data = make()
    data.release()
    if way is SOCKETS["write a part"]:
        way = lambda socket, data: socket.write(data, 0, 0)  # noqa: E731
    async with connected(tcp_wire, streams=way in STREAMS.values()) as (target, received):
        with pytest.raises(ValueError, match="released"):
            await hand_in(way, target, data)
        target.write(b"goes on")
        await until(lambda: received == b"goes on")


@pytest.mark.parametrize("way", each(SOCKETS | STREAMS))
async def test_a_buffer_is_let_go_of_when_the_write_is_over(wire: Wire, way: Way) -> None:
    async with connected(wire, streams=way in STREAMS.values()) as (target, received):
        data = bytearray(b"before")
        await hand_in(way, target, data)
        data[:] = b"another"  # BufferError if somebody looks at it still
        await until(lambda: received.rstrip() == b"before")


@pytest.mark.parametrize("read", each(READERS))
async def test_who_reads_bytes_takes_every_contiguous_buffer(read: Callable[[Any], Any]) -> None:
    expected = read(b"abcdef")
    for make in (
        lambda: bytearray(b"abcdef"),
        lambda: memoryview(b"abcdef").cast("B", [2, 3]),
        lambda: PickleBuffer(b"abcdef"),
    ):
        assert read(make()) == expected


@pytest.mark.parametrize("read", each(READERS))
@pytest.mark.parametrize("wrong", ["text", None, 5])
async def test_who_reads_bytes_refuses_all_else(read: Callable[[Any], Any], wrong: Any) -> None:
    given = "None" if wrong is None else type(wrong).__name__
    with pytest.raises(TypeError, match=f"^data: must be a bytes-like object, not {given}$"):
        read(wrong)


@pytest.mark.parametrize("read", each(READERS))
@pytest.mark.parametrize("make", each({name: make for name, (make, _) in GAPS.items()}))
async def test_who_reads_bytes_refuses_gaps(
    read: Callable[[Any], Any], make: Callable[[], Any]
) -> None:
    data = make()
    with pytest.raises(TypeError, match="^data: must be a C-contiguous buffer$"):
        read(data)
    data.release()


async def test_send_all_holds_a_buffer_until_it_is_sent(wire: Wire) -> None:
    async with connected(wire, streams=False) as (socket, received):
        data = bytearray(8 << 20)
        sending = asyncio.create_task(socket.send_all(data))
        await asyncio.sleep(0)
        assert not sending.done()
        with pytest.raises(BufferError):
            data.append(0)
        await soon(sending)
        data.append(0)
        await until(lambda: len(received) == 8 << 20)


async def test_send_all_lets_go_of_a_buffer_when_it_is_cancelled(wire: Wire) -> None:
    async with connected(wire, streams=False) as (socket, _):
        data = bytearray(8 << 20)
        # The second waits for its turn.
        both = [asyncio.create_task(socket.send_all(data)) for _ in range(2)]
        await asyncio.sleep(0)
        for sending in both:
            sending.cancel()
        await asyncio.wait(both)
        assert all(sending.cancelled() for sending in both)
        data.append(0)


async def test_send_all_lets_go_of_a_buffer_when_it_is_dropped(wire: Wire) -> None:
    async with connected(wire, streams=False) as (socket, _):
        data = bytearray(8 << 20)
        sending = socket.send_all(data)
        sending.send(None)
        with pytest.raises(BufferError):
            data.append(0)
        del sending
        data.append(0)
