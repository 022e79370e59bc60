"""Two echo servers on uvsock, plain and TLS, and two kinds of client for each.

`make demo` runs it. It prints what happened and exits with 0 if every byte came back.
"""

from __future__ import annotations

import asyncio
import socket
import ssl

import trustme

import uvsock

GREETING = b"hello\n"
# More than the kernel's buffers hold, so that writes come back short on the way.
BULK = bytes(range(256)) * 32768

# One table of handlers for every connection of both servers. A connection's `data` is what its
# last write did not take.
Connection = uvsock.Socket[memoryview | None]


def received(connection: Connection, data: bytes) -> None:
    sent = connection.write(data)
    if 0 <= sent < len(data):  # back-pressure: keep the rest, stop reading, wait for `drain`
        connection.data = memoryview(data)[sent:]
        connection.pause()


def drained(connection: Connection) -> None:
    rest = connection.data
    assert rest is not None
    sent = connection.write(rest)
    if 0 <= sent < len(rest):
        connection.data = rest[sent:]
    else:
        connection.data = None
        connection.resume()


ECHO = uvsock.Handlers(data=received, drain=drained)


async def uvsock_client(
    listener: uvsock.Listener, message: bytes, tls: uvsock.TLS | None = None
) -> bytes:
    """Send a message and the end of the stream; return all that comes back."""
    answer = bytearray()
    closed: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def data(client: uvsock.Socket[None], data: bytes) -> None:
        answer.extend(data)

    def close(client: uvsock.Socket[None], error: BaseException | None) -> None:
        if error is None:
            closed.set_result(None)
        else:
            closed.set_exception(error)

    handlers = {"data": data, "close": close}
    client = await uvsock.connect(handlers, listener.hostname, listener.port, tls=tls)
    await client.send_all(message)
    client.end()
    await closed
    return bytes(answer)


def standard_client(
    listener: uvsock.Listener, message: bytes, context: ssl.SSLContext | None = None
) -> bytes:
    """The same with Python's own `socket` and `ssl`. They block, so this runs in a thread."""
    client = socket.create_connection((listener.hostname, listener.port), timeout=10)
    if context is not None:
        client = context.wrap_socket(client, server_hostname=listener.hostname)
    answer = bytearray()
    with client:
        for start in range(0, len(message), 65536):
            client.sendall(message[start : start + 65536])
            while len(answer) < min(start + 65536, len(message)):
                data = client.recv(65536)
                if not data:
                    return bytes(answer)
                answer += data
    return bytes(answer)


def report(who: str, wire: str, message: bytes, answer: bytes) -> None:
    if answer != message:
        raise SystemExit(f"{who}, {wire}: {len(message)} bytes sent, other ones came back")
    what = repr(message.decode()) if message == GREETING else f"{len(message)} bytes"
    print(f"  {who:<15}  {wire:<5}  sent {what} and got the same back")


async def main() -> None:
    authority = trustme.CA()
    certificate = authority.issue_cert("127.0.0.1")
    server_tls = uvsock.TLS(
        key=certificate.private_key_pem.bytes(),
        cert=b"".join(pem.bytes() for pem in certificate.cert_chain_pems),
    )
    client_tls = uvsock.TLS(ca=authority.cert_pem.bytes())
    client_context = ssl.create_default_context(cadata=authority.cert_pem.bytes().decode())

    plain = await uvsock.listen(ECHO, "127.0.0.1", 0)
    secure = await uvsock.listen(ECHO, "127.0.0.1", 0, tls=server_tls)
    print(f"Echo server on {plain.hostname}:{plain.port}")
    print(f"Echo server on {secure.hostname}:{secure.port}, with TLS")
    print("Clients of both:")
    for message in (GREETING, BULK):
        answer = await uvsock_client(plain, message)
        report("uvsock", "plain", message, answer)
        answer = await uvsock_client(secure, message, client_tls)
        report("uvsock", "TLS", message, answer)
        answer = await asyncio.to_thread(standard_client, plain, message)
        report("Python's socket", "plain", message, answer)
        answer = await asyncio.to_thread(standard_client, secure, message, client_context)
        report("Python's ssl", "TLS", message, answer)

    for listener in (plain, secure):
        await listener.shutdown(5)
    print("Both servers stopped, every byte came back.")


if __name__ == "__main__":
    uvsock.run(asyncio.wait_for(main(), 60))
