"""A report in Markdown, as GitHub renders it."""

from __future__ import annotations

import os
import re
from pathlib import Path

from dqx.record.words import lede, public
from dqx.report.content import Report
from dqx.report.tables import Entry, Table

#: What Markdown would not show as it is: marks, underscores at the edge of a word, links, entities, headings and lists.
SPECIAL = re.compile(r"([\\`*<>|~]|(?<!\w)_|_(?!\w)|\[(?=[^]]*\][(:\[])|&(?=#?\w+;)|^(?:#|[-+](?= )))")


def escape(text: str) -> str:
    """Text that Markdown shows as it is, on one line."""
    return SPECIAL.sub(r"\\\1", " ".join(public(text).split()))


def code(text: str) -> str:
    """Text as code, in a table too: between more backquotes than it has."""
    plain = " ".join(public(text).split()).replace("|", "\\|")
    fence = "`" * (max((len(run) for run in re.findall("`+", plain)), default=0) + 1)
    space = " " if plain.startswith("`") or plain.endswith("`") else ""
    return f"{fence}{space}{plain}{space}{fence}"


def table(content: Table) -> str:
    """One table with its notes."""
    lines = ["| " + " | ".join(map(escape, content.columns)) + " |"]
    lines.append("|" + "|".join("---" if i < content.left else "--:" for i in range(len(content.columns))) + "|")
    lines += ["| " + " | ".join(map(_entry, row)) + " |" for row in (*content.head, *content.rows)]
    return "\n".join([*lines, *(f"\n{escape(note)}" for note in content.notes)])


def _entry(entry: Entry) -> str:
    text = code(entry.text) if entry.code and entry.text else escape(entry.text)
    return f"{text} {escape(entry.small)}" if entry.small else text


def tables(content: Report) -> str:
    """The tables of all runs alone."""
    parts = []
    for overview in content.overviews:
        parts += [f"### {escape(overview.title)}", table(overview)]
    for study in content.studies:
        parts += [f"### {escape(study.title)}, by task", table(study)]
    return "\n\n".join(parts)


def comparisons(content: Report) -> list[str]:
    """The tables of presets beside the published values, and the commands for what is missing."""
    parts = []
    for comparison in content.comparisons:
        counts = ", ".join(f"{count} {word}" for word, count in comparison.counts.items())
        parts += [f"## Beside the published values: {escape(comparison.preset)}", f"Cells: {counts}."]
        parts += [f"### {escape(each.title)}\n\n{table(each)}" for each in comparison.tables]
        if comparison.commands:
            rows = [f"- {code(command)} fills {escape(', '.join(tasks))}" for command, tasks in comparison.commands]
            parts += ["What is missing comes from:", "\n".join(rows)]
    return parts


def markdown(content: Report, folder: Path | None = None) -> str:
    """The whole report; links to figures are relative to `folder` (None: without figures)."""
    parts = ["# Report", escape(lede(content.records)), *_skipped(content), "## Results", tables(content)]
    parts += comparisons(content)
    if folder is not None and content.pictures:
        images = [f"![{escape(p.title)}]({os.path.relpath(p.path, folder)})" for p in content.pictures]
        parts += ["## Figures", *images]
    if content.runs:
        commands = [f"1. {escape(str(run.path))}: {code(run.record.command or 'not recorded')}" for run in content.runs]
        parts += ["## Runs", "\n".join(commands)]
    return "\n\n".join(part for part in parts if part) + "\n"


def _skipped(content: Report) -> list[str]:
    if not content.skipped:
        return []
    rows = [f"- {escape(str(each.path))}: {escape(each.reason)}" for each in content.skipped]
    return ["In no table:", "\n".join(rows)]
