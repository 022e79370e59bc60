"""end, shutdown, close, terminate: what is delivered, what is called, and in which state."""

from __future__ import annotations

import asyncio
import errno
import gc
import socket as stdlib
import threading
import time
import weakref
from typing import Any

import pytest
import uvloop

import uvsock
from conftest import Recorder, Wire
from helpers import soon, stopped, until
from uvsock import ReadyState

MIB = 1 << 20


async def linked(
    wire: Wire, recorder: Recorder, *names: str, **options: Any
) -> tuple[uvsock.Listener, asyncio.StreamReader, asyncio.StreamWriter]:
    listener = await wire.listen(recorder.table(*names), **options)
    reader, writer = await wire.streams(listener)
    await until(lambda: recorder.sockets)
    return listener, reader, writer


def without_handshake(events: list[str]) -> list[str]:
    return [event for event in events if event != "handshake"]


# ── The order of events ────────────────────────────────────────────────────────────────────────


async def test_open_data_end_close_in_this_order(wire: Wire) -> None:
    recorder = Recorder()
    listener, reader, writer = await linked(wire, recorder)
    writer.write(b"hello")
    await until(lambda: recorder.received == b"hello")
    writer.close()
    assert await soon(reader.read()) == b""
    await until(lambda: recorder.events[-1] == "close")
    assert without_handshake(recorder.events) == ["open", "data", "end", "close"]
    assert recorder.close_errors == [None]
    await stopped(listener)


async def test_the_own_side_ends_after_the_end_handler_and_its_reply_is_delivered(
    wire: Wire,
) -> None:
    """A reply written in `end`, after the peer's FIN or close_notify, still goes out."""
    recorder = Recorder(end=lambda socket: socket.write(b"farewell"))
    server = await wire.listen(recorder.table())
    client = Recorder()
    socket = await wire.connect(server, client.table())
    socket.write(b"question")
    socket.end()
    await soon(socket.wait_closed())
    assert bytes(client.received) == b"farewell"
    assert without_handshake(client.events) == ["open", "data", "end", "close"]
    await until(lambda: "close" in recorder.events)
    assert bytes(recorder.received) == b"question"
    await stopped(server)


async def test_with_allow_half_open_the_own_side_stays_open(wire: Wire) -> None:
    recorder = Recorder()
    server = await wire.listen(recorder.table(), allow_half_open=True)
    client = Recorder()
    socket = await wire.connect(server, client.table())
    socket.end(b"last words")
    await until(lambda: "end" in recorder.events)
    accepted = recorder.socket
    assert accepted.ready_state is ReadyState.ESTABLISHED
    await asyncio.sleep(0.02)
    for number in range(5):
        assert accepted.write(b"%d" % number) == 1
        await asyncio.sleep(0.005)
    accepted.end()
    await soon(socket.wait_closed())
    assert bytes(client.received) == b"01234"
    await until(lambda: "close" in recorder.events)
    await stopped(server)


async def test_end_takes_the_last_chunk_whole_and_still_reads(wire: Wire) -> None:
    recorder = Recorder()
    server = await wire.listen(recorder.table(), high_water_mark=1000, allow_half_open=True)
    client = Recorder(data=lambda socket, data: None)
    socket = await wire.connect(server, client.table(), allow_half_open=True)
    await until(lambda: recorder.sockets)
    payload = bytes(range(256)) * (8 * MIB // 256)
    assert recorder.socket.end(payload) == len(payload)
    assert recorder.socket.ready_state is ReadyState.SHUTDOWN
    assert recorder.socket.end() == -1
    assert recorder.socket.end(b"again") == -1
    await until(lambda: "end" in client.events, 10)
    assert bytes(client.received) == payload
    socket.write(b"still heard")
    socket.end()
    await soon(socket.wait_closed())
    await until(lambda: "close" in recorder.events)
    assert bytes(recorder.received) == b"still heard"
    assert "end" in recorder.events
    await stopped(server)


async def test_shutdown_half_closes(wire: Wire) -> None:
    recorder = Recorder()
    server = await wire.listen(recorder.table())
    client = Recorder()
    socket = await wire.connect(server, client.table())
    assert socket.shutdown() is None
    socket.shutdown()
    assert socket.ready_state is ReadyState.SHUTDOWN
    assert socket.write(b"x") == -1
    await soon(socket.wait_closed())
    assert without_handshake(recorder.events) == ["open", "end", "close"]
    await stopped(server)


async def test_shutdown_read_drops_what_comes_and_a_later_end_works(wire: Wire) -> None:
    recorder = Recorder()
    listener, reader, writer = await linked(wire, recorder)
    recorder.socket.shutdown(True)
    writer.write(b"unheard")
    await asyncio.sleep(0.02)
    assert recorder.socket.ready_state is ReadyState.ESTABLISHED
    assert recorder.socket.end(b"bye") == 3
    assert await soon(reader.read()) == b"bye"
    writer.close()
    await until(lambda: "close" in recorder.events)
    assert not recorder.received
    with pytest.raises(TypeError, match="^read"):
        recorder.socket.shutdown(read=1)  # type: ignore[arg-type]
    await stopped(listener)


async def test_with_socket_ends_it(wire: Wire) -> None:
    recorder = Recorder()
    listener, reader, writer = await linked(wire, recorder)
    with recorder.socket as same:
        assert same is recorder.socket
        same.write(b"inside")
    assert recorder.socket.ready_state is ReadyState.SHUTDOWN
    assert await soon(reader.read()) == b"inside"
    writer.close()
    await until(lambda: "close" in recorder.events)
    await stopped(listener)


# ── Nothing accepted is lost ───────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("action", ["end", "close"])
async def test_everything_accepted_arrives_though_the_peer_keeps_sending_and_reads_slowly(
    plain_wire: Wire, action: str
) -> None:
    """Unread input at close would make the kernel send an RST that destroys what is under way."""
    total = 0

    def opened(socket: uvsock.Socket[Any]) -> None:
        nonlocal total
        while (taken := socket.write(b"x" * 60_000)) == 60_000:
            total += taken
        total += taken
        getattr(socket, action)()

    listener = await plain_wire.listen({"open": opened, "data": lambda socket, data: None})
    if plain_wire.kind == "unix":
        peer = stdlib.socket(stdlib.AF_UNIX)
        address: Any = listener.unix
    else:
        peer = stdlib.socket()
        address = (listener.hostname, listener.port)

    def slow_reader() -> int:
        peer.settimeout(5)
        peer.connect(address)
        count = 0
        with peer:
            while chunk := peer.recv(30_000):
                count += len(chunk)
                try:
                    peer.send(b"noise" * 500)
                except (BrokenPipeError, ConnectionResetError):
                    pytest.fail(f"the connection was reset after {count} bytes")
        return count

    received = await soon(asyncio.to_thread(slow_reader), 20)
    assert received == total
    assert total > 100_000
    await stopped(listener)


async def test_close_over_tls_delivers_everything_while_the_peer_sends(tls_wire: Wire) -> None:
    total = 0

    def opened(socket: uvsock.Socket[Any]) -> None:
        nonlocal total
        while (taken := socket.write(b"x" * 60_000)) == 60_000:
            total += taken
        total += taken
        socket.close()

    server = await tls_wire.listen({"open": opened, "data": lambda socket, data: None})
    received = 0

    def chatty(socket: uvsock.Socket[Any], data: bytes) -> None:
        nonlocal received
        received += len(data)
        socket.write(b"noise" * 100)
        socket.pause()
        asyncio.get_running_loop().call_later(0.001, socket.resume)

    socket = await tls_wire.connect(server, {"data": chatty})
    await soon(socket.wait_closed(), 20)
    assert received == total
    assert total > 100_000
    await stopped(server)


async def test_the_automatic_end_after_the_peers_fin_delivers_everything(wire: Wire) -> None:
    payload = b"y" * (6 * MIB)

    def data(socket: uvsock.Socket[Any], _: bytes) -> None:
        socket.end(payload)

    server = await wire.listen({"data": data})
    client = Recorder()
    socket = await wire.connect(server, client.table())
    socket.end(b"go")
    await soon(socket.wait_closed(), 20)
    assert bytes(client.received) == payload
    await stopped(server)


async def test_a_peer_that_takes_nothing_is_reset_after_the_linger_time(plain_wire: Wire) -> None:
    recorder = Recorder()
    listener, _, writer = await linked(
        plain_wire, recorder, "open", "data", "close", linger_timeout=0.2
    )
    writer.transport.pause_reading()
    socket = recorder.socket
    while socket.write(b"x" * MIB) == MIB:
        pass
    started = asyncio.get_running_loop().time()
    socket.close()
    assert socket.ready_state is ReadyState.SHUTDOWN
    await soon(socket.wait_closed())
    assert asyncio.get_running_loop().time() - started >= 0.19
    (error,) = recorder.close_errors
    assert isinstance(error, TimeoutError)
    assert error.errno == errno.ETIMEDOUT
    assert "linger_timeout" in str(error)
    writer.transport.abort()
    await stopped(listener)


async def test_close_waits_for_the_peers_fin_no_longer_than_the_linger_time(wire: Wire) -> None:
    recorder = Recorder()
    listener, reader, writer = await linked(wire, recorder, linger_timeout=0.2)
    recorder.socket.write(b"all of it")
    recorder.socket.close()
    assert await soon(reader.readexactly(9)) == b"all of it"
    await soon(recorder.socket.wait_closed())
    assert recorder.close_errors == [None]
    writer.close()
    await stopped(listener)


async def test_after_close_only_close_follows(wire: Wire) -> None:
    recorder = Recorder(data=lambda socket, data: socket.close())
    listener, _, writer = await linked(wire, recorder)
    writer.write(b"first")
    await until(lambda: recorder.received)
    writer.write(b"second")
    writer.close()
    await until(lambda: "close" in recorder.events)
    assert without_handshake(recorder.events) == ["open", "data", "close"]
    assert bytes(recorder.received) == b"first"
    await stopped(listener)


async def test_terminate_resets_and_drops(plain_wire: Wire) -> None:
    recorder = Recorder()
    listener, reader, writer = await linked(plain_wire, recorder)
    socket = recorder.socket
    while socket.write(b"x" * MIB) == MIB:
        pass
    socket.terminate()
    socket.terminate()
    assert socket.ready_state is ReadyState.SHUTDOWN
    assert socket.writable_length == 0
    await soon(socket.wait_closed())
    assert socket.ready_state is ReadyState.CLOSED
    assert recorder.close_errors == [None]
    if plain_wire.kind == "tcp":
        with pytest.raises(ConnectionResetError):
            await soon(reader.read())
    writer.close()
    await stopped(listener)


async def test_terminate_of_an_idle_socket_sends_an_rst(tcp_wire: Wire) -> None:
    recorder = Recorder()
    listener, reader, writer = await linked(tcp_wire, recorder)
    recorder.socket.terminate()
    with pytest.raises(ConnectionResetError):
        await soon(reader.read())
    writer.close()
    await stopped(listener)


async def test_a_reset_goes_to_close_and_skips_end(tcp_wire: Wire) -> None:
    recorder = Recorder()
    listener, _, writer = await linked(tcp_wire, recorder)
    peer = writer.get_extra_info("socket")
    peer.setsockopt(stdlib.SOL_SOCKET, stdlib.SO_LINGER, b"\1\0\0\0\0\0\0\0")
    writer.transport.abort()
    await until(lambda: "close" in recorder.events)
    assert recorder.events == ["open", "close"]
    (error,) = recorder.close_errors
    assert isinstance(error, ConnectionResetError)
    await stopped(listener)


# ── State and addresses ────────────────────────────────────────────────────────────────────────


async def test_ready_state_goes_through_established_shutdown_closed(wire: Wire) -> None:
    seen: list[ReadyState] = []
    recorder = Recorder(
        open=lambda socket: seen.append(socket.ready_state),
        close=lambda socket, error: seen.append(socket.ready_state),
    )
    listener, _, writer = await linked(wire, recorder)
    socket = recorder.socket
    socket.close()
    seen.append(socket.ready_state)
    assert listener.connections == 1
    assert socket in listener.sockets
    writer.close()
    await soon(socket.wait_closed())
    assert seen == [ReadyState.ESTABLISHED, ReadyState.SHUTDOWN, ReadyState.CLOSED]
    assert [int(state) for state in seen] == [1, -2, 0]
    assert listener.connections == 0
    await stopped(listener)


async def test_addresses_are_valid_after_close(wire: Wire) -> None:
    recorder = Recorder()
    listener, _, writer = await linked(wire, recorder)
    socket = recorder.socket
    if wire.kind == "unix":
        expected: tuple[Any, ...] = (None,) * 6
    else:
        host, port = writer.get_extra_info("sockname")[:2]
        expected = (host, port, "IPv4", listener.hostname, listener.port, "IPv4")

    def addresses() -> tuple[Any, ...]:
        return (
            socket.remote_address,
            socket.remote_port,
            socket.remote_family,
            socket.local_address,
            socket.local_port,
            socket.local_family,
        )

    assert addresses() == expected
    assert socket.listener is listener
    assert socket.fileno() >= 0
    writer.close()
    await soon(socket.wait_closed())
    assert addresses() == expected
    assert socket.listener is None
    assert socket.fileno() == -1
    assert socket.get_extra_info("nothing", 5) == 5
    await stopped(listener)


async def test_ipv6_addresses() -> None:
    try:
        listener = await uvsock.listen({"data": lambda socket, data: None}, "::1", 0)
    except OSError:
        pytest.skip("no IPv6 on this machine")
    socket = await uvsock.connect({"data": lambda socket, data: None}, "::1", listener.port)
    assert (socket.remote_address, socket.remote_family) == ("::1", "IPv6")
    assert socket.get_extra_info("peername")[:2] == ("::1", listener.port)
    socket.end()
    await soon(socket.wait_closed())
    assert socket.get_extra_info("peername") == ("::1", listener.port, 0, 0)
    await stopped(listener)


async def test_methods_of_a_closed_socket_do_nothing_and_do_not_raise(wire: Wire) -> None:
    recorder = Recorder()
    listener, _, writer = await linked(wire, recorder)
    socket = recorder.socket
    writer.close()
    await soon(socket.wait_closed())
    assert socket.write(b"x") == -1
    assert socket.end(b"x") == -1
    socket.close()
    socket.terminate()
    socket.shutdown()
    socket.pause()
    socket.resume()
    socket.flush()
    socket.timeout(1)
    socket.ref()
    socket.unref()
    socket.ref()
    with socket.cork():
        assert socket.write(b"x") == -1
    assert socket.set_no_delay() is False
    assert socket.set_keep_alive(True, 1.0) is False
    assert socket.writable_length == 0
    await soon(socket.drained())
    await soon(socket.wait_closed())
    assert recorder.events.count("close") == 1
    await stopped(listener)


async def test_a_socket_is_freed_by_reference_counting_alone(wire: Wire) -> None:
    gone: list[bool] = []

    def opened(socket: uvsock.Socket[Any]) -> None:
        weakref.finalize(socket, gone.append, True)

    listener = await wire.listen({"open": opened, "data": lambda s, d: s.write(d)})
    gc.collect()
    gc.disable()
    try:
        reader, writer = await wire.streams(listener)
        writer.write(b"x" * 100)
        assert len(await soon(reader.readexactly(100))) == 100
        assert not gone
        writer.close()
        await until(lambda: gone, 3)
    finally:
        gc.enable()
    await stopped(listener)


async def test_an_open_socket_that_nobody_holds_stays_alive(wire: Wire) -> None:
    listener = await wire.listen({"data": lambda socket, data: socket.write(data)})
    reader, writer = await wire.streams(listener)
    gc.collect()
    writer.write(b"still there")
    assert await soon(reader.readexactly(11)) == b"still there"
    writer.close()
    await stopped(listener)


# ── Reading and its flow ───────────────────────────────────────────────────────────────────────


async def test_pause_holds_data_and_end_back_until_resume(wire: Wire) -> None:
    recorder = Recorder(open=lambda socket: socket.pause())
    listener, _, writer = await linked(wire, recorder)
    writer.write(b"waiting")
    if writer.can_write_eof():
        writer.write_eof()
    else:
        writer.close()
    await asyncio.sleep(0.05)
    assert without_handshake(recorder.events) == ["open"]
    recorder.socket.resume()
    assert without_handshake(recorder.events) == ["open"]
    await until(lambda: "close" in recorder.events)
    writer.close()
    assert bytes(recorder.received) == b"waiting"
    assert without_handshake(recorder.events) == ["open", "data", "end", "close"]
    await stopped(listener)


async def test_a_paused_socket_lets_the_peer_fill_up(wire: Wire) -> None:
    recorder = Recorder(data=lambda socket, data: socket.pause())
    listener, _, writer = await linked(wire, recorder)
    payload = b"z" * (4 * MIB)
    writer.write(payload)
    await until(lambda: recorder.received)
    await asyncio.sleep(0.05)
    seen = len(recorder.received)
    assert recorder.events.count("data") == 1
    assert seen < len(payload)
    total = Recorder()
    listener.reload(total.table())
    recorder.socket.resume()
    await until(lambda: seen + len(total.received) == len(payload), 10)
    writer.close()
    await until(lambda: "close" in total.events)
    await stopped(listener)


async def test_pausing_in_the_middle_of_what_has_arrived_loses_nothing(wire: Wire) -> None:
    """The rest of a TLS chunk that was decrypted, or of one read, waits for `resume`."""
    loop = asyncio.get_running_loop()

    def data(socket: uvsock.Socket[Any], _: bytes) -> None:
        socket.pause()
        loop.call_later(0.001, socket.resume)

    recorder = Recorder(data=data)
    listener, _, writer = await linked(wire, recorder)
    payload = bytes(range(256)) * 4096
    for start in range(0, len(payload), 50_000):
        writer.write(payload[start : start + 50_000])
        await writer.drain()
    writer.close()
    await until(lambda: "close" in recorder.events, 20)
    assert bytes(recorder.received) == payload
    await stopped(listener)


# ── Time ───────────────────────────────────────────────────────────────────────────────────────


async def test_timeout_is_called_once_and_traffic_does_not_move_it(wire: Wire) -> None:
    loop = asyncio.get_running_loop()
    times: list[float] = []
    recorder = Recorder(timeout=lambda socket: times.append(loop.time()))
    listener, _, writer = await linked(wire, recorder)
    started = loop.time()
    recorder.socket.timeout(0.1)
    for _ in range(8):
        writer.write(b"x")
        await asyncio.sleep(0.02)
    await until(lambda: times)
    await asyncio.sleep(0.15)
    assert len(times) == 1
    assert 0.099 <= times[0] - started < 1
    assert recorder.socket.ready_state is ReadyState.ESTABLISHED
    writer.close()
    await until(lambda: "close" in recorder.events)
    await stopped(listener)


async def test_timeout_zero_turns_it_off_and_a_new_one_replaces_the_old(wire: Wire) -> None:
    loop = asyncio.get_running_loop()
    times: list[float] = []
    recorder = Recorder(timeout=lambda socket: times.append(loop.time()))
    listener, _, writer = await linked(wire, recorder)
    recorder.socket.timeout(0.03)
    recorder.socket.timeout(0)
    await asyncio.sleep(0.08)
    assert not times
    started = loop.time()
    recorder.socket.timeout(10)
    recorder.socket.timeout(0.03)
    recorder.socket.timeout(0.1)
    await until(lambda: times)
    assert times[0] - started >= 0.097  # the loop's clock counts milliseconds, at both ends
    for bad, error in ((-1, ValueError), ("1", TypeError), (float("nan"), ValueError)):
        with pytest.raises(error, match="^seconds"):
            recorder.socket.timeout(bad)  # type: ignore[arg-type]
    writer.close()
    await until(lambda: "close" in recorder.events)
    await stopped(listener)


def test_a_timeout_for_each_message_arms_no_timer_for_each() -> None:
    class Counting(uvloop.Loop):
        timers = 0

        def call_later(self, *arguments: Any, **keywords: Any) -> asyncio.TimerHandle:
            self.timers += 1
            return super().call_later(*arguments, **keywords)

    async def main() -> int:
        loop = asyncio.get_running_loop()
        assert isinstance(loop, Counting)

        def data(socket: uvsock.Socket[Any], data: bytes) -> None:
            socket.timeout(30)
            socket.write(data)

        answers = Recorder()
        async with await uvsock.listen({"data": data}, "127.0.0.1", 0) as listener:
            client = await uvsock.connect(answers.table(), "127.0.0.1", listener.port)
            before = loop.timers
            for number in range(100):
                client.write(b"x")
                while len(answers.received) <= number:
                    await asyncio.sleep(0)
            taken = loop.timers - before
            client.end()
            await client.wait_closed()
        return taken

    with asyncio.Runner(loop_factory=Counting) as runner:
        assert runner.run(main()) == 1


async def test_without_a_timeout_handler_the_socket_is_closed(wire: Wire) -> None:
    recorder = Recorder()
    listener, reader, writer = await linked(wire, recorder)
    recorder.socket.timeout(0.03)
    assert await soon(reader.read()) == b""
    writer.close()
    await until(lambda: "close" in recorder.events)
    assert recorder.close_errors == [None]
    assert "end" not in recorder.events
    await stopped(listener)


async def test_idle_timeout_is_moved_by_traffic_and_comes_again(wire: Wire) -> None:
    loop = asyncio.get_running_loop()
    times: list[float] = []
    recorder = Recorder(timeout=lambda socket: times.append(loop.time()))
    listener, _, writer = await linked(wire, recorder, idle_timeout=0.15)
    for _ in range(10):
        writer.write(b"x")
        await asyncio.sleep(0.03)
    assert not times
    await until(lambda: len(times) == 2)
    assert times[1] - times[0] >= 0.149
    writer.close()
    await until(lambda: "close" in recorder.events)
    await stopped(listener)


# ── ref, unref ─────────────────────────────────────────────────────────────────────────────────


async def test_ref_and_unref_count_once(wire: Wire) -> None:
    from uvsock._stream import state_of

    state = state_of(asyncio.get_running_loop())
    assert state.held == 0
    recorder = Recorder()
    listener, _, writer = await linked(wire, recorder)
    assert state.held == 2
    recorder.socket.unref()
    recorder.socket.unref()
    assert state.held == 1
    recorder.socket.ref()
    recorder.socket.ref()
    assert state.held == 2
    listener.unref()
    listener.unref()
    assert state.held == 1
    recorder.socket.unref()
    assert state.held == 0
    writer.close()
    await until(lambda: "close" in recorder.events)
    await stopped(listener)
    assert state.held == 0


# ── Many ───────────────────────────────────────────────────────────────────────────────────────


async def test_what_came_before_a_reset_is_delivered_though_paused(tcp_wire: Wire) -> None:
    """A failed write must not drop what was received before and not yet looked at."""
    recorder = Recorder(open=lambda socket: socket.pause())
    listener, _, writer = await linked(tcp_wire, recorder)
    writer.write(b"the last words")
    await asyncio.sleep(0.02)
    peer = writer.get_extra_info("socket")
    peer.setsockopt(stdlib.SOL_SOCKET, stdlib.SO_LINGER, b"\1\0\0\0\0\0\0\0")
    writer.transport.abort()
    await asyncio.sleep(0.02)
    socket = recorder.socket
    for _ in range(100):
        if socket.write(b"x") == -1:
            break
        await asyncio.sleep(0.002)
    await soon(socket.wait_closed())
    assert bytes(recorder.received) == b"the last words"
    assert recorder.events == ["open", "data", "close"]
    assert isinstance(recorder.close_errors[0], (ConnectionResetError, BrokenPipeError))
    await stopped(listener)


async def test_end_during_the_handshake_takes_nothing(tls_wire: Wire) -> None:
    listener = await tls_wire.listen({"data": lambda socket, data: None})
    reader, writer = await asyncio.open_connection(listener.hostname, listener.port)
    await until(lambda: listener.connections)
    (socket,) = listener.sockets
    assert socket.ready_state is ReadyState.CONNECTING
    assert socket.write(b"x") == 0
    assert socket.end(b"x") == -1
    assert socket.writable_length == 0
    socket.close()
    assert await soon(reader.read()) == b""
    writer.close()
    await stopped(listener)


@pytest.mark.parametrize("also_closing", [True, False])
async def test_stop_reaches_what_was_accepted_in_the_same_iteration(
    wire: Wire, also_closing: bool
) -> None:
    """uvloop accepts many connections at a time, and makes their transports an iteration later."""
    opened: list[Any] = []
    listener = await wire.listen(
        {"open": opened.append, "data": lambda socket, data: None}, backlog=400
    )
    clients = []
    for _ in range(300):
        family = stdlib.AF_UNIX if wire.kind == "unix" else stdlib.AF_INET
        client = stdlib.socket(family)
        client.connect(listener.unix or (listener.hostname, listener.port))
        client.setblocking(False)
        clients.append(client)
    await asyncio.sleep(0)  # one iteration: some are accepted, the others wait in the backlog
    listener.stop(also_closing)
    try:
        if also_closing:
            await soon(listener.wait_closed())
        else:
            stopping = asyncio.create_task(listener.shutdown(0.2))
            await soon(stopping)
        assert not listener.connections
    finally:
        for client in clients:
            client.close()


async def test_cancelling_listen_leaves_nothing() -> None:
    for delay in (None, 0):
        task = asyncio.create_task(
            uvsock.listen({"data": lambda socket, data: None}, "localhost", 0)
        )
        if delay is not None:
            await asyncio.sleep(delay)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task


async def test_a_timeout_of_a_closing_socket_does_not_spin(plain_wire: Wire) -> None:
    """It is never told of after close(), so it must not be armed again either."""

    def data(socket: uvsock.Socket[Any], data: bytes) -> None:
        socket.timeout(0.05)
        socket.close()

    listener = await plain_wire.listen({"data": data})
    reader, writer = await plain_wire.streams(listener)
    writer.write(b"x")
    assert await soon(reader.read()) == b""  # and this side stays open
    await asyncio.sleep(0.1)
    used = time.process_time()
    await asyncio.sleep(0.5)
    assert time.process_time() - used < 0.3
    writer.close()
    await stopped(listener)


async def test_a_timeout_set_in_the_handshake_does_not_spin(tls_wire: Wire) -> None:
    server = Recorder()
    listener = await tls_wire.listen(server.table())
    silent = stdlib.create_connection((listener.hostname, listener.port))
    await until(lambda: listener.sockets)
    for socket in listener.sockets:
        socket.timeout(0.05)
    await asyncio.sleep(0.1)
    used = time.process_time()
    await asyncio.sleep(0.3)
    assert time.process_time() - used < 0.2
    assert not server.events
    silent.close()
    client = await tls_wire.connect(listener, {"data": lambda *_: None})
    await until(lambda: "open" in server.events)
    client.close()
    await stopped(listener)


def test_a_loop_may_be_set_up_in_one_thread_and_run_in_another() -> None:
    loop = uvloop.new_event_loop()
    listening = uvsock.listen({"data": lambda socket, data: socket.write(data)}, "127.0.0.1", 0)

    async def wait() -> uvsock.Listener:
        return await listening

    listener = loop.run_until_complete(wait())
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    try:
        with stdlib.create_connection((listener.hostname, listener.port), 5) as sock:
            sock.sendall(b"ping")
            assert sock.recv(4) == b"ping"
        with pytest.raises(RuntimeError, match="call_soon_threadsafe"):
            listener.stop(True)  # now this is the wrong thread
        asyncio.run_coroutine_threadsafe(listener.shutdown(0), loop).result(5)
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join(5)
        loop.close()


async def test_close_with_a_full_kernel_and_nothing_held(plain_wire: Wire) -> None:
    """The FIN follows what the kernel has; nothing is thrown away when the linger is over."""
    accepted = 0

    def opened(socket: uvsock.Socket[Any]) -> None:
        nonlocal accepted
        while (taken := socket.write(bytes(100_000))) == 100_000:
            accepted += taken
        accepted += taken
        assert socket.writable_length == 0
        socket.close()

    listener = await plain_wire.listen(
        {"open": opened, "data": lambda *_: None}, cork=False, linger_timeout=0.1
    )
    sock = plain_wire.dial(listener)
    await asyncio.sleep(0.3)

    def receive() -> int:
        received = 0
        while chunk := sock.recv(1 << 16):
            received += len(chunk)
        return received

    assert await soon(asyncio.to_thread(receive)) == accepted
    sock.close()
    await stopped(listener)
