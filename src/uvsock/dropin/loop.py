"""asyncio's event loop: uvloop's, with uvsock's transports."""

from __future__ import annotations

import asyncio
import contextvars
import errno
import logging
import os
import socket
import ssl as ssl_module
import stat
import sys
import warnings
from collections.abc import Callable, Iterable
from itertools import chain
from typing import Any, cast

import uvloop

from uvsock._addresses import AddressInfo, interleave, resolve
from uvsock._bind import SocketFile, bound, socket_file
from uvsock._dial import Dialler, connected, dial
from uvsock._stream import close_state, state_of
from uvsock._uvloop import attach
from uvsock.dropin._transport import Transport, TransportGroup
from uvsock.dropin.bridge import bridge
from uvsock.dropin.sendfile import SendFile
from uvsock.dropin.server import Server

logger = logging.getLogger("asyncio")


ProtocolFactory = Callable[[], asyncio.BaseProtocol]


class Loop(SendFile):
    """uvloop's event loop, on which TCP, Unix and TLS connections are uvsock's.

    Arguments, their checks and the texts of errors are asyncio's; reading, writing and TLS are
    uvsock's; all the rest is uvloop's.
    """

    def __init__(self) -> None:
        # Written out, because nothing can be seen of the arguments of uvloop's.
        super().__init__()

    def set_debug(self, enabled: bool) -> None:
        """Turn debug mode on or off: from here on, for connections that are open as well."""
        super().set_debug(enabled)
        state_of(self)

    def close(self) -> None:
        """Close the loop, and the descriptor that watches its connections."""
        super().close()
        close_state(self)

    # ── Connecting ─────────────────────────────────────────────────────────────────────────────

    async def create_connection(  # type: ignore[override]
        self,
        protocol_factory: ProtocolFactory,
        host: Any = None,
        port: Any = None,
        *,
        ssl: ssl_module.SSLContext | bool | None = None,
        family: int = 0,
        proto: int = 0,
        flags: int = 0,
        sock: socket.socket | None = None,
        local_addr: tuple[Any, ...] | None = None,
        server_hostname: str | None = None,
        ssl_handshake_timeout: float | None = None,
        ssl_shutdown_timeout: float | None = None,
        happy_eyeballs_delay: float | None = None,
        interleave: int | None = None,
        all_errors: bool = False,
        context: contextvars.Context | None = None,
    ) -> tuple[asyncio.Transport, asyncio.BaseProtocol]:
        """Connect to a TCP server, as ``asyncio.loop.create_connection`` of the newest Python.

        Here as in what follows, ``context`` is that of the protocol's callbacks: by default a copy
        of the caller's.
        """
        _check_tls_options(ssl, server_hostname, ssl_handshake_timeout, ssl_shutdown_timeout)
        if server_hostname is None and ssl:
            if not host:
                raise ValueError("You must set server_hostname when using ssl without a host")
            server_hostname = host
        _check_plain_socket(sock)
        group = self._client_group(
            ssl, server_hostname, ssl_handshake_timeout, ssl_shutdown_timeout, context
        )
        ours = sock is None
        if host is not None or port is not None:
            if sock is not None:
                raise ValueError("host/port and sock can not be specified at the same time")
            if happy_eyeballs_delay is not None and interleave is None:
                interleave = 1
            sock = await self._dial(
                (host, port),
                local_addr,
                family,
                proto,
                flags,
                happy_eyeballs_delay,
                interleave,
                all_errors,
            )
        elif sock is None:
            raise ValueError("host and port was not specified and no sock specified")
        else:
            _check_stream(sock)
        return await self._connected(group, protocol_factory, sock, ours)

    async def _dial(
        self,
        address: tuple[Any, Any],
        local_address: tuple[Any, ...] | None,
        family: int,
        proto: int,
        flags: int,
        delay: float | None,
        first_family: int | None,
        all_errors: bool,
    ) -> socket.socket:
        infos = await self._resolved(address, family, proto, flags)
        local = None
        if local_address is not None:
            local = await self._resolved(local_address, family, proto, flags)
        if first_family:
            infos = interleave(infos, first_family)
        sock, errors = await dial(infos, local, delay, _AsyncioDialler(self))
        if sock is not None:
            return sock
        try:
            if all_errors:
                raise ExceptionGroup("create_connection failed", errors)
            if len({str(error) for error in errors}) == 1:
                raise errors[0]
            raise OSError(f"Multiple exceptions: {', '.join(map(str, errors))}")
        finally:
            del errors  # or the error would hold this frame, and this frame the error

    async def _resolved(
        self, address: tuple[Any, ...], family: int, proto: int, flags: int
    ) -> list[AddressInfo]:
        infos = await resolve(self, address, family=family, proto=proto, flags=flags)
        if not infos:
            raise OSError(f"getaddrinfo({address[0]!r}) returned empty list")
        return infos

    async def create_unix_connection(  # type: ignore[override]
        self,
        protocol_factory: ProtocolFactory,
        path: Any = None,
        *,
        ssl: ssl_module.SSLContext | bool | None = None,
        sock: socket.socket | None = None,
        server_hostname: str | None = None,
        ssl_handshake_timeout: float | None = None,
        ssl_shutdown_timeout: float | None = None,
        context: contextvars.Context | None = None,
    ) -> tuple[asyncio.Transport, asyncio.BaseProtocol]:
        """Connect to a Unix socket, as ``asyncio.loop.create_unix_connection``.

        Raises:
            BlockingIOError: the listener's backlog is full.
        """
        if ssl and server_hostname is None:
            raise ValueError("you have to pass server_hostname when using ssl")
        _check_tls_options(ssl, server_hostname, ssl_handshake_timeout, ssl_shutdown_timeout)
        group = self._client_group(
            ssl, server_hostname, ssl_handshake_timeout, ssl_shutdown_timeout, context
        )
        ours = sock is None
        if path is not None:
            if sock is not None:
                raise ValueError("path and sock can not be specified at the same time")
            sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            try:
                sock.setblocking(False)
                await self.sock_connect(sock, os.fspath(path))
            except BaseException:
                sock.close()
                raise
        elif sock is None:
            raise ValueError("no path and sock were specified")
        else:
            _check_unix_stream(sock)
        return await self._connected(group, protocol_factory, sock, ours)

    async def connect_accepted_socket(  # type: ignore[override]
        self,
        protocol_factory: ProtocolFactory,
        sock: socket.socket,
        *,
        ssl: ssl_module.SSLContext | bool | None = None,
        ssl_handshake_timeout: float | None = None,
        ssl_shutdown_timeout: float | None = None,
        context: contextvars.Context | None = None,
    ) -> tuple[asyncio.Transport, asyncio.BaseProtocol]:
        """Serve a connection that was accepted elsewhere, as asyncio's method of that name."""
        _check_stream(sock)
        _check_tls_options(ssl, None, ssl_handshake_timeout, ssl_shutdown_timeout)
        _check_plain_socket(sock)
        if ssl is True:
            raise ValueError("Server side SSL needs a valid SSLContext")
        group = self._server_group(
            None, ssl or None, ssl_handshake_timeout, ssl_shutdown_timeout, context
        )
        return await self._connected(group, protocol_factory, sock, ours=False)

    def _client_group(
        self,
        ssl: ssl_module.SSLContext | bool | None,
        server_hostname: str | None,
        handshake_timeout: float | None,
        shutdown_timeout: float | None,
        context: contextvars.Context | None,
    ) -> TransportGroup:
        tls_context = ssl or None
        if isinstance(tls_context, bool):
            tls_context = ssl_module.create_default_context()
            if not server_hostname:
                tls_context.check_hostname = False
        return TransportGroup(
            state_of(self),
            tls_context=tls_context,
            server_hostname=server_hostname or None,
            handshake_timeout=handshake_timeout,
            shutdown_timeout=shutdown_timeout,
            context=context,
        )

    def _server_group(
        self,
        protocol_factory: ProtocolFactory | None,
        tls_context: ssl_module.SSLContext | None,
        handshake_timeout: float | None,
        shutdown_timeout: float | None,
        context: contextvars.Context | None,
    ) -> TransportGroup:
        return TransportGroup(
            state_of(self),
            tls_context=tls_context,
            server_side=True,
            protocol_factory=protocol_factory,
            handshake_timeout=handshake_timeout,
            shutdown_timeout=shutdown_timeout,
            context=context,
        )

    async def _connected(
        self,
        group: TransportGroup,
        protocol_factory: ProtocolFactory,
        sock: socket.socket,
        ours: bool,
    ) -> tuple[asyncio.Transport, asyncio.BaseProtocol]:
        """A transport on a connected socket; one of ``ours`` is closed if there is no protocol."""
        try:
            sock.setblocking(False)
            protocol = protocol_factory()
        except BaseException:
            if ours:
                sock.close()
            raise
        transport = await self._open(group, protocol, sock)
        if self.get_debug():
            peer = transport.get_extra_info("peername")
            logger.debug("connected to %r: (%r, %r)", peer, transport, protocol)
        return cast(asyncio.Transport, transport), protocol

    async def _open(
        self, group: TransportGroup, protocol: asyncio.BaseProtocol, sock: socket.socket
    ) -> Transport:
        """A transport of this group, when its protocol has it; the socket belongs to it."""
        transport = group()
        opened = transport._open_for(protocol)
        try:
            attach(self, transport, group.context, sock)
            await opened
        except BaseException:
            transport._drop()
            await group.when_empty()  # the descriptor is closed, and `sock` detached
            raise
        finally:
            del opened  # it holds the error, and the error this frame
        # Not before the caller has the transport, as asyncio promises.
        self.call_soon(transport._start_reading)
        return transport

    async def sock_connect(self, sock: socket.socket, address: Any) -> None:
        """Connect a socket to an address, as asyncio's; every error of the system's names it.

        Raises:
            BlockingIOError: the backlog of a Unix listener is full.
        """
        _check_plain_socket(sock)
        if self.get_debug() and sock.gettimeout() != 0:
            raise ValueError("the socket must be non-blocking")
        if sock.family in (socket.AF_INET, socket.AF_INET6):
            infos = await resolve(
                self, address, family=sock.family, kind=sock.type, proto=sock.proto
            )
            address = infos[0][4]
        try:
            await connected(sock, address)
        except OSError as error:
            if error.errno is None:
                raise
            if sock.family == socket.AF_UNIX:
                raise OSError(error.errno, os.strerror(error.errno), address) from None
            raise OSError(error.errno, f"Connect call failed {address}") from None

    # ── Serving ────────────────────────────────────────────────────────────────────────────────

    async def create_server(  # type: ignore[override]
        self,
        protocol_factory: ProtocolFactory,
        host: Any = None,
        port: Any = None,
        *,
        family: int = socket.AF_UNSPEC,
        flags: int = socket.AI_PASSIVE,
        sock: socket.socket | None = None,
        backlog: int = 100,
        ssl: ssl_module.SSLContext | None = None,
        reuse_address: bool | None = None,
        reuse_port: bool | None = None,
        keep_alive: bool | None = None,
        ssl_handshake_timeout: float | None = None,
        ssl_shutdown_timeout: float | None = None,
        start_serving: bool = True,
        context: contextvars.Context | None = None,
    ) -> Server:
        """Start a TCP server, as ``asyncio.loop.create_server`` of the newest Python."""
        _check_server_tls(ssl, ssl_handshake_timeout, ssl_shutdown_timeout)
        _check_plain_socket(sock)
        group = self._server_group(
            protocol_factory, ssl, ssl_handshake_timeout, ssl_shutdown_timeout, context
        )
        if host is not None or port is not None:
            if sock is not None:
                raise ValueError("host/port and sock can not be specified at the same time")
            infos = await self._server_addresses(host, port, family, flags)
            sockets = _bind_all(
                infos, reuse_address is not False, bool(reuse_port), bool(keep_alive)
            )
        elif sock is None:
            raise ValueError("Neither host/port nor sock were specified")
        else:
            _check_stream(sock)
            sockets = [sock]
        return await self._serve(group, sockets, backlog, start_serving)

    async def _server_addresses(
        self, host: Any, port: Any, family: int, flags: int
    ) -> list[AddressInfo]:
        if host == "":
            hosts: Iterable[Any] = [None]
        elif isinstance(host, (str, bytes)) or not isinstance(host, Iterable):
            hosts = [host]
        else:
            hosts = host
        found = await asyncio.gather(
            *(self._resolved((host, port), family, 0, flags) for host in hosts)
        )
        return list(dict.fromkeys(chain.from_iterable(found)))

    async def create_unix_server(  # type: ignore[override]
        self,
        protocol_factory: ProtocolFactory,
        path: Any = None,
        *,
        sock: socket.socket | None = None,
        backlog: int = 100,
        ssl: ssl_module.SSLContext | None = None,
        ssl_handshake_timeout: float | None = None,
        ssl_shutdown_timeout: float | None = None,
        start_serving: bool = True,
        cleanup_socket: bool = sys.version_info >= (3, 13),
        context: contextvars.Context | None = None,
    ) -> Server:
        """Start a server on a Unix socket, as asyncio's; ``cleanup_socket`` on every Python."""
        _check_server_tls(ssl, ssl_handshake_timeout, ssl_shutdown_timeout)
        group = self._server_group(
            protocol_factory, ssl, ssl_handshake_timeout, ssl_shutdown_timeout, context
        )
        if path is not None:
            if sock is not None:
                raise ValueError("path and sock can not be specified at the same time")
            sock = _bind_unix(os.fspath(path))
        elif sock is None:
            raise ValueError("path was not specified, and no sock specified")
        else:
            _check_unix_stream(sock)
        file = socket_file(sock.getsockname()) if cleanup_socket else None
        return await self._serve(group, [sock], backlog, start_serving, file)

    async def _serve(
        self,
        group: TransportGroup,
        sockets: list[socket.socket],
        backlog: int,
        start_serving: bool,
        file: SocketFile | None = None,
    ) -> Server:
        server = Server(self, sockets, group, backlog, file)
        try:
            for sock in sockets:
                sock.setblocking(False)
            if start_serving:
                await server.start_serving()
        except BaseException:
            server.close()
            raise
        if self.get_debug():
            logger.info("%r is serving", server)
        return server

    # ── TLS on a connection ────────────────────────────────────────────────────────────────────

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
        if not isinstance(sslcontext, ssl_module.SSLContext):
            raise TypeError(
                f"sslcontext is expected to be an instance of ssl.SSLContext, got {sslcontext!r}"
            )
        if not isinstance(transport, asyncio.Transport):
            raise TypeError(f"transport {transport!r} is not supported by start_tls()")
        inner: Any = transport
        if type(inner) is not Transport or inner.get_extra_info("sslcontext") is not None:
            inner = await bridge(self, transport)  # not ours, or TLS in TLS
        done = inner._start_tls(
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
            inner._drop()
            raise
        finally:
            del done  # it holds the error, and the error this frame
        self.call_soon(inner._start_reading)
        return cast(asyncio.Transport, inner)


class _AsyncioDialler(Dialler):
    def __init__(self, loop: Loop) -> None:
        self._loop = loop

    async def connect(self, sock: socket.socket, address: tuple[Any, ...]) -> None:
        # By the method, as asyncio: programs override it.
        await self._loop.sock_connect(sock, address)

    def not_connected(
        self, address: tuple[Any, ...], local: tuple[Any, ...] | None, error: OSError
    ) -> OSError:
        return error  # names the address already

    def not_bound(
        self, address: tuple[Any, ...], local: tuple[Any, ...], error: OSError
    ) -> OSError:
        return _cannot_bind(local, error)

    def no_local(self, address: tuple[Any, ...], family: int) -> OSError:
        return OSError(f"no matching local address with family={family!r} found")


def _cannot_bind(address: tuple[Any, ...], error: OSError) -> OSError:
    return OSError(
        error.errno,
        f"error while attempting to bind on address {address!r}: {str(error).lower()}",
    )


def _bind_all(
    infos: list[AddressInfo], reuse_address: bool, reuse_port: bool, keep_alive: bool
) -> list[socket.socket]:
    """A bound socket for each address that this machine has."""
    if reuse_port and not hasattr(socket, "SO_REUSEPORT"):
        raise ValueError("reuse_port not supported by socket module")
    sockets: list[socket.socket] = []
    try:
        for info in infos:
            try:
                sock = bound(
                    info,
                    reuse_address=reuse_address,
                    reuse_port=reuse_port,
                    keep_alive=keep_alive,
                )
            except OSError as error:
                failure = _cannot_bind(info[4], error)
                # The machine has not that address, or no IPv6 (bpo-30945).
                if error.errno not in (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT):
                    raise failure from None
                logger.debug("create_server(): %s", failure)
                continue
            sockets.append(sock)
        if not sockets:
            raise OSError(f"could not bind on any address out of {[info[4] for info in infos]!r}")
    except BaseException:
        for sock in sockets:
            sock.close()
        raise
    return sockets


def _bind_unix(path: str | bytes) -> socket.socket:
    """Bind a Unix socket, in the place of one whose file is there: asyncio does not ask whose."""
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        if path and path[0] not in (0, "\0"):
            try:
                if stat.S_ISSOCK(os.stat(path).st_mode):
                    os.remove(path)
            except FileNotFoundError:
                pass
            except OSError as error:
                # A folder may allow to make a socket, and no more than that.
                logger.error("Unable to check or remove stale UNIX socket %r: %r", path, error)
        sock.bind(path)
    except OSError as error:
        sock.close()
        if error.errno != errno.EADDRINUSE:
            raise
        raise OSError(error.errno, f"Address {path!r} is already in use") from None
    except BaseException:
        sock.close()
        raise
    return sock


def _check_stream(sock: socket.socket) -> None:
    if sock.type != socket.SOCK_STREAM:
        raise ValueError(f"A Stream Socket was expected, got {sock!r}")


def _check_unix_stream(sock: socket.socket) -> None:
    if sock.family != socket.AF_UNIX or sock.type != socket.SOCK_STREAM:
        raise ValueError(f"A UNIX Domain Stream Socket was expected, got {sock!r}")


def _check_plain_socket(sock: socket.socket | None) -> None:
    if isinstance(sock, ssl_module.SSLSocket):
        raise TypeError("Socket cannot be of type SSLSocket")


def _check_tls_options(
    ssl: object,
    server_hostname: object,
    handshake_timeout: float | None,
    shutdown_timeout: float | None,
) -> None:
    if ssl:
        return
    for name, value in (
        ("server_hostname", server_hostname),
        ("ssl_handshake_timeout", handshake_timeout),
        ("ssl_shutdown_timeout", shutdown_timeout),
    ):
        if value is not None:
            raise ValueError(f"{name} is only meaningful with ssl")


def _check_server_tls(
    ssl: object, handshake_timeout: float | None, shutdown_timeout: float | None
) -> None:
    if isinstance(ssl, bool):
        raise TypeError("ssl argument must be an SSLContext or None")
    _check_tls_options(ssl, None, handshake_timeout, shutdown_timeout)


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

        asyncio.set_event_loop_policy(_policy()())


def _policy() -> Any:
    # Made when it is asked for: from Python 3.14 on the class itself is deprecated.
    def make(policy: object) -> Loop:
        return new_event_loop()

    return type("EventLoopPolicy", (uvloop.EventLoopPolicy,), {"new_event_loop": make})
