"""What a run or a sweep would do and roughly what it would cost, without a weight, a dataset or a network.

`python launch.py experiment=qdlm_table1 plan=true` prints one row per run. Everything is an estimate from the sizes of
models and benchmarks (`dqx/models/published.py`, `dqx/evaluate/sizes.py`); `ASSUMPTIONS` says how, under the table.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TextIO

from omegaconf import DictConfig, OmegaConf
from rich.console import Console
from rich.table import Table
from rich.text import Text

from dqx.checks import problems
from dqx.config import Config, ConfigProblems, build, resolve
from dqx.evaluate.sizes import SIZES, TEXT_TOKENS
from dqx.evaluate.spec import TaskSpec, steps_of
from dqx.models.checkpoint import PACKAGED, CheckpointError, locate, read_config
from dqx.models.published import of_family
from dqx.models.transformer import ROLES, SITES, Architecture
from dqx.names import method_label
from dqx.quant.bits import UNQUANTIZED, BitsConfig
from dqx.quant.method import Method
from dqx.report import RULES

#: Passes of the calibration text through all blocks that collecting statistics takes, per stream.
PASSES_PER_STREAM = 3
#: The same for one candidate of a scale search: each linear once in its own and once in a neighbour's judge, about.
PASSES_PER_CANDIDATE = 1.5
ASSUMPTIONS = (
    "Estimated, not measured, at {tflops:g} x 10^12 operations per second (plan_tflops=...), which short sequences",
    "do not reach. A sequence of T tokens takes 2 x parameters x T + 4 x blocks x width x T^2 operations, embedding",
    "not counted. Sequences, tokens and operations are of one evaluation; prompts have mean lengths",
    "(dqx/evaluate/sizes.py), answers take all their steps. Calibration: 3 passes of the text per stream, Hessians,",
    "1.5 passes per candidate of a scale search; solving, clipping and rotating are not counted. The full-precision",
    "side is counted in the first run that needs it, and takes nothing where an earlier run left it in cache_dir.",
)


@dataclass(frozen=True)
class TaskCost:
    """One evaluation of one task."""

    documents: int
    per_document: str  # "4 choices x 128 draws", "256 steps"
    forwards: int  # sequences through the model
    length: int  # tokens of each

    @property
    def tokens(self) -> int:
        return self.forwards * self.length


@dataclass
class PlannedRun:
    """One run of the plan. `problems` keep it from running; then nothing is estimated."""

    model: str
    method: str
    bits: str
    tasks: list[str]
    problems: list[str] = field(default_factory=list)
    costs: dict[str, TaskCost] = field(default_factory=dict)  # of the tasks whose size is known
    evaluation: dict[str, float] = field(default_factory=dict)  # operations by task
    quantization: float = 0.0  # operations
    changes: bool = True  # False: nothing is quantized, so the full-precision results are the run's
    baselines: dict[str, str] = field(default_factory=dict)  # task -> what its full-precision result depends on
    assumed: str | None = None  # whose published shapes stand in for a checkpoint that is not here


def plan_run(cfg: DictConfig) -> PlannedRun:
    """What one composed configuration would do. Never raises for a configuration that cannot run: it says why."""
    try:
        return _planned(resolve(cfg))
    except ConfigProblems as error:
        names = ("model.name", "method.name", "method.variant", "bits.name")
        model, method, variant, bits = (_text(cfg, key) for key in names)
        tasks = [str(name) for name in OmegaConf.select(cfg, "task.suite") or ()]
        return PlannedRun(model, method_label(method, variant), bits, tasks, error.problems)


def _text(cfg: DictConfig, key: str) -> str:
    try:
        return str(OmegaConf.select(cfg, key, default=""))
    except Exception:  # an interpolation that fails is among the problems already
        return "?"


def _planned(config: Config) -> PlannedRun:
    suite = config.task.suite
    label = method_label(config.method.name, config.method.variant)
    run = PlannedRun(config.model.name, label, config.bits.name, list(suite))
    shapes, found = _architecture(config)
    if shapes is None:
        run.problems = found
        return run
    run.assumed, arch = shapes
    run.problems = found + problems(config, arch)
    if run.problems:
        return run
    method = build(config.method)
    passes = 2 if (config.model.sampler.get("cfg_scale") or 0) > 0 else 1
    for name, spec in suite.items():
        cost = task_cost(spec, limit=config.task.limit, steps=config.steps.count, passes=passes)
        if cost is not None:
            run.costs[name] = cost
            run.evaluation[name] = cost.forwards * forward_flops(arch, cost.length)
        run.baselines[name] = _baseline_key(config, spec)
    run.changes = _changes(method, config.bits)
    run.quantization = quantization_flops(method, config.bits, arch, config.calib.samples, config.calib.length)
    return run


def _architecture(config: Config) -> tuple[tuple[str | None, Architecture] | None, list[str]]:
    """The checkpoint's architecture where it is here, else its family's published one with its name."""
    path = config.model.path
    if path.startswith(PACKAGED) or (path and Path(path).expanduser().is_dir()):
        try:
            return (None, read_config(locate(path))[1]), []
        except CheckpointError as error:
            return None, [str(error)]
    published = of_family(config.model.family)
    if published is None:
        return None, [f"model.family={config.model.family} is unknown, and {path} is not here to say what it is"]
    return published, []


def task_cost(
    spec: TaskSpec, *, limit: int | None = None, steps: int | None = None, passes: int = 1
) -> TaskCost | None:
    """One evaluation of a task; None where its size is not known. `passes`: forwards per model call (guidance: 2)."""
    if spec.kind == "text":
        return _text_cost(spec, limit)
    size = SIZES.get(spec.harness)
    if size is None:
        return None
    documents = size.documents if limit is None else min(limit, size.documents)
    if spec.kind == "likelihood":
        draws = 1 if size.target == 1 else spec.mc_samples or 1
        what = f"{size.choices} choices x {draws} draw{'s' if draws > 1 else ''}"
        per_document, length = size.choices * draws, size.prompt(spec) + size.target
    else:
        per_document = steps_of(spec, steps) or spec.gen_length or 0
        what, length = f"{per_document} steps", size.prompt(spec) + (spec.gen_length or 0)
        per_document *= passes
    return TaskCost(documents, what, documents * per_document, length)


def _text_cost(spec: TaskSpec, limit: int | None) -> TaskCost | None:
    tokens = TEXT_TOKENS.get(spec.text or "")
    if tokens is None or not spec.length or not spec.mc_samples:
        return None
    windows = min(n for n in (tokens // spec.length, spec.windows, limit) if n is not None)
    draws = f"{spec.mc_samples} draw{'s' if spec.mc_samples > 1 else ''}"
    return TaskCost(windows, draws, windows * spec.mc_samples, spec.length + 1)


def block_parameters(arch: Architecture) -> int:
    """Weights of the seven linears of one block."""
    return sum(arch.in_features(role) * arch.out_features(role) for role in ROLES)


def forward_flops(arch: Architecture, length: int, *, head: bool = True) -> float:
    """Operations of one forward of `length` tokens: the linears, with the output head if `head`, and attention."""
    weights = arch.n_blocks * block_parameters(arch) + (arch.vocab_size * arch.hidden_size if head else 0)
    return 2.0 * weights * length + 4.0 * arch.n_blocks * arch.hidden_size * length**2


def quantization_flops(method: Method, bits: BitsConfig, arch: Architecture, samples: int, length: int) -> float:
    """Operations of calibration: statistics by stream, Hessians, and the candidates of a scale search."""
    streams = method.streams(bits)
    one_pass = forward_flops(arch, length, head=False)
    total = sum(PASSES_PER_STREAM * one_pass * (1 if stream == "mean" else samples) for stream in streams)
    for site, roles in SITES.items():
        rounding = [method.rounding_of(role) for role in roles if bits.weight_of(role).bits != UNQUANTIZED]
        if any(part is not None and "hessian" in part.needs for part in rounding):
            total += 2.0 * arch.n_blocks * samples * length * arch.in_features(SITES[site][0]) ** 2
    for transform in method.block_transforms.values():
        total += PASSES_PER_CANDIDATE * getattr(transform, "n_grid", 0) * samples * one_pass
    return total


def _changes(method: Method, bits: BitsConfig) -> bool:
    return any(
        (method.rounding_of(role) is not None and bits.weight_of(role).bits != UNQUANTIZED)
        or (method.quantizes_input(role) and bits.activation_of(role).bits != UNQUANTIZED)
        for role in ROLES
    )


def _baseline_key(config: Config, spec: TaskSpec) -> str:
    model = {key: value for key, value in asdict(config.model).items() if not key.startswith("calib_")}
    likelihood = config.likelihood.deciding() if spec.kind == "likelihood" else None
    steps = steps_of(spec, config.steps.count)
    return json.dumps(
        [model, asdict(spec), steps, likelihood, config.task.limit, config.seed, config.data_root],
        sort_keys=True,
        default=str,
    )


# ---- as tables -----------------------------------------------------------------------------------------------


def print_plan(runs: Sequence[PlannedRun], tflops: float, file: TextIO | None = None) -> None:
    """Print the runs, the tasks, what stands in their way, and what the estimate assumes."""
    file = file or sys.stdout
    console = Console(file=file, highlight=False, emoji=False)
    wide = Console(file=file, highlight=False, emoji=False, width=max(200, console.width))
    console.print(Text(f"\n{len(runs)} run{'s' if len(runs) != 1 else ''} planned, nothing is loaded or run\n"))
    wide.print(_run_table(runs, tflops * 1e12))
    if any(run.costs for run in runs):
        console.print()
        wide.print(_task_table(runs))
    console.print()
    for line in [*_notes(runs), *(line.format(tflops=tflops) for line in ASSUMPTIONS)]:
        console.print(Text(line), soft_wrap=True)


def _run_table(runs: Sequence[PlannedRun], speed: float) -> Table:
    table = Table(box=RULES, padding=0, show_edge=False)
    for name in ("model", "method", "bits"):
        table.add_column(name, no_wrap=True)
    for name in (
        "tasks",
        "sequen-\nces",
        "tokens",
        "opera-\ntions",
        "full\nprecision",
        "calibrate",
        "evaluate",
        "total",
    ):
        table.add_column(name, justify="right", no_wrap=True)
    known: set[str] = set()
    totals = [0.0] * 4
    for run in runs:
        if run.problems:
            table.add_row(run.model, run.method, run.bits, str(len(run.tasks)), *[""] * 6, "cannot run")
            continue
        costs = run.costs.values()
        new = {name for name, key in run.baselines.items() if key not in known}
        known |= set(run.baselines.values())
        evaluation = sum(run.evaluation.values())
        parts = [
            sum(value for name, value in run.evaluation.items() if name in new),
            run.quantization,
            evaluation if run.changes else 0.0,
        ]
        seconds = [part / speed for part in (*parts, sum(parts))]
        totals = [a + b for a, b in zip(totals, seconds, strict=True)]
        table.add_row(
            run.model,
            run.method,
            run.bits,
            str(len(run.tasks)),
            amount(sum(cost.forwards for cost in costs)),
            amount(sum(cost.tokens for cost in costs)),
            amount(evaluation),
            *map(duration, seconds),
        )
    if sum(not run.problems for run in runs) > 1:
        table.add_section()
        table.add_row("all", "", "", "", "", "", "", *map(duration, totals))
    return table


def _task_table(runs: Iterable[PlannedRun]) -> Table:
    table = Table(box=RULES, padding=0, show_edge=False)
    table.add_column("task", no_wrap=True)
    for name in ("documents", "each", "sequen-\nces", "tokens\neach"):
        table.add_column(name, justify="right", no_wrap=True)
    for name, cost in dict.fromkeys((name, cost) for run in runs for name, cost in run.costs.items()):
        table.add_row(name, str(cost.documents), cost.per_document, amount(cost.forwards), str(cost.length))
    return table


def _notes(runs: Sequence[PlannedRun]) -> list[str]:
    by_problem: dict[str, list[str]] = {}
    for run in runs:
        for problem in run.problems:
            by_problem.setdefault(problem, []).append(f"{run.model}-{run.method}-{run.bits}")
    lines = [f"Cannot run: {', '.join(dict.fromkeys(names))}: {problem}" for problem, names in by_problem.items()]
    unknown = dict.fromkeys(n for run in runs if not run.problems for n in run.tasks if n not in run.costs)
    if unknown:
        lines.append(f"Not counted, for their sizes are not known: {', '.join(unknown)}.")
    assumed = {run.model: run.assumed for run in runs if run.assumed}
    lines += [f"{model} is not here; it is taken to have the shapes of {name}." for model, name in assumed.items()]
    return lines


def amount(value: float) -> str:
    """A count with three digits: 950, 1.32k, 10.3M, 5.6P."""
    for unit in ("", "k", "M", "G", "T", "P"):
        if value < 999.5:
            return f"{value:.0f}{unit}" if not unit or value >= 100 else f"{value:.3g}{unit}"
        value /= 1000
    return f"{value:.3g}E"


def duration(seconds: float) -> str:
    """Hours, minutes or seconds, whichever reads best."""
    if seconds <= 0:
        return "-"
    if seconds < 1:
        return "< 1 s"
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
