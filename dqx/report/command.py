"""`dqx report RUNS...`: HTML, Markdown and LaTeX of any finished runs, and their figures.

dqx report runs/2026-11-20                      report/report.html, .md, .tex (for a paper); then their figures/
dqx report runs --preset qdlm_table1            beside the published values of that table
dqx report runs --out -                         the tables in Markdown, on standard output
"""

from __future__ import annotations

import argparse
from pathlib import Path

from rich.console import Console
from rich.text import Text

from dqx.common.files import write_text
from dqx.record import words
from dqx.report import content, latex, markdown
from dqx.report.published import presets
from dqx.report.terminal import errors_end, print_lines


def write(report: content.Report, folder: Path) -> list[Path]:
    """Write the report's documents, with the figures that it has by now. Returns their paths."""
    from dqx.report import page  # with Jinja, which printed tables need not

    texts = page.page(report), markdown.markdown(report, folder), latex.latex(report)
    paths = [folder / f"report.{suffix}" for suffix in ("html", "md", "tex")]
    for path, text in zip(paths, texts, strict=True):
        write_text(path, text)
    return paths


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        description="A report of all finished runs below the given folders: HTML, Markdown, LaTeX, figures.",
        epilog="Example: dqx report runs/2026-11-20 --out report",
    )
    parser.add_argument("runs", nargs="*", metavar="RUNS", help="folders of runs or sweeps (runs)")
    parser.add_argument("--out", default="report", metavar="FOLDER", help="where to write it (report); - prints tables")
    told = (
        f"published tables to compare with, whatever there is of them: {', '.join(presets()[::2])}, "
        "each also with _as_published; by default those that the runs have cells of"
    )
    parser.add_argument("--preset", nargs="+", default=[], metavar="NAME", help=told)
    arguments = parser.parse_args()
    console = Console(highlight=False, emoji=False)
    with errors_end() as ending:
        ending.there = "nothing is written yet"
        nothing = not arguments.runs and arguments.preset and not Path("runs").is_dir()
        report = content.build([] if nothing else arguments.runs or ["runs"], arguments.preset)
        if arguments.out == "-":
            print("\n\n".join([markdown.tables(report), *markdown.comparisons(report)]).strip())
            return
        folder = Path(arguments.out)
        print_lines(Console(stderr=True), (f"in no table: {each.path}: {each.reason}" for each in report.skipped))
        console.print(Text(words.lede(report.records)))
        written = write(report, folder)
        ending.there = f"{written[0]}, .md and .tex are there, figures are missing; the same command draws them"
        print_lines(console, (f"  {path}" for path in written))  # to be read while figures are drawn
        if report.runs:
            from dqx.report import figures  # with Matplotlib

            figures.draw(report, folder / "figures")
            write(report, folder)
            print_lines(console, [f"  {folder / 'figures'}"])
