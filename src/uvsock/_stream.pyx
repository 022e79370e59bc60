"""The socket core on uvloop's transports: reading, writing, TLS, flow control, closing."""

import asyncio
import gc
import inspect
import logging
import os
import socket
import ssl
import sys
import threading
import weakref

import uvloop

cimport cython
from cpython.buffer cimport PyBuffer_FillInfo
from cpython.bytearray cimport PyByteArray_FromStringAndSize
from cpython.bytes cimport (
    PyBytes_AS_STRING, PyBytes_CheckExact, PyBytes_FromStringAndSize, PyBytes_GET_SIZE,
)
from cpython.memoryview cimport PyMemoryView_FromObject
from libc.errno cimport EAGAIN, EBADF, EINTR, ENOBUFS, EPIPE, EPROTOTYPE, ETIMEDOUT, errno
from libc.math cimport INFINITY
from libc.stdlib cimport free, malloc
from libc.string cimport memcpy, memset
from posix.time cimport CLOCK_MONOTONIC, clock_gettime, timespec

from uvsock._framing cimport (
    AS_BYTEARRAY, AS_BYTES, AS_MEMORYVIEW, Envelope, FrameReader,
)
from uvsock._pieces cimport UVS_PARTS, Pieces, iovec
from uvsock._poller cimport Poller, UVS_HANGUP, UVS_READ, UVS_WATCHED, UVS_WRITE
from uvsock._tls cimport TLSLayer

cdef extern from "sys/socket.h":
    ctypedef unsigned int socklen_t
    struct msghdr:
        iovec* msg_iov
        size_t msg_iovlen
    struct linger_option "linger":
        int l_onoff
        int l_linger
    int SOL_SOCKET, SO_ERROR, SO_LINGER, SO_KEEPALIVE, SHUT_WR, SHUT_RDWR
    Py_ssize_t recv(int fd, void* data, size_t size, int flags) noexcept
    Py_ssize_t send(int fd, const void* data, size_t size, int flags) noexcept
    Py_ssize_t sendmsg(int fd, const msghdr* message, int flags) noexcept
    int shutdown(int fd, int how) noexcept
    int getsockopt(int fd, int level, int name, void* value, socklen_t* size) noexcept
    int setsockopt(int fd, int level, int name, const void* value, socklen_t size) noexcept

cdef extern from "netinet/in.h":
    int IPPROTO_TCP

cdef extern from "netinet/tcp.h":
    int TCP_NODELAY

cdef extern from "_compat.h":
    int MSG_NOSIGNAL, MSG_DONTWAIT, TCP_KEEPIDLE, SO_PEERNAME

cdef enum:
    # Writes up to this size are copied to be sent together with others; a larger one is worth a
    # system call of its own, and copying it costs more than a gathering send saves.
    UVS_COPY_LIMIT = 16384
    # Plain text per SSL_write: bounds the ciphertext that waits while the kernel is full.
    UVS_TLS_BATCH = 65536
    # The largest plain text of one TLS record (RFC 8446, 5.1): a read needs room for one.
    UVS_TLS_RECORD = 16384
    # What one read may bring: the most of one connection before the others have their turn.
    UVS_READ_SIZE = 262144
    UVS_TLS_READ_SIZE = 131072
    # Ciphertext that waits for the kernel: above what the program's own writes make of it OpenSSL
    # has answered for a peer that takes no answer, and is given no more to answer.
    UVS_TLS_UNSENT = 131072
    # Frames between two looks at the clock, at most.
    UVS_FRAMES_PER_LOOK = 64
    # Empty `Pieces` kept per loop; more would hold memory after a burst.
    UVS_SPARE_PIECES = 64
    # So many reads in an iteration are a few, and so many answers a habit. With eight reads answers
    # are better sent together, with two they are not.
    UVS_FEW_READS = 4
    UVS_ANSWERS = 16
    # A send that keeps failing with EPROTOTYPE (macOS, while the socket shuts down) is given up.
    UVS_SEND_RETRIES = 16

# Seconds until a connection whose send failed is dropped although its read side reports nothing.
cdef double UVS_BROKEN_GRACE = 1.0
# Seconds until a send is tried again where nothing tells when it can succeed: at first, and at most
# after doubling each time. Without the delay it would be tried for ever by a whole processor.
cdef double UVS_RETRY_FIRST = 0.001
cdef double UVS_RETRY_LAST = 1.0
# Seconds that one connection may keep the others waiting.
cdef double UVS_TURN = 0.001
# Seconds. uvloop's timers count whole milliseconds and may fire that much early.
cdef double UVS_TIMER_SLACK = 0.001

# libuv before 1.52 takes the hang-up of a reset that follows data for an end.
cdef bint END_MAY_BE_RESET = uvloop.__version__.startswith("0.22.")

# asyncio's, by its documented name: who looks at debug mode looks there.
cdef object logger = logging.getLogger("asyncio")
cdef object SSLError = ssl.SSLError
cdef tuple ENDING_THE_RUN = (KeyboardInterrupt, SystemExit)
cdef object TCPTransport = uvloop.loop.TCPTransport
cdef object PseudoSocket = uvloop.loop.PseudoSocket
# As a function: a third of the steps of the method.
cdef object get_protocol = uvloop.loop.UVBaseTransport.get_protocol


cdef frozenset OF_THE_DESCRIPTOR = frozenset({
    "dup", "get_inheritable", "getpeername", "getsockname", "getsockopt", "set_inheritable",
    "setsockopt", "shutdown",
})


class TransportSocket:
    """The socket of a connection, for what is neither reading, writing nor closing.

    As asyncio's of that name: on a connection that is closed, what needs the descriptor is an
    ``OSError``, also if the object was had before. uvloop's answers then, or raises a ValueError.
    """

    __slots__ = ("_socket",)

    def __init__(self, of_uvloop):
        self._socket = of_uvloop

    def __repr__(self):
        return repr(self._socket).replace("uvloop.PseudoSocket", "uvsock.TransportSocket")

    def __getattr__(self, name):
        if name in OF_THE_DESCRIPTOR and self._socket.fileno() < 0:
            return _refuse
        return getattr(self._socket, name)


def _refuse(*arguments):
    raise OSError(EBADF, os.strerror(EBADF))


class _NamedTransport:
    """A transport that does not know its peer, and the name of that."""

    __slots__ = ("_peername", "_transport")

    def __init__(self, transport, peername):
        self._transport = transport
        self._peername = peername

    def __getattr__(self, name):
        return getattr(self._transport, name)

    def get_extra_info(self, name, default=None):
        if name == "peername":
            return self._peername
        return self._transport.get_extra_info(name, default)


cdef double now() noexcept:
    """The loop's clock (libuv's uv_hrtime is CLOCK_MONOTONIC too)."""
    cdef timespec t
    clock_gettime(CLOCK_MONOTONIC, &t)
    return t.tv_sec + t.tv_nsec * 1e-9


cdef Py_ssize_t receive_into(int fd, void* p, Py_ssize_t n) noexcept:
    """Read without waiting: how much, 0 for the end, or the negative errno."""
    n = recv(fd, p, n, MSG_DONTWAIT)
    return n if n >= 0 else -errno


cdef void shut_both(int fd) noexcept:
    """End both directions of a connection, whatever other descriptors it has."""
    shutdown(fd, SHUT_RDWR)


cdef class ReadBuffer:
    def __cinit__(self, Py_ssize_t size):
        self.memory = <char*>malloc(size)
        if self.memory == NULL:
            raise MemoryError()
        self.size = size
        self.start = 0
        self.visible = size

    def __dealloc__(self):
        free(self.memory)

    def __getbuffer__(self, Py_buffer* view, int flags):
        PyBuffer_FillInfo(view, self, self.memory + self.start, self.visible, 0, flags)
        self.exports += 1

    def __releasebuffer__(self, Py_buffer* view):
        self.exports -= 1


cdef class LoopState:
    """What uvsock keeps per event loop; made by ``state_of``."""

    def __cinit__(self, object loop):
        self.loop = loop
        self.thread = PyThread_get_thread_ident()
        self.acceptors = set()
        self.listeners = set()
        self.groups = set()
        self.starved = []
        self._dirty = []
        self._idle_waiters = set()
        self.sockets = {}
        self._flush_callback = self._flush_dirty
        self._answers_callback = self._flush_answers
        self.poller = Poller(loop)

    cdef int _wrong_thread(self) except -1:
        try:
            running = asyncio.get_running_loop()
        except RuntimeError:
            running = None
        if running is self.loop:
            self.thread = PyThread_get_thread_ident()  # the loop was set up in another thread
            return 0
        raise RuntimeError(
            f"called in thread {PyThread_get_thread_ident()}, but this object belongs to the "
            f"event loop of thread {self.thread}; use loop.call_soon_threadsafe()"
        )

    def check_thread(self):
        """Raise RuntimeError unless called in the loop's thread."""
        self.check()

    cdef int check_slow(self, double begun, object callback, object caller) except -1:
        """In debug mode: name what has run for long, as the loop does with its own callbacks."""
        cdef double taken = now() - begun
        if taken > self.loop.slow_callback_duration:
            logger.warning(
                "Executing <%s, called by %s> took %.3f seconds",
                _describe(callback), repr(caller), taken,
            )
        return 0

    cdef bint ends_the_run(self, object error) except -1:
        """Whether it does; then it is raised where it leaves the loop.

        uvloop swallows these inside a protocol's methods, but not in a callback.
        """
        if not isinstance(error, ENDING_THE_RUN):
            return False
        self.loop.call_soon(_raise_again, error)
        return True

    cpdef int hold(self) except -1:
        """One more thing keeps ``run`` going: a referenced listener, socket or pending connect."""
        self.held += 1
        return 0

    cpdef int release(self) except -1:
        """Undo one ``hold``."""
        self.held -= 1
        if self.held == 0:
            _resolve(self._idle_waiters)
        return 0

    def idle(self):
        """A Future that is done when nothing is held."""
        return _waiter(self.loop, self._idle_waiters, self.held == 0)

    cdef int add_dirty(self, Stream stream) except -1:
        if not self._awaited:
            self.schedule_flush()
        stream.dirty = True
        self._dirty.append(stream)
        return 0

    cdef int schedule_flush(self) except -1:
        """Send what is held when all that is scheduled so far has run."""
        if not self._flush_scheduled:
            self.loop.call_soon(self._flush_callback)  # raises on a closed loop
            self._flush_scheduled = True
        return 0

    cdef bint defer_flush(self) noexcept:
        """Whether from here on it is the caller who has to call `_flush_dirty`, not the loop."""
        if self._flush_scheduled:
            return False
        self._flush_scheduled = True
        return True

    def _flush_dirty(self):
        self._flush_scheduled = False
        self._flush()

    cdef int _flush(self) except -1:
        cdef Stream stream
        cdef list dirty = self._dirty
        cdef Py_ssize_t done = 0
        self._dirty = []
        try:
            for stream in dirty:
                done += 1
                stream.dirty = False
                # In a turn or a cork its own end flushes.
                if stream.turn == 0 and stream.corks == 0:
                    stream.flush_now()
        except BaseException:
            # No memory, say: the others must not stay marked as if they were still in the list.
            for stream in dirty[done:]:
                self.add_dirty(stream)
            raise
        return 0

    # What a task writes waits for the end of the iteration, which costs another iteration, and the
    # peer waits as long. With many reads that is worth it: answers that leave behind each other
    # find the peers awake. With a few it is not. Then, once tasks have answered a few reads for a
    # while, a flush is scheduled with each read, behind the task that it wakes; and once each of
    # the answers was one write, the write sends it.

    cdef int count_read(self) except -1:
        """A read was delivered; its task, if it is for one, is scheduled."""
        self.reads += 1
        if self.reads > UVS_FEW_READS:
            self._answers = self._single = 0
        elif self._answers == UVS_ANSWERS and self._single < UVS_ANSWERS:
            self.loop.call_soon(self._answers_callback)
            self._awaited += 1
        return 0

    cdef bint answers_at_once(self, Stream stream) noexcept:
        """Whether what a task writes to the stream now leaves without waiting for more."""
        if self._flush_scheduled or self._awaited:
            if stream.dirty:
                self._single = 0
            elif self._awaited and self._single < UVS_ANSWERS:
                self._single += 1
            return False
        if self.reads == 0:
            self._single = 0  # the second after one read, or no answer
            return False
        if self.reads <= UVS_FEW_READS:
            if self._single == UVS_ANSWERS:
                self.reads -= 1
                return True
            self._single += 1
            self._answers = min(self._answers + 1, UVS_ANSWERS)
        self.reads = 0
        return False

    def _flush_answers(self):
        self._awaited -= 1
        self.reads = 0
        if self._dirty:
            self._flush()
        else:
            self._answers = 0  # it comes later, if one comes

    cdef object socket_of(self, int fd, object of_uvloop):
        """The same object each time, as programs expect; for those that were asked for one."""
        found = self.sockets.get(fd)
        if found is None:
            found = self.sockets[fd] = TransportSocket(of_uvloop)
        return found

    cdef int keep_transport(self, Py_ssize_t fd, object transport) except -1:
        cdef list transports = self.transports
        while len(transports) <= fd:
            transports.append(None)
        transports[fd] = transport
        return 0

    cdef int forget_transport(self, Py_ssize_t fd) except -1:
        if self.transports is not None and 0 <= fd < len(self.transports):
            self.transports[fd] = None
        return 0

    cdef ReadBuffer read_memory(self):
        if self.read_buffer is None:
            self.read_buffer = ReadBuffer(UVS_READ_SIZE)
        return self.read_buffer

    cdef int feed(self) except -1:
        """A descriptor is closed when this iteration is over: let those have it that need one."""
        cdef list starved = self.starved
        # Another one first each time, or that one would take all.
        self.starved = []
        for accept in starved[1:] + starved[:1]:
            self.loop.call_soon(accept)
        return 0

    cdef Pieces take_pieces(self):
        cdef Pieces pieces = self._spare_pieces
        if pieces is None:
            return Pieces.__new__(Pieces)
        self._spare_pieces = pieces.next_spare
        self._spare_count -= 1
        pieces.next_spare = None
        return pieces

    cdef void give_pieces(self, Pieces pieces):
        if self._spare_count < UVS_SPARE_PIECES:
            pieces.trim()
            pieces.next_spare = self._spare_pieces
            self._spare_pieces = pieces
            self._spare_count += 1


def _raise_again(error):
    raise error


cdef object _describe(object callback):
    """The name of a callback, and where it is if it is written in Python."""
    inner = inspect.unwrap(callback)
    name = getattr(inner, "__qualname__", None)
    if name is None:
        return repr(callback)
    code = getattr(inner, "__code__", None)
    where = getattr(code, "co_filename", None)
    return name if not where else f"{name} at {where}:{code.co_firstlineno}"


cdef object _waiter(object loop, set waiters, bint done):
    """A Future that is in the set as long as somebody waits for it; or done already."""
    waiter = loop.create_future()
    if done:
        waiter.set_result(None)
    else:
        waiters.add(waiter)
        waiter.add_done_callback(waiters.discard)  # also one that is cancelled
    return waiter


cdef int _resolve(object waiters) except -1:
    for waiter in list(waiters):
        if not waiter.done():
            waiter.set_result(None)
    return 0


def state_of(loop):
    """The loop's state, made on first use.

    Raises:
        RuntimeError: the loop is not uvloop's.
    """
    cdef LoopState state
    if not isinstance(loop, uvloop.Loop):
        raise RuntimeError(
            f"uvsock needs a uvloop event loop, not {type(loop).__name__}; "
            "use uvsock.run() or asyncio.Runner(loop_factory=uvloop.new_event_loop)"
        )
    found = getattr(loop, "_uvsock_state", None)
    if found is None:
        state = LoopState(loop)
        state.debug = loop.get_debug()
        loop._uvsock_state = state
        watch_transports(state)
        return state
    state = found
    state.debug = loop.get_debug()
    if not state.listeners and not state.groups:
        # A loop that runs again in another thread.
        state.thread = threading.get_ident()
    return state


def close_state(loop):
    """Close what the state of a closed loop has open. Without it that goes with the loop."""
    cdef LoopState state = getattr(loop, "_uvsock_state", None)
    if state is not None:
        for acceptor in state.acceptors.copy():
            acceptor.close()
        state.poller.close()


class TransportTable(weakref.WeakValueDictionary):
    """uvloop's table of a loop's transports by descriptor, with less to do per connection.

    uvloop enters each transport before ``connection_made``, and looks up one that somebody else
    wants to watch the descriptor of. A transport of a stream is kept here in a list until
    ``connection_lost``: the weak reference that the class makes takes a quarter of a connection's
    time, and 160 bytes. And the stream learns its descriptor, which otherwise takes a system call
    and an object that stays.
    """

    __slots__ = ()

    def __setitem__(self, fd, transport):
        cdef Stream stream
        protocol = get_protocol(transport)
        if isinstance(protocol, Stream):
            stream = <Stream>protocol
            stream.fd = fd
            stream.state.keep_transport(stream.fd, transport)
        else:
            (<LoopState>self.state).forget_transport(fd)
            weakref.WeakValueDictionary.__setitem__(self, fd, transport)

    def __getitem__(self, fd):
        cdef list transports = (<LoopState>self.state).transports
        transport = transports[fd] if 0 <= fd < len(transports) else None
        if transport is not None:
            return transport
        return weakref.WeakValueDictionary.__getitem__(self, fd)


def watch_transports(LoopState state):
    """Have the loop's table of transports be a ``TransportTable``, if it is known to be safe.

    Nothing but speed depends on it. A uvloop that is not known to enter descriptors, or to do more
    with the table, is left alone.
    """
    if not uvloop.__version__.startswith(("0.22.", "0.23.")):
        return
    found = [
        item for item in gc.get_referents(state.loop)
        if type(item) is weakref.WeakValueDictionary
    ]
    if len(found) == 1:
        state.transports = []
        found[0].state = state
        found[0].__class__ = TransportTable


cdef class StreamGroup:
    """The options, TLS context and live streams of one listener or one connection."""

    def __cinit__(self, *args, **kwargs):
        self.sockets = []
        self._empty_waiters = set()

    cdef int add(self, Stream stream) except -1:
        """The stream has a transport."""
        stream.place = len(self.sockets)
        self.sockets.append(stream)
        if self._alive == 0:
            self.state.groups.add(self)
        self.accepted += 1
        self._alive += 1
        stream.alive = True
        if not stream.unreferenced:
            self.state.hold()
        return 0

    cdef int remove(self, Stream stream) except -1:
        """The stream is closed; its last event is still to come."""
        cdef Stream last
        if stream.place < 0:
            return 0
        last = self.sockets.pop()
        if last is not stream:
            last.place = stream.place
            self.sockets[last.place] = last
        stream.place = -1
        self._bytes_read += stream.bytes_read
        self._bytes_written += stream.bytes_written
        return 0

    cdef int forget(self, Stream stream) except -1:
        """The stream's last event is over."""
        if not stream.alive:
            return 0
        stream.alive = False
        self._alive -= 1
        if not stream.unreferenced:
            self.state.release()
        if self._alive == 0:
            self.state.groups.discard(self)
            if self._empty_waiters:
                _resolve(self._empty_waiters)
        return 0

    def when_empty(self):
        """A Future that is done when no stream is left, and every last event is over."""
        return _waiter(self.state.loop, self._empty_waiters, self._alive == 0)

    @property
    def bytes_read(self):
        """Plain-text bytes received, by streams closed and live."""
        cdef Stream stream
        cdef long long total = self._bytes_read
        for stream in self.sockets:
            total += stream.bytes_read
        return total

    @property
    def bytes_written(self):
        """Bytes accepted for writing, by streams closed and live."""
        cdef Stream stream
        cdef long long total = self._bytes_written
        for stream in self.sockets:
            total += stream.bytes_written
        return total


cdef object _handshake_error(object error):
    """What the handshake event is told: an ssl.SSLError, whatever broke the connection."""
    if error is None or isinstance(error, SSLError):
        return error
    told = ssl.SSLEOFError(
        ssl.SSL_ERROR_EOF, f"the connection broke during the TLS handshake: {error}"
    )
    told.__cause__ = error
    return told


@cython.final
cdef class Deadlines:
    pass


cdef class Stream:
    """One connection: the protocol object that uvloop calls, and all that happens below events."""

    def __cinit__(self):
        self.fd = -1
        self.place = -1
        self.phase = CONNECTING
        self.reader = STARTING

    # ── What uvloop calls ──────────────────────────────────────────────────────────────────────

    # uvloop has a context for each connection. Handlers run in the group's: what one of them sets
    # is seen by all, wherever it is called from.

    @cython.binding(False)
    def connection_made(self, transport):
        self.state.poller.enter(self.group.context)
        try:
            self._made(transport)
        finally:
            self.state.poller.leave()

    @cython.binding(False)
    def data_received(self, data):
        cdef Py_ssize_t before = self.state.held_outside
        self.state.poller.enter(self.group.context)
        self.turn += 1
        try:
            if self.reader == UVLOOP:
                # Many connections bring no more than this, and need not be entered in the poller.
                self.reader = UVLOOP_ONCE_MORE
            else:
                self._take_over()
                self.watch()
            self.received(PyBytes_AS_STRING(data), PyBytes_GET_SIZE(data), data)
        finally:
            self._leave_reading(before)
            self.state.poller.leave()

    @cython.binding(False)
    def eof_received(self):
        cdef int code = get_error(self.fd) if END_MAY_BE_RESET else 0
        self.reader = OURS  # uvloop reads no more when this returns
        self.state.poller.enter(self.group.context)
        self.turn += 1
        try:
            if code:
                self.lost(code)
            else:
                self._received_end()
        finally:
            self.leave_turn()
            self.state.poller.leave()
        return True  # the transport stays: it is closed when both sides have ended

    @cython.binding(False)
    def connection_lost(self, exc):
        self.state.poller.enter(self.group.context)
        try:
            self._gone(exc)
        finally:
            self.state.poller.leave()

    cdef int _made(self, object transport) except -1:
        if self.phase < LEAVING and not self.group.stopped:
            self.on_made()
        if self.phase >= LEAVING or self.group.stopped:
            self._enter(LEAVING)  # given up before the transport was there
            self.group.add(self)  # or nothing would wait until it is gone
            transport.abort()
            return 0
        self.transport = transport
        self.state.debug = self.state.loop.get_debug()
        if self.fd < 0:  # no TransportTable
            self.fd = transport.get_extra_info("socket").fileno()
        self.tcp = isinstance(transport, TCPTransport)
        self.group.add(self)
        self.turn += 1
        try:
            self._set_options()
            if self.group.tls_context is None:
                self._enter(ESTABLISHED)
                self.on_open()
            else:
                try:
                    self.begin_tls(
                        self.group.tls_context, self.group.server_side,
                        self.group.server_hostname, self.group.handshake_timeout,
                    )
                except Exception as error:
                    # A context or a name that the ssl module cannot use.
                    self.group.handshake_failures += 1
                    self.on_handshake(False, error)
                    self.begin_abort(error, False)
                else:
                    self._continue_handshake()
            self.arm_timer()
        finally:
            self.leave_turn()
        self.reader = UVLOOP
        if (self.held_back() or self.blocked) and self.phase < LEAVING:
            # uvloop starts reading when this returns, whatever was asked for before.
            self.state.loop.call_soon(self._watch)
        return 0

    cdef int _gone(self, object exc) except -1:
        if exc is not None and self.error is None and self.phase < LEAVING:
            self.error = exc
        if self.error is not None and self.transport is not None:
            self.transport_info("peername", None)  # can be had only while there is a descriptor
        self.turn += 1
        try:
            self._end_pause()
            while self.spent and self.phase <= ENDING:
                self.spent = False  # there is no later: the descriptor is closed behind this
                self._end_pause()
            if self.tls is not None and self.tls.handshaking and self.phase < LEAVING:
                self.begin_abort(exc if exc is not None else self.error, False)
        finally:
            self.turn -= 1
            self._unwatch()
            self._drop_output()
            self.state.forget_transport(self.fd)
            if self.state.sockets:
                self.state.sockets.pop(self.fd, None)
            if self.state.starved:
                self.state.feed()
            self.fd = -1
            self.stash = None
            if self.frames is not None:
                self.frames.drop()
            self._enter(LEAVING)
        if self.opened:
            return self.on_closed()
        self.begin_closed()
        return self.end_closed()

    def pause_writing(self):
        # Never called: nothing is ever written to the transport.
        raise RuntimeError("uvsock writes to the descriptor, not to the transport")

    def resume_writing(self):
        raise RuntimeError("uvsock writes to the descriptor, not to the transport")

    # ── Events: a subclass overrides these ─────────────────────────────────────────────────────

    cdef int on_made(self) except -1:
        return 0

    cdef int on_open(self) except -1:
        return 0

    cdef int on_data(self, object data) except -1:
        return 0

    cdef int on_data_raised(self, object error) except -1:
        raise error  # a subclass whose on_data raises says what becomes of it

    cdef int on_frame_error(self, object error) except -1:
        return 0

    cdef int on_drain(self) except -1:
        return 0

    cdef int on_end(self) except -1:
        return 0

    cdef int on_hang_up(self) except -1:
        return 0

    cdef int on_timeout(self) except -1:
        return 0

    cdef int on_handshake(self, bint success, object error) except -1:
        return 0

    cdef int on_tls_error(self, object error) except -1:
        return 0

    cdef int on_closed(self) except -1:
        return 0

    # ── Reading ────────────────────────────────────────────────────────────────────────────────

    cdef int on_ready(self, int what) except -1:
        cdef Py_ssize_t before
        self.state.poller.enter(self.group.context)
        if what & UVS_WRITE:
            if self.blocked:
                self._writable()
            else:
                self.watch()  # it was left on, since one episode often follows another
        if self.watching & UVS_READ:
            if what & (UVS_READ | UVS_HANGUP):
                before = self.state.held_outside
                self.turn += 1
                try:
                    self.receive()
                finally:
                    self._leave_reading(before)
        elif what & UVS_HANGUP and self.watching:
            self.turn += 1
            try:
                self._hung_up()
            finally:
                self.leave_turn()
        return 0

    cdef int on_ready_raised(self, object error) except -1:
        if self.state.ends_the_run(error):
            return 0
        self.state.loop.call_exception_handler({
            "message": "uvsock: reading or writing failed", "exception": error, "protocol": self,
        })
        return self.begin_abort(error, False)

    cdef int receive(self) except -1:
        """Read what there is, up to a limit, and deliver it."""
        cdef ReadBuffer buffer = self.state.read_memory()
        cdef Py_ssize_t n
        n = receive_into(
            self.fd, buffer.memory, UVS_READ_SIZE if self.tls is None else UVS_TLS_READ_SIZE
        )
        if n > 0:
            return self.received(buffer.memory, n, buffer)
        return self.nothing_received(n)

    cdef int nothing_received(self, Py_ssize_t n) except -1:
        """A read has brought the end (0), or failed (the negative errno)."""
        if n == 0:
            return self._received_end()
        return 0 if n == -EAGAIN or n == -EINTR else self.lost(-n)

    cdef int _received_end(self) except -1:
        """The peer's FIN."""
        self.tcp_eof = True
        if self.broken:
            return self._give_up()
        if self.phase == CLOSING:
            self.peer_ended = True
            return self._finish()
        return self._check_end()

    cdef int lost(self, int code) except -1:
        """The connection has failed. What it brought before that is still delivered."""
        if self.error is None:
            self.error = OSError(code, os.strerror(code))
        self.broken = self.tcp_eof = True
        return self._give_up()

    cdef int _hung_up(self) except -1:
        """A hang-up of a connection that is not read just now."""
        cdef int code = 0
        cdef socklen_t size = sizeof(code)
        cdef ReadBuffer buffer
        cdef Py_ssize_t n = 0
        getsockopt(self.fd, SOL_SOCKET, SO_ERROR, &code, &size)
        if code:
            # The kernel has what came before it, and nobody will ask for that any more.
            buffer = ReadBuffer(UVS_TLS_READ_SIZE)
            while not self.tcp_eof and self.phase <= ENDING:
                n = receive_into(self.fd, buffer.memory, UVS_TLS_READ_SIZE)
                if n <= 0:
                    break
                self._stash(buffer.memory, n)
            return self.lost(code)
        if self.end_given and self.phase <= ENDING:
            self.on_hang_up()
        # Told once: what there is to read, or to write, tells the rest.
        self.hung_up = True
        return self.watch()

    cdef inline bint held_back(self) noexcept:
        return self.paused or self.busy or self.full or self.spent

    cdef inline bint choked(self) noexcept:
        """Whether what OpenSSL answers would only pile up."""
        return self.blocked and self.wire is not None and self.wire.size > UVS_TLS_UNSENT

    cdef int watch(self) except -1:
        """Have the descriptor watched for exactly what would be looked at, and for its hang-up."""
        cdef int what = 0 if self.hung_up else UVS_WATCHED
        if self.transport is None or self.phase >= LEAVING or self.reader == STARTING:
            return 0
        if not self.tcp_eof and (
            self.phase == CLOSING
            or self.broken  # only the read side tells when that connection is over
            or (self.tls is not None and self.tls.handshaking)
            or (not self.held_back() and self.stash is None)
        ) and not (self.tls is not None and self.choked()):
            what = UVS_WATCHED | UVS_READ
        if self.blocked and not (self._deadlines is not None and self._deadlines.retry):
            what |= UVS_WATCHED | UVS_WRITE
        if self.reader != OURS:
            if what == UVS_WATCHED | UVS_READ:
                return 0  # uvloop does that
            self._take_over()
        if what == self.watching:
            return 0
        try:
            return self.state.poller.watch(self, what)
        except OSError as error:
            return self.begin_abort(error, False)

    cdef int _take_over(self) except -1:
        if self.reader != OURS:
            self.reader = OURS
            self.transport.pause_reading()
        return 0

    cdef int _unwatch(self) except -1:
        return 0 if self.watching == 0 else self.state.poller.watch(self, 0)

    def _watch(self):
        self.watch()

    cdef int received(self, const char* p, Py_ssize_t n, object owner) except -1:
        """These have come; ``owner`` is the bytes object that they are, or the ReadBuffer."""
        if self.phase >= CLOSING:
            if self.phase == CLOSING and self.tls is not None:
                return self._receive_last(p, n)
            return 0
        if self.group.idle_timeout > 0:
            self.deadlines().active = now()
        if self.stash is not None or (
            self.held_back() and not (self.tls is not None and self.tls.handshaking)
        ):
            self._stash(p, n)
            return self.watch()
        return self._look_at(p, n, owner)

    cdef inline int _look_at(self, const char* p, Py_ssize_t n, object owner) except -1:
        if self.tls is not None:
            return self._receive_tls(p, n)
        self.bytes_read += n
        return self.deliver(p, n, owner)

    cdef int _stash(self, const char* p, Py_ssize_t n) except -1:
        if self.stash is None:
            self.stash = []
        self.stash.append(PyBytes_FromStringAndSize(p, n))
        return 0

    cdef int _receive_tls(self, const char* p, Py_ssize_t n) except -1:
        """Have OpenSSL read these, a few records at a time, and deliver what it makes of them."""
        cdef Py_ssize_t taken
        cdef double until = 0
        cdef bint stalled
        while True:
            stalled = self.tls.stalled
            taken = self.tls.feed(p, n)
            p += taken
            n -= taken
            if self.tls.handshaking:
                self._continue_handshake()
            else:
                self._read_tls()
            if stalled and self.phase < LEAVING:
                self.flush_now()
                self.check_drain()
            if n == 0:
                return self._check_end()
            if self.phase >= CLOSING:
                return self._receive_last(p, n) if self.phase == CLOSING else 0
            if until == 0:
                until = now() + UVS_TURN
            elif now() > until:
                self.rest()
            if self.held_back() or self.choked():
                self._stash(p, n)
                return self.watch()

    cdef int _receive_last(self, const char* p, Py_ssize_t n) except -1:
        """What comes after close() is dropped, but it may hold the peer's close_notify."""
        cdef Py_ssize_t taken
        if self.tls.handshaking and not self.pending():
            return 0
        while n > 0 and self.phase == CLOSING:
            taken = self.tls.feed(p, n)
            p += taken
            n -= taken
            if self.tls.handshaking:
                self._continue_handshake()  # accepted bytes still wait for it
            else:
                self._drop_input()
        if self.tls.handshaking:
            return 0
        return self._finish()

    cdef int _drop_input(self) except -1:
        cdef Py_ssize_t n = 1
        cdef ReadBuffer buffer = ReadBuffer(UVS_TLS_RECORD)
        while n > 0:
            try:
                n = self.tls.read(buffer.memory, buffer, buffer.size)
            except SSLError:
                return 0  # what the peer says cannot be understood: its FIN is waited for
        if self.tls.peer_closed:
            self.peer_ended = True
        return 0

    cdef int rest(self) except -1:
        """The others have their turn; then it goes on here."""
        self.spent = True
        return self.schedule_pump()

    cdef int deliver(self, const char* p, Py_ssize_t n, object owner) except -1:
        """Give these to the subclass, as frames or as they are."""
        cdef ReadBuffer buffer
        if self.read_off:
            return 0
        if PyBytes_CheckExact(owner):
            if self.frames is not None:
                self.frames.feed(owner, p, n)
                return self._deliver_frames()
            if self.group.delivery == AS_BYTES:
                return self._give(owner)
            if self.group.delivery == AS_BYTEARRAY:
                return self._give(bytearray(owner))
            view = memoryview(bytearray(owner))
            self._give(view)
            return self.release_borrowed(view)
        if self.frames is None and self.group.delivery == AS_BYTES:
            return self._give(PyBytes_FromStringAndSize(p, n))
        if self.frames is None and self.group.delivery == AS_BYTEARRAY:
            return self._give(PyByteArray_FromStringAndSize(p, n))
        buffer = <ReadBuffer>owner
        buffer.start = 0
        buffer.visible = n
        if self.frames is not None:
            self.frames.feed(buffer, p, n)
            self._deliver_frames()
        else:
            view = PyMemoryView_FromObject(buffer)
            self._give(view)
            self.release_borrowed(view)
            view = None
        if buffer.exports > 0:
            # A slice was kept, or an async handler still reads: that memory is theirs now.
            if self.state.read_buffer is buffer:
                self.state.read_buffer = None
            if self.state.tls_buffer is buffer:
                self.state.tls_buffer = None
        return 0

    cdef inline int _give(self, object data) except -1:
        """Deliver what is no frame."""
        try:
            return self.on_data(data)
        except BaseException as error:
            return self.on_data_raised(error)

    cdef int _deliver_frames(self) except -1:
        """Deliver the frames that are whole, until something holds the stream back."""
        cdef FrameReader frames = self.frames
        cdef bint borrow = self.group.delivery == AS_MEMORYVIEW
        cdef int left = 1, step = 1  # frames until the clock is looked at, and from then on
        cdef double until = 0
        frame = None
        while True:
            try:
                while not self.held_back() and self.phase <= ENDING and not self.read_off:
                    frame = frames.next(self.group.delivery)
                    if frame is None:
                        break
                    left -= 1
                    if left < 0:
                        if until == 0:
                            until = now() + UVS_TURN
                        elif now() > until:
                            self.rest()  # behind this one
                        step = min(2 * step, UVS_FRAMES_PER_LOOK)
                        left = step
                    self.on_data(frame)
                    if borrow:
                        self.release_borrowed(frame)
                    frame = None
                break
            except BaseException as error:
                if frame is None:
                    frames.fail()
                    self.on_frame_error(error)
                    break
                # The handler's error, not the framer's: the frames behind this one follow.
                self.on_data_raised(error)
                if borrow:
                    self.release_borrowed(frame)
                frame = None  # what is raised next is the framer's again
        if self.phase > ENDING or self.read_off:
            frames.drop()
        frames.leave()
        if frames.framer is None and not frames.more:
            self.frames = None  # dropped in a handler
        return 0

    cdef bint unread(self) noexcept:
        """Whether something was received that was not looked at yet."""
        return self.stash is not None or (self.frames is not None and self.frames.more)

    cdef int release_borrowed(self, object view) except -1:
        """End the loan of a view, when its handler has returned."""
        try:
            view.release()
        except BufferError:
            # Something built on the view holds it, so it stays valid; its buffer is not reused.
            return 0
        return 0

    cdef int _read_tls(self) except -1:
        cdef ReadBuffer buffer
        cdef Py_ssize_t total, n = 0
        cdef TLSLayer tls = self.tls
        broken = None
        while self.phase <= ENDING and not self.held_back() and broken is None:
            buffer = self.state.tls_buffer
            if buffer is None:
                buffer = self.state.tls_buffer = ReadBuffer(UVS_TLS_READ_SIZE)
            total = 0
            while total <= UVS_TLS_READ_SIZE - UVS_TLS_RECORD:
                buffer.start = total
                buffer.visible = UVS_TLS_READ_SIZE - total
                try:
                    n = tls.read(buffer.memory + total, buffer, UVS_TLS_READ_SIZE - total)
                except SSLError as error:
                    broken = error
                    n = 0
                if n <= 0:
                    break
                total += n
            if total:
                self.bytes_read += total
                self.deliver(buffer.memory, total, buffer)
            if n <= 0:
                break
        if broken is not None:
            return self._tls_failed(broken)
        if self.phase <= ENDING and not self.fin_sent:
            self._send_outgoing()  # what reading made OpenSSL say: key updates, alerts
        return 0

    cdef int _continue_handshake(self) except -1:
        cdef bint done
        try:
            done = self.tls.handshake()
        except (SSLError, ValueError) as error:  # ValueError: certificate with a malformed name
            cause = getattr(self.tls.sslobj, "_uvsock_error", None)
            if cause is not None:
                error.__cause__ = cause
            return self._tls_failed(error)
        self._send_outgoing()
        if self.broken:
            # The peer does not have what it needs to take it for done.
            self.tls.handshaking = True
            return self.begin_abort(self.error, False)
        if not done:
            return 0
        if self._deadlines is not None:
            self._deadlines.handshake = 0
        if self.phase == CONNECTING:
            self._enter(ESTABLISHED)
        if self.phase <= ENDING:
            self.on_handshake(True, None)
        if self.phase <= ENDING and not self.opened:
            self.on_open()
        if self.phase >= LEAVING:
            return 0
        self.flush_now()
        self.check_drain()
        self.arm_timer()
        self.watch()
        if self.phase <= ENDING and not self.held_back():
            return self._read_tls()
        return 0

    cdef int _check_end(self) except -1:
        """Give the end event, if the peer has ended and all it sent was delivered."""
        if self.tls is not None and self.tls.handshaking:
            if self.tcp_eof and self.stash is None:
                self._tls_failed(ssl.SSLEOFError(
                    ssl.SSL_ERROR_EOF, "the peer closed the connection during the TLS handshake"
                ))
            return 0
        if self.end_given or self.phase > ENDING or self.held_back() or self.unread():
            return 0
        if self.broken:
            return 0  # a send took the reset's error: the read after it looks like an orderly end
        if self.tls is None:
            if not self.tcp_eof:
                return 0
        elif not self.tls.peer_closed:
            if not self.tcp_eof:
                return 0
            self.cut_off = True
        self.end_given = True
        if self.frames is not None:
            self.frames.drop()  # an unfinished frame
        return self.on_end()

    cdef int after_end(self) except -1:
        """The end event's handler has returned."""
        self.peer_ended = True
        if self.phase == ESTABLISHED and not self.group.allow_half_open:
            self.begin_end()
        self.hung_up = False  # asked again: it means more than it did before
        return self._finish()

    cdef int schedule_pump(self) except -1:
        if not self.pump_scheduled:
            self.pump_scheduled = True
            self.state.loop.call_soon(self._pump, context=self.group.context)
        return 0

    def _pump(self):
        self.pump_scheduled = False
        self.turn += 1
        try:
            self.pump()
            if self.broken and self.tcp_eof and self.phase <= ENDING:
                self._give_up()
            else:
                self.check_drain()
        finally:
            self.leave_turn()

    cdef int pump(self) except -1:
        """Go on with what was received while the stream was held back."""
        cdef bytes data
        self.spent = self.hung_up = False
        if self.frames is not None and self.frames.more:
            self._deliver_frames()
        if self.tls is not None and self.phase < LEAVING:
            if self.tls.handshaking:
                self._continue_handshake()
            elif not self.held_back():
                self._read_tls()
        while self.stash is not None and self.phase < LEAVING:
            if self.held_back() and not (self.tls is not None and self.tls.handshaking):
                break
            if self.choked():
                break
            data = self.stash.pop(0)
            if not self.stash:
                self.stash = None
            if self.phase == CLOSING:
                continue
            self._look_at(PyBytes_AS_STRING(data), PyBytes_GET_SIZE(data), data)
        if self.phase < LEAVING and not self.spent:
            self._check_end()
        return self.watch()

    # ── Writing ────────────────────────────────────────────────────────────────────────────────

    cdef inline Py_ssize_t pending(self) noexcept:
        return self.unsent

    cdef inline bint _corking(self) noexcept:
        return self.group.cork or self.corks > 0

    cdef Py_ssize_t write_bytes(
        self, const char* p, Py_ssize_t n, bint whole, bytes owner
    ) except -2:
        """Accept bytes: how many, or -1 once the write side is closed.

        ``whole`` takes them all. ``owner`` is the object that they are in, or None.
        """
        if self.phase != ESTABLISHED or self.broken:
            return 0 if self.phase == CONNECTING and not self.broken and not whole else -1
        if n == 0:
            return 0
        if self.sending and not whole:
            return 0  # bytes in the middle of what send_all sends would tear it apart
        if not self._holdable(n):
            return self._write_now(p, n, whole, owner)
        # First what can fail: bytes that were counted are held, and others are not.
        self._flush_later()
        self._touch()
        if (
            owner is not None and n == PyBytes_GET_SIZE(owner)
            and self.lone is None and self._held_or_none() is None
        ):
            self.lone = owner
        else:
            memcpy(self._held().extend(n), p, n)
        self._count(n)
        return n

    cdef Py_ssize_t _write_now(
        self, const char* p, Py_ssize_t n, bint whole, bytes owner
    ) except -2:
        """Give these to the kernel, after what is held, as far as it takes them."""
        cdef Py_ssize_t taken = 0
        if self.tls is not None:
            return self._write_tls(p, n, whole, owner)
        if not self.blocked:
            taken = self._send(p, n)
        if 0 <= taken < n:
            return self._hold(p, n, taken, whole, owner)
        return taken

    cdef inline bint _holdable(self, Py_ssize_t n) noexcept:
        """Whether these wait for what comes next, to leave together with it."""
        return (
            n <= UVS_COPY_LIMIT and self._corking()
            and n + self.unsent <= self.group.high_water_mark
        )

    cdef Py_ssize_t _write_tls(
        self, const char* p, Py_ssize_t n, bint whole, bytes owner
    ) except -2:
        cdef Py_ssize_t done = 0, batch
        if self.blocked or self.tls.handshaking or self.tls.stalled:
            return self._hold(p, n, 0, whole, owner)
        if self.unsent:
            self.flush_now()
        try:
            while done < n and not self.blocked and not self.tls.stalled and not self.broken:
                # The ciphertext of one batch is held if the kernel does not take it.
                batch = min(n - done, min(UVS_TLS_BATCH, self.group.high_water_mark))
                batch = self.tls.encrypt(p + done, batch)
                self.tls.wire_plain += batch
                self._count(batch)
                done += batch
                self._send_outgoing()
        except SSLError as error:
            self._tls_failed(error)
            return -1
        except MemoryError as error:
            if whole and done:
                self._tear(error)
            raise
        if self.broken:
            return -1
        self._touch()
        return done if done == n else self._hold(p, n, done, whole, owner)

    cdef Py_ssize_t write_framed(self, const char* p, Py_ssize_t n, bytes owner) except -2:
        """Accept a frame, with what belongs around it, as a whole: its size on the wire.

        0 if it has to wait, -1 once the write side is closed.
        """
        cdef Envelope envelope
        cdef char* target
        cdef Py_ssize_t size
        if self.frames is None or self.frames.framer is None:
            raise RuntimeError("write_frame: the socket has no framing")
        if self.phase != ESTABLISHED or self.broken:
            return self.write_bytes(p, n, False, None)
        envelope.prefix = envelope.suffix = b""
        envelope.prefix_size = envelope.suffix_size = 0
        _owner = self.frames.framer.enclose(p, n, &envelope)
        size = envelope.prefix_size + n + envelope.suffix_size
        if self.blocked or self.sending or size == 0 or not self._holdable(size):
            return self._write_parts(&envelope, p, n, size, owner)
        self._flush_later()
        self._touch()
        target = self._held().extend(size)
        self._count(size)
        self.short_unanswered = False
        if envelope.prefix_size:
            memcpy(target, envelope.prefix, envelope.prefix_size)
            target += envelope.prefix_size
        if n:
            memcpy(target, p, n)
        if envelope.suffix_size == 1:
            target[n] = envelope.suffix[0]
        elif envelope.suffix_size:
            memcpy(target + n, envelope.suffix, envelope.suffix_size)
        return size

    cdef Py_ssize_t _write_parts(
        self, const Envelope* envelope, const char* p, Py_ssize_t n, Py_ssize_t size, bytes owner
    ) except -2:
        """The same for a frame that does not simply wait for what comes next."""
        cdef Py_ssize_t mark = self.group.high_water_mark
        cdef long long before
        if self.pending() and self.pending() + size > mark:
            self.flush_now()
        if self.sending or (self.pending() and self.pending() + size > mark):
            self.short_write = self.short_unanswered = True
            return 0
        self.short_unanswered = False
        before = self.bytes_written
        self.corks += 1  # the parts leave together
        try:
            if (
                self.write_bytes(envelope.prefix, envelope.prefix_size, True, None) < 0
                or self.write_bytes(p, n, True, owner) < 0
                or self.write_bytes(envelope.suffix, envelope.suffix_size, True, None) < 0
            ):
                size = -1
        except MemoryError as error:
            if self.bytes_written != before:
                self._tear(error)
            raise
        finally:
            self.corks -= 1
        if self.corks == 0:
            if not self.group.cork:
                self.flush_now()
            elif self.pending():
                self._flush_later()
        return size

    cdef inline int _touch(self) except -1:
        """Traffic: the idle timeout begins anew."""
        if self.group.idle_timeout > 0:
            self.deadlines().active = now()
        return 0

    cdef inline void _count(self, Py_ssize_t n) noexcept:
        """So many bytes were accepted, and the kernel does not have them yet."""
        self.bytes_written += n
        self.unsent += n

    cdef Py_ssize_t _hold(
        self, const char* p, Py_ssize_t n, Py_ssize_t taken, bint whole, bytes owner
    ) except -1:
        """Keep what follows the bytes that were taken, as far as it is allowed: all accepted."""
        cdef Py_ssize_t rest = n - taken
        if not whole:
            if not self._corking():
                return taken
            rest = min(rest, self.group.high_water_mark - self.unsent)
        if rest <= 0:
            return taken
        try:
            self._flush_later()
            self._touch()
            self._held().add(p + taken, rest, owner)
        except MemoryError as error:
            if taken == 0:
                raise
            if whole:
                self._tear(error)
                raise
            return taken
        self._count(rest)
        return taken + rest

    cdef int _tear(self, object error) except -1:
        """Some of what the peer needs as a whole has left, and the rest cannot: nothing follows."""
        self.broken = True
        return self.begin_abort(error, True)

    cdef inline Pieces _held_or_none(self):
        return self.wire if self.tls is None else self.tls.plain

    cdef inline Pieces _held(self):
        """Where accepted bytes are held: plain text for TLS, else bytes for the kernel."""
        cdef Pieces held = self._held_or_none()
        return self._new_held() if held is None else held

    cdef Pieces _new_held(self):
        cdef Pieces held = self.state.take_pieces()
        cdef Py_ssize_t left
        if self.lone is not None:
            left = self._lone_left()
            held.add(PyBytes_AS_STRING(self.lone) + PyBytes_GET_SIZE(self.lone) - left, left, None)
            self.lone = None
        if self.tls is None:
            self.wire = held
        else:
            self.tls.plain = held
        return held

    cdef inline Py_ssize_t _lone_left(self) noexcept:
        """How many of the last bytes of `lone` are still held."""
        return self.unsent if self.tls is None else self.unsent - self.tls.wire_plain

    cdef inline int _flush_later(self) except -1:
        if self.turn == 0 and self.corks == 0 and not self.blocked:
            self.state.held_outside += 1
            if not self.dirty:
                self.state.add_dirty(self)
        return 0

    cdef Py_ssize_t _send(self, const char* p, Py_ssize_t n) except -2:
        """Give the kernel the held bytes and then these, together; how many of these it took.

        -1 when the connection is broken. The only place that sends.
        """
        cdef Py_ssize_t held, rest, size, sent, taken = 0
        cdef int count, code, retries = 0
        cdef iovec parts[UVS_PARTS + 1]
        cdef msghdr message
        while True:
            count = 0
            held = rest = 0
            if self.lone is not None and self.tls is None:
                held = self.unsent
                parts[0].iov_base = (
                    PyBytes_AS_STRING(self.lone) + PyBytes_GET_SIZE(self.lone) - held
                )
                parts[0].iov_len = held
                count = 1
            elif self.wire is not None:
                held = self.wire.gather(parts, &count)
                rest = self.wire.size - held
            size = held
            if rest == 0 and n:
                parts[count].iov_base = <void*>p
                parts[count].iov_len = n
                count += 1
                size += n
            if count == 0:
                return taken
            if count == 1:
                sent = send(
                    self.fd, parts[0].iov_base, parts[0].iov_len, MSG_NOSIGNAL | MSG_DONTWAIT
                )
            else:
                memset(&message, 0, sizeof(message))
                message.msg_iov = parts
                message.msg_iovlen = count
                sent = sendmsg(self.fd, &message, MSG_NOSIGNAL | MSG_DONTWAIT)
            if sent < 0:
                code = errno
                if code == ENOBUFS:
                    self.retry_later()
                    return taken
                if code == EINTR or code == EPROTOTYPE:
                    # macOS says EPROTOTYPE while a socket is being shut down; the next try says
                    # EPIPE.
                    retries += 1
                    if retries < UVS_SEND_RETRIES:
                        continue
                if code != EAGAIN:
                    self._broken(code)
                    return -1
                sent = 0
            if sent > 0:
                self._sent(min(sent, held), max(sent - held, 0))
                taken += max(sent - held, 0)
            if sent < size:
                self.arm_writer()
                return taken if self.phase < LEAVING else -1
            if rest == 0:
                return taken

    cdef inline int _sent(self, Py_ssize_t held, Py_ssize_t taken) except -1:
        """The kernel has taken the first of the held bytes, and so many of the others."""
        if self.tls is None:
            self.unsent -= held
            self.bytes_written += taken
            if self.unsent == 0:
                self.lone = None
        if self.wire is not None:
            self.wire.consume(held)
            if self.wire.size == 0:
                self.state.give_pieces(self.wire)
                self.wire = None
        self._touch()
        if self.phase >= ENDING and self._deadlines is not None and self._deadlines.linger:
            # The peer reads: it is alive.
            self._deadlines.linger = now() + self.linger()
        return 0

    cdef int _send_outgoing(self) except -1:
        """Send the ciphertext that is held, and what OpenSSL has written since."""
        cdef const char* p = NULL
        cdef Py_ssize_t n = 0, taken = 0
        cdef bytes data = self.tls.take()
        if data is not None:
            p = PyBytes_AS_STRING(data)
            n = PyBytes_GET_SIZE(data)
        elif self.wire is None:
            return 0
        if self.fin_sent or self.broken or self.fd < 0:
            return 0
        if not self.blocked:
            taken = self._send(p, n)
            if taken < 0:
                return 0
        if taken < n:
            try:
                if self.wire is None:
                    self.wire = self.state.take_pieces()
                self.wire.add(p + taken, n - taken, data)
            except MemoryError as error:
                return self._tear(error)  # what comes behind these could not be decrypted
        elif not self.blocked:
            self.unsent -= self.tls.wire_plain
            self.tls.wire_plain = 0
        return 0

    cdef int flush_now(self) except -1:
        """Send what is held, as far as the kernel takes it."""
        if self.broken or self.fd < 0 or self.phase >= LEAVING:
            return 0
        if self.blocked:
            # The kernel is full, but holds all: it can take the FIN.
            return self._flushed() if self.tls is None and self.unsent == 0 else 0
        if self.tls is None:
            if self.unsent and self._send(NULL, 0) < 0:
                return 0
        else:
            self._send_outgoing()
            try:
                self._encrypt_held()
            except SSLError as error:
                return self._tls_failed(error)
        if self.unsent == 0 and not self.blocked and not self.broken:
            return self._flushed()
        return 0

    cdef int _encrypt_held(self) except -1:
        """Send the plain text that is held, as far as the kernel takes it."""
        cdef TLSLayer tls = self.tls
        cdef Pieces plain
        cdef const char* p
        cdef Py_ssize_t n, batch
        if tls.handshaking or tls.stalled or self.blocked or self.broken:
            return 0
        if self.lone is not None:
            n = self._lone_left()
            if n == PyBytes_GET_SIZE(self.lone):
                batch = tls.encrypt_bytes(self.lone)
            else:
                p = PyBytes_AS_STRING(self.lone) + PyBytes_GET_SIZE(self.lone) - n
                batch = tls.encrypt(p, n)
            tls.wire_plain += batch
            if batch == n:
                self.lone = None
            self._send_outgoing()
        while tls.plain is not None and not self.blocked and not tls.stalled and not self.broken:
            plain = tls.plain
            batch = 0
            while plain.size and batch < UVS_TLS_BATCH and not tls.stalled:
                n = plain.head(&p)
                n = tls.encrypt(p, min(n, UVS_TLS_BATCH - batch))
                plain.consume(n)
                tls.wire_plain += n
                batch += n
            if plain.size == 0:
                self.state.give_pieces(plain)
                tls.plain = None
            self._send_outgoing()
        return 0

    cdef int _flushed(self) except -1:
        """All that was accepted is with the kernel."""
        if self.phase >= ENDING and not self.fin_sent:
            self._send_fin()
        if self.write_waiters is not None and not self.blocked:
            self.wake_writers()
        return 0

    cdef int leave_turn(self) except -1:
        self.turn -= 1
        if self.turn == 0 and self.corks == 0 and (
            self.unsent or (self.phase >= ENDING and not self.fin_sent)
        ):
            self.flush_now()
        if self.tcp_eof and self.turn == 0:
            return self.watch()  # not before, since most connections are over by now
        return 0

    cdef int _leave_reading(self, Py_ssize_t before) except -1:
        """The turn of a read ends; ``before`` is what `held_outside` was when it began."""
        self.state.count_read()
        if (
            self.state.held_outside != before and self.turn == 1 and self.corks == 0
            and self.phase == ESTABLISHED and not self.blocked and self.pending()
        ):
            # The handler has written to other streams too. If they all are written to by each
            # other, as in a chat, this one would be sent once now and once with them.
            self.turn = 0
            if not self.dirty:
                self.state.add_dirty(self)
            return 0
        return self.leave_turn()

    cdef int arm_writer(self) except -1:
        """Call `_writable` when the kernel takes bytes again."""
        self.blocked = True
        return self.watch()

    cdef int retry_later(self) except -1:
        """Call `_writable` after a while, where the kernel does not tell when it takes bytes."""
        cdef Deadlines due = self.deadlines()
        self.blocked = True
        if not due.retry:
            due.backoff = min(max(UVS_RETRY_FIRST, 2 * due.backoff), UVS_RETRY_LAST)
            due.retry = now() + due.backoff
        self.watch()  # not for writing: it may be writable all the time
        return self.arm_timer()

    cdef int _writable(self) except -1:
        cdef bint choked = self.choked()
        if not self.blocked or self.phase >= LEAVING:
            return 0
        self.blocked = False
        self.turn += 1
        try:
            self.flush_now()
            self.on_writable()
        finally:
            self.leave_turn()
        if not self.blocked and self._deadlines is not None:
            self._deadlines.backoff = 0
        if choked and self.phase < LEAVING:
            self.schedule_pump()
        return 0

    cdef int on_writable(self) except -1:
        """Some or all of what was held has left."""
        if not self.blocked:
            self.wake_writers()
            self.check_drain()
        return 0

    cdef int check_drain(self) except -1:
        """Give the drain event that a short write is owed, if everything has left."""
        if (
            self.short_write and not self.blocked and not self.sending and not self.broken
            and self.phase == ESTABLISHED and self.opened and self.pending() == 0
            and not (self.tls is not None and self.tls.handshaking)
        ):
            self.short_write = False
            return self.on_drain()
        return 0

    cdef int wake_writers(self) except -1:
        waiters = self.write_waiters
        self.write_waiters = None
        return 0 if waiters is None else _resolve(waiters)

    async def _writable_again(self):
        """Wait until all that was accepted has left, or nothing more will."""
        if self.phase >= LEAVING or self.broken or (
            self.phase != CONNECTING and not self.blocked and self.pending() == 0
        ):
            return
        waiter = self.state.loop.create_future()
        if self.write_waiters is None:
            self.write_waiters = {}
        self.write_waiters[waiter] = None
        try:
            await waiter
        finally:
            if self.write_waiters is not None:
                self.write_waiters.pop(waiter, None)  # cancelled

    # ── Ending ─────────────────────────────────────────────────────────────────────────────────

    cdef int _enter(self, Phase phase) except -1:
        if phase > self.phase:
            self.phase = phase
        return 0

    cdef int begin_end(self) except -1:
        """End the own side once everything accepted has left; go on reading."""
        if self.phase > ESTABLISHED:
            return 0
        self._enter(ENDING)
        if self.pending():
            self.limit_linger()
        self.wake_writers()  # of a send_all: nothing more is accepted
        if self.turn == 0 and self.corks == 0:
            self.flush_now()
        return 0

    cdef int begin_close(self) except -1:
        """Deliver what was accepted, drop what comes in, then close."""
        if self.phase >= CLOSING:
            return 0
        if self.phase == CONNECTING:
            self._enter(CLOSING)  # nothing was accepted yet, and nobody is told of the handshake
            return self.begin_abort(None, False)
        self._enter(CLOSING)
        if self.tls is not None:
            for data in self.stash or ():
                # Dropped, but not the handshake, nor what comes behind it.
                self.tls.feed_all(PyBytes_AS_STRING(data), PyBytes_GET_SIZE(data))
        self.stash = None
        self.peer_ended = self.tcp_eof or (self.tls is not None and self.tls.peer_closed)
        self.limit_linger()
        self.watch()
        self.wake_writers()  # of a send_all: nothing more is accepted
        if self.tls is not None and self.tls.handshaking and self.pending():
            self._continue_handshake()
        if self.turn == 0 and self.corks == 0:
            self.flush_now()
        return self._finish()

    cdef int begin_abort(self, object error, bint reset) except -1:
        """Drop everything and close the transport.

        With ``reset``, or if accepted bytes are lost, the peer gets an RST: after a FIN it would
        take what it has for all.
        """
        cdef linger_option option
        if self.phase >= LEAVING:
            return 0
        if error is not None and self.error is None:
            self.error = error
        if self.tls is not None and self.tls.handshaking and not self.handshake_told:
            self.handshake_told = True
            self.broken = True  # a write in the handler is refused
            self.group.handshake_failures += 1
            if self.phase <= ENDING:
                self.on_handshake(False, _handshake_error(error))
            if self.phase >= LEAVING:
                return 0
        if (reset or self._cuts_off()) and self.fd >= 0:
            option.l_onoff = 1
            option.l_linger = 0
            setsockopt(self.fd, SOL_SOCKET, SO_LINGER, &option, sizeof(option))
        self._leave()
        return self.drop_transport()

    cdef int _leave(self) except -1:
        """The transport is about to be closed: connection_lost follows in the next iteration."""
        self._enter(LEAVING)
        self._unwatch()
        self._drop_output()
        self.stash = None
        return self.wake_writers()

    cdef bint _cuts_off(self) noexcept:
        """Whether the peer misses some of what was accepted, if the connection ends now."""
        if self.dropped:
            return True
        if self.tls is not None and self.tls.handshaking:
            # What waits for a handshake is no part of anything yet; what was written in the clear
            # before it is.
            return self.tls.wire_plain > 0
        return self.pending() > 0

    cdef void _drop_output(self):
        if self.unsent:
            self.dropped = True
        self.unsent = 0
        self.lone = None
        self.wire = None
        if self.tls is not None:
            self.tls.plain = None
            self.tls.wire_plain = 0
        self.blocked = False

    cdef int begin_tls(
        self, object context, bint server_side, object server_hostname, double timeout
    ) except -1:
        """Put a TLS layer on the stream; `_continue_handshake` starts the handshake."""
        if self.lone is not None:
            self._new_held()
        self.tls = TLSLayer(context, server_side, server_hostname)
        # Written before: it leaves as it is, ahead of the handshake.
        self.tls.wire_plain = self.unsent
        if timeout != INFINITY:
            self.deadlines().handshake = now() + timeout
            self.arm_timer()
        return self.watch()

    cdef int _send_fin(self) except -1:
        """Everything accepted has left: say that nothing follows."""
        if self.tls is not None:
            if self.tls.handshaking:
                if self.phase == ENDING:
                    return 0  # the peer's data is still wanted, so the handshake goes on first
            else:
                try:
                    self.tls.notify(self.phase == ENDING)
                except SSLError as error:
                    return self._tls_failed(error)
                self._send_outgoing()
                if self.broken:
                    return 0
                if self.blocked:
                    # Also where nothing was accepted: a peer that does not take the close_notify.
                    if self._deadlines is None or not self._deadlines.linger:
                        self.limit_linger()
                    return 0
                if self.phase == ENDING:
                    self.schedule_pump()  # for what had to be decrypted first
        self.shut_down()
        self.fin_sent = True
        if self._deadlines is not None:
            self._deadlines.linger = self._deadlines.handshake = 0
        if self.phase == CLOSING:
            self.limit_linger()
        return self._finish()

    cdef int shut_down(self) except -1:
        """Send the FIN."""
        if not (self.peer_ended and self.tcp_eof):  # else the descriptor's close follows at once
            self.half_close()
        return 0

    cdef void half_close(self) noexcept:
        # Fails only on a connection that is gone, which reading reports.
        shutdown(self.fd, SHUT_WR)

    cdef int _finish(self) except -1:
        """Close the transport once both sides have ended."""
        if self.fin_sent and self.peer_ended and self.phase < LEAVING:
            self._leave()
            return self.drop_transport()
        return 0

    cdef int drop_transport(self) except -1:
        """Have uvloop close the descriptor; connection_lost follows."""
        if self.transport is not None:
            self.transport.close()  # its own buffer is always empty, so this is at once
        return 0

    cdef double linger(self) noexcept:
        """Seconds that what was accepted has to leave, and then the peer to end its side."""
        return self.group.linger_timeout

    cdef int _broken(self, int code) except -1:
        """A send failed. What was received before that is still delivered."""
        self.broken = True
        self.dropped = True  # what the send was given, if nothing else
        if self.error is None:
            self.error = OSError(code, os.strerror(code))
        self._drop_output()
        self.wake_writers()
        if self.phase >= CLOSING or (self.tcp_eof and not self.held_back()):
            return self.begin_abort(self.error, False)
        self.deadlines().broken = now() + (0 if self.tcp_eof else UVS_BROKEN_GRACE)
        self.arm_timer()
        return self.watch()

    cdef int _end_pause(self) except -1:
        """The connection is gone: what it brought before that is still the handler's, in turns."""
        cdef double until = now() + UVS_TURN
        # A handler that pauses again and again has one frame each time.
        while (
            self.phase <= ENDING and not self.busy and not self.spent
            and (self.paused or self.unread())
        ):
            self.paused = False
            self.pump()
            if self.unread() and not self.spent and now() > until:
                self.rest()
        return 0

    cdef int _give_up(self) except -1:
        """Close a connection that has failed."""
        self._end_pause()
        if self.spent and self.tcp_eof and self.phase <= ENDING:
            return 0  # when the handler has had all
        return self.begin_abort(self.error, False)

    cdef int _tls_failed(self, object error) except -1:
        """The handshake failed, or the session broke."""
        if self.phase >= LEAVING:
            return 0
        self._send_outgoing()  # the alert that tells the peer why
        if not self.tls.handshaking and not self.handshake_told:
            self.handshake_told = True
            self.broken = True  # a write in the handler is refused
            if self.error is None:
                self.error = error
            if self.phase <= ENDING:
                self.on_tls_error(error)
        return self.begin_abort(error, False)

    cdef int begin_closed(self) except -1:
        """The connection is gone; the last event comes now."""
        self._enter(CLOSED)
        self._drop_deadlines()
        return self.group.remove(self)

    cdef int end_closed(self) except -1:
        """The last event is over: nothing refers to the stream from here on."""
        self.group.forget(self)
        return self.wake_writers()

    cdef object transport_info(self, object name, object default):
        """What uvloop's transport knows; as asyncio's it has a socket also when it is closed."""
        if name == "socket" and self.fd < 0:
            family = socket.AF_UNIX
            if self.tcp:
                long_name = len(self.transport.get_extra_info("sockname") or ()) == 4
                family = socket.AF_INET6 if long_name else socket.AF_INET
            return TransportSocket(PseudoSocket(family, socket.SOCK_STREAM, 0, -1))
        found = self.transport.get_extra_info(name)
        if name == "socket" and found is not None:
            return self.state.socket_of(self.fd, found)
        if found is None and name == "peername" and self.tcp and self.fd >= 0:
            found = self._gone_peer()
        return default if found is None else found

    cdef object _gone_peer(self):
        """The address of a client that had reset before it was accepted. uvloop could not ask it.

        It is kept: the transport is asked again when the descriptor is closed.
        """
        cdef unsigned char name[28]
        cdef socklen_t size = 28  # a sockaddr_in6; Linux refuses to be asked for more than it has
        if SO_PEERNAME < 0:
            return None
        if getsockopt(self.fd, SOL_SOCKET, SO_PEERNAME, name, &size) < 0:
            size = 16  # a sockaddr_in
            if getsockopt(self.fd, SOL_SOCKET, SO_PEERNAME, name, &size) < 0:
                return None
        raw = name[:size]
        port = int.from_bytes(raw[2:4], "big")
        family = int.from_bytes(raw[:2], sys.byteorder)
        if family == socket.AF_INET:
            found = (socket.inet_ntop(family, raw[4:8]), port)
        elif family == socket.AF_INET6:
            found = (
                socket.inet_ntop(family, raw[8:24]), port,
                int.from_bytes(raw[4:8], "big"), int.from_bytes(raw[24:28], sys.byteorder),
            )
        else:
            return None
        self.transport = _NamedTransport(self.transport, found)
        return found

    # ── Time ───────────────────────────────────────────────────────────────────────────────────

    cdef Deadlines deadlines(self):
        if self._deadlines is None:
            self._deadlines = Deadlines.__new__(Deadlines)
        return self._deadlines

    cdef int limit_linger(self) except -1:
        """Call `on_linger_expired` if the peer takes nothing for so long."""
        cdef double seconds = self.linger()
        if seconds == INFINITY:
            return 0
        self.deadlines().linger = now() + seconds
        return self.arm_timer()

    cdef int arm_timer(self) except -1:
        """Have the one timer fire no later than the earliest deadline."""
        cdef Deadlines due = self._deadlines
        cdef double earliest
        # As in `_on_timer`: a deadline that it passes over would fire for ever.
        cdef bint telling = self.opened and self.phase <= ENDING
        if due is None or self.phase >= LEAVING:
            return 0
        earliest = earlier(earlier(due.handshake, due.linger), earlier(due.broken, due.retry))
        if telling:
            earliest = earlier(earliest, due.timeout)
            if self.group.idle_timeout > 0:
                earliest = earlier(earliest, due.active + self.group.idle_timeout)
        if not earliest:
            return 0 if due.timeout and self.phase <= ENDING else self._drop_deadlines()
        if due.timer is not None:
            if due.timer_at <= earliest:
                return 0  # it fires early, finds nothing due and is armed anew: cheaper
            due.timer.cancel()
        due.timer_at = earliest
        due.timer = self.state.loop.call_later(
            max(earliest - now(), 0.0), self._on_timer, context=self.group.context
        )
        return 0

    cdef int _drop_deadlines(self) except -1:
        if self._deadlines is not None:
            if self._deadlines.timer is not None:
                self._deadlines.timer.cancel()
            self._deadlines = None
        return 0

    def _on_timer(self):
        cdef Deadlines due = self.deadlines()
        cdef double t = now() + UVS_TIMER_SLACK
        due.timer = None
        if self.phase >= LEAVING:
            return
        self.turn += 1
        try:
            if due.broken and due.broken <= t:
                due.broken = 0
                self._give_up()
            if due.handshake and due.handshake <= t:
                due.handshake = 0
                self.on_handshake_expired()
            if due.linger and due.linger <= t:
                due.linger = 0
                self.on_linger_expired()
            if due.retry and due.retry <= t:
                due.retry = 0
                self._writable()
                self.watch()
            if self.opened and self.phase <= ENDING:
                if due.timeout and due.timeout <= t:
                    due.timeout = 0
                    self.on_timeout()
                elif self.group.idle_timeout > 0 and due.active + self.group.idle_timeout <= t:
                    due.active = t
                    self.on_timeout()
        finally:
            self.leave_turn()
        self.arm_timer()

    cdef int on_handshake_expired(self) except -1:
        return self._tls_failed(ssl.SSLError(
            ssl.SSL_ERROR_SSL,
            f"the TLS handshake took longer than {self.group.handshake_timeout:g} seconds",
        ))

    cdef int on_linger_expired(self) except -1:
        if self.phase >= LEAVING:
            return 0
        if self.fin_sent:
            self._leave()
            return self.drop_transport()
        # An RST, because a FIN would tell the peer that it has everything.
        return self.begin_abort(
            TimeoutError(
                ETIMEDOUT,
                f"{self.pending()} bytes were not taken by the peer within linger_timeout "
                f"({self.group.linger_timeout:g} seconds)",
            ),
            True,
        )

    cdef int _set_options(self) except -1:
        if self.tcp and not self.group.no_delay:
            set_no_delay(self.fd, False)  # uvloop turns it on for every TCP transport
        if self.tcp and self.group.keep_alive >= 0:
            set_keep_alive(self.fd, True, self.group.keep_alive)
        if self.group.idle_timeout > 0:
            self.deadlines().active = now()
        return 0


cdef double earlier(double a, double b) noexcept:
    """The earlier of two deadlines; 0 is none."""
    return b if not a or 0 < b < a else a


cdef int get_error(int fd) noexcept:
    """The error that the connection failed with: 0 for none, and for a reset after the end."""
    cdef int code = 0
    cdef socklen_t size = sizeof(code)
    if getsockopt(fd, SOL_SOCKET, SO_ERROR, &code, &size) != 0 or code == EPIPE:
        return 0
    return code


cdef bint set_keep_alive(int fd, bint enable, double delay) noexcept:
    cdef int value = enable
    if setsockopt(fd, SOL_SOCKET, SO_KEEPALIVE, &value, sizeof(value)) != 0:
        return False
    if enable and delay > 0:
        value = <int>delay if delay >= 1 else 1  # the system counts whole seconds
        return setsockopt(fd, IPPROTO_TCP, TCP_KEEPIDLE, &value, sizeof(value)) == 0
    return True


cdef bint set_no_delay(int fd, bint enable) noexcept:
    cdef int value = enable
    return setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &value, sizeof(value)) == 0
