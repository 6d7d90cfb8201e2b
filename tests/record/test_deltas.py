"""Paired deltas: hand-computed values, exact zero, pairing errors, and coverage counted over all outcomes."""

import math
from dataclasses import replace
from functools import cache

import numpy as np
import pytest
import torch
from scipy import stats

from dqx.evaluate.results import DocumentRow, TaskResult
from dqx.record import deltas, significance


def result(name, scores, category="math", ids=None):
    ids = ids or [f"{name}/{i}" for i in range(len(scores))]
    rows = [DocumentRow(doc_id=i, score=float(s)) for i, s in zip(ids, scores, strict=True)]
    value = sum(scores) / len(scores) if scores else 0.0
    return TaskResult(name=name, category=category, metric="acc", value=value, n=len(rows), documents=rows)


def test_hand_computed():
    # 10 documents, 3 lost, 1 gained: two more documents give p12 = 2/12, p21 = 4/12,
    # centre -2/12, variance (6/12 - 4/144) / 12 = 0.0393519, half width 1.959964 * 0.1983730.
    fp = result("t", [1, 1, 1, 1, 1, 1, 1, 0, 0, 0])
    q = result("t", [0, 0, 0, 1, 1, 1, 1, 1, 0, 0])
    row = deltas.compare_task(fp, q)
    assert (row.full_precision, row.quantized, row.n, row.lost, row.gained) == (0.7, 0.5, 10, 3, 1)
    assert row.delta == pytest.approx(-0.2)
    assert row.low == pytest.approx(-1 / 6 - 1.9599640 * 0.19837304, abs=1e-6)
    assert row.high == pytest.approx(-1 / 6 + 1.9599640 * 0.19837304, abs=1e-6)
    assert row.relative_drop == pytest.approx(2 / 7)
    assert row.level == "> 4 %"


def test_forwards_per_token_are_a_delta_of_their_own():
    def paced(counts, name="t"):
        plain = result(name, [1] * len(counts))
        rows = [replace(r, forwards=n, tokens=m) for r, (n, m) in zip(plain.documents, counts, strict=True)]
        return replace(plain, documents=rows)

    before, after = paced([(4, 8), (6, 8), (2, 8)]), paced([(8, 8), (6, 8), (4, 16)])
    schedule_alone = result("fixed", [1, 0])
    (row,) = deltas.forwards({"t": before, "fixed": schedule_alone}, {"t": after, "fixed": schedule_alone})
    assert (row.name, row.metric, row.n, row.lost, row.gained) == ("t", "forwards per token", 3, 1, 0)
    assert row.full_precision == pytest.approx((0.5 + 0.75 + 0.25) / 3)
    assert row.delta == pytest.approx(0.5 / 3)
    assert row.low < row.delta < row.high
    (slower,) = deltas.forwards({"t": paced([(4, 8)] * 12)}, {"t": paced([(6, 8), (7, 8)] * 6)})
    assert (slower.verdict, slower.relative_drop, slower.level) == ("worse", None, None)


def test_documents_pair_by_id_not_by_order():
    fp = result("t", [1, 0, 1], ids=["a", "b", "c"])
    q = result("t", [1, 1, 0], ids=["c", "a", "b"])
    row = deltas.compare_task(fp, q)
    assert (row.delta, row.lost, row.gained) == (0, 0, 0)


@pytest.mark.parametrize("scores", [[1, 0, 1, 1], [0.2, 0.7], [3.5, -2.0, 17.0]], ids=["decisions", "fractions", "any"])
def test_identical_runs_give_exactly_zero(scores):
    runs = {"a": result("a", scores), "b": result("b", scores[::-1])}
    for row in deltas.compare(runs, runs):
        assert row.delta == 0.0
        assert row.relative_drop == 0.0
        assert row.level == "< 1 %"
        assert row.lost == row.gained == 0
        assert row.low <= 0 <= row.high
        assert row.bootstrap_low is None or row.bootstrap_low <= 0 <= row.bootstrap_high
        assert (row.p_value, row.p_adjusted, row.verdict) == (1.0, 1.0, "not distinguishable")


def test_no_flips_still_leaves_a_width():
    row = deltas.compare_task(result("t", [1] * 50), result("t", [1] * 50))
    assert row.high == -row.low
    assert 0.03 < row.high < 0.08


def test_one_document():
    row = deltas.compare_task(result("t", [1]), result("t", [0]))
    assert (row.delta, row.lost) == (-1, 1)
    assert row.low == -1
    assert 0 < row.high <= 1  # one document proves nothing
    row = deltas.compare_task(result("t", [12.0]), result("t", [11.0]))
    assert (row.delta, row.low, row.high) == (-1, None, None)
    average = deltas.compare(
        {"a": result("a", [12.0]), "b": result("b", [1])}, {"a": result("a", [11.0]), "b": result("b", [1])}
    )
    assert average[-1].low is None  # an unknown interval stays unknown in the average


@pytest.mark.parametrize(
    ("drop", "expected"),
    [
        (-0.3, "< 1 %"),
        (0.0099, "< 1 %"),
        (0.01, "1-4 %"),
        ((0.50 - 0.48) / 0.50, "1-4 %"),
        (0.041, "> 4 %"),
        (None, None),
    ],
)
def test_levels(drop, expected):
    assert deltas.level(drop) == expected


def test_nothing_right_at_full_precision_has_no_relative_drop():
    row = deltas.compare_task(result("t", [0, 0]), result("t", [0, 1]))
    assert row.relative_drop is None
    assert row.level is None


def test_averages_count_every_task_the_same():
    fp = {"a": result("a", [1, 1], "general"), "b": result("b", [1] * 8, "general"), "c": result("c", [1] * 4, "code")}
    q = {
        "a": result("a", [1, 0], "general"),
        "b": result("b", [1] * 8, "general"),
        "c": result("c", [1, 1, 1, 0], "code"),
    }
    rows = deltas.compare(fp, q)
    assert [(r.name, r.kind) for r in rows] == [
        ("a", "task"), ("b", "task"), ("c", "task"), ("general", "category"), ("average", "overall")
    ]  # fmt: skip
    assert rows[3].delta == pytest.approx(-0.25)
    assert rows[4].delta == pytest.approx(-0.25)
    assert rows[4].n == 14
    assert rows[4].lost == 2
    # MOVER by hand from the three rows above
    below = sum((r.delta - r.low) ** 2 for r in rows[:3]) ** 0.5 / 3
    assert rows[4].low == pytest.approx(-0.25 - below)
    above = sum((r.bootstrap_high - r.delta) ** 2 for r in rows[:3]) ** 0.5 / 3
    assert rows[4].bootstrap_high == pytest.approx(-0.25 + above)


def test_unpaired_documents_are_named():
    with pytest.raises(
        ValueError, match=r"1 document \(b\) only in the full precision run; 1 document \(x\) only in the quant"
    ):
        deltas.compare_task(result("t", [1, 0], ids=["a", "b"]), result("t", [1, 0], ids=["a", "x"]))
    with pytest.raises(ValueError, match=r"1 document \(a\) listed twice"):
        deltas.compare_task(result("t", [1, 0], ids=["a", "a"]), result("t", [1, 0], ids=["a", "b"]))
    with pytest.raises(ValueError, match=r"1 document \(b\) without a finite score"):
        deltas.compare_task(result("t", [1, math.nan], ids=["a", "b"]), result("t", [1, 0], ids=["a", "b"]))
    with pytest.raises(ValueError, match="different tasks"):
        deltas.compare({"a": result("a", [1])}, {"b": result("b", [1])})
    with pytest.raises(ValueError, match="no document"):
        deltas.compare_task(result("t", []), result("t", []))


@pytest.mark.parametrize("n", [4, 10, 30, 80])
def test_coverage_of_the_paired_interval(n):
    """Every outcome of n documents is enumerated and weighted: no sampling error in the coverage."""
    outcomes = [(lost, gained) for lost in range(n + 1) for gained in range(n + 1 - lost)]
    limits = torch.tensor(
        [deltas.paired_interval([-1.0] * b + [1.0] * c + [0.0] * (n - b - c)) for b, c in outcomes], dtype=torch.float64
    )
    counts = torch.tensor([(b, c, n - b - c) for b, c in outcomes], dtype=torch.float64)
    ways = math.lgamma(n + 1) - torch.lgamma(counts + 1).sum(1)
    covered = []
    for p_lost in (0.005, 0.02, 0.1, 0.3):
        for p_gained in (0.005, 0.02, 0.1, 0.3):
            chances = torch.tensor([p_lost, p_gained, 1 - p_lost - p_gained], dtype=torch.float64)
            weight = (ways + counts @ chances.log()).exp()
            assert weight.sum() == pytest.approx(1)
            truth = p_gained - p_lost
            covered.append(float(weight[(limits[:, 0] <= truth) & (truth <= limits[:, 1])].sum()))
    assert min(covered) > 0.93
    if n >= 30:  # few documents with rare flips cannot be covered less than nearly always
        assert sum(covered) / len(covered) < 0.985


#: Chances that a document is lost or gained: hardly any flips, as at 8 bits; a method's; a collapse.
LOSSES = [(0.01, 0.01), (0.02, 0.01), (0.05, 0.02), (0.1, 0.02), (0.1, 0.1), (0.3, 0.05), (0.3, 0.25), (0.5, 0.02)]
SAMPLES = pytest.mark.parametrize(
    "samples", [pytest.param(600, id="few"), pytest.param(10_000, marks=pytest.mark.slow, id="many")]
)


@cache
def limits(lost, gained, n, kind):
    differences = [-1.0] * lost + [1.0] * gained + [0.0] * (n - lost - gained)
    return (deltas.paired_interval if kind == "bonett-price" else significance.bootstrap_bounded)(differences)


def coverage(tasks, kind, samples):
    """How often the interval of the average over `tasks`, each (documents, chance lost, chance gained), is right."""
    rng = np.random.default_rng(1)
    truth = sum(gained - lost for _, lost, gained in tasks) / len(tasks)
    drawn = [rng.multinomial(n, [lost, gained, 1 - lost - gained], samples).tolist() for n, lost, gained in tasks]
    covered = 0
    for outcomes in zip(*drawn, strict=True):
        parts = [
            ((gained - lost) / (lost + gained + same), *limits(lost, gained, lost + gained + same, kind))
            for lost, gained, same in outcomes
        ]
        low, high = deltas.mover(parts)
        covered += low - 1e-12 <= truth <= high + 1e-12
    return covered / samples


@pytest.mark.parametrize("n", [50, 128, 500])
def test_coverage_of_the_paired_interval_in_practice(n):
    """92 to 98 % where 6 or more flips are expected; with fewer nearly always right, as a flip or two prove nothing.

    Counted over all outcomes that ever come up, again without sampling error.
    """
    for lost, gained in LOSSES:
        highest = stats.binom.isf(1e-7, n, [lost, gained]).astype(int)
        outcomes = [(b, c) for b in range(highest[0] + 1) for c in range(highest[1] + 1) if b + c <= n]
        weights = stats.multinomial.pmf([(b, c, n - b - c) for b, c in outcomes], n, [lost, gained, 1 - lost - gained])
        common = weights > 1e-8
        assert weights[common].sum() > 0.999
        intervals = [limits(b, c, n, "bonett-price") for (b, c), use in zip(outcomes, common, strict=True) if use]
        covered = sum(
            w for w, (low, high) in zip(weights[common], intervals, strict=True) if low <= gained - lost <= high
        )
        assert 0.94 <= covered <= (1 if n * (lost + gained) < 6 else 0.98), (lost, gained, covered)


@SAMPLES
@pytest.mark.parametrize("n", [50, 128, 500])
def test_coverage_of_the_bootstrap_by_simulation(n, samples):
    covered = [coverage([(n, *losses)], "bootstrap", samples) for losses in LOSSES]
    assert min(covered) >= 0.92
    assert max(c for c, losses in zip(covered, LOSSES, strict=True) if n * sum(losses) >= 6) <= 0.99


@SAMPLES
@pytest.mark.parametrize("kind", ["bonett-price", "bootstrap"])
@pytest.mark.parametrize(
    "tasks",
    [
        [(20, 0.2, 0.05)] * 10,
        [(20, 0.6, 0.0)] * 10,
        [(128, 0.1, 0.02)] * 3,
        [(50, 0.02 * i, 0.01 * i) for i in range(1, 11)],
        [(60, 0.05, 0.05)] * 10,
    ],
    ids=["small", "collapse", "three", "mixed", "no loss"],
)
def test_coverage_of_averages_by_simulation(tasks, kind, samples):
    assert 0.92 <= coverage(tasks, kind, samples) <= 0.98


def test_both_intervals_of_decisions_agree():
    row = deltas.compare_task(result("t", [1] * 60 + [0] * 40), result("t", [1] * 45 + [0] * 50 + [1] * 5))
    assert row.bootstrap_low == pytest.approx(row.low, abs=0.015)
    assert row.bootstrap_high == pytest.approx(row.high, abs=0.015)


def test_verdicts_are_corrected_for_the_number_of_tasks():
    fp = {name: result(name, [1] * 40, category) for name, category in zip("abcd", ("x", "x", "y", "y"), strict=True)}
    q = {
        "a": result("a", [0] * 7 + [1] * 33, "x"),
        "b": result("b", [0] * 9 + [1] * 31, "x"),
        "c": result("c", [1] * 40, "y"),
        "d": result("d", [0] + [1] * 39, "y"),
    }
    rows = {row.name: row for row in deltas.compare(fp, q)}
    assert rows["a"].p_value == significance.mcnemar(7, 0) < 0.05
    tasks = [rows[name] for name in "abcd"]
    assert [row.p_adjusted for row in tasks] == significance.holm([row.p_value for row in tasks])
    assert [row.verdict for row in tasks] == ["worse", "worse", "not distinguishable", "not distinguishable"]
    # seven flips would not do as the better of eight tasks
    assert deltas.judged([rows["a"]] * 8)[0].verdict == "not distinguishable"
    categories = [rows["x"], rows["y"]]
    assert [row.p_adjusted for row in categories] == significance.holm([row.p_value for row in categories])
    assert rows["x"].verdict == rows["average"].verdict == "worse"
    assert rows["average"].p_adjusted == rows["average"].p_value


def test_no_verdict_contradicts_its_interval():
    """Better or worse is said of intervals that leave out 0 alone, whatever the scores are."""
    rng = np.random.default_rng(3)
    for n in (6, 9, 14, 30):
        for _ in range(40):
            before, after = (list(rng.integers(0, 2, n)) for _ in range(2))
            row = deltas.compare({"t": result("t", before)}, {"t": result("t", after)})[0]
            inside = row.low <= 0 <= row.high
            assert row.verdict == "not distinguishable" or not inside, (n, row.p_value, row.low, row.high)
    sure = deltas.compare_task(result("t", [1] * 6), result("t", [0] * 6))
    assert (sure.p_value, sure.verdict) == (2 / 2**6, "worse")


def test_what_a_sample_could_have_shown():
    rows = deltas.compare(
        {"a": result("a", [1] * 50), "b": result("b", [1] * 200)},
        {"a": result("a", [1] * 50), "b": result("b", [0] * 20 + [1] * 180)},
    )
    assert rows[0].resolvable == significance.resolvable_decision(50, 0)
    assert rows[1].resolvable == significance.resolvable_decision(200, 20)
    assert rows[2].resolvable == pytest.approx(math.hypot(rows[0].resolvable, rows[1].resolvable) / 2)
    assert deltas.compare_task(result("t", [1]), result("t", [1])).resolvable is None


def nats(name, scores):
    return replace(result(name, scores, "text"), metric="nll")


def test_less_is_better_for_nats():
    before, after = [2.1, 0.4, 0.8, 1.9, 0.7, 0.6, 1.1, 1.2], [2.2, 0.6, 0.9, 2.3, 0.7, 0.9, 1.3, 1.4]
    row = deltas.compare_task(nats("t", before), nats("t", after))
    assert (row.delta, row.lost, row.gained) == (pytest.approx(1.5 / 8), 7, 0)
    assert (row.relative_drop, row.level) == (None, None)
    assert row.interval == "studentised bootstrap"
    assert (row.low, row.high) == (row.bootstrap_low, row.bootstrap_high)
    assert 0 < row.low < row.delta < row.high
    assert row.p_value == pytest.approx(2 / 2**7)
    assert deltas.compare_task(nats("t", after), nats("t", before)).gained == 7
    longer = deltas.compare_task(nats("t", before * 4), nats("t", after * 4))
    assert longer.verdict == "worse"
    assert deltas.compare_task(nats("t", after * 4), nats("t", before * 4)).verdict == "better"


def test_few_windows_get_the_t_interval():
    row = deltas.compare_task(nats("t", [2.0, 2.1, 1.9, 2.2]), nats("t", [3.4, 3.6, 3.2, 3.5]))
    assert (row.interval, row.bootstrap_low) == ("paired t", None)
    assert row.low < row.delta < row.high


def test_nats_below_one_are_not_taken_for_fractions():
    row = deltas.compare_task(nats("t", [0.1, 0.9]), nats("t", [0.2, 0.9]))
    assert (row.interval, row.bootstrap_low) == ("paired t", None)
    assert row.resolvable is not None


def test_nats_are_in_no_average():
    both = {"a": result("a", [1, 0]), "text": nats("text", [2.0, 3.0])}
    rows = deltas.compare(both, both)
    assert [row.name for row in rows] == ["a", "text"]
    assert deltas.headline(rows).name == "a"
    assert deltas.headline(rows[1:]).name == "text"
    three = both | {"b": result("b", [1, 1])}
    rows = deltas.compare(three, three)
    assert [row.name for row in rows] == ["a", "text", "b", "average"]
    assert deltas.headline(rows).full_precision == 0.75
