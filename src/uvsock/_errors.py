"""The library's own exceptions."""


class SocketError(OSError):
    """Base of the errors that uvsock itself defines."""


class SocketClosedError(SocketError):
    """The socket was closed, in order, before the operation could finish."""


class FrameTooLargeError(SocketError):
    """A frame is longer than the framer's ``max_length``."""


class ProxyProtocolError(SocketError):
    """The PROXY protocol header of a connection is missing, malformed or not allowed."""
