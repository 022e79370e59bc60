"""Programs of others as peers: Bun, OpenSSL's command line, socat, the standard library."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import http.client
import os
import shutil
import socket as stdlib
import ssl
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

import uvsock
from conftest import SERVER_NAME, Authority, Recorder, Wire
from helpers import soon, stopped, until

INTEROP = Path(__file__).parent / "interop"
LARGE = 2_000_000
MESSAGE = bytes((i * 31 + (i >> 8)) & 255 for i in range(LARGE))


def program(name: str) -> str:
    """The path of a program; without it the test is skipped, or fails where CI says so."""
    found = shutil.which(name)
    if name == "bun":
        found = os.environ.get("UVSOCK_BUN") or found
    if found:
        return found
    message = f"{name} is not installed"
    if os.environ.get("CI"):
        pytest.fail(message)
    pytest.skip(message)


@contextlib.asynccontextmanager
async def running(*command: str, **options: Any) -> AsyncIterator[asyncio.subprocess.Process]:
    """A program, ended and reaped whatever happens."""
    pipe = asyncio.subprocess.PIPE
    process = await asyncio.create_subprocess_exec(
        *command, stdin=pipe, stdout=pipe, stderr=asyncio.subprocess.STDOUT, **options
    )
    try:
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        assert process.stdin is not None
        process.stdin.close()
        await soon(process.communicate())


async def output_of(*command: str, given: bytes = b"", **options: Any) -> bytes:
    """What a program prints, until it ends by itself."""
    async with running(*command, **options) as process:
        printed, _ = await soon(process.communicate(given), 20)
        return bytes(printed)


class Echo(Recorder):
    """Sends everything back, also to a peer that reads slowly."""

    def __init__(self) -> None:
        super().__init__(data=self.returned, drain=self.go_on)
        self.rest: dict[Any, memoryview] = {}

    def returned(self, socket: uvsock.Socket[Any], data: Any) -> None:
        sent = socket.write(data)
        if 0 <= sent < len(data):
            self.rest[socket] = memoryview(data)[sent:]
            socket.pause()

    def go_on(self, socket: uvsock.Socket[Any]) -> None:
        if socket in self.rest:
            self.returned(socket, self.rest.pop(socket))
        if socket not in self.rest:
            socket.resume()


def where(listener: uvsock.Listener) -> str:
    return listener.unix or str(listener.port)


def socat_address(wire: Wire, listener: uvsock.Listener, directory: Path) -> str:
    if listener.unix:
        return f"UNIX-CONNECT:{listener.unix}"
    if not wire.encrypted:
        return f"TCP:127.0.0.1:{listener.port}"
    (directory / "ca.pem").write_bytes(wire.authority.ca_pem)
    return (
        f"OPENSSL:127.0.0.1:{listener.port},cafile={directory / 'ca.pem'},"
        f"commonname={SERVER_NAME},snihost={SERVER_NAME}"
    )


def write_certificates(authority: Authority, directory: Path) -> tuple[str, str, str]:
    """The files of the CA, the server's certificate chain and its key."""
    options = authority.server_options
    for name, content in (
        ("ca", authority.ca_pem), ("cert", options["cert"]), ("key", options["key"]),
    ):  # fmt: skip
        (directory / f"{name}.pem").write_bytes(content)
    ca, cert, key = (str(directory / f"{name}.pem") for name in ("ca", "cert", "key"))
    return ca, cert, key


# ── Bun ────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("size", [1, LARGE])
async def test_bun_as_a_client(wire: Wire, size: int, tmp_path: Path) -> None:
    bun = program("bun")
    echo = Echo()
    listener = await wire.listen(echo.table())
    command = [bun, str(INTEROP / "talk.js"), where(listener), str(size)]
    if wire.encrypted:
        command.append(write_certificates(wire.authority, tmp_path)[0])
    assert await output_of(*command) == b"%d true\n" % size
    await until(lambda: echo.events[-1] == "close")
    assert len(echo.received) == size
    assert echo.close_errors == [None]
    assert not echo.socket.truncated
    await stopped(listener)


@pytest.mark.parametrize("size", [1, LARGE])
async def test_bun_as_a_server(wire: Wire, size: int, tmp_path: Path) -> None:
    bun = program("bun")
    at = str(wire.directory / "bun.sock") if wire.kind == "unix" else "0"
    command = [bun, str(INTEROP / "echo.js"), at]
    options: dict[str, Any] = {}
    if wire.encrypted:
        command += write_certificates(wire.authority, tmp_path)[1:]
        options["tls"] = wire.authority.client_options
    async with running(*command) as process:
        assert process.stdout is not None
        told = (await soon(process.stdout.readline(), 20)).decode().strip()
        recorder = Recorder()
        if wire.kind == "unix":
            socket = await uvsock.connect(recorder.table(), unix=told)
        else:
            socket = await uvsock.connect(recorder.table(), "127.0.0.1", int(told), **options)
        await soon(socket.send_all(MESSAGE[:size]), 20)
        await until(lambda: len(recorder.received) == size, 20)
        assert recorder.received == MESSAGE[:size]
        socket.end()
        await soon(socket.wait_closed())
        assert recorder.close_errors == [None]


# ── OpenSSL ────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("version", ["-tls1_2", "-tls1_3"])
async def test_openssl_s_client(tls_wire: Wire, version: str, tmp_path: Path) -> None:
    openssl = program("openssl")
    ca, _, _ = write_certificates(tls_wire.authority, tmp_path)
    echo = Echo()
    tls = tls_wire.authority.server_options | {"alpn_protocols": ["b", "a"]}
    listener = await tls_wire.listen(echo.table(), tls=tls)
    async with running(
        openssl, "s_client", "-connect", f"127.0.0.1:{listener.port}", "-servername", SERVER_NAME,
        "-verify_hostname", SERVER_NAME, "-verify_return_error", "-CAfile", ca, "-alpn", "a,c",
        version,
    ) as process:  # fmt: skip
        assert process.stdin is not None
        assert process.stdout is not None
        seen = b""
        process.stdin.write(b"through OpenSSL\n")
        while b"through OpenSSL\n" not in seen:
            seen += await soon(process.stdout.readline())
        assert b"Verification: OK" in seen
        assert b"ALPN protocol: a" in seen
        if version == "-tls1_3":
            for command, answer in ((b"k\n", b"KEYUPDATE\n"), (b"K\n", b"KEYUPDATE\n")):
                process.stdin.write(command)
                while answer not in seen:
                    seen += await soon(process.stdout.readline())
                seen = b""
            process.stdin.write(b"with new keys\n")
            while b"with new keys\n" not in seen:
                seen += await soon(process.stdout.readline())
        assert echo.socket.server_name == SERVER_NAME
        assert echo.socket.alpn_protocol == "a"
        process.stdin.write(b"Q\n")
        await until(lambda: echo.events[-1] == "close")
    assert echo.close_errors == [None]
    assert not echo.socket.truncated
    await stopped(listener)


async def test_openssl_s_client_asks_for_starttls(tcp_wire: Wire, tmp_path: Path) -> None:
    openssl = program("openssl")
    ca, _, _ = write_certificates(tcp_wire.authority, tmp_path)

    def data(socket: uvsock.Socket[Any], data: bytes) -> None:
        if socket.encrypted:
            socket.write(data.upper())
        elif data.startswith(b"EHLO"):
            socket.write(b"250-uvsock\r\n250 STARTTLS\r\n")
        elif data.startswith(b"STARTTLS"):
            socket.write(b"220 go ahead\r\n")
            socket.upgrade_tls(tcp_wire.authority.server_options)

    listener = await tcp_wire.listen(
        {"open": lambda socket: socket.write(b"220 ready\r\n"), "data": data}
    )
    async with running(
        openssl, "s_client", "-connect", f"127.0.0.1:{listener.port}", "-starttls", "smtp",
        "-CAfile", ca, "-verify_return_error", "-quiet",
    ) as process:  # fmt: skip
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write(b"after starttls\n")
        seen = b""
        while b"AFTER STARTTLS\n" not in seen:
            seen += await soon(process.stdout.readline())
    await until(lambda: not listener.connections)
    await stopped(listener)


async def test_openssl_s_client_resumes_its_session(tls_wire: Wire, tmp_path: Path) -> None:
    openssl = program("openssl")
    recorder = Recorder()
    listener = await tls_wire.listen(recorder.table())
    printed = await output_of(
        openssl, "s_client", "-connect", f"127.0.0.1:{listener.port}", "-reconnect", "-tls1_2"
    )  # fmt: skip
    assert printed.count(b"Reused, TLSv1.2") == 5
    assert [socket.session_reused for socket in recorder.sockets] == [False] + [True] * 5
    await stopped(listener)


@pytest.mark.parametrize("version", ["-tls1_2", "-tls1_3"])
async def test_openssl_s_server(authority: Authority, version: str, tmp_path: Path) -> None:
    """`-rev` sends each line back reversed. It asks for a client certificate and gets one."""
    openssl = program("openssl")
    ca, cert, key = write_certificates(authority, tmp_path)
    async with running(
        openssl, "s_server", "-accept", "0", "-rev", "-cert", cert, "-key", key, "-CAfile", ca,
        "-Verify", "1", "-verify_return_error", version,
    ) as process:  # fmt: skip
        assert process.stdout is not None
        line = b""
        while not line.startswith(b"ACCEPT"):
            line = await soon(process.stdout.readline())
        port = int(line.decode().rpartition(":")[2])
        recorder = Recorder()
        socket = await uvsock.connect(
            recorder.table(),
            "127.0.0.1",
            port,
            tls=authority.client_options | Authority.pair(authority.client),
        )
        assert socket.authorized
        socket.write(b"stressed\n")
        await until(lambda: recorder.received == b"desserts\n")
        socket.end()
        await soon(socket.wait_closed())
        assert recorder.close_errors == [None]


async def test_openssl_renegotiates_while_we_write(authority: Authority, tmp_path: Path) -> None:
    """In TLS 1.2 a peer may shake hands again at any time. What is written meanwhile waits."""
    openssl = program("openssl")
    _, cert, key = write_certificates(authority, tmp_path)
    async with running(
        openssl, "s_server", "-accept", "0", "-cert", cert, "-key", key, "-tls1_2",
    ) as process:  # fmt: skip
        assert process.stdin is not None
        assert process.stdout is not None
        line = b""
        while not line.startswith(b"ACCEPT"):
            line = await soon(process.stdout.readline())
        recorder = Recorder()
        socket = await uvsock.connect(
            recorder.table(),
            "127.0.0.1",
            int(line.decode().rpartition(":")[2]),
            tls=authority.client_context(),  # uvsock's own contexts refuse to
            server_hostname=SERVER_NAME,
        )
        heard: list[bytes] = []
        handshakes = 0

        async def listen_to(output: asyncio.StreamReader) -> None:
            nonlocal handshakes
            while line := await output.readline():
                handshakes += b"SSL_do_handshake" in line
                heard.extend([line] if line.startswith(b"line ") else [])

        listening = asyncio.create_task(listen_to(process.stdout))
        written = []
        for attempt in range(3):
            process.stdin.write(b"r\n")  # the command for a handshake
            await process.stdin.drain()
            for number in range(200):
                written.append(b"line %d of %d\n" % (number, attempt))
                await soon(socket.send_all(written[-1]))
                await asyncio.sleep(0.0005)
            # Two commands that arrive together are one.
            await until(lambda wanted=attempt + 1: handshakes == wanted)
        socket.end()
        await until(lambda: len(heard) >= len(written))
        assert heard == written
        socket.terminate()
        await soon(socket.wait_closed())
        listening.cancel()


# ── socat ──────────────────────────────────────────────────────────────────────────────────────


async def test_socat_sends_much_and_gets_it_back(wire: Wire, tmp_path: Path) -> None:
    socat = (program("socat"), "-t", "10", "-lf", str(tmp_path / "log"))  # 1.8 warns over TLS
    echo = Echo()
    listener = await wire.listen(echo.table())
    address = socat_address(wire, listener, tmp_path)
    printed = await output_of(*socat, "-", address, given=MESSAGE)
    assert hashlib.sha256(printed).digest() == hashlib.sha256(MESSAGE).digest()
    await until(lambda: echo.events[-1] == "close")
    assert echo.close_errors == [None]
    await stopped(listener)


async def test_socat_gets_a_reply_after_its_end_of_file(plain_wire: Wire, tmp_path: Path) -> None:
    socat = program("socat")
    recorder = Recorder(
        end=lambda socket: socket.write(hashlib.sha256(recorder.received).hexdigest())
    )
    listener = await plain_wire.listen(recorder.table())
    printed = await output_of(
        socat, "-t", "10", "-", socat_address(plain_wire, listener, tmp_path), given=MESSAGE
    )
    assert printed.decode() == hashlib.sha256(MESSAGE).hexdigest()
    await until(lambda: not listener.connections)
    await stopped(listener)


async def test_socat_as_a_server(plain_wire: Wire) -> None:
    socat = program("socat")
    path = plain_wire.directory / "socat.sock"
    address = f"UNIX-LISTEN:{path}" if plain_wire.kind == "unix" else "TCP-LISTEN:0,bind=127.0.0.1"
    recorder = Recorder()
    async with running(socat, "-d", "-d", address, "PIPE") as process:
        assert process.stdout is not None
        line = b""
        while b"listening on" not in line:
            line = await soon(process.stdout.readline())
        if plain_wire.kind == "unix":
            socket = await uvsock.connect(recorder.table(), unix=path)
        else:
            port = int(line.decode().strip().rpartition(":")[2])
            socket = await uvsock.connect(recorder.table(), "127.0.0.1", port)
        await soon(socket.send_all(MESSAGE[:50_000]))
        socket.end()
        await soon(socket.wait_closed())
    assert recorder.received == MESSAGE[:50_000]
    assert recorder.close_errors == [None]


# ── The standard library ───────────────────────────────────────────────────────────────────────


async def test_http_client(wire: Wire) -> None:
    """Kept-alive requests of the standard library's HTTP client, with a large body each."""
    if wire.kind == "unix":
        pytest.skip("http.client does not speak over Unix sockets")

    def data(socket: uvsock.Socket[Any], data: bytes) -> None:
        socket.data = (socket.data or b"") + data
        _, found, body = socket.data.partition(b"\r\n\r\n")
        if found and len(body) == LARGE:
            socket.data = b""
            digest = hashlib.sha256(body).hexdigest()
            socket.write(f"HTTP/1.1 200 OK\r\nContent-Length: {len(digest)}\r\n\r\n{digest}")

    def post() -> list[str]:
        if wire.encrypted:
            context = wire.authority.client_context()
            client: Any = http.client.HTTPSConnection(
                "localhost", listener.port, timeout=10, context=context
            )
        else:
            client = http.client.HTTPConnection("localhost", listener.port or 0, timeout=10)
        with contextlib.closing(client):
            answers = []
            for _ in range(3):
                client.request("POST", "/", MESSAGE)
                answers.append(client.getresponse().read().decode())
            return answers

    listener = await wire.listen({"data": data})
    assert await soon(asyncio.to_thread(post), 20) == [hashlib.sha256(MESSAGE).hexdigest()] * 3
    await until(lambda: not listener.connections)
    await stopped(listener)


STREAMS = """
import asyncio, ssl, sys

async def main():
    where, ca = sys.argv[1], sys.argv[2]
    if where.startswith("/"):
        reader, writer = await asyncio.open_unix_connection(where)
    else:
        context = ssl.create_default_context(cafile=ca) if ca else None
        reader, writer = await asyncio.open_connection(
            "127.0.0.1", int(where), ssl=context, server_hostname="uvsock.test" if ca else None
        )
    for size in (1, 100, 200_000):
        message = bytes(size)
        writer.write(message)
        assert await reader.readexactly(size) == message
    writer.close()
    await writer.wait_closed()
    print("all came back")

asyncio.run(main())
"""


async def test_asyncio_streams_on_the_default_loop(wire: Wire, tmp_path: Path) -> None:
    echo = Echo()
    listener = await wire.listen(echo.table())
    ca = write_certificates(wire.authority, tmp_path)[0] if wire.encrypted else ""
    printed = await output_of(sys.executable, "-c", STREAMS, where(listener), ca)
    assert printed == b"all came back\n"
    await until(lambda: echo.events[-1] == "close")
    assert echo.close_errors == [None]
    await stopped(listener)


async def test_the_ssl_modules_own_server(authority: Authority) -> None:
    """A blocking server in a thread, that answers after the client's end."""
    context = authority.server_context()
    listening = stdlib.create_server(("127.0.0.1", 0))

    def serve() -> bytes:
        with listening:
            connection, _ = listening.accept()
            connection.settimeout(10)
            heard = b""
            with context.wrap_socket(connection, server_side=True) as sock:
                while len(heard) < 10:
                    heard += sock.recv(100)
                sock.sendall(heard[::-1])
                with contextlib.suppress(ssl.SSLError, OSError):
                    sock.unwrap()
            return heard

    serving = asyncio.create_task(asyncio.to_thread(serve))
    recorder = Recorder()
    socket = await uvsock.connect(
        recorder.table(),
        "127.0.0.1",
        listening.getsockname()[1],
        tls=authority.client_options,
    )
    socket.write(b"0123456789")
    await soon(socket.wait_closed())
    assert recorder.received == b"9876543210"
    assert await soon(serving) == b"0123456789"
    assert recorder.close_errors == [None]
