"""Connecting: from addresses to one connected system socket, for sockets and for the event loop."""

from __future__ import annotations

import asyncio
import errno
import os
import socket
from typing import Any

from uvsock._addresses import AddressInfo

# Seconds between two tries of a Unix listener whose backlog is full, first and at most: nothing
# tells when there is room.
_FIRST_PAUSE = 0.001
_LONGEST_PAUSE = 0.05


class Dialler:
    """How an attempt is made, and what its errors say: uvsock's own. The event loop has asyncio's.

    All of them are of one address each: ``dial`` puts them together.
    """

    async def connect(self, sock: socket.socket, address: tuple[Any, ...]) -> None:
        """Connect a socket that does not block."""
        await connected(sock, address)

    def not_connected(
        self, address: tuple[Any, ...], local: tuple[Any, ...] | None, error: OSError
    ) -> OSError:
        """connect(2) failed, or there can be no socket of that family."""
        where = _where(address) + ("" if local is None else f" from {_where(local)}")
        return cannot_connect(where, error)

    def not_bound(
        self, address: tuple[Any, ...], local: tuple[Any, ...], error: OSError
    ) -> OSError:
        """The local address cannot be bound."""
        return self.not_connected(address, local, error)

    def no_local(self, address: tuple[Any, ...], family: int) -> OSError:
        """No local address is of the family of this one."""
        return OSError(
            errno.EAFNOSUPPORT,
            f"cannot connect to {_where(address)}: local_address is of another family",
        )


def _where(address: tuple[Any, ...]) -> str:
    return f"{address[0]} port {address[1]}"


def cannot_connect(where: str, error: OSError) -> OSError:
    """The error of uvsock's own that names the address."""
    reason = os.strerror(error.errno) if error.errno else str(error)
    return OSError(error.errno, f"cannot connect to {where}: {reason}")


async def dial(
    infos: list[AddressInfo],
    local: list[AddressInfo] | None,
    delay: float | None,
    dialler: Dialler,
) -> tuple[socket.socket | None, list[OSError]]:
    """The first connection to one of these addresses that is made (RFC 8305, 5).

    Args:
        infos: in the order in which to try them.
        local: addresses to connect from, or None.
        delay: seconds until the next address is tried beside one that has not answered; None to try
            them one after another.
        dialler: of each attempt.

    Returns:
        The connected socket, or None and why not, in the order of the addresses.
    """
    failures: list[list[OSError]] = [[] for _ in infos]
    if delay is None or len(infos) == 1:
        for info, failed in zip(infos, failures, strict=True):
            sock = await _attempt(info, local, dialler, failed)
            if sock is not None:
                return sock, []
    else:
        sock = await _race(infos, local, delay, dialler, failures)
        if sock is not None:
            return sock, []
    return None, [error for failed in failures for error in failed]


async def _race(
    infos: list[AddressInfo],
    local: list[AddressInfo] | None,
    delay: float,
    dialler: Dialler,
    failures: list[list[OSError]],
) -> socket.socket | None:
    loop = asyncio.get_running_loop()
    waiting = list(zip(infos, failures, strict=True))
    attempts: dict[asyncio.Task[socket.socket | None], None] = {}
    winner: socket.socket | None = None
    try:
        while winner is None and (waiting or attempts):
            # The next address is tried when one has failed, or has not answered for long enough.
            if waiting:
                info, failed = waiting.pop(0)
                attempts[loop.create_task(_attempt(info, local, dialler, failed))] = None
            done, _ = await asyncio.wait(
                attempts,
                timeout=delay if waiting else None,
                return_when=asyncio.FIRST_COMPLETED,
            )
            for attempt in [attempt for attempt in attempts if attempt in done]:
                if winner is not None:
                    break  # a second one was made in the same iteration: closed below
                winner = attempt.result()
                del attempts[attempt]
    finally:
        # Not awaited: a second cancellation here would lose the connections that were made.
        for attempt in attempts:
            attempt.cancel()
            attempt.add_done_callback(_close_late)
    return winner


def _close_late(attempt: asyncio.Task[socket.socket | None]) -> None:
    if not attempt.cancelled() and attempt.exception() is None:
        sock = attempt.result()
        if sock is not None:
            sock.close()


async def _attempt(
    info: AddressInfo, local: list[AddressInfo] | None, dialler: Dialler, failed: list[OSError]
) -> socket.socket | None:
    """One connection, or None and the reasons in ``failed``."""
    family, kind, proto, _, address = info
    sock: socket.socket | None = None
    own: tuple[Any, ...] | None = None
    try:
        sock = socket.socket(family, kind, proto)
        sock.setblocking(False)
        if local is not None:
            own = _bind_local(sock, address, local, dialler, failed)
        if local is None or own is not None:
            await dialler.connect(sock, address)
            made, sock = sock, None
            return made
    except OSError as error:
        # Without its traceback, which would keep this frame, and so itself, until the next
        # collection of garbage: it is raised from elsewhere.
        failed.append(dialler.not_connected(address, own, error).with_traceback(None))
    finally:
        if sock is not None:
            sock.close()
    return None


def _bind_local(
    sock: socket.socket,
    address: tuple[Any, ...],
    local: list[AddressInfo],
    dialler: Dialler,
    failed: list[OSError],
) -> tuple[Any, ...] | None:
    """Bind to the first of these that can be, of the socket's family."""
    matching = [info[4] for info in local if info[0] == sock.family]
    if not matching:
        failed.append(dialler.no_local(address, sock.family))
    for own in matching:
        try:
            # A port that was used a moment ago is free for another peer.
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            sock.bind(own)
        except OSError as error:
            failed.append(dialler.not_bound(address, own, error))
        else:
            return own
    return None


def _settle(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_result(None)


async def connected(sock: socket.socket, address: Any) -> None:
    """connect(2) of a non-blocking socket, to an address that is none of a name.

    Raises:
        BlockingIOError: the backlog of a Unix listener is full: nothing was started (unix(7)).
        OSError: why it is not connected, as the system says it.
    """
    try:
        sock.connect(address)
    except (BlockingIOError, InterruptedError) as error:
        if error.errno == errno.EAGAIN:
            raise
        loop = asyncio.get_running_loop()
        writable = loop.create_future()
        loop.add_writer(sock, _settle, writable)
        try:
            await writable
            # Before it is not watched any more: that is what keeps the descriptor of a socket that
            # the program has closed meanwhile.
            number = sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
        finally:
            if sock.fileno() >= 0:
                loop.remove_writer(sock)
        if number:
            raise OSError(number, os.strerror(number)) from None


async def dial_unix(path: str | bytes, *, patient: bool) -> socket.socket:
    """A connection to a Unix socket.

    Args:
        path: of the socket, or an abstract name.
        patient: wait while the listener's backlog is full; otherwise that is an error.
    """
    pause = _FIRST_PAUSE
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        sock.setblocking(False)
        while True:
            try:
                sock.connect(path)
            except BlockingIOError:
                if not patient:
                    raise
                await asyncio.sleep(pause)
                pause = min(2 * pause, _LONGEST_PAUSE)
            else:
                return sock
    except OSError as error:
        sock.close()
        raise cannot_connect(repr(os.fsdecode(path)), error) from error
    except BaseException:
        sock.close()
        raise
