"""What became of the runs of one launch, in whichever process or on whichever machine they ran.

Nothing is told through memory: in a run's folder `results.json` stands for a finished run, `failure.json` says why a
run ended without one, and a run that left neither was killed or never started.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

FILE = "failure.json"

#: The run folders of this process's launch, in order; the sweeper and single runs fill it in.
launched: list[Path] = []


@dataclass(frozen=True)
class Failure:
    """Why a run ended without results."""

    reason: str
    refused: bool = False  # a mistake in the configuration or the files it names, told before anything heavy started

    def write(self, folder: Path) -> None:
        from dqx.store import write_json

        write_json(folder / FILE, asdict(self))


class RunFailed(Exception):
    """A run has failed and said so. Stands for the error itself, which another process may be unable to unpickle."""


def failures(folders: Sequence[Path]) -> dict[Path, Failure]:
    """The runs without results, and why."""
    found = {}
    for folder in folders:
        if (folder / FILE).exists():
            found[folder] = Failure(**json.loads((folder / FILE).read_text(encoding="utf-8")))
        elif not (folder / "results.json").exists():
            found[folder] = Failure("it was killed" if folder.exists() else "it did not start")
    return found
