"""The table of odd commands, dqx/config/COMMANDS.md: `python tests/commands.py` runs them and writes it anew.

All of them in this one process, in an empty folder. A run that could start does not: its name is the answer.
`--show` prints the page instead (`tests/launch/test_commands.py` compares it with the file).
"""

from __future__ import annotations

import contextlib
import io
import logging
import os
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import dqx
from dqx import __main__ as program
from dqx.config.schema import CONF_DIR, Config, ConfigProblems
from dqx.launch import main as launch
from dqx.models.checkpoint import CheckpointError
from dqx.record.outcomes import launched
from dqx.study.experiment import Experiment

PAGE = CONF_DIR.parent / "dqx" / "config" / "COMMANDS.md"
INTRODUCTION = """# Odd commands, and what dqx answers

Written by `python tests/commands.py`, which runs every line; a test runs them again and compares. What is refused ends
with the exit code in the last column, before any weights are loaded. What starts is not carried out here: the answer
is the names of the runs.
"""
COMMANDS = {
    "Settings written otherwise": """
dqx run bits=3 steps=64
dqx run --method gptq
dqx run --limit=4
dqx run method gptq
dqx run method= gptq
dqx run method:gptq
dqx run gptq bits=4
dqx run plan
dqx run method=rtn -m bits=3,4
dqx run method=rtn,gptq
dqx run method=[rtn,gptq]
dqx run bits=4 bits=3
dqx run task=nano_facts task=nano_sums
dqx run task=nano_facts,nano_sums
dqx run +experiment=quick
dqx run +wandb=false
""",
    "Names": """
dqx run model=llada
dqx run model=LLaDA-8B-Base
dqx run model=GSAI-ML/LLaDA-8B-Base
dqx run method=GPTQ
dqx run method=gptx
dqx run -m method=rtn,gptx
dqx run calib=mcx
dqx run steps=many
dqx run limit=4
dqx run task.limt=4
dqx run -m task.limt=4 seed=1,2
dqx run experimnt=quick
dqx run device=cpu
dqx run method.rounding.dampin=0.1
dqx run --hepl
dqx reprot runs
dqx generate nano_lada
""",
    "Values": """
dqx run wandb=false
dqx run outliers=off
dqx run wandb.project=team/proj
dqx run 'wandb.project=a#b'
dqx run wandb.tags=paper
dqx run steps=0
dqx run task.limit=all
dqx run task.limit=0
dqx run seed=
dqx run plan=maybe
dqx run task.suite.nano_sums.gen_length=4096 task.suite.nano_sums.block_length=4096 steps=4096
dqx run bits.weight.group_size=100 task.limit=0
dqx generate nano_llada --gen-length 0 --at 3
""",
    "Paths": """
dqx run 'model.path=/no/my(model)=x'
dqx run 'model.path=/no/{a} [b] #c'
dqx run "model.path=/no/it's"
dqx run data_root=/no/größe/模型
dqx run model.path=/no/a,b
dqx run 'wandb.tags=[a(b)]'
dqx run --from nothing.dqx.zip
dqx report nothing
dqx compare nothing other
""",
}
PYTHON = """
dqx.load("nano_lada")
dqx.load("nano_llada", dtyp="float32")
lm.generate("1+1=", steps=0)
lm.generate("1+1=", gen_length=8, block_length=3)
lm.generate("1+1=", gen_length=5000)
lm.logits("1+1=" * 2000)
lm.log_likelihood("1+1=", " 2", samples=0)
lm.quantize("gptqq")
lm.evaluate("nano_sums", steps=0)
"""


def page() -> str:
    """The whole file."""
    parts = [INTRODUCTION]
    for title, commands in COMMANDS.items():
        rows = [row(line, *answer(line)) for line in commands.strip().splitlines()]
        parts.append("\n".join([f"## {title}", "", "| typed | answer | exit code |", "|---|---|--:|", *rows, ""]))
    names = {"dqx": dqx, "lm": dqx.load("nano_llada", device="cpu")}
    rows = [row(line, raised(line, names)) for line in PYTHON.strip().splitlines()]
    parts.append("\n".join(["## From Python", "", "| typed | exception |", "|---|---|", *rows, ""]))
    return "\n".join(parts)


def row(typed: str, *cells: str) -> str:
    return "| " + " | ".join([f"`{escaped(typed)}`", *map(escaped, cells)]) + " |"


def escaped(text: str) -> str:
    return text.replace("|", r"\|").replace("\n", "<br>")


def answer(line: str) -> tuple[str, str]:
    """What a command says, and its exit code; the names of the runs that it would have started."""
    started: list[str] = []

    def dispatch(config: Config, folder: Path) -> None:
        Experiment.of(config)
        started.append(f"`{folder.name[folder.name.index(config.model.name) :]}`")

    launch.dispatch = dispatch
    launched.clear()
    sys.argv = shlex.split(line)
    told, printed = io.StringIO(), io.StringIO()
    with contextlib.redirect_stderr(told), contextlib.redirect_stdout(printed):
        try:
            code: object = program.main()
        except SystemExit as ended:
            code = ended.code
    if started:
        return f"starts {' and '.join(started)}", ""
    return (told.getvalue() or printed.getvalue()).rstrip(), str(code or 0)


def raised(line: str, names: dict[str, object]) -> str:
    """What a line of Python raises."""
    try:
        exec(line, names)
    except (ConfigProblems, CheckpointError) as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


@contextlib.contextmanager
def somewhere() -> Iterator[None]:
    """In an empty folder, without what this machine's user has set."""
    for name in [name for name in os.environ if name.startswith(("DQX_", "WANDB_", "HYDRA_", "CUDA_"))]:
        del os.environ[name]
    before = Path.cwd()
    with TemporaryDirectory() as folder:
        os.chdir(folder)
        yield
        logging.shutdown()
        os.chdir(before)


if __name__ == "__main__":
    show = "--show" in sys.argv
    with somewhere():
        text = page()
    if show:
        sys.stdout.write(text)
    else:
        PAGE.write_text(text, encoding="utf-8")
