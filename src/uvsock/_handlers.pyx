"""The table of handlers that a listener's sockets, or a connection, share."""

import functools
from collections.abc import Mapping

from uvsock._awaiting cimport is_awaitable

cdef tuple NAMES = (
    "open", "data", "drain", "end", "timeout", "handshake", "error", "close", "connect_error",
)
cdef frozenset KNOWN = frozenset(NAMES)


cdef str event_name(int event):
    return NAMES[event]


async def _awaited(awaitable):
    return await awaitable


cdef inline object _heard(object result):
    """What a handler returned: NotImplemented would say that there is none."""
    return None if result is NotImplemented else result


cdef class Handlers:
    """Handlers(*, open=None, data=None, drain=None, close=None, error=None, end=None,\
    timeout=None, handshake=None, connect_error=None)\n--\n
    The handlers of a listener or a connection, checked once and shared by all its sockets.

    Each argument is a callable or ``None`` for an event that is not handled; at least ``data`` or
    ``drain`` must be given. What a handler returns is awaited where it can be, so an ``async def``
    will do, decorated or not. A table does not change after it is built.

    Raises:
        TypeError: a handler is not callable, or both ``data`` and ``drain`` are missing.
    """

    def __init__(self, *, open=None, data=None, drain=None, close=None, error=None, end=None,
                 timeout=None, handshake=None, connect_error=None):
        self.open = self._pick("open", open)
        self.data = self._pick("data", data)
        self.drain = self._pick("drain", drain)
        self.end = self._pick("end", end)
        self.timeout = self._pick("timeout", timeout)
        self.handshake = self._pick("handshake", handshake)
        self.error = self._pick("error", error)
        self.close = self._pick("close", close)
        self.connect_error = self._pick("connect_error", connect_error)
        for name in NAMES:
            handler = getattr(self, name)
            if handler is None:
                continue
            if not callable(handler):
                raise TypeError(
                    f"handlers: {name!r} must be callable or None, not {type(handler).__name__}"
                )
        # A compiled subclass handles its events by overriding the on_ methods instead.
        if type(self) is Handlers and data is None and drain is None:
            raise TypeError("handlers: at least 'data' or 'drain' must be given")

    cdef object _pick(self, str name, object handler):
        """The handler of an event: in a Python subclass its method of that name will do."""
        if handler is None and getattr(type(self), name) is not getattr(Handlers, name):
            return getattr(self, name)
        return handler

    def __eq__(self, other):
        if type(self) is not Handlers or type(other) is not Handlers:
            return NotImplemented  # a subclass says itself what makes two of it equal
        return all([getattr(self, name) == getattr(other, name) for name in NAMES])

    def __hash__(self):
        # Of what can always be hashed: a handler need not be.
        if type(self) is not Handlers:
            return object.__hash__(self)
        return hash(tuple([getattr(self, name) is None for name in NAMES]))

    def __reduce__(self):
        if type(self) is not Handlers:
            raise TypeError(
                f"cannot pickle {type(self).__name__!r} object: it has no __reduce__()"
            )
        given = {name: getattr(self, name) for name in NAMES if getattr(self, name) is not None}
        return functools.partial(Handlers, **given), ()

    def __repr__(self):
        names = [name for name in NAMES if getattr(self, name) is not None]
        return f"<{type(self).__name__} {' '.join(names)}>"

    cdef object on_open(self, object socket):
        if self.open is None:
            return NotImplemented
        return _heard(self.open(socket))

    cdef object on_data(self, object socket, object data):
        if self.data is None:
            return NotImplemented
        return _heard(self.data(socket, data))

    cdef object on_drain(self, object socket):
        if self.drain is None:
            return NotImplemented
        return _heard(self.drain(socket))

    cdef object on_end(self, object socket):
        if self.end is None:
            return NotImplemented
        return _heard(self.end(socket))

    cdef object on_timeout(self, object socket):
        if self.timeout is None:
            return NotImplemented
        return _heard(self.timeout(socket))

    cdef object on_handshake(self, object socket, bint success, object error):
        if self.handshake is None:
            return NotImplemented
        return _heard(self.handshake(socket, success, error))

    cdef object on_error(self, object socket, object error):
        if self.error is None:
            return NotImplemented
        return _heard(self.error(socket, error))

    cdef object on_close(self, object socket, object error):
        if self.close is None:
            return NotImplemented
        return _heard(self.close(socket, error))

    cdef object on_connect_error(self, object socket, object error):
        if self.connect_error is None:
            return NotImplemented
        return _heard(self.connect_error(socket, error))

    def _call_connect_error(self, socket, error):
        """Call ``connect_error``: a coroutine to await where it returns what can be, else None."""
        result = self.on_connect_error(socket, error)
        return _awaited(result) if is_awaitable(result) else None


def as_handlers(value):
    """A ``Handlers`` from a ``Handlers``, a mapping, or any object with handlers as attributes.

    Raises:
        TypeError: an unknown key, a handler that is not callable, neither ``data`` nor ``drain``.
    """
    if isinstance(value, Handlers):
        return value
    if isinstance(value, Mapping):
        for key in value:
            if key not in KNOWN:
                raise TypeError(f"handlers: unknown key {key!r}; known are {', '.join(NAMES)}")
        return Handlers(**value)
    if value is None or isinstance(value, (str, bytes, int, float, list, tuple, set)):
        raise TypeError(
            "handlers: must be a Handlers, a mapping, or an object with handlers as attributes, "
            f"not {type(value).__name__}"
        )
    return Handlers(**{name: getattr(value, name, None) for name in NAMES})
