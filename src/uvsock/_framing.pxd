# Cutting a stream of bytes into frames. It knows nothing of sockets.
#
# A Framer is a description: never changed, and shared by all sockets of a listener. What one socket
# has received, and how far that was searched, is in its FrameReader.

cimport cython
from cpython.object cimport PyObject

from uvsock._sink cimport BufferSink


cdef enum:
    # Bytes of the longest prefix that a framer of the library writes: a Netstring's 20 digits.
    UVS_PREFIX_ROOM = 32


cdef enum Delivery:
    AS_BYTES, AS_BYTEARRAY, AS_MEMORYVIEW


cdef struct Cut:
    # How many bytes the last look at this frame saw; 0 at the first.
    Py_ssize_t searched
    # Of an unfinished frame: how many bytes there must be before another look is worth while; 0 if
    # any more may do.
    Py_ssize_t need
    # The frame is p[start:stop], and takes p[0:size] with all that belongs to it.
    Py_ssize_t start
    Py_ssize_t stop
    Py_ssize_t size
    # What p points into, and where: for framers written in Python, which get a view of it.
    PyObject* owner
    Py_ssize_t offset


cdef struct Envelope:
    # What goes before and behind the bytes of a frame on the wire.
    const char* prefix
    Py_ssize_t prefix_size
    const char* suffix
    Py_ssize_t suffix_size
    char room[UVS_PREFIX_ROOM]  # for a prefix made on the spot


cdef class Framer:
    cdef readonly Py_ssize_t max_length
    # The most bytes that a frame may take with all that belongs to it: what a peer can make a
    # socket keep. max_length, unless a framer counts in another way.
    cdef Py_ssize_t limit

    # Look for the end of the frame that begins at p, and fill in the cut: 1 if it is there, 0 if
    # the frame is unfinished (`need` may be set then). n is never 0. What it raises goes to the
    # socket's `error`, and closes the socket.
    cdef int cut(self, const char* p, Py_ssize_t n, Cut* cut) except -1
    # The same, checked, for a caller that has the bytes at p this far from the beginning of their
    # owner. Where it returns False, `searched` and `need` are set for the next look.
    @cython.final
    cdef inline bint look(
        self, PyObject* owner, const char* p, Py_ssize_t n, Py_ssize_t offset, Cut* cut
    ) except -1
    cdef bint _refuse(self, Py_ssize_t n, const Cut* cut) except -1
    cdef bint _unfinished(self, Py_ssize_t n, Cut* cut) except -1
    # What belongs around these n bytes. It returns what keeps the envelope's pointers alive.
    cdef object enclose(self, const char* p, Py_ssize_t n, Envelope* envelope)


@cython.final
cdef class Lines(Framer):
    cdef readonly bint keep_end


@cython.final
cdef class Delimited(Framer):
    cdef readonly bytes delimiter
    cdef readonly bint keep_end


@cython.final
cdef class LengthPrefixed(Framer):
    cdef readonly object size
    cdef readonly str byteorder
    cdef readonly bint include_prefix
    cdef readonly bint length_includes_prefix
    cdef Py_ssize_t _width                # of the prefix, 0 for a varint
    cdef bint _little


@cython.final
cdef class FixedSize(Framer):
    cdef readonly Py_ssize_t size


@cython.final
cdef class Netstring(Framer):
    pass


@cython.final
cdef class FrameReader:
    cdef readonly Framer framer           # None: all that is there is one frame
    # Kept of earlier chunks, from the first byte of a frame; None when empty. While there is one,
    # the part of the chunk before the position is at its end.
    cdef BufferSink _tail
    # The chunk that is being cut, where it is: its owner exports these bytes. None after `leave`.
    cdef object _owner
    cdef const char* _chunk
    cdef Py_ssize_t _size
    cdef Py_ssize_t _position
    cdef Cut _cut
    cdef Py_ssize_t _dropped
    cdef bint more                        # there may be a whole frame among what is held
    cdef bint failed                      # what comes is no frame: all of it is dropped

    # In this order: feed, next until None or until the caller stops, leave.
    cdef int feed(self, object owner, const char* p, Py_ssize_t n) except -1
    cdef object next(self, Delivery delivery)
    cdef int leave(self) except -1

    cdef Py_ssize_t held(self) noexcept   # bytes not handed out, and those dropped
    cdef int change(self, Framer framer) except -1
    cdef bytes take(self)                 # all that is held
    cdef int drop(self) except -1
    cdef int fail(self) except -1

    cdef inline bint _find(
        self, PyObject* owner, const char* p, Py_ssize_t n, Py_ssize_t offset
    ) except -1
    cdef inline object _make(
        self, object owner, const char* p, Py_ssize_t offset, Delivery delivery
    )
    cdef object _next_kept(self, Delivery delivery)
    cdef int _forget(self) except -1
    cdef int _keep(self, Py_ssize_t n) except -1
