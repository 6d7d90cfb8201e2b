"""One run, from its configuration to its record: `run.py` is the file to read first."""
