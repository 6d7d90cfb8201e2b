"""Seconds per denoising step, tokens per second, memory and size on disk: quantized models beside the same at 16 bits.

    python -m dqx.benchmarks.throughput                              the bundled model and a random one, one core
    python -m dqx.benchmarks.throughput --models FOLDER --device cuda --batches 1,8,32 --answers 128,256
    python -m dqx.benchmarks.throughput --models random --scale 1 --blocks 32 --device cuda

Every choice of `--bits` gives several sides: its simulation, each kernel of `backend=` that multiplies such codes, and,
for a GGUF type, llama.cpp on the exported file. All sides write the same answers in turns, round after round, and the
ratio to the model at full precision is taken within a round. A side that cannot run here is named with the reason. See
README.md beside this file.
"""

from __future__ import annotations

import argparse
import copy
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import torch

from dqx.api import DiffusionLM, load
from dqx.benchmarks.common import (
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
from dqx.benchmarks.paths import architecture, random_model, random_tokens
from dqx.common import accelerator
from dqx.common.environment import environment
from dqx.common.memory import gigabytes
from dqx.config import compose
from dqx.data.calibration import calibration_windows
from dqx.diffusion.block_engine import engine_for
from dqx.diffusion.engine import Answer, Prompt
from dqx.diffusion.samplers import LLaDASampler, Sampler
from dqx.engines import llama_cpp
from dqx.engines.model import EngineModel
from dqx.export import gguf
from dqx.models.checkpoint import save
from dqx.models.family import family_of
from dqx.models.transformer import MaskedDiffusionTransformer
from dqx.quant import quantize
from dqx.quant.backends.choice import KERNELS, SIMULATED, backend_problems, chosen, install, untrusted
from dqx.quant.checkpoint.folder import save_quantized
from dqx.report.tables import Table

BASE = "full precision"
BITS = ("w8a8", "w4a16", "gguf_q4_0")
ON_CUDA = ("fp8",)  # besides, where the kernel is one
GGUF = "gguf_"  # how the names of llama.cpp's types begin in conf/bits
METHOD = "rtn"  # needs no text; a forward takes as long whatever chose the codes
RANDOM, BUNDLED = "random", "nano_llada"
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


@dataclass(frozen=True)
class Subject:
    """A model at full precision, its sampler, and prompts for it; `lm` where it has a tokenizer."""

    name: str
    model: MaskedDiffusionTransformer
    sampler: Sampler
    prompts: Callable[[int, int], list[Prompt]]  # so many, of so many tokens each
    lm: DiffusionLM | None = None

    def words(self) -> str:
        arch = self.model.arch
        dtype = str(self.model.dtype).removeprefix("torch.")
        return f"{self.name}: {arch.n_blocks} blocks, hidden {arch.hidden_size}, MLP {arch.mlp_size}, {dtype}"


@dataclass(frozen=True)
class Side:
    """A model that writes the answers; `simulation` names the side whose answers they should be."""

    name: str
    model: MaskedDiffusionTransformer
    disk: int  # bytes
    simulation: str | None = None


@dataclass
class Figures:
    """One side at one batch size and length of answers."""

    model: str
    side: str
    batch: int
    answer: int  # tokens of each
    steps: int
    seconds: list[float]  # of writing the batch, by round
    ratios: list[float]  # seconds of the model at full precision in the same round, by this one's
    forwards_per_token: float
    memory: int | None  # bytes: the weights, and the most that writing takes besides
    disk: int  # bytes
    equal_to_simulation: float | None  # share of the tokens; None: no other side simulates this one
    equal_to_base: float  # share of the tokens that the model at full precision writes too

    @property
    def seconds_per_step(self) -> float:
        return median(self.seconds) / self.steps

    @property
    def tokens_per_second(self) -> float:
        return self.batch * self.answer / median(self.seconds)

    def to_dict(self) -> dict[str, Any]:
        derived = {"seconds_per_step": self.seconds_per_step, "tokens_per_second": self.tokens_per_second}
        ratio = {"median": median(self.ratios), "lowest": min(self.ratios), "highest": max(self.ratios)}
        return asdict(self) | derived | {"ratio": ratio}


def random_subject(args: argparse.Namespace) -> Subject:
    """LLaDA-8B's proportions at a fraction of its width."""
    arch = architecture(args.scale, args.blocks)
    model = random_model(arch, 0, torch.device(args.device), DTYPES[args.dtype]).eval().requires_grad_(False)

    def prompts(count: int, length: int) -> list[Prompt]:
        generator = torch.Generator().manual_seed(1)
        return [Prompt(random_tokens(model, length, generator), i) for i in range(count)]

    return Subject(f"random, LLaDA-8B's widths / {args.scale}", model, LLaDASampler(suppress_mask=True), prompts)


def loaded_subject(name: str, args: argparse.Namespace) -> Subject:
    """A model by its name in conf/model, or a checkpoint; prompts are windows of the bundled text."""
    lm = load(name, dtype=args.dtype, device=args.device)

    def prompts(count: int, length: int) -> list[Prompt]:
        wanted = ["calib.text=nano", f"calib.samples={count}", f"calib.length={length}"]
        calib = compose.select(method=METHOD, bits="w4a16", overrides=wanted).calib
        return [Prompt(ids, i) for i, ids in enumerate(calibration_windows(calib, lm.tokenizer, seed=0))]

    return Subject(lm.config.name, lm.model, lm.sampler, prompts, lm)


def sides(subject: Subject, bits: Sequence[str], folder: Path, left_out: dict[str, str]) -> Iterator[Side]:
    """The side at full precision, then those of each choice of `bits`; what cannot run here joins `left_out`."""
    original, arch = subject.model, subject.model.arch
    save(original, family_of(arch.family).config(arch), folder / "original")
    yield Side(BASE, original, size(folder / "original"))
    for name in bits:
        in_gguf = name.startswith(GGUF)
        if in_gguf and (reason := _no_gguf(subject)):
            left_out[f"{name} llama.cpp"] = reason
            continue
        choice = compose.select(method=METHOD, bits=name)
        method, model, simulation = compose.build(choice.method), copy.deepcopy(original), f"{name} {SIMULATED}"
        report = quantize(model, method, choice.bits, progress=False)
        save_quantized(model, report, folder / name, method=method, bits=choice.bits)
        yield Side(simulation, model, size(folder / name))
        for backend in KERNELS:
            if any(backend_problems(backend, method, choice.bits, arch)):
                continue  # no kernel for such codes
            if reason := untrusted(backend, model.device):
                left_out[f"{name} {backend}"] = reason
                continue
            with_kernels = copy.deepcopy(model)
            install(with_kernels, chosen(backend, method, choice.bits, arch, model.device))
            yield Side(f"{name} {backend}", with_kernels, size(folder / name), simulation)
        if in_gguf:
            assert subject.lm is not None
            file = folder / f"{name}.gguf"
            gguf.write(replace(subject.lm, model=model), file)
            yield Side(f"{name} llama.cpp", EngineModel(arch, llama_cpp.LlamaCpp(file)), size(file), simulation)


def _no_gguf(subject: Subject) -> str | None:
    """Why llama.cpp cannot be a side."""
    if subject.lm is None:
        return "a GGUF file holds a tokenizer, and a random model has none"
    if subject.model.device.type != "cpu":
        return "llama.cpp computes on the CPU here; --device=cpu compares with it"
    return next(iter([*llama_cpp.problems(), *gguf.problems(subject.lm)]), None)


def size(path: Path) -> int:
    """Bytes of a file, or of the files in a folder."""
    return path.stat().st_size if path.is_file() else sum(file.stat().st_size for file in path.iterdir())


def held(model: MaskedDiffusionTransformer) -> int | None:
    """Bytes of a model's tensors; None where an engine holds them."""
    if isinstance(model, EngineModel):
        return None
    tensors = {each.data_ptr(): each.nbytes for each in (*model.parameters(), *model.buffers())}
    return sum(tensors.values())


def measure(
    subject: Subject, compared: Sequence[Side], batch: int, answer: int, args: argparse.Namespace
) -> list[Figures]:
    """All sides write the same `batch` answers in turns, after each has written them twice untimed: for the answers,
    which pays for what is set up once, and for the memory."""
    prompts, steps = subject.prompts(batch, args.prompt), max(1, answer // args.tokens_per_step)
    device, sampler = subject.model.device, subject.sampler
    settings: dict[str, Any] = {"gen_length": answer, "block_length": sampler.block_length(answer), "steps": steps}

    def write(side: Side) -> list[Answer]:
        return engine_for(sampler)(side.model, sampler, batch_size=batch, **settings).generate(prompts)

    written = {side.name: write(side) for side in compared}
    memory = {side.name: taken(partial(write, side), device) for side in compared}
    spent: dict[str, list[float]] = {side.name: [] for side in compared}
    for _, side in in_turns(compared, args.rounds):
        spent[side.name].append(seconds(partial(write, side), device))
    rows = []
    for side in compared:
        answers, weights = written[side.name], held(side.model)
        rows.append(
            Figures(
                subject.name,
                side.name,
                batch,
                answer,
                steps,
                spent[side.name],
                [base / own for base, own in zip(spent[BASE], spent[side.name], strict=True)],
                sum(each.n_forwards for each in answers) / sum(each.n_written for each in answers),
                None if weights is None else weights + memory[side.name],
                side.disk,
                None if side.simulation is None else same(answers, written[side.simulation]),
                same(answers, written[BASE]),
            )
        )
    return rows


def same(ours: Sequence[Answer], theirs: Sequence[Answer]) -> float:
    """The share of equal tokens."""
    equal = [a == b for one, other in zip(ours, theirs, strict=True) for a, b in zip(one.ids, other.ids, strict=True)]
    return sum(equal) / len(equal)


def overview(rows: Sequence[Figures], notes: Sequence[str]) -> Table:
    """A line per side, under each batch size and length."""
    lines, before = [], None
    for row in rows:
        here = (str(row.batch), str(row.answer))
        lines.append(
            [
                *(("", "") if here == before else here),
                row.side,
                f"{1000 * row.seconds_per_step:.2f}",
                f"{row.tokens_per_second:.0f}",
                f"{median(row.ratios):.2f}",
                f"{min(row.ratios):.2f} to {max(row.ratios):.2f}" if row.side != BASE else "",
                f"{row.forwards_per_token:.2f}",
                "" if row.memory is None else gigabytes(row.memory),
                gigabytes(row.disk),
                "" if row.equal_to_simulation is None else f"{100 * row.equal_to_simulation:.1f} %",
                f"{100 * row.equal_to_base:.1f} %" if row.side != BASE else "",
            ]
        )
        before = here
    columns = ("batch", "answer", "side", "ms per step", "tokens/s", "times as fast", "lowest to highest",
               "forwards per token", "memory", "on disk", "as simulated", "as full precision")  # fmt: skip
    return table(columns, lines, notes, left=3)


def notes(subject: Subject, left_out: dict[str, str], args: argparse.Namespace) -> list[str]:
    """What the numbers are, where they come from, and what is not among them."""
    device = subject.model.device
    clocked = "processor time" if device.type == "cpu" and torch.get_num_threads() == 1 else "wall-clock time"
    cap = os.environ.get("ONEDNN_MAX_CPU_ISA")
    machine = [
        accelerator.name(device),
        *accelerator.instructions(device),
        *([f"ONEDNN_MAX_CPU_ISA={cap}"] if cap and device.type == "cpu" else []),
        f"threads {torch.get_num_threads()}",
    ]
    return [
        f"{subject.words()}; prompts of {args.prompt} tokens, {args.tokens_per_step} tokens a step.",
        f"{', '.join(machine)}; {clocked}, medians of {args.rounds} rounds in turns. A ratio below 1 is slower.",
        "as simulated, as full precision: the share of the tokens that the simulation of the same codes, and the model "
        "at full precision, write too.",
        *(f"left out: {name}: {reason}." for name, reason in left_out.items()),
    ]


def compare(name: str, args: argparse.Namespace, say: Say) -> tuple[list[Figures], list[str], dict[str, str]]:
    """The figures of one model, notes on them, and the sides left out."""
    subject = random_subject(args) if name == RANDOM else loaded_subject(name, args)
    left_out: dict[str, str] = {}
    rows: list[Figures] = []
    with TemporaryDirectory() as folder:
        say("quantizing")
        compared = list(sides(subject, args.bits, Path(folder), left_out))
        for answer in args.answers:
            for batch in args.batches:
                say(f"{batch} answers of {answer} tokens")
                rows += measure(subject, compared, batch, answer, args)
    return rows, notes(subject, left_out, args), left_out


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = options("throughput", __doc__)
    parser.add_argument(
        "--models",
        default=f"{BUNDLED},{RANDOM}",
        help=f"names in conf/model or checkpoints, or {RANDOM}: a random model ({BUNDLED},{RANDOM})",
    )
    parser.add_argument("--bits", help=f"choices of the config group `bits` ({','.join(BITS)}; on CUDA also fp8)")
    parser.add_argument("--batches", default="1,4", help="answers written together (1,4)")
    parser.add_argument("--answers", default="32,64", help="tokens of an answer (32,64)")
    parser.add_argument("--prompt", type=int, default=32, help="tokens of a prompt (32)")
    parser.add_argument("--tokens-per-step", type=int, default=4, help="tokens per denoising step (4; study: 1)")
    parser.add_argument("--rounds", type=int, default=7, help="how often every side is timed (7)")
    parser.add_argument(
        "--scale", type=int, default=8, help="of the random model: divide LLaDA-8B's widths by this (8)"
    )
    parser.add_argument("--blocks", type=int, default=4, help="of the random model: transformer blocks (4)")
    parser.add_argument(
        "--dtype",
        default="bfloat16",
        choices=DTYPES,
        help="of the side at full precision and of simulations (bfloat16)",
    )
    parser.add_argument("--device", default="cpu", help="where all sides run: cpu, cuda, xpu (cpu)")
    parser.add_argument("--threads", type=int, default=1, help="threads on the CPU (1)")
    args = parser.parse_args(argv)
    check(parser, args, "prompt", "tokens_per_step", "rounds", "blocks", "threads", models=["llada_8b"])
    default = (*BITS, *(ON_CUDA if args.device.startswith("cuda") else ()))
    args.bits = names(parser, "--bits", args.bits or ",".join(default), compose.choices("bits"))
    args.models = args.models.split(",")
    for name in ("batches", "answers"):
        text = getattr(args, name)
        if not all(part.isdecimal() and int(part) for part in text.split(",")):
            parser.error(f"--{name}={text} must be numbers of at least 1, such as 1,4")
        setattr(args, name, [int(part) for part in text.split(",")])
    if wrong := [answer for answer in args.answers if answer % args.tokens_per_step]:
        parser.error(f"--tokens-per-step={args.tokens_per_step} must divide the answers; {wrong[0]} is no multiple")
    return args


def main(argv: list[str] | None = None) -> None:
    args = arguments(argv)
    torch.set_num_threads(args.threads)
    settings = {name: value for name, value in vars(args).items() if name not in ("json", "models")}
    figures: dict[str, Any] = {"machine": environment(args.device), "settings": settings, "models": []}
    tables = []
    with progress() as line:
        for name in args.models:
            rows, told, left_out = compare(name, args, line(name))
            tables.append(overview(rows, told))
            figures["models"].append({"left_out": left_out, "figures": [row.to_dict() for row in rows]})
            write_figures(args.json, figures)
    for each in tables:
        tell(each)


if __name__ == "__main__":
    main()
