"""A DNS server over TCP (RFC 7766), and over TLS (RFC 7858), for a few names.

python dns_tcp_server.py --port 5353 --record www.example A 192.0.2.1 --record example TXT hello
kdig +tcp @127.0.0.1 -p 5353 www.example
"""

from __future__ import annotations

import argparse
import ipaddress
import struct
from pathlib import Path

import uvsock

TYPES = {"A": 1, "TXT": 16, "AAAA": 28}
ANY = 255
INTERNET = 1
TTL = 300
NO_ERROR, FORMAT_ERROR, NAME_ERROR, NOT_IMPLEMENTED, REFUSED = 0, 1, 3, 4, 5
# Bits of a header's flags. The second are the kind of query, of which 0 asks for records.
RESPONSE, OPCODE, AUTHORITATIVE, RECURSION_DESIRED = 0x8000, 0x7800, 0x0400, 0x0100
# The name of the question, which begins after the header of 12 bytes, once more (RFC 1035, 4.1.4).
SAME_NAME = b"\xc0\x0c"
MAX_NAME = 255
# Bytes of one name's records; a message has at most 65535.
MAX_RECORDS = 60_000
# Bytes of responses that wait for a client before its next queries do.
MAX_RESPONSES = 64 * 1024
# Seconds without a query.
IDLE = 30


class FormatError(Exception):
    """A query that cannot be understood."""


class Zone:
    """Records by name and type."""

    def __init__(self, records: list[tuple[str, str, str]]) -> None:
        self.records: dict[bytes, list[tuple[int, bytes]]] = {}
        for name, kind, value in records:
            number = TYPES[kind.upper()]
            entry = (number, self.encode(number, value))
            entries = self.records.setdefault(wire_name(name), [])
            entries.append(entry)
            if sum(12 + len(value) for _, value in entries) > MAX_RECORDS:
                raise ValueError(f"too many records of {name}")

    @staticmethod
    def encode(kind: int, value: str) -> bytes:
        if kind == TYPES["A"]:
            return ipaddress.IPv4Address(value).packed
        if kind == TYPES["AAAA"]:
            return ipaddress.IPv6Address(value).packed
        text = value.encode()
        parts = [text[start : start + 255] for start in range(0, len(text), 255)] or [b""]
        return b"".join(bytes([len(part)]) + part for part in parts)

    def find(self, name: bytes, kind: int) -> list[tuple[int, bytes]] | None:
        """The records of a type; None if there are none of any type."""
        found = self.records.get(name.lower())
        if found is None:
            return None
        return [record for record in found if kind in (ANY, record[0])]


def wire_name(name: str) -> bytes:
    labels = [label.encode("idna") for label in name.rstrip(".").split(".") if label]
    return b"".join(bytes([len(label)]) + label for label in labels).lower() + b"\0"


def end_of_name(query: bytes, start: int) -> int:
    position = start
    while position < len(query) and position - start < MAX_NAME:
        length = query[position]
        position += 1 + length
        if length == 0:
            return position
        if length > 63:  # a pointer: there is nothing before a question to point to
            break
    raise FormatError


def answer(zone: Zone, query: bytes) -> bytes:
    """The response to a query. Raises FormatError if not even its header is one."""
    if len(query) < 12:
        raise FormatError
    number, flags, questions, *_ = struct.unpack_from("!6H", query)
    if flags & RESPONSE:
        raise FormatError
    question, records = b"", []
    if flags & OPCODE:
        code = NOT_IMPLEMENTED
    else:
        try:
            question, name, kind, family = ask(query, questions)
        except FormatError:
            code = FORMAT_ERROR
        else:
            found = zone.find(name, kind) if family in (INTERNET, ANY) else None
            if family not in (INTERNET, ANY):
                code = REFUSED
            elif found is None:
                code = NAME_ERROR
            else:
                code, records = NO_ERROR, found
    flags = RESPONSE | AUTHORITATIVE | flags & (OPCODE | RECURSION_DESIRED) | code
    header = struct.pack("!6H", number, flags, 1 if question else 0, len(records), 0, 0)
    return (
        header
        + question
        + b"".join(
            SAME_NAME + struct.pack("!HHIH", kind, INTERNET, TTL, len(value)) + value
            for kind, value in records
        )
    )


def ask(query: bytes, questions: int) -> tuple[bytes, bytes, int, int]:
    """The question of a query: its bytes, its name, type and class."""
    if questions != 1:
        raise FormatError
    end = end_of_name(query, 12)
    if len(query) < end + 4:
        raise FormatError
    kind, family = struct.unpack_from("!HH", query, end)
    return query[12 : end + 4], query[12:end], kind, family


# `data` is the response that was not taken yet, or None.
Client = uvsock.Socket[bytes | None]


class Server:
    """The handlers of all connections."""

    def __init__(self, zone: Zone) -> None:
        self.zone = zone

    def data(self, socket: Client, query: bytes) -> None:
        try:
            self.respond(socket, answer(self.zone, query))
        except FormatError:
            socket.terminate()

    def respond(self, socket: Client, response: bytes) -> None:
        """A client that does not take its responses is not read from."""
        if socket.write_frame(response) == 0:
            socket.data = response
            socket.pause()

    def drain(self, socket: Client) -> None:
        response, socket.data = socket.data, None
        if response is not None:
            socket.resume()
            self.respond(socket, response)


async def main(arguments: argparse.Namespace) -> None:
    tls = None
    if arguments.tls_cert is not None:
        tls = uvsock.TLS(cert=arguments.tls_cert, key=arguments.tls_key, alpn_protocols=["dot"])
    listener = await uvsock.listen(
        Server(Zone(arguments.record)),
        arguments.host,
        arguments.port,
        tls=tls,
        idle_timeout=IDLE,
        # Each message comes after its length, two bytes.
        framing=uvsock.LengthPrefixed(2, max_length=65535),
        high_water_mark=MAX_RESPONSES,
    )
    print(f"listening on {listener.hostname} port {listener.port}", flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="A DNS server over TCP and TLS.")
    parser.add_argument("--host", default="127.0.0.1", help="default: 127.0.0.1")
    parser.add_argument("--port", type=int, default=5353, help="0 for a free one, default: 5353")
    parser.add_argument("--tls-cert", type=Path, metavar="FILE", help="certificate chain, PEM")
    parser.add_argument("--tls-key", type=Path, metavar="FILE", help="private key, PEM")
    parser.add_argument(
        "--record",
        action="append",
        nargs=3,
        default=[],
        metavar=("NAME", "TYPE", "VALUE"),
        help="A, AAAA or TXT; may be given many times",
    )
    uvsock.run(main(parser.parse_args()))
