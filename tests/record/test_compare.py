"""Two runs against each other: known deltas, what differs between their settings, and what cannot be compared."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import records

from dqx.record.compare import compare, costs, differences, flips
from dqx.record.folder import RunFolder
from dqx.report.compare import flip_lines


def run(full_precision, quantized, sampler=None, task="nano_sums", **more):
    config = records.record().config | {"model": {"name": "nano_llada", "sampler": sampler or {"threshold": None}}}
    sides = {"full_precision": full_precision, "quantized": quantized}
    return records.record(
        config=config, **{side: {task: records.task_result(task, scores, **more)} for side, scores in sides.items()}
    )


EXACT = run([1, 1, 1, 0], [1, 0, 1, 0], n_forwards=64, n_tokens=2048)
FAST = run([1, 1, 1, 0], [0, 0, 0, 0], {"threshold": 0.9, "cache": "dual"}, n_forwards=16, n_tokens=256)


def test_each_side_is_compared_with_the_same_side() -> None:
    by_side = compare(EXACT, FAST)
    assert [(side, rows[0].delta, rows[0].lost) for side, rows in by_side.items()] == [
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


def test_flipped_documents_are_shown_with_both_outputs() -> None:
    """Lost and gained ones in turn; nothing in an output steers the terminal or breaks its line."""
    before, after = (records.task_result("a", scores) for scores in ([1, 1, 0, 1, 0], [0, 1, 1, 0, 0]))
    assert [(flip.before.doc_id, flip.lost) for flip in flips(before, after)] == [
        ("a/0", True),
        ("a/2", False),
        ("a/3", True),
    ]
    after.documents[0] = replace(after.documents[0], prediction="\x1b[2J\nred\u202e" + "x" * 700)
    lines = list(flip_lines("a", before, after, 1))
    assert lines[0] == "a: 2 lost, 1 gained; 1 of them:"
    assert lines[1] == "  a/0, lost; target 0"
    assert lines[2] == "    first run,  score 1: line\\n0 \\u2028 é"
    assert lines[3].startswith("    second run, score 0: \\x1b[2J\\nred\\u202exxx")
    assert lines[3].endswith("x ... (109 characters more)")
    assert not list(flip_lines("a", before, after, 0))
    assert not list(flip_lines("a", before, before, 3))
    text = [replace(task, metric="nll") for task in (before, after)]
    assert [flip.lost for flip in flips(*text)] == [True, False, False]  # less is better


def test_command(tmp_path: Path) -> None:
    for name, record in (("exact", EXACT), ("fast", FAST)):
        RunFolder(tmp_path / name).write(record)
    command = [sys.executable, "-m", "dqx", "compare", str(tmp_path / "exact")]
    done = subprocess.run([*command, str(tmp_path / "fast")], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "model.sampler.threshold: null -> 0.9" in done.stdout
    for words in ("full precision", "quantized", "-50.0 [", "tokens computed 2048 -> 256 (8.00x)", "2 lost, 0 gained:"):
        assert words in done.stdout
    (tmp_path / "empty").mkdir()
    failed = subprocess.run([*command, str(tmp_path / "empty")], capture_output=True, text=True)
    assert failed.returncode == 2
    assert failed.stderr.strip() == f"{tmp_path / 'empty'} holds no finished run: there is no results.json"
