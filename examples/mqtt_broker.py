"""An MQTT 3.1.1 broker: QoS 0, wildcards, wills, keep-alive. Nothing is stored.

python mqtt_broker.py --port 1883
mosquitto_sub -p 1883 -t 'rooms/+/light' &
mosquitto_pub -p 1883 -t rooms/kitchen/light -m on
"""

from __future__ import annotations

import argparse
import itertools
from pathlib import Path

import uvsock

# Numbers of packet types (MQTT 3.1.1, table 2.1).
CONNECT, CONNACK, PUBLISH, PUBACK = 1, 2, 3, 4
SUBSCRIBE, SUBACK, UNSUBSCRIBE, UNSUBACK = 8, 9, 10, 11
PINGREQ, PINGRESP, DISCONNECT = 12, 13, 14
# Bytes of a packet, and of packets that wait for a client; what exceeds these is not sent to it.
MAX_PACKET = 256 * 1024
MAX_BACKLOG = 1024 * 1024
MAX_FILTERS = 1000
# Characters of a filter.
MAX_FILTER = 1024
# Seconds that a client has for its CONNECT.
PATIENCE = 10
BAD_PROTOCOL, BAD_IDENTIFIER = 1, 2
FAILURE = 0x80


class ProtocolError(Exception):
    """A packet that the standard does not allow: its connection is closed."""


# ── Packets ────────────────────────────────────────────────────────────────────────────────────


class Packets:
    """Bytes in, packets out: the first byte, and what comes after the length."""

    def __init__(self) -> None:
        self.buffer = bytearray()

    def feed(self, data: bytes) -> None:
        self.buffer += data

    def next(self) -> tuple[int, Fields] | None:
        """The next packet, None if it is not complete. Raises ProtocolError."""
        length = 0
        for position in range(1, 5):
            if position >= len(self.buffer):
                return None
            byte = self.buffer[position]
            length |= (byte & 127) << 7 * (position - 1)
            if byte < 128:
                break
        else:
            raise ProtocolError("a length of more than four bytes")
        if length > MAX_PACKET:
            raise ProtocolError("a packet is too large")
        start = position + 1
        if len(self.buffer) < start + length:
            return None
        first, body = self.buffer[0], bytes(self.buffer[start : start + length])
        del self.buffer[: start + length]
        return first, Fields(body)


class Fields:
    """The body of a packet, taken apart from its beginning."""

    def __init__(self, body: bytes) -> None:
        self.body = body
        self.position = 0

    def take(self, length: int) -> bytes:
        start = self.position
        self.position += length
        if self.position > len(self.body):
            raise ProtocolError("a packet is too short")
        return self.body[start : self.position]

    def number(self, length: int) -> int:
        return int.from_bytes(self.take(length))

    def binary(self) -> bytes:
        return self.take(self.number(2))

    def text(self) -> str:
        try:
            text = self.binary().decode()
        except UnicodeDecodeError as error:
            raise ProtocolError("a text is not UTF-8") from error
        if "\0" in text:
            raise ProtocolError("a text has a NUL")
        return text

    def rest(self) -> bytes:
        return self.take(len(self.body) - self.position)

    def __bool__(self) -> bool:
        return self.position < len(self.body)


def packet(first: int, body: bytes = b"") -> bytes:
    length, encoded = len(body), bytearray()
    while length > 127:
        encoded.append(length & 127 | 128)
        length >>= 7
    return bytes([first, *encoded, length]) + body


def publication(topic: str, message: bytes) -> bytes:
    name = topic.encode()
    return packet(PUBLISH << 4, len(name).to_bytes(2) + name + message)


# ── Topics ─────────────────────────────────────────────────────────────────────────────────────


def check_topic(topic: str) -> str:
    if not topic or "+" in topic or "#" in topic:
        raise ProtocolError("a topic with wildcards, or without a name")
    return topic


def check_filter(text: str) -> list[str]:
    levels = text.split("/")
    for level in levels[:-1]:
        if "#" in level or ("+" in level and level != "+"):
            raise ProtocolError("a wildcard that is not a whole level")
    last = levels[-1]
    if not text or (last not in ("#", "+") and ("#" in last or "+" in last)):
        raise ProtocolError("a wildcard that is not a whole level")
    return levels


def matches(levels: list[str], topic: list[str]) -> bool:
    if topic[0].startswith("$") and levels[0] in ("#", "+"):
        return False
    for level, name in itertools.zip_longest(levels, topic):
        if level == "#":
            return True  # what is left, and also nothing
        if name is None or (level != "+" and level != name):
            return False
    return True


# ── Connections ────────────────────────────────────────────────────────────────────────────────


class Session:
    """What the broker knows of a connection."""

    def __init__(self) -> None:
        self.packets = Packets()
        self.backlog = uvsock.BufferSink()
        self.name: str | None = None  # until CONNECT
        self.keep_alive = 0.0
        self.will: tuple[str, bytes] | None = None
        self.filters: dict[str, list[str]] = {}


Client = uvsock.Socket[Session]


class Broker:
    """The handlers of all connections, and who is connected."""

    def __init__(self) -> None:
        self.clients: dict[str, Client] = {}
        self.names = itertools.count(1)

    # Handlers

    def open(self, socket: Client) -> None:
        socket.timeout(PATIENCE)

    def data(self, socket: Client, data: bytes) -> None:
        session = socket.data
        session.packets.feed(data)
        try:
            while socket.ready_state == uvsock.ReadyState.ESTABLISHED:
                found = session.packets.next()
                if found is None:
                    break
                self.take(socket, *found)
        except ProtocolError:
            socket.terminate()
        else:
            if session.keep_alive:
                socket.timeout(session.keep_alive)

    def drain(self, socket: Client) -> None:
        socket.data.backlog.flush_to(socket)

    def timeout(self, socket: Client) -> None:
        socket.terminate()

    def close(self, socket: Client, error: OSError | None) -> None:
        session = socket.data
        if session.name is not None and self.clients.get(session.name) is socket:
            del self.clients[session.name]
        if session.will is not None:
            self.publish(*session.will)

    # Packets

    def take(self, socket: Client, first: int, fields: Fields) -> None:
        kind, flags = first >> 4, first & 15
        if (socket.data.name is None) != (kind == CONNECT):
            raise ProtocolError("CONNECT comes first, and once")
        if kind == PUBLISH:
            self.take_publish(socket, flags, fields)
        elif flags != (2 if kind in (SUBSCRIBE, UNSUBSCRIBE) else 0):
            raise ProtocolError("reserved flags")
        elif kind == CONNECT:
            self.take_connect(socket, fields)
        elif kind == SUBSCRIBE:
            self.take_subscribe(socket, fields)
        elif kind == UNSUBSCRIBE:
            self.take_unsubscribe(socket, fields)
        elif kind == PINGREQ:
            self.reply(socket, packet(PINGRESP << 4))
        elif kind == DISCONNECT:
            socket.data.will = None
            socket.close()
        else:
            raise ProtocolError("not a packet of a client")

    def take_connect(self, socket: Client, fields: Fields) -> None:
        session = socket.data
        if fields.text() != "MQTT":
            raise ProtocolError("another protocol")
        level, flags, keep_alive = fields.number(1), fields.number(1), fields.number(2)
        if level != 4:
            self.refuse(socket, BAD_PROTOCOL)
            return
        if flags & 1:
            raise ProtocolError("a reserved flag")
        name = fields.text()
        if not name and not flags & 2:  # a session that is to be kept needs a name
            self.refuse(socket, BAD_IDENTIFIER)
            return
        if flags & 4:
            session.will = check_topic(fields.text()), fields.binary()
        if flags & 128:
            fields.text()  # a user's name: everybody is welcome
        if flags & 64:
            fields.binary()  # a password
        session.name = name or f"{socket.remote_address}-{next(self.names)}"
        before = self.clients.pop(session.name, None)
        if before is not None:
            before.terminate()
        self.clients[session.name] = socket
        # One and a half times what the client promised; 0 turns it off.
        session.keep_alive = keep_alive * 1.5
        socket.timeout(session.keep_alive)
        self.reply(socket, packet(CONNACK << 4, b"\0\0"))

    def refuse(self, socket: Client, code: int) -> None:
        self.reply(socket, packet(CONNACK << 4, bytes([0, code])))
        socket.close()

    def take_publish(self, socket: Client, flags: int, fields: Fields) -> None:
        quality = flags >> 1 & 3
        if quality > 1:
            raise ProtocolError("QoS 2 is not known here")
        topic = check_topic(fields.text())
        if quality == 1:
            self.reply(socket, packet(PUBACK << 4, fields.take(2)))
        self.publish(topic, fields.rest())

    def take_subscribe(self, socket: Client, fields: Fields) -> None:
        filters, number, codes = socket.data.filters, fields.take(2), bytearray()
        while fields or not codes:
            text, quality = fields.text(), fields.number(1)
            levels = check_filter(text)
            if quality > 2:
                raise ProtocolError("an unknown QoS")
            if len(text) <= MAX_FILTER and (len(filters) < MAX_FILTERS or text in filters):
                filters[text] = levels
                codes.append(0)
            else:
                codes.append(FAILURE)
        self.reply(socket, packet(SUBACK << 4, number + codes))

    def take_unsubscribe(self, socket: Client, fields: Fields) -> None:
        number = fields.take(2)
        first = True
        while fields or first:
            socket.data.filters.pop(fields.text(), None)
            first = False
        self.reply(socket, packet(UNSUBACK << 4, number))

    # What leaves

    def publish(self, topic: str, message: bytes) -> None:
        encoded, levels = publication(topic, message), topic.split("/")
        for client in list(self.clients.values()):
            if any(matches(wanted, levels) for wanted in client.data.filters.values()):
                self.send(client, encoded)  # or not: QoS 0 is at most once

    def reply(self, socket: Client, encoded: bytes) -> None:
        if not self.send(socket, encoded):
            raise ProtocolError("requests without reading the replies")

    @staticmethod
    def send(socket: Client, encoded: bytes) -> bool:
        """Send a packet, unless too much waits for the client already."""
        backlog = socket.data.backlog
        fits = len(backlog) + len(encoded) <= MAX_BACKLOG
        if fits:
            backlog.write(encoded)
            backlog.flush_to(socket)
        return fits


async def main(arguments: argparse.Namespace) -> None:
    tls = None
    if arguments.tls_cert is not None:
        tls = uvsock.TLS(cert=arguments.tls_cert, key=arguments.tls_key)
    listener = await uvsock.listen(
        Broker(), arguments.host, arguments.port, tls=tls, data_factory=Session
    )
    print(f"listening on {listener.hostname} port {listener.port}", flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="An MQTT 3.1.1 broker for QoS 0.")
    parser.add_argument("--host", default="127.0.0.1", help="default: 127.0.0.1")
    parser.add_argument("--port", type=int, default=1883, help="0 for a free one, default: 1883")
    parser.add_argument("--tls-cert", type=Path, metavar="FILE", help="certificate chain, PEM")
    parser.add_argument("--tls-key", type=Path, metavar="FILE", help="private key, PEM")
    uvsock.run(main(parser.parse_args()))
