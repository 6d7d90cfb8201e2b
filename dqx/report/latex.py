"""The tables of a report in LaTeX with booktabs: a document that compiles, each table ready to be taken out of it."""

from __future__ import annotations

import re

from dqx.record.words import lede, visible
from dqx.report.content import Report
from dqx.report.tables import MISSING, Entry, Table

PREAMBLE = r"""\documentclass{article}
\usepackage[T1]{fontenc}
\usepackage[utf8]{inputenc}
\usepackage[a4paper,landscape,margin=1.5cm]{geometry}
\usepackage{booktabs,graphicx}
\begin{document}
"""
NAMED = {
    "\\": "backslash", "~": "asciitilde", "^": "asciicircum", "<": "less", ">": "greater", "|": "bar",
    '"': "quotedbl", "`": "asciigrave", "'": "quotesingle",
}  # fmt: skip
#: After a line break LaTeX takes [ for its option, and - makes a ligature with the next one.
SPECIAL = {c: rf"\text{name}{{}}" for c, name in NAMED.items()} | {c: rf"\{c}" for c in "{}$&#%_"}
SPECIAL |= {c: f"{{{c}}}" for c in "[]-"}
NUMBER = re.compile(r"[+-]?\d+(\.\d+)?\*?")


def escape(text: str) -> str:
    """Text that LaTeX prints as it is, on one line; characters beyond Latin 1, which its fonts may lack, as U+4E2D."""
    plain = " ".join(visible(text).split())
    return "".join(SPECIAL.get(c, c if ord(c) < 256 else f"{{[}}U+{ord(c):04X}{{]}}") for c in plain)


def table(content: Table) -> str:
    """One table float: caption, rules, rows."""
    columns = "l" * content.left + "r" * (len(content.columns) - content.left)
    rows = [_row(row) for row in content.head] + ([r"\midrule"] if content.head and content.rows else [])
    for i, row in enumerate(content.rows):
        rows += [r"\midrule"] if i in content.rules else []
        rows.append(_row(row))
    lines = [
        *(r"\begin{table}[htbp]", r"\centering"),
        rf"\caption{{{escape(content.title)}. {escape(' '.join(content.notes))}}}",
        r"\resizebox{\ifdim\width>\linewidth\linewidth\else\width\fi}{!}{%",
        *(rf"\begin{{tabular}}{{{columns}}}", r"\toprule"),
        *(" & ".join(map(escape, content.columns)) + r" \\", r"\midrule"),
        *(*rows, r"\bottomrule", r"\end{tabular}}", r"\end{table}"),
    ]
    return "\n".join(lines)


def _row(row: list[Entry]) -> str:
    return " & ".join(map(_entry, row)) + r" \\"


def _entry(entry: Entry) -> str:
    if entry.kind == MISSING and entry.text == MISSING:
        text = "--"
    elif entry.code and entry.text:
        text = rf"\texttt{{{escape(entry.text)}}}"
    elif NUMBER.fullmatch(entry.text):
        text = "$" + entry.text.replace("*", "^{*}") + "$"
    else:
        text = escape(entry.text)
    return rf"{text} {{\scriptsize {escape(entry.small)}}}" if entry.small else text


def latex(content: Report) -> str:
    """The whole report: a document of tables."""
    tables = [*content.overviews, *content.studies]
    tables += [each for comparison in content.comparisons for each in comparison.tables]
    parts = [escape(lede(content.records)), *map(table, tables)]
    return PREAMBLE + "\n\\clearpage\n".join(parts) + "\n\\end{document}\n"
