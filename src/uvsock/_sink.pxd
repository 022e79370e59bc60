# One contiguous, growing buffer of bytes. It knows nothing of sockets.

cimport cython
from cpython.bytearray cimport PyByteArray_AS_STRING, PyByteArray_GET_SIZE


cdef class BufferSink:
    cdef bytearray _store         # owned; its length is the capacity; None until the first byte
    cdef Py_ssize_t _start        # the content is _store[_start:_end]
    cdef Py_ssize_t _end
    cdef Py_ssize_t _mark         # the end of the content at the last flush that only counted
    cdef Py_ssize_t _hint         # capacity to begin with, and to keep when emptied
    cdef int _exports             # views of the content that somebody holds: it must not move
    cdef bint _stream
    cdef bint _as_bytes
    cdef bint _ended

    # Copy to the end; p must not point into this sink. BufferError if it has to grow while a view
    # is held. It does not look at whether the sink has ended.
    cdef int append(self, const char* p, Py_ssize_t n) except -1
    # The same for bytes that the caller puts there: n is above 0.
    @cython.final
    cdef inline char* extend(self, Py_ssize_t n) except NULL:
        cdef char* end
        if self._store is None or n > PyByteArray_GET_SIZE(self._store) - self._end:
            self._reserve(n)
        end = PyByteArray_AS_STRING(self._store) + self._end
        self._end += n
        return end

    # The first byte held: good until the next append, NULL before the first.
    @cython.final
    cdef inline char* head(self) noexcept:
        if self._store is None:
            return NULL
        return PyByteArray_AS_STRING(self._store) + self._start

    @cython.final
    cdef inline Py_ssize_t held(self) noexcept:
        return self._end - self._start

    # Drop from the front; n is at most held().
    cdef void consume(self, Py_ssize_t n) noexcept
    # Of an empty sink without views: give large memory back.
    cdef void trim(self) noexcept
    # Whether somebody holds a view: appending may raise.
    cdef bint exported(self) noexcept
    # Memory in front of the content, of bytes that were dropped.
    cdef Py_ssize_t consumed(self) noexcept
    # Of a new sink: the memory to begin with.
    cdef void expect(self, Py_ssize_t n) noexcept
    cdef int _reserve(self, Py_ssize_t n) except -1
    cdef int _check_exports(self, str what) except -1
    cdef object _take(self)
    cdef object _write_number(
        self, object value, Py_ssize_t width, object byteorder, object at
    )
    cdef object _write(self, const char* p, Py_ssize_t n)
    cdef object _write_from(self, object chunk)
