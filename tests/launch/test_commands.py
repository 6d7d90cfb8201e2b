"""Odd commands as people type them, and what dqx answers: the table dqx/config/COMMANDS.md, and what is not in it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from commands import COMMANDS, PAGE, PYTHON

from dqx.config.arguments import arranged
from dqx.config.schema import ConfigProblems

SCRIPT = Path(__file__).parents[1] / "commands.py"


def test_the_table_is_what_dqx_answers() -> None:
    """In a process of its own: a launch sets logging, signals and warnings for good."""
    environment = {
        **os.environ,
        "PYTHONPATH": str(PAGE.parents[2]),
        "OMP_NUM_THREADS": "1",
        "PYTHONIOENCODING": "utf-8",
    }
    done = subprocess.run(
        [sys.executable, str(SCRIPT), "--show"], capture_output=True, text=True, encoding="utf-8", env=environment
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == PAGE.read_text(encoding="utf-8"), "python tests/commands.py writes it anew"


def test_every_line_of_the_table_is_an_answer_of_ours() -> None:
    page = PAGE.read_text(encoding="utf-8")
    rows = [line for line in page.splitlines() if line.startswith("| `")]
    assert len(rows) == len("".join([*COMMANDS.values(), PYTHON]).split("\n")) - len(COMMANDS) - 1 - 1
    for foreign in ("Traceback", "usage:", "Error executing", "hydra.cc", "mismatched input", "no viable"):
        assert foreign not in page
    for line in rows:
        *_, answer, code = (cell.strip() for cell in line.split(" | "))
        assert code.rstrip(" |") == "2" or answer.startswith("starts `") or "ConfigProblems: " in line, line


@pytest.mark.parametrize(
    ("typed", "arranged_as"),
    [
        (["method=rtn", "-m", "seed=1,2"], ["-m", "method=rtn", "seed=1,2"]),
        (["method=rtn", "--cfg", "job", "seed=1"], ["--cfg", "job", "method=rtn", "seed=1"]),
        (["seed=1", "--from", "a.zip", "-m"], ["--from", "a.zip", "-m", "seed=1"]),
        (["--from=a.zip", "seed=1"], ["--from=a.zip", "seed=1"]),
        (["-c", "job", "--resolve", "bits=3"], ["-c", "job", "--resolve", "bits=3"]),
        (["--config-dir", "conf=1", "seed=1"], ["--config-dir", "conf=1", "seed=1"]),
        (["~method.clip", "bits=4", "bits=4"], ["~method.clip", "bits=4", "bits=4"]),
        (["+method.transforms.a=smooth", "+method.transforms.b=fold"],) * 2,
        ([], []),
    ],
)
def test_options_go_in_front(typed: list[str], arranged_as: list[str]) -> None:
    assert arranged(typed, "--from") == arranged_as


@pytest.mark.parametrize(
    ("typed", "told"),
    [
        (["-method", "gptq"], "-method gptq: settings are written without dashes, method=gptq"),
        (["--model-path=/a", "-m"], "--model-path=/a: settings are written without dashes, model.path=/a"),
        (["--bits", "--resolve"], "--bits: settings are written without dashes, bits=VALUE"),
        (["--cfg", "jobs"], "argument --cfg/-c: invalid choice"),
        (["-x"], "-x is no option; there are --help, "),
        (["+seed=1", "seed=2"], "seed=1 seed=2 gives seed 2 values; write one, or -m seed=1,2 for a run with each"),
        (
            ["hydra.run.dir=a", "hydra.run.dir=b"],
            "hydra.run.dir=a hydra.run.dir=b gives hydra.run.dir 2 values; write one",
        ),
        (["bits=w4", "a16"], "a16 sets nothing; write NAME=VALUE (--help lists the choices)"),
        (["w4a16", "method"], "w4a16 sets nothing; write bits=w4a16\n2. method sets nothing; write method=VALUE"),
    ],
)
def test_what_is_neither_option_nor_setting(typed: list[str], told: str) -> None:
    with pytest.raises(ConfigProblems) as raised:
        arranged(typed)
    assert told in str(raised.value)
