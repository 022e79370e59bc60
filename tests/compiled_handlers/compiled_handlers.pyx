"""Handlers and a framer compiled against the .pxd files of the installed uvsock."""

from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_GET_SIZE
from uvsock cimport BufferSink, Cut, Envelope, Framer, Handlers, Socket


cdef class Echo(Handlers):
    cdef readonly int connections

    cdef object on_open(self, object socket):
        self.connections += 1

    cdef object on_data(self, object socket, object data):
        cdef Py_ssize_t size = PyBytes_GET_SIZE(data)
        cdef Py_ssize_t sent = (<Socket>socket).write_memory(PyBytes_AS_STRING(data), size)
        if 0 <= sent < size:
            (<Socket>socket).data = data[sent:]
            socket.pause()

    cdef object on_drain(self, object socket):
        rest, (<Socket>socket).data = (<Socket>socket).data, None
        socket.resume()
        return self.on_data(socket, rest)


cdef class Zeros(Framer):
    cdef int cut(self, const char* p, Py_ssize_t n, Cut* cut) except -1:
        cdef Py_ssize_t i
        for i in range(cut.searched, n):
            if p[i] == 0:
                cut.start, cut.stop, cut.size = 0, i, i + 1
                return 1
        return 0

    cdef object enclose(self, const char* p, Py_ssize_t n, Envelope* envelope):
        envelope.suffix = b"\0"
        envelope.suffix_size = 1


cdef class Frames(Handlers):
    """Sends frames back; some frames ask for more."""

    cdef readonly list results

    def __init__(self, **others):
        super().__init__(**others)
        self.results = []

    cdef object on_data(self, object socket, object data):
        if data == b"close":
            socket.close()
        elif data == b"terminate":
            socket.terminate()
        elif data == b"raise":
            raise LookupError("raised in C")
        elif data == b"unframed":
            socket.set_framing(None)
        elif data == b"wait":
            return self.wait(socket)
        elif data == b"python":
            socket.reload({"data": python})
        self.results.append(
            (<Socket>socket).write_frame_memory(PyBytes_AS_STRING(data), PyBytes_GET_SIZE(data))
        )

    async def wait(self, socket):
        await self.sleep()
        socket.write_frame("waited")

    async def sleep(self):
        import asyncio
        await asyncio.sleep(0.01)


def python(socket, data):
    """What `python` reloads: `compiled` goes back to the table in the socket's data."""
    socket.write_frame(b"python: " + data)
    if data == b"compiled":
        socket.reload(socket.data)


cdef class Events(Handlers):
    """Writes down all events, and raises in one of them."""

    cdef readonly list events
    cdef readonly list errors
    cdef object faulty
    cdef BufferSink received

    def __init__(self, faulty=None):
        self.events = []
        self.errors = []
        self.faulty = faulty
        self.received = BufferSink()
        self.received.start()

    def all_received(self):
        return bytes(self.received.end())

    cdef object happened(self, str event, object error=None):
        self.events.append(event)
        if error is not None:
            self.errors.append(error)
        if event == self.faulty:
            raise LookupError(event)

    cdef object on_open(self, object socket):
        self.happened("open")

    cdef object on_data(self, object socket, object data):
        self.received.append(PyBytes_AS_STRING(data), PyBytes_GET_SIZE(data))
        self.happened("data")

    cdef object on_drain(self, object socket):
        self.happened("drain")

    cdef object on_end(self, object socket):
        self.happened("end")

    cdef object on_timeout(self, object socket):
        self.happened("timeout")
        socket.end()

    cdef object on_handshake(self, object socket, bint success, object error):
        self.happened("handshake" if success else "failed handshake", error)

    cdef object on_error(self, object socket, object error):
        self.happened("error", error)

    cdef object on_close(self, object socket, object error):
        self.happened("close", error)

    cdef object on_connect_error(self, object socket, object error):
        self.happened("connect_error", error)
