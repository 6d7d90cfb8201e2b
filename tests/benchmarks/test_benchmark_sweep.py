"""The benchmark of sweeps: it runs, and its three ways give the same results."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from dqx.benchmarks.sweep import main


@pytest.mark.slow
def test_the_quick_benchmark_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["--quick", "--json", str(tmp_path / "figures.json")])
    assert "results: equal to the last bit" in capsys.readouterr().out
    assert json.loads((tmp_path / "figures.json").read_text())["runs"] == 4
