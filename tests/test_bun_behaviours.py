"""What Bun's sockets were seen to do, one test per behaviour, as docs/guides/from_bun.md maps it.

A docstring begins with the numbers of the behaviours that its test is about; those of TLS are in
test_bun_behaviours_tls. The last test compares the numbers with the page.
"""

from __future__ import annotations

import array
import asyncio
import contextlib
import errno
import gc
import hashlib
import os
import re
import resource
import shutil
import socket as stdlib
import stat
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import uvsock
from conftest import Recorder, Wire, open_descriptors, run_python, unused_port
from helpers import echo, ignore, soon, stopped, until
from uvsock import BufferSink, ReadyState

LINUX = pytest.mark.skipif(sys.platform != "linux", reason="Linux only")
RESET = b"\1\0\0\0\0\0\0\0"  # SO_LINGER: on, for no time
MIB = 1 << 20


IGNORE: dict[str, Any] = {"data": ignore}
ECHO: dict[str, Any] = {"data": echo}


def fill(socket: uvsock.Socket[Any], size: int = 60_000) -> int:
    """Write until a write comes back short; the number of bytes accepted."""
    total = 0
    while (taken := socket.write(b"x" * size)) == size:
        total += taken
    return total + max(taken, 0)


async def linked(
    wire: Wire, server: Recorder, client: Recorder, **options: Any
) -> tuple[uvsock.Listener, uvsock.Socket[Any]]:
    """A listener and its one client; both sides have opened."""
    listener = await wire.listen(server.table(), **options)
    socket = await wire.connect(listener, client.table())
    await until(lambda: server.sockets)
    return listener, socket


async def dialled(wire: Wire, recorder: Recorder, **options: Any) -> Any:
    """A listener and a blocking client of the standard library's."""
    listener = await wire.listen(recorder.table(), **options)
    peer = await asyncio.to_thread(wire.dial, listener)
    await until(lambda: recorder.sockets)
    return listener, peer


def reset(peer: stdlib.socket) -> None:
    """Close with an RST: over loopback it has arrived when this returns."""
    peer.setsockopt(stdlib.SOL_SOCKET, stdlib.SO_LINGER, RESET)
    peer.close()


def plain(events: list[str]) -> list[str]:
    """The events that TCP has too."""
    return [event for event in events if event != "handshake"]


def strace() -> str:
    """The path of strace; without it the test is skipped, or fails where CI says so."""
    found = shutil.which("strace")
    if found is None:
        if os.environ.get("CI"):
            pytest.fail("strace is not installed")
        pytest.skip("strace is not installed")
    probe = subprocess.run([found, "-o", os.devnull, "true"], capture_output=True, text=True)
    if probe.returncode and not os.environ.get("CI"):
        pytest.skip(f"strace may not trace here: {probe.stderr}")
    return found


# ── Arguments ──────────────────────────────────────────────────────────────────────────────────

CALLS = pytest.mark.parametrize("call", [uvsock.listen, uvsock.connect], ids=["listen", "connect"])


@CALLS
def test_a_table_is_an_object(call: Callable[..., Any]) -> None:
    """B1: nothing, a number, text and a list are none; a function with the attributes is."""
    for wrong in (None, 1, "text", [], ()):
        with pytest.raises(TypeError, match="^handlers: "):
            call(wrong, "127.0.0.1", 8080)
    with pytest.raises(TypeError, match="handlers"):
        call()

    def function() -> None: ...

    function.data = ignore  # type: ignore[attr-defined]
    call(function, "127.0.0.1", 8080).close()


@CALLS
def test_wrong_arguments_raise_at_the_call(call: Callable[..., Any]) -> None:
    """B2: before anything is awaited; only the network's failures wait for that."""

    class Sly:
        @property
        def data(self) -> None:
            raise LookupError("no such handler")

    for error, arguments, options in (
        (TypeError, ({}, "127.0.0.1", 8080), {}),
        (LookupError, (Sly(), "127.0.0.1", 8080), {}),
        (ValueError, (IGNORE, "127.0.0.1", 65536), {}),
        (ValueError, (IGNORE, "a\0b", 8080), {}),
        (TypeError, (IGNORE, "127.0.0.1", 8080), {"tls": 1}),
        (ValueError, (IGNORE, "127.0.0.1", 8080), {"tls": {"key": "junk", "cert": "junk"}}),
        (ValueError, (IGNORE, "127.0.0.1", 8080), {"tls": {"ca": "junk"}}),
    ):
        with pytest.raises(error):
            call(*arguments, **options)


async def test_the_networks_failures_wait_for_await() -> None:
    """B2: a refused connection is none of the call's errors."""
    pending = uvsock.connect(IGNORE, "127.0.0.1", unused_port())
    with pytest.raises(ConnectionRefusedError):
        await pending


async def test_data_or_drain_must_be_there(tcp_wire: Wire) -> None:
    """B3: for `listen`, `connect`, `reload` and `upgrade_tls`."""
    server = Recorder()
    listener, client = await linked(tcp_wire, server, Recorder())
    wrong = {"open": ignore, "close": ignore}
    tls = tcp_wire.authority.client_options
    for call in (
        lambda: uvsock.listen(wrong, "127.0.0.1", 0),
        lambda: uvsock.connect(wrong, "127.0.0.1", 8080),
        lambda: listener.reload(wrong),
        lambda: client.reload(wrong),
        lambda: client.upgrade_tls(tls, handlers=wrong),
    ):
        with pytest.raises(TypeError, match="'data' or 'drain'"):
            call()
    assert not client.encrypted
    await stopped(listener)


async def test_without_data_what_comes_in_is_dropped(wire: Wire) -> None:
    """B4: `drain` alone makes a table, and `end` and `close` come all the same."""
    server = Recorder()
    listener = await wire.listen(server.table("open", "drain", "end", "close"))
    client = await wire.connect(listener, IGNORE)
    assert client.end(b"x" * 300_000) == 300_000
    await until(lambda: server.events[-1:] == ["close"])
    assert server.events == ["open", "end", "close"]
    assert server.socket.bytes_read == 300_000
    await stopped(listener)


EVENTS = (
    "open", "data", "drain", "close", "error", "end", "timeout", "handshake", "connect_error",
)  # fmt: skip


@CALLS
@pytest.mark.parametrize("name", EVENTS)
def test_a_handler_that_is_not_callable_is_named(call: Callable[..., Any], name: str) -> None:
    """B5: as it was written; `None` is an absent one, and an unknown key is an error too."""
    for wrong in (1, "text", [ignore], False):
        with pytest.raises(TypeError, match=f"'{name}'"):
            call({"data": ignore, "drain": ignore, name: wrong}, "127.0.0.1", 8080)
    call({"data": ignore, "drain": ignore, name: None}, "127.0.0.1", 8080).close()
    with pytest.raises(TypeError, match=f"'on_{name}'"):
        call({"data": ignore, f"on_{name}": ignore}, "127.0.0.1", 8080)


async def test_a_failed_check_disturbs_nothing_that_runs(wire: Wire) -> None:
    """B6: the callables of a refused table go on serving live sockets."""
    server, client = Recorder(data=echo), Recorder()
    table = server.table()
    listener = await wire.listen(table)
    socket = await wire.connect(listener, client.table())
    for _ in range(4):
        for call in (uvsock.listen, uvsock.connect):
            with pytest.raises(TypeError, match="'end'"):
                call({**table, "end": 1}, "127.0.0.1", 8080)
    for _ in range(20):
        gc.collect()
    socket.write(b"still here")
    await until(lambda: client.received == b"still here")
    await stopped(listener)


async def test_the_table_is_read_once(wire: Wire) -> None:
    """B7: from instances and getters too; what changes later has no effect."""
    reads: list[str] = []
    heard: list[bytes] = []

    class Instance:
        @property
        def data(self) -> Any:
            reads.append("data")
            return lambda socket, data: heard.append(data)

    mapping: dict[str, Any] = {"data": echo}
    server = await wire.listen(mapping)
    client = await wire.connect(server, Instance())
    mapping["data"] = ignore
    for count in range(1, 4):
        client.write(b"x")
        await until(lambda count=count: len(heard) == count)
    assert reads == ["data"]
    await stopped(server)


@CALLS
def test_binary_type_is_an_option(call: Callable[..., Any]) -> None:
    """B8: one of three names, and no key of the table."""
    for wrong in ("buffer", "uint8array", ""):
        with pytest.raises(ValueError, match="^binary_type: .*'bytes'.*'bytearray'.*'memoryview'"):
            call(IGNORE, "127.0.0.1", 8080, binary_type=wrong)
    for wrong in (None, 1, bytes):
        with pytest.raises(TypeError, match="^binary_type: "):
            call(IGNORE, "127.0.0.1", 8080, binary_type=wrong)
    with pytest.raises(TypeError, match="'binary_type'"):
        call({"data": ignore, "binary_type": "bytes"}, "127.0.0.1", 8080)


@pytest.mark.parametrize("flag", ["exclusive", "reuse_port", "ipv6_only", "allow_half_open"])
def test_flags_are_booleans(flag: str) -> None:
    """B9: 1, 0, text and `None` are refused."""
    for wrong in (1, 0, "x", None):
        with pytest.raises(TypeError, match=f"^{flag}: must be True or False"):
            uvsock.listen(IGNORE, "127.0.0.1", 0, **{flag: wrong})
    uvsock.listen(IGNORE, "127.0.0.1", 0, **{flag: True}).close()


@CALLS
def test_a_port_is_an_int(call: Callable[..., Any]) -> None:
    """B10: text, fractions and booleans are not coerced, and the range is the kernel's."""
    for wrong in ("0", "8080", 1.5, True, float("nan"), {}, None):
        with pytest.raises(TypeError, match="^port: "):
            call(IGNORE, "127.0.0.1", wrong)
    for wrong in (-1234, -1, 65536):
        with pytest.raises(ValueError, match="^port: .*to 65535"):
            call(IGNORE, "127.0.0.1", wrong)
    call(IGNORE, "127.0.0.1", 65535).close()


@CALLS
def test_exactly_one_address_is_given(call: Callable[..., Any]) -> None:
    """B11, B13: an empty host is an error of its own, and `unix` does not win over `hostname`."""
    for hostname in (None, [], 0):
        with pytest.raises(TypeError, match="^hostname: "):
            call(IGNORE, hostname, 8080)
    with pytest.raises(TypeError, match="^hostname: "):
        call(IGNORE)
    with pytest.raises(ValueError, match="^hostname: "):
        call(IGNORE, "", 8080)
    with pytest.raises(TypeError, match="^unix: must not be given together with hostname and port"):
        call(IGNORE, "127.0.0.1", 8080, unix="/tmp/s")


@CALLS
def test_a_unix_path_is_str_bytes_or_a_path(call: Callable[..., Any]) -> None:
    """B12: nothing else is coerced, and an empty one is no address."""
    for wrong in (1, [], True, object()):
        with pytest.raises(TypeError, match="^unix: "):
            call(IGNORE, unix=wrong)
    with pytest.raises(ValueError, match="^unix: "):
        call(IGNORE, unix="")
    for right in ("/tmp/s", b"/tmp/s", Path("/tmp/s")):
        call(IGNORE, unix=right).close()


@CALLS
def test_null_bytes_in_names_are_refused(call: Callable[..., Any]) -> None:
    """B16: at the call, and never cut off."""
    for name in ("\0", "127.0.0.1\0", "local\0host"):
        with pytest.raises(ValueError, match="^hostname: must be without null bytes"):
            call(IGNORE, name, 8080)


# ── Listening ──────────────────────────────────────────────────────────────────────────────────


async def test_an_address_that_cannot_be_bound_is_in_the_error(unix_wire: Wire) -> None:
    """B17, B18: with a positive `errno`, in use or not available."""
    async with await uvsock.listen(IGNORE, "127.0.0.1", 0) as listener:
        with pytest.raises(OSError, match=f"127.0.0.1 port {listener.port}") as caught:
            await uvsock.listen(IGNORE, "127.0.0.1", listener.port)
        assert caught.value.errno == errno.EADDRINUSE > 0
    with pytest.raises(OSError, match="192.0.2.1 port 0") as caught:
        await uvsock.listen(IGNORE, "192.0.2.1", 0)
    assert caught.value.errno == errno.EADDRNOTAVAIL
    missing = str(unix_wire.directory / "missing" / "s")
    with pytest.raises(FileNotFoundError, match=re.escape(missing)):
        await uvsock.listen(IGNORE, unix=missing)


async def test_listen_resolves_names_beside_the_loop() -> None:
    """B19: a name is looked up in a thread; one that nobody knows is a `gaierror`."""
    listening = asyncio.ensure_future(uvsock.listen(IGNORE, "localhost", 0))
    await asyncio.sleep(0)
    assert not listening.done()
    await stopped(await listening)
    for name in ("no-such-name.invalid", "this is not a hostname", "localhost:80"):
        with pytest.raises(stdlib.gaierror, match=re.escape(repr(name))):
            await uvsock.listen(IGNORE, name, 0)
    with pytest.raises(ValueError, match="^hostname: "):
        uvsock.listen(IGNORE, "a..b", 0)


@CALLS
def test_an_address_has_no_brackets(call: Callable[..., Any]) -> None:
    """B20: neither for `listen` nor for `connect`."""
    with pytest.raises(ValueError, match="^hostname: must be an IP address without brackets"):
        call(IGNORE, "[::1]", 8080)


async def test_a_failed_listen_leaks_nothing(tls_wire: Wire) -> None:
    """B21: no descriptor and no TLS context, and the next one works."""
    taken = await tls_wire.listen(IGNORE)
    before = open_descriptors()

    def contexts() -> int:
        gc.collect()
        return sum(type(thing).__name__ == "SSLContext" for thing in gc.get_objects())

    known = contexts()
    for _ in range(20):
        with pytest.raises(OSError, match=str(taken.port)):
            await uvsock.listen(
                IGNORE, "127.0.0.1", taken.port, tls=tls_wire.authority.server_options
            )
    assert contexts() == known
    assert open_descriptors() == before
    await stopped(await tls_wire.listen(IGNORE))
    await stopped(taken)


async def test_an_address_is_free_again_after_stop(plain_wire: Wire) -> None:
    """B22: at once, also while a connection of the old listener lives."""
    old = await plain_wire.listen(ECHO)
    client = await plain_wire.connect(old, IGNORE)
    old.stop()
    where = (
        {"unix": old.unix} if old.unix else {"hostname": old.hostname, "port": old.port}
    )  # fmt: skip
    new = await uvsock.listen(ECHO, **where)
    client.write(b"x")
    await until(lambda: client.bytes_read == 1)
    await stopped(old)
    await stopped(new)


async def test_options_of_the_listening_socket() -> None:
    """B23: both sides must agree to share a port, and "::" takes IPv4 unless told otherwise."""
    async with await uvsock.listen(IGNORE, "127.0.0.1", 0, reuse_port=True) as shared:
        async with await uvsock.listen(IGNORE, "127.0.0.1", shared.port, reuse_port=True) as other:
            assert other.port == shared.port
        for options in ({}, {"exclusive": True}):
            with pytest.raises(OSError, match="port") as caught:
                await uvsock.listen(IGNORE, "127.0.0.1", shared.port, **options)
            assert caught.value.errno == errno.EADDRINUSE
    server = Recorder()
    async with await uvsock.listen(server.table(), "::", 0) as dual:
        client = await uvsock.connect(IGNORE, "127.0.0.1", dual.port)
        await until(lambda: server.sockets)
        assert server.socket.remote_address == "::ffff:127.0.0.1"
        assert server.socket.remote_family == "IPv6"
        client.end()
        await soon(client.wait_closed())
    async with await uvsock.listen(IGNORE, "::", 0, ipv6_only=True) as six:
        with pytest.raises(ConnectionRefusedError):
            await uvsock.connect(IGNORE, "127.0.0.1", six.port)


async def test_what_a_listener_says_of_itself() -> None:
    """B24, B25: the port that was bound, the host as given, read only; `data` is None."""
    async with await uvsock.listen(IGNORE, "localhost", 0) as listener:
        assert listener.hostname == "localhost"
        assert 0 < (listener.port or 0) < 65536
        assert listener.data is None
        for name in ("hostname", "port", "unix", "handlers", "sockets", "connections"):
            with pytest.raises(AttributeError):
                setattr(listener, name, 1)
        with stdlib.create_connection(("localhost", listener.port or 0), 5):
            await until(lambda: listener.connections == 1)


async def test_every_connection_of_a_burst_opens(plain_wire: Wire) -> None:
    """B28: how many are accepted per iteration is not promised, but none is forgotten."""
    server = Recorder()
    listener = await plain_wire.listen(server.table())
    peers = [plain_wire.dial(listener) for _ in range(20)]
    assert not server.events
    await until(lambda: server.events.count("open") == 20)
    for peer in peers:
        peer.close()
    await until(lambda: server.events.count("close") == 20)
    await stopped(listener)


async def test_connections_in_the_kernels_queue_at_stop_are_reset(plain_wire: Wire) -> None:
    """B29: `open` is not called for them."""
    server = Recorder()
    listener = await plain_wire.listen(server.table())
    with contextlib.ExitStack() as stack:
        peers = [stack.enter_context(plain_wire.dial(listener)) for _ in range(3)]
        listener.stop()
        await soon(listener.wait_closed())
        for peer in peers:
            with pytest.raises(ConnectionResetError):
                await asyncio.to_thread(peer.recv, 1)
    assert server.events == []


# ── Connecting ─────────────────────────────────────────────────────────────────────────────────


async def test_listening_calls_no_handler(wire: Wire) -> None:
    """B30: whatever the table has."""
    server = Recorder()
    listener = await wire.listen(server.table(*EVENTS))
    await asyncio.sleep(0.005)
    await stopped(listener)
    assert server.events == []


async def test_open_is_later_than_the_call_of_connect(wire: Wire) -> None:
    """B31: neither inside it nor in its first step, but before it gives the socket."""
    client = Recorder()
    listener = await wire.listen(IGNORE)
    pending = wire.connect(listener, client.table())
    assert client.events == []
    task = asyncio.ensure_future(pending)
    await asyncio.sleep(0)
    assert "open" not in client.events
    await soon(task)
    assert client.events[-1] == "open"
    await stopped(listener)


async def test_open_is_called_once(wire: Wire) -> None:
    """B32: on each side, and nothing else on a quiet connection."""
    server, client = Recorder(), Recorder()
    listener, socket = await linked(wire, server, client)
    await asyncio.sleep(0.01)
    expected = ["handshake", "open"] if wire.encrypted else ["open"]
    assert server.events == client.events == expected
    assert socket.bytes_written == server.socket.bytes_written == 0
    await stopped(listener)


async def test_connect_gives_the_object_of_the_handlers(wire: Wire) -> None:
    """B33: `write` on it works at once."""
    client = Recorder()
    listener = await wire.listen(ECHO)
    socket = await wire.connect(listener, client.table())
    assert socket is client.socket
    assert socket.write(b"now") == 3
    assert wire.kind == "unix" or socket.local_port
    await until(lambda: client.received == b"now")
    await stopped(listener)


def test_an_ip_address_needs_no_dns(tmp_path: Path) -> None:
    """B34: not even the file of names is read."""
    program = """
import sys, uvsock
H = {"data": lambda socket, data: None}
async def main():
    async with await uvsock.listen(H, "127.0.0.1", 0) as listener:
        (await uvsock.connect(H, sys.argv[1], listener.port)).end()
uvsock.run(main())
"""
    looked = []
    for host in ("127.0.0.1", "localhost"):
        trace = tmp_path / host
        run_python(
            "-c", program, host, under=[strace(), "-f", "-qq", "-e", "openat", "-o", str(trace)]
        )
        looked.append("/etc/hosts" in trace.read_text())
    assert looked == [False, True]


async def test_several_addresses_are_raced(
    monkeypatch: pytest.MonkeyPatch, loop_errors: list[Any]
) -> None:
    """B35: a listener may see connections that close again; the client gets one."""
    server, client = Recorder(), Recorder()
    listener = await uvsock.listen(server.table(), "127.0.0.1", 0)

    async def getaddrinfo(hostname: str, port: int, **hints: Any) -> Any:
        kind = (stdlib.AF_INET, stdlib.SOCK_STREAM, 6)
        return [(*kind, name, ("127.0.0.1", port)) for name in ("", "again")]

    monkeypatch.setattr(asyncio.get_running_loop(), "getaddrinfo", getaddrinfo, raising=False)
    socket = await uvsock.connect(
        client.table(), "twice.test", listener.port, happy_eyeballs_delay=0
    )
    await until(lambda: listener.connections == 1)
    opened = server.events.count("open")
    assert 1 <= opened <= 2
    assert server.events.count("close") == opened - 1
    assert client.events == ["open"]
    socket.write(b"x")
    await until(lambda: server.received == b"x")
    assert loop_errors == []
    await stopped(listener)


async def test_connect_error_comes_once_before_the_exception(plain_wire: Wire) -> None:
    """B36: and nothing else is called."""
    listener = await plain_wire.listen(IGNORE)
    listener.stop()
    client = Recorder()
    with pytest.raises(OSError) as caught:
        try:
            await plain_wire.connect(listener, client.table(*EVENTS))
        except OSError:
            assert client.events == ["connect_error"]
            raise
    await asyncio.sleep(0.005)
    assert client.events == ["connect_error"]
    assert client.calls[0][2] is caught.value


async def test_a_refusal_says_where(tcp_wire: Wire) -> None:
    """B37: the type is Python's, `errno` positive, the address in the text."""
    port = unused_port()
    with pytest.raises(ConnectionRefusedError, match=f"127.0.0.1 port {port}") as caught:
        await uvsock.connect(IGNORE, "127.0.0.1", port)
    assert caught.value.errno == errno.ECONNREFUSED > 0


async def test_the_socket_of_connect_error() -> None:
    """B38: closed, but it is there and has its data, which can be assigned."""
    seen: list[Any] = []

    def failed(socket: uvsock.Socket[Any], error: OSError) -> None:
        seen.extend([socket.ready_state, socket.data, socket.write(b"x"), socket.end(b"x")])
        socket.data = "assigned"
        seen.append(socket.data)

    given = object()
    with pytest.raises(ConnectionRefusedError):
        await uvsock.connect(
            {"data": ignore, "connect_error": failed}, "127.0.0.1", unused_port(), data=given
        )
    assert seen == [ReadyState.CLOSED, given, -1, -1, "assigned"]


async def test_both_channels_get_one_error(loop_errors: list[Any]) -> None:
    """B39, B43: `connect` always raises it, and it is never reported a second time."""
    told: list[BaseException] = []
    for table in (IGNORE, {"data": ignore, "connect_error": lambda _, error: told.append(error)}):
        for host in ("127.0.0.1", "no-such-name.invalid"):
            for _ in range(3):
                with pytest.raises(OSError) as caught:
                    await uvsock.connect(table, host, unused_port())
                assert table is IGNORE or told[-1] is caught.value
    told.clear()
    for _ in range(10):
        gc.collect()
    await asyncio.sleep(0)
    assert loop_errors == []


async def test_what_connect_error_raises_replaces_the_error() -> None:
    """B40: also in an `async def`; what it returns does not."""

    def raising(socket: uvsock.Socket[Any], error: OSError) -> None:
        raise LookupError("instead") from error

    async def raising_later(socket: uvsock.Socket[Any], error: OSError) -> None:
        await asyncio.sleep(0)
        raise LookupError("instead")

    for handler in (raising, raising_later):
        with pytest.raises(LookupError, match="instead"):
            await uvsock.connect(
                {"data": ignore, "connect_error": handler}, "127.0.0.1", unused_port()
            )
    returning = {"data": ignore, "connect_error": lambda socket, error: LookupError("ignored")}
    with pytest.raises(ConnectionRefusedError):
        await uvsock.connect(returning, "127.0.0.1", unused_port())


async def test_connect_error_is_never_called_inside_connect(unix_wire: Wire) -> None:
    """B41: not even for a Unix path that fails at once."""
    client = Recorder()
    pending = uvsock.connect(client.table(), unix=unix_wire.directory / "missing")
    assert client.events == []
    with pytest.raises(FileNotFoundError):
        await pending
    assert client.events == ["connect_error"]


async def test_names_are_the_systems_resolvers_business() -> None:
    """B42, B44, B45, B46: a `gaierror` in both channels, again and again; nothing is dialled."""
    listener = await uvsock.listen(ECHO, "127.0.0.1", 0)
    port = listener.port
    for name in (
        "no-such-name.invalid", "no-such-name.invalid", "this is not a hostname", "localhost:80",
        "127.0.0.1 x", "127.0.0.1\n", "127.0.0.1\t", "::1/64", "::ffff:127.0.1",
    ):  # fmt: skip
        client = Recorder()
        with pytest.raises(stdlib.gaierror, match="^.*cannot resolve ") as caught:
            await uvsock.connect(client.table(), name, port)
        assert client.events == ["connect_error"]
        assert client.calls[0][2] is caught.value
        assert repr(name) in str(caught.value)
    for name in ("a..b", "[::1]", "[127.0.0.1]", "[name]", "[]"):
        with pytest.raises(ValueError, match="^hostname: "):
            uvsock.connect(IGNORE, name, port)
    assert listener.stats.accepted == 0
    for name in ("127.1", "0x7f000001"):  # inet_aton(3) knows these
        socket = await uvsock.connect(IGNORE, name, port)
        assert socket.remote_address == "127.0.0.1"
        socket.end()
        await soon(socket.wait_closed())
    await stopped(listener)


@pytest.mark.parametrize("family", [stdlib.AF_UNIX, stdlib.AF_INET])
async def test_a_peer_that_wrote_and_closed_before_the_first_iteration(family: int) -> None:
    """B47: the connection has succeeded: `open`, `data`, `end`, `close`."""
    if family == stdlib.AF_UNIX:
        mine, peer = stdlib.socketpair()
    else:
        with stdlib.create_server(("127.0.0.1", 0)) as server:
            mine = stdlib.create_connection(server.getsockname())
            peer = server.accept()[0]
    peer.sendall(b"farewell")
    peer.close()
    client = Recorder()
    socket = await uvsock.connect(client.table(), sock=mine)
    await soon(socket.wait_closed())
    assert client.events == ["open", "data", "end", "close"]
    assert client.received == b"farewell"
    assert client.close_errors == [None]


async def test_the_systems_error_decides(unix_wire: Wire) -> None:
    """B48: refused, not there, no socket, or the backlog is full."""
    regular = unix_wire.directory / "regular"
    regular.touch()
    with pytest.raises(ConnectionRefusedError):
        await uvsock.connect(IGNORE, "127.0.0.1", unused_port())
    with pytest.raises(FileNotFoundError):
        await uvsock.connect(IGNORE, unix=unix_wire.directory / "missing")
    with pytest.raises(OSError, match="regular") as caught:
        await uvsock.connect(IGNORE, unix=regular)
    assert caught.value.errno in (errno.ECONNREFUSED, errno.ENOTSOCK)  # the latter on macOS
    with stdlib.socket(stdlib.AF_UNIX) as full, contextlib.ExitStack() as stack:
        full.bind(str(unix_wire.directory / "full"))
        full.listen(0)
        for _ in range(3):
            filler = stack.enter_context(stdlib.socket(stdlib.AF_UNIX))
            filler.setblocking(False)
            with contextlib.suppress(BlockingIOError, ConnectionRefusedError):
                filler.connect(str(unix_wire.directory / "full"))
        with pytest.raises((BlockingIOError, ConnectionRefusedError), match="full"):
            await uvsock.connect(IGNORE, unix=unix_wire.directory / "full")


@pytest.mark.parametrize("when", ["before", "after"])
async def test_a_socket_of_ones_own_opens_and_closes_once(when: str) -> None:
    """B49: `sock=` takes the place of a descriptor; one that cannot be used is refused."""
    mine, peer = stdlib.socketpair()
    client = Recorder()
    if when == "before":
        peer.close()
    socket = await uvsock.connect(client.table(), sock=mine)
    peer.close()
    await soon(socket.wait_closed())
    assert client.events.count("open") == client.events.count("close") == 1
    assert "connect_error" not in client.events
    with pytest.raises(ValueError, match="^sock: "):
        uvsock.connect(IGNORE, sock=mine)


async def test_end_in_open(wire: Wire) -> None:
    """B50: `connect` gives a socket that is ending; `close` is not called inside."""
    client = Recorder(open=lambda socket: (socket.end(b"bye"), inside.extend(client.events)))
    inside: list[str] = []
    server = Recorder()
    listener = await wire.listen(server.table())
    socket = await wire.connect(listener, client.table())
    assert socket.ready_state is ReadyState.SHUTDOWN
    assert inside[-1] == "open"
    await soon(socket.wait_closed())
    assert plain(client.events) == ["open", "end", "close"]
    await until(lambda: server.received == b"bye")
    await stopped(listener)


async def test_what_a_handler_returns_is_ignored(wire: Wire) -> None:
    """B51: an exception that is returned is not raised."""
    wrong = {name: (lambda *arguments: ValueError("returned")) for name in EVENTS}
    listener = await wire.listen({**wrong, "data": lambda s, d: (s.write(d), ValueError())[1]})
    client = Recorder(open=lambda socket: ValueError("returned"))
    socket = await wire.connect(listener, client.table())
    socket.write(b"x")
    await until(lambda: client.received == b"x")
    assert "error" not in client.events
    assert socket.ready_state is ReadyState.ESTABLISHED
    await stopped(listener)


async def test_connecting_has_a_timeout_and_can_be_cancelled() -> None:
    """B52: both give the connection up, and `open` is not called."""
    client = Recorder()
    with stdlib.create_server(("127.0.0.1", 0)) as silent:
        port = silent.getsockname()[1]
        with pytest.raises(TimeoutError, match="timeout"):
            await uvsock.connect(
                client.table(), "localhost", port, tls=True, timeout=0.02
            )  # fmt: skip
        assert client.events[-1] == "connect_error"
        task = asyncio.ensure_future(
            uvsock.connect(client.table(), "localhost", port, tls=True)
        )  # fmt: skip
        await asyncio.sleep(0.01)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
    assert "open" not in client.events


def test_a_pending_connect_keeps_run_going() -> None:
    """B53: until it has succeeded or failed, whatever the main coroutine does."""
    outcomes: list[str] = []
    tasks: list[asyncio.Task[None]] = []

    async def once(port: int) -> None:
        try:
            socket = await uvsock.connect(IGNORE, "localhost", port)
        except ConnectionRefusedError:
            outcomes.append("refused")
        else:
            socket.end()
            outcomes.append("connected")

    async def main(*ports: int) -> None:
        tasks.extend(asyncio.ensure_future(once(port)) for port in ports)
        await asyncio.sleep(0)

    with stdlib.create_server(("127.0.0.1", 0)) as server:
        accepting = threading.Thread(target=lambda: server.accept()[0].close())
        accepting.start()
        uvsock.run(main(unused_port(), server.getsockname()[1]))
        accepting.join(5)
    assert sorted(outcomes) == ["connected", "refused"]


# ── Receiving ──────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("kind", [bytes, bytearray, memoryview])
async def test_the_chunk_is_of_the_chosen_type_and_yours(wire: Wire, kind: type) -> None:
    """B54: bytes and a bytearray may be kept; they never change afterwards."""
    kept: list[Any] = []
    types: list[type] = []

    def data(socket: uvsock.Socket[Any], chunk: Any) -> None:
        types.append(type(chunk))
        kept.append(bytes(chunk) if kind is memoryview else chunk)

    listener = await wire.listen({"data": data}, binary_type=kind.__name__)
    client = await wire.connect(listener, IGNORE)
    for number in range(3):
        client.write(bytes([65 + number]) * 10)
        await until(lambda number=number: len(kept) == number + 1)
    assert types == [kind] * 3
    assert kept == [b"A" * 10, b"B" * 10, b"C" * 10]
    await stopped(listener)


async def test_small_writes_arrive_together_and_a_chunk_has_a_limit(wire: Wire) -> None:
    """B55: at most 256 KiB, over TLS 128 KiB; the order is kept."""
    sizes: list[int] = []
    received = bytearray()

    def data(socket: uvsock.Socket[Any], chunk: bytes) -> None:
        sizes.append(len(chunk))
        received.extend(chunk)

    listener = await wire.listen({"data": data})
    client = await wire.connect(listener, IGNORE)
    await until(lambda: listener.connections and (received or client.write(b"|")))
    for number in range(10):
        client.write(b"%d" % number)
        client.flush()
    await until(lambda: received.endswith(b"9"))
    assert received.endswith(b"0123456789")
    assert len(sizes) <= 2
    message = hashlib.shake_128(b"order").digest(3 * MIB)
    del received[:]
    await soon(client.send_all(message))
    await until(lambda: len(received) == len(message))
    assert received == message
    assert max(sizes) <= (128 if wire.encrypted else 256) * 1024
    await stopped(listener)


async def test_large_amounts_arrive_whole_and_in_order(wire: Wire) -> None:
    """B56: sent by counted writes, the rest when `drain` is called."""
    message = hashlib.shake_128(b"large").digest(24 * MIB)
    left = memoryview(message)
    digest = hashlib.sha256()
    total = 0

    def more(socket: uvsock.Socket[Any]) -> None:
        nonlocal left
        while left and (taken := socket.write(left[:700_000])) > 0:
            left = left[taken:]
        if not left:
            socket.end()

    def data(socket: uvsock.Socket[Any], chunk: bytes) -> None:
        nonlocal total
        total += len(chunk)
        digest.update(chunk)

    listener = await wire.listen({"data": data})
    client = await wire.connect(listener, {"open": more, "drain": more, "data": ignore})
    await soon(client.wait_closed(), 15)
    assert total == len(message)
    assert digest.digest() == hashlib.sha256(message).digest()
    await stopped(listener)


async def test_a_flooding_peer_does_not_hold_the_loop(plain_wire: Wire) -> None:
    """B57: what one iteration reads is bounded, and every byte arrives."""
    turns = [0]
    server = Recorder(data=lambda socket, chunk: turns.append(turns.pop() + len(chunk)))
    listener, peer = await dialled(plain_wire, server)
    total = 64 * MIB

    def flood() -> None:
        with peer:
            for _ in range(total // MIB):
                peer.sendall(bytes(MIB))

    flooding = asyncio.ensure_future(asyncio.to_thread(flood))
    while server.events[-1] != "close":
        await asyncio.sleep(0)
        if turns[-1]:
            turns.append(0)
    await flooding
    assert sum(turns) == total
    assert max(turns) <= 32 * 256 * 1024  # libuv: 32 reads of uvloop's buffer
    await stopped(listener)


@pytest.mark.parametrize("action", ["close", "terminate"])
async def test_no_data_after_ones_own_close(wire: Wire, action: str) -> None:
    """B58: in a handler too, with more of it received already."""
    server = Recorder(data=lambda socket, data: getattr(socket, action)())
    listener = await wire.listen(server.table())
    client = await wire.connect(listener, {"open": lambda s: fill(s), "data": ignore})
    await soon(client.wait_closed())
    await until(lambda: "close" in server.events)
    assert server.events.count("data") == 1
    assert "end" not in server.events
    await stopped(listener)


async def test_data_still_comes_after_end(wire: Wire) -> None:
    """B58: until the peer ends its side as well."""
    server = Recorder(data=lambda socket, data: socket.end())
    listener = await wire.listen(server.table())
    client = await wire.connect(listener, IGNORE, allow_half_open=True)
    for letter in (b"a", b"b", b"c"):
        client.write(letter)
        await until(lambda letter=letter: server.received.endswith(letter))
    client.end()
    await soon(client.wait_closed())
    assert server.received == b"abc"
    await stopped(listener)


async def test_async_handlers_do_not_overlap(wire: Wire) -> None:
    """B59: the next chunk waits for the handler, and the socket does not read meanwhile."""
    steps: list[str] = []
    go_on = asyncio.Event()

    async def data(socket: uvsock.Socket[Any], chunk: bytes) -> None:
        steps.append(f"in {len(chunk)}")
        await go_on.wait()
        steps.append("out")

    server = Recorder(data=data)
    listener = await wire.listen(server.table())
    client = await wire.connect(listener, IGNORE)
    client.write(b"x")
    await until(lambda: steps)
    accepted = 0
    while (taken := fill(client)) > 0:  # as much as the kernel holds, and no more
        accepted += taken
        await asyncio.sleep(0.01)
    assert steps == ["in 1"]
    assert accepted < 50 * MIB
    go_on.set()
    await until(lambda: len(server.received) == accepted + 1)
    assert steps[:4:2] == ["in 1", steps[2]]
    assert steps[1::2] == ["out"] * (len(steps) // 2)
    await stopped(listener)


@LINUX  # other systems drop what was received before a reset
async def test_a_reset_waits_while_data_closes_the_socket(tcp_wire: Wire) -> None:
    """B60: a connection that `close` begins gets its own error, not that of the reset."""
    errors: list[BaseException] = []
    tasks: list[asyncio.Task[None]] = []

    async def refused() -> None:
        try:
            await uvsock.connect(IGNORE, "127.0.0.1", port)
        except OSError as error:
            errors.append(error)

    def close(socket: uvsock.Socket[Any], error: OSError | None) -> None:
        tasks.append(asyncio.ensure_future(refused()))

    port = unused_port()
    server = Recorder(data=lambda socket, data: socket.terminate(), close=close)
    listener, peer = await dialled(tcp_wire, server)
    peer.sendall(b"x" * 1000)
    reset(peer)
    await until(lambda: errors)
    assert server.events == ["open", "data", "close"]
    assert [type(error) for error in errors] == [ConnectionRefusedError]
    await soon(tasks[0])
    await stopped(listener)


# ── Writing ────────────────────────────────────────────────────────────────────────────────────

CORK = pytest.mark.parametrize("cork", [True, False], ids=["cork", "no cork"])


@CORK
async def test_write_returns_how_much_was_taken(wire: Wire, cork: bool) -> None:
    """B62: all of it when it fits; without cork nothing is held."""
    client = Recorder()
    listener = await wire.listen(ECHO)
    socket = await wire.connect(listener, client.table(), cork=cork)
    assert socket.write(b"hello") == 5
    assert socket.writable_length == (5 if cork else 0)
    await until(lambda: client.received == b"hello")
    await stopped(listener)


async def test_no_handler_of_the_peer_runs_inside_write(wire: Wire) -> None:
    """B63: nor inside `flush`."""
    server = Recorder()
    listener, client = await linked(wire, server, Recorder())
    client.write(b"x")
    client.flush()
    assert "data" not in server.events
    await until(lambda: server.received == b"x")
    await stopped(listener)


@CORK
async def test_a_short_write_keeps_nothing_of_the_rest(wire: Wire, cork: bool) -> None:
    """B64: what follows is refused until `drain`; the peer gets what was counted."""
    server, client = Recorder(), Recorder(drain=ignore)
    listener, socket = await linked(wire, server, client)
    await stopped(listener)
    listener = await wire.listen(server.table())
    socket = await wire.connect(listener, client.table(), cork=cork)
    await until(lambda: listener.connections)
    (accepted,) = listener.sockets
    accepted.pause()
    total = 0
    while (taken := socket.write(b"x" * MIB)) == MIB:
        total += taken
    assert 0 <= taken < MIB
    total += taken
    assert [socket.write(b"more"), socket.write(b"x" * MIB)] == [0, 0]
    server.received.clear()
    accepted.resume()
    await until(lambda: "drain" in client.events)
    await until(lambda: len(server.received) == total)
    assert socket.write(b"y") == 1
    await until(lambda: server.received.endswith(b"y"))
    assert len(server.received) == total + 1
    assert socket.bytes_written == total + 1
    await stopped(listener)


@pytest.mark.parametrize("action", ["end", "shutdown", "close", "terminate"])
async def test_write_is_minus_one_after_ones_own_end(wire: Wire, action: str) -> None:
    """B65, B67: at once and while it has not finished; wrong arguments raise as always."""
    server, client = Recorder(), Recorder()
    listener, socket = await linked(wire, server, client)
    server.socket.pause()
    fill(socket)
    getattr(socket, action)()
    for _ in range(2):
        assert [socket.write(b"x"), socket.write(""), socket.end(b"x")] == [-1, -1, -1]
        with pytest.raises(TypeError, match="^data: "):
            socket.write(None)  # type: ignore[arg-type]
        with pytest.raises(ValueError, match="^offset: "):
            socket.write(b"x", 2)
        server.socket.resume()
        await soon(socket.wait_closed())
    await stopped(listener)


async def test_a_reset_that_was_not_told_yet_refuses_writes(tcp_wire: Wire) -> None:
    """B66: the count does not move, and `close` gets the error."""
    server = Recorder()
    listener, peer = await dialled(tcp_wire, server, cork=False)
    reset(peer)
    assert server.socket.write(b"x" * 1000) == -1
    assert server.socket.write(b"x") == -1
    assert server.socket.bytes_written == 0
    assert server.events == ["open"]
    await until(lambda: "close" in server.events)
    assert server.events == ["open", "close"]
    assert isinstance(server.close_errors[0], ConnectionResetError)
    await stopped(listener)


async def test_what_can_be_written(wire: Wire) -> None:
    """B68, B69, B70: text as UTF-8, any contiguous buffer; nothing is 0, all else an error."""
    server, client = Recorder(), Recorder(drain=ignore)
    listener, socket = await linked(wire, server, client)
    for empty in ("", b"", bytearray(), memoryview(b"")):
        assert socket.write(empty) == 0
    for wrong in (None, 1, True, 1.5, [1], {}, object()):
        with pytest.raises(TypeError, match="^data: must be str or a bytes-like object"):
            socket.write(wrong)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="^data: must be a C-contiguous buffer"):
        socket.write(memoryview(b"abcd")[::2])
    with pytest.raises(UnicodeEncodeError):
        socket.write("\ud800")
    numbers = array.array("H", [1, 2, 3])
    expected = b""
    for data, sent in (
        ("é😋", "é😋".encode()), (b"bytes", b"bytes"), (bytearray(b"array"), b"array"),
        (memoryview(b"a view of it")[2:6], b"view"), (numbers, numbers.tobytes()),
    ):  # fmt: skip
        assert socket.write(data) == len(sent)
        expected += sent
    assert len("é😋".encode()) == 6
    await until(lambda: server.received == expected)
    assert "drain" not in client.events
    await stopped(listener)


async def test_offsets_and_lengths_count_bytes(wire: Wire) -> None:
    """B72, B73: of the encoding for text; outside the data they are an error."""
    server = Recorder()
    listener, socket = await linked(wire, server, Recorder())
    assert socket.write(b"abcdef", 2) == 4
    assert socket.write(b"abcdef", 1, 2) == 2
    assert socket.write(b"abcdef", length=3) == 3
    assert socket.write(b"abcdef", 6) == socket.write(b"abcdef", 0, 0) == 0
    assert socket.write("é😋", 2) == 4
    assert socket.write(array.array("H", [0x4141, 0x4242]), 2, 2) == 2
    await until(lambda: server.received == b"cdef" + b"bc" + b"abc" + "😋".encode() + b"BB")
    for offset, length, name in (
        (-1, None, "offset"), (7, None, "offset"), (0, 7, "length"), (3, 4, "length"),
        (0, -1, "length"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=f"^{name}: "):
            socket.write(b"abcdef", offset, length)
    for offset, length, name in ((1.5, None, "offset"), (None, 1, "offset"), (0, "1", "length")):
        with pytest.raises(TypeError, match=f"^{name}: "):
            socket.write(b"abcdef", offset, length)  # type: ignore[arg-type]
    await stopped(listener)


async def test_bytes_written_is_the_sum_of_the_counts(wire: Wire) -> None:
    """B74: plain text over TLS, and there after `close` too."""
    server = Recorder()
    listener, socket = await linked(wire, server, Recorder())
    total = socket.write("é") + socket.write(b"x" * 1000) + fill(socket)
    assert socket.bytes_written == total
    total += socket.end(b"bye")
    await soon(socket.wait_closed())
    assert socket.bytes_written == total == len(server.received)
    await stopped(listener)


async def test_an_echo_needs_no_drain(wire: Wire) -> None:
    """B77, B78: a write that was taken whole is followed by none."""
    server, client = Recorder(data=echo, drain=ignore), Recorder(drain=ignore)
    listener, socket = await linked(wire, server, client)
    for number in range(1, 11):
        assert socket.write(b"x" * 1000) == 1000
        await until(lambda number=number: len(client.received) == 1000 * number)
    assert "drain" not in server.events + client.events
    await stopped(listener)


async def test_drain_comes_once_per_short_write(wire: Wire) -> None:
    """B78, B79: when everything has left; pausing, resuming and the peer's end give none."""
    server, client = Recorder(), Recorder(drain=lambda s: pending.append(s.writable_length))
    pending: list[int] = []
    listener, socket = await linked(wire, server, client, allow_half_open=True)
    for round_ in range(1, 4):
        server.socket.pause()
        fill(socket)
        assert socket.write(b"x") == 0
        server.socket.resume()
        await until(lambda round_=round_: client.events.count("drain") == round_)
    socket.pause()
    socket.resume()
    server.socket.end()
    await until(lambda: "end" in client.events)
    await asyncio.sleep(0.005)
    assert pending == [0, 0, 0]
    await stopped(listener)


async def test_drain_does_not_come_with_what_is_read(unix_wire: Wire) -> None:
    """B80: busy connections with small buffers have no more of them than short writes."""
    short = drained = chunks = 0

    def data(socket: uvsock.Socket[Any], chunk: bytes) -> None:
        nonlocal short, chunks
        chunks += 1
        if 0 <= socket.write(chunk) < len(chunk):
            short += 1

    def drain(socket: uvsock.Socket[Any]) -> None:
        nonlocal drained
        drained += 1

    def opened(socket: uvsock.Socket[Any]) -> None:
        sock = socket.get_extra_info("socket")
        sock.setsockopt(stdlib.SOL_SOCKET, stdlib.SO_SNDBUF, 512)

    table = {"open": opened, "data": data, "drain": drain}
    listener = await unix_wire.listen(table)
    clients = [await unix_wire.connect(listener, table) for _ in range(10)]
    for client in clients:
        client.write(b"x" * 512)
    await until(lambda: chunks > 1000)
    assert drained <= short
    assert drained < 1.5 * chunks
    await stopped(listener)
    await until(lambda: all(client.ready_state is ReadyState.CLOSED for client in clients))


# ── Ending ─────────────────────────────────────────────────────────────────────────────────────


async def test_who_is_told_what_when_one_side_ends(wire: Wire) -> None:
    """B82, B83: `end` is for both, `close` comes later than the call; a second end is -1."""
    server, client = Recorder(), Recorder()
    listener, socket = await linked(wire, server, client)
    assert socket.end(b"hello") == 5
    assert plain(client.events) == ["open"]
    assert socket.ready_state is ReadyState.SHUTDOWN
    assert [socket.end(b"again"), socket.end()] == [-1, -1]
    await soon(socket.wait_closed())
    await until(lambda: server.events[-1] == "close")
    assert plain(server.events) == ["open", "data", "end", "close"]
    assert plain(client.events) == ["open", "end", "close"]
    other = await wire.connect(listener, IGNORE)
    assert other.end() == 0
    await soon(other.wait_closed())
    await stopped(listener)


async def test_a_wrong_type_in_end_leaves_the_socket_open(wire: Wire) -> None:
    """B84: nothing has happened."""
    client = Recorder()
    listener = await wire.listen(ECHO)
    socket = await wire.connect(listener, client.table())
    for wrong in (None, 1, []):
        with pytest.raises(TypeError, match="^data: "):
            socket.end(wrong)  # type: ignore[arg-type]
    assert socket.ready_state is ReadyState.ESTABLISHED
    socket.write(b"open")
    await until(lambda: client.received == b"open")
    await stopped(listener)


@pytest.mark.parametrize("full", [False, True], ids=["room", "full"])
async def test_end_takes_any_size_and_delivers_it(wire: Wire, full: bool) -> None:
    """B85, B86: also when the kernel takes nothing at the moment."""
    server, client = Recorder(), Recorder()
    listener, socket = await linked(wire, server, client)
    server.socket.pause()
    before = fill(socket) if full else 0
    last = hashlib.shake_128(b"last").digest(8 * MIB)
    assert socket.end(last) == len(last)
    server.socket.resume()
    await soon(socket.wait_closed(), 10)
    assert len(server.received) == before + len(last)
    assert server.received.endswith(last)
    assert server.close_errors == client.close_errors == [None]
    await stopped(listener)


async def test_end_loses_nothing_of_either_side(wire: Wire) -> None:
    """B87: the peer is still sending, and both get all of it."""
    message = hashlib.shake_128(b"both").digest(4 * MIB)
    server, client = Recorder(open=lambda socket: socket.end(message)), Recorder()
    listener, socket = await linked(wire, server, client)
    assert socket.end(message) == len(message)
    await soon(socket.wait_closed(), 10)
    await until(lambda: "close" in server.events)
    assert server.received == client.received == message
    assert server.close_errors == client.close_errors == [None]
    await stopped(listener)


async def test_shutdown_ends_the_own_side_only(wire: Wire) -> None:
    """B88, B89: data still arrives, then `end` and `close`, over TCP as over TLS."""
    server, client = Recorder(), Recorder()
    listener, socket = await linked(wire, server, client, allow_half_open=True)
    for _ in range(2):
        socket.shutdown()
        assert [socket.write(b"x"), socket.end(b"x")] == [-1, -1]
        assert socket.ready_state is ReadyState.SHUTDOWN
    await until(lambda: "end" in server.events)
    server.socket.write(b"still")
    await until(lambda: client.received == b"still")
    server.socket.shutdown()
    await soon(socket.wait_closed())
    assert plain(client.events) == ["open", "data", "end", "close"]
    await until(lambda: server.events[-1] == "close")
    await stopped(listener)


async def test_shutdown_of_the_read_side_drops_what_arrives(wire: Wire) -> None:
    """B90: `end` comes when the peer ends, not because of the call."""
    server, client = Recorder(), Recorder()
    listener, socket = await linked(wire, server, client)
    server.socket.shutdown(True)
    socket.write(b"unheard")
    await until(lambda: server.socket.bytes_read == 7)
    assert plain(server.events) == ["open"]
    assert server.socket.write(b"heard") == 5
    await until(lambda: client.received == b"heard")
    socket.end()
    await soon(socket.wait_closed())
    await until(lambda: plain(server.events) == ["open", "end", "close"])
    await stopped(listener)


async def test_what_was_written_before_close_arrives(wire: Wire) -> None:
    """B91: it returns nothing and calls nothing; the peer sees an orderly end."""
    server, client = Recorder(), Recorder()
    listener, socket = await linked(wire, server, client)
    socket.write(b"last words")
    assert socket.close() is None
    assert plain(client.events) == ["open"]
    await soon(socket.wait_closed())
    assert plain(client.events) == ["open", "close"]
    await until(lambda: server.events[-1] == "close")
    assert plain(server.events) == ["open", "data", "end", "close"]
    assert server.received == b"last words"
    await stopped(listener)


async def test_terminate_is_a_reset_for_the_peer(tcp_wire: Wire) -> None:
    """B92: `close` without an error for oneself, with one for the peer, no `end`, no `error`."""
    server, client = Recorder(), Recorder()
    listener, socket = await linked(tcp_wire, server, client)
    socket.write(b"x")
    socket.flush()
    await until(lambda: server.received)
    socket.terminate()
    assert client.events == ["open"]
    await soon(socket.wait_closed())
    assert client.events == ["open", "close"]
    assert client.close_errors == [None]
    await until(lambda: "close" in server.events)
    assert server.events == ["open", "data", "close"]
    assert isinstance(server.close_errors[0], ConnectionResetError)
    assert server.close_errors[0].errno == errno.ECONNRESET
    await stopped(listener)


@pytest.mark.parametrize("first", ["end", "close", "terminate"])
async def test_everything_is_harmless_on_a_closed_socket(wire: Wire, first: str) -> None:
    """B93, B193: it calls no handler, and no property raises."""
    client = Recorder()
    listener = await wire.listen(IGNORE)
    socket = await wire.connect(listener, client.table())
    getattr(socket, first)()
    await soon(socket.wait_closed())
    events = list(client.events)
    for name in ("close", "terminate", "shutdown", "flush", "ref", "unref", "pause", "resume"):
        assert getattr(socket, name)() is None
    assert socket.end() == -1
    socket.timeout(0.001)
    socket.reload(client.table())
    assert [socket.set_no_delay(), socket.set_keep_alive(True)] == [False, False]
    for name in dir(uvsock.Socket):
        if not name.startswith("_"):
            getattr(socket, name)
    await asyncio.sleep(0.01)
    assert client.events == events
    await stopped(listener)


@pytest.mark.parametrize("half_open", [False, True])
async def test_both_sides_end_in_the_same_turn(wire: Wire, half_open: bool) -> None:
    """B94, B97: each gets `end`, then `close`."""
    server, client = Recorder(), Recorder()
    listener = await wire.listen(server.table(), allow_half_open=half_open)
    socket = await wire.connect(listener, client.table(), allow_half_open=half_open)
    await until(lambda: server.sockets)
    socket.end()
    server.socket.end()
    await soon(socket.wait_closed())
    await soon(server.socket.wait_closed())
    for recorder in (server, client):
        assert plain(recorder.events) == ["open", "end", "close"]
        assert recorder.close_errors == [None]
    await stopped(listener)


async def test_a_with_block_ends_the_socket(wire: Wire) -> None:
    """B95: also when it is left by an exception."""
    server = Recorder()
    listener, socket = await linked(wire, server, Recorder())
    with pytest.raises(LookupError), socket as same:
        assert same is socket
        socket.write(b"inside")
        raise LookupError
    assert socket.ready_state is ReadyState.SHUTDOWN
    await soon(socket.wait_closed())
    assert server.received == b"inside"
    await stopped(listener)


# ── close and its error ────────────────────────────────────────────────────────────────────────


async def test_close_is_called_once_whatever_closed_the_socket(wire: Wire) -> None:
    """B100: with two arguments; and never for a connection that failed."""
    server, client = Recorder(), Recorder()
    listener = await wire.listen(server.table())
    ways = ["end", "close", "terminate", "shutdown"] * 4
    sockets = [await wire.connect(listener, client.table()) for _ in ways]
    await until(lambda: server.events.count("open") == len(ways))
    for number, (way, socket) in enumerate(zip(ways, sockets, strict=True)):
        getattr(socket if number < 8 else server.sockets[number], way)()
    for socket in sockets:
        await soon(socket.wait_closed())
    await until(lambda: not listener.connections)
    for recorder in (server, client):
        closed = [call for call in recorder.calls if call[0] == "close"]
        assert len(closed) == len({call[1] for call in closed}) == len(ways)
        assert {len(call) for call in closed} == {3}
    await stopped(listener)
    failed = Recorder()
    with pytest.raises(OSError):
        await wire.connect(listener, failed.table())
    assert failed.events == ["connect_error"]


@pytest.mark.parametrize("accepted", [False, True])
async def test_a_reset_goes_to_close_alone(tcp_wire: Wire, accepted: bool) -> None:
    """B101, B102: as its error; `error` and `end` are not called."""
    server, client = Recorder(), Recorder()
    listener, socket = await linked(tcp_wire, server, client)
    resetting, told = (socket, server) if accepted else (server.socket, client)
    resetting.terminate()
    await until(lambda: "close" in told.events)
    assert told.events == ["open", "close"]
    (error,) = told.close_errors
    assert isinstance(error, ConnectionResetError)
    await stopped(listener)


async def test_a_write_to_a_peer_that_is_gone_is_closes_error(unix_wire: Wire) -> None:
    """B101: EPIPE here; the write itself only says -1 or that the bytes were accepted."""
    server = Recorder()
    listener, peer = await dialled(unix_wire, server, cork=False, allow_half_open=True)
    peer.close()
    assert server.socket.write(b"x") == -1
    await until(lambda: "close" in server.events)
    assert isinstance(server.close_errors[0], BrokenPipeError)
    assert "error" not in server.events
    await stopped(listener)


async def test_end_comes_once_and_before_close(wire: Wire) -> None:
    """B103, B106: a normal disconnect is `end`, `close`, and no error of any kind."""
    server = Recorder()
    listener, socket = await linked(wire, server, Recorder())
    socket.end()
    await soon(socket.wait_closed())
    await until(lambda: server.events[-1] == "close")
    assert plain(server.events) == ["open", "end", "close"]
    assert server.close_errors == [None]
    await stopped(listener)


async def test_a_reply_in_end_goes_out_whole(wire: Wire) -> None:
    """B104: however long, and then the socket is closed by itself."""
    reply = hashlib.shake_128(b"reply").digest(6 * MIB)
    server, client = Recorder(end=lambda socket: socket.end(reply)), Recorder()
    listener, socket = await linked(wire, server, client)
    socket.end(b"question")
    await soon(socket.wait_closed(), 10)
    assert client.received == reply
    await until(lambda: server.events[-1] == "close")
    await stopped(listener)


async def test_what_close_can_still_read(wire: Wire) -> None:
    """B105, B159: `data` and the addresses, which stay; the state is `CLOSED`."""

    def facts(socket: uvsock.Socket[Any]) -> list[Any]:
        return [
            socket.data, socket.local_address, socket.local_port, socket.local_family,
            socket.remote_address, socket.remote_port, socket.remote_family,
        ]  # fmt: skip

    def closed(socket: uvsock.Socket[Any], error: OSError | None) -> None:
        seen.append(facts(socket))
        seen.append([socket.ready_state, socket.write(b"x"), socket.end(b"x"), socket.fileno()])

    seen: list[list[Any]] = []
    client = Recorder(close=closed)
    listener = await wire.listen(IGNORE)
    socket = await wire.connect(listener, client.table(), data="mine")
    before = facts(socket)
    socket.end()
    await soon(socket.wait_closed())
    assert seen == [before, [ReadyState.CLOSED, -1, -1, -1]]
    assert facts(socket) == before
    assert wire.kind == "unix" or before[5] == listener.port
    await stopped(listener)


# ── Half-open connections ──────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("action", ["end", "shutdown"])
async def test_a_half_open_socket_is_writable_until_its_own_end(wire: Wire, action: str) -> None:
    """B107, B108, B111: `end` once, Unix sockets too; ending it as well closes both."""
    server, client = Recorder(), Recorder()
    listener, socket = await linked(wire, server, client, allow_half_open=True)
    socket.shutdown()
    await until(lambda: "end" in server.events)
    for number in range(3):
        assert server.socket.ready_state is ReadyState.ESTABLISHED
        assert server.socket.write(b"%d" % number) == 1
        await until(lambda number=number: client.received.endswith(b"%d" % number))
    getattr(server.socket, action)()
    await soon(socket.wait_closed())
    await until(lambda: server.events[-1] == "close")
    assert server.events.count("end") == server.events.count("close") == 1
    await stopped(listener)


async def test_a_reset_behind_a_short_write_is_one_end_and_one_close(wire: Wire) -> None:
    """B109: of a half-open socket whose peer takes nothing, ends, and is gone."""
    server = Recorder(open=lambda socket: fill(socket), drain=ignore)
    listener, peer = await dialled(wire, server, allow_half_open=True)
    peer.shutdown(stdlib.SHUT_WR)
    await until(lambda: "end" in server.events)
    await asyncio.sleep(0.01)
    assert server.events.count("end") == 1
    assert "close" not in server.events
    reset(peer)
    await until(lambda: "close" in server.events)
    assert plain(server.events) == ["open", "end", "close"]
    assert isinstance(server.close_errors[0], ConnectionError)
    await stopped(listener)


async def test_a_short_write_in_end_does_not_repeat_it(wire: Wire) -> None:
    """B110: not before nor after the peer has read it."""
    server, client = Recorder(end=lambda socket: fill(socket), drain=ignore), Recorder()
    listener, socket = await linked(wire, server, client, allow_half_open=True)
    socket.pause()
    socket.shutdown()
    await until(lambda: "end" in server.events)
    await asyncio.sleep(0.01)
    socket.resume()
    await until(lambda: "drain" in server.events)
    server.socket.end()
    await soon(socket.wait_closed())
    await until(lambda: "close" in server.events)
    assert plain(server.events) == ["open", "end", "drain", "close"]
    assert len(client.received) == server.socket.bytes_written
    await stopped(listener)


# ── Exceptions in handlers ─────────────────────────────────────────────────────────────────────


class Oops(Exception):
    """What the handlers of these tests raise."""


OOPS = Oops()


def oops(socket: uvsock.Socket[Any], *arguments: Any) -> None:
    raise OOPS


@pytest.mark.parametrize("event", ["data", "drain", "timeout"])
async def test_what_a_handler_raises_goes_to_error_and_the_socket_stays(
    wire: Wire, event: str
) -> None:
    """B112, B115: the very object, and the next event is delivered."""
    server, client = Recorder(**{event: oops}), Recorder()
    listener, socket = await linked(wire, server, client)
    if event == "timeout":
        server.socket.timeout(0.001)
    elif event == "data":
        socket.write(b"x")
    else:
        fill(server.socket)
    await until(lambda: "error" in server.events)
    assert server.errors[0] is OOPS
    assert server.socket.ready_state is ReadyState.ESTABLISHED
    socket.write(b"next")
    await until(lambda: server.received.endswith(b"next"))
    await stopped(listener)


@pytest.mark.parametrize("event", ["open", "data", "end", "error"])
async def test_without_error_handler_the_loop_is_told_and_the_socket_closed(
    wire: Wire, event: str, loop_errors: list[dict[str, Any]]
) -> None:
    """B112, B118: so it is when `error` itself raises, which is not called again."""
    server = Recorder(**{event: oops})
    if event == "error":
        server.overrides["data"] = oops
    listener = await wire.listen(server.table("open", "data", "end", "close"))
    socket = await wire.connect(listener, IGNORE)
    socket.write(b"x")
    if event == "end":
        socket.end()
    await soon(socket.wait_closed())
    await until(lambda: "close" in server.events)
    (context,) = loop_errors
    assert context["exception"] is OOPS
    assert context["handler"] == event
    assert context["socket"] is server.socket
    assert server.events.count("error") == (event == "error")
    await stopped(listener)


@pytest.mark.parametrize("side", ["server", "client"])
async def test_open_that_raises_closes_the_socket(wire: Wire, side: str) -> None:
    """B113, B114: `error`, then `close`; the peer sees an end, and `connect` succeeds."""
    server, client = Recorder(), Recorder()
    failing, other = (server, client) if side == "server" else (client, server)
    failing.overrides["open"] = oops
    listener = await wire.listen(server.table())
    socket = await wire.connect(listener, client.table())
    await until(lambda: {"close"} <= {*server.events} & {*client.events})
    assert failing.errors == [OOPS]
    assert plain(failing.events) == ["open", "error", "close"]
    assert plain(other.events) == ["open", "end", "close"]
    assert socket is client.socket
    await stopped(listener)


async def test_end_and_close_that_raise_change_nothing(wire: Wire) -> None:
    """B116: the close goes on as usual, and `error` comes after the one that raised."""
    server = Recorder(end=oops, close=oops)
    listener, socket = await linked(wire, server, Recorder())
    assert socket.end(b"x") == 1
    await soon(socket.wait_closed())
    await until(lambda: server.events.count("error") == 2)
    assert plain(server.events) == ["open", "data", "end", "error", "close", "error"]
    assert server.errors == [OOPS, OOPS]
    await until(lambda: not listener.connections)
    await stopped(listener)


async def test_what_an_async_handler_raises_goes_to_error(wire: Wire) -> None:
    """B119: and the socket stays open."""

    async def data(socket: uvsock.Socket[Any], chunk: bytes) -> None:
        await asyncio.sleep(0)
        raise OOPS

    server = Recorder(data=data)
    listener, socket = await linked(wire, server, Recorder())
    for count in (1, 2):
        socket.write(b"x")
        await until(lambda count=count: len(server.errors) == count)
    assert server.errors == [OOPS, OOPS]
    assert server.socket.ready_state is ReadyState.ESTABLISHED
    await stopped(listener)


# ── Time ───────────────────────────────────────────────────────────────────────────────────────


async def test_timeout_counts_in_milliseconds_and_only_tells(wire: Wire) -> None:
    """B122: the handler can write, and the socket stays open."""
    server = Recorder(timeout=lambda socket: socket.write(b"time"))
    client = Recorder()
    listener, _ = await linked(wire, server, client)
    started = time.monotonic()
    server.socket.timeout(0.02)
    await until(lambda: client.received == b"time")
    assert 0.018 <= time.monotonic() - started < 1
    assert server.socket.ready_state is ReadyState.ESTABLISHED
    await stopped(listener)


async def test_timeout_is_one_shot_from_the_call(wire: Wire) -> None:
    """B123: traffic does not move it, another call does, and 0 turns it off."""
    times: list[float] = []
    server = Recorder(timeout=lambda socket: times.append(time.monotonic()))
    listener, socket = await linked(wire, server, Recorder())
    started = time.monotonic()
    server.socket.timeout(0.04)
    while not times:
        socket.write(b"x")
        server.socket.write(b"x")
        await asyncio.sleep(0.005)
        assert time.monotonic() - started < 2
    assert times[0] - started >= 0.038
    server.socket.timeout(0.02)
    server.socket.timeout(0)
    await asyncio.sleep(0.06)
    assert len(times) == 1
    server.socket.timeout(0.001)
    await until(lambda: len(times) == 2)
    await stopped(listener)


async def test_without_timeout_handler_the_socket_is_closed(wire: Wire) -> None:
    """B124: in order, so that the peer sees an end."""
    server, client = Recorder(), Recorder()
    listener, socket = await linked(wire, server, client)
    server.socket.timeout(0.005)
    await soon(socket.wait_closed())
    await until(lambda: "close" in server.events)
    assert plain(client.events) == ["open", "end", "close"]
    assert server.close_errors == [None]
    await stopped(listener)


# ── Pausing ────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("where", ["open", "data", "outside"])
async def test_pause_is_not_counted_and_works_anywhere(wire: Wire, where: str) -> None:
    """B126: two pauses, one resume; what waited is delivered then, in order."""

    def pause(socket: uvsock.Socket[Any], *arguments: Any) -> None:
        if not paused:
            paused.append(socket)
            socket.pause()
            socket.pause()

    paused: list[uvsock.Socket[Any]] = []
    server = Recorder(**({} if where == "outside" else {where: pause}))
    listener, socket = await linked(wire, server, Recorder())
    if where == "outside":
        pause(server.socket)
    if where == "data":
        socket.write(b"0")
        await until(lambda: paused)
        server.received.clear()
    for number in (b"1", b"2", b"3"):
        socket.write(number)
        socket.flush()
    await asyncio.sleep(0.01)
    assert server.received == b""
    assert socket.bytes_read == 0
    server.socket.resume()
    await until(lambda: server.received == b"123")
    await stopped(listener)


async def test_the_peers_end_waits_for_resume(wire: Wire) -> None:
    """B127: then `data`, `end`, `close`."""
    server = Recorder(open=lambda socket: socket.pause())
    listener, socket = await linked(wire, server, Recorder())
    socket.end(b"before the end")
    await asyncio.sleep(0.02)
    assert plain(server.events) == ["open"]
    assert server.socket.ready_state is ReadyState.ESTABLISHED
    server.socket.resume()
    await soon(socket.wait_closed())
    await until(lambda: server.events[-1] == "close")
    assert plain(server.events) == ["open", "data", "end", "close"]
    assert server.received == b"before the end"
    await stopped(listener)


@LINUX  # other systems drop what was received before a reset
@pytest.mark.parametrize("writing", [False, True])
async def test_a_reset_while_paused(tcp_wire: Wire, writing: bool) -> None:
    """B128, B129: what had come is delivered although the socket is paused, then `close`."""
    server = Recorder()
    listener, peer = await dialled(tcp_wire, server)
    server.socket.pause()
    if writing:
        fill(server.socket)
    peer.sendall(b"queued")
    await asyncio.sleep(0.005)
    reset(peer)
    await until(lambda: "close" in server.events)
    assert server.events == ["open", "data", "close"]
    assert server.received == b"queued"
    assert isinstance(server.close_errors[0], ConnectionResetError)
    await stopped(listener)


@LINUX
async def test_a_paused_socket_costs_no_wakeups(plain_wire: Wire) -> None:
    """B130: 200 segments of a byte, while the loop's thread sleeps."""
    server = Recorder()
    listener, peer = await dialled(plain_wire, server)
    server.socket.pause()

    def wakeups() -> int:
        return resource.getrusage(resource.RUSAGE_THREAD).ru_nvcsw

    def send() -> None:
        peer.setsockopt(stdlib.SOL_SOCKET, stdlib.SO_SNDBUF, 1 << 20)
        for _ in range(200):
            peer.send(b"x")
            time.sleep(0.0002)

    await asyncio.sleep(0.01)
    before = wakeups()
    await asyncio.to_thread(send)
    assert wakeups() - before < 50
    assert server.events == ["open"]
    server.socket.resume()
    await until(lambda: len(server.received) == 200)
    peer.close()
    await until(lambda: "close" in server.events)
    await stopped(listener)


# ── What keeps the program alive ───────────────────────────────────────────────────────────────


@pytest.mark.parametrize("what", ["listener", "socket", "socket of a stopped listener"])
@pytest.mark.parametrize("referenced", [True, False, None])
def test_what_keeps_run_going(what: str, referenced: bool | None) -> None:
    """B133: a listener and a socket do, unless `unref`; `ref` restores it."""
    order: list[str] = []

    def release(listener: uvsock.Listener) -> None:
        order.append("released")
        listener.stop(True)

    async def main() -> None:
        server = Recorder()
        listener = await uvsock.listen(server.table(), "127.0.0.1", 0)
        if what == "listener":
            held: list[Any] = [listener]
        else:
            socket = await uvsock.connect(IGNORE, "127.0.0.1", listener.port)
            await until(lambda: server.sockets)
            held = [socket, server.socket]
            if what == "socket":
                listener.unref()
            else:
                listener.stop()
        if referenced is not True:
            for thing in held:
                thing.unref()
        if referenced is None:
            held[0].ref()
        asyncio.get_running_loop().call_later(0.03, release, listener)
        order.append("main is over")

    uvsock.run(main())
    order.append("run is over")
    expected = ["main is over", "released", "run is over"]
    if referenced is False:
        expected.remove("released")
    assert order == expected


async def test_an_unreferenced_listener_keeps_accepting(wire: Wire) -> None:
    """B134: nobody holds the object, and the collector has looked."""
    server = Recorder(data=echo)
    listener = await wire.listen(server.table())
    known = weakref.ref(listener)
    listener.unref()
    where = listener
    del listener
    for _ in range(3):
        gc.collect()
        client = Recorder()
        socket = await wire.connect(where, client.table())
        socket.write(b"x")
        await until(lambda client=client: client.received == b"x")
        socket.end()
        await soon(socket.wait_closed())
        if where is known():
            # What is needed to connect, without the listener itself.
            where = Address(where)  # type: ignore[assignment]
    gc.collect()
    left = known()
    assert left is not None
    await stopped(left)


class Address:
    """Where a listener listens."""

    def __init__(self, listener: uvsock.Listener) -> None:
        self.hostname, self.port, self.unix = listener.hostname, listener.port, listener.unix


async def test_an_open_socket_needs_no_reference(wire: Wire) -> None:
    """B135, B228: its handlers run; after `close` nothing holds it any more."""
    heard: list[bytes] = []
    listener = await wire.listen(ECHO)
    alive = weakref.ref(
        await wire.connect(listener, {"data": lambda socket, data: heard.append(data)})
    )
    for _ in range(3):
        gc.collect()
    await until(lambda: listener.connections)
    await until(lambda: any(socket.write(b"there") == 5 for socket in listener.sockets))
    await until(lambda: heard == [b"there"])
    socket = alive()
    assert socket is not None
    socket.end()
    await soon(socket.wait_closed())
    del socket
    await until(lambda: alive() is None)
    await stopped(listener)


# ── Reload ─────────────────────────────────────────────────────────────────────────────────────


async def test_reload_replaces_the_whole_set(wire: Wire) -> None:
    """B136: what the new table leaves out is gone; `binary_type` is an option and stays."""
    old = Recorder()
    kinds: list[type] = []
    listener, socket = await linked(wire, old, Recorder(), binary_type="bytearray")
    before = list(old.events)
    listener.reload({"data": lambda socket, data: kinds.append(type(data))})
    socket.write(b"x")
    await until(lambda: kinds)
    socket.end()
    await soon(socket.wait_closed())
    await until(lambda: not listener.connections)
    assert old.events == before
    assert kinds == [bytearray]
    await stopped(listener)


async def test_reload_takes_the_table_itself(wire: Wire) -> None:
    """B137, B138, B139: anything else raises and changes nothing."""
    server, client = Recorder(data=echo), Recorder()
    listener, socket = await linked(wire, server, client)
    for call in (listener.reload, socket.reload, server.socket.reload):
        for wrong in ({"socket": IGNORE}, {"open": ignore}, {"data": 1}, None, "text"):
            with pytest.raises(TypeError, match="^handlers: "):
                call(wrong)
        with pytest.raises(TypeError):
            call()
        with pytest.raises(TypeError):
            call(IGNORE, data=1)
    socket.write(b"as before")
    await until(lambda: client.received == b"as before")
    await stopped(listener)


async def test_whom_a_reload_reaches(wire: Wire) -> None:
    """B140: a listener's all its sockets, an accepted socket's too, a client's itself only."""
    listener = await wire.listen(IGNORE)
    tables = [Recorder(), Recorder()]
    clients = [await wire.connect(listener, table.table()) for table in tables]
    await until(lambda: listener.connections == 2)
    answer = 0

    async def heard() -> set[bytes]:
        for table in tables:
            table.received.clear()
        for client in clients:
            client.write(b"?")
        await until(lambda: all(table.received for table in tables))
        return {bytes(table.received) for table in tables}

    reloads = (listener.reload, next(iter(listener.sockets)).reload)
    for number, reload in enumerate(reloads, answer + 1):
        reload({"data": lambda socket, data, text=b"%d" % number: socket.write(text)})
        assert await heard() == {b"%d" % number}
    own: list[bytes] = []
    clients[0].reload({"data": lambda socket, data: own.append(data)})
    tables[0].received.clear()
    for client in clients:
        client.write(b"?")
    await until(lambda: own and tables[1].received.endswith(b"22"))
    assert tables[0].received == b""
    await stopped(listener)


async def test_a_running_call_finishes_on_the_old_set(wire: Wire) -> None:
    """B141, B142: the next event uses the new one, and the counters stay right."""
    calls: list[str] = []

    def old(socket: uvsock.Socket[Any], data: bytes) -> None:
        listener.reload({"data": lambda socket, data: calls.append("new")})
        calls.append("old")

    listener = await wire.listen({"data": old})
    client = await wire.connect(listener, IGNORE)
    for count in (1, 2, 3):
        client.write(b"x")
        await until(lambda count=count: len(calls) == count)
        assert listener.connections == 1
    assert calls == ["old", "new", "new"]
    client.end()
    await soon(client.wait_closed())
    await until(lambda: listener.connections == 0)
    assert listener.stats.accepted == 1
    await stopped(listener)


async def test_a_getter_that_closes_the_socket_during_reload(wire: Wire) -> None:
    """B143: it does no harm, and `close` of the old set is called."""
    client = Recorder()
    listener = await wire.listen(IGNORE)
    socket = await wire.connect(listener, client.table())

    class Sly:
        @property
        def data(self) -> Any:
            socket.terminate()
            raise LookupError("no table after all")

    with pytest.raises(LookupError):
        socket.reload(Sly())
    await soon(socket.wait_closed())
    assert client.events[-1] == "close"
    await stopped(listener)


async def test_reload_of_what_is_closed_is_checked_and_taken(wire: Wire) -> None:
    """B144: on a closed socket as on a stopped listener."""
    server, client = Recorder(), Recorder()
    listener, socket = await linked(wire, server, client)
    listener.stop()
    with pytest.raises(TypeError, match="^handlers: "):
        listener.reload({})
    new = uvsock.Handlers(data=echo)
    listener.reload(new)
    assert listener.handlers is new
    socket.write(b"x")
    await until(lambda: client.received == b"x")
    socket.end()
    await soon(socket.wait_closed())
    with pytest.raises(TypeError, match="^handlers: "):
        socket.reload({})
    socket.reload(new)
    await stopped(listener)


# ── Stopping ───────────────────────────────────────────────────────────────────────────────────


async def test_stop_leaves_live_sockets_alone(wire: Wire) -> None:
    """B145: new connections are refused at once; it can be repeated; `stop(True)` closes them."""
    server, client = Recorder(data=echo), Recorder()
    listener, socket = await linked(wire, server, client)
    for _ in range(2):
        listener.stop()
        with pytest.raises((ConnectionRefusedError, FileNotFoundError)):
            await wire.connect(listener, IGNORE)
    socket.write(b"still")
    await until(lambda: client.received == b"still")
    listener.stop(True)
    await soon(socket.wait_closed())
    await soon(listener.wait_closed())


@pytest.mark.parametrize("inside", [False, True])
async def test_stop_true_calls_close_later(wire: Wire, inside: bool) -> None:
    """B146, B148: without an error; the peers get what was written, then an end."""

    def opened(socket: uvsock.Socket[Any]) -> None:
        socket.write(b"welcome")
        if inside:
            stop()

    def stop() -> None:
        listener.stop(True)
        order.extend(plain(server.events))

    order: list[str] = []
    server, client = Recorder(open=opened), Recorder()
    listener = await wire.listen(server.table())
    socket = await wire.connect(listener, client.table())
    await until(lambda: server.sockets)
    if not inside:
        stop()
    await soon(socket.wait_closed())
    await soon(listener.wait_closed())
    assert order == ["open"]
    assert plain(server.events) == ["open", "close"]
    assert server.close_errors == [None]
    assert client.received == b"welcome"
    assert plain(client.events) == ["open", "data", "end", "close"]


async def test_stop_takes_a_boolean_and_async_with_stops(wire: Wire) -> None:
    """B147: 1 is an error, and leaving the block closes the sockets."""
    server, client = Recorder(), Recorder()
    async with await wire.listen(server.table()) as listener:
        with pytest.raises(TypeError, match="^close_active_connections: "):
            listener.stop(1)  # type: ignore[arg-type]
        socket = await wire.connect(listener, client.table())
        await until(lambda: server.sockets)  # with TLS its handshake takes longer than ours
    assert listener.connections == 0
    await soon(socket.wait_closed())
    assert plain(client.events) == ["open", "end", "close"]


async def test_close_handlers_close_siblings_while_stop_runs(wire: Wire) -> None:
    """B149: each socket closes once, also if they stop the listener again."""

    def close(socket: uvsock.Socket[Any], error: OSError | None) -> None:
        listener.stop(True)
        for sibling in listener.sockets:
            sibling.terminate()

    server = Recorder(close=close)
    listener = await wire.listen(server.table())
    clients = [await wire.connect(listener, IGNORE) for _ in range(10)]
    await until(lambda: listener.stats.accepted == 10 == server.events.count("open"))
    listener.stop(True)
    for client in clients:
        await soon(client.wait_closed())
    await soon(listener.wait_closed())
    closed = [call[1] for call in server.calls if call[0] == "close"]
    assert len(closed) == len(set(closed)) == 10


# ── Properties ─────────────────────────────────────────────────────────────────────────────────


async def test_data_of_a_listener_is_one_object_for_all(wire: Wire) -> None:
    """B151, B152: until it is assigned, which changes later sockets only, or its own alone."""
    shared: dict[str, Any] = {}
    server = Recorder()
    listener = await wire.listen(server.table(), data=shared)
    clients = [await wire.connect(listener, IGNORE) for _ in range(2)]
    await until(lambda: len(server.sockets) == 2)
    assert listener.data is shared
    assert all(socket.data is shared for socket in server.sockets)
    server.socket.data = "own"
    assert listener.data is server.sockets[0].data is shared
    listener.data = "later"
    assert server.sockets[0].data is shared
    clients.append(await wire.connect(listener, IGNORE))
    await until(lambda: len(server.sockets) == 3)
    assert [socket.data for socket in server.sockets] == [shared, "own", "later"]
    assert all(client.data is None for client in clients)
    await stopped(listener)


async def test_data_factory_makes_one_per_connection(wire: Wire) -> None:
    """B151: what people expect of `data`."""
    server = Recorder()
    listener = await wire.listen(server.table(), data_factory=list)
    for _ in range(2):
        await wire.connect(listener, IGNORE)
    await until(lambda: len(server.sockets) == 2)
    first, second = (socket.data for socket in server.sockets)
    assert first == second == []
    assert first is not second
    await stopped(listener)


async def test_the_listener_of_a_socket(wire: Wire) -> None:
    """B153: also after `stop`; None on clients and once closed."""
    seen: list[Any] = []
    server = Recorder(close=lambda socket, error: seen.append(socket.listener))
    listener, socket = await linked(wire, server, Recorder())
    assert server.socket.listener is listener
    assert socket.listener is None
    listener.stop()
    assert server.socket.listener is listener
    socket.end()
    await soon(socket.wait_closed())
    await until(lambda: seen)
    await soon(listener.wait_closed())
    assert server.socket.listener is None


async def test_ready_states(wire: Wire) -> None:
    """B155: from `open` on, after one's own end, and in `close`."""
    states: list[ReadyState] = []

    def note(socket: uvsock.Socket[Any], *arguments: Any) -> None:
        states.append(socket.ready_state)

    listener = await wire.listen({"data": ignore, "end": lambda socket: None})
    table = dict.fromkeys(("open", "data", "end", "close"), note)
    socket = await wire.connect(listener, table)
    note(socket)
    socket.end()
    note(socket)
    await soon(socket.wait_closed())
    assert [int(state) for state in states] == [1, 1, -2, -2, 0]
    assert states[-1] is ReadyState.CLOSED
    assert [int(state) for state in ReadyState] == [-2, -1, 0, 1, 2]
    await stopped(listener)


@pytest.mark.parametrize(("host", "family"), [("127.0.0.1", "IPv4"), ("::1", "IPv6")])
async def test_addresses_of_both_sides(host: str, family: str) -> None:
    """B156: each other's, with their families."""
    server = Recorder()
    async with await uvsock.listen(server.table(), host, 0) as listener:
        socket = await uvsock.connect(IGNORE, host, listener.port)
        await until(lambda: server.sockets)
        accepted = server.socket
        assert socket.remote_address == accepted.remote_address == host
        assert socket.local_address == accepted.local_address == host
        assert socket.remote_port == accepted.local_port == listener.port
        assert socket.local_port == accepted.remote_port
        assert {socket.remote_family, socket.local_family, accepted.remote_family} == {family}


async def test_unix_sockets_have_no_addresses(unix_wire: Wire) -> None:
    """B157: all six are None, on both sides."""
    server = Recorder()
    listener, socket = await linked(unix_wire, server, Recorder())
    for end in (socket, server.socket):
        for side in ("local", "remote"):
            for part in ("address", "port", "family"):
                assert getattr(end, f"{side}_{part}") is None
    await stopped(listener)


async def test_addresses_outlive_the_connection(tcp_wire: Wire) -> None:
    """B158: the system has forgotten them after a reset that was not told yet."""
    server = Recorder()
    listener, peer = await dialled(tcp_wire, server)
    port = peer.getsockname()[1]
    reset(peer)
    with stdlib.socket(fileno=os.dup(server.socket.fileno())) as same, pytest.raises(OSError):
        same.getpeername()
    assert server.socket.remote_port == port
    await until(lambda: "close" in server.events)
    assert server.socket.remote_port == port
    await stopped(listener)


def option(socket: uvsock.Socket[Any], level: int, name: int) -> int:
    value: int = socket.get_extra_info("socket").getsockopt(level, name)
    return value


async def test_options_of_a_connection(tcp_wire: Wire) -> None:
    """B160, B161, B162: Nagle's algorithm is off; delays are seconds; the rest by setsockopt."""
    server = Recorder()
    listener, socket = await linked(tcp_wire, server, Recorder())
    tcp, level = stdlib.IPPROTO_TCP, stdlib.SOL_SOCKET
    for end in (socket, server.socket):
        assert option(end, tcp, stdlib.TCP_NODELAY)
        assert end.set_no_delay(False)
        assert not option(end, tcp, stdlib.TCP_NODELAY)
        assert end.set_no_delay()
        assert option(end, tcp, stdlib.TCP_NODELAY)
    idle = getattr(stdlib, "TCP_KEEPIDLE", getattr(stdlib, "TCP_KEEPALIVE", 0))
    assert not option(socket, level, stdlib.SO_KEEPALIVE)
    assert socket.set_keep_alive(True, 4)
    assert option(socket, level, stdlib.SO_KEEPALIVE)
    assert option(socket, tcp, idle) == 4
    assert socket.set_keep_alive(True)
    assert option(socket, tcp, idle) == 4
    assert socket.set_keep_alive(False)
    assert not option(socket, level, stdlib.SO_KEEPALIVE)
    with pytest.raises(ValueError, match="^initial_delay: "):
        socket.set_keep_alive(True, -1)
    with pytest.raises(TypeError, match="^initial_delay: "):
        socket.set_keep_alive(True, "1")  # type: ignore[arg-type]
    socket.get_extra_info("socket").setsockopt(stdlib.IPPROTO_IP, stdlib.IP_TOS, 0x10)
    assert option(socket, stdlib.IPPROTO_IP, stdlib.IP_TOS) == 0x10
    await stopped(listener)


async def test_only_data_can_be_assigned(wire: Wire) -> None:
    """B163: the other properties are read only, and a socket takes no further attributes."""
    listener = await wire.listen(IGNORE)
    socket = await wire.connect(listener, IGNORE)
    names = [name for name in dir(uvsock.Socket) if not name.startswith("_") and name != "data"]
    assert {"ready_state", "remote_port", "bytes_written", "listener", "write"} <= set(names)
    for name in (*names, "extra"):
        with pytest.raises(AttributeError):
            setattr(socket, name, 1)
    socket.data = 1
    assert socket.data == 1
    await stopped(listener)


# ── Unix sockets ───────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("close", [False, True])
async def test_the_file_is_made_and_removed(unix_wire: Wire, close: bool) -> None:
    """B202: each listener removes its own, also with live connections."""
    listeners = [await unix_wire.listen(IGNORE) for _ in range(3)]
    socket = await unix_wire.connect(listeners[0], IGNORE)
    paths = [listener.unix or "" for listener in listeners]
    assert all(stat.S_ISSOCK(os.stat(path).st_mode) for path in paths)
    for number, listener in enumerate(listeners):
        listener.stop(close)
        assert [os.path.exists(path) for path in paths] == [n > number for n in range(3)]
    socket.end()
    await soon(socket.wait_closed())


async def test_what_is_at_the_path_before(unix_wire: Wire) -> None:
    """B203: a live socket and a regular file are in use, a stale socket is replaced."""
    live = await unix_wire.listen(ECHO)
    regular = unix_wire.directory / "regular"
    regular.write_text("mine")
    stale = unix_wire.directory / "stale"
    with stdlib.socket(stdlib.AF_UNIX) as sock:
        sock.bind(str(stale))
    for path in (live.unix, regular):
        with pytest.raises(OSError, match=re.escape(str(path))) as caught:
            await uvsock.listen(IGNORE, unix=path)
        assert caught.value.errno == errno.EADDRINUSE
    assert regular.read_text() == "mine"
    await stopped(await uvsock.listen(IGNORE, unix=stale))
    client = await unix_wire.connect(live, IGNORE)
    client.write(b"x")
    await until(lambda: client.bytes_read == 1)
    await stopped(live)


async def test_stop_removes_its_own_file_only(unix_wire: Wire) -> None:
    """B204: not what somebody else has put there, nor a file that was renamed."""
    renamed = unix_wire.directory / "renamed"
    listener = await unix_wire.listen(IGNORE)
    path = Path(listener.unix or "")
    path.rename(renamed)
    path.write_text("foreign")
    await stopped(listener)
    assert path.read_text() == "foreign"
    assert renamed.exists()


def test_the_file_is_removed_at_the_end_of_the_program(unix_wire: Wire) -> None:
    """B205: of a listener that nobody stopped."""
    path = unix_wire.directory / "left"

    async def main() -> None:
        (await uvsock.listen(IGNORE, unix=path)).unref()
        assert path.exists()

    uvsock.run(main())
    assert not path.exists()


@CALLS
def test_paths_that_cannot_be(call: Callable[..., Any], unix_wire: Wire) -> None:
    """B206, B207: too long ones, with the limit, and those with a NUL; nothing is made."""
    for path in (f"{unix_wire.directory}/{'x' * 150}", "x" * 200):
        with pytest.raises(ValueError, match=r"^unix: .* at most 10[37] bytes, not \d+"):
            call(IGNORE, unix=path)
    for path in (f"{unix_wire.directory}/a\0b", f"{unix_wire.directory}/a\0"):
        with pytest.raises(ValueError, match="^unix: must be without null bytes"):
            call(IGNORE, unix=path)
    assert list(unix_wire.directory.iterdir()) == []


@LINUX
async def test_abstract_names(unix_wire: Wire) -> None:
    """B207: they begin with a NUL, and leave no file."""
    name = f"\0uvsock-{os.getpid()}"
    listener = await uvsock.listen(ECHO, unix=name)
    assert listener.unix == name
    client = await uvsock.connect(IGNORE, unix=name)
    client.write(b"x")
    await until(lambda: client.bytes_read == 1)
    await stopped(listener)
    await stopped(await uvsock.listen(ECHO, unix=name))


@pytest.mark.parametrize("mask", [0o022, 0o077, 0o000])
async def test_the_umask_decides_about_the_files_mode(unix_wire: Wire, mask: int) -> None:
    """B208: nothing else changes it."""
    before = os.umask(mask)
    try:
        listener = await unix_wire.listen(IGNORE)
    finally:
        os.umask(before)
    assert stat.S_IMODE(os.stat(listener.unix or "").st_mode) == 0o777 & ~mask
    await stopped(listener)


# ── The sink ────────────────────────────────────────────────────────────────────────────────────


def test_the_sink_gives_the_bytes_written_in_order() -> None:
    """B210, B211, B212, B217: counts and views; the mark is a hint."""
    sink = BufferSink()
    sink.start(high_water_mark=2)
    assert sink.write("text ") == 5
    assert sink.write(memoryview(b"0123456789")[3:7]) == 4
    assert sink.write(b"") == 0
    expected = b"text 3456"
    for number in range(1000):
        assert sink.write(b"x" * number) == number
        expected += b"x" * number
    assert len(sink) == len(expected)
    assert sink.end() == expected


def test_streaming_flushes_are_independent() -> None:
    """B215, B216, B219: `start` in the middle drops what was not flushed, and sets all options."""
    sink = BufferSink()
    sink.start(stream=True)
    sink.write(b"one")
    first = sink.flush()
    sink.write(b"two")
    assert (first, sink.flush(), sink.flush()) == (b"one", b"two", b"")
    sink.write(b"dropped")
    sink.start(as_bytes=True)
    sink.write(b"kept")
    assert sink.flush() == 4
    result = sink.end()
    assert result == b"kept"
    assert type(result) is bytes
    assert first == b"one"


# ── The list ────────────────────────────────────────────────────────────────────────────────────


def numbers(text: str) -> set[int]:
    found: set[int] = set()
    for first, last in re.findall(r"\bB(\d+)(?:[-–]B?(\d+))?", text):  # noqa: RUF001
        found.update(range(int(first), int(last or first) + 1))
    return found


def test_every_behaviour_that_is_the_same_has_a_test() -> None:
    page = (Path(__file__).parents[1] / "docs/guides/from_bun.md").read_text()
    same = numbers("".join(re.findall(r"^The same.*?\n\n", page, re.MULTILINE | re.DOTALL)))
    assert len(same) > 80
    tests = "".join(path.read_text() for path in Path(__file__).parent.glob("test_*.py"))
    tested = numbers("".join(re.findall(r'""".*?"""', tests, re.DOTALL)))
    assert not same - tested
