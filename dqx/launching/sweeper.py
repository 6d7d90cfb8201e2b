"""Hydra's sweeper, except that it knows where runs are computed (`dqx.dispatch`) and leave records (`dqx.outcomes`)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.types import HydraContext, RunMode, TaskFunction
from omegaconf import DictConfig, open_dict

from dqx.dispatch import separate
from dqx.outcomes import expect, launched


class Sweeper(BasicSweeper):
    """Every combination of the values given, in order, through whichever launcher was chosen."""

    at_once = 2  # how many runs could be side by side, at the least

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        """Take `hydra/launcher=local_gpus` where that is what `dispatch` asks for, and nobody chose a launcher."""
        chosen = any(o.startswith("hydra/launcher=") for o in config.hydra.overrides.hydra)
        device = config.model.device
        if not (chosen or config.plan) and separate(config.dispatch, device, self.at_once, config.hydra.overrides.task):
            overrides = [*config.hydra.overrides.hydra, *config.hydra.overrides.task, "hydra/launcher=local_gpus"]
            name = config.hydra.job.config_name
            other = hydra_context.config_loader.load_configuration(name, overrides, RunMode.MULTIRUN)
            with open_dict(config):
                config.hydra.launcher = other.hydra.launcher
        super().setup(hydra_context=hydra_context, task_function=task_function, config=config)

    def validate_batch_is_legal(self, batch: Sequence[Sequence[str]]) -> None:
        """Compose every run, so that mistakes in names come before anything starts."""
        assert self.config is not None
        assert self.hydra_context is not None
        folders: list[Path] = []
        for number, overrides in enumerate(batch, len(launched)):
            config = self.hydra_context.config_loader.load_sweep_config(self.config, list(overrides))
            with open_dict(config):
                config.hydra.job.num = number
            folders.append(Path(self.config.hydra.sweep.dir, config.hydra.sweep.subdir))
        expect(folders)
