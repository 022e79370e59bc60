"""asyncio's functions that open streams, with the compiled ones."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

from uvsock._framing import Framer, as_framer
from uvsock.dropin._streams import StreamProtocol, StreamReader, StreamWriter

LIMIT = 65536

Connected = Callable[[StreamReader, StreamWriter], Awaitable[None] | None]


def _reader(limit: int, framing: Framer | None, loop: asyncio.AbstractEventLoop) -> StreamReader:
    reader = StreamReader(limit, loop)
    if framing is not None:
        reader.set_framing(framing)
    return reader


def _factory(
    client_connected_cb: Connected, limit: int, framing: Framer | None
) -> Callable[[], StreamProtocol]:
    loop = asyncio.get_running_loop()
    as_framer(framing)  # here, and not for each connection, it can be told to the caller
    return lambda: StreamProtocol(_reader(limit, framing, loop), client_connected_cb, loop)


async def open_connection(
    host: Any = None,
    port: Any = None,
    *,
    limit: int = LIMIT,
    framing: Framer | None = None,
    **kwds: Any,
) -> tuple[StreamReader, StreamWriter]:
    """Connect, as ``asyncio.open_connection``.

    Args:
        host: name or address.
        port: its number.
        limit: the most bytes of a line; half of what is held before reading is paused.
        framing: the ``Framer`` of ``readframe``.
        **kwds: the others of ``loop.create_connection``.

    Returns:
        A ``StreamReader`` and a ``StreamWriter``.
    """
    loop = asyncio.get_running_loop()
    reader = _reader(limit, framing, loop)
    protocol = StreamProtocol(reader, None, loop)
    transport, _ = await loop.create_connection(lambda: protocol, host, port, **kwds)
    return reader, StreamWriter(transport, protocol, reader, loop)


async def start_server(
    client_connected_cb: Connected,
    host: Any = None,
    port: Any = None,
    *,
    limit: int = LIMIT,
    framing: Framer | None = None,
    **kwds: Any,
) -> asyncio.Server:
    """Start a server, as ``asyncio.start_server``.

    Args:
        client_connected_cb: called with the reader and the writer of each new connection; a
            coroutine runs as a task.
        host: name or address to listen at, several of them, or None for all.
        port: its number, 0 for a free one.
        limit: the most bytes of a line; half of what is held before reading is paused.
        framing: the ``Framer`` of ``readframe``.
        **kwds: the others of ``loop.create_server``.

    Returns:
        What ``loop.create_server`` returns.
    """
    factory = _factory(client_connected_cb, limit, framing)
    loop = asyncio.get_running_loop()
    return await loop.create_server(factory, host, port, **kwds)


async def open_unix_connection(
    path: Any = None, *, limit: int = LIMIT, framing: Framer | None = None, **kwds: Any
) -> tuple[StreamReader, StreamWriter]:
    """Connect to a Unix socket, as ``asyncio.open_unix_connection``.

    Args:
        path: where it is.
        limit: the most bytes of a line; half of what is held before reading is paused.
        framing: the ``Framer`` of ``readframe``.
        **kwds: the others of ``loop.create_unix_connection``.

    Returns:
        A ``StreamReader`` and a ``StreamWriter``.
    """
    loop = asyncio.get_running_loop()
    reader = _reader(limit, framing, loop)
    protocol = StreamProtocol(reader, None, loop)
    transport, _ = await loop.create_unix_connection(lambda: protocol, path, **kwds)
    return reader, StreamWriter(transport, protocol, reader, loop)


async def start_unix_server(
    client_connected_cb: Connected,
    path: Any = None,
    *,
    limit: int = LIMIT,
    framing: Framer | None = None,
    **kwds: Any,
) -> asyncio.Server:
    """Start a server at a Unix socket, as ``asyncio.start_unix_server``.

    Args:
        client_connected_cb: called with the reader and the writer of each new connection; a
            coroutine runs as a task.
        path: where the socket is to be.
        limit: the most bytes of a line; half of what is held before reading is paused.
        framing: the ``Framer`` of ``readframe``.
        **kwds: the others of ``loop.create_unix_server``.

    Returns:
        What ``loop.create_unix_server`` returns.
    """
    factory = _factory(client_connected_cb, limit, framing)
    loop = asyncio.get_running_loop()
    return await loop.create_unix_server(factory, path, **kwds)
