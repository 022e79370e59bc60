"""Files, by each of the three calls that send them: the same bytes whatever the connection."""

from __future__ import annotations

import asyncio
import bz2
import contextlib
import errno
import functools
import gzip
import io
import lzma
import os
import random
import socket as stdlib
import sys
import tempfile
import zipfile
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest

import uvsock
from conftest import SERVER_NAME, Authority, Wire
from helpers import soon, until

LOOPS = {"uvsock": uvsock.new_event_loop}
MIB = 1 << 20
CONTENT = random.Random(9).randbytes(600_000)


class Sender:
    """A connection, and one of the ways to send a file over it."""

    def __init__(self, way: str, wire: Wire) -> None:
        self.way = way
        self.wire = wire
        self.received = bytearray()
        self.ended = False
        self.loop: Any = asyncio.get_running_loop()

    async def open(self) -> None:
        def ended(socket: uvsock.Socket[Any], error: object) -> None:
            self.ended = True

        self.listener = await self.wire.listen(
            {"data": lambda _, data: self.received.extend(data), "close": ended}
        )
        if self.way == "Socket.sendfile":
            self.end: Any = await self.wire.connect(self.listener, {"data": print})
            self._send = self.end.sendfile
        elif self.way == "Loop.sendfile":
            if self.wire.kind == "unix":
                made = await self.loop.create_unix_connection(asyncio.Protocol, self.listener.unix)
            else:
                options: dict[str, Any] = {}
                if self.wire.encrypted:
                    options["ssl"] = self.wire.authority.client_context()
                    options["server_hostname"] = SERVER_NAME
                made = await self.loop.create_connection(
                    asyncio.Protocol, "127.0.0.1", self.listener.port, **options
                )
            self.end = made[0]
            self._send = lambda *a, **k: self.loop.sendfile(self.end, *a, **k)
        else:
            self.end = self.wire.dial(self.listener)
            self.end.setblocking(False)
            self._send = lambda *a, **k: self.loop.sock_sendfile(self.end, *a, **k)
        await until(lambda: self.listener.connections)

    async def send(self, *arguments: Any, **options: Any) -> int:
        return await soon(self._send(*arguments, **options))  # type: ignore[no-any-return]

    def pause(self) -> None:
        """Have the other side read nothing until ``resume``."""
        for socket in self.listener.sockets:
            socket.pause()

    def resume(self) -> None:
        for socket in self.listener.sockets:
            socket.resume()

    async def everything(self) -> bytes:
        """All that the other side got."""
        self.end.close()
        await until(lambda: self.ended)
        return bytes(self.received)

    async def close(self) -> None:
        self.end.close()
        self.listener.stop(True)
        await soon(self.listener.wait_closed())
        if isinstance(self.end, uvsock.Socket):
            await soon(self.end.wait_closed())


WAYS = ["Socket.sendfile", "Loop.sendfile", "Loop.sock_sendfile"]


@pytest.fixture(params=WAYS)
async def sender(request: pytest.FixtureRequest, wire: Wire) -> AsyncIterator[Sender]:
    if request.param == "Loop.sock_sendfile" and wire.encrypted:
        pytest.skip("a socket of the program's own is plain")
    sender = Sender(request.param, wire)
    await sender.open()
    yield sender
    await sender.close()


@pytest.fixture(params=WAYS)
async def plain_sender(request: pytest.FixtureRequest, plain_wire: Wire) -> AsyncIterator[Sender]:
    sender = Sender(request.param, plain_wire)
    await sender.open()
    yield sender
    await sender.close()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "file"
    path.write_bytes(CONTENT)
    return path


class Upper(io.FileIO):
    """Says something else than its descriptor."""

    def readinto(self, buffer: Any) -> int:
        n = super().readinto(buffer) or 0
        buffer[:n] = bytes(buffer[:n]).swapcase()
        return n

    def read(self, size: int | None = -1, /) -> bytes:
        return super().read(size).swapcase()


def zipped(path: Path) -> Any:
    with zipfile.ZipFile(path.parent / "zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("member", CONTENT)
    with zipfile.ZipFile(path.parent / "zip") as archive:
        return archive.open("member")


def packed(module: Any) -> Callable[[Path], Any]:
    content = functools.cache(lambda: module.compress(CONTENT))  # takes a while

    def pack(path: Path) -> Any:
        (path.parent / "packed").write_bytes(content())
        return module.open(path.parent / "packed", "rb")

    return pack


def unflushed(path: Path) -> Any:
    file = path.open("r+b")
    file.seek(100)
    file.write(b"not with the system yet")
    return file


def temporary(path: Path) -> Any:
    file = tempfile.NamedTemporaryFile()  # noqa: SIM115 (a wrapper, which is no class of io's)
    file.write(CONTENT)
    return file


def spooled(path: Path) -> Any:
    file = tempfile.SpooledTemporaryFile()  # noqa: SIM115
    file.write(CONTENT)
    return file


def unbuffered(path: Path) -> Any:
    return path.open("rb", buffering=0)


class Minimal:
    """Only a ``read``."""

    def __init__(self, path: Path) -> None:
        self.content = io.BytesIO(path.read_bytes())

    def read(self, size: int) -> bytes:
        return self.content.read(size)

    def close(self) -> None:
        self.content.close()


FILES: dict[str, Callable[[Path], Any]] = {
    "buffered": lambda path: path.open("rb"),
    "unbuffered": unbuffered,
    "unflushed": unflushed,
    "empty": lambda path: (path.parent / "empty").open("w+b"),
    "gzip": packed(gzip),
    "bz2": packed(bz2),
    "lzma": packed(lzma),
    "zip": zipped,
    "temporary": temporary,
    "spooled": spooled,
    "memory": lambda path: io.BytesIO(CONTENT),
    "subclass": lambda path: Upper(path),
    "around a subclass": lambda path: io.BufferedReader(Upper(path)),
    "minimal": Minimal,
}
if sys.platform == "linux":
    FILES["proc"] = lambda path: io.BufferedReader(io.FileIO("/proc/self/limits"))


@pytest.mark.parametrize("kind", FILES)
async def test_what_read_gives_is_sent(sender: Sender, path: Path, kind: str) -> None:
    with contextlib.closing(FILES[kind](path)) as file:
        sent = await sender.send(file)
    with contextlib.closing(FILES[kind](path)) as file:
        if hasattr(file, "seek"):
            file.seek(0)
        expected = file.read(MIB)
    assert await sender.everything() == expected
    assert sent == len(expected)


@pytest.mark.parametrize("kind", ["buffered", "unbuffered", "unflushed", "gzip", "memory"])
async def test_a_part_is_sent_and_the_position_is_behind_it(
    sender: Sender, path: Path, kind: str
) -> None:
    with contextlib.closing(FILES[kind](path)) as file:
        file.seek(7)
        assert await sender.send(file, 1000, 500_000) == 500_000
        assert file.tell() == 501_000
        assert await sender.send(file, len(CONTENT) - 5) == 5
        assert file.tell() == len(CONTENT)
        assert await sender.send(file, len(CONTENT)) == 0
        assert await sender.send(file, len(CONTENT) + 10, 5) == 0
    assert await sender.everything() == CONTENT[1000:501_000] + CONTENT[-5:]


@pytest.mark.parametrize("kind", ["buffered", "gzip", "memory"])
async def test_one_file_goes_to_many_at_once(wire: Wire, path: Path, kind: str) -> None:
    senders = [Sender(way, wire) for way in WAYS[: 2 if wire.encrypted else 3]]
    for sender in senders:
        await sender.open()
    with contextlib.closing(FILES[kind](path)) as file:
        await asyncio.gather(*(sender.send(file) for sender in senders))
    for sender in senders:
        assert await sender.everything() == CONTENT
        await sender.close()


@pytest.mark.parametrize(
    "code", ["EINVAL", "ENOSYS", "EOVERFLOW", "ENOTSUP", "EOPNOTSUPP", "ENOTSOCK", "EPERM"]
)
@pytest.mark.parametrize("before", [0, 1000])
async def test_what_the_kernel_refuses_is_read(
    plain_sender: Sender, path: Path, code: str, before: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = os.sendfile
    calls = 0

    def refuse(descriptor: int, source: int, offset: int, count: int) -> int:
        nonlocal calls
        calls += 1
        if offset < before:
            return original(descriptor, source, offset, before - offset)
        raise OSError(getattr(errno, code), code)

    monkeypatch.setattr(os, "sendfile", refuse)
    with path.open("rb") as file:
        assert await plain_sender.send(file) == len(CONTENT)
        assert file.tell() == len(CONTENT)
    assert calls == (2 if before else 1)
    assert await plain_sender.everything() == CONTENT


async def test_a_file_that_cannot_seek_is_read_from_where_it_is(sender: Sender) -> None:
    reading, writing = os.pipe()
    with io.FileIO(reading) as file:
        os.write(writing, b"through a pipe")
        os.close(writing)
        with pytest.raises(io.UnsupportedOperation, match="^offset: must be 0, not 3"):
            await sender.send(file, 3)
        assert await sender.send(file) == 14
    assert await sender.everything() == b"through a pipe"


async def test_a_pipe_that_has_nothing_yet_is_not_at_its_end(sender: Sender) -> None:
    reading, writing = os.pipe()
    os.set_blocking(reading, False)
    with io.FileIO(reading) as file, io.FileIO(writing, "w"), pytest.raises(BlockingIOError):
        await sender.send(file)


async def test_text_is_refused(sender: Sender, path: Path) -> None:
    refused = TypeError if sender.way == "Socket.sendfile" else ValueError
    with path.open() as text, tempfile.NamedTemporaryFile("w+") as temporary:
        for file in (text, temporary, io.StringIO("text")):
            with pytest.raises(refused, match="binary mode"):
                await sender.send(file)
    with (
        contextlib.closing(Minimal(path)) as odd,
        pytest.MonkeyPatch.context() as patch,
        pytest.raises(TypeError, match=r"^file: read\(\) must give bytes, not str"),
    ):
        patch.setattr(odd, "read", lambda size: "")
        await sender.send(odd)
    assert await sender.everything() == b""


async def test_a_file_that_is_closed_meanwhile_is_not_read_any_more(
    sender: Sender, tmp_path: Path
) -> None:
    """Its descriptor's number may belong to another file by then."""
    with (tmp_path / "large").open("wb") as file:
        file.truncate(64 * MIB)
    sender.pause()
    with (tmp_path / "large").open("rb") as file:
        task = asyncio.ensure_future(sender.send(file))
        await asyncio.sleep(0.05)
    sender.resume()
    with pytest.raises(ValueError, match="closed file"):
        await task
    assert len(await sender.everything()) < 64 * MIB


async def test_a_file_that_shrinks_ends_there(sender: Sender, tmp_path: Path) -> None:
    with (tmp_path / "large").open("w+b", buffering=0) as file:
        file.truncate(64 * MIB)
        sender.pause()
        task = asyncio.ensure_future(sender.send(file, 0, 64 * MIB))
        await asyncio.sleep(0.05)
        file.truncate(MIB)
        sender.resume()
        sent = await task
        assert sent < 64 * MIB
        assert file.tell() == sent
    assert len(await sender.everything()) == sent


async def test_a_cancelled_call_leaves_the_position_behind_what_was_sent(
    sender: Sender, tmp_path: Path
) -> None:
    with (tmp_path / "large").open("w+b") as file:
        file.truncate(64 * MIB)
        sender.pause()
        task = asyncio.ensure_future(sender.send(file))
        await asyncio.sleep(0.05)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        position = file.tell()
        sender.resume()
    # What was read over TLS may be with the connection in part, and has not been counted.
    received = len(await sender.everything())
    assert 0 < position <= received < 64 * MIB
    if not sender.wire.encrypted:
        assert received == position


@pytest.mark.parametrize("way", WAYS[1:])
@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((0, "count"), TypeError, r"count must be a positive integer \(got 'count'\)"),
        ((0, 0), ValueError, r"count must be a positive integer \(got 0\)"),
        ((0, -1), ValueError, r"count must be a positive integer \(got -1\)"),
        (("offset",), TypeError, r"offset must be a non-negative integer \(got 'offset'\)"),
        ((-1,), ValueError, r"offset must be a non-negative integer \(got -1\)"),
    ],
)
async def test_the_loops_checks_are_asyncios(
    tcp_wire: Wire, way: str, arguments: Any, error: type[Exception], message: str
) -> None:
    sender = Sender(way, tcp_wire)
    await sender.open()
    with pytest.raises(error, match=message):
        await sender.send(io.BytesIO(b"x"), *arguments)
    await sender.close()


@pytest.mark.parametrize("way", WAYS[1:])
async def test_without_a_fallback_nothing_is_read(
    tcp_wire: Wire, path: Path, way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    sender = Sender(way, tcp_wire)
    await sender.open()
    with path.open("rb") as file:
        assert await sender.send(file, 0, 10, fallback=False) == 10
        assert await sender.send(file, len(CONTENT), fallback=False) == 0
    with pytest.raises(asyncio.SendfileNotAvailableError, match="not a regular file"):
        await sender.send(io.BytesIO(b"x"), fallback=False)

    def refuse(*_: int) -> int:
        raise OSError(errno.EINVAL, "refused")

    monkeypatch.setattr(os, "sendfile", refuse)
    with (
        path.open("rb") as file,
        pytest.raises(asyncio.SendfileNotAvailableError, match=r"os.sendfile call failed"),
    ):
        await sender.send(file, fallback=False)
    assert await sender.everything() == CONTENT[:10]
    await sender.close()


async def test_sock_sendfile_takes_plain_stream_sockets(authority: Authority) -> None:
    loop = asyncio.get_running_loop()
    with stdlib.socket(stdlib.AF_INET, stdlib.SOCK_DGRAM) as datagrams:
        datagrams.setblocking(False)
        with pytest.raises(ValueError, match="only SOCK_STREAM type sockets are supported"):
            await loop.sock_sendfile(datagrams, io.BytesIO(b"x"))
    with authority.client_context().wrap_socket(
        stdlib.socket(), server_hostname=SERVER_NAME
    ) as wrapped:
        wrapped.setblocking(False)
        with pytest.raises(TypeError, match="Socket cannot be of type SSLSocket"):
            await loop.sock_sendfile(wrapped, io.BytesIO(b"x"))
    loop.set_debug(True)
    with stdlib.socket() as blocking, pytest.raises(ValueError, match="must be non-blocking"):
        await loop.sock_sendfile(blocking, io.BytesIO(b"x"))


async def test_a_socket_that_the_program_closes_is_not_watched(
    tcp_wire: Wire, tmp_path: Path
) -> None:
    sender = Sender("Loop.sock_sendfile", tcp_wire)
    await sender.open()
    (socket,) = sender.listener.sockets
    socket.pause()
    with (tmp_path / "large").open("w+b") as file:
        file.truncate(64 * MIB)
        task = asyncio.ensure_future(sender.send(file))
        await asyncio.sleep(0.05)
        sender.end.close()
        socket.resume()
        with pytest.raises(OSError, match="Bad file descriptor"):
            await task
    await sender.close()


# ── Other libraries' transports ────────────────────────────────────────────────────────────────


class Foreign(asyncio.Transport):
    """A transport with asyncio's interface, by public methods only, in the place of another."""

    def __init__(self, transport: Any) -> None:
        super().__init__()
        self.transport = transport
        for name in (
            "write",
            "is_closing",
            "close",
            "get_write_buffer_size",
            "get_write_buffer_limits",
            "get_protocol",
            "set_protocol",
            "is_reading",
            "pause_reading",
            "resume_reading",
        ):
            setattr(self, name, getattr(transport, name))


class Flow(asyncio.Protocol):
    def __init__(self) -> None:
        self.calls: list[str] = []
        self.lost = False

    def pause_writing(self) -> None:
        self.calls.append("pause")

    def resume_writing(self) -> None:
        self.calls.append("resume")

    def connection_lost(self, exc: Exception | None) -> None:
        self.lost = True


async def foreign(sender: Sender) -> tuple[Foreign, Flow]:
    await sender.open()
    transport = Foreign(sender.end)
    protocol = Flow()
    transport.set_protocol(protocol)
    return transport, protocol


@pytest.mark.parametrize("size", [600_000, 20 * MIB])
async def test_a_foreign_transport_is_written_to(wire: Wire, tmp_path: Path, size: int) -> None:
    sender = Sender("Loop.sendfile", wire)
    transport, protocol = await foreign(sender)
    content = random.Random(3).randbytes(size)
    (tmp_path / "file").write_bytes(content)
    sender.pause()
    transport.write(b"before")
    with (tmp_path / "file").open("rb") as file:
        task = asyncio.ensure_future(sender.loop.sendfile(transport, file))
        await asyncio.sleep(0.02)
        assert transport.get_write_buffer_size() < MIB
        sender.resume()
        assert await soon(task, 20) == size
        assert file.tell() == size
    assert transport.get_protocol() is protocol
    assert transport.is_reading()
    transport.write(b"after")
    assert await sender.everything() == b"before" + content + b"after"
    await until(lambda: protocol.calls in ([], ["pause", "resume"]))
    await sender.close()


async def test_a_foreign_transport_that_is_full_resumes_its_own_protocol(tcp_wire: Wire) -> None:
    sender = Sender("Loop.sendfile", tcp_wire)
    transport, protocol = await foreign(sender)
    (socket,) = sender.listener.sockets
    socket.pause()
    transport.write(bytes(20 * MIB))
    assert protocol.calls == ["pause"]
    task = asyncio.ensure_future(sender.loop.sendfile(transport, io.BytesIO(b"file")))
    await asyncio.sleep(0.02)
    assert not task.done()
    socket.resume()
    assert await soon(task) == 4
    assert protocol.calls == ["pause", "resume"]
    assert await sender.everything() == bytes(20 * MIB) + b"file"
    await sender.close()


async def test_a_foreign_transport_that_closes_ends_the_call(
    tcp_wire: Wire, tmp_path: Path
) -> None:
    sender = Sender("Loop.sendfile", tcp_wire)
    transport, protocol = await foreign(sender)
    (socket,) = sender.listener.sockets
    socket.pause()
    with (tmp_path / "large").open("w+b") as file:
        file.truncate(64 * MIB)
        task = asyncio.ensure_future(sender.loop.sendfile(transport, file))
        await until(lambda: transport.get_write_buffer_size())
        sender.end.abort()
        with pytest.raises(ConnectionError):
            await soon(task)
    await until(lambda: protocol.lost)
    with pytest.raises(RuntimeError, match="Transport is closing"):
        await sender.loop.sendfile(transport, io.BytesIO(b"x"))
    await sender.close()


async def test_a_transport_that_is_no_stream_is_refused() -> None:
    loop = asyncio.get_running_loop()
    transport, _ = await loop.create_datagram_endpoint(
        asyncio.DatagramProtocol, local_addr=("127.0.0.1", 0)
    )
    with pytest.raises(RuntimeError, match="sendfile is not supported for transport"):
        await loop.sendfile(transport, io.BytesIO(b"x"))  # type: ignore[arg-type]
    reading, writing = os.pipe()
    pipe, _ = await loop.connect_write_pipe(asyncio.BaseProtocol, io.FileIO(writing, "w"))
    with pytest.raises(RuntimeError, match="sendfile is not supported for transport"):
        await loop.sendfile(pipe, io.BytesIO(b"x"))
    transport.close()
    pipe.close()
    os.close(reading)
    await asyncio.sleep(0.01)
