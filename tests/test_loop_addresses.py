"""Names and addresses on the event loop's way in and out, and on that of uvsock's own sockets."""

from __future__ import annotations

import asyncio
import errno
import os
import shutil
import socket as stdlib
import ssl
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import trustme

import uvsock
from conftest import Wire
from helpers import ignore, soon
from uvsock import _addresses, _dial

LOOPS = {"uvsock": uvsock.new_event_loop}


def protocol() -> asyncio.Protocol:
    return asyncio.Protocol()


# ── Resolving ──────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("address", "family", "expected"),
    [
        (("127.0.0.1", 80), 0, ("127.0.0.1", 80)),
        ((b"127.0.0.1", "80"), 0, ("127.0.0.1", 80)),
        (("127.0.0.1", None), 0, ("127.0.0.1", 0)),
        (("127.0.0.1", ""), 0, ("127.0.0.1", 0)),
        (("127.0.0.1", "http"), 0, ("127.0.0.1", 80)),
        (("::1", 80), 0, ("::1", 80, 0, 0)),
        (("::1%1", 80), 0, ("::1", 80, 0, 1)),
        (("::1%1", "http"), 0, ("::1", 80, 0, 1)),
        (("::1", 80, 7, 1), 0, ("::1", 80, 7, 1)),
        (("::1%1", 80, 7, 0), 0, ("::1", 80, 7, 1)),
    ],
)
async def test_an_address_is_no_question_for_the_resolver(
    address: tuple[Any, ...], family: int, expected: tuple[Any, ...]
) -> None:
    class Silent:
        """A loop that resolves no names."""

        run_in_executor = staticmethod(asyncio.get_running_loop().run_in_executor)

    (info,) = await _addresses.resolve(Silent(), address, family=family)  # type: ignore[arg-type]
    assert info[1:3] == (stdlib.SOCK_STREAM, 6)
    assert info[4] == expected


async def test_a_name_that_is_none_is_named() -> None:
    loop = asyncio.get_running_loop()
    expected = r"cannot resolve 'no-such-name\.invalid': "
    with pytest.raises(stdlib.gaierror, match=expected):
        await loop.create_connection(protocol, "no-such-name.invalid", 80)
    with pytest.raises(stdlib.gaierror, match=expected):
        await loop.create_server(protocol, "no-such-name.invalid", 80)
    with pytest.raises(stdlib.gaierror, match=expected):
        await loop.create_connection(
            protocol, "127.0.0.1", 80, local_addr=("no-such-name.invalid", 0)
        )


async def test_an_address_of_another_family_is_an_error() -> None:
    with pytest.raises(stdlib.gaierror, match=r"cannot resolve '127\.0\.0\.1': "):
        await _addresses.resolve(
            asyncio.get_running_loop(), ("127.0.0.1", 80), family=stdlib.AF_INET6
        )


@pytest.mark.parametrize("first", [1, 2, 3])
def test_families_take_turns(first: int) -> None:
    infos: list[Any] = [(10, 1, 6, "", (f"{n}",)) for n in range(3)]
    infos += [(2, 1, 6, "", (f"{n}",)) for n in range(2)]
    order = [info[0] for info in _addresses.interleave(infos, first)]
    assert order == {1: [10, 2, 10, 2, 10], 2: [10, 10, 2, 10, 2], 3: [10, 10, 10, 2, 2]}[first]
    assert _addresses.interleave([]) == []


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "::1", None])
@pytest.mark.parametrize("port", [65536, -1, "70000"])
async def test_a_port_that_there_is_not(host: str | None, port: Any) -> None:
    """getaddrinfo(3) keeps 16 bits of it, so that another port would be served or asked."""
    loop = asyncio.get_running_loop()
    with pytest.raises(OverflowError, match="port must be 0-65535"):
        await loop.create_server(protocol, host, port)
    with pytest.raises(OverflowError, match="port must be 0-65535"):
        await loop.create_connection(protocol, host, port)
    with pytest.raises(OverflowError, match="port must be 0-65535"):
        await loop.create_connection(protocol, "127.0.0.1", 9, local_addr=(host, port))
    with stdlib.socket() as sock:
        sock.setblocking(False)
        with pytest.raises(OverflowError, match="port must be 0-65535"):
            await loop.sock_connect(sock, (host, port))


# ── Unix sockets whose backlog is full ─────────────────────────────────────────────────────────


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere a full backlog refuses")
async def test_a_full_backlog_is_never_a_connection(unix_wire: Wire) -> None:
    loop = asyncio.get_running_loop()
    path = str(unix_wire.directory / "s")
    with stdlib.socket(stdlib.AF_UNIX) as server, stdlib.socket(stdlib.AF_UNIX) as first:
        server.bind(path)
        server.listen(0)
        first.connect(path)
        with pytest.raises(BlockingIOError, match=path):
            await loop.create_unix_connection(protocol, path)
        with pytest.raises(BlockingIOError, match=path):
            await asyncio.open_unix_connection(path)
        with stdlib.socket(stdlib.AF_UNIX) as sock:
            sock.setblocking(False)
            with pytest.raises(BlockingIOError, match=path):
                await loop.sock_connect(sock, path)


async def test_errors_of_a_unix_path_name_it(unix_wire: Wire) -> None:
    path = str(unix_wire.directory / "none")
    with pytest.raises(FileNotFoundError, match=path) as caught:
        await asyncio.get_running_loop().create_unix_connection(protocol, path)
    assert caught.value.filename == path


# ── Several addresses ──────────────────────────────────────────────────────────────────────────


def resolve_to(monkeypatch: pytest.MonkeyPatch, *addresses: tuple[Any, ...]) -> None:
    async def getaddrinfo(*arguments: Any, **hints: Any) -> Any:
        return [
            (stdlib.AF_INET, stdlib.SOCK_STREAM, 6, str(n), address)
            for n, address in enumerate(addresses)
        ]

    monkeypatch.setattr(asyncio.get_running_loop(), "getaddrinfo", getaddrinfo)


def refusing() -> tuple[str, int]:
    with stdlib.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return sock.getsockname()  # type: ignore[no-any-return]


@pytest.mark.parametrize("delay", [None, 0.01])
async def test_all_errors(monkeypatch: pytest.MonkeyPatch, delay: float | None) -> None:
    """On every Python, in the order of the addresses."""
    loop: Any = asyncio.get_running_loop()
    one, two = refusing(), refusing()
    resolve_to(monkeypatch, one, two)
    with pytest.raises(ExceptionGroup, match="create_connection failed") as caught:
        await loop.create_connection(
            protocol, "two.test", 1, all_errors=True, happy_eyeballs_delay=delay
        )
    assert [str(error) for error in caught.value.exceptions] == [
        f"[Errno {errno.ECONNREFUSED}] Connect call failed {address}" for address in (one, two)
    ]
    with pytest.raises(OSError, match="^Multiple exceptions: .*, .*") as told:
        await loop.create_connection(protocol, "two.test", 1, happy_eyeballs_delay=delay)
    assert all(str(address) in str(told.value) for address in (one, two))
    resolve_to(monkeypatch, one, one)
    with pytest.raises(ConnectionRefusedError):
        await loop.create_connection(protocol, "two.test", 1, happy_eyeballs_delay=delay)


async def test_a_resolver_without_an_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    resolve_to(monkeypatch)
    loop = asyncio.get_running_loop()
    with pytest.raises(OSError, match=r"getaddrinfo\('no.test'\) returned empty list"):
        await loop.create_connection(protocol, "no.test", 1)
    with pytest.raises(OSError, match=r"getaddrinfo\('no.test'\) returned empty list"):
        await loop.create_server(protocol, "no.test", 1)


async def test_the_next_local_address_is_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    server = await asyncio.get_running_loop().create_server(protocol, "127.0.0.1", 0)
    address = server.sockets[0].getsockname()
    kind = (stdlib.AF_INET, stdlib.SOCK_STREAM, 6, "")
    local = [(*kind, ("203.0.113.1", 0)), (*kind, ("127.0.0.2", 0))]
    sock, errors = await _dial.dial([(*kind, address)], local, None, _dial.Dialler())
    assert sock is not None
    assert errors == []
    assert sock.getsockname()[0] == "127.0.0.2"
    sock.close()
    sock, errors = await _dial.dial([(*kind, address)], local[:1], None, _dial.Dialler())
    assert sock is None
    assert "203.0.113.1" in str(errors[0])
    server.close()
    await soon(server.wait_closed())


# ── Names that TLS must not send as they are ───────────────────────────────────────────────────


async def on_the_loop(host: str, port: int, name: str, context: ssl.SSLContext) -> None:
    loop = asyncio.get_running_loop()
    transport, _ = await loop.create_connection(
        protocol, host, port, ssl=context, server_hostname=name
    )
    transport.abort()


async def by_streams(host: str, port: int, name: str, context: ssl.SSLContext) -> None:
    _, writer = await uvsock.open_connection(host, port, ssl=context, server_hostname=name)
    writer.transport.abort()


async def by_start_tls(host: str, port: int, name: str, context: ssl.SSLContext) -> None:
    loop = asyncio.get_running_loop()
    made, upgraded = await loop.create_connection(protocol, host, port)
    transport = await loop.start_tls(made, upgraded, context, server_hostname=name)
    assert transport is not None
    transport.abort()


async def by_a_socket(host: str, port: int, name: str, context: ssl.SSLContext) -> None:
    socket = await uvsock.connect({"data": ignore}, host, port, tls=context, server_hostname=name)
    socket.terminate()
    await soon(socket.wait_closed())


async def by_an_upgrade(host: str, port: int, name: str, context: ssl.SSLContext) -> None:
    socket = await uvsock.connect({"data": ignore}, host, port, server_hostname=name)
    await soon(socket.upgrade_tls(context))
    socket.terminate()
    await soon(socket.wait_closed())


@pytest.mark.parametrize(
    "connecting", [on_the_loop, by_streams, by_start_tls, by_a_socket, by_an_upgrade]
)
@pytest.mark.parametrize(
    ("name", "sent"),
    [("localhost.", "localhost"), ("localhost", "localhost"), ("::1%1", None), ("::1", None)],
)
async def test_names_of_tls(connecting: Callable[..., Any], name: str, sent: str | None) -> None:
    """RFC 6066, 3: no trailing dot and no address; RFC 4007, 11.2: a zone is no part of it."""
    authority = trustme.CA()
    server_context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert("localhost", "::1").configure_cert(server_context)
    client_context = ssl.create_default_context()
    authority.configure_trust(client_context)
    names: list[str | None] = []
    server_context.sni_callback = lambda session, asked, context: names.append(asked)
    listener = await uvsock.listen({"data": ignore}, "127.0.0.1", 0, tls=server_context)
    await connecting("127.0.0.1", listener.port, name, client_context)
    assert names == [sent]
    listener.stop(True)
    await soon(listener.wait_closed())


# ── Zones, on an interface that is made for it ─────────────────────────────────────────────────

ZONE = """
import asyncio, fcntl, socket, struct, sys, uvsock

with socket.socket(socket.AF_INET6, socket.SOCK_DGRAM) as control:
    fcntl.ioctl(control, 0x8914, struct.pack("16sh14x", b"lo", 1))  # SIOCSIFFLAGS: up
    address = socket.inet_pton(socket.AF_INET6, "fe80::1")
    fcntl.ioctl(control, 0x8916, struct.pack("16sIi", address, 64, 1))  # SIOCSIFADDR

async def echo(reader, writer):
    writer.write(await reader.readline())
    writer.close()

async def ask(port):
    reader, writer = await asyncio.open_connection("fe80::1%lo", port)
    print(writer.get_extra_info("peername")[0::3])
    writer.write(b"x\\n")
    assert await reader.readline() == b"x\\n"
    writer.close()
    await writer.wait_closed()

async def main():
    while True:  # the address is checked for duplicates first (RFC 4862, 5.4)
        try:
            server = await asyncio.start_server(echo, "fe80::1%lo", 0)
            break
        except OSError:
            await asyncio.sleep(0.05)
    await ask(server.sockets[0].getsockname()[1])
    server.close()
    listener = await uvsock.listen({"data": lambda s, d: s.end(d)}, "fe80::1%lo", 0)
    await ask(listener.port)
    socket = await uvsock.connect({"data": print}, "fe80::1%lo", listener.port)
    print(socket.remote_address)
    socket.end()
    await socket.wait_closed()
    listener.stop(True)

with asyncio.Runner(loop_factory=uvsock.new_event_loop) as runner:
    runner.run(asyncio.wait_for(main(), 20))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="network namespaces are Linux's")
@pytest.mark.skipif(os.geteuid() != 0, reason="a network namespace needs root")
def test_link_local_addresses_with_a_zone(tmp_path: Path) -> None:
    script = tmp_path / "zone.py"
    script.write_text(ZONE)
    unshare = shutil.which("unshare")
    assert unshare is not None
    done = subprocess.run(
        [unshare, "--net", sys.executable, script], capture_output=True, text=True, timeout=50
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == ["('fe80::1', 1)", "('fe80::1', 1)", "fe80::1%lo"]
