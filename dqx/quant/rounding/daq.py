"""DAQ, the data-aware any-order quantizer of Quant-dLLM: binary matrices, each with its own scales per row and column.

arXiv:2510.03274, as released. A group of W columns is `sum over k of r_k,i c_k,j B_k,ij`: K matrices of signs, each
with a scale r per row and a scale c per column of its own. The fit is of weighted least squares: elements that matter
count more. What an element matters is `W_ij^2 / u_j^2`, u the diagonal of U (H^-1 = U^T U): the loss of leaving it out.
Salient are those from the smallest value upwards that lies more than `threshold` standard deviations from the mean of
the group.

15 times: term by term r, then c, by weighted least squares given the other terms, then every element to the nearest of
its 2^K levels. Column scales of different terms differ, so that no other linear can take them over: they are stored.

Where we differ from the code: an element that is exactly 0 in a group with a single term counts as negative when it is
stored, since one sign has no third value; the code leaves 0.

O = outputs, W = columns of a group, K terms.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import reduce
from typing import ClassVar

import torch
from torch import Tensor

from dqx.formats.binary import nearest, terms_of
from dqx.formats.integers import wide
from dqx.quant.protocols import Context
from dqx.quant.rounding.levels import BinaryLevels

EPS = 1e-12
RIDGE = 1e-8


@dataclass(frozen=True)
class DAQ(BinaryLevels):
    """Row and column scales per term; see `daq`."""

    shared_columns: ClassVar[bool] = False
    salient_weight: float = 3.0  # of the squared error of a salient element; others have 1
    threshold: float = 2.0  # standard deviations above which elements are salient

    def fit(self, w_OW: Tensor, u_W: Tensor, terms: int) -> tuple[Tensor, Tensor]:
        importance = 1 + (self.salient_weight - 1) * salient(w_OW, u_W, self.threshold).to(w_OW.dtype)
        return daq(w_OW, importance, terms, iterations=self.iterations)

    def problems(self, where: str, context: Context) -> list[str]:
        problems = super().problems(where, context)
        if self.salient_weight <= 0:
            problems.append(
                f"{where}.salient_weight={self.salient_weight} must be above 0; 3 is the authors', 1 is none"
            )
        return problems


def salient(w_OW: Tensor, u_W: Tensor, threshold: float = 2.0) -> Tensor:
    """Which elements [O, W] of a group matter most; none where none stands out."""
    loss = wide(w_OW).square() / (u_W.square() + EPS)
    far = ((loss - loss.mean()) / loss.std()).abs() > threshold
    smallest = torch.where(far, loss, torch.inf).amin()
    return loss >= smallest


def daq(w_OW: Tensor, importance_OW: Tensor, terms: int, *, iterations: int = 15) -> tuple[Tensor, Tensor]:
    """Row scales [O, K] and column scales [W, K] that make `sum of importance * (W - W_hat)^2` small.

    `BinaryGrid(terms)` has the codes, with the product of both as scales. With 0 iterations those it starts from.
    """
    w, e = wide(w_OW), importance_OW
    rows, columns, matrices, rest = [], [], [], w
    for _ in range(terms):
        r = rest.abs().mean(1)
        c = (rest / (r + EPS)[:, None]).abs().mean(0)
        b = rest.sign()
        rest = rest - r[:, None] * c * b
        rows.append(r)
        columns.append(c)
        matrices.append(b)
    for iteration in range(iterations):
        if iteration and terms > 1:
            codes = nearest(w, [r[:, None] * c for r, c in zip(rows, columns, strict=True)])
            matrices = terms_of(codes, terms)
        summands = [r[:, None] * c * b for r, c, b in zip(rows, columns, matrices, strict=True)]
        for k, b in enumerate(matrices):
            target = (w - reduce(torch.add, summands)).add_(summands[k])  # what the other terms leave
            part = columns[k] * b
            heavy = e * part
            rows[k] = (heavy * target).sum(1) / ((e * part.square_()).sum(1) + RIDGE)
            part = rows[k][:, None] * b
            heavy = e * part
            columns[k] = (heavy * target).sum(0) / ((e * part.square_()).sum(0) + RIDGE)
            summands[k] = rows[k][:, None] * columns[k] * b
    return torch.stack(rows, -1), torch.stack(columns, -1)
