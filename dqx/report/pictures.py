"""The figures of a report, as files: those of all runs together, and those of each run in a folder of its own."""

from __future__ import annotations

from pathlib import Path

from dqx import figures
from dqx.report.content import Picture, Report, anchor


def draw(report: Report, folder: Path) -> None:
    """Draw what the records have the data for, as PNG and PDF below `folder`, and put the places into the report."""
    report.pictures = _saved(figures.of_runs(report.records) if report.runs else {}, folder)
    report.run_pictures = [
        _saved(figures.of_run(run.record), folder / anchor(number)) for number, run in enumerate(report.runs, 1)
    ]


def _saved(drawn: dict[str, figures.Figure], folder: Path) -> list[Picture]:
    for name, figure in drawn.items():
        folder.mkdir(parents=True, exist_ok=True)
        figures.save(figure, folder, name)
    return [Picture(name, folder / f"{name}.png") for name in drawn]
