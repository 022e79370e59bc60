"""Everything a handler may do to its own socket, in every handler, with more data waiting.

The socket under test is once the accepted and once the connecting one. Its peer sends more than one
read brings, before the handler runs: what the handler does, it does in the middle of things.
"""

from __future__ import annotations

import asyncio
import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest

import uvsock
from conftest import Recorder, Wire
from helpers import ignore, soon, stopped, until
from uvsock import ReadyState

EVENTS = ("open", "data", "drain", "end", "timeout", "error", "close", "handshake")
PAYLOAD = b"p" * 300_000
LARGE = b"L" * (1 << 20)


class Scene:
    """A connection one side of which does something in one of its handlers, once."""

    def __init__(self, wire: Wire, event: str, action: Callable[[Scene, Any], Any]) -> None:
        self.wire = wire
        self.event = event
        self.action = action
        self.listener: uvsock.Listener
        self.peer: uvsock.Socket[Any] | None = None
        self.peer_received = bytearray()
        self.peer_closed = False
        self.events: list[str] = []
        self.acted_at = -1  # len(events) when the action had been done
        self.result: Any = None
        self.close_error: Any = None
        self.held: list[uvsock.Socket[Any]] = []  # the only references but the library's
        self.gone: list[bool] = []
        self.wrote = 0

    def handler(self, name: str) -> Callable[..., None]:
        def handler(socket: uvsock.Socket[Any], *arguments: Any) -> None:
            self.events.append(name)
            if not self.held and self.acted_at < 0:
                self.held.append(socket)
                weakref.finalize(socket, self.gone.append, True)
            if name == "close":
                self.close_error = arguments[0]
            if name == self.event and self.acted_at < 0:
                self.result = self.action(self, socket)
                self.acted_at = len(self.events)
                return
            if name == "open" and self.event == "timeout":
                socket.timeout(0.001)
            if name == "open" and self.event == "drain":
                while socket.write(b"d" * 100_000) == 100_000:
                    pass
            if name == "data" and self.event == "error":
                raise ValueError

        return handler

    def table(self) -> dict[str, Callable[..., None]]:
        return {name: self.handler(name) for name in EVENTS}

    def peer_table(self) -> dict[str, Callable[..., Any]]:
        def opened(socket: uvsock.Socket[Any]) -> None:
            self.peer = socket
            socket.write(PAYLOAD)
            if self.event in ("end", "close"):
                socket.end()

        def data(socket: uvsock.Socket[Any], chunk: bytes) -> None:
            self.peer_received.extend(chunk)

        def close(socket: uvsock.Socket[Any], error: OSError | None) -> None:
            self.peer_closed = True

        return {"open": opened, "data": data, "close": close, "error": ignore}

    async def play(self, accepted: bool) -> None:
        """Until the action was done and what followed at once has been."""
        # Half-open, so that the peer never ends before the tested side wants it to.
        if accepted:
            self.listener = await self.wire.listen(self.table())
            await self.wire.connect(self.listener, self.peer_table(), allow_half_open=True)
        else:
            self.listener = await self.wire.listen(self.peer_table(), allow_half_open=True)
            await soon(self.connected())
        await until(lambda: self.acted_at >= 0)
        for _ in range(3):
            await asyncio.sleep(0)

    async def connected(self) -> None:
        # A socket that closes in its handshake never opens, which connect() then says.
        try:
            await self.wire.connect(self.listener, self.table())
        except OSError:
            assert self.event == "handshake"

    async def finish(self) -> None:
        """The peer ends; both close, and the listener."""
        # stop(True) drops a peer that is still in its handshake.
        await until(lambda: self.peer is not None or not self.listener.connections)
        if self.peer is not None:
            self.peer.end()
            try:
                await until(lambda: self.peer_closed)
            except TimeoutError:
                pytest.fail(f"the peer never closed; events: {self.events}")
        if "open" in self.events:
            await until(lambda: self.events[-1] == "close")
        await until(lambda: not self.listener.connections)
        await stopped(self.listener)

    def check(self) -> None:
        """What holds whatever a handler did."""
        assert self.events.count("open") <= 1
        assert self.events.count("end") <= 1
        assert self.events.count("close") == self.events.count("open")
        before = [name for name in self.events if name not in ("handshake",)]
        if before:
            assert before[0] == "open"
            assert before[-1] == "close" or before[-2:] == ["close", "error"]

    @property
    def after(self) -> list[str]:
        """The events after the one that acted."""
        return self.events[self.acted_at :]


def upgrade(scene: Scene, socket: uvsock.Socket[Any]) -> Any:
    try:
        return socket.upgrade_tls(scene.wire.authority.server_options, server_side=True)
    except RuntimeError as error:
        return error


def drop(scene: Scene, socket: uvsock.Socket[Any]) -> None:
    socket.data = None
    scene.held.clear()
    del socket
    gc.collect()


def drop_and_terminate(scene: Scene, socket: uvsock.Socket[Any]) -> None:
    socket.terminate()
    drop(scene, socket)


def write_a_lot(scene: Scene, socket: uvsock.Socket[Any]) -> int:
    scene.wrote = socket.write(LARGE)
    return scene.wrote


def write_and(method: str) -> Callable[[Scene, uvsock.Socket[Any]], Any]:
    def act(scene: Scene, socket: uvsock.Socket[Any]) -> Any:
        scene.wrote = socket.write(b"first ")
        scene.wrote += socket.write(LARGE)
        return getattr(socket, method)()

    return act


def reload(scene: Scene, socket: uvsock.Socket[Any]) -> None:
    # The same handlers in a table of their own: the one that runs is let go.
    socket.reload({name: scene.handler(name) for name in EVENTS})
    gc.collect()


def everything(scene: Scene, socket: uvsock.Socket[Any]) -> None:
    for _ in range(2):
        socket.pause()
        socket.write(b"x")
        socket.flush()
        socket.timeout(0.001)
        reload(scene, socket)
        socket.resume()
        socket.end(b"y")
        socket.shutdown(True)
        socket.close()
        socket.unref()
        socket.ref()
        socket.terminate()
        upgrade(scene, socket)


ACTIONS: dict[str, Callable[[Scene, Any], Any]] = {
    "close": lambda scene, socket: socket.close(),
    "end": lambda scene, socket: socket.end(b"bye"),
    "terminate": lambda scene, socket: socket.terminate(),
    "shutdown": lambda scene, socket: socket.shutdown(),
    "shutdown read": lambda scene, socket: socket.shutdown(True),
    "pause": lambda scene, socket: socket.pause(),
    "pause and resume": lambda scene, socket: (socket.pause(), socket.resume()),
    "reload": reload,
    "upgrade": upgrade,
    "write": lambda scene, socket: socket.write(b"written"),
    "write a lot": write_a_lot,
    "write and flush": lambda scene, socket: (socket.write(b"flushed"), socket.flush()),
    "write and close": write_and("close"),
    "write and end": write_and("end"),
    "write and terminate": write_and("terminate"),
    "drop": drop,
    "drop and terminate": drop_and_terminate,
    "stop": lambda scene, socket: scene.listener.stop(True),
    "everything": everything,
}
ABORTING = ("terminate", "write and terminate", "drop and terminate", "everything")
CLOSING = ("close", "write and close", *ABORTING)


@pytest.mark.parametrize(
    ("wire", "event"),
    [
        (kind, event)
        for kind in ("tcp", "unix", "tls")
        for event in EVENTS
        if event != "handshake" or kind == "tls"
    ],
    indirect=["wire"],
)
@pytest.mark.parametrize("action", ACTIONS)
async def test_a_handler_may_do_anything_to_its_own_socket(
    wire: Wire, action: str, event: str
) -> None:
    for accepted in (True, False):
        scene = Scene(wire, event, ACTIONS[action])
        await scene.play(accepted)
        # A handshake that is the last event has not been followed by `open`.
        over = action in CLOSING or (action == "stop" and accepted)
        if action in ABORTING:
            # The others wait for the peer's end, which comes in finish().
            await until(lambda s=scene: s.after == ["close"] or "open" not in s.events
                        or s.event == "close")  # fmt: skip
        if action == "pause" and event not in ("close", "end"):
            seen = list(scene.after)
            await asyncio.sleep(0.005)
            if event == "handshake":
                assert set(scene.after) <= {"open"}
            else:
                assert scene.after == seen == []
            while scene.held:
                scene.held.pop().resume()
        await scene.finish()
        scene.check()
        if over:
            assert scene.after in ([], ["close"])
            assert scene.close_error is None
        if event == "close":
            assert scene.after == []
        expectations(scene, action, event, accepted)
        scene.held.clear()
        scene.result = None
        if scene.gone or "open" in scene.events:
            gc.collect()
            assert scene.gone


def expectations(scene: Scene, action: str, event: str, accepted: bool) -> None:
    """What the peer has got, where the action says so."""
    got = bytes(scene.peer_received)
    if event == "close":
        if action == "upgrade":
            assert isinstance(scene.result, RuntimeError)
        if action in ("write", "end"):
            assert scene.result == -1
        return
    if action == "write":
        assert scene.result == 7
        assert got.endswith(b"written")
    if action == "end":
        assert scene.result == 3
        assert got.endswith(b"bye")
    if action == "write and flush":
        assert got.endswith(b"flushed")
    if action in ("write and close", "write and end", "write a lot"):
        assert scene.wrote > 0
        sent = b"L" * scene.wrote
        if action != "write a lot":
            sent = (b"first " + sent)[: scene.wrote]
        assert got.endswith(sent)
    if action == "upgrade" and scene.wire.encrypted:
        assert isinstance(scene.result, RuntimeError)
    if action == "drop":
        assert "close" in scene.events


# ── Two sockets, and many ──────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("action", ["close", "terminate", "end"])
async def test_two_sockets_that_close_each_other(wire: Wire, action: str) -> None:
    """In `data`, and again in `close`, when the other is about to get its own."""
    closed: list[Any] = []
    data_after_close: list[Any] = []

    def data(socket: uvsock.Socket[Any], chunk: bytes) -> None:
        if action != "end" and socket.ready_state is not ReadyState.ESTABLISHED:
            data_after_close.append(socket)
        for other in list(listener.sockets):
            getattr(other, action)()

    def close(socket: uvsock.Socket[Any], error: OSError | None) -> None:
        closed.append(socket)
        for other in list(listener.sockets):
            getattr(other, action)()

    listener = await wire.listen({"data": data, "close": close})
    clients = [await wire.connect(listener, {"data": ignore}) for _ in range(2)]
    for client in clients:
        client.write(PAYLOAD)
    for client in clients:
        await soon(client.wait_closed())
    await until(lambda: not listener.connections)
    assert len(closed) == len(set(closed)) == 2
    assert not data_after_close
    await stopped(listener)


async def test_both_ends_in_one_process_close_each_other(wire: Wire) -> None:
    server, client = Recorder(), Recorder()
    listener = await wire.listen(server.table())
    socket = await wire.connect(listener, client.table())
    await until(lambda: server.sockets)
    accepted = server.socket
    accepted.end()
    socket.end()
    await soon(asyncio.gather(accepted.wait_closed(), socket.wait_closed()))
    for recorder in (server, client):
        assert recorder.events.count("close") == 1
        assert recorder.close_errors == [None]
    await stopped(listener)


@pytest.mark.parametrize("event", ["open", "data", "end", "close", "timeout"])
async def test_stop_true_inside_a_handler_closes_every_socket_once(wire: Wire, event: str) -> None:
    """B149: also when the `close` handlers close what is left, and stop again."""
    recorder = Recorder()
    fired: list[str] = []

    def trigger(socket: uvsock.Socket[Any], *arguments: Any) -> None:
        if len(recorder.sockets) == 10 or event not in ("open",):
            fired.append(event)
            listener.stop(True)

    def close(socket: uvsock.Socket[Any], error: OSError | None) -> None:
        for other in list(listener.sockets):
            other.terminate()
        listener.stop(True)
        if event == "close":
            fired.append("close")

    def opened(socket: uvsock.Socket[Any]) -> None:
        if event == "timeout" and len(recorder.sockets) == 10:
            socket.timeout(0.001)

    recorder.overrides = {"open": opened, "close": close}
    if event != "close":
        recorder.overrides[event] = trigger
    listener = await wire.listen(recorder.table("open", "data", "end", "close", "timeout"))
    clients = [await wire.connect(listener, {"data": ignore}) for _ in range(10)]
    if event == "data":
        for client in clients:
            client.write(PAYLOAD)
    if event in ("end", "close"):
        clients[3].end()
    for client in clients:
        await soon(client.wait_closed())
    await soon(listener.wait_closed())
    assert fired
    assert recorder.events.count("open") == recorder.events.count("close") == 10
    for accepted in recorder.sockets:
        mine = [call[0] for call in recorder.calls if call[1] is accepted]
        assert mine[-1] == "close"
        assert mine.count("close") == 1
    assert listener.connections == 0


async def test_connect_and_listen_inside_handlers(wire: Wire) -> None:
    """A handler starts what it cannot await: new listeners and connections, on the same wire."""
    tasks: list[asyncio.Task[Any]] = []
    heard = bytearray()

    async def relay(chunk: bytes) -> None:
        inner = await wire.listen({"data": lambda socket, data: (heard.extend(data), socket.end())})
        client = await wire.connect(inner, {"data": ignore})
        client.write(chunk)
        await client.wait_closed()
        inner.stop(True)
        await inner.wait_closed()

    def data(socket: uvsock.Socket[Any], chunk: bytes) -> None:
        tasks.append(asyncio.get_running_loop().create_task(relay(chunk)))
        socket.end()

    listener = await wire.listen({"data": data})
    client = await wire.connect(listener, {"data": ignore})
    client.write(b"pass it on")
    await soon(client.wait_closed())
    await soon(asyncio.gather(*tasks))
    assert heard == b"pass it on"
    await stopped(listener)


async def test_writing_to_each_other_inside_data_never_mixes_streams(wire: Wire) -> None:
    """B76: what one socket receives is written to its neighbour in the middle of a read."""
    received: dict[int, bytearray] = {}
    neighbours: dict[Any, Any] = {}

    def opened(socket: uvsock.Socket[Any]) -> None:
        others = [s for s in neighbours if neighbours[s] is None]
        neighbours[socket] = None
        if others:
            neighbours[socket], neighbours[others[0]] = others[0], socket

    async def data(socket: uvsock.Socket[Any], chunk: bytes) -> None:
        await neighbours[socket].send_all(chunk)

    listener = await wire.listen({"open": opened, "data": data})
    payloads = {number: bytes([65 + number]) * 1_500_000 for number in range(2)}
    clients = []
    for number in payloads:
        received[number] = bytearray()
        clients.append(
            await wire.connect(
                listener, {"data": lambda socket, data, n=number: received[n].extend(data)}
            )
        )
    await until(lambda: len(neighbours) == 2)
    await soon(
        asyncio.gather(*(clients[n].send_all(payload) for n, payload in payloads.items())), 20
    )
    await until(lambda: all(len(got) == 1_500_000 for got in received.values()), 10)
    assert received[0] == payloads[1]
    assert received[1] == payloads[0]
    for client in clients:
        client.end()
        await soon(client.wait_closed())
    await stopped(listener)


async def test_a_flood_of_connections_that_close_in_open(wire: Wire) -> None:
    recorder = Recorder(open=lambda socket: socket.close())
    listener = await wire.listen(recorder.table("open", "data", "close"))

    async def once() -> None:
        client = await wire.connect(listener, {"data": ignore})
        await client.wait_closed()

    await soon(asyncio.gather(*(once() for _ in range(30))))
    await until(lambda: not listener.connections)
    assert recorder.events.count("open") == recorder.events.count("close") == 30
    assert recorder.close_errors == [None] * 30
    await stopped(listener)


async def test_upgrade_inside_open_and_data_again_and_again(tcp_wire: Wire) -> None:
    """B201: the upgrade starts while the socket is being opened, many at a time."""
    authority = tcp_wire.authority
    upgraded: list[bytes] = []

    def opened(socket: uvsock.Socket[Any]) -> None:
        socket.upgrade_tls(authority.server_options)

    listener = await tcp_wire.listen(
        {"open": opened, "data": lambda socket, data: socket.end(data[::-1])}
    )

    async def once(number: int) -> None:
        table = {
            "open": lambda socket: socket.upgrade_tls(authority.client_options),
            "data": lambda socket, data: upgraded.append(data),
        }
        client = await tcp_wire.connect(listener, table)
        await client.send_all(b"%04d" % number)
        await client.wait_closed()
        assert client.encrypted

    for start in range(0, 32, 16):
        await soon(asyncio.gather(*(once(start + n) for n in range(16))), 20)
    assert sorted(upgraded) == sorted((b"%04d" % number)[::-1] for number in range(32))
    await stopped(listener)
