"""Hydra's Ray launcher, with two differences: a run that dies is one failed run, and a cluster can be joined."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from hydra.core.singleton import Singleton
from hydra.core.utils import JobReturn
from omegaconf import OmegaConf, open_dict

from dqx.launch.runs import announce, ended, vanished

try:
    from hydra_plugins.hydra_ray_launcher.ray_launcher import RayLauncher as HydraRayLauncher
except ImportError:  # whoever chooses it is told (dqx/config/mistakes.py)
    from hydra.plugins.launcher import Launcher as HydraRayLauncher


class RayLauncher(HydraRayLauncher):
    @property
    def elsewhere(self) -> bool:
        """Whether runs may be computed on other machines than this one."""
        return bool(self.ray_cfg.init.address)

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        """Run every job; Ray finds the room."""
        import ray
        from hydra_plugins.hydra_ray_launcher._launcher_util import launch_job_on_ray

        assert self.config is not None
        assert self.hydra_context is not None
        settings: Any = OmegaConf.to_container(self.ray_cfg, resolve=True)
        chosen = {what: {k: v for k, v in settings[what].items() if v is not None} for what in ("init", "remote")}
        returns: dict[int, JobReturn] = {}
        ray.init(**chosen["init"])
        try:
            tasks = {}
            for number, overrides in enumerate(job_overrides, initial_job_idx):
                announce(number, overrides)
                config = self.hydra_context.config_loader.load_sweep_config(self.config, list(overrides))
                with open_dict(config):
                    config.hydra.job.num, config.hydra.job.id = number, str(number)
                state = Singleton.get_state()
                task = launch_job_on_ray(
                    self.hydra_context, OmegaConf.create(chosen["remote"]), config, self.task_function, state
                )
                tasks[task] = number
            while tasks:
                (task,), _ = ray.wait(list(tasks), num_returns=1)
                number = tasks.pop(task)
                try:
                    returned = ray.get(task)
                except ray.exceptions.RayError as error:
                    returned = vanished(number, str(error).splitlines()[0])
                returns[number] = ended(number, returned)
        finally:
            ray.shutdown()  # ends what is still running
        return [returns[number] for number in sorted(returns)]
