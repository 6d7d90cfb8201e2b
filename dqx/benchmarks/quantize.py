"""How long quantizing takes: GPTQ, AWQ and DuQuant on one block, by dqx and by a plain transcription of the papers.

    python -m dqx.benchmarks.quantize                          both models, all methods: about forty minutes of one core
    python -m dqx.benchmarks.quantize --scale 4                all widths divided by 4: about six minutes
    python -m dqx.benchmarks.quantize --model dream_7b --methods gptq,duquant --json figures.json

The block has a model's real shapes and random weights; its input has planted outliers. Each side runs in a process of
its own, one after the other in the same minutes, and both results are compared. See README.md beside this file.
"""

from __future__ import annotations

import argparse
import tempfile
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from dqx.benchmarks.cases import LENGTH, MODELS, make_case, scaled
from dqx.benchmarks.common import Say, check_counts, in_process, names, options, progress, table, tell, write_figures
from dqx.benchmarks.sides import BITS, SIDES, SideRun, compare
from dqx.common.memory import peak_ram
from dqx.config import compose
from dqx.report.tables import Table

NAMES = ("plain", "dqx")
MIB = 2**20


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


def measure(figures: Figures, say: Say) -> Figures:
    """Run both sides, each in a fresh process, and fill in the figures. Raises RuntimeError if one dies."""
    with tempfile.TemporaryDirectory() as folder:
        for side in NAMES:
            try:
                result = in_process(_work, figures, side, folder, say=say)
            except RuntimeError as error:
                raise RuntimeError(
                    f"{figures.method} on {figures.model}, {side}: {error}: take a larger --scale or fewer --tokens"
                ) from None
            figures.seconds[side] = result["seconds"]
            if side == "plain":
                figures.aside = result["aside"]
            figures.peak_mib[side], figures.start_mib[side] = result["peak_mib"], result["start_mib"]
        figures.differences = result["differences"]
    return figures


def _work(figures: Figures, side: str, folder: str, say: Say) -> dict[str, Any]:
    """One side in a process of its own; the dqx side reads what the plain side left in `folder` and compares."""
    torch.set_num_threads(figures.threads)

    def told(text: str) -> None:
        say(f"{side}: {text}")

    arch = scaled(MODELS[figures.model], figures.scale)
    choice = compose.select(method=figures.method, bits=figures.bits)
    run = SideRun(make_case(arch, figures.tokens), compose.build(choice.method), choice.bits, told)
    start = peak_ram() / MIB
    SIDES[figures.method][NAMES.index(side)](run)
    result = {"seconds": run.seconds, "aside": run.aside, "peak_mib": peak_ram() / MIB, "start_mib": start}
    file = Path(folder) / "plain.safetensors"
    if side == "plain":
        save_file({name: tensor.contiguous() for name, tensor in run.tensors.items()}, file)
        return result
    if figures.method == "duquant":
        run = SideRun(make_case(arch, figures.tokens), run.method, run.bits, told)
    return result | {"differences": compare(figures.method, run, load_file(file))}


def overview(rows: list[Figures]) -> Table:
    """Times, ratios, equality and memory of all figures; methods of several phases get a line per phase."""
    columns = ("model", "method", "plain s", "dqx s", "ratio", "codes that differ", "plain MiB", "dqx MiB",
               "plain h per model", "dqx h per model")  # fmt: skip
    lines = []
    for f in rows:
        per_model = [f"{f.total(side) * f.blocks / 3600:.2f}" for side in NAMES]
        memory = [f"{f.peak_mib[side]:.0f}" for side in NAMES]
        totals = [f"{f.total(side):.2f}" for side in NAMES]
        codes = f"{100 * f.differences['codes']:.3f} %"
        lines.append([f.model, f"{f.method} {f.bits}", *totals, f"{f.ratio:.2f}", codes, *memory, *per_model])
        if len(f.seconds["dqx"]) > 1:
            for phase, ours in f.seconds["dqx"].items():
                theirs = f.seconds["plain"][phase]
                lines.append(["", f"  {phase}", f"{theirs:.2f}", f"{ours:.2f}", f"{theirs / ours:.2f}"])
    return table(columns, lines, notes(rows), left=2)


def notes(rows: list[Figures]) -> list[str]:
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
    parser = options("quantize", __doc__)
    parser.add_argument("--model", default=",".join(MODELS), help=f"one or several of {', '.join(MODELS)} (all)")
    parser.add_argument("--methods", default=",".join(SIDES), help=f"one or several of {', '.join(SIDES)} (all)")
    parser.add_argument("--tokens", type=int, default=2048, help=f"a multiple of {LENGTH} (2048)")
    parser.add_argument("--scale", type=int, default=1, help="divide all widths by this (1)")
    parser.add_argument("--threads", type=int, default=1, help="threads of each process (1)")
    args = parser.parse_args(argv)
    args.model = names(parser, "--model", args.model, MODELS)
    args.methods = names(parser, "--methods", args.methods, SIDES)
    if args.tokens < LENGTH or args.tokens % LENGTH:
        parser.error(f"--tokens={args.tokens} must be a multiple of {LENGTH}, the length of a sequence; write 2048")
    check_counts(parser, args, "threads")
    for model in args.model:
        try:
            scaled(MODELS[model], args.scale)
        except ValueError as error:
            parser.error(f"{model}: --{error}")
    return args


def main(argv: list[str] | None = None) -> None:
    args = arguments(argv)
    rows: list[Figures] = []
    with progress() as line:
        for model in args.model:
            for method in args.methods:
                say = line(f"{model} {method}")
                blocks = MODELS[model].n_blocks
                figures = Figures(model, method, BITS[method], args.tokens, args.scale, args.threads, blocks)
                rows.append(measure(figures, say))
                say(f"{rows[-1].ratio:.2f} times as fast")
                write_figures(args.json, [row.to_dict() for row in rows])  # now, lest the run be broken off
    tell(overview(rows))


if __name__ == "__main__":
    main()
