"""A file on its way to a socket: sent by the kernel where it can, read where it cannot."""

from __future__ import annotations

import asyncio
import errno
import io
import os
import stat
import threading
import weakref
from collections.abc import Awaitable, Callable
from typing import Any, Final

# Bytes of a file that are read at a time.
_CHUNK: Final = 262144
# Bytes per sendfile(2): macOS and some file systems refuse counts near 2 GiB.
_MAX_SENDFILE: Final = 1 << 30
# What sendfile(2) says of the connection. All else may be said of the file, or of the two together
# (EINVAL in /proc, EOVERFLOW, ENOSYS or EPERM in a sandbox): reading it works, or says why not.
_OF_THE_CONNECTION: Final = frozenset(
    {
        errno.EPIPE,
        errno.ECONNRESET,
        errno.ECONNABORTED,
        errno.ETIMEDOUT,
        errno.EHOSTUNREACH,
        errno.EHOSTDOWN,
        errno.ENETUNREACH,
        errno.ENETDOWN,
    }
)

# One sendfile(2) of a file, from a position, of so many bytes: how many were sent, 0 at its end.
# SendfileNotAvailableError: the file has to be read.
ByKernel = Callable[[Any, int, int], Awaitable[int]]
Write = Callable[[bytes | bytearray], Awaitable[object]]


def is_text(file: object) -> bool:
    """Whether reading from this file gives ``str``, as far as can be told without reading."""
    if isinstance(file, (io.RawIOBase, io.BufferedIOBase)):
        return False  # whatever its `mode` says: that of a zipfile's member is "r"
    mode = getattr(file, "mode", "b")
    return isinstance(file, io.TextIOBase) or (isinstance(mode, str) and "b" not in mode)


def sendfile(descriptor: int, file: Any, position: int, size: int) -> int:
    """One sendfile(2) to this descriptor.

    Raises:
        BlockingIOError: there is no room.
        OSError: the connection is broken.
        SendfileNotAvailableError: the kernel does not send this file.
    """
    try:
        return os.sendfile(descriptor, file.fileno(), position, min(size, _MAX_SENDFILE))
    except BlockingIOError:
        raise
    except OSError as error:
        if error.errno in _OF_THE_CONNECTION:
            raise
        if error.errno == errno.ENOTCONN:  # as asyncio: it was connected when this began
            raise ConnectionError(error.errno, "socket is not connected") from error
        raise asyncio.SendfileNotAvailableError("os.sendfile call failed") from error


async def send_file(
    loop: asyncio.AbstractEventLoop,
    file: Any,
    offset: int,
    count: int | None,
    by_kernel: ByKernel | None,
    write: Write | None,
) -> int:
    """Send a file, or ``count`` bytes of it, and leave its position behind what was sent.

    Args:
        by_kernel: None where the connection takes only what was read.
        write: None where nothing may be read.

    Returns:
        The number of bytes sent.

    Raises:
        SendfileNotAvailableError: the kernel does not send this file, and ``write`` is None.
    """
    content = _Plain(file) if _is_plain(file) else _Content(file, offset)
    native = by_kernel is not None and isinstance(content, _Plain)
    sent = 0
    try:
        while count is None or sent < count:
            position = offset + sent
            size = _MAX_SENDFILE if count is None else count - sent
            if native:
                try:
                    done = await by_kernel(file, position, size)  # type: ignore[misc]
                except asyncio.SendfileNotAvailableError:
                    if write is None:
                        raise
                    native = False
                    continue
                if done == 0 and sent == 0 and write is not None:
                    native = False  # FUSE and /proc have files that only end for sendfile(2)
                    continue
            elif write is None:
                raise asyncio.SendfileNotAvailableError("not a regular file")
            else:
                data = await loop.run_in_executor(None, content.read, position, min(size, _CHUNK))
                done = len(data)
                if done:
                    await write(data)
            if done == 0:
                break
            sent += done
        return sent
    finally:
        if (sent or offset) and not getattr(file, "closed", False):
            content.leave_at(offset + sent)


def _is_plain(file: Any) -> bool:
    """Whether what is read from a file is what its descriptor has, and ``io`` reads it.

    A subclass, or what only has a ``fileno`` (gzip's, tarfile's), may make something else of it.
    """
    raw = file.raw if type(file) in (io.BufferedReader, io.BufferedRandom) else file
    if type(raw) is not io.FileIO or not raw.readable():
        return False
    return stat.S_ISREG(os.fstat(raw.fileno()).st_mode)


class _Plain:
    """What a descriptor has. The position is neither used nor moved by reading: the program may
    move it meanwhile, and other calls may send the same file.
    """

    def __init__(self, file: Any) -> None:
        self._file = file
        if type(file) is io.BufferedRandom:
            file.flush()  # before this, what the program wrote is not there

    def read(self, position: int, size: int) -> bytes | bytearray:
        # Asked for each time: a file that was closed says so, and its number may be another's.
        return os.pread(self._file.fileno(), size, position)

    def leave_at(self, position: int) -> None:
        self._file.seek(position)


# Of the files that are being read, by id(): each call must find the position where it put it.
_locks: weakref.WeakValueDictionary[int, threading.Lock] = weakref.WeakValueDictionary()


class _Content:
    """What an object's ``read`` gives."""

    def __init__(self, file: Any, offset: int) -> None:
        self._file = file
        self._lock = _locks.setdefault(id(file), threading.Lock())
        self._seekable = file.seekable() if hasattr(file, "seekable") else hasattr(file, "seek")
        if offset and not self._seekable:
            raise io.UnsupportedOperation(f"offset: must be 0, not {offset}: {file!r} cannot seek")

    def read(self, position: int, size: int) -> bytes | bytearray:
        if self._seekable:
            with self._lock:
                if self._file.tell() != position:
                    self._file.seek(position)
                data = self._file.read(size)
        else:
            data = self._file.read(size)
        if data is None:
            raise BlockingIOError(errno.EAGAIN, "the file has nothing to read yet")
        if not isinstance(data, (bytes, bytearray)):
            raise TypeError(f"file: read() must give bytes, not {type(data).__name__}")
        return data

    def leave_at(self, position: int) -> None:
        if self._seekable and self._lock.acquire(blocking=False):
            try:
                self._file.seek(position)
            finally:
                self._lock.release()
