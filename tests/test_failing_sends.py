"""send(2) that fails for another reason than a dead peer, by a library loaded before libc."""

from __future__ import annotations

import errno
import os
import shutil
import socket
import ssl
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from conftest import SERVER_NAME, Authority

pytestmark = [
    pytest.mark.skipif(sys.platform != "linux", reason="LD_PRELOAD is Linux's"),
    pytest.mark.skipif(shutil.which("cc") is None, reason="needs a C compiler"),
]

# After FAIL_AFTER bytes, FAIL_TIMES sends fail with FAIL_ERRNO. No send takes more than 4 KiB.
LIBRARY = r"""
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <stdlib.h>
#include <sys/socket.h>

static long sent;
long failed;

static long number(const char *name) { return atol(getenv(name)); }

static int fails(void) {
    if (sent < number("FAIL_AFTER") || failed >= number("FAIL_TIMES")) return 0;
    failed++;
    errno = number("FAIL_ERRNO");
    return 1;
}

ssize_t send(int fd, const void *data, size_t size, int flags) {
    static ssize_t (*real)(int, const void *, size_t, int);
    if (!real) real = dlsym(RTLD_NEXT, "send");
    if (fails()) return -1;
    ssize_t n = real(fd, data, size > 4096 ? 4096 : size, flags);
    if (n > 0) sent += n;
    return n;
}

ssize_t sendmsg(int fd, const struct msghdr *message, int flags) {
    static ssize_t (*real)(int, const struct msghdr *, int);
    if (!real) real = dlsym(RTLD_NEXT, "sendmsg");
    if (fails()) return -1;
    ssize_t n = real(fd, message, flags);
    if (n > 0) sent += n;
    return n;
}
"""

# Serves one connection with SIZE bytes and an end, and says what became of it.
SERVER = """
import asyncio, contextlib, ctypes, os, ssl, sys, uvsock

kind, key, cert = sys.argv[1:]
size = int(os.environ["SIZE"])
over = asyncio.Event()
context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
context.load_cert_chain(cert, key)
tls = context if "tls" in kind else None

def say(*what):
    print(*what, flush=True)

class Protocol(asyncio.Protocol):
    def connection_made(self, transport):
        say("open")
        self.transport = transport
    def data_received(self, data):
        self.transport.write(b"z" * size)
        self.transport.close()
    def connection_lost(self, error):
        say("close", repr(error))
        over.set()

def closed(socket, error):
    say("close", repr(error))
    over.set()

def shaken(socket, success, error):
    if not success:
        say("handshake", repr(error.__cause__))
        over.set()

table = {
    "open": lambda socket: say("open"),
    "data": lambda socket, data: socket.end(b"z" * size),
    "close": closed,
    "handshake": shaken,
}

async def main():
    if "transport" in kind:
        loop = asyncio.get_running_loop()
        server = await loop.create_server(Protocol, "127.0.0.1", 0, ssl=tls)
        port = server.sockets[0].getsockname()[1]
    else:
        listener = await uvsock.listen(table, "127.0.0.1", 0, tls=tls)
        port = listener.port
    say(port)
    with contextlib.suppress(TimeoutError):
        await asyncio.wait_for(over.wait(), float(os.environ["SECONDS"]))
    say(ctypes.c_long.in_dll(ctypes.CDLL(os.environ["LIBRARY"]), "failed").value)
    os._exit(0)

asyncio.Runner(loop_factory=uvsock.new_event_loop).run(main())
"""

# Connects to a port, and says what became of it.
CLIENT = """
import asyncio, sys, uvsock

async def main():
    table = {"data": print, "open": lambda socket: print("open"), "close": print}
    tls = {"reject_unauthorized": False}
    try:
        await uvsock.connect(table, "127.0.0.1", int(sys.argv[1]), tls=tls)
    except OSError as error:
        print(repr(error.__cause__))

asyncio.Runner(loop_factory=uvsock.new_event_loop).run(main())
"""


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("library")
    (folder / "failing.c").write_text(LIBRARY)
    built = folder / "failing.so"
    command = ["cc", "-shared", "-fPIC", "-o", str(built), str(folder / "failing.c"), "-ldl"]
    subprocess.run(command, check=True)
    return built


@pytest.fixture
def environment(library: Path) -> Callable[..., dict[str, str]]:
    def made(code: int, after: int, times: int, seconds: float = 10) -> dict[str, str]:
        before = os.environ.get("LD_PRELOAD")  # a sanitizer: it has to be first
        return os.environ | {
            "LD_PRELOAD": f"{before}:{library}" if before else str(library),
            "FAIL_ERRNO": str(code),
            "FAIL_AFTER": str(after),
            "FAIL_TIMES": str(times),
            "SIZE": "100000",
            "SECONDS": str(seconds),
            "LIBRARY": str(library),
        }

    return made


class Server:
    def __init__(self, process: subprocess.Popen[str], authority: Authority, tls: bool) -> None:
        self.process = process
        self.authority = authority
        self.tls = tls
        self.port = int(self.line())

    def line(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline().strip()

    def talk(self, timeout: float = 10) -> tuple[int, str]:
        """Ask for the bytes: how many came, and what came then."""
        received = 0
        with socket.create_connection(("127.0.0.1", self.port), timeout) as sock:
            session = Session(sock, self.authority.client_context()) if self.tls else None
            try:
                if session is None:
                    sock.sendall(b"x")
                else:
                    session.run(session.ssl.do_handshake)
                    session.run(lambda: session.ssl.write(b"x"))
                read = session.read if session is not None else lambda: sock.recv(65536)
                while piece := read():
                    received += len(piece)
            except OSError as error:
                return received, type(error).__name__
            return received, "end"


class Session:
    """TLS on a blocking socket. That of the ssl module calls a reset an EOF."""

    def __init__(self, sock: socket.socket, context: ssl.SSLContext) -> None:
        self.sock = sock
        self.incoming, self.outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        self.ssl = context.wrap_bio(self.incoming, self.outgoing, server_hostname=SERVER_NAME)

    def run(self, call: Callable[[], Any]) -> Any:
        while True:
            try:
                result = call()
            except ssl.SSLWantReadError:
                self.sock.sendall(self.outgoing.read())
                if piece := self.sock.recv(65536):
                    self.incoming.write(piece)
                else:
                    self.incoming.write_eof()
            else:
                self.sock.sendall(self.outgoing.read())
                return result

    def read(self) -> bytes:
        try:
            return self.run(lambda: self.ssl.read(65536))  # type: ignore[no-any-return]
        except ssl.SSLZeroReturnError:
            return b""


@pytest.fixture(params=["socket", "socket tls", "transport", "transport tls"])
def serve(
    request: pytest.FixtureRequest,
    authority: Authority,
    environment: Callable[..., dict[str, str]],
    tmp_path: Path,
) -> Iterator[Callable[..., Server]]:
    started: list[subprocess.Popen[str]] = []

    def start(*arguments: Any, **options: Any) -> Server:
        paths = []
        for name, content in authority.server_options.items():
            paths.append(tmp_path / name)
            paths[-1].write_bytes(content)
        process = subprocess.Popen(
            [sys.executable, "-c", SERVER, request.param, *paths],
            env=environment(*arguments, **options),
            stdout=subprocess.PIPE,
            text=True,
        )
        started.append(process)
        return Server(process, authority, "tls" in request.param)

    yield start
    for process in started:
        process.kill()
        process.communicate()


@pytest.mark.parametrize("code", [errno.ENOMEM, errno.EHOSTUNREACH])
def test_the_peer_is_reset_after_bytes_were_dropped(
    serve: Callable[..., Server], code: int
) -> None:
    """After a FIN it would take a part for the whole."""
    server = serve(code, 20_000, 1_000_000)
    received, then = server.talk()
    assert received < 100_000
    assert then == "ConnectionResetError"
    assert server.line() == "open"
    assert server.line() == f"close {OSError(code, os.strerror(code))!r}"


def test_a_send_without_buffers_is_tried_again(serve: Callable[..., Server]) -> None:
    server = serve(errno.ENOBUFS, 20_000, 5)
    assert server.talk() == (100_000, "end")
    assert [server.line(), server.line()] == ["open", "close None"]


def test_what_fails_for_ever_is_not_tried_all_the_time(serve: Callable[..., Server]) -> None:
    """With delays that double there are ten tries in the first second, without them thousands."""
    server = serve(errno.ENOBUFS, 20_000, 1_000_000_000, seconds=1.5)
    server.talk()
    assert server.line() == "open"
    assert 3 < int(server.line()) < 50


def test_the_last_send_of_a_handshake_fails(
    environment: Callable[..., dict[str, str]], authority: Authority, tmp_path: Path
) -> None:
    """The client's own last flight: whoever connects is told, and not of an open socket."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        process = subprocess.Popen(
            [sys.executable, "-W", "error", "-c", CLIENT, str(listening.getsockname()[1])],
            env=environment(errno.EHOSTUNREACH, 1, 1_000_000),
            stdout=subprocess.PIPE,
            text=True,
        )
        connection, _ = listening.accept()
        context = authority.server_context()
        with (
            connection,
            pytest.raises(OSError),
            context.wrap_socket(connection, server_side=True) as session,
        ):
            session.recv(1)
        said, _ = process.communicate(timeout=10)
    assert said == f"{OSError(errno.EHOSTUNREACH, os.strerror(errno.EHOSTUNREACH))!r}\n"
