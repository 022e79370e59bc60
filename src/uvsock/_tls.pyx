"""TLS on top of any byte stream. All cryptography is OpenSSL's, through the ssl module."""

import ssl

from cpython.buffer cimport PyBUF_READ
from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_GET_SIZE
from cpython.memoryview cimport PyMemoryView_FromMemory
from libc.string cimport memcpy

from uvsock._sink cimport BufferSink

cdef object SSLError = ssl.SSLError
cdef object SSLWantReadError = ssl.SSLWantReadError
cdef object SSLZeroReturnError = ssl.SSLZeroReturnError
cdef object MemoryBIO = ssl.MemoryBIO


cdef object _session(object sslobj):
    """The compiled object inside an SSLObject: an interpreted call less per record."""
    return getattr(sslobj, "_sslobj", sslobj)


cdef object SSLSession = type(_session(
    ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT).wrap_bio(
        ssl.MemoryBIO(), ssl.MemoryBIO(), server_hostname="localhost"
    )
))
# To look a method up for every record takes as long as half of its call.
cdef object session_read = SSLSession.read
cdef object session_write = SSLSession.write
cdef object bio_read = MemoryBIO.read
cdef object bio_write = MemoryBIO.write

# The largest plain text of one record (RFC 8446, 5.1): what one read of OpenSSL's can return.
cdef enum:
    RECORD = 16384
    # Of a record: type, version, and in the last two bytes the length.
    HEADER = 5
    # The largest body of a record, of TLS 1.2 (RFC 5246, 6.2.3).
    LONGEST = 16384 + 2048
    # Records that OpenSSL is given at a time.
    FEW = 16


cdef object _name_of_peer(object name):
    """The name as TLS sends it and as certificates have it.

    Without the dot of a name that is complete (RFC 6066, 3); an address without its zone, which is
    this machine's own (RFC 4007, 11.2).
    """
    if not isinstance(name, str):
        return name
    address, zone, _ = name.partition("%")
    return address if zone and ":" in address else name.removesuffix(".")


cdef class TLSLayer:
    """One TLS session.

    Args:
        context: the ``ssl.SSLContext``.
        server_side: whether this end is the server.
        server_hostname: the name a client sends and verifies, or None.
    """

    def __cinit__(self, object context, bint server_side, object server_hostname):
        self._incoming = MemoryBIO()
        self._outgoing = MemoryBIO()
        self.sslobj = context.wrap_bio(
            self._incoming, self._outgoing, server_side=server_side,
            server_hostname=_name_of_peer(server_hostname),
        )
        self._ssl = _session(self.sslobj)
        self.handshaking = True

    cdef bint handshake(self) except -1:
        self._output = True
        try:
            self._ssl.do_handshake()
        except SSLWantReadError:
            return False
        self.handshaking = False
        return True

    cdef Py_ssize_t feed(self, const char* p, Py_ssize_t n) except -1:
        """Take ciphertext: how much of it. The rest is for when this has been read.

        OpenSSL may answer a record without giving anything to read, so that one read goes through
        all that there are: of key updates, which are short, a second's worth.
        """
        if self.peer_closed or self.broken:
            return n  # thrown away: nobody will look at it
        self.stalled = False
        n = self._count(<const unsigned char*>p, n)
        bio_write(self._incoming, PyMemoryView_FromMemory(<char*>p, n, PyBUF_READ))
        return n

    cdef int feed_all(self, const char* p, Py_ssize_t n) except -1:
        cdef Py_ssize_t taken = 0
        while taken < n:
            taken += self.feed(p + taken, n - taken)
        return 0

    cdef Py_ssize_t _count(self, const unsigned char* p, Py_ssize_t n) except -1:
        """Count the records that are complete (RFC 8446, 5.1), and stop after a few.

        Reading more than there is costs an SSLWantReadError, a Python exception per message, and to
        ask OpenSSL first is not much cheaper.
        """
        cdef const unsigned char* end = p + n
        cdef const unsigned char* begin = p
        cdef Py_ssize_t step
        cdef int found = 0
        while p < end and not self._garbled and found < FEW:
            if self._header < HEADER:
                # For what is no record OpenSSL is asked at once: more may never come.
                if self._header == 0:
                    self._garbled = not 20 <= p[0] <= 24  # the content types that there are
                elif self._header == 1:
                    self._garbled = p[0] != 3  # the first byte of the version, in all versions
                elif self._header >= 3:
                    self._missing = self._missing << 8 | p[0]
                    self._garbled = self._missing > LONGEST
                self._header += 1
                step = 1
            else:
                step = min(end - p, self._missing)
                self._missing -= step
            if self._header == HEADER and self._missing == 0:
                found += 1
                self._header = 0
            p += step
        self._records += found
        return n if self._garbled else p - begin

    cdef Py_ssize_t read(self, char* p, object view, Py_ssize_t size) except -2:
        cdef Py_ssize_t n
        if self._backlog is not None:
            n = min(size, self._backlog.held())
            if n:
                memcpy(p, self._backlog.head(), n)
                self._backlog.consume(n)
                return n
            self._backlog = None
        if self.peer_closed:
            return -1
        if self._records == 0 and not self._garbled:
            return 0
        try:
            n = session_read(self._ssl, size, view)
        except SSLWantReadError:
            # The records were not of the application's: OpenSSL may have answered them.
            self._output = True
            self._records = 0
            return 0
        except SSLZeroReturnError:
            n = 0
        except SSLError:
            self._output = True  # the alert
            self.broken = True
            raise
        if n == 0:
            self.peer_closed = True
            return -1
        self._records -= 1
        return n

    cdef Py_ssize_t encrypt(self, const char* p, Py_ssize_t n) except -1:
        cdef Py_ssize_t done = 0
        self._output = True
        while done < n:
            try:
                done += session_write(
                    self._ssl, PyMemoryView_FromMemory(<char*>p + done, n - done, PyBUF_READ)
                )
            except SSLWantReadError:
                self.stalled = True
                break
        return done

    cdef Py_ssize_t encrypt_bytes(self, bytes data) except -1:
        """Without the memoryview that ``encrypt`` needs; at most one record."""
        cdef Py_ssize_t done
        self._output = True
        try:
            done = session_write(self._ssl, data)
        except SSLWantReadError:
            self.stalled = True
            return 0
        if done < PyBytes_GET_SIZE(data):
            done += self.encrypt(PyBytes_AS_STRING(data) + done, PyBytes_GET_SIZE(data) - done)
        return done

    cdef object take(self):
        if not self._output:
            return None
        self._output = False
        return bio_read(self._outgoing) or None

    cdef int notify(self, bint keep_input) except -1:
        """Write close_notify. Whatever the peer already sent is kept for ``read``, or dropped."""
        cdef Py_ssize_t n
        if self.notified:
            return 0
        # SSL_shutdown would read application data that is still in the BIO and fail on it.
        kept = BufferSink() if keep_input else None
        while not self.peer_closed:
            piece = bytearray(RECORD)
            n = self.read(piece, piece, RECORD)
            if n <= 0:
                break
            if keep_input:
                (<BufferSink>kept).append(piece, n)
        if keep_input and (<BufferSink>kept).held():
            self._backlog = kept
        self.notified = self._output = True
        try:
            self.sslobj.unwrap()
        except SSLWantReadError:
            pass  # written; the peer's own close_notify has not arrived
        except SSLError:
            # The alert is in the outgoing BIO or the session is past saying anything: either way
            # there is nothing more to write, and the read side will report what broke.
            return 0
        else:
            self.peer_closed = True
        return 0
