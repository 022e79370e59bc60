"""Binding: from addresses to listening system sockets, for listeners and for the event loop."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import socket
import stat
from typing import Any

from uvsock._addresses import AddressInfo, resolve

# A port that the system picked for one address can be taken for another.
_PORT_ATTEMPTS = 20
# An address of a family or an interface that this machine does not have.
_NOT_HERE = (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT)


def bound(
    info: AddressInfo,
    *,
    reuse_address: bool = True,
    reuse_port: bool = False,
    keep_alive: bool = False,
    ipv6_only: bool = True,
) -> socket.socket:
    """A socket that is bound to this address, and not blocking. Errors are the system's own."""
    family, kind, proto, _, address = info
    sock = socket.socket(family, kind, proto)
    try:
        if reuse_address:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if reuse_port:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        if keep_alive:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        if family == socket.AF_INET6:
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, ipv6_only)
        sock.bind(address)
        sock.setblocking(False)
    except BaseException:
        sock.close()
        raise
    return sock


async def bind_tcp(
    hostname: str, port: int, backlog: int, reuse_port: bool, ipv6_only: bool
) -> list[socket.socket]:
    """Listening sockets for every address of the name, on one port."""
    loop = asyncio.get_running_loop()
    infos = await resolve(loop, (hostname, port), flags=socket.AI_PASSIVE)
    # Two sockets of both families collide unless the IPv6 one leaves IPv4 alone.
    ipv6_only = ipv6_only or len({info[0] for info in infos}) > 1
    for attempt in range(_PORT_ATTEMPTS):
        try:
            return _bind_all(infos, port, backlog, reuse_port, ipv6_only)
        except OSError as error:
            retry = port == 0 and len(infos) > 1 and error.errno == errno.EADDRINUSE
            if not retry or attempt == _PORT_ATTEMPTS - 1:
                raise
    raise AssertionError("not reached")


def _bind_all(
    infos: list[AddressInfo], port: int, backlog: int, reuse_port: bool, ipv6_only: bool
) -> list[socket.socket]:
    sockets: list[socket.socket] = []
    absent: OSError | None = None
    try:
        for family, kind, proto, name, address in infos:
            address = (address[0], port, *address[2:])
            try:
                sock = bound(
                    (family, kind, proto, name, address),
                    reuse_port=reuse_port,
                    ipv6_only=ipv6_only,
                )
            except OSError as error:
                failure = _cannot_bind(f"{address[0]} port {port}", error)
                # Of `localhost`, say, the IPv6 address may be missing on this machine.
                if error.errno not in _NOT_HERE:
                    raise failure from error
                absent = failure
                continue
            sockets.append(sock)
            # Here and not in uvloop, whose error would not name the address.
            _listen(sock, backlog)
            port = sock.getsockname()[1]
        if not sockets and absent is not None:
            raise absent
    except BaseException:
        for sock in sockets:
            sock.close()
        raise
    return sockets


def _listen(sock: socket.socket, backlog: int) -> None:
    try:
        sock.listen(backlog)
    except OSError as error:
        name = sock.getsockname()
        where = f"{name[0]} port {name[1]}" if isinstance(name, tuple) else repr(os.fsdecode(name))
        raise _cannot_bind(where, error) from error


def listen_on(sock: socket.socket, backlog: int) -> None:
    """listen(2) on a socket of the caller's, which is closed if that fails."""
    try:
        _listen(sock, backlog)
    except OSError:
        sock.close()
        raise


def bind_unix(path: str, backlog: int) -> socket.socket:
    """A listening Unix socket, in the place of one that nobody listens on any more."""
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        if not path.startswith("\0"):
            _remove_stale(path)
        sock.bind(path)
        sock.listen(backlog)
        sock.setblocking(False)
    except OSError as error:
        sock.close()
        raise _cannot_bind(repr(path), error) from error
    return sock


def _cannot_bind(where: str, error: OSError) -> OSError:
    reason = os.strerror(error.errno) if error.errno else str(error)
    return OSError(error.errno, f"cannot listen on {where}: {reason}")


def _remove_stale(path: str) -> None:
    """Remove a socket file that nobody listens on any more."""
    try:
        if not stat.S_ISSOCK(os.stat(path).st_mode):
            return  # bind(2) refuses it
    except FileNotFoundError:
        return
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.setblocking(False)
        try:
            probe.connect(path)
        except ConnectionRefusedError:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(path)
        except OSError:
            return  # alive with a full backlog, or not ours to judge: bind(2) says what is wrong


class SocketFile:
    """The file of a Unix socket, to be removed when it is closed.

    Wherever the working directory is then, and only if it is still the file of this socket.
    """

    def __init__(self, path: str | bytes) -> None:
        self._path = os.path.abspath(path)
        self._inode = self._find()

    def _find(self) -> tuple[int, int] | None:
        try:
            found = os.lstat(self._path)
        except OSError:
            return None
        return found.st_dev, found.st_ino

    def remove(self) -> None:
        """Remove the file, once. An ``OSError`` says why it cannot be."""
        inode, self._inode = self._inode, None
        if inode is not None and self._find() == inode:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(self._path)


def socket_file(path: Any) -> SocketFile | None:
    """That of what getsockname(2) says; None for an abstract name, and for none at all."""
    return SocketFile(path) if path and path[0] not in (0, "\0") else None
