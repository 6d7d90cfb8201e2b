"""What the benchmarks share: their options, a clock, a process of its own, progress, a table, the file of figures."""

from __future__ import annotations

import argparse
import json
import multiprocessing
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, TypeVar

import torch
from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from dqx.benchmarks.cases import MODELS, scaled
from dqx.common import accelerator
from dqx.common.devices import device_problems
from dqx.common.memory import peak_ram, trim, watch_peaks
from dqx.report.tables import Entry, Table
from dqx.report.terminal import print_lines, show

CPU = torch.device("cpu")
Say = Callable[[str], None]
T = TypeVar("T")


def options(name: str, about: str | None, *, figures: bool = True) -> argparse.ArgumentParser:
    """The command line of `python -m dqx.benchmarks.NAME`, by the module's docstring; with `--json` for figures."""
    parser = argparse.ArgumentParser(
        prog=f"python -m dqx.benchmarks.{name}", description=about, formatter_class=argparse.RawTextHelpFormatter
    )
    if figures:
        parser.add_argument("--json", type=Path, help="write the figures to this file")
    return parser


def names(parser: argparse.ArgumentParser, option: str, text: str, known: Iterable[str]) -> list[str]:
    """The names in `a,b`. Ends the program where one is unknown."""
    chosen = text.split(",")
    if unknown := [name for name in chosen if name not in known]:
        parser.error(f"{option}: {', '.join(unknown)} is unknown; there are {', '.join(known)}")
    return chosen


def check(parser: argparse.ArgumentParser, args: argparse.Namespace, *counts: str, models: Iterable[str] = ()) -> None:
    """End the program where one of the options `counts` is below 1, where this machine has no such `--device`, or where
    `--scale` does not divide the widths of these `models` (names in MODELS)."""
    for name in counts:
        if (value := getattr(args, name)) is not None and value < 1:
            parser.error(f"--{name}={value} must be at least 1")
    for problem in device_problems(getattr(args, "device", "cpu")):
        parser.error(problem.replace("model.device", "--device"))
    for model in models:
        try:
            scaled(MODELS[model], args.scale)
        except ValueError as error:
            parser.error(f"--{error}")


def clock(device: torch.device = CPU) -> float:
    """Seconds: of this process on one thread of the CPU, so that other work on the machine does not count."""
    accelerator.synchronize(device)
    return time.process_time() if device.type == "cpu" and torch.get_num_threads() == 1 else time.perf_counter()


def seconds(work: Callable[[], object], device: torch.device = CPU) -> float:
    """What `work` takes, by the `clock`."""
    started = clock(device)
    work()
    return clock(device) - started


def in_turns(sides: Sequence[T], rounds: int) -> Iterator[tuple[int, T]]:
    """Every side once in each round, with the round's number, and not always behind the same one."""
    for turn in range(rounds):
        first = turn % len(sides)
        for side in (*sides[first:], *sides[:first]):
            yield turn, side


def taken(work: Callable[[], object], device: torch.device = CPU) -> int:
    """The most bytes that `work` takes besides what was there before."""

    def peak() -> int:
        return peak_ram() if device.type == "cpu" else accelerator.peak_memory(device)

    trim()
    watch_peaks(device)
    before = peak()
    work()
    return peak() - before


def in_process(work: Callable[..., Any], *arguments: Any, say: Say = lambda text: None) -> Any:
    """What `work(*arguments, say)` returns in a new process. Raises RuntimeError if that dies."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_send, args=(work, arguments, theirs))
    process.start()
    theirs.close()
    try:
        while True:
            ended, message = ours.recv()
            if ended:
                return message
            say(message)
    except EOFError:
        process.join()
        raise RuntimeError(f"the process ended with code {process.exitcode}; -9 means that memory ran out") from None
    finally:
        process.join()


def _send(work: Callable[..., Any], arguments: Sequence[Any], pipe: Connection) -> None:
    pipe.send((True, work(*arguments, lambda text: pipe.send((False, text)))))
    pipe.close()


@contextmanager
def progress() -> Iterator[Callable[[str], Say]]:
    """Lines on stderr: `line(name)` begins one, and what it returns says what stands behind the name."""
    columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True)) as shown:

        def line(name: str) -> Say:
            for before in shown.task_ids:
                shown.stop_task(before)
            task = shown.add_task(name)
            return lambda text: shown.update(task, description=f"{name}, {text}")

        yield line


def table(columns: Sequence[str], rows: Iterable[Sequence[str]], notes: Sequence[str] = (), *, left: int = 1) -> Table:
    """Rows of text, the first `left` columns flush left; short rows are filled up."""
    entries = [[Entry(text) for text in (*row, *[""] * (len(columns) - len(row)))] for row in rows]
    return Table("", tuple(columns), entries, [], notes=tuple(notes), left=left)


def tell(figures: Table) -> None:
    """Print a table with its notes."""
    console = Console(highlight=False, emoji=False)
    print_lines(console, ["", *show(figures, console)], "dim")


def write_figures(file: Path | None, figures: Any) -> None:
    """Write figures as JSON, where a file was asked for."""
    if file is not None:
        file.write_text(json.dumps(figures, indent=1) + "\n")
