"""Handlers and framers in Cython, compiled as a project of its own against the installed uvsock."""

from __future__ import annotations

import asyncio
import importlib.machinery
import importlib.util
import re
import shutil
import socket as stdlib
import subprocess
import sys
import threading
import warnings
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import uvsock
from conftest import Recorder, Wire
from helpers import soon, until
from test_packaging import build_environment

ROOT = Path(__file__).resolve().parent.parent
PROJECT = Path(__file__).resolve().parent / "compiled_handlers"
NAME = "compiled_handlers"


@pytest.fixture(scope="session")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> ModuleType:
    """The project's module. It finds the .pxd files of the uvsock that is imported here."""
    directory = tmp_path_factory.mktemp("compiled")
    shutil.copytree(PROJECT, directory, dirs_exist_ok=True)
    environment = build_environment()
    # First, so that it is the package under test wherever that is imported from.
    environment["PYTHONPATH"] = str(Path(uvsock.__file__).parent.parent)
    built = subprocess.run(
        [sys.executable, "setup.py", "--quiet", "build_ext", "--inplace"],
        cwd=directory,
        env=environment,
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert built.returncode == 0, built.stdout + built.stderr
    path = directory / f"{NAME}{importlib.machinery.EXTENSION_SUFFIXES[0]}"
    spec = importlib.util.spec_from_file_location(NAME, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# Whichever test comes first compiles.
pytestmark = pytest.mark.timeout(240)


async def ask(wire: Wire, listener: uvsock.Listener, request: bytes) -> bytes:
    reader, writer = await wire.streams(listener)
    writer.write(request)
    if writer.can_write_eof():
        writer.write_eof()
    answer = await soon(reader.readexactly(len(request)))
    writer.close()
    return answer


async def test_events_come_through_c(wire: Wire, compiled: ModuleType) -> None:
    handlers = compiled.Events()
    async with await wire.listen(handlers) as listener:
        client = await wire.connect(listener, {"data": print})
        client.write("one")
        client.end(" two")
        await soon(client.wait_closed())
        await until(lambda: handlers.events[-1] == "close")
    before = ["handshake"] if wire.encrypted else []
    assert set(handlers.events) == {*before, "open", "data", "end", "close"}
    assert handlers.events[: len(before) + 1] == [*before, "open"]
    assert handlers.events[-2:] == ["end", "close"]
    assert handlers.all_received() == b"one two"
    assert handlers.errors == []


async def test_a_compiled_client(wire: Wire, compiled: ModuleType) -> None:
    handlers = compiled.Events()
    async with await wire.listen(
        {"open": lambda socket: socket.end("hello"), "data": print}
    ) as listener:
        client = await wire.connect(listener, handlers)
        await soon(client.wait_closed())
    assert handlers.all_received() == b"hello"
    assert handlers.events[-1] == "close"


async def test_connect_error_and_timeout(unix_wire: Wire, compiled: ModuleType) -> None:
    handlers = compiled.Events()
    with pytest.raises(FileNotFoundError) as caught:
        await uvsock.connect(handlers, unix=str(unix_wire.directory / "nobody"))
    assert handlers.events == ["connect_error"]
    assert handlers.errors == [caught.value]
    handlers = compiled.Events()
    async with await unix_wire.listen({"data": print}) as listener:
        client = await unix_wire.connect(listener, handlers)
        client.timeout(0.01)
        await soon(client.wait_closed())
    assert handlers.events == ["open", "timeout", "end", "close"]


async def test_a_failed_handshake(tls_wire: Wire, compiled: ModuleType) -> None:
    handlers = compiled.Events()
    async with await tls_wire.listen({"data": print}) as listener:
        with pytest.raises(OSError, match="certificate verify failed"):
            await tls_wire.connect(listener, handlers, tls=True)
    assert handlers.events[0] == "failed handshake"


async def test_an_echo_under_back_pressure(wire: Wire, compiled: ModuleType) -> None:
    handlers = compiled.Echo()
    request = bytes(range(256)) * 20_000
    async with await wire.listen(handlers, high_water_mark=65536) as listener:
        received = bytearray()

        def exchange() -> None:
            with wire.dial(listener) as sock:
                sender = threading.Thread(target=sock.sendall, args=(request,))
                sender.start()
                while len(received) < len(request):
                    received.extend(sock.recv(50_000))
                sender.join()

        await soon(asyncio.to_thread(exchange), 30)
    assert received == request
    assert handlers.connections == 1


async def test_frames_in_c(wire: Wire, compiled: ModuleType) -> None:
    handlers = compiled.Frames()
    async with await wire.listen(handlers, framing=compiled.Zeros()) as listener:
        reader, writer = await wire.streams(listener)
        writer.write(b"one\0two\0thr")
        assert await soon(reader.readexactly(8)) == b"one\0two\0"
        writer.write(b"ee\0wait\0four\0")
        assert await soon(reader.readexactly(18)) == b"three\0waited\0four\0"
        writer.write(b"close\0never seen\0")
        assert await soon(reader.read()) == b""
        writer.close()
    assert handlers.results == [4, 4, 6, 5, -1]


async def test_ended_within_a_frame(wire: Wire, compiled: ModuleType) -> None:
    handlers = compiled.Frames()
    async with await wire.listen(handlers, framing=uvsock.Lines()) as listener:
        reader, writer = await wire.streams(listener)
        writer.write(b"terminate\nnever seen\n")
        with pytest.raises((ConnectionError, asyncio.IncompleteReadError)):
            await soon(reader.readexactly(1))
        writer.close()
        await until(lambda: handlers.results)
    assert handlers.results == [-1]


async def test_what_raises_in_c_goes_to_error(wire: Wire, compiled: ModuleType) -> None:
    """Also to one in Python: events without a method of their own call what the table has."""
    seen: list[Exception] = []

    def error(socket: uvsock.Socket[Any], error: Exception) -> None:
        seen.append(error)
        socket.write("sorry\n")

    async with await wire.listen(compiled.Frames(error=error), framing=uvsock.Lines()) as listener:
        reader, writer = await wire.streams(listener)
        writer.write(b"raise\nunframed\nstill here\n")
        assert await soon(reader.readexactly(6)) == b"sorry\n"
        await until(lambda: len(seen) == 3)  # without framing there is no write_frame
        writer.close()
    assert isinstance(seen[0], LookupError)
    assert [str(error) for error in seen[1:]] == ["write_frame: the socket has no framing"] * 2


@pytest.mark.parametrize("faulty", ["open", "data", "end", "close", "error"])
async def test_each_event_may_raise(
    tcp_wire: Wire, compiled: ModuleType, faulty: str, loop_errors: list[dict[str, Any]]
) -> None:
    handlers = compiled.Events(faulty)
    async with await tcp_wire.listen(handlers) as listener:
        client = await tcp_wire.connect(listener, {"data": print})
        client.end("data")
        await soon(client.wait_closed())
        await until(lambda: "close" in handlers.events)
    told = [type(error) for error in handlers.errors]
    assert told == ([] if faulty == "error" else [LookupError])
    assert not loop_errors


async def test_an_error_handler_in_c_that_raises(
    tcp_wire: Wire, compiled: ModuleType, loop_errors: list[dict[str, Any]]
) -> None:
    handlers = compiled.Events("error")
    framing = uvsock.Lines(max_length=4)
    async with await tcp_wire.listen(handlers, framing=framing) as listener:
        client = await tcp_wire.connect(listener, {"data": print})
        client.write("too long")
        await soon(client.wait_closed())
        await until(lambda: "close" in handlers.events)
    assert [type(error) for error in handlers.errors] == [uvsock.FrameTooLargeError]
    assert [type(context["exception"]) for context in loop_errors] == [LookupError]


async def test_reload_between_compiled_and_python(wire: Wire, compiled: ModuleType) -> None:
    handlers = compiled.Frames()
    async with await wire.listen(handlers, framing=uvsock.Lines(), data=handlers) as listener:
        reader, writer = await wire.streams(listener)
        # In one chunk: each line finds the table that the one before it has chosen.
        writer.write(b"one\npython\ntwo\ncompiled\nthree\npython\nfour\n")
        expected = [b"one", b"python", b"python: two", b"python: compiled", b"three", b"python"]
        expected.append(b"python: four")
        lines = [(await soon(reader.readline())).rstrip(b"\n") for _ in expected]
        assert lines == expected
        listener.reload(handlers)
        writer.write(b"five\n")
        assert await soon(reader.readline()) == b"five\n"
        writer.close()


async def test_a_drain_in_c_answers_a_short_write(tcp_wire: Wire, compiled: ModuleType) -> None:
    """In debug mode a short write that nobody answers is warned of."""
    asyncio.get_running_loop().set_debug(True)
    handlers = compiled.Events()
    recorder = Recorder()
    async with await tcp_wire.listen(recorder.table("open", "data")) as listener:
        client = await tcp_wire.connect(listener, handlers, high_water_mark=1)
        sock = client.get_extra_info("socket")
        sock.setsockopt(stdlib.SOL_SOCKET, stdlib.SO_SNDBUF, 4096)
        await until(lambda: recorder.sockets)
        recorder.socket.pause()
        data = bytes(20_000_000)
        assert client.write(data) < len(data)
        recorder.socket.resume()
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            await until(lambda: "drain" in handlers.events)
            client.end()
            await soon(client.wait_closed())


def test_the_guide_shows_what_is_compiled() -> None:
    page = (ROOT / "docs" / "guides" / "compiled.md").read_text()
    source = (PROJECT / f"{NAME}.pyx").read_text()
    blocks = re.findall(r"^```cython\n(.*?)^```", page, re.DOTALL | re.MULTILINE)
    assert len(blocks) >= 2
    for block in blocks:
        for part in re.split(r"\n{3,}", block.strip()):
            assert part in source
    for name in ("pyproject.toml", "setup.py"):
        assert (PROJECT / name).read_text() in page
