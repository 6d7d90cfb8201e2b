"""Which masked states a likelihood needs, each once, and the likelihood from what the model says about them.

The draws are those of `likelihood.mask_states`. A target of L tokens has only 2^L - 1 states, so the draws of a short
one repeat: each state is computed once and counts as often as it was drawn. With `exact` the draws give way to the
expectation they estimate where enumerating all states takes no more of them than there are draws: a state that masks
c tokens comes with probability 1 / (L * C(L, c)).

Shapes: L target, N draws, S different states.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from dqx.diffusion.batches import Piece
from dqx.diffusion.likelihood import mask_states
from dqx.diffusion.noise import Key


def n_states(length: int) -> int:
    """How many states a target of L tokens has: every set of masked tokens but the empty one."""
    return 2**length - 1


@dataclass
class Estimate:
    """The likelihood of one target as it becomes known.

    `masks` [S, L] are the different states, `of_draw` [N] the state of each draw, and `values` [S], float64, the
    estimate in nats that each state gives by itself, NaN until it is computed. `probabilities` [S] is set where the
    expectation is enumerated; then there are no draws and `of_draw` is every state once. `weights` [S] are what the
    log-probabilities that a state gives are multiplied by; None: the target's length over the number of masked tokens.
    """

    masks: Tensor
    of_draw: Tensor
    probabilities: Tensor | None = None
    weights: Tensor | None = None
    values: Tensor = field(init=False)

    def __post_init__(self) -> None:
        self.values = torch.full((len(self.masks),), math.nan, dtype=torch.float64)

    def missing(self, stride: int = 1) -> Tensor:
        """The states, in order, that every `stride`-th draw needs and that have no value yet."""
        wanted = self.of_draw if self.probabilities is not None else self.of_draw[::stride]
        states: Tensor = wanted.unique()
        return states[self.values[states].isnan()]

    def enter(self, states: Tensor, log_probs: Tensor) -> None:
        """Note for `states` what the model gives: the summed log-probabilities of their scored tokens, float64."""
        if self.weights is None:
            self.values[states] = log_probs * (self.masks.shape[1] / self.masks[states].sum(1))
        else:
            self.values[states] = log_probs * self.weights[states]

    def draws(self, stride: int = 1) -> Tensor:
        """The estimate of every `stride`-th draw [N / stride], one value repeated where the likelihood is exact."""
        n = len(range(0, len(self.of_draw), stride))
        if self.probabilities is not None:
            return (self.probabilities @ self.values).expand(n)
        return self.values[self.of_draw[::stride]]

    def value(self, stride: int = 1) -> float:
        """Nats: the mean over every `stride`-th draw, or the enumerated expectation."""
        if self.probabilities is not None:
            return float(self.probabilities @ self.values)
        drawn = self.of_draw[::stride]
        often = torch.bincount(drawn, minlength=len(self.masks)).double() / len(drawn)
        return float(often[often > 0] @ self.values[often > 0])


def enumerated(length: int) -> Estimate:
    """The expectation over all masks of a target."""
    codes = torch.arange(1, n_states(length) + 1)
    masks = (codes[:, None] >> torch.arange(length) & 1).bool()
    counts = masks.sum(1).tolist()
    probabilities = torch.tensor([1 / (length * math.comb(length, c)) for c in counts], dtype=torch.float64)
    return Estimate(masks, torch.arange(len(masks)), probabilities)


def piece_estimate(piece: Piece, *, samples: int, seed: int, exact: bool) -> Estimate:
    """The estimate of one term of a likelihood."""
    if piece.by_final is not None:
        return certain(len(piece.target), samples)
    return make_estimate(len(piece.target), samples=samples, seed=seed, key=piece.key, exact=exact)


def certain(length: int, samples: int) -> Estimate:
    """Of tokens that one state gives exactly, whatever is drawn: it masks the last one, which nothing has to see."""
    last = torch.arange(length)[None] == length - 1
    return Estimate(last, torch.zeros(samples, dtype=torch.long), weights=torch.ones(1, dtype=torch.float64))


def make_estimate(length: int, *, samples: int, seed: int, key: tuple[Key, ...], exact: bool) -> Estimate:
    """Enumerated with `exact` where a target has no more states than draws, else drawn as `log_likelihood` does."""
    if exact and n_states(length) <= samples:
        return enumerated(length)
    if length == 1:
        return Estimate(torch.ones(1, 1, dtype=torch.bool), torch.zeros(samples, dtype=torch.long))
    return Estimate(*mask_states(length, samples=samples, seed=seed, key=key).unique(dim=0, return_inverse=True))
