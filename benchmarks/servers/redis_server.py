"""redis-server, without what it writes to disk: ``PROGRAM redis``.

What is started becomes redis-server. A child of it says when that listens, and ends it when
standard input ends.
"""

from __future__ import annotations

import os
import signal
import socket
import sys
import time

# Seconds for it to listen.
PATIENCE = 10


def watch(port: int, server: int) -> None:
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline and os.getppid() == server:
        try:
            socket.create_connection(("127.0.0.1", port)).close()
        except ConnectionRefusedError:
            time.sleep(0.01)
        else:
            print(port, flush=True)
            sys.stdin.read()
            break
    if os.getppid() == server:
        os.kill(server, signal.SIGKILL)


if __name__ == "__main__":
    program = sys.argv[1]
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    if os.fork() == 0:
        watch(port, os.getppid())
    else:
        options = {"port": str(port), "bind": "127.0.0.1", "save": "", "logfile": "/dev/null"}
        os.execl(program, program, *(w for n, v in options.items() for w in (f"--{n}", v)))
