"""The tables of a report in LaTeX: a fragment that a paper takes in, and that needs booktabs.

The best value of a setting is bold. Averages stand with settings as rows and methods as columns, where it is the best
of its row. With graphicx a table wider than its column is made to fit.
"""

from __future__ import annotations

import re
import unicodedata
from dataclasses import replace

from dqx.record.words import lede, public
from dqx.report.content import Report
from dqx.report.tables import MISSING, Entry, Table

HEAD = r"""% Tables for a document that has \usepackage{booktabs}; with \usepackage{graphicx} wide ones are made to fit.
\providecommand{\resizebox}[3]{#3}
"""
NAMED = {
    "\\": "backslash", "~": "asciitilde", "^": "asciicircum", "<": "less", ">": "greater", "|": "bar",
    "`": "asciigrave", "'": "quotesingle",
}  # fmt: skip
#: After a line break LaTeX takes [ for its option, and - makes a ligature with the next one.
SPECIAL = {c: rf"\text{name}{{}}" for c, name in NAMED.items()} | {c: rf"\{c}" for c in "{}$&#%_"}
SPECIAL |= {c: f"{{{c}}}" for c in "[]-"} | {'"': r"\symbol{34}"}  # which has a name in T1 fonts alone
NUMBER = re.compile(r"[+-]?\d+(\.\d+)?\*?")


def escape(text: str) -> str:
    """Text that LaTeX prints as it is, on one line; characters that its oldest fonts lack as U+4E2D."""
    plain = " ".join(public(text).split())
    return "".join(SPECIAL.get(c, c if _in_fonts(c) else f"{{[}}U+{ord(c):04X}{{]}}") for c in plain)


def _in_fonts(character: str) -> bool:
    """ASCII, and letters of Latin 1 with an accent."""
    accented = character.isalpha() and unicodedata.decomposition(character)[:1].isdigit()
    return character.isascii() or (ord(character) < 256 and accented)


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
        number = entry.text.replace("*", "^{*}")
        text = rf"$\mathbf{{{number}}}$" if entry.best else f"${number}$"
    else:
        text = escape(entry.text)
    return rf"{text} {{\scriptsize {escape(entry.small)}}}" if entry.small else text


def turned(content: Table) -> Table:
    """A table of averages with its rows as columns."""
    rows = [*content.head, *content.rows]
    columns = [[Entry(name), *(row[i] for row in rows)] for i, name in enumerate(content.columns)][1:]
    return replace(content, columns=("setting", *(row[0].text for row in rows)), head=[], rows=columns, rules=())


def latex(content: Report) -> str:
    """The tables of a report, one float each."""
    tables = [*map(turned, content.overviews), *content.studies]
    tables += [each for comparison in content.comparisons for each in comparison.tables]
    return "\n".join([HEAD + f"% {escape(lede(content.records))}", *map(table, tables)]) + "\n"
