"""Framers, which say where the messages in a stream of bytes begin and end."""

import errno
import sys

cimport cython
from cpython.bytearray cimport PyByteArray_FromStringAndSize
from cpython.bytes cimport (
    PyBytes_AS_STRING, PyBytes_CheckExact, PyBytes_FromStringAndSize, PyBytes_GET_SIZE,
)
from cpython.memoryview cimport PyMemoryView_FromObject
from cpython.object cimport PyObject
from cpython.sequence cimport PySequence_GetSlice
from libc.stdio cimport snprintf
from libc.string cimport memchr, memcmp, memset

from uvsock._given cimport BUFFERS, Given, acquire, release
from uvsock._packing cimport UVS_VARINT_MAX, get_number, get_varint, put_number, put_varint
from uvsock._sink cimport BufferSink

from uvsock._errors import FrameError, FrameTooLargeError
from uvsock._options import check_flag, check_int, check_one_of, wrong_type, wrong_value

cdef extern from "string.h":
    # In glibc, musl, macOS and the BSDs.
    void* memmem(const void* p, size_t n, const void* part, size_t part_size) noexcept

cdef enum:
    # Memory taken at once for a frame whose length is known. More than that is only taken as it
    # comes: a peer must not make the library take memory by announcing large frames.
    UVS_FRAME_AHEAD = (1 << 20) + UVS_PREFIX_ROOM
    # The least that is copied to find the end of an unfinished frame: fewer looks at short ones.
    UVS_FILL = 512
    # Memory of frames already delivered that may stay in front of an unfinished one.
    UVS_SLACK = 4096

# So that a frame with all that belongs to it can still be counted.
cdef Py_ssize_t UVS_MAX_LENGTH = sys.maxsize - 2 * UVS_PREFIX_ROOM

cdef tuple BYTE_ORDERS = ("big", "little")
cdef tuple PREFIX_SIZES = (1, 2, 4, 8, "varint")


cdef object _too_large(Framer framer):
    return FrameTooLargeError(
        errno.EMSGSIZE, f"a frame is longer than max_length ({framer.max_length} bytes)"
    )


cdef object _malformed(str what):
    return FrameError(errno.EBADMSG, what)


cdef Py_ssize_t _check_length(object max_length) except -1:
    return check_int("max_length", max_length, 1, UVS_MAX_LENGTH)


def _restored(kind, max_length):
    """A framer of a subclass, without its ``__init__``: its attributes follow."""
    cdef Framer framer = kind.__new__(kind)
    framer.max_length = framer.limit = max_length
    return framer


cdef class Framer:
    """Framer(max_length=65536)\n--\n
    Says where frames end. Derive from it for a protocol that the library has no framer for.

    A framer is never changed, and may be shared by any number of sockets: it keeps nothing of what
    they receive. Override ``find``, and ``wrap`` if frames are to be written too.

    Args:
        max_length: the most bytes that a frame may have. A framer of your own counts all that
            belongs to a frame, the others what is between prefix and delimiter.
    """

    # Also where a subclass forgets to call __init__: without a limit, a peer could fill the memory.
    def __cinit__(self, *args, **kwargs):
        self.max_length = self.limit = 65536

    def __init__(self, max_length=65536):
        self.max_length = self.limit = _check_length(max_length)

    def __eq__(self, other):
        if type(self) is not type(other) or type(self) not in OWN:
            return NotImplemented  # a subclass says itself what makes two of it equal
        return self.__reduce__() == other.__reduce__()

    def __hash__(self):
        return hash(self.__reduce__()) if type(self) in OWN else object.__hash__(self)

    def __reduce__(self):
        if type(self) is Framer:
            return Framer, (self.max_length,)
        try:
            # Written in Python: what it has of its own is in there.
            attributes = self.__dict__
        except AttributeError:
            raise TypeError(
                f"cannot pickle {type(self).__name__!r} object: it has no __reduce__()"
            ) from None
        return _restored, (type(self), self.max_length), attributes

    def find(self, data, searched=0):
        """Look for the end of the frame that ``data`` begins with.

        Args:
            data: all that was received from the first byte of the frame on. A ``memoryview`` that
                is released when ``find`` returns; for a framer of the library any buffer.
            searched: the number of bytes that the last call for this frame was given: 0 in the
                first. With it a search can go on where it stopped.

        Returns:
            For a whole frame ``(start, stop, size)``: the frame is ``data[start:stop]``, and
            ``data[:size]`` is what it takes with all that belongs to it. Else the number of bytes
            that there must be before it is worth while to ask again, or None if any more may do.

        Raises:
            FrameError: no frame can begin like this. Whatever is raised goes to ``error``, and the
                socket is closed.
            ValueError: ``searched`` is more than there is, or negative.
        """
        cdef Given given
        cdef Cut cut
        cdef int found
        memset(&cut, 0, sizeof(cut))
        cut.owner = <PyObject*>data
        acquire(data, BUFFERS, "data", &given)
        try:
            cut.searched = check_int("searched", searched, 0, given.n)
            found = self.cut(given.p, given.n, &cut)
        finally:
            release(&given)
        if found:
            return cut.start, cut.stop, cut.size
        return cut.need or None

    def wrap(self, data):
        """What belongs around a frame on the wire, for ``write_frame``.

        Args:
            data: the bytes of the frame.

        Returns:
            Two ``bytes``: what goes before the frame, and what goes behind it.

        Raises:
            ValueError: the frame cannot be written.
        """
        cdef Given given
        cdef Envelope envelope
        memset(&envelope, 0, sizeof(envelope))
        acquire(data, BUFFERS, "data", &given)
        try:
            _owner = self.enclose(given.p, given.n, &envelope)
        finally:
            release(&given)
        return (
            PyBytes_FromStringAndSize(envelope.prefix, envelope.prefix_size),
            PyBytes_FromStringAndSize(envelope.suffix, envelope.suffix_size),
        )

    cdef int cut(self, const char* p, Py_ssize_t n, Cut* cut) except -1:
        if type(self).find is Framer.find:
            raise NotImplementedError(f"{type(self).__name__} has no find()")
        whole = PyMemoryView_FromObject(<object>cut.owner)
        view = PySequence_GetSlice(whole, cut.offset, cut.offset + n)
        whole.release()
        try:
            found = self.find(view, cut.searched)
        finally:
            try:
                view.release()
            except BufferError:
                pass  # something is built on it: its memory stays as it is
        if found is None:
            return 0
        if isinstance(found, int):
            cut.need = found
            return 0
        cut.start, cut.stop, cut.size = found
        return 1

    cdef inline bint look(
        self, PyObject* owner, const char* p, Py_ssize_t n, Py_ssize_t offset, Cut* cut
    ) except -1:
        cut.owner = owner
        cut.offset = offset
        cut.need = 0
        if not self.cut(p, n, cut):
            return self._unfinished(n, cut)
        if 0 <= cut.start <= cut.stop <= cut.size <= n and 0 < cut.size <= self.limit:
            return True
        return self._refuse(n, cut)

    cdef bint _refuse(self, Py_ssize_t n, const Cut* cut) except -1:
        if 0 <= cut.start <= cut.stop <= cut.size <= n and cut.size:
            raise _too_large(self)
        raise ValueError(
            f"{self!r} found a frame [{cut.start}:{cut.stop}] of {cut.size} bytes in {n} bytes"
        )

    cdef bint _unfinished(self, Py_ssize_t n, Cut* cut) except -1:
        if n > self.limit or cut.need > self.limit:
            raise _too_large(self)
        cut.searched = n
        if cut.need <= n:
            cut.need = 0
        return False

    cdef object enclose(self, const char* p, Py_ssize_t n, Envelope* envelope):
        if type(self).wrap is Framer.wrap:
            raise NotImplementedError(f"{type(self).__name__} has no wrap()")
        prefix, suffix = self.wrap(PyBytes_FromStringAndSize(p, n))
        if not PyBytes_CheckExact(prefix) or not PyBytes_CheckExact(suffix):
            raise TypeError(f"{type(self).__name__}.wrap() must return two bytes objects")
        envelope.prefix = PyBytes_AS_STRING(prefix)
        envelope.prefix_size = PyBytes_GET_SIZE(prefix)
        envelope.suffix = PyBytes_AS_STRING(suffix)
        envelope.suffix_size = PyBytes_GET_SIZE(suffix)
        return prefix, suffix


@cython.final
cdef class Lines(Framer):
    """Lines(keep_end=False, max_length=65536)\n--\n
    Lines that end with a line feed; a carriage return before it belongs to the end.

    ``write_frame`` ends a line with a line feed. Give it a line that ends with a carriage return
    where the peer wants both.

    Args:
        keep_end: deliver lines with their ends, as they came.
        max_length: the most bytes that a line may have, not counting its end.
    """

    def __init__(self, keep_end=False, max_length=65536):
        self.keep_end = check_flag("keep_end", keep_end)
        self.max_length = _check_length(max_length)
        self.limit = self.max_length + 2

    def __reduce__(self):
        return Lines, (bool(self.keep_end), self.max_length)

    def __repr__(self):
        return f"Lines(keep_end={bool(self.keep_end)}, max_length={self.max_length})"

    cdef int cut(self, const char* p, Py_ssize_t n, Cut* cut) except -1:
        cdef const char* end = <const char*>memchr(p + cut.searched, c"\n", n - cut.searched)
        cdef Py_ssize_t length
        if end == NULL:
            return 0
        length = cut.stop = end - p
        cut.size = length + 1
        if length and p[length - 1] == c"\r":
            length -= 1
        if length > self.max_length:
            raise _too_large(self)
        cut.start = 0
        cut.stop = cut.size if self.keep_end else length
        return 1

    cdef object enclose(self, const char* p, Py_ssize_t n, Envelope* envelope):
        if n and memchr(p, c"\n", n) != NULL:
            raise ValueError("data: must not contain a line feed")
        envelope.suffix = b"\n"
        envelope.suffix_size = 1


@cython.final
cdef class Delimited(Framer):
    """Delimited(delimiter, keep_end=False, max_length=65536)\n--\n
    Frames that end with a delimiter of one or more bytes.

    Args:
        delimiter: ``bytes``, or a buffer that is copied.
        keep_end: deliver frames with their delimiter.
        max_length: the most bytes that a frame may have, not counting the delimiter.
    """

    def __init__(self, delimiter, keep_end=False, max_length=65536):
        if not isinstance(delimiter, (bytes, bytearray, memoryview)):
            raise wrong_type("delimiter", "a bytes-like object", delimiter)
        if not len(delimiter):
            raise wrong_value("delimiter", "at least one byte", delimiter)
        self.delimiter = bytes(delimiter)
        self.keep_end = check_flag("keep_end", keep_end)
        self.max_length = _check_length(max_length)
        self.limit = self.max_length + len(self.delimiter)

    def __reduce__(self):
        return Delimited, (self.delimiter, bool(self.keep_end), self.max_length)

    def __repr__(self):
        return (
            f"Delimited({self.delimiter!r}, keep_end={bool(self.keep_end)}, "
            f"max_length={self.max_length})"
        )

    cdef int cut(self, const char* p, Py_ssize_t n, Cut* cut) except -1:
        cdef Py_ssize_t width = PyBytes_GET_SIZE(self.delimiter), length
        # The delimiter may have begun in bytes that were seen before.
        cdef Py_ssize_t start = max(cut.searched - width + 1, <Py_ssize_t>0)
        cdef const char* end = <const char*>memmem(
            p + start, n - start, PyBytes_AS_STRING(self.delimiter), width
        )
        if end == NULL:
            return 0
        length = end - p
        if length > self.max_length:
            raise _too_large(self)
        cut.start = 0
        cut.size = length + width
        cut.stop = cut.size if self.keep_end else length
        return 1

    cdef object enclose(self, const char* p, Py_ssize_t n, Envelope* envelope):
        cdef const char* delimiter = PyBytes_AS_STRING(self.delimiter)
        cdef Py_ssize_t width = PyBytes_GET_SIZE(self.delimiter), k
        if n and memmem(p, n, delimiter, width) != NULL:
            raise ValueError(f"data: must not contain the delimiter {self.delimiter!r}")
        # Nor may a delimiter begin in the data and end in the one behind it: "a\r" before "\r\r".
        for k in range(1, min(n, width - 1) + 1):
            if (
                memcmp(p + n - k, delimiter, k) == 0
                and memcmp(delimiter + k, delimiter, width - k) == 0
            ):
                raise ValueError(
                    f"data: must not end with the beginning of the delimiter {self.delimiter!r}"
                )
        envelope.suffix = delimiter
        envelope.suffix_size = width
        return self.delimiter


@cython.final
cdef class LengthPrefixed(Framer):
    """LengthPrefixed(size=4, byteorder='big', include_prefix=False, max_length=16777216,\
    length_includes_prefix=False)\n--\n
    Frames that follow their length.

    Args:
        size: bytes of the length, an unsigned number: 1, 2, 4 or 8, or ``"varint"`` for seven bits
            per byte, the lowest first, as Protocol Buffers have it.
        byteorder: ``"big"`` or ``"little"``; a varint has none.
        include_prefix: deliver frames with their length in front.
        max_length: the most bytes that a frame may have, not counting its length.
        length_includes_prefix: the length counts its own bytes too.
    """

    def __init__(
        self, size=4, byteorder="big", include_prefix=False, max_length=16777216,
        length_includes_prefix=False,
    ):
        what = "1, 2, 4, 8 or 'varint'"
        if isinstance(size, bool) or not isinstance(size, (int, str)):
            raise wrong_type("size", what, size)
        if size not in PREFIX_SIZES:
            raise wrong_value("size", what, size)
        self.size = size
        self._width = 0 if size == "varint" else size
        self.byteorder = check_one_of("byteorder", byteorder, BYTE_ORDERS)
        self._little = self.byteorder == "little"
        self.include_prefix = check_flag("include_prefix", include_prefix)
        self.max_length = _check_length(max_length)
        self.length_includes_prefix = check_flag("length_includes_prefix", length_includes_prefix)
        self.limit = self.max_length + UVS_VARINT_MAX

    def __reduce__(self):
        return LengthPrefixed, (
            self.size, self.byteorder, bool(self.include_prefix), self.max_length,
            bool(self.length_includes_prefix),
        )

    def __repr__(self):
        return (
            f"LengthPrefixed(size={self.size!r}, byteorder={self.byteorder!r}, "
            f"include_prefix={bool(self.include_prefix)}, max_length={self.max_length}, "
            f"length_includes_prefix={bool(self.length_includes_prefix)})"
        )

    cdef int cut(self, const char* p, Py_ssize_t n, Cut* cut) except -1:
        cdef unsigned long long length = 0
        cdef Py_ssize_t width = self._width
        if width:
            if n < width:
                cut.need = width
                return 0
            length = get_number(p, width, self._little)
        else:
            width = get_varint(p, n, &length)
            if width < 0:
                raise _malformed("a varint of more than 64 bits")
            if width == 0:
                cut.need = n + 1
                return 0
        if self.length_includes_prefix:
            if length < <unsigned long long>width:
                raise _malformed("a length that is shorter than its own bytes")
            length -= width
        if length > <unsigned long long>self.max_length:
            raise _too_large(self)
        cut.start = 0 if self.include_prefix else width
        cut.stop = cut.size = width + <Py_ssize_t>length
        if n < cut.size:
            cut.need = cut.size
            return 0
        return 1

    cdef object enclose(self, const char* p, Py_ssize_t n, Envelope* envelope):
        cdef unsigned long long length = n
        cdef Py_ssize_t width = self._width
        if width == 0:
            width = put_varint(envelope.room, length)
            if self.length_includes_prefix:
                # With its own bytes the number may need one more.
                width = put_varint(envelope.room, length + width)
                width = put_varint(envelope.room, length + width)
        else:
            if self.length_includes_prefix:
                length += width
            if width < 8 and length >> (8 * width):
                raise ValueError(f"data: must be shorter for a length of {width} bytes, not {n}")
            put_number(envelope.room, length, width, self._little)
        envelope.prefix = envelope.room
        envelope.prefix_size = width


@cython.final
cdef class FixedSize(Framer):
    """FixedSize(size)\n--\n
    Frames of one size.

    Args:
        size: bytes of each frame, at least 1.
    """

    def __init__(self, size):
        self.size = self.max_length = self.limit = check_int("size", size, 1, UVS_MAX_LENGTH)

    def __reduce__(self):
        return FixedSize, (self.size,)

    def __repr__(self):
        return f"FixedSize({self.size})"

    cdef int cut(self, const char* p, Py_ssize_t n, Cut* cut) except -1:
        if n < self.size:
            cut.need = self.size
            return 0
        cut.start = 0
        cut.stop = cut.size = self.size
        return 1

    cdef object enclose(self, const char* p, Py_ssize_t n, Envelope* envelope):
        if n != self.size:
            raise ValueError(f"data: must be {self.size} bytes, not {n}")


@cython.final
cdef class Netstring(Framer):
    """Netstring(max_length=16777216)\n--\n
    Netstrings: ``5:hello,``.

    Args:
        max_length: the most bytes that a string may have.
    """

    def __init__(self, max_length=16777216):
        self.max_length = _check_length(max_length)
        self.limit = self.max_length + UVS_PREFIX_ROOM

    def __reduce__(self):
        return Netstring, (self.max_length,)

    def __repr__(self):
        return f"Netstring(max_length={self.max_length})"

    cdef int cut(self, const char* p, Py_ssize_t n, Cut* cut) except -1:
        cdef Py_ssize_t length = 0, i = 0
        while i < n and c"0" <= p[i] <= c"9":
            if i and length == 0:
                raise _malformed("the length of a netstring begins with a zero")
            if length > self.max_length // 10:  # before it overflows
                raise _too_large(self)
            length = length * 10 + (p[i] - c"0")
            if length > self.max_length:
                raise _too_large(self)
            i += 1
        if i == n:
            cut.need = n + 1
            return 0
        if i == 0 or p[i] != c":":
            raise _malformed("a netstring begins with its length and a colon")
        cut.start = i + 1
        cut.stop = cut.start + length
        cut.size = cut.stop + 1
        if n < cut.size:
            cut.need = cut.size
            return 0
        if p[cut.stop] != c",":
            raise _malformed("a netstring ends with a comma")
        return 1

    cdef object enclose(self, const char* p, Py_ssize_t n, Envelope* envelope):
        envelope.prefix = envelope.room
        envelope.prefix_size = snprintf(envelope.room, UVS_PREFIX_ROOM, "%zd:", n)
        envelope.suffix = b","
        envelope.suffix_size = 1


# Whose arguments say all.
cdef frozenset OWN = frozenset({Framer, Lines, Delimited, LengthPrefixed, FixedSize, Netstring})


def as_framer(value):
    """The ``framing`` option: a ``Framer``, or None for none.

    Raises:
        TypeError: it is neither.
    """
    if value is not None and not isinstance(value, Framer):
        raise wrong_type("framing", "a Framer, such as Lines(), or None", value)
    return value


@cython.final
cdef class FrameReader:
    """What one stream has received that is not delivered yet, cut into frames on request."""

    def __init__(self, framer):
        self.framer = as_framer(framer)

    def split(self, data, binary_type="bytes"):
        """The frames that are whole with these bytes. For tests, and bytes from elsewhere."""
        cdef Given given
        cdef list frames = []
        kind = check_one_of("binary_type", binary_type, ("bytes", "bytearray", "memoryview"))
        cdef Delivery delivery = {
            "bytes": AS_BYTES, "bytearray": AS_BYTEARRAY, "memoryview": AS_MEMORYVIEW,
        }[kind]
        acquire(data, BUFFERS, "data", &given)
        try:
            self.feed(data, given.p, given.n)
            while True:
                frame = self.next(delivery)
                if frame is None:
                    return frames
                frames.append(frame)
        finally:
            self.leave()
            release(&given)

    def __len__(self):
        return self.held()

    cdef int feed(self, object owner, const char* p, Py_ssize_t n) except -1:
        if self.failed or n == 0:
            return 0
        self._owner = owner
        self._chunk = p
        self._size = n
        self._position = 0
        self.more = True
        return 0

    cdef object next(self, Delivery delivery):
        """The next whole frame, or None."""
        cdef const char* p = self._chunk + self._position
        cdef Py_ssize_t n = self._size - self._position
        if not self.more:
            return None
        if self._tail is not None:
            return self._next_kept(delivery)
        if n == 0 or not self._find(<PyObject*>self._owner, p, n, self._position):
            self.more = False
            return None
        frame = self._make(self._owner, p, self._position, delivery)
        self._position += self._cut.size
        self._cut.searched = self._cut.need = 0
        return frame

    cdef object _next_kept(self, Delivery delivery):
        """The same for a frame that began in an earlier chunk."""
        cdef BufferSink tail = self._tail
        cdef Py_ssize_t n = self._size - self._position, wanted
        while (
            tail.held() < self._cut.need or tail.held() == self._cut.searched
            or not self._find(<PyObject*>tail, tail.head(), tail.held(), 0)
        ):
            if n == 0:
                self.more = False
                return None
            # No more than the frame lacks. Where that is not known, as much again as there is.
            if self._cut.need:
                wanted = self._cut.need - tail.held()
            else:
                wanted = max(tail.held(), <Py_ssize_t>UVS_FILL)
            self._keep(min(n, wanted))
            tail = self._tail
            n = self._size - self._position
        frame = self._make(tail, tail.head(), 0, delivery)
        tail.consume(self._cut.size)
        # What was too much is cut where it came from.
        if tail.held() <= self._position:
            self._position -= tail.held()
            self._tail = None
        self._cut.searched = self._cut.need = 0
        return frame

    cdef int leave(self) except -1:
        """The chunk's memory goes: keep what is left of it."""
        cdef BufferSink tail
        if self._position < self._size:
            self._keep(self._size - self._position)
        tail = self._tail
        if tail is not None and tail.consumed() > max(tail.held(), <Py_ssize_t>UVS_SLACK):
            # A few bytes must not hold the memory of all that came before them.
            self._tail = BufferSink.__new__(BufferSink)
            self._tail.append(tail.head(), tail.held())
        self._owner = None
        self._chunk = NULL
        self._size = self._position = 0
        return 0

    cdef inline bint _find(
        self, PyObject* owner, const char* p, Py_ssize_t n, Py_ssize_t offset
    ) except -1:
        cdef Cut* cut = &self._cut
        if self.framer is None:
            cut.start = 0
            cut.stop = cut.size = n
            return True
        return self.framer.look(owner, p, n, offset, cut)

    cdef inline object _make(
        self, object owner, const char* p, Py_ssize_t offset, Delivery delivery
    ):
        """The frame that was found at p, which is this far from the beginning of its owner."""
        cdef Py_ssize_t start = self._cut.start, length = self._cut.stop - start
        if delivery == AS_BYTES:
            if PyBytes_CheckExact(owner) and length == PyBytes_GET_SIZE(owner):
                return owner
            return PyBytes_FromStringAndSize(p + start, length)
        if delivery == AS_BYTEARRAY:
            return PyByteArray_FromStringAndSize(p + start, length)
        start += offset
        return PySequence_GetSlice(PyMemoryView_FromObject(owner), start, start + length)

    cdef int _keep(self, Py_ssize_t n) except -1:
        """Move the next n bytes of the chunk to the tail."""
        cdef BufferSink old = self._tail
        if old is None or old.exported():
            # Somebody holds a view of the old one: that memory is theirs now.
            self._tail = BufferSink.__new__(BufferSink)
            self._tail.expect(min(self._cut.need, <Py_ssize_t>UVS_FRAME_AHEAD))
            if old is not None:
                self._tail.append(old.head(), old.held())
        self._tail.append(self._chunk + self._position, n)
        self._position += n
        return 0

    cdef Py_ssize_t held(self) noexcept:
        cdef Py_ssize_t kept = 0 if self._tail is None else self._tail.held()
        return kept + self._size - self._position + self._dropped

    cdef int change(self, Framer framer) except -1:
        """Have another framer cut what is held."""
        self.framer = framer
        self._cut.searched = self._cut.need = 0
        self.more = not self.failed and self.held() > self._dropped
        return 0

    cdef bytes take(self):
        """All that is held, to be cut no more."""
        cdef bytes rest = PyBytes_FromStringAndSize(
            self._chunk + self._position, self._size - self._position
        )
        if self._tail is not None:
            rest = PyBytes_FromStringAndSize(self._tail.head(), self._tail.held()) + rest
        self._forget()
        return rest

    cdef int drop(self) except -1:
        """Forget all that is held, except how much it was."""
        self._dropped = self.held()
        return self._forget()

    cdef int fail(self) except -1:
        """What is held is no frame, and what follows cannot be one."""
        self.failed = True
        return self.drop()

    cdef int _forget(self) except -1:
        self._tail = None
        self._position = self._size
        self._cut.searched = self._cut.need = 0
        self.more = False
        return 0
