"""Digests: of plain values, of files, of the sources of dqx."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from dqx.common.content import file_digests
from dqx.common.files import PACKAGE

#: Files beside the sources that decide nothing: weights have a fingerprint, the rest is for people.
UNREAD = (".safetensors", ".md", ".png", ".csv")


def code_version(parts: Sequence[str], package: Path | None = None) -> str:
    """Hash of the files of dqx, by name or below folders, that decide what a result is."""
    root = package or PACKAGE
    files = (p for name in parts for p in ((root / name).rglob("*") if (root / name).is_dir() else [root / name]))
    return files_digest((p for p in files if "__pycache__" not in p.parts and p.suffix not in UNREAD), root)


def digest(value: Any) -> str:
    """Hash of what JSON can hold."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, allow_nan=False).encode()).hexdigest()


def files_digest(paths: Iterable[Path], root: Path | None = None) -> str:
    """Hash over the names of files, below `root` where it is given, and every byte of them."""
    files = sorted({path for path in paths if path.is_file()})
    names = [str(path.relative_to(root)) if root else path.name for path in files]
    return digest(list(zip(names, file_digests(files), strict=True)))[:20]
