"""Statistics of a linear's input, gathered sequence by sequence and shared by all linears of one site.

T tokens of one sequence, N of all, I = inputs. Tokens may have weights, whose mean over all of them is 1
(`token_weight.py`): averages are then weighted ones.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from dqx.common.names import did_you_mean
from dqx.formats.integers import wide
from dqx.quant.activations_store import ActivationStore, Row
from dqx.quant.registry import register

CHUNK_TOKENS = 8192  # tokens converted to float32 at a time
SAMPLED_TOKENS = 512  # kept by "tokens", at least
NO_WEIGHT = 1e-30  # stands for a sum of weights that is 0, to divide by
PANEL = 512  # columns of a symmetric product that are computed at a time

TokenWeights = Sequence[Tensor] | None  # [1, T] of each sequence; None: all tokens count alike

#: Every statistic by the name that a part's `needs` says.
COLLECTORS: dict[str, type[Collector]] = {}


class Collector:
    """A statistic: sees the inputs [1, T, I] of one sequence after the other, then gives its value.

    `class Mine(Collector, statistic="mine")` is all that parts need to ask for "mine". `n_tokens` is N, where it is
    known; what grows with the calibration text goes into a row of `store`.
    """

    factors: ClassVar[int] = 0  # matrices [I, I] of float32 held at a time by it and by who uses it, for estimates
    averaged: ClassVar[bool] = True  # over tokens
    weighted: ClassVar[bool] = False  # whether `add` looks at `weight`

    weight: Tensor | None = None  # [1, T], of the tokens that are added; None: all count alike

    def __init_subclass__(cls, *, statistic: str = "") -> None:
        if statistic:
            register(COLLECTORS, statistic, cls)

    def __init__(self, n_tokens: int = 0, store: ActivationStore | None = None) -> None:
        self.total: Tensor | None = None
        self.n_tokens = 0  # seen so far

    def add(self, x: Tensor, intact: Tensor | None = None) -> None:
        """See x [1, T, I], and for parts that follow both streams the same sequence in the full-precision model.

        `weight` has their weights.
        """
        raise NotImplementedError

    def see(self, x: Tensor, intact: Tensor | None = None, weight: Tensor | None = None) -> None:
        """`add` a sequence whose tokens have these weights [1, T]."""
        self.weight = weight
        self.add(x, intact)

    def value(self) -> Any:
        """The statistic, once: nothing can be added then. Raises ValueError if no token was seen."""
        if self.total is None or (self.averaged and self.n_tokens == 0):
            raise ValueError("no calibration token reached this linear; give at least one calibration batch")
        total, self.total = self.total, None
        return total.div_(self.n_tokens) if self.averaged else total


class Hessian(Collector, statistic="hessian"):
    """`X^T X / N` [I, I] in float32 (float64 for float64 input); the paper's factor 2 cancels.

    Summed up in panels of columns as far down as the diagonal: little more than half the work.
    """

    factors: ClassVar[int] = 2  # the sum, in whose half the factor lies, and a copy in the columns' order
    weighted: ClassVar[bool] = True  # X^T diag(weights) X / N

    def add(self, x: Tensor, intact: Tensor | None = None) -> None:
        rows = x.reshape(-1, x.shape[-1])
        if self.total is None:
            self.total = wide(x.new_zeros(x.shape[-1], x.shape[-1]))
        for part in _chunks(len(rows)):
            chunk = scaled(wide(rows[part]), self.weight, part)
            for left, right in _panels(len(self.total)):
                self.total[:right, left:right].addmm_(chunk[:, :right].T, chunk[:, left:right])
        self.n_tokens += len(rows)

    def value(self) -> Tensor:
        mean: Tensor = super().value()
        for left, right in _panels(len(mean)):
            mean[right:, left:right] = mean[left:right, right:].T
        return mean


def _chunks(n_rows: int) -> list[slice]:
    return [slice(start, start + CHUNK_TOKENS) for start in range(0, n_rows, CHUNK_TOKENS)]


def scaled(rows: Tensor, weight: Tensor | None, part: slice = slice(None)) -> Tensor:
    """Rows, a `part` of a sequence's tokens, times the root of their weights [1, T]: squares then are weighted."""
    return rows if weight is None else rows * weight[:, part].reshape(-1, 1).sqrt().to(rows.dtype)


def weighted_rows(inputs: Row, weights: TokenWeights = None) -> Iterator[Tensor]:
    """The statistic "inputs" as rows [T, I], one tensor per sequence, times the root of their tokens' weights."""
    for i, x in enumerate(inputs):
        yield scaled(wide(x).reshape(-1, x.shape[-1]), None if weights is None else weights[i])


def _panels(n_columns: int) -> list[tuple[int, int]]:
    return [(left, min(left + PANEL, n_columns)) for left in range(0, n_columns, PANEL)]


class Cross(Collector, statistic="cross"):
    """`(X_fp - X_q)^T X_q / N` [I, I]: row = a channel of the difference, column = one of the quantized model."""

    factors: ClassVar[int] = 1
    weighted: ClassVar[bool] = True

    def add(self, x: Tensor, intact: Tensor | None = None) -> None:
        rows, wanted = x.reshape(-1, x.shape[-1]), _paired(intact).reshape(-1, x.shape[-1])
        if self.total is None:
            self.total = wide(x.new_zeros(x.shape[-1], x.shape[-1]))
        for part in _chunks(len(rows)):
            quantized = wide(rows[part])
            difference = scaled(wide(wanted[part]) - quantized, self.weight, part)
            self.total.addmm_(difference.T, scaled(quantized, self.weight, part))
        self.n_tokens += len(rows)


class Shift(Collector, statistic="shift"):
    """Mean and variance over tokens [2, I] of `x_fp - x_q`, in float64."""

    weighted: ClassVar[bool] = True

    def add(self, x: Tensor, intact: Tensor | None = None) -> None:
        change = (_paired(intact).double() - x.double()).reshape(-1, x.shape[-1])
        n: Any  # the sum of their weights
        if self.weight is None:
            n, mean = len(change), change.mean(0)
            squares = (change - mean).square().sum(0)
        else:
            heavy = self.weight.double().reshape(-1, 1)
            n = heavy.sum().clamp(min=NO_WEIGHT)  # a sequence whose tokens all have weight 0 adds nothing
            mean = (heavy * change).sum(0) / n
            squares = (heavy * (change - mean).square()).sum(0)
        if self.total is None:  # the mean so far, and the sum of squared deviations from it
            self.n_tokens, self.total = n, torch.stack((mean, squares))
            return
        delta, total = mean - self.total[0], self.n_tokens + n
        self.total[1] += squares + delta.square() * (self.n_tokens * n / total)
        self.total[0] += delta * (n / total)
        self.n_tokens = total

    def value(self) -> Tensor:
        assert self.total is not None
        return torch.stack((self.total[0], self.total[1] / self.n_tokens))


class SequenceShift(Collector, statistic="sequence_shift"):
    """Mean and variance over sequences [2, I] of each one's mean of `x_fp - x_q`, in float64."""

    def __init__(self, n_tokens: int = 0, store: ActivationStore | None = None) -> None:
        self.means: list[Tensor] = []

    def add(self, x: Tensor, intact: Tensor | None = None) -> None:
        self.means.append((_paired(intact).double() - x.double()).reshape(-1, x.shape[-1]).mean(0))

    def value(self) -> Tensor:
        means = torch.stack(self.means)
        return torch.stack((means.mean(0), means.var(0, unbiased=False)))


class AbsMax(Collector, statistic="absmax"):
    """The largest |x| of every channel [I]."""

    averaged: ClassVar[bool] = False

    def add(self, x: Tensor, intact: Tensor | None = None) -> None:
        largest = wide(x.abs().reshape(-1, x.shape[-1]).amax(0))
        self.total = largest if self.total is None else torch.maximum(self.total, largest)


class AbsMean(Collector, statistic="absmean"):
    """The mean |x| of every channel [I], summed in float64."""

    weighted: ClassVar[bool] = True

    def add(self, x: Tensor, intact: Tensor | None = None) -> None:
        rows = x.reshape(-1, x.shape[-1])
        heavy = rows.abs() if self.weight is None else rows.abs() * self.weight.reshape(-1, 1)
        total = heavy.sum(0, dtype=torch.float64)
        self.total = total if self.total is None else self.total + total
        self.n_tokens += len(rows)


class MinMax(Collector, statistic="minmax"):
    """The smallest and largest value of all channels and tokens [2]."""

    averaged: ClassVar[bool] = False

    def add(self, x: Tensor, intact: Tensor | None = None) -> None:
        lo, hi = torch.aminmax(wide(x))
        if self.total is not None:
            lo, hi = torch.minimum(lo, self.total[0]), torch.maximum(hi, self.total[1])
        self.total = torch.stack((lo, hi))


class Tokens(Collector, statistic="tokens"):
    """Every (N // 512)-th token [n, I], from the first: at least 512 where there are so many."""

    def __init__(self, n_tokens: int = 0, store: ActivationStore | None = None) -> None:
        self.stride = max(1, n_tokens // SAMPLED_TOKENS)
        self.seen = 0
        self.kept: list[Tensor] = []

    def add(self, x: Tensor, intact: Tensor | None = None) -> None:
        rows = x.reshape(-1, x.shape[-1])
        self.kept.append(rows[(-self.seen) % self.stride :: self.stride].clone())
        self.seen += len(rows)

    def value(self) -> Tensor:
        return torch.cat(self.kept)


class WeightedTokens(Tokens, statistic="weighted_tokens"):
    """As `Tokens`, times the root of their weights, for errors that are quadratic in the input (AWQ's clip search)."""

    weighted: ClassVar[bool] = True

    def add(self, x: Tensor, intact: Tensor | None = None) -> None:
        super().add(x if self.weight is None else scaled(wide(x[0]), self.weight)[None])


class Weights(Collector, statistic="weights"):
    """The weights of all tokens, a list of [1, T] with one entry per sequence; None where tokens have none."""

    weighted: ClassVar[bool] = True

    def __init__(self, n_tokens: int = 0, store: ActivationStore | None = None) -> None:
        self.kept: list[Tensor] = []

    def add(self, x: Tensor, intact: Tensor | None = None) -> None:
        if self.weight is not None:
            self.kept.append(self.weight)

    def value(self) -> list[Tensor] | None:
        return self.kept or None


class Inputs(Collector, statistic="inputs"):
    """All inputs, a row of [1, T, I] with one entry per sequence. It grows with the calibration text."""

    def __init__(self, n_tokens: int = 0, store: ActivationStore | None = None) -> None:
        self.kept: Row = (store or ActivationStore()).row()

    def add(self, x: Tensor, intact: Tensor | None = None) -> None:
        self.kept.append(x.clone())

    def value(self) -> Row:
        return self.kept


def _paired(intact: Tensor | None) -> Tensor:
    if intact is None:
        raise ValueError("a statistic that compares two models needs a part that follows both (`stream`)")
    return intact


def collectors(names: Iterable[str], n_tokens: int, store: ActivationStore | None = None) -> dict[str, Collector]:
    """Fresh collectors by name. Raises ValueError for a name that no statistic has."""
    if unknown := [name for name in names if name not in COLLECTORS]:
        raise ValueError(f"{unknown[0]} is no statistic; {did_you_mean(unknown[0], COLLECTORS)}")
    return {name: COLLECTORS[name](n_tokens, store) for name in names}
