"""Two sockets that are connected to each other."""

from __future__ import annotations

import asyncio
import contextlib
import socket as stdlib
import tempfile
from typing import Any

from uvsock._connector import connect
from uvsock._listener import Listener, listen
from uvsock._options import check_flag, wrong_type
from uvsock._socket import ReadyState, Socket
from uvsock._types import HandlersLike
from uvsock.testing._certificates import Certificates, default_certificates

# Bytes. Windows below the 64 KiB segments of a loopback make TCP wait for its timers.
_SMALL = 65536


async def pair(
    handlers_a: HandlersLike,
    handlers_b: HandlersLike,
    *,
    tls: bool | Certificates = False,
    unix: bool = False,
    **options: Any,
) -> tuple[Socket[Any], Socket[Any]]:
    """Two connected sockets on the running loop: ``a`` has connected, ``b`` was accepted.

    Everything between them is real: the kernel's sockets, and TLS with verified certificates.

    Args:
        handlers_a: the table of the side that connects.
        handlers_b: the table of the side that accepts. Its listener has stopped already, but
            ``b.listener`` is there, with ``reload`` and all that concerns live sockets.
        tls: True for certificates made for the occasion, or ``Certificates`` of yours.
        unix: a Unix socket instead of TCP.
        options: for both sides, what ``listen`` and ``connect`` have in common:
            ``high_water_mark``, ``allow_half_open``, ``binary_type``...

    Returns:
        ``a`` and ``b``, once ``open`` was called on both. Close them at the end of the test.

    Raises:
        TypeError, ValueError: an argument is wrong.
        OSError: they could not be connected: what ``connect`` raises, or ``ConnectionAbortedError``
            where ``b`` was closed before it could be returned.
    """
    check_flag("unix", unix)
    if isinstance(tls, bool):
        certificates = default_certificates() if tls else None
    elif isinstance(tls, Certificates):
        certificates = tls
    else:
        raise wrong_type("tls", "True, False or Certificates", tls)
    server, client = (certificates.server, certificates.client) if certificates else (None, None)
    with tempfile.TemporaryDirectory(prefix="uvsock") as directory:
        path = f"{directory}/pair" if unix else None
        host, port = (None, None) if unix else ("127.0.0.1", 0)
        listener = await listen(handlers_b, host, port, unix=path, tls=server, **options)
        try:
            a = await connect(
                handlers_a, host, listener.port, unix=path, tls=client, timeout=10, **options
            )
            try:
                return a, await _accepted(listener)
            except BaseException:
                a.terminate()
                raise
        except BaseException:
            for socket in listener.sockets:
                socket.terminate()
            raise
        finally:
            listener.stop()


async def _accepted(listener: Listener) -> Socket[Any]:
    """The one socket of a listener, once it is open."""
    while listener.connections or not listener.stats.accepted:
        for socket in listener.sockets:
            if socket.ready_state != ReadyState.CONNECTING:
                return socket
        await asyncio.sleep(0)
    raise ConnectionAbortedError("the accepted socket was closed at once")


def shrink_buffers(*sockets: Socket[Any]) -> None:
    """Make the kernel hold some hundred kilobytes for these sockets instead of megabytes.

    A ``write`` comes back short once the buffers of both ends and ``high_water_mark`` are full.

    Args:
        sockets: TCP or Unix sockets, plain or TLS, of either side. Closed ones are left alone.
    """
    for socket in sockets:
        transport: stdlib.socket | None = socket.get_extra_info("socket")
        with contextlib.suppress(OSError, ValueError):  # closed by now
            if transport is not None:
                transport.setsockopt(stdlib.SOL_SOCKET, stdlib.SO_SNDBUF, _SMALL)
                transport.setsockopt(stdlib.SOL_SOCKET, stdlib.SO_RCVBUF, _SMALL)
