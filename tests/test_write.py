"""What `write` accepts, in which order it leaves, and in how many system calls."""

from __future__ import annotations

import array
import asyncio
import contextlib
import gc
import io
import os
import random
import socket as stdlib
import struct
import sys
import warnings
from typing import Any

import pytest

import uvsock
from conftest import Recorder, Wire, run_python
from helpers import soon, until

MIB = 1 << 20


async def accepted(wire: Wire, **options: Any) -> tuple[Any, Any, Any, uvsock.Socket[Any]]:
    """A listener, the streams of its one client, and the accepted socket."""
    sockets: list[uvsock.Socket[Any]] = []
    handlers = options.pop("handlers", {})
    table = {"open": sockets.append, "data": lambda socket, data: None, **handlers}
    listener = await wire.listen(table, **options)
    reader, writer = await wire.streams(listener)
    await until(lambda: sockets)
    return listener, reader, writer, sockets[0]


async def finish(listener: uvsock.Listener, writer: asyncio.StreamWriter) -> None:
    writer.close()
    with contextlib.suppress(ConnectionError):  # after terminate()
        await writer.wait_closed()
    listener.stop(True)
    await soon(listener.wait_closed())


def segments(socket: uvsock.Socket[Any]) -> int:
    """TCP segments with data sent so far: tcpi_data_segs_out of linux/tcp.h."""
    duplicate = stdlib.fromfd(socket.fileno(), stdlib.AF_INET, stdlib.SOCK_STREAM)
    with duplicate:
        info = duplicate.getsockopt(stdlib.IPPROTO_TCP, stdlib.TCP_INFO, 160)
    return int(struct.unpack_from("I", info, 156)[0])


linux_only = pytest.mark.skipif(sys.platform != "linux", reason="TCP_INFO is Linux's")


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (b"bytes", b"bytes"),
        ("text ü €", "text ü €".encode()),
        (bytearray(b"array"), b"array"),
        (memoryview(b"xviewx")[1:-1], b"view"),
        (array.array("I", [1, 2, 3]), array.array("I", [1, 2, 3]).tobytes()),
        (memoryview(array.array("H", [5, 6])), array.array("H", [5, 6]).tobytes()),
    ],
)
async def test_write_takes_text_and_every_contiguous_buffer(
    wire: Wire, data: Any, expected: bytes
) -> None:
    listener, reader, writer, socket = await accepted(wire)
    assert socket.write(data) == len(expected)
    assert await soon(reader.readexactly(len(expected))) == expected
    assert socket.bytes_written == len(expected)
    await finish(listener, writer)


async def test_offset_and_length_count_bytes(wire: Wire) -> None:
    listener, reader, writer, socket = await accepted(wire)
    assert socket.write(b"0123456789", 4) == 6
    assert socket.write(b"0123456789", 2, 3) == 3
    assert socket.write("aüb", 1, 2) == 2  # the two bytes of the ü
    assert socket.write(bytearray(b"xyz"), length=1) == 1
    assert socket.write(b"abc", 3) == 0
    assert socket.write(b"", 0, 0) == 0
    assert await soon(reader.readexactly(12)) == b"456789234" + "ü".encode() + b"x"
    await finish(listener, writer)


@pytest.mark.parametrize(
    ("arguments", "error", "name"),
    [
        ((5,), TypeError, "data"),
        ((None,), TypeError, "data"),
        ((["x"],), TypeError, "data"),
        ((memoryview(b"abcdef")[::2],), TypeError, "data"),
        ((b"abc", 4), ValueError, "offset"),
        ((b"abc", -1), ValueError, "offset"),
        ((b"abc", 1, 3), ValueError, "length"),
        ((b"abc", 0, -1), ValueError, "length"),
        ((b"abc", "1"), TypeError, "offset"),
        ((b"abc", True), TypeError, "offset"),
        ((b"abc", 0, 1.0), TypeError, "length"),
    ],
)
async def test_bad_arguments_name_the_argument(
    tcp_wire: Wire, arguments: tuple[Any, ...], error: type[Exception], name: str
) -> None:
    listener, _, writer, socket = await accepted(tcp_wire)
    with pytest.raises(error, match=f"^{name}: "):
        socket.write(*arguments)
    assert socket.bytes_written == 0
    await finish(listener, writer)


@pytest.mark.parametrize("cork", [True, False])
async def test_a_short_write_is_followed_by_drain_and_nothing_is_lost(
    wire: Wire, cork: bool
) -> None:
    """Bun's `write` loop: count what was taken, keep the rest, go on at `drain`."""
    payload = random.Random(1).randbytes(12 * MIB)
    progress = {"offset": 0, "short": 0, "drains": 0}
    held: list[int] = []

    def push(socket: uvsock.Socket[Any]) -> None:
        while progress["offset"] < len(payload):
            wanted = min(70_000, len(payload) - progress["offset"])
            taken = socket.write(payload, progress["offset"], wanted)
            progress["offset"] += taken
            held.append(socket.writable_length)
            if taken < wanted:
                progress["short"] += 1
                return
        socket.end()

    def drain(socket: uvsock.Socket[Any]) -> None:
        progress["drains"] += 1
        assert socket.writable_length == 0
        push(socket)

    listener = await wire.listen(
        {"open": push, "drain": drain, "data": lambda socket, data: None}, cork=cork
    )
    received = await wire.receive_all(listener)
    assert received == payload
    assert progress["short"] > 0
    assert progress["drains"] == progress["short"]
    assert max(held) <= (65536 if cork or wire.encrypted else 0)
    listener.stop(True)
    await soon(listener.wait_closed())


async def test_no_more_than_the_high_water_mark_is_held(wire: Wire) -> None:
    listener, reader, writer, socket = await accepted(wire, high_water_mark=10_000)
    total = 0
    while (taken := socket.write(b"x" * 5000)) == 5000:
        total += taken
        assert socket.writable_length <= 10_000
    total += taken
    assert socket.high_water_mark == 10_000
    assert socket.writable_length <= 10_000
    assert socket.write(b"y" * 20_000) == 0
    assert len(await soon(reader.readexactly(total))) == total
    await soon(socket.drained())
    assert socket.writable_length == 0
    await finish(listener, writer)


async def test_small_and_large_writes_keep_their_order(wire: Wire) -> None:
    sizes = random.Random(7)
    expected = bytearray()

    def data(socket: uvsock.Socket[Any], _: bytes) -> None:
        for number in range(300):
            piece = bytes([number % 251]) * sizes.choice((1, 7, 100, 4000, 16_384, 16_385, 40_000))
            taken = socket.write(piece)
            expected.extend(piece[:taken])
            if taken < len(piece):
                break
            if number % 17 == 0:
                socket.flush()
        socket.end()

    listener = await wire.listen({"data": data})
    assert await wire.receive_all(listener, b"go") == expected
    listener.stop(True)
    await soon(listener.wait_closed())


async def test_writes_outside_a_handler_leave_at_the_end_of_the_iteration(wire: Wire) -> None:
    listener, reader, writer, socket = await accepted(wire)
    socket.write(b"one ")
    socket.write(b"two")
    assert socket.writable_length == 7
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    assert socket.writable_length == 0
    assert await soon(reader.readexactly(7)) == b"one two"
    await finish(listener, writer)


async def test_flush_sends_what_is_held_now(wire: Wire) -> None:
    listener, reader, writer, socket = await accepted(wire)
    socket.write(b"now")
    socket.flush()
    assert socket.writable_length == 0
    assert await soon(reader.readexactly(3)) == b"now"
    await finish(listener, writer)


@linux_only
async def test_five_writes_of_a_handler_leave_in_one_segment(tcp_wire: Wire) -> None:
    def data(socket: uvsock.Socket[Any], _: bytes) -> None:
        for letter in b"abcde":
            socket.write(bytes([letter]))

    listener, reader, writer, socket = await accepted(tcp_wire, handlers={"data": data})
    for _ in range(3):
        before = segments(socket)
        writer.write(b"go")
        assert await soon(reader.readexactly(5)) == b"abcde"
        assert segments(socket) - before == 1
    await finish(listener, writer)


@linux_only
async def test_without_cork_every_write_is_a_segment_and_nothing_is_held(tcp_wire: Wire) -> None:
    def data(socket: uvsock.Socket[Any], _: bytes) -> None:
        for letter in b"abcde":
            assert socket.write(bytes([letter])) == 1
            assert socket.writable_length == 0

    listener, reader, writer, socket = await accepted(tcp_wire, handlers={"data": data}, cork=False)
    before = segments(socket)
    writer.write(b"go")
    assert await soon(reader.readexactly(5)) == b"abcde"
    assert segments(socket) - before == 5
    await finish(listener, writer)


@linux_only
@pytest.mark.parametrize("cork", [True, False])
async def test_an_explicit_cork_gathers_outside_handlers(tcp_wire: Wire, cork: bool) -> None:
    listener, reader, writer, socket = await accepted(tcp_wire, cork=cork)
    before = segments(socket)
    with socket.cork():
        socket.write(b"ab")
        await asyncio.sleep(0.01)
        with socket.cork() as same:
            assert same is socket
            socket.write(b"cd")
        assert socket.writable_length == 4
    assert socket.writable_length == 0
    assert await soon(reader.readexactly(4)) == b"abcd"
    assert segments(socket) - before == 1
    await finish(listener, writer)


@linux_only
async def test_writes_to_another_socket_leave_in_one_segment(tcp_wire: Wire) -> None:
    sockets: list[uvsock.Socket[Any]] = []

    def data(socket: uvsock.Socket[Any], _: bytes) -> None:
        for other in sockets:
            if other is not socket:
                for _ in range(4):
                    other.write(b"news")

    listener = await tcp_wire.listen({"open": sockets.append, "data": data})
    clients = [await tcp_wire.streams(listener) for _ in range(3)]
    await until(lambda: len(sockets) == 3)
    before = [segments(socket) for socket in sockets]
    clients[0][1].write(b"go")
    for reader, _ in clients[1:]:
        assert await soon(reader.readexactly(16)) == b"news" * 4
    assert [segments(s) - b for s, b in zip(sockets, before, strict=True)] == [0, 1, 1]
    for _, writer in clients:
        writer.close()
        await writer.wait_closed()
    listener.stop(True)
    await soon(listener.wait_closed())


@linux_only
async def test_held_and_large_bytes_leave_in_one_call(tcp_wire: Wire) -> None:
    """The held header and the large body are gathered: no segment with the header alone."""

    def data(socket: uvsock.Socket[Any], _: bytes) -> None:
        socket.write(b"h" * 10)
        assert socket.writable_length == 10
        assert socket.write(b"b" * 20_000) == 20_000
        assert socket.writable_length == 0

    listener, reader, writer, socket = await accepted(tcp_wire, handlers={"data": data})
    before = segments(socket)
    writer.write(b"go")
    assert await soon(reader.readexactly(20_010)) == b"h" * 10 + b"b" * 20_000
    assert segments(socket) - before == 1
    await finish(listener, writer)


async def test_send_all_waits_and_sends_everything(wire: Wire) -> None:
    payload = random.Random(3).randbytes(8 * MIB)
    drains: list[object] = []
    tasks: list[asyncio.Task[None]] = []

    async def send(socket: uvsock.Socket[Any]) -> None:
        await socket.send_all(bytearray(payload))
        socket.end()

    def opened(socket: uvsock.Socket[Any]) -> None:
        tasks.append(asyncio.create_task(send(socket)))

    listener = await wire.listen(
        {"open": opened, "drain": drains.append, "data": lambda socket, data: None}
    )
    received = await wire.receive_all(listener)
    await soon(tasks[0])
    assert received == payload
    assert not drains
    listener.stop(True)
    await soon(listener.wait_closed())


async def test_send_all_calls_follow_one_another(wire: Wire) -> None:
    listener, reader, writer, socket = await accepted(wire)
    pieces = [bytes([65 + number]) * (4 * MIB) for number in range(4)]
    tasks = [asyncio.create_task(socket.send_all(piece)) for piece in pieces]
    await until(lambda: socket.writable_length)
    assert socket.write(b"in between") == 0
    assert await soon(reader.readexactly(16 * MIB)) == b"".join(pieces)
    await soon(asyncio.gather(*tasks))
    assert socket.write(b"after") == 5
    assert await soon(reader.readexactly(5)) == b"after"
    await finish(listener, writer)


async def test_a_write_refused_during_send_all_gets_its_drain(wire: Wire) -> None:
    drains: list[int] = []
    listener, reader, writer, socket = await accepted(
        wire, handlers={"drain": lambda socket: drains.append(socket.write(b"late"))}
    )
    task = asyncio.create_task(socket.send_all(b"x" * (16 * MIB)))
    await until(lambda: socket.writable_length)
    assert socket.write(b"early") == 0
    assert await soon(reader.readexactly(16 * MIB + 4)) == b"x" * (16 * MIB) + b"late"
    await soon(task)
    assert drains == [4]
    await finish(listener, writer)


async def test_a_cancelled_send_all_lets_the_next_one_go_on(wire: Wire) -> None:
    listener, reader, writer, socket = await accepted(wire)
    first = asyncio.create_task(socket.send_all(b"a" * (8 * MIB)))
    second = asyncio.create_task(socket.send_all(b"b" * 10))
    third = asyncio.create_task(socket.send_all(b"c" * 10))
    await until(lambda: socket.writable_length)
    second.cancel()
    first.cancel()
    await asyncio.gather(first, second, return_exceptions=True)
    assert first.cancelled()
    assert second.cancelled()
    while not (chunk := await soon(reader.read(65536))).endswith(b"c" * 10):
        assert chunk
    await soon(third)
    await finish(listener, writer)


async def test_send_all_raises_what_broke_the_connection(plain_wire: Wire) -> None:
    listener, _, writer, socket = await accepted(plain_wire)
    task = asyncio.create_task(socket.send_all(b"x" * (16 * MIB)))
    await until(lambda: socket.writable_length)
    writer.transport.abort()
    with pytest.raises(OSError) as caught:
        await soon(task)
    assert not isinstance(caught.value, uvsock.SocketClosedError)
    with pytest.raises(OSError):
        await socket.send_all(b"more")
    listener.stop(True)
    await soon(listener.wait_closed())


async def test_send_all_on_a_socket_closed_in_order(wire: Wire) -> None:
    listener, _, writer, socket = await accepted(wire)
    socket.end()
    with pytest.raises(uvsock.SocketClosedError):
        await socket.send_all(b"more")
    await finish(listener, writer)


@pytest.mark.parametrize("bad", [5, None, memoryview(b"abcdef")[::2]])
async def test_send_all_names_bad_data(tcp_wire: Wire, bad: Any) -> None:
    listener, _, writer, socket = await accepted(tcp_wire)
    with pytest.raises(TypeError, match="^data: "):
        await socket.send_all(bad)
    await finish(listener, writer)


async def test_write_after_end_close_and_terminate_is_refused(wire: Wire) -> None:
    for action in ("end", "shutdown", "close", "terminate"):
        listener, _, writer, socket = await accepted(wire)
        getattr(socket, action)()
        assert socket.write(b"x") == -1
        assert socket.write(b"") == -1
        assert socket.end(b"y") == -1
        await finish(listener, writer)


async def test_writing_to_a_peer_that_is_gone_never_raises(wire: Wire) -> None:
    recorder = Recorder()
    listener, _, writer, socket = await accepted(wire, handlers=recorder.table("close"))
    writer.transport.abort()
    for _ in range(200):
        if socket.write(b"x" * 1000) == -1:
            break
        await asyncio.sleep(0.002)
    assert socket.write(b"x") == -1
    await until(lambda: recorder.events == ["close"])
    listener.stop()
    await soon(listener.wait_closed())


async def test_sendfile_sends_the_part_asked_for(wire: Wire, tmp_path: Any) -> None:
    content = random.Random(5).randbytes(5 * MIB)
    path = tmp_path / "file"
    path.write_bytes(content)
    listener, reader, writer, socket = await accepted(wire)
    with path.open("rb") as file:
        socket.write(b"head")
        task = asyncio.create_task(socket.sendfile(file, 1000, 4 * MIB))
        assert await soon(reader.readexactly(4 + 4 * MIB)) == b"head" + content[1000:][: 4 * MIB]
        assert await soon(task) == 4 * MIB
        assert file.tell() == 1000 + 4 * MIB
        task = asyncio.create_task(socket.sendfile(file, 5 * MIB - 7))
        assert await soon(reader.readexactly(7)) == content[-7:]
        assert await soon(task) == 7
        assert await soon(socket.sendfile(file, 5 * MIB)) == 0
    assert socket.bytes_written == 4 + 4 * MIB + 7
    await finish(listener, writer)


async def test_sendfile_of_a_file_in_memory(wire: Wire) -> None:
    listener, reader, writer, socket = await accepted(wire)
    assert await soon(socket.sendfile(io.BytesIO(b"0123456789"), 2, 5)) == 5
    assert await soon(reader.readexactly(5)) == b"23456"
    with pytest.raises(TypeError, match="^file: "):
        await socket.sendfile(io.StringIO("text"))
    with pytest.raises(ValueError, match="^offset: "):
        await socket.sendfile(io.BytesIO(b"x"), -1)
    with pytest.raises(ValueError, match="^count: "):
        await socket.sendfile(io.BytesIO(b"x"), 0, -1)
    await finish(listener, writer)


async def test_debug_mode_warns_about_a_short_write_that_was_forgotten(wire: Wire) -> None:
    asyncio.get_running_loop().set_debug(True)
    taken: list[int] = []

    def data(socket: uvsock.Socket[Any], chunk: bytes) -> None:
        taken.append(socket.write(b"x" * (32 * MIB)))
        socket.end()

    listener = await wire.listen({"data": data})
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        received = await wire.receive_all(listener, b"go")
        await until(lambda: not listener.connections)
    assert len(received) == taken[0] < 32 * MIB
    assert [w.category for w in caught if "drain" in str(w.message)] == [RuntimeWarning]
    listener.stop(True)
    await soon(listener.wait_closed())


async def test_that_warning_as_an_error_does_not_keep_a_socket_from_closing(
    wire: Wire, loop_errors: list[dict[str, Any]]
) -> None:
    asyncio.get_running_loop().set_debug(True)
    recorder = Recorder(data=lambda socket, data: (socket.write(b"x" * (32 * MIB)), socket.end()))
    listener = await wire.listen(recorder.table())
    await wire.receive_all(listener, b"go")
    await until(lambda: recorder.events[-1] == "close")
    (context,) = loop_errors
    assert isinstance(context["exception"], RuntimeWarning)
    assert context["socket"] is recorder.socket
    listener.stop(True)
    await soon(listener.wait_closed())


@pytest.mark.parametrize("answer", ["close", "terminate"])
async def test_closing_answers_a_short_write(tcp_wire: Wire, answer: str) -> None:
    asyncio.get_running_loop().set_debug(True)
    listener, _, writer, socket = await accepted(tcp_wire)
    assert socket.write(b"x" * (32 * MIB)) < 32 * MIB
    getattr(socket, answer)()
    writer.transport.abort()
    await soon(socket.wait_closed())
    await finish(listener, writer)


async def test_calls_from_another_thread_are_refused(tcp_wire: Wire) -> None:
    listener, _, writer, socket = await accepted(tcp_wire)
    for call in (
        lambda: socket.write(b"x"),
        socket.end,
        socket.close,
        socket.terminate,
        socket.pause,
        socket.flush,
        lambda: socket.timeout(1),
        listener.stop,
    ):
        with pytest.raises(RuntimeError, match="thread"):
            await asyncio.to_thread(call)
    assert socket.ready_state is uvsock.ReadyState.ESTABLISHED
    await finish(listener, writer)


@pytest.mark.parametrize("ending", ["close", "end"])
async def test_a_waiting_send_all_hears_of_the_end(wire: Wire, ending: str) -> None:
    listener, _, writer, socket = await accepted(wire, linger_timeout=0.1)
    task = asyncio.create_task(socket.send_all(bytes(32 * MIB)))
    await until(lambda: socket.writable_length)
    getattr(socket, ending)()
    with pytest.raises(uvsock.SocketClosedError):
        await soon(task)
    writer.transport.abort()
    await finish(listener, writer)


async def test_drained_tells_of_bytes_that_were_dropped(wire: Wire) -> None:
    listener, _, writer, socket = await accepted(wire, high_water_mark=64 * MIB)
    assert socket.write(bytes(48 * MIB)) == 48 * MIB
    task = asyncio.create_task(socket.drained())
    await asyncio.sleep(0)
    socket.terminate()
    with pytest.raises(uvsock.SocketClosedError):
        await soon(task)
    await finish(listener, writer)


async def test_bytes_that_leave_are_traffic(plain_wire: Wire) -> None:
    """A peer that reads slowly is not idle, although nothing new is written."""
    timeouts: list[object] = []
    listener, _, writer, socket = await accepted(
        plain_wire,
        high_water_mark=256 * MIB,
        idle_timeout=1,
        handlers={"timeout": timeouts.append},
    )
    writer.transport.abort()
    await until(lambda: not listener.connections)
    opened = listener.connections
    sock = plain_wire.dial(listener)
    await until(lambda: listener.connections > opened)
    (socket,) = listener.sockets
    socket.write(bytes(200 * MIB))
    for _ in range(40):
        await asyncio.to_thread(sock.recv, MIB)
        await asyncio.sleep(0.05)
    assert socket.writable_length
    assert not timeouts
    socket.terminate()
    sock.close()
    await finish(listener, writer)


@pytest.mark.parametrize("arguments", [(2**70,), (0, 2**70), (-(2**70),)])
async def test_numbers_of_any_size_are_out_of_range(
    tcp_wire: Wire, arguments: tuple[int, ...]
) -> None:
    listener, _, writer, socket = await accepted(tcp_wire)
    with pytest.raises(ValueError, match=f"^{('offset', 'length')[len(arguments) - 1]}: must be"):
        socket.write(b"abc", *arguments)
    with pytest.raises(ValueError, match="^offset: must be"):
        await socket.sendfile(io.BytesIO(b""), 2**70)
    await finish(listener, writer)


@pytest.mark.parametrize("wait", ["send_all", "drained", "wait_closed", "listener"])
async def test_cancelled_waits_leave_nothing(tcp_wire: Wire, wait: str) -> None:
    listener, _, writer, socket = await accepted(tcp_wire)
    writer.transport.pause_reading()
    while socket.write(b"x" * 65536) == 65536:
        pass
    if wait == "listener":
        listener.stop()
    waits = {
        "send_all": lambda: socket.send_all(b"y"),
        "drained": socket.drained,
        "wait_closed": socket.wait_closed,
        "listener": listener.wait_closed,
    }

    async def wait_in_vain(times: int, at_once: int) -> int:
        for _ in range(times):
            tasks = [asyncio.create_task(waits[wait]()) for _ in range(at_once)]
            for _ in range(3):
                await asyncio.sleep(0)
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            assert all(task.cancelled() for task in tasks)
        del tasks, task
        await asyncio.sleep(0)
        gc.collect()
        return len(gc.get_objects())

    before = await wait_in_vain(10, 1)
    assert await wait_in_vain(300, 1) - before < 50
    assert await wait_in_vain(3, 100) - before < 50
    socket.terminate()
    await finish(listener, writer)


async def test_a_cancelled_wait_does_not_end_the_others(tcp_wire: Wire) -> None:
    listener, reader, writer, socket = await accepted(tcp_wire)
    writer.transport.pause_reading()
    while socket.write(b"x" * 65536) == 65536:
        pass
    waits = [asyncio.create_task(socket.drained()) for _ in range(3)]
    waits += [asyncio.create_task(socket.wait_closed()) for _ in range(3)]
    await asyncio.sleep(0)
    for cancelled in waits[1::3]:
        cancelled.cancel()
    writer.transport.resume_reading()
    reading = asyncio.create_task(reader.read())
    await soon(asyncio.gather(waits[0], waits[2]))
    assert not waits[3].done()
    socket.close()
    await soon(reading)
    await finish(listener, writer)
    await soon(asyncio.gather(waits[3], waits[5]))
    assert all(cancelled.cancelled() for cancelled in waits[1::3])


async def test_one_flush_that_fails_does_not_keep_the_others(
    plain_wire: Wire, monkeypatch: pytest.MonkeyPatch, loop_errors: list[dict[str, Any]]
) -> None:
    """What is written outside handlers leaves together, at the end of the iteration."""
    listener, _, writer, socket = await accepted(plain_wire)
    others: list[Any] = [await accepted(plain_wire) for _ in range(2)]

    def strerror(code: int) -> str:
        monkeypatch.undo()
        raise MemoryError

    with stdlib.socket(fileno=os.dup(socket.fileno())) as same:
        same.shutdown(stdlib.SHUT_WR)  # the send of the first fails, and its error cannot be made
    monkeypatch.setattr(os, "strerror", strerror)
    for opened in [socket, others[0][3], others[1][3]]:
        assert opened.write(b"x") == 1
    for _, reader, _, _ in others:
        assert await soon(reader.readexactly(1)) == b"x"
    assert isinstance(loop_errors[0]["exception"], MemoryError)
    socket.terminate()
    for opened in [(listener, None, writer), *others]:
        await finish(opened[0], opened[2])


WITHOUT_DESCRIPTORS = """
import asyncio, errno, os, resource, uvsock

async def main():
    received = 0
    servers = []
    def data(socket, data):
        nonlocal received
        received += len(data)
    def opened(socket):
        socket.pause()
        servers.append(socket)
    table = {"open": opened, "data": data}
    listener = await uvsock.listen(table, "127.0.0.1", 0)
    client = await uvsock.connect({"data": data}, "127.0.0.1", listener.port)
    while not servers:
        await asyncio.sleep(0.001)
    resource.setrlimit(resource.RLIMIT_NOFILE, (64, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
    taken = []
    try:
        while True:
            taken.append(os.dup(0))
    except OSError as error:
        assert error.errno == errno.EMFILE
    for call in (
        lambda: uvsock.listen(table, "127.0.0.1", 0),
        lambda: uvsock.connect(table, "127.0.0.1", listener.port),
    ):
        try:
            await call()
        except OSError as error:
            print(errno.errorcode[error.errno])
    # The kernel is full, and there is no descriptor to watch it with.
    accepted = 0
    while (n := client.write(bytes(65536))) == 65536:
        accepted += n
    accepted += n
    assert client.writable_length
    servers[0].resume()
    async with asyncio.timeout(5):
        while received < accepted:
            await asyncio.sleep(0.01)
    print(received == accepted)
    for descriptor in taken:
        os.close(descriptor)
    client.close()
    await client.wait_closed()
    listener.stop(True)

uvsock.run(main())
"""


@pytest.mark.skipif(sys.platform != "linux", reason="counts on Linux's choice of descriptors")
def test_when_no_descriptor_is_left() -> None:
    assert run_python("-c", WITHOUT_DESCRIPTORS) == "EMFILE\nEMFILE\nTrue\n"
