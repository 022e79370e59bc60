# TLS as bytes in, bytes out: one ssl.SSLObject between two memory BIOs. It knows no sockets.

from uvsock._pieces cimport Pieces
from uvsock._sink cimport BufferSink


cdef class TLSLayer:
    cdef readonly object sslobj   # ssl.SSLObject, for its attributes
    cdef object _ssl              # the compiled object inside it
    cdef object _incoming         # ssl.MemoryBIO: ciphertext from the peer
    cdef object _outgoing         # ssl.MemoryBIO: ciphertext for the peer
    cdef bint handshaking         # until the handshake has succeeded
    # The peer negotiates anew (TLS 1.2 and older): nothing is encrypted before it has said more.
    cdef bint stalled
    cdef bint peer_closed         # the peer's close_notify was read
    cdef bint notified            # our close_notify was written
    cdef bint broken              # a record could not be read, so none after it can
    cdef bint _output             # OpenSSL may have written something since the last `take`
    cdef Pieces plain             # plain text accepted and not yet encrypted; None when empty
    cdef Py_ssize_t wire_plain    # plain text that the bytes in the stream's `wire` stand for
    # The records that have come in whole and were not read; may be too high, never too low.
    cdef Py_ssize_t _records
    cdef Py_ssize_t _missing      # bytes of the record that is coming in
    cdef int _header              # bytes of its header that have come
    cdef bint _garbled            # not TLS: for OpenSSL to say
    # Plain text that had to be decrypted before our close_notify, still to be read.
    cdef BufferSink _backlog

    # All raise ssl.SSLError for a broken session.
    cdef bint handshake(self) except -1   # True once done, False: wants more ciphertext
    # How many it took: those of a few records, or all where they are thrown away.
    cdef Py_ssize_t feed(self, const char* p, Py_ssize_t n) except -1
    cdef int feed_all(self, const char* p, Py_ssize_t n) except -1
    # > 0 bytes at p (view is that memory as an object), 0 wants more ciphertext, -1 close_notify.
    cdef Py_ssize_t read(self, char* p, object view, Py_ssize_t size) except -2
    # How many bytes: fewer once `stalled`.
    cdef Py_ssize_t encrypt(self, const char* p, Py_ssize_t n) except -1
    cdef Py_ssize_t encrypt_bytes(self, bytes data) except -1
    cdef object take(self)                                   # ciphertext to send: bytes, or None
    cdef Py_ssize_t _count(self, const unsigned char* p, Py_ssize_t n) except -1
    cdef int notify(self, bint keep_input) except -1         # write close_notify
