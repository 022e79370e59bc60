"""What the sdist and the wheel hold, and that a build which fails is an install that fails."""

from __future__ import annotations

import importlib.machinery
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from importlib.metadata import version
from pathlib import Path

import pytest

import uvsock
import uvsock._stream

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "src" / "uvsock"
EXTENSION = importlib.machinery.EXTENSION_SUFFIXES[0]
NOT_SOURCE = shutil.ignore_patterns("__pycache__", "*.so", "*.c", "*.egg-info", "_build")


def names(pattern: str) -> set[str]:
    return {path.relative_to(PACKAGE).as_posix() for path in PACKAGE.rglob(pattern)}


def copy_tree(target: Path) -> Path:
    """The project's own files, as a checkout has them."""
    target.mkdir()
    for path in ROOT.iterdir():
        if path.name == "benchmarks":  # its C is written by hand
            shutil.copytree(path, target / path.name, ignore=shutil.ignore_patterns("__pycache__"))
        elif path.name in ("src", "tests", "docs", "examples", ".ci"):
            shutil.copytree(path, target / path.name, ignore=NOT_SOURCE)
        # The first two are in an unpacked sdist only.
        elif path.is_file() and path.name not in ("PKG-INFO", "setup.cfg", ".coverage"):
            shutil.copy2(path, target)
    return target


def build_environment() -> dict[str, str]:
    """Without what decides how uvsock is built, and without a sanitizer in the compiler itself."""
    return {
        name: value
        for name, value in os.environ.items()
        if not name.startswith("UVSOCK_") and name not in ("LD_PRELOAD", "PYTHONMALLOC")
    }


def build(tree: Path, kind: str, target: Path) -> subprocess.CompletedProcess[str]:
    """Run the hook that pip runs, in the tree, with the installed setuptools and Cython."""
    hook = f"import sys, setuptools.build_meta as b; b.build_{kind}(sys.argv[1])"
    return subprocess.run(
        [sys.executable, "-c", hook, str(target)],
        cwd=tree,
        env=build_environment(),
        capture_output=True,
        text=True,
        timeout=240,
    )


def test_the_version_is_the_same_everywhere() -> None:
    assert uvsock.__version__ == version("uvsock")


def test_the_build_that_runs_is_the_one_that_was_asked_for() -> None:
    flavour = os.environ.get("UVSOCK_TEST_BUILD")
    if flavour is None or sys.platform != "linux":
        pytest.skip("only `make` says which build it tests, only ELF files are looked into")
    module = Path(uvsock._stream.__file__).read_bytes()
    assert (b".debug_info" in module) == (flavour != "release")
    assert (b"__asan_init" in module) == (flavour == "sanitize")


def test_what_compiled_handlers_and_type_checkers_need_is_installed() -> None:
    package = Path(uvsock.__file__).parent
    installed = {path.relative_to(package).as_posix() for path in package.rglob("*")}
    modules = {name.removesuffix(".pyx") for name in names("*.pyx")}
    assert modules
    assert "py.typed" in installed
    assert {f"{module}{EXTENSION}" for module in modules} <= installed
    assert {f"{module}.pyi" for module in modules} <= installed
    assert names("*.pxd") | {"__init__.pxd"} <= installed


@pytest.mark.timeout(300)
def test_the_sdist_holds_every_source_and_nothing_made(tmp_path: Path) -> None:
    tree = copy_tree(tmp_path / "tree")
    expected = {path.relative_to(tree).as_posix() for path in tree.rglob("*") if path.is_file()}
    result = build(tree, "sdist", tmp_path)
    assert result.returncode == 0, result.stderr
    with tarfile.open(tmp_path / f"uvsock-{uvsock.__version__}.tar.gz") as archive:
        held = {member.name.partition("/")[2] for member in archive.getmembers() if member.isfile()}
    made = {"PKG-INFO", "setup.cfg"}
    assert {name for name in held if not name.startswith("src/uvsock.egg-info/")} - made == expected


@pytest.mark.timeout(300)
def test_the_wheel_holds_the_interfaces_and_no_source_of_the_compiled_modules(
    tmp_path: Path,
) -> None:
    tree = copy_tree(tmp_path / "tree")
    # A small module in place of the real ones: what goes into the wheel is the same, in seconds.
    for source in (tree / "src" / "uvsock").rglob("*.pyx"):
        source.unlink()
    (tree / "src" / "uvsock" / "_small.pyx").write_text("answer = 42\n")
    result = build(tree, "wheel", tmp_path)
    assert result.returncode == 0, result.stderr
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        held = set(archive.namelist())
    information = f"uvsock-{uvsock.__version__}.dist-info/"
    assert information + "licenses/LICENSE" in held
    modules = names("*.py") | names("*.pyi") | names("*.pxd") | {"py.typed", f"_small{EXTENSION}"}
    assert {name for name in held if not name.startswith(information)} == {
        f"uvsock/{name}" for name in modules
    }


@pytest.mark.timeout(300)
@pytest.mark.parametrize(
    ("source", "complaint"),
    [
        pytest.param("def f(:\n", "_small.pyx:1", id="Cython"),
        pytest.param('cdef extern from "no_such_header.h":\n    pass\n', "no_such_header", id="C"),
        pytest.param(None, "no .pyx", id="no source"),
    ],
)
def test_a_module_that_does_not_compile_fails_the_build(
    tmp_path: Path, source: str | None, complaint: str
) -> None:
    tree = copy_tree(tmp_path / "tree")
    for path in (tree / "src" / "uvsock").rglob("*.pyx"):
        path.unlink()
    if source is not None:
        (tree / "src" / "uvsock" / "_small.pyx").write_text(source)
    result = build(tree, "wheel", tmp_path)
    assert result.returncode != 0
    assert complaint in result.stdout + result.stderr
    assert not list(tmp_path.glob("*.whl"))


@pytest.mark.timeout(300)
def test_a_change_of_flavour_compiles_again(tmp_path: Path) -> None:
    tree = copy_tree(tmp_path / "tree")
    package = tree / "src" / "uvsock"
    for path in package.rglob("*.pyx"):
        path.unlink()
    (package / "_small.pyx").write_text("def at(bytes b, int i):\n    return b[i]\n")
    command = [sys.executable, "setup.py", "--quiet", "build_ext", "--inplace"]
    plain = build_environment()
    sizes = []
    for switches in ({}, {"UVSOCK_DEBUG": "1"}, {}, {}):
        subprocess.run(command, cwd=tree, env=plain | switches, check=True, timeout=120)
        sizes.append((package / f"_small{EXTENSION}").stat().st_size)
    assert sizes[0] == sizes[2] == sizes[3] < sizes[1]


def test_no_machine_and_no_registry_is_named() -> None:
    """A host in a requirement or a URL would bind every build to it."""
    text = (ROOT / "pyproject.toml").read_text() + (ROOT / "Makefile").read_text()
    assert not re.findall(r"https?://\S+", text)
