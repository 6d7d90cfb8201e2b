"""Benchmarks that a user can run: `python -m dqx.benchmarks.quantize` and `python -m dqx.benchmarks.evaluate`."""
