"""STARTTLS: `upgrade_tls` on live connections, from both sides, with bytes on either side of it."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import io
import smtplib
import ssl
from pathlib import Path
from typing import Any

import pytest

import uvsock
from conftest import SERVER_NAME, Authority, Recorder, Wire
from helpers import ignore, soon, stopped, until
from test_tls import ByHand, raw
from uvsock import ReadyState

PAYLOAD = hashlib.shake_128(b"upgrade").digest(400_000)


def starttls(authority: Authority, **table: Any) -> dict[str, Any]:
    """A server that answers "starttls" with "ok" and TLS, and echoes all else in capitals."""

    def data(socket: uvsock.Socket[Any], data: bytes) -> None:
        if not socket.encrypted and data.startswith(b"starttls\n"):
            socket.write(b"ok\n")
            socket.upgrade_tls(authority.server_options, leftover=data[9:])
        else:
            socket.write(data.upper())

    return {"data": data} | table


async def upgraded(listener: uvsock.Listener, authority: Authority) -> ByHand:
    """A client driven by hand that has asked for TLS, before its handshake."""
    reader, writer = await raw(listener)
    writer.write(b"starttls\n")
    assert await soon(reader.readexactly(3)) == b"ok\n"
    return ByHand(reader, writer, authority.client_context())


async def test_both_sides_of_uvsock(plain_wire: Wire, authority: Authority) -> None:
    server, client = Recorder(), Recorder()
    upgrades: list[asyncio.Future[Any]] = []

    def asked(socket: uvsock.Socket[Any], data: bytes) -> None:
        if socket.encrypted:
            socket.write(data.upper())
        else:
            assert data == b"starttls"
            socket.write(b"ok")
            upgrades.append(socket.upgrade_tls(authority.server_options))

    server.overrides = {"data": asked}
    listener = await plain_wire.listen(server.table())
    socket = await plain_wire.connect(listener, client.table())
    socket.write(b"starttls")
    await until(lambda: client.received == b"ok")
    future = socket.upgrade_tls(authority.client_options)
    assert socket.write(b"written before the handshake is done") == 36
    assert await soon(future) is socket
    assert socket.encrypted
    assert socket.authorized
    assert await soon(upgrades[0]) is server.socket
    await until(lambda: client.received == b"okWRITTEN BEFORE THE HANDSHAKE IS DONE")
    assert socket.bytes_written == len(b"starttls") + 36
    socket.end()
    await soon(socket.wait_closed())
    await until(lambda: server.events[-1] == "close")
    for recorder in (server, client):
        assert recorder.events.count("open") == recorder.events.count("handshake") == 1
        assert recorder.close_errors == [None]
    assert not socket.truncated
    await stopped(listener)


@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])
async def test_leftover_cut_at_every_byte(
    tcp_wire: Wire, authority: Authority, version: ssl.TLSVersion
) -> None:
    """The ClientHello comes with the last plain bytes: some of it, or all, in the same segment."""
    listener = await tcp_wire.listen(starttls(authority))
    for cut in (0, 1, 4, 5, 6, 50, 100, 1000):
        reader, writer = await raw(listener)
        context = authority.client_context(minimum_version=version, maximum_version=version)
        peer = ByHand(reader, writer, context)
        with pytest.raises(ssl.SSLWantReadError):
            peer.ssl.do_handshake()
        hello = peer.outgoing.read()
        writer.write(b"starttls\n" + hello[:cut])
        await asyncio.sleep(0.003)
        writer.write(hello[cut:])
        assert await soon(reader.readexactly(3)) == b"ok\n"
        await peer.handshake()
        peer.send(b"quiet")
        assert await peer.receive(5) == b"QUIET"
        await peer.close()
    await stopped(listener)


async def test_leftover_with_the_whole_flight_and_data(
    tcp_wire: Wire, authority: Authority
) -> None:
    """A client that upgrades and is upgraded in one segment: its peer sends the same way."""
    recorder = Recorder()
    listener = await tcp_wire.listen(
        {"open": lambda socket: socket.write(b"hello\n"), "data": ignore}
    )
    socket = await tcp_wire.connect(listener, recorder.table())
    await until(lambda: recorder.received == b"hello\n")
    with pytest.raises(TypeError, match="^leftover: "):
        socket.upgrade_tls(authority.client_options, leftover="text")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="^leftover: must be a C-contiguous buffer"):
        socket.upgrade_tls(authority.client_options, leftover=memoryview(b"abcd")[::2])
    released = memoryview(b"x")
    released.release()
    with pytest.raises(ValueError, match="released"):
        socket.upgrade_tls(authority.client_options, leftover=released)
    with pytest.raises(ValueError, match="^tls: "):
        socket.upgrade_tls(None)
    with pytest.raises(TypeError, match="^server_side: "):
        socket.upgrade_tls(authority.client_options, server_side=1)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="^handlers: "):
        socket.upgrade_tls(authority.client_options, handlers={"dat": ignore})
    assert not socket.encrypted
    assert socket.write(b"still plain") == 11
    socket.end()
    await soon(socket.wait_closed())
    await stopped(listener)


async def test_what_was_written_before_leaves_plain_also_under_back_pressure(
    tcp_wire: Wire, authority: Authority
) -> None:
    taken: list[int] = []

    def data(socket: uvsock.Socket[Any], data: bytes) -> None:
        if socket.encrypted:
            socket.write(data.upper())
            return
        while (n := socket.write(PAYLOAD)) == len(PAYLOAD):
            taken.append(n)
        taken.append(n)
        socket.upgrade_tls(authority.server_options)
        assert socket.writable_length > 0

    listener = await tcp_wire.listen({"data": data})
    reader, writer = await raw(listener)
    writer.write(b"go")
    await until(lambda: taken and taken[-1] < len(PAYLOAD))
    expected = (PAYLOAD * len(taken))[: sum(taken)]
    assert await soon(reader.readexactly(len(expected))) == expected
    peer = await ByHand(reader, writer, authority.client_context()).handshake()
    peer.send(b"now in secret")
    assert await peer.receive(13) == b"NOW IN SECRET"
    await peer.close()
    await stopped(listener)


@pytest.mark.parametrize("event", ["open", "data", "drain", "timeout", "error"])
async def test_from_inside_each_handler(tcp_wire: Wire, authority: Authority, event: str) -> None:
    def upgrade(socket: uvsock.Socket[Any], *arguments: Any) -> None:
        if not socket.encrypted:
            socket.upgrade_tls(authority.server_options)

    def opened(socket: uvsock.Socket[Any]) -> None:
        if event == "timeout":
            socket.timeout(0.001)
        if event == "drain":
            while socket.write(PAYLOAD) == len(PAYLOAD):
                pass

    def data(socket: uvsock.Socket[Any], data: bytes) -> None:
        if event == "error" and not socket.encrypted:
            raise ValueError
        if event == "data":
            upgrade(socket)
        if socket.encrypted:
            received.extend(data)

    received = bytearray()
    table: dict[str, Any] = {"open": opened, "data": data}
    if event != "data":
        table[event] = upgrade
    listener = await tcp_wire.listen(table)
    reader, writer = await raw(listener)
    if event in ("data", "error"):
        writer.write(b"x")
    (socket,) = await connected(listener)
    plain = 0
    while not socket.encrypted or socket.writable_length or socket.bytes_written > plain:
        if socket.bytes_written > plain:
            plain += len(await soon(reader.read(1 << 20)))
        else:
            await asyncio.sleep(0.001)
    peer = await ByHand(reader, writer, authority.client_context()).handshake()
    received.clear()
    peer.send(b"secret")
    await until(lambda: received == b"secret")
    await peer.close()
    await stopped(listener)


async def connected(listener: uvsock.Listener) -> frozenset[uvsock.Socket[Any]]:
    await until(lambda: listener.connections)
    return listener.sockets


async def test_an_async_handler_awaits_the_upgrade(tcp_wire: Wire, authority: Authority) -> None:
    order: list[str] = []

    async def data(socket: uvsock.Socket[Any], data: bytes) -> None:
        order.append(data.decode())
        if data == b"starttls":
            socket.write(b"ok")
            await socket.upgrade_tls(authority.server_options)
            order.append(f"upgraded {socket.tls_version}")
            socket.write(b"welcome")

    listener = await tcp_wire.listen({"data": data})
    reader, writer = await raw(listener)
    writer.write(b"starttls")
    assert await soon(reader.readexactly(2)) == b"ok"
    peer = await ByHand(reader, writer, authority.client_context()).handshake()
    peer.send(b"first words")
    assert await peer.receive(7) == b"welcome"
    await until(lambda: len(order) == 3)
    assert order == ["starttls", "upgraded TLSv1.3", "first words"]
    await peer.close()
    await stopped(listener)


async def test_the_socket_leaves_its_listeners_table(tcp_wire: Wire, authority: Authority) -> None:
    heard: list[str] = []

    def data(socket: uvsock.Socket[Any], data: bytes) -> None:
        socket.upgrade_tls(
            authority.server_options,
            {
                "data": lambda socket, data: heard.append("own"),
                "handshake": lambda socket, success, error: heard.append(f"handshake {success}"),
            },
        )

    listener = await tcp_wire.listen({"data": data, "handshake": ignore})
    reader, writer = await raw(listener)
    writer.write(b"x")
    (socket,) = await connected(listener)
    await until(lambda: socket.encrypted)
    peer = await ByHand(reader, writer, authority.client_context()).handshake()
    listener.reload({"data": lambda socket, data: heard.append("reloaded")})
    peer.send(b"x")
    await until(lambda: len(heard) == 2)
    assert heard == ["handshake True", "own"]
    assert listener.connections == 1
    await peer.close()
    await stopped(listener)


async def test_it_is_refused_twice_and_on_a_socket_that_ends(
    tcp_wire: Wire, authority: Authority
) -> None:
    recorder = Recorder()
    listener = await tcp_wire.listen(recorder.table())
    peer_reader, peer_writer = await raw(listener)
    (socket,) = await connected(listener)
    future = socket.upgrade_tls(authority.server_options)
    with pytest.raises(RuntimeError, match="encrypted already"):
        socket.upgrade_tls(authority.server_options)
    peer = await ByHand(peer_reader, peer_writer, authority.client_context()).handshake()
    await soon(future)
    with pytest.raises(RuntimeError, match="encrypted already"):
        socket.upgrade_tls(authority.server_options)
    await peer.close()
    await soon(socket.wait_closed())
    other = await tcp_wire.connect(listener, {"data": ignore})
    other.end()
    with pytest.raises(RuntimeError, match="not open"):
        other.upgrade_tls(authority.client_options)
    await soon(other.wait_closed())
    assert other.ready_state is ReadyState.CLOSED
    with pytest.raises(RuntimeError, match="not open"):
        other.upgrade_tls(authority.client_options)
    await stopped(listener)


async def test_a_failed_upgrade_is_told_to_handshake_future_and_close(
    tcp_wire: Wire, authority: Authority
) -> None:
    recorder = Recorder()
    listener = await tcp_wire.listen(recorder.table())
    reader, writer = await raw(listener)
    (socket,) = await connected(listener)
    future = socket.upgrade_tls(authority.server_options)
    writer.write(b"this is not TLS\r\n")
    with pytest.raises(ssl.SSLError) as caught:
        await soon(future)
    await soon(socket.wait_closed())
    assert recorder.events == ["open", "handshake", "close"]
    assert recorder.calls[1][2:] == (False, caught.value)
    assert recorder.close_errors == [caught.value]
    await soon(reader.read())
    writer.close()
    await stopped(listener)


async def test_a_client_verifies_the_name_that_it_connected_to(
    tcp_wire: Wire, authority: Authority
) -> None:
    for name, good in (("other.test", False), (SERVER_NAME, True)):
        listener = await tcp_wire.listen(starttls(authority))
        recorder = Recorder()
        client = await uvsock.connect(
            recorder.table(), "127.0.0.1", listener.port, server_hostname=name
        )
        client.write(b"starttls\n")
        await until(lambda r=recorder: r.received == b"ok\n")
        future = client.upgrade_tls({"ca": authority.ca_pem})
        if good:
            await soon(future)
            client.end()
        else:
            with pytest.raises(ssl.SSLCertVerificationError):
                await soon(future)
            assert isinstance(client.authorization_error, ssl.SSLCertVerificationError)
        await soon(client.wait_closed())
        await stopped(listener)


async def test_a_paused_socket_still_does_the_handshake(
    tcp_wire: Wire, authority: Authority
) -> None:
    recorder = Recorder()
    listener = await tcp_wire.listen(recorder.table())
    reader, writer = await raw(listener)
    (socket,) = await connected(listener)
    socket.pause()
    future = socket.upgrade_tls(authority.server_options)
    peer = await ByHand(reader, writer, authority.client_context()).handshake()
    peer.send(b"patience")
    await soon(future)
    await asyncio.sleep(0.005)
    assert not recorder.received
    socket.resume()
    await until(lambda: recorder.received == b"patience")
    await peer.close()
    await stopped(listener)


async def test_ends_while_the_handshake_runs(tcp_wire: Wire, authority: Authority) -> None:
    """What was accepted before `end` waits for the handshake, and arrives."""
    listener = await tcp_wire.listen({"data": ignore})
    reader, writer = await raw(listener)
    (socket,) = await connected(listener)
    socket.upgrade_tls(authority.server_options)
    assert socket.write(b"the last ") == 9
    assert socket.end(b"words") == 5
    peer = await ByHand(reader, writer, authority.client_context()).handshake()
    assert await peer.receive_until_end() == b"the last words"
    await peer.close()
    await until(lambda: not listener.connections)
    await stopped(listener)


async def test_a_server_can_be_the_tls_client(tcp_wire: Wire, authority: Authority) -> None:
    """`server_side` decides, not who has connected."""
    listener = await tcp_wire.listen({"data": ignore})
    client = await tcp_wire.connect(listener, {"data": ignore})
    (accepted,) = await connected(listener)
    ends = (
        client.upgrade_tls(authority.server_options, server_side=True),
        accepted.upgrade_tls(authority.client_options, server_side=False),
    )
    await soon(asyncio.gather(*ends))
    assert accepted.authorized
    client.end()
    await soon(client.wait_closed())
    await stopped(listener)


async def test_the_standard_librarys_smtp_client(tcp_wire: Wire, authority: Authority) -> None:
    """A mail server's STARTTLS (RFC 3207), as far as EHLO, and a mail that arrives."""
    mails: list[bytes] = []

    def opened(socket: uvsock.Socket[Any]) -> None:
        socket.data = {"partial": b"", "body": None}
        socket.write(b"220 ready\r\n")

    def data(socket: uvsock.Socket[Any], data: bytes) -> None:
        *lines, socket.data["partial"] = (socket.data["partial"] + data).split(b"\r\n")
        for number, line in enumerate(lines):
            if socket.data["body"] is not None:
                if line == b".":
                    mails.append(b"\n".join(socket.data["body"]))
                    socket.data["body"] = None
                    socket.write(b"250 accepted\r\n")
                else:
                    socket.data["body"].append(line)
                continue
            word = line[:4].upper()
            if word == b"EHLO":
                offer = b"" if socket.encrypted else b"250-STARTTLS\r\n"
                socket.write(b"250-uvsock\r\n" + offer + b"250 HELP\r\n")
            elif word == b"STAR":
                socket.write(b"220 go ahead\r\n")
                rest = b"\r\n".join([*lines[number + 1 :], socket.data["partial"]])
                socket.data["partial"] = b""
                socket.upgrade_tls(authority.server_options, leftover=rest)
                return
            elif word == b"DATA":
                socket.data["body"] = []
                socket.write(b"354 go on\r\n")
            elif word == b"QUIT":
                socket.end(b"221 bye\r\n")
            else:
                socket.write(b"250 fine\r\n")

    def send() -> None:
        with smtplib.SMTP("localhost", listener.port or 0, timeout=10) as client:
            client.starttls(context=authority.client_context())
            client.sendmail(
                "a@uvsock.test", ["b@uvsock.test"], "Subject: hi\r\n\r\nsecret text\r\n"
            )

    listener = await tcp_wire.listen({"open": opened, "data": data})
    await soon(asyncio.to_thread(send))
    assert mails == [b"Subject: hi\n\nsecret text"]
    await until(lambda: not listener.connections)
    await stopped(listener)


@pytest.mark.parametrize("writes", [1, 2])
@pytest.mark.parametrize("ending", ["close", "end"])
@pytest.mark.parametrize("leftover", [False, True])
async def test_what_is_written_before_the_handshake_arrives(
    tcp_wire: Wire, authority: Authority, writes: int, ending: str, leftover: bool
) -> None:
    def data(socket: uvsock.Socket[Any], data: bytes) -> None:
        if not leftover:
            socket.write(b"go")
        socket.upgrade_tls(authority.server_options, leftover=data if leftover else b"")
        for _ in range(writes):
            socket.write(b"x")
        getattr(socket, ending)()

    listener = await tcp_wire.listen({"data": data})
    reader, writer = await raw(listener)
    peer = ByHand(reader, writer, authority.client_context())
    if not leftover:
        writer.write(b"starttls")
        assert await soon(reader.readexactly(2)) == b"go"
    await peer.handshake()
    assert await soon(peer.receive(writes)) == b"x" * writes
    await peer.close()
    await stopped(listener)


async def test_it_is_refused_while_a_file_is_sent(
    plain_wire: Wire, authority: Authority, tmp_path: Path
) -> None:
    """What is left of the file would leave in the clear, behind the ClientHello."""
    content = b"secret" * (4 << 20)
    path = tmp_path / "file"
    path.write_bytes(content)
    server = Recorder(open=lambda socket: socket.pause())
    listener = await plain_wire.listen(server.table())
    socket = await plain_wire.connect(listener, {"data": ignore})
    with path.open("rb") as file, contextlib.closing(io.BytesIO(b"secret")) as other:
        tasks = [asyncio.create_task(socket.sendfile(source)) for source in (file, other)]
        await until(lambda: socket.bytes_written)
        with pytest.raises(RuntimeError, match="sendfile is in progress"):
            socket.upgrade_tls(authority.client_options)
        assert not socket.encrypted
        server.socket.resume()
        assert await soon(asyncio.gather(*tasks)) == [len(content), 6]
    await until(lambda: len(server.received) == len(content) + 6)
    assert server.received == content + b"secret"
    socket.terminate()
    await stopped(listener)


async def test_what_send_all_has_left_is_encrypted(tcp_wire: Wire, authority: Authority) -> None:
    server = Recorder(open=lambda socket: socket.pause())
    listener = await tcp_wire.listen(server.table())
    socket = await tcp_wire.connect(listener, {"data": ignore})
    content = b"secret" * (4 << 20)
    task = asyncio.create_task(socket.send_all(content))
    await until(lambda: socket.writable_length)
    accepted = socket.bytes_written
    upgrading = socket.upgrade_tls(authority.client_options)
    server.socket.resume()
    await until(lambda: len(server.received) > accepted)
    assert server.received[:accepted] == content[:accepted]
    assert server.received[accepted : accepted + 2] == b"\x16\x03"  # a ClientHello
    await asyncio.sleep(0.05)
    assert b"secret" not in server.received[accepted:]
    task.cancel()
    upgrading.cancel()
    await asyncio.gather(task, upgrading, return_exceptions=True)
    socket.terminate()
    await stopped(listener)
