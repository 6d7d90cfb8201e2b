"""Run or sweep: `python launch.py [-m] GROUP=CHOICE ...`; `python launch.py --help` lists the choices.

Exit code 0: every run finished; 2: a mistake in the command line or the configuration, told in plain words before
any weight was read; 1: a run failed on the way.
"""

import os
import sys
import traceback

import hydra
from omegaconf import DictConfig

from dqx.command_line import explain, normalize
from dqx.config import ConfigProblems, resolve, validate

started = False  # a run's own code has been entered, so an error is no longer one of the command line
failed: list[BaseException] = []


@hydra.main(version_base="1.3", config_path="conf", config_name="config")
def main(cfg: DictConfig) -> None:
    """One run of what may be a sweep. In a sweep a run that fails says so at once and the others go on."""
    global started
    started = True
    try:
        config = resolve(cfg)
        problems = validate(config)
        if problems:
            raise ConfigProblems(problems)
        from dqx.run import run

        run(config)
    except ConfigProblems as error:
        failed.append(error)
        say(error)
        raise
    except Exception as error:
        failed.append(error)
        traceback.print_exc()
        raise


def say(error: BaseException) -> None:
    """Problems in plain words, numbered where there are several."""
    problems = explain(error)
    if len(problems) == 1:
        print(f"cannot run: {problems[0]}", file=sys.stderr)
    else:
        print(f"cannot run, {len(problems)} problems:", file=sys.stderr)
        for i, problem in enumerate(problems, 1):
            print(f"  {i}. {problem}", file=sys.stderr)


if __name__ == "__main__":
    sys.argv[1:] = normalize(sys.argv[1:])
    hydra_full_error = os.environ.get("HYDRA_FULL_ERROR") == "1"
    os.environ["HYDRA_FULL_ERROR"] = "1"  # have Hydra raise instead of print, so that messages are ours
    try:
        main()
    except Exception as error:
        if hydra_full_error:
            raise
        if not failed:
            if started:
                traceback.print_exc()
            else:
                say(error)
        plain = all(isinstance(e, ConfigProblems) for e in failed or [error])
        sys.exit(2 if plain or not started else 1)
