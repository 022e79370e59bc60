"""The event loop's server, and TLS over another transport."""

from __future__ import annotations

import asyncio
import contextvars
import inspect
import os
import socket as stdlib
from typing import Any

import pytest

import uvsock
from conftest import SERVER_NAME, Wire, open_descriptors
from helpers import soon, until
from uvsock.dropin.server import Server

LOOPS = {"uvsock": uvsock.new_event_loop}


class Recorder(asyncio.Protocol):
    def __init__(self) -> None:
        self.events: list[Any] = []
        self.received = b""
        self.transport: Any = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = transport
        self.events.append("made")

    def data_received(self, data: bytes) -> None:
        self.received += data

    def eof_received(self) -> None:
        self.events.append("eof")

    def connection_lost(self, error: Exception | None) -> None:
        self.events.append(error)


class Served:
    """A server, its protocols, and a client."""

    def __init__(self, wire: Wire) -> None:
        self.wire = wire
        self.made: list[Recorder] = []

    def factory(self) -> Recorder:
        self.made.append(Recorder())
        return self.made[-1]

    async def start(self, **options: Any) -> Server:
        loop: Any = asyncio.get_running_loop()
        if self.wire.encrypted:
            options["ssl"] = self.wire.authority.server_context()
        if self.wire.kind == "unix":
            path = str(self.wire.directory / "s")
            self.server = await loop.create_unix_server(self.factory, path, **options)
        else:
            self.server = await loop.create_server(self.factory, "127.0.0.1", 0, **options)
        self.address = self.server.sockets[0].getsockname()
        return self.server  # type: ignore[no-any-return]

    async def connect(self) -> Recorder:
        loop: Any = asyncio.get_running_loop()
        options: dict[str, Any] = {}
        if self.wire.encrypted:
            options = {"ssl": self.wire.authority.client_context(), "server_hostname": SERVER_NAME}
        before = len(self.made)
        if self.wire.kind == "unix":
            made = await loop.create_unix_connection(Recorder, self.address, **options)
        else:
            made = await loop.create_connection(Recorder, *self.address, **options)
        await until(lambda: len(self.made) > before and self.made[-1].transport is not None)
        return made[1]  # type: ignore[no-any-return]


@pytest.fixture
def served(wire: Wire) -> Served:
    return Served(wire)


# ── The server ─────────────────────────────────────────────────────────────────────────────────


def test_nothing_of_asyncios_own_is_used() -> None:
    """It is one for isinstance only: what asyncio's class does inside differs between Pythons."""
    public = {
        name
        for name, _ in inspect.getmembers(asyncio.Server)
        if not name.startswith("_") or name in ("__init__", "__repr__", "__aenter__", "__aexit__")
    }
    assert public <= set(vars(Server))
    assert issubclass(Server, asyncio.Server)


async def test_what_it_tells(served: Served) -> None:
    server = await served.start()
    assert isinstance(server, asyncio.Server)
    assert isinstance(server, asyncio.AbstractServer)
    assert server.get_loop() is asyncio.get_running_loop()
    assert server.is_serving()
    (sock,) = server.sockets
    assert sock.getsockname() == served.address
    assert repr(server) == f"<Server sockets={server.sockets!r}>"
    server.close()
    server.close()
    assert not server.is_serving()
    assert server.sockets == ()
    await soon(server.wait_closed())
    await soon(server.wait_closed())
    with pytest.raises(RuntimeError, match="is closed"):
        await server.serve_forever()
    await server.start_serving()
    assert not server.is_serving()


async def test_it_serves_when_told(served: Served) -> None:
    server = await served.start(start_serving=False)
    assert not server.is_serving()
    with pytest.raises(ConnectionRefusedError):
        await served.connect()
    await server.start_serving()
    await server.start_serving()
    client = await served.connect()
    client.transport.abort()
    server.close()
    await soon(server.wait_closed())


async def test_a_server_that_never_served(served: Served) -> None:
    before = open_descriptors()
    server = await served.start(start_serving=False)
    server.close()
    assert open_descriptors() == before
    await soon(server.wait_closed())


async def test_wait_closed_waits_for_the_server_and_its_connections(served: Served) -> None:
    """As from Python 3.12 on, on every Python."""
    server = await served.start()
    waiting = asyncio.ensure_future(server.wait_closed())
    client = await served.connect()
    server.close()
    for _ in range(3):
        await asyncio.sleep(0)
    assert not waiting.done()
    client.transport.close()
    await soon(waiting)
    assert served.made[0].events[-1] is None


@pytest.mark.parametrize("how", ["close_clients", "abort_clients"])
async def test_clients_are_closed(served: Served, how: str) -> None:
    """As from Python 3.13 on, on every Python."""
    server = await served.start()
    clients = [await served.connect() for _ in range(3)]
    server.close()
    getattr(server, how)()
    await soon(server.wait_closed())
    assert [made.events[-1] for made in served.made] == [None] * 3
    await until(lambda: all(len(client.events) > 1 for client in clients))
    for client in clients:
        client.transport.abort()


async def test_serve_forever(served: Served) -> None:
    server = await served.start(start_serving=False)
    serving = asyncio.ensure_future(server.serve_forever())
    await until(server.is_serving)
    with pytest.raises(RuntimeError, match="already being awaited"):
        await server.serve_forever()
    client = await served.connect()
    serving.cancel()
    await until(lambda: not server.is_serving())
    with pytest.raises(asyncio.CancelledError):
        await soon(serving)
    assert served.made[0].events[-1] is None  # closed, or it would be waited for
    client.transport.abort()


async def test_close_ends_serve_forever(served: Served) -> None:
    server = await served.start()
    serving = asyncio.ensure_future(server.serve_forever())
    await asyncio.sleep(0)
    server.close()
    with pytest.raises(asyncio.CancelledError):
        await soon(serving)


async def test_as_a_context(served: Served) -> None:
    async with await served.start() as server:
        client = await served.connect()
        client.transport.close()
    assert not server.is_serving()
    assert served.made[0].events[-1] is None


async def test_an_address_in_use_leaves_nothing_open(served: Served) -> None:
    loop: Any = asyncio.get_running_loop()
    with stdlib.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        before = open_descriptors()
        with pytest.raises(OSError, match="error while attempting to bind on address"):
            await loop.create_server(Recorder, *taken.getsockname())
        with pytest.raises(ValueError, match="ssl_handshake_timeout"):
            await loop.create_server(
                Recorder,
                "127.0.0.1",
                0,
                ssl=served.wire.authority.server_context(),
                ssl_handshake_timeout=0,
            )
        assert open_descriptors() == before


@pytest.mark.parametrize("cleanup", [False, True])
async def test_the_file_of_a_unix_socket(unix_wire: Wire, cleanup: bool) -> None:
    served = Served(unix_wire)
    server = await served.start(cleanup_socket=cleanup)
    assert os.path.exists(served.address)
    server.close()
    assert os.path.exists(served.address) is not cleanup
    await soon(server.wait_closed())


async def test_the_file_of_somebody_else_stays(unix_wire: Wire) -> None:
    served = Served(unix_wire)
    server = await served.start(cleanup_socket=True)
    os.unlink(served.address)
    with stdlib.socket(stdlib.AF_UNIX) as other:
        other.bind(served.address)
        server.close()
        assert os.path.exists(served.address)
    await soon(server.wait_closed())


async def test_keep_alive(tcp_wire: Wire) -> None:
    """As from Python 3.13 on, on every Python."""
    server = await Served(tcp_wire).start(keep_alive=True)
    assert server.sockets[0].getsockopt(stdlib.SOL_SOCKET, stdlib.SO_KEEPALIVE) == 1
    server.close()
    await soon(server.wait_closed())


async def test_a_context_of_ones_own(served: Served) -> None:
    """Of the protocol's callbacks, on every Python; by default it is the caller's."""
    variable = contextvars.ContextVar("variable", default="-")
    given = contextvars.copy_context()
    given.run(variable.set, "given")
    seen: list[str] = []

    class Watching(Recorder):
        def connection_made(self, transport: asyncio.BaseTransport) -> None:
            super().connection_made(transport)
            seen.append(variable.get())

    def factory() -> Watching:
        served.made.append(Watching())
        return served.made[-1]  # type: ignore[return-value]

    served.factory = factory  # type: ignore[method-assign]
    server = await served.start(context=given)
    client = await served.connect()
    assert seen == ["given"]
    client.transport.abort()
    server.close()
    await soon(server.wait_closed())


async def test_a_socket_of_ones_own_stays_open_if_there_is_no_protocol() -> None:
    def factory() -> asyncio.Protocol:
        raise ZeroDivisionError

    loop: Any = asyncio.get_running_loop()
    mine, peer = stdlib.socketpair()
    with mine, peer:
        for connecting in (
            loop.create_connection(factory, sock=mine),
            loop.create_unix_connection(factory, sock=mine),
            loop.connect_accepted_socket(factory, mine),
        ):
            with pytest.raises(ZeroDivisionError):
                await connecting
            assert mine.fileno() >= 0
    server = await loop.create_server(Recorder, "127.0.0.1", 0)
    before = open_descriptors()
    with pytest.raises(ZeroDivisionError):
        await loop.create_connection(factory, *server.sockets[0].getsockname())
    server.close()
    await soon(server.wait_closed())
    await until(lambda: len(open_descriptors()) < len(before))


# ── TLS over another transport ─────────────────────────────────────────────────────────────────


class Foreign(asyncio.Transport):
    """A transport of somebody else's, in Python, on one of the loop's."""

    def __init__(self, below: Any) -> None:
        super().__init__()
        self.below = below

    def __getattribute__(self, name: str) -> Any:
        if name in ("below", "__class__", "__dict__"):
            return object.__getattribute__(self, name)
        return getattr(object.__getattribute__(self, "below"), name)


async def tunnel(served: Served, client: Recorder, foreign: bool) -> tuple[Any, Any]:
    """TLS on both ends of a connection: the two upper transports, with their protocols."""
    loop: Any = asyncio.get_running_loop()
    authority = served.wire.authority
    ends = [served.made[-1].transport, client.transport]
    if foreign:
        ends = [Foreign(end) for end in ends]
    uppers = [Recorder(), Recorder()]
    transports = await soon(
        asyncio.gather(
            loop.start_tls(ends[0], uppers[0], authority.server_context(), server_side=True),
            loop.start_tls(
                ends[1], uppers[1], authority.client_context(), server_hostname=SERVER_NAME
            ),
        )
    )
    for upper, transport in zip(uppers, transports, strict=True):
        upper.transport = transport
    return uppers[0], uppers[1]


@pytest.mark.parametrize("foreign", [False, True])
async def test_tls_in_tls(tls_wire: Wire, foreign: bool) -> None:
    served = Served(tls_wire)
    server = await served.start()
    client = await served.connect()
    below = client.transport
    one, two = await tunnel(served, client, foreign)
    assert two.transport.get_extra_info("peername") == below.get_extra_info("peername")
    assert two.transport.get_extra_info("socket") is below.get_extra_info("socket")
    assert two.transport.get_extra_info("cipher") is not None
    assert two.transport.get_extra_info("nothing", "default") == "default"
    much = os.urandom(3_000_000)
    two.transport.write(much)
    one.transport.write(much[::-1])
    await until(lambda: len(one.received) == len(two.received) == len(much), 20)
    assert one.received == much
    assert two.received == much[::-1]
    two.transport.write(b"last")
    two.transport.close()
    await until(lambda: one.events == two.events == ["eof", None])
    assert one.received == much + b"last"
    server.close()
    await soon(server.wait_closed())
    await until(below.is_closing)


async def test_tls_on_a_plain_transport_of_somebody_else(plain_wire: Wire) -> None:
    served = Served(plain_wire)
    server = await served.start()
    one, two = await tunnel(served, await served.connect(), True)
    two.transport.write(b"up")
    one.transport.write(b"down")
    await until(lambda: (one.received, two.received) == (b"up", b"down"))
    two.transport.write_eof()
    await until(lambda: "eof" in one.events)
    await until(lambda: one.events[-1] is None and two.events[-1] is None)
    server.close()
    await soon(server.wait_closed())


async def test_a_tunnel_that_breaks(tls_wire: Wire) -> None:
    """What broke the connection below is what the protocol above is told."""
    served = Served(tls_wire)
    server = await served.start()
    client = await served.connect()
    one, two = await tunnel(served, client, False)
    error = ConnectionResetError("broken")
    client.transport._force_close(error)
    await until(lambda: two.events == [error])
    await until(lambda: one.events and not isinstance(one.events[-1], str))
    server.close()
    await soon(server.wait_closed())


@pytest.mark.parametrize("how", ["abort", "close"])
async def test_a_tunnel_that_is_given_up(tls_wire: Wire, how: str) -> None:
    served = Served(tls_wire)
    server = await served.start()
    client = await served.connect()
    one, two = await tunnel(served, client, False)
    getattr(two.transport, how)()
    await until(lambda: two.events[-1:] == [None])
    await until(lambda: one.events and not isinstance(one.events[-1], str))
    server.close()
    await soon(server.wait_closed())


async def test_a_handshake_in_a_tunnel_that_fails(tls_wire: Wire) -> None:
    served = Served(tls_wire)
    server = await served.start()
    client = await served.connect()
    before = open_descriptors()
    served.made[0].transport.write(b"this is no TLS\n" * 10)
    with pytest.raises(OSError):
        await soon(
            asyncio.get_running_loop().start_tls(
                client.transport,
                Recorder(),
                tls_wire.authority.client_context(),
                server_hostname=SERVER_NAME,
            )
        )
    server.close()
    await soon(server.wait_closed())
    await until(lambda: len(open_descriptors()) < len(before))


@pytest.mark.parametrize("transport", [None, asyncio.WriteTransport(), 5])
async def test_what_is_no_transport(tls_wire: Wire, transport: Any) -> None:
    loop = asyncio.get_running_loop()
    with pytest.raises(TypeError, match=r"is not supported by start_tls\(\)"):
        await loop.start_tls(transport, Recorder(), tls_wire.authority.client_context())
    with pytest.raises(TypeError, match="sslcontext is expected"):
        await loop.start_tls(asyncio.Transport(), Recorder(), None)  # type: ignore[arg-type]
