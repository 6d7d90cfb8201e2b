"""One composed configuration as a run of the plan: its work and seconds, its memory, what keeps it from running."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from pathlib import Path

import torch
from omegaconf import DictConfig, OmegaConf
from safetensors import safe_open

from dqx.common.devices import device_problems, dtype_of, pick_device
from dqx.common.names import method_label
from dqx.config.compose import build, resolve
from dqx.config.schema import Config, ConfigProblems
from dqx.diffusion.rollout import schedule
from dqx.diffusion.samplers import Sampler
from dqx.evaluate.scorers.sandbox import run_program
from dqx.evaluate.spec import TaskSpec, steps_of
from dqx.formats.bits import UNQUANTIZED, BitsConfig
from dqx.models.checkpoint import PACKAGED, CheckpointError, inspect, locate, read_config
from dqx.models.family import families
from dqx.models.transformer import SITES, Architecture
from dqx.quant.method import Method
from dqx.study.checks import problems, reads_text
from dqx.study.estimate.memory import Memory, changes, memory_problems, of_run, pools, streams_from_disk
from dqx.study.estimate.speed import Assumed, Measured, Speed, measured, work_flops
from dqx.study.estimate.work import Work, fidelity_work, outlier_work, task_work
from dqx.study.plan.found import found_documents

#: Passes of the calibration text through all blocks that collecting statistics takes, per stream.
PASSES_PER_STREAM = 3
#: The same for one candidate of a scale search: each linear once in its own and once in a neighbour's judge, about.
PASSES_PER_CANDIDATE = 1.5
#: How safetensors calls what a checkpoint's numbers are stored in.
STORED = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}


@dataclass(frozen=True)
class Cost:
    """What some work takes: operations, and seconds on the devices at hand."""

    flops: float = 0.0
    seconds: float = 0.0

    def __add__(self, other: Cost) -> Cost:
        return Cost(self.flops + other.flops, self.seconds + other.seconds)

    def __mul__(self, factor: float) -> Cost:
        return Cost(self.flops * factor, self.seconds * factor)


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
    found: dict[str, int | None] = field(default_factory=dict)  # documents of full precision in the cache; None: all
    memory: Memory | None = None
    speed: str = ""  # how seconds were found
    notes: list[str] = field(default_factory=list)

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
        done = self.found.get(task, 0)
        return 0.0 if done is None else max(0.0, 1 - done / self.work[task].documents)


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
    label = method_label(config.method.name, config.method.variant)
    run = PlannedRun(config.model.name, label, config.bits.name, list(config.task.suite))
    arch = _architecture(config, run)
    if arch is None:
        return run
    run.problems += _speed_problems(config) + problems(config, arch)
    if run.problems:
        return run
    dtype, method = _dtype(config), build(config.method)
    speed = _speed(config, arch, dtype)
    sampler = _exact(build(config.model.sampler), run)
    run.speed = speed.label
    run.changes = changes(method, config.bits)

    def cost(work: Work) -> Cost:
        return Cost(work_flops(arch, work), speed.seconds(work, sampler))

    for name, spec in config.task.suite.items():
        work = task_work(
            spec,
            sampler,
            limit=config.task.limit,
            steps=config.steps.count,
            chat=config.model.chat,
            likelihood=config.likelihood,
        )
        if work is not None:
            run.work[name] = work
            run.evaluation[name] = cost(work) + Cost(seconds=work.programs and work.programs * _program_seconds())
            run.baselines[name] = _baseline_key(config, spec)
    run.checks = sum(map(cost, _checks(config, sampler.cfg_scale > 0)), Cost())
    run.quantization = sum(map(cost, calibration_work(method, config)), Cost())
    hessians = hessian_flops(method, config.bits, arch, config.calib.samples * config.calib.length)
    run.quantization += Cost(hessians, hessians / (speed.tflops * 1e12))
    if isinstance(speed, Measured) and _is_here(config.model.path):
        run.found = _found(config, dtype, speed.device, run)
    device = speed.device if isinstance(speed, Measured) else torch.device("cuda")
    run.memory = of_run(config, arch, dtype, device)
    if isinstance(speed, Measured):
        run.notes += _memory_notes(config, arch, dtype, device)
    return run


def _architecture(config: Config, run: PlannedRun) -> Architecture | None:
    """The checkpoint's architecture where it is here, else its family's published one, which is noted."""
    path = config.model.path
    if _is_here(path):
        try:
            return read_config(locate(path))[1]
        except CheckpointError as error:
            run.problems.append(str(error))
            return None
    family = families().get(config.model.family)
    if family is None or family.published is None:
        run.problems.append(f"model.family={config.model.family} has no published shape, and {path} is not here")
        return None
    name, arch = family.published
    run.notes.append(f"{config.model.name} is not here; it is taken to have the shapes of {name}.")
    return arch


def _is_here(path: str) -> bool:
    return path.startswith(PACKAGED) or bool(path and Path(path).expanduser().is_dir())


def _dtype(config: Config) -> torch.dtype:
    """The dtype of the run's weights; of dtype=auto that of a file, bfloat16 where there is none."""
    dtype = dtype_of(config.model.dtype)
    if dtype is not None:
        return dtype
    files = sorted(locate(config.model.path).glob("*.safetensors")) if _is_here(config.model.path) else []
    for file in files:
        with safe_open(file, framework="pt") as f:
            return STORED[f.get_slice(next(iter(f.keys()))).get_dtype()]
    return torch.bfloat16


# ---- what is done, and how fast ------------------------------------------------------------------------------


def _speed_problems(config: Config) -> list[str]:
    if config.plan_tflops is None:
        return [f"{p}; plan_tflops=NUMBER plans for another machine" for p in device_problems(config.model.device)]
    if config.plan_tflops > 0:
        return []
    return [f"plan_tflops={config.plan_tflops} must be a number above 0; null measures this machine"]


def _speed(config: Config, arch: Architecture, dtype: torch.dtype) -> Speed:
    if config.plan_tflops is not None:
        return Assumed(arch, config.plan_tflops)
    return measured(arch, dtype, pick_device(config.model.device))


def _exact(sampler: Sampler, run: PlannedRun) -> Sampler:
    """The sampler without approximations: how much they save is not in the schedule."""
    if not sampler.approximations:
        return sampler
    run.notes.append(
        f"model.sampler has {', '.join(sampler.approximations)}, which save what only a run can tell: the costs of "
        "answers are those of the exact schedule."
    )
    return sampler.exact()


def calibration_work(method: Method, config: Config) -> list[Work]:
    """Sequences through all blocks while a method is fitted: statistics by stream, candidates of a scale search.

    Solving, clipping and rotating are not counted, nor the search for a rotation.
    """
    calib, streams = config.calib, method.streams(config.bits)
    sequences = sum(PASSES_PER_STREAM * (1 if stream == "mean" else calib.samples) for stream in streams)
    searches = sum(transform.candidates for transform in method.block_transforms.values())
    sequences += round(PASSES_PER_CANDIDATE * searches * calib.samples)
    found = [Work("plain", sequences, sequences, calib.length)] if sequences else []
    if calib.rollout and reads_text(config, method):  # half a generation for each window
        steps = calib.samples * (calib.steps or calib.gen_length or 0) // 2
        found.append(Work("plain", steps, steps, calib.length))
    return found


def hessian_flops(method: Method, bits: BitsConfig, arch: Architecture, tokens: int) -> float:
    """Operations of the sums X^T X of all sites that are rounded by them."""
    total = 0.0
    for widths in map(bits.of_block, range(arch.n_blocks)):
        for roles in SITES.values():
            rounding = [method.rounding_of(role) for role in roles if widths.weight_of(role).bits != UNQUANTIZED]
            if any(part is not None and "hessian" in part.needs for part in rounding):
                total += 2.0 * tokens * arch.in_features(roles[0]) ** 2
    return total


def _checks(config: Config, guided: bool) -> list[Work]:
    """What is looked at on both sides besides the tasks."""
    outliers, fidelity = config.outliers.samples, config.fidelity
    found = [outlier_work(min(outliers, config.calib.samples), config.calib.length)] if outliers else []
    steps = schedule(fidelity.gen_length, config.steps.count)
    if fidelity.samples and outliers:
        states = min(config.outliers.steps, steps)
        found.append(outlier_work(fidelity.samples * states, fidelity.length // 2 + fidelity.gen_length))
    if fidelity.samples:
        states = min(fidelity.steps, steps)
        found += fidelity_work(
            fidelity.samples, fidelity.length, fidelity.gen_length, steps=steps, states=states, guided=guided
        )
    return found


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


def _found(config: Config, dtype: torch.dtype, device: torch.device, run: PlannedRun) -> dict[str, int | None]:
    try:
        return found_documents(config, inspect(config.model.path, config.model.revision), dtype, device)
    except CheckpointError as error:
        run.notes.append(f"the cache was not looked at: {error}")
        return {}


# ---- memory --------------------------------------------------------------------------------------------------


def _memory_notes(config: Config, arch: Architecture, dtype: torch.dtype, device: torch.device) -> Iterator[str]:
    found = pools(config, arch, dtype, device)
    if streams_from_disk(found):
        yield "quantized from disk, block by block: it does not fit into memory together with what quantizing it needs."
    yield from memory_problems(found)
