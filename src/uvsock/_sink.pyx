"""A contiguous buffer that collects small writes and hands them over without a copy."""

import sys

from cpython.buffer cimport PyBuffer_FillInfo
from cpython.bytearray cimport (
    PyByteArray_AS_STRING, PyByteArray_FromStringAndSize, PyByteArray_GET_SIZE, PyByteArray_Resize,
)
from cpython.bytes cimport (
    PyBytes_AS_STRING, PyBytes_CheckExact, PyBytes_FromStringAndSize, PyBytes_GET_SIZE,
)
from cpython.long cimport PyLong_CheckExact
from libc.string cimport memcpy, memmove, memset

from uvsock._given cimport TEXT, Given, acquire, release
from uvsock._packing cimport UVS_VARINT_MAX, put_number, put_varint

from uvsock._options import check_flag, check_int, check_one_of, wrong_type, wrong_value

cdef enum:
    # Bytes of the first memory taken. Smaller ones would be outgrown after a few writes.
    UVS_SINK_FIRST = 512
    # Bytes of memory that an empty sink keeps. More would add up over many idle connections.
    UVS_SINK_KEEP = 16384
    # Bytes that high_water_mark can ask for in advance: a hint must not become a MemoryError.
    UVS_SINK_AHEAD = 1 << 26


cdef unsigned long long UVS_MAX_NUMBER = 0xFFFFFFFFFFFFFFFF
cdef str BIG = "big"
cdef str LITTLE = "little"


cdef int _release(view) except -1:
    """Release a view; 0 if somebody still holds a buffer of it, which then keeps it exported."""
    try:
        view.release()
    except BufferError:
        return 0
    return 1


cdef object _ended():
    return ValueError("the sink has ended: start() it again before writing")


cdef unsigned long long _number(object value, Py_ssize_t width) except? 0:
    """A number of at most this many bytes."""
    cdef unsigned long long limit = UVS_MAX_NUMBER >> (64 - 8 * width), number
    if PyLong_CheckExact(value):
        try:
            number = value
        except OverflowError:
            number = check_int("value", value, 0, limit)
        if number <= limit:
            return number
    return check_int("value", value, 0, limit)


cdef class BufferSink:
    """BufferSink()\n--\n
    Collects bytes in one contiguous ``bytearray`` (Bun's ``ArrayBufferSink``).

    A new sink is started with the defaults of ``start``. ``len(sink)`` is the number of bytes held.

    The buffer protocol (``memoryview(sink)``) shows the content without a copy, read-only. While
    such a view is held the memory stays where it is: a ``write`` that would have to grow it, and
    ``flush``, ``flush_to``, ``end`` and ``start``, raise ``BufferError`` and change nothing. A view
    shows the content as it was when the view was taken.
    """

    # Without it, arguments would be ignored.
    def __init__(self):
        return

    cdef int append(self, const char* p, Py_ssize_t n) except -1:
        if n:
            memcpy(self.extend(n), p, n)
        return 0

    cdef void consume(self, Py_ssize_t n) noexcept:
        self._start += n
        # Not under a view: the next write would change the bytes that it shows.
        if self._start == self._end and self._exports == 0:
            self._start = self._end = self._mark = 0

    cdef void trim(self) noexcept:
        if self._start != self._end or self._exports:
            return
        self._start = self._end = self._mark = 0
        if self._store is not None:
            if PyByteArray_GET_SIZE(self._store) > max(<Py_ssize_t>UVS_SINK_KEEP, self._hint):
                self._store = None

    cdef bint exported(self) noexcept:
        return self._exports > 0

    cdef Py_ssize_t consumed(self) noexcept:
        return self._start

    cdef void expect(self, Py_ssize_t n) noexcept:
        self._hint = n

    cdef int _reserve(self, Py_ssize_t n) except -1:
        """Make room for n more bytes at the end."""
        cdef Py_ssize_t held = self._end - self._start, capacity
        self._check_exports("grow")
        if self._store is None:
            capacity = max(n, self._hint, <Py_ssize_t>UVS_SINK_FIRST)
            self._store = PyByteArray_FromStringAndSize(NULL, capacity)
            return 0
        capacity = PyByteArray_GET_SIZE(self._store)
        if self._start:
            memmove(
                PyByteArray_AS_STRING(self._store),
                PyByteArray_AS_STRING(self._store) + self._start, held,
            )
            self._mark = max(self._mark - self._start, <Py_ssize_t>0)
            self._start = 0
            self._end = held
        # Moving is enough only where it freed as much as it moved. Else a full sink, consumed a
        # little at a time, would move all its content for every write.
        if n > capacity - held or held > capacity // 2:
            PyByteArray_Resize(self._store, max(held + n, capacity * 2))
        return 0

    cdef int _check_exports(self, str what) except -1:
        if self._exports:
            raise BufferError(f"a BufferSink cannot {what} while a view of its content is held")
        return 0

    cdef object _take(self):
        """All that is held, as the caller's own. There must be no view of it."""
        cdef Py_ssize_t start = self._start, end = self._end
        if self._as_bytes:
            taken = PyBytes_FromStringAndSize(self.head(), end - start)
        elif start == end:
            taken = bytearray()
        else:
            taken = self._store
            PyByteArray_Resize(taken, end)
            if start:
                # Only advances the bytearray's own beginning, unless little is left of it.
                del taken[:start]
            self._store = None
        self._start = self._end = self._mark = 0
        self.trim()
        return taken

    def start(self, stream=False, high_water_mark=None, as_bytes=False):
        """Begin anew: drop what is held and set all options.

        Args:
            stream: ``flush`` hands the content over, instead of counting it.
            high_water_mark: bytes of memory to take at the first write, and to keep whenever the
                sink is emptied; None for small defaults. A hint: it limits nothing.
            as_bytes: hand over ``bytes``, which copies, instead of a ``bytearray``.

        Raises:
            TypeError, ValueError: naming the argument; nothing is changed.
            BufferError: a view of the content is held; nothing is changed.
        """
        check_flag("stream", stream)
        check_flag("as_bytes", as_bytes)
        if high_water_mark is not None:
            check_int("high_water_mark", high_water_mark, 0)
        self._check_exports("start")
        self._hint = 0 if high_water_mark is None else min(high_water_mark, UVS_SINK_AHEAD)
        self._stream = stream
        self._as_bytes = as_bytes
        self._ended = False
        self._store = None
        self._start = self._end = self._mark = 0

    def write(self, chunk):
        """Append a copy of the chunk.

        Args:
            chunk: ``str``, which is stored as UTF-8, or any C-contiguous buffer. It may be the sink
                itself.

        Returns:
            The number of bytes appended: all of them.

        Raises:
            TypeError: the chunk is neither.
            UnicodeEncodeError: a ``str`` with a lone surrogate, which UTF-8 cannot express.
            ValueError: the sink has ended.
            BufferError: the sink would have to grow while a view of its content is held.
        """
        if PyBytes_CheckExact(chunk):
            return self._write(PyBytes_AS_STRING(chunk), PyBytes_GET_SIZE(chunk))
        return self._write_from(chunk)

    cdef object _write_from(self, object chunk):
        cdef Given given
        acquire(chunk, TEXT, "chunk", &given)
        try:
            return self._write(given.p, given.n)
        finally:
            release(&given)

    cdef object _write(self, const char* p, Py_ssize_t n):
        # Here, because making the chunk's buffer can have run code that ended the sink.
        if self._ended:
            raise _ended()
        self.append(p, n)
        return n

    # ── Numbers ────────────────────────────────────────────────────────────────────────────────

    def write_u8(self, value, at=None):
        """Append an unsigned number of 8 bits.

        Args:
            value: 0 to 255.
            at: where to put it instead, over bytes that are held: a position from ``reserve``.

        Returns:
            The number of bytes written, as all of these methods.

        Raises:
            TypeError, ValueError: naming the argument; nothing is changed.
            BufferError: a view of the content is held, and the sink would have to grow or what the
                view shows would change.
        """
        return self._write_number(value, 1, BIG, at)

    def write_u16(self, value, byteorder="big", at=None):
        """Append an unsigned number of 16 bits.

        Args:
            value: 0 to 65535.
            byteorder: ``"big"`` or ``"little"``.
            at: as for ``write_u8``.
        """
        return self._write_number(value, 2, byteorder, at)

    def write_u32(self, value, byteorder="big", at=None):
        """Append an unsigned number of 32 bits.

        Args:
            value: below 2 ** 32.
            byteorder: ``"big"`` or ``"little"``.
            at: as for ``write_u8``.
        """
        return self._write_number(value, 4, byteorder, at)

    def write_u64(self, value, byteorder="big", at=None):
        """Append an unsigned number of 64 bits.

        Args:
            value: below 2 ** 64.
            byteorder: ``"big"`` or ``"little"``.
            at: as for ``write_u8``.
        """
        return self._write_number(value, 8, byteorder, at)

    def write_varint(self, value):
        """Append an unsigned number in as few bytes as it needs: 1 to 10.

        Each has seven bits, the lowest first, as Protocol Buffers have it (LEB128).

        Args:
            value: below 2 ** 64.
        """
        cdef char packed[UVS_VARINT_MAX]
        return self._write(packed, put_varint(packed, _number(value, 8)))

    def reserve(self, n):
        """Append zeros to be written over later, such as a length that is not known yet.

        Args:
            n: number of bytes, at least 0.

        Returns:
            Where they are, for ``at=``: counted from the beginning of the content, so it is good
            until ``flush``, ``flush_to``, ``end`` or ``start`` take something away.

        Raises:
            TypeError, ValueError: naming the argument; nothing is changed.
            BufferError: the sink would have to grow while a view of its content is held.
        """
        cdef Py_ssize_t size = check_int("n", n, 0, sys.maxsize // 2)
        if self._ended:
            raise _ended()
        if size and (self._store is None or size > PyByteArray_GET_SIZE(self._store) - self._end):
            self._reserve(size)
        if size:
            memset(PyByteArray_AS_STRING(self._store) + self._end, 0, size)
        self._end += size
        return self.held() - size

    cdef object _write_number(
        self, object value, Py_ssize_t width, object byteorder, object at
    ):
        cdef char packed[8]
        cdef Py_ssize_t position
        cdef bint little = byteorder is LITTLE
        if not little and byteorder is not BIG:
            little = check_one_of("byteorder", byteorder, (BIG, LITTLE)) == LITTLE
        put_number(packed, _number(value, width), width, little)
        if at is None:
            return self._write(packed, width)
        position = check_int("at", at, 0, sys.maxsize)
        if position > self.held() - width:
            raise wrong_value("at", f"a position with {width} bytes of content behind it", at)
        self._check_exports("write over its content")
        memcpy(self.head() + position, packed, width)
        return width

    # ── Handing over ───────────────────────────────────────────────────────────────────────────

    def flush(self):
        """Hand over what is held, or count it.

        Returns:
            With ``stream=True`` the content, as a ``bytearray`` (``bytes`` with ``as_bytes=True``)
            that is the caller's own; the sink is empty then. Else the number of bytes written since
            the last flush; they stay in the sink. Those that ``flush_to`` has sent meanwhile do not
            count.

        Raises:
            BufferError: a view of the content is held; nothing is lost.
        """
        cdef Py_ssize_t written = self._end - max(self._start, self._mark)
        self._check_exports("flush")
        if self._stream:
            return self._take()
        self._mark = self._end
        return written

    def end(self):
        """Hand over what is held, and finish the sink until the next ``start``.

        Returns:
            The content as a ``bytearray`` (``bytes`` with ``as_bytes=True``) that is the caller's
            own; an empty one if the sink has ended before.

        Raises:
            BufferError: a view of the content is held; nothing is lost and the sink goes on.
        """
        self._check_exports("end")
        content = self._take()
        self._ended = True
        self._store = None
        return content

    def flush_to(self, socket):
        """Write the content to a socket without a copy, and keep what it does not take, in order.

        During the call a view of the content is held: ``socket.write`` may write to the sink as far
        as there is room, and finds those bytes after the ones that are kept. The view it is given
        is released when it returns; a view it made of that one and keeps stays valid, and counts as
        a view of the content.

        Args:
            socket: anything with ``write(buffer) -> int``, such as a ``uvsock.Socket``. It returns
                how many bytes it took from the front, or -1 if it is closed. It is called for an
                empty sink too.

        Returns:
            The number of bytes that the socket took; -1 if it is closed: the content is kept.

        Raises:
            TypeError, ValueError: ``socket`` is no such object; the content is kept.
            BufferError: a view of the content is held; nothing is lost.
        """
        cdef Py_ssize_t held, taken
        write = getattr(socket, "write", None)
        if not callable(write):
            raise wrong_type("socket", "an object with write(buffer) -> int", socket)
        self._check_exports("flush")
        held = self.held()
        view = memoryview(self)
        try:
            result = write(view)
        finally:
            # What else refers to the view, a traceback for one, must not keep the sink exported.
            _release(view)
        if not isinstance(result, int) or isinstance(result, bool):
            raise wrong_type("socket", "an object whose write() returns an int", result)
        try:
            taken = result
        except OverflowError:
            taken = -2
        if not -1 <= taken <= held:
            raise wrong_value("socket", f"an object whose write() returns -1 to {held}", result)
        if taken > 0:
            self.consume(taken)
            self.trim()
        return taken

    def __len__(self):
        return self.held()

    def __repr__(self):
        cdef list parts = [type(self).__name__, f"{self.held()} bytes"]
        if self._stream:
            parts.append("stream")
        if self._ended:
            parts.append("ended")
        return f"<{' '.join(parts)}>"

    def __getbuffer__(self, Py_buffer* view, int flags):
        cdef char* p = self.head()
        # Not NULL for a view of nothing, as with a bytearray: to some C functions that is an error.
        PyBuffer_FillInfo(view, self, p if p != NULL else <char*>b"", self.held(), 1, flags)
        self._exports += 1

    def __releasebuffer__(self, Py_buffer* view):
        self._exports -= 1
