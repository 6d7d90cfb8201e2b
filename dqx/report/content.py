"""What a report says, before it is written in one format or another."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from dqx.record.collection import Run, Skipped
from dqx.record.collection import runs as read_runs
from dqx.record.folder import Record
from dqx.report import published, tables
from dqx.report.gather import evaluations, groups
from dqx.report.published import Comparison
from dqx.report.tables import Table


@dataclass(frozen=True)
class Picture:
    """A figure that was saved as a PNG, and beside it as an SVG, which pages show."""

    name: str
    path: Path
    inches: float  # wide

    @property
    def pixels(self) -> int:
        """Its width in a page that has room: letters a third larger than in print."""
        return round(128 * self.inches)

    @property
    def title(self) -> str:
        return self.name.replace("_", " ")


@dataclass
class Report:
    """Runs, the tables made of them, and their figures."""

    runs: Sequence[Run]
    skipped: Sequence[Skipped]
    overviews: list[Table]
    studies: list[Table]
    comparisons: list[Comparison]
    pictures: list[Picture] = field(default_factory=list)  # of all runs together
    run_pictures: list[list[Picture]] = field(default_factory=list)  # of each run

    @property
    def records(self) -> list[Record]:
        return [run.record for run in self.runs]


def build(folders: Iterable[str | Path], presets: Sequence[str] = ()) -> Report:
    """The report of all finished runs below the folders, without figures.

    With the presets of the published tables that are named, else with those that the runs have cells of. Raises
    ValueError where there is nothing to report, OSError for a folder that does not exist.
    """
    folders = list(folders)
    runs = read_runs(*folders, documents=True)
    if not runs and not presets:
        reasons = "".join(f"\n  {each.path}: {each.reason}" for each in runs.skipped)
        raise ValueError(f"no finished run below {', '.join(map(str, folders))}{reasons}")
    return of_runs(runs, runs.skipped, presets)


def of_runs(runs: Sequence[Run], skipped: Sequence[Skipped] = (), presets: Sequence[str] = ()) -> Report:
    """The report of runs that are read already."""
    evaluated = evaluations(runs)
    sorted_runs = groups(evaluated)
    return Report(
        runs,
        skipped,
        [tables.overview(group) for group in sorted_runs if group.rows],
        [tables.study(group) for group in sorted_runs],
        [published.compared(preset, evaluated) for preset in presets or published.present(evaluated)],
    )


def lacks(record: Record) -> list[str]:
    """What a record does not have, and the setting that would have measured it."""
    missing = []
    if not record.outliers:
        missing.append("no outlier statistics (outliers.samples=0)")
    elif not record.activations:
        missing.append("no activations per channel and token")
    if not record.fidelity:
        missing.append("no denoising diagnostics (fidelity.samples=0)")
    elif not record.fidelity.get("by_step"):
        missing.append("no diagnostics by denoising step")
    return missing
