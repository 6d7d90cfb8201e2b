"""How soon a command answers: CPU seconds of whole processes, beside those of `import torch`.

    python -m dqx.benchmarks.startup                     commands that compute nothing, three times each
    python -m dqx.benchmarks.startup --before FOLDER     the same in another checkout as well, in turns
    python -m dqx.benchmarks.startup --cached            besides: runs of which everything is in the cache, a report

Figures are medians over the repetitions: user and system time of the command and of all processes that it waits for.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory

from dqx.benchmarks.common import check, options, progress, table, tell, write_figures
from dqx.common.files import PACKAGE

CHECKOUT = PACKAGE.parent
LAUNCH, DQX = "launch.py", ("-m", "dqx")
REFUSED = 2  # the exit code of a command line that cannot work
#: What is typed -> Python's arguments.
COMMANDS: dict[str, tuple[str, ...]] = {
    "python -c 'import torch'": ("-c", "import torch"),
    "launch.py --help": (LAUNCH, "--help"),
    "launch.py --cfg job": (LAUNCH, "--cfg", "job"),
    "launch.py with a mistake in a setting": (LAUNCH, "bits.weight.group_size=100"),
    "launch.py with a mistake in a name": (LAUNCH, "method=gptqq"),
    "dqx --help": (*DQX, "--help"),
    "dqx report --help": (*DQX, "report", "--help"),
    "dqx cache": (*DQX, "cache"),
}


def seconds(checkout: Path, arguments: tuple[str, ...], folder: Path, *, code: int = 0) -> float:
    """CPU seconds of `python ARGUMENTS` with the sources of a checkout, started in `folder`.

    Raises RuntimeError with the command's last words where it ends with another exit code than `code`.
    """
    first = [str(checkout / LAUNCH)] if arguments[0] == LAUNCH else [arguments[0]]
    environment = {"OMP_NUM_THREADS": "1", **os.environ, "PYTHONPATH": str(checkout)}
    with (folder / "told").open("w+") as told:
        command = [sys.executable, *first, *arguments[1:]]
        child = subprocess.Popen(command, cwd=folder, env=environment, stdout=told, stderr=told)
        _, status, usage = os.wait4(child.pid, 0)
        child.returncode = os.waitstatus_to_exitcode(status)
        if child.returncode != code:
            told.seek(0)
            raise RuntimeError(f"python {' '.join(arguments)} failed in {checkout}: {told.read()[-2000:]}")
    return usage.ru_utime + usage.ru_stime


def cached(checkout: Path, folder: Path, runs: int = 4) -> dict[str, float]:
    """CPU seconds of runs of which everything is in the cache, and of a report of them; figures are not drawn twice."""
    quick = (LAUNCH, "experiment=quick", "cache_dir=cache")
    sweep = (LAUNCH, "-m", *quick[1:], "seed=" + ",".join(map(str, range(runs))), "hydra.sweep.dir=swept")
    for command in (quick, sweep):  # fill the cache
        seconds(checkout, command, folder)
    once = seconds(checkout, quick, folder)
    many = seconds(checkout, sweep, folder)
    report = seconds(checkout, (*DQX, "report", "swept", "--out", "report"), folder)
    return {
        "a run, everything cached": once,
        "each further one of a sweep": (many - once) / (runs - 1),
        f"dqx report of {runs} runs": report,
    }


def main(argv: list[str] | None = None) -> None:
    parser = options("startup", __doc__)
    parser.add_argument("--before", type=Path, metavar="FOLDER", help="another checkout, measured beside this one")
    parser.add_argument("--repeat", type=int, default=3, help="how often each command is measured (3)")
    parser.add_argument("--cached", action="store_true", help="also runs that compute nothing, and a report: minutes")
    args = parser.parse_args(argv)
    check(parser, args, "repeat")
    checkouts = {"before": args.before.resolve(), "now": CHECKOUT} if args.before else {"now": CHECKOUT}
    for name, checkout in checkouts.items():
        if not (checkout / LAUNCH).is_file():
            parser.error(f"{name}: {checkout} has no {LAUNCH}; this benchmark compares checkouts of the repository")
    figures: dict[str, dict[str, float]] = {}
    with progress() as line:
        for command, arguments in COMMANDS.items():
            line(command)
            measured: dict[str, list[float]] = {name: [] for name in checkouts}
            for _ in range(args.repeat):
                for name, checkout in checkouts.items():
                    with TemporaryDirectory() as folder:
                        Path(folder, "runs", "cache").mkdir(parents=True)  # for `dqx cache`
                        code = REFUSED if "mistake" in command else 0
                        measured[name].append(seconds(checkout, arguments, Path(folder), code=code))
            figures[command] = {name: median(values) for name, values in measured.items()}
        for name, checkout in checkouts.items() if args.cached else ():
            line(f"cached runs, {name}")
            with TemporaryDirectory() as folder:
                for what, value in cached(checkout, Path(folder)).items():
                    figures.setdefault(what, {})[name] = value
    rows = [(what, *(f"{values[name]:.2f}" for name in checkouts)) for what, values in figures.items()]
    tell(table(("CPU seconds", *checkouts), rows))
    write_figures(args.json, figures)


if __name__ == "__main__":
    main()
