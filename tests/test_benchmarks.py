"""The benchmarks work, and the pages show what they have found. No test looks at a speed."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest

from benchmarks import peers, plots, report
from benchmarks.measure import Bench
from benchmarks.workloads import WORKLOADS

ROOT = Path(__file__).resolve().parent.parent
PATIENCE = 30

linux = pytest.mark.skipif(sys.platform != "linux", reason="measuring needs Linux")


@pytest.fixture(scope="session")
def load() -> Path:
    """The compiled load generator. The floor is compiled beside it."""
    # The sanitizer's runtime is for Python alone.
    environment = {name: value for name, value in os.environ.items() if name != "LD_PRELOAD"}
    with patch.dict(os.environ, environment, clear=True):
        try:
            peers.compiled("floor")
            return peers.load()[0]
        except peers.Missing as error:
            if os.environ.get("CI"):
                pytest.fail(str(error))
            pytest.skip(str(error))


@contextmanager
def process(*command: str | Path) -> Iterator[subprocess.Popen[str]]:
    """A program that ends when its standard input does, as the load and the floor do."""
    pipes: dict[str, Any] = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    with subprocess.Popen(list(map(str, command)), text=True, **pipes) as started:
        try:
            yield started
            _, errors = started.communicate(timeout=PATIENCE)
        finally:
            started.kill()
    assert (started.returncode, errors) == (0, "")


@linux
@pytest.mark.parametrize(
    ("mode", "behaviour", "options"),
    [
        pytest.param("echo", "echo", "size=300000 connections=2", id="echo, large"),
        pytest.param("echo", "echo", "size=64 depth=16 connections=50", id="echo, pipelined"),
        pytest.param("echo", "small_writes", "size=1 reply=5 connections=3", id="small writes"),
        pytest.param("fan_out", "fan_out", "size=64 depth=8 connections=20", id="fan-out"),
        pytest.param("download", "send", "bytes=5000000 size=65536", id="download"),
        pytest.param("download", "send", "bytes=2e6 size=65536 rate=20e6", id="slow reader"),
        pytest.param("upload", "receive", "bytes=5000000 size=65536", id="upload"),
        pytest.param("churn", "echo", "connections=10", id="churn"),
    ],
)
def test_the_load_and_the_floor_understand_each_other(
    load: Path, mode: str, behaviour: str, options: str
) -> None:
    with process(peers.compiled("floor"), behaviour) as floor:
        assert floor.stdout is not None
        port = floor.stdout.readline().strip()
        with process(load, mode, port, "seconds=0.05", *options.split()) as started:
            assert started.stdout is not None
            result = json.loads(started.stdout.readline())
    assert result["messages"] > 0
    assert 0 < result["seconds"] < PATIENCE
    assert (result["p50"] is None) == (mode in ("download", "upload"))
    if result["p50"] is not None:
        assert result["p50"] <= result["p99"] <= result["p999"]


@linux
def test_idle_connections_are_held_until_the_load_is_told_to_end(load: Path) -> None:
    with process(peers.compiled("floor"), "echo") as floor:
        assert floor.stdout is not None
        port = floor.stdout.readline().strip()
        with process(load, "hold", port, "connections=30") as holding:
            assert holding.stdout is not None
            assert json.loads(holding.stdout.readline()) == {"ready": 30}
            descriptors = len(os.listdir(f"/proc/{floor.pid}/fd"))
            assert descriptors > 30
            assert holding.poll() is None


@linux
@pytest.mark.parametrize("spin", [0, 1])
def test_a_load_that_polls_does_not_sleep(load: Path, spin: int) -> None:
    def sleeps(pid: int) -> int:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
        return int(dict(line.split(":") for line in lines)["voluntary_ctxt_switches"])

    with process(peers.compiled("floor"), "echo") as floor:
        assert floor.stdout is not None
        port = floor.stdout.readline().strip()
        words = ("gate=1", "seconds=0.5", f"spin={spin}")
        with process(load, "echo", port, *words) as started:
            assert started.stdin is not None
            assert started.stdout is not None
            started.stdout.readline()
            before = sleeps(started.pid)
            started.stdin.write("go\n")
            started.stdin.flush()
            messages = json.loads(started.stdout.readline())["messages"]
            slept = sleeps(started.pid) - before
    assert messages > 0
    assert slept < 10 if spin else slept > 10


@linux
@pytest.mark.usefixtures("load")
@pytest.mark.parametrize(("processors", "spin"), [((0, 0), None), ((0, 1), 1)])
def test_a_load_on_the_processor_of_the_server_sleeps(
    tmp_path: Path, processors: tuple[int, int], spin: int | None
) -> None:
    with patch("benchmarks.measure.processors", return_value=processors):
        bench = Bench(tmp_path, rounds=1, seconds=1, quick=False)
    (churn,) = (workload for workload in WORKLOADS if workload.name == "churn")
    assert bench._options(churn).get("spin") == spin


def run(words: str, output: Path | None = None) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "benchmarks", *words.split()]
    return subprocess.run(
        command if output is None else [*command, "--output", str(output)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=PATIENCE,
    )


@linux
@pytest.mark.usefixtures("load")
def test_a_run_writes_its_results_in_the_documented_shape(tmp_path: Path) -> None:
    output = tmp_path / "results.json"
    workloads = ["echo-1024-1", "bulk-send"]
    words = "--quick --peer c --peer uvsock --rounds 2 --seconds 0.3"
    done = run(" --workload ".join((words, *workloads)), output)
    assert done.returncode == 0, done.stderr
    assert "C, epoll" in done.stdout
    results = json.loads(output.read_text())
    assert set(results) == {"meta", "missing", "skipped", "workloads"}
    reference = json.loads(report.RESULTS.read_text())
    assert results["meta"].keys() == reference["meta"].keys()
    assert results["missing"] == results["skipped"] == {}
    assert list(results["workloads"]) == workloads
    for found in results["workloads"].values():
        assert set(found) == {"c", "uvsock"}
        for result in found.values():
            assert len(result["cpu"]) == len(result["rate"]) == 2
            assert min(result["rate"]) > 0
    assert len(results["workloads"]["echo-1024-1"]["uvsock"]["p50"]) == 2


@linux
@pytest.mark.usefixtures("load")
def test_resumed_handshakes_are_counted(tmp_path: Path) -> None:
    output = tmp_path / "results.json"
    # Each of 20 connections begins with a full handshake: the turn is long enough for many more,
    # also where other tests have the same processors.
    words = "--peer c --peer uvsock --workload tls_handshake-resumed --rounds 1 --seconds 2"
    done = run(words, output)
    assert done.returncode == 0, done.stderr
    results = json.loads(output.read_text())
    if results["skipped"]:
        assert "OpenSSL's headers" in results["skipped"]["tls_handshake-resumed"]
    else:
        (found,) = results["workloads"].values()
        assert set(found) == {"uvsock"}
        assert found["uvsock"]["resumed"][0] > 0.5


@linux
@pytest.mark.usefixtures("load")
@pytest.mark.parametrize(
    ("workload", "loops"),
    [
        ("protocol_echo-1024-50", {"uvloop", "uvsock-protocol"}),
        ("protocol_tls_echo-1024-20", {"uvloop", "uvsock-protocol"}),
        ("protocol_tls_echo_mmap-1024-20", {"uvloop", "uvsock-protocol"}),
        ("apps-aiohttp", {"uvloop-app", "uvsock-app"}),
        ("apps-uvicorn_tls", {"uvloop-app", "uvsock-app"}),
        ("apps-websockets", {"uvloop-app", "uvsock-app"}),
        ("apps-redis", {"uvloop-app", "uvsock-app"}),
    ],
)
def test_the_same_program_is_measured_on_both_loops(
    workload: str, loops: set[str], tmp_path: Path
) -> None:
    output = tmp_path / "results.json"
    done = run(f"--workload {workload} --rounds 1 --seconds 0.05", output)
    assert done.returncode == 0, done.stderr
    results = json.loads(output.read_text())
    if missing := results["skipped"].get(workload):
        pytest.skip(missing)
    assert results["workloads"][workload].keys() == loops
    assert all(result["rate"][0] > 0 for result in results["workloads"][workload].values())
    (ours,) = (name for name in loops if name.startswith("uvsock"))
    assert f"{ours} / peer" in done.stdout


def test_a_program_that_is_missing_shows_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    with pytest.raises(peers.Missing, match="wrk is not installed"):
        peers.require("wrk")


@linux
@pytest.mark.usefixtures("load")
def test_a_server_that_fails_does_not_end_the_others(tmp_path: Path) -> None:
    broken = tmp_path / "bun"
    broken.write_text("#!/bin/sh\necho out of order >&2\nexit 1\n")
    broken.chmod(0o755)
    output = tmp_path / "results.json"
    with patch.dict(os.environ, UVSOCK_BUN=str(broken)):
        done = run("--quick --peer c --peer bun --workload echo-64-1 --seconds 0.05", output)
    assert done.returncode == 1
    assert "failed: ended: out of order" in done.stdout
    found = json.loads(output.read_text())["workloads"]["echo-64-1"]
    assert found["bun"] == {"error": "ended: out of order"}
    assert found["c"]["cpu"]


def test_a_peer_that_is_missing_shows_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    here, missing = peers.chosen(["uvsock", "node"])
    assert [peer.name for peer in here] == ["uvsock"]
    results = json.loads(report.RESULTS.read_text()) | {"missing": missing}
    (workload,) = (each for each in WORKLOADS if each.name == "pipeline")
    assert "Node: no node" in report.text(workload, results)
    assert "- Left out, Node: no node" in report.machine(results)


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        ("--peer tornado", "--peer: tornado: not one of c, uvsock"),
        ("--workload telnet", "--workload: 'telnet' matches none of echo-64-1"),
        ("--seconds 0", "--seconds: must be above 0"),
        ("report --results no-such-file", "--results: "),
    ],
    ids=["peer", "workload", "seconds", "results"],
)
def test_bad_input_is_named(words: str, complaint: str) -> None:
    done = run(words)
    assert done.returncode != 0
    assert complaint in done.stderr
    assert "Traceback" not in done.stderr


def test_help_lists_workloads_and_peers() -> None:
    text = run("--help").stdout
    assert all(f" {workload.name} " in text for workload in WORKLOADS)
    assert all(f" {name} " in text for name in peers.LABELS)


# --- the pages --------------------------------------------------------------------------------


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A copy of the pages."""
    shutil.copytree(ROOT / "docs", tmp_path / "docs", ignore=shutil.ignore_patterns("_build"))
    shutil.copy2(ROOT / "README.md", tmp_path)
    return tmp_path


def complaint(capsys: pytest.CaptureFixture[str], *words: str) -> str | None:
    """The files that `report --check` does not accept; None if there are none."""
    if report.main(["--check", *words]) == 0:
        return None
    return capsys.readouterr().err.strip().rpartition(": ")[2]


def test_the_pages_and_plots_show_the_reference_results(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert complaint(capsys) is None, "run: python -m benchmarks report"


@pytest.mark.parametrize("page", report.PAGES, ids=str)
def test_a_figure_that_was_changed_by_hand_is_found(
    page: Path, tree: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = (tree / page).read_text()
    changed = text.replace(" µs | ", "9 µs | ", 1)
    assert changed != text
    (tree / page).write_text(changed)
    assert complaint(capsys, "--root", str(tree)) == str(page)


def test_a_plot_of_other_figures_is_found(tree: Path, capsys: pytest.CaptureFixture[str]) -> None:
    results = json.loads(report.RESULTS.read_text())
    results["workloads"]["scaling"]["uvsock"]["cpu_beside"]["100"] = [1.0]
    other = tree / "other.json"
    other.write_text(json.dumps(results))
    stale = complaint(capsys, "--root", str(tree), "--results", str(other))
    assert stale is not None
    assert stale.split(", ") == ["docs/plots/scaling.svg", "docs/performance.md"]
    (tree / "docs" / "plots" / "idle.svg").unlink()
    assert complaint(capsys, "--root", str(tree)) == "docs/plots/idle.svg"


@pytest.mark.skipif(find_spec("matplotlib") is None, reason="the bench extra is not installed")
def test_what_is_drawn_says_what_it_shows() -> None:
    script = (
        "import json, sys; from benchmarks import plots, report\n"
        "for figure in plots.figures(json.loads(report.RESULTS.read_text())).values():\n"
        "    svg = plots.svg(figure)\n"
        "    assert plots.digest_in(svg) == plots.digest(figure)\n"
        "    assert '>uvsock</text>' in svg\n"
    )
    subprocess.run([sys.executable, "-c", script], cwd=ROOT, check=True, timeout=PATIENCE)


def test_results_without_a_workload_have_no_plot_of_it() -> None:
    results = json.loads(report.RESULTS.read_text())
    assert plots.figures(results).keys() == plots.PLOTS.keys()
    assert plots.figures(results | {"workloads": {}}) == {}


# --- micro ------------------------------------------------------------------------------------


@pytest.mark.skipif(find_spec("pyperf") is None, reason="the bench extra is not installed")
def test_the_micro_benchmarks_make_what_pyperf_compares(tmp_path: Path) -> None:
    output = tmp_path / "micro.json"
    # Its workers get no other variables, and a sanitizer's runtime is one of these.
    inherited = "--inherit-environ=LD_PRELOAD,PYTHONMALLOC,ASAN_OPTIONS"
    done = run(f"micro --debug-single-value --quiet {inherited}", output)
    assert done.returncode == 0, done.stderr
    names = [each["metadata"]["name"] for each in json.loads(output.read_text())["benchmarks"]]
    kinds = [name.partition(":")[0] for name in names]
    assert sorted(set(kinds)) == ["collect", "dispatch", "timeout", "write"]
    command = [sys.executable, "-m", "pyperf", "compare_to", "-v", str(output), str(output)]
    compared = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE)
    assert compared.returncode == 0, compared.stderr
