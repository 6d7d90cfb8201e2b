"""What files hold, as digests of every byte: read once, remembered until the file changes.

A digest is a tree of BLAKE2b: pieces of 32 MiB are hashed side by side, then their digests in order. It is remembered
below the user's cache folder with the file's path, size, inode and times of change (of its content and of its inode,
which no program can set back), and only once these are old enough that a further change would show in them; small
files are read again. Files of the hub's cache need no reading: a file's name there is the hub's own SHA-256 of it.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

from tqdm import tqdm

from dqx.common.files import write_json
from dqx.common.heartbeat import beat

PIECE = 32 * 2**20  # bytes
READERS = 8  # pieces in memory at a time
SMALL = 2**18  # bytes, up to which reading a file is as quick as remembering it
LARGE = 10**9  # bytes to read, from which on a progress bar tells of it
SETTLED_NS = 2 * 10**9  # age of a file's times, from which on a digest is remembered
HUB_BLOB = re.compile(r"[0-9a-f]{64}")


def file_digests(paths: Sequence[Path]) -> list[str]:
    """64 hex digits for the content of each file. Raises OSError for one that cannot be read."""
    statuses = {path: _status(path) for path in paths}
    digests = {path: _known(path, status) for path, status in statuses.items()}
    unread = [path for path, digest in digests.items() if digest is None]
    pieces = [(path, start) for path in unread for start in range(0, max(1, statuses[path][0]), PIECE)]
    total = sum(statuses[path][0] for path in unread)
    trees = {path: hashlib.blake2b(digest_size=32) for path in unread}
    with (
        ThreadPoolExecutor(READERS) as pool,
        tqdm(total=total, unit="B", unit_scale=True, desc="hashing files", disable=total < LARGE) as bar,
    ):
        each = pool.map if total > PIECE else map  # a thread costs more than hashing a few small files
        for (path, _), digest in zip(pieces, each(_piece, pieces), strict=True):
            trees[path].update(digest)
            bar.update(min(PIECE, total - bar.n))
            beat()
    for path in unread:
        digests[path] = trees[path].hexdigest()
        _remember(path, statuses[path], trees[path].hexdigest())
    return [str(digests[path]) for path in paths]


def _piece(piece: tuple[Path, int]) -> bytes:
    path, start = piece
    with path.open("rb") as file:
        file.seek(start)
        return hashlib.blake2b(file.read(PIECE), digest_size=32).digest()


def _status(path: Path) -> list[int]:
    status = path.stat()
    return [status.st_size, status.st_ino, status.st_dev, status.st_mtime_ns, status.st_ctime_ns]


def _known(path: Path, status: list[int]) -> str | None:
    """The digest of a file that need not be read, or None."""
    if status[0] <= SMALL:
        return None
    real = path.resolve()
    if path.is_symlink() and real.parent.name == "blobs" and HUB_BLOB.fullmatch(real.name):
        return real.name
    with suppress(OSError, ValueError, KeyError, TypeError):
        entry = json.loads(_place(real).read_text(encoding="utf-8"))
        if entry["path"] == str(real) and entry["status"] == status:
            return str(entry["digest"])
    return None


def _remember(path: Path, status: list[int], digest: str) -> None:
    if status[0] <= SMALL or status != _status(path) or time.time_ns() - max(status[3:]) < SETTLED_NS:
        return
    real = path.resolve()
    with suppress(OSError):  # a home that cannot be written costs reading again
        write_json(_place(real), {"path": str(real), "status": status, "digest": digest})


def _place(path: Path) -> Path:
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(home) / "dqx" / "digests" / f"{hashlib.sha256(os.fsencode(path)).hexdigest()[:32]}.json"
