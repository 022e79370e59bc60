"""What the servers written in Python share: standard input, and the certificate."""

from __future__ import annotations

import asyncio
import gc
import importlib.util
import json
import os
import ssl
import sys
import time
from pathlib import Path
from typing import Any

CHUNK = bytes(65536)


def collect() -> dict[str, float]:
    """One full collection, after one that does not count: the first also frees what was left."""
    gc.collect()
    start = time.perf_counter()
    gc.collect()
    return {"gc_seconds": time.perf_counter() - start, "gc_objects": len(gc.get_objects())}


async def serve(port: int) -> None:
    """Prints the port and answers requests for a collection until standard input ends."""
    print(port, flush=True)
    loop = asyncio.get_running_loop()
    ended = loop.create_future()

    def asked() -> None:
        if os.read(0, 100):
            print(json.dumps(collect()), flush=True)
        else:
            loop.remove_reader(0)
            ended.set_result(None)

    loop.add_reader(0, asked)
    await ended
    # The connections that are left are the load's: nothing has to be delivered any more.
    sys.stdout.flush()
    os._exit(0)


def example(name: str) -> Any:
    """A module of examples/."""
    path = Path(__file__).resolve().parents[2] / "examples" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def context(certificate: str | None) -> ssl.SSLContext | None:
    """The TLS context of a server, for a file that holds its key and certificate."""
    if certificate is None:
        return None
    made = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    made.load_cert_chain(Path(certificate))
    return made
