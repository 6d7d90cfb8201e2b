"""Tables over many runs: what makes a cell, means over seeds, intervals over documents."""

import pytest
import records

from dqx.deltas import paired_interval
from dqx.store import RunFolder
from dqx.tables import cells, markdown, mean_over_seeds, read


def run(seed, scores, method="gptq", bits="w3a16", created="2026-01-01T00:00:00+00:00"):
    base = records.record()
    config = base.config | {"seed": seed, "method": {"name": method}, "bits": {"name": bits}}
    fp = {"nano_sums": records.task_result("nano_sums", [1, 1, 1, 1])}
    q = {"nano_sums": records.task_result("nano_sums", scores)}
    return records.record(config=config, full_precision=fp, quantized=q, created=created)


def test_seeds_of_one_setting_make_one_cell():
    found = cells([run(0, [1, 1, 0, 0]), run(1, [1, 0, 0, 0]), run(0, [1, 1, 1, 1], bits="w4a16")])
    assert [(cell.bits, cell.seeds) for cell in found] == [("w3a16", (0, 1)), ("w4a16", (0,))]
    delta = found[0].overall
    assert delta.quantized == pytest.approx(3 / 8)
    assert (delta.low, delta.high) == pytest.approx(paired_interval([0, -0.5, -1, -1]))  # four documents, not eight
    assert found[0].by_seed == (0.5, 0.25)


def test_the_later_of_two_equal_runs_counts():
    again = run(0, [1, 1, 1, 1], created="2026-01-02T00:00:00+00:00")
    for order in ([run(0, [0, 0, 0, 0]), again], [again, run(0, [0, 0, 0, 0])]):
        assert cells(order)[0].overall.quantized == 1


def test_runs_that_differ_in_more_than_the_seed_are_refused():
    """Neither of two step counts hides the other, nor do seeds of both become one mean."""
    base = run(0, [1, 1, 1, 1])
    for seed in (0, 1):
        config = base.config | {"seed": seed, "steps": {"count": 64}}
        other = records.record(config=config, full_precision=base.full_precision, quantized=base.quantized)
        with pytest.raises(ValueError, match=r"gptq w3a16 differ in more than the seed: .*steps.*64"):
            cells([base, other])


def test_seeds_with_other_documents_are_refused():
    with pytest.raises(ValueError, match="different documents"):
        mean_over_seeds([records.task_result("a", [1, 0]), records.task_result("a", [1])])


def test_folders_become_markdown(tmp_path):
    for i, record in enumerate([run(0, [1, 1, 0, 0]), run(1, [1, 0, 0, 0]), run(0, [1, 1, 1, 1], "rtn", "w8a8")]):
        RunFolder(tmp_path / "sweep" / str(i)).write(record)
    (tmp_path / "sweep" / "unfinished").mkdir()
    text = markdown(cells(read([tmp_path])))
    assert "| method | w8a8 | w3a16 |" in text
    assert "| `gptq` |  | **37.5** -62.5 [" in text
    assert "| `rtn` | w8a8 | " in text
    assert "2: 25.0, 50.0" in text
