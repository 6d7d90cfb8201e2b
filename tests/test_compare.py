"""Two runs against each other: known deltas, what differs between their settings, and what cannot be compared."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import records

from dqx.compare import compare, costs, differences
from dqx.store import RunFolder


def run(full_precision, quantized, sampler=None, task="nano_sums", **more):
    config = records.record().config | {"model": {"name": "nano_llada", "sampler": sampler or {"threshold": None}}}
    sides = {"full_precision": full_precision, "quantized": quantized}
    return records.record(
        config=config, **{side: {task: records.task_result(task, scores, **more)} for side, scores in sides.items()}
    )


EXACT = run([1, 1, 1, 0], [1, 0, 1, 0], n_forwards=64, n_tokens=2048)
FAST = run([1, 1, 1, 0], [0, 0, 0, 0], {"threshold": 0.9, "cache": "dual"}, n_forwards=16, n_tokens=256)


def test_each_side_is_compared_with_the_same_side() -> None:
    found = compare(EXACT, FAST)
    assert [(side, rows[0].delta, rows[0].lost) for side, rows in found.items()] == [
        ("full_precision", 0, 0),
        ("quantized", -0.5, 2),
    ]
    assert compare(EXACT, EXACT)["full_precision"][0].delta == 0
    same = run([1, 0], [1, 0])
    assert list(compare(same, same)) == ["full_precision"]  # where nothing was quantized the sides are one


def test_settings_and_costs() -> None:
    assert list(differences(EXACT.config, FAST.config)) == [
        "model.sampler.threshold: null -> 0.9",
        "model.sampler.cache: not set -> dual",
    ]
    assert not list(differences(EXACT.config, EXACT.config | {"cache_dir": "elsewhere"}))
    (line,) = costs(EXACT.quantized, FAST.quantized)
    assert line.startswith("nano_sums: sequences 64 -> 16 (4.00x), tokens computed 2048 -> 256 (8.00x)")


def test_a_part_that_one_run_lacks_is_one_short_line() -> None:
    without, having = {"task": {"suite": {}}}, {"task": {"suite": {"nano_sums": {"fewshot": 0, "steps": 16}}}}
    assert list(differences(without, having)) == ["task.suite.nano_sums: not set -> set"]


def test_other_tasks_or_documents_are_refused() -> None:
    with pytest.raises(ValueError, match="no task is in both runs: nano_sums; nano_code"):
        compare(EXACT, run([1], [1], task="nano_code"))
    with pytest.raises(ValueError, match="task nano_sums: 4 and 2 documents, 2 of them in both"):
        compare(EXACT, run([1, 1], [1, 1]))


def test_command(tmp_path: Path) -> None:
    for name, record in (("exact", EXACT), ("fast", FAST)):
        RunFolder(tmp_path / name).write(record)
    command = [sys.executable, "-m", "dqx", "compare", str(tmp_path / "exact")]
    done = subprocess.run([*command, str(tmp_path / "fast")], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "model.sampler.threshold: null -> 0.9" in done.stdout
    for words in ("full precision", "quantized", "-50.0 [", "tokens computed 2048 -> 256 (8.00x)"):
        assert words in done.stdout
    (tmp_path / "empty").mkdir()
    failed = subprocess.run([*command, str(tmp_path / "empty")], capture_output=True, text=True)
    assert failed.returncode == 2
    assert failed.stderr.strip() == f"{tmp_path / 'empty'} holds no finished run: there is no results.json"
