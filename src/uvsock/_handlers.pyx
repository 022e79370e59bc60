"""The table of handlers that a listener's sockets, or a connection, share."""

import asyncio.coroutines
import inspect
from collections.abc import Mapping

cdef tuple NAMES = (
    "open", "data", "drain", "end", "timeout", "handshake", "error", "close", "connect_error",
)
cdef frozenset KNOWN = frozenset(NAMES)
# Cython's functions have True where asyncio has no mark.
cdef object MARK = getattr(asyncio.coroutines, "_is_coroutine", True)


cdef str event_name(int event):
    return NAMES[event]


cdef bint _is_async(object handler):
    """Whether a call gives a coroutine: functions, methods, partials, objects, Cython's."""
    return (
        inspect.iscoroutinefunction(handler)
        or inspect.iscoroutinefunction(getattr(type(handler), "__call__", None))
        # Functions compiled by Cython carry this mark instead of a code flag.
        or getattr(handler, "_is_coroutine", None) is MARK
    )


cdef class Handlers:
    """The handlers of a listener or a connection, checked once and shared by all its sockets.

    Each argument is a callable, an ``async def`` or ``None`` for an event that is not handled; at
    least ``data`` or ``drain`` must be given. A table does not change after it is built.

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
        self._awaitable = 0
        for event, name in enumerate(NAMES):
            handler = getattr(self, name)
            if handler is None:
                continue
            if not callable(handler):
                raise TypeError(
                    f"handlers: {name!r} must be callable or None, not {type(handler).__name__}"
                )
            if _is_async(handler):
                self._awaitable |= 1u << <unsigned int>event
        # A compiled subclass handles its events by overriding the on_ methods instead.
        if type(self) is Handlers and data is None and drain is None:
            raise TypeError("handlers: at least 'data' or 'drain' must be given")

    cdef object _pick(self, str name, object handler):
        """The handler of an event: in a Python subclass its method of that name will do."""
        if handler is None and getattr(type(self), name) is not getattr(Handlers, name):
            return getattr(self, name)
        return handler

    def __repr__(self):
        names = [name for name in NAMES if getattr(self, name) is not None]
        return f"<{type(self).__name__} {' '.join(names)}>"

    cdef object on_open(self, object socket):
        if self.open is None:
            return NotImplemented
        result = self.open(socket)
        return result if self._awaitable & (1u << OPEN) else None

    cdef object on_data(self, object socket, object data):
        if self.data is None:
            return NotImplemented
        result = self.data(socket, data)
        return result if self._awaitable & (1u << DATA) else None

    cdef object on_drain(self, object socket):
        if self.drain is None:
            return NotImplemented
        result = self.drain(socket)
        return result if self._awaitable & (1u << DRAIN) else None

    cdef object on_end(self, object socket):
        if self.end is None:
            return NotImplemented
        result = self.end(socket)
        return result if self._awaitable & (1u << END) else None

    cdef object on_timeout(self, object socket):
        if self.timeout is None:
            return NotImplemented
        result = self.timeout(socket)
        return result if self._awaitable & (1u << TIMEOUT) else None

    cdef object on_handshake(self, object socket, bint success, object error):
        if self.handshake is None:
            return NotImplemented
        result = self.handshake(socket, success, error)
        return result if self._awaitable & (1u << HANDSHAKE) else None

    cdef object on_error(self, object socket, object error):
        if self.error is None:
            return NotImplemented
        result = self.error(socket, error)
        return result if self._awaitable & (1u << ERROR) else None

    cdef object on_close(self, object socket, object error):
        if self.close is None:
            return NotImplemented
        result = self.close(socket, error)
        return result if self._awaitable & (1u << CLOSE) else None

    cdef object on_connect_error(self, object socket, object error):
        if self.connect_error is None:
            return NotImplemented
        result = self.connect_error(socket, error)
        return result if self._awaitable & (1u << CONNECT_ERROR) else None

    def _call_connect_error(self, socket, error):
        """Call ``connect_error``: a coroutine to await where it is ``async def``, else None."""
        result = self.on_connect_error(socket, error)
        return None if result is NotImplemented else result


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
