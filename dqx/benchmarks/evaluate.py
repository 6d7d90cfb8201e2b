"""How long evaluating takes: GSM8K, HumanEval, MMLU, ARC and HellaSwag, by dqx and by the plain path of the study.

    python -m dqx.benchmarks.evaluate                          all tasks on one core: about seven minutes
    python -m dqx.benchmarks.evaluate --tasks mmlu,hellaswag --scale 8 --json figures.json
    python -m dqx.benchmarks.evaluate --scale 1 --blocks 32 --device cuda --dtype bfloat16 --documents 48
    python -m dqx.benchmarks.evaluate --quick                  a few seconds, to see that it runs

Random models of LLaDA-8B's proportions with prompts and answers as long as the real ones (lengths.json). Both paths
work on the same documents, one after the other in the same minutes, and their results are compared. See README.md
beside this file.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch

from dqx.benchmarks.common import check, names, options, progress, seconds, table, tell, write_figures
from dqx.benchmarks.lengths import TASKS, Lengths, read, spread
from dqx.benchmarks.paths import PATHS, PUBLISHED_MODEL, Comparison, Work, architecture, random_model
from dqx.config import compose
from dqx.evaluate.spec import TaskSpec
from dqx.models.transformer import Architecture
from dqx.report.tables import Table

#: Documents of each task, as many as take about seven minutes together.
DOCUMENTS = {"gsm8k": 12, "humaneval": 3, "mmlu": 12, "arc_easy": 36, "arc_challenge": 18, "hellaswag": 3}
GSM8K_STOP = 110  # tokens after which its answers stop, on average; the sampled lengths are scaled to it
ROUNDS = 3  # each with its own weights, prompts and draws; both paths in each
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass
class Figures:
    """One task, or several together."""

    task: str
    kind: str
    documents: int
    stop: float  # of a generation task, tokens until the stop string is complete; mean
    outcome: Comparison = field(default_factory=Comparison)

    @property
    def plain(self) -> Work:
        return self.outcome.plain + self.outcome.greedy

    @property
    def dqx(self) -> Work:
        return self.outcome.dqx

    @property
    def ratio(self) -> float:
        return self.plain.seconds / self.dqx.seconds

    @property
    def ratio_without_greedy(self) -> float:
        """Against a plain path that leaves the greedy pass out; of generation, which has none, the same."""
        return self.outcome.plain.seconds / self.dqx.seconds

    def savings(self) -> dict[str, float]:
        """Factors whose product is the ratio. All but the last are ratios of FLOPs, hence the same on any machine."""
        once, whole = self.outcome.plain.flops, self.dqx.whole_blocks + self.dqx.whole_head
        blocks = self.dqx.blocks + self.dqx.whole_head
        parts = {} if self.kind == "generation" else {"no greedy pass": self.plain.flops / once}
        parts["early stop" if self.kind == "generation" else "each state once"] = once / whole
        parts["last block only where it is read"] = whole / blocks
        parts["head only where it is read"] = blocks / self.dqx.flops
        parts["batches and all else"] = self.ratio * self.dqx.flops / self.plain.flops
        return parts

    def equality(self) -> str:
        if self.kind == "generation":
            return f"{sum(self.outcome.equal)} of {len(self.outcome.equal)} equal"
        return f"within {self.outcome.error:.1e}"

    def to_dict(self) -> dict[str, Any]:
        ratios = {"ratio": self.ratio, "ratio_without_greedy": self.ratio_without_greedy}
        return asdict(self) | ratios | {"savings": self.savings()}


def together(name: str, rows: list[Figures]) -> Figures:
    """The sum of several tasks of one kind."""
    outcome = sum((f.outcome for f in rows), Comparison())
    return Figures(name, rows[0].kind, sum(f.documents for f in rows), 0.0, outcome)


def chosen(task: str, spec: TaskSpec, count: int) -> list[Lengths]:
    """`count` documents of a task; GSM8K's answers stop after GSM8K_STOP tokens on average."""
    documents = spread(read(task), count)
    if task == "gsm8k":
        factor = GSM8K_STOP * count / sum(d.targets[0] for d in documents)
        documents = [replace(d, targets=(round(d.targets[0] * factor),)) for d in documents]
    if spec.gen_length is not None:
        documents = [replace(d, targets=(min(d.targets[0], spec.gen_length),)) for d in documents]
    return documents


def quick(spec: TaskSpec, documents: list[Lengths]) -> tuple[TaskSpec, list[Lengths]]:
    """A task of the same form with an eighth of prompts, steps and draws."""
    shorter = {name: max(1, value // 8) for name in ("gen_length", "block_length", "steps", "mc_samples")
               if (value := getattr(spec, name)) is not None}  # fmt: skip
    targets = 8 if spec.kind == "generation" else 1
    return replace(spec, **shorter), [
        Lengths(max(1, d.prompt // 8), tuple(max(1, t // targets) for t in d.targets)) for d in documents
    ]


def measure(task: str, args: argparse.Namespace) -> Iterator[Figures]:
    """The figures of a task, after each round."""
    spec = compose.suite([task])[task]
    if spec.gen_length is not None:
        spec = replace(spec, steps=spec.gen_length // args.tokens_per_step)
    documents = chosen(task, spec, args.documents or DOCUMENTS[task])
    if args.quick:
        spec, documents = quick(spec, documents)
    stop = sum(d.targets[0] for d in documents) / len(documents) if spec.kind == "generation" else 0.0
    figures = Figures(task, spec.kind, len(documents), stop)
    arch, device = architecture(args.scale, args.blocks), torch.device(args.device)
    for seed in range(min(ROUNDS, len(documents))):
        model = random_model(arch, seed, device, DTYPES[args.dtype])
        figures.outcome += PATHS[spec.kind](model, spec, documents[seed::ROUNDS], seed)
        yield figures


def matmul_rate(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of a large matrix product, the best of five tries."""
    width = 2048 if device.type == "cpu" else 8192
    matrix = torch.randn(width, width, device=device, dtype=dtype)
    return 2 * width**3 / min(seconds(lambda: matrix @ matrix, device) for _ in range(5))


def head_share(arch: Architecture) -> float:
    """The head's share of the parameters that multiply every token."""
    blocks = arch.n_blocks * sum(arch.in_features(role) * arch.out_features(role) for role in arch.roles)
    head = arch.vocab_size * arch.hidden_size
    return head / (head + blocks)


def overview(rows: list[Figures], notes: Sequence[str] = ()) -> Table:
    """Times, work and equality of both paths; under each task, what made the difference."""
    columns = ("task", "docs", "plain s", "of it greedy", "dqx s", "ratio", "without greedy", "plain forwards",
               "dqx forwards", "plain tokens", "dqx tokens", "results")  # fmt: skip
    lines = []
    for f in rows:
        both = (f.plain, f.dqx)
        seconds = [f"{w.seconds:.2f}" for w in (f.plain, f.outcome.greedy, f.dqx)]
        ratios = [f"{f.ratio:.2f}", f"{f.ratio_without_greedy:.2f}"]
        forwards, tokens = [str(w.sequences) for w in both], [f"{w.tokens / 1000:.1f}k" for w in both]
        lines.append([f.task, str(f.documents), *seconds, *ratios, *forwards, *tokens, f.equality()])
        lines += [[f"  {what}", "", "", "", "", f"{factor:.2f}"] for what, factor in f.savings().items()]
    return table(columns, lines, notes)


def notes(rows: list[Figures], args: argparse.Namespace, rate: float) -> list[str]:
    """What the numbers are, and how fast each path went."""
    arch = architecture(args.scale, args.blocks)
    clocked = "processor time on one thread" if args.device == "cpu" and args.threads == 1 else "wall-clock time"
    lines = [
        f"{arch.n_blocks} blocks, hidden {arch.hidden_size}, MLP {arch.mlp_size}, vocabulary {arch.vocab_size} (the "
        f"head has {100 * head_share(arch):.1f} % of the parameters that multiply, as at LLaDA-8B "
        f"{100 * head_share(PUBLISHED_MODEL):.1f} %), {args.dtype}; {clocked}.",
        "forwards: sequences through the model. tokens: of these, with padding. Lines under a task: factors of its "
        "ratio. without greedy: against a plain path without the greedy pass of each choice.",
    ]
    for f in rows:
        stop = f"; the stop string is complete after {f.stop:.0f} tokens on average" if f.stop else ""
        speeds = (
            f"{name} {w.tokens / w.seconds:.0f} tokens/s, {w.sequences / w.seconds:.1f} forwards/s, "
            f"{100 * w.flops / w.seconds / rate:.0f} % of peak"
            for name, w in (("plain", f.plain), ("dqx", f.dqx))
        )
        lines.append(f"{f.task}: {'; '.join(speeds)}{stop}.")
    lines.append(f"Peak: {rate / 1e12:.3g} TFLOP/s, " + ("as given." if args.peak else "a large matrix product here."))
    return lines


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = options("evaluate", __doc__)
    parser.add_argument("--tasks", default=",".join(TASKS), help=f"one or several of {', '.join(TASKS)} (all)")
    parser.add_argument("--documents", type=int, help="documents of every task (as many as take some minutes)")
    parser.add_argument("--scale", type=int, default=16, help="divide LLaDA-8B's widths by this (16)")
    parser.add_argument("--blocks", type=int, default=4, help="transformer blocks (4)")
    parser.add_argument("--tokens-per-step", type=int, default=4, help="tokens per denoising step (4; study: 1)")
    parser.add_argument("--device", default="cpu", help="where both sides run: cpu, cuda, xpu (cpu)")
    parser.add_argument("--dtype", default="float32", choices=DTYPES, help="type of the weights (float32)")
    parser.add_argument("--threads", type=int, default=1, help="threads on the CPU (1)")
    parser.add_argument("--peak", type=float, help="TFLOP/s of the device (those of a large matrix product)")
    parser.add_argument("--quick", action="store_true", help="tiny model, two documents, short prompts and answers")
    args = parser.parse_args(argv)
    args.tasks = names(parser, "--tasks", args.tasks, TASKS)
    if args.quick:
        args.scale, args.blocks, args.documents = 32, 2, args.documents or 2
    check(parser, args, "documents", "blocks", "threads", models=["llada_8b"])
    if args.tokens_per_step not in (1, 2, 4, 8, 16, 32):
        parser.error(
            f"--tokens-per-step={args.tokens_per_step} must divide a block of 32 tokens; 1, 2, 4, 8, 16, 32 do"
        )
    return args


def main(argv: list[str] | None = None) -> None:
    args = arguments(argv)
    torch.set_num_threads(args.threads)
    settings = {name: value for name, value in vars(args).items() if name not in ("tasks", "json")}
    rows: list[Figures] = []
    with progress() as line:
        for name in args.tasks:
            say = line(name)
            for figures in measure(name, args):
                say(f"{figures.ratio:.2f} times as fast")
            rows.append(figures)
            write_figures(args.json, [row.to_dict() | {"settings": settings} for row in rows])  # now, lest it break off
    arc = [f for f in rows if f.task.startswith("arc_")]
    shown = [*rows, together("arc, both", arc)] if len(arc) > 1 else rows
    rate = args.peak * 1e12 if args.peak else matmul_rate(torch.device(args.device), DTYPES[args.dtype])
    tell(overview(shown, notes(rows, args, rate)))


if __name__ == "__main__":
    main()
