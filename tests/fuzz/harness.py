"""What the fuzz targets share: bytes as choices, and framers with plain models of what they do.

A target is a function of bytes that raises where a promise is broken. Under atheris it gets what
that makes up, without atheris it gets the corpus once.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import uvsock

try:
    import atheris
except ImportError:
    atheris = None

CORPUS = Path(__file__).parent / "corpus"
LIMIT = 40


class Choices:
    """Bytes that decide, and the rest of them."""

    def __init__(self, data: bytes) -> None:
        self.data = data
        self.position = 0

    def number(self) -> int:
        """The next byte; 0 when there is none."""
        value = self.data[self.position] if self.position < len(self.data) else 0
        self.position += 1
        return value

    def among(self, options: Any) -> Any:
        return options[self.number() % len(options)]

    def rest(self) -> bytes:
        return self.data[self.position :]


def cut_up(stream: bytes, sizes: list[int]) -> Iterator[bytes]:
    """Chunks of these sizes, again and again; all at once if there are none."""
    position = number = 0
    while position < len(stream):
        size = sizes[number % len(sizes)] if any(sizes) else len(stream)
        yield stream[position : position + size]
        position, number = position + size, number + 1


# ── Models: the frames of a whole stream, and then how it ends ─────────────────────────────────

# The number of bytes left over, or what is wrong with them.
End = int | type[uvsock.FrameError]
Model = Callable[[bytes], tuple[list[bytes], End]]


def delimited(delimiter: bytes, keep_end: bool) -> Model:
    def model(stream: bytes) -> tuple[list[bytes], End]:
        *frames, rest = stream.split(delimiter)
        for number, frame in enumerate(frames):
            if len(frame) > LIMIT:
                return [f + delimiter * keep_end for f in frames[:number]], TOO_LARGE
        end: End = TOO_LARGE if len(rest) > LIMIT + len(delimiter) else len(rest)
        return [frame + delimiter * keep_end for frame in frames], end

    return model


def lines(keep_end: bool) -> Model:
    def model(stream: bytes) -> tuple[list[bytes], End]:
        *found, rest = stream.split(b"\n")
        frames = []
        for line in found:
            if len(line.removesuffix(b"\r")) > LIMIT:
                return frames, TOO_LARGE
            frames.append(line + b"\n" if keep_end else line.removesuffix(b"\r"))
        return frames, TOO_LARGE if len(rest) > LIMIT + 2 else len(rest)

    return model


def prefixed(size: int, byteorder: Any, include: bool, counts_itself: bool) -> Model:
    def model(stream: bytes) -> tuple[list[bytes], End]:
        frames = []
        while len(stream) >= size:
            length = int.from_bytes(stream[:size], byteorder) - size * counts_itself
            if length < 0:
                return frames, uvsock.FrameError
            if length > LIMIT:
                return frames, TOO_LARGE
            if len(stream) < size + length:
                break
            frames.append(stream[0 if include else size : size + length])
            stream = stream[size + length :]
        return frames, len(stream)

    return model


def varint(stream: bytes) -> tuple[list[bytes], End]:
    frames = []
    while stream:
        length = width = 0
        for width, byte in enumerate(stream[:10], 1):
            length |= (byte & 127) << (7 * (width - 1))
            if byte < 128:
                break
        else:
            if width < 10:
                break
            length = 1 << 64
        if length >= 1 << 64:
            return frames, uvsock.FrameError
        if length > LIMIT:
            return frames, TOO_LARGE
        if len(stream) < width + length:
            break
        frames.append(stream[width : width + length])
        stream = stream[width + length :]
    return frames, len(stream)


def fixed(stream: bytes) -> tuple[list[bytes], End]:
    whole = len(stream) - len(stream) % LIMIT
    return [stream[i : i + LIMIT] for i in range(0, whole, LIMIT)], len(stream) - whole


def netstring(stream: bytes) -> tuple[list[bytes], End]:
    frames = []
    while stream:
        width = next((i for i, byte in enumerate(stream) if byte not in b"0123456789"), len(stream))
        # Digit by digit: the first that is wrong decides.
        for digits in (stream[:n] for n in range(1, width + 1)):
            if digits[:1] == b"0" and len(digits) > 1:
                return frames, uvsock.FrameError
            if int(digits) > LIMIT:
                return frames, TOO_LARGE
        if width == len(stream):
            break
        if width == 0 or stream[width : width + 1] != b":":
            return frames, uvsock.FrameError
        stop = width + 1 + int(stream[:width])
        if len(stream) <= stop:
            break
        if stream[stop : stop + 1] != b",":
            return frames, uvsock.FrameError
        frames.append(stream[width + 1 : stop])
        stream = stream[stop + 1 :]
    return frames, len(stream)


class Quoted(uvsock.Framer):
    """Frames in quotes: a framer in Python, which counts the quotes too."""

    def find(self, data: memoryview, searched: int = 0) -> tuple[int, int, int] | int | None:
        if data[0] != 0x22:
            raise uvsock.FrameError(None, "a frame begins with a quote")
        for position in range(max(searched, 1), len(data)):
            if data[position] == 0x22:
                return 1, position, position + 1
        return None


def quoted(stream: bytes) -> tuple[list[bytes], End]:
    frames = []
    while stream:
        if stream[:1] != b'"':
            return frames, uvsock.FrameError
        end = stream.find(b'"', 1)
        if end < 0:
            return frames, TOO_LARGE if len(stream) > LIMIT else len(stream)
        if end >= LIMIT:
            return frames, TOO_LARGE
        frames.append(stream[1:end])
        stream = stream[end + 1 :]
    return frames, 0


TOO_LARGE = uvsock.FrameTooLargeError
FRAMERS: list[tuple[uvsock.Framer, Model]] = [
    *((uvsock.Lines(keep, LIMIT), lines(keep)) for keep in (False, True)),
    *(
        (uvsock.Delimited(delimiter, keep, LIMIT), delimited(delimiter, keep))
        for delimiter in (b"\0", b"\r\n\r\n", b"aab")
        for keep in (False, True)
    ),
    *(
        (
            uvsock.LengthPrefixed(size, order, include, LIMIT, itself),  # type: ignore[arg-type]
            prefixed(size, order, include, itself),
        )
        for size in (1, 2, 4, 8)
        for order in ("big", "little")
        for include in (False, True)
        for itself in (False, True)
    ),
    (uvsock.LengthPrefixed("varint", max_length=LIMIT), varint),
    (uvsock.FixedSize(LIMIT), fixed),
    (uvsock.Netstring(LIMIT), netstring),
    (Quoted(LIMIT), quoted),
]


def corpus(name: str) -> list[Path]:
    return sorted((CORPUS / name).iterdir())


def main(target: Callable[[bytes], None]) -> None:
    """Fuzz a target with atheris, or give it the files of the arguments."""
    if atheris is not None:
        # What is compiled cannot be looked into, but the models take the same branches.
        atheris.instrument_all()
        atheris.Setup(sys.argv, target)
        atheris.Fuzz()
    paths = [path for word in sys.argv[1:] if not word.startswith("-") for path in files(word)]
    for path in paths:
        target(path.read_bytes())
    print(f"atheris is not installed: {len(paths)} inputs of the corpus")


def files(word: str) -> list[Path]:
    path = Path(word)
    return sorted(path.iterdir()) if path.is_dir() else [path]
