"""uvloop's table of transports by descriptor: quicker, and as right as before."""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import gc
import os
import socket as stdlib
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import uvloop

import uvsock
from conftest import Recorder, Wire
from helpers import echo, ignore, soon, until
from uvsock._stream import TransportTable


def table(loop: Any) -> weakref.WeakValueDictionary[int, Any]:
    (found,) = (
        item for item in gc.get_referents(loop) if isinstance(item, weakref.WeakValueDictionary)
    )
    return found


async def test_it_is_known_on_this_uvloop(wire: Wire) -> None:
    """Fails with a uvloop that is new: see whether it still enters descriptors, then name it."""
    listener = await wire.listen({"data": ignore})
    assert type(table(asyncio.get_running_loop())) is TransportTable
    listener.stop()


async def test_a_socket_has_the_descriptor_of_its_transport(wire: Wire) -> None:
    listener = await wire.listen({"data": ignore})
    clients = [await wire.connect(listener, {"data": ignore}) for _ in range(3)]
    await until(lambda: len(listener.sockets) == 3)
    sockets = [*clients, *listener.sockets]
    for socket in sockets:
        assert socket.get_extra_info("socket").fileno() == socket.fileno()
    assert len({socket.fileno() for socket in sockets}) == 6
    for socket in clients:
        socket.end()
        await soon(socket.wait_closed())
        assert socket.fileno() == -1
    listener.stop()
    await soon(listener.wait_closed())


async def test_nobody_else_may_watch_the_descriptor_of_a_connection(wire: Wire) -> None:
    loop = asyncio.get_running_loop()
    listener = await wire.listen({"data": ignore})
    socket = await wire.connect(listener, {"data": ignore})
    descriptor = socket.fileno()
    with pytest.raises(RuntimeError, match=f"descriptor {descriptor} is used by transport"):
        loop.add_reader(descriptor, ignore)
    socket.end()
    await soon(socket.wait_closed())
    listener.stop()
    await soon(listener.wait_closed())

    # The number is free again, for anybody.
    ours, peer = stdlib.socketpair()
    if peer.fileno() == descriptor:
        ours, peer = peer, ours
    with ours, peer, contextlib.ExitStack() as stack:
        if ours.fileno() != descriptor:
            assert fcntl.fcntl(ours, fcntl.F_DUPFD_CLOEXEC, descriptor) == descriptor
            stack.callback(os.close, descriptor)
        heard = asyncio.Event()
        loop.add_reader(descriptor, heard.set)
        peer.send(b"?")
        await soon(heard.wait())
        loop.remove_reader(descriptor)


async def test_a_transport_that_is_closed_is_not_kept(tcp_wire: Wire) -> None:
    listener = await tcp_wire.listen({"data": ignore})
    entered = table(asyncio.get_running_loop())
    socket = await tcp_wire.connect(listener, {"data": ignore})
    descriptor = socket.fileno()
    transport = weakref.ref(entered[descriptor])
    assert transport() is not None
    socket.end()
    await soon(socket.wait_closed())
    with pytest.raises(KeyError):
        entered[descriptor]
    del socket
    await until(lambda: transport() is None)
    listener.stop()


@pytest.mark.parametrize(
    "factory", [uvloop.new_event_loop, uvsock.new_event_loop], ids=["uvloop", "uvsock"]
)
@pytest.mark.parametrize("unknown", ["version", "table"])
def test_with_a_uvloop_that_is_not_known_the_transport_is_asked(
    factory: Callable[[], asyncio.AbstractEventLoop],
    unknown: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if unknown == "version":
        monkeypatch.setattr(uvloop, "__version__", "0.99.0")
    else:
        monkeypatch.setattr(gc, "get_referents", lambda *objects: [])

    async def main() -> bytes:
        loop = asyncio.get_running_loop()
        client = Recorder()
        async with await uvsock.listen({"data": echo}, "127.0.0.1", 0) as listener:
            socket = await uvsock.connect(client.table(), "127.0.0.1", listener.port)
            assert socket.fileno() == socket.get_extra_info("socket").fileno() > 0
            socket.write(b"hello")
            await until(lambda: len(client.received) == 5)
            monkeypatch.undo()
            assert type(table(loop)) is weakref.WeakValueDictionary
            socket.end()
            await soon(socket.wait_closed())
        return bytes(client.received)

    with asyncio.Runner(loop_factory=factory) as runner:
        assert runner.run(main()) == b"hello"


def test_the_protocols_of_others_are_left_alone() -> None:
    """A loop of uvloop's own that serves uvsock's sockets and others beside them."""
    made: asyncio.Future[Any]

    class Protocol(asyncio.Protocol):
        def connection_made(self, transport: Any) -> None:
            made.set_result(transport)

    async def main() -> None:
        nonlocal made
        loop = asyncio.get_running_loop()
        made = loop.create_future()
        async with await uvsock.listen({"data": echo}, "127.0.0.1", 0) as listener:
            server = await loop.create_server(Protocol, "127.0.0.1", 0)
            reader, writer = await asyncio.open_connection(*server.sockets[0].getsockname())
            transport = await soon(made)
            descriptor = transport.get_extra_info("socket").fileno()
            entered = table(loop)
            assert entered[descriptor] is transport
            with pytest.raises(RuntimeError, match="is used by transport"):
                loop.add_reader(descriptor, ignore)
            transport.write(b"from uvloop")
            transport.close()
            assert await soon(reader.read()) == b"from uvloop"
            writer.close()
            await writer.wait_closed()
            server.close()

            # One number, with one of uvsock's and one of uvloop's by turns.
            socket = await uvsock.connect({"data": ignore}, "127.0.0.1", listener.port)
            used = {descriptor, socket.fileno()}
            assert entered[socket.fileno()] is not transport
            socket.end()
            await soon(socket.wait_closed())
            await until(lambda: not listener.sockets)
            reader, writer = await asyncio.open_connection("127.0.0.1", listener.port)
            descriptor = writer.get_extra_info("socket").fileno()
            assert descriptor in used
            assert entered[descriptor] is writer.transport
            writer.close()
            await writer.wait_closed()
            await until(lambda: not listener.sockets)
            assert type(table(loop)) is TransportTable
            assert not listener.sockets

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(main())
