"""Connecting: names to addresses, addresses to a connection, and what happens when none works."""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import errno
import os
import socket as stdlib
from collections.abc import Coroutine
from itertools import zip_longest
from typing import TYPE_CHECKING, Any, Literal

import uvloop

from uvsock._addresses import Address, resolve
from uvsock._contexts import TLSLike, client_context
from uvsock._framing import Framer, as_framer
from uvsock._handlers import as_handlers
from uvsock._options import (
    check_address,
    check_hostname,
    check_port,
    check_seconds,
    check_sock,
    check_unix_path,
    socket_options,
)
from uvsock._socket import Group, Socket
from uvsock._stream import state_of

if TYPE_CHECKING:
    from uvsock._types import HandlersLike

# These say that an address cannot be used from here; an answer of the peer says more.
_UNREACHABLE = (errno.ENETUNREACH, errno.EHOSTUNREACH, errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT)


def connect(
    handlers: HandlersLike,
    hostname: str | None = None,
    port: int | None = None,
    *,
    unix: str | bytes | os.PathLike[str] | None = None,
    sock: stdlib.socket | None = None,
    tls: TLSLike = None,
    server_hostname: str | None = None,
    data: Any = None,
    timeout: float | None = None,
    local_address: tuple[str, int] | None = None,
    happy_eyeballs_delay: float | None = 0.25,
    allow_half_open: bool = False,
    binary_type: Literal["bytes", "bytearray", "memoryview"] = "bytes",
    framing: Framer | None = None,
    cork: bool = True,
    high_water_mark: int = 65536,
    no_delay: bool = True,
    keep_alive: bool | float | None = None,
    idle_timeout: float | None = None,
    linger_timeout: float = 30.0,
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
        data: what ``socket.data`` begins as.
        timeout: seconds for name lookup, connecting and the TLS handshake together.
        local_address: host and port to connect from.
        happy_eyeballs_delay: seconds until the next address is tried beside one that has not
            answered; None to try them one after another.
        allow_half_open, binary_type, framing, cork, high_water_mark, no_delay, keep_alive,
            idle_timeout, linger_timeout: as for ``listen``.

    Returns:
        The socket, once ``open`` has returned.

    Raises:
        TypeError, ValueError: an argument is wrong; raised by the call itself.
        OSError: why there is no connection, after ``connect_error`` was called with it:
            ``ConnectionRefusedError``, ``TimeoutError``, ``socket.gaierror``, ``ssl.SSLError``...
        Exception: what ``connect_error`` raised itself.
    """
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
    options = socket_options(
        allow_half_open=allow_half_open,
        binary_type=binary_type,
        framing=as_framer(framing),
        cork=cork,
        high_water_mark=high_water_mark,
        no_delay=no_delay,
        keep_alive=keep_alive,
        idle_timeout=idle_timeout,
        linger_timeout=linger_timeout,
    )
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
            return _dial_unix(unix)
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
            options=options,
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


def attach(
    loop: asyncio.AbstractEventLoop,
    protocol: asyncio.BaseProtocol,
    context: contextvars.Context,
    sock: stdlib.socket,
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


def _cannot_connect(where: str, error: OSError) -> OSError:
    reason = os.strerror(error.errno) if error.errno else str(error)
    return OSError(error.errno, f"cannot connect to {where}: {reason}")


def _dial_unix(path: str | bytes) -> stdlib.socket:
    sock = stdlib.socket(stdlib.AF_UNIX, stdlib.SOCK_STREAM)
    sock.setblocking(False)
    try:
        # Done at once, or EAGAIN where the listener's backlog is full: unix(7) has no waiting.
        sock.connect(path)
    except OSError as error:
        sock.close()
        raise _cannot_connect(repr(os.fsdecode(path)), error) from error
    return sock


async def _dial_tcp(
    hostname: str, port: int, local_address: tuple[str, int] | None, delay: float | None
) -> stdlib.socket:
    """The first connection to an address of the name that is made (RFC 8305)."""
    addresses = await resolve(hostname, port)
    local = [] if local_address is None else await resolve(*local_address)
    queue = _interleave(addresses)
    loop = asyncio.get_running_loop()
    attempts: dict[asyncio.Task[stdlib.socket], None] = {}
    failures: list[OSError] = []
    winner: stdlib.socket | None = None
    try:
        while winner is None and (queue or attempts):
            # The next address is tried when one has failed, or has not answered for long enough.
            if queue:
                attempts[loop.create_task(_dial(*queue.pop(0), local))] = None
            done, _ = await asyncio.wait(
                attempts,
                timeout=delay if queue else None,
                return_when=asyncio.FIRST_COMPLETED,
            )
            for attempt in [attempt for attempt in attempts if attempt in done]:
                error = attempt.exception()
                if error is None and winner is None:
                    winner = attempt.result()
                elif isinstance(error, OSError):
                    failures.append(error)
                elif error is not None:
                    raise error
                else:
                    continue  # a second one was made in the same iteration: closed below
                del attempts[attempt]
    finally:
        # Not awaited: a second cancellation here would lose the connections that were made.
        for attempt in attempts:
            attempt.cancel()
            attempt.add_done_callback(_close_late)
    if winner is None:
        telling = [error for error in failures if error.errno not in _UNREACHABLE] or failures
        texts = dict.fromkeys(str(error.strerror) for error in failures)
        raise OSError(telling[0].errno, "; ".join(texts))
    return winner


def _close_late(attempt: asyncio.Task[stdlib.socket]) -> None:
    if not attempt.cancelled() and attempt.exception() is None:
        attempt.result().close()


def _interleave(
    addresses: list[Address],
) -> list[Address]:
    """In the resolver's order, but with the families taking turns (RFC 8305, 4)."""
    first = [entry for entry in addresses if entry[0] == addresses[0][0]]
    others = [entry for entry in addresses if entry[0] != addresses[0][0]]
    pairs = zip_longest(first, others)
    return [entry for pair in pairs for entry in pair if entry is not None]


async def _dial(family: int, address: tuple[Any, ...], local: list[Address]) -> stdlib.socket:
    sock: stdlib.socket | None = None
    where = f"{address[0]} port {address[1]}"
    own = [entry[1] for entry in local if entry[0] == family]
    if local and not own:
        raise OSError(
            errno.EAFNOSUPPORT, f"cannot connect to {where}: local_address is of another family"
        )
    try:
        sock = stdlib.socket(family, stdlib.SOCK_STREAM)
        sock.setblocking(False)
        if local:
            where += f" from {own[0][0]} port {own[0][1]}"
            sock.setsockopt(stdlib.SOL_SOCKET, stdlib.SO_REUSEADDR, 1)
            sock.bind(own[0])
        await _established(sock, address)
    except OSError as error:
        if sock is not None:
            sock.close()
        raise _cannot_connect(where, error) from error
    except BaseException:
        if sock is not None:
            sock.close()
        raise
    return sock


def _settle(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_result(None)


async def _established(sock: stdlib.socket, address: tuple[Any, ...]) -> None:
    """connect(2). The loop's sock_connect would resolve the address again, in a thread."""
    try:
        sock.connect(address)
    except BlockingIOError:
        loop = asyncio.get_running_loop()
        writable = loop.create_future()
        loop.add_writer(sock, _settle, writable)
        try:
            await writable
        finally:
            loop.remove_writer(sock)
        number = sock.getsockopt(stdlib.SOL_SOCKET, stdlib.SO_ERROR)
        if number:
            raise OSError(number, os.strerror(number)) from None
