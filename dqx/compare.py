"""Two runs against each other, document by document: what another setting of the same model cost or gained.

    dqx compare RUN OTHER --show 5

A run's own table compares its quantized model with its full-precision one. This one compares the full-precision
models of two runs, and their quantized ones: a sampler that approximates with one that does not, fewer denoising steps
with more, one calibration with another. A delta is OTHER minus RUN, with the interval, test and verdict of
`dqx/deltas.py`; verdicts are corrected over the tasks of a table. Tasks that only one run has are left out. Below each
table stand documents whose score changed, with what both models answered.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import chain, zip_longest
from typing import Any

from rich.console import Console
from rich.text import Text

from dqx import deltas
from dqx.evaluate.results import DocumentRow, TaskResult
from dqx.evaluate.spec import NLL
from dqx.report import delta_legend, delta_table, visible
from dqx.store import SIDES, Record, RunFolder

#: Settings that say where things are and what they may take, not what is computed.
PLACES = (
    *("cache_dir", "cache_max_gb", "keep_quantized", "memory", "reuse", "wandb"),
    *("plan", "plan_tflops", "bundle", "sweep", "dispatch", "hang_minutes"),
)
ABSENT = "not set"
SHOWN = 3  # flipped documents printed of each task
LONGEST = 600  # characters printed of an output


@dataclass(frozen=True)
class Flip:
    """A document whose score changed."""

    before: DocumentRow
    after: DocumentRow
    lost: bool  # the second one is worse


def differences(before: Any, after: Any, path: str = "") -> Iterator[str]:
    """The settings that differ, `model.sampler.threshold: null -> 0.9`."""
    if isinstance(before, Mapping) and isinstance(after, Mapping):
        for key in dict.fromkeys((*before, *after)):
            if path or key not in PLACES:
                inner = f"{path}.{key}" if path else str(key)
                yield from differences(before.get(key, ABSENT), after.get(key, ABSENT), inner)
    elif before != after:
        if isinstance(before, Mapping) or isinstance(after, Mapping):
            before, after = ("set" if isinstance(v, Mapping) else v for v in (before, after))
        yield f"{path}: {_text(before)} -> {_text(after)}"


def compare(before: Record, after: Record) -> dict[str, list[deltas.Delta]]:
    """The deltas of the tasks that both runs have, by side; of sides that are one model and the same results, one.

    Raises ValueError where no task is in both, or a task's documents are not the same.
    """
    tasks = [name for name in before.quantized if name in after.quantized]
    if not tasks:
        raise ValueError(f"no task is in both runs: {', '.join(before.quantized)}; {', '.join(after.quantized)}")
    found: dict[str, list[deltas.Delta]] = {}
    for side in SIDES:
        sides = [{name: getattr(run, side)[name] for name in tasks} for run in (before, after)]
        for name in tasks:
            here, there = ({row.doc_id for row in results[name].documents} for results in sides)
            if here != there:
                raise ValueError(
                    f"task {name}: {len(here)} and {len(there)} documents, {len(here & there)} of them in both; "
                    "evaluate both runs with the same task.limit and data"
                )
        rows = deltas.compare(*sides)
        if rows not in found.values():
            found[side] = rows
    return found


def costs(before: Mapping[str, TaskResult], after: Mapping[str, TaskResult]) -> Iterator[str]:
    """What the tasks took: `nano_sums: sequences 384 -> 101, tokens computed 17k -> 5k, seconds 2.1 -> 0.9`."""
    for name in (name for name in before if name in after):
        pairs = {
            what: (getattr(before[name], field), getattr(after[name], field))
            for what, field in (("sequences", "n_forwards"), ("tokens computed", "n_tokens"))
        }
        counts = [f"{what} {_ratio(*pair)}" for what, pair in pairs.items()]
        yield f"{name}: {', '.join(counts)}, {before[name].seconds:.3g} s -> {after[name].seconds:.3g} s"


def flips(before: TaskResult, after: TaskResult) -> list[Flip]:
    """The documents whose score changed: lost and gained ones in turn, each in the order of the documents."""
    other = {row.doc_id: row for row in after.documents}
    lost: list[Flip] = []
    gained: list[Flip] = []
    for row in before.documents:
        there = other.get(row.doc_id)
        if there is not None and there.score != row.score:
            worse = (there.score < row.score) != (before.metric == NLL)
            (lost if worse else gained).append(Flip(row, there, worse))
    return [flip for flip in chain.from_iterable(zip_longest(lost, gained)) if flip is not None]


def flip_lines(name: str, before: TaskResult, after: TaskResult, show: int) -> Iterator[str]:
    """How many documents of a task flipped, and some of them with both outputs."""
    found = flips(before, after)
    if not found or not show:
        return
    lost = sum(flip.lost for flip in found)
    yield f"{name}: {lost} lost, {len(found) - lost} gained" + (f"; {show} of them:" if len(found) > show else ":")
    for flip in found[:show]:
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


def _ratio(before: int, after: int) -> str:
    return f"{before} -> {after}" + (f" ({before / after:.2f}x)" if after else "")


def _text(value: Any) -> str:
    return "null" if value is None else str(value)


def print_comparison(before: Record, after: Record, console: Console, show: int = SHOWN) -> None:
    """Print what differs; for each side a table, its costs, and up to `show` flipped documents of each task."""
    changed = list(differences(before.config, after.config))
    for line in changed or ["The two runs have the same settings."]:
        console.print(Text(visible(line), style="bold"), soft_wrap=True)
    tables = compare(before, after)
    for side, rows in tables.items():
        console.print(Text(f"\n{side.replace('_', ' ') if len(tables) > 1 else 'both sides'}\n"))
        console.print(delta_table(rows, "first\nrun", "second\nrun"))
        sides = getattr(before, side), getattr(after, side)
        for line in costs(*sides):
            console.print(Text(line), soft_wrap=True)
        for name in (row.name for row in rows if row.kind == "task"):
            for line in flip_lines(name, sides[0][name], sides[1][name], show):
                console.print(Text(line), soft_wrap=True)
    console.print()
    for line in delta_legend(next(iter(tables.values()))):
        console.print(Text(line, style="dim"), soft_wrap=True)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        description="Two runs against each other, document by document.",
        epilog="Example: dqx compare runs/2026-11-20/12-00-00-000000-nano_llada-gptq-w3a16 runs/2026-11-20/OTHER",
    )
    parser.add_argument("run", help="folder of a run")
    parser.add_argument("other", help="folder of the run that is compared with it")
    parser.add_argument(
        "--show",
        type=int,
        default=SHOWN,
        metavar="N",
        help=f"flipped documents printed of each task ({SHOWN}); 0: none",
    )
    arguments = parser.parse_args()
    console = Console(highlight=False, emoji=False, width=max(120, Console().width))
    try:
        before, after = (RunFolder(folder).read() for folder in (arguments.run, arguments.other))
        print_comparison(before, after, console, arguments.show)
    except (OSError, ValueError) as error:
        Console(stderr=True).print(Text(str(error)), soft_wrap=True)
        sys.exit(2)
