"""Figures of records: drawn on demand, the same bytes for the same record.

    style.py      sizes, fonts, colours, markers
    sheet.py      a figure with its caption; captions.py, groups.py: what was run, in words
    surface.py    the activation surface, tokens by channels
    channels.py   channel maxima
    outliers.py   outliers by block and step, and by token class; measures.py: what is shown of them
    depth.py      the hidden state's error by block and step
    errors.py     predictions against full precision, by step and mask ratio
    pareto.py     accuracy against average bits; steps.py: steps by bits
    heat.py, axes.py   a matrix as colours; what axes share

Nothing here keeps a state between figures (no pyplot), and a record without the data of a figure has none of it.
What each figure shows: README.md.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from pathlib import Path

from matplotlib.figure import Figure

from dqx.record.collection import Run
from dqx.record.folder import Record
from dqx.report.figures import channels, depth, errors, outliers, pareto, steps, style, surface
from dqx.report.figures.groups import complete
from dqx.report.figures.sheet import settled
from dqx.report.figures.surface import with_one_surface
from dqx.report.gather import evaluations, groups

__all__ = ["Figure", "of_run", "of_runs", "save", "with_one_surface"]

OF_RUN: tuple[Callable[[Record], dict[str, Figure]], ...] = (
    surface.surfaces,
    channels.channel_maxima,
    outliers.by_step,
    outliers.by_class,
    depth.sqnr,
    errors.by_step,
    errors.by_mask_ratio,
)
NO_DATE = {"CreationDate": None, "Creator": None, "Producer": None}


def of_run(record: Record) -> dict[str, Figure]:
    """The figures of one run, by name."""
    with style.applied():
        return {name: settled(figure) for draw in OF_RUN for name, figure in draw(record).items()}


def of_runs(records: Iterable[Record]) -> dict[str, Figure]:
    """The figures of many runs together, by name; of several groups of runs each has its own, behind its name."""
    runs = [Run(Path(), record) for record in records]
    scored = [group for group in groups(evaluations(runs)) if complete(group)]
    varied = steps.by_steps(scored)
    with style.applied():
        drawn = {
            _named("accuracy_by_bits", group.title, len(scored)): pareto.accuracy_by_bits(group) for group in scored
        } | {
            _named("steps_by_bits", next(iter(members.values())).title, len(varied)): steps.steps_by_bits(members)
            for members in varied
        }
        return {name: settled(figure) for name, figure in drawn.items()}


def _named(name: str, title: str, of: int) -> str:
    return name if of == 1 else f"{name}_{re.sub(r'[^0-9A-Za-z]+', '_', title).strip('_')}"


def save(figure: Figure, folder: str | Path, name: str, pdf: bool = True) -> None:
    """Write NAME.png and NAME.pdf into a folder, without dates or versions: the same figure gives the same bytes."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    with style.applied():
        figure.savefig(folder / f"{name}.png", metadata={"Software": None}, pil_kwargs={"compress_level": 4})
        if pdf:
            figure.savefig(folder / f"{name}.pdf", dpi=style.PRINT_DPI, metadata=NO_DATE)
