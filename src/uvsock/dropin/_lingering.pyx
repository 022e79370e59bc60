"""A closed connection, until its peer has all that was written.

``close()`` of asyncio's does not wait for the peer. But a kernel that gets bytes for a connection
that nobody has open answers with a reset, which takes with it what has not arrived yet. So a
duplicate of the descriptor stays open as long as there is such, and what comes in is dropped.
"""

cimport cython
from libc.errno cimport EAGAIN, EINTR
from posix.unistd cimport close as close_descriptor

from uvsock._poller cimport UVS_READ, UVS_WATCHED, Watched
from uvsock._stream cimport LoopState, ReadBuffer, now, receive_into

cdef extern from "fcntl.h":
    int fcntl(int fd, int command, ...) noexcept
    int F_DUPFD_CLOEXEC

cdef extern from "sys/socket.h":
    int SHUT_WR
    int shutdown(int fd, int how) noexcept

cdef extern from "_compat.h":
    int uvs_unsent(int fd) noexcept  # bytes that the peer has not acknowledged, or -1

# Seconds. As long as a TLS peer has to end its side (asyncio.constants.SSL_SHUTDOWN_TIMEOUT).
cdef double UVS_LINGER = 30.0
# Seconds that a peer which has all, and has not closed, may go on without a word.
cdef double UVS_QUIET = 1.0
# Seconds until it is asked again, since nothing tells that all has arrived.
cdef double UVS_ASK = 0.5


@cython.final
cdef class Lingering(Watched):
    cdef LoopState state
    cdef object timer
    cdef double until
    cdef double quiet       # since when it says nothing, and takes nothing

    def __dealloc__(self):
        if self.fd >= 0:
            close_descriptor(self.fd)  # the loop was closed

    cdef int on_ready(self, int what) except -1:
        cdef ReadBuffer buffer = self.state.read_memory()
        cdef Py_ssize_t n = receive_into(self.fd, buffer.memory, buffer.size)
        if n > 0:
            # It talks, and a reset now would fail its next write before it has read all.
            self.quiet = now()
        elif n != -EAGAIN and n != -EINTR:
            self.timer.cancel()
            self.close()
        return 0

    cdef int on_ready_raised(self, object error) except -1:
        self.timer.cancel()
        self.close()  # or it would be tried again, for ever
        raise error

    def _ask(self):
        cdef double t = now()
        if uvs_unsent(self.fd) > 0:
            self.quiet = t
        if t > self.until or t - self.quiet > UVS_QUIET:
            self.close()
        else:
            self.timer = self.state.loop.call_later(UVS_ASK, self._ask)

    cdef int close(self) except -1:
        self.state.poller.watch(self, 0)
        close_descriptor(self.fd)
        self.fd = -1
        return 0


cdef int keep_until_delivered(LoopState state, int fd) except -1:
    cdef Lingering lingering
    if uvs_unsent(fd) <= 0:
        return 0
    lingering = Lingering.__new__(Lingering)
    lingering.state = state
    lingering.fd = fcntl(fd, F_DUPFD_CLOEXEC, 0)
    if lingering.fd < 0:
        return 0  # no descriptor is left
    try:
        state.poller.watch(lingering, UVS_WATCHED | UVS_READ)
    except OSError:
        return 0
    shutdown(lingering.fd, SHUT_WR)
    lingering.quiet = now()
    lingering.until = lingering.quiet + UVS_LINGER
    # The timer is what keeps it alive.
    lingering.timer = state.loop.call_later(UVS_ASK, lingering._ask)
    return 0
