"""The types of handlers, for annotations."""

from __future__ import annotations

import ssl
from collections.abc import Callable, Mapping
from typing import Any, Protocol, TypeAlias, TypedDict

from uvsock._handlers import Handlers
from uvsock._socket import Socket

# What they return is awaited if it can be, as of an `async def`, and ignored otherwise.
SocketHandler: TypeAlias = Callable[[Socket[Any]], object]
# `binary_type` decides which of the three it is called with.
DataHandler: TypeAlias = (
    Callable[[Socket[Any], bytes], object]
    | Callable[[Socket[Any], bytearray], object]
    | Callable[[Socket[Any], memoryview], object]
)
HandshakeHandler: TypeAlias = Callable[[Socket[Any], bool, ssl.SSLError | None], object]
ErrorHandler: TypeAlias = Callable[[Socket[Any], Exception], object]
CloseHandler: TypeAlias = Callable[[Socket[Any], OSError | None], object]
ConnectErrorHandler: TypeAlias = Callable[[Socket[Any], OSError], object]


class HandlersDict(TypedDict, total=False):
    """The keys of a mapping that is given as handlers."""

    open: SocketHandler | None
    data: DataHandler | None
    drain: SocketHandler | None
    close: CloseHandler | None
    error: ErrorHandler | None
    end: SocketHandler | None
    timeout: SocketHandler | None
    handshake: HandshakeHandler | None
    connect_error: ConnectErrorHandler | None


class DataHandlers(Protocol):
    """An object, or a module, that is given as handlers and has ``data`` among them."""

    @property
    def data(self) -> DataHandler | None: ...


class DrainHandlers(Protocol):
    """An object, or a module, that is given as handlers and has ``drain`` among them."""

    @property
    def drain(self) -> SocketHandler | None: ...


# A mapping that is not a dict display has values of more than one signature, whose common type says
# nothing. `HandlersDict` on such a variable brings the checks back.
HandlersLike: TypeAlias = Handlers | HandlersDict | Mapping[str, Any] | DataHandlers | DrainHandlers
