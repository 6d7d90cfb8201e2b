"""Benchmarks that a user can run, `python -m dqx.benchmarks.NAME`: quantize, evaluate, memory, sweep, activations."""
