"""uvsock: ``BEHAVIOUR [--tls FILE] [--binary-type TYPE] [--compiled DIRECTORY]``."""

from __future__ import annotations

import argparse
import importlib
import sys
from typing import Any

import uvsock
from benchmarks.servers import control

CHUNK = control.CHUNK
Socket = uvsock.Socket[Any]


# echo, as in the guide on writing: what is not taken is kept, and nothing is read meanwhile.


def echo(socket: Socket, data: bytes) -> None:
    sent = socket.write(data)
    if 0 <= sent < len(data):
        socket.data = memoryview(data)[sent:]
        socket.pause()


def echo_rest(socket: Socket) -> None:
    sent = socket.write(socket.data)
    if 0 <= sent < len(socket.data):
        socket.data = socket.data[sent:]
    else:
        socket.data = None
        socket.resume()


def small_writes(socket: Socket, data: bytes) -> None:
    socket.write(b"a")
    socket.write(b"b")
    socket.write(b"c")
    socket.write(b"d")
    socket.write(b"e")


class FanOut:
    """What a connection does not take at once waits in its ``data``."""

    def __init__(self) -> None:
        self.connections: set[Socket] = set()

    def open(self, socket: Socket) -> None:
        self.connections.add(socket)
        socket.data = bytearray()

    def data(self, socket: Socket, data: bytes) -> None:
        size = len(data)
        for each in self.connections:
            sent = 0 if each.data else each.write(data)
            if 0 <= sent < size:
                each.data += data[sent:]

    def drain(self, socket: Socket) -> None:
        sent = socket.write(socket.data)
        if sent > 0:
            del socket.data[:sent]

    def close(self, socket: Socket, error: Exception | None) -> None:
        self.connections.discard(socket)


# send and receive: socket.data is the number of bytes left.


def pour(socket: Socket) -> None:
    left = socket.data
    while left > 0:
        sent = socket.write(CHUNK, 0, min(left, 65536))
        if sent < 0:
            break
        left -= sent
        if sent < 65536:
            break
    socket.data = left


def requested(socket: Socket, data: bytes) -> None:
    socket.data = int.from_bytes(data[:8], "little")
    pour(socket)


def receive(socket: Socket, data: bytes) -> None:
    left = socket.data
    if not left:
        left = int.from_bytes(data[:8], "little") + 8
    left -= len(data)
    socket.data = left
    if left == 0:
        socket.write(b".")


# lines and length_prefixed: the framing finds the messages, and each is answered by itself.


def answer(socket: Socket, frame: bytes) -> None:
    socket.write_frame(frame)


FRAMING = {"lines": uvsock.Lines(), "length_prefixed": uvsock.LengthPrefixed(4)}


def compiled(directory: str) -> uvsock.Handlers:
    """The same, compiled: the directory holds the module that is made of compiled.pyx."""
    sys.path.insert(0, directory)
    handlers: uvsock.Handlers = importlib.import_module("compiled").Frames()
    return handlers


async def main(arguments: argparse.Namespace) -> None:
    factory = None
    handlers: Any = {
        "echo": {"data": echo, "drain": echo_rest},
        "small_writes": {"data": small_writes},
        "fan_out": FanOut(),
        "send": {"data": requested, "drain": pour},
        "receive": {"data": receive},
        "lines": {"data": answer},
        "length_prefixed": {"data": answer},
        "redis": None,
    }[arguments.behaviour]
    if arguments.behaviour == "redis":
        example = control.example("redis_server")
        handlers, factory = example.HANDLERS, example.Session
    if arguments.compiled is not None:
        handlers = compiled(arguments.compiled)
    server = await uvsock.listen(
        handlers,
        "127.0.0.1",
        0,
        tls=control.context(arguments.tls),
        binary_type=arguments.binary_type,
        framing=FRAMING.get(arguments.behaviour),
        data_factory=factory,
    )
    assert server.port is not None
    await control.serve(server.port)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("behaviour")
    parser.add_argument("--tls")
    parser.add_argument("--binary-type", default="bytes")
    parser.add_argument("--compiled")
    uvsock.run(main(parser.parse_args()))
