"""Tests and intervals against known values, exhaustive counts and simulation."""

import itertools
import math

import numpy as np
import pytest
from scipy import stats

from dqx.record.significance import (
    bootstrap_bounded,
    bootstrap_studentised,
    holm,
    mcnemar,
    mcnemar_power,
    resolvable_decision,
    resolvable_mean,
    sign_flip,
    t_interval,
    verdict,
)


def decisions(lost, gained, n):
    return [-1.0] * lost + [1.0] * gained + [0.0] * (n - lost - gained)


@pytest.mark.parametrize(("lost", "gained"), [(0, 0), (1, 0), (3, 1), (0, 6), (10, 10), (40, 61)])
def test_mcnemar_is_the_binomial_test_of_the_flips(lost, gained):
    expected = stats.binomtest(lost, lost + gained, 0.5).pvalue if lost + gained else 1.0
    assert mcnemar(lost, gained) == pytest.approx(expected)
    assert mcnemar(gained, lost) == mcnemar(lost, gained)


def test_mcnemar_errs_no_more_often_than_it_says():
    for flips in range(1, 40):
        rejected = [k for k in range(flips + 1) if mcnemar(k, flips - k) <= 0.05]
        assert sum(stats.binom.pmf(k, flips, 0.5) for k in rejected) <= 0.05


def test_sign_flip_of_decisions_is_mcnemar():
    assert sign_flip(decisions(12, 4, 900)) == mcnemar(12, 4)
    assert sign_flip([0.25 * d for d in decisions(2, 7, 30)]) == mcnemar(2, 7)
    assert sign_flip([0.0, 0.0]) == sign_flip([]) == 1.0


def test_sign_flip_enumerates_few_and_draws_many():
    rng = np.random.default_rng(3)
    few = rng.normal(0.4, 1, 10).tolist()
    expected = stats.permutation_test((few,), np.mean, permutation_type="samples", n_resamples=np.inf).pvalue
    assert sign_flip(few) == pytest.approx(expected)
    assert sign_flip([0.5, -0.25, -0.25]) == 1.0  # a sum of 0 is the least extreme of all
    many = rng.normal(0.2, 1, 200)
    assert sign_flip(many) == pytest.approx(stats.ttest_1samp(many, 0).pvalue, abs=0.01)
    assert sign_flip(many) == sign_flip(many[::-1])
    assert sign_flip(many + 3) == 1 / 10000


def test_holm_known_values():
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.5, 0.9]) == [1.0, 1.0]
    assert holm([0.02]) == [0.02]
    assert holm([]) == []


def test_holm_is_the_step_down_procedure():
    """Smallest p first: reject while p <= level / (hypotheses left)."""
    rng = np.random.default_rng(7)
    for m in (1, 2, 5, 12):
        table = rng.choice([0.001, 0.004, 0.01, 0.02, 0.03, 0.05, 0.3, 1.0], m).tolist()  # with ties
        for level in (0.01, 0.05, 0.2):
            rejected = [False] * m
            for k, i in enumerate(np.argsort(table, kind="stable")):
                if table[i] > level / (m - k):
                    break
                rejected[i] = True
            assert [p <= level for p in holm(table)] == rejected


def test_holm_errs_in_five_percent_of_tables():
    tables = np.random.default_rng(0).uniform(size=(4000, 10))
    assert np.mean([min(holm(table)) <= 0.05 for table in tables.tolist()]) == pytest.approx(0.05, abs=0.01)


@pytest.mark.parametrize("n", [10, 30])
def test_coverage_of_the_bounded_bootstrap(n):
    """Every outcome of n documents is enumerated and weighted: no sampling error in the coverage."""
    outcomes = [(lost, gained) for lost in range(n + 1) for gained in range(n + 1 - lost)]
    limits = {}
    for lost, gained in outcomes:
        if lost >= gained:
            low, high = bootstrap_bounded(decisions(lost, gained, n))
            limits[lost, gained], limits[gained, lost] = (low, high), (-high, -low)
    covered = []
    for p in itertools.product((0.005, 0.02, 0.1, 0.3), repeat=2):
        weights = stats.multinomial.pmf([(*o, n - sum(o)) for o in outcomes], n, [*p, 1 - sum(p)])
        truth = p[1] - p[0]
        inside = [low - 1e-9 <= truth <= high + 1e-9 for low, high in (limits[o] for o in outcomes)]
        covered.append(weights[inside].sum())
    assert min(covered) > 0.93
    if n >= 30:  # few documents with rare flips cannot be covered less than nearly always
        assert 0.92 < np.mean(covered) < 0.98


@pytest.mark.parametrize("draw", ["normal", "exponential"])
@pytest.mark.parametrize("n", [12, 40])
def test_coverage_of_the_studentised_bootstrap(draw, n):
    samples = getattr(np.random.default_rng(1), draw)(size=(300, n))
    truth = {"normal": 0.0, "exponential": 1.0}[draw]
    limits = [bootstrap_studentised(sample) for sample in samples]
    assert 0.92 <= np.mean([low <= truth <= high for low, high in limits]) <= 0.98


def test_bootstrap_does_not_depend_on_order_or_sign():
    values = np.random.default_rng(2).normal(0.1, 1, 50).tolist()
    assert bootstrap_studentised(values) == bootstrap_studentised(values[::-1])
    assert bootstrap_bounded(decisions(3, 9, 40)) == bootstrap_bounded(decisions(3, 9, 40)[::-1])
    low, high = bootstrap_studentised([v + 5 for v in values])
    assert (low - 5, high - 5) == pytest.approx(bootstrap_studentised(values))


def test_no_flips_still_leave_a_width():
    low, high = bootstrap_bounded([0.0] * 50)
    assert high == -low
    assert 0.02 < high < 0.08
    assert bootstrap_studentised([0.0] * 50) == (0.0, 0.0)  # nothing moved, not even in the last digit
    assert bootstrap_studentised([0.1, 0.2, 0.3]) is None
    with pytest.raises(ValueError, match="no document"):
        bootstrap_bounded([])


def test_t_interval_known_value():
    # mean 2, deviation 1, n 3: t(0.975, 2) = 4.302653
    half = 4.302653 / math.sqrt(3)
    assert t_interval([1.0, 2.0, 3.0]) == pytest.approx((2 - half, 2 + half), abs=1e-5)
    assert t_interval([1.0]) is None


def test_power_is_that_of_the_test():
    rng = np.random.default_rng(5)
    n, flipped, difference = 80, 0.2, 0.12
    chances = [(flipped - difference) / 2, (flipped + difference) / 2, 1 - flipped]
    rejected = [mcnemar(lost, gained) <= 0.05 for lost, gained, _ in rng.multinomial(n, chances, 4000)]
    assert mcnemar_power(n, flipped, difference) == pytest.approx(np.mean(rejected), abs=0.025)
    assert mcnemar_power(n, flipped, 0.0) <= 0.05
    assert mcnemar_power(n, 0.0, 0.0) == 0.0


@pytest.mark.parametrize(("n", "flipped"), [(12, 0), (164, 12), (1319, 150), (14042, 900)])
def test_the_resolvable_difference_is_found_in_four_of_five_samples(n, flipped):
    difference = resolvable_decision(n, flipped)
    assert mcnemar_power(n, max(flipped / n, difference), difference) == pytest.approx(0.8, abs=1e-3)
    # the textbook's approximation (Connor 1987) for many flips
    share, z_a, z_b = flipped / n, stats.norm.ppf(0.975), stats.norm.ppf(0.8)
    if flipped >= 100:
        approximate = math.sqrt(share) * (z_a * math.sqrt(n) + z_b * math.sqrt(n - z_a**2 + z_b**2)) / (n + z_b**2)
        assert difference == pytest.approx(approximate, rel=0.05)


def test_few_documents_resolve_nothing():
    assert resolvable_decision(5, 0) is None  # five flips one way have p = 0.06
    assert resolvable_decision(6, 0) > 0.9
    assert resolvable_decision(2000, 0) < resolvable_decision(200, 0)
    assert resolvable_mean([0.3]) is None
    assert resolvable_mean([0.0, 0.0]) is None


def test_a_resolvable_mean_is_found_in_four_of_five_samples():
    noise = np.random.default_rng(6).normal(size=(3000, 25))
    shift = resolvable_mean((noise[0] - noise[0].mean()) / noise[0].std(ddof=1))
    assert np.mean(stats.ttest_1samp(noise + shift, 0, axis=1).pvalue <= 0.05) == pytest.approx(0.8, abs=0.03)


@pytest.mark.parametrize(
    ("difference", "p_value", "limits", "lower_is_better", "expected"),
    [
        (-0.1, 0.01, (-0.2, -0.01), False, "worse"),
        (0.1, 0.05, (0.01, 0.2), False, "better"),
        (0.1, 0.01, (0.01, 0.2), True, "worse"),
        (-0.1, 0.01, (-0.2, -0.01), True, "better"),
        (-0.1, 0.01, (None, None), False, "worse"),
        (-0.1, 0.0501, (-0.2, -0.01), False, "not distinguishable"),  # the correction says so
        (-0.1, 0.01, (-0.2, 0.01), False, "not distinguishable"),  # the interval says so
        (0.0, 0.01, (-0.1, 0.1), False, "not distinguishable"),
    ],
)
def test_verdicts(difference, p_value, limits, lower_is_better, expected):
    assert verdict(difference, p_value, *limits, lower_is_better=lower_is_better) == expected
