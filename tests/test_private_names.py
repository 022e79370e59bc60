"""Only documented names of asyncio, uvloop, ssl and socket are used, but for a short list."""

from __future__ import annotations

import ast
import asyncio
import re
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import pytest

import uvsock
from conftest import SERVER_NAME, Authority
from helpers import soon, until

LOOPS = {"uvsock": uvsock.new_event_loop}

TESTS = Path(__file__).resolve().parent
SOURCES = TESTS.parent / "src" / "uvsock"

# In Cython: comments and strings go, names and the dot before them stay.
TOKEN = re.compile(
    r"#[^\n]*"
    r'|(?:[rbfu]{0,2})(?:"""(?:\\.|[^\\])*?"""|\'\'\'(?:\\.|[^\\])*?\'\'\')'
    r'|(?:[rbfu]{0,2})(?:"(?:\\.|[^"\\\n])*"|\'(?:\\.|[^\'\\\n])*\')'
    r"|(?P<dot>\.\s*)?(?P<name>[A-Za-z_][A-Za-z0-9_]*)",
    re.S,
)
ASKED = re.compile(r"(?:get|has|set)attr\(\s*[\w.()]+,\s*[\"'](\w+)[\"']")
# In Cython: what is taken from a module that is not ours.
IMPORTED = re.compile(r"^\s*from +((?!uvsock|cpython|libc|posix)[\w.]+) +import +([^#\n]+)", re.M)
# The name that a file has for one of their modules.
MODULE = re.compile(
    r"^\s*import +(?:(?:asyncio|uvloop|ssl|socket) +as +(\w+)|(asyncio|uvloop|ssl|socket)\b)", re.M
)
PRIVATE = re.compile(r"_(?!_)[A-Za-z]\w*")
# Parts of asyncio that no documentation names.
UNDOCUMENTED = re.compile(
    r"\basyncio\.(?:base_events|constants|coroutines|selector_events|sslproto|staggered|unix_events)\b"
)


class Use(NamedTuple):
    """Why a private name is used, what is done where there is none, and the test that does it."""

    reason: str
    fallback: str
    test: str


ALLOWED = {
    "_sslobj": Use(
        "the compiled object inside an SSLObject: an interpreted call less for each record",
        "the methods of the SSLObject",
        "test_private_names.py::test_tls_without_the_compiled_session",
    ),
    "_stream_reader": Use(
        "what asyncio's own reader holds when TLS starts goes to TLS",
        "it stays where it is",
        "test_private_names.py::test_start_tls_with_a_reader_that_is_not_found",
    ),
}


def foreign_names() -> dict[str, set[str]]:
    """The private names that are asked of what is not ours, with the files that do."""
    asked: dict[str, set[str]] = {}
    # Ours: what is defined anywhere in the sources, and the names of our modules.
    own = {path.stem for path in SOURCES.rglob("*.p*")}
    paths = [path for kind in ("*.py", "*.pyx", "*.pxd") for path in SOURCES.rglob(kind)]
    assert len(paths) > 20
    certain: set[str] = set()  # asked of a module of theirs, or of what may be anything
    for path in paths:
        where = path.relative_to(SOURCES).as_posix()
        text = path.read_text()
        found: set[str] = set()
        theirs = {alias or module for alias, module in MODULE.findall(text)}
        if path.suffix == ".py":
            for node in ast.walk(ast.parse(text)):
                match node:
                    case ast.Attribute(value=ast.Name("self" | "cls"), attr=name, ctx=ast.Store()):
                        own.add(name)
                    case ast.Attribute(value=ast.Name(id), attr=name) if id in theirs:
                        certain.add(name)
                        found.add(name)
                    case ast.Attribute(attr=name):
                        found.add(name)
                    case ast.keyword(arg=str(name)):
                        found.add(name)
                    case ast.Call(
                        func=ast.Name("getattr" | "hasattr" | "setattr"),
                        args=[_, ast.Constant(value=str(name)), *_],
                    ):
                        certain.add(name)
                        found.add(name)
                    case ast.Name(id=name) | ast.arg(arg=name):
                        own.add(name)
                    case ast.FunctionDef(name=name) | ast.AsyncFunctionDef(name=name):
                        own.add(name)
                    case ast.ClassDef(name=name):
                        own.add(name)
                    case ast.Import(names=names):
                        found.update(part for alias in names for part in alias.name.split("."))
                    case ast.ImportFrom(module=module, names=names) if "uvsock" not in str(module):
                        found.update(alias.name for alias in names)
                        certain.update(alias.name for alias in names)
                        found.update(f"{module}.{alias.name}" for alias in names)
        else:
            importing = re.findall(r"^\s*import +(\w+)", text, re.M)
            for module, names in IMPORTED.findall(text):
                for name in re.findall(r"\w+", names):
                    found.update((name, f"{module}.{name}"))
                    certain.add(name)
            found.update(importing)
            for name in ASKED.findall(text):
                certain.add(name)
                found.add(name)
            for token in TOKEN.finditer(text):
                name = token["name"]
                if name and token["dot"]:
                    before = text[: token.start()].rsplit(None, 1)[-1:] or [""]
                    assigned = re.match(r"\s*(=[^=]|, )", text[token.end() :])
                    if assigned and before[0].endswith("self"):
                        own.add(name)
                        continue
                    found.add(name)
                    if re.split(r"\W", before[0])[-1] in theirs:
                        certain.add(name)
                elif name and name not in importing:
                    own.add(name)
        for name in found:
            if PRIVATE.fullmatch(name) or UNDOCUMENTED.fullmatch(name):
                asked.setdefault(name, set()).add(where)
        for name in UNDOCUMENTED.findall(re.sub(r"#[^\n]*", "", text)):
            asked.setdefault(name, set()).add(where)
    return {
        name: files
        for name, files in asked.items()
        # What we put on objects of theirs has a name that says so.
        if (name not in own or name in certain) and not name.startswith("_uvsock_")
    }


def test_no_private_name_but_those_listed() -> None:
    foreign = foreign_names()
    assert {name: files for name, files in foreign.items() if name not in ALLOWED} == {}
    assert set(ALLOWED) <= set(foreign), "listed, and not used any more"
    for use in ALLOWED.values():
        file, function = use.test.split("::")
        assert re.search(rf"^(async )?def {function}\(", (TESTS / file).read_text(), re.M)


@pytest.mark.parametrize(
    ("name", "text", "seen"),
    [
        ("module.py", "import asyncio\nasyncio._private()\n", "_private"),
        ("module.py", "import _socket\n", "_socket"),
        ("module.py", "from uvloop import _noop\n", "_noop"),
        ("module.py", "getattr(loop, '_ready')\n", "_ready"),
        (
            "module.py",
            "import asyncio.sslproto\nx = asyncio.sslproto.SSLProtocol\n",
            "asyncio.sslproto",
        ),
        ("module.pyx", "cdef f(x):\n    return x._private\n", "_private"),
        ("module.pyx", "import _socket\n", "_socket"),
        ("module.pyx", "from asyncio.events import _lock\n", "_lock"),
        ("module.pyx", "from asyncio import sslproto\n", "asyncio.sslproto"),
        ("module.pyx", "import asyncio\ndef _lock():\n    return asyncio._lock\n", "_lock"),
        ("module.py", "from asyncio import sslproto\n", "asyncio.sslproto"),
        ("module.py", "import asyncio as a\ndef _lock():\n    return a._lock\n", "_lock"),
        ("module.py", "transport.close(_quietly=True)\n", "_quietly"),
        ("module.pyx", 'x = getattr(loop, "_ready")  # y._not\n', "_ready"),
    ],
)
def test_what_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, text: str, seen: str
) -> None:
    for number in range(20):
        (tmp_path / f"empty{number}.py").touch()
    (tmp_path / name).write_text(text)
    monkeypatch.setattr(f"{__name__}.SOURCES", tmp_path)
    assert foreign_names() == {seen: {name}}


# ── The fallbacks ──────────────────────────────────────────────────────────────────────────────

WITHOUT_SESSION = """
import ssl
import sys

class Renamed(ssl.SSLObject):
    def __getattribute__(self, name):
        if name == "_sslobj" and sys._getframe(1).f_globals["__name__"] != "ssl":
            raise AttributeError(name)
        return super().__getattribute__(name)

ssl.SSLContext.sslobject_class = Renamed
import uvsock
from uvsock.testing import Certificates

async def main():
    certificates = Certificates()
    listener = await uvsock.listen(
        {"data": lambda socket, data: socket.write(data)}, "127.0.0.1", 0, tls=certificates.server
    )
    got = bytearray()
    def received(socket, data):
        got.extend(data)
        if len(got) == 300_000:
            socket.end()
    socket = await uvsock.connect({"data": received}, "localhost", listener.port,
                                  tls=certificates.client)
    await socket.send_all(bytes(range(250)) * 1200)
    await socket.wait_closed()
    assert got == bytes(range(250)) * 1200
    listener.stop(True)
    print("done")

uvsock.run(main())
"""


def test_tls_without_the_compiled_session() -> None:
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_SESSION], capture_output=True, text=True, timeout=50
    )
    assert (done.stdout, done.returncode) == ("done\n", 0), done.stderr


async def test_start_tls_with_a_reader_that_is_not_found(authority: Authority) -> None:
    """As on an asyncio that names it otherwise."""

    class Renamed(asyncio.StreamReaderProtocol):
        def __getattribute__(self, name: str) -> Any:
            if name == "_stream_reader" and hidden:
                raise AttributeError(name)
            return super().__getattribute__(name)

    hidden = False
    loop = asyncio.get_running_loop()
    accepted: asyncio.Future[asyncio.StreamWriter] = loop.create_future()
    reader = asyncio.StreamReader()

    def connected(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        accepted.set_result(writer)

    server = await loop.create_server(lambda: Renamed(reader, connected), "127.0.0.1", 0)
    _, client = await asyncio.open_connection(*server.sockets[0].getsockname())
    client.write(b"plain\n")
    writer = await soon(accepted)
    await until(lambda: reader._buffer)  # type: ignore[attr-defined]
    hidden = True
    upgrading = asyncio.ensure_future(
        loop.start_tls(
            writer.transport,  # type: ignore[arg-type]
            writer.transport.get_protocol(),
            authority.server_context(),
            server_side=True,
        )
    )
    await soon(client.start_tls(authority.client_context(), server_hostname=SERVER_NAME))
    await soon(upgrading)
    hidden = False
    assert await soon(reader.readline()) == b"plain\n"
    client.close()
    writer.transport.abort()
    server.close()
    await soon(server.wait_closed())
