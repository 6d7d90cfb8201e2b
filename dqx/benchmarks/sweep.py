"""How long a sweep takes: with an empty cache, with a full one, and as separate processes without any.

    python -m dqx.benchmarks.sweep                  16 runs of the bundled model, three times: minutes
    python -m dqx.benchmarks.sweep --methods gptq,awq --bits w4a16,w3a16,w2a16 --json figures.json
    python -m dqx.benchmarks.sweep --quick          4 runs

Every time is that of the command a user types, from its start to its end: `dqx run -m` twice with one cache, then
`dqx run reuse=false` for each of the runs. The results are compared to the last bit. A sweep costs what its distinct
stages cost: one full-precision result for each number of steps and task, one quantized model for each method and width,
one quantized result for each combination of both.
"""

from __future__ import annotations

import itertools
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from dqx.benchmarks.common import options, table, tell, write_figures
from dqx.benchmarks.startup import CHECKOUT, DQX, seconds
from dqx.record.folder import Record, RunFolder

GROUPS = ("method", "bits", "steps", "task")


@dataclass
class Figures:
    """Seconds of all runs together."""

    runs: int
    cold: float
    warm: float
    separate: float
    equal: bool  # all results, to the last bit


def measure(choices: dict[str, list[str]], shared: Sequence[str], folder: Path) -> Figures:
    """Do everything three times below `folder`."""
    combinations = [dict(zip(choices, values, strict=True)) for values in itertools.product(*choices.values())]
    sweep = ["-m", *(f"{group}={','.join(values)}" for group, values in choices.items())]
    cache = f"cache_dir={folder / 'cache'}"

    def multirun(name: str) -> tuple[float, list[Record]]:
        subdir = f"hydra.sweep.dir={folder / name}"
        seconds = launch(*sweep, *shared, cache, subdir, "hydra.sweep.subdir=${hydra.job.num}")
        return seconds, [RunFolder(folder / name / str(i)).read() for i in range(len(combinations))]

    cold, first = multirun("cold")
    warm, second = multirun("warm")
    separate, alone = 0.0, []
    for i, combination in enumerate(combinations):
        place = folder / "separate" / str(i)
        overrides = [f"{group}={value}" for group, value in combination.items()]
        own = [f"cache_dir={place / 'cache'}", "reuse=false", f"hydra.run.dir={place}"]
        separate += launch(*overrides, *shared, *own)
        alone.append(RunFolder(place).read())
    equal = all(shown(a) == shown(b) == shown(c) for a, b, c in zip(first, second, alone, strict=True))
    return Figures(len(combinations), cold, warm, separate, equal)


def launch(*arguments: str) -> float:
    """Seconds of `dqx run ARGUMENTS`. Raises RuntimeError with its last words where it fails."""
    started = time.perf_counter()
    with TemporaryDirectory() as folder:
        seconds(CHECKOUT, (*DQX, "run", *arguments), Path(folder))
    return time.perf_counter() - started


def shown(record: Record) -> dict[str, Any]:
    """What a run found out: every document of both models, deltas, outliers, fidelity."""
    sides = {"full_precision": record.full_precision, "quantized": record.quantized}
    documents = {side: {name: task.documents for name, task in tasks.items()} for side, tasks in sides.items()}
    return {"documents": documents, "deltas": record.deltas, "outliers": record.outliers, "fidelity": record.fidelity}


def main(argv: list[str] | None = None) -> None:
    parser = options("sweep", __doc__)
    parser.add_argument("--methods", default="gptq,awq")
    parser.add_argument("--bits", default="w4a16,w3a16")
    parser.add_argument("--steps", default="8,16")
    parser.add_argument("--tasks", default="nano_sums,nano_facts")
    parser.add_argument("--limit", type=int, default=32, help="documents per task (32)")
    parser.add_argument("--quick", action="store_true", help="one width and task, 2 documents: to see that it runs")
    args = parser.parse_args(argv)
    values = [args.methods, args.bits, args.steps, args.tasks]
    shared = [f"task.limit={args.limit}", "wandb.mode=disabled"]
    if args.quick:
        values = ["gptq,smoothquant", "w4a16", "8,16", "nano_sums"]
        shared = ["task.limit=2", "wandb.mode=disabled", "calib.samples=2", "calib.length=32"]
    with TemporaryDirectory() as folder:
        figures = measure({g: v.split(",") for g, v in zip(GROUPS, values, strict=True)}, shared, Path(folder))
    rows = {
        "one command, empty cache": figures.cold,
        "the same command again": figures.warm,
        f"{figures.runs} commands, no cache": figures.separate,
    }
    tell(table(("", "seconds"), [(name, f"{seconds:.1f}") for name, seconds in rows.items()]))
    print("results: equal to the last bit" if figures.equal else "results: DIFFERENT")
    write_figures(args.json, asdict(figures))
    if not figures.equal:
        sys.exit(1)


if __name__ == "__main__":
    main()
