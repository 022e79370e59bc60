"""asyncio's server: listening sockets, and the connections that they brought."""

from __future__ import annotations

import asyncio
import asyncio.trsock
import logging
import socket
from typing import Self

from uvsock._accept import Acceptor
from uvsock._bind import SocketFile
from uvsock.dropin._transport import TransportGroup

logger = logging.getLogger("asyncio")


class Server(asyncio.Server):
    """What ``loop.create_server`` returns. Only the event loop makes one.

    It is an ``asyncio.Server`` for ``isinstance`` only: no method of that class is used.
    ``wait_closed``, ``close_clients`` and ``abort_clients`` are those of Python 3.13 on every
    Python.
    """

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        sockets: list[socket.socket],
        group: TransportGroup,
        backlog: int,
        file: SocketFile | None = None,
    ) -> None:
        # Not that of asyncio.Server, which differs between Pythons.
        self._loop = loop
        self._sockets: list[socket.socket] | None = sockets
        self._group = group
        self._backlog = backlog
        self._file = file
        self._accepting: list[Acceptor] = []
        self._closed: asyncio.Future[None] = loop.create_future()
        self._forever: asyncio.Future[None] | None = None

    def __repr__(self) -> str:
        return f"<{type(self).__name__} sockets={self.sockets!r}>"

    def get_loop(self) -> asyncio.AbstractEventLoop:
        """The event loop that it belongs to."""
        return self._loop

    def is_serving(self) -> bool:
        """Whether it accepts connections."""
        return bool(self._accepting)

    @property
    def sockets(  # type: ignore[override]
        self,
    ) -> tuple[asyncio.trsock.TransportSocket, ...]:
        """The listening sockets; none once it is closed."""
        return tuple(asyncio.trsock.TransportSocket(sock) for sock in self._sockets or ())

    def _start(self) -> None:
        if self._accepting or self._sockets is None:
            return
        self._group.server = self  # or a server that the program forgets could not be closed
        for sock in self._sockets:
            sock.listen(self._backlog)
            self._accepting.append(Acceptor(self._group, sock))

    async def start_serving(self) -> None:
        """Begin to accept connections, if it has not begun yet."""
        self._start()
        await asyncio.sleep(0)

    async def serve_forever(self) -> None:
        """Accept connections until this is cancelled, which closes the server and its clients.

        As from Python 3.15 on: before, one client that stayed would keep the program from ending.
        """
        if self._forever is not None:
            raise RuntimeError(f"server {self!r} is already being awaited on serve_forever()")
        if self._sockets is None:
            raise RuntimeError(f"server {self!r} is closed")
        self._start()
        self._forever = self._loop.create_future()
        try:
            await self._forever
        except asyncio.CancelledError:
            self.close()
            self.close_clients()
            await self.wait_closed()
            raise
        finally:
            self._forever = None

    def close(self) -> None:
        """Stop accepting; the connections live on."""
        sockets, self._sockets = self._sockets, None
        if sockets is None:
            return
        self._group.server = None
        self._group.stopped = True  # for those that were accepted in this iteration
        for acceptor in self._accepting:
            acceptor.close()
        for sock in sockets[len(self._accepting) :]:
            sock.close()  # bound, and never served
        self._accepting = []
        if self._file is not None:
            try:
                self._file.remove()
            except OSError as error:
                logger.error("Unable to clean up listening UNIX socket: %r", error)
        if self._forever is not None:
            self._forever.cancel()
        self._closed.set_result(None)

    def close_clients(self) -> None:
        """Close the connections that are left, each by its ``close()``."""
        self._group.close()

    def abort_clients(self) -> None:
        """Close the connections that are left at once, each by its ``abort()``."""
        self._group.abort()

    async def wait_closed(self) -> None:
        """Wait until it is closed and its last connection is lost."""
        if not self._closed.done():
            await asyncio.shield(self._closed)
        await self._group.when_empty()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exception: object) -> None:
        self.close()
        await self.wait_closed()
