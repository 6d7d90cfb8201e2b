"""Benchmarks that a user can run, `python -m dqx.benchmarks.NAME`.

quantize, throughput, evaluate, temperature, memory, sweep, startup, activations, gpu; README.md has their figures.
"""
