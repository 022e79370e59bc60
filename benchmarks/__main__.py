"""The command line: measure, write the report, or hand over to pyperf."""

from __future__ import annotations

import argparse
import datetime
import json
import os
import subprocess
import sys
import tempfile
import time
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from benchmarks import peers, report, workloads
from benchmarks.measure import Bench, Failed, allow_many_files, processors

USAGE = """\
python -m benchmarks [options]                 measure, print a table per workload
       python -m benchmarks report [--check]   write the figures into the pages, or compare them
       python -m benchmarks micro [options]    the micro-benchmarks, with pyperf's options
"""
# More load than this from others, and figures are not worth keeping.
BUSY = 1.5


def measure(arguments: argparse.Namespace) -> int:
    chosen = workloads.chosen(arguments.workload, quick=arguments.quick)
    here, missing = peers.chosen(arguments.peer)
    rounds = arguments.rounds or (1 if arguments.quick else 5)
    seconds = arguments.seconds or (0.3 if arguments.quick else 1.5)
    try:
        peers.load()
    except peers.Missing as error:
        raise SystemExit(f"no load without a compiler: {error}") from None
    allow_many_files()
    server, load = processors()
    if server == load:
        print("only one processor: the load competes with the server", file=sys.stderr)
    if os.getloadavg()[0] > BUSY:
        print(f"this machine is busy (load {os.getloadavg()[0]:.1f})", file=sys.stderr)
    results: dict[str, Any] = {
        "meta": {
            "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "commit": peers.commit(),
            "processor": peers.processor(),
            "processors": os.cpu_count(),
            "load_average": [round(each, 2) for each in os.getloadavg()],
            "versions": peers.versions(),
            "quick": arguments.quick,
            "rounds": rounds,
            "seconds": seconds,
            "server_on": server,
            "load_on": load,
        },
        "missing": missing,
        "skipped": {},
        "workloads": {},
    }
    for name, why in missing.items():
        print(f"{peers.LABELS[name]} is left out: {why}", file=sys.stderr)
    started = time.monotonic()
    failed = False
    with tempfile.TemporaryDirectory(prefix="uvsock-bench-") as directory:
        bench = Bench(Path(directory), rounds=rounds, seconds=seconds, quick=arguments.quick)
        for workload in chosen:
            try:
                found = bench.run(workload, here)
            except (peers.Missing, Failed, OSError, subprocess.SubprocessError) as error:
                print(f"{workload.name} is left out: {error}", file=sys.stderr)
                results["skipped"][workload.name] = str(error)
                failed |= not isinstance(error, peers.Missing)
            else:
                results["workloads"][workload.name] = found
                failed |= any("error" in result for result in found.values())
                print(report.text(workload, results), flush=True)
            # After each, so that an interrupted run has not been for nothing.
            arguments.output.parent.mkdir(parents=True, exist_ok=True)
            arguments.output.write_text(json.dumps(results, indent=1) + "\n")
    print(f"{arguments.output}: {time.monotonic() - started:.0f} s", file=sys.stderr)
    return int(failed)


def epilog() -> str:
    """The names that options take."""
    _, missing = peers.chosen([])
    lines = ["workloads (* marks those of --quick):"]
    lines += [f"  {' *'[w.quick]} {w.name:22} {w.title}" for w in workloads.WORKLOADS]
    lines.append("peers:")
    for name, label in peers.LABELS.items():
        lines.append(f"    {name:22} {label}" + (f": {missing[name]}" if name in missing else ""))
    return "\n".join(lines)


def micro(arguments: list[str]) -> int:
    if find_spec("pyperf") is None:
        print("pyperf is not installed: pip install '.[bench]'", file=sys.stderr)
        return 2
    # pyperf starts the script again in its worker processes, so the script has to be the program.
    return subprocess.call([sys.executable, "-m", "benchmarks.micro", *arguments])


def main(words: list[str]) -> int:
    if words[:1] == ["report"]:
        return report.main(words[1:])
    if words[:1] == ["micro"]:
        return micro(words[1:])
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks",
        usage=USAGE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description="Measures servers of uvsock and its peers under the same load.",
        epilog=epilog() if {"-h", "--help"} & set(words) else None,
    )
    parser.add_argument("--quick", action="store_true", help="fewer workloads, one short round")
    parser.add_argument(
        "--workload",
        action="append",
        default=[],
        metavar="NAME",
        help="one of those below, or several: echo, tls_*; may be repeated",
    )
    parser.add_argument(
        "--peer",
        action="append",
        default=[],
        metavar="NAME",
        help="one of those below; may be repeated",
    )
    parser.add_argument("--rounds", type=int, help="how often each server has its turn")
    parser.add_argument("--seconds", type=float, help="how long a turn is")
    parser.add_argument(
        "--output",
        type=Path,
        default=peers.BUILD / "results.json",
        metavar="FILE",
        help="where the results go (default: build/benchmarks/results.json)",
    )
    arguments = parser.parse_args(words)
    # Processor affinity, epoll, and what /proc says of a process.
    if sys.platform != "linux":
        parser.error("measuring needs Linux")
    for name in ("rounds", "seconds"):
        value = getattr(arguments, name)
        if value is not None and value <= 0:
            parser.error(f"--{name}: must be above 0, not {value}")
    return measure(arguments)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
