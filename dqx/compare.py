"""Two runs against each other, document by document: what another setting of the same model cost or gained.

    dqx compare RUN OTHER

A run's own table compares its quantized model with its full-precision one. This one compares the full-precision
models of two runs, and their quantized ones: a sampler that approximates with one that does not, fewer denoising steps
with more, one calibration with another. A delta is OTHER minus RUN, with the interval, test and verdict of
`dqx/deltas.py`; verdicts are corrected over the tasks of a table. Tasks that only one run has are left out.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Mapping
from typing import Any

from rich.console import Console
from rich.text import Text

from dqx import deltas
from dqx.evaluate.results import TaskResult
from dqx.report import delta_legend, delta_table
from dqx.store import SIDES, Record, RunFolder

#: Settings that say where things are, not what is computed.
PLACES = ("cache_dir", "cache_max_gb", "keep_quantized", "reuse", "wandb", "plan", "plan_tflops", "bundle", "sweep")
ABSENT = "not set"


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


def _ratio(before: int, after: int) -> str:
    return f"{before} -> {after}" + (f" ({before / after:.2f}x)" if after else "")


def _text(value: Any) -> str:
    return "null" if value is None else str(value)


def print_comparison(before: Record, after: Record, console: Console) -> None:
    """Print what differs, and a table with its costs for each side."""
    changed = list(differences(before.config, after.config))
    for line in changed or ["The two runs have the same settings."]:
        console.print(Text(line, style="bold"), soft_wrap=True)
    tables = compare(before, after)
    for side, rows in tables.items():
        console.print(Text(f"\n{side.replace('_', ' ') if len(tables) > 1 else 'both sides'}\n"))
        console.print(delta_table(rows, "first\nrun", "second\nrun"))
        for line in costs(getattr(before, side), getattr(after, side)):
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
    arguments = parser.parse_args()
    try:
        before, after = (RunFolder(folder).read() for folder in (arguments.run, arguments.other))
        print_comparison(before, after, Console(highlight=False, emoji=False, width=max(120, Console().width)))
    except (OSError, ValueError) as error:
        Console(stderr=True).print(Text(str(error)), soft_wrap=True)
        sys.exit(2)
