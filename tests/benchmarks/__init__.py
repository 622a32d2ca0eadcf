"""Benchmarks: programs, each run as `python -m tests.benchmarks.NAME [--quick] [--json FILE]`."""
