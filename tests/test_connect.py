"""`connect`: how a connection comes about, or why it does not."""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import errno
import os
import re
import socket as stdlib
import ssl
import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest

import uvsock
from conftest import SERVER_NAME, Authority, Recorder, Wire, open_descriptors, unused_port
from helpers import ignore, soon, stopped, until
from uvsock import ReadyState, _addresses, _dial

NOWHERE = ("192.0.2.1", 9)  # RFC 5737: routed nowhere


@asynccontextmanager
async def silent_server() -> AsyncIterator[int]:
    """Its kernel accepts a connection; nobody ever speaks on it."""
    with stdlib.create_server(("127.0.0.1", 0)) as sock:
        yield sock.getsockname()[1]


@asynccontextmanager
async def full_server() -> AsyncIterator[int]:
    """Its backlog is full, so that a further connection is never answered."""
    with stdlib.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        sock.listen(0)
        port = sock.getsockname()[1]
        fillers = [stdlib.socket() for _ in range(4)]
        try:
            for filler in fillers:
                filler.setblocking(False)
                filler.connect_ex(("127.0.0.1", port))
            await asyncio.sleep(0.01)
            yield port
        finally:
            for filler in fillers:
                filler.close()


def patch_addresses(monkeypatch: pytest.MonkeyPatch, *addresses: tuple[Any, Any]) -> None:
    """Let every name resolve to these addresses, whatever the port that was asked for."""

    async def getaddrinfo(*arguments: Any, **hints: Any) -> list[Any]:
        return [(family, stdlib.SOCK_STREAM, 6, "", address) for family, address in addresses]

    monkeypatch.setattr(asyncio.get_running_loop(), "getaddrinfo", getaddrinfo, raising=False)


async def cancelled(task: asyncio.Task[Any]) -> None:
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


async def test_it_resolves_after_open_has_returned(wire: Wire) -> None:
    order: list[str] = []

    async def opened(socket: uvsock.Socket[Any]) -> None:
        assert socket.ready_state is ReadyState.ESTABLISHED
        await asyncio.sleep(0.005)
        order.append("open")

    listener = await wire.listen({"data": ignore})
    socket = await wire.connect(listener, {"open": opened, "data": ignore}, data="mine")
    order.append("connected")
    assert order == ["open", "connected"]
    assert socket.data == "mine"
    assert socket.listener is None
    assert socket.encrypted == wire.encrypted
    if wire.kind != "unix":
        assert (socket.remote_address, socket.remote_port) == ("127.0.0.1", listener.port)
        assert socket.remote_family == socket.local_family == "IPv4"
        assert socket.local_port not in (None, listener.port)
    socket.end()
    await soon(socket.wait_closed())
    if wire.kind != "unix":
        assert socket.remote_port == listener.port  # after close too
        assert socket.get_extra_info("peername") == ("127.0.0.1", listener.port)
    assert socket.fileno() == -1
    await stopped(listener)


async def test_ipv6() -> None:
    async with await uvsock.listen({"data": ignore}, "::1", 0) as listener:
        socket = await uvsock.connect({"data": ignore}, "::1", listener.port)
        assert socket.remote_family == "IPv6"
        assert socket.remote_address == socket.local_address == "::1"
        socket.end()
        await soon(socket.wait_closed())


async def test_refused(loop_errors: list[Any]) -> None:
    port = unused_port()
    recorder = Recorder()
    with pytest.raises(ConnectionRefusedError, match=f"127.0.0.1 port {port}") as caught:
        await uvsock.connect(recorder.table(), "127.0.0.1", port, data="d")
    assert recorder.events == ["connect_error"]
    (_, socket, error) = recorder.calls[0]
    assert error is caught.value
    assert socket.data == "d"
    assert socket.ready_state is ReadyState.CLOSED
    assert socket.write(b"x") == socket.end(b"x") == -1
    for call in (socket.close, socket.terminate, socket.pause, socket.resume, socket.flush):
        call()
    assert socket.fileno() == -1
    await soon(socket.wait_closed())
    with pytest.raises(OSError):
        await socket.send_all(b"x")
    assert not loop_errors


async def test_unreachable(loop_errors: list[Any]) -> None:
    """The kernel says so at once: no TCP to the broadcast address."""
    recorder = Recorder()
    with pytest.raises(OSError, match="255.255.255.255 port 80") as caught:
        await uvsock.connect(recorder.table(), "255.255.255.255", 80)
    assert caught.value.errno in (errno.ENETUNREACH, errno.EHOSTUNREACH, errno.EACCES)
    assert recorder.events == ["connect_error"]
    assert recorder.calls[0][2] is caught.value
    assert not loop_errors


async def test_connect_error_is_called_once_and_before_the_exception(wire: Wire) -> None:
    order: list[str] = []
    listener = await wire.listen({"data": ignore})
    await stopped(listener)
    table = {"data": ignore, "connect_error": lambda socket, error: order.append("handler")}
    try:
        await wire.connect(listener, table)
    except OSError as error:
        order.append(type(error).__name__)
    await asyncio.sleep(0.01)
    expected = "FileNotFoundError" if wire.kind == "unix" else "ConnectionRefusedError"
    assert order == ["handler", expected]


async def test_without_connect_error_the_exception_is_all(loop_errors: list[Any]) -> None:
    with pytest.raises(ConnectionRefusedError):
        await uvsock.connect({"data": ignore}, "127.0.0.1", unused_port())
    assert not loop_errors


async def test_the_unix_address_may_be_bytes_or_a_path(unix_wire: Wire) -> None:
    path = unix_wire.directory / "s"
    async with await uvsock.listen({"data": ignore}, unix=path):
        for given in (path, str(path), os.fsencode(path)):
            socket = await uvsock.connect({"data": ignore}, unix=given)
            socket.end()
            await soon(socket.wait_closed())


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere a full backlog refuses")
async def test_a_unix_socket_with_a_full_backlog(unix_wire: Wire) -> None:
    """An error at once; with a timeout it is waited for. unix(7): nothing tells when to go on."""
    path = str(unix_wire.directory / "s")
    waiting = []
    with stdlib.socket(stdlib.AF_UNIX) as server:
        server.bind(path)
        server.listen(0)
        try:
            for _ in range(3):
                waiting.append(stdlib.socket(stdlib.AF_UNIX))
                waiting[-1].setblocking(False)
                waiting[-1].connect_ex(path)
            with pytest.raises(BlockingIOError, match=re.escape(repr(path))):
                await uvsock.connect({"data": ignore}, unix=path)
            recorder = Recorder()
            with pytest.raises(TimeoutError, match=r"0\.05"):
                await uvsock.connect(recorder.table(), unix=path, timeout=0.05)
            assert recorder.events == ["connect_error"]
            connecting = asyncio.ensure_future(
                uvsock.connect({"data": ignore}, unix=path, timeout=30)
            )
            await asyncio.sleep(0)
            assert not connecting.done()
            accepted, _ = server.accept()
            socket = await soon(connecting)
            accepted.close()
            socket.terminate()
            await soon(socket.wait_closed())
        finally:
            for sock in waiting:
                sock.close()


async def test_a_unix_socket_that_is_not_there(unix_wire: Wire) -> None:
    path = unix_wire.directory / "nobody"
    with pytest.raises(FileNotFoundError, match=re.escape(repr(str(path)))):
        await uvsock.connect({"data": ignore}, unix=path)
    stale = stdlib.socket(stdlib.AF_UNIX)
    stale.bind(str(path))
    stale.close()
    with pytest.raises(ConnectionRefusedError, match="nobody"):
        await uvsock.connect({"data": ignore}, unix=path)


async def test_a_name_that_does_not_resolve() -> None:
    recorder = Recorder()
    with pytest.raises(stdlib.gaierror, match=r"'no-such-name\.invalid'"):
        await uvsock.connect(recorder.table(), "no-such-name.invalid", 80)
    assert recorder.events == ["connect_error"]


@pytest.mark.parametrize("stage", ["tcp", "tls"])
async def test_timeout_covers_every_stage(stage: str, authority: Authority) -> None:
    recorder = Recorder()
    before = open_descriptors()
    server = full_server() if stage == "tcp" else silent_server()
    async with server as port:
        started = time.monotonic()
        with pytest.raises(TimeoutError, match=r"0\.05") as caught:
            await uvsock.connect(
                recorder.table(), "127.0.0.1", port, timeout=0.05, tls=authority.client_options
            )
        assert 0.04 < time.monotonic() - started < 2
    assert caught.value.errno == errno.ETIMEDOUT
    assert recorder.events[-1] == "connect_error"
    assert recorder.events.count("connect_error") == 1
    assert recorder.calls[-1][2] is caught.value
    assert "close" not in recorder.events
    await until(lambda: open_descriptors() == before)


def patch_lookup(monkeypatch: pytest.MonkeyPatch) -> asyncio.Future[Any]:
    """Let name lookups wait for this Future."""
    loop = asyncio.get_running_loop()
    answer: asyncio.Future[Any] = loop.create_future()

    async def getaddrinfo(*arguments: Any, **hints: Any) -> Any:
        return await asyncio.shield(answer)

    monkeypatch.setattr(loop, "getaddrinfo", getaddrinfo, raising=False)
    return answer


async def test_timeout_covers_the_lookup_of_the_name(monkeypatch: pytest.MonkeyPatch) -> None:
    patch_lookup(monkeypatch)
    recorder = Recorder()
    with pytest.raises(TimeoutError, match=r"0\.03") as caught:
        await uvsock.connect(recorder.table(), "slow.test", 80, timeout=0.03)
    assert caught.value.errno == errno.ETIMEDOUT
    assert recorder.events == ["connect_error"]
    assert recorder.calls[0][2] is caught.value


async def test_timeout_covers_the_stages_together(
    monkeypatch: pytest.MonkeyPatch, authority: Authority
) -> None:
    """Most of it goes to the lookup, so that less is left for the handshake."""
    answer = patch_lookup(monkeypatch)
    async with silent_server() as port:
        info = (stdlib.AF_INET, stdlib.SOCK_STREAM, 6, "", ("127.0.0.1", port))
        asyncio.get_running_loop().call_later(0.9, answer.set_result, [info])
        started = time.monotonic()
        with pytest.raises(TimeoutError):
            await uvsock.connect(
                {"data": ignore}, "slow.test", port, timeout=1, tls=authority.client_options
            )
        assert 0.99 < time.monotonic() - started < 1.8


async def test_timeout_does_not_cover_open(wire: Wire) -> None:
    async def opened(socket: uvsock.Socket[Any]) -> None:
        await asyncio.sleep(0.35)

    listener = await wire.listen({"data": ignore})
    socket = await wire.connect(listener, {"open": opened, "data": ignore}, timeout=0.3)
    assert socket.ready_state is ReadyState.ESTABLISHED
    await asyncio.sleep(0.01)
    socket.end()
    await soon(socket.wait_closed())
    await stopped(listener)


async def test_a_timeout_of_the_callers_is_the_callers(authority: Authority) -> None:
    """`asyncio.timeout` cancels: that is no failure of the connection."""
    recorder = Recorder()
    async with silent_server() as port:
        with pytest.raises(TimeoutError) as caught:
            async with asyncio.timeout(0.03):
                await uvsock.connect(
                    recorder.table(), "127.0.0.1", port, tls=authority.client_options, timeout=9
                )
    assert caught.value.errno is None
    assert recorder.events.count("connect_error") == 0


async def test_a_timeout_raised_by_the_kernel_is_told_as_it_is(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def getaddrinfo(*arguments: Any, **hints: Any) -> Any:
        raise TimeoutError(errno.ETIMEDOUT, "the kernel gave up")

    monkeypatch.setattr(asyncio.get_running_loop(), "getaddrinfo", getaddrinfo, raising=False)
    with pytest.raises(TimeoutError, match="the kernel gave up"):
        await uvsock.connect({"data": ignore}, "slow.test", 80, timeout=5)


async def test_cancelling_at_any_iteration_leaves_nothing(wire: Wire) -> None:
    """From the first one, until a connection has been made before it could be given up."""
    recorder = Recorder()
    listener = await wire.listen(recorder.table())
    before = open_descriptors()
    finished = 0
    for iterations in range(1000):
        client = Recorder()
        task = asyncio.create_task(wire.connect(listener, client.table()))
        for _ in range(iterations):
            await asyncio.sleep(0)
        if task.cancel():
            with pytest.raises(asyncio.CancelledError):
                await task
        else:
            finished += 1
            (await task).terminate()
            await (await task).wait_closed()
        await until(lambda: not listener.connections and open_descriptors() == before)
        assert "connect_error" not in client.events
        assert client.events.count("open") == client.events.count("close")
        if finished == 3:
            break
    else:
        pytest.fail("no connection was made")
    await stopped(listener)
    assert recorder.events.count("open") == recorder.events.count("close")


async def test_cancelling_an_async_open_cancels_the_handler_and_closes(wire: Wire) -> None:
    opening = asyncio.Event()
    order: list[str] = []

    async def opened(socket: uvsock.Socket[Any]) -> None:
        try:
            opening.set()
            await asyncio.sleep(30)
        finally:
            order.append("open is over")

    listener = await wire.listen({"data": ignore})
    table = {
        "open": opened,
        "data": ignore,
        "close": lambda socket, error: order.append(f"close {error}"),
    }
    task = asyncio.create_task(wire.connect(listener, table))
    await soon(opening.wait())
    await cancelled(task)
    await until(lambda: len(order) == 2)
    assert order == ["open is over", "close None"]
    await stopped(listener)


async def test_cancelling_with_several_attempts_in_flight(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async with full_server() as one, full_server() as two:
        before = open_descriptors()
        patch_addresses(
            monkeypatch,
            (stdlib.AF_INET, ("127.0.0.1", one)),
            (stdlib.AF_INET, ("127.0.0.1", two)),
        )
        task = asyncio.create_task(
            uvsock.connect({"data": ignore}, "several.test", 80, happy_eyeballs_delay=0)
        )
        await until(lambda: len(open_descriptors() - before) == 2)
        await cancelled(task)
        assert open_descriptors() == before


async def test_cancelling_while_the_name_is_looked_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also in the iteration in which the answer has come."""
    for answered in (False, True):
        answer = patch_lookup(monkeypatch)
        recorder = Recorder()
        before = open_descriptors()
        task = asyncio.create_task(uvsock.connect(recorder.table(), "slow.test", 80))
        for _ in range(3):
            await asyncio.sleep(0)
        if answered:
            info = (stdlib.AF_INET, stdlib.SOCK_STREAM, 6, "", ("127.0.0.1", unused_port()))
            answer.set_result([info])
        await cancelled(task)
        assert recorder.events == []
        assert open_descriptors() == before


async def test_cancelling_while_an_async_connect_error_runs() -> None:
    order: list[str] = []

    async def told(socket: uvsock.Socket[Any], error: Exception) -> None:
        order.append("told")
        try:
            await asyncio.sleep(30)
        finally:
            order.append("over")

    table = {"data": ignore, "connect_error": told}
    task = asyncio.create_task(uvsock.connect(table, "127.0.0.1", unused_port()))
    await until(lambda: order)
    await cancelled(task)
    assert order == ["told", "over"]


async def test_a_connect_that_is_never_awaited_does_nothing() -> None:
    recorder = Recorder()
    async with await uvsock.listen(recorder.table(), "127.0.0.1", 0) as listener:
        uvsock.connect({"data": ignore}, "127.0.0.1", listener.port).close()
        await asyncio.sleep(0.01)
    assert recorder.events == []


variable: contextvars.ContextVar[str] = contextvars.ContextVar("variable", default="unset")


@pytest.mark.parametrize("kind", ["sync", "async"])
async def test_connect_error_runs_in_the_context_of_the_call(kind: str) -> None:
    seen: list[str] = []

    def told(socket: uvsock.Socket[Any], error: Exception) -> None:
        seen.append(variable.get())

    async def told_later(socket: uvsock.Socket[Any], error: Exception) -> None:
        seen.append(variable.get())
        await asyncio.sleep(0)
        seen.append(variable.get())

    variable.set("called")
    connecting = uvsock.connect(
        {"data": ignore, "connect_error": told if kind == "sync" else told_later},
        "127.0.0.1",
        unused_port(),
    )
    variable.set("awaited")
    with pytest.raises(ConnectionRefusedError):
        await connecting
    assert set(seen) == {"called"}


@pytest.mark.parametrize("stage", ["first step", "dns", "tcp", "tls", "open"])
async def test_cancelling_leaves_nothing(stage: str, authority: Authority) -> None:
    """The teardown counts descriptors, tasks, and calls of the loop's exception handler."""
    recorder = Recorder()
    listener = await uvsock.listen({"data": ignore}, "127.0.0.1", 0)
    opening = asyncio.Event()

    async def opened(socket: uvsock.Socket[Any]) -> None:
        opening.set()
        await asyncio.sleep(30)

    options: dict[str, Any] = {}
    host, port = "127.0.0.1", listener.port
    if stage == "dns":
        host = "localhost"
    if stage == "open":
        recorder.overrides["open"] = opened
    if stage == "tls":
        options["tls"] = authority.client_options
    server = full_server() if stage == "tcp" else silent_server()
    async with server as other:
        if stage in ("tcp", "tls"):
            port = other
        task = asyncio.create_task(uvsock.connect(recorder.table(), host, port, **options))
        if stage == "open":
            await soon(opening.wait())
        elif stage != "first step":
            await asyncio.sleep(0 if stage == "dns" else 0.02)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
    assert "connect_error" not in recorder.events
    for socket in recorder.sockets:
        await soon(socket.wait_closed())
    await stopped(listener)


async def test_connect_error_may_be_async_and_replace_the_error() -> None:
    port = unused_port()
    order: list[str] = []

    async def told(socket: uvsock.Socket[Any], error: Exception) -> None:
        await asyncio.sleep(0.002)
        order.append("told")

    with pytest.raises(ConnectionRefusedError):
        await uvsock.connect({"data": ignore, "connect_error": told}, "127.0.0.1", port)
    assert order == ["told"]

    def replaced(socket: uvsock.Socket[Any], error: Exception) -> None:
        raise LookupError("instead") from error

    async def replaced_later(socket: uvsock.Socket[Any], error: Exception) -> None:
        raise LookupError("instead") from error

    for handler in (replaced, replaced_later):
        with pytest.raises(LookupError, match="instead") as caught:
            await uvsock.connect({"data": ignore, "connect_error": handler}, "127.0.0.1", port)
        assert isinstance(caught.value.__cause__, ConnectionRefusedError)


async def test_arguments_are_checked_before_anything_is_dialled() -> None:
    recorder = Recorder()
    for arguments, options, error, name in (
        (("127.0.0.1", 0), {}, ValueError, "port"),
        (("127.0.0.1", 70000), {}, ValueError, "port"),
        (("127.0.0.1", "80"), {}, TypeError, "port"),
        (("127.0.0.1", True), {}, TypeError, "port"),
        (("", 80), {}, ValueError, "hostname"),
        (("a\0b", 80), {}, ValueError, "hostname"),
        ((), {}, TypeError, "hostname"),
        (("a", 80), {"unix": "/x"}, TypeError, "unix"),
        ((), {"unix": "a\0b"}, ValueError, "unix"),
        ((), {"unix": "/" + "x" * 200}, ValueError, "unix"),
        (("a", 80), {"timeout": -1}, ValueError, "timeout"),
        (("a", 80), {"timeout": "1"}, TypeError, "timeout"),
        (("a", 80), {"happy_eyeballs_delay": -1}, ValueError, "happy_eyeballs_delay"),
        (("a", 80), {"local_address": "127.0.0.1"}, TypeError, "local_address"),
        ((), {"unix": "/x", "local_address": ("127.0.0.1", 0)}, TypeError, "local_address"),
        (("a", 80), {"binary_type": "str"}, ValueError, "binary_type"),
        (("a", 80), {"cork": 1}, TypeError, "cork"),
        (("a", 80), {"tls": {"nonsense": 1}}, TypeError, "tls"),
        (("a", 80), {"tls": {"ca": "no PEM"}}, ValueError, "tls.ca"),
        ((), {"unix": "/x", "tls": True}, ValueError, "server_hostname"),
    ):
        with pytest.raises(error, match=rf"^{re.escape(name)}\b"):
            uvsock.connect(recorder.table(), *arguments, **options)
    with pytest.raises(TypeError, match="^handlers"):
        uvsock.connect({"dta": ignore}, "a", 80)  # type: ignore[arg-type]
    assert not recorder.events


# ── Several addresses (RFC 8305) ───────────────────────────────────────────────────────────────


async def test_the_next_address_is_tried_at_once_when_one_fails(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async with await uvsock.listen({"data": ignore}, "127.0.0.1", 0) as listener:
        patch_addresses(
            monkeypatch,
            (stdlib.AF_INET6, ("::1", unused_port(), 0, 0)),
            (stdlib.AF_INET, ("127.0.0.1", unused_port())),
            (stdlib.AF_INET, ("127.0.0.1", listener.port)),
        )
        socket = await soon(
            uvsock.connect({"data": ignore}, "several.test", 80, happy_eyeballs_delay=30)
        )
        assert socket.remote_port == listener.port
        socket.end()
        await soon(socket.wait_closed())


async def test_a_silent_address_does_not_hold_up_the_next(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async with (
        await uvsock.listen({"data": ignore}, "127.0.0.1", 0) as listener,
        full_server() as silent,
    ):
        before = open_descriptors()
        patch_addresses(
            monkeypatch,
            (stdlib.AF_INET, ("127.0.0.1", silent)),
            (stdlib.AF_INET, ("127.0.0.1", listener.port)),
        )
        socket = await uvsock.connect(
            {"data": ignore}, "several.test", 80, happy_eyeballs_delay=0.02
        )
        assert socket.remote_port == listener.port
        # The other attempt is given up: one descriptor at each end of this connection is left.
        await until(lambda: len(open_descriptors() - before) == 2)
        socket.end()
        await soon(socket.wait_closed())
        with pytest.raises(TimeoutError):
            await uvsock.connect(
                {"data": ignore}, "several.test", 80, happy_eyeballs_delay=None, timeout=0.05
            )


async def test_when_all_fail_every_address_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    ports = [unused_port() for _ in range(2)]
    patch_addresses(monkeypatch, *((stdlib.AF_INET, ("127.0.0.1", port)) for port in ports))
    with pytest.raises(ConnectionRefusedError) as caught:
        await uvsock.connect({"data": ignore}, "several.test", 80)
    assert all(str(port) in str(caught.value) for port in ports)


async def test_one_after_another_in_the_resolvers_order_with_the_families_taking_turns(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    six = [(stdlib.AF_INET6, ("::1", unused_port(), 0, 0)) for _ in range(2)]
    four = [(stdlib.AF_INET, ("127.0.0.1", unused_port())) for _ in range(3)]
    dialled: list[Any] = []
    connected = _dial.connected

    def watched(sock: stdlib.socket, address: tuple[Any, ...]) -> Any:
        dialled.append((sock.family, address))
        return connected(sock, address)

    monkeypatch.setattr(_dial, "connected", watched)
    patch_addresses(monkeypatch, *six, *four)
    with pytest.raises(ConnectionRefusedError):
        await uvsock.connect({"data": ignore}, "several.test", 80, happy_eyeballs_delay=None)
    assert dialled == [six[0], four[0], six[1], four[1], four[2]]


async def test_an_answer_says_more_than_a_missing_route(monkeypatch: pytest.MonkeyPatch) -> None:
    patch_addresses(
        monkeypatch,
        (stdlib.AF_INET, ("255.255.255.255", 80)),
        (stdlib.AF_INET, ("127.0.0.1", unused_port())),
    )
    recorder = Recorder()
    with pytest.raises(ConnectionRefusedError, match="255.255.255.255 port 80.*127.0.0.1"):
        await uvsock.connect(recorder.table(), "several.test", 80)
    assert recorder.events == ["connect_error"]


async def test_of_all_attempts_at_once_one_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several may be made in one iteration: what is not kept is closed."""
    recorder = Recorder()
    listeners = [await uvsock.listen(recorder.table(), "127.0.0.1", 0) for _ in range(5)]
    patch_addresses(
        monkeypatch,
        *((stdlib.AF_INET, ("127.0.0.1", listener.port)) for listener in listeners),
    )
    before = open_descriptors()
    client = Recorder()
    for _ in range(10):
        socket = await uvsock.connect(client.table(), "several.test", 80, happy_eyeballs_delay=0)
        await until(lambda: sum(listener.connections for listener in listeners) == 1)
        socket.end()
        await soon(socket.wait_closed())
        await until(lambda: open_descriptors() == before)
    assert client.events == ["open", "end", "close"] * 10
    for listener in listeners:
        await stopped(listener)


async def test_local_address() -> None:
    recorder = Recorder()
    async with await uvsock.listen(recorder.table(), "127.0.0.1", 0) as listener:
        port = unused_port()
        socket = await uvsock.connect(
            {"data": ignore}, "127.0.0.1", listener.port, local_address=("127.0.0.2", port)
        )
        assert (socket.local_address, socket.local_port) == ("127.0.0.2", port)
        await until(lambda: recorder.sockets)
        assert recorder.socket.remote_address == "127.0.0.2"
        socket.end()
        await soon(socket.wait_closed())
        with pytest.raises(OSError, match="family"):
            await uvsock.connect(
                {"data": ignore}, "127.0.0.1", listener.port, local_address=("::1", 0)
            )


async def test_a_local_address_in_use_or_unknown_is_named() -> None:
    recorder = Recorder()
    async with await uvsock.listen({"data": ignore}, "127.0.0.1", 0) as listener:
        before = open_descriptors()
        with pytest.raises(OSError, match=f"from 127.0.0.1 port {listener.port}") as caught:
            await uvsock.connect(
                recorder.table(),
                "127.0.0.1",
                listener.port,
                local_address=("127.0.0.1", listener.port),
            )
        assert caught.value.errno == errno.EADDRINUSE
        with pytest.raises(stdlib.gaierror, match=r"'no-such-name\.invalid'"):
            await uvsock.connect(
                recorder.table(),
                "127.0.0.1",
                listener.port,
                local_address=("no-such-name.invalid", 0),
            )
        assert recorder.events == ["connect_error"] * 2
        assert open_descriptors() == before
        for bad, error in (
            (("127.0.0.1",), TypeError),
            (("127.0.0.1", "1"), TypeError),
            (("127.0.0.1", 70000), ValueError),
            ((b"127.0.0.1", 0), TypeError),
            (["127.0.0.1", 0], TypeError),
        ):
            with pytest.raises(error, match="^local_address: "):
                uvsock.connect({"data": ignore}, "127.0.0.1", listener.port, local_address=bad)


async def test_a_local_address_may_be_a_name_and_its_port_the_systems() -> None:
    async with await uvsock.listen({"data": ignore}, "127.0.0.1", 0) as listener:
        socket = await uvsock.connect(
            {"data": ignore}, "127.0.0.1", listener.port, local_address=("localhost", 0)
        )
        assert socket.local_address == "127.0.0.1"
        assert socket.local_port
        socket.end()
        await soon(socket.wait_closed())


# ── Options ────────────────────────────────────────────────────────────────────────────────────


async def test_the_options_of_a_socket_apply_to_a_client_too(wire: Wire) -> None:
    got: list[Any] = []
    table = {
        "data": lambda socket, data: got.append((type(data), bytes(data))),
        "timeout": lambda socket: socket.end(),
    }
    listener = await wire.listen({"open": lambda socket: socket.write(b"hello"), "data": ignore})
    socket = await wire.connect(
        listener,
        table,
        binary_type="memoryview",
        high_water_mark=1234,
        idle_timeout=0.03,
        linger_timeout=5,
        no_delay=False,
        keep_alive=11,
        cork=False,
        allow_half_open=True,
    )
    await until(lambda: got)
    assert got == [(memoryview, b"hello")]
    assert socket.high_water_mark == 1234
    with stdlib.socket(fileno=os.dup(socket.fileno())) as copy:
        if wire.kind != "unix":
            assert copy.getsockopt(stdlib.SOL_SOCKET, stdlib.SO_KEEPALIVE) == 1
            assert copy.getsockopt(stdlib.IPPROTO_TCP, stdlib.TCP_NODELAY) == 0
    assert socket.write(b"12345") == 5
    assert socket.writable_length == 0  # not corked
    await soon(socket.wait_closed())
    assert socket.bytes_written == 5
    await stopped(listener)


# ── Sockets of ones own, and many ──────────────────────────────────────────────────────────────


@pytest.mark.parametrize("family", [stdlib.AF_INET, stdlib.AF_UNIX])
async def test_a_connected_socket_of_ones_own(family: Any) -> None:
    mine, other = stdlib.socketpair() if family == stdlib.AF_UNIX else tcp_pair()
    recorder = Recorder()
    socket = await uvsock.connect(recorder.table(), sock=mine)
    assert mine.fileno() == -1  # it is the socket's from here on
    other.sendall(b"hello")
    await until(lambda: recorder.received == b"hello")
    socket.end(b"bye")
    assert other.recv(10) == b"bye"
    other.close()
    await soon(socket.wait_closed())
    with pytest.raises(ValueError, match="^sock: "):
        uvsock.connect({"data": ignore}, sock=mine)
    with stdlib.socket() as unconnected, pytest.raises(ValueError, match="^sock: "):
        uvsock.connect({"data": ignore}, sock=unconnected)
    with (
        stdlib.socket(stdlib.AF_INET, stdlib.SOCK_DGRAM) as datagram,
        pytest.raises(ValueError, match="^sock: "),
    ):
        uvsock.connect({"data": ignore}, sock=datagram)


@pytest.mark.parametrize("how", ["failed", "timeout", "cancelled"])
async def test_a_socket_of_ones_own_is_closed_when_its_handshake_comes_to_nothing(
    how: str, authority: Authority
) -> None:
    mine, other = tcp_pair()
    other.settimeout(5)
    recorder = Recorder()
    task = asyncio.create_task(
        uvsock.connect(
            recorder.table(),
            sock=mine,
            tls=authority.client_options,
            timeout=0.05 if how == "timeout" else None,
        )
    )
    try:
        hello = await asyncio.to_thread(other.recv, 4096)
        assert hello[:1] == b"\x16"
        if how == "failed":
            other.sendall(b"this is no TLS\r\n")
        if how == "cancelled":
            await cancelled(task)
        else:
            with pytest.raises(ssl.SSLError if how == "failed" else TimeoutError):
                await task
            assert recorder.events[-1] == "connect_error"
            assert recorder.events.count("connect_error") == 1
        assert mine.fileno() == -1

        def rest() -> bool:
            with contextlib.suppress(ConnectionResetError):
                while other.recv(4096):
                    pass
            return True

        assert await soon(asyncio.to_thread(rest))
    finally:
        other.close()


@pytest.mark.parametrize("given", ["server_hostname", "tls", "both"])
async def test_server_hostname_is_sent_and_verified(authority: Authority, given: str) -> None:
    """It wins over the one among the TLS options; both win over the host name."""
    recorder = Recorder()
    tls: dict[str, Any] = {"ca": authority.ca_pem}
    options: dict[str, Any] = {}
    if given != "tls":
        options["server_hostname"] = SERVER_NAME
    if given != "server_hostname":
        tls["server_name"] = "wrong.test" if given == "both" else SERVER_NAME
    async with await uvsock.listen(
        recorder.table(), "127.0.0.1", 0, tls=authority.server_options
    ) as listener:
        socket = await uvsock.connect(
            {"data": ignore}, "127.0.0.1", listener.port, tls=tls, **options
        )
        assert socket.authorized
        await until(lambda: recorder.sockets)
        assert recorder.socket.server_name == SERVER_NAME
        socket.end()
        await soon(socket.wait_closed())
        failing = Recorder()
        with pytest.raises(ssl.SSLCertVerificationError, match="wrong.test") as caught:
            await uvsock.connect(
                failing.table(), "127.0.0.1", listener.port, tls=tls, server_hostname="wrong.test"
            )
        assert failing.events == ["handshake", "connect_error"]
        assert failing.calls[-1][2] is caught.value


async def test_server_hostname_for_a_unix_socket(unix_wire: Wire, authority: Authority) -> None:
    path = unix_wire.directory / "s"
    async with await uvsock.listen(
        {"data": ignore}, unix=path, tls=authority.server_options
    ) as listener:
        socket = await uvsock.connect(
            {"data": ignore},
            unix=listener.unix,
            tls={"ca": authority.ca_pem},
            server_hostname=SERVER_NAME,
        )
        assert socket.authorized
        socket.end()
        await soon(socket.wait_closed())


def tcp_pair() -> tuple[stdlib.socket, stdlib.socket]:
    with stdlib.create_server(("127.0.0.1", 0)) as server:
        client = stdlib.create_connection(server.getsockname())
        return client, server.accept()[0]


@pytest.mark.parametrize("action", ["terminate", "close", "end"])
async def test_closing_in_open_never_closes_a_descriptor_twice(wire: Wire, action: str) -> None:
    """uvloop forgets that it has closed a socket that was given to it, if that happens at once."""
    listener = await wire.listen({"data": ignore})
    victims: list[int] = []
    for _ in range(20):
        socket = await wire.connect(
            listener, {"open": lambda socket: getattr(socket, action)(), "data": ignore}
        )
        await soon(socket.wait_closed())
        # Takes the number that was closed: a second close would be this one's.
        victims.append(os.open(os.devnull, os.O_RDONLY))
    await asyncio.sleep(0.01)
    for victim in victims:
        os.fstat(victim)
        os.close(victim)
    await stopped(listener)


@pytest.mark.parametrize("action", ["terminate", "close", "end"])
async def test_closing_in_an_async_open_resolves_connect(wire: Wire, action: str) -> None:
    order: list[str] = []

    async def opened(socket: uvsock.Socket[Any]) -> None:
        getattr(socket, action)()
        await asyncio.sleep(0.01)
        order.append("open")

    listener = await wire.listen({"data": ignore})
    table = {"open": opened, "data": ignore, "close": lambda socket, error: order.append("close")}
    socket = await soon(wire.connect(listener, table))
    assert order[0] == "open"
    await soon(socket.wait_closed())
    assert order == ["open", "close"]
    await stopped(listener)


@pytest.mark.parametrize("action", ["terminate", "close"])
async def test_closing_in_handshake_fails_connect(tls_wire: Wire, action: str) -> None:
    """The handshake went well, but a closed socket never opens."""
    recorder = Recorder(handshake=lambda socket, *result: getattr(socket, action)())
    listener = await tls_wire.listen({"data": ignore})
    with pytest.raises(OSError) as caught:
        await soon(tls_wire.connect(listener, recorder.table()))
    assert recorder.events == ["handshake", "connect_error"]
    assert recorder.calls[-1][2] is caught.value
    await stopped(listener)


async def test_ending_the_own_side_in_handshake_opens_all_the_same(tls_wire: Wire) -> None:
    server = Recorder(end=lambda socket: socket.write(b"answer"))
    client = Recorder(handshake=lambda socket, *result: socket.end(b"question"))
    listener = await tls_wire.listen(server.table())
    socket = await soon(tls_wire.connect(listener, client.table()))
    await soon(socket.wait_closed())
    assert client.events == ["handshake", "open", "data", "end", "close"]
    assert bytes(client.received) == b"answer"
    assert bytes(server.received) == b"question"
    await stopped(listener)


async def test_two_hundred_at_once(wire: Wire) -> None:
    recorder = Recorder(data=lambda socket, data: socket.end(data))
    listener = await wire.listen(recorder.table())

    async def one(number: int) -> bytes:
        mine = Recorder()
        socket = await wire.connect(listener, mine.table())
        socket.write(b"%d" % number)
        await socket.wait_closed()
        return bytes(mine.received)

    results = await soon(asyncio.gather(*(one(number) for number in range(200))), 20)
    assert results == [b"%d" % number for number in range(200)]
    assert listener.stats.accepted == 200
    await stopped(listener)


async def test_tls_true_verifies_against_the_system(authority: Authority) -> None:
    """The test's own authority is not among the system's."""
    async with await uvsock.listen(
        {"data": ignore}, "127.0.0.1", 0, tls=authority.server_options
    ) as listener:
        with pytest.raises(ssl.SSLCertVerificationError):
            await uvsock.connect({"data": ignore}, "localhost", listener.port, tls=True)


async def test_it_needs_a_loop_of_uvloops() -> None:
    def run() -> None:
        asyncio.run(uvsock.connect({"data": ignore}, *NOWHERE))

    with pytest.raises(RuntimeError, match="uvloop"):
        await asyncio.to_thread(run)


def scoped_address() -> str | None:
    """A link-local address of this machine's, with its interface, if it has one."""
    with contextlib.suppress(OSError), open("/proc/net/if_inet6") as file:
        for line in file:
            digits, *_, interface = line.split()
            if digits.startswith("fe80"):
                groups = [digits[at : at + 4] for at in range(0, 32, 4)]
                return f"{':'.join(groups)}%{interface}"
    return None


@pytest.mark.skipif(scoped_address() is None, reason="this machine has no link-local address")
async def test_an_address_with_a_scope() -> None:
    address = scoped_address()
    assert address is not None
    async with await uvsock.listen({"data": ignore}, address, 0) as listener:
        socket = await uvsock.connect({"data": ignore}, address, listener.port)
        interface = address.partition("%")[2]
        assert socket.remote_address == socket.local_address
        assert str(socket.remote_address).endswith(f"%{interface}")
        socket.end()
        await soon(socket.wait_closed())


async def test_an_address_is_dialled_without_a_thread() -> None:
    async with await uvsock.listen({"data": ignore}, "127.0.0.1", 0) as listener:
        socket = await uvsock.connect({"data": ignore}, "127.0.0.1", listener.port)
        loop: Any = asyncio.get_running_loop()
        resolved: list[Any] = []

        class Watched:
            """The loop, where it is asked for names."""

            def __getattr__(self, name: str) -> Any:
                if name in ("getaddrinfo", "sock_connect"):
                    resolved.append(name)
                return getattr(loop, name)

        (info,) = await _addresses.resolve(Watched(), ("127.0.0.1", listener.port))  # type: ignore[arg-type]
        assert info[4] == ("127.0.0.1", listener.port)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(asyncio, "get_running_loop", Watched)
            await _addresses.resolve(Watched(), ("::1", 5))  # type: ignore[arg-type]
            sock, _ = await _dial.dial([info], None, None, _dial.Dialler())
            assert sock is not None
            sock.close()
        assert not resolved
        socket.end()
        await soon(socket.wait_closed())


@pytest.mark.parametrize("steps", [1, 2, 3, 4])
async def test_a_connect_cancelled_twice(steps: int) -> None:
    async with await uvsock.listen({"data": ignore}, "127.0.0.1", 0) as listener:
        task = asyncio.ensure_future(uvsock.connect({"data": ignore}, "127.0.0.1", listener.port))
        for _ in range(steps):
            await asyncio.sleep(0)
        task.cancel()
        await asyncio.sleep(0)
        await cancelled(task)
        await asyncio.sleep(0.02)
        await until(lambda: not listener.connections)


async def test_a_local_address_of_another_family_is_named() -> None:
    with pytest.raises(OSError, match="local_address is of another family"):
        await uvsock.connect({"data": ignore}, "127.0.0.1", unused_port(), local_address=("::1", 0))
