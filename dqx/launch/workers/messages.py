"""What the processes of a run tell each other about it: files in a folder that lives as long as they do.

job.yaml       what is to be run (launch.py)
0.sign, ...    how far each process is (`dqx/common/heartbeat.py`)
0.json, ...    why a process gave up
deaths.json    how processes ended, as accelerate's launcher saw it
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import yaml

from dqx.config.compose import restored
from dqx.config.origin import Origin
from dqx.config.schema import Config

JOB, DEATHS = "job.yaml", "deaths.json"


@dataclass(frozen=True)
class SharedRun:
    """A run, and how many processes share it."""

    config: Config
    folder: Path  # of the run
    origin: Origin
    processes: int
    logging: dict[str, Any] = field(default_factory=dict)  # for logging.config.dictConfig

    def write(self, folder: Path) -> None:
        text = yaml.safe_dump(asdict(self) | {"folder": str(self.folder)}, allow_unicode=True)
        (folder / JOB).write_text(text, encoding="utf-8")

    @classmethod
    def read(cls, folder: Path) -> SharedRun:
        values = yaml.safe_load((folder / JOB).read_text(encoding="utf-8"))
        return cls(
            restored(values["config"]),
            Path(values["folder"]),
            Origin(**values["origin"]),
            values["processes"],
            values["logging"],
        )


@dataclass(frozen=True)
class Report:
    """Why a process gave up."""

    rank: int
    reason: str
    traceback: str
    problems: Sequence[str] = ()  # mistakes in the configuration, or in the files it names
    lost: bool = False  # only because another process was gone
    time: float = field(default_factory=time.time)

    def write(self, folder: Path) -> None:
        new = folder / f"{self.rank}.new"
        new.write_text(json.dumps(asdict(self)), encoding="utf-8")
        new.replace(folder / f"{self.rank}.json")


def reports(folder: Path, processes: int) -> list[Report]:
    """What processes had to say, the earliest first."""
    paths = [folder / f"{rank}.json" for rank in range(processes)]
    found = [Report(**json.loads(path.read_text(encoding="utf-8"))) for path in paths if path.exists()]
    return sorted(found, key=lambda report: report.time)


@dataclass(frozen=True)
class Death:
    """How a process ended: its exit code, or the signal that ended it as a negative number."""

    rank: int
    code: int


def write_deaths(folder: Path, deaths: Sequence[Death]) -> None:
    (folder / DEATHS).write_text(json.dumps([asdict(death) for death in deaths]), encoding="utf-8")


def deaths(folder: Path) -> list[Death]:
    """How processes ended, the first one first."""
    path = folder / DEATHS
    return [Death(**death) for death in json.loads(path.read_text(encoding="utf-8"))] if path.exists() else []
