# What users hold: the Socket, and the Group of those that share a table of handlers.

cimport cython

from uvsock._framing cimport Framer
from uvsock._handlers cimport Handlers
from uvsock._stream cimport Stream, StreamGroup


cdef class Group(StreamGroup):
    cdef public Handlers handlers       # assigning it is the hot reload
    cdef readonly object listener       # None for an outgoing connection
    cdef public object data
    cdef public object data_factory
    cdef public Framer framing          # what its sockets begin with, or None


@cython.final
cdef class AsyncHandler:
    # The async handler that a socket runs, and the events that come after it.
    cdef object task
    cdef int event
    cdef object borrowed          # the memoryview that it was given, or None
    cdef list queue               # of (event, argument)
    cdef bint closes              # when it has returned: it is the error handler of `open`


cdef class Socket(Stream):
    cdef public object data
    cdef object __weakref__
    cdef Handlers _own            # after upgrade_tls(handlers=); else the group's table is used
    cdef AsyncHandler _running    # None while no event waits for another
    # Futures as keys in order, by what they wait for: "connected", "opened" (`open` has returned),
    # "upgraded", "closed", "turn" (at send_all). None before the first.
    cdef dict _waiters
    cdef bint _over               # the close event is over

    # write() and write_frame() for compiled code: they return and raise the same. What p points to
    # need not live on.
    cdef Py_ssize_t write_memory(self, const char* p, Py_ssize_t n) except -2
    cdef Py_ssize_t write_frame_memory(self, const char* p, Py_ssize_t n) except -2

    @cython.final
    cdef Handlers table(self)
    cdef int _emit(self, int event, object argument) except -1
    cdef int _call(self, int event, object argument) except -1
    cdef int _check_slow(self, double begun, Handlers table, int event) except -1
    cdef int _warn_of_short_write(self) except -1
    @cython.final
    cdef int _start(self, int event, object awaitable) except -1
    cdef int _done(self, AsyncHandler running) except -1
    @cython.final
    cdef int _returned(self, int event, object failure, bint absent) except -1
    @cython.final
    cdef int _raised(self, int event, object failure) except -1
    cdef int _report(self, object failure, object handler) except -1
    cdef int _run_queue(self) except -1
    cdef object _reason(self)
    cdef object _session(self)
    cdef object _end(self, str name)
    cdef object _wait_for(self, str what)
    cdef int _stop_waiting(self, str what, object waiter) except -1
    cdef int _tell(self, str what, object error) except -1
    @cython.final
    cdef inline Py_ssize_t _write_checked(
        self, const char* p, Py_ssize_t n, bint whole, bytes owner
    ) except -2
    cdef Py_ssize_t _write_frame_from(self, object data) except -2
    @cython.final
    cdef Py_ssize_t _write_from(
        self, object data, object offset, object length, bint whole
    ) except -2
    cdef Py_ssize_t _write_piece(self, const char* p, Py_ssize_t n) except -1
