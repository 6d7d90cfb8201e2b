"""The W&B sweeps in conf/sweeps: by W&B's schema, by our settings, and driven by W&B's agent and sweep engine."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import sweeps
import yaml
from records import record

from dqx.config.compose import compose, resolve
from dqx.config.schema import CONF_DIR
from dqx.record.summary import summary as numbers
from dqx.study.experiment import problems

FILES = sorted((CONF_DIR / "sweeps").glob("*.yaml"))
QUICK = {
    "task": "nano_facts",
    "task.limit": 2,
    "calib.samples": 2,
    "calib.length": 64,
    "outliers.samples": 0,
    "fidelity.samples": 1,
    "wandb.mode": "offline",
}


def read(name: str) -> dict[str, Any]:
    return yaml.safe_load((CONF_DIR / "sweeps" / name).read_text())


def without_server_keys(spec: dict[str, Any]) -> dict[str, Any]:
    """What the sweep engine judges: `run_cap` is for W&B's server, which counts the runs."""
    return {key: value for key, value in spec.items() if key != "run_cap"}


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_files_are_sweeps_by_wandbs_schema(file: Path) -> None:
    assert sweeps.SweepConfig(without_server_keys(read(file.name)))


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_what_is_optimized_is_in_the_summary(file: Path) -> None:
    run = record()
    run.fidelity["by_mask_ratio"].append({"mask_ratio": 0.5, "positions": 32, "divergence": 0.3, "agreement": 0.9})
    assert read(file.name)["metric"]["name"] in numbers(run)


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_every_corner_is_a_configuration(file: Path) -> None:
    """Each parameter at its ends or values; what cannot run is a pair of method and bits and nothing else."""
    values = {
        name: entry.get("values") or [entry[key] for key in ("value", "min", "max") if key in entry]
        for name, entry in read(file.name)["parameters"].items()
    }
    for corner in itertools.product(*values.values()):
        overrides = [f"{name}={value}" for name, value in zip(values, corner, strict=True)]
        told = problems(resolve(compose(overrides)))
        assert all("quantizes weights only" in problem for problem in told), (overrides, told)


def drive(tmp_path: Path, spec: dict[str, Any], steps: int, **settings: Any) -> list[dict[str, Any]]:
    """What W&B's agent gets done in so many steps."""
    fixed = {
        **QUICK,
        "cache_dir": str(tmp_path / "cache"),
        "hydra.run.dir": str(tmp_path / "runs" / "${now:%H-%M-%S-%f}"),
        **settings,
    }
    spec["parameters"] |= {name: {"value": value} for name, value in fixed.items()}
    (tmp_path / "spec.json").write_text(json.dumps(without_server_keys(spec)))
    python = Path(sys.executable).parent
    environment = {key: value for key, value in os.environ.items() if not key.startswith("WANDB")}
    environment |= {"PATH": f"{python}:{os.environ['PATH']}", "OMP_NUM_THREADS": "1", "WANDB_DIR": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "tests/sweep_agent.py", tmp_path / "spec.json", tmp_path / "runs", str(steps)],
        cwd=CONF_DIR.parent,
        env=environment | {"PYTHONPATH": str(CONF_DIR.parent)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_an_agent_works_through_the_grid_and_skips_what_cannot_be(tmp_path: Path) -> None:
    spec = read("grid.yaml")
    spec["parameters"]["method"]["values"] = ["awq", "rtn"]
    spec["parameters"]["bits"]["values"] = ["w4a4"]
    skipped, finished = drive(tmp_path, spec, steps=3)  # the grid ends after two
    assert skipped["settings"]["method"]["value"] == "awq"
    assert "quantizes weights only" in skipped["summary"]["skipped"]
    assert finished["settings"]["method"]["value"] == "rtn"
    assert finished["summary"]["delta/average"] == finished["summary"]["delta/nano_facts"]


@pytest.mark.slow
def test_an_agent_searches_by_the_metric(tmp_path: Path) -> None:
    spec = read("duquant.yaml")
    metric = spec["metric"]["name"]
    runs = drive(tmp_path, spec, steps=3)
    assert len(runs) == 3
    values = [run["summary"][metric] for run in runs]
    assert len(set(values)) == 3
    assert all(value > 0 for value in values)
    ratios = {run["settings"]["method.clip.ratio"]["value"] for run in runs}
    assert len(ratios) == 3
    assert all(0.6 <= ratio <= 1.0 for ratio in ratios)
