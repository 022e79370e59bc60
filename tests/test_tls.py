"""TLS on the wire: failed handshakes, half-close, records, truncation, new certificates.

The peers are the standard library's: blocking ones in a thread, or one that is driven by hand over
a plain connection, so that a test decides which bytes leave when. The TLS options themselves are in
test_contexts.
"""

from __future__ import annotations

import asyncio
import contextlib
import datetime
import hashlib
import socket as stdlib
import ssl
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
import trustme

import uvsock
from conftest import SERVER_NAME, Authority, Recorder, Wire
from helpers import soon, stopped, until

BOTH_VERSIONS = pytest.mark.parametrize("version", ["TLSv1.2", "TLSv1.3"])
ALERT, HANDSHAKE, APPLICATION_DATA = 21, 22, 23


class ByHand:
    """A TLS peer over a plain connection, one step at a time."""

    def __init__(
        self,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        context: ssl.SSLContext,
        server_hostname: str | None = SERVER_NAME,
        server_side: bool = False,
        session: ssl.SSLSession | None = None,
    ) -> None:
        self.reader, self.writer = reader, writer
        self.incoming, self.outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        self.ssl = context.wrap_bio(
            self.incoming,
            self.outgoing,
            server_side=server_side,
            server_hostname=None if server_side else server_hostname,
            session=session,
        )
        self.wire = b""  # all ciphertext received
        self.eof = False

    def push(self) -> None:
        if self.outgoing.pending:
            self.writer.write(self.outgoing.read())

    async def pull(self) -> None:
        data = await soon(self.reader.read(65536))
        self.wire += data
        if data:
            self.incoming.write(data)
        else:
            self.eof = True
            self.incoming.write_eof()

    async def step(self, call: Callable[[], Any]) -> Any:
        while True:
            try:
                result = call()
            except ssl.SSLWantReadError:
                self.push()
                await self.pull()
            except ssl.SSLZeroReturnError:
                return b""
            except ssl.SSLError:
                self.push()
                raise
            else:
                self.push()
                return result

    async def handshake(self) -> ByHand:
        await self.step(self.ssl.do_handshake)
        return self

    def send(self, data: bytes) -> None:
        self.ssl.write(data)
        self.push()

    async def receive(self, size: int) -> bytes:
        received = b""
        while len(received) < size:
            chunk = await self.step(lambda: self.ssl.read(65536))
            if not chunk:
                break
            received += chunk
        return received

    async def receive_until_end(self) -> bytes:
        """What comes until the peer's close_notify, or b"" and the end without one."""
        return await self.receive(1 << 40)

    def notify(self) -> None:
        """Send close_notify."""
        with contextlib.suppress(ssl.SSLWantReadError):  # the peer's own has not come
            self.ssl.unwrap()
        self.push()

    def records(self) -> list[int]:
        """The content types of the records received."""
        found, at = [], 0
        while at + 5 <= len(self.wire):
            found.append(self.wire[at])
            at += 5 + int.from_bytes(self.wire[at + 3 : at + 5])
        return found

    async def close(self) -> None:
        self.writer.transport.abort()
        await asyncio.sleep(0)


async def raw(
    listener: uvsock.Listener,
) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    return await asyncio.open_connection(listener.hostname, listener.port)


async def by_hand(
    listener: uvsock.Listener, authority: Authority, version: str = "TLSv1.3", **options: Any
) -> ByHand:
    """A client after its handshake."""
    context = options.pop("context", None) or authority.client_context()
    context.minimum_version = context.maximum_version = getattr(
        ssl.TLSVersion, version.replace(".", "_")
    )
    peer = ByHand(*await raw(listener), context, **options)
    try:
        return await peer.handshake()
    except BaseException:
        await peer.close()
        raise


async def serve_by_hand(
    authority: Authority, version: str, play: Callable[[ByHand], Awaitable[None]]
) -> asyncio.Server:
    """A server that does this with each connection."""

    async def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        context = authority.server_context()
        context.minimum_version = context.maximum_version = getattr(
            ssl.TLSVersion, version.replace(".", "_")
        )
        peer = ByHand(reader, writer, context, server_side=True)
        try:
            await play(await peer.handshake())
        finally:
            await peer.close()

    return await asyncio.start_server(connected, "127.0.0.1", 0)


def port_of(server: asyncio.Server) -> int:
    port: int = server.sockets[0].getsockname()[1]
    return port


# ── Half-close ─────────────────────────────────────────────────────────────────────────────────


@BOTH_VERSIONS
async def test_a_server_replies_after_the_peers_close_notify(
    tls_wire: Wire, authority: Authority, version: str
) -> None:
    recorder = Recorder(end=lambda socket: socket.end(b"heard: " + bytes(recorder.received)))
    listener = await tls_wire.listen(recorder.table())
    peer = await by_hand(listener, authority, version)
    peer.send(b"last words")
    peer.notify()
    assert await peer.receive_until_end() == b"heard: last words"
    await until(lambda: recorder.events[-1] == "close")
    assert recorder.events == ["handshake", "open", "data", "end", "close"]
    assert recorder.close_errors == [None]
    assert not recorder.socket.truncated
    await peer.close()
    await stopped(listener)


@BOTH_VERSIONS
async def test_a_client_receives_after_its_own_end(authority: Authority, version: str) -> None:
    heard = []

    async def play(peer: ByHand) -> None:
        heard.append(await peer.receive_until_end())
        for _ in range(5):
            peer.send(b"still here ")
            await asyncio.sleep(0.002)
        peer.notify()

    server = await serve_by_hand(authority, version, play)
    recorder = Recorder()
    client = await uvsock.connect(
        recorder.table(), "127.0.0.1", port_of(server), tls=authority.client_options
    )
    assert client.tls_version == version
    assert client.end(b"that is all") == 11
    await soon(client.wait_closed())
    assert heard == [b"that is all"]
    assert recorder.received == b"still here " * 5
    assert recorder.events[-2:] == ["end", "close"]
    assert recorder.close_errors == [None]
    server.close()
    await server.wait_closed()


@BOTH_VERSIONS
async def test_close_ends_with_the_peers_close_notify(
    tls_wire: Wire, authority: Authority, version: str
) -> None:
    """Its FIN need not be waited for: after its close_notify it has nothing to say."""
    recorder = Recorder(data=lambda socket, data: socket.close())
    listener = await tls_wire.listen(recorder.table())
    peer = await by_hand(listener, authority, version)
    peer.send(b"close, please")
    peer.send(b"dropped " * 10_000)
    assert await peer.receive_until_end() == b""
    peer.notify()
    await until(lambda: recorder.events[-1] == "close", 2)  # the peer's socket is still open
    assert recorder.close_errors == [None]
    await peer.close()
    await stopped(listener)


@BOTH_VERSIONS
async def test_allow_half_open_keeps_the_own_side_open_after_close_notify(
    tls_wire: Wire, authority: Authority, version: str
) -> None:
    recorder = Recorder()
    listener = await tls_wire.listen(recorder.table(), allow_half_open=True)
    peer = await by_hand(listener, authority, version)
    peer.notify()
    await until(lambda: "end" in recorder.events)
    for number in range(3):
        assert recorder.socket.write(b"%d" % number) == 1
        await asyncio.sleep(0.002)
    recorder.socket.end()
    assert await peer.receive_until_end() == b"012"
    await peer.close()
    await until(lambda: not listener.connections)
    await stopped(listener)


# ── How a session ends ─────────────────────────────────────────────────────────────────────────


@BOTH_VERSIONS
async def test_an_end_without_close_notify_is_a_truncation(
    tls_wire: Wire, authority: Authority, version: str
) -> None:
    seen: list[bool] = []
    recorder = Recorder(end=lambda socket: seen.append(socket.truncated))
    listener = await tls_wire.listen(recorder.table())
    peer = await by_hand(listener, authority, version)
    peer.send(b"cut")
    peer.writer.write_eof()
    await until(lambda: "end" in recorder.events)
    assert recorder.received == b"cut"
    assert seen == [True]
    await peer.close()
    await until(lambda: recorder.events[-1] == "close")
    await stopped(listener)


@BOTH_VERSIONS
async def test_a_reset_goes_to_close_and_to_no_error_handler(
    tls_wire: Wire, authority: Authority, version: str
) -> None:
    recorder = Recorder()
    listener = await tls_wire.listen(recorder.table())
    peer = await by_hand(listener, authority, version)
    peer.send(b"x")
    await until(lambda: recorder.received)
    sock = peer.writer.get_extra_info("socket")
    sock.setsockopt(stdlib.SOL_SOCKET, stdlib.SO_LINGER, b"\1\0\0\0\0\0\0\0")
    await peer.close()
    await until(lambda: recorder.events[-1] == "close")
    assert "error" not in recorder.events
    assert "end" not in recorder.events
    assert isinstance(recorder.close_errors[0], ConnectionResetError)
    await stopped(listener)


@pytest.mark.parametrize(
    "garbage", [b"\x17\x03\x03\x00\x20" + b"?" * 32, b"GET / HTTP/1.1\r\n\r\n", b"\x17\x03\x03\x7f"]
)
@BOTH_VERSIONS
async def test_a_broken_session_costs_its_own_connection_only(
    tls_wire: Wire, authority: Authority, version: str, garbage: bytes
) -> None:
    recorder = Recorder()
    listener = await tls_wire.listen(recorder.table())
    good = await by_hand(listener, authority, version)
    bad = await by_hand(listener, authority, version)
    await until(lambda: len(recorder.sockets) == 2)
    bad.send(b"before")
    bad.writer.write(garbage)
    if len(garbage) == 4:
        bad.writer.write(b"\xff" + b"?" * 32)  # longer than any record may be
    await until(lambda: "close" in recorder.events)
    assert recorder.received == b"before"
    (error,) = recorder.errors
    assert isinstance(error, ssl.SSLError)
    assert recorder.close_errors == [error]
    broken = next(call[1] for call in recorder.calls if call[0] == "close")
    assert broken.write(b"x") == -1
    good.send(b" and after")
    await until(lambda: recorder.received == b"before and after")
    # The peer is told why.
    await bad.pull()
    assert ALERT in bad.records() or version == "TLSv1.3"
    await good.close()
    await bad.close()
    await stopped(listener)


async def test_a_broken_session_without_error_handler_is_reported(
    tls_wire: Wire, authority: Authority, loop_errors: list[dict[str, Any]]
) -> None:
    closed: list[Any] = []
    listener = await tls_wire.listen(
        {"data": lambda socket, data: None, "close": lambda socket, error: closed.append(error)}
    )
    peer = await by_hand(listener, authority)
    peer.writer.write(b"\x17\x03\x03\x00\x20" + b"?" * 32)
    await until(lambda: closed)
    (context,) = loop_errors
    assert context["exception"] is closed[0]
    await peer.close()
    await stopped(listener)


# ── Handshakes that fail ───────────────────────────────────────────────────────────────────────


async def speak_http(listener: uvsock.Listener, authority: Authority) -> None:
    reader, writer = await raw(listener)
    writer.write(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
    await soon(reader.read())
    writer.close()


async def distrust(listener: uvsock.Listener, authority: Authority) -> None:
    with pytest.raises(ssl.SSLCertVerificationError):
        await by_hand(listener, authority, context=ssl.create_default_context())


async def expect_another_name(listener: uvsock.Listener, authority: Authority) -> None:
    with pytest.raises(ssl.SSLCertVerificationError):
        await by_hand(listener, authority, server_hostname="other.test")


async def refused(listener: uvsock.Listener, authority: Authority, context: ssl.SSLContext) -> None:
    """TLS 1.3: the server's refusal comes after the client's handshake."""
    with pytest.raises(ssl.SSLError):
        await by_hand_and_back(listener, authority, context)


async def by_hand_and_back(
    listener: uvsock.Listener, authority: Authority, context: ssl.SSLContext
) -> None:
    peer = await by_hand(listener, authority, context=context)
    try:
        await peer.receive(1)
    finally:
        await peer.close()


async def show_no_certificate(listener: uvsock.Listener, authority: Authority) -> None:
    await refused(listener, authority, authority.client_context())


async def show_an_expired_one(listener: uvsock.Listener, authority: Authority) -> None:
    context = authority.client_context()
    past = datetime.datetime(2020, 1, 1, tzinfo=datetime.UTC)
    authority.ca.issue_cert("late@uvsock.test", not_after=past).configure_cert(context)
    await refused(listener, authority, context)


async def show_a_strangers(listener: uvsock.Listener, authority: Authority) -> None:
    context = authority.client_context()
    trustme.CA().issue_cert("stranger@uvsock.test").configure_cert(context)
    await refused(listener, authority, context)


async def speak_an_old_version(listener: uvsock.Listener, authority: Authority) -> None:
    with pytest.raises(ssl.SSLError):
        await by_hand(listener, authority, version="TLSv1.2")


async def leave(listener: uvsock.Listener, authority: Authority, reset: bool = False) -> None:
    _, writer = await raw(listener)
    peer = ByHand(None, writer, authority.client_context())  # type: ignore[arg-type]
    with pytest.raises(ssl.SSLWantReadError):
        peer.ssl.do_handshake()
    hello = peer.outgoing.read()
    writer.write(hello[: len(hello) // 2])
    await asyncio.sleep(0.01)
    if reset:
        sock = writer.get_extra_info("socket")
        sock.setsockopt(stdlib.SOL_SOCKET, stdlib.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        writer.transport.abort()
    writer.close()


async def leave_with_a_reset(listener: uvsock.Listener, authority: Authority) -> None:
    await leave(listener, authority, reset=True)


MUTUAL = {"request_cert": True}
FAILURES: dict[str, tuple[Any, dict[str, Any], str]] = {
    "plain HTTP": (speak_http, {}, "HTTP"),
    "a client that does not know the CA": (distrust, {}, "unknown ca|certificate"),
    "a client that expects another name": (expect_another_name, {}, "certificate|alert"),
    "no client certificate": (show_no_certificate, MUTUAL, "certificate"),
    "an expired client certificate": (show_an_expired_one, MUTUAL, "expired"),
    "a client certificate of another CA": (show_a_strangers, MUTUAL, "verif"),
    "an old version": (speak_an_old_version, {"min_version": "TLSv1.3"}, "version|protocol"),
    "gone halfway": (leave, {}, "during the TLS handshake"),
    "reset halfway": (leave_with_a_reset, {}, "during the TLS handshake"),
}


@pytest.mark.parametrize("kind", FAILURES)
async def test_the_server_is_told_why_a_handshake_failed(
    tls_wire: Wire, authority: Authority, kind: str, capfd: pytest.CaptureFixture[str]
) -> None:
    """One call of `handshake`, nothing else, nothing on stderr, and the next client is served."""
    act, options, text = FAILURES[kind]
    recorder = Recorder()
    tls = authority.server_options | options
    if options is MUTUAL:
        tls["ca"] = authority.ca_pem
    listener = await tls_wire.listen(recorder.table(), tls=tls)
    await act(listener, authority)
    await until(lambda: recorder.events and not listener.connections)
    assert recorder.events == ["handshake"]
    (_, socket, success, error) = recorder.calls[0]
    assert success is False
    assert isinstance(error, ssl.SSLError)
    assert any(part.lower() in str(error).lower() for part in text.split("|")), error
    assert not socket.authorized
    assert socket.ready_state is uvsock.ReadyState.CLOSED
    assert listener.stats.handshake_failures == 1
    context = authority.client_context()
    authority.client.configure_cert(context)
    peer = await by_hand(listener, authority, context=context)
    await until(lambda: recorder.events[-1] == "open")
    await peer.close()
    await stopped(listener)
    assert capfd.readouterr().err == ""


async def test_a_failed_handshake_without_handler_is_counted_and_silent(
    tls_wire: Wire, authority: Authority
) -> None:
    listener = await tls_wire.listen({"data": lambda socket, data: None})
    await speak_http(listener, authority)
    await until(lambda: listener.stats.handshake_failures == 1 and not listener.connections)
    await stopped(listener)


async def test_a_handshake_byte_by_byte(tls_wire: Wire, authority: Authority) -> None:
    recorder = Recorder()
    listener = await tls_wire.listen(recorder.table())
    reader, writer = await raw(listener)
    peer = ByHand(reader, writer, authority.client_context())

    def slowly() -> None:
        for byte in peer.outgoing.read():
            writer.write(bytes([byte]))

    peer.push = slowly  # type: ignore[method-assign]
    await peer.handshake()
    peer.send(b"in pieces")
    await until(lambda: recorder.received == b"in pieces")
    assert recorder.events[:2] == ["handshake", "open"]
    await peer.close()
    await stopped(listener)


async def test_records_cut_at_every_byte(tls_wire: Wire, authority: Authority) -> None:
    recorder = Recorder(data=lambda socket, data: socket.write(data))
    listener = await tls_wire.listen(recorder.table())
    peer = await by_hand(listener, authority)
    sent = b""
    for cut in range(1, 60):
        peer.ssl.write(b"<%d>" % cut)
        peer.ssl.write(b"[%d]" % cut)
        records = peer.outgoing.read()
        peer.writer.write(records[:cut])
        await asyncio.sleep(0.001)
        peer.writer.write(records[cut:])
        sent += b"<%d>[%d]" % (cut, cut)
    await until(lambda: recorder.received == sent)
    assert await peer.receive(len(sent)) == sent
    await peer.close()
    await stopped(listener)


@pytest.mark.parametrize("kind", ["stranger", "name", "expired", "plain", "closing"])
async def test_a_client_raises_why_the_handshake_failed(authority: Authority, kind: str) -> None:
    ca, names, options = authority.ca, [SERVER_NAME], {}
    if kind == "stranger":
        ca = trustme.CA()
    if kind == "name":
        names = ["other.test"]
    if kind == "expired":
        options["not_after"] = datetime.datetime(2020, 1, 1, tzinfo=datetime.UTC)
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    ca.issue_cert(*names, **options).configure_cert(context)

    async def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            if kind == "plain":
                writer.write(b"220 no TLS here\r\n")
                await reader.read()
            elif kind != "closing":
                with pytest.raises(ssl.SSLError):
                    await ByHand(reader, writer, context, server_side=True).handshake()
        finally:
            writer.transport.abort()

    server = await asyncio.start_server(connected, "127.0.0.1", 0)
    recorder = Recorder()
    expected = {"plain": ssl.SSLError, "closing": (ssl.SSLError, ConnectionError)}
    with pytest.raises(expected.get(kind, ssl.SSLCertVerificationError)) as caught:
        await uvsock.connect(
            recorder.table(), "127.0.0.1", port_of(server), tls=authority.client_options, data="d"
        )
    assert recorder.events == ["handshake", "connect_error"]
    (_, socket, error) = recorder.calls[-1]
    assert error is caught.value
    assert socket.data == "d"
    assert socket.write(b"x") == -1
    if kind in ("stranger", "name", "expired"):
        assert socket.authorization_error is error
    server.close()
    await server.wait_closed()


# ── Certificates of both sides ─────────────────────────────────────────────────────────────────


@BOTH_VERSIONS
async def test_both_sides_show_certificates(
    tls_wire: Wire, authority: Authority, version: str
) -> None:
    server, client = Recorder(), Recorder()
    mutual = authority.server_options | {"request_cert": True, "ca": authority.ca_pem}
    listener = await tls_wire.listen(server.table(), tls=mutual)
    context = authority.client_context()
    authority.client.configure_cert(context)
    context.minimum_version = context.maximum_version = getattr(
        ssl.TLSVersion, version.replace(".", "_")
    )
    socket = await uvsock.connect(
        client.table(), "127.0.0.1", listener.port, tls=context, server_hostname=SERVER_NAME
    )
    await until(lambda: server.sockets)
    for end, names in ((socket, SERVER_NAME), (server.socket, "client@uvsock.test")):
        assert end.encrypted
        assert end.authorized
        assert end.authorization_error is None
        assert end.tls_version == version
        assert end.cipher[1] == version
        certificate = end.peer_certificate()
        assert names in str(certificate["subjectAltName"])
        assert ssl.DER_cert_to_PEM_cert(end.peer_certificate(binary=True)).startswith("-----BEGIN")
        assert end.get_extra_info("ssl_object").version() == version
    assert socket.server_name == SERVER_NAME
    assert server.socket.server_name == SERVER_NAME
    if version == "TLSv1.2":
        assert socket.channel_binding() == server.socket.channel_binding() != None  # noqa: E711
    socket.end()
    await soon(socket.wait_closed())
    assert socket.tls_version == version  # after close too
    await stopped(listener)


async def test_a_plain_socket_has_the_tls_attributes_too(tcp_wire: Wire) -> None:
    recorder = Recorder()
    listener = await tcp_wire.listen(recorder.table())
    socket = await tcp_wire.connect(listener, {"data": lambda socket, data: None})
    assert (socket.encrypted, socket.authorized) == (False, False)
    for name in (
        "authorization_error", "alpn_protocol", "server_name", "tls_version", "cipher",
        "session_reused",
    ):  # fmt: skip
        assert getattr(socket, name) is None
    assert socket.peer_certificate() is None
    assert socket.channel_binding() is None
    assert not socket.truncated
    socket.end()
    await soon(socket.wait_closed())
    await stopped(listener)


@pytest.mark.parametrize(
    ("server", "client", "chosen"),
    [
        (["h2", "http/1.1"], ["http/1.1", "h2"], "h2"),
        (["mqtt"], None, False),
        (None, ["mqtt"], False),
    ],
)
async def test_alpn(
    tls_wire: Wire, authority: Authority, server: Any, client: Any, chosen: Any
) -> None:
    recorder = Recorder()
    listener = await tls_wire.listen(
        recorder.table(), tls=authority.server_options | {"alpn_protocols": server}
    )
    socket = await tls_wire.connect(
        listener,
        {"data": lambda socket, data: None},
        tls=authority.client_options | {"alpn_protocols": client},
    )
    await until(lambda: recorder.sockets)
    assert socket.alpn_protocol == recorder.socket.alpn_protocol == chosen
    socket.end()
    await soon(socket.wait_closed())
    await stopped(listener)


async def test_sni_chooses_the_certificate(authority: Authority) -> None:
    hosts = {name: authority.ca.issue_cert(name) for name in ("a.test", "*.b.test")}
    recorder = Recorder()
    listener = await uvsock.listen(
        recorder.table(),
        "127.0.0.1",
        0,
        tls=authority.server_options
        | {"sni": {name: Authority.pair(leaf) for name, leaf in hosts.items()}},
    )
    for name, shown in (
        ("a.test", "a.test"),
        ("x.b.test", "*.b.test"),
        (SERVER_NAME, SERVER_NAME),
    ):
        socket = await uvsock.connect(
            {"data": lambda socket, data: None},
            "127.0.0.1",
            listener.port,
            tls={"ca": authority.ca_pem},
            server_hostname=name,
        )
        assert shown in str(socket.peer_certificate())
        await until(lambda: recorder.sockets)
        assert recorder.sockets.pop().server_name == name
        socket.end()
        await soon(socket.wait_closed())
    await stopped(listener)


@BOTH_VERSIONS
async def test_sessions_are_resumed(tls_wire: Wire, authority: Authority, version: str) -> None:
    recorder = Recorder(data=lambda socket, data: socket.write(data))
    listener = await tls_wire.listen(recorder.table())
    context = authority.client_context()
    first = await by_hand(listener, authority, version, context=context)
    first.send(b"x")
    await first.receive(1)  # TLS 1.3: the ticket comes with it
    session = first.ssl.session
    assert session is not None
    second = await by_hand(listener, authority, version, context=context, session=session)
    second.send(b"y")
    await second.receive(1)
    assert second.ssl.session_reused
    assert [socket.session_reused for socket in recorder.sockets] == [False, True]
    await first.close()
    await second.close()
    await stopped(listener)


async def test_reload_tls_changes_new_connections_only(
    tls_wire: Wire, authority: Authority
) -> None:
    listener = await tls_wire.listen({"data": lambda socket, data: socket.write(data)})
    table = {"data": lambda socket, data: None}
    old = await tls_wire.connect(listener, table)
    shown = old.peer_certificate(binary=True)
    listener.reload_tls(Authority.pair(authority.ca.issue_cert(SERVER_NAME)))
    with pytest.raises(ValueError, match="tls"):
        listener.reload_tls({"key": b"no key", "cert": b"no certificate"})
    new = await tls_wire.connect(listener, table)
    assert new.peer_certificate(binary=True) != shown
    assert old.write(b"x") == new.write(b"x") == 1
    await until(lambda: old.bytes_read == new.bytes_read == 1)
    for socket in (old, new):
        socket.end()
        await soon(socket.wait_closed())
    await stopped(listener)


# ── Records ────────────────────────────────────────────────────────────────────────────────────


@BOTH_VERSIONS
async def test_a_turns_small_writes_are_one_record(
    tls_wire: Wire, authority: Authority, version: str
) -> None:
    def data(socket: uvsock.Socket[Any], data: bytes) -> None:
        for number in range(100):
            socket.write(b"%02d" % number)

    listener = await tls_wire.listen({"data": data})
    peer = await by_hand(listener, authority, version)
    expected = b"".join(b"%02d" % number for number in range(100))
    for _ in range(2):
        peer.wire = b""
        peer.send(b"go")
        assert await peer.receive(200) == expected
    # The first time the session tickets of TLS 1.3 came before it.
    assert peer.records() == [APPLICATION_DATA]
    await peer.close()
    await stopped(listener)


async def test_without_cork_each_write_is_a_record(tls_wire: Wire, authority: Authority) -> None:
    listener = await tls_wire.listen(
        {"data": lambda socket, data: [socket.write(b"x") for _ in range(7)]}, cork=False
    )
    peer = await by_hand(listener, authority, "TLSv1.2")
    peer.wire = b""
    peer.send(b"go")
    assert await peer.receive(7) == b"x" * 7
    assert peer.records() == [APPLICATION_DATA] * 7
    await peer.close()
    await stopped(listener)


async def test_large_transfers_both_ways_at_once(tls_wire: Wire) -> None:
    """The peer is slow and blocking; nothing is lost, also after `end`."""
    payload = hashlib.shake_128(b"seed").digest(3_000_000)
    received = bytearray()

    async def opened(socket: uvsock.Socket[Any]) -> None:
        tasks.append(asyncio.create_task(socket.send_all(payload)))

    tasks: list[asyncio.Task[None]] = []

    async def end(socket: uvsock.Socket[Any]) -> None:
        await tasks[0]

    listener = await tls_wire.listen(
        {"open": opened, "data": lambda socket, data: received.extend(data), "end": end}
    )

    def talk() -> bytes:
        back = bytearray()
        with tls_wire.dial(listener) as sock:
            sock.setblocking(False)
            sent = 0
            while len(back) < len(payload) or sent < len(payload):
                try:
                    sent += sock.send(payload[sent : sent + 30_000]) if sent < len(payload) else 0
                except (ssl.SSLWantReadError, ssl.SSLWantWriteError):
                    sent += 0
                try:
                    back += sock.recv(20_000)
                except (ssl.SSLWantReadError, ssl.SSLWantWriteError):
                    continue
            sock.setblocking(True)
            sock.unwrap()
        return bytes(back)

    assert await soon(asyncio.to_thread(talk), 20) == payload
    await until(lambda: not listener.connections)
    assert received == payload
    await stopped(listener)


@BOTH_VERSIONS
async def test_messages_of_every_size_come_back(
    tls_wire: Wire, authority: Authority, version: str
) -> None:
    recorder = Recorder(data=lambda socket, data: socket.write(data))
    listener = await tls_wire.listen(recorder.table())
    peer = await by_hand(listener, authority, version)
    for size in (1, 2, 100, 16383, 16384, 16385, 32768, 60_000):
        message = hashlib.shake_128(b"%d" % size).digest(size)
        peer.send(message[:16384])
        peer.send(message[16384:])
        assert await peer.receive(size) == message
    await peer.close()
    await stopped(listener)
