"""Measurements beside a baseline in the same run; each module is a command: `python -m benchmarks.NAME`."""
