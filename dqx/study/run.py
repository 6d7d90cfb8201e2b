"""One run, stage by stage: load, evaluate, quantize, evaluate again, compare, record. The file to read first.

Several processes may share a run (`dqx/common/processes.py`): all of them do everything but for the documents they
share, and the main one alone keeps, prints and records.
"""

from __future__ import annotations

import logging
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dqx.common import heartbeat
from dqx.common.devices import pick_device
from dqx.common.environment import environment
from dqx.common.memory import bound_gpu
from dqx.common.processes import main_first, processes
from dqx.common.tensors import tensor_digest
from dqx.config.compose import build
from dqx.config.origin import Origin
from dqx.config.schema import Config, ConfigProblems
from dqx.data.calibration import CalibBatch, calibration_windows
from dqx.data.masking import calibration_states
from dqx.diagnostics import activations, fidelity
from dqx.diffusion.rollout import Rollout, State, schedule, spread, write
from dqx.evaluate.journal import Journal
from dqx.evaluate.problems import hub_problems
from dqx.evaluate.results import TaskResult
from dqx.evaluate.spec import TaskSpec
from dqx.evaluate.text import text_windows
from dqx.models.checkpoint import inspect
from dqx.models.tokenizer import load_tokenizer
from dqx.record import folder as store
from dqx.report.terminal import print_copy, print_table
from dqx.report.wandb import copy_run
from dqx.sharing.against import Against
from dqx.study import facts as keys
from dqx.study.cache.key import Key
from dqx.study.cache.once import Once
from dqx.study.cache.space import make_room
from dqx.study.cache.store import Store
from dqx.study.checks import reads_text, validate
from dqx.study.costs import Costs
from dqx.study.estimate.memory import exceeded
from dqx.study.results import Results
from dqx.study.subjects import MadeAnew, Subject, Subjects

log = logging.getLogger(__name__)


def run(config: Config, folder: str | Path, origin: Origin | None = None) -> store.Record:
    """Run one configuration and leave its record in `folder`. `origin` says where it comes from.

    Raises ConfigProblems before anything is loaded when the configuration cannot work.
    """
    problems = validate(config)
    if problems:
        raise ConfigProblems(problems)
    main, origin = processes().main, origin or Origin()
    output = store.RunFolder(folder)
    device = pick_device(config.model.device)
    costs = Costs(device)
    bound_gpu(device, config.memory.gpu_gb)

    with costs.stage("read the data"), main_first():
        windows = _data(config)
    once = Once(Store(config.cache_dir), reuse=config.reuse)
    subjects = Subjects(config, once, costs.seconds)  # no weights yet: they are loaded to compute something
    here = environment(subjects.device)
    if main:
        output.start(config, here)
    text = None if windows is None else tensor_digest([("ids", windows)])[:16]
    shared = Against(config.bundle, config, here, text) if config.bundle else None
    if shared and main:
        shared.tell()

    calibration: list[CalibBatch] = []
    if windows is not None:
        with costs.stage("make the calibration states"):
            calibration = _states(subjects, config, once, windows)
    reference = None
    if config.fidelity.samples:
        with costs.stage("predictions, full precision"):
            reference = _reference(subjects.original, config, once)
    watched = _watched(config, calibration, reference)
    before = _measure(subjects.original, config, once, watched, costs)
    with costs.stage("quantize"):
        quantization, source = subjects.quantize(calibration if subjects.method.needs_data else [])
    after = before
    if quantization.report.changed:
        try:
            after = _measure(subjects.quantized, config, once, watched, costs, reference)
        except MadeAnew as made:  # what is known was measured on a model that is no more and differs from this one
            after = _measure(subjects.quantized, config, once, watched, costs, reference)
            quantization, source = made.quantized, "computed"

    sides = {"full_precision": before, "quantized": after}
    record = store.Record(
        config=asdict(config),
        environment=here,
        model=subjects.described(),
        full_precision=before.results,
        quantized=after.results,
        quantization={**quantization.report.to_dict(), "source": source},
        outliers={side: found.outliers for side, found in sides.items() if found.outliers},
        activations={
            f"{side}/{name}": tensor
            for side, found in sides.items()
            if found.outliers
            for name, tensor in found.outliers.maps.items()
        },
        fidelity={} if reference is None else after.moved or reference.unmoved(),
        calibration_text=text,
        mask_ratio=float(torch.cat([batch.mask_ratio for batch in calibration]).mean()) if calibration else None,
        timings=costs.seconds,
        memory={
            "limit": {pool.name: pool.limit for pool in subjects.pools},
            "peak": costs.peak,
            "stages": costs.peaks,
        },
        sources={side: found.sources for side, found in sides.items()},
        choices=origin.choices or (shared.record.choices if shared else {}),
        command=origin.command,
        warnings=[
            *once.store.warnings,
            *_notes(after.results),
            *quantization.report.notes,
            *quantization.notes,
            *exceeded(subjects.pools, costs.peak),
        ],
    )
    if shared:
        record.warnings += shared.notes(record)
    _keep(record, output, subjects, origin)
    if main and config.cache_max_gb is not None:
        make_room(once.store, 0, int(config.cache_max_gb * 1e9))
    finished: store.Record = processes().broadcast(record)  # in no process before it is written
    return finished


def _data(config: Config) -> Tensor | None:
    """The calibration text [N, T], None for runs that read none.

    What it and the tasks need from the hub is fetched here, before any weight is read. Raises ConfigProblems for what
    cannot be had.
    """
    windows, problems = None, []
    tokenizer = load_tokenizer(inspect(config.model.path, config.model.revision))
    try:
        if reads_text(config, build(config.method)):
            windows = calibration_windows(config.calib, tokenizer, seed=config.seed, data_root=config.data_root)
    except (ValueError, OSError) as error:
        offline = isinstance(error, ConnectionError)
        remedy = "; without a network, give data_root=FOLDER with a copy, or calib.text=FILE" if offline else ""
        problems.append(f"calib.text={config.calib.text}: {error}{remedy}")
    for name, spec in config.task.suite.items():
        if spec.kind == "text":
            try:
                text_windows(name, spec, tokenizer, limit=config.task.limit, data_root=config.data_root)
            except (ValueError, OSError) as error:
                offline = isinstance(error, ConnectionError)
                remedy = (
                    f"; without a network, give data_root=FOLDER, or task.suite.{name}.text=FILE" if offline else ""
                )
                problems.append(f"task {name}: {error}{remedy}")
    if config.data_root is None:
        problems += hub_problems(config.task.suite, limit=config.task.limit, chat=config.model.chat)
    if problems:
        raise ConfigProblems(problems)
    return windows


def _states(subjects: Subjects, config: Config, once: Once, windows: Tensor) -> list[CalibBatch]:
    """The calibration states. Only rollouts need the model's weights, and are kept."""
    lm, calib, seed = subjects.lm, config.calib, config.seed
    if not calib.rollout:
        return calibration_states(lm.model, lm.sampler, windows, calib, seed=seed)
    facts = keys.rollout_facts(subjects.facts, sampler=config.model.sampler, calib=calib, windows=windows, seed=seed)

    def compute() -> dict[str, Tensor]:
        batches = calibration_states(subjects.full_precision().model, lm.sampler, windows, calib, seed=seed)
        return {
            "ids": torch.cat([batch.ids for batch in batches]),
            "mask_ratio": torch.cat([batch.mask_ratio for batch in batches]),
        }

    found, _ = once.tensors(Key("calibration", config.model.name, facts), compute)
    return [CalibBatch(ids[None], share[None]) for ids, share in zip(found["ids"], found["mask_ratio"], strict=True)]


@dataclass(frozen=True)
class Watched:
    """What a model is shown while its activations are looked at."""

    windows: list[CalibBatch]
    states: list[State]


def _watched(config: Config, calibration: list[CalibBatch], reference: fidelity.Reference | None) -> Watched:
    """A few calibration windows, and of the denoising states a few steps."""
    settings, total = config.outliers, len(calibration)
    windows = [calibration[i] for i in spread(min(settings.samples, total), total)]
    return Watched(windows, [] if reference is None else reference.rollout.states(settings.steps))


@dataclass(frozen=True)
class Measured:
    """What one model has shown."""

    results: dict[str, TaskResult]
    sources: dict[str, str]  # by task: computed or reused
    outliers: activations.OutlierStats | None  # None: not measured
    moved: dict[str, Any]  # its predictions against those of full precision; empty: not measured


def _measure(
    subject: Subject,
    config: Config,
    once: Once,
    watched: Watched,
    costs: Costs,
    reference: fidelity.Reference | None = None,
) -> Measured:
    """Everything that a run wants to know of a model; its weights are loaded where something is not known yet."""
    statistics, moved = None, {}
    if watched.windows:
        with costs.stage(f"outliers, {subject.name}"):
            statistics = _outliers(subject, config, once, watched)
    if reference is not None:
        with costs.stage(f"predictions, {subject.name}"):
            moved = _moved(subject, config, once, reference)
    with costs.stage(f"evaluate, {subject.name}"):
        return Measured(*_evaluate(subject, config, once), statistics, moved)


def _evaluate(subject: Subject, config: Config, once: Once) -> tuple[dict[str, TaskResult], dict[str, str]]:
    """The result of every task, and whether it was reused or computed."""
    facts = keys.evaluation_facts(
        checkpoint=subject.described.checkpoint.folder,
        fingerprint=subject.facts["fingerprint"],
        model=config.model,
        dtype=subject.dtype,
        device=subject.device,
        seed=config.seed,
        limit=config.task.limit,
        data_root=config.data_root,
    )
    known = Results(
        once.store,
        facts | subject.facts,
        steps=config.steps.count,
        likelihood=config.likelihood,
        reuse=config.reuse,
    )

    def compute(name: str, spec: TaskSpec, journal: Journal) -> TaskResult:
        return subject.lm().evaluate_suite(
            {name: spec},
            limit=config.task.limit,
            steps=config.steps.count,
            seed=config.seed,
            data_root=config.data_root,
            likelihood=config.likelihood,
            journal=journal,
        )[name]

    results, sources = {}, {}
    for name, spec in config.task.suite.items():
        results[name], sources[name] = known.get(name, spec, compute)
    return results, sources


def _outliers(subject: Subject, config: Config, once: Once, watched: Watched) -> activations.OutlierStats:
    """The statistics, and the tensors that go with them: two artefacts, made and kept together."""
    settings, described = _thresholds(config), subject.described
    count = described.checkpoint.arch.n_blocks
    surfaces = activations.default_blocks(count) if config.outliers.surfaces is None else config.outliers.surfaces
    facts = keys.outlier_facts(
        subject.facts, batches=watched.windows, thresholds=settings, states=watched.states, surfaces=surfaces
    )
    numbers, maps = (Key(kind, config.model.name, facts) for kind in ("outliers", "activations"))

    def read() -> activations.OutlierStats | None:
        tensors = once.store.read_tensors(maps)
        if tensors is None:
            return None
        return once.store.read(numbers, lambda found: activations.OutlierStats.from_dict(found, tensors))

    def compute() -> activations.OutlierStats:
        model = subject.lm().model
        return activations.measure_activations(
            model, watched.windows, settings, states=watched.states, surfaces=surfaces
        )

    def keep(found: activations.OutlierStats) -> None:
        once.store.write_tensors(maps, found.maps)
        once.store.write(numbers, found.to_dict())

    found, _ = once.get(numbers, read, compute, keep)
    return found.with_token_texts(lambda token_id: str(described.tokenizer.decode([token_id])))


def _reference(subject: Subject, config: Config, once: Once) -> fidelity.Reference:
    """What full precision says: the answers it writes after a few windows of text, and predictions on their states."""
    settings, lm, seed = config.fidelity, subject.described, config.seed
    tokens = fidelity.windows(lm.tokenizer, settings.samples, settings.length)
    prompts, steps = tokens[:, : settings.length // 2], schedule(settings.gen_length, config.steps.count)
    how = {"gen_length": settings.gen_length, "steps": steps, "seed": seed}
    facts = keys.answer_facts(subject.facts, sampler=config.model.sampler, prompts=prompts, **how)
    written, _ = once.tensors(
        Key("denoising", config.model.name, facts),
        lambda: {"ids": write(subject.lm().model, lm.sampler, prompts, **how).ids},
    )
    rollout = Rollout(written["ids"], prompts.shape[1], lm.model.arch.mask_token_id)
    questions = fidelity.questions(tokens, rollout.states(settings.steps), rollout.mask_token_id, seed=seed)

    def compute() -> dict[str, Tensor]:
        model = subject.lm().model
        return fidelity.to_tensors(fidelity.predict(model, lm.sampler, questions, steps=steps, seed=seed))

    facts = keys.prediction_facts(
        subject.facts, sampler=config.model.sampler, questions=questions, rollout=rollout, seed=seed
    )
    found, _ = once.tensors(Key("predictions", config.model.name, facts), compute)
    return fidelity.Reference(rollout, questions, fidelity.from_tensors(found))


def _moved(subject: Subject, config: Config, once: Once, reference: fidelity.Reference) -> dict[str, Any]:
    """How far the predictions of a quantized model are from those of full precision."""
    lm, seed = subject.described, config.seed
    facts = keys.prediction_facts(
        subject.facts,
        sampler=config.model.sampler,
        questions=reference.questions,
        rollout=reference.rollout,
        seed=seed,
    )

    def compute() -> dict[str, Any]:
        change = build(config.method).residual_map(config.bits, lm.checkpoint.arch, seed=seed)
        return fidelity.measure_fidelity(subject.lm().model, lm.sampler, reference, seed=seed, residual_map=change)

    found, _ = once.value(Key("fidelity", config.model.name, facts), dict[str, Any], compute)
    return found


def _thresholds(config: Config) -> activations.Thresholds:
    settings = config.outliers
    return activations.Thresholds(
        channel_ratio=settings.channel_ratio,
        massive_absolute=settings.massive_absolute,
        massive_relative=settings.massive_relative,
    )


def _keep(record: store.Record, output: store.RunFolder, subjects: Subjects, origin: Origin) -> None:
    """Print the record, write it, and copy it to W&B, with the quantized weights where they are wanted."""
    main, wandb = processes().main, subjects.config.wandb
    if main:
        print_table(record, output.path)  # first: a full disk or a slow network takes nothing from the screen
        output.write(record)
    weights = _checkpoint(subjects, record, output.path / "checkpoint") if wandb.checkpoint else None
    if main:
        heartbeat.stage("copy to Weights & Biases")
        record.mirror = copy_run(record, output.path, wandb, group=origin.sweep, checkpoint=weights)
        output.write_results(record)
        print_copy(record)
        if weights:
            shutil.rmtree(weights, ignore_errors=True)


def _checkpoint(subjects: Subjects, record: store.Record, folder: Path) -> Path | None:
    """Write the quantized model to `folder`, for W&B; None, with the reason in the record, where there is none to show.

    It is loaded from the cache or made again where that does not have it.
    """
    try:
        if subjects.known is None or not subjects.known.report.changed:
            raise ValueError("nothing was quantized")
        if processes().main:
            shutil.rmtree(folder, ignore_errors=True)  # of an attempt that was killed
        subjects.save(folder)
    except (MadeAnew, OSError, ValueError) as error:
        record.warnings.append(f"no checkpoint in Weights & Biases: {error}")
        return None
    return folder


def _notes(results: dict[str, TaskResult]) -> list[str]:
    return [f"{name}: {note}" for name, result in results.items() for note in result.notes]
