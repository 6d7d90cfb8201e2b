"""Which folders are caches of dqx, and which of their files are its own: nothing else is ever removed.

A file `dqx-cache` marks a cache. The first run that keeps something in an empty folder writes it; a folder of an
earlier dqx, which holds nothing but artefacts, is taken over. Any other folder is refused.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from dqx.common.files import write_text
from dqx.study.cache.key import KINDS

MARKER = "dqx-cache"
TEXT = """This folder is a cache of dqx: what runs have computed and others need not compute again.
It may be deleted while no run is going on. `dqx cache` lists, verifies and prunes it.
"""
#: NAME-DIGEST with what the store puts behind it: a lock, JSON, tensors, a journal, an unfinished folder.
NAME = re.compile(r"\.?[\w.+-]+-[0-9a-f]{20}(\.json|\.safetensors|\.lock|\.partial|\.journal\.\d+)?(\.[0-9a-f]{1,32})?")


def artifacts(folder: Path) -> Iterator[Path]:
    """The files and folders of a cache that dqx has made, by kind and name; links are none."""
    for kind in KINDS:
        inside = folder / kind
        if inside.is_dir() and not inside.is_symlink():
            yield from sorted(p for p in inside.iterdir() if NAME.fullmatch(p.name) and not p.is_symlink())


def cache_problem(folder: Path) -> str | None:
    """Why a folder is no place for a cache, or None."""
    if not folder.exists() or (folder / MARKER).is_file():
        return None
    if not folder.is_dir():
        return "it is a file; give a folder"
    ours = set(artifacts(folder))
    for path in folder.iterdir():
        inside = list(path.iterdir()) if path.name in KINDS and path.is_dir() else [path]
        if foreign := [p for p in inside if p not in ours]:
            return (
                f"it holds {foreign[0].relative_to(folder)}, which is not dqx's, and nothing marks it as a cache; give "
                "a folder of its own, empty or not there yet"
            )
    return None


def mark(folder: Path) -> None:
    """Make a folder a cache. Raises OSError where it cannot be written."""
    if not (folder / MARKER).exists():
        write_text(folder / MARKER, TEXT)
