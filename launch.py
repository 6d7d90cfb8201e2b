"""Run or sweep: `python launch.py [-m] GROUP=CHOICE ...`; `python launch.py --help` lists the choices.

`--from BUNDLE` runs a shared run again (`dqx/sharing/replay.py`).

Exit code 0: every run finished. 2: mistakes in the command line, the configuration or the files it names, told in
plain words before anything heavy started (runs of the same sweep without mistakes were done). 1: a run failed on
the way. 130: interrupted. Inside a W&B sweep a combination of settings that cannot run is skipped with exit code 0,
because an agent gives up after three failures.
"""

from __future__ import annotations

import logging
import os
import sys
import textwrap
import traceback
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from dqx.command_line import explain, normalize
from dqx.config import ConfigProblems, resolve
from dqx.launching import register
from dqx.outcomes import FILE, Failure, RunFailed, failures, launched
from dqx.sharing.replay import replayed

if TYPE_CHECKING:
    from dqx.planning import PlannedRun

log = logging.getLogger("dqx.launch")  # also into the run's run.log
planned: list[PlannedRun] = []  # with plan=true


@hydra.main(version_base="1.3", config_path="conf", config_name="config")
def main(cfg: DictConfig) -> None:
    """One run, of a sweep perhaps. A run that fails says so at once, and why in its folder; in a sweep others go on."""
    if cfg.plan:
        from dqx.planning import plan_run

        planned.append(plan_run(cfg))
        return
    from dqx.models.checkpoint import CheckpointError

    folder = Path(HydraConfig.get().runtime.output_dir)
    if HydraConfig.get().mode == RunMode.RUN:  # a sweep's are known to the process that launched it
        launched.append(folder)
    (folder / FILE).unlink(missing_ok=True)
    try:
        from dqx.run import run

        run(resolve(cfg))
    except (ConfigProblems, CheckpointError) as error:
        problems = explain(error)
        log.error(plain(problems))
        more = f" (and {len(problems) - 1} more)" if problems[1:] else ""
        failure, cause = Failure(problems[0] + more, refused=True), error
    except Exception as error:
        log.exception("the run failed")
        failure, cause = Failure("".join(traceback.format_exception_only(error)).strip()), error
    else:
        return
    failure.write(folder)
    if failure.refused and in_wandb_sweep():
        from dqx import mirror

        mirror.skip(OmegaConf.to_container(cfg), folder, OmegaConf.to_container(cfg.wandb), failure.reason)
    raise RunFailed(failure.reason) from cause


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


def launch(developer: bool = False) -> int:
    """Do what the command line says and tell how it ended, to developers with tracebacks. Returns the exit code."""
    try:
        sys.argv[1:] = replayed(normalize(sys.argv[1:]))
        with without_output_folders(sys.argv):
            main()
    except RunFailed as error:  # told by the run
        if developer:
            traceback.print_exception(error)
    except KeyboardInterrupt:
        print_finished()
        print("interrupted", file=sys.stderr)
        return 130
    except Exception as error:
        mistake = not launched or isinstance(error, ConfigProblems)
        if developer or not mistake:  # a launcher's, say
            traceback.print_exception(error)
        if mistake:
            print(plain(explain(error)), file=sys.stderr)
            return 2
        print_finished()
        return exit_code() or 1
    if planned:
        from dqx.planning import print_plan

        print_plan(planned)
        return 0
    print_finished()
    return exit_code()


def print_finished() -> None:
    """The table of a sweep: the runs that have results."""
    failed = failures(launched)
    finished = [folder for folder in launched if folder not in failed]
    if len(finished) > 1:
        from dqx.report import print_sweep
        from dqx.store import RunFolder

        print_sweep([RunFolder(folder).read(documents=False) for folder in finished])


def exit_code() -> int:
    """List the runs of a sweep that failed, and say what all of them together mean."""
    failed = failures(launched)
    if failed and len(launched) > 1:
        print(f"{len(failed)} of {len(launched)} runs failed:", file=sys.stderr)
        for folder, failure in failed.items():
            print(f"  {folder.name}: {failure.reason}", file=sys.stderr)
    if any(not failure.refused for failure in failed.values()):
        return 1
    return 2 if failed and not in_wandb_sweep() else 0


if __name__ == "__main__":
    register()
    developer = os.environ.get("HYDRA_FULL_ERROR") == "1"
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra then raises where it would print, and the messages can be ours
    warnings.filterwarnings("error", message="provider=.* is not available")  # a folder on the search path is missing
    sys.exit(launch(developer))
