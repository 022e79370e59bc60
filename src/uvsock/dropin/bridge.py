"""TLS in TLS, and TLS on a transport of somebody else's: a second connection in this process.

uvsock's TLS sends to a descriptor. Where the bytes have to go through another transport instead, a
pair of connected Unix sockets stands between them: one end is a transport that TLS can be put on;
what comes out of the other is handed to the transport that was given, and the other way round.
"""

from __future__ import annotations

import asyncio
import socket
from typing import TYPE_CHECKING, Any, cast

from uvsock._stream import state_of
from uvsock.dropin._transport import Transport, TransportGroup

if TYPE_CHECKING:
    from uvsock.dropin.loop import Loop

# What get_extra_info() is asked that is not about TLS.
_OF_THE_CONNECTION = ("peername", "sockname", "socket")


class _Relay(asyncio.Protocol):
    """What its transport receives is written to the other one, as fast as that takes it."""

    transport: asyncio.Transport
    to: asyncio.Transport
    ended = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)

    def data_received(self, data: bytes) -> None:
        self.to.write(data)

    # Of the own transport, which the other one fills.

    def pause_writing(self) -> None:
        self.to.pause_reading()

    def resume_writing(self) -> None:
        self.to.resume_reading()


class _Outer(_Relay):
    """On the transport that was given."""

    def __init__(self, inner: Transport) -> None:
        self.inner = inner

    def eof_received(self) -> bool:
        if not self.to.is_closing():
            self.to.write_eof()
        return True

    def connection_lost(self, error: Exception | None) -> None:
        if error is None:
            self.to.close()
        else:
            self.inner._force_close(error)


class _Middle(_Relay):
    """On the end of the pair that the program does not see."""

    def __init__(self, inner: Transport) -> None:
        self.inner = inner

    def eof_received(self) -> bool:
        self.ended = True
        if self.inner.is_closing() or not self.to.can_write_eof():
            self.to.close()
        elif not self.to.is_closing():
            self.to.write_eof()
        return True

    def connection_lost(self, error: Exception | None) -> None:
        self.to.close()

    def inner_lost(self, _: object) -> None:
        """After the end, nothing else tells that nobody reads any more."""
        if self.ended:
            self.transport.close()


async def bridge(loop: Loop, outer: Any) -> Transport:
    """A transport whose bytes go through ``outer``, and which TLS can be put on."""
    outer.pause_reading()
    near, far = socket.socketpair()
    # Its protocol goes on in the context of the connection.
    context = outer._context if type(outer) is Transport else None
    group = TransportGroup(state_of(loop), context=context)
    try:
        inner = await loop._open(group, asyncio.Protocol(), near)
    except BaseException:
        far.close()
        raise
    middle = _Middle(inner)
    try:
        relay = _Outer(inner)
        relay.transport = middle.to = outer
        relay.to = cast(
            asyncio.Transport, await loop._open(TransportGroup(state_of(loop)), middle, far)
        )
    except BaseException:
        inner.abort()
        raise
    group.when_empty().add_done_callback(middle.inner_lost)
    own_info = inner.get_extra_info

    def get_extra_info(name: str, default: Any = None) -> Any:
        known = outer.get_extra_info if name in _OF_THE_CONNECTION else own_info
        return known(name, default)

    inner.get_extra_info = get_extra_info  # type: ignore[method-assign]
    outer.set_protocol(relay)
    middle.transport.resume_reading()
    outer.resume_reading()
    return inner
