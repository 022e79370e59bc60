"""asyncio's streams, compiled: what runs for each message, and for each read of a socket."""

import asyncio
import sys
import weakref
from asyncio import CancelledError, IncompleteReadError, LimitOverrunError

cimport cython
from cpython.bytes cimport (
    PyBytes_AS_STRING, PyBytes_CheckExact, PyBytes_FromStringAndSize, PyBytes_GET_SIZE,
)
from cpython.exc cimport PyErr_SetObject
from cpython.object cimport PyObject, PyTypeObject
from cpython.ref cimport Py_INCREF
from libc.string cimport memchr

from uvsock._awaiting cimport is_awaitable, task_of
from uvsock._framing cimport Cut, Framer
from uvsock._given cimport BUFFERS, Given, acquire, release
from uvsock._sink cimport BufferSink
from uvsock._stream cimport CLOSING, LoopState, now
from uvsock.dropin._transport cimport CompiledProtocol, Transport, read_now

from uvsock._framing import as_framer

cdef extern from "Python.h":
    int PyContext_Enter(object context) except -1
    int PyContext_Exit(object context) except -1
    bint PyCFunction_Check(object function)
    PyObject* PyCFunction_GET_SELF(object function)  # borrowed; NULL for a static one
    Py_ssize_t PyNumber_AsSsize_t(object number, PyObject* overflow) except? -1
    void PyType_Modified(PyTypeObject* type)
    enum:
        PYGEN_RETURN
        PYGEN_NEXT

cdef extern from "string.h":
    # In glibc, musl, macOS and the BSDs.
    void* memmem(const void* p, size_t n, const void* part, size_t part_size) noexcept

ctypedef int (*Send)(PyObject* self, PyObject* value, PyObject** result) except -1
ctypedef PyObject* (*Next)(PyObject* self) except? NULL

cdef extern from *:
    """
    /* Cython has no way to write a class's am_send. Without it, each result of an `await` would be
     * carried out of here by a StopIteration. */
    #define uvs_set_send(type, send) ((type)->tp_as_async->am_send = (sendfunc)(send))
    #define uvs_set_next(type, next) ((type)->tp_iternext = (iternextfunc)(next))
    """
    void uvs_set_send(PyTypeObject* type, Send send)
    void uvs_set_next(PyTypeObject* type, Next next)

cdef enum:
    # asyncio's: the most bytes of a line, and half of what is kept before reading is paused.
    UVS_LIMIT = 65536
    # Memory of bytes already read that may stay in front of those of an unfinished message.
    UVS_STREAM_SLACK = 4096

cdef bytes NEWLINE = b"\n"
# What an attempt to read has as its result when more has to come first.
cdef object MORE = object()
cdef object Task = asyncio.Task
# Here, not where it is called: programs replace asyncio's classes by these.
cdef object wait_and_drain = asyncio.StreamWriter.drain
cdef object start_tls = asyncio.StreamWriter.start_tls
# By loop. A queue does not hold its loop: both would stay for ever.
cdef object WAKE_QUEUES = weakref.WeakKeyDictionary()
# An answer waits at most so long for those of other tasks, and for the task that runs.
cdef double BATCH_SECONDS = 0.001
cdef str FOUND_TOO_FAR = "Separator is found, but chunk is longer than limit"
cdef str NOT_FOUND = "Separator is not found, and chunk exceed the limit"
# From 3.13 on asyncio leaves the writer to the server's callback alone, and closes a connection
# whose writer was forgotten.
cdef bint KEEP_WRITER = sys.version_info < (3, 13)


class _NoLoop:
    def get_debug(self):
        return False


# What a task is woken with: its result is None. It is no loop's, and is never awaited.
cdef object DONE = asyncio.Future(loop=_NoLoop())
DONE.set_result(None)


cdef enum Kind:
    READ, READ_ALL, READ_EXACTLY, READ_UNTIL, READ_LINE, NEXT_LINE, READ_FRAME


# As in asyncio, where readline is a readuntil.
cdef tuple NAMES = (
    "read", "read", "readexactly", "readuntil", "readuntil", "readuntil", "readframe",
)
cdef tuple METHODS = (
    "read", "read", "readexactly", "readuntil", "readline", "__anext__", "readframe",
)


cdef enum Progress:
    NEW, WAITING, OVER


@cython.final
cdef class WakeQueue:
    """The reads of one loop that have their data: one callback of the loop runs all their tasks.

    While many sockets are readable, all are read first, then all tasks run, and then all that they
    wrote is sent. Reading, running and sending by turns costs more.
    """

    cdef list waiters
    cdef object run_all
    cdef LoopState state        # None until a stream has one of uvsock's transports
    cdef bint debug             # the loop's debug mode, as of its newest stream

    def __cinit__(self):
        self.waiters = []
        self.run_all = self._run_all

    cdef int add(self, Waiter waiter) except -1:
        if self.debug if self.state is None else self.state.debug:
            # A callback of its own, so that the loop can say which task was slow.
            waiter.loop.call_soon(waiter.callback, waiter.outcome(), context=waiter.context)
            return 0
        if not self.waiters:
            waiter.loop.call_soon(self.run_all)
        self.waiters.append(waiter)
        return 0

    def _run_all(self):
        cdef list waiters = self.waiters
        cdef LoopState state = self.state
        cdef bint deferred = state is not None and state.defer_flush()
        cdef double begun = now() if deferred else 0
        cdef Waiter waiter
        cdef Py_ssize_t done = 0
        self.waiters = []
        try:
            for waiter in waiters:
                done += 1
                waiter.run()
                if deferred and now() - begun > BATCH_SECONDS:
                    state._flush_dirty()
                    deferred = state.defer_flush()
                    begun = now()
        except BaseException:
            # KeyboardInterrupt or SystemExit in a task: the others go on if the loop does.
            for waiter in waiters[done:]:
                self.add(waiter)
            raise
        finally:
            if deferred:
                state._flush_dirty()


@cython.final
@cython.freelist(64)
cdef class Waiter:
    """What the task of a read waits for: as much of a Future as a Task asks for."""

    cdef object loop
    cdef WakeQueue queue
    cdef object callback
    cdef object context
    cdef object error
    cdef bint finished
    cdef public bint _asyncio_future_blocking

    @cython.binding(False)
    def get_loop(self):
        return self.loop

    @cython.binding(False)
    def add_done_callback(self, callback, *, context):
        self.callback = callback
        self.context = context
        if self.finished:
            self.queue.add(self)

    @cython.binding(False)
    def result(self):
        if self.error is not None:
            raise self.error

    def done(self):
        return self.finished

    def cancel(self, msg=None):
        if self.finished:
            return False
        self.finish(CancelledError() if msg is None else CancelledError(msg))
        return True

    def __repr__(self):
        return f"<Waiter {'finished' if self.finished else 'pending'}>"

    cdef int finish(self, object error) except -1:
        self.finished = True
        self.error = error
        if self.callback is not None:
            self.queue.add(self)
        return 0

    cdef int run(self) except -1:
        callback = self.callback
        context = self.context
        outcome = self.outcome()
        self.callback = self.context = None
        PyContext_Enter(context)
        try:
            callback(outcome)
        finally:
            PyContext_Exit(context)
        return 0

    cdef object outcome(self):
        """What the callback is called with."""
        # A task wants no more than the result. asyncio gets that of its own Futures much faster.
        return DONE if self.error is None and _wakes_task(self.callback) else self


@cython.final
@cython.freelist(64)
cdef class Reading:
    """The coroutine of a read: it does not suspend where the data is there already."""

    cdef ReaderCore reader
    cdef Waiter waiter
    cdef Kind kind
    cdef Progress progress
    cdef Py_ssize_t size
    cdef object what      # the separator or separators; for READ_ALL what was read so far

    def __await__(self):
        return self

    def __iter__(self):
        return self

    # Replaced below, by what does not raise StopIteration itself.
    def __next__(self):
        raise StopIteration

    def send(self, value):
        result = self.advance()
        if self.progress == WAITING:
            return result
        raise StopIteration(result)

    def throw(self, kind, value=None, traceback=None):
        self.stop()
        if value is None:
            value = kind if isinstance(kind, BaseException) else kind()
        elif not isinstance(value, BaseException):
            value = kind(value)
        if traceback is not None:
            value = value.with_traceback(traceback)
        raise value

    def close(self):
        self.stop()

    @property
    def __name__(self):
        return METHODS[self.kind]

    @property
    def __qualname__(self):
        return f"StreamReader.{METHODS[self.kind]}"

    @property
    def cr_running(self):
        return False

    def __repr__(self):
        return f"<coroutine {self.__qualname__}>"

    cdef int stop(self) except -1:
        if self.waiter is not None and self.reader._waiter is self.waiter:
            self.reader._waiter = None
            self.reader._read_so_far = None
        self.waiter = None
        self.progress = OVER
        return 0

    cdef object advance(self):
        """The result; or, while `progress` is WAITING, what to wait for."""
        cdef bint new = self.progress == NEW
        if self.progress == OVER:
            raise RuntimeError("cannot reuse already awaited coroutine")
        self.waiter = None
        self.progress = OVER
        result = self.reader.attempt(self, new)
        if result is MORE:
            result = self.waiter = self.reader.wait(self.kind)
            self.progress = WAITING
        return result


cdef int _send(PyObject* reading, PyObject* value, PyObject** result) except -1:
    result[0] = NULL  # looked at even where this raises
    found = (<Reading>reading).advance()
    Py_INCREF(found)
    result[0] = <PyObject*>found
    return PYGEN_NEXT if (<Reading>reading).progress == WAITING else PYGEN_RETURN


cdef PyObject* _next(PyObject* reading) except? NULL:
    found = (<Reading>reading).advance()
    if (<Reading>reading).progress == WAITING:
        Py_INCREF(found)
        return <PyObject*>found
    if isinstance(found, (tuple, BaseException)):
        # PyErr_SetObject would take either apart.
        found = StopIteration(found)
    PyErr_SetObject(StopIteration, found)
    return NULL


uvs_set_send(<PyTypeObject*>Reading, _send)
uvs_set_next(<PyTypeObject*>Reading, _next)
PyType_Modified(<PyTypeObject*>Reading)


@cython.final
cdef class Ready:
    """The coroutine of a `drain` that has nothing to wait for: there is only one."""

    def __await__(self):
        return self

    def __iter__(self):
        return self

    # Replaced below, by what ends without raising StopIteration.
    def __next__(self):
        raise StopIteration

    def send(self, value):
        raise StopIteration

    def throw(self, kind, value=None, traceback=None):
        Reading.throw(Reading.__new__(Reading), kind, value, traceback)

    def close(self):
        """It never waits, so nothing in it is left to end."""

    @property
    def __name__(self):
        return "drain"

    @property
    def __qualname__(self):
        return "StreamWriter.drain"


cdef int _ready_send(PyObject* ready, PyObject* value, PyObject** result) except -1:
    Py_INCREF(None)
    result[0] = <PyObject*>None
    return PYGEN_RETURN


cdef PyObject* _ready_next(PyObject* ready) except? NULL:
    return NULL


uvs_set_send(<PyTypeObject*>Ready, _ready_send)
uvs_set_next(<PyTypeObject*>Ready, _ready_next)
PyType_Modified(<PyTypeObject*>Ready)
cdef Ready READY = Ready()


cdef WakeQueue _wake_queue_of(object loop):
    queue = WAKE_QUEUES.get(loop)
    if queue is None:
        queue = WAKE_QUEUES[loop] = WakeQueue()
    (<WakeQueue>queue).debug = loop.get_debug()
    return queue


cdef bint _wakes_task(object callback):
    """Whether it is the wake-up of a Task of asyncio's in C."""
    cdef PyObject* owner
    if not PyCFunction_Check(callback):
        return False
    owner = PyCFunction_GET_SELF(callback)
    return owner != NULL and type(<object>owner) is Task


cdef bytes _as_separator(object separator):
    if PyBytes_CheckExact(separator):
        return separator
    return bytes(memoryview(separator))


cdef class ReaderCore:
    """ReaderCore(limit=65536, loop=None)\n--\n
    What ``StreamReader`` is made of."""

    cdef object __weakref__
    cdef readonly object _loop
    cdef object _any_transport
    cdef Transport _native      # the same, if it is uvsock's
    cdef WakeQueue _wake_queue
    cdef readonly object _exception
    cdef readonly bint _eof
    cdef readonly bint _paused
    cdef readonly Py_ssize_t _limit
    cdef public object _waiter  # a Waiter, while a read waits
    # How many bytes there must be before another attempt is worth while: of the read that waits,
    # and of the last attempt, which may not be allowed to wait.
    cdef Py_ssize_t _need
    cdef Py_ssize_t _wanted

    # What was received and not yet read: _size bytes at _head. They belong to _chunk, bytes that
    # came at once and are never changed; or to _sink, once more came before these were read.
    cdef const char* _head
    cdef Py_ssize_t _size
    cdef bytes _chunk
    cdef BufferSink _sink

    cdef list _read_so_far      # by a read up to the end that waits
    # This separator, or what this framer looks for, does not begin in the first _searched bytes.
    cdef object _sought
    cdef Py_ssize_t _searched
    cdef Framer _framer

    def __init__(self, limit=UVS_LIMIT, loop=None):
        if limit <= 0:
            raise ValueError("Limit cannot be <= 0")
        self._limit = PyNumber_AsSsize_t(limit, NULL)
        self._loop = asyncio.get_event_loop() if loop is None else loop

    # --- what asyncio's repr and other people's code look at

    # For protocols 0 and 1, which would call the class with itself.
    def __reduce__(self):
        raise TypeError(f"cannot pickle {type(self).__name__!r} object")

    @property
    def _transport(self):
        return self._any_transport

    @_transport.setter
    def _transport(self, transport):
        self._any_transport = transport
        self._native = transport if isinstance(transport, Transport) else None

    @property
    def _buffer(self):
        return PyBytes_FromStringAndSize(self._head, self._size)

    def exception(self):
        """What ended the connection, or None."""
        return self._exception

    def at_eof(self):
        """Whether the peer has ended the stream, and all of it was read."""
        return self._eof and self._size == 0

    # --- the transport's side

    def set_transport(self, transport):
        """Name the transport that is paused while too much is held."""
        assert self._any_transport is None, "Transport already set"
        self._transport = transport

    def set_exception(self, exc):
        """Have reads raise this."""
        self._exception = exc
        if self._waiter is not None:
            self.wake(exc)

    def feed_eof(self):
        """Nothing comes any more."""
        self._eof = True
        if self._waiter is not None:
            self.wake(None)

    def feed_data(self, data):
        """Add bytes to what can be read.

        Args:
            data: a bytes-like object, which is copied unless it is ``bytes``.
        """
        cdef Given given
        acquire(data, BUFFERS, "data", &given)
        try:
            self.feed(given.p, given.n, <bytes>given.owner)
        finally:
            release(&given)

    cdef int feed(self, const char* p, Py_ssize_t n, bytes owner) except -1:
        """The same. All of the owner, if there is one, is kept without a copy."""
        assert not self._eof, "feed_data after feed_eof"
        if n == 0:
            return 0
        self.add(p, n, owner)
        if self._waiter is not None:
            if self._size < self._need:
                return 0  # a read waits for more than this, so it must get it: no pause
            self.wake(None)
        if self._size - self._limit > self._limit and not self._paused:
            self.pause()
        return 0

    cdef int pause(self) except -1:
        if self._any_transport is None:
            return 0
        try:
            self._any_transport.pause_reading()
        except NotImplementedError:
            self._transport = None
        else:
            self._paused = True
        return 0

    cdef int wake(self, object error) except -1:
        cdef Waiter waiter = self._waiter
        self._waiter = None
        if not waiter.finished:
            waiter.finish(error)
        return 0

    cdef int add(self, const char* p, Py_ssize_t n, bytes owner) except -1:
        cdef BufferSink sink = self._sink
        if self._size == 0:
            self._chunk = owner if owner is not None else PyBytes_FromStringAndSize(p, n)
            self._head = PyBytes_AS_STRING(self._chunk)
            self._size = n
            return 0
        if sink is None or sink.exported():
            # Somebody holds a view of the old one: that memory is theirs now.
            sink = BufferSink.__new__(BufferSink)
            sink.expect(self._size + n)
            sink.append(self._head, self._size)
        sink.append(p, n)
        self._sink = sink
        self._chunk = None
        self._head = sink.head()
        self._size = sink.held()
        return 0

    cdef int own(self) except -1:
        """Copy what is held, to hold no more memory than that."""
        self._chunk = PyBytes_FromStringAndSize(self._head, self._size)
        self._head = PyBytes_AS_STRING(self._chunk)
        self._sink = None
        return 0

    # --- the side of the reads

    cdef Reading reading(self, Kind kind, Py_ssize_t size, object what):
        cdef Reading reading = Reading.__new__(Reading)
        reading.reader = self
        reading.kind = kind
        reading.size = size
        reading.what = what
        return reading

    def readline(self):
        """Read up to and with the next line feed, or up to the end of the stream.

        Returns:
            The line; without its line feed where the stream ends, and empty behind that.

        Raises:
            ValueError: the line is longer than the limit. It was dropped, as far as it had come.
        """
        return self.reading(READ_LINE, 0, None)

    def readuntil(self, separator=NEWLINE):
        """Read up to and with a separator.

        Args:
            separator: a bytes-like object, or a tuple of them: the one that ends first counts.

        Raises:
            IncompleteReadError: the stream ended before. ``partial`` is what was left of it.
            LimitOverrunError: more bytes than the limit are before it. They can still be read.
            ValueError: a separator is empty, or there is none.
        """
        return self.reading(READ_UNTIL, 0, separator)

    def readexactly(self, n):
        """Read this many bytes.

        Raises:
            IncompleteReadError: the stream ended before. ``partial`` is what was left of it.
            ValueError: the number is negative.
        """
        return self.reading(READ_EXACTLY, PyNumber_AsSsize_t(n, NULL), n)

    def read(self, n=-1):
        """Read what there is, but at least one byte.

        Args:
            n: the most bytes to return; negative for all up to the end of the stream.

        Returns:
            The bytes; none where the stream has ended.
        """
        cdef Py_ssize_t size = PyNumber_AsSsize_t(n, NULL)
        return self.reading(READ if size >= 0 else READ_ALL, size, None)

    def readframe(self):
        """Read one frame, which the framer says where it ends.

        Returns:
            The bytes of the frame, without what belongs around it.

        Raises:
            FrameError: what there is cannot begin a frame. It can still be read in other ways.
            IncompleteReadError: the stream ended before the frame did, or before it began.
                ``partial`` is what was left of it.
            RuntimeError: there is no framer.
        """
        return self.reading(READ_FRAME, 0, None)

    def set_framing(self, framer):
        """Say where frames end, from the first byte on that was not read.

        Args:
            framer: a ``Framer``, or None.
        """
        self._framer = as_framer(framer)
        if self._waiter is not None:
            self.wake(None)

    @property
    def framing(self):
        """The framer of ``readframe``, or None."""
        return self._framer

    def __aiter__(self):
        return self

    def __anext__(self):
        return self.reading(NEXT_LINE, 0, None)

    cdef object attempt(self, Reading reading, bint new):
        """The result of the read, or MORE."""
        cdef Kind kind = reading.kind
        cdef Py_ssize_t size = reading.size
        if new:
            self.check(reading)
        if kind == READ_LINE:
            return self.take_line()
        if kind == READ_EXACTLY:
            if self._size >= size:
                return self.take(size)
            if self._eof:
                raise IncompleteReadError(self.take(self._size), reading.what)
            self._wanted = size
            return MORE
        if kind == READ:
            if self._size or self._eof or size == 0:
                return self.take(min(size, self._size))
            self._wanted = 1
            return MORE
        if kind == READ_FRAME:
            return self.take_frame()
        if kind == READ_UNTIL:
            if type(reading.what) is tuple:
                return self.take_until_any(<tuple>reading.what)
            return self.take_until(<bytes>reading.what)
        if kind == READ_ALL:
            return self.take_all(<list>reading.what)
        line = self.take_line()
        if line is not MORE and PyBytes_GET_SIZE(line) == 0:
            raise StopAsyncIteration
        return line

    cdef int check(self, Reading reading) except -1:
        """What is raised for the arguments comes before what the connection has to say."""
        cdef Kind kind = reading.kind
        if kind == READ_EXACTLY:
            if reading.size < 0:
                raise ValueError("readexactly size can not be less than zero")
        elif kind == READ_UNTIL:
            if isinstance(reading.what, tuple):
                separators = tuple(sorted(map(_as_separator, reading.what), key=len))
                if not separators:
                    raise ValueError("Separator should contain at least one element")
                reading.what = separators if len(separators) > 1 else separators[0]
                empty = not separators[0]
            else:
                reading.what = _as_separator(reading.what)
                empty = not reading.what
            if empty:
                raise ValueError("Separator should be at least one-byte string")
        elif kind == READ_ALL:
            reading.what = []
        if self._exception is not None:
            raise self._exception
        return 0

    cdef Waiter wait(self, Kind kind):
        cdef Waiter waiter
        if self._exception is not None:
            raise self._exception
        if self._waiter is not None:
            raise RuntimeError(
                f"{NAMES[kind]}() called while another coroutine is already waiting for incoming "
                "data"
            )
        if self._paused:
            self._paused = False
            self._any_transport.resume_reading()
        # A few bytes must not hold the memory of all that came before them.
        if self.slack() > max(self._size, <Py_ssize_t>UVS_STREAM_SLACK):
            self.own()
        if self._wake_queue is None:
            self._wake_queue = _wake_queue_of(self._loop)
        waiter = Waiter.__new__(Waiter)
        waiter.loop = self._loop
        waiter.queue = self._wake_queue
        if self._native is not None:
            waiter.queue.state = self._native.state
        waiter._asyncio_future_blocking = True  # a Task takes it for a mistake without
        self._waiter = waiter
        self._need = self._wanted
        return waiter

    cdef Py_ssize_t slack(self) noexcept:
        if self._chunk is not None:
            return PyBytes_GET_SIZE(self._chunk) - self._size
        return 0 if self._sink is None else self._sink.consumed()

    cdef object take(self, Py_ssize_t n):
        cdef bytes taken
        if self._chunk is not None and PyBytes_GET_SIZE(self._chunk) == n:
            taken = self._chunk
        else:
            taken = PyBytes_FromStringAndSize(self._head, n)
        self.drop(n)
        return taken

    cdef bytes take_unread(self):
        """All that no read has returned."""
        cdef bytes taken = b""
        if self._read_so_far is not None:
            taken = b"".join(self._read_so_far)
            self._read_so_far.clear()
        if self._size:
            taken += self.take(self._size)
        return taken

    cdef int drop(self, Py_ssize_t n) except -1:
        self._size -= n
        self._searched = 0
        self._need = 0  # of a read that waits, while another takes what is there
        if self._size:
            self._head += n
            if self._sink is not None:
                self._sink.consume(n)
        else:
            self._head = NULL
            self._chunk = None
            self._sink = None
        if self._paused and self._size <= self._limit:
            self._paused = False
            self._any_transport.resume_reading()
        return 0

    cdef int remember(self, object sought, Py_ssize_t searched) noexcept:
        """A search that begins again goes on here: bytes that trickle in are searched once."""
        self._sought = sought
        self._searched = searched
        self._wanted = self._size + 1
        return 0

    cdef object take_line(self):
        cdef Py_ssize_t start = self._searched if self._sought is NEWLINE else 0
        cdef Py_ssize_t length
        cdef const char* found = NULL
        if start < self._size:
            found = <const char*>memchr(self._head + start, c"\n", self._size - start)
        if found != NULL:
            length = found - self._head
            if length <= self._limit:
                return self.take(length + 1)
            self.drop(length + 1)
            raise ValueError(FOUND_TOO_FAR)
        if self._size > self._limit:
            self.drop(self._size)
            raise ValueError(NOT_FOUND)
        if self._eof:
            return self.take(self._size)
        self.remember(NEWLINE, self._size)
        return MORE

    cdef object take_until(self, bytes separator):
        cdef Py_ssize_t width = PyBytes_GET_SIZE(separator), length
        cdef Py_ssize_t start = self._searched if self._sought is separator else 0
        cdef const char* found
        if self._size >= width:
            found = <const char*>memmem(
                self._head + start, self._size - start, PyBytes_AS_STRING(separator), width
            )
            if found != NULL:
                length = found - self._head
                if length > self._limit:
                    raise LimitOverrunError(FOUND_TOO_FAR, length)
                return self.take(length + width)
            start = self._size + 1 - width
            if start > self._limit:
                raise LimitOverrunError(NOT_FOUND, start)
        if self._eof:
            raise IncompleteReadError(self.take(self._size), None)
        self.remember(separator, start)
        return MORE

    cdef object take_until_any(self, tuple separators):
        """As take_until: the separator that ends first, of those the shortest one."""
        cdef Py_ssize_t start = self._searched if self._sought is separators else 0
        cdef Py_ssize_t end = -1, length = 0, width = 0
        cdef bytes separator
        cdef const char* found
        if self._size >= PyBytes_GET_SIZE(<bytes>separators[0]):
            for separator in separators:
                width = PyBytes_GET_SIZE(separator)
                found = <const char*>memmem(
                    self._head + start, self._size - start, PyBytes_AS_STRING(separator), width
                )
                if found != NULL and (end < 0 or found - self._head + width < end):
                    length = found - self._head
                    end = length + width
            if end >= 0:
                if length > self._limit:
                    raise LimitOverrunError(FOUND_TOO_FAR, length)
                return self.take(end)
            start = max(<Py_ssize_t>0, self._size + 1 - width)
            if start > self._limit:
                raise LimitOverrunError(NOT_FOUND, start)
        if self._eof:
            raise IncompleteReadError(self.take(self._size), None)
        self.remember(separators, start)
        return MORE

    cdef object take_all(self, list taken):
        if self._exception is not None:
            raise self._exception
        if self._size:
            taken.append(self.take(self._size))
        self._read_so_far = None if self._eof else taken
        if self._eof:
            return taken[0] if len(taken) == 1 else b"".join(taken)
        self._wanted = 1
        return MORE

    cdef object take_frame(self):
        cdef Cut cut
        cdef object owner
        cdef Py_ssize_t offset = 0
        cdef bytes frame
        if self._framer is None:
            raise RuntimeError("no framing: set_framing() says where a frame ends")
        cut.searched = self._searched if self._sought is self._framer else 0
        cut.need = 0
        if self._size:
            if self._chunk is None:
                owner = self._sink
            else:
                owner = self._chunk
                offset = self._head - PyBytes_AS_STRING(self._chunk)
            if self._framer.look(<PyObject*>owner, self._head, self._size, offset, &cut):
                frame = PyBytes_FromStringAndSize(self._head + cut.start, cut.stop - cut.start)
                self.drop(cut.size)
                return frame
        if self._eof:
            raise IncompleteReadError(self.take(self._size), None)
        self.remember(self._framer, self._size)
        if cut.need:
            self._wanted = cut.need
        return MORE


cdef class StreamProtocol(CompiledProtocol):
    """What the transport of a stream calls.

    Args:
        stream_reader: where the bytes go. Only a weak reference is kept, but for a server's until
            it is connected.
        client_connected_cb: of a server, called with reader and writer; what can be awaited of what
            it returns becomes a task.
        loop: None for the running loop.
    """

    cdef object __weakref__
    cdef readonly object _loop
    cdef object _reader_ref
    cdef object _strong_reader
    cdef readonly object _stream_writer
    cdef readonly object _transport
    cdef readonly object _client_connected_cb
    cdef readonly object _task
    cdef readonly bint _paused
    cdef readonly bint _connection_lost
    cdef object _error
    cdef object _closed         # a Future, once somebody waits for the end
    cdef list _drain_waiters    # of Futures; None while there are none

    def __init__(self, stream_reader, client_connected_cb=None, loop=None):
        self._loop = asyncio.get_event_loop() if loop is None else loop
        if stream_reader is not None:
            self._reader_ref = weakref.ref(stream_reader)
            if client_connected_cb is not None:
                self._strong_reader = stream_reader
        self._client_connected_cb = client_connected_cb

    cdef object reader(self):
        return None if self._reader_ref is None else self._reader_ref()

    @property
    def _stream_reader(self):
        return self.reader()

    def _replace_transport(self, transport):
        self._transport = transport
        reader = self.reader()
        if isinstance(reader, ReaderCore):
            (<ReaderCore>reader)._transport = transport
            (<ReaderCore>reader)._paused = False

    def _replace_writer(self, writer):
        self._replace_transport(writer.transport)

    def connection_made(self, transport):
        reader = self.reader()
        self._transport = transport
        if reader is not None:
            reader.set_transport(transport)
        if self._client_connected_cb is None:
            return
        writer = StreamWriter(transport, self, reader, self._loop)
        if KEEP_WRITER:
            self._stream_writer = writer
        try:
            started = self._client_connected_cb(reader, writer)
        except Exception as error:
            self._report(error, transport)
            started = None
        if started is not None and is_awaitable(started):
            self._task = task_of(self._loop, started, False)
            self._task.add_done_callback(self._task_done)
            if isinstance(transport, Transport):
                # For what the task writes at once: scheduled later, it takes an iteration more.
                (<Transport>transport).state.schedule_flush()
        self._strong_reader = None

    def _task_done(self, task):
        transport = self._transport
        if task.cancelled():
            if transport is not None:
                transport.close()
            return
        error = task.exception()
        if error is not None:
            self._report(error, transport)

    cdef int _report(self, object error, object transport) except -1:
        """The program's function for a new connection, or its task, has raised."""
        self._loop.call_exception_handler({
            "message": "Unhandled exception in client_connected_cb",
            "exception": error,
            "transport": transport,
        })
        if transport is not None:
            transport.close()
        return 0

    cdef int bytes_received(self, const char* data, Py_ssize_t size, bytes owner) except -1:
        reader = self.reader()
        if isinstance(reader, ReaderCore):
            (<ReaderCore>reader).feed(data, size, owner)
        elif reader is not None:
            reader.feed_data(data[:size])
        return 0

    cdef bytes take_unread(self):
        reader = self.reader()
        if not isinstance(reader, ReaderCore):
            return read_now(reader)
        (<ReaderCore>reader)._paused = False  # to start TLS resumes reading by itself
        return (<ReaderCore>reader).take_unread()

    def data_received(self, data):
        reader = self.reader()
        if isinstance(reader, ReaderCore) and PyBytes_CheckExact(data):
            (<ReaderCore>reader).feed(PyBytes_AS_STRING(data), PyBytes_GET_SIZE(data), data)
        elif reader is not None:
            reader.feed_data(data)

    def eof_received(self):
        reader = self.reader()
        if reader is not None:
            reader.feed_eof()
        # asyncio's TLS transports cannot stay open in one direction, and warn; uvsock's can.
        return self._transport is None or self._transport.can_write_eof()

    def connection_lost(self, exc):
        reader = self.reader()
        if reader is not None:
            if exc is None:
                reader.feed_eof()
            else:
                reader.set_exception(exc)
        self._connection_lost = True
        self._error = exc
        if self._closed is not None:
            self._resolve(self._closed)
        if self._drain_waiters is not None:
            for waiter in self._drain_waiters:
                self._resolve(waiter)
        self._reader_ref = self._stream_writer = self._task = self._transport = None

    def _resolve(self, future):
        if future.done():
            return
        if self._error is None:
            future.set_result(None)
        else:
            future.set_exception(self._error)
            future.exception()  # whether anybody looks at it is not the loop's concern

    def pause_writing(self):
        assert not self._paused
        self._paused = True

    def resume_writing(self):
        assert self._paused
        self._paused = False
        if self._drain_waiters is not None:
            for waiter in self._drain_waiters:
                if not waiter.done():
                    waiter.set_result(None)

    async def _drain_helper(self):
        if self._connection_lost:
            raise ConnectionResetError("Connection lost")
        if not self._paused:
            return
        waiter = self._loop.create_future()
        if self._drain_waiters is None:
            self._drain_waiters = []
        self._drain_waiters.append(waiter)
        try:
            await waiter
        finally:
            self._drain_waiters.remove(waiter)

    def _get_close_waiter(self, stream):
        if self._closed is None or self._closed.cancelled():
            self._closed = self._loop.create_future()
            if self._connection_lost:
                self._resolve(self._closed)
        return asyncio.shield(self._closed)  # else who is cancelled would cancel all that wait


def _hand_over(transport, StreamProtocol protocol):
    """Give what came in the clear to the TLS that was started on the transport."""
    tls = transport.get_protocol()
    if tls is protocol or not hasattr(tls, "get_buffer"):
        return  # it was refused, or it is uvsock's own, which asks the protocol
    data = memoryview(protocol.take_unread())
    while data:
        room = tls.get_buffer(len(data))
        n = min(len(data), len(room))
        room[:n] = data[:n]
        tls.buffer_updated(n)
        data = data[n:]


cdef class WriterCore:
    """WriterCore(transport, protocol, reader, loop)\n--\n
    What ``StreamWriter`` is made of."""

    cdef object __weakref__
    cdef object _any_transport
    cdef Transport _native
    cdef readonly object _protocol
    cdef readonly object _reader
    cdef readonly object _loop
    # The same two, where they are uvsock's.
    cdef StreamProtocol _flow
    cdef ReaderCore _source

    def __init__(self, transport, protocol, reader, loop):
        assert reader is None or isinstance(reader, asyncio.StreamReader)
        self._transport = transport
        self._protocol = protocol
        self._reader = reader
        self._loop = loop
        self._flow = protocol if isinstance(protocol, StreamProtocol) else None
        self._source = reader if isinstance(reader, ReaderCore) else None

    def __reduce__(self):
        raise TypeError(f"cannot pickle {type(self).__name__!r} object")

    @property
    def _transport(self):
        return self._any_transport

    @_transport.setter
    def _transport(self, transport):
        self._any_transport = transport
        self._native = transport if isinstance(transport, Transport) else None

    def write(self, data):
        """Send these bytes, after all that was written before.

        Args:
            data: a bytes-like object.
        """
        if self._native is not None and PyBytes_CheckExact(data):
            self._native.write_from(PyBytes_AS_STRING(data), PyBytes_GET_SIZE(data), data)
        else:
            self._any_transport.write(data)

    def writelines(self, data):
        """Send these bytes-like objects, one behind the other."""
        self._any_transport.writelines(data)

    def drain(self):
        """Wait until the peer has taken enough of what was written.

        It neither waits nor suspends where little is held.

        Raises:
            ConnectionResetError: the connection is lost.
        """
        cdef bint closing
        if (
            self._flow is not None and not self._flow._paused and not self._flow._connection_lost
            and self._source is not None and self._source._exception is None
        ):
            if self._native is None:
                closing = self._any_transport.is_closing()
            else:
                closing = self._native.phase >= CLOSING or self._native.broken
            if not closing:
                return READY
        return wait_and_drain(self)

    async def start_tls(
        self, sslcontext, *, server_hostname=None, ssl_handshake_timeout=None,
        ssl_shutdown_timeout=None,
    ):
        """Upgrade the stream to TLS, once what was written before has been taken.

        What was received and not yet read goes to TLS: it is never read as if TLS had brought it.

        Args:
            sslcontext: an ``ssl.SSLContext``.
            server_hostname: the name that a client sends and verifies.
            ssl_handshake_timeout: seconds that the handshake may take; None for 60.
            ssl_shutdown_timeout: seconds that the peer has at the end; None for 30.

        Raises:
            ssl.SSLError: the handshake failed.
            OSError: the connection broke.
        """
        cdef StreamProtocol protocol = self._flow
        if self._native is not None:
            self._native.state.check()
        options = {
            "server_hostname": server_hostname, "ssl_handshake_timeout": ssl_handshake_timeout,
        }
        if ssl_shutdown_timeout is not None:
            options["ssl_shutdown_timeout"] = ssl_shutdown_timeout
        if protocol is None:
            return await start_tls(self, sslcontext, **options)
        await self.drain()
        server_side = protocol._client_connected_cb is not None
        transport = self._any_transport
        starting = self._loop.start_tls(
            transport, protocol, sslcontext, server_side=server_side, **options
        )
        if self._native is None:
            # Perhaps TLS of somebody else's, which does not know what the reader holds. It takes
            # the protocol's place when the task begins, and the connection one iteration later.
            starting = self._loop.create_task(starting)
            self._loop.call_soon(self._loop.call_soon, _hand_over, transport, protocol)
        self._transport = await starting
        protocol._replace_transport(self._any_transport)


class StreamReader(ReaderCore, asyncio.StreamReader):
    """The reading side of a stream: ``asyncio.StreamReader``, compiled, and with frames.

    Args:
        limit: the most bytes of a line or of what ``readuntil`` returns, without the separator.
            Reading is paused while more than twice as many are held.
        loop: None for the running loop.
    """

    __slots__ = ()


class StreamWriter(WriterCore, asyncio.StreamWriter):
    """The writing side of a stream: ``asyncio.StreamWriter``, compiled.

    Args:
        transport: what it writes to.
        protocol: the transport's.
        reader: the ``StreamReader`` of the same stream, or None.
        loop: their event loop.
    """

    __slots__ = ()
