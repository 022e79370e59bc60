# asyncio's transports on the socket core. A transport is the Stream itself: it calls asyncio's
# protocol where a Socket calls handlers.

cimport cython

from uvsock._stream cimport Stream, StreamGroup


cdef class CompiledProtocol:
    # A protocol that gets its bytes by a C call instead of `data_received`. ``owner`` is the object
    # that they are all of, or None.
    cdef int bytes_received(self, const char* data, Py_ssize_t size, bytes owner) except -1
    # What it was given and nobody has read yet; it is forgotten.
    cdef bytes take_unread(self)


cdef class TransportGroup(StreamGroup):
    # What the transports of one server, or one connection, share.
    cdef object __weakref__
    cdef object protocol_factory        # a server's; None where a client has its protocol
    cdef public object server           # that accepts for it, as long as it does


cdef class Transport(Stream):
    cdef object __weakref__
    cdef dict __dict__                  # methods can be replaced, as programs and tests do
    cdef object protocol
    cdef object context                 # its own copy of the group's; None until there is a call
    cdef object get_buffer              # of a BufferedProtocol, else None
    cdef object buffer_updated
    cdef const char* filling            # received: the part that `_fill` has still to copy
    cdef Py_ssize_t left
    cdef bytes unfilled                 # received, and not taken by a BufferedProtocol that paused
    cdef CompiledProtocol compiled      # the protocol, if it is one
    cdef object opening                 # Future: connection_made has returned, or why not
    cdef Py_ssize_t high                # pause_writing above this many bytes held
    cdef Py_ssize_t low                 # resume_writing at this many or fewer
    cdef double handshake_timeout       # seconds
    cdef double shutdown_timeout        # seconds that a TLS peer has to end its side too
    cdef unsigned char writing_paused
    cdef unsigned char pausing          # pause_writing() of the protocol runs
    cdef unsigned char eof_written      # write_eof() was called
    cdef unsigned char inside           # a call of the protocol runs, in that context

    cdef int _check_writable(self) except -1
    cdef int write_from(self, const char* data, Py_ssize_t size, bytes owner) except -1
    cdef int _write(self, const char* data, Py_ssize_t size, bytes owner) except -1
    cdef int _write_object(self, object data) except -1
    cdef bint _enter_write(self) except -1
    cdef int _leave_write(self, bint at_once) except -1
    cdef int flush(self) except -1
    cdef int _use(self, object protocol) except -1
    @cython.final
    cdef object _enter_context(self)
    @cython.final
    cdef int _leave_context(self, object context) except -1
    @cython.final
    cdef object _call(self, object method, object argument)
    cdef int _fill(self, const char* data, Py_ssize_t size) except -1
    cdef bytes _take_left(self)
    cdef int _pause_writing(self) except -1
    cdef int _resume_writing(self) except -1
    cdef int _resume_if_low(self) except -1
    cdef int _close(self) except -1
    cdef int _opened(self, object error) except -1
    cdef int _report(self, str message, object error) except -1
    cdef int _failed(self, str method, object error) except -1


cdef bytes read_now(object reader)
