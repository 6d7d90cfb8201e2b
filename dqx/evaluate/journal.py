"""The finished documents of an evaluation that is not complete, so that a killed run goes on where it stopped.

    d3486ae9 {"of": {"seed": 0, ...}}                                             the facts the evaluation depends on
    51ab0c77 {"document": "nano_facts/3", "text": "9f...", "responses": [...]}    one line per finished document

Each line begins with a checksum over it and over the name of the evaluation, so a line that is cut, damaged or from
elsewhere costs its document alone. Each call of `append` ends with an `fsync`. Each process of a run has a file of its
own, and all of them are read, however many processes go on.
"""

from __future__ import annotations

import json
import logging
import os
import zlib
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from io import FileIO
from pathlib import Path
from typing import Any

from dqx.common.digest import digest
from dqx.common.files import jsonable

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Line:
    """A finished document: what the model answered to its requests, and what was spent since the line before."""

    document: str
    text: str  # digest of its requests' text
    responses: list[Any]
    spent: dict[str, int] = field(default_factory=dict)  # forwards, tokens, nanoseconds, ...
    notes: list[str] = field(default_factory=list)  # what a reader of the result should know


@dataclass
class Past:
    """What earlier sessions left."""

    lines: dict[str, Line] = field(default_factory=dict)  # by document
    spent: Counter[str] = field(default_factory=Counter)  # nanoseconds: of the process that took longest
    notes: list[str] = field(default_factory=list)


class Journal:
    """The journal of one evaluation: `read` once, `append` as documents finish, `remove` when its result is kept.

    `path` is the evaluation's place without a suffix, `rank` this process's number. A file that cannot be written is
    told to `warn` once, and the evaluation goes on; what is not on the disk yet is tried again with the next documents.
    """

    def __init__(
        self, path: Path, facts: Mapping[str, Any], rank: int = 0, warn: Callable[[str], object] = log.warning
    ):
        self.path, self.facts, self.warn = path.with_name(f"{path.name}.journal.{rank}"), facts, warn
        self.seed = zlib.crc32(digest(facts).encode())
        self._file: FileIO | None = None
        self._waiting: list[bytes] = []  # for the disk to take them
        self._told = False

    def read(self) -> Past:
        """Everything that earlier sessions finished, of all processes. Journals of other evaluations are removed."""
        past = Past()
        for path in self._files():
            lines = self._lines(path)
            if lines is None:
                self.warn(f"{path} is of an evaluation with other settings; it was not used and is removed")
                path.unlink()
                continue
            time = sum(line.spent.pop("nanoseconds", 0) for line in lines)
            past.spent["nanoseconds"] = max(past.spent["nanoseconds"], time)
            for line in lines:
                past.lines[line.document] = line
                past.spent.update(line.spent)
                past.notes += [note for note in line.notes if note not in past.notes]
        return past

    def append(self, lines: Sequence[Line]) -> None:
        """Keep finished documents; they are on the disk when this returns."""
        self._waiting += [_encoded(asdict(line), self.seed) for line in lines]
        try:
            self._write(self._file or self._open())
        except OSError as error:
            if not self._told:
                self._told = True
                self.warn(
                    f"{self.path} cannot be written ({error}): what is finished from now on is lost if the run ends; "
                    "tried again with every document"
                )

    def close(self) -> None:
        """Nothing more will be appended."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def remove(self) -> None:
        """The evaluation is complete, or was wanted afresh."""
        self.close()
        for path in self._files():
            path.unlink(missing_ok=True)

    def _files(self) -> list[Path]:
        return sorted(self.path.parent.glob(f"{self.path.stem}.*"))

    def _open(self) -> FileIO:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._file = file = self.path.open("ab", buffering=0)
        cut = file.tell() > 0  # what a killed run was writing ends here
        self._waiting.insert(0, b"\n" if cut else _encoded({"of": jsonable(self.facts)}))
        return file

    def _write(self, file: FileIO) -> None:
        """Write what waits, all of it or nothing."""
        end, rest = os.fstat(file.fileno()).st_size, memoryview(b"".join(self._waiting))
        try:
            while rest:
                rest = rest[file.write(rest) :]
            os.fsync(file.fileno())
        except OSError:
            file.truncate(end)
            raise
        self._waiting.clear()

    def _lines(self, path: Path) -> list[Line] | None:
        """The undamaged lines of a file; None where its header has other facts."""
        header, *rest = path.read_bytes().split(b"\n")
        about = _decoded(header)
        if about is not None and about.get("of") != self.facts:
            return None
        written = [line for line in rest if line]
        lines = [Line(**fields) for line in written if (fields := _decoded(line, self.seed)) is not None]
        if len(lines) < len(written):
            self.warn(f"{len(written) - len(lines)} of {len(written)} lines of {path} are damaged and were not used")
        return lines


def _encoded(value: Any, seed: int = 0) -> bytes:
    text = json.dumps(jsonable(value), allow_nan=False).encode()
    return b"%08x %s\n" % (zlib.crc32(text, seed), text)


def _decoded(line: bytes, seed: int = 0) -> Any:
    """The value in a line; None where its checksum does not fit."""
    checksum, _, text = line.partition(b" ")
    return json.loads(text) if checksum == b"%08x" % zlib.crc32(text, seed) else None
