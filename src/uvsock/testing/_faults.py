"""A proxy that does to a connection what networks do.

    client ◄──► accepted ═══ to_server ═══► dialled ◄──► server
                         ◄══ to_client ════

Each chunk that arrives is passed on by an ``async def data``. While that waits, its socket does not
read, so a delay or a stall here is back-pressure for the sender.
"""

from __future__ import annotations

import asyncio
import contextlib
import tempfile
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Final, NoReturn, Self

from uvsock._connector import connect
from uvsock._listener import Listener, listen
from uvsock._options import check_int, check_seconds, wrong_type
from uvsock._socket import ReadyState, Socket
from uvsock.testing._pair import shrink_buffers


@dataclass(frozen=True, kw_only=True)
class Faults:
    """What happens to the bytes of one direction; by default nothing.

    Args:
        chunk_size: bytes passed on at a time, each such chunk in a segment of its own.
        delay: seconds before each chunk.
        reset_after: bytes of a connection in this direction after which it is reset, both sides.
            0 resets it when the first byte arrives.
        stall_after: bytes after which nothing more is read or passed on, until ``inject`` says
            otherwise. The connection stays open.

    Raises:
        TypeError, ValueError: an argument is wrong.
    """

    chunk_size: int | None = None
    delay: float = 0.0
    reset_after: int | None = None
    stall_after: int | None = None

    def __post_init__(self) -> None:
        check_seconds("delay", self.delay, allow_zero=True)
        for name, low in (("chunk_size", 1), ("reset_after", 0), ("stall_after", 0)):
            if getattr(self, name) is not None:
                check_int(name, getattr(self, name), low)


# What arrives is passed on as it is: one end at a time, and each chunk at once.
_PLAIN: Final[dict[str, Any]] = {"allow_half_open": True, "cork": False}


class _Side:
    """What a socket of the proxy knows: the other one, and what went from here to there."""

    def __init__(self, peer: Socket[Any], direction: str) -> None:
        self.peer = peer
        self.direction = direction
        self.passed = 0
        self.over = False


class FaultProxy:
    """A proxy to a server that delays, splits, stalls or resets what passes through it.

    Use it as ``async with FaultProxy(listener, ...) as proxy``, and connect to the proxy instead.
    TLS passes through as it is: the counts of ``Faults`` are then those of its records.

    Args:
        target: a ``Listener``, a host and a port, or the path of a Unix socket.
        to_server: faults of the bytes from clients to the server.
        to_client: faults of the bytes from the server to clients.

    Raises:
        TypeError: an argument has the wrong type.
        OSError: the proxy cannot listen.
    """

    def __init__(
        self,
        target: Listener | tuple[str, int] | str,
        *,
        to_server: Faults | None = None,
        to_client: Faults | None = None,
    ) -> None:
        if isinstance(target, Listener):
            target = target.unix or (target.hostname or "", target.port or 0)
        elif isinstance(target, tuple):
            hostname, port = target if len(target) == 2 else (None, None)
            if not isinstance(hostname, str) or not isinstance(port, int):
                raise TypeError(f"target: must be (hostname, port), not {target!r}")
        elif not isinstance(target, str):
            raise wrong_type("target", "a Listener, (hostname, port) or a path", target)
        self._target = target
        self._changed = asyncio.Event()
        self._dialled: set[Socket[_Side]] = set()
        self._listener: Listener
        self.inject(to_server=to_server, to_client=to_client)

    def inject(self, *, to_server: Faults | None = None, to_client: Faults | None = None) -> None:
        """Replace the faults of both directions, for live connections too; None is no fault.

        Raises:
            TypeError: not ``Faults``; nothing is changed.
        """
        chosen = {"to_server": to_server or Faults(), "to_client": to_client or Faults()}
        for name, faults in chosen.items():
            if not isinstance(faults, Faults):
                raise wrong_type(name, "Faults or None", faults)
        self._faults = chosen
        self._wake()

    def reset(self) -> None:
        """Reset every connection now. New ones are accepted as before."""
        for socket in (*self._listener.sockets, *self._dialled):
            self._drop(socket)

    @property
    def hostname(self) -> str | None:
        """Where to connect to; None if the target is a Unix socket."""
        return self._listener.hostname

    @property
    def port(self) -> int | None:
        """Where to connect to; None if the target is a Unix socket."""
        return self._listener.port

    @property
    def unix(self) -> str | None:
        """The path to connect to if the target is a Unix socket, else None."""
        return self._listener.unix

    def __reduce__(self) -> NoReturn:
        raise TypeError("cannot pickle 'FaultProxy' object")

    async def __aenter__(self) -> Self:
        """The proxy, which listens until the block ends."""
        handlers = {"open": self._accept, **self._handlers()}
        self._cleaning = contextlib.ExitStack()
        with contextlib.ExitStack() as cleaning:
            options: dict[str, Any] = {"hostname": "127.0.0.1", "port": 0}
            if isinstance(self._target, str):
                directory = cleaning.enter_context(tempfile.TemporaryDirectory(prefix="uvsock"))
                options = {"unix": f"{directory}/proxy"}
            self._listener = await listen(handlers, **options, **_PLAIN)
            self._cleaning = cleaning.pop_all()
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Reset what still passes through, and stop listening."""
        with self._cleaning:
            self._listener.stop()
            self.reset()
            await self._listener.wait_closed()
            self.reset()  # those whose dialling has only ended now
            for socket in list(self._dialled):
                await socket.wait_closed()

    def _handlers(self) -> dict[str, Any]:
        return {"data": self._pass_on, "end": self._end, "close": self._close}

    def _wake(self) -> None:
        """Let those who wait in a stall look again whether they still have to."""
        self._changed.set()
        self._changed = asyncio.Event()

    def _drop(self, socket: Socket[Any]) -> None:
        # Its `close` waits until its `data` has returned, which may wait in a stall.
        if socket.data is not None:
            socket.data.over = True
        socket.terminate()
        self._wake()

    async def _accept(self, accepted: Socket[Any]) -> None:
        handlers = {"open": self._dialled.add, **self._handlers()}
        # As initial `data`: a server that speaks first may do so before connect() has returned.
        options = {"data": _Side(accepted, "to_client"), "timeout": 10, **_PLAIN}
        try:
            if isinstance(self._target, str):
                dialled = await connect(handlers, unix=self._target, **options)
            else:
                dialled = await connect(handlers, *self._target, **options)
        except OSError:
            accepted.terminate()
            return
        if accepted.ready_state != ReadyState.ESTABLISHED:
            dialled.terminate()  # reset meanwhile
            return
        # With the kernel's usual ones a sender would notice a stall after some megabytes only.
        shrink_buffers(accepted, dialled)
        accepted.data = _Side(dialled, "to_server")

    async def _pass_on(self, socket: Socket[_Side], data: bytes) -> None:
        side = socket.data
        rest = memoryview(data)
        while not side.over:
            changed, faults = self._changed, self._faults[side.direction]
            if faults.reset_after is not None and side.passed >= faults.reset_after:
                self._drop(socket)
                self._drop(side.peer)
                return
            if not rest:
                return
            totals = (faults.reset_after, faults.stall_after)
            room = [total - side.passed for total in totals if total is not None]
            size = max(min(len(rest), faults.chunk_size or len(rest), *room), 0)
            if size == 0:
                await changed.wait()
                continue
            # At least one iteration: a receiver on this loop reads each chunk by itself.
            await asyncio.sleep(faults.delay)
            try:
                await side.peer.send_all(rest[:size])
                await side.peer.drained()
            except OSError:
                return  # the `close` of that socket says why, and ends this one
            side.passed += size
            rest = rest[size:]

    def _end(self, socket: Socket[_Side]) -> None:
        socket.data.peer.end()

    def _close(self, socket: Socket[_Side | None], error: OSError | None) -> None:
        self._dialled.discard(socket)
        # Accepted ones have no peer yet while it is being dialled.
        if socket.data is not None and error is not None:
            self._drop(socket.data.peer)
