"""To run, and what to do with runs that are finished: `dqx COMMAND ...`, also as `python -m dqx COMMAND ...`.

Each command is a module with a `main` of its own, imported when it is chosen.
"""

from __future__ import annotations

import sys
from importlib import import_module

#: Command -> the module that does it, what it does, an example.
COMMANDS = {
    "run": ("dqx.launch.main", "a run, or a sweep: dqx run ARGUMENTS", "dqx run method=gptq bits=4"),
    "generate": ("dqx.show.command", "an answer as it is written, live in the terminal", "dqx generate nano_llada"),
    "report": ("dqx.report.command", "many runs as HTML, Markdown and LaTeX", "dqx report runs"),
    "compare": ("dqx.report.compare", "two runs, document by document", "dqx compare RUN OTHER"),
    "cache": ("dqx.study.cache.command", "what runs share: list, verify, prune", "dqx cache verify"),
    "mirror": ("dqx.report.wandb.command", "copies in Weights & Biases, made again", "dqx mirror runs"),
    "doctor": ("dqx.study.doctor", "this machine: what there is, what is missing", "dqx doctor"),
    "export": ("dqx.study.export", "a model as files that other programs read", "dqx export gguf RUN --out FILE"),
    "verify": ("dqx.study.verify", "an exported file against its model", "dqx verify FILE --against RUN"),
    "share": ("dqx.sharing.share", "one file of a run, from which others run it again", "dqx share RUN"),
}


def usage() -> str:
    """What `dqx --help` prints."""
    lines = [f"  {name:<9} {what:<51} {example}" for name, (_, what, example) in COMMANDS.items()]
    return "\n".join(["usage: dqx COMMAND ...", "", *lines, "", "dqx COMMAND --help says more."])


def main() -> int:
    """The command line. Returns the exit code: 2 for a command that does not exist, 130 where Ctrl-C ended it."""
    command, *rest = sys.argv[1:] or ["--help"]
    if command in ("-h", "--help"):
        print(usage())
        return 0
    if command not in COMMANDS:
        from dqx.common.names import did_you_mean

        print(f"dqx {command}: no such command; {did_you_mean(command, COMMANDS)}", file=sys.stderr)
        return 2
    sys.argv = [f"dqx {command}", *rest]
    try:
        return import_module(COMMANDS[command][0]).main() or 0
    except KeyboardInterrupt:  # before the command could say more
        print("interrupted", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
