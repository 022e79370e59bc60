# The socket core: what uvloop calls, the write path, flow control, TLS and the ways to close.
#
#   CONNECTING ──► ESTABLISHED ──► ENDING ──► CLOSING ──► LEAVING ───► CLOSED
#   no event yet   reads, writes   own side    input is    transport    connection_lost
#                                  ended,      dropped     is going     has run
#                                  still reads
#
# A stream only ever moves to the right, in `_enter`. Bytes are accepted in ESTABLISHED only, and
# delivered up to ENDING only. A subclass turns the on_ methods into calls of handlers.

cimport cython

from uvsock._framing cimport Delivery, Envelope, FrameReader
from uvsock._pieces cimport Pieces
from uvsock._poller cimport Poller, Watched
from uvsock._tls cimport TLSLayer

cdef extern from "pythread.h":
    unsigned long PyThread_get_thread_ident() noexcept


cdef enum Phase:
    CONNECTING, ESTABLISHED, ENDING, CLOSING, LEAVING, CLOSED


cdef enum Reader:
    # Who reads: uvloop begins when connection_made has returned, reads once, and once more. A
    # connection that goes on after that is read here.
    STARTING, UVLOOP, UVLOOP_ONCE_MORE, OURS


cdef enum Sending:
    # Who has the write side: nobody, one call whose bytes TLS must not come between (sendfile), or
    # one whose next piece would simply be encrypted (send_all).
    NOBODY, ONE_PIECE, PIECES


cdef class ReadBuffer:
    # Memory shared by all streams of a loop, lent to handlers as a memoryview. While a view is
    # kept, `exports` is above the loop's own and the loop takes a new one instead.
    cdef char* memory
    cdef Py_ssize_t size
    cdef Py_ssize_t start     # the part that the next view shows
    cdef Py_ssize_t visible
    cdef int exports


@cython.final
cdef class LoopState:
    # One per event loop. Streams hold it; it holds their groups only while they have streams.
    cdef readonly object loop
    cdef list transports        # uvloop's of open streams, by descriptor; None: not known
    cdef dict sockets           # those of them that were asked for, by descriptor
    cdef unsigned long thread
    cdef bint debug             # the loop's debug mode, as of its newest connection or listener
    cdef readonly Py_ssize_t held
    cdef set _idle_waiters      # Futures
    cdef readonly set listeners
    cdef readonly set groups
    cdef set acceptors          # open ones: a loop that is closed closes them
    cdef list starved           # called when a descriptor may be free: listeners that need one
    cdef list _dirty
    cdef Py_ssize_t held_outside          # how often bytes were held for a stream not in a turn
    cdef Py_ssize_t reads                 # that no task has answered yet
    cdef int _answers                     # of tasks to a few reads: in how many iterations in a row
    cdef int _single                      # of those of one write each: how many in a row
    cdef int _awaited                     # flushes scheduled, each behind a read's task
    cdef object _answers_callback
    cdef bint _flush_scheduled
    cdef object _flush_callback
    cdef Pieces _spare_pieces     # a chain: the first, which names the next
    cdef int _spare_count
    cdef ReadBuffer read_buffer
    cdef ReadBuffer tls_buffer
    cdef Poller poller

    cdef inline int check(self) except -1:
        return 0 if PyThread_get_thread_ident() == self.thread else self._wrong_thread()

    cdef bint ends_the_run(self, object error) except -1
    cpdef int hold(self) except -1
    cpdef int release(self) except -1
    cdef int _wrong_thread(self) except -1
    cdef int check_slow(self, double begun, object callback, object caller) except -1
    cdef int add_dirty(self, Stream stream) except -1
    cdef int schedule_flush(self) except -1
    cdef bint defer_flush(self) noexcept
    cdef int count_read(self) except -1
    cdef bint answers_at_once(self, Stream stream) noexcept
    cdef int _flush(self) except -1
    cdef object socket_of(self, int fd, object of_uvloop)
    cdef int keep_transport(self, Py_ssize_t fd, object transport) except -1
    cdef int forget_transport(self, Py_ssize_t fd) except -1
    cdef ReadBuffer read_memory(self)
    cdef int feed(self) except -1
    cdef Pieces take_pieces(self)
    cdef void give_pieces(self, Pieces pieces)


cdef class StreamGroup:
    # What the streams of one listener, or one connection, share.
    cdef readonly LoopState state
    cdef readonly object context          # contextvars.Context that handlers run in
    cdef public object tls_context
    cdef readonly bint server_side
    cdef public bint stopped              # a connection accepted, but not yet made, is dropped
    cdef readonly object server_hostname
    cdef readonly list sockets            # live: what keeps open streams from being collected
    cdef set _empty_waiters               # Futures
    cdef Py_ssize_t _alive                # as `sockets`, and those whose last event runs
    cdef readonly Py_ssize_t accepted
    cdef readonly Py_ssize_t handshake_failures
    cdef long long _bytes_read            # of streams already closed
    cdef long long _bytes_written
    cdef public bint allow_half_open
    cdef public bint cork
    cdef public bint no_delay
    cdef public Delivery delivery
    cdef public Py_ssize_t high_water_mark
    cdef public double keep_alive         # seconds before the first probe, 0 the system's, < 0 off
    cdef public double idle_timeout       # seconds, 0 off
    cdef public double linger_timeout     # seconds
    cdef double handshake_timeout         # seconds

    cdef int add(self, Stream stream) except -1
    cdef int remove(self, Stream stream) except -1
    cdef int forget(self, Stream stream) except -1


@cython.final
cdef class Deadlines:
    # Of one stream, as loop time, 0 for none. Made with the first of them, gone with the last. Each
    # has its own place: what sets or clears one leaves the others alone.
    cdef double handshake        # the TLS handshake has to be over
    cdef double linger           # what was accepted has to be gone, and then the peer
    cdef double broken           # a send failed, and reading has not told that it is over
    cdef double retry            # a send that found no memory is tried again
    cdef double backoff          # seconds that the last such try was put off
    cdef double timeout          # of `timeout()`
    cdef double active           # last traffic, kept only with an idle timeout
    cdef double timer_at
    cdef object timer            # the one TimerHandle, armed for the earliest of these


cdef class Stream(Watched):
    cdef StreamGroup group
    cdef LoopState state
    cdef object transport        # uvloop's; owns the descriptor, knows the addresses after close

    # An idle connection is mostly this: 16 bytes more take it to the next size of malloc's.
    cdef unsigned char phase              # a Phase
    cdef unsigned char opened             # the open event was given, so a close event is due
    cdef unsigned char tcp                # else a Unix socket
    cdef unsigned char reader             # a Reader
    cdef unsigned char paused             # by the user
    cdef unsigned char busy               # an async handler runs
    cdef unsigned char full               # a buffered protocol had no room: that comes first
    cdef unsigned char spent              # others have their turn first
    cdef unsigned char hung_up            # the kernel said so, and there is nothing to do about it
    cdef unsigned char read_off           # shutdown(read=True)
    cdef unsigned char tcp_eof            # the peer's FIN was read
    cdef unsigned char peer_ended         # the peer's end was delivered, or needs no delivery
    cdef unsigned char fin_sent
    cdef unsigned char broken             # a send failed: what was received is still delivered
    cdef unsigned char blocked            # the kernel took less than it was given
    cdef unsigned char short_write        # a write was refused in part: a drain event is due
    cdef unsigned char short_unanswered   # ... and neither drain nor a retry has come (debug mode)
    cdef unsigned char sending            # a Sending
    cdef unsigned char dirty              # in the loop's list of streams to flush
    cdef unsigned char alive              # from connection_made until the last event is over
    cdef unsigned char unreferenced
    cdef unsigned char pump_scheduled
    cdef unsigned char end_given       # the end event was given
    cdef unsigned char handshake_told     # that the handshake failed, or TLS broke: said once
    cdef unsigned char dropped         # accepted bytes were
    cdef unsigned char cut_off         # the peer ended TLS without close_notify

    cdef short turn              # > 0 inside an event: corked writes are held until it ends
    cdef short corks             # > 0 inside `with cork()`
    cdef int place               # in the group's `sockets`, else -1

    # Bytes accepted that the kernel does not have yet, as plain text.
    cdef Py_ssize_t unsent
    # Bytes for the kernel: plain ones, or ciphertext when there is a TLS layer, which then has the
    # plain ones. None when empty.
    cdef Pieces wire
    # The only bytes held, not copied: what is written once is sent, or encrypted, from where it is.
    # `unsent` tells how many of its last ones still are.
    cdef bytes lone
    cdef TLSLayer tls
    # Received while paused or busy, not yet looked at. None when empty.
    cdef list stash
    # Cuts what was received into frames; None where chunks are delivered as they come.
    cdef FrameReader frames

    cdef Deadlines _deadlines    # None while there are none
    cdef readonly long long bytes_read
    cdef readonly long long bytes_written
    cdef object error            # what broke the connection, or None
    # Futures, as keys in order: everything accepted has left, or the stream is closed.
    cdef dict write_waiters

    # Events, for the subclass. They do not raise, but for on_data: what that raises goes to
    # on_data_raised, so that the frames of a chunk need one `try` for all.
    cdef int on_made(self) except -1      # there is a connection; entering LEAVING refuses it
    cdef int on_open(self) except -1
    cdef int on_data(self, object data) except -1
    cdef int on_data_raised(self, object error) except -1
    cdef int on_frame_error(self, object error) except -1
    cdef int on_drain(self) except -1
    cdef int on_end(self) except -1
    cdef int on_hang_up(self) except -1   # after the end: nobody is left to write to
    cdef int on_timeout(self) except -1
    cdef int on_handshake(self, bint success, object error) except -1
    cdef int on_tls_error(self, object error) except -1
    cdef int on_closed(self) except -1

    # Of uvloop's calls
    cdef int _made(self, object transport) except -1
    cdef int _gone(self, object exc) except -1

    # Reading
    cdef int receive(self) except -1
    cdef int nothing_received(self, Py_ssize_t n) except -1
    cdef int _received_end(self) except -1
    cdef int lost(self, int code) except -1
    cdef int _hung_up(self) except -1
    cdef inline bint held_back(self) noexcept
    cdef inline bint choked(self) noexcept
    cdef int watch(self) except -1
    cdef int _take_over(self) except -1
    cdef int _unwatch(self) except -1
    @cython.final
    cdef int received(self, const char* p, Py_ssize_t n, object owner) except -1
    cdef inline int _look_at(self, const char* p, Py_ssize_t n, object owner) except -1
    cdef int _stash(self, const char* p, Py_ssize_t n) except -1
    @cython.final
    cdef int _receive_tls(self, const char* p, Py_ssize_t n) except -1
    cdef int _receive_last(self, const char* p, Py_ssize_t n) except -1
    cdef int _drop_input(self) except -1
    cdef int rest(self) except -1
    cdef int deliver(self, const char* p, Py_ssize_t n, object owner) except -1
    cdef inline int _give(self, object data) except -1
    @cython.final
    cdef int _deliver_frames(self) except -1
    cdef bint unread(self) noexcept
    cdef int _read_tls(self) except -1
    cdef int release_borrowed(self, object view) except -1
    cdef int _continue_handshake(self) except -1
    cdef int _check_end(self) except -1
    cdef int after_end(self) except -1
    cdef int schedule_pump(self) except -1
    cdef int pump(self) except -1

    # Writing
    cdef Py_ssize_t write_bytes(
        self, const char* p, Py_ssize_t n, bint whole, bytes owner
    ) except -2
    cdef inline bint _holdable(self, Py_ssize_t n) noexcept
    @cython.final
    cdef Py_ssize_t _write_now(
        self, const char* p, Py_ssize_t n, bint whole, bytes owner
    ) except -2
    @cython.final
    cdef Py_ssize_t _write_tls(
        self, const char* p, Py_ssize_t n, bint whole, bytes owner
    ) except -2
    cdef Py_ssize_t write_framed(self, const char* p, Py_ssize_t n, bytes owner) except -2
    cdef Py_ssize_t _write_parts(
        self, const Envelope* envelope, const char* p, Py_ssize_t n, Py_ssize_t size, bytes owner
    ) except -2
    cdef inline int _touch(self) except -1
    cdef inline void _count(self, Py_ssize_t n) noexcept
    cdef inline bint _corking(self) noexcept
    @cython.final
    cdef Py_ssize_t _hold(
        self, const char* p, Py_ssize_t n, Py_ssize_t taken, bint whole, bytes owner
    ) except -1
    cdef int _tear(self, object error) except -1
    cdef inline Pieces _held_or_none(self)
    cdef inline Pieces _held(self)
    cdef Pieces _new_held(self)
    cdef inline Py_ssize_t _lone_left(self) noexcept
    cdef inline int _flush_later(self) except -1
    @cython.final
    cdef Py_ssize_t _send(self, const char* p, Py_ssize_t n) except -2
    cdef inline int _sent(self, Py_ssize_t held, Py_ssize_t taken) except -1
    cdef int _send_outgoing(self) except -1
    cdef int _encrypt_held(self) except -1
    @cython.final
    cdef int flush_now(self) except -1
    @cython.final
    cdef int _flushed(self) except -1
    @cython.final
    cdef int leave_turn(self) except -1
    @cython.final
    cdef int _leave_reading(self, Py_ssize_t before) except -1
    cdef inline Py_ssize_t pending(self) noexcept
    cdef int arm_writer(self) except -1
    cdef int retry_later(self) except -1
    cdef int wake_writers(self) except -1
    cdef int _writable(self) except -1
    cdef int on_writable(self) except -1
    @cython.final
    cdef int check_drain(self) except -1

    # Ending
    cdef int _enter(self, Phase phase) except -1
    cdef int begin_end(self) except -1
    cdef int begin_close(self) except -1
    cdef int begin_abort(self, object error, bint reset) except -1
    cdef int begin_tls(
        self, object context, bint server_side, object server_hostname, double timeout
    ) except -1
    cdef int _send_fin(self) except -1
    cdef int shut_down(self) except -1
    cdef void half_close(self) noexcept
    cdef int _finish(self) except -1
    cdef int drop_transport(self) except -1
    cdef int _leave(self) except -1
    cdef double linger(self) noexcept
    cdef bint _cuts_off(self) noexcept
    cdef void _drop_output(self)
    cdef int _broken(self, int code) except -1
    cdef int _end_pause(self) except -1
    cdef int _give_up(self) except -1
    cdef int _tls_failed(self, object error) except -1
    cdef int begin_closed(self) except -1
    cdef int end_closed(self) except -1
    cdef object transport_info(self, object name, object default)
    cdef object _gone_peer(self)

    # Time
    cdef Deadlines deadlines(self)
    cdef int limit_linger(self) except -1
    cdef int on_handshake_expired(self) except -1
    cdef int on_linger_expired(self) except -1
    cdef int _drop_deadlines(self) except -1
    cdef int arm_timer(self) except -1
    cdef int _set_options(self) except -1


cdef double now() noexcept
cdef Py_ssize_t receive_into(int fd, void* p, Py_ssize_t n) noexcept
cdef void shut_both(int fd) noexcept
cdef bint set_keep_alive(int fd, bint enable, double delay) noexcept
cdef bint set_no_delay(int fd, bint enable) noexcept
