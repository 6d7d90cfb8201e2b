"""Two runs against each other, document by document: what another setting of the same model cost or gained.

    dqx compare RUN OTHER --show 5

The full-precision models of two runs are compared, and their quantized ones: a sampler that approximates with one that
does not, fewer denoising steps with more. A delta is OTHER minus RUN, with the interval, test and verdict of
`dqx/record/deltas.py`; verdicts are corrected over the tasks of a table. Tasks that only one run has are left out.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator

from rich.console import Console

from dqx.evaluate.results import TaskResult
from dqx.record.compare import compare, costs, differences, flips
from dqx.record.folder import Record, RunFolder
from dqx.record.words import visible
from dqx.report import tables
from dqx.report.terminal import errors_end, print_lines, show

SHOWN = 3  # flipped documents printed of each task
LONGEST = 600  # characters printed of an output


def flip_lines(name: str, before: TaskResult, after: TaskResult, shown: int) -> Iterator[str]:
    """How many documents of a task flipped, and some of them with both outputs."""
    flipped = flips(before, after)
    if not flipped or not shown:
        return
    lost = sum(flip.lost for flip in flipped)
    part = f"; {shown} of them" if len(flipped) > shown else ""
    yield f"{name}: {lost} lost, {len(flipped) - lost} gained{part}:"
    for flip in flipped[:shown]:
        what = "lost" if flip.lost else "gained"
        yield f"  {visible(flip.before.doc_id)}, {what}; target {_output(flip.before.target)}"
        yield f"    first run,  score {flip.before.score:g}: {_output(flip.before.prediction)}"
        yield f"    second run, score {flip.after.score:g}: {_output(flip.after.prediction)}"


def _output(text: str | None) -> str:
    """An output on one line, without anything that a terminal would obey."""
    if text is None:
        return "not recorded"
    more = f" ... ({len(text) - LONGEST} characters more)" if len(text) > LONGEST else ""
    return visible(text[:LONGEST]).replace("\n", "\\n").replace("\t", "\\t") + more


def print_comparison(before: Record, after: Record, console: Console, shown: int = SHOWN) -> None:
    """Print what differs; for each side a table, its costs, and up to `shown` flipped documents of each task."""
    changed = list(differences(before.config, after.config))
    print_lines(console, map(visible, changed or ["The two runs have the same settings."]), "bold")
    by_side = compare(before, after)
    for side, rows in by_side.items():
        print_lines(console, ["", side.replace("_", " ") if len(by_side) > 1 else "both sides", ""])
        notes = show(tables.deltas(rows, "first run", "second run"), console)
        first, second = getattr(before, side), getattr(after, side)
        print_lines(console, costs(first, second))
        for name in (row.name for row in rows if row.kind == "task"):
            print_lines(console, flip_lines(name, first[name], second[name], shown))
    print_lines(console, ["", *notes], "dim")


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        description="Two runs against each other, document by document.",
        epilog="Example: dqx compare runs/2026-11-20/12-00-00-000000-nano_llada-gptq-w3a16 runs/2026-11-20/OTHER",
    )
    parser.add_argument("run", help="folder of a run")
    parser.add_argument("other", help="folder of the run that is compared with it")
    told = f"flipped documents printed of each task ({SHOWN}); 0: none"
    parser.add_argument("--show", type=int, default=SHOWN, metavar="N", help=told)
    arguments = parser.parse_args()
    console = Console(highlight=False, emoji=False, width=max(120, Console().width))
    with errors_end() as ending:
        ending.there = "nothing is printed yet"
        before, after = (RunFolder(folder).read() for folder in (arguments.run, arguments.other))
        ending.there = "what is printed so far holds; the same command prints all of it"
        print_comparison(before, after, console, arguments.show)
