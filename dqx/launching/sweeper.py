"""Hydra's sweeper, except that it notes where the runs will leave their records (`dqx.outcomes`)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from omegaconf import open_dict

from dqx.outcomes import launched


class Sweeper(BasicSweeper):
    """Every combination of the values given, in order, through whichever launcher was chosen."""

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
        launched.extend(folders)
