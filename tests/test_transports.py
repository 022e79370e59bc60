"""asyncio's programs on uvsock's loop. What is not marked runs on asyncio's own loop too.

So each test says what asyncio does, and that uvsock does the same; `uvsock_only` marks what is
better than asyncio's, or asked for by version.
"""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import functools
import gc
import os
import socket
import ssl
import struct
import sys
import weakref
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest
import uvloop

import uvsock
from conftest import SERVER_NAME, Authority, Wire, run_python, unused_port
from helpers import soon, until

LOOPS = {"uvsock": uvsock.new_event_loop, "asyncio": asyncio.SelectorEventLoop}
uvsock_only = pytest.mark.asyncio(loop_factories=["uvsock"])
# asyncio's own transports of Python 3.12.1 and 3.13.0 queue a buffer without copying it, fail on
# writelines([b""]), and take a writelines() after close().
not_on_asyncio_312 = pytest.mark.asyncio(
    loop_factories=["uvsock"] if sys.version_info >= (3, 12) else list(LOOPS)
)


class Recorder(asyncio.Protocol):
    """A protocol that writes down every call."""

    def __init__(self, **overrides: Callable[..., Any]) -> None:
        self.events: list[str] = []
        self.received = bytearray()
        self.overrides = overrides
        self.error: BaseException | None = None
        self.lost = asyncio.get_running_loop().create_future()
        self.made = asyncio.get_running_loop().create_future()

    def _call(self, event: str, *arguments: Any) -> Any:
        self.events.append(event)
        if event in self.overrides:
            return self.overrides[event](self, *arguments)
        return None

    def connection_made(self, transport: Any) -> None:
        self.transport: asyncio.Transport = transport
        self.made.set_result(transport)
        self._call("made")

    def data_received(self, data: bytes) -> None:
        self.received += data
        self._call("data", data)

    def eof_received(self) -> bool | None:
        return bool(self._call("eof"))

    def pause_writing(self) -> None:
        self._call("pause")

    def resume_writing(self) -> None:
        self._call("resume")

    def connection_lost(self, exc: Exception | None) -> None:
        self.error = exc
        self.lost.set_result(exc)
        self._call("lost")


class Buffered(asyncio.BufferedProtocol):
    """The same, for a BufferedProtocol with a buffer of this size."""

    def __init__(self, size: int = 100) -> None:
        self.buffer = bytearray(size)
        self.received = bytearray()
        self.lost = asyncio.get_running_loop().create_future()

    def connection_made(self, transport: Any) -> None:
        self.transport: asyncio.Transport = transport

    def get_buffer(self, sizehint: int) -> Any:
        return self.buffer

    def buffer_updated(self, nbytes: int) -> None:
        self.received += self.buffer[:nbytes]

    def connection_lost(self, exc: Exception | None) -> None:
        self.lost.set_result(exc)


class Net:
    """Servers and clients of the running loop, on one wire."""

    def __init__(self, wire: Wire) -> None:
        self.kind = wire.kind
        self.authority = wire.authority
        self.directory = wire.directory
        self.servers: list[asyncio.Server] = []
        self.transports: list[asyncio.Transport] = []
        self.loop: Any = asyncio.get_running_loop()

    @property
    def encrypted(self) -> bool:
        return self.kind == "tls"

    @property
    def ours(self) -> bool:
        return isinstance(self.loop, uvsock.Loop)

    @property
    def path(self) -> str:
        return str(self.directory / "s")

    async def serve(self, factory: Callable[[], Any], **options: Any) -> asyncio.Server:
        if self.encrypted:
            options.setdefault("ssl", self.authority.server_context())
        if self.kind == "unix":
            server = await self.loop.create_unix_server(factory, self.path, **options)
        else:
            server = await self.loop.create_server(factory, "127.0.0.1", 0, **options)
        self.servers.append(server)
        return server  # type: ignore[no-any-return]

    @property
    def address(self) -> Any:
        return self.servers[-1].sockets[0].getsockname()

    async def connect(self, factory: Callable[[], Any], **options: Any) -> tuple[Any, Any]:
        if self.encrypted:
            options.setdefault("ssl", self.authority.client_context())
            options.setdefault("server_hostname", SERVER_NAME)
        async with asyncio.timeout(5):  # not a task: it would be told late
            if self.kind == "unix":
                made = await self.loop.create_unix_connection(factory, self.path, **options)
            else:
                made = await self.loop.create_connection(factory, *self.address, **options)
        self.transports.append(made[0])
        return made  # type: ignore[no-any-return]

    async def pair(
        self, client: Callable[[], Any] = Recorder, server: Callable[[], Any] = Recorder
    ) -> tuple[Any, Any]:
        """Two connected protocols."""
        made: list[Any] = []

        def factory() -> Any:
            made.append(server())
            return made[-1]

        await self.serve(factory)
        _, protocol = await self.connect(client)
        await until(lambda: made and getattr(made[0], "transport", None))
        self.transports.append(made[0].transport)
        return protocol, made[0]

    def dial(self) -> socket.socket:
        """A plain client of the standard library's, also where the server speaks TLS."""
        sock = socket.socket(socket.AF_UNIX if self.kind == "unix" else socket.AF_INET)
        sock.settimeout(5)
        sock.connect(self.path if self.kind == "unix" else self.address)
        return sock

    async def close(self) -> None:
        for transport in self.transports:
            if not transport.is_closing():
                transport.abort()
        for server in self.servers:
            server.close()
            await soon(server.wait_closed())


@pytest.fixture
async def net(wire: Wire) -> AsyncIterator[Net]:
    net = Net(wire)
    if net.encrypted and not net.ours:
        # Its write() after close() raises, and it reads for ever into a small buffer...
        pytest.skip("asyncio's transports differ with TLS")
    yield net
    await net.close()


@pytest.fixture
async def plain_net(plain_wire: Wire) -> AsyncIterator[Net]:
    net = Net(plain_wire)
    yield net
    await net.close()


@pytest.fixture
async def tcp_net(tcp_wire: Wire) -> AsyncIterator[Net]:
    net = Net(tcp_wire)
    yield net
    await net.close()


@pytest.fixture
async def tls_net(tls_wire: Wire) -> AsyncIterator[Net]:
    net = Net(tls_wire)
    yield net
    await net.close()


def echo() -> Recorder:
    return Recorder(data=lambda protocol, data: protocol.transport.write(data))


# ── What a transport is ────────────────────────────────────────────────────────────────────────


async def test_is_an_asyncio_transport(net: Net) -> None:
    client, server = await net.pair()
    for transport in (client.transport, server.transport):
        assert isinstance(transport, asyncio.Transport)
        assert ("SSL" in transport.__class__.__name__) == net.encrypted
        assert weakref.ref(transport)() is transport
        transport.mine = 1
        assert transport.mine == 1


async def test_methods_can_be_replaced(net: Net) -> None:
    client, server = await net.pair()
    written: list[bytes] = []
    client.transport.write = written.append
    client.transport.write(b"x")
    assert written == [b"x"]
    del client.transport.write
    client.transport.write(b"y")
    await until(lambda: server.received == b"y")


async def test_extra_info(net: Net) -> None:
    client, server = await net.pair()
    for transport in (client.transport, server.transport):
        info = transport.get_extra_info
        sock = info("socket")
        assert sock is info("socket")
        assert sock.fileno() >= 0
        assert info("sockname") == sock.getsockname()
        assert info("nothing") is None
        assert info("nothing", 7) == 7
        if not net.encrypted:
            assert info("ssl_object") is None
            assert info("sslcontext") is None
            continue
        assert isinstance(info("ssl_object"), ssl.SSLObject)
        assert isinstance(info("sslcontext"), ssl.SSLContext)
        assert len(info("cipher")) == 3
        assert info("compression", 7) is None
        assert info("peercert", 7) is not 7  # noqa: F632
    assert client.transport.get_extra_info("peername") == server.transport.get_extra_info(
        "sockname"
    )


async def test_addresses_are_known_after_close(tcp_net: Net) -> None:
    client, server = await tcp_net.pair()
    names = [client.transport.get_extra_info(name) for name in ("sockname", "peername")]
    client.transport.close()
    await soon(client.lost)
    assert names == [client.transport.get_extra_info(name) for name in ("sockname", "peername")]
    assert client.transport.get_extra_info("socket").fileno() == -1
    await soon(server.lost)


@pytest.mark.parametrize("family", ["IPv4", "IPv6", "Unix"])
async def test_the_socket_of_a_closed_transport_that_nobody_asked_for(
    family: str, tcp_net: Net
) -> None:
    loop = tcp_net.loop
    if family == "Unix":
        path = str(tcp_net.directory / "closed")
        server = await loop.create_unix_server(echo, path)
        transport, client = await loop.create_unix_connection(Recorder, path)
    else:
        host = {"IPv4": "127.0.0.1", "IPv6": "::1"}[family]
        server = await loop.create_server(echo, host, 0)
        port = server.sockets[0].getsockname()[1]
        transport, client = await loop.create_connection(Recorder, host, port)
    transport.close()
    await soon(client.lost)
    closed = transport.get_extra_info("socket")
    assert closed.fileno() == -1
    expected = {"IPv4": socket.AF_INET, "IPv6": socket.AF_INET6, "Unix": socket.AF_UNIX}
    assert closed.family == expected[family]
    server.close()
    await soon(server.wait_closed())


async def test_repr_tells_the_state(net: Net) -> None:
    client, _ = await net.pair()
    if net.ours:
        assert "fd=" in repr(client.transport)
        assert "read=polling" in repr(client.transport)
    client.transport.abort()
    await soon(client.lost)
    if net.ours:
        assert "closed" in repr(client.transport)


async def test_no_delay_is_on(tcp_net: Net) -> None:
    for protocol in await tcp_net.pair():
        sock = protocol.transport.get_extra_info("socket")
        assert sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)


@uvsock_only
async def test_cannot_be_made_by_hand() -> None:
    from uvsock.dropin._transport import Transport

    with pytest.raises(TypeError, match="made by the event loop"):
        Transport()


# ── Order ──────────────────────────────────────────────────────────────────────────────────────


async def test_data_comes_after_create_connection_has_returned(net: Net) -> None:
    def speak(protocol: Recorder) -> None:
        protocol.transport.write(b"first")

    await net.serve(lambda: Recorder(made=speak))
    for _ in range(20):
        _, protocol = await net.connect(Recorder)
        assert protocol.events == ["made"]
        await until(lambda: protocol.received == b"first")  # noqa: B023
        protocol.transport.abort()
        await soon(protocol.lost)


async def test_a_whole_life(net: Net) -> None:
    client, server = await net.pair(Recorder, echo)
    client.transport.write(b"hello")
    await until(lambda: client.received == b"hello")
    client.transport.close()
    assert client.transport.is_closing()
    assert "lost" not in client.events
    await soon(client.lost)
    await soon(server.lost)
    assert (client.error, server.error) == (None, None)
    assert server.events == ["made", "data", "eof", "lost"]
    # With TLS the peer's close_notify is told of too.
    assert client.events == ["made", "data", *(["eof"] if net.encrypted else []), "lost"]


@uvsock_only
async def test_callbacks_run_in_the_context_of_the_connection(net: Net) -> None:
    # asyncio runs some in the context of whoever calls.
    name: contextvars.ContextVar[str] = contextvars.ContextVar("name", default="none")
    seen: dict[str, str] = {}

    def note(event: str) -> Callable[..., None]:
        return lambda *_: seen.update({event: name.get()})

    name.set("creator")
    client, server = await net.pair(
        lambda: Recorder(**{e: note(e) for e in ("made", "data", "pause", "resume", "lost")})
    )
    name.set("later")
    server.transport.write(b"x")
    client.transport.set_write_buffer_limits(high=1000)
    server.transport.pause_reading()
    while "pause" not in client.events:
        client.transport.write(bytes(100_000))
    server.transport.resume_reading()
    await until(lambda: {"data", "resume"} <= set(client.events))
    client.transport.abort()
    await soon(client.lost)
    assert seen == dict.fromkeys(("made", "data", "pause", "resume", "lost"), "creator")


# ── Writing ────────────────────────────────────────────────────────────────────────────────────


@not_on_asyncio_312
async def test_bytes_like_objects(net: Net) -> None:
    client, server = await net.pair()
    numbers = memoryview(struct.pack("4I", 1, 2, 3, 4)).cast("I")
    chunks = [b"a", bytearray(b"b"), memoryview(b"c"), b"", numbers]
    for chunk in chunks:
        client.transport.write(chunk)
    client.transport.writelines(iter(chunks))
    client.transport.writelines([])
    client.transport.writelines([b""])
    expected = b"".join(chunks) * 2  # type: ignore[arg-type]
    await until(lambda: len(server.received) >= len(expected))
    assert server.received == expected


@uvsock_only
async def test_a_strided_memoryview_is_sent_as_its_bytes(net: Net) -> None:
    # asyncio's own takes it and then loses the connection.
    client, server = await net.pair()
    client.transport.write(memoryview(b"a-b-c-")[::2])
    await until(lambda: server.received == b"abc")


@pytest.mark.parametrize("wrong", ["text", None, 42, [b"x"]])
async def test_what_is_not_bytes_is_refused(net: Net, wrong: Any) -> None:
    client, server = await net.pair()
    # The second is asyncio's from Python 3.14 on.
    text = "must be a (bytes-like|bytes, bytearray, or memoryview) object, not"
    with pytest.raises(TypeError, match=text):
        client.transport.write(wrong)
    client.transport.write(b"goes on")
    await until(lambda: server.received == b"goes on")


@uvsock_only
@pytest.mark.parametrize("wrong", [[b"a", "text"], [b"a", 1], 42])
async def test_writelines_sends_all_or_nothing(net: Net, wrong: Any) -> None:
    client, server = await net.pair()
    with pytest.raises(TypeError):
        client.transport.writelines(wrong)
    client.transport.write(b"only")
    await until(lambda: server.received == b"only")


@not_on_asyncio_312
async def test_a_buffer_may_be_changed_after_write(net: Net) -> None:
    client, server = await net.pair()
    server.transport.pause_reading()
    sent = b""
    for letter in b"abcdefghij":
        chunk = bytearray([letter]) * 200_000
        sent += bytes(chunk)
        client.transport.write(chunk)
        chunk[:] = b""  # resized, even
    server.transport.resume_reading()
    await until(lambda: len(server.received) == len(sent))
    assert server.received == sent


@uvsock_only
async def test_writes_of_a_callback_leave_together(plain_net: Net) -> None:
    def five(protocol: Recorder, data: bytes) -> None:
        for letter in b"abcde":
            protocol.transport.write(bytes([letter]))
        assert protocol.transport.get_write_buffer_size() == 5  # held, and counted

    await plain_net.serve(lambda: Recorder(data=five))
    with plain_net.dial() as sock:
        for _ in range(20):
            sock.sendall(b"?")
            assert await asyncio.to_thread(sock.recv, 100) == b"abcde"


async def ping_pong(client: Recorder, server: Recorder, rounds: int) -> list[int]:
    """Each in turn writes a byte, from this task: what was held after each write."""
    held = []
    for _ in range(rounds):
        for writer, reader in ((client, server), (server, client)):
            before = len(reader.received)
            writer.transport.write(b"x")
            held.append(writer.transport.get_write_buffer_size())
            await until(lambda reader=reader, before=before: len(reader.received) > before)
    return held


@uvsock_only
async def test_a_task_that_answers_once_is_not_kept_waiting(net: Net) -> None:
    client, server = await net.pair()
    held = await ping_pong(client, server, 30)
    assert held[:10] == [1] * 10  # more may follow
    assert held[-10:] == [0] * 10


@uvsock_only
async def test_two_writes_of_a_task_leave_together(plain_net: Net) -> None:
    held = []

    def answer(protocol: Recorder) -> None:
        for part in (b"head", b"body"):
            protocol.transport.write(part)
            held.append(protocol.transport.get_write_buffer_size())

    await plain_net.serve(
        lambda: Recorder(data=lambda protocol, data: plain_net.loop.call_soon(answer, protocol))
    )
    with plain_net.dial() as sock:
        for _ in range(40):
            sock.sendall(b"?")
            assert await asyncio.to_thread(sock.recv, 100) == b"headbody"
    assert held == [4, 8] * 40


@uvsock_only
async def test_answers_to_many_leave_together(plain_net: Net) -> None:
    """The system calls for one stand behind each other, which takes all of them less."""
    held = []

    def answer(protocol: Recorder) -> None:
        protocol.transport.write(b"!")
        held.append(protocol.transport.get_write_buffer_size())

    await plain_net.serve(
        lambda: Recorder(data=lambda protocol, data: plain_net.loop.call_soon(answer, protocol))
    )
    with contextlib.ExitStack() as stack:
        socks = [stack.enter_context(plain_net.dial()) for _ in range(8)]
        for _ in range(40):
            for sock in socks:
                sock.sendall(b"?")
            for sock in socks:
                assert await asyncio.to_thread(sock.recv, 100) == b"!"
    assert held == [1] * 320


@uvsock_only
async def test_what_follows_an_answer_that_has_left(net: Net) -> None:
    client, server = await net.pair()
    await ping_pong(client, server, 30)
    client.received.clear()
    server.transport.write(b"a")
    assert server.transport.get_write_buffer_size() == 0
    server.transport.write(b"b")
    server.transport.writelines([b"c", b"", bytearray(b"d")])
    assert server.transport.get_write_buffer_size() == 3
    await until(lambda: client.received == b"abcd")
    assert server.transport.get_write_buffer_size() == 0


@uvsock_only
async def test_writelines_is_one_answer(tcp_net: Net) -> None:
    made: list[Recorder] = []

    def answer(protocol: Recorder) -> None:
        protocol.transport.writelines([b"a", b"b", b"c"])

    def factory() -> Recorder:
        made.append(Recorder(data=lambda p, data: tcp_net.loop.call_soon(answer, p)))
        return made[-1]

    await tcp_net.serve(factory)
    with tcp_net.dial() as sock:
        for _ in range(40):
            sock.sendall(b"?")
            assert await asyncio.to_thread(sock.recv, 100) == b"abc"
        answer(made[0])  # to nothing
        assert made[0].transport.get_write_buffer_size() == 3
        assert await asyncio.to_thread(sock.recv, 100) == b"abc"
        for _ in range(20):
            sock.sendall(b"?")
            assert await asyncio.to_thread(sock.recv, 100) == b"abc"


@uvsock_only
async def test_an_answer_to_a_peer_that_is_gone(plain_net: Net) -> None:
    made: list[Recorder] = []
    answered: list[Recorder] = []

    def answer(protocol: Recorder) -> None:
        protocol.transport.write(b"!")
        answered.append(protocol)

    def factory() -> Recorder:
        made.append(Recorder(data=lambda protocol, data: later(answer, protocol)))
        return made[-1]

    later = plain_net.loop.call_soon
    await plain_net.serve(factory)
    with plain_net.dial() as sock:
        for _ in range(30):
            sock.sendall(b"?")
            assert await asyncio.to_thread(sock.recv, 100) == b"!"
        later = functools.partial(plain_net.loop.call_later, 0.05)
        sock.sendall(b"?")
    await soon(made[0].lost)
    await until(lambda: len(answered) == 31)  # the last is dropped, as asyncio drops it
    assert made[0].events.count("lost") == 1


@uvsock_only
async def test_closing_when_writing_is_paused(net: Net) -> None:
    """Also where a task writes: all that was accepted arrives."""
    client, server = await net.pair(lambda: Recorder(pause=lambda p: p.transport.close()))
    await ping_pong(client, server, 30)
    server.received.clear()
    server.transport.pause_reading()
    sent = 0
    while not client.transport.is_closing():
        client.transport.write(bytes(100_000))
        sent += 100_000
    server.transport.resume_reading()
    await soon(server.lost)
    assert len(server.received) == sent


async def test_writes_outside_callbacks_leave_by_themselves(net: Net) -> None:
    client, server = await net.pair()
    client.transport.write(b"a")
    client.transport.write(b"b")
    await asyncio.sleep(0.001)
    assert client.transport.get_write_buffer_size() == 0
    await until(lambda: server.received == b"ab")


async def test_default_write_buffer_limits(net: Net) -> None:
    client, _ = await net.pair()
    if net.encrypted and not net.ours:
        return  # asyncio has others for TLS: 512 KiB
    assert client.transport.get_write_buffer_limits() == (16384, 65536)


@pytest.mark.parametrize(
    ("given", "limits"),
    [
        ({"high": 1024}, (256, 1024)),
        ({"low": 16385}, (16385, 65540)),
        ({"high": 0}, (0, 0)),
        ({"high": 1024, "low": 128}, (128, 1024)),
    ],
)
async def test_write_buffer_limits(
    plain_net: Net, given: dict[str, int], limits: tuple[int, int]
) -> None:
    client, _ = await plain_net.pair()
    client.transport.set_write_buffer_limits(**given)
    assert client.transport.get_write_buffer_limits() == limits


@pytest.mark.parametrize("given", [{"high": 0, "low": 1}, {"low": -1}, {"high": -1}])
async def test_wrong_write_buffer_limits(plain_net: Net, given: dict[str, int]) -> None:
    client, _ = await plain_net.pair()
    with pytest.raises(ValueError, match=r"high \(.*\) must be >= low \(.*\) must be >= 0"):
        client.transport.set_write_buffer_limits(**given)


def fill(writer: Recorder, reader: Recorder) -> int:
    """Write to one that does not read, until writing is paused; how many bytes that took."""
    reader.transport.pause_reading()
    total = 0
    while "pause" not in writer.events:
        writer.transport.write(bytes(100_000))
        total += 100_000
    return total


async def test_writing_is_paused_and_resumed_once(net: Net) -> None:
    client, server = await net.pair()
    client.transport.set_write_buffer_limits(high=10_000, low=5_000)
    server.transport.pause_reading()
    total = 0
    while "pause" not in client.events:
        client.transport.write(bytes(50_000))
        total += 50_000
        await asyncio.sleep(0)
    assert client.transport.get_write_buffer_size() > 10_000
    client.transport.write(bytes(50_000))
    assert client.events.count("pause") == 1
    server.transport.resume_reading()
    await until(lambda: "resume" in client.events)
    assert client.transport.get_write_buffer_size() <= 5_000
    await until(lambda: len(server.received) == total + 50_000)
    assert client.events == ["made", "pause", "resume"]


async def test_writing_is_resumed_also_where_the_last_bytes_close(net: Net) -> None:
    """What waits in resume_writing() for its turn is not left waiting by close()."""
    client, server = await net.pair()
    total = fill(client, server)
    client.transport.close()
    server.transport.resume_reading()
    await soon(client.lost)
    await until(lambda: len(server.received) == total)
    # Over TLS the peer's answer to the close is an end of its side, which may be told.
    assert [event for event in client.events if event != "eof"] == [
        "made",
        "pause",
        "resume",
        "lost",
    ]


async def test_aborting_resumes_no_writing(net: Net) -> None:
    client, server = await net.pair()
    fill(client, server)
    client.transport.abort()
    await soon(client.lost)
    assert client.events == ["made", "pause", "lost"]


async def test_lower_limits_pause_at_once(plain_net: Net) -> None:
    client, server = await plain_net.pair()
    server.transport.pause_reading()
    client.transport.set_write_buffer_limits(high=10_000_000)
    for _ in range(100):
        client.transport.write(bytes(50_000))
    assert client.events == ["made"]
    client.transport.set_write_buffer_limits(high=1000)
    assert client.events == ["made", "pause"]


@uvsock_only
async def test_what_is_only_held_back_does_not_pause(net: Net) -> None:
    client, server = await net.pair()
    client.transport.set_write_buffer_limits(high=0)
    client.transport.write(b"x" * 100)
    client.transport.write(b"y" * 100)
    assert client.events == ["made"]  # the kernel had room for it
    await until(lambda: len(server.received) == 200)


@uvsock_only
async def test_pause_writing_that_raises_is_reported(
    plain_net: Net, loop_errors: list[dict[str, Any]]
) -> None:
    def fail(protocol: Recorder) -> None:
        raise ValueError("boom")

    client, server = await plain_net.pair(lambda: Recorder(pause=fail, resume=fail))
    total = fill(client, server)
    server.transport.resume_reading()
    await until(lambda: len(server.received) == total)
    await until(lambda: len(loop_errors) == 2)
    for error, event in zip(loop_errors, ("pause", "resume"), strict=True):
        assert error["message"] == f"protocol.{event}_writing() failed"
        assert str(error["exception"]) == "boom"
        assert error["transport"] is client.transport
        assert error["protocol"] is client


async def test_write_eof(plain_net: Net) -> None:
    client, server = await plain_net.pair(Recorder, lambda: Recorder(eof=lambda _: True))
    assert client.transport.can_write_eof()
    client.transport.write(b"last")
    client.transport.write_eof()
    client.transport.write_eof()
    await until(lambda: "eof" in server.events)
    assert server.received == b"last"
    with pytest.raises(RuntimeError, match=r"Cannot call write\(\) after write_eof\(\)"):
        client.transport.write(b"x")
    server.transport.write(b"late")  # eof_received() has returned True
    server.transport.close()
    await soon(client.lost)
    assert client.received == b"late"


@uvsock_only
async def test_write_eof_with_tls(tls_net: Net) -> None:
    # asyncio and uvloop cannot.
    client, server = await tls_net.pair(Recorder, lambda: Recorder(eof=lambda _: True))
    assert client.transport.can_write_eof()
    client.transport.write(b"last")
    client.transport.write_eof()
    await until(lambda: "eof" in server.events)
    assert server.received == b"last"
    server.transport.write(b"late")
    server.transport.close()
    await soon(client.lost)
    assert client.received == b"late"


@not_on_asyncio_312
async def test_writes_after_close_and_after_the_end_are_ignored(net: Net) -> None:
    client, server = await net.pair()
    client.transport.close()
    for _ in range(2):
        client.transport.write(b"x")
        client.transport.writelines([b"x"])
        assert client.transport.get_write_buffer_size() == 0
        client.transport.close()
        client.transport.pause_reading()
        client.transport.resume_reading()
        assert not client.transport.is_reading()
        await soon(client.lost)
    client.transport.abort()
    await soon(server.lost)
    assert server.received == b""


# ── Reading ────────────────────────────────────────────────────────────────────────────────────


async def test_pause_reading_in_connection_made_holds(net: Net) -> None:
    client, server = await net.pair(
        lambda: Recorder(made=lambda protocol: protocol.transport.pause_reading())
    )
    server.transport.write(b"data")
    await asyncio.sleep(0.03)
    assert client.received == b""
    assert not client.transport.is_reading()
    client.transport.resume_reading()
    client.transport.resume_reading()
    assert client.transport.is_reading()
    await until(lambda: client.received == b"data")


async def test_not_a_byte_comes_after_pause_reading(net: Net) -> None:
    def one(protocol: Recorder, data: bytes) -> None:
        protocol.transport.pause_reading()

    client, server = await net.pair(lambda: Recorder(data=one))
    sent = os.urandom(1_000_000)
    server.transport.write(sent)
    server.transport.write_eof() if server.transport.can_write_eof() else None
    while len(client.received) < len(sent):
        before = len(client.events)
        await asyncio.sleep(0.002)
        assert len(client.events) <= before + 1
        assert "eof" not in client.events
        client.transport.resume_reading()
    assert client.received == sent


async def test_a_protocol_can_be_replaced(net: Net) -> None:
    client, server = await net.pair()
    server.transport.write(b"old")
    await until(lambda: client.received == b"old")
    new = Buffered(7)
    client.transport.set_protocol(new)
    assert client.transport.get_protocol() is new
    server.transport.write(b"for a buffer")
    await until(lambda: new.received == b"for a buffer")
    third = Recorder()
    client.transport.set_protocol(third)
    server.transport.write(b"new")
    await until(lambda: third.received == b"new")
    client.transport.close()
    await soon(third.lost)
    await soon(server.lost)


@pytest.mark.parametrize("size", [1, 100, 1_000_000])
async def test_buffered_protocols(net: Net, size: int) -> None:
    client, server = await net.pair(lambda: Buffered(size))
    sent = os.urandom(20_000 if size == 1 else 500_000)
    server.transport.write(sent)
    await until(lambda: len(client.received) == len(sent), 20)
    assert client.received == sent
    server.transport.close()
    assert await soon(client.lost) is None


async def test_a_buffered_protocol_can_pause_and_go(net: Net) -> None:
    class Slow(Buffered):
        def buffer_updated(self, nbytes: int) -> None:
            super().buffer_updated(nbytes)
            self.transport.pause_reading()

    client, server = await net.pair(lambda: Slow(1000))
    sent = os.urandom(20_000)
    server.transport.write(sent)
    while len(client.received) < len(sent):
        before = len(client.received)
        await asyncio.sleep(0.001)
        assert len(client.received) <= before + 1000
        client.transport.resume_reading()
    assert client.received == sent


@uvsock_only
@pytest.mark.parametrize("buffer", [b"read-only", bytearray(), None, "raise"])
async def test_a_buffer_that_cannot_be_used(
    plain_net: Net, buffer: Any, loop_errors: list[dict[str, Any]]
) -> None:
    class Bad(Buffered):
        def get_buffer(self, sizehint: int) -> Any:
            if buffer == "raise":
                raise ValueError("boom")
            return buffer

    client, server = await plain_net.pair(Bad)
    server.transport.write(b"data")
    assert isinstance(await soon(client.lost), (BufferError, TypeError, RuntimeError, ValueError))
    assert "call failed" in loop_errors[0]["message"]
    await soon(server.lost)


@uvsock_only  # uvloop crashes
@pytest.mark.parametrize(
    "act",
    ["pause_reading", "close", "abort", "write_eof", "write", "set_protocol", "pause and close"],
)
async def test_get_buffer_may_do_anything(net: Net, act: str) -> None:
    class Acting(Buffered):
        calls = 0
        new: Recorder | None = None

        def get_buffer(self, sizehint: int) -> bytearray:
            self.calls += 1
            if self.calls > 1:
                return self.buffer
            if act == "set_protocol":
                self.new = Recorder()
                self.transport.set_protocol(self.new)
            elif act == "write":
                self.transport.write(b"written")
            else:
                for name in act.split(" and "):
                    getattr(self.transport, "pause_reading" if name == "pause" else name)()
            return self.buffer

    client, server = await net.pair(Acting, lambda: Recorder(eof=lambda _: True))
    server.transport.write(b"first")
    await until(lambda: client.calls)
    await asyncio.sleep(0.01)
    server.transport.write(b"second")
    if act == "pause_reading":
        await asyncio.sleep(0.01)
        assert client.received in (b"", b"first")  # this read was under way
        client.transport.resume_reading()
    if act == "set_protocol":
        await until(lambda: client.received + client.new.received == b"firstsecond")
        client.transport.abort()
        await soon(client.new.lost)
    elif "close" in act or act == "abort":
        if net.encrypted:
            server.transport.close()  # there close() waits for the peer to end too
        assert await soon(client.lost) is None
        assert client.received in (b"", b"first")
    else:
        await until(lambda: client.received == b"firstsecond")
        if act == "write":
            await until(lambda: server.received == b"written")
        if act == "write_eof":
            await until(lambda: "eof" in server.events)


async def test_a_duck_typed_buffered_protocol(tcp_net: Net) -> None:
    class Duck(asyncio.BaseProtocol):
        buffer = bytearray(10)
        received = b""

        def connection_made(self, transport: Any) -> None:
            self.transport = transport

        def get_buffer(self, sizehint: int) -> bytearray:
            return self.buffer

        def buffer_updated(self, nbytes: int) -> None:
            self.received += self.buffer[:nbytes]

    if not tcp_net.ours:
        return  # asyncio goes by the base class, uvloop by what is there
    client, server = await tcp_net.pair(Duck)
    server.transport.write(b"more than ten bytes")
    await until(lambda: client.received == b"more than ten bytes")


async def test_a_protocol_of_both_kinds_is_buffered(net: Net) -> None:
    class Both(asyncio.Protocol, Buffered):
        def data_received(self, data: bytes) -> None:
            raise AssertionError("not by data_received()")

    client, server = await net.pair(Both)
    server.transport.write(b"more than ten bytes")
    await until(lambda: client.received == b"more than ten bytes")


# ── Ending ─────────────────────────────────────────────────────────────────────────────────────


async def test_close_sends_everything_first(net: Net) -> None:
    client, server = await net.pair()
    server.transport.pause_reading()
    sent = os.urandom(1_000_000) * 20
    client.transport.write(sent)
    client.transport.close()
    await asyncio.sleep(0.01)
    assert "lost" not in client.events
    server.transport.resume_reading()
    await soon(server.lost)
    await soon(client.lost)
    assert server.received == sent
    assert client.error is None


async def test_abort_drops(net: Net) -> None:
    client, server = await net.pair()
    server.transport.pause_reading()
    client.transport.write(bytes(10_000_000))
    client.transport.abort()
    client.transport.abort()
    assert "lost" not in client.events
    assert await soon(client.lost) is None
    server.transport.resume_reading()
    await soon(server.lost)
    assert len(server.received) < 10_000_000


async def test_a_reset_is_an_error(net: Net) -> None:
    client, server = await net.pair()
    linger = struct.pack("ii", 1, 0)
    if net.kind == "unix":
        client.transport.abort()
        assert await soon(server.lost) is None
        return
    client.transport.get_extra_info("socket").setsockopt(
        socket.SOL_SOCKET, socket.SO_LINGER, linger
    )
    client.transport.abort()
    assert isinstance(await soon(server.lost), ConnectionResetError)


async def test_a_writer_learns_that_the_peer_has_gone(plain_net: Net) -> None:
    client, server = await plain_net.pair()
    server.transport.abort()
    await soon(server.lost)
    async with asyncio.timeout(5):
        while not client.transport.is_closing():
            client.transport.write(b"x" * 100_000)
            await asyncio.sleep(0)
    await soon(client.lost)


# ── Errors in callbacks ────────────────────────────────────────────────────────────────────────


def boom(*_: Any) -> None:
    raise ValueError("boom")


@pytest.mark.parametrize("event", ["data", "eof"])
async def test_a_callback_that_raises_ends_the_connection(
    net: Net, event: str, loop_errors: list[dict[str, Any]]
) -> None:
    client, server = await net.pair(Recorder, lambda: Recorder(**{event: boom}))
    client.transport.write(b"data")
    await until(lambda: "data" in server.events)
    client.transport.close()
    assert isinstance(await soon(server.lost), ValueError)
    await soon(client.lost)
    (report,) = loop_errors
    assert str(report["exception"]) == "boom"
    assert {"message", "exception", "transport", "protocol"} <= set(report)
    assert report["protocol"] is server or not net.ours
    if net.ours or not net.encrypted:
        assert report["message"] == f"Fatal error: protocol.{event}_received() call failed."


async def test_connection_made_that_raises(net: Net, loop_errors: list[dict[str, Any]]) -> None:
    await net.serve(echo)
    if net.encrypted:
        with pytest.raises(ValueError, match="boom"):
            await net.connect(lambda: Recorder(made=boom))
        await asyncio.sleep(0.01)
        return
    transport, client = await net.connect(lambda: Recorder(made=boom))
    transport.write(b"goes on")
    await until(lambda: client.received == b"goes on")
    transport.close()
    assert await soon(client.lost) is None
    assert str(loop_errors[0]["exception"]) == "boom"


async def test_connection_lost_that_raises_is_reported(
    net: Net, loop_errors: list[dict[str, Any]]
) -> None:
    client, server = await net.pair(lambda: Recorder(lost=boom))
    client.transport.close()
    await soon(client.lost)
    await soon(server.lost)
    await until(lambda: loop_errors)
    assert str(loop_errors[0]["exception"]) == "boom"


@uvsock_only
async def test_a_factory_that_raises_disconnects_the_client(
    plain_net: Net, loop_errors: list[dict[str, Any]]
) -> None:
    calls = []

    def factory() -> Recorder:
        calls.append(1)
        if len(calls) == 1:
            raise ValueError("boom")
        return echo()

    await plain_net.serve(factory)
    with plain_net.dial() as sock:
        assert await asyncio.to_thread(sock.recv, 1) == b""
    _, client = await plain_net.connect(Recorder)  # the server goes on
    client.transport.write(b"x")
    await until(lambda: client.received == b"x")
    assert str(loop_errors[0]["exception"]) == "boom"


LEAVING = """
import asyncio, contextlib, ssl, sys, uvsock
event, encrypted, folder = sys.argv[1], sys.argv[2] == "tls", sys.argv[3]

def leave(now):
    if now == event:
        raise SystemExit(7)

class Leaving(asyncio.Protocol):
    def connection_made(self, transport): leave("made")
    def data_received(self, data): leave("data")
    def eof_received(self): leave("eof")
    def connection_lost(self, exc): leave("lost")

async def main():
    loop = asyncio.get_running_loop()
    loop.set_exception_handler(lambda _, context: print("reported", context))
    serving, options = None, {}
    if encrypted:
        serving = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        serving.load_cert_chain(folder + "/cert", folder + "/key")
        connecting = ssl.create_default_context(cafile=folder + "/ca")
        options = {"ssl": connecting, "server_hostname": "localhost"}
    server = await loop.create_server(Leaving, "127.0.0.1", 0, ssl=serving)
    address = server.sockets[0].getsockname()
    transport, _ = await loop.create_connection(asyncio.Protocol, *address, **options)
    transport.write(b"x")
    await asyncio.sleep(0.05)
    transport.close()
    await asyncio.sleep(10)

runner = asyncio.Runner(loop_factory=uvsock.new_event_loop)
try:
    runner.run(main())
except SystemExit as exit:
    print("left with", exit)
with contextlib.suppress(SystemExit):
    runner.close()
"""


@pytest.mark.parametrize("event", ["made", "data", "eof", "lost"])
@pytest.mark.parametrize("kind", ["tcp", "tls"])
def test_an_exit_leaves_the_loop(
    event: str, kind: str, authority: Authority, tmp_path: Path
) -> None:
    (tmp_path / "ca").write_bytes(authority.ca_pem)
    for name, pem in authority.server_options.items():
        (tmp_path / name).write_bytes(pem)
    # Connections are left open, and uvloop cannot close its loop where warnings are errors.
    said = run_python("-c", LEAVING, event, kind, str(tmp_path), warnings="ignore")
    assert said == "left with 7\n"


# ── TLS ────────────────────────────────────────────────────────────────────────────────────────


async def test_a_certificate_that_is_not_trusted(tls_net: Net) -> None:
    made: list[Recorder] = []

    def factory() -> Recorder:
        made.append(Recorder())
        return made[-1]

    await tls_net.serve(factory)
    client = Recorder()
    with pytest.raises(ssl.SSLCertVerificationError, match="certificate verify failed"):
        await tls_net.connect(lambda: client, ssl=ssl.create_default_context())
    with pytest.raises(ssl.SSLCertVerificationError, match="Hostname mismatch"):
        await tls_net.connect(lambda: client, server_hostname="other.test")
    await asyncio.sleep(0.02)
    assert client.events == []
    assert all(protocol.events == [] for protocol in made)


async def test_server_hostname_may_be_empty(tls_net: Net) -> None:
    await tls_net.serve(echo)
    context = tls_net.authority.client_context(check_hostname=False)
    _, client = await tls_net.connect(Recorder, ssl=context, server_hostname="")
    client.transport.write(b"x")
    await until(lambda: client.received == b"x")


async def test_a_peer_that_goes_in_the_handshake(tcp_net: Net) -> None:
    await tcp_net.serve(lambda: Recorder(data=lambda protocol, _: protocol.transport.abort()))
    with pytest.raises(ConnectionResetError):
        await tcp_net.connect(
            Recorder, ssl=tcp_net.authority.client_context(), server_hostname=SERVER_NAME
        )


async def test_a_handshake_that_takes_too_long(tcp_net: Net) -> None:
    await tcp_net.serve(Recorder)
    with pytest.raises(ConnectionAbortedError, match="SSL handshake is taking longer than 0.05"):
        await tcp_net.connect(
            Recorder,
            ssl=tcp_net.authority.client_context(),
            server_hostname=SERVER_NAME,
            ssl_handshake_timeout=0.05,
        )


async def test_a_server_gives_up_slow_handshakes(tls_net: Net) -> None:
    await tls_net.serve(Recorder, ssl_handshake_timeout=0.05)
    with tls_net.dial() as sock:
        assert await asyncio.to_thread(sock.recv, 1) == b""


async def test_a_peer_without_close_notify(tls_net: Net) -> None:
    made: list[Recorder] = []

    def factory() -> Recorder:
        made.append(Recorder())
        return made[-1]

    await tls_net.serve(factory)

    def truncate() -> None:
        with tls_net.dial() as sock:
            secure = tls_net.authority.client_context().wrap_socket(
                sock, server_hostname=SERVER_NAME
            )
            secure.sendall(b"cut off")
            secure.shutdown(socket.SHUT_RDWR)  # a FIN, and no close_notify
            secure.close()

    await asyncio.to_thread(truncate)
    await until(lambda: made and made[0].lost.done())
    assert made[0].events == ["made", "data", "eof", "lost"]
    assert made[0].received == b"cut off"
    assert made[0].error is None


async def test_a_peer_that_does_not_answer_close_notify(tls_net: Net) -> None:
    made: list[Recorder] = []

    def factory() -> Recorder:
        made.append(Recorder(data=lambda protocol, _: protocol.transport.close()))
        return made[-1]

    await tls_net.serve(factory, ssl_shutdown_timeout=0.1)

    def silent() -> None:
        with tls_net.dial() as sock:
            secure = tls_net.authority.client_context().wrap_socket(
                sock, server_hostname=SERVER_NAME, suppress_ragged_eofs=True
            )
            secure.sendall(b"x")
            assert secure.recv(1) == b""  # the server's close_notify
            raw = socket.socket(fileno=secure.detach())
            raw.settimeout(5)
            assert raw.recv(1) == b""  # and, after the timeout, its FIN
            raw.close()

    await asyncio.to_thread(silent)
    await until(lambda: made and made[0].lost.done())
    assert isinstance(made[0].error, TimeoutError)
    assert "SSL shutdown timed out" in str(made[0].error)


async def test_the_context_is_freed_without_the_collector(tls_net: Net) -> None:
    context = tls_net.authority.client_context()
    await tls_net.serve(echo)
    _, client = await tls_net.connect(Recorder, ssl=context)
    client.transport.close()
    await soon(client.lost)
    seen = weakref.ref(context)
    tls_net.transports.clear()
    del context, client, _
    gc.disable()
    try:
        await asyncio.sleep(0.01)
        assert seen() is None or not tls_net.ours
    finally:
        gc.enable()


@uvsock_only  # asyncio's own leaks the socket
@pytest.mark.parametrize("name", ["ssl_handshake_timeout", "ssl_shutdown_timeout"])
async def test_wrong_tls_timeouts(tls_net: Net, name: str) -> None:
    await tls_net.serve(echo)
    with pytest.raises(ValueError, match=f"{name} should be a positive number, got 0"):
        await tls_net.connect(Recorder, **{name: 0})
    plain = {"ssl": None, "server_hostname": None}
    with pytest.raises(ValueError, match=f"{name} is only meaningful with ssl"):
        await tls_net.connect(Recorder, **plain, **{name: 1})


async def test_a_protocol_without_data_received(net: Net, loop_errors: list[Any]) -> None:
    class Deaf(asyncio.BaseProtocol):
        def __init__(self) -> None:
            self.lost = net.loop.create_future()

        def connection_made(self, transport: Any) -> None:
            self.transport = transport

        def connection_lost(self, exc: Exception | None) -> None:
            self.lost.set_result(exc)

    client, server = await net.pair(Recorder, Deaf)
    client.transport.write(b"x")
    assert isinstance(await soon(server.lost), AttributeError)
    await soon(client.lost)
    assert [error["message"] for error in loop_errors] == [
        "Fatal error: protocol.data_received() call failed."
    ]


async def test_data_received_may_be_replaced(net: Net) -> None:
    client, server = await net.pair()
    client.transport.write(b"one")
    await until(lambda: server.received == b"one")
    later: list[bytes] = []
    server.data_received = later.append
    client.transport.write(b"two")
    await until(lambda: later == [b"two"])


async def test_write_eof_after_the_peers(plain_net: Net) -> None:
    """The peer has half-closed first; then this side ends without closing."""
    client, server = await plain_net.pair(
        lambda: Recorder(eof=lambda protocol: True), lambda: Recorder(eof=lambda protocol: True)
    )
    client.transport.write_eof()
    await until(lambda: "eof" in server.events)
    server.transport.write(b"reply")
    server.transport.write_eof()
    await until(lambda: "eof" in client.events)
    assert client.received == b"reply"
    assert not server.lost.done()


async def test_is_closing_is_a_bool(net: Net) -> None:
    client, _ = await net.pair()
    assert client.transport.is_closing() is False
    client.transport.close()
    assert client.transport.is_closing() is True


@uvsock_only
async def test_other_threads_are_told_and_harm_nobody(net: Net) -> None:
    net.loop.set_debug(True)
    client, _ = await net.pair(Recorder, echo)
    transport = client.transport
    for call in (
        lambda: transport.write(b"x"),
        lambda: transport.writelines([b"x"]),
        transport.write_eof,
        transport.close,
        transport.abort,
        transport.pause_reading,
        transport.resume_reading,
        lambda: transport.set_protocol(client),
        transport.set_write_buffer_limits,
    ):
        with pytest.raises(RuntimeError, match="call_soon_threadsafe"):
            await asyncio.to_thread(call)
    assert await asyncio.to_thread(transport.is_closing) is False
    transport.write(b"after")
    await until(lambda: client.received == b"after")


@uvsock_only
async def test_a_server_closed_while_it_accepts(plain_net: Net) -> None:
    """The connection ends, and the protocol is never made."""
    made: list[Recorder] = []

    def factory() -> Recorder:
        made.append(Recorder())
        return made[-1]

    server = await plain_net.serve(factory)
    with plain_net.dial() as sock:
        await asyncio.sleep(0)  # it is accepted now, and connection_made() is still to come
        server.close()
        received = b""
        with contextlib.suppress(ConnectionResetError):
            received = await asyncio.to_thread(sock.recv, 1)
    assert received == b""
    assert made == []
    await soon(server.wait_closed())


@uvsock_only
@pytest.mark.parametrize("end", ["abort", "close"])
async def test_sendfile_ends_with_the_transport(plain_net: Net, tmp_path: Path, end: str) -> None:
    path = tmp_path / "file"
    size = 50_000_000
    with path.open("wb") as file:
        file.truncate(size)
    client, server = await plain_net.pair(Recorder)
    client.transport.pause_reading()
    with path.open("rb") as file:
        task = asyncio.create_task(plain_net.loop.sendfile(server.transport, file))
        await asyncio.sleep(0.05)
        getattr(server.transport, end)()
        with pytest.raises(ConnectionError):
            await soon(task)
    await soon(server.lost)
    client.transport.resume_reading()
    await soon(client.lost)
    assert len(client.received) < size


@uvsock_only
@pytest.mark.parametrize(
    ("limits", "expected"),
    [
        ({"high": 1.5}, (0, 1)),
        ({"high": 2**70}, (sys.maxsize, sys.maxsize)),
        ({"low": 2**62}, (2**62, sys.maxsize)),
    ],
)
async def test_odd_write_buffer_limits(
    tcp_net: Net, limits: dict[str, Any], expected: tuple[int, int]
) -> None:
    client, _ = await tcp_net.pair()
    client.transport.set_write_buffer_limits(**limits)
    assert client.transport.get_write_buffer_limits() == expected


async def test_start_tls(plain_net: Net) -> None:
    loop = plain_net.loop
    done: asyncio.Future[Any] = loop.create_future()

    def starttls(protocol: Recorder, data: bytes) -> None:
        if data == b"STARTTLS":
            protocol.transport.write(b"OK")
            task = loop.create_task(
                loop.start_tls(
                    protocol.transport,
                    protocol,
                    plain_net.authority.server_context(),
                    server_side=True,
                )
            )
            task.add_done_callback(lambda task: done.set_result(task.result()))

    client, server = await plain_net.pair(Recorder, lambda: Recorder(data=starttls))
    plain = client.transport
    plain.write(b"STARTTLS")
    await until(lambda: client.received == b"OK")
    secure = await soon(
        loop.start_tls(
            plain,
            client,
            plain_net.authority.client_context(),
            server_hostname=SERVER_NAME,
        )
    )
    plain_net.transports.append(secure)
    assert "SSL" in secure.__class__.__name__
    assert not plain.is_closing()
    served = await soon(done)
    served.write(b"secret")
    await until(lambda: client.received == b"OKsecret")
    assert secure.get_extra_info("peercert")["subjectAltName"][0] == ("DNS", SERVER_NAME)
    secure.write(b"!" * 100_000)
    await until(lambda: len(server.received) == 8 + 100_000)
    secure.close()
    await soon(client.lost)
    await soon(server.lost)
    assert client.events.count("made") == 1


async def test_start_tls_that_fails(plain_net: Net) -> None:
    client, server = await plain_net.pair(Recorder, echo)
    context = plain_net.authority.client_context()
    with pytest.raises(ssl.SSLError):
        # The server sends everything back, which is no answer.
        await soon(plain_net.loop.start_tls(client.transport, client, context, server_hostname="x"))
    await soon(server.lost)
    await soon(client.lost)


async def test_start_tls_that_is_cancelled(plain_net: Net) -> None:
    client, server = await plain_net.pair()
    context = plain_net.authority.client_context()
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(
            plain_net.loop.start_tls(client.transport, client, context, server_hostname="x"), 0.05
        )
    await soon(server.lost)


@uvsock_only
async def test_a_cancelled_start_tls_is_not_blamed_on_the_peer(plain_net: Net) -> None:
    client, server = await plain_net.pair()
    context = plain_net.authority.client_context()
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(
            plain_net.loop.start_tls(client.transport, client, context, server_hostname="x"), 0.05
        )
    assert await soon(client.lost) is None
    await soon(server.lost)


async def test_start_tls_of_something_else(plain_net: Net) -> None:
    client, _ = await plain_net.pair()
    context = plain_net.authority.client_context()
    with pytest.raises(TypeError, match="SSLContext, got"):
        await plain_net.loop.start_tls(client.transport, client, None)
    with pytest.raises(TypeError, match="is not supported"):
        await plain_net.loop.start_tls(None, client, context)


async def test_tls_in_tls(tls_net: Net) -> None:
    loop = tls_net.loop
    inner: asyncio.Future[Any] = loop.create_future()

    def starttls(protocol: Recorder, data: bytes) -> None:
        if data == b"again":
            protocol.overrides = {}
            task = loop.create_task(
                loop.start_tls(
                    protocol.transport,
                    protocol,
                    tls_net.authority.server_context(),
                    server_side=True,
                )
            )
            task.add_done_callback(lambda task: inner.set_result(task.result()))

    client, server = await tls_net.pair(Recorder, lambda: Recorder(data=starttls))
    client.transport.write(b"again")
    await until(lambda: server.received == b"again")
    secure = await soon(
        loop.start_tls(
            client.transport,
            client,
            tls_net.authority.client_context(),
            server_hostname=SERVER_NAME,
        )
    )
    served = await soon(inner)
    secure.write(b"in two envelopes")
    await until(lambda: server.received == b"againin two envelopes")
    served.write(b"and back")
    await until(lambda: client.received == b"and back")
    secure.close()
    await soon(client.lost)
    await soon(server.lost)


# ── Files ──────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def content(tmp_path: Path) -> tuple[Path, bytes]:
    data = os.urandom(700_000)
    path = tmp_path / "file"
    path.write_bytes(data)
    return path, data


@pytest.mark.parametrize(("offset", "count"), [(0, None), (100_000, None), (5, 300_000)])
async def test_sendfile(
    net: Net, content: tuple[Path, bytes], offset: int, count: int | None
) -> None:
    path, data = content
    wanted = data[offset:] if count is None else data[offset : offset + count]
    client, server = await net.pair()
    client.transport.write(b"before ")
    with path.open("rb") as file:
        sent = await soon(net.loop.sendfile(client.transport, file, offset, count))
        assert sent == len(wanted)
        assert file.tell() == offset + sent
    client.transport.write(b" after")
    client.transport.close()
    await soon(server.lost)
    assert server.received == b"before " + wanted + b" after"


async def test_sendfile_without_a_fallback(tls_net: Net, content: tuple[Path, bytes]) -> None:
    client, _ = await tls_net.pair()
    with content[0].open("rb") as file, pytest.raises(RuntimeError, match="fallback is disabled"):
        await tls_net.loop.sendfile(client.transport, file, fallback=False)


async def test_writes_are_refused_while_a_file_is_sent(
    plain_net: Net, content: tuple[Path, bytes]
) -> None:
    client, server = await plain_net.pair()
    server.transport.pause_reading()
    with content[0].open("rb") as file:
        sending = asyncio.ensure_future(plain_net.loop.sendfile(client.transport, file))
        await asyncio.sleep(0)
        with pytest.raises(RuntimeError, match="sendfile is in progress"):
            client.transport.write(b"in between")
        server.transport.resume_reading()
        assert await soon(sending) == len(content[1])
    await until(lambda: len(server.received) == len(content[1]))
    assert server.received == content[1]


async def test_sendfile_to_a_peer_that_goes(plain_net: Net, content: tuple[Path, bytes]) -> None:
    client, server = await plain_net.pair()
    server.transport.abort()
    await soon(client.lost)
    with content[0].open("rb") as file, pytest.raises(RuntimeError, match="is closing"):
        await plain_net.loop.sendfile(client.transport, file)


# ── Connecting and serving ─────────────────────────────────────────────────────────────────────


async def test_arguments_are_asyncios(tcp_net: Net) -> None:
    loop = tcp_net.loop
    await tcp_net.serve(echo)
    for options, message in (
        ({"host": None, "port": None}, "host and port was not specified and no sock specified"),
        ({"host": "x", "port": 1, "server_hostname": "x"}, "only meaningful with ssl"),
    ):
        with pytest.raises(ValueError, match=message):
            await loop.create_connection(Recorder, **options)
    with pytest.raises(TypeError, match="must be an SSLContext or None"):
        await loop.create_server(Recorder, "127.0.0.1", 0, ssl=True)
    with pytest.raises(ValueError, match="Neither host/port nor sock were specified"):
        await loop.create_server(Recorder)


async def test_a_refused_connection_names_the_address(tcp_net: Net) -> None:
    port = unused_port()
    with pytest.raises(ConnectionRefusedError, match=rf"Connect call failed .*{port}"):
        await tcp_net.loop.create_connection(Recorder, "127.0.0.1", port)


async def test_an_address_in_use_is_named(tcp_net: Net) -> None:
    await tcp_net.serve(echo)
    with pytest.raises(OSError, match="error while attempting to bind on address"):
        await tcp_net.loop.create_server(echo, *tcp_net.address, reuse_address=False)


async def test_local_address(tcp_net: Net) -> None:
    peers: list[Any] = []
    await tcp_net.serve(
        lambda: Recorder(made=lambda p: peers.append(p.transport.get_extra_info("peername")))
    )
    await tcp_net.connect(Recorder, local_addr=("127.0.0.2", 0))
    await until(lambda: peers)
    assert peers[0][0] == "127.0.0.2"


async def test_happy_eyeballs(tcp_net: Net, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second address is tried while the first has not answered; without a delay it is not."""
    await tcp_net.serve(echo)
    loop = tcp_net.loop
    slow = ("127.0.0.1", 1)

    resolving = loop.getaddrinfo

    async def getaddrinfo(host: Any, *arguments: Any, **options: Any) -> Any:
        if host != "two.test":
            return await resolving(host, *arguments, **options)
        kind = (socket.AF_INET, socket.SOCK_STREAM, 6, "")
        return [(*kind, slow), (*kind, tcp_net.address)]

    connecting = type(loop).sock_connect

    async def sock_connect(sock: socket.socket, address: Any) -> None:
        if address == slow:
            await asyncio.sleep(30)
        await connecting(loop, sock, address)

    monkeypatch.setattr(loop, "getaddrinfo", getaddrinfo)
    monkeypatch.setattr(loop, "sock_connect", sock_connect)
    transport, client = await soon(
        loop.create_connection(Recorder, "two.test", 80, happy_eyeballs_delay=0.01)
    )
    tcp_net.transports.append(transport)
    transport.write(b"x")
    await until(lambda: client.received == b"x")
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(loop.create_connection(Recorder, "two.test", 80), 0.1)


async def test_a_socket_of_ones_own(plain_net: Net) -> None:
    await plain_net.serve(echo)
    sock = plain_net.dial()
    transport, client = await plain_net.loop.create_connection(Recorder, sock=sock)
    assert sock.fileno() >= 0
    transport.write(b"x")
    await until(lambda: client.received == b"x")
    transport.close()
    await soon(client.lost)
    assert sock.fileno() == -1


@uvsock_only
async def test_a_cancelled_connection_takes_its_socket_along(tcp_net: Net) -> None:
    # Closed by the transport: a later close() by its owner must not hit another descriptor.
    await tcp_net.serve(Recorder)
    sock = tcp_net.dial()
    context = tcp_net.authority.client_context()
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(
            tcp_net.loop.create_connection(
                Recorder, sock=sock, ssl=context, server_hostname=SERVER_NAME
            ),
            0.05,
        )
    assert sock.fileno() == -1


async def test_connect_accepted_socket(net: Net) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        options: dict[str, Any] = {}
        if net.encrypted:
            options = {
                "ssl": net.authority.client_context(),
                "server_hostname": SERVER_NAME,
            }
        dialing = asyncio.ensure_future(
            net.loop.create_connection(Recorder, *listening.getsockname(), **options)
        )
        accepted, _ = await asyncio.to_thread(listening.accept)
    context = net.authority.server_context() if net.encrypted else None
    transport, server = await soon(net.loop.connect_accepted_socket(echo, accepted, ssl=context))
    net.transports.append(transport)
    peer, client = await soon(dialing)
    peer.write(b"x")
    await until(lambda: client.received == b"x")
    peer.close()
    await soon(server.lost)


async def test_servers(net: Net) -> None:
    server = await net.serve(echo, start_serving=False)
    assert isinstance(server, asyncio.AbstractServer)
    assert not server.is_serving()
    await server.start_serving()
    await server.start_serving()
    assert server.is_serving()
    assert isinstance(server.sockets, tuple)
    (listening,) = server.sockets
    assert listening.fileno() >= 0
    _, client = await net.connect(Recorder)
    client.transport.write(b"x")
    await until(lambda: client.received == b"x")
    server.close()
    server.close()
    assert server.sockets == ()
    assert not server.is_serving()
    with pytest.raises(RuntimeError, match="is closed"):
        await server.serve_forever()
    client.transport.write(b"y")
    await until(lambda: client.received == b"xy")  # connections go on
    client.transport.close()
    await soon(client.lost)


async def test_serve_forever_ends_with_its_task(net: Net) -> None:
    server = await net.serve(echo)
    serving = asyncio.ensure_future(server.serve_forever())
    await asyncio.sleep(0.01)
    serving.cancel()
    with pytest.raises(asyncio.CancelledError):
        await soon(serving)
    assert not server.is_serving()


@pytest.mark.skipif(sys.version_info < (3, 12, 1), reason="earlier it did not wait")
async def test_wait_closed_waits_for_connections(net: Net) -> None:
    server = await net.serve(echo)
    client = await connected_to_echo(net)
    server.close()
    waiting = asyncio.ensure_future(server.wait_closed())
    await asyncio.sleep(0.02)
    assert not waiting.done()
    client.transport.close()
    await soon(waiting)


async def connected_to_echo(net: Net) -> Any:
    """A client that the server has answered."""
    _, client = await net.connect(Recorder)
    client.transport.write(b"x")
    await until(lambda: client.received == b"x")
    return client


@uvsock_only
@pytest.mark.skipif(sys.version_info < (3, 12, 1), reason="earlier it did not wait")
async def test_wait_closed_waits_for_the_last_connection(net: Net) -> None:
    """Also where there was none for a while, and where the factory has failed for one."""
    broken = False

    def factory() -> Recorder:
        if broken:
            raise SyntaxError("no protocol")
        return echo()

    server = await net.serve(factory)
    first = await connected_to_echo(net)
    first.transport.close()
    await soon(first.lost)

    told: list[Any] = []
    net.loop.set_exception_handler(lambda loop, context: told.append(context["exception"]))
    broken = True
    with net.dial():
        await until(lambda: told)
    broken = False
    net.loop.set_exception_handler(None)
    assert type(told[0]) is SyntaxError

    clients = [await connected_to_echo(net) for _ in range(3)]
    server.close()
    waiting = asyncio.ensure_future(server.wait_closed())
    for client in clients:
        await asyncio.sleep(0.02)
        assert not waiting.done()
        client.transport.close()
        await soon(client.lost)
    await soon(waiting)


@pytest.mark.skipif(sys.version_info < (3, 13), reason="new in Python 3.13")
@pytest.mark.parametrize("how", ["close_clients", "abort_clients"])
async def test_a_server_ends_its_connections(net: Net, how: str) -> None:
    server: Any = await net.serve(echo)
    clients = [await connected_to_echo(net) for _ in range(3)]
    server.close()
    getattr(server, how)()
    await soon(server.wait_closed())
    for client in clients:
        await soon(client.lost)


@uvsock_only
@pytest.mark.parametrize("cleanup", [True, False])
async def test_the_file_of_a_unix_server(unix_wire: Wire, cleanup: bool) -> None:
    net = Net(unix_wire)
    server = await net.serve(echo, cleanup_socket=cleanup)
    server.close()
    await server.wait_closed()
    assert os.path.exists(net.path) != cleanup
    if cleanup:
        server = await net.serve(echo, cleanup_socket=True)
        os.unlink(net.path)
        Path(net.path).touch()  # somebody else's now
        server.close()
        assert os.path.exists(net.path)
    await net.close()


async def test_descriptors_of_transports_are_not_watched(tcp_net: Net) -> None:
    client, _ = await tcp_net.pair()
    sock = client.transport.get_extra_info("socket")
    for watch in (tcp_net.loop.add_reader, tcp_net.loop.add_writer):
        with pytest.raises(RuntimeError, match="is used by transport"):
            watch(sock.fileno(), print)


async def test_a_thousand_connections_leave_nothing(net: Net) -> None:
    made: list[weakref.ref[Any]] = []
    await net.serve(echo)
    for _ in range(20):
        together = [await net.connect(Recorder) for _ in range(5)]
        for transport, _protocol in together:
            transport.write(b"x")
        for transport, protocol in together:
            while protocol.received != b"x":
                await asyncio.sleep(0.001)
            made.append(weakref.ref(transport))
            transport.close()
            await soon(protocol.lost)
        net.transports.clear()
        del together, transport, protocol, _protocol
    gc.collect()
    assert not [ref for ref in made if ref() is not None]


# ── The loop ───────────────────────────────────────────────────────────────────────────────────


@uvsock_only
async def test_the_loop_is_uvloops() -> None:
    loop = asyncio.get_running_loop()
    assert isinstance(loop, uvsock.Loop)
    assert isinstance(loop, uvloop.Loop)


@uvsock_only
async def test_uvsocks_own_sockets_run_on_it() -> None:
    def data(socket: uvsock.Socket[Any], data: bytes) -> None:
        socket.write(data)

    received = bytearray()
    async with await uvsock.listen({"data": data}, "127.0.0.1", 0) as listener:
        client = await uvsock.connect(
            {"data": lambda _, data: received.extend(data)}, "127.0.0.1", listener.port
        )
        client.write(b"x")
        await until(lambda: received == b"x")
        client.close()


def test_run_is_on_it() -> None:
    assert (
        run_python(
            "-c",
            """
import asyncio, uvsock
async def main(): return isinstance(asyncio.get_running_loop(), uvsock.Loop)
print(uvsock.run(main()))
""",
        )
        == "True\n"
    )


def test_install() -> None:
    assert (
        run_python(
            "-c",
            """
import asyncio, sys, uvsock, warnings
if sys.version_info >= (3, 12):
    try:
        uvsock.install()
    except DeprecationWarning as warning:
        assert "loop_factory" in str(warning)
    else:
        print("no warning")
warnings.simplefilter("ignore", DeprecationWarning)
uvsock.install()
async def main(): return isinstance(asyncio.get_running_loop(), uvsock.Loop)
print(asyncio.run(main()))
""",
        )
        == "True\n"
    )


async def test_lines_by_asyncios_streams(net: Net) -> None:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        async for line in reader:
            writer.write(line.upper())
            await writer.drain()
        writer.close()
        await writer.wait_closed()

    def factory() -> asyncio.StreamReaderProtocol:
        return asyncio.StreamReaderProtocol(asyncio.StreamReader(), serve)

    await net.serve(factory)
    options: dict[str, Any] = {}
    if net.encrypted:
        options = {"ssl": net.authority.client_context(), "server_hostname": SERVER_NAME}
    if net.kind == "unix":
        reader, writer = await asyncio.open_unix_connection(net.path)
    else:
        reader, writer = await asyncio.open_connection(*net.address, **options)
    writer.writelines([b"one\n", b"two\n"])
    assert [await soon(reader.readline()) for _ in range(2)] == [b"ONE\n", b"TWO\n"]
    writer.close()
    await soon(writer.wait_closed())


# ── Context variables ──────────────────────────────────────────────────────────────────────────


class BufferedRecorder(Recorder, asyncio.BufferedProtocol):
    """The same as a buffered protocol."""

    buffer = bytearray(100)

    def get_buffer(self, sizehint: int) -> bytearray:
        return self.buffer

    def buffer_updated(self, nbytes: int) -> None:
        self.data_received(self.buffer[:nbytes])


@uvsock_only
@pytest.mark.parametrize("kind", [Recorder, BufferedRecorder])
async def test_what_a_connection_sets_in_its_context_is_its_own(net: Net, kind: type[Any]) -> None:
    """Each call of its protocol sees what the calls before it have set, and nobody else does."""
    path: contextvars.ContextVar[str] = contextvars.ContextVar("path", default="")
    paths: dict[Any, list[str]] = {}

    def note(step: str) -> Callable[..., None]:
        def call(protocol: Any, *arguments: Any) -> None:
            path.set(path.get() + step)
            paths.setdefault(protocol, []).append(path.get())

        return call

    steps = {"made": "m", "data": "d", "pause": "p", "resume": "r", "eof": "e", "lost": "l"}

    def factory() -> Any:
        path.set(path.get() + "f")
        return kind(**{event: note(step) for event, step in steps.items()})

    path.set(">")
    await net.serve(factory)
    clients = []
    for _ in range(3):
        transport, client = await net.connect(lambda: Recorder(made=note("m"), lost=note("l")))
        transport.write(b"x")
        await until(lambda: len(paths) == 2 * len(clients) + 2)
        clients.append(client)
    servers = [protocol for protocol in paths if protocol not in clients]
    await until(lambda: all(">fmd" in paths[server] for server in servers))
    sent = 0
    for server in servers:
        server.transport.set_write_buffer_limits(high=1000)
        while "pause" not in server.events:
            server.transport.write(bytes(100_000))
            sent += 100_000
    await until(lambda: all(">fmdpr" in paths[server] for server in servers))
    # A client that closes with something unread resets its connection.
    await until(lambda: sum(len(client.received) for client in clients) == sent)
    for client in clients:
        client.transport.close()
        await soon(client.lost)
    for server in servers:
        await soon(server.lost)
        assert paths[server] == [">fmdpre"[: 3 + n] for n in range(5)] + [">fmdprel"]
    assert [paths[client] for client in clients] == [[">m", ">ml"]] * 3
    assert path.get() == ">"


@uvsock_only
async def test_what_an_sni_callback_sets_is_its_connections(tls_net: Net) -> None:
    asked: contextvars.ContextVar[str] = contextvars.ContextVar("asked", default="")
    seen: list[str] = []

    def choose(sslobj: Any, name: str, context: Any) -> None:
        seen.append(asked.get())
        asked.set(name)

    context = tls_net.authority.server_context()
    context.sni_callback = choose
    factory = functools.partial(Recorder, made=lambda *_: seen.append(asked.get()))
    await tls_net.serve(factory, ssl=context)
    for _ in range(2):
        await tls_net.connect(Recorder)
    await until(lambda: len(seen) == 4)
    assert seen == ["", SERVER_NAME] * 2


@uvsock_only
async def test_what_a_streams_callback_sets_is_its_connections(net: Net) -> None:
    tenant: contextvars.ContextVar[str] = contextvars.ContextVar("tenant", default="none")
    seen: list[str] = []

    def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> Any:
        seen.append(tenant.get())
        tenant.set("callback")
        return asyncio.ensure_future(serve(reader, writer))

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        seen.append(tenant.get())
        tenant.set("task")
        await reader.read()
        writer.close()

    options: dict[str, Any] = {}
    if net.encrypted:
        options["ssl"] = net.authority.server_context()
    if net.kind == "unix":
        server = await uvsock.start_unix_server(connected, net.path, **options)
    else:
        server = await uvsock.start_server(connected, "127.0.0.1", 0, **options)
    net.servers.append(server)
    for _ in range(3):
        _, client = await net.connect(Recorder)
        client.transport.write(b"x")
    await until(lambda: len(seen) == 6)
    for transport in net.transports:
        transport.close()
    assert seen == ["none", "callback"] * 3


@uvsock_only
async def test_a_stream_that_its_callback_waits_for_otherwise(net: Net) -> None:
    """What fails in it is told as for a coroutine, and the connection closed."""

    class Serving:
        def __init__(self, writer: asyncio.StreamWriter) -> None:
            self.writer = writer

        def __await__(self) -> Any:
            self.writer.write(b"served")
            yield from asyncio.sleep(0).__await__()
            self.writer.close()

    options: dict[str, Any] = {"ssl": net.authority.server_context()} if net.encrypted else {}
    if net.kind == "unix":
        server = await uvsock.start_unix_server(lambda r, w: Serving(w), net.path, **options)
    else:
        server = await uvsock.start_server(lambda r, w: Serving(w), "127.0.0.1", 0, **options)
    net.servers.append(server)
    _, client = await net.connect(Recorder)
    await soon(client.lost)
    assert client.received == b"served"


# --- TLS that is started later, and what goes on meanwhile ------------------------------------


@uvsock_only
async def test_a_peer_that_reads_has_no_more_time_for_its_handshake(plain_net: Net) -> None:
    client, server = await plain_net.pair()
    server.transport.write(b"z" * (16 << 20))
    starting = asyncio.ensure_future(
        plain_net.loop.start_tls(
            server.transport,
            server,
            plain_net.authority.server_context(),
            server_side=True,
            ssl_handshake_timeout=0.3,
        )
    )
    await asyncio.sleep(0)
    server.transport.write_eof()
    with pytest.raises(ConnectionAbortedError, match="SSL handshake is taking longer than 0.3"):
        await soon(starting)
    assert len(client.received) > 0
    await soon(server.lost)
    client.transport.abort()
    await soon(client.lost)


@uvsock_only
async def test_start_tls_is_refused_while_a_file_is_sent(plain_net: Net, tmp_path: Path) -> None:
    """What is left of the file would leave in the clear, behind the ClientHello."""
    path = tmp_path / "file"
    path.write_bytes(b"secret" * (4 << 20))
    client, server = await plain_net.pair()
    server.transport.pause_reading()
    context = plain_net.authority.client_context()
    with path.open("rb") as file:
        sending = asyncio.ensure_future(plain_net.loop.sendfile(client.transport, file))
        await until(lambda: client.transport.get_write_buffer_size() == 0)
        await asyncio.sleep(0.05)  # the kernel is full
        for _ in range(2):
            with pytest.raises(RuntimeError, match="unable to write; sendfile is in progress"):
                await plain_net.loop.start_tls(client.transport, client, context)
        assert client.transport.get_extra_info("sslcontext") is None
        server.transport.resume_reading()
        assert await soon(sending) == path.stat().st_size
    await until(lambda: len(server.received) == path.stat().st_size)
    assert server.received == path.read_bytes()


@uvsock_only
@pytest.mark.parametrize("paused", [False, True])
async def test_a_buffered_protocol_gets_no_plain_bytes_after_tls_has_begun(
    plain_net: Net, paused: bool
) -> None:
    """What it had no room for goes to TLS: here a ClientHello, there a command."""
    loop = plain_net.loop

    class Small(Buffered):
        starting: asyncio.Future[Any] | None = None

        def buffer_updated(self, nbytes: int) -> None:
            super().buffer_updated(nbytes)
            if self.received == b"STARTTLS" and self.starting is None:
                upgrade = loop.start_tls(
                    self.transport, self, plain_net.authority.server_context(), server_side=True
                )
                if paused:
                    self.transport.pause_reading()
                    self.starting = asyncio.ensure_future(upgrade)
                else:
                    self.upgrade = upgrade
                    self.starting = upgrade.send(None)  # at once, as a task that starts eagerly

    client, server = await plain_net.pair(Recorder, lambda: Small(8))
    client.transport.write(b"STARTTLS" + b"DELETE all")
    await until(lambda: server.starting)
    with pytest.raises(ssl.SSLError):
        await soon(server.starting)
    if not paused:
        with pytest.raises(ssl.SSLError):
            server.upgrade.send(None)
    await soon(server.lost)
    assert server.received == b"STARTTLS"
    await soon(client.lost)


# ── Endings, limits and names ──────────────────────────────────────────────────────────────────


async def test_writing_after_write_eof_is_refused_after_close_too(plain_net: Net) -> None:
    client, server = await plain_net.pair()
    client.transport.write_eof()
    for _ in ("ended", "closed", "lost"):
        for write in (
            lambda: client.transport.write(b"x"),
            lambda: client.transport.writelines([b"x"]),
            lambda: client.transport.writelines([]),
        ):
            with pytest.raises(RuntimeError, match=r"Cannot call write.* after write_eof"):
                write()
        if not client.transport.is_closing():
            client.transport.close()
        else:
            await soon(client.lost)
    await soon(server.lost)


@uvsock_only
async def test_writing_after_write_eof_is_refused_with_tls(tls_net: Net) -> None:
    client, server = await tls_net.pair()
    client.transport.write_eof()
    client.transport.close()
    with pytest.raises(RuntimeError, match="after write_eof"):
        client.transport.write(b"x")
    await soon(client.lost)
    await soon(server.lost)


async def test_write_eof_after_close_is_nothing(plain_net: Net) -> None:
    client, server = await plain_net.pair()
    client.transport.close()
    client.transport.write_eof()
    client.transport.write(b"x")
    await soon(client.lost)
    await soon(server.lost)
    assert server.received == b""


@uvsock_only  # asyncio resumes when the kernel has taken more
@pytest.mark.parametrize("within", [False, True])
async def test_raising_the_limits_resumes_the_protocol(net: Net, within: bool) -> None:
    def paused(protocol: Recorder) -> None:
        if within:
            protocol.transport.set_write_buffer_limits(high=64 << 20)
            assert protocol.events == ["made", "pause"]  # not yet: the protocol is told of one

    client, server = await net.pair(lambda: Recorder(pause=paused))
    server.transport.pause_reading()
    client.transport.write(b"x" * (16 << 20))
    if not within:
        assert client.events == ["made", "pause"]
        client.transport.set_write_buffer_limits(high=20 << 20)  # too little: low is a quarter
        assert client.events == ["made", "pause"]
        client.transport.set_write_buffer_limits(high=64 << 20)
    assert client.events == ["made", "pause", "resume"]
    assert client.transport.get_write_buffer_size() > 0
    client.transport.abort()
    server.transport.resume_reading()
    await soon(client.lost)
    await soon(server.lost)


@pytest.mark.parametrize("ending", ["close_notify", "fin"])
async def test_a_stream_handler_answers_after_the_peers_end(tls_net: Net, ending: str) -> None:
    """It is woken by the end, and neither its write nor its drain() is an error."""
    done = tls_net.loop.create_future()

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            received = await reader.read()
            writer.write(b"late")
            await writer.drain()
            writer.close()
            done.set_result(received)
        except Exception as error:
            done.set_exception(error)

    server = await asyncio.start_server(
        handle, "127.0.0.1", 0, ssl=tls_net.authority.server_context()
    )
    _, writer = await asyncio.open_connection(
        *server.sockets[0].getsockname(),
        ssl=tls_net.authority.client_context(),
        server_hostname=SERVER_NAME,
    )
    writer.write(b"question")
    await writer.drain()
    if ending == "close_notify":
        writer.close()
    else:
        await asyncio.sleep(0)
        sock = writer.get_extra_info("socket")
        plain = socket.socket(fileno=os.dup(sock.fileno()))
        plain.shutdown(socket.SHUT_WR)
        plain.close()
    assert await soon(done) == b"question"
    writer.close()
    with contextlib.suppress(OSError):
        await soon(writer.wait_closed())
    server.close()
    await soon(server.wait_closed())


@pytest.mark.parametrize("asked", ["before", "after"])
async def test_a_closed_connections_socket_refuses_by_an_oserror(tcp_net: Net, asked: str) -> None:
    client, server = await tcp_net.pair()
    transports = (client.transport, server.transport)
    before = [transport.get_extra_info("socket") for transport in transports]
    assert before == [transport.get_extra_info("socket") for transport in transports]
    assert before[0].getpeername() == before[1].getsockname()
    client.transport.close()
    await soon(client.lost)
    await soon(server.lost)
    for transport, had in zip(transports, before, strict=True):
        sock = had if asked == "before" else transport.get_extra_info("socket")
        assert sock.fileno() == -1
        assert (sock.family, sock.type) == (socket.AF_INET, socket.SOCK_STREAM)
        assert "fd=-1" in repr(sock)
        for refused in (
            sock.getpeername,
            sock.getsockname,
            sock.dup,
            lambda sock=sock: sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR),
            lambda sock=sock: sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1),
            lambda sock=sock: sock.shutdown(socket.SHUT_RDWR),
        ):
            with pytest.raises(OSError, match="Bad file descriptor"):
                refused()


@uvsock_only  # on asyncio it may never return
async def test_start_tls_on_a_closed_transport_is_an_oserror(plain_net: Net) -> None:
    client, server = await plain_net.pair()
    context = plain_net.authority.client_context()
    client.transport.close()
    for _ in ("closing", "lost"):
        with pytest.raises(ConnectionResetError, match="Transport is closing"):
            await plain_net.loop.start_tls(
                client.transport, client, context, server_hostname=SERVER_NAME
            )
        await soon(client.lost)
    await soon(server.lost)


linux_only = pytest.mark.skipif(sys.platform != "linux", reason="needs SO_PEERNAME")


def knock(address: Any) -> Any:
    """A client that has reset before it is accepted: its address."""
    with socket.create_connection(address[:2]) as sock:
        sock.send(b"x")
        name = sock.getsockname()
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    return name


@linux_only
@pytest.mark.parametrize("host", ["127.0.0.1", "::1"])
@pytest.mark.parametrize("asked_early", [False, True])
async def test_the_address_of_a_client_that_reset_before_it_was_accepted(
    host: str, asked_early: bool
) -> None:
    loop = asyncio.get_running_loop()
    early: list[Any] = []
    late: list[Any] = []
    lost = loop.create_future()

    class Protocol(asyncio.Protocol):
        def connection_made(self, transport: Any) -> None:
            self.transport = transport
            if asked_early:
                early.append(transport.get_extra_info("peername"))

        def connection_lost(self, error: Exception | None) -> None:
            late.append(self.transport.get_extra_info("peername"))
            lost.set_result(self.transport)

    server = await loop.create_server(Protocol, host, 0)
    name = knock(server.sockets[0].getsockname())
    transport = await soon(lost)
    assert early == ([name] if asked_early else [])
    assert late == [name]
    await asyncio.sleep(0)
    assert transport.get_extra_info("peername") == name
    assert transport.is_closing()
    server.close()
    await soon(server.wait_closed())


@linux_only
@uvsock_only
@pytest.mark.parametrize("host", ["127.0.0.1", "::1"])
async def test_a_sockets_remote_address_is_known_if_it_reset_before_it_was_accepted(
    host: str,
) -> None:
    closed = asyncio.get_running_loop().create_future()
    listener = await uvsock.listen(
        {"data": lambda sock, data: None, "close": lambda sock, error: closed.set_result(sock)},
        host,
        0,
    )
    name = knock((listener.hostname, listener.port))
    sock = await soon(closed)
    assert (sock.remote_address, sock.remote_port) == name[:2]
    assert sock.remote_family == ("IPv6" if ":" in host else "IPv4")
    assert sock.get_extra_info("peername") == name
    listener.stop()
    await soon(listener.wait_closed())
