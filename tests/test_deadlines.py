"""What a connection has time for: each deadline on its own, whatever the others do."""

from __future__ import annotations

import asyncio
import socket as stdlib
import ssl
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest

import uvsock
from conftest import SERVER_NAME, Authority, Recorder, Wire
from helpers import stopped, until

MUCH = b"z" * (8 << 20)


def dial(listener: uvsock.Listener) -> stdlib.socket:
    """A client that has room for little."""
    sock = stdlib.socket()
    sock.settimeout(10)
    sock.setsockopt(stdlib.SOL_SOCKET, stdlib.SO_RCVBUF, 4096)
    sock.connect((listener.hostname, listener.port))
    return sock


@asynccontextmanager
async def upgrading(
    wire: Wire, authority: Authority, then: Callable[[uvsock.Socket[Any]], Any], **options: Any
) -> AsyncIterator[tuple[Recorder, stdlib.socket]]:
    """A server that starts TLS when asked for it, and then does something; and its client."""

    def data(socket: uvsock.Socket[Any], data: bytes) -> None:
        socket.upgrade_tls(authority.server_options)
        then(socket)

    recorder = Recorder(data=data)
    listener = await wire.listen(recorder.table(), **options)
    with dial(listener) as client:
        client.sendall(b"starttls")
        await until(lambda: recorder.received)
        yield recorder, client
    await stopped(listener)


@pytest.mark.parametrize("ending", ["end", "close"])
async def test_a_handshake_that_ends_leaves_the_linger_time_alone(
    tcp_wire: Wire, authority: Authority, ending: str
) -> None:
    def then(socket: uvsock.Socket[Any]) -> None:
        socket.end(MUCH)
        if ending == "close":
            socket.close()

    async with upgrading(tcp_wire, authority, then, linger_timeout=0.3) as (recorder, client):
        context = authority.client_context()

        def handshake() -> ssl.SSLSocket:
            return context.wrap_socket(client, server_hostname=SERVER_NAME)

        with await asyncio.to_thread(handshake):
            await until(lambda: recorder.close_errors)
    (error,) = recorder.close_errors
    assert isinstance(error, TimeoutError)
    assert "linger_timeout" in str(error)


@pytest.mark.parametrize("ending", ["end", "close"])
async def test_a_peer_that_never_finishes_its_handshake_gets_the_linger_time(
    tcp_wire: Wire, authority: Authority, ending: str
) -> None:
    def then(socket: uvsock.Socket[Any]) -> None:
        socket.write(b"for later")
        getattr(socket, ending)()

    async with upgrading(tcp_wire, authority, then, linger_timeout=0.3) as (recorder, _):
        await until(lambda: recorder.close_errors)
    (error,) = recorder.close_errors
    assert isinstance(error, TimeoutError)
    assert "9 bytes were not taken by the peer within linger_timeout (0.3 seconds)" in str(error)
