"""What to do with runs that are finished: `dqx COMMAND ...`, also as `python -m dqx COMMAND ...`.

Each command is a module with a `main` of its own, imported when it is chosen. Runs are started by `launch.py`.
"""

from __future__ import annotations

import sys
from importlib import import_module

#: Command -> the module that does it, what it does, an example.
COMMANDS = {
    "report": ("dqx.report.command", "many runs as HTML, Markdown and LaTeX", "dqx report runs"),
    "compare": ("dqx.report.compare", "two runs, document by document", "dqx compare RUN OTHER"),
    "cache": ("dqx.study.cache.command", "what runs share: list, verify, prune", "dqx cache verify"),
    "mirror": ("dqx.report.wandb.command", "copies in Weights & Biases, made again", "dqx mirror runs"),
    "share": ("dqx.sharing.share", "one file of a run, from which others run it again", "dqx share RUN"),
}


def usage() -> str:
    """What `dqx --help` prints."""
    lines = [f"  {name:<9} {what:<51} {example}" for name, (_, what, example) in COMMANDS.items()]
    return "\n".join(["usage: dqx COMMAND ...", "", *lines, "", "dqx COMMAND --help says more."])


def main() -> None:
    """The command line. Exit code 2 for a command that does not exist."""
    command, *rest = sys.argv[1:] or ["--help"]
    if command in ("-h", "--help"):
        print(usage())
        return
    if command not in COMMANDS:
        from dqx.common.names import did_you_mean

        print(f"dqx {command}: no such command; {did_you_mean(command, COMMANDS)}", file=sys.stderr)
        sys.exit(2)
    sys.argv = [f"dqx {command}", *rest]
    import_module(COMMANDS[command][0]).main()


if __name__ == "__main__":
    main()
