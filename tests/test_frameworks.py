"""What docs/guides/asyncio.md says to write to have a framework run on uvsock's loop."""

from __future__ import annotations

import asyncio
import http.client
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import anyio
import pytest

import uvsock
from conftest import run_python, unused_port

APP = """
import asyncio
{first}

async def app(scope, receive, send):
    if scope["type"] == "lifespan":
        while True:
            event = (await receive())["type"]
            await send({{"type": event + ".complete"}})
            if event == "lifespan.shutdown":
                return
    loop = type(asyncio.get_running_loop())
    body = f"{{loop.__module__}}.{{loop.__qualname__}}".encode()
    headers = [(b"content-length", str(len(body)).encode())]
    await send({{"type": "http.response.start", "status": 200, "headers": headers}})
    await send({{"type": "http.response.body", "body": body}})
"""
OURS = b"uvsock.dropin.loop.Loop"
# The same uvsock as here, also where the path to it is relative.
ENVIRONMENT = os.environ | {"PYTHONPATH": str(Path(uvsock.__file__).parent.parent)}


def answer(server: subprocess.Popen[bytes], port: int) -> bytes:
    """What the server says, once it listens."""
    while server.poll() is None:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
        try:
            connection.request("GET", "/")
            return connection.getresponse().read()
        except ConnectionRefusedError:
            time.sleep(0.01)
        finally:
            connection.close()
    raise AssertionError(f"nobody listens at port {port}")


@pytest.mark.parametrize(
    ("command", "first"),
    [
        ("uvicorn app:app --port {} --log-level critical --loop uvsock:new_event_loop", ""),
        ("hypercorn app:app --bind 127.0.0.1:{}", "import uvsock; uvsock.install()"),
        ("hypercorn app:app --bind 127.0.0.1:{} --workers 0", "import uvsock; uvsock.install()"),
    ],
    ids=["uvicorn", "hypercorn", "hypercorn without workers"],
)
def test_a_server_of_asgi_runs_on_this_loop(command: str, first: str, tmp_path: Path) -> None:
    words = command.split()
    (tmp_path / "app.py").write_text(APP.format(first=first))
    port = unused_port()
    with subprocess.Popen(
        [sys.executable, "-W", "ignore", "-m", *(word.format(port) for word in words)],
        cwd=tmp_path,
        env=ENVIRONMENT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    ) as server:
        try:
            assert answer(server, port) == OURS
        finally:
            server.send_signal(signal.SIGTERM)
            output, _ = server.communicate(timeout=20)
    assert b"Traceback" not in output, output


def test_anyio_runs_on_this_loop() -> None:
    async def main() -> type:
        return type(asyncio.get_running_loop())

    options = {"loop_factory": uvsock.new_event_loop}
    assert anyio.run(main, backend_options=options) is uvsock.Loop


def test_pytest_asyncio_runs_on_this_loop(tmp_path: Path) -> None:
    (tmp_path / "conftest.py").write_text(
        "import uvsock\n"
        "def pytest_asyncio_loop_factories(config, item):\n"
        "    return {'uvsock': uvsock.new_event_loop}\n"
    )
    (tmp_path / "test_it.py").write_text(
        "import asyncio, pytest, uvsock\n"
        "@pytest.mark.asyncio\n"
        "async def test_it():\n"
        "    assert type(asyncio.get_running_loop()) is uvsock.Loop\n"
    )
    words = ("-q", "-p", "no:cacheprovider", "-o", "asyncio_default_fixture_loop_scope=function")
    output = run_python("-m", "pytest", *words, str(tmp_path), env=ENVIRONMENT, cwd=tmp_path)
    assert "1 passed" in output
