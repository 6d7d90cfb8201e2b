"""Benchmarks that a user can run: `python -m dqx.benchmarks.quantize`, `.evaluate` and `.memory`."""
