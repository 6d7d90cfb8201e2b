"""How long quantizing takes: GPTQ, AWQ and DuQuant on one block, by dqx and by a plain transcription of the papers.

    python -m dqx.benchmarks.quantize                          both models, all methods: about forty minutes of one core
    python -m dqx.benchmarks.quantize --scale 4                all widths divided by 4: about six minutes
    python -m dqx.benchmarks.quantize --model dream_7b --methods gptq,duquant --json figures.json
    python -m dqx.benchmarks.quantize --parts all              what single parts take beside GPTQ, by dqx

The block has a model's real shapes and random weights; its input has planted outliers. Each side runs in a process of
its own, one after the other in the same minutes, and both results are compared. With `--parts` a model of one such
block is quantized with one part after the other, forward passes included. See README.md beside this file.
"""

from __future__ import annotations

import argparse
import tempfile
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from dqx.benchmarks.cases import LENGTH, MODELS, make_case, scaled
from dqx.benchmarks.common import (
    CPU,
    Say,
    check,
    in_process,
    names,
    options,
    progress,
    seconds,
    table,
    tell,
    write_figures,
)
from dqx.benchmarks.sides import BITS, LEFT_TO_RIGHT, SETTINGS, SIDES, SideRun, block_error, block_output, compare
from dqx.common.memory import peak_ram, watch_peaks
from dqx.config import compose
from dqx.models.checkpoint import skeleton
from dqx.models.transformer import Block
from dqx.quant import quantize
from dqx.report.tables import Table

NAMES = ("plain", "dqx")
USUAL = "llada_8b,dream_7b"  # models
MIB = 2**20

#: What `--parts` measures: method, bits and settings by name. Each one is put beside GPTQ from left to right.
LEVELS, DAC = "method.rounding.levels", "+method.corrections"
PARTS: dict[str, tuple[str, str, tuple[str, ...]]] = {
    "gptq": ("gptq", "w2a16", (LEFT_TO_RIGHT,)),
    "act_order": ("gptq", "w2a16", ()),
    "group_order": (
        "gptq",
        "w2a16",
        (
            LEFT_TO_RIGHT,
            "method.rounding.group_order=true",
        ),
    ),
    "gptaq": ("gptaq", "w2a16", ()),
    "weight_mse": (
        "gptq",
        "w2a16",
        (
            LEFT_TO_RIGHT,
            "method.clip=weight_mse",
        ),
    ),
    "dual_scale": ("gptq", "w2a16", (LEFT_TO_RIGHT, f"{LEVELS}=dual_scale", f"{LEVELS}.fold=false")),
    "daq_abmp": ("gptq", "w2a16", (LEFT_TO_RIGHT, f"{LEVELS}=daq", f"{LEVELS}.allocation=abmp")),
    "blockwise": ("gptq", "w2a16", ("method.rounding=blockwise",)),
    "dac": ("gptq", "w2a16", (LEFT_TO_RIGHT, f"{DAC}.shift=mean_shift", f"{DAC}.final=final_shift")),
    "mask_state": ("gptq", "w2a16", (LEFT_TO_RIGHT, "calib=mcs", "method.token_weight=mask_state")),
    "confidence": ("gptq", "w2a16", (LEFT_TO_RIGHT, "calib=mcs", "method.token_weight=confidence")),
    "value_clip": (
        "gptq",
        "w2a16",
        (LEFT_TO_RIGHT, "method.kv=per_head", "method.kv.value_clip=attention", "bits.kv.bits=4"),
    ),
    "d2quant": ("d2quant", "w2a16", ()),
    "quant_dllm": ("quant_dllm", "w2a16", ()),
}
#: Parts that round in every forward. Each one is put beside the first.
IN_FORWARDS: dict[str, tuple[str, str, tuple[str, ...]]] = {
    "no rounding": ("rtn", "w16a16", ()),
    "activations per token": ("rtn", "w16a16", ("bits.activation.bits=4",)),
    "groups of 128": ("rtn", "w16a16", ("bits.activation.bits=4", "bits.activation.group_size=128")),
    "groups of 128, rescale": (
        "rtn",
        "w16a16",
        ("bits.activation.bits=4", "bits.activation.group_size=128", "method.activation.rescale=true"),
    ),
    "kv per_head": ("rtn", "w16a16", ("bits.kv.bits=4", "method.kv=per_head")),
    "kv per_head, center": ("rtn", "w16a16", ("bits.kv.bits=4", "method.kv=per_head", "method.kv.center=mean")),
    "kv per_channel, 32, 128": (
        "rtn",
        "w16a16",
        ("bits.kv.bits=4", "method.kv=per_channel", "method.kv.token_group=32", "method.kv.recent=128"),
    ),
}
OTHERS = ("k", "v", "o", "gate")  # not rounded with `--parts`: one linear of each shape is
FORWARDS = 3  # of which the fastest counts
VOCABULARY = 1024  # of the model of one block: embedding and head would take more than the block


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
    start_mib: dict[str, float] = field(default_factory=dict)  # of that when the method started
    differences: dict[str, float] = field(default_factory=dict)
    errors: dict[str, float] = field(default_factory=dict)  # relative squared error of the block's output, by side
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
            if "error" in result:
                figures.errors[side] = result["error"]
        figures.differences = result["differences"]
    return figures


def _work(figures: Figures, side: str, folder: str, say: Say) -> dict[str, Any]:
    """One side in a process of its own; the dqx side reads what the plain side left in `folder` and compares."""
    torch.set_num_threads(figures.threads)

    def told(text: str) -> None:
        say(f"{side}: {text}")

    arch = scaled(MODELS[figures.model], figures.scale)
    choice = compose.select(method=figures.method, bits=figures.bits, overrides=SETTINGS[figures.method])
    run = SideRun(make_case(arch, figures.tokens), compose.build(choice.method), choice.bits, told)
    SIDES[figures.method][NAMES.index(side)](run)
    run.note_peak()
    result: dict[str, Any] = {"seconds": run.seconds, "aside": run.aside}
    result |= {"peak_mib": run.peak / MIB, "start_mib": run.start / MIB}
    if figures.method != "duquant":  # whose weights are rotated
        result["error"] = block_error(run, make_case(arch, figures.tokens))
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
        f"{max(max(f.start_mib.values()) for f in rows):.0f} at most before the method began (libraries, block, "
        "inputs). Whole model: one block times the number of blocks.",
    ]
    for f in rows:
        for phase, theirs in f.aside.items():
            total = f.total("plain") - f.seconds["plain"][phase] + theirs
            lines.append(
                f"{f.model} {f.method}: with matrix products in its {phase} the plain side takes {theirs:.2f} s there, "
                f"{total:.2f} s in all, and the ratio is {total / f.total('dqx'):.2f}."
            )
        if f.errors:
            shares = ", ".join(f"{side} {error:.5f}" for side, error in f.errors.items())
            lines.append(f"{f.model} {f.method}: relative squared error of the block's output: {shares}")
        rest = {k: v for k, v in f.differences.items() if k != "codes"}
        lines.append(f"{f.model} {f.method}: " + ", ".join(f"{name} {value:.2g}" for name, value in rest.items()))
    return lines


@torch.no_grad()
def _part(name: str, args: argparse.Namespace, say: Say) -> dict[str, Any]:
    """What a part takes on a model of one block, in a process of its own: seconds, and MiB beside the model's."""
    torch.set_num_threads(args.threads)
    method, bits, settings = (PARTS | IN_FORWARDS)[name]
    others = [f"+method.rounding_by_role.{role}=null" for role in OTHERS if name in PARTS]
    choice = compose.select(method=method, bits=bits, overrides=[*settings, *others])
    whole = scaled(MODELS[args.model[0]], args.scale)
    arch = replace(whole, n_blocks=1, vocab_size=VOCABULARY, mask_token_id=VOCABULARY - 1)
    model = skeleton(arch).to_empty(device=CPU).requires_grad_(False)
    model.blocks[0] = make_case(arch, args.tokens).block
    for weight in (model.embed.weight, model.norm.weight, model.head.weight):
        weight.normal_(generator=torch.Generator().manual_seed(1))
    ids = torch.randint(VOCABULARY - 1, (args.tokens // LENGTH, LENGTH), generator=torch.Generator().manual_seed(0))
    ids[:, ::2] = arch.mask_token_id
    built = compose.build(choice.method)
    watch_peaks(CPU)
    start = peak_ram()
    if name in PARTS:
        spent = seconds(lambda: quantize(model, built, choice.bits, [ids], progress=False))
    else:
        quantize(model, built, choice.bits, [ids], progress=False)
        block, inputs = model.blocks[0], [model.embed(row) for row in ids.split(1)]
        assert isinstance(block, Block)
        block_output(block, inputs[0])
        spent = min(seconds(lambda: [block_output(block, x) for x in inputs]) for _ in range(FORWARDS))
    return {"seconds": spent, "peak_mib": (peak_ram() - start) / MIB}


def overview_of_parts(figures: dict[str, dict[str, Any]], args: argparse.Namespace) -> Table:
    """What each part takes, the first of its kind 1."""
    lines = []
    for kind in (PARTS, IN_FORWARDS):
        first = figures.get(next(iter(kind)))
        for name in (name for name in kind if name in figures):
            own = figures[name]
            ratio = "" if first is None else f"{own['seconds'] / first['seconds']:.2f}"
            lines.append([name, " ".join(kind[name][2]), f"{own['seconds']:.2f}", ratio, f"{own['peak_mib']:.0f}"])
    divided = "" if args.scale == 1 else f", all widths divided by {args.scale}"
    about = (
        f"One block of {args.model[0]}{divided}, {args.tokens} tokens, {args.threads} threads. First what rounding "
        f"one linear of each shape takes ({', '.join(OTHERS)} stay as they are), forward passes included; then what "
        "a forward takes. MiB: at most, beside model and libraries."
    )
    return table(("part", "settings", "s", "ratio", "MiB"), lines, [about], left=2)


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = options("quantize", __doc__)
    parser.add_argument("--model", default=USUAL, help=f"one or several of {', '.join(MODELS)} ({USUAL})")
    parser.add_argument("--methods", default=",".join(SIDES), help=f"one or several of {', '.join(SIDES)} (all)")
    parser.add_argument("--tokens", type=int, default=2048, help=f"a multiple of {LENGTH} (2048)")
    parser.add_argument("--scale", type=int, default=1, help="divide all widths by this (1)")
    parser.add_argument("--parts", help=f"all, or one or several of {', '.join(PARTS | IN_FORWARDS)}; first model only")
    parser.add_argument("--threads", type=int, default=1, help="threads of each process (1)")
    args = parser.parse_args(argv)
    args.model = names(parser, "--model", args.model, MODELS)
    args.methods = names(parser, "--methods", args.methods, SIDES)
    every = PARTS | IN_FORWARDS
    args.parts = (
        list(every) if args.parts == "all" else names(parser, "--parts", args.parts, every) if args.parts else []
    )
    if args.tokens < LENGTH or args.tokens % LENGTH:
        parser.error(f"--tokens={args.tokens} must be a multiple of {LENGTH}, the length of a sequence; write 2048")
    check(parser, args, "threads", models=args.model)
    return args


def main(argv: list[str] | None = None) -> None:
    args = arguments(argv)
    rows: list[Figures] = []
    if args.parts:
        parts: dict[str, dict[str, Any]] = {}
        with progress() as line:
            for name in args.parts:
                parts[name] = in_process(_part, name, args, say=line(name))
                write_figures(args.json, parts)
        tell(overview_of_parts(parts, args))
        return
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
