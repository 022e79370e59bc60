"""Listening: binding an address, and what is done with all sockets of a listener at once."""

from __future__ import annotations

import asyncio
import contextvars
import os
import socket
from collections.abc import Coroutine
from types import TracebackType
from typing import Any, NamedTuple, NoReturn, Self, Unpack

from uvsock._accept import Acceptor
from uvsock._bind import SocketFile, bind_tcp, bind_unix, listen_on, socket_file
from uvsock._contexts import TLSLike, server_context
from uvsock._handlers import Handlers, as_handlers
from uvsock._option_table import LISTEN, ListenOptions, ListenRows, check_options, takes
from uvsock._options import (
    check_address,
    check_flag,
    check_hostname,
    check_int,
    check_port,
    check_seconds,
    check_sock,
    check_unix_path,
)
from uvsock._socket import Group, Socket
from uvsock._stream import LoopState, state_of
from uvsock._types import HandlersLike

# Seconds that async handlers have after their sockets were terminated.
LAST_GRACE = 1.0


class ListenerStats(NamedTuple):
    """Totals of a listener, since it was made."""

    accepted: int
    """Connections accepted."""
    connections: int
    """Sockets that are live now."""
    handshake_failures: int
    """TLS handshakes that failed."""
    bytes_read: int
    """Bytes received, plain text for TLS."""
    bytes_written: int
    """Bytes accepted for writing, plain text for TLS."""


@takes(LISTEN, ListenOptions)
def listen(
    handlers: HandlersLike,
    hostname: str | None = None,
    port: int | None = None,
    *,
    unix: str | bytes | os.PathLike[str] | None = None,
    sock: socket.socket | None = None,
    tls: TLSLike = None,
    backlog: int = 1024,
    reuse_port: bool = False,
    exclusive: bool = False,
    ipv6_only: bool = False,
    data: Any = None,
    **options: Unpack[ListenOptions],
) -> Coroutine[Any, Any, Listener]:
    """Listen on one address: ``hostname`` and ``port``, ``unix``, or ``sock``. Await the result.

    Args:
        handlers: a ``Handlers``, a mapping, or an object with handlers as attributes.
        hostname: host name or IP address; every address of a name is bound, on one port.
        port: 0 lets the system pick one.
        unix: path of a Unix socket, or on Linux an abstract name (``"\\0name"``). A stale socket
            file is replaced; the file is removed at ``stop()``.
        sock: a bound or listening stream socket, which the listener owns from here on.
        tls: TLS options (see ``TLS``); None or False for plain connections.
        backlog: connections that the kernel keeps until they are accepted (listen(2)).
        reuse_port: share the port with other processes (SO_REUSEPORT).
        exclusive: refuse to share it; not together with ``reuse_port``.
        ipv6_only: do not take IPv4 connections on an IPv6 address (IPV6_V6ONLY).
        data: ``listener.data``, and what ``socket.data`` begins as: one object for all sockets.
        **options: see ``ListenRows``.

    Raises:
        TypeError, ValueError: an argument is wrong; raised by the call itself.
        OSError: the address cannot be bound, with the address in its text.
    """
    fields = check_options(LISTEN, "listen", options)
    table = as_handlers(handlers)
    kind = check_address(hostname, port, unix, sock)
    if kind == "tcp":
        hostname, port = check_hostname("hostname", hostname), check_port(port)
    elif kind == "unix":
        unix = check_unix_path(unix)
    else:
        sock = check_sock(sock, "bound")
    check_int("backlog", backlog, 1, 65535)
    check_flag("reuse_port", reuse_port)
    check_flag("exclusive", exclusive)
    check_flag("ipv6_only", ipv6_only)
    if reuse_port and exclusive:
        raise ValueError("exclusive: must not be given together with reuse_port")
    if data is not None and fields["data_factory"] is not None:
        raise TypeError("data_factory: must not be given together with data")
    context = server_context(tls)
    calling = contextvars.copy_context()

    async def start() -> Listener:
        loop = asyncio.get_running_loop()
        state = state_of(loop)
        path: str | None = None
        if kind == "tcp":
            assert hostname is not None
            assert port is not None
            sockets = await bind_tcp(hostname, port, backlog, reuse_port, ipv6_only)
        elif kind == "unix":
            assert isinstance(unix, (str, bytes))
            path = os.fsdecode(unix)
            sockets = [bind_unix(path, backlog)]
        else:
            assert sock is not None
            sockets = [sock]
            if sock.family == socket.AF_UNIX:
                path = os.fsdecode(sock.getsockname())
            listen_on(sock, backlog)
        listener = Listener.__new__(Listener)
        group = Group(
            state,
            table,
            context=calling,
            fields=fields,
            listener=listener,
            data=data,
            tls_context=context,
            server_side=True,
        )
        listener._init(state, group, sockets, hostname, path, owns_path=kind == "unix")
        listener._start()
        return listener

    return start()


class Listener(ListenRows):
    """A listening address and its sockets. Made by ``listen``."""

    _state: LoopState
    _group: Group
    _acceptors: list[Acceptor]
    _stopped: asyncio.Future[None]

    def __init__(self) -> None:
        raise TypeError("a Listener is made by uvsock.listen()")

    def _init(
        self,
        state: LoopState,
        group: Group,
        sockets: list[socket.socket],
        hostname: str | None,
        path: str | None,
        *,
        owns_path: bool,
    ) -> None:
        self._state = state
        self._group = group
        self._sockets = sockets
        self._acceptors = []
        self._referenced = True
        self._path = path
        self._file: SocketFile | None = socket_file(path) if owns_path else None
        self._hostname: str | None = None
        self._port: int | None = None
        if path is None:
            name = sockets[0].getsockname()
            self._hostname, self._port = hostname or name[0], name[1]
        self._stopped = state.loop.create_future()

    def _start(self) -> None:
        try:
            for sock in self._sockets:
                self._acceptors.append(Acceptor(self._group, sock))
        except BaseException:
            self._close()
            raise
        self._state.listeners.add(self)
        self._state.hold()

    def _close(self) -> None:
        for acceptor in self._acceptors:
            acceptor.close()
        for sock in self._sockets[len(self._acceptors) :]:
            sock.close()
        self._acceptors = []
        self._sockets = []
        if self._file is not None:
            self._file.remove()

    def __reduce__(self) -> NoReturn:
        raise TypeError("cannot pickle 'Listener' object")

    def __repr__(self) -> str:
        if self._path is not None:
            where = repr(self._path)
        else:
            where = f"{self._hostname} port {self._port}"
        return f"<uvsock.Listener {where}{' stopped' if self._stopped.done() else ''}>"

    @property
    def hostname(self) -> str | None:
        """The host name as it was given; None on a Unix socket."""
        return self._hostname

    @property
    def port(self) -> int | None:
        """The port that was bound; None on a Unix socket."""
        return self._port

    @property
    def unix(self) -> str | None:
        """The path or abstract name of a Unix socket, else None."""
        return self._path

    @property
    def data(self) -> Any:
        """What ``socket.data`` of a new connection begins as, without ``data_factory``."""
        return self._group.data

    @data.setter
    def data(self, value: Any) -> None:
        self._state.check_thread()
        self._group.data = value

    @property
    def handlers(self) -> Handlers:
        """The table that the sockets share."""
        return self._group.handlers

    @property
    def sockets(self) -> frozenset[Socket[Any]]:
        """The live sockets: from the connection until ``close`` is called."""
        return frozenset(self._group.sockets)

    @property
    def connections(self) -> int:
        """The number of live sockets."""
        return len(self._group.sockets)

    @property
    def stats(self) -> ListenerStats:
        """Totals since the listener was made. Takes time in proportion to its live sockets."""
        group = self._group
        return ListenerStats(
            group.accepted,
            len(group.sockets),
            group.handshake_failures,
            group.bytes_read,
            group.bytes_written,
        )

    def stop(self, close_active_connections: bool = False) -> None:
        """Stop accepting; the address is free at once.

        Args:
            close_active_connections: close the live sockets too, each as by ``close()``.
        """
        self._state.check_thread()
        check_flag("close_active_connections", close_active_connections)
        if not self._stopped.done():
            self._stopped.set_result(None)
            self._close()
            self._state.listeners.discard(self)
            if self._referenced:
                self._state.release()
        if close_active_connections:
            self._group.stopped = True  # for those that were accepted in this iteration
            for sock in self.sockets:
                sock.close()

    def ref(self) -> None:
        """Let this listener keep ``run`` going, as it does by default."""
        self._state.check_thread()
        if not self._referenced:
            self._referenced = True
            if not self._stopped.done():
                self._state.hold()

    def unref(self) -> None:
        """Do not let this listener keep ``run`` going."""
        self._state.check_thread()
        if self._referenced:
            self._referenced = False
            if not self._stopped.done():
                self._state.release()

    def reload(self, handlers: HandlersLike) -> None:
        """Replace the table of every live and future socket at once.

        A handler that runs finishes on the old table; one that the new table leaves out is gone.

        Raises:
            TypeError: not a table; nothing is changed.
        """
        self._state.check_thread()
        self._group.handlers = as_handlers(handlers)

    def reload_tls(self, tls: TLSLike) -> None:
        """Use other TLS options for new connections; live ones go on as they are.

        Raises:
            TypeError, ValueError: wrong options, or a change from or to plain connections. Nothing
                is changed.
        """
        self._state.check_thread()
        context = server_context(tls)
        if self._group.tls_context is None:
            raise ValueError("tls: must not be reloaded on a listener without TLS")
        if context is None:
            raise ValueError("tls: must not be turned off on a listener with TLS")
        self._group.tls_context = context

    async def wait_closed(self) -> None:
        """Wait until the listener is stopped and the last ``close`` handler has returned."""
        self._state.check_thread()
        await asyncio.shield(self._stopped)
        await asyncio.sleep(0)  # what was accepted in the same iteration is made now
        await self._group.when_empty()

    async def serve_forever(self) -> None:
        """Wait until the listener is stopped. Cancelling this stops it."""
        self._state.check_thread()
        try:
            await asyncio.shield(self._stopped)
        except asyncio.CancelledError:
            self.stop()
            raise

    async def shutdown(self, timeout: float) -> None:
        """Stop accepting, let the sockets finish by themselves, then terminate what is left.

        Async handlers that still run then have one more second; it does not wait for them longer.

        Args:
            timeout: seconds that they have; 0 terminates them at once.
        """
        seconds = check_seconds("timeout", timeout, allow_zero=True)
        self.stop()
        await asyncio.sleep(0)  # what was accepted in the same iteration is made now
        empty = self._group.when_empty()
        if not empty.done():
            await asyncio.wait([empty], timeout=seconds)
        for sock in self.sockets:
            sock.terminate()
        if not empty.done():
            await asyncio.wait([empty], timeout=LAST_GRACE)

    async def __aenter__(self) -> Self:
        """The listener, which is stopped when the block ends."""
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Close the live sockets too, and wait for their ``close`` handlers."""
        self.stop(True)
        await self.wait_closed()
