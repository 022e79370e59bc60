"""uvsock's streams: asyncio's own as the model, and what they do over real sockets."""

from __future__ import annotations

import asyncio
import contextvars
import gc
import socket
import ssl
import sys
import threading
import time
import tracemalloc
import weakref
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from contextlib import asynccontextmanager, suppress
from typing import Any

import pytest
import uvloop
from hypothesis import given, settings
from hypothesis import strategies as st

import uvsock
from conftest import SERVER_NAME, Authority, Wire
from helpers import soon, until
from test_tls import ByHand
from uvsock import Delimited, FixedSize, FrameError, Framer, LengthPrefixed, Lines, Netstring
from uvsock.dropin._streams import StreamProtocol

# Each test of a coroutine runs on all of these.
LOOPS = {
    "uvsock": uvsock.new_event_loop,
    "uvloop": uvloop.new_event_loop,
    "asyncio": asyncio.new_event_loop,
}
KIB = 1024
MIB = 1024 * KIB

Served = Callable[[uvsock.StreamReader, uvsock.StreamWriter], Coroutine[Any, Any, None]]


class Streams:
    """A server and its clients on one wire, both with uvsock's streams."""

    def __init__(self, wire: Wire) -> None:
        self.wire = wire
        self.where: Any = None

    @asynccontextmanager
    async def serving(self, served: Any, **options: Any) -> AsyncIterator[None]:
        """Ends when the tasks of all connections have."""
        before = asyncio.all_tasks()
        if self.wire.kind == "unix":
            self.where = str(self.wire.directory / "streams")
            server = await uvsock.start_unix_server(served, self.where, **options)
        else:
            if self.wire.encrypted:
                options["ssl"] = self.wire.authority.server_context()
            server = await uvsock.start_server(served, "127.0.0.1", 0, **options)
            self.where = server.sockets[0].getsockname()[:2]
        try:
            yield
        finally:
            server.close()
            await until(lambda: asyncio.all_tasks() <= before)

    async def connect(self, **options: Any) -> tuple[uvsock.StreamReader, uvsock.StreamWriter]:
        if self.wire.kind == "unix":
            return await uvsock.open_unix_connection(self.where, **options)
        if self.wire.encrypted:
            options["ssl"] = self.wire.authority.client_context()
            options["server_hostname"] = SERVER_NAME
        return await uvsock.open_connection(*self.where, **options)


@pytest.fixture
def streams(wire: Wire) -> Streams:
    return Streams(wire)


@pytest.fixture
def tcp(tcp_wire: Wire) -> Streams:
    return Streams(tcp_wire)


async def closed(writer: asyncio.StreamWriter) -> None:
    writer.close()
    with suppress(ConnectionError):
        await soon(writer.wait_closed())


async def echo_lines(reader: uvsock.StreamReader, writer: uvsock.StreamWriter) -> None:
    async for line in reader:
        writer.write(line)
        await writer.drain()
    await closed(writer)


class Transport(asyncio.Transport):
    """One that a test looks at."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[str] = []

    def pause_reading(self) -> None:
        self.calls.append("pause")

    def resume_reading(self) -> None:
        self.calls.append("resume")

    def is_closing(self) -> bool:
        return "close" in self.calls

    def close(self) -> None:
        self.calls.append("close")

    def write(self, data: Any) -> None:
        self.calls.append("write")


# --- over real sockets ------------------------------------------------------------------------


async def test_lines_go_both_ways(streams: Streams) -> None:
    async with streams.serving(echo_lines):
        reader, writer = await soon(streams.connect())
        for line in (b"one\n", b"\n", b"x" * 60_000 + b"\n"):
            writer.write(line)
            await writer.drain()
            assert await soon(reader.readline()) == line
        assert not reader.at_eof()
        await closed(writer)
        assert reader.at_eof()
        assert await reader.read() == b""


async def test_many_lines_at_once(streams: Streams) -> None:
    lines = [b"%d\n" % number for number in range(20_000)]

    async with streams.serving(echo_lines):
        reader, writer = await soon(streams.connect())

        async def send() -> None:
            for line in lines:
                writer.write(line)
                await writer.drain()

        sending = asyncio.create_task(send())
        assert [await soon(reader.readline()) for _ in lines] == lines
        await sending
        await closed(writer)


async def test_small_and_large_reads_by_turns(streams: Streams) -> None:
    """Where the bytes of a read go to changes with the first large one."""
    sizes = [10, 5 * MIB, 1, 300_000, 70_000, 3, 2 * MIB, 65_536, 1]

    async def echo_sized(reader: uvsock.StreamReader, writer: uvsock.StreamWriter) -> None:
        for size in sizes:
            writer.write(await reader.readexactly(size))
            await writer.drain()
        writer.close()

    async with streams.serving(echo_sized):
        reader, writer = await soon(streams.connect())
        for number, size in enumerate(sizes):
            message = bytes([number]) * size
            writer.write(message)
            assert await soon(reader.readexactly(size)) == message
        assert await soon(reader.read()) == b""
        await closed(writer)


async def test_whoever_waits_for_a_read_is_told_its_result() -> None:
    """A task is woken in a shorter way than what else waits."""
    loop = asyncio.get_running_loop()
    reader = uvsock.StreamReader(loop=loop)
    told: list[Any] = []
    reading = reader.readline()
    waiter: Any = reading.send(None)
    waiter.add_done_callback(told.append, context=contextvars.copy_context())
    reader.feed_data(b"line\n")
    await until(lambda: told)
    assert told == [waiter]
    assert waiter.result() is None
    with pytest.raises(StopIteration) as stopped:
        reading.send(None)
    assert stopped.value.value == b"line\n"


async def test_every_way_to_read(streams: Streams) -> None:
    async def served(reader: uvsock.StreamReader, writer: uvsock.StreamWriter) -> None:
        writer.writelines([b"line\n", bytearray(b"until--"), memoryview(b"exactly"), b"a;b,"])
        await writer.drain()
        assert await reader.read(10) == b"go"
        writer.write(b"rest " * 50_000)
        await closed(writer)

    async with streams.serving(served):
        reader, writer = await soon(streams.connect())
        assert await soon(reader.readline()) == b"line\n"
        assert await soon(reader.readuntil(b"--")) == b"until--"
        assert await soon(reader.readexactly(7)) == b"exactly"
        assert await soon(reader.readuntil((b",", b";"))) == b"a;"
        assert await soon(reader.readuntil((b",", b";"))) == b"b,"
        writer.write(b"go")
        assert await soon(reader.read()) == b"rest " * 50_000
        await closed(writer)


async def test_the_end_in_the_middle_of_a_message(streams: Streams) -> None:
    async def served(reader: uvsock.StreamReader, writer: uvsock.StreamWriter) -> None:
        writer.write(b"unfinished")
        await closed(writer)

    async with streams.serving(served):
        reads: list[tuple[Callable[[uvsock.StreamReader], Awaitable[bytes]], int | None]] = [
            (lambda reader: reader.readuntil(b"\n"), None),
            (lambda reader: reader.readexactly(11), 11),
        ]
        for read, expected in reads:
            reader, writer = await soon(streams.connect())
            with pytest.raises(asyncio.IncompleteReadError) as caught:
                await soon(read(reader))
            assert (caught.value.partial, caught.value.expected) == (b"unfinished", expected)
            await closed(writer)
        reader, writer = await soon(streams.connect())
        assert await soon(reader.readline()) == b"unfinished"
        assert await soon(reader.readline()) == b""
        await closed(writer)


async def test_a_half_closed_stream_still_answers(streams: Streams) -> None:
    answered = asyncio.Event()

    async def served(reader: uvsock.StreamReader, writer: uvsock.StreamWriter) -> None:
        received = await reader.read()
        await asyncio.sleep(0.01)
        writer.write(received)
        if writer.can_write_eof():
            writer.write_eof()  # the client sees it although this side is not closed
            await soon(answered.wait())
        await closed(writer)

    async with streams.serving(served):
        reader, writer = await soon(streams.connect())
        if not isinstance(asyncio.get_running_loop(), uvsock.Loop) and streams.wire.encrypted:
            assert not writer.can_write_eof()
            return await closed(writer)
        writer.write(b"all of it")
        writer.write_eof()
        assert await soon(reader.read()) == b"all of it"
        answered.set()
        await closed(writer)


async def test_a_line_over_the_limit(streams: Streams) -> None:
    async def served(reader: uvsock.StreamReader, writer: uvsock.StreamWriter) -> None:
        writer.write(b"x" * 2000 + b"\n" + b"short\n")
        await closed(writer)

    async with streams.serving(served):
        reader, writer = await soon(streams.connect(limit=1000))
        with pytest.raises(asyncio.LimitOverrunError) as caught:
            await soon(reader.readuntil())
        assert str(caught.value) == "Separator is found, but chunk is longer than limit"
        assert caught.value.consumed == 2000
        with pytest.raises(ValueError, match="Separator is found, but chunk is longer than limit"):
            await soon(reader.readline())
        assert await soon(reader.readline()) == b"short\n"
        await closed(writer)


async def test_small_writes_leave_together(tcp: Streams) -> None:
    async def served(reader: uvsock.StreamReader, writer: uvsock.StreamWriter) -> None:
        for _ in range(100):
            writer.write(b"abc")
            await writer.drain()
        assert await reader.read(1) == b"!"
        await closed(writer)

    if not isinstance(asyncio.get_running_loop(), uvsock.Loop):
        pytest.skip("it is the transport that collects them")
    async with tcp.serving(served):
        reader, writer = await soon(tcp.connect())
        assert await soon(reader.read(1000)) == b"abc" * 100
        writer.write(b"!")
        await reader.read()
        await closed(writer)


async def test_a_peer_that_does_not_read_makes_drain_wait(tcp: Streams) -> None:
    chunk = bytes(64 * KIB)
    written = 0

    async def served(reader: uvsock.StreamReader, writer: uvsock.StreamWriter) -> None:
        nonlocal written
        for _ in range(512):
            writer.write(chunk)
            await writer.drain()
            written += len(chunk)
        await closed(writer)

    async with tcp.serving(served):
        # What the kernel holds on both sides is bounded, else the test would measure that.
        with socket.socket() as peer:
            peer.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 64 * KIB)
            peer.setblocking(False)
            await asyncio.get_running_loop().sock_connect(peer, tcp.where)
            await until(lambda: written)
            before = -1
            while before != written:
                before = written
                await asyncio.sleep(0.1)
            assert 0 < written < 512 * len(chunk)
            received = 0
            while data := await soon(asyncio.get_running_loop().sock_recv(peer, MIB)):
                received += len(data)
            assert received == 512 * len(chunk)


@pytest.mark.asyncio(loop_factories=["uvsock"])
async def test_a_reader_that_does_not_read_holds_little(tcp: Streams) -> None:
    size = 32 * MIB
    readers: list[uvsock.StreamReader] = []
    go_on = asyncio.Event()
    total = 0

    async def served(reader: uvsock.StreamReader, writer: uvsock.StreamWriter) -> None:
        nonlocal total
        readers.append(reader)
        await go_on.wait()
        while data := await reader.read(MIB):
            total += len(data)
        await closed(writer)

    def flood() -> None:
        with socket.create_connection(tcp.where, 10) as peer:
            peer.sendall(bytes(size))

    async with tcp.serving(served, limit=16 * KIB):
        thread = threading.Thread(target=flood)
        thread.start()
        await until(lambda: readers and readers[0]._paused)
        held = len(readers[0]._buffer)
        # One read of a transport may come on top of twice the limit: uvloop's has 256 KiB.
        assert 32 * KIB < held <= 32 * KIB + 256 * KIB
        await asyncio.sleep(0.05)
        assert len(readers[0]._buffer) == held
        go_on.set()
        await until(lambda: total == size)
        thread.join()


async def test_start_tls_on_a_writer(tcp: Streams, authority: Authority) -> None:
    async def served(reader: uvsock.StreamReader, writer: uvsock.StreamWriter) -> None:
        assert await reader.readline() == b"STARTTLS\n"
        writer.write(b"go\n")
        await writer.drain()
        await writer.start_tls(authority.server_context())
        assert await reader.readline() == b"secret\n"
        assert isinstance(writer.get_extra_info("ssl_object"), ssl.SSLObject)
        writer.write(b"x" * 300_000 + b"\n")
        await writer.drain()
        assert await reader.readline() == b"bye\n"
        await closed(writer)

    async with tcp.serving(served):
        reader, writer = await soon(tcp.connect(limit=400_000))
        assert writer.get_extra_info("sslcontext") is None
        writer.write(b"STARTTLS\n")
        assert await soon(reader.readline()) == b"go\n"
        await soon(writer.start_tls(authority.client_context(), server_hostname=SERVER_NAME))
        assert writer.get_extra_info("sslcontext") is not None
        writer.write(b"secret\n")
        assert await soon(reader.readline()) == b"x" * 300_000 + b"\n"
        writer.write(b"bye\n")
        assert await soon(reader.read()) == b""
        await closed(writer)


async def test_a_reset_ends_the_read_and_the_drain(tcp: Streams) -> None:
    raised: list[BaseException] = []
    reading = asyncio.Event()

    async def served(reader: uvsock.StreamReader, writer: uvsock.StreamWriter) -> None:
        reading.set()
        try:
            await reader.readline()
        except ConnectionError as error:
            raised.append(error)
        for attempt in (writer.drain, reader.readline, writer.wait_closed):
            try:
                await attempt()
            except ConnectionError as error:
                raised.append(error)
        writer.close()

    async with tcp.serving(served):
        with socket.create_connection(tcp.where, 5) as peer:
            await soon(reading.wait())
            peer.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        await until(lambda: len(raised) == 4)
    assert {type(error) for error in raised} == {ConnectionResetError}


async def test_a_task_that_only_writes_sees_the_reset(tcp: Streams) -> None:
    async def served(reader: uvsock.StreamReader, writer: uvsock.StreamWriter) -> None:
        writer.close()

    async def write(writer: uvsock.StreamWriter) -> None:
        while True:
            writer.write(b"nobody reads this\n")
            await writer.drain()

    async with tcp.serving(served):
        _, writer = await soon(tcp.connect())
        with pytest.raises(ConnectionError):
            await soon(write(writer))
        await closed(writer)


async def test_drain_of_a_closed_writer(tcp: Streams) -> None:
    async with tcp.serving(echo_lines):
        _, writer = await soon(tcp.connect())
        await closed(writer)
        assert writer.is_closing()
        with pytest.raises(ConnectionResetError, match="Connection lost"):
            await writer.drain()


async def test_nothing_is_left_of_a_stream(streams: Streams) -> None:
    left: list[weakref.ref[Any]] = []

    async def served(reader: uvsock.StreamReader, writer: uvsock.StreamWriter) -> None:
        left.extend((weakref.ref(reader), weakref.ref(writer), weakref.ref(writer._protocol)))
        await reader.readline()
        await closed(writer)

    async with streams.serving(served):
        reader, writer = await soon(streams.connect())
        left.extend((weakref.ref(reader), weakref.ref(writer), weakref.ref(writer._protocol)))
        writer.write(b"x\n")
        assert await soon(reader.read()) == b""
        await closed(writer)
        del reader, writer
        await until(lambda: (gc.collect(), [ref for ref in left if ref() is not None])[1] == [])
    assert len(left) == 6


async def test_a_writer_that_was_forgotten_is_closed(tcp: Streams) -> None:
    ended = asyncio.Event()

    async def served(reader: uvsock.StreamReader, writer: uvsock.StreamWriter) -> None:
        assert await reader.read() == b""
        ended.set()
        await closed(writer)

    async with tcp.serving(served):
        forgotten = [await soon(tcp.connect())]
        with pytest.warns(ResourceWarning, match="unclosed <StreamWriter"):
            forgotten.clear()
        await soon(ended.wait())


# --- the server's callback --------------------------------------------------------------------


async def test_a_plain_function_is_called_too(tcp: Streams) -> None:
    def served(reader: uvsock.StreamReader, writer: uvsock.StreamWriter) -> None:
        writer.write(b"hello")
        writer.close()

    async with tcp.serving(served):
        reader, writer = await soon(tcp.connect())
        assert await soon(reader.read()) == b"hello"
        await closed(writer)


async def test_an_exception_of_the_callback_is_reported_and_closes(
    tcp: Streams, loop_errors: list[dict[str, Any]]
) -> None:
    async def served(reader: uvsock.StreamReader, writer: uvsock.StreamWriter) -> None:
        raise KeyError("boom")

    async with tcp.serving(served):
        reader, writer = await soon(tcp.connect())
        assert await soon(reader.read()) == b""
        await closed(writer)
    assert [error["message"] for error in loop_errors] == [
        "Unhandled exception in client_connected_cb"
    ]
    assert repr(loop_errors[0]["exception"]) == "KeyError('boom')"


async def test_a_cancelled_callback_closes_and_is_not_reported(tcp: Streams) -> None:
    async def served(reader: uvsock.StreamReader, writer: uvsock.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        task.cancel()
        await asyncio.sleep(1)

    async with tcp.serving(served):
        reader, writer = await soon(tcp.connect())
        assert await soon(reader.read()) == b""
        await closed(writer)


# --- frames -----------------------------------------------------------------------------------


class Quoted(Framer):
    """A framer written in Python: text between single quotes."""

    def find(self, data: memoryview, searched: int = 0) -> tuple[int, int, int] | int | None:
        text = bytes(data)
        if text[:1] != b"'":
            raise FrameError(0, "no quote")
        end = text.find(b"'", max(1, searched))
        return (1, end, end + 1) if end > 0 else None


FRAMED: list[tuple[Framer, bytes, list[bytes]]] = [
    (Lines(), b"a\r\nbc\n\nd\n", [b"a", b"bc", b"", b"d"]),
    (Delimited(b"--"), b"a--b-c----", [b"a", b"b-c", b""]),
    (LengthPrefixed(2), b"\0\1a\0\0\0\3bcd", [b"a", b"", b"bcd"]),
    (FixedSize(3), b"abcdef", [b"abc", b"def"]),
    (Netstring(), b"1:a,0:,3:bcd,", [b"a", b"", b"bcd"]),
    (Quoted(), b"'a''''bcd'", [b"a", b"", b"bcd"]),
]


@pytest.mark.parametrize(("framer", "stream", "frames"), FRAMED, ids=lambda value: "")
@pytest.mark.parametrize("step", [1, 2, 100])
async def test_frames(framer: Framer, stream: bytes, frames: list[bytes], step: int) -> None:
    reader = uvsock.StreamReader()
    reader.set_framing(framer)
    assert reader.framing is framer
    got: list[bytes] = []

    async def read() -> None:
        while True:
            got.append(await reader.readframe())

    task = asyncio.create_task(read())
    for start in range(0, len(stream), step):
        reader.feed_data(stream[start : start + step])
        await asyncio.sleep(0)
    reader.feed_eof()
    with pytest.raises(asyncio.IncompleteReadError) as caught:
        await soon(task)
    assert (got, caught.value.partial) == (frames, b"")


async def test_frames_over_the_wire(streams: Streams) -> None:
    async def served(reader: uvsock.StreamReader, writer: uvsock.StreamWriter) -> None:
        with suppress(asyncio.IncompleteReadError):
            while True:
                frame = await reader.readframe()
                writer.write(len(frame).to_bytes(4, "big") + frame)
                await writer.drain()
        await closed(writer)

    async with streams.serving(served, framing=LengthPrefixed(4)):
        reader, writer = await soon(streams.connect(framing=LengthPrefixed(4)))
        for size in (0, 1, 64, 5000, 3 * MIB):
            frame = bytes([size % 251]) * size
            writer.write(size.to_bytes(4, "big") + frame)
            assert await soon(reader.readframe()) == frame
        await closed(writer)


async def test_frames_after_other_reads() -> None:
    reader = uvsock.StreamReader()
    with pytest.raises(RuntimeError, match="no framing"):
        await reader.readframe()
    reader.feed_data(b"HELLO\n3:abc,4:de")
    assert await reader.readline() == b"HELLO\n"
    reader.set_framing(Netstring())
    assert await reader.readframe() == b"abc"
    waiting = asyncio.create_task(reader.readframe())
    await asyncio.sleep(0)
    reader.feed_data(b"fg")
    await asyncio.sleep(0)
    assert not waiting.done()
    reader.feed_data(b",rest")
    assert await soon(waiting) == b"defg"
    assert await reader.read(4) == b"rest"


async def test_what_is_no_frame_can_still_be_read() -> None:
    reader = uvsock.StreamReader()
    reader.set_framing(Lines(max_length=10))
    reader.feed_data(b"x" * 50)
    for _ in range(2):
        with pytest.raises(uvsock.FrameTooLargeError):
            await reader.readframe()
    assert await reader.read(100) == b"x" * 50
    reader.feed_data(b"x")
    reader.feed_eof()
    with pytest.raises(asyncio.IncompleteReadError) as caught:
        await reader.readframe()
    assert caught.value.partial == b"x"


def test_framing_must_be_a_framer() -> None:
    with asyncio.Runner() as runner:
        reader = uvsock.StreamReader(loop=runner.get_loop())
        with pytest.raises(TypeError, match="framing"):
            reader.set_framing("lines")  # type: ignore[arg-type]
        with pytest.raises(TypeError, match="framing"):
            runner.run(uvsock.start_server(echo_lines, "127.0.0.1", 0, framing=4))  # type: ignore[arg-type]


# --- against asyncio's ------------------------------------------------------------------------

letters = st.text("ab\n;", max_size=12).map(str.encode)
separators = st.sampled_from([b"\n", b";", b"ab", b"\n;", b"aab", b""])
if sys.version_info >= (3, 13):
    separators |= st.lists(st.sampled_from([b"\n", b"ab", b"a;", b"b", b""]), max_size=3).map(tuple)
steps = st.lists(
    st.one_of(
        st.tuples(st.just("feed_data"), letters),
        st.tuples(st.just("feed_data"), letters.map(bytearray)),
        st.tuples(st.just("readline")),
        st.tuples(st.just("__anext__")),
        st.tuples(st.just("read"), st.integers(-1, 10)),
        st.tuples(st.just("readexactly"), st.integers(-1, 30)),
        st.tuples(st.just("readuntil"), separators),
        st.tuples(st.just("cancel")),
        st.tuples(st.just("feed_eof")),
        st.tuples(st.just("set_exception")),
        st.tuples(st.just("at_eof")),
    ),
    max_size=25,
)


def outcome(task: asyncio.Task[Any]) -> Any:
    if not task.done():
        return "waiting"
    if task.cancelled():
        return "cancelled"
    error = task.exception()
    if error is None:
        return task.result()
    details = [getattr(error, name, None) for name in ("partial", "expected", "consumed")]
    return type(error), str(error), details


async def history(reader: asyncio.StreamReader, steps: list[tuple[Any, ...]]) -> list[Any]:
    """What each step led to: the states of all reads so far, and what is held."""
    tasks: list[asyncio.Task[Any]] = []
    seen: list[Any] = []
    ended = False
    for name, *arguments in steps:
        if name == "cancel":
            for task in tasks:
                task.cancel()
        elif name == "set_exception":
            reader.set_exception(ValueError("broken"))
        elif name == "at_eof":
            seen.append(reader.at_eof())
        elif name in ("feed_data", "feed_eof"):
            if ended and name == "feed_data":
                with pytest.raises(AssertionError, match="feed_data after feed_eof"):
                    reader.feed_data(*arguments)
            else:
                getattr(reader, name)(*arguments)
            ended = ended or name == "feed_eof"
        # asyncio's loses its place where bytes are taken from under a read that waits.
        elif not (reader._buffer and not all(task.done() for task in tasks)):  # type: ignore[attr-defined]
            read: Any = getattr(reader, name)(*arguments)
            tasks.append(asyncio.ensure_future(read))
        for _ in range(4):
            await asyncio.sleep(0)
        seen.append(([outcome(task) for task in tasks], bytes(reader._buffer)))  # type: ignore[attr-defined]
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    return seen


@settings(max_examples=500, deadline=None)
@given(steps, st.integers(1, 12))
def test_like_asyncios_reader(steps: list[tuple[Any, ...]], limit: int) -> None:
    async def both() -> tuple[list[Any], list[Any]]:
        mine, theirs = uvsock.StreamReader(limit), asyncio.StreamReader(limit)
        return await history(mine, steps), await history(theirs, steps)

    with asyncio.Runner() as runner:
        mine, theirs = runner.run(both())
    assert mine == theirs


@given(
    st.text("ab;", max_size=20).map(str.encode),
    st.lists(st.text("ab;", min_size=1, max_size=3).map(str.encode), min_size=1, max_size=3),
    st.integers(1, 20),
)
def test_the_separator_that_ends_first_counts(
    data: bytes, separators: list[bytes], step: int
) -> None:
    ends = [data.find(sep) + len(sep) for sep in separators if sep in data]

    async def read() -> bytes:
        reader = uvsock.StreamReader()
        task = asyncio.ensure_future(reader.readuntil(tuple(separators)))
        for start in range(0, len(data), step):
            await asyncio.sleep(0)
            reader.feed_data(data[start : start + step])
        reader.feed_eof()
        try:
            return await task
        except asyncio.IncompleteReadError as error:
            assert not ends
            return error.partial

    with asyncio.Runner() as runner:
        assert runner.run(read()) == (data[: min(ends)] if ends else data)


async def test_reading_pauses_above_twice_the_limit_and_goes_on_at_the_limit() -> None:
    for cls in (uvsock.StreamReader, asyncio.StreamReader):
        reader, transport = cls(limit=10), Transport()
        reader.set_transport(transport)
        reader.feed_data(b"x" * 20)
        assert transport.calls == []
        reader.feed_data(b"x")
        assert transport.calls == ["pause"]
        await reader.readexactly(10)
        assert transport.calls == ["pause"]
        await reader.readexactly(1)
        assert transport.calls == ["pause", "resume"]
        reader.feed_data(b"x" * 11)
        waiting = asyncio.ensure_future(reader.readexactly(50))
        await asyncio.sleep(0)
        assert transport.calls == ["pause", "resume"] * 2
        reader.feed_data(b"x" * 29)
        assert await waiting == b"x" * 50
        with pytest.raises(AssertionError, match="Transport already set"):
            reader.set_transport(transport)


async def test_a_transport_that_cannot_pause() -> None:
    reader = uvsock.StreamReader(limit=10)
    reader.set_transport(asyncio.Transport())
    reader.feed_data(b"x" * 100)
    reader.feed_data(b"x" * 100)
    assert await reader.readexactly(200) == b"x" * 200


def test_a_limit_must_be_above_zero() -> None:
    for limit in (0, -1):
        with pytest.raises(ValueError, match="Limit cannot be <= 0"):
            uvsock.StreamReader(limit)


# --- reads as coroutines ----------------------------------------------------------------------


async def test_reads_and_drains_are_coroutines() -> None:
    loop = asyncio.get_running_loop()
    reader = uvsock.StreamReader()
    protocol = StreamProtocol(reader, None, loop)
    transport = Transport()
    protocol.connection_made(transport)
    writer = uvsock.StreamWriter(transport, protocol, reader, loop)
    assert asyncio.iscoroutine(reader.readline())
    assert asyncio.iscoroutine(writer.drain())
    assert reader.readline().__qualname__ == "StreamReader.readline"
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(reader.readline(), 0.001)
    # Not even begun: nothing may be taken.
    reader.feed_data(b"a\nb\nc\nd\n")
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(reader.readline(), 0)
    task = loop.create_task(reader.readline())
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    reader.readline().close()
    assert await asyncio.gather(reader.readline(), reader.read(2), writer.drain()) == [
        b"a\n",
        b"b\n",
        None,
    ]
    assert await asyncio.wait_for(reader.readline(), 1) == b"c\n"
    await loop.create_task(writer.drain())
    once = reader.readline()
    assert await once == b"d\n"
    with pytest.raises(RuntimeError, match="already awaited"):
        await once
    writer.close()


async def test_data_that_is_there_does_not_suspend() -> None:
    reader = uvsock.StreamReader()
    reader.feed_data(b"a\nbc")
    with pytest.raises(StopIteration) as stopped:
        reader.readline().send(None)
    assert stopped.value.value == b"a\n"
    with pytest.raises(StopIteration) as stopped:
        next(iter(reader.readexactly(2)))
    assert stopped.value.value == b"bc"


async def test_an_exception_thrown_into_a_read_ends_it() -> None:
    reader = uvsock.StreamReader()
    for thrown in ((KeyError("x"),), (KeyError, "x"), (KeyError,)):
        read = reader.readline()
        read.send(None)
        with pytest.raises(KeyError):
            read.throw(*thrown)
        assert reader._waiter is None


async def test_a_cancelled_read_loses_nothing(tcp: Streams) -> None:
    async with tcp.serving(echo_lines):
        reader, writer = await soon(tcp.connect())
        for _ in range(20):
            task = asyncio.create_task(reader.readline())
            await asyncio.sleep(0)
            writer.write(b"half")
            writer.write(b" a line\n")
            await asyncio.sleep(0.001)
            task.cancel()
            with suppress(asyncio.CancelledError):
                await task
            line = task.result() if not task.cancelled() else await soon(reader.readline())
            assert line == b"half a line\n"
        await closed(writer)


async def test_one_read_at_a_time() -> None:
    reader = uvsock.StreamReader()
    first = asyncio.create_task(reader.readline())
    await asyncio.sleep(0)
    for read, name in (
        (reader.readline(), "readuntil"),
        (reader.readexactly(3), "readexactly"),
        (reader.read(3), "read"),
    ):
        text = f"{name}\\(\\) called while another coroutine is already waiting for incoming data"
        with pytest.raises(RuntimeError, match=text):
            await read
    reader.feed_data(b"x\n")
    assert await soon(first) == b"x\n"


async def test_a_read_that_waits_goes_on_after_others_took_what_was_there() -> None:
    reader = uvsock.StreamReader()
    reader.feed_data(b"abc")
    first = asyncio.create_task(reader.readline())
    await asyncio.sleep(0)
    assert await reader.read(3) == b"abc"
    reader.feed_data(b"x\n")
    assert await soon(first) == b"x\n"


async def test_a_new_framer_looks_at_once() -> None:
    reader = uvsock.StreamReader()
    reader.set_framing(FixedSize(100))
    reader.feed_data(b"line\n")
    waiting = asyncio.create_task(reader.readframe())
    await asyncio.sleep(0)
    reader.set_framing(Lines())
    assert await soon(waiting) == b"line"


@pytest.mark.parametrize("loop", LOOPS.values(), ids=LOOPS)
def test_an_exit_in_one_task_leaves_the_others(loop: Any) -> None:
    readers: list[uvsock.StreamReader] = []
    tasks: list[asyncio.Task[bytes]] = []

    async def leave(reader: uvsock.StreamReader) -> bytes:
        await reader.readline()
        raise SystemExit(3)

    async def start() -> None:
        readers.extend(uvsock.StreamReader() for _ in range(3))
        reads = [readers[0].readline(), leave(readers[1]), readers[2].readline()]
        tasks.extend(asyncio.ensure_future(read) for read in reads)
        await asyncio.sleep(0)

    async def feed() -> None:
        for reader in readers:
            reader.feed_data(b"x\n")
        await asyncio.sleep(1)

    async def finish() -> list[bytes]:
        return await soon(asyncio.gather(tasks[0], tasks[2]))  # type: ignore[no-any-return]

    with asyncio.Runner(loop_factory=loop) as runner:
        runner.run(start())
        with pytest.raises(SystemExit):
            runner.run(feed())
        assert runner.run(finish()) == [b"x\n", b"x\n"]
        assert isinstance(tasks[1].exception(), SystemExit)


async def test_the_classes_are_asyncios() -> None:
    reader = uvsock.StreamReader()
    assert isinstance(reader, asyncio.StreamReader)
    assert issubclass(uvsock.StreamWriter, asyncio.StreamWriter)
    reader.feed_data(b"abc")
    assert repr(reader) == "<StreamReader 3 bytes>"


# --- how much -----------------------------------------------------------------------------------


@pytest.mark.parametrize("separator", [b"\n", b"ab" * 50 + b"\n", (b"\n", b"ab" * 50 + b"\n")])
async def test_one_byte_at_a_time_stays_linear(separator: Any) -> None:
    reader = uvsock.StreamReader(limit=MIB)
    task = asyncio.ensure_future(reader.readuntil(separator))
    await asyncio.sleep(0)
    started = time.process_time()
    for _ in range(MIB // 8):
        reader.feed_data(b"a")
        await asyncio.sleep(0)
    reader.feed_data(b"ab" * 50 + b"\n")
    await task
    # Less than a second; minutes if each byte searched or moved all those before it.
    assert time.process_time() - started < 10


async def test_many_small_reads_of_much_stay_linear() -> None:
    reader = uvsock.StreamReader(limit=8 * MIB)
    for _ in range(4 * MIB // 16):
        reader.feed_data(b"x" * 15 + b"\n")
    started = time.process_time()
    for _ in range(4 * MIB // 16):
        await reader.readline()
    assert time.process_time() - started < 10
    assert reader._buffer == b""


async def test_an_idle_stream_gives_back_the_memory_of_a_burst() -> None:
    readers = [uvsock.StreamReader() for _ in range(50)]
    tracemalloc.start()
    try:
        before = tracemalloc.get_traced_memory()[0]
        waiting = []
        for reader in readers:
            for _ in range(8):
                reader.feed_data(b"x" * 999 + b"\n" + b"y" * 30_000 + b"\n")
            reader.feed_data(b"begun")
            for _ in range(16):
                await reader.readline()
            waiting.append(asyncio.ensure_future(reader.readline()))
        await asyncio.sleep(0)
        held = tracemalloc.get_traced_memory()[0] - before
    finally:
        tracemalloc.stop()
    for reader in readers:
        reader.feed_data(b"\n")
    assert await asyncio.gather(*waiting) == [b"begun\n"] * 50
    # Tasks, futures and the few bytes; not a quarter of a MiB each.
    assert held < 50 * 4 * KIB


# --- TLS that is started later ----------------------------------------------------------------


async def upgrades(
    reader: Any, writer: Any, context: ssl.SSLContext, **options: Any
) -> tuple[bool, bytes]:
    """Whether TLS could be started on a stream, and the line that was read after that."""
    try:
        await writer.start_tls(context, **options)
        line = await soon(reader.readline())
    except (OSError, asyncio.IncompleteReadError):
        writer.close()  # not all loops tell when a connection is gone that TLS was not started on
        return False, b""
    await closed(writer)
    return True, line


@pytest.mark.parametrize("module", [uvsock, asyncio])
@pytest.mark.parametrize("junk", [b"DELETE all\r\n", b"half a li"])
async def test_what_came_in_the_clear_is_not_read_as_if_over_tls(
    authority: Authority, module: Any, junk: bytes, loop_errors: list[Any]
) -> None:
    """A command pipelined behind STARTTLS (RFC 3207, 6): an attacker may have put it there."""
    if module is asyncio and not isinstance(asyncio.get_running_loop(), uvsock.Loop):
        pytest.skip("asyncio's own streams, on a loop that is not ours")
    server: asyncio.Future[tuple[bool, bytes]] = asyncio.get_running_loop().create_future()

    async def served(reader: Any, writer: Any) -> None:
        assert await reader.readline() == b"STARTTLS\r\n"
        writer.write(b"220 go\r\n")
        server.set_result(await upgrades(reader, writer, authority.server_context()))

    serving = await module.start_server(served, "127.0.0.1", 0)
    reader, writer = await module.open_connection(*serving.sockets[0].getsockname())
    writer.write(b"STARTTLS\r\n" + junk)
    assert await soon(reader.readline()) == b"220 go\r\n"
    context = authority.client_context()
    client = await soon(upgrades(reader, writer, context, server_hostname=SERVER_NAME))
    assert await soon(server) == client == (False, b"")
    serving.close()


async def test_what_a_server_sent_in_the_clear_is_not_read_as_if_over_tls(
    tcp: Streams, authority: Authority, loop_errors: list[Any]
) -> None:
    async def served(reader: uvsock.StreamReader, writer: uvsock.StreamWriter) -> None:
        writer.write(b"220 go\r\n235 logged in\r\n")
        await reader.read()
        await closed(writer)

    async with tcp.serving(served):
        reader, writer = await tcp.connect()
        assert await soon(reader.readline()) == b"220 go\r\n"
        context = authority.client_context()
        result = await soon(upgrades(reader, writer, context, server_hostname=SERVER_NAME))
        assert result == (False, b"")


@pytest.mark.parametrize("cut", [0, 1, 5, 100, 1000])
async def test_a_client_hello_behind_the_last_plain_bytes(
    tcp: Streams, authority: Authority, cut: int
) -> None:
    async def served(reader: uvsock.StreamReader, writer: uvsock.StreamWriter) -> None:
        assert await reader.readline() == b"STARTTLS\n"
        writer.write(b"go\n")
        await writer.start_tls(authority.server_context())
        async for line in reader:
            writer.write(line.upper())
        await closed(writer)

    async with tcp.serving(served):
        reader, writer = await tcp.connect()
        peer = ByHand(reader, writer, authority.client_context())
        with pytest.raises(ssl.SSLWantReadError):
            peer.ssl.do_handshake()
        hello = peer.outgoing.read()
        writer.write(b"STARTTLS\n" + hello[:cut])
        await writer.drain()
        assert await soon(reader.readexactly(3)) == b"go\n"
        writer.write(hello[cut:])
        await soon(peer.handshake())
        peer.send(b"quiet\n")
        assert await soon(peer.receive(6)) == b"QUIET\n"
        await peer.close()


async def test_a_read_up_to_the_end_gives_no_plain_bytes_after_tls_has_begun(
    tcp: Streams, authority: Authority, loop_errors: list[Any]
) -> None:
    if not isinstance(asyncio.get_running_loop(), uvsock.Loop):
        pytest.skip("the other loops leave the read waiting")
    results: list[Any] = []

    async def served(reader: uvsock.StreamReader, writer: uvsock.StreamWriter) -> None:
        assert await reader.readline() == b"go on\n"
        reading = asyncio.create_task(reader.read())
        await asyncio.sleep(0)  # it has taken what there was
        await upgrades(reader, writer, authority.server_context())
        results.extend(await asyncio.gather(reading, return_exceptions=True))

    async with tcp.serving(served):
        reader, writer = await tcp.connect()
        writer.write(b"go on\nplain")
        context = authority.client_context()
        await soon(upgrades(reader, writer, context, server_hostname=SERVER_NAME))
        await until(lambda: results)
    assert results[0] == b"" or isinstance(results[0], OSError)


async def test_start_tls_that_is_refused_changes_nothing(tcp: Streams) -> None:
    async def served(reader: uvsock.StreamReader, writer: uvsock.StreamWriter) -> None:
        assert await reader.readline() == b"one\n"
        with pytest.raises(TypeError):
            await writer.start_tls(None)  # type: ignore[arg-type]
        await asyncio.sleep(0.01)
        writer.write(await reader.readline())
        await closed(writer)

    async with tcp.serving(served):
        reader, writer = await tcp.connect()
        writer.write(b"one\ntwo\n")
        assert await soon(reader.readline()) == b"two\n"
        await closed(writer)


async def test_who_is_cancelled_does_not_cancel_others_that_wait_for_the_end(tcp: Streams) -> None:
    async def served(reader: uvsock.StreamReader, writer: uvsock.StreamWriter) -> None:
        await reader.read()
        await closed(writer)

    async with tcp.serving(served):
        _, writer = await tcp.connect()
        waits = [asyncio.create_task(writer.wait_closed()) for _ in range(3)]
        await asyncio.sleep(0)
        waits[1].cancel()
        await asyncio.wait(waits[1:2])
        writer.close()
        await soon(asyncio.gather(waits[0], waits[2]))
        assert waits[1].cancelled()
