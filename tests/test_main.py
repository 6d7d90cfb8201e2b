"""The commands `dqx NAME`: what each is called, its help, and what it costs to ask for it."""

from __future__ import annotations

import subprocess
import sys
import tomllib
from importlib import import_module
from pathlib import Path

import pytest

from dqx.__main__ import COMMANDS, main

ROOT = Path(__file__).parents[1]
HEAVY = ("torch", "transformers", "datasets", "lm_eval", "scipy", "matplotlib", "wandb")
START = f"""
import sys
from dqx.__main__ import main
try:
    code = main()
except SystemExit as ended:
    code = ended.code
print("imported:", *(name for name in {HEAVY} if name in sys.modules))
sys.exit(code)
"""


def dqx(*arguments: str, folder: Path = ROOT) -> subprocess.CompletedProcess[str]:
    """A command as a user starts it; its last line says what it has imported of HEAVY."""
    environment = {"PYTHONPATH": str(ROOT), "PATH": ""}
    command = [sys.executable, "-c", START, *arguments]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)


def test_the_program_and_its_commands() -> None:
    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
    assert scripts == {"dqx": "dqx.__main__:main"}
    for name, (module, _, example) in COMMANDS.items():
        assert callable(import_module(module).main)
        assert f"{example} ".startswith(f"dqx {name} ")
    shown = dqx()
    assert shown.returncode == 0
    assert all(example in shown.stdout for _, _, example in COMMANDS.values())
    assert shown.stdout.endswith("imported:\n")
    assert dqx("--help").stdout == shown.stdout


def test_an_unknown_command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["dqx", "reprot"])
    assert main() == 2
    assert "did you mean report or export?" in capsys.readouterr().err


@pytest.mark.parametrize("name", [name for name in COMMANDS if name != "mirror"])
def test_help_of_a_command_imports_nothing_heavy(name: str) -> None:
    shown = dqx(name, "--help")
    assert shown.returncode == 0, shown.stderr
    assert f"dqx {name} " in shown.stdout
    assert shown.stdout.endswith("imported:\n"), shown.stdout.splitlines()[-1]


def test_the_doctor_imports_torch_alone(tmp_path: Path) -> None:
    """And needs no configuration, checkpoint or network."""
    shown = dqx("doctor", folder=tmp_path)
    assert shown.returncode == 0, shown.stderr
    assert shown.stdout.splitlines()[-1] == "imported: torch"
    assert list(tmp_path.iterdir()) == []


def test_runs_start_from_any_folder(tmp_path: Path) -> None:
    """And what is shown of them imports nothing heavy. A mistake says where to look."""
    shown = dqx("run", "method=rtn", "--cfg", "job", folder=tmp_path)
    assert "name: rtn" in shown.stdout, shown.stderr
    assert shown.stdout.endswith("imported:\n")
    mistaken = dqx("run", "method=gptx", folder=tmp_path)
    assert mistaken.returncode == 2
    assert mistaken.stderr == "cannot run: method=gptx is no choice; did you mean gptq or gptaq?\n"
    assert list(tmp_path.iterdir()) == []
