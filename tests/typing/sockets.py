"""What the methods and attributes of a socket give and take."""

from __future__ import annotations

import array
import asyncio
import ssl
from pathlib import Path
from typing import Any, Literal, assert_type

import uvsock


class Session:
    name: str = ""


def generic(socket: uvsock.Socket[Session], untyped: uvsock.Socket) -> None:
    assert_type(socket.data, Session)
    assert_type(untyped.data, Any)
    socket.data = Session()
    socket.data = None  # type: ignore[assignment]
    with socket as same:
        assert_type(same, uvsock.Socket[Session])
    with socket.cork() as corked:
        assert_type(corked.data, Session)


def writing(socket: uvsock.Socket[Session]) -> None:
    for data in ("text", b"bytes", bytearray(4), memoryview(b"view"), array.array("d", [1.0])):
        assert_type(socket.write(data), int)
    assert_type(socket.write(b"abc", 1, 2), int)
    assert_type(socket.write(b"abc", length=None), int)
    assert_type(socket.end(), int)
    assert_type(socket.end("bye"), int)
    socket.shutdown(read=True)
    socket.timeout(0.5)
    socket.write(5)  # type: ignore[arg-type]
    socket.write(b"abc", 0.5)  # type: ignore[arg-type]
    socket.timeout(None)  # type: ignore[arg-type]


async def waiting(socket: uvsock.Socket[Session], path: Path) -> None:
    await socket.send_all("text")
    with path.open("rb") as file:
        assert_type(await socket.sendfile(file, 0, None), int)
    with path.open() as text:
        await socket.sendfile(text)  # type: ignore[arg-type]
    await socket.drained()
    await socket.wait_closed()
    assert_type(await socket.upgrade_tls({"ca": path}), uvsock.Socket[Session])
    tls = uvsock.TLS(key=path, cert=[path], alpn_protocols=["h2"])
    await asyncio.wait_for(socket.upgrade_tls(tls, {"data": None}, leftover=b"x"), 1)


def state(socket: uvsock.Socket[Session]) -> None:
    assert_type(socket.ready_state, uvsock.ReadyState)
    assert_type(socket.ready_state.value, int)
    assert_type(socket.listener, uvsock.Listener | None)
    assert_type(socket.remote_address, str | None)
    assert_type(socket.local_port, int | None)
    assert_type(socket.remote_family, Literal["IPv4", "IPv6"] | None)
    assert_type(socket.bytes_read, int)
    assert_type(socket.bytes_written, int)
    assert_type(socket.writable_length, int)
    assert_type(socket.set_no_delay(), bool)
    assert_type(socket.set_keep_alive(True, 10), bool)
    assert_type(socket.get_extra_info("peername"), Any)
    socket.bytes_read = 0  # type: ignore[misc]
    socket.listener = None  # type: ignore[misc]


def tls(socket: uvsock.Socket[Session]) -> None:
    assert_type(socket.encrypted, bool)
    assert_type(socket.authorized, bool)
    assert_type(socket.authorization_error, ssl.SSLCertVerificationError | None)
    assert_type(socket.alpn_protocol, str | Literal[False] | None)
    assert_type(socket.server_name, str | None)
    assert_type(socket.tls_version, str | None)
    assert_type(socket.cipher, tuple[str, str, int] | None)
    assert_type(socket.session_reused, bool | None)
    assert_type(socket.channel_binding(), bytes | None)
    assert_type(socket.peer_certificate(), dict[str, Any] | None)
    assert_type(socket.peer_certificate(binary=True), bytes | None)
