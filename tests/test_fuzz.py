"""The fuzz targets of tests/fuzz, on their corpus and on streams of hypothesis' making."""

from __future__ import annotations

import struct
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

sys.path.insert(0, str(Path(__file__).resolve().parent / "fuzz"))
import framing
import harness
import sockets

TARGETS = {"framing": framing.target, "sockets": sockets.target}


@pytest.mark.parametrize(
    ("name", "path"),
    [
        pytest.param(name, path, id=f"{name}, {path.name}")
        for name in TARGETS
        for path in harness.corpus(name)
    ],
)
def test_the_corpus(name: str, path: Path) -> None:
    TARGETS[name](path.read_bytes())


# What frames are made of: ends, lengths around the limit, and content.
PART = st.one_of(
    st.binary(max_size=6),
    st.sampled_from([b"\n", b"\r\n", b"\r\n\r\n", b"\0", b"aab", b"aa", b'"', b"3:abc,", b"40:"]),
    st.integers(0, 50).map(lambda n: b"x" * n),
    st.integers(0, 50).flatmap(
        lambda n: st.sampled_from([f"{o}{c}" for o in "<>" for c in "BHIQ"]).map(
            lambda layout: struct.pack(layout, n) + b"y" * n
        )
    ),
)
STREAMS = st.lists(PART, max_size=20).map(b"".join)


@pytest.mark.timeout(240)
@pytest.mark.parametrize(("name", "examples"), [("framing", 3000), ("sockets", 150)])
def test_any_stream(name: str, examples: int) -> None:
    target: Callable[[bytes], None] = TARGETS[name]

    @settings(
        max_examples=examples,
        deadline=None,
        database=None,
        suppress_health_check=[HealthCheck.too_slow],
    )
    @given(st.binary(min_size=16, max_size=16), STREAMS)
    def check(choices: bytes, stream: bytes) -> None:
        target(choices + stream)

    check()


def test_every_framer_has_a_model_and_a_corpus() -> None:
    kinds = {type(framer).__name__ for framer, _ in harness.FRAMERS}
    assert kinds == {"Lines", "Delimited", "LengthPrefixed", "FixedSize", "Netstring", "Quoted"}
    for name in TARGETS:
        first = [path.read_bytes()[0] % len(harness.FRAMERS) for path in harness.corpus(name)]
        assert {type(harness.FRAMERS[number][0]).__name__ for number in first} == kinds
