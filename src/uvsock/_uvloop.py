"""What uvsock has uvloop do: accept connections, and make a transport of a descriptor."""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import socket
from typing import Any

import uvloop

from uvsock._stream import StreamGroup


def attach(
    loop: asyncio.AbstractEventLoop,
    protocol: asyncio.BaseProtocol,
    context: contextvars.Context,
    sock: socket.socket,
) -> None:
    """Give a connected system socket to uvloop, whose transport owns it from here on.

    ``connection_made`` follows in the next iteration, in this context as all that comes after.
    """
    # Not by the loop's method: that of uvsock's own loop makes asyncio's transports.
    connect: Any = uvloop.Loop.connect_accepted_socket
    connecting = connect(loop, lambda: protocol, sock)
    # Not as a task: cancelled, as all tasks are at the end of a run, uvloop would close the
    # transport and never tell the protocol.
    try:
        waiter = context.run(connecting.send, None)
    except BaseException:
        sock.close()
        raise

    def made(_: object) -> None:
        with contextlib.suppress(StopIteration):
            connecting.send(None)

    waiter.add_done_callback(made)


def serve(
    loop: asyncio.AbstractEventLoop, group: StreamGroup, sock: socket.socket, backlog: int
) -> asyncio.AbstractServer:
    """Have uvloop accept connections on a bound socket; each is a call of the group."""
    # Not by the loop's methods: those of uvsock's own loop make asyncio's transports.
    create: Any = (
        uvloop.Loop.create_unix_server
        if sock.family == socket.AF_UNIX
        else uvloop.Loop.create_server
    )
    options = {"cleanup_socket": False} if sock.family == socket.AF_UNIX else {}
    serving = create(loop, group, sock=sock, backlog=backlog, **options)
    try:
        # It has nothing to wait for, so nothing can cancel it halfway. uvloop runs a server's
        # protocols in the context that it was created in.
        group.context.run(serving.send, None)
    except StopIteration as done:
        server: asyncio.AbstractServer = done.value
        return server
    serving.close()
    raise RuntimeError("uvloop's server waits for something")
