"""One run, stage by stage: load, evaluate, quantize, evaluate again, compare, record. The file to read first.

Several processes may share a run (`dqx/common/processes.py`): all of them do everything but for the documents they
share, and the main one alone keeps, prints and records.
"""

from __future__ import annotations

import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from dqx.common import accelerator, heartbeat
from dqx.common.environment import environment
from dqx.common.memory import GB, keep_freed
from dqx.common.processes import main_first, processes
from dqx.common.tensors import tensor_digest
from dqx.config.origin import Origin
from dqx.config.schema import Config
from dqx.evaluate.results import TaskResult
from dqx.export.formats import FORMATS
from dqx.quant import fused
from dqx.quant.backends.choice import SIMULATED, counted
from dqx.quant.report import QuantReport
from dqx.record.folder import Record, RunFolder
from dqx.report.terminal import print_copy, print_export, print_line, print_run
from dqx.report.wandb import copy_run
from dqx.sharing.against import Against
from dqx.study import engine
from dqx.study.cache.space import make_room
from dqx.study.checks import backend_notes, reuse_notes, sampler_notes
from dqx.study.costs import Costs
from dqx.study.estimate.memory import exceeded
from dqx.study.experiment import Experiment
from dqx.study.stages import Stages
from dqx.study.subjects import ModelChanged, Subjects
from dqx.study.surroundings import surroundings


def run(described: Config | Experiment, folder: str | Path, origin: Origin | None = None) -> Record:
    """Run one configuration, or the experiment built from it, and leave its record in `folder`.

    `origin` says where it comes from. Raises ConfigProblems before anything is loaded when the configuration cannot
    work.
    """
    experiment = described if isinstance(described, Experiment) else Experiment.of(described)
    with fused.using(fused.wanted(experiment.config.model.fused, experiment.device)):
        return _run(experiment, folder, origin)


def _run(experiment: Experiment, folder: str | Path, origin: Origin | None) -> Record:
    config = experiment.config
    keep_freed()
    gpu_gb = config.memory.gpu_gb
    accelerator.bound_memory(experiment.device, None if gpu_gb is None else gpu_gb * GB)
    main, origin, output = processes().main, origin or Origin(), RunFolder(folder)
    costs = Costs(experiment.device)
    stages = Stages(experiment, costs)  # no weights yet: they are loaded to compute something
    subjects = stages.subjects

    with costs.stage("read the data"), main_first():
        windows = stages.data()
    here = environment(experiment.device) | surroundings()
    if main:
        output.start(config, here)
    text = None if windows is None else tensor_digest([("ids", windows)])[:16]
    shared = Against(config.bundle, config, experiment.fingerprint, here, text) if config.bundle else None
    if shared and main:
        shared.tell()

    calibration = stages.calibration(windows)
    asked = stages.reference()
    watched = stages.watched(calibration, asked)
    before = stages.measure(subjects.original, watched)
    quantization, source = stages.quantize(calibration)
    after = before
    if quantization.report.changed:
        try:
            after = stages.measure(subjects.quantized, watched, asked)
        except ModelChanged as change:  # what is known was measured on a model that is no more and differs from this
            after = stages.measure(subjects.quantized, watched, asked)
            quantization, source = change.quantized, "computed"

    sides = {"full_precision": before, "quantized": after}
    statistics = {name: side.outliers for name, side in sides.items() if side.outliers}
    record = Record(
        config=asdict(config),
        environment=here | {"fused": fused.said()},
        model=subjects.described(),
        full_precision=before.results,
        quantized=after.results,
        quantization={**_computed(quantization.report, experiment), "source": source},
        outliers=statistics,
        activations={
            f"{side}/{name}": tensor for side, measured in statistics.items() for name, tensor in measured.maps.items()
        },
        fidelity={} if asked is None else after.moved or asked.reference.unmoved(),
        calibration_text=text,
        mask_ratio=float(torch.cat([batch.mask_ratio for batch in calibration]).mean()) if calibration else None,
        timings=costs.seconds,
        memory={
            "limit": {pool.name: pool.limit for pool in experiment.pools},
            "peak": costs.peak,
            "stages": costs.peaks,
        },
        sources={name: side.sources for name, side in sides.items()},
        choices=origin.choices or (shared.record.choices if shared else {}),
        command=origin.command,
        warnings=[
            *stages.cache.store.warnings,
            *_notes(after.results),
            *quantization.report.notes,
            *quantization.notes,
            *reuse_notes(config, experiment.method),
            *backend_notes(config, experiment.arch, experiment.kernels),
            *engine.notes(config),
            *sampler_notes(config, experiment.arch, experiment.sampler),
            *exceeded(experiment.pools, costs.peak),
        ],
    )
    if shared:
        record.warnings += shared.notes(record)
    _keep(record, output, subjects, origin)
    if main and config.cache_max_gb is not None:
        make_room(stages.cache.store, 0, int(config.cache_max_gb * GB))
    finished: Record = processes().broadcast(record)  # in no process before it is written
    return finished


def _computed(report: QuantReport, experiment: Experiment) -> dict[str, Any]:
    """What quantization did, with the kernel that computes each linear, and how many each of them computes."""
    content, kernels = report.to_dict(), experiment.kernels
    rows = [row | {"kernel": kernels.get(row["name"], SIMULATED)} for row in content["linears"]]
    return content | {"linears": rows, "kernels": counted(kernels, len(rows))}


def _keep(record: Record, output: RunFolder, subjects: Subjects, origin: Origin) -> None:
    """Print the record, write it, and copy it to W&B, with the quantized weights where they are wanted."""
    main, wandb, verbose = processes().main, subjects.config.wandb, subjects.config.verbose
    whole = verbose > 1 or (verbose == 1 and origin.sweep is None)
    if main:
        if whole:  # first: a full disk or a slow network takes nothing from the screen
            print_run(record, output.path, origin.again)
        else:
            print_line(record, output.path.name)
        output.write(record)
    _export(subjects, record, output)
    weights = _checkpoint(subjects, record, output.path / "checkpoint") if wandb.checkpoint else None
    if main:
        heartbeat.stage("copy to Weights & Biases")
        record.mirror = copy_run(record, output.path, wandb, group=origin.sweep, checkpoint=weights)
        output.write_results(record)
        if whole or record.mirror.get("state") == "failed":
            print_copy(record)
        if weights:
            shutil.rmtree(weights, ignore_errors=True)


def _export(subjects: Subjects, record: Record, output: RunFolder) -> None:
    """Write the quantized model as `export` names; where that fails, the record says why and stays as it is."""
    export = subjects.config.export
    if export.format is None or subjects.known is None:
        return
    form = FORMATS[export.format]
    out = output.path / form.file
    try:
        lm = subjects.finished()
        if processes().main:
            heartbeat.stage(f"export {form.name}")
            shutil.rmtree(out, ignore_errors=True)  # of an attempt that was killed
            out.unlink(missing_ok=True)
            notes = form.write(lm, out, export.dtype, record)
            print_export(out, notes)
    except (ModelChanged, OSError, ValueError) as error:  # nothing that is finished may be lost
        record.warnings.append(f"no {out.name}: {error}")
        if processes().main:
            print_export(out, [f"not written: {error}"])


def _checkpoint(subjects: Subjects, record: Record, folder: Path) -> Path | None:
    """Write the quantized model to `folder`, for W&B; None, with the reason in the record, where there is none to show.

    It is loaded from the cache or made again where that does not have it.
    """
    try:
        if subjects.known is None or not subjects.known.report.changed:
            raise ValueError("nothing was quantized")
        if processes().main:
            shutil.rmtree(folder, ignore_errors=True)  # of an attempt that was killed
        subjects.save(folder)
    except (ModelChanged, OSError, ValueError) as error:
        record.warnings.append(f"no checkpoint in Weights & Biases: {error}")
        return None
    return folder


def _notes(results: dict[str, TaskResult]) -> list[str]:
    return [f"{name}: {note}" for name, result in results.items() for note in result.notes]
