"""What it takes to write and read rounded weights at their true width: one block, beside itself in bfloat16.

    python -m dqx.benchmarks.packing                            LLaDA-8B's shapes: some three minutes of one core
    python -m dqx.benchmarks.packing --bits fp8,gguf_q4_k       other choices of the config group `bits`
    python -m dqx.benchmarks.packing --quick                    a small block, to see that it runs

The block has random weights, rounded to nearest once for each choice of `--bits`. All sides write their file and read
it again in turns, round after round, and ratios to bfloat16 are taken within a round. See README.md beside this file.
"""

from __future__ import annotations

import argparse
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor

from dqx.benchmarks.common import (
    CPU,
    Say,
    check,
    in_turns,
    names,
    options,
    progress,
    seconds,
    table,
    taken,
    tell,
    write_figures,
)
from dqx.benchmarks.paths import architecture, random_model
from dqx.common import accelerator
from dqx.common.environment import environment
from dqx.common.memory import gigabytes
from dqx.config import compose
from dqx.formats.integers import bit_patterns
from dqx.models.transformer import Architecture, Block
from dqx.quant import quantize
from dqx.quant.checkpoint.folder import BLOCK, read_block, write_block
from dqx.report.tables import Table

BASE = "bfloat16"
BITS = ("w8a8", "w4a16", "w3a16", "w2a16")
METHOD = "rtn"  # needs no text; packing does not depend on what chose the codes


@dataclass
class Figures:
    """One side: times by round, and what it takes on disk and in memory, in bytes."""

    side: str
    write: list[float] = field(default_factory=list)  # seconds
    read: list[float] = field(default_factory=list)
    disk: int = 0
    memory_to_write: int = 0  # at most, besides the block
    memory_to_read: int = 0  # at most, with the block that is read and the pages of the file
    equal: bool = False  # whether what was read is what was written, to the bit


@dataclass(frozen=True)
class Side:
    """A block, and the folder that it is written to."""

    block: Block
    folder: Path
    arch: Architecture

    @property
    def file(self) -> Path:
        return self.folder / BLOCK.format(0)

    def write(self) -> None:
        write_block(self.folder, 0, self.block)

    def read(self) -> Block:
        return read_block(self.folder, 0, self.arch, CPU)


def block_of_side(name: str, arch: Architecture) -> Block:
    """The same random block, rounded as `name` says."""
    model = random_model(arch, 0, CPU, torch.bfloat16).eval().requires_grad_(False)
    if name != BASE:
        choice = compose.select(method=METHOD, bits=name)
        quantize(model, compose.build(choice.method), choice.bits, progress=False)
    block = model.blocks[0]
    assert isinstance(block, Block)
    return block


def measure(bits: list[str], arch: Architecture, rounds: int, say: Say) -> list[Figures]:
    """All sides, in turns, after each has written and read once untimed."""
    with TemporaryDirectory() as folder:
        sides: dict[str, Side] = {}
        for name in (BASE, *bits):
            say(f"rounding to {name}")
            (Path(folder) / name).mkdir()
            sides[name] = Side(block_of_side(name, arch), Path(folder) / name, arch)
        figures = {name: Figures(name) for name in sides}
        for name, side in sides.items():
            own = figures[name]
            own.memory_to_write, own.memory_to_read = taken(side.write), taken(side.read)
            own.disk, own.equal = side.file.stat().st_size, same(side.block, side.read())
        for turn, name in in_turns(list(sides), rounds):
            say(f"round {turn + 1} of {rounds}, {name}")
            figures[name].write.append(seconds(sides[name].write))
            figures[name].read.append(seconds(sides[name].read))
    return list(figures.values())


def same(one: Block, other: Block) -> bool:
    """Whether two blocks have the same tensors, to the bit."""

    def bits(x: Tensor) -> Tensor:
        return bit_patterns(x) if x.is_floating_point() else x

    ours, theirs = one.state_dict(), other.state_dict()
    return ours.keys() == theirs.keys() and all(torch.equal(bits(ours[name]), bits(theirs[name])) for name in ours)


def overview(rows: list[Figures], notes: list[str]) -> Table:
    """A line per side; ratios are to the first one."""
    base = rows[0]
    lines = []
    for row in rows:
        line = [row.side, gigabytes(row.disk), f"{base.disk / row.disk:.2f}"]
        for own, first, memory in (
            (row.write, base.write, row.memory_to_write),
            (row.read, base.read, row.memory_to_read),
        ):
            ratios = [a / b for a, b in zip(own, first, strict=True)]
            spread = "" if row is base else f"{median(ratios):.1f} ({min(ratios):.1f} to {max(ratios):.1f})"
            line += [f"{median(own):.3g}", spread, gigabytes(memory)]
        lines.append([*line, "yes" if row.equal else "NO"])
    columns = ("", "on disk", "times smaller", "write s", "times as long", "memory",
               "read s", "times as long", "memory", "equal")  # fmt: skip
    return table(columns, lines, notes)


def notes(arch: Architecture, args: argparse.Namespace) -> list[str]:
    """What the numbers are."""
    clocked = "processor time on one thread" if args.threads == 1 else f"wall-clock time on {args.threads} threads"
    machine = ", ".join((accelerator.name(CPU), *accelerator.instructions(CPU)))
    return [
        f"One block, hidden {arch.hidden_size}, MLP {arch.mlp_size}, {METHOD}; {machine}; {clocked}, medians of "
        f"{args.rounds} rounds in turns, in brackets the lowest and the highest.",
        "write: codes read off the weights, packed, written, with a checksum. memory: at most; of writing besides the "
        "block, of reading with the block, which is in bfloat16 again, and the mapped file.",
    ]


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = options("packing", __doc__)
    parser.add_argument("--bits", default=",".join(BITS), help=f"choices of the config group `bits` ({','.join(BITS)})")
    parser.add_argument("--scale", type=int, default=1, help="divide LLaDA-8B's widths by this (1)")
    parser.add_argument("--rounds", type=int, default=5, help="how often every side is timed (5)")
    parser.add_argument("--threads", type=int, default=1, help="threads (1)")
    parser.add_argument("--quick", action="store_true", help="widths divided by 16, two rounds")
    args = parser.parse_args(argv)
    args.bits = names(parser, "--bits", args.bits, compose.choices("bits"))
    if args.quick:
        args.scale, args.rounds = 16, 2
    check(parser, args, "rounds", "threads", models=["llada_8b"])
    return args


def main(argv: list[str] | None = None) -> None:
    args = arguments(argv)
    torch.set_num_threads(args.threads)
    arch = architecture(args.scale, 1)
    with progress() as line:
        rows = measure(args.bits, arch, args.rounds, line("packing"))
    settings = {name: value for name, value in vars(args).items() if name != "json"}
    figures: dict[str, Any] = {"machine": environment("cpu"), "settings": settings}
    write_figures(args.json, figures | {"figures": [asdict(row) for row in rows]})
    tell(overview(rows, notes(arch, args)))


if __name__ == "__main__":
    main()
