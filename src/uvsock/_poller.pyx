"""Which of a loop's connections can be read or written, by one descriptor that holds them all."""

import contextvars
import os

cimport cython
from cpython.contextvars cimport PyContext_Enter, PyContext_Exit
from libc.errno cimport errno
from posix.unistd cimport close as close_descriptor

cdef extern from "_poller.h":
    ctypedef struct uvs_ready:
        pass
    int uvs_poller_open() noexcept
    int uvs_poller_set(int poller, int fd, int before, int what, void* who) noexcept
    int uvs_poller_take(int poller, uvs_ready* ready) noexcept


cdef class Watched:
    cdef int on_ready(self, int what) except -1:
        # To do nothing would be to be called again, for ever.
        raise TypeError(f"{type(self).__name__} does not define on_ready()")

    cdef int on_ready_raised(self, object error) except -1:
        raise error


@cython.final
cdef class Poller:
    """The connections of one loop that are read and written by uvsock; made with the first."""

    def __cinit__(self, object loop):
        self.loop = loop
        self.fd = uvs_poller_open()
        if self.fd < 0:
            raise OSError(errno, os.strerror(errno))
        # In a context of its own: add_reader would keep that of whoever comes first.
        contextvars.Context().run(loop.add_reader, self.fd, self._on_ready)

    def __dealloc__(self):
        if self.fd >= 0:
            close_descriptor(self.fd)

    cdef int close(self) except -1:
        """Before the loop closes: nothing is watched any more."""
        if self.fd >= 0:
            if not self.loop.is_closed():
                self.loop.remove_reader(self.fd)
            close_descriptor(self.fd)
            self.fd = -1
        return 0

    cdef int watch(self, Watched who, int what) except -1:
        cdef int i
        if what == who.watching or self.fd < 0:
            return 0
        if uvs_poller_set(self.fd, who.fd, who.watching, what, <void*>who) < 0 and what:
            raise OSError(errno, os.strerror(errno))
        if who.watching == 0:
            self.watched += 1
            self.only = <void*>who
        elif what == 0:
            self.watched -= 1
            self.only = NULL  # who is left is not known
            for i in range(self.next, self.count):
                if self.batch[i].who == <void*>who:
                    self.batch[i].who = NULL
        who.watching = what
        return 0

    cdef int enter(self, object context) except -1:
        if self.entered is context:
            return 0
        self.leave()
        PyContext_Enter(context)
        self.entered = context
        return 0

    cdef int leave(self) except -1:
        entered = self.entered
        if entered is not None:
            self.entered = None
            PyContext_Exit(entered)
        return 0

    def _on_ready(self):
        cdef Watched who
        cdef int what
        if (
            self.watched == 1 and self.only != NULL
            and (<Watched>self.only).watching == UVS_WATCHED | UVS_READ
        ):
            # Then it is the one, and reading tells the rest.
            self.batch[0].who = self.only
            self.batch[0].what = UVS_READ
            self.count = 1
        else:
            self.count = uvs_poller_take(self.fd, <uvs_ready*>self.batch)
        self.next = 0
        try:
            while self.next < self.count:
                if self.batch[self.next].who == NULL:
                    self.next += 1  # closed by a handler of this batch
                    continue
                who = <Watched>self.batch[self.next].who
                what = self.batch[self.next].what
                self.next += 1
                try:
                    who.on_ready(what)
                except BaseException as error:
                    who.on_ready_raised(error)
        finally:
            self.count = self.next = 0
            self.leave()
