"""What a long-lived process keeps of connections that are gone: nothing."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import functools
import gc
import operator
import socket as stdlib
import ssl
import sys
import weakref
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import pytest

import uvsock
from conftest import Authority, Recorder, Wire, open_descriptors
from helpers import ignore, soon, until
from uvsock._handlers import Handlers
from uvsock._socket import Group

# Connections at a time, and the times that make a round.
AT_ONCE = 100
TIMES = 3
ROUNDS = 6
# What one connection may leave, on average. One forgotten object is one block, or more bytes.
BLOCKS = 0.5
BYTES = 40

Scene = Callable[[Wire, uvsock.Listener], Awaitable[None]]


class _Malloc(ctypes.Structure):
    """What glibc's mallinfo2(3) returns."""

    _fields_ = [
        (name, ctypes.c_size_t)
        for name in (
            "arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "uordblks",
            "fordblks", "keepcost",
        )
    ]  # fmt: skip


@functools.cache
def mallinfo() -> Callable[[], Any] | None:
    """Glibc's mallinfo2, where the process has it: what libuv and OpenSSL took is told by it."""
    function = getattr(ctypes.CDLL(None), "mallinfo2", None)
    if function is not None:
        function.restype = _Malloc
    return function


def memory() -> tuple[int, int]:
    """The blocks that Python's allocator has given out, and the bytes that malloc has.

    Resident memory would not do: a leak fits into what earlier connections have given back.
    """
    gc.collect()
    tell = mallinfo()
    if tell is None:
        return sys.getallocatedblocks(), 0
    told = tell()
    return sys.getallocatedblocks(), told.uordblks + told.hblkhd


async def assert_nothing_is_left_by(work: Callable[[], Awaitable[int]]) -> None:
    """A round of ``work``, which returns how many connections it made, leaves no memory taken.

    The first rounds fill caches and pools, and a table of the allocator's grows in a later one now
    and then. A leak grows in every round.
    """
    grown = []
    for _ in range(ROUNDS):
        blocks, size = memory()
        count = await work()
        after = memory()
        grown.append(((after[0] - blocks) / count, (after[1] - size) / count))
        if grown[-1][0] < BLOCKS and grown[-1][1] < BYTES:
            return
    raise AssertionError(f"blocks and bytes per connection, round by round: {grown}")


def objects() -> int:
    gc.collect()
    return len(gc.get_objects())


def hang_up(socket: uvsock.Socket[Any], data: Any) -> None:
    socket.end()


class Echo:
    """Sends back what comes; TLS from here on, where the peer asks for that."""

    def __init__(self, context: ssl.SSLContext) -> None:
        self.context = context

    def data(self, socket: uvsock.Socket[Any], data: bytes) -> None:
        if data == b"STARTTLS":
            socket.write(b"go ahead")
            socket.upgrade_tls(self.context)
        else:
            socket.write(data)


@contextlib.asynccontextmanager
async def echoing(wire: Wire) -> AsyncIterator[uvsock.Listener]:
    # A context of the test's own: making one per connection would be measured with it.
    context = wire.authority.server_context()
    options = {"tls": context} if wire.encrypted else {}
    listener = await wire.listen(Echo(context), **options)
    try:
        yield listener
    finally:
        listener.stop(True)
        await soon(listener.wait_closed())


@functools.cache
def trusting(authority: Authority) -> ssl.SSLContext:
    return authority.client_context()


TRUSTS_NOBODY = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)


async def connect(
    wire: Wire, listener: uvsock.Listener, handlers: Any, **options: Any
) -> uvsock.Socket[Any]:
    if wire.encrypted:
        options = {"tls": trusting(wire.authority), "server_hostname": "localhost"} | options
    return await wire.connect(listener, handlers, **options)


# ── What a connection may go through ───────────────────────────────────────────────────────────


async def talked(wire: Wire, listener: uvsock.Listener) -> None:
    socket = await connect(wire, listener, {"data": hang_up})
    socket.write(b"x" * 3000)
    await socket.wait_closed()


async def terminated_under_back_pressure(wire: Wire, listener: uvsock.Listener) -> None:
    """Bytes are held on both sides: here what was refused, there what was to be sent back."""

    def small(socket: uvsock.Socket[Any]) -> None:
        sock = socket.get_extra_info("socket")
        sock.setsockopt(stdlib.SOL_SOCKET, stdlib.SO_SNDBUF, 4096)
        sock.setsockopt(stdlib.SOL_SOCKET, stdlib.SO_RCVBUF, 4096)
        socket.pause()

    socket = await connect(wire, listener, {"open": small, "data": ignore})
    while socket.write(b"x" * 60_000) == 60_000:
        pass
    assert socket.writable_length
    await asyncio.sleep(0)
    socket.terminate()
    await socket.wait_closed()


async def kept_a_slice(wire: Wire, listener: uvsock.Listener) -> None:
    kept: list[memoryview] = []

    def data(socket: uvsock.Socket[Any], view: memoryview) -> None:
        kept.append(view[:1])
        socket.end()

    socket = await connect(wire, listener, {"data": data}, binary_type="memoryview")
    socket.write(b"x" * 100)
    await socket.wait_closed()
    assert kept[0] == b"x"


async def handled_async(wire: Wire, listener: uvsock.Listener) -> None:
    async def data(socket: uvsock.Socket[Any], data: bytes) -> None:
        await asyncio.sleep(0)
        socket.end()

    socket = await connect(wire, listener, {"data": data})
    await socket.send_all(b"x" * 100)
    await socket.wait_closed()


async def raised(wire: Wire, listener: uvsock.Listener) -> None:
    def data(socket: uvsock.Socket[Any], data: bytes) -> None:
        raise RuntimeError("in a handler")

    def error(socket: uvsock.Socket[Any], error: BaseException) -> None:
        socket.close()

    socket = await connect(wire, listener, {"data": data, "error": error})
    socket.write(b"x")
    await socket.wait_closed()


async def reloaded(wire: Wire, listener: uvsock.Listener) -> None:
    socket = await connect(wire, listener, {"data": ignore})
    socket.reload({"data": hang_up})
    socket.timeout(60)
    socket.write(b"x")
    await socket.wait_closed()


async def cancelled(wire: Wire, listener: uvsock.Listener) -> None:
    """After any number of iterations, up to where the connection is there."""
    for iterations in range(0, 16, 3):
        task = asyncio.create_task(connect(wire, listener, {"data": ignore}))
        for _ in range(iterations):
            await asyncio.sleep(0)
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            (await task).terminate()


async def refused(wire: Wire, listener: uvsock.Listener) -> None:
    address = {"unix": f"{listener.unix}x"} if wire.kind == "unix" else {}
    where = () if address else ("127.0.0.1", 1)
    with pytest.raises(OSError, match="cannot connect"):
        await uvsock.connect({"data": ignore, "connect_error": ignore}, *where, **address)


async def not_trusted(wire: Wire, listener: uvsock.Listener) -> None:
    with pytest.raises(ssl.SSLCertVerificationError):
        await connect(wire, listener, {"data": ignore, "handshake": ignore}, tls=TRUSTS_NOBODY)


async def spoke_no_tls(wire: Wire, listener: uvsock.Listener) -> None:
    plain = {"data": hang_up, "end": ignore}
    socket = await uvsock.connect(plain, listener.hostname, listener.port)
    socket.write(b"EHLO uvsock.test\r\n")
    await socket.wait_closed()


async def answered_no_tls(wire: Wire, listener: uvsock.Listener) -> None:
    """The ClientHello comes back."""
    options = {"tls": TRUSTS_NOBODY, "server_hostname": "localhost"}
    with pytest.raises(ssl.SSLError):
        await wire.connect(listener, {"data": ignore}, **options)


async def timed_out(wire: Wire, listener: uvsock.Listener) -> None:
    """Connected, as far as the kernel knows, but nobody answers the ClientHello."""
    with stdlib.create_server(("127.0.0.1", 0)) as silent, pytest.raises(TimeoutError):
        await uvsock.connect(
            {"data": ignore}, *silent.getsockname(), tls=TRUSTS_NOBODY,
            server_hostname="localhost", timeout=0.005,
        )  # fmt: skip


async def upgraded(wire: Wire, listener: uvsock.Listener) -> None:
    def data(socket: uvsock.Socket[Any], data: bytes) -> None:
        if socket.encrypted:
            socket.end()
        else:
            socket.upgrade_tls(trusting(wire.authority))

    def handshake(socket: uvsock.Socket[Any], success: bool, error: Exception | None) -> None:
        socket.write(b"over TLS")

    handlers = {"data": data, "handshake": handshake}
    socket = await wire.connect(listener, handlers, server_hostname="localhost")
    socket.write(b"STARTTLS")
    await socket.wait_closed()
    assert socket.authorized


async def framed(wire: Wire, listener: uvsock.Listener) -> None:
    """Lines, and an unfinished one when it ends; both ways of writing one."""

    def data(socket: uvsock.Socket[Any], line: bytes) -> None:
        if line == b"last":
            socket.end("unfinished")

    socket = await connect(wire, listener, {"data": data}, framing=uvsock.Lines())
    for _ in range(10):
        socket.write_frame(b"x" * 300)
    socket.write("half a ")
    socket.write("line\nlast\n")
    await socket.wait_closed()


async def kept_a_frame(wire: Wire, listener: uvsock.Listener) -> None:
    """In the memory of the frames: the socket goes on in other memory."""
    kept: list[memoryview] = []

    def data(socket: uvsock.Socket[Any], view: memoryview) -> None:
        kept.append(view[:1])
        if len(kept) == 3:
            socket.end()

    options = {"framing": uvsock.LengthPrefixed(2), "binary_type": "memoryview"}
    socket = await connect(wire, listener, {"data": data}, **options)
    for _ in range(3):
        socket.write_frame(b"x" * 3000)
    await socket.wait_closed()
    assert kept == [b"x"] * 3


async def framed_wrongly(wire: Wire, listener: uvsock.Listener) -> None:
    """A frame beyond the limit, behind one in another framing."""

    def data(socket: uvsock.Socket[Any], line: bytes) -> None:
        socket.set_framing(uvsock.Netstring(max_length=100))

    handlers = {"data": data, "error": ignore}
    socket = await connect(wire, listener, handlers, framing=uvsock.Lines())
    socket.write("netstrings\n101:")
    await socket.wait_closed()


EVERYWHERE: list[Scene] = [
    talked, terminated_under_back_pressure, kept_a_slice, handled_async, raised, reloaded,
    cancelled, framed, kept_a_frame, framed_wrongly,
]  # fmt: skip
SCENES = [
    *((kind, scene) for kind in ("tcp", "unix", "tls") for scene in EVERYWHERE),
    ("tcp", refused), ("unix", refused),
    ("tls", not_trusted), ("tls", spoke_no_tls), ("tcp", answered_no_tls), ("tcp", timed_out),
    ("tcp", upgraded), ("unix", upgraded),
]  # fmt: skip


@pytest.fixture
def kind_of_wire(request: pytest.FixtureRequest) -> Wire:
    wire: Wire = request.getfixturevalue(f"{request.param}_wire")
    return wire


@pytest.mark.parametrize(
    ("kind_of_wire", "scene"),
    SCENES,
    indirect=["kind_of_wire"],
    ids=[f"{kind}-{scene.__name__}" for kind, scene in SCENES],
)
async def test_connections_leave_descriptors_and_memory_as_they_were(
    kind_of_wire: Wire, scene: Scene
) -> None:
    wire = kind_of_wire
    async with echoing(wire) as listener:
        before = open_descriptors()

        async def batches() -> int:
            for _ in range(TIMES):
                await soon(asyncio.gather(*(scene(wire, listener) for _ in range(AT_ONCE))), 30)
                await until(lambda: not listener.connections and open_descriptors() == before)
            return TIMES * AT_ONCE

        await assert_nothing_is_left_by(batches)


async def test_a_thousand_connections_at_once_give_their_memory_back(plain_wire: Wire) -> None:
    wire = plain_wire
    async with echoing(wire) as listener:
        before = open_descriptors()

        async def thousand() -> int:
            connecting = (connect(wire, listener, {"data": ignore}) for _ in range(1000))
            sockets = await soon(asyncio.gather(*connecting), 30)
            for socket in sockets:
                socket.write(b"x" * 1000)
            await until(lambda: all(socket.bytes_read == 1000 for socket in sockets), 30)
            for socket in sockets:
                socket.end()
            for socket in sockets:
                await soon(socket.wait_closed())
            await until(lambda: not listener.connections and open_descriptors() == before)
            return 1000

        await assert_nothing_is_left_by(thousand)


async def test_a_thousand_reloads_keep_the_last_table_only(wire: Wire) -> None:
    async with echoing(wire) as listener:
        socket = await connect(wire, listener, {"data": ignore})

        async def reload() -> int:
            for _ in range(1000):
                listener.reload({"data": ignore, "timeout": ignore})
                socket.reload({"data": lambda socket, data: None})
            return 1000

        await assert_nothing_is_left_by(reload)
        socket.end()
        await soon(socket.wait_closed())


async def test_reload_tls_keeps_the_last_certificate_only(tls_wire: Wire) -> None:
    async with echoing(tls_wire) as listener:
        old = tls_wire.authority.server_context()
        listener.reload_tls(old)
        socket = await connect(tls_wire, listener, {"data": ignore})
        alive = weakref.ref(old)
        del old
        listener.reload_tls(tls_wire.authority.server_context())
        assert alive() is not None  # the open connection has it
        socket.end()
        await soon(socket.wait_closed())
        await until(lambda: alive() is None)


# ── What frees it ──────────────────────────────────────────────────────────────────────────────


@contextlib.contextmanager
def without_the_collector() -> Any:
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


@pytest.mark.parametrize("way", ["end", "close", "terminate", "shutdown"])
async def test_a_closed_socket_is_freed_without_the_garbage_collector(wire: Wire, way: str) -> None:
    recorder = Recorder()
    async with echoing(wire) as listener:
        with without_the_collector():
            socket = await connect(wire, listener, recorder.table("data"))
            alive = weakref.ref(socket)
            socket.write(b"x")
            await until(lambda: recorder.received == b"x")
            (accepted,) = listener.sockets
            accepted_alive = weakref.ref(accepted)
            del accepted
            recorder.sockets.clear()
            recorder.calls.clear()
            operator.methodcaller(way)(socket)
            await soon(socket.wait_closed())
            del socket
            await until(lambda: alive() is None and accepted_alive() is None)


async def test_a_socket_with_an_async_handler_is_freed_without_the_collector(wire: Wire) -> None:
    async def data(socket: uvsock.Socket[Any], data: bytes) -> None:
        await asyncio.sleep(0)
        socket.end()

    async with echoing(wire) as listener:
        with without_the_collector():
            socket = await connect(wire, listener, {"data": data})
            alive = weakref.ref(socket)
            await soon(socket.send_all(b"x"))
            await soon(socket.wait_closed())
            del socket
            await until(lambda: alive() is None)


async def test_a_socket_that_upgraded_is_freed_without_the_collector(plain_wire: Wire) -> None:
    alive = []

    async def upgrade() -> None:
        socket = await plain_wire.connect(
            listener, {"data": ignore}, server_hostname="localhost", binary_type="memoryview"
        )
        alive.append(weakref.ref(socket))
        alive.extend(map(weakref.ref, listener.sockets))
        socket.write(b"STARTTLS")
        await until(lambda: socket.bytes_read)
        assert await soon(socket.upgrade_tls(trusting(plain_wire.authority))) is socket
        socket.end()
        await soon(socket.wait_closed())

    async with echoing(plain_wire) as listener:
        with without_the_collector():
            await upgrade()
            assert alive
            await until(lambda: not any(reference() for reference in alive))


async def test_an_open_socket_is_kept_by_the_library(wire: Wire) -> None:
    recorder = Recorder()
    async with echoing(wire) as listener:
        await connect(wire, listener, recorder.table("data", "close"))
        gc.collect()
        await until(lambda: listener.connections == 1)

        def written() -> bool:
            """Over TLS nothing is taken before the server's end of the handshake."""
            return all(socket.write(b"still there") == 11 for socket in listener.sockets)

        await until(written)
        await until(lambda: recorder.received == b"still there")
    await until(lambda: "close" in recorder.events)


async def test_a_stopped_listener_its_group_and_its_tables_are_freed(wire: Wire) -> None:
    def ours() -> int:
        return sum(type(thing) in (Group, Handlers) for thing in gc.get_objects())

    before = ours()
    handlers = Recorder()
    listener = await wire.listen(handlers.table())
    client = await connect(wire, listener, {"data": ignore})
    assert ours() >= before + 4
    client.end()
    await soon(client.wait_closed())
    listener.stop(True)
    await soon(listener.wait_closed())
    alive = [weakref.ref(handlers), weakref.ref(listener), weakref.ref(client)]
    del handlers, listener, client

    def gone() -> bool:
        gc.collect()
        return not any(reference() for reference in alive) and ours() == before

    await until(gone)


@pytest.mark.parametrize(
    ("kind_of_wire", "bound"),
    [
        # Socket and transport, with what ties the two together.
        ("tcp", 7),
        ("unix", 7),
        # And the session, its two buffers, what is cached of it, and the handshake's deadline.
        ("tls", 17),
    ],
    indirect=["kind_of_wire"],
)
async def test_what_the_collector_sees_of_an_idle_connection(
    kind_of_wire: Wire, bound: int
) -> None:
    wire, count = kind_of_wire, 50
    peers: list[stdlib.socket] = []
    async with echoing(wire) as listener:
        try:
            for _ in range(count):  # in a thread: a handshake needs the loop meanwhile
                peers.append(await asyncio.to_thread(wire.dial, listener))
                peers[-1].sendall(b"x")
                await asyncio.to_thread(peers[-1].recv, 1)
            idle = objects()
            for socket in listener.sockets:
                socket.terminate()
            del socket
            await until(lambda: not listener.connections)
            # What the peers are made of is there before and after.
            per_connection = (idle - objects()) / count
        finally:
            for peer in peers:
                peer.close()
    assert 2 <= per_connection <= bound
