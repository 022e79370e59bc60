"""The socket that users hold, and the calling of its handlers."""

import asyncio
import enum
import errno
import socket as stdlib
import ssl
import warnings

cimport cython
from cpython.bytes cimport (
    PyBytes_AS_STRING, PyBytes_CheckExact, PyBytes_FromStringAndSize, PyBytes_GET_SIZE,
)
from libc.limits cimport LLONG_MAX
from libc.math cimport INFINITY

from uvsock._awaiting cimport is_awaitable, task_of
from uvsock._framing cimport Framer, FrameReader
from uvsock._given cimport BUFFERS, TEXT, Given, acquire, release
from uvsock._handlers cimport (
    CLOSE, DATA, DRAIN, END, ERROR, HANDSHAKE, OPEN, TIMEOUT, Handlers, event_name,
)
from uvsock._stream cimport (
    CLOSED, CLOSING, CONNECTING, ENDING, ESTABLISHED,
    LEAVING, NOBODY, ONE_PIECE, PIECES, Stream, StreamGroup, now, set_keep_alive, set_no_delay,
)

from uvsock._contexts import client_context, server_context
from uvsock._errors import SocketClosedError
from uvsock._files import is_text, send_file, sendfile
from uvsock._framing import as_framer
from uvsock._handlers import as_handlers
from uvsock._options import check_flag, check_seconds

cdef extern from "Python.h":
    long PyLong_AsLongAndOverflow(object number, int* overflow) except? -1

cdef object SSLError = ssl.SSLError
cdef object ZERO = 0
cdef object Task = asyncio.Task
cdef tuple ENDING_THE_RUN = (KeyboardInterrupt, SystemExit)
# Seconds. A peer that connects and never finishes its handshake would otherwise stay for ever.
cdef double UVS_HANDSHAKE_TIMEOUT = 60.0


class ReadyState(enum.IntEnum):
    """What a socket can still do. The numbers are Bun's."""

    SHUTDOWN = -2
    DETACHED = -1
    CLOSED = 0
    ESTABLISHED = 1
    CONNECTING = 2


cdef object STATE_CONNECTING = ReadyState.CONNECTING
cdef object STATE_ESTABLISHED = ReadyState.ESTABLISHED
cdef object STATE_SHUTDOWN = ReadyState.SHUTDOWN
cdef object STATE_CLOSED = ReadyState.CLOSED


def live_sockets(loop):
    """The sockets of a loop whose ``close`` event has not come yet."""
    state = getattr(loop, "_uvsock_state", None)
    if state is None:
        return set()
    return {s for group in state.groups if isinstance(group, Group) for s in group.sockets}


cdef class Group(StreamGroup):
    """What the sockets of one listener, or one connection, share. Calling it makes a socket."""

    def __init__(self, state, handlers, *, context, fields, listener=None, data=None,
                 tls_context=None, server_side=False, server_hostname=None):
        self.state = state
        self.context = context
        self.handlers = handlers
        self.listener = listener
        self.data = data
        self.tls_context = tls_context
        self.server_side = server_side
        self.server_hostname = server_hostname
        for field, value in fields.items():  # as check_options() made them
            setattr(self, field, value)
        self.handshake_timeout = UVS_HANDSHAKE_TIMEOUT

    def __call__(self):
        # A listener calls this while it accepts, so nothing of the user's runs here: it might stop
        # the listener in between.
        cdef Socket socket = Socket.__new__(Socket)
        socket.group = self
        socket.state = self.state
        socket.data = self.data
        if self.framing is not None:
            socket.frames = FrameReader.__new__(FrameReader)
            socket.frames.framer = self.framing
        return socket


cdef class Cork:
    """Holds what is written to a socket until the block ends."""

    cdef Socket _socket

    def __init__(self, Socket socket):
        self._socket = socket

    def __enter__(self):
        self._socket.state.check()
        self._socket.corks += 1
        return self._socket

    def __exit__(self, *exception):
        cdef Socket socket = self._socket
        socket.state.check()
        socket.corks -= 1
        if socket.corks == 0:
            if socket.turn == 0:
                socket.flush_now()
            elif not socket.group.cork:
                socket.flush_now()


@cython.final
cdef class AsyncHandler:
    def __cinit__(self):
        self.queue = []


cdef class Socket(Stream):
    """Socket()\n--\n
    A connection over TCP, a Unix socket or TLS. Made by ``listen`` and ``connect`` only.

    Its methods must be called in the loop's thread: elsewhere those that change anything raise
    ``RuntimeError``. What only looks, such as ``fileno`` and ``get_extra_info``, does not.
    """

    def __init__(self):
        raise TypeError("a Socket is made by uvsock.listen() and uvsock.connect()")

    def __class_getitem__(cls, item):
        return cls

    def __repr__(self):
        cdef list parts = [self.ready_state.name.lower()]
        if self.remote_port is not None:
            parts.append(f"{self.local_address}:{self.local_port}")
            parts.append(f"-> {self.remote_address}:{self.remote_port}")
        if self.tls is not None:
            parts.append("tls")
        return f"<uvsock.Socket {' '.join(parts)}>"

    # ── Connecting ─────────────────────────────────────────────────────────────────────────────

    cdef int on_made(self) except -1:
        cdef Group group = <Group>self.group
        if group.data_factory is None:
            return 0
        try:
            self.data = group.context.copy().run(group.data_factory)
        except BaseException as error:
            self._enter(LEAVING)
            if not self.state.ends_the_run(error):
                self._report(error, "data_factory")
        return 0

    def _opening(self):
        """Two Futures: connected, or why not; and ``open`` has returned."""
        return self._wait_for("connected"), self._wait_for("opened")

    def _abandon(self, error=None):
        """Give up a connection that has not opened; no handler is called."""
        if self.phase >= CLOSING:
            return  # closed by its handshake handler, which may have written
        if self.transport is None:
            self.error = error
            self._enter(CLOSED)
            self._over = True
        else:
            self._enter(CLOSING)
            self.begin_abort(error, self.opened)
            if self.busy:
                self._running.task.cancel()  # an async `open`, which connect() was waiting for

    # ── Events ─────────────────────────────────────────────────────────────────────────────────

    cdef Handlers table(self):
        return self._own if self._own is not None else (<Group>self.group).handlers

    cdef int on_data(self, object data) except -1:
        cdef Handlers table = self.table()
        cdef double begun
        if not self.state.debug:
            result = table.on_data(self, data)
        else:
            begun = now()
            result = None
            try:
                result = table.on_data(self, data)
            finally:
                if result is not NotImplemented:
                    self._check_slow(begun, table, DATA)
        if result is None or result is NotImplemented or not is_awaitable(result):
            return 0
        return self._start(DATA, result)

    cdef int on_data_raised(self, object error) except -1:
        return self._raised(DATA, error)

    cdef int on_open(self) except -1:
        return self._emit(OPEN, None)

    cdef int on_drain(self) except -1:
        return self._emit(DRAIN, None)

    cdef int on_end(self) except -1:
        return self._emit(END, None)

    cdef int on_hang_up(self) except -1:
        return self.lost(errno.EPIPE)

    cdef int on_timeout(self) except -1:
        if self._running is not None and (TIMEOUT, None) in self._running.queue:
            return 0  # a slow handler is told once that time has passed, not once per period
        return self._emit(TIMEOUT, None)

    cdef int on_handshake(self, bint success, object error) except -1:
        cause = getattr(error, "__cause__", None)
        self.state.ends_the_run(cause)  # raised by an SNI callback
        if success:
            self._tell("upgraded", None)
        else:
            reason = error if error is not None else self._reason()
            self._tell("connected", reason)
            self._tell("upgraded", reason)
        return self._emit(HANDSHAKE, (success, error))

    cdef int on_frame_error(self, object error) except -1:
        if self.state.ends_the_run(error):  # raised by a framer written in Python
            return self.begin_close()
        return self._emit(ERROR, (error, None))

    cdef int on_tls_error(self, object error) except -1:
        return self._emit(ERROR, (error, None))

    cdef int on_closed(self) except -1:
        return self._emit(CLOSE, None)

    cdef int end_closed(self) except -1:
        self._over = True
        Stream.end_closed(self)
        if self._waiters is not None:
            self._tell("connected", self._reason())
            self._tell("upgraded", self._reason())
            self._tell("closed", None)
        return 0

    cdef object _wait_for(self, str what):
        """A Future of this socket, which `_tell` sets."""
        waiter = self.state.loop.create_future()
        if self._waiters is None:
            self._waiters = {}
        self._waiters.setdefault(what, {})[waiter] = None
        return waiter

    cdef int _stop_waiting(self, str what, object waiter) except -1:
        if self._waiters is not None:
            self._waiters.get(what, {}).pop(waiter, None)
        return 0

    cdef int _tell(self, str what, object error) except -1:
        """Let those go on that wait for this; with an error, it is raised in them."""
        if self._waiters is None:
            return 0
        for waiter in self._waiters.pop(what, ()):
            if waiter.done():
                continue
            if error is None:
                waiter.set_result(self)
            else:
                waiter.set_exception(error)
                waiter.exception()  # seen: nobody need await it, `close` tells too
        return 0

    cdef object _reason(self):
        if self.error is not None:
            return self.error
        return SocketClosedError(errno.ENOTCONN, "the socket is closed")

    cdef int _emit(self, int event, object argument) except -1:
        """Call a handler, after those of the events before it have finished."""
        if self._running is None:
            return self._call(event, argument)
        self._running.queue.append((event, argument))
        return 0

    cdef int _call(self, int event, object argument) except -1:
        cdef Handlers table = self.table()
        cdef bint unanswered = self.short_unanswered
        cdef double begun
        result = failure = None
        if event == OPEN:
            self.opened = True
            self._tell("connected", None)
            self.arm_timer()
        elif event == CLOSE:
            if self.short_unanswered and self.error is None and self.state.loop.get_debug():
                self._warn_of_short_write()
            self.begin_closed()
        elif event == DRAIN:
            self.short_unanswered = False
        begun = now() if self.state.debug else 0
        try:
            if event == OPEN:
                result = table.on_open(self)
            elif event == DRAIN:
                result = table.on_drain(self)
            elif event == END:
                result = table.on_end(self)
            elif event == TIMEOUT:
                result = table.on_timeout(self)
            elif event == HANDSHAKE:
                result = table.on_handshake(self, argument[0], argument[1])
            elif event == ERROR:
                result = table.on_error(self, argument[0])
            elif event == CLOSE:
                result = table.on_close(self, self.error)
        except BaseException as error:
            failure = error
        if begun and result is not NotImplemented:
            self._check_slow(begun, table, event)
        if result is not None and result is not NotImplemented and is_awaitable(result):
            return self._start(event, result)
        if event == DRAIN and result is NotImplemented:
            self.short_unanswered = unanswered
        if event == ERROR and result is NotImplemented:
            # With nobody to say that the connection can go on, it does not.
            self._report(argument[0], argument[1])
            return self.begin_close()
        return self._returned(event, failure, result is NotImplemented)

    cdef int _check_slow(self, double begun, Handlers table, int event) except -1:
        handler = getattr(table, event_name(event))
        if handler is None:
            handler = type(table)  # a compiled table
        return self.state.check_slow(begun, handler, self)

    cdef int _warn_of_short_write(self) except -1:
        try:
            warnings.warn(
                f"{self!r}: the last write() took less than it was given, and neither a drain "
                "handler nor another write() followed", RuntimeWarning, stacklevel=1,
            )
        except RuntimeWarning as warning:
            # Where warnings are errors. The close event still has to be given.
            self.state.loop.call_exception_handler({
                "message": "uvsock: a short write was forgotten", "exception": warning,
                "socket": self,
            })
        return 0

    cdef int _start(self, int event, object awaitable) except -1:
        """Run an async handler; no other handler of this socket runs until it is done."""
        cdef AsyncHandler running
        if self._running is None:
            self._running = AsyncHandler.__new__(AsyncHandler)
        running = self._running
        running.event = event
        self.busy = True
        try:
            # It copies the context that its handler was called in: what it sets is seen by nobody
            # else, and it sees what a decorator has set.
            running.task = task_of(self.state.loop, awaitable, True)
        except BaseException as error:
            self.busy = False
            self._returned(event, error, False)
            return self._run_queue()
        if isinstance(running.task, Task) and running.task.done():
            return self._done(running)  # it had nothing to wait for
        running.task.add_done_callback(self._finished, context=self.group.context)
        return self.watch()

    cdef int _done(self, AsyncHandler running) except -1:
        """Its task is done: go on with what waited for that."""
        task = running.task
        running.task = None
        self.busy = False
        if task.cancelled():
            failure = asyncio.CancelledError()
        else:
            failure = task.exception()
            if isinstance(failure, ENDING_THE_RUN):
                failure = None  # the task itself has ended the run with it
        self._returned(running.event, failure, False)
        if running.closes:
            running.closes = False
            self.begin_close()
        return self._run_queue()

    cdef int release_borrowed(self, object view) except -1:
        if not self.busy:
            return Stream.release_borrowed(self, view)
        self._running.borrowed = view  # until the handler that got it is done
        return 0

    def _finished(self, task):
        cdef AsyncHandler running = self._running
        view = running.borrowed
        running.borrowed = None
        self.turn += 1
        try:
            if view is not None:
                Stream.release_borrowed(self, view)
            self._done(running)
            if self.phase < LEAVING and not self.busy:
                self.pump()
                self.check_drain()
        finally:
            self.leave_turn()

    cdef int _run_queue(self) except -1:
        cdef int event
        while not self.busy and self._running is not None and self._running.queue:
            event, argument = self._running.queue.pop(0)
            if self.phase > ENDING and (
                event in (OPEN, DRAIN, END, TIMEOUT) or (event == HANDSHAKE and argument[0])
            ):
                continue  # after close() and terminate() only `close` follows
            self._call(event, argument)
        if not self.busy:
            self._running = None
        return 0

    cdef int _returned(self, int event, object failure, bint absent) except -1:
        """A handler has returned, or raised ``failure``."""
        if failure is not None:
            self._raised(event, failure)
        if event == OPEN:
            self._tell("opened", None)
            if failure is not None:
                if self.busy:
                    self._running.closes = True  # its async error handler can still reply
                else:
                    self.begin_close()
        elif event == HANDSHAKE:
            if self.phase > ENDING and not self.opened:
                # Closed before it opened: whoever waits for that need not wait for the linger.
                self._tell("connected", self._reason())
        elif event == END:
            self.after_end()
        elif event == TIMEOUT:
            if absent:
                self.begin_close()
        elif event == ERROR:
            if self.frames is not None and self.frames.failed:
                self.begin_close()  # where the next frame begins is not known
        elif event == CLOSE:
            self.end_closed()
        return 0

    cdef int _raised(self, int event, object failure) except -1:
        """Hand what a handler raised to whom it concerns. The one place that decides this."""
        if self.state.ends_the_run(failure):
            return 0
        if isinstance(failure, asyncio.CancelledError) and self.phase >= LEAVING:
            return 0  # on purpose: the connection is gone
        if event == ERROR:
            self._report(failure, event_name(ERROR))
            return self.begin_close()
        # Right after the handler that raised, also where later events wait already.
        argument = (failure, event_name(event))
        if not self.busy:
            return self._call(ERROR, argument)
        self._running.queue.insert(0, (ERROR, argument))
        return 0

    cdef int _report(self, object failure, object handler) except -1:
        if isinstance(failure, asyncio.CancelledError):
            return 0  # the task was cancelled on purpose, as at the loop's end
        self.state.loop.call_exception_handler({
            "message": (
                f"uvsock: the {handler} handler raised" if handler is not None
                else "uvsock: the TLS session broke" if isinstance(failure, SSLError)
                else "uvsock: the framer found no frame"
            ),
            "exception": failure,
            "socket": self,
            "handler": handler,
        })
        return 0

    # ── Writing ────────────────────────────────────────────────────────────────────────────────

    @cython.binding(False)
    def write(self, data, offset=0, length=None):
        """Accept bytes for sending, without ever blocking.

        Args:
            data: ``bytes``, ``str`` (sent as UTF-8), or any C-contiguous buffer.
            offset: first byte to send, in bytes.
            length: number of bytes to send, in bytes; None for all that follow ``offset``.

        Returns:
            The number of bytes accepted. Less than asked is back-pressure: keep the rest and wait
            for ``drain``. -1 once the socket is closed, its write side has ended, or a send failed.

        Raises:
            TypeError: ``data`` is no such object.
            ValueError: ``offset`` or ``length`` lie outside the data.
        """
        if PyBytes_CheckExact(data) and offset is ZERO and length is None:
            self.state.check()
            return self._write_checked(
                PyBytes_AS_STRING(data), PyBytes_GET_SIZE(data), False, <bytes>data
            )
        return self._write_from(data, offset, length, False)

    cdef Py_ssize_t _write_from(
        self, object data, object offset, object length, bint whole
    ) except -2:
        cdef Given given
        cdef Py_ssize_t start
        self.state.check()
        acquire(data, TEXT, "data", &given)
        try:
            if offset is not ZERO or length is not None:
                start = _index("offset", offset, given.n)
                given.n -= start
                if length is not None:
                    given.n = _index("length", length, given.n)
                given.p += start
            return self._write_checked(given.p, given.n, whole, <bytes>given.owner)
        finally:
            release(&given)

    cdef inline Py_ssize_t _write_checked(
        self, const char* p, Py_ssize_t n, bint whole, bytes owner
    ) except -2:
        cdef Py_ssize_t taken = self.write_bytes(p, n, whole, owner)
        if 0 <= taken < n:
            self.short_write = self.short_unanswered = True
        elif n:
            self.short_unanswered = False
        return taken

    cdef Py_ssize_t write_memory(self, const char* p, Py_ssize_t n) except -2:
        self.state.check()
        return self._write_checked(p, n, False, None)

    cdef Py_ssize_t write_frame_memory(self, const char* p, Py_ssize_t n) except -2:
        self.state.check()
        return self.write_framed(p, n, None)

    @cython.binding(False)
    def write_frame(self, data):
        """Write one frame, with the prefix or the delimiter of the socket's framing around it.

        A frame is taken as a whole or not at all. One that is larger than the high-water mark is
        taken when nothing is held, and then all of it is held that the kernel does not take.

        Args:
            data: ``bytes``, ``str`` (sent as UTF-8), or any C-contiguous buffer.

        Returns:
            The number of bytes that the frame takes on the wire. 0 is back-pressure: keep the frame
            and wait for ``drain``. -1 as for ``write``.

        Raises:
            TypeError: ``data`` is no such object.
            ValueError: the framer cannot write this frame, as one that contains the delimiter.
            RuntimeError: the socket has no framing.
        """
        if PyBytes_CheckExact(data):
            self.state.check()
            return self.write_framed(PyBytes_AS_STRING(data), PyBytes_GET_SIZE(data), data)
        return self._write_frame_from(data)

    cdef Py_ssize_t _write_frame_from(self, object data) except -2:
        cdef Given given
        self.state.check()
        acquire(data, TEXT, "data", &given)
        try:
            return self.write_framed(given.p, given.n, <bytes>given.owner)
        finally:
            release(&given)

    async def send_all(self, data):
        """Send all of the data, waiting under back-pressure.

        Concurrent calls follow one another in order; a ``write`` in between takes 0 bytes.

        Args:
            data: as for ``write``. A mutable buffer must not change until this returns.

        Raises:
            OSError: what broke the connection.
            SocketClosedError: the socket was closed, or its write side ended, in order.
        """
        cdef Given given
        cdef Py_ssize_t offset = 0
        self.state.check()
        acquire(data, TEXT, "data", &given)
        try:
            await self._take_write_side()
            self.sending = PIECES
            try:
                while True:
                    offset += self._write_piece(given.p + offset, given.n - offset)
                    if offset == given.n:
                        return
                    await self._writable_again()
            finally:
                self._give_write_side()
        finally:
            release(&given)

    cdef Py_ssize_t _write_piece(self, const char* p, Py_ssize_t n) except -1:
        """A write of the call that has the write side to itself: how much was taken."""
        cdef unsigned char sending = self.sending
        cdef Py_ssize_t taken
        self.sending = NOBODY
        try:
            taken = self.write_bytes(p, n, False, None)
        finally:
            self.sending = sending
        if taken < 0:
            raise self._reason()
        return taken

    async def _take_write_side(self):
        """Wait for the send_all and sendfile calls before this one."""
        if not self.sending and not self._turns():
            self.sending = ONE_PIECE
            return
        turn = self._wait_for("turn")
        try:
            await turn  # whoever sets it leaves `sending` on
        except BaseException:
            self._stop_waiting("turn", turn)
            if turn.done() and not turn.cancelled():
                self._give_write_side()
            raise
        self.sending = ONE_PIECE

    def _turns(self):
        return None if self._waiters is None else self._waiters.get("turn")

    def _give_write_side(self):
        turns = self._turns()
        while turns:
            turn = next(iter(turns))
            del turns[turn]
            if not turn.done():
                turn.set_result(None)
                return
        self.sending = NOBODY
        if self.short_write and self.phase == ESTABLISHED:
            self.schedule_pump()  # a write was refused meanwhile: its drain is due

    async def drained(self):
        """Wait until the kernel has everything that was accepted.

        Raises:
            OSError: what broke the connection before that.
            SocketClosedError: ``terminate`` dropped them.
        """
        self.state.check()
        while self.pending() and not self.broken and self.phase < LEAVING:
            await self._writable_again()
        if self.error is not None:
            raise self.error
        if self.dropped:
            raise self._reason()

    async def sendfile(self, file, offset=0, count=None):
        """Send a file, by sendfile(2) where that sends what reading the file gives.

        That is where the socket is plain, and the file a regular one that ``open`` has opened. All
        others are read, in a thread.

        Args:
            file: a file opened in binary mode, or an object with its ``read`` method.
            offset: first byte of the file to send; 0 where the file cannot seek.
            count: number of bytes to send; None for all up to the end of the file.

        Returns:
            The number of bytes sent: less than ``count`` if the file ended. The file's position is
            after the last of them.

        Raises:
            OSError: what broke the connection, or reading the file.
            SocketClosedError: the socket was closed, or its write side ended, in order.
        """
        self.state.check()
        if not hasattr(file, "read") or is_text(file):
            raise TypeError("file: must be a file opened in binary mode")
        _index("offset", offset, LLONG_MAX)
        if count is not None:
            _index("count", count, LLONG_MAX)
        await self._take_write_side()
        try:
            if self.phase != ESTABLISHED or self.broken:
                raise self._reason()
            return await send_file(
                self.state.loop, file, offset, count, self._send_from, self._send_piece
            )
        finally:
            self._give_write_side()

    async def _send_from(self, file, position, size):
        """What sendfile(2) takes of a file."""
        self.flush_now()
        while True:
            while self.blocked or self.pending():
                await self._writable_again()
                if self.phase != ESTABLISHED or self.broken:
                    raise self._reason()
            if self.tls is not None:  # by upgrade_tls() meanwhile
                raise asyncio.SendfileNotAvailableError("the socket is encrypted")
            if self.phase != ESTABLISHED or self.broken:
                raise self._reason()
            try:
                done = sendfile(self.fd, file, position, size)
            except BlockingIOError:
                self.arm_writer()
                continue
            except OSError as error:
                self._broken(error.errno)
                raise self._reason() from None
            self.bytes_written += done
            if self.group.idle_timeout > 0:
                self.deadlines().active = now()
            return done

    async def _send_piece(self, data):
        """All of some bytes, for the call that has the write side to itself."""
        cdef Given given
        cdef Py_ssize_t offset = 0
        acquire(data, BUFFERS, "data", &given)
        try:
            while True:
                offset += self._write_piece(given.p + offset, given.n - offset)
                if offset == given.n:
                    return
                await self._writable_again()
        finally:
            release(&given)

    def flush(self):
        """Send what is held now, as far as the kernel takes it."""
        self.state.check()
        self.flush_now()

    def cork(self):
        """A context manager that holds what is written, also outside handlers, until it exits."""
        self.state.check()
        return Cork(self)

    # ── Ending ─────────────────────────────────────────────────────────────────────────────────

    def end(self, data=b""):
        """Write a last chunk and end the own side; the peer's data is still delivered.

        Args:
            data: as for ``write``; always taken whole.

        Returns:
            The length of ``data`` in bytes, or -1 if the write side has ended already.
        """
        cdef Py_ssize_t taken = self._write_from(data, ZERO, None, True)
        if self.phase != ESTABLISHED or self.broken:
            return -1
        self.begin_end()
        return taken

    def shutdown(self, read=False):
        """Half-close: end the own side, or with ``read`` drop whatever the peer still sends."""
        self.state.check()
        check_flag("read", read)
        if read:
            self.read_off = True
        elif self.phase == ESTABLISHED:
            self.begin_end()

    def close(self):
        """Deliver what was accepted, then close. Incoming data is dropped meanwhile.

        Bounded by ``linger_timeout``: a peer that takes nothing for that long gets an RST, and
        ``close`` a ``TimeoutError``.
        """
        self.state.check()
        self.short_unanswered = False  # an answer too
        self.begin_close()

    def terminate(self):
        """Close at once with an RST; what the kernel does not have yet is dropped."""
        self.state.check()
        self.short_unanswered = False
        self._enter(CLOSING)  # from here on only `close` follows
        self.begin_abort(None, True)

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self.end()

    async def wait_closed(self):
        """Wait until the ``close`` handler has returned."""
        self.state.check()
        if self._over:
            return
        waiter = self._wait_for("closed")
        try:
            await waiter
        finally:
            self._stop_waiting("closed", waiter)

    # ── Flow, time and life ────────────────────────────────────────────────────────────────────

    def pause(self):
        """Stop reading. ``end`` is held back too; a TLS handshake goes on."""
        self.state.check()
        self.paused = True
        self.watch()

    def resume(self):
        """Undo ``pause``; what was received meanwhile is delivered in the next iteration."""
        self.state.check()
        if self.paused:
            self.paused = False
            if self.phase < LEAVING and self.transport is not None:
                self.schedule_pump()

    @cython.binding(False)
    def timeout(self, seconds):
        """Have ``timeout`` called once, this many seconds from now.

        Args:
            seconds: not negative; 0 turns it off. Traffic does not move it.
        """
        self.state.check()
        cdef double delay = -1
        cdef int overflow = 0
        if type(seconds) is float:
            delay = seconds
        elif type(seconds) is int:
            delay = PyLong_AsLongAndOverflow(seconds, &overflow)
        if not 0 <= delay < INFINITY or overflow:  # the check alone would cost as much as an echo
            delay = check_seconds("seconds", seconds, allow_none=False, allow_zero=True)
        if delay > 0:
            self.deadlines().timeout = now() + delay
            self.arm_timer()
        elif self._deadlines is not None:
            self._deadlines.timeout = 0

    def ref(self):
        """Let this socket keep ``run`` going, as it does by default."""
        self.state.check()
        if self.unreferenced:
            self.unreferenced = False
            if self.alive:
                self.state.hold()

    def unref(self):
        """Do not let this socket keep ``run`` going."""
        self.state.check()
        if not self.unreferenced:
            self.unreferenced = True
            if self.alive:
                self.state.release()

    def reload(self, handlers):
        """Replace the table of handlers: a client's own, or on an accepted socket its listener's.

        A handler that runs finishes on the old table.

        Raises:
            TypeError: not a table; nothing is changed.
        """
        self.state.check()
        table = as_handlers(handlers)
        if self._own is not None:
            self._own = table
        else:
            (<Group>self.group).handlers = table

    def upgrade_tls(self, tls, handlers=None, server_side=None, leftover=b""):
        """Start TLS on this connection (STARTTLS, RFC 3207).

        What was written before goes out plain; all that arrives after the call is TLS.

        Args:
            tls: TLS options, as for ``listen`` or ``connect``.
            handlers: a table of this socket's own from here on, or None to keep the table.
            server_side: which end this is; None for the one that accepted or connected.
            leftover: bytes of the current chunk that belong to TLS already.

        Returns:
            A Future of the socket, done when the handshake is. It need not be awaited.

        Raises:
            TypeError, ValueError: an argument is wrong; nothing is changed.
            RuntimeError: the socket is not open, encrypted already, or sending a file.
        """
        cdef Group group = <Group>self.group
        cdef Given given
        self.state.check()
        if server_side is None:
            server_side = group.listener is not None
        else:
            check_flag("server_side", server_side)
        acquire(leftover, BUFFERS, "leftover", &given)
        try:
            data = PyBytes_FromStringAndSize(given.p, given.n)
        finally:
            release(&given)
        table = None if handlers is None else as_handlers(handlers)
        hostname = None
        if server_side:
            context = server_context(tls)
        else:
            found = client_context(tls)
            context, hostname = found if found is not None else (None, None)
            if hostname is None:
                hostname = group.server_hostname
        if context is None:
            raise ValueError("tls: must be given: an upgrade to plain text is none")
        if self.tls is not None:
            raise RuntimeError("upgrade_tls: the socket is encrypted already")
        if self.phase != ESTABLISHED or self.broken:
            raise RuntimeError("upgrade_tls: the socket is not open for writing")
        if self.sending == ONE_PIECE:
            raise RuntimeError("upgrade_tls: unable to write; sendfile is in progress")
        self.begin_tls(context, server_side, hostname, group.handshake_timeout)
        if table is not None:
            self._own = table
        if self.frames is not None:
            data += self.frames.take()
            self.frames.change(None)
        if data:
            self.stash = [data] if self.stash is None else [data, *self.stash]
        upgrading = self._wait_for("upgraded")
        self.schedule_pump()
        return upgrading

    def set_framing(self, framing=None):
        """Cut what is received from here on into frames in another way.

        In a ``data`` handler this begins right behind the frame that it was called with. Without
        framing until then, it begins with the next bytes that arrive.

        Args:
            framing: as for ``listen``; None to deliver what arrives as it comes.

        Raises:
            TypeError: not a framer; nothing is changed.
        """
        cdef Framer framer = as_framer(framing)
        self.state.check()
        if self.frames is None:
            if framer is None:
                return
            self.frames = FrameReader.__new__(FrameReader)
        self.frames.change(framer)
        if self.phase < LEAVING and self.frames.more:
            self.schedule_pump()

    def set_no_delay(self, enable=True):
        """Send small segments at once (TCP_NODELAY). False where it does not apply."""
        self.state.check()
        check_flag("enable", enable)
        return self.fd >= 0 and self.tcp != 0 and bool(set_no_delay(self.fd, enable))

    def set_keep_alive(self, enable=False, initial_delay=0.0):
        """Probe an idle peer (SO_KEEPALIVE). False where it does not apply.

        Args:
            enable: whether to probe.
            initial_delay: idle seconds before the first probe; 0 for the system's own.
        """
        self.state.check()
        check_flag("enable", enable)
        cdef double delay = check_seconds(
            "initial_delay", initial_delay, allow_none=False, allow_zero=True
        )
        return (
            self.fd >= 0 and self.tcp != 0
            and bool(set_keep_alive(self.fd, enable, delay))
        )

    # ── What it is ─────────────────────────────────────────────────────────────────────────────

    def fileno(self):
        """The descriptor, or -1 once closed. It belongs to the socket: do not close or read it."""
        return self.fd

    @property
    def ready_state(self):
        """What the socket can still do, as a ``ReadyState``."""
        if self.phase == ESTABLISHED:
            return STATE_ESTABLISHED
        if self.phase == CONNECTING:
            return STATE_CONNECTING
        if self.phase == CLOSED or (self.phase == LEAVING and not self.opened):
            return STATE_CLOSED
        return STATE_SHUTDOWN

    @property
    def listener(self):
        """The listener that accepted it; None on clients and once ``close`` has returned."""
        return None if self._over else (<Group>self.group).listener

    @property
    def encrypted(self):
        """Whether the connection uses TLS."""
        return self.tls is not None

    cdef object _end(self, str name):
        """An address of the connection's, as the socket module has it; None on Unix sockets."""
        return self.transport_info(name, None) if self.tcp else None

    @property
    def remote_address(self):
        """The peer's IP address; None on Unix sockets."""
        return _address(self._end("peername"))

    @property
    def remote_port(self):
        """The peer's port; None on Unix sockets."""
        return _port(self._end("peername"))

    @property
    def remote_family(self):
        """``"IPv4"`` or ``"IPv6"``; None on Unix sockets."""
        return _family(self._end("peername"))

    @property
    def local_address(self):
        """The own IP address; None on Unix sockets."""
        return _address(self._end("sockname"))

    @property
    def local_port(self):
        """The own port; None on Unix sockets."""
        return _port(self._end("sockname"))

    @property
    def local_family(self):
        """``"IPv4"`` or ``"IPv6"``; None on Unix sockets."""
        return _family(self._end("sockname"))

    @property
    def writable_length(self):
        """Bytes accepted that the kernel does not have yet; plain text for TLS."""
        return self.pending()

    @property
    def high_water_mark(self):
        """The most that ``write`` lets be held, in bytes."""
        return self.group.high_water_mark

    @property
    def framing(self):
        """The framer that cuts what is received, or None."""
        return None if self.frames is None else self.frames.framer

    @property
    def unframed(self):
        """Bytes received that are in no frame yet; in ``end``, those of an unfinished frame."""
        return 0 if self.frames is None else self.frames.held()

    @property
    def truncated(self):
        """Whether the peer ended a TLS session without close_notify: data may be missing."""
        return bool(self.cut_off)

    def get_extra_info(self, name, default=None):
        """What asyncio names: peername, sockname, socket, ssl_object, cipher, peercert..."""
        if self.tls is not None and not self.tls.handshaking:
            if name == "ssl_object":
                return self.tls.sslobj
            if name == "sslcontext":
                return self.tls.sslobj.context
            if name == "cipher":
                return self.tls.sslobj.cipher()
            if name == "compression":
                return self.tls.sslobj.compression()
            if name == "peercert":
                return self.tls.sslobj.getpeercert()
        if self.transport is None or (self.fd < 0 and not self.tcp):
            return default
        return self.transport_info(name, default)

    # ── TLS ────────────────────────────────────────────────────────────────────────────────────

    cdef object _session(self):
        """The ssl.SSLObject once the handshake has succeeded, else None."""
        return None if self.tls is None or self.tls.handshaking else self.tls.sslobj

    @property
    def authorized(self):
        """Whether the peer showed a certificate and it was verified."""
        session = self._session()
        return (
            session is not None and session.context.verify_mode != 0
            and session.getpeercert(binary_form=True) is not None
        )

    @property
    def authorization_error(self):
        """Why the peer's certificate was refused, or None."""
        return self.error if type(self.error).__name__ == "SSLCertVerificationError" else None

    @property
    def alpn_protocol(self):
        """The protocol agreed on; None before the handshake, False if none was."""
        session = self._session()
        return None if session is None else session.selected_alpn_protocol() or False

    @property
    def server_name(self):
        """The name the client asked for (SNI, RFC 6066), or None."""
        if self.tls is None:
            return None
        name = getattr(self.tls.sslobj, "_uvsock_server_name", None)
        return name if name is not None else self.tls.sslobj.server_hostname

    @property
    def tls_version(self):
        """``"TLSv1.3"`` or ``"TLSv1.2"``; None before the handshake and on a plain socket."""
        session = self._session()
        return None if session is None else session.version()

    @property
    def cipher(self):
        """``(name, protocol, secret bits)``; None before the handshake and on a plain socket."""
        session = self._session()
        return None if session is None else session.cipher()

    @property
    def session_reused(self):
        """Whether the handshake resumed an earlier session; None on a plain socket."""
        session = self._session()
        return None if session is None else session.session_reused

    def peer_certificate(self, binary=False):
        """The peer's certificate: the dict of ``ssl.SSLSocket.getpeercert``, or DER bytes.

        None if there is none; the dict is empty if it was not verified.
        """
        check_flag("binary", binary)
        session = self._session()
        return None if session is None else session.getpeercert(binary_form=binary)

    def channel_binding(self):
        """The session's ``tls-unique`` binding (RFC 5929), or None."""
        session = self._session()
        return None if session is None else session.get_channel_binding("tls-unique")


cdef object _index(str name, object value, object limit):
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name}: must be an int, not {type(value).__name__}")
    if not 0 <= value <= limit:
        raise ValueError(f"{name}: must be between 0 and {limit}, not {value}")
    return value


cdef object _address(tuple end):
    if end is None:
        return None
    if len(end) == 2 or not end[3]:
        return end[0]
    try:
        return f"{end[0]}%{stdlib.if_indextoname(end[3])}"
    except OSError:
        return f"{end[0]}%{end[3]}"  # the interface has gone


cdef object _port(tuple end):
    return None if end is None else end[1]


cdef object _family(tuple end):
    if end is None:
        return None
    return "IPv4" if len(end) == 2 else "IPv6"
