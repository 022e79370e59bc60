"""`async def` handlers: one after another, with reading paused, nothing lost or out of order."""

from __future__ import annotations

import asyncio
import contextvars
import functools
import sys
import types
from collections.abc import Callable
from typing import Any
from unittest.mock import AsyncMock

import pytest

import uvsock
from conftest import Recorder, Wire, unused_port
from helpers import ignore, soon, stopped, until
from uvsock import ReadyState

MIB = 1 << 20


class Trouble(Exception):
    """What the handlers of these tests raise."""


async def pause(seconds: float = 0.005) -> None:
    await asyncio.sleep(seconds)


class Journal:
    """Async handlers that write down when they begin and when they have finished."""

    def __init__(self, seconds: float = 0.005) -> None:
        self.seconds = seconds
        self.entries: list[str] = []
        self.received = bytearray()
        self.running = 0
        self.most = 0

    def handler(self, name: str) -> Callable[..., Any]:
        async def handler(socket: uvsock.Socket[Any], *arguments: Any) -> None:
            self.running += 1
            self.most = max(self.most, self.running)
            self.entries.append(f"{name} begins")
            if name == "data":
                self.received.extend(arguments[0])
            await asyncio.sleep(self.seconds)
            self.entries.append(f"{name} ends")
            self.running -= 1

        return handler

    def table(self, *names: str) -> dict[str, Callable[..., Any]]:
        return {name: self.handler(name) for name in names}


# ── Order ──────────────────────────────────────────────────────────────────────────────────────


async def test_the_calls_of_one_socket_run_one_after_another_in_order(wire: Wire) -> None:
    journal = Journal()
    names = ("open", "data", "end", "close", *(["handshake"] if wire.encrypted else []))
    listener = await wire.listen(journal.table(*names))
    client = await wire.connect(listener, {"data": ignore})
    for number in range(5):
        client.write(b"%d" % number)
        await pause(0.002)
    client.end()
    await soon(client.wait_closed())
    await until(lambda: "close ends" in journal.entries)
    assert journal.most == 1
    assert journal.received == b"01234"
    begun = [entry.removesuffix(" begins") for entry in journal.entries[::2]]
    assert journal.entries == [
        text for name in begun for text in (f"{name} begins", f"{name} ends")
    ]
    expected = [name for name in ("handshake", "open", "data", "end", "close") if name in names]
    assert list(dict.fromkeys(begun)) == expected
    assert all(begun.count(name) == 1 for name in expected if name != "data")
    await stopped(listener)


async def test_sync_handlers_wait_for_a_running_async_one(wire: Wire) -> None:
    """The table mixes both: the order of events stays the order of calls."""
    gate = asyncio.Event()
    entries: list[str] = []

    async def data(socket: uvsock.Socket[Any], chunk: bytes) -> None:
        entries.append("data begins")
        await gate.wait()
        entries.append("data ends")

    table = {
        "data": data,
        "end": lambda socket: entries.append("end"),
        "close": lambda socket, error: entries.append("close"),
    }
    listener = await wire.listen(table)
    client = await wire.connect(listener, {"data": ignore})
    client.end(b"x")
    await until(lambda: entries)
    await pause(0.03)
    assert entries == ["data begins"]
    gate.set()
    await soon(client.wait_closed())
    await until(lambda: len(entries) == 4)
    assert entries == ["data begins", "data ends", "end", "close"]
    await stopped(listener)


async def test_sockets_do_not_wait_for_one_another(wire: Wire) -> None:
    gate = asyncio.Event()

    async def data(socket: uvsock.Socket[Any], chunk: bytes) -> None:
        if chunk == b"slow":
            await gate.wait()
        socket.write(chunk)

    listener = await wire.listen({"data": data})
    slow_reader, slow = await wire.streams(listener)
    slow.write(b"slow")
    await until(lambda: listener.stats.bytes_read == 4)
    reader, writer = await wire.streams(listener)
    writer.write(b"fast")
    assert await soon(reader.readexactly(4)) == b"fast"
    gate.set()
    assert await soon(slow_reader.readexactly(4)) == b"slow"
    for each in (slow, writer):
        each.close()
    await stopped(listener)


@pytest.mark.parametrize("binary_type", ["bytes", "bytearray", "memoryview"])
async def test_nothing_is_lost_or_reordered_under_a_flood(wire: Wire, binary_type: Any) -> None:
    received = bytearray()

    async def data(socket: uvsock.Socket[Any], chunk: Any) -> None:
        await asyncio.sleep(0)
        received.extend(chunk)

    listener = await wire.listen({"data": data}, binary_type=binary_type)
    client = await wire.connect(listener, {"data": ignore})
    payload = bytes(range(251)) * 12_000
    await soon(client.send_all(payload), 20)
    client.end()
    await soon(client.wait_closed())
    await until(lambda: not listener.connections)
    assert received == payload
    await stopped(listener)


async def test_an_async_echo_answers_everything_in_order(wire: Wire) -> None:
    async def data(socket: uvsock.Socket[Any], chunk: bytes) -> None:
        await asyncio.sleep(0)
        await socket.send_all(chunk)

    listener = await wire.listen({"data": data})
    client = Recorder()
    socket = await wire.connect(listener, client.table())
    payload = bytes(range(253)) * 8000
    await soon(socket.send_all(payload), 20)
    socket.end()
    await soon(socket.wait_closed(), 20)
    assert client.received == payload
    assert client.close_errors == [None]
    await stopped(listener)


# ── Flow ───────────────────────────────────────────────────────────────────────────────────────


async def test_reading_stops_while_a_handler_runs(wire: Wire) -> None:
    """A slow handler slows its peer: what piles up is with the kernel and the peer, not here."""
    gate = asyncio.Event()
    calls = 0

    async def data(socket: uvsock.Socket[Any], chunk: bytes) -> None:
        nonlocal calls
        calls += 1
        await gate.wait()

    listener = await wire.listen({"data": data})
    client = await wire.connect(listener, {"data": ignore})
    payload = b"x" * (16 * MIB)
    sending = asyncio.create_task(client.send_all(payload))
    await until(lambda: calls)
    await pause(0.1)
    assert calls == 1
    assert listener.stats.bytes_read <= MIB
    assert not sending.done()
    gate.set()
    await soon(sending, 20)
    client.end()
    await soon(client.wait_closed(), 20)
    await until(lambda: listener.stats.bytes_read == len(payload))
    assert calls > 1
    await stopped(listener)


async def test_pause_inside_an_async_handler_lasts_until_resume(wire: Wire) -> None:
    recorder = Recorder()

    async def data(socket: uvsock.Socket[Any], chunk: bytes) -> None:
        socket.pause()
        await pause()

    recorder.overrides["data"] = data
    listener = await wire.listen(recorder.table("open", "data", "end", "close"))
    client = await wire.connect(listener, {"data": ignore})
    client.write(b"one")
    await until(lambda: recorder.received == b"one")
    client.end(b"two")
    await pause(0.04)
    assert recorder.events == ["open", "data"]
    recorder.socket.resume()
    await until(lambda: recorder.received == b"onetwo")
    await pause(0.02)
    assert recorder.events == ["open", "data", "data"]
    recorder.socket.resume()
    await soon(client.wait_closed())
    await until(lambda: recorder.events == ["open", "data", "data", "end", "close"])
    await stopped(listener)


async def test_what_an_async_handler_writes_leaves_while_it_runs(wire: Wire) -> None:
    gate = asyncio.Event()

    async def data(socket: uvsock.Socket[Any], chunk: bytes) -> None:
        socket.write(b"begun ")
        await gate.wait()
        socket.write(b"done")

    listener = await wire.listen({"data": data})
    reader, writer = await wire.streams(listener)
    writer.write(b"x")
    assert await soon(reader.readexactly(6)) == b"begun "
    gate.set()
    assert await soon(reader.readexactly(4)) == b"done"
    writer.close()
    await stopped(listener)


async def test_drain_comes_after_the_handler_that_wrote_too_much(wire: Wire) -> None:
    entries: list[str] = []
    gate = asyncio.Event()

    async def data(socket: uvsock.Socket[Any], chunk: bytes) -> None:
        while socket.write(b"x" * MIB) == MIB:
            pass
        entries.append("full")
        await gate.wait()
        entries.append("data ends")

    async def drain(socket: uvsock.Socket[Any]) -> None:
        entries.append("drain begins")
        await pause()
        entries.append("drain ends")
        socket.end()

    listener = await wire.listen({"data": data, "drain": drain})
    client = await wire.connect(listener, {"data": ignore})
    client.write(b"x")
    await until(lambda: entries)
    await pause(0.05)
    assert entries == ["full"]
    gate.set()
    await soon(client.wait_closed())
    assert entries == ["full", "data ends", "drain begins", "drain ends"]
    await stopped(listener)


# ── A view in an async handler ─────────────────────────────────────────────────────────────────


async def test_a_memoryview_is_valid_while_the_handler_runs_and_released_after(
    wire: Wire,
) -> None:
    views: list[memoryview] = []
    intact: list[bool] = []

    async def data(socket: uvsock.Socket[Any], view: memoryview) -> None:
        views.append(view)
        before = bytes(view)
        socket.write(b"k")
        await pause(0.01)
        intact.append(bytes(view) == before)

    listener = await wire.listen({"data": data}, binary_type="memoryview")
    clients = [await wire.streams(listener) for _ in range(3)]
    for letter in b"abcd":
        for number, (_, writer) in enumerate(clients):
            writer.write(bytes([letter + number]) * 3000)
        for reader, _ in clients:
            assert await soon(reader.read(1))
    await until(lambda: len(intact) == len(views))
    assert all(intact)
    assert len(views) >= 12
    await asyncio.sleep(0.01)  # the last handler has returned, but its task is not done yet
    for view in views:
        with pytest.raises(ValueError, match="released"):
            bytes(view)
    for _, writer in clients:
        writer.close()
    await stopped(listener)


async def test_a_slice_kept_by_an_async_handler_stays_what_it_was(wire: Wire) -> None:
    kept: list[memoryview] = []

    async def data(socket: uvsock.Socket[Any], view: memoryview) -> None:
        await asyncio.sleep(0)
        kept.append(view[:])

    listener = await wire.listen({"data": data}, binary_type="memoryview")
    client = await wire.connect(listener, {"data": ignore})
    payload = bytes(range(249)) * 6000
    await soon(client.send_all(payload), 20)
    client.end()
    await soon(client.wait_closed())
    await until(lambda: not listener.connections)
    assert b"".join(kept) == payload
    await stopped(listener)


async def test_the_view_is_valid_after_terminate_and_after_a_reset(wire: Wire) -> None:
    gate = asyncio.Event()
    seen: list[bytes] = []

    async def data(socket: uvsock.Socket[Any], view: memoryview) -> None:
        socket.terminate()
        await gate.wait()
        seen.append(bytes(view))

    listener = await wire.listen({"data": data}, binary_type="memoryview")
    _, writer = await wire.streams(listener)
    writer.write(b"still here")
    await until(lambda: listener.stats.bytes_read)
    await pause(0.01)
    gate.set()
    await until(lambda: seen)
    assert seen == [b"still here"]
    writer.close()
    await stopped(listener)


# ── Closing ────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("wire", "how"),
    [
        (kind, how)
        for kind in ("tcp", "unix", "tls")
        for how in ("terminate", "close", "peer resets", "stop")
        if (kind, how) != ("unix", "peer resets")  # an aborted Unix peer sends an EOF
    ],
    indirect=["wire"],
)
async def test_close_waits_for_the_running_handler(wire: Wire, how: str) -> None:
    gate = asyncio.Event()
    states: list[ReadyState] = []
    recorder = Recorder()

    async def data(socket: uvsock.Socket[Any], chunk: bytes) -> None:
        await gate.wait()
        states.append(socket.ready_state)
        assert socket.write(b"too late") == -1
        recorder.events.append("data ends")

    recorder.overrides["data"] = data
    listener = await wire.listen(recorder.table("open", "data", "end", "close"), linger_timeout=0.1)
    client = await wire.connect(listener, {"data": ignore}, linger_timeout=0.1)
    client.write(b"x")
    await until(lambda: recorder.received)
    accepted = recorder.socket
    if how == "peer resets":
        client.terminate()
        # The socket does not read, so it learns of the reset by writing.
        await until(lambda: accepted.write(b"x" * 1000) == -1)
    elif how == "stop":
        listener.stop(True)
    else:
        getattr(accepted, how)()
    waiting = asyncio.create_task(accepted.wait_closed())
    await pause(0.15)
    assert recorder.events == ["open", "data"]
    assert accepted.ready_state is ReadyState.SHUTDOWN or how == "peer resets"
    assert listener.connections == 1
    assert not waiting.done()
    gate.set()
    await soon(waiting)
    assert recorder.events == ["open", "data", "data ends", "close"]
    assert len(states) == 1
    assert states[0] is not ReadyState.CLOSED
    if how != "peer resets":
        assert recorder.close_errors == [None]
    assert listener.connections == 0
    await until(lambda: client.ready_state is ReadyState.CLOSED)
    await stopped(listener)


async def test_end_and_close_wait_until_the_running_handler_has_returned(wire: Wire) -> None:
    journal = Journal(0.02)
    listener = await wire.listen(journal.table("data", "end", "close"))
    client = await wire.connect(listener, {"data": ignore})
    client.end(b"last words")
    await soon(client.wait_closed())
    await until(lambda: "close ends" in journal.entries)
    assert journal.entries == [
        f"{name} {when}" for name in ("data", "end", "close") for when in ("begins", "ends")
    ]
    await stopped(listener)


async def test_the_own_side_ends_after_an_async_end_handler(wire: Wire) -> None:
    async def end(socket: uvsock.Socket[Any]) -> None:
        await pause(0.01)
        assert socket.ready_state is ReadyState.ESTABLISHED
        await socket.send_all(b"farewell" * 10_000)

    listener = await wire.listen({"data": ignore, "end": end})
    client = Recorder()
    socket = await wire.connect(listener, client.table())
    socket.end()
    await soon(socket.wait_closed())
    assert client.received == b"farewell" * 10_000
    await stopped(listener)


async def test_wait_closed_waits_for_an_async_close_handler(wire: Wire) -> None:
    gate = asyncio.Event()
    entries: list[str] = []

    async def close(socket: uvsock.Socket[Any], error: OSError | None) -> None:
        assert socket.ready_state is ReadyState.CLOSED
        await gate.wait()
        entries.append("close")

    listener = await wire.listen({"data": ignore, "close": close})
    client = await wire.connect(listener, {"data": ignore})
    await until(lambda: listener.sockets)
    (accepted,) = listener.sockets
    client.end()
    await soon(client.wait_closed())
    await until(lambda: accepted.ready_state is ReadyState.CLOSED)
    listener.stop()
    both = asyncio.gather(accepted.wait_closed(), listener.wait_closed())
    await pause(0.02)
    assert not both.done()
    gate.set()
    await soon(both)
    assert entries == ["close"]


# ── Each of the other handlers ─────────────────────────────────────────────────────────────────


async def test_connect_resolves_when_an_async_open_has_finished(wire: Wire) -> None:
    entries: list[str] = []

    async def opened(socket: uvsock.Socket[Any]) -> None:
        await pause(0.02)
        entries.append("open ends")

    listener = await wire.listen({"open": lambda socket: socket.write(b"greeting"), "data": ignore})
    table = {"open": opened, "data": lambda socket, data: entries.append("data")}
    socket = await soon(wire.connect(listener, table))
    assert entries[0] == "open ends"
    await until(lambda: entries == ["open ends", "data"])
    socket.end()
    await soon(socket.wait_closed())
    await stopped(listener)


async def test_connect_resolves_when_an_async_open_raised(wire: Wire) -> None:
    raised = Trouble("open")

    async def opened(socket: uvsock.Socket[Any]) -> None:
        await pause()
        raise raised

    listener = await wire.listen({"data": ignore})
    recorder = Recorder(open=opened)
    socket = await soon(wire.connect(listener, recorder.table("open", "data", "error", "close")))
    await soon(socket.wait_closed())
    assert recorder.events == ["open", "error", "close"]
    assert recorder.errors == [raised]
    await stopped(listener)


async def test_connect_resolves_when_the_socket_closes_during_an_async_open(wire: Wire) -> None:
    entries: list[str] = []

    async def opened(socket: uvsock.Socket[Any]) -> None:
        socket.terminate()
        await pause(0.02)
        entries.append("open ends")

    listener = await wire.listen({"data": ignore})
    table = {"open": opened, "data": ignore, "close": lambda s, error: entries.append("close")}
    socket = await soon(wire.connect(listener, table))
    await soon(socket.wait_closed())
    assert entries == ["open ends", "close"]
    await stopped(listener)


async def test_an_async_handshake_finishes_before_open(tls_wire: Wire) -> None:
    journal = Journal()
    listener = await tls_wire.listen(journal.table("handshake", "open", "data"))
    _reader, writer = await tls_wire.streams(listener)
    writer.write(b"early")
    await until(lambda: "data ends" in journal.entries)
    assert journal.entries == [
        f"{name} {when}" for name in ("handshake", "open", "data") for when in ("begins", "ends")
    ]
    writer.close()
    await stopped(listener)


async def test_an_async_handshake_of_a_failed_handshake_runs_to_its_end(tls_wire: Wire) -> None:
    finished: list[bool] = []

    async def handshake(socket: uvsock.Socket[Any], success: bool, error: Exception | None) -> None:
        await pause()
        finished.append(success)

    listener = await tls_wire.listen({"data": ignore, "handshake": handshake})
    _, writer = await asyncio.open_connection(listener.hostname, listener.port)
    writer.write(b"GET / HTTP/1.1\r\n\r\n")
    await until(lambda: finished)
    assert finished == [False]
    writer.close()
    await stopped(listener)


async def test_an_async_error_handler_is_awaited_before_what_follows(wire: Wire) -> None:
    entries: list[str] = []

    def data(socket: uvsock.Socket[Any], chunk: bytes) -> None:
        entries.append(f"data {len(chunk)}")
        raise Trouble

    async def error(socket: uvsock.Socket[Any], failure: Exception) -> None:
        entries.append("error begins")
        await pause(0.02)
        entries.append("error ends")
        socket.write(b"sorry")

    table = {"data": data, "error": error, "end": lambda socket: entries.append("end")}
    listener = await wire.listen(table)
    client = Recorder()
    socket = await wire.connect(listener, client.table())
    socket.end(b"x")
    await soon(socket.wait_closed())
    assert entries == ["data 1", "error begins", "error ends", "end"]
    assert client.received == b"sorry"
    await stopped(listener)


async def test_an_async_timeout_handler_and_the_data_that_waits(wire: Wire) -> None:
    entries: list[str] = []

    async def timeout(socket: uvsock.Socket[Any]) -> None:
        entries.append("timeout begins")
        await pause(0.02)
        entries.append("timeout ends")

    table = {
        "open": lambda socket: socket.timeout(0.001),
        "timeout": timeout,
        "data": lambda socket, data: entries.append("data"),
    }
    listener = await wire.listen(table)
    client = await wire.connect(listener, {"data": ignore})
    await until(lambda: entries)
    client.write(b"x")
    await until(lambda: "data" in entries)
    assert entries == ["timeout begins", "timeout ends", "data"]
    client.end()
    await soon(client.wait_closed())
    await stopped(listener)


async def test_an_async_connect_error_is_awaited() -> None:
    finished: list[tuple[Any, Exception]] = []

    async def connect_error(socket: uvsock.Socket[Any], error: Exception) -> None:
        assert socket.data == "mine"
        await pause()
        finished.append((socket.write(b"x"), error))

    with pytest.raises(ConnectionRefusedError) as caught:
        await uvsock.connect(
            {"data": ignore, "connect_error": connect_error},
            "127.0.0.1",
            unused_port(),
            data="mine",
        )
    assert finished == [(-1, caught.value)]


async def test_what_an_async_connect_error_raises_replaces_the_error() -> None:
    raised = Trouble("instead")

    async def connect_error(socket: uvsock.Socket[Any], error: Exception) -> None:
        await pause()
        raise raised

    with pytest.raises(Trouble) as caught:
        await uvsock.connect(
            {"data": ignore, "connect_error": connect_error}, "127.0.0.1", unused_port()
        )
    assert caught.value is raised
    assert isinstance(raised.__context__, ConnectionRefusedError)


# ── Timeouts while a handler runs ──────────────────────────────────────────────────────────────


async def test_a_timeout_that_passes_while_a_handler_runs_is_called_after_it(wire: Wire) -> None:
    entries: list[str] = []

    async def data(socket: uvsock.Socket[Any], chunk: bytes) -> None:
        socket.timeout(0.005)
        await pause(0.03)
        entries.append("data ends")

    listener = await wire.listen({"data": data, "timeout": lambda s: entries.append("timeout")})
    client = await wire.connect(listener, {"data": ignore})
    client.write(b"x")
    await until(lambda: len(entries) == 2)
    await pause(0.02)
    assert entries == ["data ends", "timeout"]
    client.end()
    await soon(client.wait_closed())
    await stopped(listener)


async def test_an_idle_timeout_that_passes_again_and_again_meanwhile_is_called_once(
    wire: Wire,
) -> None:
    """A handler that ran for many idle times owes one `timeout`, not a burst of them."""
    entries: list[str] = []

    async def data(socket: uvsock.Socket[Any], chunk: bytes) -> None:
        await pause(0.1)
        entries.append("data ends")
        socket.timeout(0)

    def timeout(socket: uvsock.Socket[Any]) -> None:
        entries.append("timeout")

    listener = await wire.listen({"data": data, "timeout": timeout}, idle_timeout=0.03)
    client = await wire.connect(listener, {"data": ignore})
    client.write(b"x")
    await until(lambda: "data ends" in entries)
    for _ in range(3):
        await asyncio.sleep(0)
    assert entries.count("timeout") <= 1
    client.end()
    await soon(client.wait_closed())
    await stopped(listener)


async def test_without_a_timeout_handler_a_busy_socket_is_closed_after_its_handler(
    wire: Wire,
) -> None:
    entries: list[str] = []

    async def data(socket: uvsock.Socket[Any], chunk: bytes) -> None:
        socket.timeout(0.005)
        await pause(0.03)
        entries.append("data ends")
        assert socket.write(b"answer") == 6

    listener = await wire.listen({"data": data, "close": lambda s, e: entries.append("close")})
    reader, writer = await wire.streams(listener)
    writer.write(b"x")
    assert await soon(reader.read()) == b"answer"
    writer.close()
    await until(lambda: entries == ["data ends", "close"])
    await stopped(listener)


async def test_after_terminate_in_a_handler_no_timeout_or_end_follows(wire: Wire) -> None:
    recorder = Recorder(timeout=ignore)

    async def data(socket: uvsock.Socket[Any], chunk: bytes) -> None:
        socket.timeout(0.005)
        await pause(0.02)
        socket.terminate()
        await pause(0.01)

    recorder.overrides["data"] = data
    listener = await wire.listen(recorder.table("open", "data", "end", "close", "timeout"))
    client = await wire.connect(listener, {"data": ignore})
    client.end(b"x")
    await until(lambda: "close" in recorder.events)
    assert recorder.events == ["open", "data", "close"]
    await until(lambda: client.ready_state is ReadyState.CLOSED)
    await stopped(listener)


# ── Exceptions ─────────────────────────────────────────────────────────────────────────────────

on_every_wire = pytest.mark.parametrize(
    ("wire", "event"),
    [
        *(
            (kind, event)
            for kind in ("tcp", "unix", "tls")
            for event in ("open", "data", "end", "timeout", "close", "drain")
        ),
        ("tls", "handshake"),
    ],
    indirect=["wire"],
)


def raising_table(event: str, raised: BaseException) -> dict[str, Callable[..., Any]]:
    pending = [raised]

    async def trouble(socket: uvsock.Socket[Any], *arguments: Any) -> None:
        await pause(0.002)
        if pending:
            raise pending.pop()

    def opened(socket: uvsock.Socket[Any]) -> None:
        if event == "timeout":
            socket.timeout(0.001)
        if event == "drain":
            while socket.write(b"x" * 100_000) == 100_000:
                pass

    return {"open": opened, "drain": ignore, "timeout": ignore, event: trouble}


@on_every_wire
async def test_what_an_async_handler_raises_goes_to_error(wire: Wire, event: str) -> None:
    raised = Trouble(event)
    recorder = Recorder(**raising_table(event, raised), error=ignore)
    names = ["open", "data", "end", "close", *(["handshake"] if event == "handshake" else [])]
    listener = await wire.listen(recorder.table(*names))
    client = await wire.connect(listener, {"data": ignore})
    if event == "data":
        client.write(b"trouble")
    if event in ("end", "close"):
        client.end()
    await until(lambda: "error" in recorder.events)
    assert recorder.errors == [raised]
    if event in ("data", "timeout", "drain", "handshake"):
        await pause(0.01)
        assert "close" not in recorder.events
        client.write(b"still heard")
        await until(lambda: recorder.received.endswith(b"still heard"))
        client.end()
    await soon(client.wait_closed())
    await until(lambda: "close" in recorder.events)
    assert recorder.events.count("close") == 1
    await stopped(listener)


@on_every_wire
async def test_without_error_the_loop_is_told_and_the_socket_closed(
    wire: Wire, event: str, loop_errors: list[dict[str, Any]]
) -> None:
    raised = Trouble(event)
    closed: list[object] = []
    table = raising_table(event, raised)
    table.setdefault("data", ignore)
    table.setdefault("close", lambda *call: closed.append(call))
    listener = await wire.listen(table)
    client = await wire.connect(listener, {"data": ignore})
    if event == "data":
        client.write(b"trouble")
    if event in ("end", "close"):
        client.end()
    await soon(client.wait_closed())
    await until(lambda: not listener.connections)
    await until(lambda: loop_errors)
    (context,) = loop_errors
    assert context["exception"] is raised
    assert context["handler"] == event
    assert isinstance(context["socket"], uvsock.Socket)
    if event not in ("close", "handshake"):
        assert len(closed) == 1
    await stopped(listener)


@pytest.mark.parametrize("first", [True, False])
async def test_what_an_async_error_raises_goes_to_the_loop_and_closes(
    wire: Wire, first: bool, loop_errors: list[dict[str, Any]]
) -> None:
    second = Trouble("in error")

    async def data(socket: uvsock.Socket[Any], chunk: bytes) -> None:
        raise Trouble("in data")

    async def error(socket: uvsock.Socket[Any], failure: Exception) -> None:
        if not first:
            await pause()
        raise second

    recorder = Recorder(data=data, error=error)
    listener = await wire.listen(recorder.table("open", "data", "error", "close"))
    client = await wire.connect(listener, {"data": ignore})
    client.write(b"x")
    await soon(client.wait_closed())
    await until(lambda: not listener.connections)
    (context,) = loop_errors
    assert (context["exception"], context["handler"]) == (second, "error")
    assert recorder.events == ["open", "data", "error", "close"]
    await stopped(listener)


@pytest.mark.parametrize("how", ["terminate", "peer ends", "timeout"])
async def test_error_comes_right_after_its_handler_and_before_what_waited(
    wire: Wire, how: str
) -> None:
    """Events that came while the handler ran follow its `error`: `close` is always the last."""
    gate = asyncio.Event()
    recorder = Recorder(error=ignore, timeout=ignore)

    async def data(socket: uvsock.Socket[Any], chunk: bytes) -> None:
        await gate.wait()
        raise Trouble

    recorder.overrides["data"] = data
    listener = await wire.listen(recorder.table("open", "data", "end", "error", "close", "timeout"))
    client = await wire.connect(listener, {"data": ignore})
    client.write(b"x")
    await until(lambda: recorder.received)
    if how == "terminate":
        recorder.socket.terminate()
    elif how == "peer ends":
        client.end()
    else:
        recorder.socket.timeout(0.001)
    await pause(0.02)
    gate.set()
    await until(lambda: "error" in recorder.events)
    expected = {"terminate": ["close"], "peer ends": ["end", "close"], "timeout": ["timeout"]}[how]
    await until(lambda: recorder.events[-1] == expected[-1])
    assert recorder.events == ["open", "data", "error", *expected]
    client.end()
    await soon(client.wait_closed())
    await stopped(listener)


async def test_an_exception_of_one_socket_does_not_stop_another(wire: Wire) -> None:
    async def data(socket: uvsock.Socket[Any], chunk: bytes) -> None:
        await asyncio.sleep(0)
        if chunk == b"bad":
            raise Trouble
        socket.write(chunk)

    failures: list[Exception] = []
    listener = await wire.listen({"data": data, "error": lambda s, error: failures.append(error)})
    reader, writer = await wire.streams(listener)
    _, bad = await wire.streams(listener)
    for _ in range(5):
        bad.write(b"bad")
        writer.write(b"good")
        assert await soon(reader.readexactly(4)) == b"good"
    assert failures
    bad.close()
    writer.close()
    await stopped(listener)


async def test_a_cancelled_handler_closes_its_socket_in_order(
    wire: Wire, loop_errors: list[dict[str, Any]]
) -> None:
    tasks: list[asyncio.Task[Any]] = []

    async def data(socket: uvsock.Socket[Any], chunk: bytes) -> None:
        task = asyncio.current_task()
        assert task is not None
        tasks.append(task)
        await asyncio.sleep(60)

    recorder = Recorder(data=data)
    listener = await wire.listen(recorder.table("open", "data", "close"))
    client = await wire.connect(listener, {"data": ignore})
    client.write(b"x")
    await until(lambda: tasks)
    tasks[0].cancel()
    await soon(client.wait_closed())
    await until(lambda: "close" in recorder.events)
    assert recorder.events == ["open", "data", "close"]
    await stopped(listener)


# What ends the run leaves open sockets to the loop's close().
@pytest.mark.filterwarnings("ignore:unclosed:ResourceWarning")
@pytest.mark.parametrize("kind", [KeyboardInterrupt, SystemExit])
@pytest.mark.parametrize("later", [True, False])
def test_keyboard_interrupt_and_system_exit_end_the_run(
    kind: type[BaseException], later: bool
) -> None:
    progress: list[str] = []

    async def data(socket: uvsock.Socket[Any], chunk: bytes) -> None:
        if later:
            await pause()
        progress.append("raised")
        raise kind(7)

    def error(socket: uvsock.Socket[Any], failure: Exception) -> None:
        progress.append("error")

    async def main() -> None:
        listener = await uvsock.listen({"data": data, "error": error}, "127.0.0.1", 0)
        reader, writer = await asyncio.open_connection("127.0.0.1", listener.port)
        writer.write(b"hello")
        try:
            await reader.read()
            await asyncio.sleep(3)
            progress.append("survived")
        finally:
            writer.transport.abort()

    with (
        pytest.raises(kind) as caught,
        asyncio.Runner(loop_factory=uvsock.new_event_loop) as runner,
    ):
        runner.run(main())
    assert caught.value.args == (7,)
    assert progress == ["raised"]


# ── What it costs, and what counts as async ────────────────────────────────────────────────────


async def test_a_sync_table_makes_no_task(wire: Wire) -> None:
    loop = asyncio.get_running_loop()
    made: list[str] = []

    def factory(loop: asyncio.AbstractEventLoop, coroutine: Any, **options: Any) -> Any:
        made.append(coroutine.__qualname__)
        return asyncio.Task(coroutine, loop=loop, **options)

    table = {name: ignore for name in ("open", "drain", "end", "timeout", "close", "handshake")}
    listener = await wire.listen({**table, "data": lambda socket, data: socket.write(data)})
    client = Recorder()
    socket = await wire.connect(listener, client.table())
    loop.set_task_factory(factory)
    try:
        for number in range(20):
            socket.write(b"x" * 100)
            while len(client.received) < 100 * (number + 1):
                await asyncio.sleep(0.001)
        socket.end()
        while socket.ready_state is not ReadyState.CLOSED:
            await asyncio.sleep(0.001)
    finally:
        loop.set_task_factory(None)
    assert made == []
    await stopped(listener)


class AsyncCallable:
    def __init__(self, seen: list[bytes]) -> None:
        self.seen = seen

    async def __call__(self, socket: uvsock.Socket[Any], data: bytes) -> None:
        await asyncio.sleep(0)
        self.seen.append(data)

    async def method(self, socket: uvsock.Socket[Any], data: bytes) -> None:
        await self(socket, data)


async def collect(seen: list[bytes], socket: uvsock.Socket[Any], data: bytes) -> None:
    await asyncio.sleep(0)
    seen.append(data)


KINDS: dict[str, Callable[[list[bytes]], Callable[..., Any]]] = {
    "callable object": AsyncCallable,
    "bound method": lambda seen: AsyncCallable(seen).method,
    "partial": lambda seen: functools.partial(collect, seen),
    "mock": lambda seen: AsyncMock(side_effect=lambda socket, data: seen.append(data)),
}


@pytest.mark.parametrize("kind", KINDS)
async def test_every_kind_of_async_callable_is_awaited(tcp_wire: Wire, kind: str) -> None:
    seen: list[bytes] = []
    listener = await tcp_wire.listen({"data": KINDS[kind](seen)})
    _, writer = await tcp_wire.streams(listener)
    writer.write(b"hello")
    await until(lambda: seen)
    assert seen == [b"hello"]
    writer.close()
    await stopped(listener)


async def test_a_handler_may_await_an_upgrade_of_its_own_socket(tcp_wire: Wire) -> None:
    """The socket reads for the handshake although its handler runs."""
    authority = tcp_wire.authority
    entries: list[str] = []

    async def data(socket: uvsock.Socket[Any], chunk: bytes) -> None:
        if not socket.encrypted:
            socket.write(b"go")
            await socket.upgrade_tls(authority.server_options)
            entries.append("upgraded")
        else:
            entries.append(chunk.decode())
            socket.end(b"secret answer")

    listener = await tcp_wire.listen({"data": data})
    answers = bytearray()

    async def client_data(socket: uvsock.Socket[Any], chunk: bytes) -> None:
        if chunk == b"go":
            assert await socket.upgrade_tls(authority.client_options) is socket
            socket.write(b"secret")
        else:
            answers.extend(chunk)

    client = await tcp_wire.connect(listener, {"data": client_data})
    client.write(b"STARTTLS")
    await soon(client.wait_closed())
    assert entries == ["upgraded", "secret"]
    assert answers == b"secret answer"
    await stopped(listener)


async def test_the_context_of_listen_is_an_async_handlers_too(wire: Wire) -> None:
    import contextvars

    variable: contextvars.ContextVar[str] = contextvars.ContextVar("variable", default="unset")
    seen: list[str] = []

    async def note(socket: uvsock.Socket[Any], *arguments: Any) -> None:
        seen.append(variable.get())
        await pause(0.001)
        seen.append(variable.get())

    variable.set("at listen")
    listener = await wire.listen({"open": note, "data": note, "end": note, "close": note})
    variable.set("later")
    client = await wire.connect(listener, {"data": ignore})
    client.end(b"x")
    await soon(client.wait_closed())
    await until(lambda: len(seen) == 8)
    assert set(seen) == {"at listen"}
    await stopped(listener)


@pytest.mark.parametrize("how", ["terminate", "close", "raise"])
async def test_no_open_after_an_async_handshake_that_ends_it(tls_wire: Wire, how: str) -> None:
    events: list[str] = []

    async def handshake(socket: uvsock.Socket[Any], success: bool, error: Any) -> None:
        events.append("handshake")
        await asyncio.sleep(0)
        if how == "raise":
            raise ZeroDivisionError
        getattr(socket, how)()

    table = {
        "handshake": handshake,
        "open": lambda socket: events.append("open"),
        "data": lambda socket, data: None,
        "error": lambda socket, error: (events.append("error"), socket.close()),
    }
    async with await tls_wire.listen({"data": lambda *_: None}) as listener:
        with pytest.raises(uvsock.SocketClosedError):
            await soon(tls_wire.connect(listener, table))
        await asyncio.sleep(0.05)
    assert events == (["handshake", "error"] if how == "raise" else ["handshake"])


@pytest.mark.parametrize("asynchronous", [False, True])
async def test_the_error_handler_of_open_can_reply(wire: Wire, asynchronous: bool) -> None:
    written: list[int] = []

    def opened(socket: uvsock.Socket[Any]) -> None:
        raise ZeroDivisionError

    def error(socket: uvsock.Socket[Any], error: Exception) -> None:
        written.append(socket.write(b"sorry"))

    async def error_later(socket: uvsock.Socket[Any], failure: Exception) -> None:
        await asyncio.sleep(0)
        error(socket, failure)

    table = {
        "open": opened,
        "data": lambda *_: None,
        "error": error_later if asynchronous else error,
    }
    async with await wire.listen(table) as listener:
        reader, writer = await wire.streams(listener)
        assert await soon(reader.read()) == b"sorry"
        writer.close()
    assert written == [5]


# ── What can be awaited is awaited ─────────────────────────────────────────────────────────────


class Awaitable:
    """An object that is neither a coroutine nor a Future."""

    def __init__(self, coroutine: Any) -> None:
        self.coroutine = coroutine

    def __await__(self) -> Any:
        return (yield from self.coroutine.__await__())


@types.coroutine
def generated(coroutine: Any) -> Any:
    return (yield from coroutine)


WAYS: dict[str, Callable[[Any], Any]] = {
    "coroutine": lambda coroutine: coroutine,
    "task": asyncio.ensure_future,
    "gathered": lambda coroutine: asyncio.gather(coroutine),
    "object": Awaitable,
    "generator": generated,
}


@pytest.mark.parametrize("way", WAYS)
async def test_what_a_plain_handler_returns_is_awaited(wire: Wire, way: str) -> None:
    """Whatever it is: its socket's next event waits, and what it raises goes to `error`."""
    journal = Journal()
    trouble = Trouble()

    def decorated(name: str) -> Callable[..., Any]:
        async def handler(socket: uvsock.Socket[Any], *arguments: Any) -> None:
            await journal.handler(name)(socket, *arguments)
            if name == "data":
                raise trouble
            if name == "error":
                assert arguments == (trouble,)

        return lambda *arguments: WAYS[way](handler(*arguments))

    names = ["open", "data", "error", "end", "close"]
    if wire.encrypted:
        names.insert(0, "handshake")
    listener = await wire.listen({name: decorated(name) for name in names})
    client = await wire.connect(listener, {"data": ignore})
    client.end(b"x")
    await soon(client.wait_closed())
    await until(lambda: "close ends" in journal.entries)
    assert journal.entries == [f"{name} {step}" for name in names for step in ("begins", "ends")]
    assert journal.received == b"x"
    await stopped(listener)


@pytest.mark.parametrize("way", WAYS)
async def test_a_decorated_timeout_and_drain_are_awaited(tcp_wire: Wire, way: str) -> None:
    journal = Journal()

    def decorated(name: str) -> Callable[..., Any]:
        return lambda *arguments: WAYS[way](journal.handler(name)(*arguments))

    def opened(socket: uvsock.Socket[Any]) -> None:
        socket.timeout(0.005)
        while socket.write(bytes(100_000)) == 100_000:
            pass

    table = {"open": opened, "timeout": decorated("timeout"), "drain": decorated("drain")}
    listener = await tcp_wire.listen(table)
    client = await tcp_wire.connect(listener, {"data": ignore})
    await until(lambda: {"timeout ends", "drain ends"} <= set(journal.entries))
    assert journal.most == 1
    client.end()
    await stopped(listener)


@pytest.mark.parametrize("way", WAYS)
async def test_a_decorated_connect_error_is_awaited(way: str) -> None:
    told: list[Any] = []

    async def tell(socket: uvsock.Socket[Any], error: OSError) -> None:
        await pause()
        told.append(error)

    table = {"data": ignore, "connect_error": lambda *arguments: WAYS[way](tell(*arguments))}
    with pytest.raises(ConnectionRefusedError) as raised:
        await uvsock.connect(table, "127.0.0.1", unused_port("127.0.0.1"))
    assert told == [raised.value]


@pytest.mark.parametrize("way", WAYS)
async def test_connect_waits_for_a_decorated_open(tcp_wire: Wire, way: str) -> None:
    journal = Journal()
    listener = await tcp_wire.listen({"data": ignore})
    client = await tcp_wire.connect(
        listener,
        {"data": ignore, "open": lambda socket: WAYS[way](journal.handler("open")(socket))},
    )
    assert journal.entries == ["open begins", "open ends"]
    client.end()
    await stopped(listener)


async def test_a_returned_future_that_is_cancelled_ends_its_handler(tcp_wire: Wire) -> None:
    future = asyncio.get_running_loop().create_future()
    recorder = Recorder(data=lambda socket, data: future)
    listener = await tcp_wire.listen(recorder.table())
    client = await tcp_wire.connect(listener, {"data": ignore})
    client.end(b"x")
    await until(lambda: "data" in recorder.events)
    await pause()
    assert "end" not in recorder.events
    future.cancel()
    await soon(client.wait_closed())
    await until(lambda: "close" in recorder.events)
    assert [type(error) for error in recorder.errors] == [asyncio.CancelledError]
    await stopped(listener)


# ── Context variables ──────────────────────────────────────────────────────────────────────────


async def test_what_an_async_handler_sets_in_its_context_is_its_own(wire: Wire) -> None:
    tenant: contextvars.ContextVar[str] = contextvars.ContextVar("tenant", default="none")
    began: list[str] = []
    seen: list[tuple[str, str]] = []
    both = asyncio.Event()

    async def data(socket: uvsock.Socket[Any], chunk: bytes) -> None:
        began.append(tenant.get())
        tenant.set(chunk.decode())
        if len(began) == 2:
            both.set()
        await soon(both.wait())
        seen.append((chunk.decode(), tenant.get()))

    listener = await wire.listen({"data": data, "end": lambda socket: began.append(tenant.get())})
    clients = [await wire.connect(listener, {"data": ignore}) for _ in "AB"]
    for client, name in zip(clients, "AB", strict=True):
        client.end(name)
    await until(lambda: len(seen) == 2 and len(began) == 4)
    assert sorted(seen) == [("A", "A"), ("B", "B")]
    assert began == ["none"] * 4
    await stopped(listener)


@pytest.mark.parametrize("side", ["listener", "client"])
async def test_an_async_handler_sees_what_its_decorator_has_set(tcp_wire: Wire, side: str) -> None:
    request: contextvars.ContextVar[str] = contextvars.ContextVar("request", default="none")
    seen: list[str] = []

    def traced(function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def call(socket: uvsock.Socket[Any], data: bytes) -> Any:
            request.set(data.decode())
            return function(socket, data)

        return call

    @traced
    async def received(socket: uvsock.Socket[Any], data: bytes) -> None:
        await pause(0)
        seen.append(request.get())

    here = {"data": received}
    there = {"data": ignore, "open": lambda socket: socket.write(b"traced")}
    listener = await tcp_wire.listen(here if side == "listener" else there)
    client = await tcp_wire.connect(listener, there if side == "listener" else here)
    await until(lambda: seen)
    assert seen == ["traced"]
    client.end()
    await stopped(listener)


async def test_a_data_factory_has_a_context_of_its_own(tcp_wire: Wire) -> None:
    tenant: contextvars.ContextVar[str] = contextvars.ContextVar("tenant", default="none")
    seen: list[str] = []

    def factory() -> None:
        seen.append(tenant.get())
        tenant.set("somebody")

    listener = await tcp_wire.listen({"data": ignore}, data_factory=factory)
    clients = [await tcp_wire.connect(listener, {"data": ignore}) for _ in range(3)]
    await until(lambda: len(seen) == 3)
    assert seen == ["none"] * 3
    for client in clients:
        client.end()
    await stopped(listener)


# ── Handlers that do not wait ──────────────────────────────────────────────────────────────────


@pytest.mark.skipif(sys.version_info < (3, 12), reason="tasks start in the next iteration")
async def test_a_handler_that_does_not_wait_is_done_in_its_own_turn(wire: Wire) -> None:
    loop = asyncio.get_running_loop()
    order: list[object] = []

    async def data(socket: uvsock.Socket[Any], line: bytes) -> None:
        assert asyncio.current_task() is not None
        order.append(line)
        loop.call_soon(order.append, "iteration")
        socket.write(line)
        if line == b"raise":
            raise ValueError("boom")

    table = {"data": data, "error": lambda socket, error: order.append(str(error))}
    listener = await wire.listen(table, framing=uvsock.Lines())
    _, writer = await wire.streams(listener)
    writer.write(b"1\nraise\n3\n")
    await until(lambda: len(order) == 7)
    assert order == [b"1", b"raise", "boom", b"3", *["iteration"] * 3]
    writer.close()
    listener.stop(True)
    await soon(listener.wait_closed())


async def test_a_task_factory_makes_the_tasks_of_handlers(wire: Wire) -> None:
    loop = asyncio.get_running_loop()
    made: list[Any] = []

    def factory(loop: asyncio.AbstractEventLoop, coro: Any, **options: Any) -> asyncio.Task[Any]:
        made.append(coro)
        return asyncio.Task(coro, loop=loop, **options)

    done = asyncio.Event()

    async def data(socket: uvsock.Socket[Any], chunk: bytes) -> None:
        done.set()

    listener = await wire.listen({"data": data})
    _, writer = await wire.streams(listener)
    loop.set_task_factory(factory)
    try:
        writer.write(b"x")
        await done.wait()
    finally:
        loop.set_task_factory(None)
    assert data.__qualname__ in {coro.__qualname__ for coro in made}
    writer.close()
    listener.stop(True)
    await soon(listener.wait_closed())
