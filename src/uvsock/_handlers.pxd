# The handler table: what runs for each event. It knows nothing of sockets or TLS.

cdef enum Event:
    OPEN, DATA, DRAIN, END, TIMEOUT, HANDSHAKE, ERROR, CLOSE, CONNECT_ERROR


cdef class Handlers:
    # The callables of a table, or None. A table never changes after it is built, so a running call
    # finishes on the table it started on.
    cdef readonly object open
    cdef readonly object data
    cdef readonly object drain
    cdef readonly object end
    cdef readonly object timeout
    cdef readonly object handshake
    cdef readonly object error
    cdef readonly object close
    cdef readonly object connect_error

    cdef object _pick(self, str name, object handler)
    # One method per event, called through C; a compiled table overrides those it wants. What they
    # return is awaited before the socket's next event if it can be, and ignored otherwise, but for
    # NotImplemented: the table has no such handler.
    cdef object on_open(self, object socket)
    cdef object on_data(self, object socket, object data)
    cdef object on_drain(self, object socket)
    cdef object on_end(self, object socket)
    cdef object on_timeout(self, object socket)
    cdef object on_handshake(self, object socket, bint success, object error)
    cdef object on_error(self, object socket, object error)
    cdef object on_close(self, object socket, object error)
    cdef object on_connect_error(self, object socket, object error)


cdef str event_name(int event)
