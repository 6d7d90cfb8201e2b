"""A run that was started from a bundle, against the bundle: what is different here, and how the results compare."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from dqx.common.files import jsonable
from dqx.config.schema import Config, ConfigProblems
from dqx.evaluate.results import TaskResult
from dqx.record.compare import ABSENT, compare, differences
from dqx.record.folder import SIDES, Record, RunFolder
from dqx.record.words import difference, interval, value
from dqx.sharing import bundle
from dqx.sharing.fingerprints import data_fingerprints
from dqx.sharing.private import placeholder, without_places
from dqx.sharing.share import conceal

#: What an environment says that no result depends on; and what bundles of earlier versions do not say.
UNRELATED = ("accelerators", "fused", "memory", "hub", "wandb", "slurm")
SINCE = ("bf16", "determinism", "sandbox")

log = logging.getLogger(__name__)


class Against:
    """The run in a bundle. `before` is what differs here, in plain words; `after` adds how the results compare."""

    def __init__(
        self,
        path: str,
        config: Config,
        checkpoint: str,
        environment: Mapping[str, Any],
        calibration_text: str | None = None,
    ):
        """Read a bundle and compare what this run will be with it. Raises ConfigProblems where it cannot be read.

        Args:
            path: the bundle.
            config: of this run.
            checkpoint: fingerprint of this run's.
            environment: of this run, as its record has it.
            calibration_text: fingerprint of this run's; None where it reads none.
        """
        try:
            shared = bundle.read(Path(path).expanduser())
            with TemporaryDirectory() as folder:
                self.record = RunFolder(shared.unpack(Path(folder))).read()
        except (bundle.BundleError, OSError, ValueError, KeyError, TypeError) as error:
            raise ConfigProblems([f"bundle={path}: {error}"]) from error
        self.name = Path(path).name
        settings = jsonable(asdict(config))
        self.before = [
            *environment_differences(self.record.environment, environment, config.model.dtype),
            *_checkpoint(self.record.model["fingerprint"], checkpoint),
            *_data(shared.manifest.get("data", {}), data_fingerprints(settings)),
            *_calibration(self.record.calibration_text, calibration_text),
            *_settings(self.record.config, settings, shared.manifest["give_anew"]),
        ]

    def tell(self) -> None:
        """Say what differs, before anything is computed."""
        log.info(f"{self.name} again; {'this differs here:' if self.before else 'nothing recorded differs here'}")
        for line in self.before:
            log.info(f"  {line}")

    def notes(self, record: Record) -> list[str]:
        """For the record of the run: what differed, and how its results compare with the bundle's."""
        lines = [*self.before, *results_differences(self.record, record)]
        return [f"against {self.name}: {line}" for line in lines]


def environment_differences(there: Mapping[str, Any], here: Mapping[str, Any], dtype: str) -> Iterator[str]:
    """What differs between two environments, of what results depend on: versions, device, commit, processes, ..."""
    compared = {
        key: facts for key, facts in here.items() if key not in UNRELATED and not (key in SINCE and key not in there)
    }
    recorded = {key: facts for key, facts in there.items() if key not in UNRELATED}
    for line in differences(recorded, compared, "environment"):
        key, _, values = line.removeprefix("environment.").partition(": ")
        before, _, after = values.partition(" -> ")
        words = ("not recorded" if text in (ABSENT, "null") else text for text in (before, after))
        yield "{}: {} there, {} here".format(key.removeprefix("packages."), *words)
    if str(here.get("commit") or "").endswith("-changed"):
        yield "commit: the sources of dqx have been changed here since"
    if str(there.get("commit") or "").endswith("-changed"):
        yield "commit: the sources of dqx had been changed there; those changes are not in the bundle"
    if dtype == "bfloat16" and here.get("bf16") == "emulated":
        yield f"bfloat16: this device ({here.get('capability')}) has no arithmetic in it and emulates it"


def _checkpoint(there: str, here: str) -> Iterator[str]:
    if there != here:
        yield f"checkpoint: fingerprint {there} there, {here} here: another model"


def _data(there: Mapping[str, str], here: Mapping[str, str]) -> Iterator[str]:
    for name in dict.fromkeys((*there, *here)):
        if there.get(name) != here.get(name):
            digests = (known.get(name, "not known (not a local copy)") for known in (there, here))
            yield "data of {}: {} there, {} here".format(name, *digests)


def _calibration(there: str | None, here: str | None) -> Iterator[str]:
    if there is not None and there != here:
        yield f"calibration text: fingerprint {there} there, {here or 'none read'} here: other tokens"


def _settings(there: Mapping[str, Any], here: Mapping[str, Any], give_anew: list[str]) -> Iterator[str]:
    """The settings that were changed, but for those that had to be given anew."""
    for line in differences(there, without_places(here)):
        key, _, values = line.partition(": ")
        if key not in give_anew or not values.startswith(placeholder(key)):
            yield line


def results_differences(there: Record, here: Record) -> Iterator[str]:
    """Per task and side: whether all predictions are identical, else how many are not and what that does to the metric.

    Deltas are those of `dqx.report.compare`: here minus there, with a 95 % interval.
    """
    missing = [name for name in there.quantized if name not in here.quantized]
    if missing:
        yield f"tasks that were not run: {', '.join(missing)}"
    same = [name for name in there.quantized if name in here.quantized]
    try:
        tables = compare(there, here) if same else {}
    except ValueError as error:
        yield f"the results cannot be compared: {error}"
        return
    for side in SIDES:
        rows = {row.name: row for row in tables.get(side, next(iter(tables.values()), [])) if row.kind == "task"}
        for name in same:
            before, after = getattr(there, side)[name], getattr(here, side)[name]
            other = other_predictions(before, after)
            label, row = f"{name}, {side.replace('_', ' ')}", rows[name]
            reused = here.sources.get(side, {}).get(name) == "reused"
            where = " (reused from the cache, not computed again)" if reused else ""
            if not other and row.delta == 0:
                yield f"{label}: all {after.n} predictions are identical{where}"
                continue
            limits = interval(row.low, row.high, row.metric)
            change = difference(row.delta, row.metric) + (f" {limits}" if limits else "")
            yield (
                f"{label}: {other} of {after.n} predictions differ, {value(row.full_precision, row.metric)} there, "
                f"{value(row.quantized, row.metric)} here, {change}, {row.verdict}{where}"
            )


def other_predictions(there: TaskResult, here: TaskResult) -> int:
    """How many documents have another prediction; likelihoods, which differ in their last digits, are not looked at."""
    known = {row.doc_id: conceal(row).prediction for row in there.documents}
    return sum(known.get(row.doc_id) != conceal(row).prediction for row in here.documents)
