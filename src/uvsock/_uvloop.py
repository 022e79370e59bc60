"""What uvsock has uvloop do: make a transport of a connected socket."""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import socket
from typing import Any

import uvloop


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
