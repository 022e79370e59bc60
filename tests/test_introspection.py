"""What others do with objects they know nothing of: look, copy, pickle, compare."""

from __future__ import annotations

import ast
import asyncio
import contextlib
import copy
import importlib
import inspect
import pickle
import ssl
import types
import typing
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import uvsock
import uvsock.testing
from conftest import Authority, Wire
from helpers import soon, until
from uvsock.dropin._transport import Transport

LOOPS = {"uvsock": uvsock.new_event_loop}
# Where the public names are: in `__all__`, or what a module of `dropin` itself defines.
MODULES = ["uvsock", "uvsock.testing", "uvsock.dropin.loop", "uvsock.dropin.streams"]
# What a transport calls, and no user.
UVLOOPS = {*vars(asyncio.BaseProtocol), *vars(asyncio.Protocol), *vars(asyncio.BufferedProtocol)}
UVLOOPS -= {"__init__"}
SPECIAL = {"__init__", "__enter__", "__exit__", "__aenter__", "__aexit__"}


def public_names() -> Iterator[tuple[str, Any]]:
    for module_name in MODULES:
        module = importlib.import_module(module_name)
        for name in getattr(module, "__all__", vars(module)):
            value = getattr(module, name)
            own = hasattr(module, "__all__") or getattr(value, "__module__", "") == module_name
            if callable(value) and own and not name.startswith("_"):
                yield f"{module_name}.{name}", value
    yield "uvsock.dropin.Transport", Transport


PUBLIC = dict(public_names())
CLASSES = {name: value for name, value in PUBLIC.items() if inspect.isclass(value)}


def members(cls: type) -> Iterator[tuple[str, Any]]:
    """The public methods and properties that the library defines for a class."""
    for name in dir(cls):
        if name.startswith("_") and name not in SPECIAL:
            continue
        owner = next(base for base in cls.__mro__ if name in vars(base))
        value = getattr(cls, name)
        if not (getattr(value, "__module__", None) or owner.__module__).startswith("uvsock"):
            continue
        if inspect.isdatadescriptor(value) or (callable(value) and name not in UVLOOPS):
            yield name, value


def everything() -> dict[str, Any]:
    found = dict(PUBLIC)
    for name, cls in CLASSES.items():
        found.update((f"{name}.{member}", value) for member, value in members(cls))
    return found


EVERYTHING = everything()


@pytest.mark.parametrize("name", EVERYTHING)
def test_type_hints_can_be_asked_for(name: str) -> None:
    value = EVERYTHING[name]
    if isinstance(value, property):
        value = value.fget
    if callable(value):
        hints = typing.get_type_hints(value)
        # Each name in an annotation was found, and none was passed over.
        assert set(getattr(value, "__annotations__", {})) <= set(hints)


@pytest.mark.parametrize("name", [n for n, value in EVERYTHING.items() if callable(value)])
def test_whatever_is_called_has_a_signature(name: str) -> None:
    value = EVERYTHING[name]
    kinds = [parameter.kind for parameter in inspect.signature(value).parameters.values()]
    if not name.endswith(("__init__", "__exit__", "__aexit__")):  # of C: the class itself has it
        # That of a wrapper, which says nothing.
        assert kinds[-2:] != [inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD]
    assert "\n--\n" not in (value.__doc__ or "")


# Those of a C structure have no docstrings: the classes and the reference say what they are.
FIELDS = {
    "bytes_read", "bytes_written", "byteorder", "data", "delimiter", "include_prefix", "keep_end",
    "length_includes_prefix", "max_length", "size", *inspect.signature(uvsock.Handlers).parameters,
}  # fmt: skip


@pytest.mark.parametrize("name", EVERYTHING)
def test_everything_says_what_it_is(name: str) -> None:
    value = EVERYTHING[name]
    if name.endswith(("__init__", "__enter__", "__exit__")):
        return  # the class says it
    if inspect.isgetsetdescriptor(value) and name.rpartition(".")[2] in FIELDS:
        return
    assert inspect.getdoc(value)


COMPILED = ("BufferSink", "Delimited", "FixedSize", "Framer", "Handlers", "LengthPrefixed", "Lines",
            "Netstring", "Socket", "StreamReader", "StreamWriter")  # fmt: skip


@pytest.mark.parametrize("name", COMPILED)
def test_the_signature_of_a_compiled_class_is_that_of_its_stub(name: str) -> None:
    """In C it is written by hand."""
    cls = getattr(uvsock, name)
    package = Path(uvsock.__file__).parent
    stub = package.joinpath(*cls.__module__.split(".")[1:]).with_suffix(".pyi")
    (definition,) = (
        node
        for node in ast.parse(stub.read_text()).body
        if isinstance(node, ast.ClassDef) and node.name == name
    )
    init = next(
        (n for n in definition.body if isinstance(n, ast.FunctionDef) and n.name == "__init__"),
        None,
    )
    expected: list[tuple[str, Any]] = []
    if init is not None:
        plain = init.args.args[1:]
        none: list[None] = [None] * (len(plain) - len(init.args.defaults))
        pairs = [*zip(plain, [*none, *init.args.defaults], strict=True)]
        pairs += zip(init.args.kwonlyargs, init.args.kw_defaults, strict=True)
        expected = [
            (arg.arg, ast.literal_eval(default) if default else inspect.Parameter.empty)
            for arg, default in pairs
        ]
    found = [(p.name, p.default) for p in inspect.signature(cls).parameters.values()]
    assert found == expected


# ── Copies ─────────────────────────────────────────────────────────────────────────────────────


class Numbered(uvsock.Framer):
    """A framer of a program's own."""

    def __init__(self, number: int) -> None:
        super().__init__(1000)
        self.number = number


def received(socket: Any, data: bytes) -> None:
    """A handler that does nothing. Here, because pickle looks it up by its name."""


FRAMERS: dict[str, Callable[[], uvsock.Framer]] = {
    "Framer": lambda: uvsock.Framer(7),
    "Lines": lambda: uvsock.Lines(keep_end=True, max_length=10),
    "Delimited": lambda: uvsock.Delimited(b"--", keep_end=True, max_length=10),
    "LengthPrefixed": lambda: uvsock.LengthPrefixed(2, "little", True, 10, True),
    "varint": lambda: uvsock.LengthPrefixed("varint"),
    "FixedSize": lambda: uvsock.FixedSize(9),
    "Netstring": lambda: uvsock.Netstring(11),
}
COPIES: dict[str, Callable[[Any], Any]] = {
    "copy": copy.copy,
    "deepcopy": copy.deepcopy,
    "pickle": lambda value: pickle.loads(pickle.dumps(value)),
    "old pickle": lambda value: pickle.loads(pickle.dumps(value, 0)),
}


@pytest.mark.parametrize("kind", FRAMERS)
@pytest.mark.parametrize("way", COPIES)
def test_a_framer_is_equal_to_its_copies(kind: str, way: str) -> None:
    framer = FRAMERS[kind]()
    copied = COPIES[way](framer)
    assert type(copied) is type(framer)
    assert copied == framer
    assert hash(copied) == hash(framer)
    if kind != "Framer":  # which has that of any object, with its address
        assert repr(copied) == repr(framer)
    assert copied.max_length == framer.max_length


def test_framers_that_differ_are_not_equal() -> None:
    others = [
        *(make() for make in FRAMERS.values()),
        uvsock.Framer(8),
        uvsock.Lines(keep_end=True),
        uvsock.Lines(max_length=10),
        uvsock.Delimited(b"-", keep_end=True, max_length=10),
        uvsock.LengthPrefixed(2, "big", True, 10, True),
        uvsock.LengthPrefixed(2, "little", True, 10, False),
        uvsock.FixedSize(10),
        Numbered(1),
        Numbered(1),
    ]
    assert len(set(others)) == len(others)
    assert all(a is b or a != b for a in others for b in others)
    assert uvsock.Lines() != "Lines()"


@pytest.mark.parametrize("way", COPIES)
def test_a_framer_of_a_programs_own_keeps_what_it_has(way: str) -> None:
    framer = COPIES[way](Numbered(3))
    assert (type(framer), framer.number, framer.max_length) == (Numbered, 3, 1000)


@pytest.mark.parametrize("way", COPIES)
def test_a_table_of_handlers_is_copied(way: str) -> None:
    table = uvsock.Handlers(data=received, close=print)
    copied = COPIES[way](table)
    assert type(copied) is uvsock.Handlers
    assert (copied.data, copied.close, copied.open) == (received, print, None)
    assert copied == table
    assert hash(copied) == hash(table)


def test_tables_that_differ_are_not_equal() -> None:
    table = uvsock.Handlers(data=received)
    for other in (
        uvsock.Handlers(data=print),
        uvsock.Handlers(drain=received),
        uvsock.Handlers(data=received, close=print),
        {"data": received},
        Table(),
    ):
        assert table != other
    assert Table() != Table()
    assert len({Table(), Table()}) == 2
    assert len({table, uvsock.Handlers(data=received)}) == 1


@pytest.mark.parametrize("way", COPIES)
def test_tls_options_are_equal_to_their_copies(way: str, authority: Authority) -> None:
    options = uvsock.TLS(
        **authority.server_options,
        alpn_protocols=["a", "b"],
        sni={"example.org": authority.server_options},
    )
    copied = COPIES[way](options)
    assert copied == options
    assert hash(copied) == hash(options)
    assert repr(copied) == repr(options)
    assert options != uvsock.TLS(**authority.server_options)
    assert options != uvsock.TLS(**{**vars(options), "request_cert": True})


@pytest.mark.parametrize("way", COPIES)
def test_errors_are_copied(way: str) -> None:
    error = COPIES[way](uvsock.SocketClosedError(107, "the socket is closed"))
    assert (error.errno, str(error)) == (107, "[Errno 107] the socket is closed")


@pytest.mark.parametrize("way", COPIES)
async def test_what_is_alive_is_not_copied(tcp_wire: Wire, way: str) -> None:
    listener = await tcp_wire.listen({"data": received})
    lending = await tcp_wire.connect(listener, {"data": received}, binary_type="memoryview")
    socket = await tcp_wire.connect(listener, {"data": received})
    reader, writer = await uvsock.open_connection("127.0.0.1", listener.port)
    proxy = uvsock.testing.FaultProxy(listener)
    sink = uvsock.BufferSink()
    for alive in (
        listener, lending, socket, socket.cork(), reader, writer, writer.transport, proxy, sink,
    ):  # fmt: skip
        with pytest.raises(TypeError, match="cannot pickle"):
            COPIES[way](alive)
    with pytest.raises(TypeError):
        COPIES[way](asyncio.get_running_loop())
    writer.close()
    await soon(writer.wait_closed())
    listener.stop(True)
    for end in (socket, lending):
        end.close()
        await soon(end.wait_closed())
    await soon(listener.wait_closed())


class Table(uvsock.Handlers):
    def data(self, socket: Any, data: bytes) -> None:  # type: ignore[override]
        """A handler that does nothing."""


@pytest.mark.parametrize("way", COPIES)
def test_a_table_of_a_subclass_says_how_it_could_be_copied(way: str) -> None:
    with pytest.raises(TypeError, match=r"cannot pickle 'Table' object: it has no __reduce__\(\)"):
        COPIES[way](Table())


# ── Threads ────────────────────────────────────────────────────────────────────────────────────

# What only looks may be called anywhere.
LOOKING = {
    "Socket": {"channel_binding", "fileno", "get_extra_info", "peer_certificate"},
    "Cork": set(),
    "Listener": {"serve_forever"},  # on a stopped one
    "Transport": {
        "can_write_eof",
        "get_extra_info",
        "get_protocol",
        "get_write_buffer_limits",
        "get_write_buffer_size",
        "is_closing",
        "is_reading",
    },
    "StreamWriter": {"can_write_eof", "drain", "get_extra_info", "is_closing", "wait_closed"},
}
ARGUMENTS: dict[str, tuple[Any, ...]] = {
    "write": (b"x",),
    "write_frame": (b"x",),
    "writelines": ([b"x"],),
    "writeframe": (b"x",),
    "send_all": (b"x",),
    "send_frame": (b"x",),
    "sendfile": (None,),
    "timeout": (1,),
    "reload": ({"data": received},),
    "reload_tls": (True,),
    "upgrade_tls": (True,),
    "start_tls": (ssl.create_default_context(),),
    "shutdown": (1,),
    "set_protocol": (asyncio.Protocol(),),
    "get_extra_info": ("socket",),
    "__exit__": (None, None, None),
    "__aexit__": (None, None, None),
}


def calls(alive: Any, kind: str) -> Iterator[tuple[str, Callable[[], Any]]]:
    for name in dir(type(alive)):
        method = getattr(type(alive), name)
        if (name.startswith("_") and name not in SPECIAL - {"__init__"}) or not callable(method):
            continue
        if name in LOOKING[kind] or isinstance(method, type):
            continue
        if name in UVLOOPS:
            continue
        if kind == "Socket" and name in ("__enter__", "shutdown"):
            continue  # it only returns the socket; and its argument is another
        if kind == "Listener" and name == "__aenter__":
            continue
        yield name, lambda name=name: getattr(alive, name)(*ARGUMENTS.get(name, ()))  # type: ignore[misc]


async def test_what_changes_something_checks_its_thread(tcp_wire: Wire) -> None:
    accepted: list[Any] = []
    listener = await tcp_wire.listen({"open": accepted.append, "data": received})
    socket = await tcp_wire.connect(listener, {"data": received}, framing=uvsock.Lines())
    _, writer = await uvsock.open_connection("127.0.0.1", listener.port)
    await until(lambda: len(accepted) == 2)
    cork = socket.cork()
    transport = writer.transport
    assert type(transport) is Transport
    sink = uvsock.BufferSink()
    sink.write(b"x")
    tried: list[str] = []

    def call(function: Callable[[], Any]) -> None:
        result = function()
        if inspect.isawaitable(result) or isinstance(result, types.CoroutineType):
            with contextlib.suppress(StopIteration):
                result.__await__().send(None)  # type: ignore[union-attr]

    kinds: dict[str, Any] = {
        "Socket": socket,
        "Cork": cork,
        "Listener": listener,
        "Transport": transport,
        "StreamWriter": writer,
    }
    attempts = [
        (f"{kind}.{name}", function)
        for kind, alive in kinds.items()
        for name, function in calls(alive, kind)
    ]
    attempts += [
        ("Socket.shutdown", socket.shutdown),
        ("Listener.data", lambda: setattr(listener, "data", 1)),
        ("BufferSink.flush_to", lambda: sink.flush_to(socket)),
    ]
    passed = []
    for name, function in attempts:
        try:
            await asyncio.to_thread(call, function)
        except RuntimeError as error:
            if "thread" in str(error):
                tried.append(name)
                continue
            passed.append(f"{name}: {error!r}")
        except Exception as error:
            passed.append(f"{name}: {error!r}")
        else:
            passed.append(name)
    assert passed == []
    assert len(tried) > 40
    assert socket.ready_state is uvsock.ReadyState.ESTABLISHED
    assert not writer.is_closing()
    writer.close()
    await soon(writer.wait_closed())
    socket.close()
    await soon(socket.wait_closed())
    listener.stop(True)
    await soon(listener.wait_closed())
