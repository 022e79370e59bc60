"""What may be given as handlers: mappings, objects, modules, tables; sync and async."""

from __future__ import annotations

import functools
import ssl
from typing import Any, assert_type

import table  # a module of handlers, beside this one

import uvsock


def opened(socket: uvsock.Socket[dict[str, str]]) -> None:
    socket.data = {"session": "abcd"}


def received(socket: uvsock.Socket[dict[str, str]], data: bytes) -> None:
    socket.write(data)


def received_view(socket: uvsock.Socket[Any], data: memoryview) -> None:
    socket.write(data[1:])


def received_array(socket: uvsock.Socket, data: bytearray) -> int:
    return socket.write(data)


def received_text(socket: uvsock.Socket[Any], data: str) -> None:
    """Wrong: data is never text."""


async def received_slowly(socket: uvsock.Socket[Any], data: bytes) -> None:
    await socket.send_all(data)


def shaken(socket: uvsock.Socket[Any], success: bool, error: ssl.SSLError | None) -> None: ...


def failed(socket: uvsock.Socket[Any], error: Exception) -> None: ...


def failed_or_cancelled(socket: uvsock.Socket[Any], error: BaseException) -> None: ...


def closed(socket: uvsock.Socket[Any], error: OSError | None) -> None: ...


def closed_without_reason(socket: uvsock.Socket[Any]) -> None:
    """Wrong: close has two arguments."""


class Echo:
    """Handlers as methods."""

    def open(self, socket: uvsock.Socket[Any]) -> None: ...
    async def data(self, socket: uvsock.Socket[Any], data: bytes) -> None: ...


class Source:
    """Handlers that only write."""

    def drain(self, socket: uvsock.Socket[Any]) -> None: ...


class OneArgument:
    """Wrong: data has two arguments."""

    def data(self, socket: uvsock.Socket[Any]) -> None: ...


class NeitherDataNorDrain:
    """Wrong: nothing to do."""

    def open(self, socket: uvsock.Socket[Any]) -> None: ...


def forward(prefix: bytes, socket: uvsock.Socket[Any], data: bytes) -> None: ...


async def accepted() -> None:
    await uvsock.listen({"open": opened, "data": received}, "localhost", 0)
    await uvsock.listen({"data": lambda socket, data: socket.write(data)}, "localhost", 0)
    await uvsock.listen({"data": received_slowly, "close": closed, "error": None}, "localhost", 0)
    await uvsock.listen({"data": functools.partial(forward, b"> ")}, "localhost", 0)
    later = {"open": opened, "data": received, "close": closed}
    await uvsock.listen(later, "localhost", 0)
    await uvsock.listen(Echo(), "localhost", 0)
    await uvsock.listen(Source(), "localhost", 0)
    await uvsock.listen(table, "localhost", 0)
    handlers = uvsock.Handlers(
        data=received_view, handshake=shaken, error=failed, close=closed, connect_error=failed
    )
    listener = await uvsock.listen(handlers, "localhost", 0, binary_type="memoryview")
    listener.reload({"data": received_array, "error": failed_or_cancelled})
    listener.reload(Echo())
    assert_type(listener.handlers, uvsock.Handlers)


async def refused() -> None:
    await uvsock.listen(received, "localhost", 0)  # type: ignore[arg-type]
    await uvsock.listen(OneArgument(), "localhost", 0)  # type: ignore[arg-type]
    await uvsock.listen(NeitherDataNorDrain(), "localhost", 0)  # type: ignore[arg-type]
    await uvsock.listen(None, "localhost", 0)  # type: ignore[arg-type]
    await uvsock.connect([("data", received)], "localhost", 80)  # type: ignore[arg-type]
    uvsock.Handlers(data=received_text)  # type: ignore[arg-type]
    uvsock.Handlers(close=closed_without_reason)  # type: ignore[arg-type]
    uvsock.Handlers(received)  # type: ignore[arg-type, call-arg]
    uvsock.Handlers(dta=received)  # type: ignore[call-arg]
