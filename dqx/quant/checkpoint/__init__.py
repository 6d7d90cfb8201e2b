"""Quantized checkpoints: one folder, written at once or block by block."""
