"""How long quantizing takes: GPTQ, AWQ and DuQuant on one block, by dqx and by a plain transcription of the papers.

    python -m dqx.benchmarks.quantize                          both models, all methods: about forty minutes of one core
    python -m dqx.benchmarks.quantize --scale 4                all widths divided by 4: about six minutes
    python -m dqx.benchmarks.quantize --model dream_7b --methods gptq,duquant --json figures.json

The block has a model's real shapes and random weights; its input has planted outliers. Each side runs in a process of
its own, one after the other in the same minutes, and both results are compared. See README.md beside this file.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import resource
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table
from safetensors.torch import load_file, save_file

from dqx.benchmarks.cases import LENGTH, MODELS, make_case, scaled
from dqx.benchmarks.sides import BITS, SIDES, Job, compare
from dqx.config import compose
from dqx.report.terminal import RULES

NAMES = ("plain", "dqx")


@dataclass
class Figures:
    """One method on one block."""

    model: str
    method: str
    bits: str
    tokens: int
    scale: int
    threads: int
    blocks: int
    seconds: dict[str, dict[str, float]] = field(default_factory=dict)  # by side and phase
    peak_mib: dict[str, float] = field(default_factory=dict)  # of the whole process, by side
    start_mib: dict[str, float] = field(default_factory=dict)  # before the method started: block, inputs, libraries
    differences: dict[str, float] = field(default_factory=dict)
    aside: dict[str, float] = field(default_factory=dict)  # seconds of the plain side that do not count, by phase

    def total(self, side: str) -> float:
        return sum(self.seconds[side].values())

    @property
    def ratio(self) -> float:
        return self.total("plain") / self.total("dqx")

    def to_dict(self) -> dict[str, Any]:
        per_model = {side: self.total(side) * self.blocks for side in NAMES}
        return asdict(self) | {"ratio": self.ratio, "seconds_per_model": per_model}


def measure(figures: Figures, progress: Callable[[str], None]) -> Figures:
    """Run both sides, each in a fresh process, and fill in the figures."""
    with tempfile.TemporaryDirectory() as folder:
        for side in NAMES:
            result = _in_process(figures, side, folder, progress)
            figures.seconds[side] = result["seconds"]
            if side == "plain":
                figures.aside = result["aside"]
            figures.peak_mib[side], figures.start_mib[side] = result["peak_mib"], result["start_mib"]
        figures.differences = result["differences"]
    return figures


def _in_process(figures: Figures, side: str, folder: str, progress: Callable[[str], None]) -> dict[str, Any]:
    """The result of `_work` from a new process, whose texts go to `progress`. Raises RuntimeError if it dies."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_work, args=(figures, side, folder, theirs))
    process.start()
    theirs.close()
    try:
        while True:
            message = ours.recv()
            if isinstance(message, dict):
                return message
            progress(f"{side}: {message}")
    except EOFError:
        process.join()
        raise RuntimeError(
            f"{figures.method} on {figures.model}, {side}: the process ended with code {process.exitcode}; "
            "if that is -9, memory ran out: take a larger --scale or fewer --tokens"
        ) from None
    finally:
        process.join()


def _work(figures: Figures, side: str, folder: str, pipe: Connection) -> None:
    """One side in a process of its own; the dqx side reads what the plain side left in `folder` and compares."""
    torch.set_num_threads(figures.threads)
    case = make_case(scaled(MODELS[figures.model], figures.scale), figures.tokens)
    choice = compose.select(method=figures.method, bits=figures.bits)
    job = Job(case, compose.build(choice.method), choice.bits, pipe.send)
    start = _peak_mib()
    SIDES[figures.method][NAMES.index(side)](job)
    result: dict[str, Any] = {
        "seconds": job.outcome.seconds,
        "aside": job.outcome.aside,
        "peak_mib": _peak_mib(),
        "start_mib": start,
    }
    file = Path(folder) / "plain.safetensors"
    if side == "plain":
        save_file({name: tensor.contiguous() for name, tensor in job.outcome.found.items()}, file)
    else:
        if figures.method == "duquant":
            fresh = make_case(scaled(MODELS[figures.model], figures.scale), figures.tokens)
            job = Job(fresh, job.method, job.bits, pipe.send)
        result["differences"] = compare(figures.method, job, load_file(file))
    pipe.send(result)
    pipe.close()


def _peak_mib() -> float:
    """The largest resident size of this process so far."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if sys.platform == "darwin" else 2**10)


def table(rows: list[Figures]) -> Table:
    """Times, ratios, equality and memory of all figures; methods of several phases get a line per phase."""
    result = Table(box=RULES, show_edge=False, pad_edge=False, header_style="bold")
    for head in ("model", "method"):
        result.add_column(head, no_wrap=True)
    for head in ("plain\ns", "dqx\ns", "ratio", "codes that\ndiffer", "plain\nMiB", "dqx\nMiB", "plain\nh per model",
                 "dqx\nh per model"):  # fmt: skip
        result.add_column(head, justify="right", no_wrap=True)
    for f in rows:
        per_model = [f"{f.total(side) * f.blocks / 3600:.2f}" for side in NAMES]
        memory = [f"{f.peak_mib[side]:.0f}" for side in NAMES]
        result.add_row(
            f.model, f"{f.method} {f.bits}", *(f"{f.total(side):.2f}" for side in NAMES), f"{f.ratio:.2f}",
            f"{100 * f.differences['codes']:.3f} %", *memory, *per_model,
        )  # fmt: skip
        if len(f.seconds["dqx"]) > 1:
            for phase, ours in f.seconds["dqx"].items():
                theirs = f.seconds["plain"][phase]
                result.add_row("", f"  {phase}", f"{theirs:.2f}", f"{ours:.2f}", f"{theirs / ours:.2f}", style="dim")
    return result


def legend(rows: list[Figures]) -> list[str]:
    """What the numbers are."""
    first = rows[0]
    clock = "processor time on one thread" if first.threads == 1 else f"wall-clock time on {first.threads} threads"
    lines = [
        f"One block{'' if first.scale == 1 else f', all widths divided by {first.scale}'}, {first.tokens} tokens in "
        f"sequences of {LENGTH}; {clock}, without the forward passes that gather inputs.",
        "MiB: largest resident size of the process, of which "
        f"{max(max(f.start_mib.values()) for f in rows):.0f} at most before the method began. Whole model: one block "
        "times the number of blocks.",
    ]
    for f in rows:
        for phase, theirs in f.aside.items():
            total = f.total("plain") - f.seconds["plain"][phase] + theirs
            lines.append(
                f"{f.model} {f.method}: with matrix products in its {phase} the plain side takes {theirs:.2f} s there, "
                f"{total:.2f} s in all, and the ratio is {total / f.total('dqx'):.2f}."
            )
        rest = {k: v for k, v in f.differences.items() if k != "codes"}
        lines.append(f"{f.model} {f.method}: " + ", ".join(f"{name} {value:.2g}" for name, value in rest.items()))
    return lines


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m dqx.benchmarks.quantize", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--model", default=",".join(MODELS), help=f"one or several of {', '.join(MODELS)} (all)")
    parser.add_argument("--methods", default=",".join(SIDES), help=f"one or several of {', '.join(SIDES)} (all)")
    parser.add_argument("--tokens", type=int, default=2048, help=f"a multiple of {LENGTH} (2048)")
    parser.add_argument("--scale", type=int, default=1, help="divide all widths by this (1)")
    parser.add_argument("--threads", type=int, default=1, help="threads of each process (1)")
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    args = parser.parse_args(argv)
    args.model, args.methods = args.model.split(","), args.methods.split(",")
    for names, known, option in ((args.model, MODELS, "--model"), (args.methods, SIDES, "--methods")):
        if strange := [name for name in names if name not in known]:
            parser.error(f"{option}: {', '.join(strange)} is unknown; there are {', '.join(known)}")
    if args.tokens < LENGTH or args.tokens % LENGTH:
        parser.error(f"--tokens={args.tokens} must be a multiple of {LENGTH}, the length of a sequence; write 2048")
    if args.threads < 1:
        parser.error(f"--threads={args.threads} must be at least 1")
    for model in args.model:
        try:
            scaled(MODELS[model], args.scale)
        except ValueError as error:
            parser.error(f"{model}: --{error}")
    return args


def main(argv: list[str] | None = None) -> None:
    args = arguments(argv)
    rows: list[Figures] = []
    columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True)) as progress:
        for model in args.model:
            for method in args.methods:
                figures = Figures(
                    model, method, BITS[method], args.tokens, args.scale, args.threads, MODELS[model].n_blocks
                )
                task = progress.add_task(f"{model} {method}")

                def say(text: str, task: Any = task, name: str = f"{model} {method}") -> None:
                    progress.update(task, description=f"{name}, {text}")

                rows.append(measure(figures, say))
                say(f"{rows[-1].ratio:.2f} times as fast")
                progress.stop_task(task)
                if args.json is not None:  # after every method, so that a run that is broken off leaves something
                    args.json.write_text(json.dumps([row.to_dict() for row in rows], indent=1) + "\n")
    console = Console(highlight=False, emoji=False)
    Console(highlight=False, emoji=False, width=max(130, console.width)).print(table(rows))
    for line in legend(rows):
        console.print(line, style="dim", soft_wrap=True)


if __name__ == "__main__":
    main()
