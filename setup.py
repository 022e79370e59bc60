"""Builds the extensions; everything else is in pyproject.toml.

Environment switches, read once here (flags on a command line vanish under ``pip install``):

UVSOCK_DEBUG=1      bounds and None checks, C assertions, hardly any optimisation
UVSOCK_SANITIZE=1   the same, with AddressSanitizer and UndefinedBehaviorSanitizer
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
ANNOTATE = switch("ANNOTATE")
CHECKED = DEBUG or SANITIZE
flavour = "sanitize" if SANITIZE else "debug" if DEBUG else "coverage" if COVERAGE else "release"

directives = {
    "language_level": 3,
    "boundscheck": CHECKED,
    "wraparound": False,
    "initializedcheck": CHECKED,
    "nonecheck": CHECKED,
    "cdivision": True,
    "embedsignature": True,
    "embedsignature.format": "clinic",
    "auto_pickle": False,
    "autotestdict": False,
    "linetrace": COVERAGE,
}
# These come after Python's own flags, so the last -O, -g and -U win over what it was built with.
compile_args = ["-O1", "-g", "-UNDEBUG"] if CHECKED else ["-O2", "-g0"]
link_args: list[str] = []
if SANITIZE:
    sanitizers = ["-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"]
    compile_args += [*sanitizers, "-fno-omit-frame-pointer"]
    link_args += sanitizers
macros = [("CYTHON_TRACE", "1"), ("CYTHON_USE_SYS_MONITORING", "0")] if COVERAGE else []

sources = sorted(Path("src").rglob("*.pyx"))
if not sources:
    # Without this an sdist that lost its sources would install as a package that cannot work.
    raise SystemExit("setup.py: no .pyx below src: run it in the root of a complete source tree")

# A build looks at file dates only. They do not show that a flag or a directive has changed, nor
# that the modules in place are of another flavour: C older than the recipe is made again.
made_with = Path("build", "made-with")
recipe = repr((directives, compile_args, link_args, macros))
if not made_with.exists() or made_with.read_text() != recipe:
    made_with.parent.mkdir(exist_ok=True)
    made_with.write_text(recipe)
# Only coverage.py's plugin insists on finding the C beside its .pyx. Elsewhere it stays out of src,
# so that neither the wheel nor the sdist can pick it up.
generated = Path("src" if COVERAGE else f"build/{flavour}/cython")
outdated = any(c.stat().st_mtime < made_with.stat().st_mtime for c in generated.rglob("*.c"))

extensions = [
    Extension(
        ".".join(source.relative_to("src").with_suffix("").parts),
        [source.as_posix()],
        include_dirs=["src/uvsock"],
        define_macros=macros,
        extra_compile_args=compile_args,
        extra_link_args=link_args,
    )
    for source in sources
]

setup(
    ext_modules=cythonize(
        extensions,
        include_path=["src"],
        build_dir=None if COVERAGE else generated.as_posix(),
        compiler_directives=directives,
        annotate=ANNOTATE,
        # The pages are written with the C, and only then.
        force=outdated or ANNOTATE,
    ),
    options={
        "build": {"build_base": f"build/{flavour}"},
        "build_ext": {"parallel": os.cpu_count()},
    },
)
