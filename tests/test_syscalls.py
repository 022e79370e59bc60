"""System calls per message, counted by strace: the figure that decides the speed of a server."""

from __future__ import annotations

import os
import re
import shutil
import signal
import socket as stdlib
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from conftest import SERVER_NAME, Authority

# Enough that what starting and ending cost is far below half a call per message.
MESSAGES = 200
RECEIVES = ("read", "recvfrom", "recvmsg", "readv")
SENDS = ("write", "sendto", "sendmsg", "writev")
POLLS = ("?epoll_wait", "epoll_pwait")  # some systems have the second one only

SERVER = """
import asyncio, os, select, signal, socket as stdlib, sys, uvsock

def write(socket, data): socket.write(data)
def five(socket, data):
    for byte in b"12345":
        socket.write(bytes([byte]))
def everyone(socket, data):
    for other in listener.sockets:
        other.write(data)
def everyone_at_once(socket, data):
    if data.startswith(b"wait for "):
        # What comes meanwhile is read in one iteration.
        with stdlib.create_connection(("127.0.0.1", int(data[9:])), 10) as held:
            held.recv(1)
    else:
        everyone(socket, data)
def held_up(socket, data):
    os.write(socket.fileno(), b"!")
    if data == b"wait":
        select.select([socket.fileno()], [], [])
def gathered(socket, data):
    socket.write(b"head")
    socket.write(LARGE)

class Protocol(asyncio.Protocol):
    def connection_made(self, transport):
        self.transport = transport
    def data_received(self, data):
        asyncio.get_running_loop().call_soon(self.answer)
class Buffered(asyncio.BufferedProtocol):
    connection_made = Protocol.connection_made
    buffer = bytearray(64)
    def get_buffer(self, hint):
        return self.buffer
    def buffer_updated(self, size):
        asyncio.get_running_loop().call_soon(self.answer)
    def answer(self):
        self.transport.write(b"head")
        self.transport.write(b"body")
class Pouring(Protocol):
    left = 20 * 2**20
    paused = False
    def data_received(self, data):
        while self.left and not self.paused:
            self.transport.write(bytes(65536))
            self.left -= 65536
    def pause_writing(self):
        self.paused = True
    def resume_writing(self):
        self.paused = False
        self.data_received(b"")
class Once(Protocol):
    def answer(self):
        self.transport.write(b"!")
class Twice(Protocol):
    def answer(self):
        self.transport.write(b"head")
        self.transport.write(b"body")

LARGE = bytes(40_000)
tls = {"cert": open(sys.argv[3]).read(), "key": open(sys.argv[4]).read()} if sys.argv[3:] else None

async def main():
    global listener
    if sys.argv[2] == "protocol":
        loop = asyncio.get_running_loop()
        server = await loop.create_server(globals()[sys.argv[1]], "127.0.0.1", 0)
        print(server.sockets[0].getsockname()[1], os.getpid(), flush=True)
        stop = asyncio.Event()
        loop.add_signal_handler(signal.SIGTERM, stop.set)
        return await stop.wait()
    listener = await uvsock.listen({"data": globals()[sys.argv[1]]}, "127.0.0.1", 0,
                                   cork=sys.argv[2] == "cork", tls=tls)
    print(listener.port, os.getpid(), flush=True)

uvsock.run(main())
"""


@contextmanager
def server(tmp_path: Path, *arguments: str) -> Iterator[tuple[int, Callable[[], Counter[str]]]]:
    """A server under strace: its port, and what ends it and counts its calls on sockets."""
    if shutil.which("strace") is None:
        if os.environ.get("CI"):
            pytest.fail("strace is not installed")
        pytest.skip("strace is not installed")
    script = tmp_path / "server.py"
    script.write_text(SERVER)
    trace = tmp_path / "trace"
    calls = ",".join((*RECEIVES, *SENDS, *POLLS, "accept4", "epoll_ctl"))
    process = subprocess.Popen(
        ["strace", "-f", "-qq", "-yy", "-e", f"trace={calls}", "-o", str(trace),
         sys.executable, str(script), *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )  # fmt: skip
    assert process.stdout is not None
    line = process.stdout.readline().split()
    if len(line) != 2:
        _, error = process.communicate()
        if "ptrace" in error.lower() and not os.environ.get("CI"):
            pytest.skip("strace may not trace here")
        pytest.fail(error)

    port, pid = map(int, line)

    def count() -> Counter[str]:
        os.kill(pid, signal.SIGTERM)  # strace itself blocks it
        process.communicate(timeout=20)
        # Such as: 17 sendto(12<TCP:[127.0.0.1:1->127.0.0.1:2]>, "x"..., 1, ...) = 1
        lines = trace.read_text()
        found = re.findall(r"^\d+ +(\w+)\(\d+<TCP:", lines, re.MULTILINE)
        counts = Counter("receive" if name in RECEIVES else name for name in found)
        counts["watch"] = len(re.findall(r"^\d+ +epoll_ctl\(.*<TCP:.*->", lines, re.MULTILINE))
        counts["poll"] = len(re.findall(r"^\d+ +epoll_p?wait\(", lines, re.MULTILINE))
        return counts

    try:
        yield port, count
    finally:
        if process.poll() is None:
            os.kill(pid, signal.SIGKILL)
            process.communicate(timeout=20)


def sends(calls: Counter[str]) -> float:
    return sum(calls[name] for name in SENDS) / MESSAGES


def ping_pong(sock: stdlib.socket, answer: int) -> None:
    for _ in range(MESSAGES):
        sock.sendall(b"x")
        left = answer
        while left:
            left -= len(sock.recv(left))


@pytest.mark.parametrize(
    ("handler", "cork", "answer", "per_message"),
    [
        ("write", "cork", 1, 1),
        ("write", "no cork", 1, 1),
        ("five", "cork", 5, 1),
        ("five", "no cork", 5, 5),
    ],
)
def test_calls_per_message(
    tmp_path: Path, handler: str, cork: str, answer: int, per_message: int
) -> None:
    with server(tmp_path, handler, cork) as (port, count):
        with stdlib.create_connection(("127.0.0.1", port), 10) as sock:
            ping_pong(sock, answer)
        calls = count()
    assert sends(calls) == per_message
    assert calls["receive"] / MESSAGES == pytest.approx(1, abs=0.05)  # and the end of the file


@pytest.mark.parametrize(("answers", "size"), [("Once", 1), ("Twice", 8), ("Buffered", 8)])
def test_an_answer_of_a_task_takes_no_iteration_of_its_own(
    tmp_path: Path, answers: str, size: int
) -> None:
    """Of asyncio's programs, with a few connections: after the first ones."""
    with server(tmp_path, answers, "protocol") as (port, count):
        with stdlib.create_connection(("127.0.0.1", port), 10) as sock:
            ping_pong(sock, size)
        calls = count()
    assert sends(calls) == 1
    assert calls["receive"] / MESSAGES == pytest.approx(1, abs=0.05)
    assert calls["poll"] / MESSAGES == pytest.approx(1, abs=0.2)


def test_a_connection_is_watched_anew_only_when_something_else_matters(tmp_path: Path) -> None:
    """Not for each message, nor each time that the kernel is full of what a protocol pours."""
    with server(tmp_path, "Pouring", "protocol") as (port, count):
        with stdlib.create_connection(("127.0.0.1", port), 10) as sock:
            sock.sendall(b"x")
            left = 20 * 2**20
            while left:
                left -= len(sock.recv(min(left, 65536)))
        calls = count()
    assert sum(calls[name] for name in SENDS) > 20  # so often it was full
    # By uvloop at first, until that is over, by us, for writing too, and no more for that.
    assert 3 <= calls["watch"] <= 8


def test_what_is_held_and_a_large_write_leave_in_one_sendmsg(tmp_path: Path) -> None:
    with server(tmp_path, "gathered", "cork") as (port, count):
        with stdlib.create_connection(("127.0.0.1", port), 10) as sock:
            ping_pong(sock, 40_004)
        calls = count()
    assert calls["sendmsg"] == MESSAGES
    assert sends(calls) == 1


def test_five_writes_over_tls_are_one_send(tmp_path: Path, authority: Authority) -> None:
    paths = []
    for name in ("cert", "key"):
        paths.append(tmp_path / f"{name}.pem")
        paths[-1].write_bytes(authority.server_options[name])
    with server(tmp_path, "five", "cork", *map(str, paths)) as (port, count):
        with (
            stdlib.create_connection(("127.0.0.1", port), 10) as plain,
            authority.client_context().wrap_socket(plain, server_hostname=SERVER_NAME) as sock,
        ):
            ping_pong(sock, 5)
            sock.unwrap()
        calls = count()
    assert sends(calls) == pytest.approx(1, abs=0.05)  # and those of the handshake
    assert calls["receive"] / MESSAGES == pytest.approx(1, abs=0.05)


def introduce(sockets: list[stdlib.socket]) -> None:
    """Have a server that sends all to everyone know them, and read what it has sent by then."""

    def read_to(last: bytes, sock: stdlib.socket) -> None:
        while not sock.recv(1000).endswith(last):
            pass

    for number, sock in enumerate(sockets):
        sock.sendall(b"%d" % number)
        read_to(b"%d" % number, sock)
    for sock in sockets[:-1]:
        read_to(b"%d" % number, sock)


def test_fan_out_is_one_send_per_socket_and_iteration(tmp_path: Path) -> None:
    """Several messages that arrive together go to everyone in one send each."""
    clients, at_once = 5, 8
    rounds = MESSAGES // at_once
    with server(tmp_path, "everyone", "cork") as (port, count):
        sockets = [stdlib.create_connection(("127.0.0.1", port), 10) for _ in range(clients)]
        try:
            introduce(sockets)
            for _ in range(rounds):
                sockets[0].sendall(b"m" * at_once)
                for sock in sockets:
                    left = at_once
                    while left:
                        left -= len(sock.recv(left))
        finally:
            for sock in sockets:
                sock.close()
        calls = count()
    total = sum(calls[name] for name in SENDS)
    assert total <= clients * (rounds + clients)
    assert total >= clients * rounds


def test_sockets_that_all_write_to_each_other_are_sent_once_per_iteration(tmp_path: Path) -> None:
    """Also to itself: the own socket does not leave before the others when it is one of them."""
    clients, rounds = 10, 30
    with server(tmp_path, "everyone_at_once", "cork") as (port, count):
        gate = stdlib.create_server(("127.0.0.1", 0))
        gate.settimeout(10)
        sockets = [stdlib.create_connection(("127.0.0.1", port), 10) for _ in range(clients)]
        try:
            # Or the kernel would keep the "m" behind "wait for" to itself.
            sockets[0].setsockopt(stdlib.IPPROTO_TCP, stdlib.TCP_NODELAY, 1)
            introduce(sockets)
            for _ in range(rounds):
                sockets[0].sendall(b"wait for %d" % gate.getsockname()[1])
                held, _ = gate.accept()
                for sock in sockets:
                    sock.sendall(b"m")
                held.close()
                for sock in sockets:
                    left = clients
                    while left:
                        left -= len(sock.recv(left))
        finally:
            for sock in (gate, *sockets):
                sock.close()
        calls = count()
    # Each round is one send for each, or two if it was over before the last message was there.
    # Until all were known it was at most one for each message and client.
    total = sum(calls[name] for name in SENDS) - clients
    assert clients * rounds <= total <= clients * rounds * 1.3 + clients * clients


def test_connections_that_come_together_are_accepted_together(tmp_path: Path) -> None:
    """libuv takes one per wake-up."""
    clients = 100
    with server(tmp_path, "held_up", "cork") as (port, count):
        with stdlib.create_connection(("127.0.0.1", port), 10) as first:
            first.sendall(b"wait")
            assert first.recv(1) == b"!"
            others = [stdlib.create_connection(("127.0.0.1", port), 10) for _ in range(clients)]
            for sock in others:
                sock.sendall(b"x")
            first.sendall(b"x")
            for sock in others:
                assert sock.recv(1) == b"!"
                sock.close()
        calls = count()
    assert calls["accept4"] >= clients + 1
    assert calls["poll"] < clients / 2
