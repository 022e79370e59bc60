"""What Bun's TLS sockets were seen to do, as docs/guides/from_bun.md maps it.

A docstring begins with the numbers of the behaviours that its test is about.
"""

from __future__ import annotations

import asyncio
import os
import socket as stdlib
import ssl
from pathlib import Path
from typing import Any

import pytest

import uvsock
from conftest import SERVER_NAME, Authority, Recorder, Wire
from helpers import echo, ignore, soon, stopped, until


async def pair(
    wire: Wire, server: Recorder, client: Recorder, **options: Any
) -> tuple[uvsock.Listener, uvsock.Socket[Any], uvsock.Socket[Any]]:
    """A listener, the accepted socket and the client's, both open."""
    listener = await wire.listen(server.table(), **options)
    socket = await wire.connect(listener, client.table(), **options)
    await until(lambda: server.sockets)
    return listener, server.socket, socket


async def over(listener: uvsock.Listener, *sockets: uvsock.Socket[Any]) -> None:
    for socket in sockets:
        await soon(socket.wait_closed())
    await until(lambda: not listener.connections)
    await stopped(listener)


def plain_peer(listener: uvsock.Listener) -> stdlib.socket:
    sock = stdlib.create_connection((listener.hostname, listener.port), 10)
    sock.setblocking(False)
    return sock


async def test_nul_bytes_in_names_are_refused(authority: Authority) -> None:
    """B16, B185."""
    for arguments, options, name in (
        (("local\0host", 80), {}, "hostname"),
        ((), {"unix": "/tmp/a\0b"}, "unix"),
        (("a", 80), {"tls": {"server_name": "a\0b"}}, "tls.server_name"),
        (("a", 80), {"server_hostname": "a\0b"}, "server_hostname"),
    ):
        with pytest.raises(ValueError, match=f"^{name}"):
            uvsock.connect({"data": ignore}, *arguments, **options)


async def test_a_trusted_peer(tls_wire: Wire) -> None:
    """B165, B175: `ca` alone asks for no client certificate."""
    server, client = Recorder(), Recorder()
    tls = tls_wire.authority.server_options | {"ca": tls_wire.authority.ca_pem}
    listener = await tls_wire.listen(server.table(), tls=tls)
    socket = await tls_wire.connect(
        listener,
        client.table(),
        tls=tls_wire.authority.client_options | Authority.pair(tls_wire.authority.client),
    )
    await until(lambda: server.sockets)
    assert client.calls[0][2:] == (True, None)
    assert socket.authorized
    assert socket.authorization_error is None
    assert server.calls[0][2:] == (True, None)
    assert not server.socket.authorized
    assert server.socket.peer_certificate() is None
    socket.end()
    await over(listener, socket)


@pytest.mark.parametrize("version", ["TLSv1.2", "TLSv1.3"])
async def test_an_untrusted_server_gets_nothing_not_even_the_clients_certificate(
    tls_wire: Wire, authority: Authority, version: str
) -> None:
    """B166, B176: `handshake(False, error)`, write is -1 inside, no data either way."""
    written: list[int] = []
    certificates: list[Any] = []

    def shaken(socket: uvsock.Socket[Any], success: bool, error: Any) -> None:
        certificates.append(socket.peer_certificate())

    server = Recorder(handshake=shaken, open=lambda socket: socket.write(b"secret"))
    client = Recorder(handshake=lambda socket, success, error: written.append(socket.write(b"x")))
    listener = await tls_wire.listen(
        server.table(),
        tls=authority.server_options
        | {"request_cert": True, "ca": authority.ca_pem, "min_version": version},
    )
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    authority.client.configure_cert(context)
    with pytest.raises(ssl.SSLCertVerificationError) as caught:
        await uvsock.connect(
            client.table(), "127.0.0.1", listener.port, tls=context, server_hostname=SERVER_NAME
        )
    assert client.events == ["handshake", "connect_error"]
    assert client.calls[0][2:] == (False, caught.value)
    assert written == [-1]
    socket = client.calls[0][1]
    assert not socket.authorized
    assert socket.authorization_error is caught.value
    await until(lambda: not listener.connections and server.events)
    assert server.events == ["handshake"]
    assert certificates == [None]
    await stopped(listener)


async def test_stop_true_in_an_sni_callback_fails_the_handshake(authority: Authority) -> None:
    """B150, B189: the callback runs during the handshake."""
    names: list[Any] = []

    def choose(session: ssl.SSLObject, name: str | None, context: ssl.SSLContext) -> None:
        names.append(name)
        listener.stop(True)

    listener = await uvsock.listen(
        {"data": ignore},
        "127.0.0.1",
        0,
        tls=authority.server_options | {"sni_callback": choose},
    )
    with pytest.raises(OSError):
        await uvsock.connect(
            {"data": ignore}, "127.0.0.1", listener.port, tls=authority.client_options
        )
    assert names == [SERVER_NAME]
    await over(listener)


async def test_a_handshake_goes_on_while_paused(tls_wire: Wire) -> None:
    """B131."""
    server = Recorder(handshake=lambda socket, success, error: socket.pause())
    listener = await tls_wire.listen(server.table())
    socket = await tls_wire.connect(listener, {"data": ignore})
    socket.write(b"later")
    await until(lambda: "open" in server.events)
    await asyncio.sleep(0.01)
    assert not server.received
    server.socket.resume()
    await until(lambda: server.received == b"later")
    socket.end()
    await over(listener, socket)


async def test_writing_to_one_tls_socket_from_the_handler_of_another(tls_wire: Wire) -> None:
    """B76."""
    heard = bytearray()
    out = await tls_wire.listen({"data": lambda socket, data: heard.extend(data)})
    relay = await tls_wire.connect(out, {"data": ignore})
    listener = await tls_wire.listen({"data": lambda socket, data: relay.write(data)})
    client = await tls_wire.connect(listener, {"data": ignore})
    sent = b"".join(b"%05d " % number for number in range(8000))
    for at in range(0, len(sent), 1000):
        client.write(sent[at : at + 1000])
        await asyncio.sleep(0)
    await until(lambda: heard == sent)
    for socket in (client, relay):
        socket.end()
    await over(listener, client)
    await over(out, relay)


@pytest.mark.parametrize("both", [False, True])
async def test_tls_end_waits_for_the_peers_close_notify(tls_wire: Wire, both: bool) -> None:
    """B96, B97: also if both sides of a half-open connection end at once."""
    server, client = Recorder(), Recorder()
    listener, accepted, socket = await pair(tls_wire, server, client, allow_half_open=True)
    socket.end()
    if both:
        accepted.end()
    else:
        await until(lambda: "end" in server.events)
        await asyncio.sleep(0.01)
        assert "close" not in client.events
        accepted.end()
    await over(listener, socket)
    assert not socket.truncated
    assert not accepted.truncated
    assert server.close_errors == client.close_errors == [None]


async def test_a_broken_record_is_error_then_close_and_nothing_behind_it(tls_wire: Wire) -> None:
    """B179."""
    written: list[int] = []
    server = Recorder(error=lambda socket, error: written.append(socket.write(b"x")))
    listener = await tls_wire.listen(server.table())
    with plain_peer(listener) as sock:
        sock.setblocking(True)
        incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        session = tls_wire.authority.client_context().wrap_bio(
            incoming, outgoing, server_hostname=SERVER_NAME
        )

        def talk() -> None:
            while True:
                try:
                    session.do_handshake()
                    break
                except ssl.SSLWantReadError:
                    sock.sendall(outgoing.read())
                    incoming.write(sock.recv(65536))
            session.write(b"good")
            good = outgoing.read()
            session.write(b"broken")
            broken = bytearray(outgoing.read())
            broken[-1] ^= 1
            session.write(b"behind it")
            sock.sendall(good + broken + outgoing.read())

        await soon(asyncio.to_thread(talk))
        await until(lambda: server.events[-1] == "close")
    assert server.received == b"good"
    assert server.events[-2:] == ["error", "close"]
    assert isinstance(server.errors[0], ssl.SSLError)
    assert written == [-1]
    assert not server.socket.authorized
    await over(listener)


async def test_certificates_that_cannot_be_used_fail_at_the_call(
    authority: Authority, tmp_path: Path
) -> None:
    """B181, B182, B183: a passphrase that is missing; a directory or FIFO in place of a file."""
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    for path in (tmp_path, fifo):
        with pytest.raises((OSError, ValueError), match=r"tls\.cert"):
            uvsock.listen(
                {"data": ignore}, "127.0.0.1", 0, tls=authority.server_options | {"cert": path}
            )
    two = [authority.server_options, Authority.pair(authority.ca.issue_cert("two.test"))]
    async with await uvsock.listen(
        {"data": ignore},
        "127.0.0.1",
        0,
        tls={name: [pair[name] for pair in two] for name in ("key", "cert")},
    ):
        pass
    from cryptography.hazmat.primitives import serialization

    key = serialization.load_pem_private_key(authority.server_options["key"], None)
    locked = key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.BestAvailableEncryption(b"open sesame"),
    )
    tls = authority.server_options | {"key": locked}
    with pytest.raises(ValueError, match=r"tls\.(key|passphrase)"):
        uvsock.listen({"data": ignore}, "127.0.0.1", 0, tls=tls)
    async with await uvsock.listen(
        {"data": ignore}, "127.0.0.1", 0, tls=tls | {"passphrase": "open sesame"}
    ):
        pass


async def test_upgrades_that_fail(tcp_wire: Wire, authority: Authority) -> None:
    """B197, B199, B200, B201: wrong arguments leave it usable, a failed handshake does not."""
    server = Recorder(open=lambda socket: socket.upgrade_tls(authority.server_options), data=echo)
    client = Recorder()
    listener = await tcp_wire.listen(server.table())
    socket = await tcp_wire.connect(listener, client.table())
    for wrong in (None, False, {"ca": "no PEM"}, {"nonsense": 1}, 5):
        with pytest.raises((TypeError, ValueError)):
            socket.upgrade_tls(wrong)
    await soon(socket.upgrade_tls(authority.client_options))
    socket.write(b"x")
    await until(lambda: client.received == b"x")
    socket.end()
    await soon(socket.wait_closed())
    other = await tcp_wire.connect(listener, client.table())
    with pytest.raises(ssl.SSLCertVerificationError):
        await soon(other.upgrade_tls({"server_name": SERVER_NAME}))
    assert other.write(b"plain text must not leak") == -1
    await over(listener, other)


async def test_tls_over_a_unix_socket(unix_wire: Wire, authority: Authority) -> None:
    """B209."""
    listener = await unix_wire.listen({"data": echo}, tls=authority.server_options)
    client = Recorder()
    socket = await unix_wire.connect(listener, client.table(), tls=authority.client_options)
    socket.write(b"secret")
    await until(lambda: client.received == b"secret")
    socket.end()
    await over(listener, socket)
