"""Files: where the package lies, and writing that leaves the old content or all of the new."""

from __future__ import annotations

import errno
import json
import math
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any
from uuid import uuid4

PACKAGE = Path(__file__).parents[1]
ASSETS = PACKAGE / "assets"


def file_name(name: str) -> str:
    """A task's name as a file name: what a file system might not take becomes `-`."""
    return re.sub(r"[^\w.+-]", "-", name) or "-"


def jsonable(value: Any) -> Any:
    """`value` as plain lists, dicts and scalars; numbers that JSON lacks as "NaN", "Infinity", "-Infinity".

    Raises TypeError for what has no place in JSON.
    """
    if value is None or isinstance(value, (str, bool, int)):
        return value
    if isinstance(value, float):
        if math.isfinite(value):
            return value
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    if is_dataclass(value) and not isinstance(value, type):
        return {f.name: jsonable(getattr(value, f.name)) for f in fields(value)}
    if isinstance(value, Mapping):
        return {str(k): jsonable(v) for k, v in value.items()}
    if isinstance(value, (Sequence, set, frozenset)) and not isinstance(value, (bytes, bytearray)):
        return [jsonable(v) for v in (sorted(value) if isinstance(value, (set, frozenset)) else value)]
    if isinstance(value, Path):
        return str(value)
    if hasattr(value, "item"):  # numpy and torch scalars
        return jsonable(value.item())
    raise TypeError(f"{type(value).__name__} has no place in JSON")


def write_json(path: Path, value: Any) -> None:
    """Write JSON atomically."""
    write_text(path, json.dumps(jsonable(value), indent=1, ensure_ascii=False, allow_nan=False) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write a text so that readers see the old content or all of the new, even if the machine stops in between.

    Half a surrogate pair, which UTF-8 has no bytes for, becomes its escape (in JSON the same string).
    """
    write_bytes(path, text.encode("utf-8", "backslashreplace"))


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file in the same way. An OSError names it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{uuid4().hex[:12]}")
    try:
        with temporary.open("wb") as f:
            f.write(content)
            f.flush()
            os.fsync(f.fileno())
        os.replace(temporary, path)
    except OSError as error:
        if error.errno is not None:
            error.filename = str(path)
        raise
    finally:
        temporary.unlink(missing_ok=True)


def disk_is_full(error: BaseException) -> bool:
    """Whether an error says that a disk is full, or a quota used up; libraries say so in words of their own."""
    full = (errno.ENOSPC, errno.EDQUOT)
    return getattr(error, "errno", None) in full or any(os.strerror(number) in str(error) for number in full)
