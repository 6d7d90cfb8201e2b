"""The record of a run in Weights & Biases. The run folder is the record; this is a copy of it, and it may fail.

    content.py    what of a record is copied, as numbers, rows and series; README.md explains the names
    identity.py   which W&B run a record is: a run that is started again continues its own
    writing.py    a W&B run, whole or not at all, online or offline
    login.py      online where there is a login
    panels.py     the panels that a team looks at
    command.py    `dqx mirror`: copies made again from run folders

One W&B run per dqx run, made from the finished `Record`; its config lies under `cfg` and `choices`, since a sweep
parameter named like a key of ours would overwrite it at the top level. Whatever goes wrong (no package, no network, a
full disk) becomes a warning and a line in results.json.
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from uuid import uuid4

import numpy as np

from dqx.common.files import jsonable
from dqx.config.schema import WandbConfig
from dqx.record.folder import Record
from dqx.record.summary import summary
from dqx.report.wandb import writing
from dqx.report.wandb.content import histogram, series, shown, tables, tags
from dqx.report.wandb.identity import identity
from dqx.report.wandb.login import pick_mode

__all__ = ["copy_run", "note_skipped"]

logger = logging.getLogger(__name__)

DEFAULTS: dict[str, Any] = asdict(WandbConfig())
AGENT_ID = "WANDB_RUN_ID"  # the variable with the id that a sweep's agent has chosen


def copy_run(
    record: Record,
    folder: str | Path,
    settings: Any = None,
    group: str | None = None,
    *,
    checkpoint: Path | None = None,
    run_id: str | None = None,
) -> dict[str, Any]:
    """Copy a record to W&B. Never raises; online, a server that does not answer makes the copy offline.

    Args:
        record: A finished run.
        folder: The run folder; W&B's files go below it.
        settings: The `wandb` section of a config; None: of the record's.
        group: The sweep's name, where the settings have no group.
        checkpoint: The folder of the quantized model, where it is to be kept there too.
        run_id: Another id than the record's own.

    Returns:
        What became of it: the `mirror` entry of results.json.
    """
    config = {"cfg": jsonable(record.config), "choices": record.choices, "environment": jsonable(record.environment)}
    config |= {"checkpoint": {"fingerprint": record.model.get("fingerprint")}}
    wanted = _settings(record.settings.wandb if settings is None else settings, group)
    wanted["tags"] = list(dict.fromkeys([*wanted["tags"], *tags(record)]))

    def fill(run: Any) -> None:
        _fill(run, record, Path(folder), wanted)
        if checkpoint is not None:
            _add_checkpoint(run, record, checkpoint)

    status = _copied(Path(folder), wanted, config, fill, lambda: run_id or os.environ.get(AGENT_ID) or identity(record))
    if wanted["figures"] is None and (status["state"], status.get("mode")) == ("written", "offline"):
        status["message"] = "; ".join([*filter(None, [status.get("message")]), "no figures, which `dqx mirror` draws"])
    return status


def note_skipped(config: Mapping[str, Any], folder: str | Path, settings: Any, reason: str) -> dict[str, Any]:
    """Say in W&B that a run of one of its sweeps cannot be: `reason` as `skipped` in the summary. Never raises."""
    return _copied(
        Path(folder), _settings(settings, None), {"cfg": config},
        lambda run: run.summary.update({"skipped": reason}), lambda: os.environ.get(AGENT_ID) or uuid4().hex,
    )  # fmt: skip


def _settings(given: Any, group: str | None) -> dict[str, Any]:
    wanted = DEFAULTS | (jsonable(given) or {})
    return wanted | {"group": wanted["group"] or group}


def _copied(
    folder: Path, settings: dict[str, Any], config: dict[str, Any], fill: writing.Fill, run_id: Callable[[], str]
) -> dict[str, Any]:
    """Write a W&B run that `fill` fills, and say what became of it."""
    try:
        mode = pick_mode(settings["mode"])
        if mode == "disabled":
            return {"state": "disabled", "mode": mode}
        name = run_id()
        try:
            return writing.write(folder, mode, name, settings, config, fill)
        except Exception as error:
            if mode != "online":
                raise
            logger.warning("W&B could not be reached (%s); the copy is written offline", _short(error))
            writing.give_up()
            written = writing.write(folder, "offline", name, settings, config, fill)
            return written | {"message": f"wanted online, but {_short(error)}"}
    except Exception as error:
        message = "the package wandb cannot be imported" if isinstance(error, ImportError) else _short(error)
        logger.warning("no copy of the run in W&B: %s; results.json has everything", message)
        return {"state": "failed", "message": message}


def _fill(run: Any, record: Record, folder: Path, settings: Mapping[str, Any]) -> None:
    """Summary; tables, histograms and figures, which are of the whole run, in one row of the history; then series."""
    import wandb

    run.summary.update({"folder": shown(folder)} | summary(record))
    whole: dict[str, Any] = {
        name: wandb.Table(columns=list(columns), data=rows)
        for name, (columns, rows) in tables(record, settings["documents"]).items()
    }
    for side, stats in record.outliers.items():
        for site in stats.sites:
            counts, edges = map(np.array, histogram(stats, site))
            whole[f"log2_abs/{side}/{site}"] = wandb.Histogram(np_histogram=(counts, edges))
    with TemporaryDirectory() as place:
        wanted = not run.offline if settings["figures"] is None else settings["figures"]
        run.log(whole | (_figures(record, Path(place), bool(settings["group"])) if wanted else {}))
    for axis, rows in series(record).items():
        if rows:
            run.define_metric(axis, hidden=True, summary="none")
            prefix = next(key for key in rows[0] if key != axis).split("/")[0]
            run.define_metric(f"{prefix}/*", step_metric=axis, summary="none")
        for row in rows:
            run.log(row)


def _figures(record: Record, place: Path, one_of_many: bool) -> dict[str, Any]:
    """The record's figures as PNG; none where drawing fails, which is no reason to lose the rest.

    One of many runs has one activation surface, as in a report of many: they take half of the time.
    """
    import wandb

    try:
        from dqx.report import figures  # matplotlib takes half a second

        drawn = figures.of_run(figures.with_one_surface(record) if one_of_many else record)
        for name, figure in drawn.items():
            figures.save(figure, place, name, ["png"])
        return {f"figures/{name}": wandb.Image(str(place / f"{name}.png")) for name in drawn}
    except Exception as error:
        logger.warning("no figures in W&B: %s", _short(error))
        return {}


def _add_checkpoint(run: Any, record: Record, folder: Path) -> None:
    """The quantized model as an artifact; `dqx.quant.load_quantized` reads the folder that W&B gives back."""
    import wandb

    name = re.sub(r"[^\w.-]", "-", "-".join(tags(record)[:3]))
    facts = {"fingerprint": record.model.get("fingerprint"), "average_bits": record.average_bits}
    artifact = wandb.Artifact(name, type="model", metadata=facts | {"choices": record.choices})
    for file in sorted(folder.iterdir()):
        artifact.add_file(str(file), name=file.name)
    run.log_artifact(artifact)


def _short(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:200]}" if lines else type(error).__name__
