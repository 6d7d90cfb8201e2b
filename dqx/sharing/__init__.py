"""Runs that are handed on: `dqx share RUN` writes one file, `python launch.py --from FILE` runs it again elsewhere.

bundle.py      the file: a zip of JSON, YAML and text with a checksum of every member, and what is refused
private.py     what belongs to one machine or person, and what stands in its place
share.py       a run's folder -> a bundle
replay.py      a bundle -> the configuration of a run, with overrides
against.py     before the run: what differs here; after it: how its results compare
"""
