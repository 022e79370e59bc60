"""`uvsock.testing` over TCP, Unix sockets and TLS, and its plugin in test runs of its own."""

from __future__ import annotations

import asyncio
import contextlib
import os
import ssl
import subprocess
import sys
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import uvsock
from conftest import Recorder, Wire
from helpers import soon, until
from uvsock.testing import Certificates, FaultProxy, Faults, pair, shrink_buffers

WIRES: dict[str, dict[str, bool]] = {
    "tcp": {},
    "unix": {"unix": True},
    "tls": {"tls": True},
    "tls-unix": {"tls": True, "unix": True},
}
on_all_wires = pytest.mark.parametrize("where", WIRES.values(), ids=WIRES)


@contextlib.asynccontextmanager
async def connected(
    a: Any, b: Any, **options: Any
) -> AsyncIterator[tuple[uvsock.Socket[Any], uvsock.Socket[Any]]]:
    sockets = await soon(pair(a, b, **options))
    try:
        yield sockets
    finally:
        for socket in sockets:
            socket.terminate()


# ── pair ───────────────────────────────────────────────────────────────────────────────────────


@on_all_wires
async def test_a_pair_talks_both_ways_until_it_is_closed(where: dict[str, bool]) -> None:
    left, right = Recorder(), Recorder()
    async with connected(left.table(), right.table(), **where) as (a, b):
        assert left.socket is a
        assert right.socket is b
        assert a.ready_state == b.ready_state == uvsock.ReadyState.ESTABLISHED
        assert a.encrypted == b.encrypted == where.get("tls", False)
        assert (a.remote_family is None) == where.get("unix", False)
        a.write(b"to b")
        b.write(b"to a")
        await until(lambda: left.received and right.received)
        assert (left.received, right.received) == (b"to a", b"to b")
        a.end()
        await soon(b.wait_closed())
        await soon(a.wait_closed())
    assert left.events[-2:] == right.events[-2:] == ["end", "close"]
    assert left.close_errors == right.close_errors == [None]


async def test_options_go_to_both_sides() -> None:
    ignore = {"data": lambda socket, data: None}
    async with connected(ignore, ignore, high_water_mark=17, data="shared") as (a, b):
        assert a.high_water_mark == b.high_water_mark == 17
        assert a.data == b.data == "shared"


async def test_the_accepted_side_has_a_listener_whose_handlers_can_be_replaced() -> None:
    before, after = Recorder(), Recorder()
    async with connected(Recorder().table(), before.table()) as (a, b):
        assert a.listener is None
        assert b.listener is not None
        b.listener.reload(after.table())
        a.write(b"news")
        await until(lambda: after.received)
    assert not before.received


async def test_a_pair_may_have_certificates_of_the_caller() -> None:
    certificates = Certificates("api.example")
    certificates.server = replace(certificates.server, request_cert=True, alpn_protocols=["x/1"])
    certificates.client = replace(
        certificates.client, server_name="api.example", alpn_protocols=["x/1"]
    )
    ignore = {"data": lambda socket, data: None}
    async with connected(ignore, ignore, tls=certificates) as (a, b):
        assert a.authorized
        assert b.authorized
        assert b.server_name == "api.example"
        assert a.alpn_protocol == b.alpn_protocol == "x/1"


@on_all_wires
async def test_an_accepted_socket_that_closes_at_once_is_told(where: dict[str, bool]) -> None:
    told: list[str] = []

    def opened(socket: uvsock.Socket[Any]) -> None:
        told.append("open")
        socket.terminate()

    closing = {
        "open": opened,
        "data": lambda socket, data: None,
        "close": lambda socket, error: told.append("close"),
    }
    with contextlib.suppress(OSError):  # or a pair whose sockets are closed already
        for socket in await soon(pair({"data": lambda socket, data: None}, closing, **where)):
            socket.terminate()
    await until(lambda: told == ["open", "close"])


async def test_a_side_that_refuses_the_other_leaves_nothing_open() -> None:
    certificates = Certificates()
    certificates.client = replace(certificates.client, ca=Certificates().ca)
    ignore = {"data": lambda socket, data: None}
    with pytest.raises(ssl.SSLCertVerificationError):
        await soon(pair(ignore, ignore, tls=certificates))


@pytest.mark.parametrize(
    ("options", "error"),
    [
        pytest.param({"tls": None}, "tls: must be True, False or Certificates", id="tls"),
        pytest.param({"unix": 1}, "unix: must be True or False", id="unix"),
        pytest.param({"framing_": 1}, "framing_", id="unknown"),
    ],
)
async def test_wrong_arguments_are_named(options: dict[str, Any], error: str) -> None:
    ignore = {"data": lambda socket, data: None}
    with pytest.raises(TypeError, match=error):
        await pair(ignore, ignore, **options)


@on_all_wires
async def test_writes_of_a_pair_with_small_buffers_come_back_short_soon(
    where: dict[str, bool],
) -> None:
    left, right = Recorder(drain=lambda socket: None), Recorder()
    message = bytes(2_000_000)
    async with connected(left.table(), right.table(), high_water_mark=1000, **where) as (a, b):
        shrink_buffers(a, b)
        sent = a.write(message)
        assert 0 < sent < 700_000
        await until(lambda: "drain" in left.events)
        assert len(right.received) <= sent
    shrink_buffers(a, b)  # closed ones are left alone


# ── The proxy ──────────────────────────────────────────────────────────────────────────────────


@contextlib.asynccontextmanager
async def through_proxy(
    wire: Wire, server: Any, client: Any, **faults: Faults
) -> AsyncIterator[tuple[FaultProxy, uvsock.Socket[Any]]]:
    """A client that is connected to a server by way of a proxy."""
    async with await wire.listen(server) as listener, FaultProxy(listener, **faults) as proxy:
        socket = await soon(wire.connect(proxy, client))  # type: ignore[arg-type]
        try:
            yield proxy, socket
        finally:
            socket.terminate()


def echo() -> Recorder:
    return Recorder(data=lambda socket, data: socket.write(data))


async def test_a_proxy_without_faults_changes_nothing(wire: Wire) -> None:
    server, client = echo(), Recorder()
    async with through_proxy(wire, server.table(), client.table()) as (_, socket):
        await soon(socket.send_all(b"x" * 50_000))
        socket.end()
        await soon(socket.wait_closed())
    assert len(client.received) == len(server.received) == 50_000
    assert client.events[-2:] == server.events[-2:] == ["end", "close"]
    assert client.close_errors == server.close_errors == [None]


@pytest.mark.parametrize("direction", ["to_server", "to_client"])
async def test_chunks_arrive_one_by_one(plain_wire: Wire, direction: str) -> None:
    server, client = echo(), Recorder()
    faults = {direction: Faults(chunk_size=1)}
    receiver = server if direction == "to_server" else client
    async with through_proxy(plain_wire, server.table(), client.table(), **faults) as (_, socket):
        socket.write(b"abcdef")
        await until(lambda: client.received == b"abcdef")
    received = [call[2] for call in receiver.calls if call[0] == "data"]
    assert received == [b"a", b"b", b"c", b"d", b"e", b"f"]


async def test_tls_passes_through_in_pieces(tls_wire: Wire) -> None:
    server, client, one = echo(), Recorder(), Faults(chunk_size=1)
    async with through_proxy(
        tls_wire, server.table(), client.table(), to_server=one, to_client=one
    ) as (_, socket):
        socket.write(b"hello")
        await until(lambda: client.received == b"hello")


async def test_a_delay_is_waited_before_each_chunk(wire: Wire) -> None:
    server, client = echo(), Recorder()
    slow = Faults(delay=0.05)
    async with through_proxy(wire, server.table(), client.table()) as (proxy, socket):
        proxy.inject(to_server=slow, to_client=slow)
        start = asyncio.get_running_loop().time()
        socket.write(b"x")
        await until(lambda: client.received)
        assert asyncio.get_running_loop().time() - start >= 0.09


async def test_a_reset_comes_after_so_many_bytes(tcp_wire: Wire) -> None:
    server, client = echo(), Recorder()
    async with through_proxy(
        tcp_wire, server.table(), client.table(), to_client=Faults(reset_after=7)
    ) as (_, socket):
        socket.write(b"0123456789")
        await soon(socket.wait_closed())
        await until(lambda: "close" in server.events)
    assert client.received == b"0123456"
    assert isinstance(client.close_errors[0], ConnectionResetError)
    assert isinstance(server.close_errors[0], ConnectionResetError)


async def test_a_unix_socket_that_is_reset_ends_on_both_sides(unix_wire: Wire) -> None:
    server, client = echo(), Recorder()
    async with through_proxy(
        unix_wire, server.table(), client.table(), to_server=Faults(reset_after=0)
    ) as (_, socket):
        socket.write(b"0123456789")
        await soon(socket.wait_closed())
        await until(lambda: "close" in server.events)
    assert not server.received


async def test_a_stall_makes_writes_short_until_it_is_over(wire: Wire) -> None:
    server = Recorder()
    client = Recorder(drain=lambda socket: None)
    message = bytes(1_000_000)
    async with through_proxy(wire, server.table(), client.table()) as (proxy, socket):
        shrink_buffers(socket)
        proxy.inject(to_server=Faults(stall_after=0))
        sent = 0
        for _ in range(10):
            sent += socket.write(message)
            await asyncio.sleep(0.01)
        assert sent < len(message)
        assert socket.write(b"x") == 0
        assert not server.received
        proxy.inject()
        await until(lambda: len(server.received) == sent)
        assert client.events[-1] == "drain"


async def test_a_stall_lets_so_many_bytes_pass(plain_wire: Wire) -> None:
    server, client = echo(), Recorder()
    async with through_proxy(
        plain_wire, server.table(), client.table(), to_server=Faults(stall_after=3)
    ) as (_, socket):
        socket.write(b"abcdef")
        await until(lambda: client.received == b"abc")
        await asyncio.sleep(0.02)
        assert client.received == b"abc"


async def test_reset_now_also_reaches_those_who_stall(tcp_wire: Wire) -> None:
    server, client = echo(), Recorder()
    async with through_proxy(
        tcp_wire, server.table(), client.table(), to_server=Faults(stall_after=0)
    ) as (proxy, socket):
        socket.write(b"stalled")
        await until(lambda: socket.writable_length == 0)
        await asyncio.sleep(0.02)
        proxy.reset()
        await soon(socket.wait_closed())
        assert isinstance(client.close_errors[0], ConnectionResetError)
        again = Recorder()
        other = await soon(tcp_wire.connect(proxy, again.table()))  # type: ignore[arg-type]
        other.terminate()


async def test_a_peer_that_resets_is_passed_on(tcp_wire: Wire) -> None:
    server, client = Recorder(open=lambda socket: socket.terminate()), Recorder()
    async with through_proxy(tcp_wire, server.table(), client.table()) as (_, socket):
        await soon(socket.wait_closed())
    assert isinstance(client.close_errors[0], ConnectionResetError)


async def test_a_server_that_speaks_first_is_heard(wire: Wire) -> None:
    server, client = Recorder(open=lambda socket: socket.end(b"hello")), Recorder()
    async with through_proxy(wire, server.table(), client.table()) as (_, socket):
        await soon(socket.wait_closed())
    assert client.received == b"hello"


async def test_a_server_that_is_not_there_is_a_reset() -> None:
    gone = await uvsock.listen({"data": lambda socket, data: None}, "127.0.0.1", 0)
    gone.stop()
    client = Recorder()
    async with FaultProxy(("127.0.0.1", gone.port or 0)) as proxy:
        socket = await soon(uvsock.connect(client.table(), proxy.hostname, proxy.port))
        await soon(socket.wait_closed())
    assert isinstance(client.close_errors[0], ConnectionResetError)


async def test_a_proxy_ends_what_is_open_when_it_ends(wire: Wire) -> None:
    server, client = Recorder(), Recorder()
    async with await wire.listen(server.table()) as listener:
        async with FaultProxy(listener) as proxy:
            socket = await soon(wire.connect(proxy, client.table()))  # type: ignore[arg-type]
            proxy.inject(to_server=Faults(stall_after=0))
            socket.write(b"x" * 1000)
            await asyncio.sleep(0.01)
        await soon(socket.wait_closed())


async def test_faults_and_targets_are_checked() -> None:
    with pytest.raises(ValueError, match="chunk_size"):
        Faults(chunk_size=0)
    with pytest.raises(TypeError, match="delay"):
        Faults(delay="1")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="reset_after"):
        Faults(reset_after=-1)
    with pytest.raises(TypeError, match="target"):
        FaultProxy(8080)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="to_client"):
        FaultProxy("/there", to_client={"delay": 1})  # type: ignore[arg-type]


# ── Certificates ───────────────────────────────────────────────────────────────────────────────


async def test_clients_of_others_trust_the_certificates() -> None:
    certificates = Certificates()
    server = echo()
    listener = await uvsock.listen(server.table(), "127.0.0.1", 0, tls=certificates.server)
    async with listener:
        reader, writer = await asyncio.open_connection(
            "127.0.0.1",
            listener.port,
            ssl=certificates.client_context(),
            server_hostname="localhost",
        )
        writer.write(b"hello")
        assert await soon(reader.readexactly(5)) == b"hello"
        writer.close()
        await writer.wait_closed()


def test_without_trustme_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "trustme", None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'uvsock\[testing\]'"):
        Certificates()


# ── The plugin ─────────────────────────────────────────────────────────────────────────────────

CONFTEST = """
import uvloop

pytest_plugins = ["uvsock.testing.plugin"]


def pytest_asyncio_loop_factories(config, item):
    return {"uvloop": uvloop.new_event_loop}
"""


def run_pytest(directory: Path, tests: str, conftest: str = CONFTEST) -> str:
    """What pytest prints for a directory with these tests."""
    (directory / "conftest.py").write_text(conftest)
    (directory / "test_them.py").write_text(tests)
    (directory / "pytest.ini").write_text(
        "[pytest]\nfilterwarnings = error\nasyncio_default_fixture_loop_scope = function\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(uvsock.__file__).parent.parent)}
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-q", str(directory)]
    result = subprocess.run(
        command, cwd=directory, env=environment, capture_output=True, text=True, timeout=50
    )
    return result.stdout + result.stderr


def test_the_fixtures_work_and_clean_up(tmp_path: Path) -> None:
    tests = """
import asyncio
import pytest
import uvsock
from uvsock._socket import live_sockets
from uvsock.testing import Faults

pytestmark = pytest.mark.asyncio
ECHO = {"data": lambda socket, data: socket.write(data)}


def collect(received):
    return {"data": lambda socket, data: received.extend(data)}


@pytest.fixture
async def nothing_left():
    yield
    await asyncio.sleep(0)
    assert not live_sockets(asyncio.get_running_loop())


@pytest.mark.parametrize("where", [{}, {"tls": True}, {"unix": True}])
@pytest.mark.usefixtures("nothing_left")
async def test_pair(where, uvsock_pair):
    received = bytearray()
    a, b = await uvsock_pair(collect(received), ECHO, **where)
    a.write(b"hello")
    async with asyncio.timeout(5):
        while received != b"hello":
            await asyncio.sleep(0)


@pytest.mark.usefixtures("nothing_left")
async def test_proxy(uvsock_certificates, uvsock_fault_proxy):
    async with await uvsock.listen(ECHO, "127.0.0.1", 0, tls=uvsock_certificates.server) as server:
        proxy = await uvsock_fault_proxy(server, to_server=Faults(chunk_size=100))
        received = bytearray()
        client = await uvsock.connect(
            collect(received), proxy.hostname, proxy.port, tls=uvsock_certificates.client
        )
        client.write(b"hello")
        async with asyncio.timeout(5):
            while received != b"hello":
                await asyncio.sleep(0)
        client.terminate()
"""
    tests = tests.replace("@pytest.fixture\n", "@pytest_asyncio.fixture\n")
    tests = tests.replace("import pytest\n", "import pytest\nimport pytest_asyncio\n")
    printed = run_pytest(tmp_path, tests)
    assert "4 passed" in printed, printed


def test_another_loop_is_told(tmp_path: Path) -> None:
    tests = """
import pytest

@pytest.mark.asyncio
async def test_pair(uvsock_pair):
    table = {"data": lambda socket, data: None}
    with pytest.raises(RuntimeError, match="uvsock needs a uvloop event loop"):
        await uvsock_pair(table, table)
"""
    printed = run_pytest(tmp_path, tests, 'pytest_plugins = ["uvsock.testing.plugin"]\n')
    assert "1 passed" in printed, printed


def test_a_run_that_does_not_ask_for_the_plugin_does_not_have_it(tmp_path: Path) -> None:
    tests = """
import sys

def test_nothing_is_imported(request):
    assert "uvsock" not in sys.modules
"""
    printed = run_pytest(tmp_path, tests, "")
    assert "1 passed" in printed, printed
