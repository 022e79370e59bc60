"""TCP, Unix and TLS sockets with one shared table of handlers, compiled, on uvloop."""

from uvsock._connector import connect
from uvsock._contexts import TLS
from uvsock._errors import (
    FrameError,
    FrameTooLargeError,
    ProxyProtocolError,
    SocketClosedError,
    SocketError,
)
from uvsock._framing import Delimited, FixedSize, Framer, LengthPrefixed, Lines, Netstring
from uvsock._handlers import Handlers
from uvsock._listener import Listener, ListenerStats, listen
from uvsock._run import run
from uvsock._sink import BufferSink
from uvsock._socket import ReadyState, Socket
from uvsock._version import __version__
from uvsock.dropin._streams import StreamReader, StreamWriter
from uvsock.dropin.loop import Loop, install, new_event_loop
from uvsock.dropin.streams import (
    open_connection,
    open_unix_connection,
    start_server,
    start_unix_server,
)

__all__ = [
    "TLS",
    "BufferSink",
    "Delimited",
    "FixedSize",
    "FrameError",
    "FrameTooLargeError",
    "Framer",
    "Handlers",
    "LengthPrefixed",
    "Lines",
    "Listener",
    "ListenerStats",
    "Loop",
    "Netstring",
    "ProxyProtocolError",
    "ReadyState",
    "Socket",
    "SocketClosedError",
    "SocketError",
    "StreamReader",
    "StreamWriter",
    "__version__",
    "connect",
    "install",
    "listen",
    "new_event_loop",
    "open_connection",
    "open_unix_connection",
    "run",
    "start_server",
    "start_unix_server",
]
