"""``connect``: its arguments, and what happens when there is no connection."""

from __future__ import annotations

import asyncio
import contextvars
import errno
import os
import socket as stdlib
from collections.abc import Coroutine
from typing import Any, Unpack

from uvsock._addresses import interleave, resolve
from uvsock._contexts import TLSLike, client_context
from uvsock._dial import Dialler, dial, dial_unix
from uvsock._handlers import as_handlers
from uvsock._option_table import CONNECT, SocketOptions, check_options, takes
from uvsock._options import (
    check_address,
    check_hostname,
    check_port,
    check_seconds,
    check_sock,
    check_unix_path,
)
from uvsock._socket import Group, Socket
from uvsock._stream import state_of
from uvsock._types import HandlersLike
from uvsock._uvloop import attach

# These say that an address cannot be used from here; an answer of the peer says more.
_UNREACHABLE = (errno.ENETUNREACH, errno.EHOSTUNREACH, errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT)


@takes(CONNECT, SocketOptions)
def connect(
    handlers: HandlersLike,
    hostname: str | None = None,
    port: int | None = None,
    *,
    unix: str | bytes | os.PathLike[str] | None = None,
    sock: stdlib.socket | None = None,
    tls: TLSLike = None,
    server_hostname: str | None = None,
    timeout: float | None = None,
    local_address: tuple[str, int] | None = None,
    happy_eyeballs_delay: float | None = 0.25,
    data: Any = None,
    **options: Unpack[SocketOptions],
) -> Coroutine[Any, Any, Socket[Any]]:
    """Connect to one address: ``hostname`` and ``port``, ``unix``, or ``sock``. Await the result.

    Args:
        handlers: a ``Handlers``, a mapping, or an object with handlers as attributes.
        hostname: host name or IP address. The addresses of a name are tried as RFC 8305 says.
        port: 1 to 65535.
        unix: path of a Unix socket, or on Linux an abstract name.
        sock: a connected stream socket, which the result owns from here on.
        tls: TLS options (see ``TLS``); True verifies the peer against the system's CAs and the host
            name; None or False for a plain connection.
        server_hostname: the name to send and to verify instead of ``hostname``.
        timeout: seconds for name lookup, connecting and the TLS handshake together. With it a Unix
            listener whose backlog is full is waited for; without, that is a ``BlockingIOError``.
        local_address: host and port to connect from.
        happy_eyeballs_delay: seconds until the next address is tried beside one that has not
            answered; None to try them one after another.
        data: what ``socket.data`` begins as.
        **options: see ``SocketRows``.

    Returns:
        The socket, once ``open`` has returned.

    Raises:
        TypeError, ValueError: an argument is wrong; raised by the call itself.
        OSError: why there is no connection, after ``connect_error`` was called with it:
            ``ConnectionRefusedError``, ``TimeoutError``, ``socket.gaierror``, ``ssl.SSLError``...
        Exception: what ``connect_error`` raised itself.
    """
    fields = check_options(CONNECT, "connect", options)
    table = as_handlers(handlers)
    kind = check_address(hostname, port, unix, sock)
    if kind == "tcp":
        hostname, port = check_hostname("hostname", hostname), check_port(port, low=1)
    elif kind == "unix":
        unix = check_unix_path(unix)
    else:
        sock = check_sock(sock, "connected")
    seconds = check_seconds("timeout", timeout, allow_none=True)
    delay = check_seconds(
        "happy_eyeballs_delay", happy_eyeballs_delay, allow_none=True, allow_zero=True
    )
    if local_address is not None:
        if kind != "tcp":
            raise TypeError("local_address: must be given together with hostname only")
        if not isinstance(local_address, tuple) or len(local_address) != 2:
            raise TypeError("local_address: must be a tuple of host and port")
        check_hostname("local_address", local_address[0])
        check_port(local_address[1], name="local_address")
    if server_hostname is not None:
        check_hostname("server_hostname", server_hostname)
    context, name = client_context(tls) or (None, None)
    # Without TLS too: an upgrade later verifies the same name.
    name = server_hostname or name or hostname
    calling = contextvars.copy_context()
    if context is not None and context.check_hostname and name is None:
        raise ValueError("server_hostname: must be given, or hostname, for tls to verify it")

    async def dial() -> stdlib.socket:
        if sock is not None:
            return sock
        if unix is not None:
            assert isinstance(unix, (str, bytes))
            return await dial_unix(unix, patient=seconds is not None)
        assert hostname is not None
        assert port is not None
        return await _dial_tcp(hostname, port, local_address, delay)

    async def start() -> Socket[Any]:
        loop = asyncio.get_running_loop()
        state = state_of(loop)
        group = Group(
            state,
            table,
            context=calling,
            fields=fields,
            data=data,
            tls_context=context,
            server_hostname=name,
        )
        socket = group()
        state.hold()
        try:
            try:
                async with asyncio.timeout(seconds) as limit:
                    system = await dial()
                    connected, opened = socket._opening()
                    attach(loop, socket, group.context, system)
                    system.detach()  # the caller's would close a descriptor that is ours
                    await connected
            except TimeoutError as error:
                if not limit.expired():
                    raise
                raise TimeoutError(
                    errno.ETIMEDOUT, f"no connection within timeout ({seconds:g} seconds)"
                ) from error
            await opened
        except asyncio.CancelledError:
            socket._abandon()
            raise
        except Exception as error:
            socket._abandon(error)
            waiting = group.context.run(table._call_connect_error, socket, error)
            if waiting is not None:
                await loop.create_task(waiting, context=group.context)
            raise
        finally:
            state.release()
        return socket

    return start()


async def _dial_tcp(
    hostname: str, port: int, local_address: tuple[str, int] | None, delay: float | None
) -> stdlib.socket:
    loop = asyncio.get_running_loop()
    infos = interleave(await resolve(loop, (hostname, port)))
    local = None if local_address is None else await resolve(loop, local_address)
    sock, failures = await dial(infos, local, delay, Dialler())
    if sock is None:
        telling = [error for error in failures if error.errno not in _UNREACHABLE] or failures
        texts = dict.fromkeys(str(error.strerror) for error in failures)
        raise OSError(telling[0].errno, "; ".join(texts))
    return sock
