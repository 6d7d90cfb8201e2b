"""The figures of a report, as files: those of all runs together, and those of each run in a folder of its own.

A run that is reported alone gets every figure that its record has the data for, as PNG and PDF. Where there are
several, those of single runs are PNG, with one activation surface each: that of the largest value.
"""

from __future__ import annotations

from pathlib import Path

from tqdm import tqdm

from dqx.report import figures
from dqx.report.content import Picture, Report
from dqx.report.tables import anchor

WIDE, NARROW = 1400, 960  # pixels of a figure in the page: of all runs together, of one


def draw(report: Report, folder: Path) -> None:
    """Draw figures below `folder`, and put their places into the report."""
    alone = len(report.runs) == 1
    report.pictures = _saved(figures.of_runs(report.records), folder, width=WIDE)
    runs = tqdm(report.runs, "figures", unit=" runs", leave=False, disable=None)
    report.run_pictures = [
        _saved(
            figures.of_run(run.record if alone else figures.with_one_surface(run.record)),
            folder / anchor(number),
            alone,
        )
        for number, run in enumerate(runs, 1)
    ]


def _saved(drawn: dict[str, figures.Figure], folder: Path, pdf: bool = True, width: int = NARROW) -> list[Picture]:
    for name, figure in drawn.items():
        figures.save(figure, folder, name, pdf=pdf)
    return [Picture(name, folder / f"{name}.png", width) for name in drawn]
