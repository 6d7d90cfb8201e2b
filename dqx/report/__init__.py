"""What runs have to say: tables in the terminal, and reports of many runs.

terminal.py    one run, or a sweep, in the terminal
gather.py      finished runs below any folders, sorted into what one table can hold; seeds make one cell
tables.py      groups as tables, in the study's layout
content.py     what a report says, in whichever format
published.py   the published tables, cell by cell beside ours
pictures.py    figures, as files
markdown.py, latex.py, page.py   a report as Markdown, LaTeX, one HTML page (templates/)
command.py     dqx report
"""

from dqx.record.words import difference, points, short, value, visible
from dqx.report.terminal import (
    RULES,
    delta_legend,
    delta_table,
    header,
    print_mirror,
    print_outcomes,
    print_sweep,
    print_table,
)

__all__ = [
    "RULES",
    "delta_legend",
    "delta_table",
    "difference",
    "header",
    "points",
    "print_mirror",
    "print_outcomes",
    "print_sweep",
    "print_table",
    "short",
    "value",
    "visible",
]
