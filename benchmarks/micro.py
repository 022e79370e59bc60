"""Single operations, timed by pyperf: ``python -m benchmarks micro -o FILE``.

What is compared with what:

- ``collect``: eight pieces of 16 bytes become one ``bytes`` object.
- ``dispatch``: what uvloop calls with 64 bytes that it has read, until the handler returns. That
  is how a connection's first bytes come to a socket; later ones come from our own poller, which no
  Python can call, and go the same way from there.
- ``write``: one write on a TCP connection, which is one ``send(2)`` each, or (``corked``) eight
  that leave in one. Its peer is read empty from time to time, while the clock stands, so each
  write finds room.
"""

from __future__ import annotations

import argparse
import asyncio
import io
import socket
import struct
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager
from fnmatch import fnmatch
from functools import partial
from time import perf_counter
from typing import Any

import pyperf
import uvloop

import uvsock

PIECES = [bytes([65 + i]) * 16 for i in range(8)]
READ = b"x" * 64
SIZES = (1, 64, 1024, 16384, 65536)
# Takes the number of repetitions, returns seconds.
Timed = Callable[[int], float]
# Bytes between two times that the peer is read empty. More might not find room at once.
ROOM = 65536


# --- collect ----------------------------------------------------------------------------------


def collectors() -> Iterator[tuple[str, Callable[[], bytes | bytearray]]]:
    sink = uvsock.BufferSink()
    sink.start(stream=True, as_bytes=True)
    growing = bytearray()
    file = io.BytesIO()
    room = bytearray(1024)

    def buffer_sink() -> Any:
        write = sink.write
        for piece in PIECES:
            write(piece)
        return sink.flush()

    def concatenated() -> bytes:
        nonlocal growing
        for piece in PIECES:
            growing += piece
        taken = bytes(growing)
        growing.clear()
        return taken

    def bytes_io() -> bytes:
        write = file.write
        for piece in PIECES:
            write(piece)
        taken = file.getvalue()
        file.seek(0)
        file.truncate()
        return taken

    def joined() -> bytes:
        held: list[bytes] = []
        append = held.append
        for piece in PIECES:
            append(piece)
        return b"".join(held)

    def packed() -> bytes:
        pack_into = struct.pack_into
        at = 0
        for piece in PIECES:
            pack_into("16s", room, at, piece)
            at += len(piece)
        return bytes(memoryview(room)[:at])

    yield "BufferSink", buffer_sink
    yield "bytearray", concatenated
    yield "io.BytesIO", bytes_io
    yield "bytes.join", joined
    yield "struct.pack_into", packed


def time_collecting(loops: int, collect: Callable[[], object]) -> float:
    start = perf_counter()
    for _ in range(loops):
        collect()
    return perf_counter() - start


# --- dispatch and write -----------------------------------------------------------------------


def ignore(socket: uvsock.Socket[Any], data: Any) -> None:
    return


class Ignore(asyncio.Protocol):
    def data_received(self, data: bytes) -> None:
        return


def on_loop(timed: Callable[..., Coroutine[Any, Any, float]], **options: Any) -> Timed:
    def run(loops: int) -> float:
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            return runner.run(timed(loops, **options))

    return run


@contextmanager
def listener() -> Iterator[socket.socket]:
    with socket.create_server(("127.0.0.1", 0)) as server:
        # Connections inherit it.
        server.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4 * ROOM)
        yield server


async def connected(server: socket.socket, **options: Any) -> tuple[Any, socket.socket]:
    """A connection of uvsock's and its blocking peer."""
    host, port = server.getsockname()
    client = await uvsock.connect({"data": ignore}, host, port, **options)
    peer, _ = server.accept()
    return client, peer


def time_calls(loops: int, call: Callable[[Any], object], argument: object = READ) -> float:
    start = perf_counter()
    for _ in range(loops):
        call(argument)
    return perf_counter() - start


async def dispatched(loops: int, binary_type: str) -> float:
    with listener() as server:
        client, peer = await connected(server, binary_type=binary_type)
        with peer:
            took = time_calls(loops, client.data_received)
            client.terminate()
            await client.wait_closed()
    return took


def time_writes(loops: int, write: Callable[[bytes], int], peer: socket.socket, size: int) -> float:
    data, rest, took, space = bytes(size), loops, 0.0, bytearray(ROOM)
    while rest:
        batch = min(rest, 64, max(1, ROOM // size))
        taken = 0
        start = perf_counter()
        for _ in range(batch):
            taken += write(data)
        took += perf_counter() - start
        if taken != batch * size:
            raise RuntimeError(f"only {taken} of {batch * size} bytes found room")
        while taken:
            taken -= peer.recv_into(space)
        rest -= batch
    return took


async def written(loops: int, size: int) -> float:
    with listener() as server:
        client, peer = await connected(server, cork=False)
        with peer:
            took = time_writes(loops, client.write, peer, size)
            client.terminate()
            await client.wait_closed()
    return took


async def corked(loops: int) -> float:
    """Eight writes and the end of the block that holds them back."""
    with listener() as server:
        client, peer = await connected(server)

        def write(_: bytes) -> int:
            with client.cork():
                write = client.write
                return sum([write(piece) for piece in PIECES])

        with peer:
            took = time_writes(loops, write, peer, sum(map(len, PIECES)))
            client.terminate()
            await client.wait_closed()
    return took


async def rearmed(loops: int) -> float:
    """`timeout()` with one that is still running, as a handler calls it for each message."""
    with listener() as server:
        client, peer = await connected(server)
        with peer:
            took = time_calls(loops, client.timeout, 30.0)
            client.terminate()
            await client.wait_closed()
    return took


def sent(loops: int, size: int) -> float:
    """The same with the standard library's socket, for the price of the system call."""
    with listener() as server, socket.create_connection(server.getsockname()) as client:
        client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        peer, _ = server.accept()
        with peer:
            return time_writes(loops, client.send, peer, size)


def benchmarks() -> Iterator[tuple[str, Timed]]:
    for name, collect in collectors():
        if collect() != b"".join(PIECES):
            raise AssertionError(name)
        yield f"collect: {name}", partial(time_collecting, collect=collect)
    yield "dispatch: asyncio.Protocol", partial(time_calls, call=Ignore().data_received)
    for kind in ("bytes", "memoryview"):
        yield f"dispatch: uvsock, {kind}", on_loop(dispatched, binary_type=kind)
    for size in SIZES:
        yield f"write: socket.send, {size} B", partial(sent, size=size)
        yield f"write: uvsock, {size} B", on_loop(written, size=size)
    yield "write: uvsock, corked, 8 x 16 B", on_loop(corked)
    yield "timeout: armed anew", on_loop(rearmed)


def main() -> None:
    def add_arguments(command: list[str], arguments: argparse.Namespace) -> None:
        command += ["--only", arguments.only]

    runner = pyperf.Runner(
        # With pyperf's own choice, 20, a run takes more than five minutes.
        processes=6,
        program_args=("-m", "benchmarks.micro"),
        add_cmdline_args=add_arguments,
    )
    runner.argparser.add_argument(
        "--only", default="*", metavar="PATTERN", help="benchmarks of these names: 'write: *'"
    )
    arguments = runner.parse_args()
    for name, timed in benchmarks():
        if fnmatch(name, arguments.only):
            runner.bench_time_func(name, timed)


if __name__ == "__main__":
    main()
