"""Digests: of plain values, of files, of the sources of dqx."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from dqx.common.files import PACKAGE

#: Files beside the sources that decide nothing: weights have a fingerprint, the rest is for people.
UNREAD = (".safetensors", ".md", ".png", ".csv")


def code_version(parts: Sequence[str], package: Path | None = None) -> str:
    """Hash of the files of dqx, by name or below folders, that decide what a result is."""
    root = package or PACKAGE
    files = (p for name in parts for p in ((root / name).rglob("*") if (root / name).is_dir() else [root / name]))
    return _content((p for p in files if "__pycache__" not in p.parts and p.suffix not in UNREAD), root)


def digest(value: Any) -> str:
    """Hash of what JSON can hold."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, allow_nan=False).encode()).hexdigest()


def _content(paths: Iterable[Path], root: Path | None = None) -> str:
    """Hash over names and bytes of files."""
    content = hashlib.sha256()
    for path in sorted(set(paths)):
        if path.is_file():
            name = str(path.relative_to(root)) if root else path.name
            content.update(f"{name}\0{path.stat().st_size}\0".encode())
            content.update(path.read_bytes())
    return content.hexdigest()[:20]


def _listing(root: Path) -> str:
    """Hash over relative names, sizes and times of change of all files in a folder."""
    content = hashlib.sha256()
    for path in sorted(root.rglob("*")):
        if path.is_file():
            stat = path.stat()
            content.update(f"{path.relative_to(root)}\0{stat.st_size}\0{stat.st_mtime_ns}\n".encode())
    return content.hexdigest()[:20]
