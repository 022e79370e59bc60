"""Descriptors that a program closes although they are the loop's: nobody else is harmed."""

from __future__ import annotations

import asyncio
import socket as stdlib
import subprocess
import sys
from typing import Any

import pytest

import uvsock
from helpers import echo, soon

LOOPS = {"uvsock": uvsock.new_event_loop}


class Echo(asyncio.Protocol):
    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport: Any = transport

    def data_received(self, data: bytes) -> None:
        self.transport.write(data)


async def answers(port: int) -> bytes:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(b"still there?\n")
    answer = await soon(reader.readline())
    writer.close()
    await writer.wait_closed()
    return answer


# ── Socket objects that were given ─────────────────────────────────────────────────────────────


@pytest.mark.parametrize("way", ["listen", "create_server"])
async def test_a_listening_socket_that_was_given_and_is_closed(way: str) -> None:
    sock = stdlib.create_server(("127.0.0.1", 0))
    port = sock.getsockname()[1]
    if way == "listen":
        listener = await uvsock.listen({"data": echo}, sock=sock)
    else:
        server = await asyncio.get_running_loop().create_server(Echo, sock=sock)
    sock.close()
    assert await answers(port) == b"still there?\n"
    if way == "listen":
        listener.stop(True)
        await soon(listener.wait_closed())
    else:
        server.close()
        await soon(server.wait_closed())
    with pytest.raises(ConnectionRefusedError):
        stdlib.create_connection(("127.0.0.1", port), 5)


@pytest.mark.parametrize("way", ["create_connection", "connect_accepted_socket"])
async def test_a_connected_socket_that_was_given_and_is_closed(way: str) -> None:
    loop = asyncio.get_running_loop()
    mine, peer = stdlib.socketpair()
    peer.setblocking(False)
    if way == "create_connection":
        transport, _ = await loop.create_connection(Echo, sock=mine)
    else:
        transport, _ = await loop.connect_accepted_socket(Echo, mine)
    mine.close()
    await loop.sock_sendall(peer, b"still there?\n")
    assert await soon(loop.sock_recv(peer, 100)) == b"still there?\n"
    transport.close()
    assert await soon(loop.sock_recv(peer, 100)) == b""
    peer.close()


# ── Descriptors that are closed by their number ────────────────────────────────────────────────

# In a process of its own, since what is to be seen is that it lives on.
PROGRAM = """
import asyncio, os, socket, sys, uvsock

class Echo(asyncio.Protocol):
    def connection_made(self, transport):
        self.transport = transport
        made.append(transport)
    def data_received(self, data):
        self.transport.write(data)

made = []

def opened(socket):
    made.append(socket)

def descriptor(connection):
    return connection.get_extra_info("socket").fileno()

async def main(what, which):
    loop = asyncio.get_running_loop()
    # Connected before: what comes after may have the number that was closed, and then nobody can
    # tell whose it is.
    good = await loop.create_server(Echo, "127.0.0.1", 0)
    reader, writer = await asyncio.open_connection(*good.sockets[0].getsockname())
    while not made:
        await asyncio.sleep(0.001)
    made.clear()
    if which == "loop":
        server = await loop.create_server(Echo, "127.0.0.1", 0)
        port, listening = server.sockets[0].getsockname()[1], server.sockets[0].fileno()
    else:
        table = {"open": opened, "data": lambda socket, data: socket.write(data)}
        server = await uvsock.listen(table, "127.0.0.1", 0)
        port = server.port
        listening = next(
            fd for fd in map(int, os.listdir("/proc/self/fd"))
            if listens(fd) == port
        )
    peer = socket.create_connection(("127.0.0.1", port))
    peer.setblocking(False)
    # Closed before libuv watches it, in the iteration that accepts it, a descriptor ends the
    # process: epoll_ctl(2) fails, and libuv aborts.
    await loop.sock_sendall(peer, b"x")
    await asyncio.wait_for(loop.sock_recv(peer, 1), 5)
    connection = made[0]
    if what == "listening":
        os.close(listening)
    else:
        if what == "full":
            while connection.write(bytes(65536)) in (None, 65536):
                if which == "loop" and connection.get_write_buffer_size():
                    break
        os.close(descriptor(connection))
        if what == "reused":
            stranger, other = socket.socketpair()  # has its number now, perhaps
        for _ in range(3):
            await asyncio.sleep(0.001)
        connection.write(b"x")
    peer.close()
    for _ in range(10):
        await asyncio.sleep(0.001)
    writer.write(b"x\\n")
    assert await asyncio.wait_for(reader.readline(), 5) == b"x\\n"
    print("alive", flush=True)
    os._exit(0)

def listens(fd):
    try:
        with socket.socket(fileno=os.dup(fd)) as sock:
            if sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
                return sock.getsockname()[1]
    except OSError:
        return None

asyncio.Runner(loop_factory=uvsock.new_event_loop).run(main(*sys.argv[1:]))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="looks for descriptors in /proc")
@pytest.mark.parametrize("which", ["loop", "sockets"])
@pytest.mark.parametrize("what", ["listening", "connected", "full", "reused"])
def test_the_process_lives_on(what: str, which: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, what, which], capture_output=True, text=True, timeout=30
    )
    assert (done.stdout, done.returncode) == ("alive\n", 0), done.stderr
