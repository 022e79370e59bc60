"""The table of handlers: its forms, what each is called with, and what happens when one raises."""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import functools
import gc
import ssl
import types
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple
from unittest.mock import Mock

import pytest
import uvloop

import uvsock
from conftest import Recorder, Wire
from helpers import echo, ignore, soon, stopped, until
from uvsock import Handlers, ReadyState

NAMES = (
    "open", "data", "drain", "end", "timeout", "handshake", "error", "close", "connect_error",
)  # fmt: skip
Table = dict[str, Callable[..., Any]]


async def round_trip(wire: Wire, listener: uvsock.Listener, payload: bytes = b"ping") -> bytes:
    """What a new connection gets back for the payload."""
    reader, writer = await soon(wire.streams(listener))
    try:
        writer.write(payload)
        answer: bytes = await soon(reader.readexactly(len(payload)))
    finally:
        writer.close()
    with contextlib.suppress(ConnectionError):
        await writer.wait_closed()
    return answer


# ── The forms of a table ───────────────────────────────────────────────────────────────────────


class Slotted:
    __slots__ = ("data", "open")

    def __init__(self, table: Table) -> None:
        self.open, self.data = table["open"], table["data"]


def instance(table: Table) -> object:
    class Service:
        """Methods are bound: `self` is the service, then comes the socket."""

        def open(self, socket: uvsock.Socket[Any]) -> None:
            table["open"](socket)

        @property
        def data(self) -> Callable[..., Any]:
            return table["data"]

    return Service()


def namespace_class(table: Table) -> object:
    class Service:
        open = staticmethod(table["open"])
        data = staticmethod(table["data"])

    return Service


def module(table: Table) -> object:
    made = types.ModuleType("handlers_of_a_test")
    vars(made).update(table, unrelated=1)
    return made


FORMS: dict[str, Callable[[Table], Any]] = {
    "Handlers": lambda table: Handlers(**table),
    "dict": dict,
    "read-only mapping": types.MappingProxyType,
    "None means absent": lambda table: {**dict.fromkeys(NAMES), **table},
    "namespace": lambda table: types.SimpleNamespace(**table, unrelated=1, close=None),
    "slots": Slotted,
    "module": module,
    "instance": instance,
    "class": namespace_class,
}


@pytest.mark.parametrize("form", FORMS)
async def test_a_table_may_be_a_mapping_or_any_object_with_the_handlers(
    tcp_wire: Wire, form: str
) -> None:
    opened: list[uvsock.Socket[Any]] = []
    listener = await tcp_wire.listen(FORMS[form]({"open": opened.append, "data": echo}))
    assert isinstance(listener.handlers, Handlers)
    assert listener.handlers.close is None
    answers: list[bytes] = []

    def answered(socket: uvsock.Socket[Any], data: bytes) -> None:
        answers.append(data)
        socket.end()

    table = {"open": lambda socket: socket.write(b"ping"), "data": answered}
    socket = await soon(tcp_wire.connect(listener, FORMS[form](table)))
    await soon(socket.wait_closed())
    assert answers == [b"ping"]
    assert len(opened) == 1
    await stopped(listener)


CALLABLES: dict[str, Callable[[list[bytes]], Callable[..., Any]]] = {
    "partial": lambda seen: functools.partial(lambda seen, socket, data: seen.append(data), seen),
    "callable object": lambda seen: CallableObject(seen),
    "bound method": lambda seen: CallableObject(seen).method,
    "mock": lambda seen: Mock(side_effect=lambda socket, data: seen.append(data)),
}


class CallableObject:
    def __init__(self, seen: list[bytes]) -> None:
        self.seen = seen

    def __call__(self, socket: uvsock.Socket[Any], data: bytes) -> None:
        self.seen.append(data)

    method = __call__


@pytest.mark.parametrize("kind", CALLABLES)
async def test_a_handler_may_be_any_callable(tcp_wire: Wire, kind: str) -> None:
    seen: list[bytes] = []
    listener = await tcp_wire.listen({"data": CALLABLES[kind](seen)})
    _, writer = await tcp_wire.streams(listener)
    writer.write(b"hello")
    await until(lambda: seen)
    assert seen == [b"hello"]
    writer.close()
    await stopped(listener)


async def test_a_table_is_read_once_at_the_call(tcp_wire: Wire) -> None:
    reads: list[str] = []

    class Service:
        @property
        def data(self) -> Callable[..., Any]:
            reads.append("data")
            return echo

    mapping: dict[str, Any] = {"data": echo}
    listener = await tcp_wire.listen(mapping)
    mapping["data"] = None
    mapping["nonsense"] = 1
    assert await round_trip(tcp_wire, listener) == b"ping"
    listener.reload(Service())
    for _ in range(3):
        assert await round_trip(tcp_wire, listener) == b"ping"
    assert reads == ["data"]
    await stopped(listener)


def test_handlers_can_be_read_back_and_not_changed() -> None:
    table = Handlers(open=ignore, data=echo)
    assert table.open is ignore
    assert table.data is echo
    assert [name for name in NAMES if getattr(table, name) is not None] == ["open", "data"]
    assert "open" in repr(table)
    assert "data" in repr(table)
    with pytest.raises(AttributeError):
        table.data = ignore  # type: ignore[misc]
    with pytest.raises(TypeError):
        Handlers(ignore)  # type: ignore[call-arg]
    with pytest.raises(TypeError, match="nonsense"):
        Handlers(data=ignore, nonsense=ignore)  # type: ignore[call-arg]


async def test_a_handlers_object_is_taken_as_it_is(tcp_wire: Wire) -> None:
    table = Handlers(data=echo)
    listener = await tcp_wire.listen(table)
    assert listener.handlers is table
    await stopped(listener)


BAD_TABLES: dict[str, tuple[Any, str]] = {
    "unknown key": ({"data": ignore, "datum": ignore}, "datum"),
    "unknown key that is None": ({"data": ignore, "dat": None}, "dat"),
    "camel case": ({"data": ignore, "connectError": ignore}, "connectError"),
    "key that is no str": ({"data": ignore, 5: ignore}, "5"),
    "empty": ({}, "data"),
    "neither data nor drain": ({"open": ignore, "close": ignore}, "data"),
    "data is None": ({"data": None}, "data"),
    "object without handlers": (object(), "data"),
    "function": (ignore, "data"),
    "None": (None, "handlers"),
    "list": ([ignore], "handlers"),
    "str": ("data", "handlers"),
    "int": (5, "handlers"),
    **{
        f"{name} is not callable": ({"data": ignore, name: value}, name)
        for name, value in zip(NAMES, (5, "x", b"x", [], {}, True, 1.5, object(), ()), strict=True)
    },
    "attribute is not callable": (types.SimpleNamespace(data=ignore, end=0), "end"),
}


@pytest.mark.parametrize("case", BAD_TABLES)
async def test_a_bad_table_is_a_type_error_that_names_the_key(tcp_wire: Wire, case: str) -> None:
    """Wherever a table is taken; what was in force stays so."""
    bad, key = BAD_TABLES[case]
    with pytest.raises(TypeError, match=key):
        await uvsock.listen(bad, "127.0.0.1", 0)
    listener = await tcp_wire.listen({"data": echo})
    with pytest.raises(TypeError, match=key):
        await tcp_wire.connect(listener, bad)
    with pytest.raises(TypeError, match=key):
        listener.reload(bad)
    client = Recorder()
    socket = await tcp_wire.connect(listener, client.table())
    with pytest.raises(TypeError, match=key):
        socket.reload(bad)
    if bad is not None:  # there, None keeps the table
        with pytest.raises(TypeError, match=key):
            socket.upgrade_tls(True, bad)
    assert listener.connections <= 1
    socket.write(b"unharmed")
    await until(lambda: client.received == b"unharmed")
    socket.end()
    await soon(socket.wait_closed())
    await stopped(listener)


async def test_drain_alone_is_a_table_and_what_arrives_is_dropped(wire: Wire) -> None:
    closed: list[object] = []
    listener = await wire.listen({"drain": ignore, "close": lambda *call: closed.append(call)})
    client = await wire.connect(listener, {"data": ignore})
    await soon(client.send_all(b"x" * 3_000_000))
    await until(lambda: listener.stats.bytes_read == 3_000_000)
    client.end()
    await soon(client.wait_closed())
    await until(lambda: closed)
    await stopped(listener)


# ── What each handler is called with ───────────────────────────────────────────────────────────


async def test_every_handler_gets_its_socket_and_its_arguments(wire: Wire) -> None:
    recorder = Recorder(
        timeout=lambda socket: socket.write(b"x"),
        data=lambda socket, data: 1 / 0,
        drain=ignore,
    )
    listener = await wire.listen(recorder.table())
    client = await wire.connect(listener, {"data": ignore})
    await until(lambda: recorder.sockets)
    accepted = recorder.socket
    accepted.timeout(0.001)
    await until(lambda: "timeout" in recorder.events)
    client.write(b"hello")
    await until(lambda: "error" in recorder.events)
    while accepted.write(b"y" * 100_000) == 100_000:
        pass
    await until(lambda: "drain" in recorder.events)
    client.end()
    await soon(client.wait_closed())
    await until(lambda: "close" in recorder.events)
    assert all(call[1] is accepted for call in recorder.calls)
    arguments: dict[str, tuple[Any, ...]] = {call[0]: call[2:] for call in recorder.calls}
    (failure,) = arguments.pop("error")
    assert isinstance(failure, ZeroDivisionError)
    expected: dict[str, tuple[Any, ...]] = {
        "open": (),
        "timeout": (),
        "data": (b"hello",),
        "drain": (),
        "end": (),
        "close": (None,),
    }
    if wire.encrypted:
        expected["handshake"] = (True, None)
    assert arguments == expected
    order = [event for event in recorder.events if event != "drain"]
    handshake = ["handshake"] if wire.encrypted else []
    assert order == [*handshake, "open", "timeout", "data", "error", "end", "close"]
    await stopped(listener)


async def test_open_comes_before_data_that_was_sent_with_the_connection(wire: Wire) -> None:
    recorder = Recorder()
    listener = await wire.listen(recorder.table("open", "data", "end", "close"))
    clients = [
        await wire.connect(
            listener, {"open": lambda socket: socket.end(b"first" * 1000), "data": ignore}
        )
        for _ in range(5)
    ]
    for client in clients:
        await soon(client.wait_closed())
    await until(lambda: recorder.events.count("close") == 5)
    for accepted in recorder.sockets:
        mine = [call[0] for call in recorder.calls if call[1] is accepted]
        assert (mine[0], mine[-2:]) == ("open", ["end", "close"])
        assert mine.count("open") == mine.count("end") == mine.count("close") == 1
    assert recorder.received == b"first" * 5000
    await stopped(listener)


async def test_a_quiet_connection_gets_open_and_nothing_else(wire: Wire) -> None:
    server, client = Recorder(drain=ignore), Recorder(drain=ignore)
    listener = await wire.listen(server.table())
    socket = await wire.connect(listener, client.table())
    await until(lambda: server.sockets)
    await asyncio.sleep(0.02)
    expected = ["handshake", "open"] if wire.encrypted else ["open"]
    assert client.events == server.events == expected
    assert (socket.bytes_read, socket.bytes_written) == (0, 0)
    socket.end()
    await soon(socket.wait_closed())
    await stopped(listener)


async def test_what_a_handler_returns_is_ignored(tcp_wire: Wire) -> None:
    recorder = Recorder(
        open=lambda socket: ValueError("returned, not raised"),
        data=lambda socket, data: False,
        end=lambda socket: NotImplemented,
        close=lambda socket, error: 5,
    )
    listener = await tcp_wire.listen(recorder.table())
    client = await tcp_wire.connect(listener, {"data": ignore})
    client.end(b"x")
    await soon(client.wait_closed())
    await until(lambda: "close" in recorder.events)
    assert recorder.events == ["open", "data", "end", "close"]
    await stopped(listener)


async def test_a_failed_handshake_calls_handshake_and_never_open_or_close(
    tls_wire: Wire,
) -> None:
    recorder = Recorder()
    listener = await tls_wire.listen(recorder.table())
    _, writer = await asyncio.open_connection(listener.hostname, listener.port)
    writer.write(b"GET / HTTP/1.1\r\n\r\n")
    await until(lambda: recorder.events)
    name, _, success, error = recorder.calls[0]
    assert (name, success) == ("handshake", False)
    assert isinstance(error, ssl.SSLError)
    await until(lambda: not listener.connections)
    await asyncio.sleep(0.01)
    assert recorder.events == ["handshake"]
    writer.close()
    await stopped(listener)


# ── A handler that raises ──────────────────────────────────────────────────────────────────────


class Trouble(Exception):
    """What the handlers of these tests raise."""


RAISING = ("open", "data", "drain", "end", "timeout", "handshake", "close")
# The one place for the rule: after which of them the socket stays open.
STAYS_OPEN = ("data", "drain", "timeout", "handshake")


# Each of them on each wire, but a handshake on TLS only.
on_every_wire = pytest.mark.parametrize(
    ("wire", "event"),
    [
        (kind, event)
        for kind in ("tcp", "unix", "tls")
        for event in RAISING
        if event != "handshake" or kind == "tls"
    ],
    indirect=["wire"],
)


async def provoke(
    wire: Wire, event: str, raised: BaseException, **extra: Callable[..., Any]
) -> tuple[uvsock.Listener, Recorder, uvsock.Socket[Any]]:
    """A listener with a handler that raises once, a client that made it, and the client's socket.

    The first byte that comes is answered with more than the client takes at once.
    """
    pending = [raised]

    def trouble(socket: uvsock.Socket[Any], *arguments: Any) -> None:
        if pending:
            raise pending.pop()

    def opened(socket: uvsock.Socket[Any]) -> None:
        if event == "timeout":
            socket.timeout(0.001)
        if event == "drain":
            while socket.write(b"x" * 100_000) == 100_000:
                pass

    overrides = {"open": opened, "drain": ignore, "timeout": ignore, **extra, event: trouble}
    recorder = Recorder(**overrides)
    names = ["open", "data", "end", "close", *(["handshake"] if event == "handshake" else [])]
    listener = await wire.listen(recorder.table(*names))
    client = await wire.connect(listener, {"data": ignore})
    await until(lambda: recorder.sockets or event in ("open", "handshake"))
    if event == "data":
        client.write(b"trouble")
    if event in ("end", "close"):
        client.end()
    await until(lambda: event in recorder.events)
    return listener, recorder, client


@on_every_wire
async def test_what_a_handler_raises_goes_to_error(wire: Wire, event: str) -> None:
    raised = Trouble(event)
    listener, recorder, client = await provoke(wire, event, raised, error=ignore)
    await until(lambda: "error" in recorder.events)
    assert recorder.errors == [raised]
    position = recorder.events.index("error")
    assert recorder.events[position - 1] == event
    if event in STAYS_OPEN:
        await until(lambda: recorder.sockets)
        await asyncio.sleep(0.01)
        assert "close" not in recorder.events
        assert recorder.socket.ready_state is ReadyState.ESTABLISHED
        client.write(b"still heard")
        await until(lambda: recorder.received.endswith(b"still heard"))
        client.end()
    await soon(client.wait_closed())
    await until(lambda: "close" in recorder.events)
    assert recorder.events.count("close") == 1
    assert recorder.close_errors == [None]
    await stopped(listener)


@on_every_wire
async def test_without_error_the_loop_is_told_and_the_socket_closed(
    wire: Wire, event: str, loop_errors: list[dict[str, Any]]
) -> None:
    raised = Trouble(event)
    listener, recorder, client = await provoke(wire, event, raised)
    await soon(client.wait_closed())
    await until(lambda: not listener.connections)
    (context,) = loop_errors
    assert context["exception"] is raised
    assert context["handler"] == event
    assert context["socket"] is recorder.calls[-1][1]
    assert isinstance(context["message"], str)
    if event != "handshake":
        assert recorder.events.count("close") == 1
        assert recorder.close_errors == [None]
    await stopped(listener)


@on_every_wire
async def test_what_error_raises_goes_to_the_loop_and_closes_the_socket(
    wire: Wire, event: str, loop_errors: list[dict[str, Any]]
) -> None:
    second = Trouble("in error")

    def error(socket: uvsock.Socket[Any], failure: Exception) -> None:
        raise second

    listener, recorder, client = await provoke(wire, event, Trouble(event), error=error)
    await soon(client.wait_closed())
    await until(lambda: not listener.connections)
    (context,) = loop_errors
    assert context["exception"] is second
    assert context["handler"] == "error"
    assert recorder.events.count("error") == 1
    if event != "handshake":
        assert recorder.events.count("close") == 1
    await stopped(listener)


@on_every_wire
async def test_the_trouble_of_one_connection_never_touches_another(
    wire: Wire, event: str, loop_errors: list[dict[str, Any]]
) -> None:
    listener = await wire.listen({"data": echo})
    reader, writer = await wire.streams(listener)
    writer.write(b"before")
    assert await soon(reader.readexactly(6)) == b"before"
    (bystander,) = listener.sockets
    pending = [Trouble(event)]

    def trouble(socket: uvsock.Socket[Any], *arguments: Any) -> None:
        if socket is not bystander and pending:
            raise pending.pop()
        if event == "data":
            socket.write(arguments[0])

    def opened(socket: uvsock.Socket[Any]) -> None:
        if event == "timeout":
            socket.timeout(0.001)
        if event == "drain" and pending:
            while socket.write(b"x" * 100_000) == 100_000:
                pass

    listener.reload({"open": opened, "data": echo, event: trouble})
    client = await wire.connect(listener, {"data": ignore})
    if event == "data":
        client.write(b"trouble")
    if event in ("end", "close"):
        client.end()
    writer.write(b"during")
    await until(lambda: not pending)
    assert await soon(reader.readexactly(6)) == b"during"
    await soon(client.wait_closed())
    writer.write(b"after")
    assert await soon(reader.readexactly(5)) == b"after"
    assert bystander.ready_state is ReadyState.ESTABLISHED
    assert await round_trip(wire, listener) == b"ping"
    assert [context["handler"] for context in loop_errors] == [event]
    writer.close()
    await stopped(listener)


async def test_more_data_of_the_same_connection_follows_an_exception(wire: Wire) -> None:
    """With an `error` handler, every call stands for itself."""
    failures: list[Exception] = []
    seen = 0

    def data(socket: uvsock.Socket[Any], chunk: bytes) -> None:
        nonlocal seen
        seen += len(chunk)
        raise Trouble(len(chunk))

    listener = await wire.listen({"data": data, "error": lambda s, error: failures.append(error)})
    client = await wire.connect(listener, {"data": ignore})
    await soon(client.send_all(b"x" * 1_500_000))
    client.end()
    await soon(client.wait_closed())
    await until(lambda: not listener.connections)
    assert seen == 1_500_000
    assert len(failures) > 1
    assert sum(failure.args[0] for failure in failures) == seen
    await stopped(listener)


async def test_connect_resolves_though_open_raised_and_the_socket_is_closed(wire: Wire) -> None:
    listener = await wire.listen({"data": echo})
    raised = Trouble("open")

    def opened(socket: uvsock.Socket[Any]) -> None:
        raise raised

    recorder = Recorder(open=opened)
    socket = await soon(wire.connect(listener, recorder.table("open", "data", "close", "error")))
    assert socket is recorder.socket
    assert socket.write(b"x") == -1
    await soon(socket.wait_closed())
    assert recorder.events == ["open", "error", "close"]
    assert recorder.errors == [raised]
    assert recorder.close_errors == [None]
    await stopped(listener)


async def test_the_error_handler_may_close_write_and_is_the_sockets_own(wire: Wire) -> None:
    def error(socket: uvsock.Socket[Any], failure: Exception) -> None:
        socket.write(f"500 {failure}")
        socket.close()

    def data(socket: uvsock.Socket[Any], chunk: bytes) -> None:
        socket.write(b"partial ")
        raise Trouble("sorry")

    listener = await wire.listen({"data": data, "error": error})
    reader, writer = await wire.streams(listener)
    writer.write(b"x")
    assert await soon(reader.read()) == b"partial 500 sorry"
    writer.close()
    await stopped(listener)


async def test_an_exception_that_is_no_exception_class_of_ours_is_passed_as_it_is(
    tcp_wire: Wire,
) -> None:
    """Anything but KeyboardInterrupt and SystemExit, also a BaseException."""

    class Odd(BaseException):
        pass

    odd = Odd()
    listener, recorder, client = await provoke(tcp_wire, "data", odd, error=ignore)
    await until(lambda: "error" in recorder.events)
    assert recorder.errors == [odd]
    client.end()
    await soon(client.wait_closed())
    await stopped(listener)


async def test_data_factory_that_raises_costs_its_own_connection_only(
    wire: Wire, loop_errors: list[dict[str, Any]]
) -> None:
    results: list[Any] = [{"number": 1}, Trouble("factory"), {"number": 3}]

    def factory() -> Any:
        result = results.pop(0)
        if isinstance(result, Exception):
            raise result
        return result

    recorder = Recorder(data=echo)
    listener = await wire.listen(recorder.table(), data_factory=factory)
    assert await round_trip(wire, listener) == b"ping"
    with pytest.raises((ConnectionError, asyncio.IncompleteReadError, ssl.SSLError)):
        await round_trip(wire, listener)
    assert await round_trip(wire, listener) == b"ping"
    assert [socket.data for socket in recorder.sockets] == [{"number": 1}, {"number": 3}]
    (context,) = loop_errors
    assert isinstance(context["exception"], Trouble)
    assert context["handler"] == "data_factory"
    await until(lambda: not listener.connections)
    assert recorder.events.count("close") == 2
    await stopped(listener)


# ── KeyboardInterrupt and SystemExit ───────────────────────────────────────────────────────────


def run_until_broken(main: Callable[[], Any]) -> list[dict[str, Any]]:
    """Run on a loop of its own; what its exception handler was called with."""
    reported: list[dict[str, Any]] = []

    async def reporting() -> None:
        asyncio.get_running_loop().set_exception_handler(
            lambda _, context: reported.append(context)
        )
        await main()

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        try:
            runner.run(reporting())
        finally:
            gc.collect()
    return reported


# What ends the run leaves open sockets to the loop's close().
@pytest.mark.filterwarnings("ignore:unclosed:ResourceWarning")
@pytest.mark.parametrize("kind", [KeyboardInterrupt, SystemExit])
@pytest.mark.parametrize(
    "event", ["open", "data", "drain", "end", "timeout", "error", "close", "data_factory"]
)
def test_keyboard_interrupt_and_system_exit_end_the_run(
    event: str, kind: type[BaseException]
) -> None:
    errors: list[object] = []
    progress: list[str] = []

    def trouble(*arguments: Any) -> None:
        progress.append("raised")
        raise kind(7)

    def opened(socket: uvsock.Socket[Any]) -> None:
        if event == "timeout":
            socket.timeout(0.001)
        if event == "drain":
            while socket.write(b"x" * 100_000) == 100_000:
                pass

    def data(socket: uvsock.Socket[Any], chunk: bytes) -> None:
        if event == "error":
            raise Trouble

    table: dict[str, Any] = {
        "open": opened, "data": data, "error": lambda s, error: errors.append(error),
    }  # fmt: skip
    options: dict[str, Any] = {}
    if event == "data_factory":
        options["data_factory"] = trouble
    else:
        table[event] = trouble

    async def main() -> None:
        listener = await uvsock.listen(table, "127.0.0.1", 0, **options)
        assert listener.port is not None
        reader, writer = await asyncio.open_connection("127.0.0.1", listener.port)
        writer.write(b"hello")
        if event in ("end", "close"):
            writer.write_eof()
        try:
            await reader.read()
            await asyncio.sleep(3)
            progress.append("survived")
        finally:
            writer.transport.abort()

    with pytest.raises(kind) as caught:
        run_until_broken(main)
    assert caught.value.args == (7,)
    assert progress == ["raised"]
    assert not errors


# ── contextvars ────────────────────────────────────────────────────────────────────────────────

variable: contextvars.ContextVar[str] = contextvars.ContextVar("variable", default="unset")


async def test_handlers_run_in_the_context_of_listen_and_connect(wire: Wire) -> None:
    seen: dict[str, set[str]] = {"server": set(), "client": set()}
    called: dict[str, set[str]] = {"server": set(), "client": set()}

    def table(side: str) -> Table:
        def recorder(name: str) -> Callable[..., None]:
            def handler(socket: uvsock.Socket[Any], *arguments: Any) -> None:
                seen[side].add(variable.get())
                called[side].add(name)
                if name == "open":
                    socket.timeout(0.005)
                if name == "data":
                    raise Trouble
                if name == "timeout":
                    while socket.write(b"x" * 100_000) == 100_000:
                        pass

            return handler

        return {name: recorder(name) for name in NAMES if name != "connect_error"}

    def factory() -> None:
        seen["server"].add(variable.get())
        called["server"].add("data_factory")

    variable.set("at listen")
    listener = await wire.listen(table("server"), data_factory=factory)
    variable.set("at connect")
    socket = await wire.connect(listener, table("client"))
    variable.set("later")
    await until(lambda: "drain" in called["server"] and "drain" in called["client"])
    socket.end()
    await soon(socket.wait_closed())
    await until(lambda: "close" in called["server"])
    assert seen == {"server": {"at listen"}, "client": {"at connect"}}
    expected = set(NAMES) - {"connect_error"} - (set() if wire.encrypted else {"handshake"})
    assert called["client"] == expected
    assert called["server"] == expected | {"data_factory"}
    await stopped(listener)


async def test_the_context_is_that_of_the_call_and_not_of_the_await() -> None:
    seen: list[str] = []
    table = {"open": lambda socket: seen.append(variable.get()), "data": ignore}
    variable.set("listen called")
    listening = uvsock.listen(table, "127.0.0.1", 0)
    variable.set("listen awaited")
    listener = await listening
    variable.set("connect called")
    connecting = uvsock.connect(table, "127.0.0.1", listener.port)
    variable.set("connect awaited")
    client = await connecting
    await until(lambda: len(seen) == 2)
    assert sorted(seen) == ["connect called", "listen called"]
    client.end()
    await soon(client.wait_closed())
    await stopped(listener)


async def test_what_resume_and_upgrade_schedule_runs_in_that_context_too(tcp_wire: Wire) -> None:
    seen: list[str] = []

    def data(socket: uvsock.Socket[Any], chunk: bytes) -> None:
        seen.append(variable.get())
        socket.pause()

    variable.set("at listen")
    listener = await tcp_wire.listen({"data": data, "end": lambda s: seen.append(variable.get())})
    variable.set("later")
    client = await tcp_wire.connect(listener, {"data": ignore})
    await soon(client.send_all(b"x" * 1_000_000))
    client.end()
    while client.ready_state is not ReadyState.CLOSED:
        for socket in listener.sockets:
            socket.resume()
        await asyncio.sleep(0.001)
    assert len(seen) > 2
    assert set(seen) == {"at listen"}
    await stopped(listener)


# ── binary_type ────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("binary_type", "kind"),
    [("bytes", bytes), ("bytearray", bytearray), ("memoryview", memoryview)],
)
async def test_binary_type_decides_what_data_is_called_with(
    wire: Wire, binary_type: Any, kind: type
) -> None:
    kinds: set[type] = set()
    received = bytearray()

    def data(socket: uvsock.Socket[Any], chunk: Any) -> None:
        kinds.add(type(chunk))
        received.extend(chunk)
        socket.write(chunk)

    listener = await wire.listen({"data": data}, binary_type=binary_type)
    echoed = bytearray()

    def client_data(socket: uvsock.Socket[Any], chunk: Any) -> None:
        kinds.add(type(chunk))
        echoed.extend(chunk)

    client = await wire.connect(listener, {"data": client_data}, binary_type=binary_type)
    for piece in (b"a", b"bc" * 1000, b"d" * 20_000):
        client.write(piece)
        await until(lambda: len(echoed) == len(received) == client.bytes_written)
    assert echoed == received == b"a" + b"bc" * 1000 + b"d" * 20_000
    assert kinds == {kind}
    client.end()
    await soon(client.wait_closed())
    await stopped(listener)


async def test_a_bytearray_is_the_handlers_own(wire: Wire) -> None:
    kept: list[bytearray] = []

    def data(socket: uvsock.Socket[Any], chunk: bytearray) -> None:
        kept.append(chunk)
        chunk += b"!"

    listener = await wire.listen({"data": data}, binary_type="bytearray")
    _, writer = await wire.streams(listener)
    for number in range(5):
        writer.write(b"%d" % number * 10)
        await until(lambda count=number + 1: len(kept) == count)
    assert kept == [b"%d" % number * 10 + b"!" for number in range(5)]
    writer.close()
    await stopped(listener)


async def test_a_memoryview_is_released_when_the_handler_returns(wire: Wire) -> None:
    views: list[memoryview] = []
    contents: list[bytes] = []

    def data(socket: uvsock.Socket[Any], view: memoryview) -> None:
        views.append(view)
        contents.append(bytes(view))
        assert (view.ndim, view.itemsize, view.contiguous) == (1, 1, True)

    listener = await wire.listen({"data": data}, binary_type="memoryview")
    _, writer = await wire.streams(listener)
    for number in range(3):
        writer.write(b"%d" % number)
        await until(lambda count=number + 1: len(views) == count)
    assert contents == [b"0", b"1", b"2"]
    for view in views:
        with pytest.raises(ValueError, match="released"):
            bytes(view)
        with pytest.raises(ValueError, match="released"):
            view[0]
        with pytest.raises(ValueError, match="released"):
            len(view)
    writer.close()
    await stopped(listener)


async def test_a_memoryview_is_released_when_the_handler_raised(wire: Wire) -> None:
    views: list[memoryview] = []

    def data(socket: uvsock.Socket[Any], view: memoryview) -> None:
        views.append(view)
        raise Trouble

    listener = await wire.listen({"data": data, "error": ignore}, binary_type="memoryview")
    _, writer = await wire.streams(listener)
    writer.write(b"x")
    await until(lambda: views)
    with pytest.raises(ValueError, match="released"):
        bytes(views[0])
    writer.close()
    await stopped(listener)


KEEP: dict[str, Callable[[memoryview], Any]] = {
    "slice": lambda view: view[: len(view)],
    "slice of a slice": lambda view: view[0:][:],
    "cast": lambda view: view.cast("b").cast("B"),
    "another view": memoryview,
    "read-only view": lambda view: view.toreadonly(),
}


@pytest.mark.parametrize("how", KEEP)
async def test_a_kept_slice_stays_valid_and_never_shows_other_bytes(wire: Wire, how: str) -> None:
    """Two connections take turns: what one keeps is not overwritten by what the other reads."""
    kept: list[tuple[Any, bytes]] = []

    def data(socket: uvsock.Socket[Any], view: memoryview) -> None:
        kept.append((KEEP[how](view), bytes(view)))
        socket.write(b"k")

    listener = await wire.listen({"data": data}, binary_type="memoryview")
    clients = [await wire.streams(listener) for _ in range(2)]
    for number in range(20):
        reader, writer = clients[number % 2]
        writer.write(bytes([65 + number]) * (number * 400 + 1))
        assert await soon(reader.read(100))
    for view, content in kept:
        assert bytes(view) == content
    assert b"".join(content for _, content in kept) == b"".join(
        bytes([65 + number]) * (number * 400 + 1) for number in range(20)
    )
    for _, writer in clients:
        writer.close()
    await stopped(listener)
    gc.collect()
    for view, content in kept:
        assert bytes(view) == content  # also when sockets and listener are gone


async def test_slices_kept_from_a_flood_stay_what_they_were(wire: Wire) -> None:
    kept: list[memoryview] = []

    def data(socket: uvsock.Socket[Any], view: memoryview) -> None:
        kept.append(view[:])

    listener = await wire.listen({"data": data}, binary_type="memoryview")
    client = await wire.connect(listener, {"data": ignore})
    payload = bytes(range(251)) * 8000
    await soon(client.send_all(payload))
    client.end()
    await soon(client.wait_closed())
    await until(lambda: not listener.connections)
    assert b"".join(kept) == payload
    await stopped(listener)


def zero_copy_views(view: memoryview) -> Iterator[object]:
    import ctypes

    yield (ctypes.c_char * len(view)).from_buffer_copy(view)
    with contextlib.suppress(TypeError):  # a read-only buffer cannot be exported this way
        yield (ctypes.c_char * len(view)).from_buffer(view)


async def test_an_object_built_on_the_view_keeps_it_valid(wire: Wire) -> None:
    """ctypes, NumPy and the like hold the view itself: it cannot be released under them."""
    kept: list[tuple[Any, bytes]] = []

    def data(socket: uvsock.Socket[Any], view: memoryview) -> None:
        kept.extend((made, bytes(view)) for made in zero_copy_views(view))
        socket.write(b"k")

    listener = await wire.listen({"data": data}, binary_type="memoryview")
    reader, writer = await wire.streams(listener)
    for letter in b"abc":
        writer.write(bytes([letter]) * 50)
        assert await soon(reader.read(10)) == b"k"
    for made, content in kept:
        assert bytes(made) == content
    assert len(kept) >= 3
    writer.close()
    await stopped(listener)


async def test_pausing_with_a_view_in_hand_loses_nothing(wire: Wire) -> None:
    loop = asyncio.get_running_loop()
    received = bytearray()

    def data(socket: uvsock.Socket[Any], view: memoryview) -> None:
        received.extend(view)
        socket.pause()
        loop.call_soon(socket.resume)

    listener = await wire.listen({"data": data}, binary_type="memoryview")
    client = await wire.connect(listener, {"data": ignore})
    payload = bytes(range(253)) * 6000
    await soon(client.send_all(payload))
    client.end()
    await soon(client.wait_closed())
    await until(lambda: not listener.connections)
    assert received == payload
    await stopped(listener)


class Refused(NamedTuple):
    value: Any
    error: type[Exception]


@pytest.mark.parametrize(
    "refused",
    [
        Refused("buffer", ValueError),
        Refused("uint8array", ValueError),
        Refused("", ValueError),
        Refused(bytes, TypeError),
        Refused(None, TypeError),
        Refused(1, TypeError),
    ],
)
async def test_any_other_binary_type_is_refused_by_name(tcp_wire: Wire, refused: Refused) -> None:
    with pytest.raises(refused.error, match="^binary_type: .*'bytes', 'bytearray' or 'memoryview'"):
        await tcp_wire.listen({"data": ignore}, binary_type=refused.value)
    with pytest.raises(refused.error, match="^binary_type: "):
        await uvsock.connect({"data": ignore}, "127.0.0.1", 1, binary_type=refused.value)


async def test_methods_of_a_subclass_are_handlers(wire: Wire) -> None:
    class Echo(Handlers):
        def data(self, socket: uvsock.Socket[Any], data: bytes) -> None:  # type: ignore[override]
            socket.write(data)

    listener = await wire.listen(Echo())
    assert await round_trip(wire, listener) == b"ping"
    await stopped(listener)


async def test_a_bare_mock_is_a_handler(wire: Wire) -> None:
    data = Mock()
    errors: list[Exception] = []
    listener = await wire.listen({"data": data, "error": lambda _, error: errors.append(error)})
    client = await wire.connect(listener, {"data": ignore})
    client.write(b"x")
    await until(lambda: data.called)
    client.close()
    await stopped(listener)
    assert not errors
