"""`dqx mirror RUNS...`: the copies in Weights & Biases made again from run folders.

    dqx mirror runs/2026-11-20                          figures, and what a disk, a network or a kill has left out
    dqx mirror runs --entity our-team --project paper   offline runs to another project, after `wandb login`

A record is written to the run of W&B that it had before, so doing it twice changes nothing. Quantized weights are not
in the run folder; started again with `wandb.checkpoint=true`, the run adds them to its run of W&B.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from rich.console import Console

from dqx.common.files import write_json
from dqx.record.folder import Record, RunFolder
from dqx.report.terminal import errors_end, print_copy, print_lines
from dqx.report.wandb import DEFAULTS, copy_run, panels
from dqx.report.wandb.identity import identity
from dqx.report.wandb.login import MODES

SWEEP = "multirun.yaml"  # what Hydra leaves in the folder of a sweep


def again(path: Path, **changes: Any) -> Record:
    """Write the copy of the run in `path` anew, with these of its `wandb` settings changed (None: as they were).

    Figures are drawn, but for `wandb.figures=false`. What came of it is noted in results.json, of which nothing else
    changes. Raises OSError or ValueError for a folder without a finished run.
    """
    record = RunFolder(path).read()
    given = [*record.settings.wandb.items(), *changes.items()]
    settings = {"figures": True} | {key: value for key, value in given if value is not None}
    group = path.parent.name if (path.parent / SWEEP).is_file() else None
    known = record.mirror.get("id") or identity(record)
    record.mirror = copy_run(record, path, settings, group, run_id=known)
    file = path / "results.json"
    write_json(file, json.loads(file.read_text(encoding="utf-8")) | {"mirror": record.mirror})
    return record


def finished(folders: Iterable[str]) -> list[Path]:
    """The folders of finished runs below the given ones. Raises ValueError where there is none."""
    runs = sorted({path.parent for folder in folders for path in Path(folder).rglob("results.json")})
    if not runs:
        raise ValueError(f"no finished run below {', '.join(folders)}")
    return runs


def main() -> None:
    """The command line. Exit code 1 where a copy or the view could not be written, 2 for folders without a run."""
    parser = argparse.ArgumentParser(
        description="Make the copies in Weights & Biases again, from run folders.",
        epilog="Example: dqx mirror runs/2026-11-20 --project paper",
    )
    parser.add_argument("folders", nargs="+", help="folders of runs or sweeps")
    parser.add_argument("--project", help="of W&B; by default that of each run's configuration")
    parser.add_argument("--entity", help="the user or team; by default that of each run's configuration")
    parser.add_argument("--mode", choices=MODES, default="auto", help="auto: online where there is a login")
    view = "save the view of dqx/report/wandb/panels.py to the projects"
    parser.add_argument("--workspace", action="store_true", help=view)
    arguments = parser.parse_args()
    errors, failed = Console(stderr=True, highlight=False), False
    places: set[tuple[str | None, str]] = set()  # entity, project
    with errors_end():
        for path in finished(arguments.folders):
            record = again(path, project=arguments.project, entity=arguments.entity, mode=arguments.mode)
            print(path)
            print_copy(record)
            failed |= record.mirror["state"] == "failed"
            settings = {**DEFAULTS, **record.settings.wandb}
            places.add((arguments.entity or settings["entity"], arguments.project or settings["project"]))
    if arguments.workspace:
        for entity, project in sorted(places, key=str):
            failed |= not _saved(entity, project, errors)
    sys.exit(1 if failed else 0)


def _saved(entity: str | None, project: str, errors: Console) -> bool:
    """Save the view to a project, and say where it is or why it could not be."""
    try:
        print(f"view: {panels.save(entity, project)}")
        return True
    except ImportError:
        print_lines(errors, ["no view: the package wandb-workspaces is missing; pip install 'dqx[workspace]'"])
    except Exception as error:  # whatever a server may say
        print_lines(errors, [f"no view: {error}"])
    return False
