"""Accepting connections, many per wake-up. Each is given to uvloop, whose transport owns it.

libuv takes one connection per wake-up, and accepts and closes those who wait when no descriptor is
left. Here they stay in the kernel's queue until there is one again.
"""

import logging
import os

import uvloop

cimport cython
from cpython.contextvars cimport PyContext_Enter, PyContext_Exit
from cpython.object cimport PyObject
from libc.errno cimport (
    EAGAIN, EBADF, ECONNABORTED, EHOSTDOWN, EHOSTUNREACH, EINTR, EINVAL, ENETDOWN, ENETUNREACH,
    ENOPROTOOPT, ENOTSOCK, EPERM, EPROTO, errno,
)
from libc.math cimport INFINITY
from posix.unistd cimport close as close_descriptor

from uvsock._stream cimport StreamGroup, now

cdef extern from "_compat.h":
    int uvs_accept(int fd) noexcept

cdef extern from "Python.h":
    ctypedef enum PySendResult:
        PYGEN_RETURN, PYGEN_ERROR, PYGEN_NEXT
    PySendResult PyIter_Send(object awaitable, object value, PyObject** result) except PYGEN_ERROR
    void Py_XDECREF(PyObject* thing) noexcept

cdef enum:
    # Connections per wake-up: while they are taken, those that are there wait.
    UVS_BATCH = 64
    # Wake-ups in a row for one connection each, until two are tried for. That a try finds nobody
    # costs a system call, which where clients come one by one is one for each of them.
    UVS_SINGLES = 8

# Seconds until it is tried again where the system could not give a descriptor: at first, and at
# most after doubling each time. A connection of this loop that closes is a reason to try at once.
cdef double UVS_RETRY_FIRST = 0.01
cdef double UVS_RETRY_LAST = 1.0
# Seconds between two warnings, of all listeners: they tell of one cause.
cdef double UVS_WARN_AGAIN = 60.0

cdef object logger = logging.getLogger("uvsock")
# Not the loop's method: that of uvsock's own loop makes asyncio's transports. A coroutine that has
# all done when it waits for the first time.
cdef object connect_accepted_socket = uvloop.Loop.connect_accepted_socket
cdef double warned_at = -INFINITY


@cython.final
cdef class _Accepted:
    """What uvloop takes for the socket object of a new connection: one does for all."""

    cdef readonly object type
    cdef readonly object family
    cdef int fd

    def fileno(self):
        return self.fd

    def close(self):
        """The transport is closed, and its descriptor with it."""


@cython.final
cdef class Acceptor:
    """Accepts on a listening socket, which it owns: each connection is a call of the group.

    Args:
        group: called without arguments, it gives the protocol of a connection.
        sock: a listening socket.
    """

    cdef StreamGroup _group
    cdef object _loop
    cdef object _sock
    cdef object _open            # keeps the descriptor open where the program closes `sock`
    cdef int _fd                 # of `sock`, -1 once closed
    cdef _Accepted _accepted
    cdef object _callback
    cdef bint _watching          # else it waits for a descriptor, or is closed
    cdef int _limit              # connections to try for at the next wake-up
    cdef int _singles            # wake-ups in a row for one each
    cdef object _timer           # of the next try
    cdef double _delay           # that the timer was set to
    cdef Py_ssize_t _shortages   # how often there was no descriptor left

    def __init__(self, group, sock):
        self._group = group
        self._loop = self._group.state.loop
        self._sock = sock
        self._open = sock.makefile("rb", buffering=0)
        self._fd = sock.fileno()
        self._accepted = _Accepted.__new__(_Accepted)
        self._accepted.type = int(sock.type)
        self._accepted.family = int(sock.family)
        self._callback = self._accept
        self._limit = 1
        self._group.state.acceptors.add(self)
        try:
            self._watch()
        except BaseException:
            self.close()
            raise

    def close(self):
        """Stop accepting, and close the socket: the kernel resets those who wait."""
        self._group.state.acceptors.discard(self)
        self._rest()
        self._forget_retry()
        self._fd = -1
        self._callback = None
        self._open.close()
        self._sock.close()

    # ── Waking up ──────────────────────────────────────────────────────────────────────────────

    cdef int _watch(self) except -1:
        if not self._watching:
            uvloop.Loop.add_reader(self._loop, self._sock, self._callback)
            self._watching = True
            self._delay = 0
        return 0

    cdef int _rest(self) except -1:
        if self._watching:
            self._watching = False
            if not self._loop.is_closed():
                uvloop.Loop.remove_reader(self._loop, self._fd)
        return 0

    def _accept(self):
        """Somebody waits, or there may be a descriptor again."""
        cdef int code
        if self._fd < 0:
            return  # closed since this was scheduled
        self._forget_retry()
        PyContext_Enter(self._group.context)
        try:
            code = self._take()
        finally:
            PyContext_Exit(self._group.context)
        if self._fd < 0:
            return
        if code == 0 or code == EAGAIN:
            self._watch()
        elif code == EBADF or code == EINVAL or code == ENOTSOCK:
            # The program has closed or shut down what it does not own. Its number may soon be that
            # of another socket.
            self._rest()
            self._report(OSError(code, os.strerror(code)))
        else:
            self._wait_for_descriptor(code)

    # ── Taking connections ─────────────────────────────────────────────────────────────────────

    cdef int _take(self) except -1:
        """Take a batch. What accept(2) failed with, or 0."""
        cdef int fd, code = 0, taken = 0
        cdef list opening = []
        while taken < self._limit and self._fd >= 0:  # an exception handler may close it
            fd = uvs_accept(self._fd)
            if fd < 0:
                code = errno
                if not _of_one_client(code):
                    break
                code = 0
            else:
                self._attach(fd, opening)
            taken += 1
        if taken < self._limit:
            self._limit = max(taken, 1)
            self._singles = 0
        elif self._limit > 1:
            self._limit = min(2 * self._limit, UVS_BATCH)
        else:
            self._singles += 1
            if self._singles == UVS_SINGLES:
                self._limit = 2
        if opening:
            # Behind the calls of connection_made, which uvloop has just scheduled.
            self._loop.call_soon(self._opened, opening)
        return code

    cdef int _attach(self, int fd, list opening) except -1:
        """Make a transport of it, and add uvloop's coroutine, which waits until that is open."""
        cdef PyObject* waiter = NULL
        self._accepted.fd = fd
        try:
            coroutine = connect_accepted_socket(self._loop, self._group, self._accepted)
            PyIter_Send(coroutine, None, &waiter)
        except Exception as error:
            close_descriptor(fd)
            return self._report(error)
        Py_XDECREF(waiter)
        opening.append(coroutine)
        return 0

    def _opened(self, opening):
        """Let uvloop's coroutines end: one that is dropped before closes its transport."""
        cdef PyObject* result
        for coroutine in opening:
            result = NULL
            try:
                PyIter_Send(coroutine, None, &result)
            except Exception as error:
                self._report(error)
            Py_XDECREF(result)

    cdef int _report(self, object error) except -1:
        self._loop.call_exception_handler({
            "message": "A connection could not be accepted",
            "exception": error,
            "socket": self._sock,
        })
        return 0

    # ── No descriptor left ─────────────────────────────────────────────────────────────────────

    cdef int _wait_for_descriptor(self, int code) except -1:
        global warned_at
        if self._watching:
            self._rest()  # the socket stays readable: the loop would turn without a pause
            self._shortages += 1
        self._limit = UVS_BATCH  # watched again only when nobody waits
        self._delay = min(max(UVS_RETRY_FIRST, 2 * self._delay), UVS_RETRY_LAST)
        self._timer = self._loop.call_later(self._delay, self._callback)
        self._group.state.starved.append(self._callback)
        if now() - warned_at >= UVS_WARN_AGAIN:
            warned_at = now()
            logger.warning(
                "cannot accept on %s: %s; who connects waits until it can",
                self._sock.getsockname(), os.strerror(code),
            )
        return 0

    cdef int _forget_retry(self) except -1:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
            if self._callback in self._group.state.starved:
                self._group.state.starved.remove(self._callback)
        return 0


cdef bint _of_one_client(int code) noexcept:
    """Whether accept(2) says that nothing is wrong but with the client that was next."""
    return (
        code == ECONNABORTED or code == EINTR or code == EPERM or code == EPROTO
        # Linux: what the network has said about the connection meanwhile.
        or code == ENETDOWN or code == ENETUNREACH or code == EHOSTDOWN or code == EHOSTUNREACH
        or code == ENOPROTOOPT
    )
