"""When a question needs no more draws: a sequential test of its leading choice, whose level holds over all looks.

The draws come in stages: every 8th, 4th and 2nd of those that there are, then all. After each stage but the last, the
choice with the best mean is compared with every other one by a one-sided paired t test on the differences of the
draws; the question is decided when all comparisons are significant at

    error_level / (looks * (choices - 1)),

`looks` being the stages before the last. Then the probability that a question is decided early for a choice whose
expectation is not the best is at most `error_level` (Bonferroni).

The t test is an approximation: a stage spreads its mask counts evenly, which makes means more precise than it assumes;
and log-likelihoods have a long lower tail, which a few draws may miss. With most tokens likely and a few far from it
the level holds (test_scorer.py). With half of a target's likelihood in one or two of its tokens, and no token depending
on how many are masked, a comparison with another such choice was wrong once to twice as often as its share, and with
an exact likelihood two to four times.

A question that no look decides gets all draws and with them the plain estimate. C choices, N draws of a stage.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

#: Stages before the last: every so many draws, where that leaves MIN_DRAWS of them.
STRIDES = (8, 4, 2)
MIN_DRAWS = 16


@dataclass(frozen=True)
class Question:
    """The requests, by index, whose likelihoods compete, and what each is divided by before they are compared."""

    requests: Sequence[int]
    scales: Sequence[float]


def stages(samples: int) -> list[int]:
    """The stages of `samples` draws, each as its stride; the last is 1. Few draws are taken in a single stage."""
    return [s for s in STRIDES if -(-samples // s) >= MIN_DRAWS] + [1]


def decided(draws_CN: Tensor, *, looks: int, error_level: float) -> bool:
    """Whether the choice with the best mean beats every other one at this look; `draws_CN` in float64.

    Draws that do not differ at all are exact likelihoods, of which the larger one is larger.
    """
    n_choices, n_draws = draws_CN.shape
    if n_choices == 1:
        return True
    leader = int(draws_CN.mean(1).argmax())
    rest = [c for c in range(n_choices) if c != leader]
    ahead = draws_CN[leader] - draws_CN[rest]
    error = ahead.std(1) / n_draws**0.5
    needed = critical(error_level / (looks * len(rest)), n_draws - 1)
    return bool((ahead.mean(1) >= needed * error).all())


@functools.cache
def critical(level: float, degrees: int) -> float:
    """The value that a t statistic exceeds with probability `level`."""
    from scipy.stats import t

    return float(t.isf(level, degrees))
