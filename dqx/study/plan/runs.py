"""One composed configuration as a run of the plan: its work and seconds, its memory, what keeps it from running."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from functools import lru_cache
from pathlib import Path

import torch
from omegaconf import DictConfig, OmegaConf

from dqx.common.devices import device_problems, dtype_of, pick_device
from dqx.common.memory import GB
from dqx.common.names import method_label
from dqx.config.compose import resolve
from dqx.config.schema import Config, ConfigProblems
from dqx.diffusion.rollout import schedule
from dqx.diffusion.samplers import Sampler
from dqx.evaluate.scorers.sandbox import run_program
from dqx.evaluate.spec import TaskSpec, steps_of
from dqx.formats.bits import UNQUANTIZED
from dqx.models.architecture import Architecture
from dqx.models.checkpoint import PACKAGED, CheckpointError, inspect, locate, read_config
from dqx.models.family import families
from dqx.quant.backends.choice import SIMULATED
from dqx.study.cache.artifacts import ArtifactCache
from dqx.study.cache.store import Store
from dqx.study.design import Design
from dqx.study.estimate.gpus import GPUS
from dqx.study.estimate.memory import (
    MemoryNeeds,
    Pool,
    memory_needs,
    memory_pools,
    memory_problems,
    streams_from_disk,
)
from dqx.study.estimate.speed import Assumed, Measured, Published, measured, work_flops
from dqx.study.estimate.work import Work, fidelity_work, outlier_work, work_of_tasks
from dqx.study.experiment import Experiment, designed, problems_here
from dqx.study.stages import Results

#: Passes of the calibration text through all blocks that collecting statistics takes, per stream.
PASSES_PER_STREAM = 3
#: The same for one candidate of a scale search: each linear once in its own and once in a neighbour's judge, about.
PASSES_PER_CANDIDATE = 1.5


Say = Callable[[str], object]  # told what is being timed


@dataclass(frozen=True)
class Cost:
    """What some work takes: operations, seconds on the device that is planned for, and seconds here beside them."""

    flops: float = 0.0
    seconds: float = 0.0
    here: float = 0.0  # with plan_gpu; else 0

    def __add__(self, other: Cost) -> Cost:
        return Cost(self.flops + other.flops, self.seconds + other.seconds, self.here + other.here)

    def __mul__(self, factor: float) -> Cost:
        return Cost(self.flops * factor, self.seconds * factor, self.here * factor)


@dataclass
class PlannedRun:
    """One run of the plan. `problems` keep it from running; then nothing is estimated.

    Costs are of one side, full precision or quantized, and of tasks whose size is known.
    """

    model: str
    method: str
    bits: str
    tasks: list[str]
    problems: list[str] = field(default_factory=list)
    work: dict[str, Work] = field(default_factory=dict)  # by task
    evaluation: dict[str, Cost] = field(default_factory=dict)  # by task
    checks: Cost = Cost()  # outliers and fidelity
    quantization: Cost = Cost()
    changes: bool = True  # False: nothing is quantized, so the full-precision results are the run's
    baselines: dict[str, str] = field(default_factory=dict)  # task -> what its full-precision result depends on
    cached: dict[str, int | None] = field(default_factory=dict)  # documents of full precision in the cache; None: all
    memory: MemoryNeeds | None = None
    speed: str = ""  # how seconds were found
    here: str = ""  # how those of this machine were found, where seconds are those of plan_gpu
    elsewhere: bool = False  # planned for another machine
    notes: list[str] = field(default_factory=list)

    @property
    def name(self) -> str:
        return f"{self.model}-{self.method}-{self.bits}"

    def cost(self, computed: set[str]) -> dict[str, Cost]:
        """Of full precision, calibration and evaluation, where the baselines `computed` are there already."""
        missing = [
            cost * self.missing(name) for name, cost in self.evaluation.items() if self.baselines[name] not in computed
        ]
        evaluation = sum(self.evaluation.values(), self.checks) if self.changes else Cost()
        return {
            "full precision": sum(missing, self.checks),
            "calibrate": self.quantization,
            "evaluate": evaluation,
        }

    def missing(self, task: str) -> float:
        """The share of a task's full-precision documents that is not in the cache."""
        done = self.cached.get(task, 0)
        return 0.0 if done is None else max(0.0, 1 - done / self.work[task].documents)


def plan_run(cfg: DictConfig, say: Say = str) -> PlannedRun:
    """What one composed configuration would do. Never raises for a configuration that cannot run: it says why.

    `say` is told what is being timed.
    """
    try:
        return _planned(resolve(cfg), say)
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


def _planned(config: Config, say: Say) -> PlannedRun:
    label = method_label(config.method.name, config.method.variant)
    run = PlannedRun(config.model.name, label, config.bits.name, list(config.task.suite))
    arch = _architecture(config, run)
    if arch is None:
        return run
    run.problems += _speed_problems(config)
    try:
        design = designed(config, arch, _dtype(config), torch.device("cuda"))
        if not (run.problems or config.plan_tflops or config.plan_gpu):
            run.problems += problems_here(replace(design, device=pick_device(config.model.device)))
    except ConfigProblems as error:
        run.problems += error.problems
    if run.problems:
        return run
    speed, here = _speeds(config, arch, design.dtype)
    if isinstance(speed, Measured):
        design = replace(design, device=speed.device)
    design = replace(design, sampler=_exact(design.sampler, run))
    run.speed, run.here = speed.label, here.label if here else ""
    run.elsewhere = not isinstance(speed, Measured)
    run.changes = design.changes_model
    if run.changes and config.backend != SIMULATED:
        run.notes.append(
            f"backend={config.backend}: what its products take only a run can tell; the quantized model is taken to "
            "run like full precision."
        )

    def cost(work: Work) -> Cost:
        own = here.seconds(work, design.sampler) if here else 0.0
        return Cost(work_flops(arch, work), speed.seconds(work, design.sampler), own)

    run.work = work_of_tasks(design)
    for name, work in run.work.items():
        say(f"{run.name}, {name}")
        programs = work.programs and work.programs * _program_seconds()
        run.evaluation[name] = cost(work) + Cost(seconds=programs, here=programs if here else 0.0)
        run.baselines[name] = _baseline_key(config, config.task.suite[name])
    say(f"{run.name}, calibration and checks")
    run.checks = sum(map(cost, _checks(config, design.sampler, design.window_tokens)), Cost())
    run.quantization = sum(map(cost, calibration_work(design)), Cost())
    hessians = hessian_flops(design, config.calib.samples * design.window_tokens)
    own = hessians / (here.tflops * 1e12) if here else 0.0
    run.quantization += Cost(hessians, hessians / (speed.tflops * 1e12), own)
    run.memory = memory_needs(design)
    if isinstance(speed, Measured):
        run.cached = _cached(design, run)
        run.notes += _memory_notes(memory_pools(design))
    elif isinstance(speed, Published):
        _, gpu = memory_pools(design, round(GPUS[speed.name].memory_gb * GB))
        run.notes += (f"on {speed.name}, {note}" for note in _memory_notes([gpu]))
        if here is None:
            run.notes.append(f"no estimate of this machine: {'; '.join(device_problems(config.model.device))}")
    return run


def _speeds(
    config: Config, arch: Architecture, dtype: torch.dtype
) -> tuple[Assumed | Published | Measured, Measured | None]:
    """The speed that is planned for, and that of this machine beside it where it is another that can be measured."""
    if config.plan_tflops:
        return Assumed(arch, config.plan_tflops), None
    absent = list(device_problems(config.model.device))
    here = None if absent else measured(arch, dtype, pick_device(config.model.device))
    if config.plan_gpu:
        return Published(arch, config.plan_gpu.lower()), here
    assert here is not None  # `_speed_problems`
    return here, None


def _architecture(config: Config, run: PlannedRun) -> Architecture | None:
    """The checkpoint's architecture where it is here, else its family's published one, which is noted."""
    path = config.model.path
    if _is_here(path):
        try:
            return read_config(locate(path), config.model.mask_token_id)[1]
        except CheckpointError as error:
            run.problems.append(str(error))
            return None
    family = families().get(config.model.family)
    shape = None if family is None else family.shape_of(path)
    if shape is None:
        run.problems.append(f"model.family={config.model.family} has no published shape, and {path} is not here")
        return None
    name, arch = shape
    run.notes.append(f"{config.model.name} is not here; it is taken to have the shapes of {name}.")
    return arch


def _is_here(path: str) -> bool:
    return path.startswith(PACKAGED) or bool(path and Path(path).expanduser().is_dir())


def _dtype(config: Config) -> torch.dtype:
    """The dtype of the run's weights; of dtype=auto that of a file, bfloat16 where there is none."""
    if (given := dtype_of(config.model.dtype)) is not None:
        return given
    if not _is_here(config.model.path):
        return torch.bfloat16
    try:
        return inspect(config.model.path, config.model.revision, config.model.mask_token_id).stored_dtype
    except CheckpointError:  # a folder with config.json alone can be planned for
        return torch.bfloat16


# ---- what is done, and how fast ------------------------------------------------------------------------------


def _speed_problems(config: Config) -> Iterator[str]:
    tflops, gpu = config.plan_tflops, config.plan_gpu
    if tflops is not None and gpu is not None:
        yield f"plan_gpu={gpu} and plan_tflops={tflops:g} are two machines to plan for; give one of them"
    elif gpu is not None and gpu.lower() not in GPUS:
        known = ", ".join(GPUS)
        yield f"plan_gpu={gpu} is not in the table, which has {known}; plan_tflops=NUMBER takes any speed"
    elif tflops is not None and tflops <= 0:
        yield f"plan_tflops={tflops} must be a number above 0; null measures this machine"
    elif tflops is None and gpu is None:
        for problem in device_problems(config.model.device):
            yield f"{problem}; plan_gpu=NAME or plan_tflops=NUMBER plans for another machine"


def _exact(sampler: Sampler, run: PlannedRun) -> Sampler:
    """The sampler without approximations: how much they save is not in the schedule."""
    if not sampler.approximations:
        return sampler
    run.notes.append(
        f"model.sampler has {', '.join(sampler.approximations)}, which save what only a run can tell: the costs of "
        "answers are those of the exact schedule."
    )
    return sampler.exact()


def calibration_work(design: Design) -> list[Work]:
    """Sequences through all blocks while a method is fitted: statistics by stream, candidates of a scale search.

    Solving, clipping and rotating are not counted, nor the search for a rotation.
    """
    calib = design.config.calib
    sequences = sum(PASSES_PER_STREAM * (1 if stream == "mean" else calib.samples) for stream in design.streams)
    searched = sum(transform.candidates for transform in design.method.block_transforms.values())
    sequences += round(PASSES_PER_CANDIDATE * searched * calib.samples)
    if design.asks_confidence:
        sequences += calib.samples
    work = [Work("plain", sequences, sequences, design.window_tokens)] if sequences else []
    if calib.rollout and design.reads_text and design.sampler.stores_final:  # a generation, pass by pass
        work.append(Work("plain", calib.samples, calib.samples, design.window_tokens))
    elif calib.rollout and design.reads_text:  # half a generation for each window
        steps = calib.samples * (calib.steps or calib.gen_length or 0) // (1 if design.asks_commitments else 2)
        work.append(Work("plain", steps, steps, calib.length))
    return work


def hessian_flops(design: Design, tokens: int) -> float:
    """Operations of the sums X^T X of all sites that are rounded by them."""
    arch, total = design.arch, 0.0
    for block in design.widths.blocks:
        for roles in arch.sites.values():
            rounding = [design.method.rounding_of(r) for r in roles if block.weight[r].bits != UNQUANTIZED]
            if any(part is not None and "hessian" in part.needs for part in rounding):
                total += 2.0 * tokens * arch.in_features(roles[0]) ** 2
    return total


def _checks(config: Config, sampler: Sampler, window: int) -> list[Work]:
    """What is looked at on both sides besides the tasks; calibration windows have so many tokens."""
    outliers, fidelity = config.outliers.samples, config.fidelity
    work = [outlier_work(min(outliers, config.calib.samples), window)] if outliers else []
    steps, guided = schedule(fidelity.gen_length, config.steps.count), sampler.cfg_scale > 0
    if fidelity.samples and outliers and not sampler.stores_final:  # see `checks.sampler_notes`
        states = min(config.outliers.steps, steps)
        work.append(outlier_work(fidelity.samples * states, fidelity.length // 2 + fidelity.gen_length))
    if fidelity.samples:
        states = min(fidelity.steps, steps)
        work += fidelity_work(
            fidelity.samples, fidelity.length, fidelity.gen_length, steps=steps, states=states, guided=guided
        )
    return work


@lru_cache
def _program_seconds() -> float:
    """Seconds that the sandbox takes for a program that does nothing."""
    started = time.perf_counter()
    run_program("pass")
    return time.perf_counter() - started


def _baseline_key(config: Config, spec: TaskSpec) -> str:
    model = {key: value for key, value in asdict(config.model).items() if not key.startswith("calib_")}
    likelihood = config.likelihood.deciding() if spec.kind == "likelihood" else None
    steps = steps_of(spec, config.steps.count)
    return json.dumps(
        [model, asdict(spec), steps, likelihood, config.task.limit, config.seed, config.data_root],
        sort_keys=True,
        default=str,
    )


def _cached(design: Design, run: PlannedRun) -> dict[str, int | None]:
    """What the cache has of full precision, which depends on the checkpoint and this machine.

    A quantized model is known by every token of its calibration text, which a plan does not read.
    """
    config = design.config
    if not (config.reuse and _is_here(config.model.path) and Path(config.cache_dir).is_dir()):
        return {}
    try:
        parts = {f.name: getattr(design, f.name) for f in fields(design)}
        experiment = Experiment(
            **parts, checkpoint=inspect(config.model.path, config.model.revision, config.model.mask_token_id)
        )
        return Results.of(experiment, ArtifactCache(Store(config.cache_dir))).finished(config.task.suite)
    except CheckpointError as error:
        run.notes.append(f"the cache was not looked at: {error}")
        return {}


# ---- memory --------------------------------------------------------------------------------------------------


def _memory_notes(pools: Sequence[Pool]) -> Iterator[str]:
    if streams_from_disk(pools):
        yield "quantized from disk, block by block: it does not fit into memory together with what quantizing it needs."
    yield from memory_problems(pools)
