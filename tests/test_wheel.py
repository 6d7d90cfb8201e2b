"""What `pip install .` installs works by itself, in any folder."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the programs of a fresh environment lie that has dqx from a wheel, and everything else from this one."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    source.mkdir()
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    for name in ("dqx", "conf"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    subprocess.run(
        [*pip, "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", folder, source], check=True, cwd=folder
    )
    (wheel,) = folder.glob("*.whl")
    shutil.rmtree(source)
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder / "environment"], check=True)
    programs = folder / "environment" / "bin"
    (packages,) = folder.glob("environment/lib/python*/site-packages")
    (packages / "others.pth").write_text(sysconfig.get_path("purelib") + "\n")
    subprocess.run([*pip, "--python", programs / "python", "install", "--no-deps", wheel], check=True, cwd=folder)
    return programs


def call(program: Path, *arguments: str, folder: Path) -> str:
    """What a program prints that is started in `folder`. Raises AssertionError where it fails."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "WANDB"))}
    done = subprocess.run([program, *arguments], cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.mark.slow
def test_a_run_a_report_and_a_model_from_an_empty_folder(installed: Path, tmp_path: Path) -> None:
    found = call(installed / "python", "-c", "import dqx; print(dqx.__file__)", folder=tmp_path)
    assert found.startswith(str(installed.parent))
    assert "dqx run ARGUMENTS" in call(installed / "dqx", folder=tmp_path)
    assert list(tmp_path.iterdir()) == []
    told = call(installed / "dqx", "run", "experiment=quick", folder=tmp_path)
    assert f"Again:   cd {tmp_path} && dqx run experiment=quick" in told
    call(installed / "dqx", "report", "runs", "--out", "report", folder=tmp_path)
    assert (tmp_path / "report" / "report.html").is_file()
    load = "import dqx; print(*(type(dqx.load(n)).__name__ for n in ('nano_llada', 'nano_block')))"
    assert call(installed / "python", "-c", load, folder=tmp_path).split() == ["DiffusionLM"] * 2
