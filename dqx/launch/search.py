"""Search for the best compromises: which settings are beaten in no objective, without running them all.

A search is an Optuna study in the folder of a sweep (`search.journal`), asked and told in batches, so that a killed
one goes on where it stopped and several runs may be computed at once. What has been measured is never run twice.
`hydra/sweeper=pareto` runs it (conf/hydra/sweeper/pareto.yaml); its result is `pareto.json` and `pareto.md`.

Objectives are numbers of a run's summary, by the names that W&B shows: `delta/average`, `average_bits`,
`fidelity/divergence/0.5`, `nll/wikitext2` ... (`dqx.record.summary`).
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from dqx.common.names import did_you_mean
from dqx.config.schema import Config, ConfigProblems
from dqx.record.outcomes import failures

if TYPE_CHECKING:
    import optuna

JOURNAL, SAMPLERS = "search.journal", ("tpe", "nsga2")
COSTS = ("seconds", "memory", "outliers")  # objectives that only a run can tell


@dataclass(frozen=True)
class Interval:
    """All numbers from `low` to `high`."""

    low: float
    high: float
    log: bool = False


Space = Mapping[str, list[str] | Interval]  # a key of the command line -> its values


@dataclass(frozen=True)
class Measurement:
    """What one run came to: values by objective, or why it has none."""

    folder: str
    values: dict[str, float] | None = None
    intervals: dict[str, tuple[float, float]] | None = None  # 95 %, of objectives that have one
    average_bits: float | None = None
    reason: str | None = None  # why it was refused or failed
    refused: bool = False


@dataclass(frozen=True)
class Trial:
    """One point of the search, and whether no other is at least as good everywhere and better somewhere."""

    overrides: list[str]
    outcome: Measurement
    on_front: bool


class Search:
    """A study with its space. Raises ConfigProblems for settings that cannot work, and for another search's folder.

    `fixed` are the overrides that all runs share: with others the measurements would not be comparable.
    """

    def __init__(
        self,
        folder: Path,
        space: Space,
        *,
        minimize: Sequence[str],
        maximize: Sequence[str],
        sampler: str = "tpe",
        seed: int = 0,
        fixed: Sequence[str] = (),
    ):
        self.folder, self.space, self.seed = folder, space, seed
        self.objectives: dict[str, Literal["minimize", "maximize"]] = {
            **dict.fromkeys(minimize, "minimize"),
            **dict.fromkeys(maximize, "maximize"),
        }
        problems = _problems(space, minimize, maximize, sampler)
        if problems:
            raise ConfigProblems(problems)
        import optuna
        from optuna.storages import JournalStorage
        from optuna.storages.journal import JournalFileBackend

        optuna.logging.set_verbosity(optuna.logging.WARNING)
        folder.mkdir(parents=True, exist_ok=True)
        self.study = optuna.create_study(
            storage=JournalStorage(JournalFileBackend(str(folder / JOURNAL))),
            study_name="search",
            directions=[*self.objectives.values()],
            load_if_exists=True,
        )
        self._check_same(fixed)
        started = len(self.study.get_trials(deepcopy=False))  # a search that goes on must not draw the same again
        chosen: optuna.samplers.BaseSampler
        if sampler == "tpe":
            chosen = optuna.samplers.TPESampler(seed=seed + started, constant_liar=True)
        else:
            chosen = optuna.samplers.NSGAIISampler(seed=seed + started)
        self.study.sampler = chosen
        self._take_back_killed()

    @property
    def size(self) -> float:
        """How many points there are."""
        return math.prod(len(values) if isinstance(values, list) else math.inf for values in self.space.values())

    def ask(self, count: int) -> list[optuna.Trial]:
        """Up to `count` points to run, none of which was measured before. Those that repeat are told here."""
        known = {tuple(overrides): outcome for overrides, outcome in self._measured()}
        asked: dict[tuple[str, ...], optuna.Trial] = {}
        while len(asked) < min(count, self.size - len(known)):
            trial = self.study.ask()
            overrides = tuple(self._suggest(trial))
            trial.set_user_attr("overrides", overrides)
            if overrides in known:
                self._tell(trial, known[overrides])
            elif overrides in asked:
                self.study.tell(trial, state=_failed())
            else:
                asked[overrides] = trial
                continue
            self.study.enqueue_trial(self._untried({*known, *asked}))
        return list(asked.values())

    def tell(self, trial: optuna.Trial, outcome: Measurement) -> None:
        """Keep what a run came to."""
        trial.set_user_attr("outcome", asdict(outcome))
        self._tell(trial, outcome)

    def run(self, trials: int, batch: int, launch: Callable[[list[list[str]]], Sequence[Measurement]]) -> None:
        """Until `trials` points are measured, the front written after every batch of runs."""
        while (left := trials - len(self._measured())) > 0 and (asked := self.ask(min(batch, left))):
            outcomes = launch([list(trial.user_attrs["overrides"]) for trial in asked])
            for trial, outcome in zip(asked, outcomes, strict=True):
                self.tell(trial, outcome)
            self.write()

    def trials(self) -> list[Trial]:
        """Every point that was tried, once, those with fewest bits first and those without values last."""
        measured = self._measured()
        values = [None if o.values is None else self._costs(o.values) for _, o in measured]
        found = [
            Trial(
                overrides, outcome, mine is not None and not any(other and dominates(other, mine) for other in values)
            )
            for (overrides, outcome), mine in zip(measured, values, strict=True)
        ]
        return sorted(found, key=lambda t: (t.outcome.values is None, t.outcome.average_bits or 0))

    def outcomes(self) -> list[Measurement]:
        """What was measured, in the order of the runs."""
        return [outcome for _, outcome in self._measured()]

    def write(self) -> None:
        """pareto.json and pareto.md."""
        from dqx.common.files import write_json, write_text

        trials = self.trials()
        rows = [{"overrides": t.overrides, **asdict(t.outcome), "on_front": t.on_front} for t in trials]
        write_json(self.folder / "pareto.json", {"objectives": self.objectives, "trials": rows})
        write_text(self.folder / "pareto.md", self.table())

    def table(self) -> str:
        """The trials as a table in Markdown, those on the front marked."""
        heads = ["front", "bits per weight", *(n for n in self.objectives if n != "average_bits"), "settings"]
        lines = [heads, ["---"] * len(heads)]
        for trial in self.trials():
            outcome, settings = trial.outcome, " ".join(trial.overrides)
            if outcome.values is None:
                what = "refused" if outcome.refused else "failed"
                lines.append(["", *["-"] * (len(heads) - 2), f"{settings} ({what}: {outcome.reason})"])
                continue
            cells = [_cell(n, outcome) for n in self.objectives if n != "average_bits"]
            bits = "-" if outcome.average_bits is None else f"{outcome.average_bits:.2f}"
            lines.append(["*" if trial.on_front else "", bits, *cells, settings])
        text = "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)
        goals = ", ".join(f"{name} ({goal})" for name, goal in self.objectives.items())
        return f"{text}\n\n`*`: on the front, no other trial is better in one of {goals} and as good in the others.\n"

    def _costs(self, values: Mapping[str, float]) -> tuple[float, ...]:
        return tuple(values[n] if goal == "minimize" else -values[n] for n, goal in self.objectives.items())

    def _suggest(self, trial: optuna.Trial) -> list[str]:
        found = []
        for key, values in self.space.items():
            if isinstance(values, Interval):
                found.append(f"{key}={trial.suggest_float(key, values.low, values.high, log=values.log)!r}")
            else:
                found.append(f"{key}={trial.suggest_categorical(key, values)}")
        return found

    def _untried(self, tried: set[tuple[str, ...]]) -> dict[str, Any]:
        """A point that was not tried, drawn at random."""
        drawn = random.Random(f"{self.seed} {len(self.study.get_trials(deepcopy=False))}")
        while True:
            point = {
                key: drawn.choice(values) if isinstance(values, list) else drawn.uniform(values.low, values.high)
                for key, values in self.space.items()
            }
            if tuple(f"{key}={value}" for key, value in point.items()) not in tried:
                return point

    def _measured(self) -> list[tuple[list[str], Measurement]]:
        kept = [t.user_attrs for t in self.study.get_trials(deepcopy=False) if "outcome" in t.user_attrs]
        return [(list(attrs["overrides"]), Measurement(**attrs["outcome"])) for attrs in kept]

    def _tell(self, trial: optuna.Trial, outcome: Measurement) -> None:
        if outcome.values is None:
            self.study.tell(trial, state=_failed())
        else:
            self.study.tell(trial, [outcome.values[name] for name in self.objectives])

    def _take_back_killed(self) -> None:
        """What was running when the search was killed comes first, in the same order."""
        from optuna.trial import TrialState

        for trial in self.study.get_trials(states=(TrialState.RUNNING,)):
            if "outcome" in trial.user_attrs:
                outcome = Measurement(**trial.user_attrs["outcome"])
                values = None if outcome.values is None else [outcome.values[n] for n in self.objectives]
                self.study.tell(trial.number, values, state=None if values else _failed())
                continue
            self.study.tell(trial.number, state=_failed())
            if "overrides" in trial.user_attrs:
                self.study.enqueue_trial(trial.params)

    def _check_same(self, fixed: Sequence[str]) -> None:
        space = {key: v if isinstance(v, list) else [v.low, v.high, v.log] for key, v in self.space.items()}
        mine = {"space": space, "objectives": self.objectives, "fixed": sorted(fixed)}
        if self.study.user_attrs.get("search", mine) != mine:
            raise ConfigProblems(
                [f"hydra.sweep.dir={self.folder} holds a search with other settings; give another folder, or its own"]
            )
        self.study.set_user_attr("search", mine)


def measure(folder: Path, objectives: Sequence[str]) -> Measurement:
    """What the run in a folder came to. Raises ConfigProblems for an objective that its record does not have."""
    failed = failures([folder]).get(folder)
    if failed:
        return Measurement(folder.name, reason=failed.reason, refused=failed.refused)
    from dqx.record.deltas import headline
    from dqx.record.folder import RunFolder
    from dqx.record.summary import summary

    record = RunFolder(folder).read(documents=False)
    found = {key: value for key, value in summary(record).items() if isinstance(value, int | float)}
    unknown = [name for name in objectives if name not in summary(record)]
    if unknown:
        raise ConfigProblems(
            [f"{n} is no number of this run's summary; {did_you_mean(n, sorted(found))}" for n in unknown]
        )
    values = {name: float(summary(record)[name]) if name in found else math.nan for name in objectives}
    lost = [name for name, value in values.items() if not math.isfinite(value)]
    if lost:
        return Measurement(
            folder.name, average_bits=record.average_bits, reason=f"{', '.join(lost)} is no finite number"
        )
    rows = {f"delta/{row.name}": row for row in record.deltas}
    rows.setdefault("delta/average", headline(record.deltas))
    intervals = {
        name: (row.low, row.high)
        for name in objectives
        if (row := rows.get(name)) and row.low is not None and row.high is not None
    }
    return Measurement(folder.name, values, intervals, record.average_bits)


def unknown_objectives(config: Config, names: Sequence[str]) -> list[str]:
    """Those of the names that no run of this configuration will have in its summary, with the nearest that it will.

    The summary of a made-up run of the same tasks says what there will be; what a run costs is not judged.
    """
    from dqx.diagnostics.fidelity import RATIOS
    from dqx.evaluate.results import DocumentRow, TaskResult
    from dqx.record.folder import Record
    from dqx.record.summary import summary

    rows = [DocumentRow(f"{i}", 0.0) for i in range(2)]
    tasks = {
        name: TaskResult(name, spec.category, spec.metric, 1.0, len(rows), rows)
        for name, spec in config.task.suite.items()
    }
    distances = [{"mask_ratio": ratio, "divergence": 0.0, "agreement": 1.0} for ratio in RATIOS]
    fidelity = {"by_mask_ratio": distances, "answers": {"agreement": 1.0}} if config.fidelity.samples else {}
    made_up = Record(asdict(config), {}, {}, tasks, tasks, {"average_bits": 4.0}, fidelity=fidelity)
    known = [name for name, value in summary(made_up).items() if isinstance(value, int | float)]
    judged = [name for name in names if name.partition("/")[0] not in COSTS]
    return [
        f"{name} will be no number of a run's summary; {did_you_mean(name, sorted(known))}"
        for name in judged
        if name not in known
    ]


def dominates(one: Sequence[float], other: Sequence[float]) -> bool:
    """Whether costs are lower somewhere and higher nowhere."""
    return all(a <= b for a, b in zip(one, other, strict=True)) and tuple(one) != tuple(other)


def _problems(space: Space, minimize: Sequence[str], maximize: Sequence[str], sampler: str) -> list[str]:
    found = []
    if not space:
        found.append("hydra/sweeper=pareto has nothing to search; give settings several values: bits=2,3,4")
    if len([*minimize, *maximize]) < 1:
        found.append("hydra.sweeper.minimize and maximize are empty; name what to optimize: average_bits")
    if len({*minimize, *maximize}) < len([*minimize, *maximize]):
        found.append("hydra.sweeper.minimize and maximize name the same objective twice; once is enough")
    if sampler not in SAMPLERS:
        found.append(f"hydra.sweeper.sampler={sampler} is unknown; it is one of {', '.join(SAMPLERS)}")
    return found


def _cell(name: str, outcome: Measurement) -> str:
    assert outcome.values is not None
    limits = (outcome.intervals or {}).get(name)
    return f"{outcome.values[name]:.4g}" + (f" [{limits[0]:.3g}, {limits[1]:.3g}]" if limits else "")


def _failed() -> optuna.trial.TrialState:
    from optuna.trial import TrialState

    return TrialState.FAIL
