"""`listen` and `Listener`: addresses, options, life time, and all sockets of a listener at once."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import re
import select
import socket as stdlib
import ssl
import sys
import threading
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

import uvsock
from conftest import SERVER_NAME, Authority, Recorder, Wire, open_descriptors, unused_port
from helpers import echo, ignore, soon, stopped, until
from uvsock import _bind

LINUX = pytest.mark.skipif(sys.platform != "linux", reason="Linux has abstract names")


ECHO = {"data": echo}


@contextlib.asynccontextmanager
async def listening(*arguments: Any, **options: Any) -> AsyncIterator[uvsock.Listener]:
    listener = await uvsock.listen(ECHO, *arguments, **options)
    try:
        yield listener
    finally:
        await stopped(listener)


async def answers(listener: uvsock.Listener) -> bool:
    """Whether a new connection is served."""
    try:
        if listener.unix is not None:
            reader, writer = await asyncio.open_unix_connection(listener.unix)
        else:
            reader, writer = await asyncio.open_connection(listener.hostname, listener.port)
    except OSError:
        return False
    try:
        writer.write(b"?")
        return await soon(reader.read(1)) == b"?"
    finally:
        writer.close()
        await writer.wait_closed()


def patch_lookup(monkeypatch: pytest.MonkeyPatch, *addresses: str) -> None:
    """Let every name resolve to these addresses, with the port that was asked for."""

    async def getaddrinfo(hostname: str, port: int, **hints: Any) -> list[Any]:
        assert hints["type"] == stdlib.SOCK_STREAM
        return [
            (stdlib.AF_INET6, stdlib.SOCK_STREAM, 6, "", (address, port, 0, 0))
            if ":" in address
            else (stdlib.AF_INET, stdlib.SOCK_STREAM, 6, "", (address, port))
            for address in addresses
        ]

    monkeypatch.setattr(asyncio.get_running_loop(), "getaddrinfo", getaddrinfo, raising=False)


def bound(port: int = 0) -> stdlib.socket:
    """A socket that is bound and does not listen."""
    sock = stdlib.socket()
    sock.setsockopt(stdlib.SOL_SOCKET, stdlib.SO_REUSEADDR, 1)
    sock.bind(("127.0.0.1", port))
    return sock


# ── Arguments ──────────────────────────────────────────────────────────────────────────────────

HERE = ("127.0.0.1", 0)


@pytest.mark.parametrize(
    ("arguments", "options", "error", "name"),
    [
        ((), {}, TypeError, "hostname"),
        (("127.0.0.1",), {}, TypeError, "port"),
        ((None, 80), {}, TypeError, "hostname"),
        (HERE, {"unix": "/x"}, TypeError, "unix"),
        ((b"127.0.0.1", 0), {}, TypeError, "hostname"),
        (("", 0), {}, ValueError, "hostname"),
        (("local\0host", 0), {}, ValueError, "hostname"),
        (("[::1]", 0), {}, ValueError, "hostname"),
        (("127.0.0.1", -1), {}, ValueError, "port"),
        (("127.0.0.1", 65536), {}, ValueError, "port"),
        (("127.0.0.1", "80"), {}, TypeError, "port"),
        (("127.0.0.1", False), {}, TypeError, "port"),
        ((), {"unix": 5}, TypeError, "unix"),
        ((), {"unix": ""}, ValueError, "unix"),
        ((), {"unix": "/tmp/a\0b"}, ValueError, "unix"),
        ((), {"unix": "/tmp/" + "x" * 200}, ValueError, "unix"),
        ((), {"sock": 5}, TypeError, "sock"),
        (HERE, {"backlog": 0}, ValueError, "backlog"),
        (HERE, {"backlog": 1.5}, TypeError, "backlog"),
        (HERE, {"backlog": True}, TypeError, "backlog"),
        (HERE, {"reuse_port": 1}, TypeError, "reuse_port"),
        (HERE, {"exclusive": 1}, TypeError, "exclusive"),
        (HERE, {"exclusive": True, "reuse_port": True}, ValueError, "exclusive"),
        (HERE, {"ipv6_only": None}, TypeError, "ipv6_only"),
        (HERE, {"allow_half_open": 1}, TypeError, "allow_half_open"),
        (HERE, {"binary_type": "buffer"}, ValueError, "binary_type"),
        (HERE, {"cork": 0}, TypeError, "cork"),
        (HERE, {"high_water_mark": 0}, ValueError, "high_water_mark"),
        (HERE, {"no_delay": "yes"}, TypeError, "no_delay"),
        (HERE, {"keep_alive": -1}, ValueError, "keep_alive"),
        (HERE, {"idle_timeout": 0}, ValueError, "idle_timeout"),
        (HERE, {"linger_timeout": None}, TypeError, "linger_timeout"),
        (HERE, {"data_factory": 5}, TypeError, "data_factory"),
        (HERE, {"data_factory": list, "data": []}, TypeError, "data_factory"),
        (HERE, {"tls": {}}, ValueError, "tls"),
        (HERE, {"tls": True}, ValueError, "tls"),
        (HERE, {"tls": {"nonsense": 1}}, TypeError, "tls"),
        (HERE, {"tls": 5}, TypeError, "tls"),
    ],
)
async def test_a_wrong_argument_is_named_by_the_call_itself(
    arguments: tuple[Any, ...], options: dict[str, Any], error: type[Exception], name: str
) -> None:
    with pytest.raises(error, match=rf"^{name}\b"):
        uvsock.listen(ECHO, *arguments, **options)


async def test_a_table_without_data_and_drain_is_refused_by_the_call_itself() -> None:
    with pytest.raises(TypeError, match="^handlers"):
        uvsock.listen({"open": ignore}, *HERE)


@pytest.mark.parametrize("tls", [None, False])
async def test_tls_none_and_false_mean_plain(tls: Any) -> None:
    async with listening(*HERE, tls=tls) as listener:
        assert await answers(listener)
        client = await uvsock.connect({"data": ignore}, listener.hostname, listener.port, tls=tls)
        assert client.encrypted is False
        client.end()
        await soon(client.wait_closed())


async def test_it_needs_a_loop_of_uvloops() -> None:
    def run() -> None:
        asyncio.run(uvsock.listen(ECHO, *HERE))

    with pytest.raises(RuntimeError, match="uvloop"):
        await asyncio.to_thread(run)


# ── Addresses ──────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("hostname", ["127.0.0.1", "::1", "localhost", "0.0.0.0", "::"])
async def test_host_names_and_addresses(hostname: str) -> None:
    async with listening(hostname, 0) as listener:
        assert listener.hostname == hostname
        assert listener.port
        assert listener.unix is None
        assert await answers(listener)
        assert f"{hostname} port {listener.port}" in repr(listener)


async def test_every_address_of_a_name_is_bound_on_one_port() -> None:
    found = {info[4][0] for info in stdlib.getaddrinfo("localhost", 0, type=stdlib.SOCK_STREAM)}
    async with listening("localhost", 0) as listener:
        for address in found:
            reader, writer = await asyncio.open_connection(address, listener.port)
            writer.write(b"?")
            assert await soon(reader.read(1)) == b"?"
            writer.close()


async def test_several_addresses_share_one_port_and_the_listener(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """An address that came twice is bound once; IPv6 leaves IPv4 alone without being asked to."""
    addresses = ("127.0.0.1", "::1", "127.0.0.2", "127.0.0.1")
    patch_lookup(monkeypatch, *addresses)
    listener = await uvsock.listen(ECHO, "several.test", 0)
    monkeypatch.undo()
    assert listener.hostname == "several.test"
    for address in addresses:
        with stdlib.create_connection((address, listener.port), 5) as peer:
            peer.sendall(b"?")
            assert await soon(asyncio.to_thread(peer.recv, 1)) == b"?"
    assert listener.stats.accepted == 4
    await stopped(listener)
    for address in addresses:
        with pytest.raises(ConnectionRefusedError):
            stdlib.create_connection((address, listener.port), 5)


async def test_an_address_that_this_machine_lacks_is_left_out_while_another_works(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    patch_lookup(monkeypatch, "2001:db8::7", "127.0.0.1")
    async with await uvsock.listen(ECHO, "several.test", 0) as listener:
        with stdlib.create_connection(("127.0.0.1", listener.port), 5) as peer:
            peer.sendall(b"?")
            assert await soon(asyncio.to_thread(peer.recv, 1)) == b"?"
    patch_lookup(monkeypatch, "2001:db8::7", "2001:db8::8")
    with pytest.raises(OSError, match="2001:db8::8 port 0") as caught:
        await uvsock.listen(ECHO, "several.test", 0)
    assert caught.value.errno == errno.EADDRNOTAVAIL


async def test_one_address_of_several_in_use_fails_it_all_and_names_that_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    port = unused_port("127.0.0.1", "127.0.0.2", "127.0.0.3")
    with stdlib.create_server(("127.0.0.2", port)):
        before = open_descriptors()
        patch_lookup(monkeypatch, "127.0.0.1", "127.0.0.2", "127.0.0.3")
        with pytest.raises(OSError, match=f"127.0.0.2 port {port}") as caught:
            await uvsock.listen(ECHO, "several.test", port)
        assert caught.value.errno == errno.EADDRINUSE
        assert open_descriptors() == before


async def test_another_port_is_picked_when_one_address_of_several_has_it_taken(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Port 0 picks for the first address; for the second that port may be another's."""
    taken: list[stdlib.socket] = []
    bound = _bind.bound

    def bind(info: Any, **options: Any) -> stdlib.socket:
        host, port = info[4]
        if host == "127.0.0.2" and len(taken) < 3:
            taken.append(stdlib.create_server(("127.0.0.2", port)))
        return bound(info, **options)

    monkeypatch.setattr(_bind, "bound", bind)
    patch_lookup(monkeypatch, "127.0.0.1", "127.0.0.2")
    try:
        async with await uvsock.listen(ECHO, "several.test", 0) as listener:
            assert len(taken) == 3
            assert listener.port not in [sock.getsockname()[1] for sock in taken]
            for address in ("127.0.0.1", "127.0.0.2"):
                stdlib.create_connection((address, listener.port), 5).close()
    finally:
        for sock in taken:
            sock.close()


async def test_ipv6_only_leaves_ipv4_alone() -> None:
    async with listening("::", 0, ipv6_only=True) as six:
        with pytest.raises(ConnectionRefusedError):
            stdlib.create_connection(("127.0.0.1", six.port), 5)
    # The same port of the other family is still free.
    port = unused_port("0.0.0.0")
    async with (
        listening("::", port, ipv6_only=True) as six,
        listening("0.0.0.0", port) as four,
    ):
        assert await answers(six)
        assert await answers(four)
    async with listening("::", 0) as both:
        with pytest.raises(OSError, match=f"0.0.0.0 port {both.port}"):
            await uvsock.listen(ECHO, "0.0.0.0", both.port)
        reader, writer = await asyncio.open_connection("127.0.0.1", both.port)
        writer.write(b"?")
        assert await soon(reader.read(1)) == b"?"
        (socket,) = both.sockets
        assert socket.remote_family == "IPv6"
        assert socket.remote_address == "::ffff:127.0.0.1"
        writer.close()


async def test_an_address_in_use_names_itself() -> None:
    async with listening("127.0.0.1", 0) as listener:
        before = open_descriptors()
        with pytest.raises(OSError, match=f"127.0.0.1 port {listener.port}") as caught:
            await uvsock.listen(ECHO, "127.0.0.1", listener.port)
        assert caught.value.errno == errno.EADDRINUSE
        with pytest.raises(OSError, match="192.0.2.1 port 0") as caught:
            await uvsock.listen(ECHO, "192.0.2.1", 0)
        assert caught.value.errno == errno.EADDRNOTAVAIL
        assert open_descriptors() == before
    with pytest.raises(stdlib.gaierror, match=r"cannot resolve 'no-such-name\.invalid'"):
        await uvsock.listen(ECHO, "no-such-name.invalid", 0)


async def test_the_address_is_free_at_once_after_stop(wire: Wire) -> None:
    """Also with a connection that is still open, and one that was just closed."""
    listener = await wire.listen(ECHO)
    client = await wire.connect(listener, {"data": ignore})
    for _ in range(3):
        listener.stop()
        again: dict[str, Any] = {"tls": wire.authority.server_options} if wire.encrypted else {}
        if listener.unix is not None:
            new = await uvsock.listen(ECHO, unix=listener.unix)
        else:
            new = await uvsock.listen(ECHO, listener.hostname, listener.port, **again)
        other = await wire.connect(new, {"data": ignore})
        other.end()
        await soon(other.wait_closed())
        new.stop()
        listener = new
    assert client.write(b"still open") == 10
    await until(lambda: client.bytes_read == 10)
    client.end()
    await soon(client.wait_closed())


async def test_reuse_port_shares_the_port() -> None:
    async with listening("127.0.0.1", 0, reuse_port=True) as one:
        async with listening("127.0.0.1", one.port, reuse_port=True) as two:
            assert one.port == two.port
            for _ in range(40):
                assert await answers(one)
            assert one.stats.accepted + two.stats.accepted == 40
            assert one.stats.accepted > 0
            assert two.stats.accepted > 0
        with pytest.raises(OSError, match="port"):
            await uvsock.listen(ECHO, "127.0.0.1", one.port)
        with pytest.raises(OSError, match="port"):
            await uvsock.listen(ECHO, "127.0.0.1", one.port, exclusive=True)


async def test_an_exclusive_port_is_not_shared() -> None:
    async with listening("127.0.0.1", 0, exclusive=True) as listener:
        for options in ({}, {"exclusive": True}, {"reuse_port": True}):
            with pytest.raises(OSError, match=f"127.0.0.1 port {listener.port}") as caught:
                await uvsock.listen(ECHO, "127.0.0.1", listener.port, **options)
            assert caught.value.errno == errno.EADDRINUSE
        assert await answers(listener)


async def test_a_port_is_not_shared_with_a_listener_that_does_not_want_it() -> None:
    async with listening("127.0.0.1", 0) as listener:
        with pytest.raises(OSError, match=f"127.0.0.1 port {listener.port}"):
            await uvsock.listen(ECHO, "127.0.0.1", listener.port, reuse_port=True)


@pytest.mark.parametrize("listened", [False, True])
@pytest.mark.parametrize("family", [stdlib.AF_INET, stdlib.AF_UNIX])
async def test_a_socket_of_ones_own(family: Any, listened: bool, unix_wire: Wire) -> None:
    sock = stdlib.socket(family)
    path = str(unix_wire.directory / "mine")
    sock.bind(path if family == stdlib.AF_UNIX else ("127.0.0.1", 0))
    if listened:
        sock.listen(5)
    async with listening(sock=sock) as listener:
        assert listener.unix == (path if family == stdlib.AF_UNIX else None)
        assert await answers(listener)
    assert sock.fileno() == -1
    # The file was made by the caller, and is the caller's.
    assert os.path.exists(path) == (family == stdlib.AF_UNIX)


async def test_a_socket_of_ones_own_that_cannot_listen_is_an_error_with_its_address() -> None:
    """Two sockets may be bound to one address; only one of them may listen."""
    before = open_descriptors()
    with bound() as first, bound(port=first.getsockname()[1]) as second:
        port = first.getsockname()[1]
        first.listen()
        with pytest.raises(OSError, match=f"127.0.0.1 port {port}") as caught:
            await uvsock.listen(ECHO, sock=second)
        assert caught.value.errno == errno.EADDRINUSE
    assert open_descriptors() == before


async def test_hostname_and_port_of_a_socket_of_ones_own_are_those_it_is_bound_to() -> None:
    sock = bound()
    port = sock.getsockname()[1]
    async with listening(sock=sock) as listener:
        assert (listener.hostname, listener.port) == ("127.0.0.1", port)


# ── Unix sockets ───────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("kind", [str, bytes, Path])
async def test_the_file_of_a_unix_socket_lives_as_long_as_its_listener(
    kind: Any, unix_wire: Wire
) -> None:
    path = unix_wire.directory / "s"
    async with listening(unix=os.fsencode(path) if kind is bytes else kind(path)) as listener:
        assert listener.unix == str(path)
        assert (listener.hostname, listener.port) == (None, None)
        assert str(path) in repr(listener)
        assert await answers(listener)
        _, writer = await asyncio.open_unix_connection(path)
        await until(lambda: listener.connections)
        (socket,) = listener.sockets
        assert socket.remote_address is socket.local_port is socket.remote_family is None
        listener.stop()
        assert not path.exists()
        writer.close()


async def test_a_stale_file_is_replaced_and_a_live_one_is_not(unix_wire: Wire) -> None:
    path = unix_wire.directory / "s"
    stale = stdlib.socket(stdlib.AF_UNIX)
    stale.bind(str(path))
    stale.close()
    async with listening(unix=path) as listener:
        assert await answers(listener)
        with pytest.raises(OSError, match=re.escape(repr(str(path)))) as caught:
            await uvsock.listen(ECHO, unix=path)
        assert caught.value.errno == errno.EADDRINUSE
        assert await answers(listener)
    path.write_text("an ordinary file")
    with pytest.raises(OSError, match="s'") as caught:
        await uvsock.listen(ECHO, unix=path)
    assert path.read_text() == "an ordinary file"
    with pytest.raises(FileNotFoundError, match="no/such"):
        await uvsock.listen(ECHO, unix=unix_wire.directory / "no/such")


async def test_stop_leaves_the_file_of_a_successor_alone(unix_wire: Wire) -> None:
    path = unix_wire.directory / "s"
    async with listening(unix=path) as old:
        path.unlink()
        async with listening(unix=path) as new:
            old.stop()
            assert await answers(new)


async def test_stop_does_not_mind_that_the_file_is_gone_or_another_kind_of_file(
    unix_wire: Wire,
) -> None:
    path = unix_wire.directory / "s"
    async with listening(unix=path):
        path.unlink()
    async with listening(unix=path):
        path.unlink()
        path.write_text("an ordinary file")
    assert path.read_text() == "an ordinary file"


async def test_a_live_file_whose_backlog_is_full_is_not_replaced(unix_wire: Wire) -> None:
    path = unix_wire.directory / "s"
    waiting = []
    with stdlib.socket(stdlib.AF_UNIX) as live:
        live.bind(str(path))
        live.listen(0)
        try:
            for _ in range(3):
                waiting.append(stdlib.socket(stdlib.AF_UNIX))
                waiting[-1].setblocking(False)
                waiting[-1].connect_ex(str(path))
            inode = path.stat().st_ino
            with pytest.raises(OSError, match=re.escape(repr(str(path)))) as caught:
                await uvsock.listen(ECHO, unix=path)
            assert caught.value.errno == errno.EADDRINUSE
            assert path.stat().st_ino == inode
        finally:
            for sock in waiting:
                sock.close()


@LINUX
async def test_a_path_that_is_no_utf8(unix_wire: Wire) -> None:
    path = os.fsencode(unix_wire.directory) + b"/\xff\xfe"
    async with listening(unix=path) as listener:
        assert os.fsencode(listener.unix or "") == path
        assert os.path.exists(path)
        client = await uvsock.connect({"data": ignore}, unix=path)
        client.end()
        await soon(client.wait_closed())
        with pytest.raises(OSError, match="udcff") as caught:
            await uvsock.listen(ECHO, unix=path)
        assert caught.value.errno == errno.EADDRINUSE
    assert not os.path.exists(path)


@LINUX
async def test_abstract_names() -> None:
    name = f"\0uvsock-{os.getpid()}"
    async with listening(unix=name) as listener:
        assert listener.unix == name
        client = await uvsock.connect({"data": lambda socket, data: socket.end()}, unix=name)
        client.write(b"?")
        await soon(client.wait_closed())
        assert client.bytes_read == 1
        with pytest.raises(OSError, match="uvsock"):
            await uvsock.listen(ECHO, unix=name)
    async with listening(unix=name.encode()) as listener:
        assert listener.unix == name


# ── Options that the kernel is asked about ─────────────────────────────────────────────────────


@pytest.mark.skipif(sys.platform != "linux", reason="Linux lets one connection more wait")
@pytest.mark.parametrize("own_socket", [False, True])
async def test_backlog_is_how_many_connections_wait_to_be_accepted(own_socket: bool) -> None:
    for backlog, waiting in ((3, 4), (1024, 20)):
        options: dict[str, Any] = {"backlog": backlog}
        if own_socket:
            sock = bound()
            sock.listen(1)
            listener = await uvsock.listen(ECHO, sock=sock, **options)
        else:
            listener = await uvsock.listen(ECHO, *HERE, **options)
        peers = [stdlib.socket() for _ in range(20)]
        try:
            for peer in peers:
                peer.setblocking(False)
                peer.connect_ex(("127.0.0.1", listener.port))
            # The loop does not run meanwhile, so nothing is accepted.
            assert len(select.select([], peers, [], 5)[1]) == waiting
        finally:
            for peer in peers:
                peer.close()
            await stopped(listener)


async def test_the_options_of_the_sockets_reach_the_sockets(wire: Wire) -> None:
    got: list[Any] = []
    recorder = Recorder(
        data=lambda socket, data: got.append(type(data)),
        timeout=lambda socket: socket.end(),
    )
    listener = await wire.listen(
        recorder.table("open", "data", "timeout", "close"),
        binary_type="bytearray",
        high_water_mark=1234,
        idle_timeout=0.03,
        linger_timeout=0,
        no_delay=False,
        keep_alive=True,
        cork=False,
        allow_half_open=True,
    )
    client = Recorder()
    socket = await wire.connect(listener, client.table())
    socket.write(b"x")
    await until(lambda: got)
    assert got == [bytearray]
    assert recorder.socket.high_water_mark == 1234
    assert recorder.socket.write(b"y" * 5) == 5
    assert recorder.socket.writable_length == 0  # not corked
    await soon(socket.wait_closed())
    await until(lambda: "close" in recorder.events)
    assert recorder.events == ["open", "data", "timeout", "close"]
    assert bytes(client.received) == b"yyyyy"
    await stopped(listener)


@pytest.mark.parametrize("enabled", [True, False])
async def test_no_delay(enabled: bool) -> None:
    async with listening("127.0.0.1", 0, no_delay=enabled) as listener:
        client = await uvsock.connect(
            {"data": ignore}, "127.0.0.1", listener.port, no_delay=enabled
        )
        await until(lambda: listener.connections)
        for socket in (client, *listener.sockets):
            assert option(socket, stdlib.IPPROTO_TCP, stdlib.TCP_NODELAY) == enabled
            assert socket.set_no_delay(not enabled)
            assert option(socket, stdlib.IPPROTO_TCP, stdlib.TCP_NODELAY) != enabled
        client.end()
        await soon(client.wait_closed())
        assert client.set_no_delay() is False


def option(socket: uvsock.Socket[Any], level: int, name: int) -> int:
    with stdlib.socket(fileno=os.dup(socket.fileno())) as copy:
        return copy.getsockopt(level, name)


@pytest.mark.parametrize(("value", "on", "delay"), [(None, 0, 0), (True, 1, 0), (17, 1, 17)])
async def test_keep_alive(value: Any, on: int, delay: int) -> None:
    idle = getattr(stdlib, "TCP_KEEPIDLE", getattr(stdlib, "TCP_KEEPALIVE", 0))
    async with listening("127.0.0.1", 0, keep_alive=value) as listener:
        client = await uvsock.connect({"data": ignore}, "127.0.0.1", listener.port)
        await until(lambda: listener.connections)
        (socket,) = listener.sockets
        assert option(socket, stdlib.SOL_SOCKET, stdlib.SO_KEEPALIVE) == on
        if delay:
            assert option(socket, stdlib.IPPROTO_TCP, idle) == delay
        assert client.set_keep_alive(True, 9)
        assert option(client, stdlib.SOL_SOCKET, stdlib.SO_KEEPALIVE) == 1
        assert option(client, stdlib.IPPROTO_TCP, idle) == 9
        assert client.set_keep_alive(False)
        assert option(client, stdlib.SOL_SOCKET, stdlib.SO_KEEPALIVE) == 0
        client.end()
        await soon(client.wait_closed())


async def test_the_backlog_holds_a_burst_of_connections() -> None:
    """With asyncio's default of 100 the kernel drops SYNs here, and clients wait for a second."""
    async with listening("127.0.0.1", 0) as listener:
        sockets = [stdlib.socket() for _ in range(400)]
        try:
            for sock in sockets:
                sock.settimeout(0.5)
                sock.connect(("127.0.0.1", listener.port))
            await until(lambda: listener.connections == 400)
        finally:
            for sock in sockets:
                sock.close()


# ── data ───────────────────────────────────────────────────────────────────────────────────────


async def test_data_is_shared_and_can_be_replaced(wire: Wire) -> None:
    first, second = {"n": 1}, {"n": 2}
    recorder = Recorder()
    listener = await wire.listen(recorder.table(), data=first)
    assert listener.data is first
    one = await wire.connect(listener, {"data": ignore})
    await until(lambda: len(recorder.sockets) == 1)
    listener.data = second
    two = await wire.connect(listener, {"data": ignore}, data="the client's")
    await until(lambda: len(recorder.sockets) == 2)
    assert [socket.data for socket in recorder.sockets] == [first, second]
    assert recorder.sockets[0].data is first
    assert (one.data, two.data) == (None, "the client's")
    recorder.sockets[0].data = "own"
    assert listener.data is second
    for client in (one, two):
        client.end()
        await soon(client.wait_closed())
    await stopped(listener)


async def test_data_factory_is_called_per_connection(wire: Wire) -> None:
    recorder = Recorder()
    listener = await wire.listen(recorder.table(), data_factory=list)
    clients = [await wire.connect(listener, {"data": ignore}) for _ in range(3)]
    await until(lambda: len(recorder.sockets) == 3)
    assert len({id(socket.data) for socket in recorder.sockets}) == 3
    assert all(socket.data == [] for socket in recorder.sockets)
    for client in clients:
        client.end()
        await soon(client.wait_closed())
    await stopped(listener)


# ── Counting ───────────────────────────────────────────────────────────────────────────────────


async def test_stats_sockets_and_connections(wire: Wire) -> None:
    recorder = Recorder(data=echo)
    listener = await wire.listen(recorder.table())
    assert listener.stats == uvsock.ListenerStats(0, 0, 0, 0, 0)
    assert listener.sockets == frozenset()
    clients = [await wire.connect(listener, {"data": ignore}) for _ in range(3)]
    for number, client in enumerate(clients):
        client.write(b"x" * (number + 1))
    await until(lambda: sum(client.bytes_read for client in clients) == 6)
    assert listener.sockets == set(recorder.sockets)
    assert all(socket.listener is listener for socket in recorder.sockets)
    assert listener.stats == uvsock.ListenerStats(3, 3, 0, 6, 6)
    clients[2].end()
    await soon(clients[2].wait_closed())
    await until(lambda: listener.connections == 2)
    assert listener.stats == uvsock.ListenerStats(3, 2, 0, 6, 6)
    closed = next(s for s in recorder.sockets if s not in listener.sockets)
    await until(lambda: closed.listener is None)
    await stopped(listener)
    assert listener.stats == uvsock.ListenerStats(3, 0, 0, 6, 6)
    for client in clients:
        await soon(client.wait_closed())


# ── The end ────────────────────────────────────────────────────────────────────────────────────


async def test_stop_refuses_new_connections_and_leaves_live_ones(wire: Wire) -> None:
    listener = await wire.listen(ECHO)
    client = await wire.connect(listener, {"data": ignore})
    await until(lambda: listener.connections == 1)
    listener.stop()
    listener.stop()
    assert "stopped" in repr(listener)
    with pytest.raises(OSError):
        await wire.connect(listener, {"data": ignore})
    client.write(b"x")
    await until(lambda: client.bytes_read == 1)
    with pytest.raises(TypeError, match="^close_active_connections: "):
        listener.stop(1)  # type: ignore[arg-type]
    waiting = asyncio.create_task(listener.wait_closed())
    await asyncio.sleep(0.01)
    assert not waiting.done()
    client.end()
    await soon(waiting)
    await soon(client.wait_closed())


async def test_stop_true_delivers_what_was_accepted(wire: Wire) -> None:
    payload = b"p" * 500_000
    recorder = Recorder(data=lambda socket, data: (socket.write(payload), listener.stop(True)))
    listener = await wire.listen(recorder.table(), high_water_mark=1 << 20)
    received = await wire.receive_all(listener, b"go")
    assert received == payload
    await soon(listener.wait_closed())
    assert recorder.events[-2:] == ["data", "close"]
    assert recorder.close_errors == [None]


async def test_shutdown_lets_sockets_finish_and_terminates_the_rest(wire: Wire) -> None:
    recorder = Recorder(data=echo)
    listener = await wire.listen(recorder.table())
    quick, slow = [await wire.connect(listener, Recorder().table()) for _ in range(2)]
    await until(lambda: listener.connections == 2)
    stopping = asyncio.create_task(listener.shutdown(0.15))
    await asyncio.sleep(0.01)
    assert listener.connections == 2
    quick.write(b"last")
    await until(lambda: quick.bytes_read == 4)
    quick.end()
    await soon(quick.wait_closed())
    started = asyncio.get_running_loop().time()
    await soon(stopping)
    assert asyncio.get_running_loop().time() - started < 1
    assert listener.connections == 0
    await soon(slow.wait_closed())
    assert recorder.events.count("close") == 2
    for bad, error in ((-1, ValueError), (None, TypeError)):
        with pytest.raises(error, match="^timeout: "):
            await listener.shutdown(bad)  # type: ignore[arg-type]


def dial_raw(wire: Wire, listener: uvsock.Listener) -> stdlib.socket:
    """A blocking client that has connected and says nothing, over TLS not even a ClientHello."""
    sock = stdlib.socket(stdlib.AF_UNIX if wire.kind == "unix" else stdlib.AF_INET)
    sock.settimeout(5)
    sock.connect(listener.unix or (listener.hostname, listener.port))
    return sock


async def hung_up(sock: stdlib.socket) -> bool:
    """Whether a client is, or comes to be, at the end of its connection."""

    def receive() -> bool:
        try:
            while sock.recv(4096):
                pass
        except TimeoutError:
            return False
        except OSError:  # reset
            pass
        return True

    return bool(await soon(asyncio.to_thread(receive), 10))


@pytest.mark.parametrize("iterations", [0, 1, 2, 3])
async def test_stop_true_amid_a_burst_leaves_no_connection_open(
    wire: Wire, iterations: int
) -> None:
    """The kernel has accepted them all, the loop some of them, and few have a transport yet."""
    recorder = Recorder()
    listener = await wire.listen(recorder.table())
    clients = [dial_raw(wire, listener) for _ in range(300)]
    try:
        for _ in range(iterations):
            await asyncio.sleep(0)
        listener.stop(True)
        assert [client for client in clients if not await hung_up(client)] == []
    finally:
        for client in clients:
            client.close()
    await soon(listener.wait_closed())
    assert listener.connections == 0
    assert listener.sockets == frozenset()
    assert recorder.events.count("open") == recorder.events.count("close")


@pytest.mark.parametrize("iterations", [0, 1, 2])
async def test_once_wait_closed_returns_every_connection_is_over(
    wire: Wire, iterations: int
) -> None:
    """Though their peers never end: the linger time bounds it."""
    listener = await wire.listen(ECHO, linger_timeout=0.05)
    clients = [dial_raw(wire, listener) for _ in range(300)]
    try:
        for _ in range(iterations):
            await asyncio.sleep(0)
        listener.stop(True)
        await soon(listener.wait_closed())
        readable = select.select(clients, [], [], 0)[0]
        assert len(readable) == 300  # at the end of the stream, or reset
    finally:
        for client in clients:
            client.close()


@pytest.mark.parametrize("iterations", [0, 1, 2])
async def test_stop_amid_a_burst_serves_or_resets_each_connection(
    plain_wire: Wire, iterations: int
) -> None:
    listener = await plain_wire.listen({"data": lambda socket, data: socket.end(data)})
    clients = [dial_raw(plain_wire, listener) for _ in range(300)]
    try:
        for _ in range(iterations):
            await asyncio.sleep(0)
        listener.stop()
        for client in clients:
            with contextlib.suppress(OSError):  # reset
                client.sendall(b"?")
        assert [client for client in clients if not await hung_up(client)] == []
    finally:
        for client in clients:
            client.close()
    await soon(listener.wait_closed())


async def test_stop_true_inside_open_leaves_no_connection_open(plain_wire: Wire) -> None:
    opened: list[Any] = []

    def on_open(socket: uvsock.Socket[Any]) -> None:
        opened.append(socket)
        if len(opened) == 10:
            listener.stop(True)

    listener = await plain_wire.listen({"open": on_open, "data": ignore})
    clients = [dial_raw(plain_wire, listener) for _ in range(100)]
    try:
        assert [client for client in clients if not await hung_up(client)] == []
    finally:
        for client in clients:
            client.close()
    await soon(listener.wait_closed())
    assert len(opened) == 10


async def test_stop_true_after_stop_closes_what_was_left(wire: Wire) -> None:
    recorder = Recorder()
    listener = await wire.listen(recorder.table())
    clients = [await wire.connect(listener, {"data": ignore}) for _ in range(3)]
    await until(lambda: len(recorder.sockets) == 3)
    listener.stop()
    await asyncio.sleep(0.01)
    assert listener.connections == 3
    listener.stop(True)
    listener.stop(True)
    assert {socket.ready_state for socket in recorder.sockets} == {uvsock.ReadyState.SHUTDOWN}
    await soon(listener.wait_closed())
    for client in clients:
        await soon(client.wait_closed())
    assert recorder.close_errors == [None] * 3
    assert "end" not in recorder.events


async def test_shutdown_zero_resets_at_once(plain_wire: Wire) -> None:
    recorder = Recorder()
    listener = await plain_wire.listen(recorder.table())
    peer = dial_raw(plain_wire, listener)
    try:
        await until(lambda: recorder.sockets)
        await soon(listener.shutdown(0), 1)
        assert recorder.events == ["open", "close"]
        assert recorder.close_errors == [None]
        if plain_wire.kind == "tcp":
            with pytest.raises(ConnectionResetError):
                peer.recv(1)
        else:
            assert await hung_up(peer)
        await soon(listener.shutdown(0), 1)  # nothing is left to do
    finally:
        peer.close()


async def test_shutdown_returns_as_soon_as_the_last_socket_has_finished(wire: Wire) -> None:
    listener = await wire.listen(ECHO)
    client = await wire.connect(listener, {"data": ignore})
    await until(lambda: listener.connections)
    stopping = asyncio.create_task(listener.shutdown(60))
    await asyncio.sleep(0.01)
    assert not stopping.done()
    assert not await answers(listener)
    client.end()
    await soon(stopping)
    await soon(client.wait_closed())


async def test_shutdown_cuts_handshakes_off_at_the_deadline(tls_wire: Wire) -> None:
    """A peer that has connected and says nothing is terminated with the others."""
    recorder = Recorder()
    listener = await tls_wire.listen(recorder.table())
    peer = dial_raw(tls_wire, listener)
    try:
        await until(lambda: listener.connections)
        await soon(listener.shutdown(0.02), 2)
        assert await hung_up(peer)
    finally:
        peer.close()
    assert "open" not in recorder.events
    assert "close" not in recorder.events


async def test_a_cancelled_shutdown_leaves_the_sockets_alone(wire: Wire) -> None:
    listener = await wire.listen(ECHO)
    client = await wire.connect(listener, {"data": ignore})
    await until(lambda: listener.connections)
    stopping = asyncio.create_task(listener.shutdown(60))
    await asyncio.sleep(0.01)
    stopping.cancel()
    with pytest.raises(asyncio.CancelledError):
        await stopping
    client.write(b"x")
    await until(lambda: client.bytes_read == 1)
    await stopped(listener)
    await soon(client.wait_closed())


async def test_wait_closed_waits_for_async_close_handlers(wire: Wire) -> None:
    finished: list[str] = []

    async def closed(socket: uvsock.Socket[Any], error: BaseException | None) -> None:
        await asyncio.sleep(0.03)
        finished.append("close")

    recorder = Recorder()
    table = {**recorder.table("open", "data"), "close": closed}
    listener = await wire.listen(table)
    client = await wire.connect(listener, {"data": ignore})
    await until(lambda: recorder.sockets)
    listener.stop(True)
    await soon(listener.wait_closed())
    assert finished == ["close"]
    await soon(client.wait_closed())


async def test_several_may_wait_and_cancelling_one_does_not_disturb_the_others() -> None:
    listener = await uvsock.listen(ECHO, *HERE)
    waits = [asyncio.create_task(listener.wait_closed()) for _ in range(3)]
    serves = [asyncio.create_task(listener.serve_forever()) for _ in range(2)]
    await asyncio.sleep(0)
    waits[0].cancel()
    await asyncio.sleep(0)
    assert await answers(listener)
    listener.stop()
    await soon(asyncio.gather(*waits[1:], *serves))
    assert waits[0].cancelled()
    await soon(listener.wait_closed())  # at once, afterwards
    await soon(listener.serve_forever())


async def test_serve_forever_ends_with_stop_and_stops_when_cancelled() -> None:
    listener = await uvsock.listen(ECHO, "127.0.0.1", 0)
    serving = asyncio.create_task(listener.serve_forever())
    await asyncio.sleep(0)
    assert await answers(listener)
    assert not serving.done()
    listener.stop()
    await soon(serving)
    listener = await uvsock.listen(ECHO, "127.0.0.1", 0)
    serving = asyncio.create_task(listener.serve_forever())
    await asyncio.sleep(0)
    serving.cancel()
    with pytest.raises(asyncio.CancelledError):
        await serving
    assert not await answers(listener)


async def test_async_with_stops_and_waits(wire: Wire) -> None:
    recorder = Recorder()
    async with await wire.listen(recorder.table()) as listener:
        client = await wire.connect(listener, {"data": ignore})
        await until(lambda: recorder.sockets)
    assert recorder.events[-1] == "close"
    await soon(client.wait_closed())
    with pytest.raises(ZeroDivisionError):
        async with await wire.listen(recorder.table()):
            raise ZeroDivisionError


async def test_a_listener_is_made_by_listen_only() -> None:
    with pytest.raises(TypeError, match="uvsock.listen"):
        uvsock.Listener()
    with pytest.raises(TypeError, match="uvsock.listen"):
        uvsock.Socket()


async def test_calls_from_another_thread_are_refused() -> None:
    async with listening("127.0.0.1", 0) as listener:
        refused: list[str] = []

        def calls() -> None:
            for call in (
                listener.stop,
                listener.ref,
                listener.unref,
                lambda: listener.reload(ECHO),
                lambda: listener.reload_tls({}),
                lambda: listener.wait_closed().send(None),
                lambda: listener.serve_forever().send(None),
                lambda: listener.shutdown(1).send(None),
            ):
                try:
                    call()
                except RuntimeError as error:
                    refused.append(str(error))

        thread = threading.Thread(target=calls)
        thread.start()
        await asyncio.to_thread(thread.join)
        assert len(refused) == 8
        assert all("call_soon_threadsafe" in text for text in refused)
        assert await answers(listener)


# ── Giving up ──────────────────────────────────────────────────────────────────────────────────


async def test_a_listen_that_is_never_awaited_does_nothing(unix_wire: Wire) -> None:
    path = unix_wire.directory / "s"
    uvsock.listen(ECHO, unix=path).close()
    assert not path.exists()


@pytest.mark.parametrize("when", ["before", "during", "just after"])
async def test_cancelling_listen_while_it_resolves_binds_nothing(
    monkeypatch: pytest.MonkeyPatch, when: str
) -> None:
    loop = asyncio.get_running_loop()
    asked = asyncio.Event()
    answer: asyncio.Future[Any] = loop.create_future()

    async def getaddrinfo(*arguments: Any, **hints: Any) -> Any:
        asked.set()
        return await answer

    monkeypatch.setattr(loop, "getaddrinfo", getaddrinfo, raising=False)
    port = unused_port()
    task = asyncio.create_task(uvsock.listen(ECHO, "slow.test", port))
    if when != "before":
        await soon(asked.wait())
    if when == "just after":
        info = (stdlib.AF_INET, stdlib.SOCK_STREAM, 6, "", ("127.0.0.1", port))
        answer.set_result([info])
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert asked.is_set() == (when != "before")
    with pytest.raises(ConnectionRefusedError):
        stdlib.create_connection(("127.0.0.1", port), 5)


# ── TLS ────────────────────────────────────────────────────────────────────────────────────────


async def test_wrong_certificates_leave_the_address_alone(authority: Authority) -> None:
    """They are looked at by the call, before anything is bound."""
    port = unused_port()
    for tls, name in (
        ({"key": "no PEM", "cert": authority.server_options["cert"]}, "tls.key"),
        ({**authority.server_options, "cert": b""}, "tls.cert"),
        ({"cert": authority.server_options["cert"]}, "tls"),
    ):
        with pytest.raises(ValueError, match=rf"^{name}\b"):
            uvsock.listen(ECHO, "127.0.0.1", port, tls=tls)
    async with listening("127.0.0.1", port):
        pass


async def test_tls_takes_a_context_of_the_standard_librarys(authority: Authority) -> None:
    async with listening(*HERE, tls=authority.server_context()) as listener:
        client = await uvsock.connect(
            {"data": lambda socket, data: socket.end()},
            "127.0.0.1",
            listener.port,
            tls=authority.client_context(),
            server_hostname=SERVER_NAME,
        )
        client.write(b"x")
        await soon(client.wait_closed())
        assert client.bytes_read == 1
        with pytest.raises(ssl.SSLCertVerificationError):
            await uvsock.connect({"data": ignore}, "127.0.0.1", listener.port, tls=True)
        await until(lambda: listener.stats.handshake_failures == 1)


async def test_a_relative_path_is_removed_from_elsewhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    listener = await uvsock.listen({"data": lambda *_: None}, unix="socket")
    assert (tmp_path / "socket").exists()
    monkeypatch.chdir("/")
    listener.stop()
    await soon(listener.wait_closed())
    assert not (tmp_path / "socket").exists()


async def test_shutdown_does_not_wait_for_a_handler_that_hangs(wire: Wire) -> None:
    called, hanging = asyncio.Event(), asyncio.Event()

    async def data(socket: uvsock.Socket[Any], data: bytes) -> None:
        called.set()
        await hanging.wait()

    listener = await wire.listen({"data": data})
    client = await wire.connect(listener, {"data": lambda *_: None})
    client.write(b"x")
    await soon(called.wait())
    await soon(listener.shutdown(0.05))
    hanging.set()
    await soon(listener.wait_closed())
    await soon(client.wait_closed())
