"""A disk that is full: what was finished stays, the message says what helps, and the same command goes on."""

from __future__ import annotations

import errno
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from safetensors import SafetensorError

from dqx.config.compose import compose, resolve
from dqx.config.schema import CONF_DIR, Config
from dqx.evaluate.journal import Journal, Line
from dqx.record.folder import RunFolder
from dqx.record.outcomes import why
from dqx.study.run import run

ROOT = CONF_DIR.parent
SMALL = [
    *("method=rtn", "bits=w3a16", "task=nano_facts", "task.limit=4", "task.suite.nano_facts.mc_samples=2"),
    *("likelihood.batch_tokens=64", "outliers.samples=0", "fidelity.samples=0", "wandb.mode=disabled"),
]


class Disk:
    """A disk that takes `room` more writes below `folder`."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch):
        self.folder, self.room = Path("/nowhere"), 0
        self.refused: list[str] = []
        real = os.fsync

        def fsync(descriptor: int) -> None:
            name = os.readlink(f"/proc/self/fd/{descriptor}")
            if Path(name).is_relative_to(self.folder):
                self.room -= 1
                if self.room < 0:
                    self.refused.append(name)
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            real(descriptor)

        monkeypatch.setattr(os, "fsync", fsync)

    def fill(self, folder: Path, room: int = 0) -> None:
        self.folder, self.room = folder, room

    def clear(self) -> None:
        self.folder = Path("/nowhere")


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> Iterator[Disk]:
    return Disk(monkeypatch)


def configured(folder: Path) -> Config:
    return resolve(compose([*SMALL, f"cache_dir={folder / 'cache'}"]))


def outcome(folder: Path) -> object:
    return [
        [(row.doc_id, row.score, row.log_likelihoods) for row in side["nano_facts"].documents]
        for record in [RunFolder(folder).read()]
        for side in (record.full_precision, record.quantized)
    ]


def test_a_record_that_finds_no_room_costs_no_result(tmp_path: Path, disk: Disk) -> None:
    config, folder = configured(tmp_path), tmp_path / "run"
    disk.fill(folder / "documents")
    with pytest.raises(OSError, match="No space left") as full:
        run(config, folder)
    assert str(folder / "documents" / "nano_facts.jsonl") in str(full.value)
    assert not (folder / "results.json").exists()
    assert not list((folder / "documents").iterdir())  # a half written file would only take space
    disk.clear()
    found = run(config, folder)
    assert {source for side in found.sources.values() for source in side.values()} == {"reused"}


@pytest.mark.parametrize("room", [0, 1, 3])
def test_where_nothing_at_all_finds_room_the_journal_keeps_what_it_could(tmp_path: Path, disk: Disk, room: int) -> None:
    """Neither the result of a task nor the record could be kept: the documents before that were."""
    config, folder = configured(tmp_path), tmp_path / "run"
    undisturbed = tmp_path / "undisturbed"
    run(configured(undisturbed), undisturbed / "run")
    disk.fill(tmp_path / "cache" / "results", room)
    record = run(config, folder)
    told = [warning for warning in record.warnings if "No space left" in warning]
    assert any("what is finished from now on is lost" in warning for warning in told)
    assert any("could not be kept" in warning for warning in told)
    disk.clear()
    kept = sum(path.read_text().count('"responses"') for path in tmp_path.glob("cache/results/*.journal.*"))
    assert bool(kept) == bool(room)
    (folder / "results.json").unlink()
    again = run(config, folder)
    sides = (again.full_precision["nano_facts"].notes, again.quantized["nano_facts"].notes)
    continued = [int(note.split()[1]) for notes in sides for note in notes if note.startswith("continued: ")]
    assert sum(continued) == kept
    assert outcome(folder) == outcome(undisturbed / "run")


def test_a_journal_goes_on_when_there_is_room_again(tmp_path: Path, disk: Disk) -> None:
    told: list[str] = []
    journal = Journal(tmp_path / "task-0123", {"seed": 0}, warn=told.append)
    lines = [Line(f"task/{i}", "", [float(i)], {"n_forwards": 1}) for i in range(5)]
    disk.fill(tmp_path, room=1)
    journal.append(lines[:1])
    before = journal.path.read_bytes()
    for line in lines[1:4]:
        journal.append([line])
        assert journal.path.read_bytes() == before  # nothing half written
    assert len(told) == 1
    assert "No space left" in told[0]
    disk.clear()
    journal.append(lines[4:])
    journal.close()
    past = Journal(tmp_path / "task-0123", {"seed": 0}).read()
    assert list(past.lines.values()) == lines
    assert past.spent["n_forwards"] == 5


def test_the_reason_says_what_helps() -> None:
    for error in (
        OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "/data/runs/results.json"),
        OSError(errno.EDQUOT, os.strerror(errno.EDQUOT)),
        SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
    ):
        told = why(error)
        assert told.startswith("the disk is full (")
        assert "free some space on it" in told
        assert "`dqx cache prune" in told
        assert "the same command goes on from here" in told
    assert "/data/runs/results.json" in why(OSError(errno.ENOSPC, "No space left", "/data/runs/results.json"))
    assert "full" not in why(OSError(errno.EACCES, os.strerror(errno.EACCES), "/data"))


FULL = """
import errno, os, sys
real = os.fsync
def fsync(descriptor):
    if "/run" in os.readlink(f"/proc/self/fd/{descriptor}"):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    real(descriptor)
os.fsync = fsync
from dqx.launch.main import main
sys.argv[0] = "launch.py"
sys.exit(main())
"""


def test_the_command_tells_it_without_tracebacks(tmp_path: Path) -> None:
    """Not even failure.json can be written."""
    arguments = [*SMALL, f"hydra.run.dir={tmp_path / 'run'}", f"cache_dir={tmp_path / 'cache'}"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", FULL, *arguments], capture_output=True, text=True, cwd=ROOT, env=environment
    )
    assert done.returncode == 1, done.stderr
    assert "Traceback" not in done.stderr
    assert re.search(r"the run failed: the disk is full \(OSError: .*No space left on device: '.*/run/", done.stderr)
    assert "the same command goes on from here" in done.stderr
    assert not (tmp_path / "run" / "failure.json").exists()
