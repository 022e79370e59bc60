# Bytes that wait, in order: small ones copied, large ones where they are. It knows no sockets.

cimport cython
from cpython.object cimport PyObject

from uvsock._sink cimport BufferSink

cdef extern from "sys/uio.h":
    struct iovec:
        void* iov_base
        size_t iov_len

cdef enum:
    # Parts that one call of the kernel is given. Large as they are, it seldom takes so many.
    UVS_PARTS = 64


cdef struct Reference:
    PyObject* owner           # a bytes object, which nobody can change
    const char* p             # the part of it that still waits
    Py_ssize_t n
    Py_ssize_t before         # copied bytes that go before it, and behind the one before


@cython.final
cdef class Pieces:
    cdef Py_ssize_t size                  # bytes that wait
    cdef Pieces next_spare                # the chain of empty ones that a loop keeps
    cdef BufferSink _copies
    cdef Reference* _references           # owned; those that wait are [_first:_end]
    cdef Py_ssize_t _first
    cdef Py_ssize_t _end
    cdef Py_ssize_t _room
    cdef Py_ssize_t _behind               # copied bytes that go behind all references

    # Room at the end for n bytes that the caller puts there: n is above 0.
    cdef inline char* extend(self, Py_ssize_t n) except NULL:
        cdef char* end = self._copies.extend(n)
        self._behind += n
        self.size += n
        return end

    # Put at the end; n is above 0. p is in the owner, or that is None.
    cdef int add(self, const char* p, Py_ssize_t n, bytes owner) except -1
    # The first of them that are in one place, and how many those are: good until the next change.
    cdef Py_ssize_t head(self, const char** p) noexcept
    # The first of them for the kernel: how many bytes. `count` is how many of UVS_PARTS they take.
    cdef Py_ssize_t gather(self, iovec* parts, int* count) noexcept
    # Drop from the front; n is at most `size`.
    cdef void consume(self, Py_ssize_t n) noexcept
    # Of empty ones: give large memory back.
    cdef void trim(self) noexcept
    cdef int _reserve(self) except -1
