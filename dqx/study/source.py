"""Where a model comes from: a run, a folder that `DiffusionLM.save` wrote, or a checkpoint at full precision.

A run's folder holds no weights. Its quantized model is made again from the recorded configuration, stage by stage as
the run made it, or comes from the cache where the run has kept it.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

from dqx.api import SETTINGS, DiffusionLM, Quantization, load, load_configured
from dqx.common.problems import ConfigProblems, raise_if
from dqx.config.compose import restored
from dqx.models.hub_config import QUANTIZED
from dqx.record.folder import Record, RunFolder
from dqx.study.costs import Costs
from dqx.study.experiment import Experiment
from dqx.study.stages import Stages
from dqx.study.subjects import ModelChanged

CONFIG, RESULTS = "config.yaml", "results.json"


def loaded(source: str) -> DiffusionLM:
    """The model of a run's folder, of a saved or plain checkpoint's folder, or of a name in `conf/model`.

    Raises ConfigProblems or CheckpointError for what is none of these, and for a run that has not finished.
    """
    folder = Path(source).expanduser()
    if not (folder / RESULTS).is_file():
        unfinished = f"{source} is a run that has not finished; name a finished one, or start it again"
        raise_if([unfinished] if (folder / CONFIG).is_file() else [])
        return load(source)
    return of_run(folder)


def is_quantized(source: str) -> bool:
    """Whether the model that `loaded` gives for a folder is quantized, told without its weights.

    Raises ConfigProblems for a run that cannot be made again here.
    """
    folder = Path(source).expanduser()
    if not (folder / RESULTS).is_file():
        return (folder / QUANTIZED).is_file()
    return Experiment.of(restored(RunFolder(folder).read(documents=False).config)).changes_model


def full_precision(source: str, lm: DiffusionLM) -> DiffusionLM:
    """The model that `lm`, loaded from `source`, was before it was quantized.

    Raises ConfigProblems where it never was, and CheckpointError where the source's checkpoint is not there any more.
    """
    raise_if([] if lm.quantization else [f"{source} is at full precision, and there is nothing to compare it with"])
    settings = Path(source).expanduser() / SETTINGS
    path = json.loads(settings.read_text())["path"] if settings.is_file() else lm.config.path
    return load_configured(replace(lm.config, path=path))


def record_of(source: str) -> Record | None:
    """The record of a run's folder, without documents; None for what is no run."""
    folder = Path(source).expanduser()
    return RunFolder(folder).read(documents=False) if (folder / RESULTS).is_file() else None


def of_run(folder: Path) -> DiffusionLM:
    """The quantized model of a finished run; its model at full precision where the run has quantized nothing.

    Raises ConfigProblems where it comes out differently than the run had it.
    """
    record = RunFolder(folder).read(documents=False)
    experiment = Experiment.of(restored(record.config))
    stages = Stages(experiment, Costs(experiment.device))
    done, _ = stages.quantize(stages.calibration(stages.data()))
    if not done.report.changed:
        return stages.subjects.full_precision()
    errors = {row["name"]: row["weight_error"] for row in record.quantization["linears"]}
    changed = [row.name for row in done.report.linears if row.weight_error != errors.get(row.name)]
    again = f"{folder}: made again, the model is another than the run's"
    raise_if([f"{again} (first in {changed[0]}); run it here, and name that run"] if changed else [])
    try:
        lm = stages.subjects.after_quantization()
    except ModelChanged as change:
        raise ConfigProblems([f"{again}; run it here again, and name that run"]) from change
    lm.quantization = Quantization(experiment.method, experiment.config.bits, done.report)
    return lm
