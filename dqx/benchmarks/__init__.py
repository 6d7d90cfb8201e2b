"""Benchmarks that a user can run: `python -m dqx.benchmarks.quantize`, `.evaluate`, `.memory`, `.sweep`, `.activations`."""
