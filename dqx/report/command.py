"""`dqx report RUNS...`: HTML, Markdown and LaTeX of any finished runs, and their figures.

dqx report runs/2026-11-20                      report/report.html, .md, .tex and figures/
dqx report runs --preset qdlm_table1            beside the published values of that table
dqx report runs --out -                         the tables in Markdown, on standard output
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from rich.console import Console
from rich.text import Text

from dqx.common.files import write_text
from dqx.record import words
from dqx.report import content, latex, markdown
from dqx.report.published import presets


def write(report: content.Report, folder: Path) -> list[Path]:
    """Write the report's files. Returns the paths of the documents."""
    from dqx.report import page, pictures

    pictures.draw(report, folder / "figures")
    documents = {
        "report.html": page.page(report),
        "report.md": markdown.markdown(report, folder),
        "report.tex": latex.latex(report),
    }
    for name, text in documents.items():
        write_text(folder / name, text)
    return [folder / name for name in documents]


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        description="A report of all finished runs below the given folders: HTML, Markdown, LaTeX, figures.",
        epilog="Example: dqx report runs/2026-11-20 --out report",
    )
    parser.add_argument("runs", nargs="*", metavar="RUNS", help="folders of runs or sweeps (runs)")
    parser.add_argument("--out", default="report", metavar="FOLDER", help="where to write it (report); - prints tables")
    parser.add_argument(
        "--preset",
        nargs="+",
        default=[],
        metavar="NAME",
        help=f"published tables to compare with, whatever there is of them: {', '.join(presets()[::2])}, "
        "each also with _as_published; by default those that the runs have cells of",
    )
    arguments = parser.parse_args()
    console = Console(highlight=False, emoji=False)
    try:
        nothing = not arguments.runs and arguments.preset and not Path("runs").is_dir()
        report = content.build([] if nothing else arguments.runs or ["runs"], arguments.preset)
        if arguments.out == "-":
            print("\n\n".join([markdown.tables(report), *markdown.comparisons(report)]).strip())
            return
        written = write(report, Path(arguments.out))
    except (OSError, ValueError) as error:
        Console(stderr=True).print(Text(str(error)), soft_wrap=True)
        sys.exit(2)
    for each in report.skipped:
        Console(stderr=True).print(Text(f"in no table: {each.path}: {each.reason}"), soft_wrap=True)
    console.print(Text(words.lede(report.records)))
    for path in written:
        console.print(Text(f"  {path}"), soft_wrap=True)
