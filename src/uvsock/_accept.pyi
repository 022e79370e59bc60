import socket
from typing import final

from uvsock._stream import StreamGroup

@final
class Acceptor:
    def __init__(self, group: StreamGroup, sock: socket.socket) -> None: ...
    def close(self) -> None: ...
