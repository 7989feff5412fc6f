"""The papers' experiments: ``python -m benchmarks.papers --help``."""
