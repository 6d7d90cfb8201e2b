"""Where a run comes from: what only Hydra, which composed it, can say."""

from __future__ import annotations

import os
import shlex
import sys
from dataclasses import dataclass, field
from pathlib import Path

from hydra.conf import HydraConf
from hydra.types import RunMode

from dqx.config.command_line import as_typed
from dqx.config.schema import GROUPS


@dataclass(frozen=True)
class Origin:
    """Empty for a run that was not started from the command line."""

    command: str | None = None  # the command line that repeats this run alone
    again: str | None = None  # the same with the folder to type it in, and the program as it was started
    choices: dict[str, str] = field(default_factory=dict)  # config group -> the file chosen
    sweep: str | None = None  # the name of the sweep: its folder's

    @classmethod
    def of(cls, hydra: HydraConf, bundle: str | None = None) -> Origin:
        """Of a run that Hydra starts; `bundle` is the shared run that it repeats."""
        chosen = hydra.runtime.choices
        command, program = _command(hydra, bundle), sys.argv[0]
        again = command
        if Path(program).name == "launch.py":  # may lie in another folder
            again = command.replace("python launch.py", shlex.join(["python", program]), 1)
        return cls(
            command=command,
            again=f"cd {shlex.quote(hydra.runtime.cwd)} && {again}",
            choices={group: str(chosen[group]) for group in GROUPS if chosen.get(group) is not None},
            sweep=Path(hydra.sweep.dir).name if hydra.mode == RunMode.MULTIRUN else None,
        )


def _command(hydra: HydraConf, bundle: str | None) -> str:
    """Out of a sweep the run alone, and with a team's own folder of configs."""
    team = os.environ.get("DQX_CONFIG_PATH")
    folders = [s.path for s in hydra.runtime.config_sources if s.provider == "command-line"]
    parts = [*hydra.help.app_name.split(), *(["--from", bundle] if bundle else [])]
    parts += [f"--config-dir={folder}" for folder in folders]
    parts += [o for o in hydra.overrides.hydra if o.startswith("hydra.searchpath")]
    task = [as_typed(o) for o in hydra.overrides.task if o != "dispatch=separate"]  # which a run alone cannot be
    return (f"DQX_CONFIG_PATH={shlex.quote(team)} " if team else "") + shlex.join([*parts, *task])
