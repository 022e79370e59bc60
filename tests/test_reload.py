"""Replacing the table of handlers while connections are open."""

from __future__ import annotations

import asyncio
import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest

import uvsock
from conftest import Recorder, Wire
from helpers import ignore, soon, stopped, until
from uvsock import Handlers, ReadyState


def answering(text: bytes) -> dict[str, Callable[..., Any]]:
    return {"data": lambda socket, data: socket.write(text)}


async def ask(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bytes:
    writer.write(b"?")
    answer: bytes = await soon(reader.read(100))
    return answer


# ── Whose table is replaced ────────────────────────────────────────────────────────────────────


async def test_listener_reload_reaches_every_live_and_future_socket_at_once(wire: Wire) -> None:
    listener = await wire.listen(answering(b"old"))
    clients = [await wire.streams(listener) for _ in range(3)]
    assert [await ask(*client) for client in clients] == [b"old"] * 3
    assert listener.reload(answering(b"new")) is None
    assert [await ask(*client) for client in clients] == [b"new"] * 3
    clients.append(await wire.streams(listener))
    assert await ask(*clients[-1]) == b"new"
    assert listener.connections == 4
    for _, writer in clients:
        writer.close()
    await stopped(listener)


async def test_reload_of_an_accepted_socket_is_its_listeners(wire: Wire) -> None:
    """B140: the sockets of a listener share one table."""
    recorder = Recorder()
    listener = await wire.listen(recorder.table())
    clients = [await wire.streams(listener) for _ in range(2)]
    await until(lambda: len(recorder.sockets) == 2)
    table = Handlers(**answering(b"new"))
    recorder.sockets[0].reload(table)
    assert listener.handlers is table
    assert [await ask(*client) for client in clients] == [b"new"] * 2
    clients.append(await wire.streams(listener))
    assert await ask(*clients[-1]) == b"new"
    for _, writer in clients:
        writer.close()
    await stopped(listener)


async def test_reload_of_a_client_is_its_own(wire: Wire) -> None:
    listener = await wire.listen({"data": lambda socket, data: socket.write(data)})
    table = Handlers(data=ignore)
    clients = [await wire.connect(listener, table) for _ in range(2)]
    recorder = Recorder()
    clients[0].reload(recorder.table("data", "close"))
    other = Recorder()
    clients[1].reload(other.table("data"))
    clients[0].write(b"mine")
    await until(lambda: recorder.received == b"mine")
    assert not other.received
    for client in clients:
        client.end()
        await soon(client.wait_closed())
    assert recorder.events == ["data", "close"]
    await stopped(listener)


async def test_listeners_with_one_handlers_object_are_reloaded_apart(tcp_wire: Wire) -> None:
    table = Handlers(**answering(b"old"))
    first, second = [await tcp_wire.listen(table) for _ in range(2)]
    clients = [await tcp_wire.streams(listener) for listener in (first, second)]
    first.reload(answering(b"new"))
    assert [await ask(*client) for client in clients] == [b"new", b"old"]
    assert second.handlers is table
    for _, writer in clients:
        writer.close()
    await stopped(first)
    await stopped(second)


async def test_a_table_of_its_own_after_upgrade_is_not_the_listeners(tcp_wire: Wire) -> None:
    """The socket has left its listener's table: neither reload reaches the other."""
    authority = tcp_wire.authority

    def data(socket: uvsock.Socket[Any], chunk: bytes) -> None:
        if chunk == b"STARTTLS":
            socket.write(b"go")
            socket.upgrade_tls(authority.server_options, answering(b"its own"))
        else:
            socket.write(b"old")

    listener = await tcp_wire.listen({"data": data})
    client = Recorder()
    socket = await tcp_wire.connect(listener, client.table("data", "close"))
    (accepted,) = listener.sockets
    plain = await tcp_wire.streams(listener)
    socket.write(b"STARTTLS")
    await until(lambda: client.received == b"go")
    await soon(socket.upgrade_tls(authority.client_options))
    listener.reload(answering(b"new"))
    socket.write(b"?")
    await until(lambda: client.received == b"goits own")
    assert await ask(*plain) == b"new"
    accepted.reload(answering(b"its next"))
    socket.write(b"?")
    await until(lambda: client.received == b"goits ownits next")
    assert await ask(*plain) == b"new"
    socket.end()
    await soon(socket.wait_closed())
    plain[1].close()
    await stopped(listener)


# ── What the new table has not, is gone ────────────────────────────────────────────────────────


async def test_the_whole_table_is_replaced(wire: Wire) -> None:
    """B136: handlers that the new table leaves out are not called any more."""
    old = Recorder(drain=ignore, timeout=ignore)
    listener = await wire.listen(old.table())
    client = await wire.connect(listener, {"data": ignore})
    await until(lambda: old.sockets)
    before = list(old.events)
    accepted = old.socket
    listener.reload({"drain": ignore})
    assert listener.handlers.data is None
    accepted.timeout(0.01)
    client.write(b"unheard")
    await soon(client.wait_closed())  # no `timeout` handler is left: it closes
    await until(lambda: not listener.connections)
    assert old.events == before
    assert accepted.bytes_read == 7
    await stopped(listener)


async def test_without_error_in_the_new_table_the_loop_is_told(
    wire: Wire, loop_errors: list[dict[str, Any]]
) -> None:
    old = Recorder()
    listener = await wire.listen(old.table("data", "error", "close"))
    client = await wire.connect(listener, {"data": ignore})
    listener.reload({"data": lambda socket, data: 1 / 0})
    client.write(b"x")
    await soon(client.wait_closed())
    await until(lambda: not listener.connections)
    assert old.events == []
    assert [type(context["exception"]) for context in loop_errors] == [ZeroDivisionError]
    await stopped(listener)


async def test_the_old_table_is_let_go(wire: Wire) -> None:
    class Service:
        def data(self, socket: uvsock.Socket[Any], data: bytes) -> None:
            socket.write(data)

    service = Service()
    gone = weakref.ref(service)
    listener = await wire.listen(service)
    reader, writer = await wire.streams(listener)
    writer.write(b"x")
    assert await soon(reader.readexactly(1)) == b"x"
    del service
    assert gone() is not None
    listener.reload(answering(b"new"))
    gc.collect()
    assert gone() is None
    assert await ask(reader, writer) == b"new"
    writer.close()
    await stopped(listener)


async def test_options_data_and_accounting_stay(wire: Wire) -> None:
    """B139, B142: only the handlers change."""
    kinds: list[type] = []
    shared = {"shared": True}
    listener = await wire.listen(
        {"data": lambda socket, data: kinds.append(type(data))},
        binary_type="bytearray",
        data=shared,
    )
    client = await wire.connect(listener, {"data": ignore})
    await until(lambda: listener.connections == 1)
    (accepted,) = listener.sockets

    def data(socket: uvsock.Socket[Any], chunk: Any) -> None:
        kinds.append(type(chunk))
        assert socket.data is shared
        listener.reload({"data": data})
        assert listener.connections == 1

    listener.reload({"data": data})
    for count in range(1, 4):
        client.write(b"x")
        await until(lambda count=count: len(kinds) == count)
    listener.reload({"data": data})
    assert kinds == [bytearray] * 3
    assert listener.data is shared
    assert listener.connections == 1
    assert list(listener.sockets) == [accepted]
    client.end()
    await soon(client.wait_closed())
    await until(lambda: listener.connections == 0)
    assert listener.stats.accepted == 1
    await stopped(listener)


async def test_a_wrong_table_raises_and_changes_nothing(wire: Wire) -> None:
    """B138; the other wrong tables are in test_handlers."""
    listener = await wire.listen(answering(b"old"))
    table = listener.handlers
    reader, writer = await wire.streams(listener)
    assert await ask(reader, writer) == b"old"
    (accepted,) = listener.sockets
    for reload in (listener.reload, accepted.reload):
        with pytest.raises(TypeError, match="close"):
            reload({"data": ignore, "close": 5})
        with pytest.raises(TypeError, match="data"):
            reload({"open": ignore})
    assert listener.handlers is table
    assert await ask(reader, writer) == b"old"
    writer.close()
    await stopped(listener)


async def test_a_property_that_closes_the_socket_during_reload(wire: Wire) -> None:
    """B143: reading the new table runs code of the user's; the old `close` still runs."""
    recorder = Recorder()
    listener = await wire.listen(recorder.table("open", "data", "close"))
    client = await wire.connect(listener, {"data": ignore})
    await until(lambda: recorder.sockets)

    class Sly:
        data = staticmethod(ignore)

        @property
        def close(self) -> None:
            recorder.socket.terminate()
            raise ValueError("no table after all")

    with pytest.raises(ValueError, match="no table after all"):
        recorder.socket.reload(Sly())
    await until(lambda: "close" in recorder.events)
    assert recorder.events == ["open", "close"]
    await until(lambda: client.ready_state is ReadyState.CLOSED)
    await stopped(listener)


# ── From inside a handler of the table that is replaced ────────────────────────────────────────

EVENTS = ("open", "data", "drain", "end", "timeout", "error", "close")


@pytest.mark.parametrize("how", ["listener.reload", "socket.reload"])
@pytest.mark.parametrize(
    ("wire", "event"),
    [*((kind, event) for kind in ("tcp", "unix", "tls") for event in EVENTS), ("tls", "handshake")],
    indirect=["wire"],
)
async def test_reload_inside_a_handler_of_the_table_being_replaced(
    wire: Wire, event: str, how: str
) -> None:
    """The running call finishes; the next event is the new table's."""
    new = Recorder(data=lambda socket, data: socket.write(data), drain=ignore, timeout=ignore)
    new_table = Handlers(**new.table())
    old_events: list[str] = []
    finished: list[str] = []
    services: list[weakref.ref[Any]] = []

    class Old:
        """Nothing but the table holds it."""

        def _called(self, name: str, socket: uvsock.Socket[Any]) -> None:
            old_events.append(name)
            if name == event:
                reload = listener.reload if how == "listener.reload" else socket.reload
                reload(new_table)
                gc.collect()
                assert listener.handlers is new_table
                finished.append(name)

        def open(self, socket: uvsock.Socket[Any]) -> None:
            self._called("open", socket)
            if event == "timeout":
                socket.timeout(0.001)
            if event == "drain":
                while socket.write(b"x" * 100_000) == 100_000:
                    pass

        def data(self, socket: uvsock.Socket[Any], data: bytes) -> None:
            self._called("data", socket)
            if event == "error":
                raise ValueError

        def drain(self, socket: uvsock.Socket[Any]) -> None:
            self._called("drain", socket)

        def end(self, socket: uvsock.Socket[Any]) -> None:
            self._called("end", socket)

        def timeout(self, socket: uvsock.Socket[Any]) -> None:
            self._called("timeout", socket)

        def error(self, socket: uvsock.Socket[Any], error: Exception) -> None:
            self._called("error", socket)

        def close(self, socket: uvsock.Socket[Any], error: OSError | None) -> None:
            self._called("close", socket)

        def handshake(self, socket: uvsock.Socket[Any], success: bool, error: Any) -> None:
            self._called("handshake", socket)

    old = Old()
    services.append(weakref.ref(old))
    listener = await wire.listen(old)
    del old
    client = Recorder()
    socket = await wire.connect(listener, client.table("data", "end", "close"))
    socket.write(b"x" * 400_000)
    if event in ("end", "close"):
        socket.end()
    await until(lambda: finished)
    if event not in ("end", "close"):
        await until(lambda: not socket.writable_length)
        socket.end(b"tail")
    await soon(socket.wait_closed())
    await until(lambda: not listener.connections)
    assert old_events[-1] == event
    assert old_events.count(event) == 1
    assert finished == [event]
    if event != "close":
        assert new.events[-1] == "close"
        assert "open" not in new.events or event == "handshake"
    else:
        assert new.events == []
    gc.collect()
    assert services[0]() is None
    await stopped(listener)


async def test_reload_to_itself_and_back_for_every_chunk(wire: Wire) -> None:
    counts = {"first": 0, "second": 0}
    tables: dict[str, Any] = {}

    def handler(name: str, other: str) -> Callable[..., None]:
        def data(socket: uvsock.Socket[Any], chunk: bytes) -> None:
            counts[name] += len(chunk)
            socket.reload(tables[other])
            socket.write(b"k")

        return data

    tables["first"] = {"data": handler("first", "second")}
    tables["second"] = {"data": handler("second", "first")}
    listener = await wire.listen(tables["first"])
    reader, writer = await wire.streams(listener)
    for _ in range(10):
        writer.write(b"12345")
        assert await soon(reader.readexactly(1)) == b"k"
    assert counts == {"first": 25, "second": 25}
    writer.close()
    await stopped(listener)


async def test_an_async_handler_finishes_on_the_old_table(wire: Wire) -> None:
    gate = asyncio.Event()
    entries: list[str] = []

    async def old_data(socket: uvsock.Socket[Any], chunk: bytes) -> None:
        entries.append("old begins")
        await gate.wait()
        entries.append("old ends")

    async def new_data(socket: uvsock.Socket[Any], chunk: bytes) -> None:
        entries.append("new data")

    listener = await wire.listen({"data": old_data, "end": lambda s: entries.append("old end")})
    client = await wire.connect(listener, {"data": ignore})
    client.write(b"one")
    await until(lambda: entries)
    listener.reload({"data": new_data, "close": lambda s, error: entries.append("new close")})
    client.write(b"two")
    client.end()
    await asyncio.sleep(0.02)
    assert entries == ["old begins"]
    gate.set()
    await soon(client.wait_closed())
    await until(lambda: "new close" in entries)
    assert entries == ["old begins", "old ends", "new data", "new close"]
    await stopped(listener)


async def test_from_sync_to_async_and_back(wire: Wire) -> None:
    """Whether calls are awaited is the table's, not the socket's."""
    received = bytearray()
    tables: list[Any] = []

    async def slowly(socket: uvsock.Socket[Any], chunk: bytes) -> None:
        received.extend(chunk)
        socket.reload(tables[1])
        await asyncio.sleep(0.001)
        socket.write(b"a")

    def quickly(socket: uvsock.Socket[Any], chunk: bytes) -> None:
        received.extend(chunk)
        socket.reload(tables[0])
        socket.write(b"s")

    tables += [{"data": slowly}, {"data": quickly}]
    listener = await wire.listen(tables[0])
    reader, writer = await wire.streams(listener)
    for number, expected in enumerate([b"a", b"s"] * 4):
        writer.write(b"%d" % number)
        assert await soon(reader.readexactly(1)) == expected
    assert received == b"01234567"
    writer.close()
    await stopped(listener)


async def test_reload_inside_connects_own_open(wire: Wire) -> None:
    listener = await wire.listen({"open": lambda socket: socket.write(b"hi"), "data": ignore})
    new = Recorder()
    table = {"open": lambda socket: socket.reload(new.table("data", "close")), "data": ignore}
    socket = await wire.connect(listener, table)
    await until(lambda: new.received == b"hi")
    socket.end()
    await soon(socket.wait_closed())
    assert new.events == ["data", "close"]
    await stopped(listener)


async def test_reload_of_a_closed_socket_and_of_a_stopped_listener_is_harmless(wire: Wire) -> None:
    """B144."""
    listener = await wire.listen(answering(b"old"))
    client = await wire.connect(listener, {"data": ignore})
    await until(lambda: listener.sockets)
    (accepted,) = listener.sockets
    client.end()
    await soon(client.wait_closed())
    await soon(accepted.wait_closed())
    client.reload({"data": ignore})
    with pytest.raises(TypeError, match="handlers"):
        client.reload(None)  # type: ignore[arg-type]
    other = await wire.streams(listener)
    await until(lambda: listener.connections == 1)
    listener.stop()
    listener.reload(answering(b"new"))
    assert await ask(*other) == b"new"
    other[1].close()
    await soon(listener.wait_closed())
    listener.reload(answering(b"newest"))


async def test_reload_from_another_thread_is_refused(tcp_wire: Wire) -> None:
    listener = await tcp_wire.listen(answering(b"old"))
    client = await tcp_wire.connect(listener, {"data": ignore})
    for reload in (listener.reload, client.reload):
        with pytest.raises(RuntimeError, match="thread"):
            await asyncio.to_thread(reload, {"data": ignore})
    client.end()
    await soon(client.wait_closed())
    await stopped(listener)
