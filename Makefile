# `make` alone lists the commands. What they make is in $(VENV), build/ and, for the modules that are
# imported from a source tree, src/uvsock/*.so.

PYTHON ?= python3
VENV ?= .venv
# More words for pytest: make test ARGS="-k tls -x", or ARGS="-n 0 --pdb" in one process
ARGS ?=

# The flavours of setup.py. Each has its own environment, so none overwrites another's modules.
FLAVOUR = release
build_release = env
build_debug = env UVSOCK_DEBUG=1
build_sanitize = env UVSOCK_SANITIZE=1
run_release = env
run_debug = env PYTHONMALLOC=debug PYTHONDEVMODE=1
# The runtime has to be the first library in the process, and Python has to allocate where it can
# see it. CPython frees little at exit, so leaks are not looked for here. A size that no machine has
# is a MemoryError in the tests, where the sanitizer would end the process.
run_sanitize = env PYTHONMALLOC=malloc ASAN_OPTIONS=detect_leaks=0:allocator_may_return_null=1 \
	LD_PRELOAD="$$($(CC) -print-file-name=libasan.so) $$($(CC) -print-file-name=libubsan.so)"
# Only the release build is imported from src: its Python files can be edited without a build.
install = $(if $(filter release,$(FLAVOUR)),--editable,--force-reinstall) .

# A process for each processor. Whoever is done first takes tests of another: files differ too much
# in how long they take to be shared out whole.
beside = --numprocesses auto --dist worksteal

BIN = $(VENV)/bin
sources := $(shell find src -name '*.py' -o -name '*.py[ix]' -o -name '*.pxd' -o -name '*.h')

# Prints the requirements named by its arguments, so that pyproject.toml is the only list of them.
define requirements
import sys, tomllib
project = tomllib.load(open("pyproject.toml", "rb"))
lists = dict(project["project"]["optional-dependencies"])
lists["build"] = project["build-system"]["requires"]
lists["run"] = project["project"]["dependencies"]
print(*(line for name in sys.argv[1:] for line in lists[name]), sep="\n")
endef
export requirements
define too_old
import sys
if sys.version_info < (3, 11):
    version = ".".join(map(str, sys.version_info[:2]))
    sys.exit("uvsock needs Python 3.11 or newer, not %s. Name one: make PYTHON=python3.13" % version)
endef
export too_old

.PHONY: help demo test others build lint debug-test sanitize-test coverage bench annotate dist clean

help:
	@echo "make demo           build, then run the demo: echo servers and clients, plain and TLS"
	@echo "make test           build, then run all tests (ARGS='-k tls' for some of them)"
	@echo "make others         the tests of asyncio, uvloop and libraries, on uvsock's event loop"
	@echo "make lint           ruff, cython-lint, mypy, stubtest, codespell"
	@echo "make debug-test     the tests on a build with checks and C assertions"
	@echo "make sanitize-test  the tests on a build with address and undefined-behaviour sanitizers"
	@echo "make coverage       line coverage of the Python and Cython code"
	@echo "make bench          the benchmarks (ARGS=--quick, ARGS=micro; ARGS=--help for more)"
	@echo "make annotate       an HTML page per module: where the compiled code calls into Python"
	@echo "make dist           dist/: the sdist, and the wheel built from it"
	@echo "make clean          remove all that was made"
	@echo "Variables: PYTHON=$(PYTHON) VENV=$(VENV)"

demo: build
	@$(BIN)/python examples/demo.py

test: build
	@echo "Testing the $(FLAVOUR) build with $$($(BIN)/python --version)"
	@UVSOCK_TEST_BUILD=$(FLAVOUR) $(run_$(FLAVOUR)) $(BIN)/python -m pytest -q $(beside) $(ARGS)

others: build
	@$(BIN)/python -m tests.others $(ARGS)

build: $(VENV)/.built

$(VENV)/.built: $(VENV)/.ready setup.py $(sources)
	@echo "Building uvsock ($(FLAVOUR))"
	@$(build_$(FLAVOUR)) $(BIN)/python -m pip install --quiet --no-deps --no-build-isolation $(install)
	@touch $@

# --clear: an environment half made, or made by another Python, does not survive.
$(VENV)/.ready: pyproject.toml
	@$(PYTHON) -c "$$too_old"
	@echo "Setting up $(VENV) with $$($(PYTHON) --version)"
	@$(PYTHON) -m venv --clear $(VENV)
	@$(BIN)/python -c "$$requirements" build run test >$(VENV)/requirements.txt
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -r $(VENV)/requirements.txt
	@touch $@

$(VENV)/.tools: $(VENV)/.ready
	@echo "Installing the linters and other tools into $(VENV)"
	@$(BIN)/python -c "$$requirements" dev >$(VENV)/requirements-dev.txt
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -r $(VENV)/requirements-dev.txt
	@touch $@

$(VENV)/.bench: $(VENV)/.ready
	@echo "Installing what the benchmarks compare with into $(VENV)"
	@$(BIN)/python -c "$$requirements" bench >$(VENV)/requirements-bench.txt
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -r $(VENV)/requirements-bench.txt
	@touch $@

# Without npm there is no Bun, and the tables say so.
build/npm/node_modules:
	@mkdir -p build/npm
	@if [ -z "$$UVSOCK_BUN" ] && ! command -v bun >/dev/null && command -v npm >/dev/null; then \
		npm install --prefix build/npm --no-save --no-audit --no-fund --loglevel=error bun@1.4.5; fi

bench: build $(VENV)/.bench build/npm/node_modules
	@$(BIN)/python -m benchmarks $(ARGS)

lint: build $(VENV)/.tools
	@echo "ruff";        $(BIN)/ruff check --quiet .
	@echo "ruff format"; $(BIN)/ruff format --quiet --check .
	@echo "cython-lint"; PATH="$(abspath $(BIN)):$$PATH" cython-lint src tests benchmarks
	@echo "mypy";        $(BIN)/mypy src/uvsock examples benchmarks $(wildcard tests/typing)
	@echo "stubtest";    $(BIN)/python -m mypy.stubtest uvsock --mypy-config-file pyproject.toml
	@echo "codespell";   $(BIN)/codespell

debug-test:
	@$(MAKE) --no-print-directory FLAVOUR=debug VENV=$(VENV)-debug test

sanitize-test:
	@$(MAKE) --no-print-directory FLAVOUR=sanitize VENV=$(VENV)-sanitize test

# In a copy of the tree, because coverage.py looks for the generated C beside the .pyx.
coverage: build $(VENV)/.tools
	@rm -rf build/coverage
	@mkdir -p build/coverage
	@cp -R src tests docs examples benchmarks README.md pyproject.toml setup.py build/coverage
	@find build/coverage/src -name '*.so' -exec rm {} +
	@echo "Building uvsock (coverage)"
	@cd build/coverage && UVSOCK_COVERAGE=1 $(abspath $(BIN))/python setup.py --quiet build_ext --inplace
	@cd build/coverage && PYTHONPATH=src $(abspath $(BIN))/coverage run -m pytest -q $(ARGS)
	@cd build/coverage && $(abspath $(BIN))/coverage report --skip-empty

annotate: $(VENV)/.ready
	@UVSOCK_ANNOTATE=1 $(BIN)/python setup.py --quiet --version >/dev/null
	@ls build/release/cython/src/uvsock/*.html

dist: $(VENV)/.tools
	@rm -rf dist
	@$(BIN)/python -m build --outdir dist .

clean:
	rm -rf build dist $(VENV) $(VENV)-debug $(VENV)-sanitize src/*.egg-info
	find src -name '*.so' -exec rm {} +
