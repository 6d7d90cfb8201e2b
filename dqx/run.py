"""One run, stage by stage: load, evaluate, quantize, evaluate again, compare, record. The file to read first.

Several processes may share a run (`dqx/processes.py`): all of them do everything but for the documents they share, and
the main one alone keeps, prints and records.
"""

from __future__ import annotations

import logging
import os
import shlex
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from torch import Tensor

from dqx import fidelity, mirror, outliers, report, store
from dqx.api import DiffusionLM, load_configured
from dqx.cache import keys
from dqx.cache.journal import Journal
from dqx.cache.results import Results
from dqx.cache.store import Store
from dqx.calib import CalibBatch, calibration_windows
from dqx.checks import reads_text
from dqx.config import GROUPS, Config, ConfigProblems, build, validate
from dqx.evaluate.problems import hub_problems
from dqx.evaluate.results import TaskResult
from dqx.evaluate.spec import TaskSpec
from dqx.evaluate.text import text_windows
from dqx.masking import calibration_states, spread
from dqx.models import inspect
from dqx.models.tokenizer import load_tokenizer
from dqx.processes import main_first, one_model, processes
from dqx.quant import quantize

log = logging.getLogger(__name__)


def run(config: Config, folder: str | Path | None = None) -> store.Record:
    """Run one configuration and leave its record in `folder` (None: Hydra's output folder).

    Raises ConfigProblems before anything is loaded when the configuration cannot work.
    """
    problems = validate(config)
    if problems:
        raise ConfigProblems(problems)
    main = processes().main
    output = store.RunFolder(folder or HydraConfig.get().runtime.output_dir)
    timings: dict[str, float] = {}

    with stage("read the data", timings), main_first():
        windows = _data(config)
    with stage("load the model", timings):
        lm = load_configured(config.model)
        method = build(config.method)
    environment = store.environment(lm.model.device)
    if main:
        output.start(config, environment)
    cache = Store(config.cache_dir)
    facts = _facts(lm, config)

    with stage("evaluate full precision", timings):
        full_precision, source = _evaluate(lm, config, cache, facts)
    sources = {"full_precision": source, "quantized": source}
    calibration: list[CalibBatch] = []
    if windows is not None:
        with stage("make the calibration states", timings):
            calibration = calibration_states(lm.model, lm.sampler, windows, config.calib, seed=config.seed)
    statistics = {}
    thresholds = _thresholds(config)
    watched = [calibration[i] for i in spread(min(config.outliers.samples, len(calibration)), len(calibration))]
    if watched:
        with stage("outliers at full precision", timings):
            statistics["full_precision"] = outliers.measure(lm.model, watched, thresholds)
    predictions = None
    if config.fidelity.samples:
        with stage("predictions of full precision", timings):
            predictions = _predict(lm, config)

    seen = calibration if method.needs_data else []
    with stage("quantize", timings):
        quantization = quantize(lm.model, method, config.bits, seen, seed=config.seed, progress=main)
        differences = one_model(lm.model, keys.model_digest)
    if watched:
        with stage("outliers after quantization", timings):
            statistics["quantized"] = (
                outliers.measure(lm.model, watched, thresholds)
                if quantization.changed
                else statistics["full_precision"]
            )
    moved = {}
    if predictions is not None:
        with stage("predictions after quantization", timings):
            moved = fidelity.compare(predictions, _predict(lm, config) if quantization.changed else predictions)
    quantized = full_precision
    with stage("evaluate quantized", timings):
        if quantization.changed:
            quantized, sources["quantized"] = _evaluate(lm, config, cache, facts | _quantization(lm, config, seen))

    record = store.Record(
        config=asdict(config),
        environment=environment,
        model={
            "name": config.model.name,
            "family": lm.checkpoint.arch.family,
            "path": config.model.path,
            "fingerprint": lm.checkpoint.fingerprint(),
            "dtype": str(lm.model.dtype).removeprefix("torch."),
            "parameters": sum(p.numel() for p in lm.model.parameters()),
            "sampler": lm.sampler.name,
        },
        full_precision=full_precision,
        quantized=quantized,
        quantization=quantization.to_dict(),
        outliers=statistics,
        fidelity=moved,
        mask_ratio=float(torch.cat([batch.mask_ratio for batch in calibration]).mean()) if calibration else None,
        timings=timings,
        sources=sources,
        choices=_choices(),
        command=_command(),
        warnings=[*cache.warnings, *_notes(quantized), *quantization.notes, *differences],
    )
    if main:
        report.print_table(record, output.path)  # first: a full disk or a slow network takes nothing from the screen
        output.write(record)
        record.mirror = mirror.log(record, output.path, config.wandb, group=_sweep())
        output.write_results(record)
        report.print_mirror(record)
    finished: store.Record = processes().broadcast(record)  # in no process before it is written
    return finished


@contextmanager
def stage(name: str, timings: dict[str, float]) -> Iterator[None]:
    """Say what is going on, and note how many seconds it took."""
    if processes().main:
        log.info(name)
    started = time.perf_counter()
    yield
    timings[name] = time.perf_counter() - started


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


def _facts(lm: DiffusionLM, config: Config) -> dict[str, Any]:
    """What results at full precision depend on."""
    return keys.evaluation_facts(
        checkpoint=lm.checkpoint.folder,
        fingerprint=lm.checkpoint.fingerprint(),
        model=config.model,
        dtype=lm.model.dtype,
        device=lm.model.device,
        seed=config.seed,
        limit=config.task.limit,
        data_root=config.data_root,
    )


def _quantization(lm: DiffusionLM, config: Config, seen: list[CalibBatch]) -> dict[str, Any]:
    """What the results of the quantized model depend on besides; `seen` is the text that quantization read."""
    facts = keys.quantization_facts(
        method=config.method,
        bits=config.bits,
        calib=config.calib if seen else None,
        calibration=seen,
        seed=config.seed,
        model=lm.model,
    )
    return {"quantization": facts}


def _evaluate(
    lm: DiffusionLM, config: Config, cache: Store, facts: dict[str, Any]
) -> tuple[dict[str, TaskResult], dict[str, str]]:
    """The result of every task, and whether it was reused or computed."""
    known = Results(cache, facts, steps=config.steps.count, likelihood=config.likelihood, reuse=config.reuse)

    def compute(name: str, spec: TaskSpec, journal: Journal) -> TaskResult:
        return lm.evaluate_suite(
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
    reused = [name for name, source in sources.items() if source == "reused"]
    if reused and processes().main:
        log.info(f"  reused from {config.cache_dir}: {', '.join(reused)}")
    return results, sources


def _predict(lm: DiffusionLM, config: Config) -> fidelity.Predictions:
    settings = config.fidelity
    tokens = fidelity.windows(lm.tokenizer, settings.samples, settings.length)
    return fidelity.predict(lm.model, lm.sampler, tokens, gen_length=settings.gen_length, seed=config.seed)


def _thresholds(config: Config) -> outliers.Thresholds:
    settings = config.outliers
    return outliers.Thresholds(
        channel_ratio=settings.channel_ratio,
        massive_absolute=settings.massive_absolute,
        massive_relative=settings.massive_relative,
    )


def _notes(results: dict[str, TaskResult]) -> list[str]:
    return [f"{name}: {note}" for name, result in results.items() for note in result.notes]


def _choices() -> dict[str, str]:
    """The config file chosen in each group, where Hydra composed the run."""
    if not HydraConfig.initialized():
        return {}
    chosen = HydraConfig.get().runtime.choices
    return {group: str(chosen[group]) for group in GROUPS if chosen.get(group) is not None}


def _command() -> str | None:
    """The command line that repeats this run alone, also out of a sweep and with a team's own folder of configs."""
    if not HydraConfig.initialized():
        return None
    hydra = HydraConfig.get()
    team = os.environ.get("DQX_CONFIG_PATH")
    folders = [s.path for s in hydra.runtime.config_sources if s.provider == "command-line"]
    parts = ["python", "launch.py", *(f"--config-dir={folder}" for folder in folders)]
    parts += [o for o in hydra.overrides.hydra if o.startswith("hydra.searchpath")]
    return (f"DQX_CONFIG_PATH={shlex.quote(team)} " if team else "") + shlex.join([*parts, *hydra.overrides.task])


def _sweep() -> str | None:
    """The name of the sweep this run belongs to: its folder's."""
    if not HydraConfig.initialized() or HydraConfig.get().mode != RunMode.MULTIRUN:
        return None
    return Path(HydraConfig.get().sweep.dir).name
