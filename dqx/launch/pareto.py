"""Hydra's side of `dqx.launch.search`: the command line's values are a space, runs go through any launcher."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import IntervalSweep, Override
from omegaconf import OmegaConf

from dqx.config.schema import ConfigProblems
from dqx.launch.search import Interval, Measurement, Search, Space, measure, unknown_objectives
from dqx.launch.sweeper import Combination, Sweeper, grouped, resolved
from dqx.record.outcomes import launched


class ParetoSweeper(Sweeper):
    """Searches for the settings that are beaten in no objective (conf/hydra/sweeper/pareto.yaml)."""

    def __init__(
        self,
        trials: int,
        batch: int,
        minimize: Sequence[str],
        maximize: Sequence[str],
        sampler: str,
        seed: int,
        params: dict[str, str] | None = None,
    ):
        super().__init__(max_batch_size=None, params=params)
        self.trials, self.batch, self.sampler, self.seed = trials, batch, sampler, seed
        self.at_once = batch
        self.minimize, self.maximize = list(minimize), list(maximize)

    def sweep(self, arguments: list[str]) -> None:
        """Ask, launch, tell, until enough points are measured; then print the table."""
        assert self.config is not None
        assert self.hydra_context is not None
        problems = self.problems(arguments)
        if problems:
            raise ConfigProblems(problems)
        parser = OverridesParser.create(config_loader=self.hydra_context.config_loader)
        by_key = {o.get_key_element(): o for o in parser.parse_overrides([*self._parse_config(), *arguments])}
        fixed = [f"{k}={o.get_value_element_as_str()}" for k, o in by_key.items() if not o.is_sweep_override()]
        space = {key: values(override) for key, override in by_key.items() if override.is_sweep_override()}
        judged = self.judge([[*fixed, *point] for point in every_value(space)])  # mistakes claim no folder
        hopeless = all(job.problems for job in judged)
        problems = grouped(judged) if hopeless else self.unknown_objectives(judged)
        if problems:
            raise ConfigProblems(problems)
        folder = Path(self.config.hydra.sweep.dir)
        search = Search(
            folder,
            space,
            minimize=self.minimize,
            maximize=self.maximize,
            sampler=self.sampler,
            seed=self.seed,
            fixed=fixed,
        )
        OmegaConf.save(self.config, folder / "multirun.yaml")
        launched.extend(folder / outcome.folder for outcome in search.outcomes())

        def launch(points: list[list[str]]) -> list[Measurement]:
            runs = self.start(self.judge([[*fixed, *point] for point in points]))
            return [measure(run, list(search.objectives)) for run in runs]

        search.run(self.trials, self.batch, launch)
        search.write()
        sys.stdout.write(f"\n{search.table()}\nSearch:  {folder / 'pareto.json'}\n")

    def unknown_objectives(self, judged: Sequence[Combination]) -> list[str]:
        """Those that the runs of the search, here the first that can work, will not have."""
        config = next(resolved(job.config) for job in judged if job.config and not job.problems)
        named = {"minimize": self.minimize, "maximize": self.maximize}
        return [
            f"hydra.sweeper.{goal}: {problem}"
            for goal, names in named.items()
            for problem in unknown_objectives(config, names)
        ]

    def problems(self, arguments: Sequence[str]) -> list[str]:
        """What keeps a search from starting."""
        found = []
        if find_spec("optuna") is None:
            found.append("hydra/sweeper=pareto needs a package that is not installed: pip install -e '.[search]'")
        if any(argument.lower() == "plan=true" for argument in arguments):
            found.append("plan=true cannot tell which runs a search makes; leave out hydra/sweeper=pareto to plan all")
        for name in ("trials", "batch"):
            if getattr(self, name) < 1:
                found.append(f"hydra.sweeper.{name}={getattr(self, name)} must be 1 or more")
        return found


def every_value(space: Space) -> list[list[str]]:
    """Points in which every value of every setting occurs: the first of each, and from there one changed at a time."""
    listed = {key: [repr(v.low), repr(v.high)] if isinstance(v, Interval) else v for key, v in space.items()}
    first = {key: found[0] for key, found in listed.items()}
    points = [first, *({**first, key: value} for key, found in listed.items() for value in found[1:])]
    return [[f"{key}={value}" for key, value in point.items()] for point in points]


def values(override: Override) -> list[str] | Interval:
    """What a setting may be: the values listed (a,b,c or range(1,5)), or any in interval(0.3,0.9)."""
    sweep = override.value()
    if isinstance(sweep, IntervalSweep):
        assert sweep.start is not None
        assert sweep.end is not None
        return Interval(sweep.start, sweep.end, log="log" in sweep.tags)
    return list(dict.fromkeys(override.sweep_string_iterator()))
