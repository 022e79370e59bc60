"""The annotated programs in tests/typing, as mypy sees them with the package that is installed."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

SAMPLES = Path(__file__).parent / "typing"


@pytest.mark.timeout(300)
def test_mypy_agrees_with_the_samples(tmp_path: Path) -> None:
    """What is wrong in a sample carries an ignore; one that is not needed is an error too."""
    pytest.importorskip("mypy", reason="mypy is not installed (pip install -e '.[dev]')")
    # Outside the tree and without its settings: nothing but the installed package is looked at.
    environment = {**os.environ, "MYPYPATH": str(SAMPLES)}
    environment.pop("LD_PRELOAD", None)  # a sanitizer
    command = [sys.executable, "-m", "mypy", "--strict", "--config-file="]
    command += ["--explicit-package-bases", "--cache-dir", str(tmp_path / "cache")]
    samples = sorted(str(path) for path in SAMPLES.glob("*.py"))
    assert samples
    result = subprocess.run(
        [*command, *samples],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert result.returncode == 0, result.stdout + result.stderr
