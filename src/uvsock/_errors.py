"""The library's own exceptions."""


class SocketError(OSError):
    """Base of the errors that uvsock itself defines."""

    # OSError has no signature for inspect to show.
    def __init__(self, *args: object) -> None:
        super().__init__(*args)


class SocketClosedError(SocketError):
    """The socket was closed, in order, before the operation could finish."""


class FrameError(SocketError):
    """Bytes were received that the framer can make no frame of."""


class FrameTooLargeError(FrameError):
    """A frame is longer than the framer's ``max_length``."""


class ProxyProtocolError(SocketError):
    """The PROXY protocol header of a connection is missing, malformed or not allowed."""
