"""The benchmarks: ``python -m benchmarks --help``."""
