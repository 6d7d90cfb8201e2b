"""Finished runs below any folders: `dqx.runs("runs").to_pandas()` has them as one frame."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dqx.record import outcomes
from dqx.record.folder import SIDES, Record, RunFolder

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True)
class Run:
    """A finished run and the folder it was read from."""

    path: Path
    record: Record

    def rows(self) -> Iterator[dict[str, Any]]:
        """One row per task: what was run, what came of it, and what it cost.

        Scores and differences are fractions, or nats per token for a text; `seconds` are those of the whole run,
        `seconds_full_precision` and `seconds_quantized` those of the task.
        """
        record, run = self.record, self.record.settings
        settings = {
            "folder": str(self.path), "created": record.created, "model": run.model, "method": run.method_label,
            "bits": run.bits, "average_bits": record.average_bits, "masking": run.masking,
            "calibration": run.calibration and run.calibration.text, "threshold": run.threshold, "cache": run.cache,
            "steps": run.steps, "limit": run.limit, "seed": run.seed,
        }  # fmt: skip
        total = sum(record.timings.values())
        measured = (
            "category",
            "metric",
            "n",
            *SIDES,
            "delta",
            "low",
            "high",
            "relative_drop",
            "level",
            "p_adjusted",
            "verdict",
        )
        for row in record.deltas:
            if row.kind == "task":
                values = {"task": row.name} | {name: getattr(row, name) for name in measured}
                seconds = {f"seconds_{side}": getattr(record, side)[row.name].seconds for side in SIDES}
                yield settings | values | seconds | {"seconds": total}


@dataclass(frozen=True)
class Skipped:
    """A folder without a run that can be read, and why."""

    path: Path
    reason: str


@dataclass(frozen=True, repr=False)
class Runs(Sequence[Run]):
    """Finished runs in order of their making, and the folders that hold none or one that cannot be read."""

    finished: tuple[Run, ...]
    skipped: tuple[Skipped, ...] = ()

    def __getitem__(self, index: Any) -> Any:
        return Runs(self.finished[index]) if isinstance(index, slice) else self.finished[index]

    def __len__(self) -> int:
        return len(self.finished)

    def __repr__(self) -> str:
        models = ", ".join(dict.fromkeys(run.record.settings.model for run in self))
        skipped = f", {len(self.skipped)} not finished or not readable" if self.skipped else ""
        return f"Runs({len(self)} finished{models and f' of {models}'}{skipped})"

    def _repr_html_(self) -> str:
        columns = ("model", "method", "bits", "seed", "task", "n", *SIDES, "delta", "low", "high", "verdict", "folder")
        frame = self.to_pandas()
        return str(frame.reindex(columns=columns).to_html(index=False, float_format="{:.3f}".format, max_rows=50))

    def to_pandas(self) -> pd.DataFrame:
        """One row per run and task, as `Run.rows` describes it."""
        import pandas as pd  # half a second, which nothing else here needs

        return pd.DataFrame([row for run in self for row in run.rows()])


def runs(*folders: str | Path, documents: bool = False) -> Runs:
    """The finished runs below the folders, with their documents where they are wanted.

    Raises FileNotFoundError for a folder that does not exist.
    """
    places: dict[Path, Path] = {}
    for folder in map(Path, folders):
        if not folder.is_dir():
            raise FileNotFoundError(f"{folder} is no folder of runs")
        for pattern in ("results.json", "environment.json", outcomes.FILE):
            places |= {path.parent.resolve(): path.parent for path in sorted(folder.rglob(pattern))}
    finished, skipped = [], []
    for path in places.values():
        failure = outcomes.failures([path]).get(path)
        if failure is not None:
            killed = failure.reason == outcomes.KILLED
            skipped.append(Skipped(path, "it has not finished: it runs, or was killed" if killed else failure.reason))
            continue
        try:
            finished.append(Run(path, RunFolder(path).read(documents)))
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            skipped.append(Skipped(path, f"cannot be read: {type(error).__name__}: {error}"))
    return Runs(tuple(sorted(finished, key=lambda run: run.record.created)), tuple(skipped))
