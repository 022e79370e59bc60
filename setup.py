"""Builds the extensions; everything else is in pyproject.toml.

Environment switches, read once here (flags on a command line vanish under ``pip install``):

UVSOCK_DEBUG=1      bounds and None checks, C assertions, no optimisation
UVSOCK_SANITIZE=1   AddressSanitizer and UndefinedBehaviorSanitizer
UVSOCK_COVERAGE=1   line tracing for coverage.py's Cython plugin
UVSOCK_ANNOTATE=1   an HTML page per module that shows where C calls into Python
"""

import os
from pathlib import Path

from Cython.Build import cythonize
from setuptools import Extension, setup


def switch(name: str) -> bool:
    return os.environ.get(f"UVSOCK_{name}", "0") not in ("", "0")


DEBUG, SANITIZE, COVERAGE = switch("DEBUG"), switch("SANITIZE"), switch("COVERAGE")
CHECKED = DEBUG or SANITIZE

directives = {
    "language_level": 3,
    "boundscheck": CHECKED,
    "wraparound": False,
    "initializedcheck": CHECKED,
    "nonecheck": CHECKED,
    "cdivision": True,
    "embedsignature": True,
    "embedsignature.format": "python",
    "auto_pickle": False,
    "autotestdict": False,
    "linetrace": COVERAGE,
}
compile_args = ["-O1", "-g", "-UNDEBUG"] if CHECKED else ["-O2", "-g0"]
link_args: list[str] = []
if SANITIZE:
    sanitizers = ["-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"]
    compile_args += [*sanitizers, "-fno-omit-frame-pointer"]
    link_args += sanitizers
macros = [("CYTHON_TRACE", "1"), ("CYTHON_USE_SYS_MONITORING", "0")] if COVERAGE else []

extensions = [
    Extension(
        f"uvsock.{source.stem}",
        [source.as_posix()],
        define_macros=macros,
        extra_compile_args=compile_args,
        extra_link_args=link_args,
    )
    for source in sorted(Path("src/uvsock").glob("*.pyx"))
]

setup(
    ext_modules=cythonize(
        extensions,
        include_path=["src"],
        # Generated C stays out of src, so neither the wheel nor the sdist can pick it up.
        build_dir="build/cython",
        compiler_directives=directives,
        annotate=switch("ANNOTATE"),
        show_all_warnings=True,
    ),
)
