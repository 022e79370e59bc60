"""asyncio's transports: the whole of its interface, on the socket core."""

import asyncio
import contextvars
import ssl
import sys

cimport cython
from cpython.buffer cimport (
    PyBUF_SIMPLE, PyBUF_WRITABLE, PyBuffer_Release, PyObject_CheckBuffer, PyObject_GetBuffer,
)
from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_CheckExact, PyBytes_GET_SIZE
from libc.math cimport INFINITY
from libc.string cimport memcpy

from uvsock._framing cimport AS_BYTES
from uvsock._given cimport ANY_LAYOUT, Given, acquire, release
from uvsock._poller cimport UVS_READ
from uvsock._stream cimport (
    CLOSING, ENDING, ESTABLISHED, LEAVING, NOBODY, ONE_PIECE, Stream, StreamGroup, now,
    receive_into, shut_both,
)

from uvsock.dropin._lingering cimport keep_until_delivered

cdef extern from "Python.h":
    int PyContext_Enter(object context) except -1
    int PyContext_Exit(object context) except -1

cdef extern from *:
    """
    /* The interpreter makes another with the first attribute that is set. */
    static void drop_dict(PyObject *object) {
        PyObject **found = _PyObject_GetDictPtr(object);
        if (found != NULL)
            Py_CLEAR(*found);
    }
    """
    void drop_dict(object)

cdef enum:
    # asyncio's own defaults (asyncio.constants.FLOW_CONTROL_HIGH_WATER_MARK_SSL_WRITE aside).
    UVS_HIGH_WATER = 65536
    # Bytes that are held, within one callback, before the first of them is sent.
    UVS_CORK_LIMIT = 65536

# Seconds: asyncio's.
cdef double UVS_TLS_HANDSHAKE = 60.0
cdef double UVS_TLS_SHUTDOWN = 30.0

cdef frozenset ABOUT_TLS = frozenset({
    "ssl_object", "sslcontext", "peercert", "cipher", "compression",
})
cdef object Protocol = asyncio.Protocol
cdef object BufferedProtocol = asyncio.BufferedProtocol
cdef object NOTHING = object()
# Here, not where it is used: programs replace asyncio's classes by compiled ones.
cdef object StreamReaderProtocol = asyncio.StreamReaderProtocol
cdef tuple ENDING_THE_RUN = (KeyboardInterrupt, SystemExit)


def _positive(name, value, default):
    if value is None:
        return default
    if not value > 0:
        raise ValueError(f"{name} should be a positive number, got {value}")
    return value


class _PlainTransport(asyncio.Transport):
    """The class that a transport says it is of: asyncio.Transport cannot be inherited from in C."""

    __slots__ = ()


class _SSLTransport(asyncio.Transport):
    """The same with TLS."""

    __slots__ = ()


_PlainTransport.__name__ = _PlainTransport.__qualname__ = "Transport"
_SSLTransport.__name__ = _SSLTransport.__qualname__ = "SSLTransport"


cdef class CompiledProtocol:
    """Base of a protocol that gets its bytes by a C call instead of ``data_received``."""

    cdef int bytes_received(self, const char* data, Py_ssize_t size, bytes owner) except -1:
        raise TypeError(f"{type(self).__name__} does not define bytes_received()")

    cdef bytes take_unread(self):
        return b""


cdef class TransportGroup(StreamGroup):
    """What the transports of one server, or one connection, share. Calling it makes a transport."""

    def __init__(self, state, *, tls_context=None, server_side=False, server_hostname=None,
                 protocol_factory=None, handshake_timeout=None, shutdown_timeout=None,
                 context=None):
        self.state = state
        self.context = contextvars.copy_context() if context is None else context
        self.tls_context = tls_context
        self.server_side = server_side
        self.server_hostname = server_hostname
        self.protocol_factory = protocol_factory
        self.handshake_timeout = _positive(
            "ssl_handshake_timeout", handshake_timeout, UVS_TLS_HANDSHAKE)
        self.linger_timeout = _positive(
            "ssl_shutdown_timeout", shutdown_timeout, UVS_TLS_SHUTDOWN)
        self.allow_half_open = True  # eof_received says
        self.cork = True
        self.no_delay = True
        self.delivery = AS_BYTES
        self.high_water_mark = UVS_CORK_LIMIT
        self.keep_alive = -1.0
        self.idle_timeout = 0.0

    def close(self):
        """Close the connections: ``Server.close_clients``."""
        for transport in self.sockets.copy():
            transport.close()

    def abort(self):
        """Close the connections at once: ``Server.abort_clients``."""
        for transport in self.sockets.copy():
            transport.abort()

    def __call__(self):
        cdef Transport transport = Transport.__new__(Transport)
        drop_dict(transport)  # Cython makes one for each, of 64 bytes
        transport.group = self
        transport.state = self.state
        transport.unreferenced = True
        transport.high = UVS_HIGH_WATER
        transport.low = UVS_HIGH_WATER // 4
        transport.handshake_timeout = self.handshake_timeout
        transport.shutdown_timeout = self.linger_timeout
        return transport


cdef class Transport(Stream):
    """Transport()\n--\n
    A connection over TCP, a Unix socket or TLS, as asyncio's programs use it."""

    def __init__(self):
        raise TypeError("a Transport is made by the event loop")

    def __reduce__(self):
        raise TypeError("cannot pickle 'Transport' object")

    @property
    def __class__(self):
        return _PlainTransport if self.tls is None else _SSLTransport

    def __repr__(self):
        cdef list parts = ["uvsock." + self.__class__.__name__]
        if self.phase >= LEAVING and self.fd < 0:
            parts.append("closed")
        else:
            if self.phase >= CLOSING:
                parts.append("closing")
            parts.append(f"fd={self.fd}")
            parts.append("read=" + ("polling" if self.is_reading() else "idle"))
            parts.append(f"write=<{'polling' if self.blocked else 'idle'}, "
                         f"bufsize={self.pending()}>")
        return f"<{' '.join(parts)}>"

    # ── Calling the protocol ───────────────────────────────────────────────────────────────────

    # As on asyncio, what a connection sets in its context is seen by itself alone. uvloop runs all
    # connections of a server in one, so each has a copy, and each call enters it. A compiled
    # protocol, which calls nothing of the program's when data comes, gets that without.

    cdef object _enter_context(self):
        """A call begins: what `_leave_context` is to be given when it is over."""
        if self.inside:
            return None  # within another call, as pause_writing() of a write in data_received()
        if self.context is None:
            self.context = self.group.context.copy()
        context = self.context
        PyContext_Enter(context)
        self.inside = True
        return context

    cdef int _leave_context(self, object context) except -1:
        if context is None:
            return 0
        self.inside = False
        return PyContext_Exit(context)

    @property
    def _context(self):
        return self.group.context if self.context is None else self.context

    cdef object _call(self, object method, object argument):
        """Call a method of the protocol with this argument, or NOTHING."""
        cdef double begun = now() if self.state.debug else 0
        context = self._enter_context()
        try:
            return method() if argument is NOTHING else method(argument)
        finally:
            self._leave_context(context)
            if begun:
                self.state.check_slow(begun, method, self)

    # ── Opening ────────────────────────────────────────────────────────────────────────────────

    def _open_for(self, protocol):
        """A client's: a Future that is done when ``connection_made`` has returned."""
        self._use(protocol)
        self.opening = self.state.loop.create_future()
        return self.opening

    def _start_reading(self):
        """The caller of create_connection() has its transport: data may come."""
        self.busy = False
        if self.phase < LEAVING:
            self.schedule_pump()

    def _drop(self, error=None):
        """The attempt that this was made for has failed or was cancelled."""
        self.opening = None
        self.handshake_told = True  # that it is over is not the peer's doing
        if self.transport is None:
            self._enter(LEAVING)
        else:
            self.begin_abort(error, False)

    cdef int on_made(self) except -1:
        cdef TransportGroup group = <TransportGroup>self.group
        if group.protocol_factory is None:
            return 0
        try:
            self._use(self._call(group.protocol_factory, NOTHING))
        except BaseException as error:
            self._enter(LEAVING)
            if not self.state.ends_the_run(error):
                self.state.loop.call_exception_handler({
                    "message": "Error on transport creation for incoming connection",
                    "exception": error,
                })
        return 0

    cdef int on_open(self) except -1:
        self.opened = True
        self.busy = self.opening is not None
        try:
            self._call(self.protocol.connection_made, self)
        except BaseException as error:
            if self.state.ends_the_run(error):
                pass
            elif self.tls is not None:
                # As asyncio: with TLS the connection ends, without it goes on.
                if self.opening is None:
                    self._report("Fatal error: protocol.connection_made() call failed.", error)
                self._opened(error)
                return self.begin_abort(error, False)
            else:
                self._report("protocol.connection_made() failed", error)
        if self.compiled is not None:
            self.context = None  # an idle stream can do without
        return self._opened(None)

    cdef int _opened(self, object error) except -1:
        """Tell who waits for the connection, or for its upgrade."""
        opening = self.opening
        self.opening = None
        if opening is not None and not opening.done():
            if error is None:
                opening.set_result(None)
            else:
                opening.set_exception(error)
        return 0

    cdef int _continue_handshake(self) except -1:
        context = self._enter_context()  # an SNI callback is the program's too
        try:
            return Stream._continue_handshake(self)
        finally:
            self._leave_context(context)

    cdef int on_handshake(self, bint success, object error) except -1:
        if success:
            return self._opened(None) if self.opened else 0
        if isinstance(error, ssl.SSLEOFError) or error is None:
            # Nothing that OpenSSL said: the connection broke.
            cause = error.__cause__ if error is not None else None
            error = cause if cause is not None else ConnectionResetError(
                "the peer closed the connection during the TLS handshake")
        if self.opening is None and self.state.loop.get_debug():
            self._report("SSL handshake failed", error)
        if self.opened:
            self.error = error  # an upgrade's: connection_lost tells
        return self._opened(error)

    # ── Reading ────────────────────────────────────────────────────────────────────────────────

    cdef int _use(self, object protocol) except -1:
        self.protocol = protocol
        self.compiled = protocol if isinstance(protocol, CompiledProtocol) else None
        # By its base class, and by what it has: programs derive from both, or BaseProtocol only.
        if isinstance(protocol, BufferedProtocol) or (
            not isinstance(protocol, Protocol) and hasattr(protocol, "get_buffer")
        ):
            self.get_buffer = protocol.get_buffer
            self.buffer_updated = protocol.buffer_updated
        else:
            self.get_buffer = self.buffer_updated = None
        return 0

    def get_protocol(self):
        """The protocol that events go to."""
        return self.protocol

    def set_protocol(self, protocol):
        """Have another protocol get the events from here on."""
        self.state.check()
        self._use(protocol)

    cdef int receive(self) except -1:
        cdef Py_buffer view
        cdef Py_ssize_t n
        if self.get_buffer is None or self.tls is not None or self.phase > ENDING:
            return Stream.receive(self)
        updated = self.buffer_updated  # get_buffer() may set another protocol
        try:
            lent = self._call(self.get_buffer, -1)
            PyObject_GetBuffer(lent, &view, PyBUF_SIMPLE | PyBUF_WRITABLE)
        except BaseException as error:
            return self._failed("get_buffer", error)
        if view.len == 0:
            PyBuffer_Release(&view)
            return self._failed(
                "get_buffer", RuntimeError("get_buffer() returned an empty buffer"))
        if not self.watching & UVS_READ:
            PyBuffer_Release(&view)
            return 0  # it has paused or closed the connection
        n = receive_into(self.fd, view.buf, view.len)
        PyBuffer_Release(&view)
        if n <= 0:
            return self.nothing_received(n)
        self.bytes_read += n
        try:
            self._call(updated, n)
        except BaseException as error:
            return self._failed("buffer_updated", error)
        return 0

    cdef int deliver(self, const char* p, Py_ssize_t n, object owner) except -1:
        if self.compiled is not None:
            try:
                self.compiled.bytes_received(p, n, owner if PyBytes_CheckExact(owner) else None)
            except BaseException as error:
                self._failed("data_received", error)
            return 0
        if self.get_buffer is not None:
            return self._fill(p, n)
        return Stream.deliver(self, p, n, owner)

    cdef int on_data(self, object data) except -1:
        if self.state.debug:
            self._call(self.protocol.data_received, data)
            return 0
        context = self._enter_context()
        try:
            self.protocol.data_received(data)
        finally:
            self._leave_context(context)
        return 0

    cdef int on_data_raised(self, object error) except -1:
        return self._failed("data_received", error)

    cdef int _fill(self, const char* data, Py_ssize_t size) except -1:
        """Copy to the protocol's buffers, as many as that takes."""
        cdef Py_buffer view
        cdef Py_ssize_t n
        self.filling = data
        self.left = size  # start_tls() takes it
        while self.left > 0 and self.phase <= ENDING:
            if self.get_buffer is None:
                # buffer_updated() has set another protocol.
                rest = self._take_left()
                return self.deliver(PyBytes_AS_STRING(rest), PyBytes_GET_SIZE(rest), rest)
            if self.paused:
                self.unfilled = self._take_left()  # ... or has paused
                self.full = True
                return 0
            updated = self.buffer_updated  # get_buffer() may set another protocol
            try:
                lent = self._call(self.get_buffer, self.left)
                if not _writable_size(lent):
                    raise RuntimeError("get_buffer() returned an empty buffer")
                if self.phase > ENDING or self.left == 0:
                    return 0  # get_buffer() has closed the connection, or begun TLS
                PyObject_GetBuffer(lent, &view, PyBUF_SIMPLE | PyBUF_WRITABLE)
            except BaseException as error:
                return self._failed("get_buffer", error)
            n = min(self.left, view.len)
            memcpy(view.buf, self.filling, n)
            PyBuffer_Release(&view)
            self.filling += n
            self.left -= n
            try:
                self._call(updated, n)
            except BaseException as error:
                return self._failed("buffer_updated", error)
        return 0

    cdef bytes _take_left(self):
        rest = self.filling[:self.left]
        self.left = 0
        return rest

    cdef int pump(self) except -1:
        rest = self.unfilled
        if rest is not None and not self.paused and not self.busy:
            self.unfilled = None
            self.full = False
            self.deliver(PyBytes_AS_STRING(rest), PyBytes_GET_SIZE(rest), rest)
        return Stream.pump(self)

    cdef int on_end(self) except -1:
        try:
            keep_open = self._call(self.protocol.eof_received, NOTHING)
        except BaseException as error:
            return self._failed("eof_received", error)
        self.peer_ended = True
        if not keep_open:
            return self._close()
        return 0

    def pause_reading(self):
        """Stop reading: no more data and no end until ``resume_reading``."""
        self.state.check()
        if not self.paused and self.phase < CLOSING:
            self.paused = True
            self.watch()

    def resume_reading(self):
        """Undo ``pause_reading``; what has arrived meanwhile comes in the next iteration."""
        self.state.check()
        if self.paused and self.phase < CLOSING:
            self.paused = False
            if self.transport is not None:
                self.schedule_pump()

    def is_reading(self):
        """Whether data is being received."""
        return not self.paused and self.phase < CLOSING

    # ── Writing ────────────────────────────────────────────────────────────────────────────────

    @cython.binding(False)
    def write(self, data):
        """Send bytes, in order: when the running callback returns, or by the end of the iteration.

        Raises:
            TypeError: not a bytes-like object.
            RuntimeError: after ``write_eof``, or while a file is sent.
        """
        self._write_object(data)

    cdef int _write_object(self, object data) except -1:
        cdef Given given
        if PyBytes_CheckExact(data):
            return self._write(PyBytes_AS_STRING(data), PyBytes_GET_SIZE(data), data)
        if not PyObject_CheckBuffer(data):
            raise TypeError(
                f"data argument must be a bytes-like object, not {type(data).__name__!r}"
            )
        acquire(data, ANY_LAYOUT, "data", &given)
        try:
            return self._write(given.p, given.n, None)
        finally:
            release(&given)

    @cython.binding(False)
    def writelines(self, list_of_data):
        """Send several chunks of bytes, from any iterable; none if one of them is wrong."""
        cdef list chunks = list_of_data if type(list_of_data) is list else list(list_of_data)
        cdef Py_ssize_t index = 0
        cdef bint at_once
        for chunk in chunks:
            if not PyObject_CheckBuffer(chunk):
                raise TypeError(f"sequence item {index}: expected a bytes-like object, "
                                f"{type(chunk).__name__} found")
            index += 1
        self._check_writable()  # also with nothing to write
        at_once = self._enter_write()
        try:
            for chunk in chunks:
                self._write_object(chunk)
        finally:
            self._leave_write(at_once)

    cdef int _write(self, const char* data, Py_ssize_t size, bytes owner) except -1:
        cdef bint at_once
        if self.turn:
            return self.write_from(data, size, owner)
        at_once = self._enter_write()
        try:
            return self.write_from(data, size, owner)
        finally:
            self._leave_write(at_once)

    # A write outside the transport's own callbacks, mostly of a task, is a turn of its own.

    cdef bint _enter_write(self) except -1:
        """A write begins: whether what it takes leaves when it ends."""
        self.state.check()
        self.turn += 1
        return self.turn == 1 and self.state.answers_at_once(self)

    cdef int _leave_write(self, bint at_once) except -1:
        if at_once or self.turn > 1 or self.phase >= ENDING:  # closed in pause_writing()
            return self.leave_turn()
        self.turn -= 1
        return self._flush_later() if self.pending() else 0

    cdef int _check_writable(self) except -1:
        self.state.check()
        if self.eof_written:
            raise RuntimeError("Cannot call write() after write_eof()")
        if self.sending:
            raise RuntimeError("unable to write; sendfile is in progress")
        return 0

    cdef int write_from(self, const char* data, Py_ssize_t size, bytes owner) except -1:
        """Take these bytes; ``owner`` is the object that they are all of, or None."""
        self._check_writable()
        self.write_bytes(data, size, True, owner)
        if not self.writing_paused and self.pending() > self.high:
            return self._pause_writing()
        return 0

    cdef int flush(self) except -1:
        """Send what is held, now."""
        return self.flush_now()

    def write_eof(self):
        """End the own side once everything written has left; the peer's data still comes.

        Raises:
            RuntimeError: while a file is sent.
        """
        self.state.check()
        if self.sending:
            raise RuntimeError("unable to write; sendfile is in progress")
        if self.phase == ESTABLISHED:
            self.eof_written = True
            self.begin_end()

    def can_write_eof(self):
        """True: with TLS too, by close_notify."""
        return True

    def get_write_buffer_size(self):
        """Bytes written that the kernel does not have yet (plain text with TLS)."""
        return self.pending()

    def get_write_buffer_limits(self):
        """The low-water and the high-water mark, in bytes."""
        return self.low, self.high

    def set_write_buffer_limits(self, high=None, low=None):
        """Set when the protocol's ``pause_writing`` and ``resume_writing`` are called.

        Args:
            high: pause above this many bytes; by default 64 KiB, or four times ``low``.
            low: resume at this many or fewer; by default a quarter of ``high``.

        A protocol that is paused and has no more than ``low`` held is resumed at once.

        Raises:
            ValueError: negative, or ``low`` above ``high``.
        """
        self.state.check()
        if high is None:
            high = UVS_HIGH_WATER if low is None else 4 * low
        if low is None:
            low = high // 4
        if not high >= low >= 0:
            raise ValueError(f"high ({high!r}) must be >= low ({low!r}) must be >= 0")
        self.high = min(int(high), sys.maxsize)
        self.low = min(int(low), sys.maxsize)
        if self.writing_paused:
            self._resume_if_low()
        elif self.pending() > self.high:
            self._pause_writing()

    cdef int _pause_writing(self) except -1:
        if not self.blocked:
            self.flush_now()  # held only to leave together with what comes next
            if self.pending() <= self.high:
                return 0
        self.writing_paused = self.pausing = True
        try:
            self._call(self.protocol.pause_writing, NOTHING)
        except ENDING_THE_RUN:
            raise
        except BaseException as error:
            self._report("protocol.pause_writing() failed", error)
        finally:
            self.pausing = False
        return self._resume_if_low()  # it may have raised the limits

    cdef int _resume_if_low(self) except -1:
        if (
            self.writing_paused and not self.pausing and self.pending() <= self.low
            # The last bytes of a closed transport take the FIN with them, and it leaves.
            and not self.broken and (self.phase < LEAVING or self.fin_sent)
        ):
            return self._resume_writing()
        return 0

    cdef int _resume_writing(self) except -1:
        self.writing_paused = False
        self.turn += 1
        try:
            self._call(self.protocol.resume_writing, NOTHING)
        except BaseException as error:
            if not self.state.ends_the_run(error):
                self._report("protocol.resume_writing() failed", error)
        finally:
            self.leave_turn()
        return 0

    cdef int on_writable(self) except -1:
        Stream.on_writable(self)
        return self._resume_if_low()

    # ── Sending files ──────────────────────────────────────────────────────────────────────────

    async def _written(self):
        """Wait until everything written has left, or the connection is gone."""
        self.flush_now()
        while self.pending() and self.phase < LEAVING and not self.broken:
            await self._writable_again()

    def _begin_file(self):
        """Refuse other writes until ``_end_file``."""
        if self.sending:
            raise RuntimeError("sendfile is in progress")
        if self.tls is not None:
            raise asyncio.SendfileNotAvailableError("the transport is encrypted")
        self.sending = ONE_PIECE

    def _end_file(self, Py_ssize_t sent):
        self.sending = NOBODY
        self.bytes_written += sent

    # ── Ending ─────────────────────────────────────────────────────────────────────────────────

    cdef int _leave(self) except -1:
        if self.sending and self.fd >= 0:
            # sendfile() has a duplicate of the descriptor, which would go on sending.
            shut_both(self.fd)
        return Stream._leave(self)

    def close(self):
        """Send what was written, then close; ``connection_lost`` follows."""
        self.state.check()
        self._close()

    def abort(self):
        """Close at once; what the kernel has no room for is lost."""
        self.state.check()
        if not self.blocked:
            self.flush_now()  # with asyncio's own transports it would have left already
        self.begin_abort(None, False)

    def is_closing(self):
        """Whether the connection is closing or closed."""
        return bool(self.phase >= CLOSING or self.broken)

    def _force_close(self, exc):
        """Close at once, for this reason: asyncio's own TLS, used on a transport, calls it."""
        self.begin_abort(exc, False)

    cdef int _close(self) except -1:
        if self.phase >= CLOSING:
            return 0
        self.begin_close()
        if self.fin_sent and self.tls is None and self.phase < LEAVING:
            self.peer_ended = True  # write_eof() came first; the peer is not waited for
            return self._finish()
        return 0

    cdef int _send_fin(self) except -1:
        if self.phase == CLOSING and self.cut_off:
            # As asyncio: a peer that went without close_notify is sent none.
            self.fin_sent = True
            return self._finish()
        return Stream._send_fin(self)

    cdef int shut_down(self) except -1:
        if self.phase < CLOSING:
            self.half_close()  # also where the peer has ended: the program closes when it likes
            return 0
        # asyncio's close() does not wait for the peer, other than for its close_notify, so the
        # descriptor's close says it all.
        if self.tls is None:
            if self.tcp and not self.tcp_eof:
                keep_until_delivered(self.state, self.fd)
            self.peer_ended = True
        return 0

    cdef int _finish(self) except -1:
        if self.phase < CLOSING:
            return 0  # both sides have ended, but it is the program that closes
        if self.tls is not None and self.opened and self.peer_ended and not self.end_given:
            self.end_given = True  # with TLS asyncio tells of the peer's end after close() too
            try:
                self._call(self.protocol.eof_received, NOTHING)
            except BaseException as error:
                return self._failed("eof_received", error)
        if (
            self.tls is None or not self.opened
            or not (self.fin_sent and self.peer_ended and self.phase < LEAVING)
        ):
            return Stream._finish(self)
        # A stream's handler that the end has woken still writes, drains and closes: as with
        # asyncio's TLS, connection_lost comes after its turn.
        self._leave()
        loop = self.state.loop
        loop.call_soon(loop.call_soon, self._drop_transport)
        return 0

    def _drop_transport(self):
        self.drop_transport()

    cdef double linger(self) noexcept:
        return self.shutdown_timeout if self.tls is not None and self.phase >= CLOSING else INFINITY

    cdef int on_handshake_expired(self) except -1:
        return self.begin_abort(ConnectionAbortedError(
            f"SSL handshake is taking longer than {self.handshake_timeout} seconds: "
            "aborting the connection"
        ), False)

    cdef int on_linger_expired(self) except -1:
        return self.begin_abort(TimeoutError("SSL shutdown timed out"), False)

    cdef int on_closed(self) except -1:
        self.begin_closed()
        try:
            self._call(self.protocol.connection_lost, self.error)
        except BaseException as error:
            if not self.state.ends_the_run(error):
                self._report("protocol.connection_lost() failed", error)
        return self.end_closed()

    cdef int end_closed(self) except -1:
        Stream.end_closed(self)
        if self.opening is not None:
            self._opened(self.error if self.error is not None else ConnectionResetError(
                "the connection was closed before it was ready"))
        # Nothing of the program's is kept alive by a transport that somebody forgot to drop.
        self.protocol = self.get_buffer = self.buffer_updated = None
        self.error = None  # its traceback may lead back to here
        self.compiled = self.context = None
        return 0

    # ── Errors ─────────────────────────────────────────────────────────────────────────────────

    cdef int _report(self, str message, object error) except -1:
        self.state.loop.call_exception_handler({
            "message": message,
            "exception": error,
            "transport": self,
            "protocol": self.protocol,
        })
        return 0

    cdef int _failed(self, str method, object error) except -1:
        """A callback that the connection cannot do without has raised."""
        if self.state.ends_the_run(error):
            return 0
        self._report(f"Fatal error: protocol.{method}() call failed.", error)
        return self.begin_abort(error, False)

    # ── Information, and upgrading ─────────────────────────────────────────────────────────────

    def get_extra_info(self, name, default=None):
        """What is known of the connection.

        Args:
            name: ``socket``, ``sockname``, ``peername``; with TLS also ``sslcontext``,
                ``ssl_object``, ``peercert``, ``cipher``, ``compression``.
            default: returned where it is not known.
        """
        if self.tls is None:
            if name in ABOUT_TLS:
                return default  # uvloop would look for it in two classes
        else:
            if name == "socket" and self.phase >= LEAVING:
                return default
            session = self.tls.sslobj
            if name == "ssl_object":
                return session
            if name == "sslcontext":
                return session.context
            if not self.tls.handshaking:
                if name == "peercert":
                    return session.getpeercert()
                if name == "cipher":
                    return session.cipher()
                if name == "compression":
                    return session.compression()
        if self.transport is None:
            return default
        try:
            return self.transport_info(name, default)
        except (AttributeError, OSError):
            return default  # closed, and uvloop had not been asked before

    def _start_tls(self, protocol, context, server_side, server_hostname, handshake_timeout,
                   shutdown_timeout):
        """Put TLS on the connection: a Future for the end of the handshake."""
        self.handshake_timeout = _positive(
            "ssl_handshake_timeout", handshake_timeout, UVS_TLS_HANDSHAKE)
        self.shutdown_timeout = _positive(
            "ssl_shutdown_timeout", shutdown_timeout, UVS_TLS_SHUTDOWN)
        if self.eof_written and self.phase < CLOSING:
            raise RuntimeError("Cannot start TLS after write_eof()")
        if self.phase != ESTABLISHED or self.broken:
            raise ConnectionResetError("Transport is closing")
        if self.sending:
            raise RuntimeError("unable to write; sendfile is in progress")
        self.begin_tls(context, server_side, server_hostname, self.handshake_timeout)
        # What came in the clear is never read as if TLS had brought it, and a ClientHello that came
        # with it is not lost.
        unread = _unread(self.protocol)
        if protocol is not self.protocol:
            unread += _unread(protocol)
        if self.left:
            unread += self._take_left()
        if self.unfilled is not None:
            unread += self.unfilled
            self.unfilled = None
            self.full = False
        self.opening = self.state.loop.create_future()
        self.paused = False
        self.busy = True
        self._use(protocol)
        if unread:
            self.stash = [unread] if self.stash is None else [unread, *self.stash]
        self.schedule_pump()
        return self.opening

    # Names of asyncio's own transports, which programs and asyncio's TLS ask for.

    @property
    def _loop(self):
        return self.state.loop

    @property
    def _paused(self):
        return bool(self.paused)

    @property
    def _closing(self):
        return self.phase >= CLOSING

    @property
    def _protocol_paused(self):
        return bool(self.writing_paused)


cdef bytes _unread(object protocol):
    """Take from a stream's protocol what it holds and nobody has read."""
    if isinstance(protocol, CompiledProtocol):
        return (<CompiledProtocol>protocol).take_unread()
    if not isinstance(protocol, StreamReaderProtocol):
        return b""  # what other protocols have been given is theirs
    return read_now(getattr(protocol, "_stream_reader", None))


cdef bytes read_now(object reader):
    """Take what one of asyncio's readers holds."""
    if reader is None:
        return b""
    reading = reader.read(sys.maxsize)
    try:
        reading.send(None)
    except StopIteration as done:
        return done.value
    except Exception:
        return b""  # the connection is lost, or somebody waits: nothing is held
    finally:
        reading.close()
    return b""


cdef Py_ssize_t _writable_size(object buffer) except -1:
    """The bytes of a buffer that a read may go to."""
    cdef Py_buffer view
    cdef Py_ssize_t size
    PyObject_GetBuffer(buffer, &view, PyBUF_SIMPLE | PyBUF_WRITABLE)
    size = view.len
    PyBuffer_Release(&view)
    return size
