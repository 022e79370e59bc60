"""What one peer may do to the others, and to the process: wait a little, and take a little."""

from __future__ import annotations

import asyncio
import ctypes
import ctypes.util
import random
import socket as stdlib
import ssl
import struct
import subprocess
import sys
import time
from fcntl import ioctl
from pathlib import Path
from termios import FIONREAD
from typing import Any

import pytest

import uvsock
from conftest import SERVER_NAME, Authority, Wire, run_python, soon, until

MEMORY = """
def resident():
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith("VmRSS"))
"""
LINUX = pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is read in /proc")


def send_what_fits(sock: stdlib.socket, data: bytes) -> int:
    sock.setblocking(False)
    sent = 0
    try:
        while sent < len(data):
            sent += sock.send(memoryview(data)[sent:])
    except BlockingIOError:
        pass
    return sent


# ── Turns ──────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("slow", [False, True])
async def test_frames_of_one_peer_leave_the_others_their_turn(wire: Wire, slow: bool) -> None:
    """Many that cost little, and few that cost much."""
    lines = 0
    at_answer: list[int] = []

    def line(socket: Any, data: bytes) -> None:
        nonlocal lines
        lines += 1
        if slow:
            time.sleep(0.002)

    def answer(socket: Any, data: bytes) -> None:
        at_answer.append(lines)
        socket.write(data)

    flooded = await wire.listen({"data": line}, framing=uvsock.Lines())
    listener = await wire.listen({"data": answer})
    flooder = await wire.connect(flooded, {"data": lambda socket, data: None})
    good = await wire.connect(listener, {"data": lambda socket, data: None})
    for _ in range(3):  # both have been read by now
        flooder.write(b"\n")
        good.write(b"x")
        seen = len(at_answer)
        await until(lambda seen=seen: len(at_answer) > seen)
    before = lines
    total = 40 if slow else 1 << 20
    sending = asyncio.ensure_future(flooder.send_all(b"\n" * total))
    await until(lambda: lines > before)
    seen = len(at_answer)
    asked = lines
    good.write(b"x")
    await until(lambda: len(at_answer) > seen, 20)
    # Two or three turns, where one read may bring 262,144 lines.
    assert at_answer[-1] - asked < (12 if slow else 100_000)
    await until(lambda: lines == before + total, 20)
    await soon(sending)
    for ended in (flooded, listener):
        ended.stop(True)
        await soon(ended.wait_closed())


async def test_a_turn_that_ends_between_frames_loses_none(wire: Wire) -> None:
    """Also where the handler pauses, and where the peer is gone by the time of the next turn."""
    got: list[bytes] = []

    def line(socket: Any, data: bytes) -> None:
        got.append(data)
        if len(got) % 30_000 == 0:
            socket.pause()
            asyncio.get_running_loop().call_soon(socket.resume)

    ended: list[Any] = []
    table = {"data": line, "close": lambda socket, error: ended.append(error)}
    listener = await wire.listen(table, framing=uvsock.Lines())
    client = await wire.connect(listener, {"data": lambda socket, data: None})
    lines = [b"%d" % number for number in range(100_000)]
    await soon(client.send_all(b"\n".join(lines) + b"\n"), 20)
    client.end()
    await until(lambda: ended, 20)
    assert got == lines
    assert ended == [None]
    listener.stop(True)
    await soon(listener.wait_closed())


@LINUX  # other systems drop what was received before a reset
@pytest.mark.parametrize("pausing", [False, True])
async def test_frames_before_a_reset_are_delivered_in_turns(tcp_wire: Wire, pausing: bool) -> None:
    """All that had come, also to a handler that pauses with each of them."""
    got = 0
    turns = 0
    ended: list[Any] = []
    opened: list[Any] = []

    def line(socket: Any, data: bytes) -> None:
        nonlocal got
        got += 1
        if pausing:
            socket.pause()

    def turn() -> None:
        nonlocal turns
        turns += got > 0
        if not ended:
            asyncio.get_running_loop().call_soon(turn)

    table = {
        "open": opened.append,
        "data": line,
        "close": lambda socket, error: ended.append(error),
    }
    listener = await tcp_wire.listen(table, framing=uvsock.Lines())
    peer = tcp_wire.dial(listener)
    await until(lambda: opened)
    opened[0].pause()
    sent = send_what_fits(peer, b"\n" * 50_000)
    taken = ctypes.c_int()
    while taken.value < sent:  # what is on its way is lost with a reset
        await asyncio.sleep(0.001)
        ioctl(opened[0].fileno(), FIONREAD, taken)
    peer.setsockopt(stdlib.SOL_SOCKET, stdlib.SO_LINGER, struct.pack("ii", 1, 0))
    peer.close()
    turn()
    await until(lambda: ended, 20)
    assert got == sent
    assert turns > 3
    assert isinstance(ended[0], ConnectionResetError)
    listener.stop(True)
    await soon(listener.wait_closed())


class Peer:
    """OpenSSL's own client, for what Python's cannot say. Its records are sent by hand."""

    def __init__(self, sock: stdlib.socket) -> None:
        try:
            self.tls = ctypes.CDLL(ctypes.util.find_library("ssl") or "libssl.so.3")
            self.crypto = ctypes.CDLL(ctypes.util.find_library("crypto") or "libcrypto.so.3")
        except OSError:
            pytest.skip("no libssl is installed")
        pointer, number = ctypes.c_void_p, ctypes.c_int
        for library, name, *arguments in (
            (self.tls, "TLS_client_method"),
            (self.tls, "SSL_CTX_new", pointer),
            (self.tls, "SSL_new", pointer),
            (self.crypto, "BIO_s_mem"),
            (self.crypto, "BIO_new", pointer),
        ):
            function = getattr(library, name)
            function.restype, function.argtypes = pointer, arguments
        self.tls.SSL_set_fd.argtypes = self.tls.SSL_key_update.argtypes = [pointer, number]
        self.tls.SSL_connect.argtypes = self.tls.SSL_do_handshake.argtypes = [pointer]
        self.tls.SSL_write.argtypes = [pointer, ctypes.c_char_p, number]
        self.tls.SSL_set_bio.argtypes = [pointer] * 3
        self.crypto.BIO_read.argtypes = [pointer, ctypes.c_char_p, number]
        self.session = self.tls.SSL_new(self.tls.SSL_CTX_new(self.tls.TLS_client_method()))
        sock.settimeout(None)  # with one it does not block
        self.tls.SSL_set_fd(self.session, sock.fileno())
        assert self.tls.SSL_connect(self.session) == 1
        memory = self.crypto.BIO_s_mem
        self.out = self.crypto.BIO_new(memory())
        self.tls.SSL_set_bio(self.session, self.crypto.BIO_new(memory()), self.out)
        self.buffer = ctypes.create_string_buffer(1 << 20)

    def key_updates(self, count: int, last: bytes = b"") -> bytes:
        """Records that ask for an update of the peer's keys each (RFC 8446, 4.6.3)."""
        for _ in range(count):
            self.tls.SSL_key_update(self.session, 1)
            self.tls.SSL_do_handshake(self.session)
        if last:
            assert self.tls.SSL_write(self.session, last, len(last)) == len(last)
        size = self.crypto.BIO_read(self.out, self.buffer, len(self.buffer))
        return self.buffer.raw[:size]


async def test_key_updates_that_nobody_lets_out_are_not_read(tls_wire: Wire) -> None:
    """Their answers count as unsent: the peer that takes none is read no more."""
    opened: list[Any] = []
    listener = await tls_wire.listen({"open": opened.append, "data": lambda socket, data: None})
    with stdlib.create_connection((listener.hostname, listener.port), 10) as sock:
        sock.setsockopt(stdlib.SOL_SOCKET, stdlib.SO_RCVBUF, 4096)
        peer = await soon(asyncio.to_thread(Peer, sock))
        await until(lambda: opened)
        server = stdlib.socket(fileno=opened[0].fileno())
        server.setsockopt(stdlib.SOL_SOCKET, stdlib.SO_SNDBUF, 4096)
        server.setsockopt(stdlib.SOL_SOCKET, stdlib.SO_RCVBUF, 65536)
        server.detach()
        taken = quiet = 0
        while quiet < 50 and taken < 16 << 20:
            records = peer.key_updates(1000)
            sent = send_what_fits(sock, records)
            taken += sent
            while sent < len(records) and quiet < 50:
                await asyncio.sleep(0.002)
                more = send_what_fits(sock, records[sent:])
                quiet = 0 if more else quiet + 1
                sent += more
                taken += more
            await asyncio.sleep(0)
        # What both kernels hold, and what makes 128 KiB of answers.
        assert taken < 8 << 20
        assert opened[0].ready_state is uvsock.ReadyState.ESTABLISHED
        opened[0].terminate()
    listener.stop()
    await soon(listener.wait_closed())


async def test_key_updates_leave_the_others_their_turn(tls_wire: Wire) -> None:
    updates = 20_000
    answered: list[float] = []
    opened: list[Any] = []
    told: list[bytes] = []
    listener = await tls_wire.listen(
        {"open": opened.append, "data": lambda socket, data: told.append(data)}
    )
    plain = await uvsock.listen(
        {"data": lambda socket, data: answered.append(time.monotonic())}, "127.0.0.1", 0
    )
    good = await uvsock.connect({"data": lambda s, d: None}, "127.0.0.1", plain.port)
    with stdlib.create_connection((listener.hostname, listener.port), 10) as sock:
        peer = await soon(asyncio.to_thread(Peer, sock))
        await until(lambda: opened)
        records = await soon(asyncio.to_thread(peer.key_updates, updates, b"done"), 30)
        sending = asyncio.ensure_future(asyncio.to_thread(sock.sendall, records))
        rounds = 0
        while not told:
            good.write(b"x")
            good.flush()
            seen = len(answered)
            await until(lambda seen=seen: len(answered) > seen)
            rounds += 1
        await sending
        assert told == [b"done"]
        # 16 of them take about half a millisecond; all together they would be a few rounds.
        assert rounds > 20
        opened[0].terminate()
    good.terminate()
    for ended in (listener, plain):
        ended.stop(True)
        await soon(ended.wait_closed())


# ── Memory ─────────────────────────────────────────────────────────────────────────────────────

FLOODED = (
    MEMORY
    + """
import asyncio, sys, uvsock
mode, cert, key = sys.argv[1:]

def data(socket, data):
    if mode == "closing":
        socket.close()
    else:
        socket.end(bytes(13 << 20))

async def main():
    tls = {"cert": open(cert).read(), "key": open(key).read()}
    listener = await uvsock.listen({"data": data}, "127.0.0.1", 0, tls=tls, linger_timeout=60)
    print(listener.port, flush=True)
    reader = asyncio.StreamReader()
    await asyncio.get_running_loop().connect_read_pipe(
        lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)
    while await reader.readline():
        print(resident(), flush=True)
    for socket in listener.sockets:
        socket.terminate()
    listener.stop()

uvsock.run(main())
"""
)


@LINUX
@pytest.mark.parametrize("mode", ["pending", "closing"])
def test_what_nobody_will_look_at_is_not_kept(
    mode: str, authority: Authority, tmp_path: Path
) -> None:
    """Behind a close_notify, and behind a record that cannot be decrypted, after close()."""
    paths = []
    for name in ("cert", "key"):
        paths.append(tmp_path / name)
        paths[-1].write_bytes(authority.server_options[name])
    with subprocess.Popen(
        [sys.executable, "-c", FLOODED, mode, *map(str, paths)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE,
    ) as process:  # fmt: skip
        assert process.stdin is not None
        assert process.stdout is not None

        def resident() -> int:
            process.stdin.write(b"?\n")
            process.stdin.flush()
            return int(process.stdout.readline())

        port = int(process.stdout.readline())
        with stdlib.socket() as sock:
            sock.setsockopt(stdlib.SOL_SOCKET, stdlib.SO_RCVBUF, 4096)
            sock.settimeout(10)
            sock.connect(("127.0.0.1", port))
            incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
            peer = authority.client_context().wrap_bio(
                incoming, outgoing, server_hostname=SERVER_NAME
            )
            while True:
                try:
                    peer.do_handshake()
                    break
                except ssl.SSLWantReadError:
                    sock.sendall(outgoing.read())
                    incoming.write(sock.recv(65536))
            peer.write(b"hi")
            sock.sendall(outgoing.read())
            if mode == "pending":
                sock.recv(1)  # its answer is on its way
                with pytest.raises(ssl.SSLError):
                    peer.unwrap()
                sock.sendall(outgoing.read())
            before = resident()
            junk = (b"\x17\x03\x03\x40\x00" + b"j" * 16384) * 16
            for _ in range(400):  # 100 MiB
                sock.sendall(junk)
            assert resident() - before < 20 * 1024  # KiB
        process.stdin.close()
        assert process.wait(20) == 0


# ── Hang-ups ───────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("state", ["half-open", "paused half-open", "waiting"])
async def test_a_reset_is_heard_where_nothing_is_read(tcp_wire: Wire, state: str) -> None:
    """After the peer's end, also while paused, and while an async handler runs."""
    log: list[str] = []
    errors: list[Any] = []
    going = asyncio.Event()

    async def wait(socket: Any, data: bytes) -> None:
        log.append("data")
        await going.wait()

    def end(socket: Any) -> None:
        log.append("end")
        if state == "paused half-open":
            socket.pause()

    opened: list[Any] = []
    table: dict[str, Any] = {
        "open": opened.append,
        "data": wait if state == "waiting" else lambda socket, data: log.append("data"),
        "end": end,
        "close": lambda socket, error: errors.append(error),
    }
    listener = await tcp_wire.listen(table, allow_half_open=True)
    with tcp_wire.dial(listener) as peer:
        peer.sendall(b"job")
        if state != "waiting":
            peer.shutdown(stdlib.SHUT_WR)
        await until(lambda: log == (["data"] if state == "waiting" else ["data", "end"]))
        peer.setsockopt(stdlib.SOL_SOCKET, stdlib.SO_LINGER, struct.pack("ii", 1, 0))
    if state == "waiting":
        await until(lambda: opened[0].fileno() == -1)
        assert errors == []  # but its handler runs
        going.set()
    await until(lambda: errors)
    assert isinstance(errors[0], ConnectionError)
    assert listener.connections == 0
    listener.stop()
    await soon(listener.wait_closed())


async def test_a_peer_that_is_gone_is_heard_of_on_a_half_open_unix_socket(
    unix_wire: Wire,
) -> None:
    log: list[Any] = []
    table = {
        "data": lambda socket, data: None,
        "end": lambda socket: log.append("end"),
        "close": lambda socket, error: log.append(error),
    }
    listener = await unix_wire.listen(table, allow_half_open=True)
    with unix_wire.dial(listener) as peer:
        peer.sendall(b"job")
        peer.shutdown(stdlib.SHUT_WR)
        await until(lambda: log == ["end"])
    await until(lambda: len(log) == 2)
    assert isinstance(log[1], BrokenPipeError)
    listener.stop()
    await soon(listener.wait_closed())


async def test_an_orderly_hang_up_waits_for_who_is_paused(unix_wire: Wire) -> None:
    """A Unix peer that closes is gone at once, with what it sent still to be read."""
    log: list[Any] = []
    opened: list[Any] = []
    table = {
        "open": lambda socket: (socket.pause(), opened.append(socket)),
        "data": lambda socket, data: log.append(data),
        "close": lambda socket, error: log.append(error),
    }
    listener = await unix_wire.listen(table)
    with unix_wire.dial(listener) as peer:
        await until(lambda: opened)
        peer.sendall(b"job")
    began = time.process_time()
    await asyncio.sleep(0.3)
    assert time.process_time() - began < 0.15  # the hang-up does not wake the loop all the time
    assert log == []
    opened[0].resume()
    await until(lambda: log == [b"job", None])
    listener.stop()
    await soon(listener.wait_closed())


# ── Closing on asyncio's face ──────────────────────────────────────────────────────────────────


async def test_a_closed_transport_delivers_to_a_peer_that_keeps_talking() -> None:
    """The kernel answers what comes in after the close by a reset, which takes the rest with it."""
    size = 300_000
    told: dict[int, Any] = {}

    class Server(asyncio.Protocol):
        def connection_made(self, transport: Any) -> None:
            self.transport = transport
            self.port = transport.get_extra_info("peername")[1]

        def data_received(self, data: bytes) -> None:
            if not self.transport.is_closing():
                self.transport.write(b"z" * size)
                self.transport.close()

        def connection_lost(self, error: Exception | None) -> None:
            told[self.port] = error

    lost: dict[int, int] = {}

    def talk(address: Any, seed: int) -> None:
        chance = random.Random(seed)
        for _ in range(6):
            with stdlib.socket() as sock:
                sock.setsockopt(stdlib.SOL_SOCKET, stdlib.SO_RCVBUF, 8192)
                sock.connect(address)
                port = sock.getsockname()[1]
                sock.sendall(b"go")
                got = pieces = 0
                try:
                    while piece := sock.recv(chance.choice([100, 4000, 65536])):
                        got += len(piece)
                        pieces += 1
                        if pieces % 3 == 0:
                            sock.sendall(b"chat" * chance.choice([1, 1000]))
                        if pieces % 8 == 0:
                            time.sleep(0.002)
                except OSError:
                    pass  # counted by what is missing
                lost[port] = size - got

    def serve() -> None:
        async def main() -> None:
            loop = asyncio.get_running_loop()
            server = await loop.create_server(Server, "127.0.0.1", 0)
            address = server.sockets[0].getsockname()
            await asyncio.gather(*(asyncio.to_thread(talk, address, seed) for seed in range(8)))
            await until(lambda: len(told) == 48)
            server.close()
            await server.wait_closed()

        with asyncio.Runner(loop_factory=uvsock.new_event_loop) as runner:
            runner.run(main())

    await soon(asyncio.to_thread(serve), 30)
    assert lost == dict.fromkeys(told, 0)
    assert set(told.values()) == {None}


def test_closed_connections_do_not_keep_their_descriptors() -> None:
    """A peer that takes nothing, one that is gone, and one that has ended its side."""
    said = run_python(
        "-c",
        """
import asyncio, os, socket, struct, uvsock

class Server(asyncio.Protocol):
    def connection_made(self, transport):
        self.transport = transport
    def data_received(self, data):
        self.transport.write(bytes(200_000))
        self.transport.close()

def sockets():
    return sum(os.readlink(f"/proc/self/fd/{n}").startswith("socket:")
               for n in os.listdir("/proc/self/fd") if os.path.lexists(f"/proc/self/fd/{n}"))

async def main():
    loop = asyncio.get_running_loop()
    server = await loop.create_server(Server, "127.0.0.1", 0)
    peers = []
    before = sockets()
    for _ in range(3):
        peer = socket.socket()
        peer.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        peer.setblocking(False)
        try:
            peer.connect(server.sockets[0].getsockname())
        except BlockingIOError:
            pass
        await loop.sock_sendall(peer, b"x")
        peers.append(peer)
    while sockets() != before + 6:  # theirs, and ours that wait for them
        await asyncio.sleep(0.01)
    peers[0].setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    for peer in peers[:2]:
        peer.close()
    while await loop.sock_recv(peers[2], 65536):
        pass
    while sockets() != before + 1:
        await asyncio.sleep(0.01)
    peers[2].close()
    server.close()
    print("gone")

asyncio.Runner(loop_factory=uvsock.new_event_loop).run(main())
""",
        warnings="ignore",
    )
    assert said == "gone\n"
