"""One loop per test, three wires, and a teardown that fails on anything left behind."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import inspect
import os
import random
import re
import signal
import socket
import ssl
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
import trustme
import uvloop

import uvsock
from helpers import soon, until
from uvsock._socket import live_sockets
from uvsock._stream import state_of

SERVER_NAME = "uvsock.test"

# What a shell starts in the background ignores SIGINT, and so would the programs that tests start.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# libuv opens a pipe for the whole process with the first loop: not a descriptor that a test leaked.
uvloop.new_event_loop().close()


def pytest_asyncio_loop_factories(config: pytest.Config, item: pytest.Item) -> Any:
    return getattr(item.module, "LOOPS", {"uvloop": uvloop.new_event_loop})  # type: ignore[attr-defined]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    # Nobody can run such a test again by its id, and pytest-xdist runs nothing at all: each of its
    # processes collects other ids.
    if addresses := [item.nodeid for item in items if " at 0x" in item.nodeid]:
        raise pytest.UsageError(f"ids of tests hold addresses of objects: {addresses}")


def pytest_collection_finish(session: pytest.Session) -> None:
    # Every test collects garbage; without this each time all that pytest itself has made.
    gc.collect()
    gc.freeze()


class Authority:
    """A certificate authority of this test run, with a server and a client certificate."""

    def __init__(self) -> None:
        self.ca = trustme.CA()
        self.server = self.ca.issue_cert(SERVER_NAME, "localhost", "127.0.0.1", "::1")
        self.client = self.ca.issue_cert("client@uvsock.test")

    @property
    def ca_pem(self) -> bytes:
        return self.ca.cert_pem.bytes()

    @staticmethod
    def pair(leaf: trustme.LeafCert) -> dict[str, bytes]:
        """``key`` and ``cert`` of a leaf, as the TLS options take them."""
        chain = b"".join(pem.bytes() for pem in leaf.cert_chain_pems)
        return {"key": leaf.private_key_pem.bytes(), "cert": chain}

    @property
    def server_options(self) -> dict[str, Any]:
        return self.pair(self.server)

    @property
    def client_options(self) -> dict[str, Any]:
        return {"ca": self.ca_pem, "server_name": SERVER_NAME}

    def client_context(self, **attributes: Any) -> ssl.SSLContext:
        """A standard-library client context that trusts this authority."""
        context = ssl.create_default_context(cadata=self.ca_pem.decode())
        for name, value in attributes.items():
            setattr(context, name, value)
        return context

    def server_context(self) -> ssl.SSLContext:
        """A standard-library server context with this authority's server certificate."""
        context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        self.server.configure_cert(context)
        return context


@pytest.fixture(scope="session")
def authority() -> Authority:
    return Authority()


class Wire:
    """The same test over TCP, Unix sockets or TLS."""

    def __init__(self, kind: str, authority: Authority, directory: Path) -> None:
        self.kind = kind
        self.authority = authority
        self.directory = directory
        self._names = 0

    @property
    def encrypted(self) -> bool:
        return self.kind == "tls"

    async def listen(self, handlers: Any, **options: Any) -> uvsock.Listener:
        if self.kind == "unix":
            self._names += 1
            return await uvsock.listen(
                handlers, unix=str(self.directory / f"s{self._names}"), **options
            )
        if self.encrypted:
            options.setdefault("tls", self.authority.server_options)
        return await uvsock.listen(handlers, "127.0.0.1", 0, **options)

    async def connect(
        self, listener: uvsock.Listener, handlers: Any, **options: Any
    ) -> uvsock.Socket[Any]:
        """A uvsock client of the listener."""
        if self.kind == "unix":
            return await uvsock.connect(handlers, unix=listener.unix, **options)
        if self.encrypted:
            options.setdefault("tls", self.authority.client_options)
        return await uvsock.connect(handlers, listener.hostname, listener.port, **options)

    async def streams(
        self, listener: uvsock.Listener, **options: Any
    ) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        """A client of the listener on asyncio's streams: a peer that is not uvsock."""
        if self.kind == "unix":
            return await asyncio.open_unix_connection(listener.unix, **options)
        if self.encrypted:
            options.setdefault("ssl", self.authority.client_context())
            options.setdefault("server_hostname", SERVER_NAME)
        return await asyncio.open_connection(listener.hostname, listener.port, **options)

    def dial(self, listener: uvsock.Listener) -> socket.socket:
        """A blocking client of the standard library's, for a thread.

        uvloop's streams lose the end of what a TLS peer sent when they are read slowly.
        """
        if self.kind == "unix":
            sock = socket.socket(socket.AF_UNIX)
            sock.settimeout(10)
            sock.connect(listener.unix or "")
            return sock
        sock = socket.create_connection((listener.hostname, listener.port), 10)
        if self.encrypted:
            sock = self.authority.client_context().wrap_socket(sock, server_hostname=SERVER_NAME)
        return sock

    async def receive_all(self, listener: uvsock.Listener, request: bytes = b"") -> bytes:
        """What a client of the standard library's receives until the end, reading slowly."""

        def receive() -> bytes:
            received = bytearray()
            with self.dial(listener) as sock:
                sock.sendall(request)
                while chunk := sock.recv(50_000):
                    received += chunk
                    time.sleep(0.0005)
            return bytes(received)

        return await soon(asyncio.to_thread(receive), 20)


@pytest.fixture(params=["tcp", "unix", "tls"])
def wire(request: pytest.FixtureRequest, authority: Authority) -> Iterator[Wire]:
    # Not tmp_path: a Unix socket's path has room for about 100 bytes.
    with tempfile.TemporaryDirectory(prefix="uvs") as directory:
        yield Wire(request.param, authority, Path(directory))


@pytest.fixture(params=["tcp", "unix"])
def plain_wire(request: pytest.FixtureRequest, authority: Authority) -> Iterator[Wire]:
    with tempfile.TemporaryDirectory(prefix="uvs") as directory:
        yield Wire(request.param, authority, Path(directory))


@pytest.fixture
def unix_wire(authority: Authority) -> Iterator[Wire]:
    with tempfile.TemporaryDirectory(prefix="uvs") as directory:
        yield Wire("unix", authority, Path(directory))


@pytest.fixture
def tcp_wire(authority: Authority, tmp_path: Path) -> Wire:
    return Wire("tcp", authority, tmp_path)


@pytest.fixture
def tls_wire(authority: Authority, tmp_path: Path) -> Wire:
    return Wire("tls", authority, tmp_path)


def without_slowness(stderr: str) -> str:
    """Without what asyncio's debug mode says of callbacks that took 0.1 s: the machine was busy."""
    return re.sub(r"^Executing <.*> took \d+\.\d+ seconds\n", "", stderr, flags=re.MULTILINE)


def run_python(
    *arguments: str, under: Sequence[str] = (), warnings: str = "error", **options: Any
) -> str:
    """What a program prints that ends by itself, succeeds and says nothing on stderr.

    ``arguments`` are the interpreter's, ``under`` is a command that runs it, ``options`` are those
    of ``subprocess.run``.
    """
    command = [*under, sys.executable, "-W", warnings, *arguments]
    options = {"timeout": 50} | options
    result = subprocess.run(command, capture_output=True, text=True, **options)
    assert without_slowness(result.stderr) == ""
    assert result.returncode == 0
    return result.stdout


def unused_port(*hosts: str) -> int:
    """A port that nobody has at these IPv4 addresses ("127.0.0.1" if none is named).

    Below the range that systems give out by themselves: there any connection of another test run
    may take it meanwhile, or the one that should be refused is given it and meets itself.
    """
    for port in random.sample(range(20000, 32000), 100):
        with contextlib.ExitStack() as taken, contextlib.suppress(OSError):
            for host in hosts or ("127.0.0.1",):
                # Without SO_REUSEADDR, so that TIME_WAIT counts as well.
                taken.enter_context(socket.socket()).bind((host, port))
            return port
    raise RuntimeError(f"no port is free at {hosts}")


def open_descriptors() -> set[int]:
    path = "/proc/self/fd" if sys.platform == "linux" else "/dev/fd"
    found = set()
    for name in os.listdir(path):
        with contextlib.suppress(OSError):
            os.fstat(int(name))  # the descriptor of the listing itself is gone by now
            found.add(int(name))
    return found


def describe(descriptors: set[int]) -> dict[int, str]:
    """What they are, as far as the system tells."""
    if sys.platform != "linux":
        return dict.fromkeys(descriptors, "?")
    return {number: os.readlink(f"/proc/self/fd/{number}") for number in descriptors}


@pytest_asyncio.fixture
async def loop_errors() -> list[dict[str, Any]]:
    """What the loop's exception handler was called with. Asking for it makes such calls legal."""
    return asyncio.get_running_loop()._uvsock_test_errors  # type: ignore[attr-defined]


@pytest_asyncio.fixture(autouse=True)
async def leaves_nothing_behind(request: pytest.FixtureRequest) -> AsyncIterator[None]:
    """Fail the test for exception-handler calls, tasks, sockets or descriptors left behind."""
    loop = asyncio.get_running_loop()
    errors: list[dict[str, Any]] = []
    loop._uvsock_test_errors = errors  # type: ignore[attr-defined]
    loop.set_exception_handler(lambda _, context: errors.append(context))
    # libuv opens /dev/null when a loop first has a stream, to accept with when descriptors run out.
    if isinstance(loop, uvloop.Loop):
        state_of(loop)  # with a descriptor that stays as long as the loop
        server = await uvloop.Loop.create_server(loop, asyncio.Protocol, "127.0.0.1", 0)
        server.close()
        await server.wait_closed()
    before = open_descriptors()
    yield
    me = asyncio.current_task()
    closed = lambda: not live_sockets(loop) and not open_descriptors() - before  # noqa: E731
    with contextlib.suppress(TimeoutError):
        await until(closed, timeout=3)
    # A test that is no coroutine has no uvloop: it can leave descriptors only.
    listeners = list(state_of(loop).listeners) if isinstance(loop, uvloop.Loop) else []
    for listener in listeners:
        listener.stop()  # uvloop cannot close a loop that has an open one and warnings as errors
    sockets = list(live_sockets(loop))
    for left_open in sockets:
        left_open.terminate()
    tasks = {task for task in asyncio.all_tasks() if task is not me and not task.done()}
    gc.collect()  # a Future or Task that died with an unseen exception reports it now
    gc.freeze()  # what is left is pytest's: the next test need not look through it again
    await asyncio.sleep(0)
    assert not listeners, f"listeners not stopped: {listeners}"
    assert not sockets, f"sockets still open: {sockets}"
    with contextlib.suppress(TimeoutError):
        # A cancelled lookup goes on in libuv's thread, and has a descriptor for a moment.
        await until(lambda: not open_descriptors() - before, timeout=3)
    left = open_descriptors() - before
    assert not left, f"descriptors left open: {describe(left)}"
    assert not tasks, f"tasks still running: {tasks}"
    if "loop_errors" not in request.fixturenames:
        assert not errors, f"the loop's exception handler was called: {errors}"


class Recorder:
    """A handler table that writes down every call, in ``events``, ``calls`` and ``received``."""

    def __init__(self, **overrides: Any) -> None:
        self.events: list[str] = []
        self.calls: list[tuple[Any, ...]] = []
        self.received = bytearray()
        self.sockets: list[uvsock.Socket[Any]] = []
        self.overrides = overrides

    @property
    def socket(self) -> uvsock.Socket[Any]:
        return self.sockets[-1]

    @property
    def close_errors(self) -> list[BaseException | None]:
        return [call[2] for call in self.calls if call[0] == "close"]

    @property
    def errors(self) -> list[BaseException]:
        return [call[2] for call in self.calls if call[0] == "error"]

    def table(self, *names: str) -> dict[str, Callable[..., Any]]:
        """Handlers that record, for these events (all but ``timeout`` and ``drain`` by default)."""
        chosen = names or (
            "open",
            "data",
            "end",
            "close",
            "error",
            "handshake",
            "connect_error",
        )
        return {name: self._handler(name) for name in dict.fromkeys((*chosen, *self.overrides))}

    def _handler(self, name: str) -> Callable[..., Any]:
        override = self.overrides.get(name)

        def handler(socket: uvsock.Socket[Any], *arguments: Any) -> Any:
            self.events.append(name)
            self.calls.append((name, socket, *arguments))
            if name in ("open", "connect_error") and socket not in self.sockets:
                self.sockets.append(socket)
            if name == "data":
                self.received += arguments[0]
            return override(socket, *arguments) if override is not None else None

        if inspect.iscoroutinefunction(override):

            async def awaiting(socket: uvsock.Socket[Any], *arguments: Any) -> None:
                await handler(socket, *arguments)

            return awaiting
        return handler
