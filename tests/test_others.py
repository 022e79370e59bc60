"""The runner of other people's tests: what it takes for a success."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.others import __main__ as others

UNKNOWN_WARNING = "filterwarnings =\n  error\n  ignore::not_there.Warning"


@pytest.fixture
def suite(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of a suite of one file, of which nothing is listed in expected.toml."""
    made = others.Suite("made_up", "", "made_up==1", (), (), ("test_a.py",), settings="pytest.ini")
    monkeypatch.setattr(others, "SUITES", (made,))
    monkeypatch.setattr(others, "BUILD", tmp_path / "build")
    folder = tmp_path / "build" / "made_up-1"
    folder.mkdir(parents=True)
    (folder / "pytest.ini").write_text("[pytest]\n")
    return folder


def test_a_suite_that_passes(suite: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (suite / "test_a.py").write_text("def test_it(): pass")
    assert others.main([]) == 0
    assert "1 passed, 0 failed" in capsys.readouterr().out


def test_a_failure_that_is_not_expected(suite: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (suite / "test_a.py").write_text("def test_it(): raise OSError('why')")
    assert others.main([]) == 1
    assert "test_a.py::test_it failed: OSError: why" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("settings", "tests", "words", "said"),
    [
        # With these settings pytest ends by an exception, and Python by 1, as for tests that fail.
        (UNKNOWN_WARNING, "def test_it(): pass", [], "ended with 1"),
        ("", "", [], "ended with 5"),
        ("", "import not_there", [], "ended with 2"),
        ("", "def test_it(): pass", ["-k", "other"], "ended with 5"),
        ("", "import pytest; pytest.skip('no', allow_module_level=True)", [], "no test was run"),
        ("", "def test_it():\n import pytest; pytest.skip()", [], "no test was run"),
    ],
)
def test_a_suite_that_runs_nothing_is_a_failure(
    suite: Path, settings: str, tests: str, words: list[str], said: str,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    (suite / "pytest.ini").write_text(f"[pytest]\n{settings}\n")
    (suite / "test_a.py").write_text(tests)
    assert others.main(words) == 1
    printed = capsys.readouterr().out
    assert said in printed
    assert "no test was run" in printed


def test_a_file_of_which_nothing_runs_is_a_failure(
    suite: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    made = others.Suite("made_up", "", "made_up==1", (), (), ("test_a.py", "test_b.py"))
    monkeypatch.setattr(others, "SUITES", (made,))
    (suite / "test_a.py").write_text("def test_it(): pass")
    (suite / "test_b.py").write_text("import pytest; pytest.importorskip('not_there')")
    assert others.main([]) == 1
    assert "no test of test_b.py was run" in capsys.readouterr().out
