"""Accepting: nobody who waits is dropped, whatever accept(2) fails with."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import resource
import shutil
import socket as stdlib
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Self

import pytest

import uvsock
from conftest import SERVER_NAME, Authority, Wire, soon, until

LOOPS = {"uvsock": uvsock.new_event_loop}


def echo(socket: uvsock.Socket[Any], data: bytes) -> None:
    socket.write(data)


class Echo(asyncio.Protocol):
    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport: Any = transport

    def data_received(self, data: bytes) -> None:
        self.transport.write(data)


# ── In this process, with as many descriptors as the test says ─────────────────────────────────


class Descriptors:
    """How many this process can still open."""

    def __init__(self) -> None:
        self.held: list[int] = []

    def leave(self, n: int) -> None:
        """All lower numbers are taken, and ``n`` more are allowed."""
        low = os.open(os.devnull, os.O_RDONLY)
        self.held.append(low)
        highest = max(map(int, os.listdir("/dev/fd")))
        while low < highest:
            low = os.open(os.devnull, os.O_RDONLY)
            self.held.append(low)
        resource.setrlimit(resource.RLIMIT_NOFILE, (low + 1 + n, self.limits[1]))

    def give_back(self) -> None:
        resource.setrlimit(resource.RLIMIT_NOFILE, self.limits)
        while self.held:
            os.close(self.held.pop())

    def __enter__(self) -> Self:
        self.limits = resource.getrlimit(resource.RLIMIT_NOFILE)
        return self

    def __exit__(self, *exception: object) -> None:
        self.give_back()


@pytest.fixture
def descriptors() -> Iterator[Descriptors]:
    with Descriptors() as found:
        yield found


class Server:
    """A listener, or a server of the loop's, and clients that are not uvsock's."""

    def __init__(self, kind: str, wire: Wire) -> None:
        self.kind = kind
        self.wire = wire
        self.clients: list[stdlib.socket] = []

    async def start(self, **options: Any) -> None:
        loop = asyncio.get_running_loop()
        if self.kind == "listen":
            self.listener = await self.wire.listen({"data": echo}, **options)
            if self.wire.kind == "unix":
                self.address: Any = self.listener.unix
            else:
                self.address = (self.listener.hostname, self.listener.port)
        elif self.wire.kind == "unix":
            self.address = str(self.wire.directory / "s")
            self.server = await loop.create_unix_server(Echo, self.address, **options)
        else:
            self.server = await loop.create_server(Echo, "127.0.0.1", 0, **options)
            self.address = self.server.sockets[0].getsockname()

    def client(self) -> stdlib.socket:
        """One that can connect later, when there is no descriptor for another."""
        family = stdlib.AF_UNIX if self.wire.kind == "unix" else stdlib.AF_INET
        sock = stdlib.socket(family)
        self.clients.append(sock)
        return sock

    def knock(self) -> None:
        """All clients connect, and say something."""
        for sock in self.clients:
            sock.setblocking(True)
            sock.connect(self.address)
            sock.setblocking(False)
            sock.send(b"x")

    def answered(self) -> list[stdlib.socket]:
        """The clients that have an answer; it is an error if one sees the end of its connection."""
        found = []
        for sock in self.clients:
            with contextlib.suppress(BlockingIOError):
                assert sock.recv(1, stdlib.MSG_PEEK) == b"x"
                found.append(sock)
        return found

    def leave(self, sock: stdlib.socket) -> None:
        self.clients.remove(sock)
        sock.close()

    async def stop(self) -> None:
        if self.kind == "listen":
            self.listener.stop(True)
            await soon(self.listener.wait_closed())
        else:
            self.server.close()
            self.server.close_clients()  # type: ignore[attr-defined, unused-ignore]
            await soon(self.server.wait_closed())

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exception: object) -> None:
        for sock in self.clients:
            sock.close()
        await self.stop()


@pytest.fixture(params=["listen", "create_server"])
def served(request: pytest.FixtureRequest, plain_wire: Wire) -> Server:
    return Server(request.param, plain_wire)


async def test_who_waits_is_served_when_another_leaves(
    served: Server, descriptors: Descriptors
) -> None:
    async with served:
        await served.start()
        for _ in range(6):
            served.client()
        descriptors.leave(3)
        served.knock()
        await until(lambda: len(served.answered()) == 3)
        await asyncio.sleep(0.02)
        assert len(served.answered()) == 3  # for the others there is no descriptor
        served.leave(served.answered()[0])
        # Its own is free, and ours.
        await until(lambda: len(served.answered()) == 4)
        while served.clients:
            await until(served.answered)
            served.leave(served.answered()[0])
        descriptors.give_back()


async def test_who_waits_is_served_when_the_program_closes_a_file(
    served: Server, descriptors: Descriptors
) -> None:
    async with served:
        await served.start()
        for _ in range(3):
            served.client()
        descriptors.leave(1)
        served.knock()
        await until(lambda: len(served.answered()) == 1)
        os.close(descriptors.held.pop())
        await until(lambda: len(served.answered()) == 2)
        os.close(descriptors.held.pop())
        await until(lambda: len(served.answered()) == 3)
        descriptors.give_back()


@pytest.mark.parametrize("again", [False, True], ids=["", "again"])
async def test_it_stops_while_there_is_no_descriptor(
    served: Server, descriptors: Descriptors, again: bool
) -> None:
    await served.start()
    sock = served.client()
    descriptors.leave(0)
    served.knock()
    await asyncio.sleep(0.02)
    await served.stop()
    if again:
        descriptors.give_back()
        await asyncio.sleep(0.05)  # longer than until the next try would have been
    sock.setblocking(True)
    sock.settimeout(5)
    with contextlib.suppress(ConnectionResetError):
        assert sock.recv(1) == b""
    sock.close()


async def test_a_socket_that_the_program_has_closed_meanwhile(
    descriptors: Descriptors, tcp_wire: Wire
) -> None:
    """As when there are descriptors: the object is the program's, the descriptor the listener's."""
    sock = stdlib.create_server(("127.0.0.1", 0))
    async with Server("listen", tcp_wire) as served:
        served.listener = await uvsock.listen({"data": echo}, sock=sock)
        served.address = sock.getsockname()
        served.client()
        descriptors.leave(0)
        served.knock()
        await asyncio.sleep(0.02)
        sock.close()
        descriptors.give_back()
        await until(served.answered)


async def test_listeners_take_turns(descriptors: Descriptors, tcp_wire: Wire) -> None:
    """The one that was first does not get every descriptor that becomes free."""
    async with Server("listen", tcp_wire) as one, Server("listen", tcp_wire) as other:
        both = (one, other)
        for each in both:
            await each.start()
            for _ in range(8):
                each.client()
        descriptors.leave(1)
        for each in both:
            each.knock()
        served = []
        for _ in range(8):
            await until(lambda: one.answered() + other.answered())
            each = one if one.answered() else other
            served.append(each)
            each.leave(each.answered()[0])
            descriptors.held.append(os.open(os.devnull, os.O_RDONLY))  # the client's own
        assert min(served.count(one), served.count(other)) >= 2
        descriptors.give_back()


# ── In a process of its own ────────────────────────────────────────────────────────────────────

# Says its port, and what it has logged when it is over; ends by SIGTERM.
PROGRAM = """
import asyncio, ctypes, logging, os, resource, socket, ssl, sys, uvsock

class Say(logging.Handler):
    def emit(self, record):
        print(record.name, record.levelname, record.getMessage(), flush=True)
logging.getLogger().addHandler(Say())

class Echo(asyncio.Protocol):
    def connection_made(self, transport):
        self.transport = transport
    def data_received(self, data):
        self.transport.write(data)

kind, wire, address, key, cert = sys.argv[1:]
context = None
if wire == "tls":
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(cert, key)
if "LIMIT" in os.environ:
    limit = int(os.environ["LIMIT"])
    resource.setrlimit(resource.RLIMIT_NOFILE, (limit, limit))

async def main():
    loop = asyncio.get_running_loop()
    if kind == "listen":
        where = {"unix": address} if wire == "unix" else {"hostname": "127.0.0.1", "port": 0}
        server = await uvsock.listen({"data": lambda socket, data: socket.write(data)},
                                     tls=context, **where)
        print(server.port, flush=True)
    else:
        if wire == "unix":
            server = await loop.create_unix_server(Echo, address, backlog=1024)
        else:
            server = await loop.create_server(Echo, "127.0.0.1", 0, backlog=1024, ssl=context)
        print(server.sockets[0].getsockname()[1] if wire != "unix" else None, flush=True)
    if "SECONDS" in os.environ:
        await asyncio.sleep(float(os.environ["SECONDS"]))
        print("tried", ctypes.c_long.in_dll(ctypes.CDLL(None), "tried").value, flush=True)
    try:
        await asyncio.Event().wait()
    finally:
        if kind != "listen":
            server.close()
            server.close_clients()
            await server.wait_closed()

uvsock.run(main())
"""

# FAIL_TIMES calls of accept4 fail with FAIL_ERRNO.
LIBRARY = r"""
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <stdlib.h>
#include <sys/socket.h>

long tried;

int accept4(int fd, struct sockaddr *name, socklen_t *size, int flags) {
    static int (*real)(int, struct sockaddr *, socklen_t *, int);
    if (!real) real = dlsym(RTLD_NEXT, "accept4");
    if (tried++ < atol(getenv("FAIL_TIMES"))) {
        errno = atoi(getenv("FAIL_ERRNO"));
        return -1;
    }
    return real(fd, name, size, flags);
}
"""


class Program:
    """A server in a process of its own."""

    def __init__(
        self, kind: str, wire: str, authority: Authority, directory: Path, **environment: object
    ) -> None:
        self.wire = wire
        self.authority = authority
        self.path = directory / "s"
        files = []
        for name, content in authority.server_options.items():
            files.append(directory / name)
            files[-1].write_bytes(content)
        self.process = subprocess.Popen(
            [sys.executable, "-W", "error", "-c", PROGRAM, kind, wire, self.path, *files],
            env=os.environ | {name: str(value) for name, value in environment.items()},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        self.port = self.line()

    def line(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline().rstrip()

    def connect(self) -> stdlib.socket:
        sock = stdlib.socket(stdlib.AF_UNIX if self.wire == "unix" else stdlib.AF_INET)
        sock.settimeout(20)
        sock.connect(str(self.path) if self.wire == "unix" else ("127.0.0.1", int(self.port)))
        if self.wire == "tls":
            sock = self.authority.client_context().wrap_socket(sock, server_hostname=SERVER_NAME)
        return sock

    def stop(self) -> tuple[str, str]:
        """What it has still said, and what it says on stderr."""
        self.process.terminate()
        return self.process.communicate(timeout=20)


@pytest.fixture
def program(authority: Authority) -> Iterator[Callable[..., Program]]:
    started = []
    with tempfile.TemporaryDirectory(prefix="uvs") as directory:

        def start(kind: str, wire: str, **environment: object) -> Program:
            started.append(Program(kind, wire, authority, Path(directory), **environment))
            return started[-1]

        yield start
        for each in started:
            each.process.kill()
            each.process.communicate()


WARNING = "uvsock WARNING cannot accept on {}: {}; who connects waits until it can"


@pytest.mark.parametrize("wire", ["tcp", "unix", "tls"])
@pytest.mark.parametrize("kind", ["listen", "create_server"])
def test_three_times_as_many_clients_as_descriptors(
    program: Callable[..., Program], kind: str, wire: str
) -> None:
    server = program(kind, wire, LIMIT=40)
    short = threading.Event()

    def client(_: int) -> bytes:
        with server.connect() as sock:
            sock.sendall(b"x")
            answer = sock.recv(1)
            short.wait(20)
            return answer

    with ThreadPoolExecutor(120) as clients:
        answers = clients.map(client, range(120))
        warning = server.line()
        short.set()
        assert list(answers) == [b"x"] * 120
    name = str(server.path) if wire == "unix" else ("127.0.0.1", int(server.port))
    assert warning == WARNING.format(name, os.strerror(errno.EMFILE))
    # Once only: it was short of descriptors more often than that.
    assert server.stop() == ("", "")
    assert server.process.returncode == 0


@pytest.mark.parametrize("kind", ["listen", "create_server"])
def test_sigterm_while_there_is_no_descriptor(program: Callable[..., Program], kind: str) -> None:
    server = program(kind, "tcp", LIMIT=30)
    clients = [server.connect() for _ in range(40)]
    assert server.line().startswith("uvsock WARNING cannot accept")
    assert server.stop() == ("", "")
    for sock in clients:
        with sock, contextlib.suppress(ConnectionResetError):
            assert sock.recv(1) == b""


@pytest.fixture(scope="module")
def failing(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., dict[str, object]]:
    """The environment of a program whose accept(2) fails with ``code`` for so many ``times``."""
    if sys.platform != "linux" or shutil.which("cc") is None:
        pytest.skip("needs LD_PRELOAD and a C compiler")
    directory = tmp_path_factory.mktemp("accept")
    (directory / "accept.c").write_text(LIBRARY)
    library = directory / "accept.so"
    subprocess.run(
        ["cc", "-shared", "-fPIC", "-o", library, directory / "accept.c", "-ldl"], check=True
    )
    return lambda code, times, **more: {
        "LD_PRELOAD": library,
        "FAIL_ERRNO": code,
        "FAIL_TIMES": times,
        **more,
    }


@pytest.mark.parametrize(
    "name", ["ECONNABORTED", "EINTR", "EPERM", "EPROTO", "ENETDOWN", "EHOSTUNREACH"]
)
def test_an_error_of_one_client_is_not_that_of_the_next(
    program: Callable[..., Program], failing: Callable[..., Any], name: str
) -> None:
    server = program("listen", "tcp", **failing(getattr(errno, name), 3))
    with server.connect() as sock:
        sock.sendall(b"x")
        assert sock.recv(1) == b"x"
    assert server.stop() == ("", "")


@pytest.mark.parametrize("name", ["EMFILE", "ENFILE", "ENOBUFS", "ENOMEM"])
def test_who_connects_while_the_system_is_short_of_something_is_served_later(
    program: Callable[..., Program], failing: Callable[..., Any], name: str
) -> None:
    code = getattr(errno, name)
    server = program("listen", "tcp", **failing(code, 3))
    with server.connect() as sock:
        sock.sendall(b"x")
        assert sock.recv(1) == b"x"
    name = WARNING.format(("127.0.0.1", int(server.port)), os.strerror(code))
    assert server.stop() == (f"{name}\n", "")


def test_what_fails_for_ever_is_not_tried_all_the_time(
    program: Callable[..., Program], failing: Callable[..., Any]
) -> None:
    """With delays that double there are some tries in this time, without them thousands."""
    server = program("listen", "tcp", **failing(errno.EMFILE, 1_000_000_000, SECONDS=0.5))
    with server.connect():
        assert server.line().startswith("uvsock WARNING")
        tried, times = server.line().split()
    assert tried == "tried"
    assert 1 < int(times) < 20
    assert server.stop() == ("", "")


def test_a_listening_socket_that_is_none_any_more(
    program: Callable[..., Program], failing: Callable[..., Any]
) -> None:
    """As after a shutdown(2) of it: that is said, once, and not tried again."""
    server = program("listen", "tcp", **failing(errno.EINVAL, 1_000_000_000, SECONDS=0.5))
    with server.connect():
        said = server.line()
        assert said.startswith("asyncio ERROR A connection could not be accepted")
        while not said.startswith("tried"):
            said = server.line()
    assert said == "tried 1"
