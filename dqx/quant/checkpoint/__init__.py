"""Quantized checkpoints: one folder, written at once or block by block."""

#: What the name of a folder ends with that is not complete.
PARTIAL = ".partial"
