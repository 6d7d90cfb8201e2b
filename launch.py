"""Run or sweep: `python launch.py [-m] GROUP=CHOICE ...`; `python launch.py --help` lists the choices.

Exit code 0: every run finished. 2: mistakes in the command line, the configuration or the files it names, told in
plain words before anything heavy started (runs of the same sweep without mistakes were done). 1: a run failed on
the way. 130: interrupted.
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
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

import hydra
from omegaconf import DictConfig

from dqx.command_line import explain, normalize
from dqx.config import ConfigProblems, resolve

if TYPE_CHECKING:
    from dqx.planning import PlannedRun
    from dqx.store import Record

log = logging.getLogger("dqx.launch")  # also into the run's run.log
failures: list[BaseException] = []  # of the runs that were started here
finished: list[Record] = []
planned: list[PlannedRun] = []  # with plan=true
started = 0


@hydra.main(version_base="1.3", config_path="conf", config_name="config")
def main(cfg: DictConfig) -> None:
    """One run, of a sweep perhaps. A run that fails says so at once; in a sweep the others go on."""
    global started
    started += 1
    if cfg.plan:
        from dqx.planning import plan_run

        planned.append(plan_run(cfg))
        return
    from dqx.models.checkpoint import CheckpointError
    from dqx.run import run

    try:
        finished.append(run(resolve(cfg)))
    except (ConfigProblems, CheckpointError) as error:
        failures.append(ConfigProblems(explain(error)))
        log.error(plain(explain(error)))
        raise
    except Exception as error:
        failures.append(error)
        log.exception("the run failed")
        raise


@contextmanager
def without_output_folders(argv: list[str]) -> Iterator[None]:
    """For `plan=true`: Hydra's output folders and messages, which it makes for every job, go to a temporary place."""
    at = next((i for i, argument in enumerate(argv) if argument.lower() == "plan=true"), None)
    if at is None:
        yield
        return
    with TemporaryDirectory() as folder:
        places = [f"hydra.run.dir={folder}", f"hydra.sweep.dir={folder}", "hydra.output_subdir=null"]
        argv[at:at] = [*places, "hydra/job_logging=none", "hydra/hydra_logging=none"]
        yield


def plain(problems: list[str]) -> str:
    """Problems in plain words, numbered where there are several."""
    if len(problems) == 1:
        return f"cannot run: {problems[0]}"
    return f"cannot run, {len(problems)} problems:\n" + textwrap.indent(str(ConfigProblems(problems)), "  ")


def exit_code(error: BaseException) -> int:
    """Tell what ended the program, unless its run has told already, and how."""
    if not started:
        print(plain(explain(error)), file=sys.stderr)
        return 2
    if not failures:  # after the runs, or in another process
        traceback.print_exception(error)
        return 1
    if started > 1:
        print(f"{len(failures)} of {started} runs failed", file=sys.stderr)
    return 2 if all(isinstance(f, ConfigProblems) for f in failures) else 1


if __name__ == "__main__":
    developer = os.environ.get("HYDRA_FULL_ERROR") == "1"
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra then raises where it would print, and the messages can be ours
    warnings.filterwarnings("error", message="provider=.* is not available")  # a folder on the search path is missing
    try:
        sys.argv[1:] = normalize(sys.argv[1:])
        with without_output_folders(sys.argv):
            try:
                main()
            finally:
                if len(finished) > 1:
                    from dqx.report import print_sweep

                    print_sweep(finished)
        if planned:
            from dqx.planning import print_plan

            print_plan(planned)
    except Exception as error:
        if developer:
            raise
        sys.exit(exit_code(error))
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
