"""Hydra's sweeper, with two differences: no run of a sweep starts before all of them have been judged, and where they
will leave their records is noted (`dqx.record.outcomes`).

Names and values that do not exist in one run stop the whole sweep, all of them told at once. Runs that are composed
but cannot work, such as a method at widths it does not have, are told before the first run starts and left out: the
others are done, and the summary at the end lists those as refused. What all runs have in common stops the sweep.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.types import HydraContext, RunMode, TaskFunction
from omegaconf import DictConfig, OmegaConf, open_dict

from dqx.common.names import method_label
from dqx.config.command_line import part_by_name
from dqx.config.compose import resolve
from dqx.config.mistakes import explain
from dqx.config.schema import Config, ConfigProblems
from dqx.launch.dispatch import separate
from dqx.record.outcomes import Failure, expect, launched

log = logging.getLogger(__name__)
NAMED = 4  # so many runs are named where several have the same problem


@dataclass
class Combination:
    """A run as its overrides, and what it came to when it was judged."""

    overrides: Sequence[str]
    config: DictConfig | None = None  # None: it cannot even be composed
    problems: list[str] = field(default_factory=list)


class Sweeper(BasicSweeper):
    """Every combination of the values given, in order, through whichever launcher was chosen."""

    at_once = 2  # how many runs could be side by side, at the least

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        """Take `hydra/launcher=local_gpus` where that is what `dispatch` asks for, and nobody chose a launcher."""
        typed: Any = OmegaConf.to_container(
            config.hydra.overrides
        )  # as it was typed: ${hydra.job.num} has no value yet
        chosen = any(o.startswith("hydra/launcher=") for o in typed["hydra"])
        if not (chosen or config.plan) and separate(config.dispatch, config.model.device, self.at_once, typed["task"]):
            overrides = [*typed["hydra"], *typed["task"], "hydra/launcher=local_gpus"]
            name = config.hydra.job.config_name
            other = hydra_context.config_loader.load_configuration(name, overrides, RunMode.MULTIRUN)
            with open_dict(config):
                config.hydra.launcher = other.hydra.launcher
        super().setup(hydra_context=hydra_context, task_function=task_function, config=config)

    def sweep(self, arguments: list[str]) -> None:
        """Judge every run, then launch those that can work."""
        assert self.config is not None
        assert self.hydra_context is not None
        parser = OverridesParser.create(config_loader=self.hydra_context.config_loader)
        (jobs,) = self.split_arguments(parser.parse_overrides([*self._parse_config(), *arguments]), None)
        judged = self.judge(jobs)
        if all(job.problems for job in judged):
            raise ConfigProblems(grouped(judged))
        folder = Path(self.config.hydra.sweep.dir)
        folder.mkdir(parents=True, exist_ok=True)
        OmegaConf.save(self.config, folder / "multirun.yaml")
        self.start(judged)

    def judge(self, jobs: Sequence[Sequence[str]]) -> list[Combination]:
        """Compose every run and look for what keeps it from working, as far as that can be told here.

        Raises ConfigProblems where one cannot be composed.
        """
        assert self.hydra_context is not None
        assert self.config is not None
        judged = [Combination([part_by_name(override) for override in overrides]) for overrides in jobs]
        for job in judged:
            try:
                job.config = self.hydra_context.config_loader.load_sweep_config(self.config, list(job.overrides))
            except Exception as error:  # Hydra's and OmegaConf's
                job.problems = explain(error)
            else:
                job.problems = [] if job.config.plan else self.mistakes(job.config)  # a plan says what cannot run
        if any(job.config is None for job in judged):
            raise ConfigProblems(grouped(judged))
        return judged

    def mistakes(self, composed: DictConfig) -> list[str]:
        """What is wrong with a run."""
        from dqx.study.experiment import problems

        try:
            return problems(resolved(composed), elsewhere=getattr(self.launcher, "elsewhere", False))
        except ConfigProblems as error:
            return error.problems

    def start(self, judged: Sequence[Combination]) -> list[Path]:
        """Launch the runs that can work and say what is wrong with the others. The folders of all, in order.

        What became of the runs is in their folders.
        """
        assert self.launcher is not None
        able, refused = ([job for job in judged if bool(job.problems) == wrong] for wrong in (False, True))
        if refused:
            told = "\n".join(f"  {i}. {problem}" for i, problem in enumerate(grouped(judged), 1))
            log.error(f"{len(refused)} of {len(judged)} runs cannot work and are left out:\n{told}")
        for line in self.meanings(able):
            log.info(line)
        first = len(launched)
        folders = {id(job): self.folder(job, number) for number, job in enumerate([*able, *refused], first)}
        expect(folders.values())
        for job in refused:
            folders[id(job)].mkdir(parents=True, exist_ok=True)
            Failure.of(job.problems, refused=True).write(folders[id(job)])
        size = self.max_batch_size or max(1, len(able))
        for at in range(0, len(able), size):
            self.launcher.launch([list(job.overrides) for job in able[at : at + size]], initial_job_idx=first + at)
        return [folders[id(job)] for job in judged]

    def meanings(self, jobs: Sequence[Combination]) -> list[str]:
        """The choices of widths that mean different widths with different methods."""
        from dqx.record import words  # with NumPy, which a sweep that is refused need not load

        asked = []
        for config in (job.config for job in jobs):
            assert config is not None
            method = method_label(config.method.name, config.method.variant)
            asked.append((str(config.hydra.runtime.choices.bits), method, str(config.bits.name)))
        return words.meanings(asked)

    def folder(self, job: Combination, number: int) -> Path:
        """Where a run leaves its record."""
        assert self.config is not None
        assert job.config is not None
        with open_dict(job.config):
            job.config.hydra.job.num = number
        return Path(self.config.hydra.sweep.dir, job.config.hydra.sweep.subdir)


def resolved(composed: DictConfig) -> Config:
    """A run's configuration without Hydra's own part. Raises ConfigProblems."""
    config = composed.copy()
    with open_dict(config):
        del config["hydra"]
    return resolve(config)


def grouped(jobs: Iterable[Combination]) -> list[str]:
    """Every problem once, with the runs that have it by what tells them apart."""
    jobs = list(jobs)
    shared = set.intersection(*(set(job.overrides) for job in jobs))
    found: dict[str, list[str]] = {}
    for job in jobs:
        name = " ".join(override for override in job.overrides if override not in shared)
        for problem in job.problems:
            found.setdefault(problem, []).append(name)
    return [problem + _concerned(names, len(jobs)) for problem, names in found.items()]


def _concerned(names: Sequence[str], total: int) -> str:
    if len(names) == total:
        return ""
    more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
    return f" [{', '.join(names[:NAMED])}{more}]"
