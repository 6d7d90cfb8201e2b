"""How the runs of a sweep are started: our sweepers, and the launchers behind `conf/hydra/launcher`.

    sweeper.py     every combination of the values given, judged before the first run starts
    pareto.py      a search for the best compromises instead
    submitit.py    `local_gpus`, one run per GPU of this machine, and `slurm`
    ray.py         `ray`
    foreign.py     `accelerate launch launch.py`, and what to type instead
    runs.py        what they say about their runs

Hydra knows them by names of its own (`register`).
"""

from __future__ import annotations

from inspect import isabstract


def register() -> None:
    """Make them known to Hydra, but for those whose engine is not installed (`dqx/config/mistakes.py` says so).

    Hydra takes plugins only by names in its own package: in `conf/hydra`, `hydra_plugins.dqx.NAME` is a class of ours.
    """
    from hydra.core.plugins import Plugins

    known = Plugins.instance().class_name_to_class  # Hydra loads its own anew: before ours, which extend them

    from dqx.launch.pareto import ParetoSweeper
    from dqx.launch.ray import RayLauncher
    from dqx.launch.submitit import LocalLauncher, SlurmLauncher
    from dqx.launch.sweeper import Sweeper

    for plugin in (Sweeper, ParetoSweeper, LocalLauncher, SlurmLauncher, RayLauncher):
        if not isabstract(plugin):
            known[f"hydra_plugins.dqx.{plugin.__name__}"] = plugin
