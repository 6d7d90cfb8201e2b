"""The search for compromises: its front, what it does not run twice, and what becomes of a kill."""

from __future__ import annotations

import itertools
import json
import os
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from dqx.config.compose import compose, resolve
from dqx.config.schema import CONF_DIR, ConfigProblems
from dqx.launch.pareto import ParetoSweeper
from dqx.launch.search import Interval, Measurement, Search, dominates, unknown_objectives

SIDE_BY_SIDE = ["hydra/launcher=local_gpus", "hydra.launcher.cpus_per_task=1", "hydra.sweeper.batch=2"]
SPACE = {"bits.overrides.o.weight": ["2", "3", "4"], "bits.overrides.down.weight": ["2", "3", "4", "8"]}


def search(folder: Path, **changes) -> Search:
    settings = {"space": SPACE, "minimize": ["average_bits"], "maximize": ["delta/average"]} | changes
    return Search(folder, **settings)


class Fake:
    """Runs with an answer that is known, the first of them killed on demand; notes every point it was given."""

    def __init__(self, killed_at: int | None = None):
        self.seen: list[tuple[str, ...]] = []
        self.killed_at = killed_at

    def __call__(self, points: list[list[str]]) -> Sequence[Measurement]:
        found = []
        for point in points:
            if len(self.seen) == self.killed_at:
                raise KeyboardInterrupt
            self.seen.append(tuple(point))
            found.append(outcome(point))
        return found


def outcome(point: Sequence[str]) -> Measurement:
    o, down = (int(setting.partition("=")[2]) for setting in point)
    if (o, down) == (3, 8):
        return Measurement("run", reason="such widths cannot be", refused=True)
    bits = (o + 2 * down) / 3
    return Measurement("run", {"average_bits": bits, "delta/average": -((o - 4) ** 2) - abs(down - 4) / 7}, {}, bits)


def grid() -> list[tuple[str, ...]]:
    keyed = [[f"{key}={value}" for value in values] for key, values in SPACE.items()]
    return list(itertools.product(*keyed))


@pytest.mark.parametrize("sampler", ["tpe", "nsga2"])
@pytest.mark.parametrize("batch", [1, 5])
def test_the_whole_grid_gives_the_front_of_brute_force(tmp_path: Path, sampler: str, batch: int) -> None:
    runs, found = Fake(), search(tmp_path, sampler=sampler)
    found.run(100, batch, runs)
    assert sorted(runs.seen) == sorted(grid())  # each once, and no more
    costs = {p: (v["average_bits"], -v["delta/average"]) for p in grid() if (v := outcome(p).values)}
    front = {p for p, mine in costs.items() if not any(dominates(other, mine) for other in costs.values())}
    assert {tuple(t.overrides) for t in found.trials() if t.on_front} == front
    written = json.loads((tmp_path / "pareto.json").read_text())
    assert {tuple(t["overrides"]) for t in written["trials"] if t["on_front"]} == front
    assert len(written["trials"]) == len(grid())
    table = (tmp_path / "pareto.md").read_text()
    assert table.count("\n| * |") == len(front)
    assert "(refused: such widths cannot be)" in table


def test_a_killed_search_goes_on_where_it_stopped(tmp_path: Path) -> None:
    first, second = Fake(killed_at=4), Fake()
    with pytest.raises(KeyboardInterrupt):
        search(tmp_path).run(9, 1, first)
    search(tmp_path).run(9, 1, second)
    assert len(second.seen) == 5
    assert not set(first.seen) & set(second.seen)
    third = Fake()
    search(tmp_path).run(9, 1, third)
    assert third.seen == []


def test_a_batch_that_was_killed_comes_again_in_its_order(tmp_path: Path) -> None:
    asked = [trial.user_attrs["overrides"] for trial in search(tmp_path).ask(3)]
    again = Fake()
    search(tmp_path).run(3, 3, again)
    assert [list(point) for point in again.seen] == [list(point) for point in asked]


def test_numbers_from_an_interval(tmp_path: Path) -> None:
    found = search(tmp_path, space={"x": Interval(1e-3, 1.0, log=True)}, minimize=["x"], maximize=[])
    runs: list[float] = []

    def launch(points: list[list[str]]) -> list[Measurement]:
        runs.extend(float(point[0].removeprefix("x=")) for point in points)
        return [Measurement("run", {"x": runs[-1]})]

    found.run(5, 1, launch)
    assert len(set(runs)) == 5
    assert all(1e-3 <= x <= 1 for x in runs)
    assert [t.outcome.values for t in found.trials() if t.on_front] == [{"x": min(runs)}]


def test_mistakes_are_told_before_anything_starts(tmp_path: Path) -> None:
    with pytest.raises(ConfigProblems) as error:
        search(tmp_path, space={}, minimize=["x"], maximize=["x"], sampler="grid")
    assert len(error.value.problems) == 3
    assert not list(tmp_path.iterdir())
    search(tmp_path)
    with pytest.raises(ConfigProblems, match="holds a search with other settings"):
        search(tmp_path, fixed=["task.limit=3"])


def test_a_missing_package_is_told_with_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dqx.launch.pareto.find_spec", lambda name: None)
    sweeper = ParetoSweeper(trials=0, batch=1, minimize=["x"], maximize=[], sampler="tpe", seed=0)
    missing, trials = sweeper.problems([])
    assert "pip install -e '.[search]'" in missing
    assert trials == "hydra.sweeper.trials=0 must be 1 or more"


@pytest.mark.parametrize(
    ("mistake", "told"),
    [
        ("method.clip.ration=interval(0.6,1.0)", "method.clip.ration is not set"),
        ("steps=8,seven", "steps=seven is no choice"),
        (
            "hydra.sweeper.maximize=[delta/averge]",
            "hydra.sweeper.maximize: delta/averge will be no number of a run's summary; did you mean delta/average",
        ),
    ],
)
def test_a_mistake_in_a_name_claims_no_folder(tmp_path: Path, mistake: str, told: str) -> None:
    command = ["launch.py", "-m", "hydra/sweeper=pareto", "method=rtn", "bits=3,4", mistake]
    command.append(f"hydra.sweep.dir={tmp_path / 'sweep'}")
    done = subprocess.run([sys.executable, *command], cwd=CONF_DIR.parent, capture_output=True, text=True)
    assert done.returncode == 2, done.stderr[-3000:]
    assert told in done.stderr
    assert not (tmp_path / "sweep").exists()


def test_objectives_are_those_of_the_tasks() -> None:
    config = resolve(compose(["task=[nano_facts,nano_text]", "fidelity.samples=0"]))
    good = ["average_bits", "delta/nano_facts", "delta/average", "nll/nano_text", "seconds", "memory/ram_gib"]
    bad = ["accuracy/nano_text", "delta/nano_sums", "fidelity/divergence/0.5", "level/average"]
    found = unknown_objectives(config, [*good, *bad])
    assert [problem.partition(" ")[0] for problem in found] == bad


@pytest.mark.parametrize(
    "launcher", [[], pytest.param(SIDE_BY_SIDE, marks=pytest.mark.slow)], ids=["here", "local_gpus"]
)
def test_a_search_end_to_end(tmp_path: Path, launcher: list[str]) -> None:
    """A role and a block by two widths, of which one does not exist: that run is refused, the search goes on."""
    command = [
        *(sys.executable, "launch.py", "-m", "hydra/sweeper=pareto", "hydra.sweeper.trials=4", "method=rtn"),
        *("bits.overrides.o.weight=2,8", "bits.blocks.b1.weight=4,9", f"hydra.sweep.dir={tmp_path / 'sweep'}"),
        *("hydra.sweeper.minimize=[average_bits,fidelity/divergence/0.5]", "hydra.sweeper.maximize=[delta/average]"),
        *("task=nano_facts", "task.limit=2", "outliers.samples=0", "fidelity.samples=1", "fidelity.length=32"),
        *("wandb.mode=disabled", f"cache_dir={tmp_path / 'cache'}", *launcher),
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=CONF_DIR.parent, capture_output=True, text=True, env=environment)
    assert done.returncode == 2, done.stderr[-3000:]  # two were refused
    assert "2 of 4 runs failed" in done.stderr
    found = json.loads((tmp_path / "sweep" / "pareto.json").read_text())["trials"]
    assert [t["refused"] for t in found] == [False, False, True, True]
    for trial in found[:2]:
        results = json.loads((tmp_path / "sweep" / trial["folder"] / "results.json").read_text())
        assert trial["average_bits"] == trial["values"]["average_bits"] == results["average_bits"]
        divergence = {row["mask_ratio"]: row["divergence"] for row in results["fidelity"]["by_mask_ratio"]}
        assert trial["values"]["fidelity/divergence/0.5"] == divergence[0.5]
        assert "delta/average" in trial["intervals"]
    assert found[0]["on_front"]
    assert (tmp_path / "sweep" / "pareto.md").read_text() in done.stdout
    again = subprocess.run(command, cwd=CONF_DIR.parent, capture_output=True, text=True, env=environment)
    assert not re.search(r"^\d+-nano\S+: ", again.stdout, re.M)  # no run has a line: none was launched
