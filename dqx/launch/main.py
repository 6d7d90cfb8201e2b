"""Run or sweep: `dqx run [-m] GROUP=CHOICE ...`, the same as `python launch.py`; `--help` lists the choices.

`--from BUNDLE` runs a shared run again (`dqx/sharing/replay.py`).

Exit code 0: every run finished. 2: mistakes in the command line, the configuration or the files it names, told in
plain words before anything heavy started (runs of the same sweep without mistakes were done). 1: a run failed on
the way. 130: interrupted. Inside a W&B sweep a combination of settings that cannot run is skipped with exit code 0,
because an agent gives up after three failures.
"""

from __future__ import annotations

import gc
import logging
import os
import re
import signal
import sys
import textwrap
import traceback
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from dqx.common.devices import ALONE, process_count
from dqx.common.files import disk_is_full
from dqx.config.arguments import arranged
from dqx.config.command_line import normalize
from dqx.config.compose import compose, resolve
from dqx.config.mistakes import explain
from dqx.config.origin import Origin
from dqx.config.schema import CONF_DIR, Config, ConfigProblems
from dqx.launch import register
from dqx.launch.foreign import is_foreign, refusal, speaks
from dqx.record.outcomes import (
    FILE,
    KILLED,
    LOG,
    Failure,
    RunEnded,
    RunFailed,
    expect,
    failures,
    launched,
    outcomes,
    why,
)
from dqx.sharing.replay import FLAG, replayed

RUN = "dqx run"
HELP = ("-h", "--help")
DEVELOPER = os.environ.get("HYDRA_FULL_ERROR") == "1"  # as it was set before `main` sets it

log = logging.getLogger("dqx.launch")  # also into the run's run.log
to_plan: list[DictConfig] = []  # with plan=true


def do(cfg: DictConfig) -> None:
    """One run, of a sweep perhaps. A run that fails says so at once, and why in its folder; in a sweep others go on."""
    if cfg.plan:
        to_plan.append(cfg)
        return
    from dqx.models.checkpoint import CheckpointError

    folder = Path(HydraConfig.get().runtime.output_dir)
    if HydraConfig.get().mode == RunMode.RUN:  # a sweep's are known to the process that launched it
        expect([folder])
    (folder / FILE).unlink(missing_ok=True)
    cause: Exception
    try:
        dispatch(resolve(cfg), folder)
    except (ConfigProblems, CheckpointError) as error:
        problems = explain(error)
        log.error(plain(problems))
        failure, cause = Failure.of(problems, refused=True), error
    except RunEnded as error:
        log.error(f"the run failed: {error}\n{error.traceback}".rstrip())
        failure, cause = Failure(str(error)), error
    except Exception as error:
        log.error(f"the run failed: {why(error)}", exc_info=DEVELOPER or not disk_is_full(error))
        release(error)
        failure, cause = Failure(why(error)), error
    except KeyboardInterrupt:
        Failure(Failure.INTERRUPTED).write(folder)
        raise
    else:
        return
    failure.write(folder)
    if failure.refused and in_wandb_sweep():
        from dqx.report.wandb import note_skipped

        settings: Any = OmegaConf.to_container(cfg)
        note_skipped(settings, folder, settings["wandb"], failure.reason)
    if HydraConfig.get().mode == RunMode.RUN and not DEVELOPER:
        return  # told, and in the folder; Hydra would print the command behind it
    raise RunFailed(failure.reason) from cause


def release(error: BaseException | None) -> None:
    """Forget where an error that has been told came from: Hydra keeps it, and with its functions a model in memory."""
    while error is not None:
        error.__traceback__ = None
        error = error.__cause__ or error.__context__


def dispatch(config: Config, folder: Path) -> None:
    """Do a run in this process, or in several that share it. Raises what the run raises, or RunEnded."""
    settings = HydraConfig.get()
    origin = Origin.of(settings, config.bundle)
    from dqx.study.experiment import Experiment, problems  # not for --help: it imports torch

    if config.dispatch == "separate" and settings.mode == RunMode.RUN:
        raise ConfigProblems([ALONE, *problems(config)])
    experiment = Experiment.of(config)
    gc.enable()
    count = process_count(config.dispatch, config.model.device)
    if count == 1:
        from dqx.launch.workers.alone import watched
        from dqx.study.run import run  # only now: with what computes, two seconds more

        with watched(config.hang_minutes, folder / LOG):
            run(experiment, folder, origin)
        return
    from dqx.launch.workers.messages import SharedRun
    from dqx.launch.workers.team import share

    logging_settings: Any = OmegaConf.to_container(settings.job_logging, resolve=True)
    share(SharedRun(config, folder.absolute(), origin, count, logging_settings))


def in_wandb_sweep() -> bool:
    """Whether an agent of W&B has started this process."""
    return bool(os.environ.get("WANDB_SWEEP_ID"))


@contextmanager
def without_output_folders(argv: list[str]) -> Iterator[None]:
    """For `plan=true`: Hydra's output folders and messages, which it makes for every job, go to a temporary place."""
    at = next((i for i, argument in enumerate(argv) if argument.lower() == "plan=true"), None)
    if at is None:
        yield
        return
    with TemporaryDirectory() as folder:
        places = [f"hydra.run.dir={folder}", f"hydra.sweep.dir={folder}", "hydra.output_subdir=null"]
        places += ["hydra/job_logging=none", "hydra/hydra_logging=none"]
        theirs = ("hydra/launcher=", "hydra.launcher.", "hydra.run.dir=", "hydra.sweep.dir=")  # planned right here
        ahead, behind = ([a for a in part if not a.startswith(theirs)] for part in (argv[:at], argv[at:]))
        argv[:] = [*ahead, *places, *behind]
        yield


def plain(problems: list[str]) -> str:
    """Problems in plain words, numbered where there are several."""
    if len(problems) == 1:
        return f"cannot run: {problems[0]}"
    return f"cannot run, {len(problems)} problems:\n" + textwrap.indent(str(ConfigProblems(problems)), "  ")


def main() -> int:
    """Do what the command line says and tell how it ended, to developers with tracebacks. Returns the exit code."""
    if is_foreign(os.environ):
        if not speaks(os.environ):
            return 0
        print(plain([refusal(sys.argv, os.environ)]), file=sys.stderr)
        return 2
    gc.disable()  # imports make much and leave no garbage: a sixth of their time; a run enables it again
    register()
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra then raises where it would print, and the messages can be ours
    warnings.filterwarnings("error", message="provider=.* is not available")  # a folder on the search path is missing
    logging.raiseExceptions = DEVELOPER  # a run.log that cannot be written, as on a full disk, is told once, by the run
    signal.signal(signal.SIGTERM, interrupt)
    try:
        sys.argv[1:] = named(sys.argv[0], replayed(normalize(arranged(sys.argv[1:], FLAG))))
        if asks_for_help(sys.argv[1:]):
            print(help_text([argument for argument in sys.argv[1:] if argument not in HELP]))
            return 0
        with without_output_folders(sys.argv):
            hydra.main(version_base="1.3", config_path=str(CONF_DIR), config_name="config")(do)()
        if to_plan:
            from dqx.study.plan.progress import plan_runs

            planned = plan_runs(to_plan)
            from dqx.study.plan.table import print_plan  # torch, which the line on the terminal comes before

            print_plan(planned)
            return 0
    except RunFailed as error:  # told by the run
        if DEVELOPER:
            traceback.print_exception(error)
    except KeyboardInterrupt:
        print_summary(interrupted=True)
        print(Failure.INTERRUPTED if launched else "interrupted", file=sys.stderr)
        return 130
    except Exception as error:
        full = disk_is_full(error)
        mistake = (not launched or isinstance(error, ConfigProblems)) and not full
        if DEVELOPER or not (mistake or full):  # a launcher's, say
            traceback.print_exception(error)
        if full:
            print(why(error), file=sys.stderr)
            for folder, failure in failures(launched).items():
                if failure.reason == KILLED:
                    Failure(why(error)).write(folder)
        if mistake:
            print(plain(explain(error)), file=sys.stderr)
            return 2
        return print_summary() or 1
    return print_summary()


def named(program: str, argv: Sequence[str]) -> list[str]:
    """The command line with the program's name, for the help and for the commands that runs record."""
    if program != RUN:
        return list(argv)
    at = next((i for i, argument in enumerate(argv) if re.match(r"[+~\w][^=]*=", argument)), len(argv))
    return [*argv[:at], f"hydra.help.app_name='{RUN}'", *argv[at:]]


def asks_for_help(argv: Sequence[str]) -> bool:
    """Whether `--help` stands there without other options of Hydra's; with them Hydra answers, in seconds."""
    return {a for a in argv if a.startswith("-")} in ({option} for option in HELP)


def help_text(overrides: Sequence[str]) -> str:
    """What `--help` prints. Hydra would list all groups first, for which it copies the configuration 128 times."""
    return compose(overrides, with_hydra=True).hydra.help.template


def interrupt(*_: object) -> None:
    """A request to end is obeyed as Ctrl-C is."""
    raise KeyboardInterrupt


def print_summary(interrupted: bool = False) -> int:
    """What became of the runs of a sweep: results of those that have some, the state of all. Returns the exit code."""
    failed = failures(launched)
    if len(launched) > 1:
        from dqx.record.folder import RunFolder
        from dqx.report.terminal import print_outcomes, print_sweep

        finished = [folder for folder in launched if folder not in failed]
        if len(finished) > 1:
            print_sweep([(folder.name, RunFolder(folder).read(documents=False)) for folder in finished])
        print_outcomes(outcomes(launched, interrupted))
        if failed and not interrupted:
            print(f"{len(failed)} of {len(launched)} runs failed:", file=sys.stderr)
            for folder, failure in failed.items():
                print(f"  {folder.name}: {failure.reason}", file=sys.stderr)
    if any(not failure.refused for failure in failed.values()):
        return 1
    return 2 if failed and not in_wandb_sweep() else 0
