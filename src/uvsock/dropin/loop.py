"""asyncio's event loop: uvloop's, with uvsock's transports."""

from __future__ import annotations

import asyncio
import asyncio.unix_events
import contextlib
import io
import os
import socket
import ssl as ssl_module
import sys
import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, cast

import uvloop

from uvsock._connector import attach
from uvsock._listener import serve
from uvsock._stream import state_of
from uvsock.dropin._transport import Transport, TransportGroup

# Whose methods are borrowed. They only use what every loop has, and each other.
_Base: Any = asyncio.BaseEventLoop
_UnixBase: Any = asyncio.unix_events._UnixSelectorEventLoop

# Bytes of a file that are read at a time where the kernel cannot send from the file itself.
_FILE_CHUNK = 262144


class Loop(uvloop.Loop):
    """uvloop's event loop, on which TCP, Unix and TLS connections are uvsock's.

    What it has to do with names, addresses and arguments is asyncio's own code, so errors are
    asyncio's too; reading, writing and TLS are uvsock's; all the rest is uvloop's.
    """

    # These end in the methods below, `_create_connection_transport` and `_start_serving`.
    if TYPE_CHECKING:
        create_connection = asyncio.AbstractEventLoop.create_connection  # type: ignore[assignment]
        create_server = asyncio.AbstractEventLoop.create_server  # type: ignore[assignment]
    else:
        create_connection = _Base.create_connection
        create_server = _Base.create_server
        connect_accepted_socket = _Base.connect_accepted_socket
        create_unix_connection = _UnixBase.create_unix_connection
        sendfile = _Base.sendfile
        sock_sendfile = _Base.sock_sendfile
        _connect_sock = _Base._connect_sock
        _ensure_resolved = _Base._ensure_resolved
        _create_server_getaddrinfo = _Base._create_server_getaddrinfo
        _check_sendfile_params = _Base._check_sendfile_params
        _sock_sendfile_fallback = _Base._sock_sendfile_fallback
        _sock_sendfile_native = _UnixBase._sock_sendfile_native
        _sock_sendfile_native_impl = _UnixBase._sock_sendfile_native_impl
        _sock_sendfile_update_filepos = _UnixBase._sock_sendfile_update_filepos
        _sock_add_cancellation_callback = _UnixBase._sock_add_cancellation_callback

    def __init__(self) -> None:
        super().__init__()
        # Of the listening sockets: what accepts, and the inodes of the files to remove.
        self._serving: dict[socket.socket, tuple[TransportGroup, asyncio.AbstractServer]] = {}
        self._unix_server_sockets: dict[socket.socket, int] = {}

    @property
    def _debug(self) -> bool:
        return self.get_debug()

    async def create_unix_server(
        self, *args: Any, cleanup_socket: bool = sys.version_info >= (3, 13), **options: Any
    ) -> asyncio.Server:
        """A server on a Unix socket: asyncio's, with ``cleanup_socket`` on every Python."""
        if sys.version_info >= (3, 13):
            options["cleanup_socket"] = cleanup_socket
        server: Any = await _UnixBase.create_unix_server(self, *args, **options)
        if cleanup_socket and sys.version_info < (3, 13):
            for sock in server._sockets:
                path = sock.getsockname()
                if path and path[0] not in (0, "\0"):
                    self._unix_server_sockets[sock] = os.stat(path).st_ino
        return cast(asyncio.Server, server)

    async def sock_connect(self, sock: socket.socket, address: Any) -> None:
        """Connect a socket to an address, as ``asyncio``'s: an error names the address."""
        try:
            await super().sock_connect(sock, address)
        except OSError as error:
            if error.errno is None or sock.family == socket.AF_UNIX:
                raise
            raise OSError(error.errno, f"Connect call failed {address}") from None

    async def _create_connection_transport(
        self,
        sock: socket.socket,
        protocol_factory: Callable[[], asyncio.BaseProtocol],
        ssl: ssl_module.SSLContext | bool | None,
        server_hostname: str | None,
        server_side: bool = False,
        ssl_handshake_timeout: float | None = None,
        ssl_shutdown_timeout: float | None = None,
    ) -> tuple[asyncio.Transport, asyncio.BaseProtocol]:
        sock.setblocking(False)
        try:
            protocol = protocol_factory()
            group = TransportGroup(
                state_of(self),
                tls_context=_tls_context(ssl, server_side, server_hostname),
                server_side=server_side,
                server_hostname=None if server_side else server_hostname or None,
                handshake_timeout=ssl_handshake_timeout,
                shutdown_timeout=ssl_shutdown_timeout,
            )
        except BaseException:
            sock.close()
            raise
        transport = group()
        opened = transport._open_for(protocol)
        try:
            attach(self, transport, group.context, sock)
            await opened
        except BaseException:
            transport._drop()
            await group.when_empty()  # the descriptor is closed, and `sock` detached
            raise
        # Not before the caller has the transport, as asyncio promises.
        self.call_soon(transport._start_reading)
        return cast(asyncio.Transport, transport), protocol

    def _start_serving(
        self,
        protocol_factory: Callable[[], asyncio.BaseProtocol],
        sock: socket.socket,
        sslcontext: ssl_module.SSLContext | None = None,
        server: asyncio.AbstractServer | None = None,
        backlog: int = 100,
        ssl_handshake_timeout: float | None = None,
        ssl_shutdown_timeout: float | None = None,
    ) -> None:
        group = TransportGroup(
            state_of(self),
            tls_context=sslcontext,
            server_side=True,
            protocol_factory=protocol_factory,
            server=server,
            handshake_timeout=ssl_handshake_timeout,
            shutdown_timeout=ssl_shutdown_timeout,
        )
        self._serving[sock] = group, serve(self, group, sock, backlog)

    def _stop_serving(self, sock: socket.socket) -> None:
        inode = self._unix_server_sockets.pop(sock, None)
        path = sock.getsockname() if inode is not None else None
        serving = self._serving.pop(sock, None)
        if serving is None:
            sock.close()  # bound, and never served
        else:
            group, server = serving
            group.stopped = True
            server.close()
        if path is not None:
            with contextlib.suppress(FileNotFoundError):
                if os.stat(path).st_ino == inode:
                    os.unlink(path)

    async def start_tls(
        self,
        transport: Any,
        protocol: asyncio.BaseProtocol,
        sslcontext: ssl_module.SSLContext,
        *,
        server_side: bool = False,
        server_hostname: str | None = None,
        ssl_handshake_timeout: float | None = None,
        ssl_shutdown_timeout: float | None = None,
    ) -> asyncio.Transport:
        """Upgrade a connection to TLS, which returns the transport to use from here on."""
        if (
            type(transport) is not Transport
            or not isinstance(sslcontext, ssl_module.SSLContext)
            or transport.get_extra_info("sslcontext") is not None
        ):
            # Not ours, wrong, or TLS in TLS: asyncio's own works on any transport.
            wrapped: asyncio.Transport = await _Base.start_tls(
                self,
                transport,
                protocol,
                sslcontext,
                server_side=server_side,
                server_hostname=server_hostname,
                ssl_handshake_timeout=ssl_handshake_timeout,
                ssl_shutdown_timeout=ssl_shutdown_timeout,
            )
            return wrapped
        done = transport._start_tls(
            protocol,
            sslcontext,
            server_side,
            None if server_side else server_hostname or None,
            ssl_handshake_timeout,
            ssl_shutdown_timeout,
        )
        try:
            await done
        except BaseException:
            transport._drop()
            raise
        self.call_soon(transport._start_reading)
        return cast(asyncio.Transport, transport)

    async def _sendfile_native(
        self, transport: Transport, file: Any, offset: int, count: int | None
    ) -> int:
        transport._begin_file()
        sent: int = 0
        try:
            await transport._written()
            if transport.is_closing():
                raise ConnectionError("Connection closed by peer")
            # A duplicate, because the loop lets nobody watch a transport's own descriptor.
            with socket.socket(fileno=os.dup(transport.get_extra_info("socket").fileno())) as sock:
                sock.setblocking(False)
                native: Any = self.sock_sendfile(sock, file, offset, count, fallback=False)
                sent = await native
        finally:
            transport._end_file(sent)
        return sent

    async def _sendfile_fallback(
        self, transport: Transport, file: Any, offset: int, count: int | None
    ) -> int:
        if count is not None and count < 0:
            raise ValueError(f"count must be 0 or more, not {count}")
        if isinstance(file, io.TextIOBase):
            raise ValueError("file should be opened in binary mode")
        if offset:
            file.seek(offset)
        sent = 0
        try:
            while count is None or sent < count:
                size = _FILE_CHUNK if count is None else min(_FILE_CHUNK, count - sent)
                chunk = await self.run_in_executor(None, file.read, size)
                if not chunk:
                    break
                await transport._written()
                if transport.is_closing():
                    raise ConnectionError("Connection closed by peer")
                transport.write(chunk)
                sent += len(chunk)
        finally:
            if sent and hasattr(file, "seek"):
                file.seek(offset + sent)
        return sent


def _tls_context(
    ssl: ssl_module.SSLContext | bool | None, server_side: bool, server_hostname: str | None
) -> ssl_module.SSLContext | None:
    if not ssl:
        return None
    if not isinstance(ssl, bool):
        return ssl
    if server_side:
        raise ValueError("Server side SSL needs a valid SSLContext")
    context = ssl_module.create_default_context()
    if not server_hostname:
        context.check_hostname = False
    return context


def new_event_loop() -> Loop:
    """A new event loop: ``asyncio.Runner(loop_factory=uvsock.new_event_loop)``."""
    return Loop()


def install() -> None:
    """Have asyncio make this loop wherever it makes one by itself (deprecated from Python 3.12 on).

    From Python 3.12 on name the loop instead: ``asyncio.run(main(), loop_factory=new_event_loop)``.
    """
    if sys.version_info >= (3, 12):
        warnings.warn(
            "uvsock.install() is deprecated: use asyncio.run(main(), "
            "loop_factory=uvsock.new_event_loop)",
            DeprecationWarning,
            stacklevel=2,
        )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        policy = uvloop.EventLoopPolicy()
        policy._loop_factory = new_event_loop
        asyncio.set_event_loop_policy(policy)
