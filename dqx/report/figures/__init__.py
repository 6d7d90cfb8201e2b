"""Figures of records: drawn on demand, the same bytes for the same record.

    style.py      sizes, fonts, colours, markers
    sheet.py      a figure with its caption; groups.py: scores of a group of runs
    surface.py    the activation surface, tokens by channels
    channels.py   channel maxima
    outliers.py   outliers by block and step, and by token class
    depth.py      the hidden state's error by block and step
    errors.py     predictions against full precision, by step and mask ratio
    pareto.py     accuracy against average bits; steps.py: steps by bits
    axes.py       what axes share; a matrix as colours

Nothing here keeps a state between figures (no pyplot), and a record without the data of a figure has none of it.
What each figure shows: README.md.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from matplotlib.figure import Figure
from tqdm import tqdm

from dqx.record.collection import Run
from dqx.record.folder import Record
from dqx.report.content import Picture, Report
from dqx.report.figures import channels, depth, errors, outliers, pareto, steps, style, surface
from dqx.report.figures.groups import complete
from dqx.report.figures.sheet import settled
from dqx.report.figures.surface import with_one_surface
from dqx.report.gather import evaluations, groups
from dqx.report.tables import anchor

__all__ = ["Figure", "draw", "of_run", "of_runs", "save", "with_one_surface"]

OF_RUN: tuple[Callable[[Record], dict[str, Figure]], ...] = (
    surface.surfaces,
    channels.channel_maxima,
    outliers.by_step,
    outliers.by_class,
    depth.sqnr,
    errors.by_step,
    errors.by_mask_ratio,
)
FORMATS = ("png", "svg", "pdf")
BAR = "drawing figures {percentage:3.0f}%|{bar}| {postfix}"
HOW: dict[str, dict[str, Any]] = {  # each is written, without dates or versions
    "png": {"metadata": {"Software": None}, "pil_kwargs": {"compress_level": 4}},
    "svg": {"metadata": {"Date": None, "Creator": None, "Format": None, "Type": None}},
    "pdf": {"dpi": style.PRINT_DPI, "metadata": {"CreationDate": None, "Creator": None, "Producer": None}},
}


def of_run(record: Record) -> dict[str, Figure]:
    """The figures of one run, by name."""
    return {name: figure for kind in OF_RUN for name, figure in _of_kind(kind, record).items()}


def _of_kind(kind: Callable[[Record], dict[str, Figure]], record: Record) -> dict[str, Figure]:
    with style.applied():
        return {name: settled(figure) for name, figure in kind(record).items()}


def of_runs(records: Iterable[Record]) -> dict[str, Figure]:
    """The figures of many runs together, by name; of several groups of runs each has its own, behind its name."""
    runs = [Run(Path(), record) for record in records]
    scored = [group for group in groups(evaluations(runs)) if complete(group)]
    varied = steps.by_steps(scored)
    with style.applied():
        drawn = {_named("accuracy_by_bits", g.title, len(scored)): pareto.accuracy_by_bits(g) for g in scored}
        for members in varied:
            title = next(iter(members.values())).title
            drawn[_named("steps_by_bits", title, len(varied))] = steps.steps_by_bits(members)
        return {name: settled(figure) for name, figure in drawn.items()}


def _named(name: str, title: str, of: int) -> str:
    return name if of == 1 else f"{name}_{re.sub(r'[^0-9A-Za-z]+', '_', title).strip('_')}"


def save(figure: Figure, folder: str | Path, name: str, formats: Sequence[str] = FORMATS) -> None:
    """Write NAME.png, NAME.svg and NAME.pdf, or some of them, into a folder; the same figure gives the same bytes."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    with style.applied():
        for suffix in formats:
            figure.savefig(folder / f"{name}.{suffix}", **HOW[suffix])
    if "svg" in formats:
        path = folder / f"{name}.svg"
        path.write_text(style.both_palettes(path.read_text("utf-8")), "utf-8")


def draw(report: Report, folder: Path) -> None:
    """Draw a report's figures below `folder`, those of each run in a folder of its own, and put their places into it.

    A run that is reported alone gets every figure that its record has the data for, as PNG, SVG and PDF. Where there
    are several, those of single runs have no PDF, and one activation surface each: that of the largest value.
    """
    alone = len(report.runs) == 1
    with tqdm(total=1 + len(OF_RUN) * len(report.runs), bar_format=BAR, leave=False, disable=None) as bar:
        bar.set_postfix_str("all runs together")
        report.pictures = _saved(of_runs(report.records), folder, bar)
        for number, run in enumerate(report.runs, 1):
            bar.set_postfix_str(f"run {number} of {len(report.runs)}")
            record = run.record if alone else with_one_surface(run.record)
            place = folder / anchor(number)
            formats = FORMATS if alone else FORMATS[:2]
            pictures = [each for kind in OF_RUN for each in _saved(_of_kind(kind, record), place, bar, formats)]
            report.run_pictures.append(pictures)


def _saved(
    drawn: dict[str, Figure], folder: Path, bar: tqdm[NoReturn], formats: Sequence[str] = FORMATS
) -> list[Picture]:
    """Save the figures of one step of the bar."""
    before = bar.n
    for number, (name, figure) in enumerate(drawn.items(), 1):
        save(figure, folder, name, formats)
        bar.update(before + number / len(drawn) - bar.n)
    bar.update(before + 1 - bar.n)
    return [Picture(name, folder / f"{name}.png", figure.get_figwidth()) for name, figure in drawn.items()]
