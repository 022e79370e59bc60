from collections.abc import Coroutine
from typing import Any

from typing_extensions import disjoint_base

from uvsock._socket import Socket
from uvsock._types import (
    CloseHandler,
    ConnectErrorHandler,
    DataHandler,
    ErrorHandler,
    HandlersLike,
    HandshakeHandler,
    SocketHandler,
)

# What Cython writes for compiled handlers, which call these functions through C.
__pyx_capi__: dict[str, object]

@disjoint_base
class Handlers:
    def __init__(
        self,
        *,
        open: SocketHandler | None = None,
        data: DataHandler | None = None,
        drain: SocketHandler | None = None,
        close: CloseHandler | None = None,
        error: ErrorHandler | None = None,
        end: SocketHandler | None = None,
        timeout: SocketHandler | None = None,
        handshake: HandshakeHandler | None = None,
        connect_error: ConnectErrorHandler | None = None,
    ) -> None: ...
    @property
    def open(self) -> SocketHandler | None: ...
    @property
    def data(self) -> DataHandler | None: ...
    @property
    def drain(self) -> SocketHandler | None: ...
    @property
    def close(self) -> CloseHandler | None: ...
    @property
    def error(self) -> ErrorHandler | None: ...
    @property
    def end(self) -> SocketHandler | None: ...
    @property
    def timeout(self) -> SocketHandler | None: ...
    @property
    def handshake(self) -> HandshakeHandler | None: ...
    @property
    def connect_error(self) -> ConnectErrorHandler | None: ...
    def _call_connect_error(
        self, socket: Socket[Any], error: Exception
    ) -> Coroutine[Any, Any, object] | None: ...

def as_handlers(value: HandlersLike) -> Handlers: ...
