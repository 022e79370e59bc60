"""Bytes that wait in order, as one stream: of small ones copies, of large ones references."""

from cpython.mem cimport PyMem_Free, PyMem_Realloc
from cpython.ref cimport Py_DECREF, Py_INCREF
from libc.string cimport memcpy, memmove

from uvsock._sink cimport BufferSink

cdef enum:
    # Up to so many bytes are copied, which takes less time than to send a part more, and keeps no
    # large object for the little that is left of it.
    UVS_REFER_ABOVE = 16384
    # Bytes given to the kernel at once, but for what the last part has more: it takes less, and
    # some systems refuse a sum of 2 GiB.
    UVS_GATHER = 1 << 24
    # References that the first memory is for.
    UVS_REFERENCES = 8


cdef class Pieces:
    """Pieces()\n--\n
    Bytes that wait to be sent, or to be encrypted.

    The copies are in one sink. Each reference knows how many of them go before it.
    """

    def __cinit__(self):
        self._copies = BufferSink.__new__(BufferSink)

    def __dealloc__(self):
        while self._first < self._end:
            Py_DECREF(<object>self._references[self._first].owner)
            self._first += 1
        PyMem_Free(self._references)

    cdef int add(self, const char* p, Py_ssize_t n, bytes owner) except -1:
        cdef Reference* last
        if owner is None or n <= UVS_REFER_ABOVE:
            memcpy(self.extend(n), p, n)
            return 0
        if self._end == self._room:
            self._reserve()
        last = &self._references[self._end]
        Py_INCREF(owner)
        last.owner = <PyObject*>owner
        last.p = p
        last.n = n
        last.before = self._behind
        self._behind = 0
        self._end += 1
        self.size += n
        return 0

    cdef int _reserve(self) except -1:
        """Make room for one more reference."""
        cdef Py_ssize_t room
        cdef void* grown
        # As in a sink: moving is enough only where it frees as much as it moves.
        if self._first > self._room // 2:
            self._end -= self._first
            memmove(
                self._references, self._references + self._first, self._end * sizeof(Reference)
            )
            self._first = 0
            return 0
        room = max(2 * self._room, <Py_ssize_t>UVS_REFERENCES)
        grown = PyMem_Realloc(self._references, room * sizeof(Reference))
        if grown == NULL:
            raise MemoryError()
        self._references = <Reference*>grown
        self._room = room
        return 0

    cdef Py_ssize_t head(self, const char** p) noexcept:
        cdef Reference* first
        p[0] = self._copies.head()
        if self._first == self._end:
            return self._behind
        first = &self._references[self._first]
        if first.before:
            return first.before
        p[0] = first.p
        return first.n

    cdef Py_ssize_t gather(self, iovec* parts, int* count) noexcept:
        cdef const char* copies = self._copies.head()
        cdef Reference* reference
        cdef Py_ssize_t size = 0, i
        for i in range(self._first, self._end):
            if count[0] > UVS_PARTS - 2 or size > UVS_GATHER:
                return size
            reference = &self._references[i]
            size += put(parts, count, copies, reference.before)
            size += put(parts, count, reference.p, reference.n)
            copies += reference.before
        if count[0] < UVS_PARTS:
            size += put(parts, count, copies, self._behind)
        return size

    cdef void consume(self, Py_ssize_t n) noexcept:
        cdef Reference* first
        cdef Py_ssize_t step
        self.size -= n
        while self._first < self._end:
            first = &self._references[self._first]
            step = min(n, first.before)
            self._copies.consume(step)
            first.before -= step
            n -= step
            step = min(n, first.n)
            first.p += step
            first.n -= step
            n -= step
            if first.n:
                return
            Py_DECREF(<object>first.owner)
            self._first += 1
        self._copies.consume(n)
        self._behind -= n

    cdef void trim(self) noexcept:
        self._copies.trim()
        PyMem_Free(self._references)
        self._references = NULL
        self._first = self._end = self._room = 0


cdef inline Py_ssize_t put(iovec* parts, int* count, const char* p, Py_ssize_t n) noexcept:
    if n:
        parts[count[0]].iov_base = <void*>p
        parts[count[0]].iov_len = n
        count[0] += 1
    return n
