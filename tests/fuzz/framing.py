"""Fuzz target: any stream, cut anywhere, gives the frames that a plain model finds in it.

python tests/fuzz/framing.py tests/fuzz/corpus/framing -max_total_time=60
"""

from __future__ import annotations

import harness

from uvsock import FrameError, FrameTooLargeError
from uvsock._framing import FrameReader


def target(data: bytes) -> None:
    choices = harness.Choices(data)
    framer, model = choices.among(harness.FRAMERS)
    binary_type = choices.among(["bytes", "bytearray", "memoryview"])
    keep = choices.number() & 1  # the views of all frames until the end
    sizes = [choices.number() % 64 for _ in range(4)]
    stream = choices.rest()
    frames, end = model(stream)
    reader = FrameReader(framer)
    # Counted, not looked at: at most one unfinished frame is held.
    most = framer.max_length + 32
    found: list[bytes | bytearray | memoryview] = []
    failure: FrameError | None = None
    for chunk in harness.cut_up(stream, sizes):
        try:
            several = reader.split(chunk, binary_type)
        except FrameError as error:
            failure = error
            break
        found += several if keep else [bytes(frame) for frame in several]
        assert len(reader) <= most, (framer, len(reader))
    if failure is None:
        assert [bytes(frame) for frame in found] == frames, (framer, found, frames)
        assert len(reader) == end, (framer, len(reader), end)
    else:
        assert type(failure) is end, (framer, failure, end)
        # split() gives up what it has found in the chunk in which it fails.
        assert [bytes(frame) for frame in found] == frames[: len(found)], (framer, found, frames)
        if end is FrameTooLargeError:
            assert f"max_length ({framer.max_length} bytes)" in str(failure)


if __name__ == "__main__":
    harness.main(target)
