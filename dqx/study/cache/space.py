"""How much room the cache takes, and what makes way when it is short: what was not used for longest.

Large files and folders go first: they can be made again and hold nearly all the bytes. Results, which are small and
cost most, go only when nothing else is left. What a run computes or reads at this moment, whose lock it holds, stays.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock, Timeout

from dqx.quant.checkpoint import PARTIAL
from dqx.study.cache.owned import artifacts
from dqx.study.cache.store import Store


@dataclass(frozen=True)
class Entry:
    """A file or folder of the cache."""

    path: Path
    kind: str  # the folder it is in: results, quantized, ...
    bytes: int
    used: float  # seconds since 1970

    @property
    def heavy(self) -> bool:
        return self.path.suffix != ".json"

    @property
    def lock(self) -> Path:
        """The lock of the artefact that it belongs to."""
        stem = self.path.name.partition(".journal.")[0]
        for suffix in (".json", ".safetensors", PARTIAL):
            stem = stem.removesuffix(suffix)
        return self.path.with_name(f"{stem}.lock")


def entries(folder: Path) -> list[Entry]:
    """All artefacts of a cache but locks and what is being written, by kind and name."""
    there = []
    for path in sorted(path for path in artifacts(folder) if not path.name.startswith(".")):
        with suppress(FileNotFoundError):  # a run that goes on has removed it by now
            if path.suffix != ".lock":
                size = sum(p.stat().st_size for p in path.rglob("*")) if path.is_dir() else path.stat().st_size
                there.append(Entry(path, path.parent.name, size, path.stat().st_mtime))
    return there


def make_room(store: Store, needed: int, limit: int) -> bool:
    """Remove entries until `needed` more bytes fit into `limit`. False, and nothing removed, where they never will."""
    if needed > limit:
        return False
    there = entries(store.folder)
    remove_oldest((e for e in there if ".journal." not in e.path.name), total(there) + needed - limit)
    return True


def remove_oldest(candidates: Iterable[Entry], excess: float) -> tuple[list[Entry], int]:
    """Remove entries until `excess` bytes are free, in the order above. Returns those removed; how many are in use."""
    removed: list[Entry] = []
    freed = in_use = 0
    for entry in sorted(candidates, key=lambda entry: (not entry.heavy, entry.used)):
        if freed >= excess:
            break
        if remove(entry):
            removed.append(entry)
            freed += entry.bytes
        else:
            in_use += 1
    return removed, in_use


def remove(entry: Entry) -> bool:
    """Remove an entry; False where a run holds its lock."""
    try:
        with FileLock(entry.lock, blocking=False):
            if entry.path.is_dir():
                shutil.rmtree(entry.path, ignore_errors=True)
            else:
                entry.path.unlink(missing_ok=True)
    except Timeout:
        return False
    return True


def total(there: Iterable[Entry]) -> int:
    """Bytes of all entries."""
    return sum(entry.bytes for entry in there)
