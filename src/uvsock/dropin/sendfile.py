"""Files on the event loop: ``sendfile`` and ``sock_sendfile``, as asyncio has them."""

from __future__ import annotations

import asyncio
import functools
import os
import socket
import ssl
from typing import IO, Any, cast

import uvloop

from uvsock._files import is_text, send_file, sendfile
from uvsock.dropin._transport import Transport

# What another library's transport needs for a file to be written to it.
_STREAM_METHODS = (
    "write",
    "get_write_buffer_size",
    "get_write_buffer_limits",
    "get_protocol",
    "set_protocol",
    "is_reading",
    "pause_reading",
    "resume_reading",
)


class SendFile(uvloop.Loop):
    """The part of the loop that sends files; it needs nothing that a loop does not have."""

    async def sendfile(
        self,
        transport: Any,
        file: IO[bytes],
        offset: int = 0,
        count: int | None = None,
        *,
        fallback: bool = True,
    ) -> int:
        """Send a file over a transport.

        By sendfile(2) where that sends what reading the file gives: on a plain connection, and a
        regular file that ``open`` has opened. All others are read, in a thread.

        Args:
            transport: that of a stream connection.
            file: a file opened in binary mode.
            offset: first byte of the file to send.
            count: number of bytes to send; None for all up to the end of the file.
            fallback: whether the file may be read.

        Returns:
            The number of bytes sent. The file's position is after the last of them, also if this
            raises.

        Raises:
            RuntimeError: the transport is closing, or is no stream's.
            SendfileNotAvailableError: without ``fallback``, for what has to be read.
            ConnectionError: the connection was closed meanwhile.
        """
        if transport.is_closing():
            raise RuntimeError("Transport is closing")
        ours = type(transport) is Transport
        if not ours and not all(hasattr(transport, name) for name in _STREAM_METHODS):
            raise _not_supported(transport)
        native = ours and transport.get_extra_info("sslcontext") is None
        if not native and not fallback:
            raise asyncio.SendfileNotAvailableError(
                "fallback is disabled and native sendfile is not supported for transport "
                f"{transport!r}"
            )
        _check(file, offset, count)
        if not ours:
            try:
                writer = _Writer(cast(asyncio.Transport, transport))
            except NotImplementedError as error:  # the write end of a pipe
                raise _not_supported(transport) from error
            try:
                return await send_file(self, file, offset, count, None, writer.write)
            finally:
                writer.restore()
        by_kernel = functools.partial(self._sendfile_native, transport) if native else None
        write = functools.partial(_write, transport) if fallback else None
        return await send_file(self, file, offset, count, by_kernel, write)

    async def sock_sendfile(
        self,
        sock: socket.socket,
        file: IO[bytes],
        offset: int = 0,
        count: int | None = None,
        *,
        fallback: bool | None = True,
    ) -> int:
        """Send a file over a socket of the program's own.

        Args:
            sock: a connected stream socket that does not block.
            file, offset, count, fallback: as for ``sendfile``.

        Returns:
            The number of bytes sent. The file's position is after the last of them, also if this
            raises.

        Raises:
            SendfileNotAvailableError: without ``fallback``, for what has to be read.
            OSError: what broke the connection.
        """
        if self.get_debug() and sock.gettimeout() != 0:
            raise ValueError("the socket must be non-blocking")
        if isinstance(sock, ssl.SSLSocket):
            raise TypeError("Socket cannot be of type SSLSocket")
        _check(file, offset, count, sock)

        async def by_kernel(file: Any, position: int, size: int) -> int:
            await asyncio.sleep(0)  # between the pieces others run
            return await self._sendfile_once(sock.fileno(), file, position, size)

        write = functools.partial(self.sock_sendall, sock) if fallback else None
        return await send_file(self, file, offset, count, by_kernel, write)

    async def _sendfile_native(
        self, transport: Transport, file: Any, offset: int, count: int
    ) -> int:
        """What one sendfile(2) takes of a file, after all that was written before."""
        transport._begin_file()
        sent = 0
        try:
            await transport._written()
            await asyncio.sleep(0)  # as asyncio: a fast peer and a large file stop nobody else
            if transport.is_closing():
                raise ConnectionError("Connection closed by peer")
            descriptor = transport.get_extra_info("socket").fileno()
            sent = await self._sendfile_once(descriptor, file, offset, count)
        finally:
            transport._end_file(sent)
        return sent

    async def _sendfile_once(self, descriptor: int, file: Any, position: int, size: int) -> int:
        try:
            return sendfile(descriptor, file, position, size)
        except BlockingIOError:
            pass
        # A duplicate, because the loop lets nobody watch a transport's own descriptor, and the
        # program may close its socket while the loop watches.
        try:
            descriptor = os.dup(descriptor)
        except OSError as error:
            raise asyncio.SendfileNotAvailableError("no descriptor is left") from error
        try:
            while True:
                room = self.create_future()
                self.add_writer(descriptor, _set, room)
                try:
                    await room
                finally:
                    self.remove_writer(descriptor)
                try:
                    return sendfile(descriptor, file, position, size)
                except BlockingIOError:
                    continue
        finally:
            os.close(descriptor)


def _not_supported(transport: object) -> RuntimeError:
    return RuntimeError(f"sendfile is not supported for transport {transport!r}")


def _check(file: Any, offset: object, count: object, sock: socket.socket | None = None) -> None:
    """What asyncio checks, in its order and words."""
    if is_text(file):
        raise ValueError("file should be opened in binary mode")
    if sock is not None and sock.type != socket.SOCK_STREAM:
        raise ValueError("only SOCK_STREAM type sockets are supported")
    if count is not None:
        wrong = f"count must be a positive integer (got {count!r})"
        if not isinstance(count, int):
            raise TypeError(wrong)
        if count <= 0:
            raise ValueError(wrong)
    wrong = f"offset must be a non-negative integer (got {offset!r})"
    if not isinstance(offset, int):
        raise TypeError(wrong)
    if offset < 0:
        raise ValueError(wrong)


def _set(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_result(None)


async def _write(transport: Transport, data: bytes | bytearray) -> None:
    await transport._written()
    if transport.is_closing():
        raise ConnectionError("Connection closed by peer")
    transport.write(data)


class _Writer(asyncio.Protocol):
    """Takes the place of the protocol on a transport of any library, to be told of room."""

    def __init__(self, transport: asyncio.Transport) -> None:
        self._transport = transport
        self._protocol = transport.get_protocol()
        self._reads = transport.is_reading()
        self._waiter: asyncio.Future[None] | None = None
        self._paused = False
        self._owed = False  # a resume_writing() that the protocol waits for
        self._lost = False
        transport.get_write_buffer_limits()  # fails here where it would fail later
        transport.pause_reading()
        transport.set_protocol(self)

    async def write(self, data: bytes | bytearray) -> None:
        # By the size and not by what was called: the transport may be full from before.
        while (
            not self._transport.is_closing()
            and self._transport.get_write_buffer_size()
            > self._transport.get_write_buffer_limits()[1]
        ):
            self._waiter = asyncio.get_running_loop().create_future()
            await self._waiter
        if self._transport.is_closing():
            raise ConnectionError("Connection closed by peer")
        self._transport.write(data)

    def restore(self) -> None:
        self._transport.set_protocol(self._protocol)
        if self._lost:
            return
        if self._reads:
            self._transport.resume_reading()
        if self._owed and not self._paused:
            self._protocol.resume_writing()
        elif self._paused and not self._owed:
            self._protocol.pause_writing()

    def pause_writing(self) -> None:
        self._paused = True

    def resume_writing(self) -> None:
        if self._paused:
            self._paused = False
        else:
            self._owed = True
        if self._waiter is not None:
            _set(self._waiter)

    def connection_lost(self, exc: Exception | None) -> None:
        self._lost = True
        waiter = self._waiter
        if waiter is not None and not waiter.done():
            waiter.set_exception(exc or ConnectionError("Connection is closed by peer"))
        self._protocol.connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        raise RuntimeError("Invalid state: reading should be paused")

    def eof_received(self) -> bool | None:
        raise RuntimeError("Invalid state: reading should be paused")
