"""DSQ, the dual-scale quantizer of D2Quant: binary matrices with scales per row and group, and one scale per column.

arXiv:2602.02546, as released. A group of W columns is `c_j * sum over k of r_k,i B_k,ij`: K = bits matrices of signs, a
scale r per row and term, and a scale c per column that all rows and terms share. No zero point, no clip. Three steps
alternate: r of every row by least squares over its K terms together, c of every column by least squares, and every
element to the nearest of its 2^K levels.

Column j of down is row j of up (times the gate's activation), so c_j multiplies the scale of that row and costs
nothing: `fold`. The released code keeps c in the weight of down, since it only simulates the rounding.

Where we differ from the code: the floor of the determinant for K = 2 is relative (theirs is 1e-8, whatever the size of
the weights), and a row whose least squares has no single answer keeps its scales (theirs stops for K > 2).

O = outputs, W = columns of a group, K terms.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import reduce
from itertools import combinations_with_replacement
from typing import ClassVar

import torch
from torch import Tensor

from dqx.formats.binary import nearest, terms_of
from dqx.formats.bits import FORMATS
from dqx.formats.integers import wide
from dqx.quant.protocols import Context
from dqx.quant.rounding.levels import BinaryLevels, roles_with
from dqx.quant.transforms.online import HeadRotation, OnlineDown

PRODUCERS = {"down": "up", "o": "v"}  # into whose rows a role's column scales go
EPS = 1e-8


@dataclass(frozen=True)
class DualScale(BinaryLevels):
    """Row scales per term, one column scale; see `dual_scale`."""

    shared_columns: ClassVar[bool] = True
    fold: bool = True  # the column scales go into the linear before; false: they stay, at 16 bits per column

    def fit(self, w_OW: Tensor, u_W: Tensor, terms: int) -> tuple[Tensor, Tensor]:
        row, column = dual_scale(w_OW, terms, iterations=self.iterations)
        return row, column[:, None]

    def problems(self, where: str, context: Context) -> list[str]:
        problems = super().problems(where, context)
        roles = roles_with(self, context) if self.fold else []
        strange = [role for role in roles if role not in PRODUCERS]
        if strange:
            problems.append(
                f"{where}: the column scales of {', '.join(strange)} have no linear before them to go into; use them "
                f"for down only (method.rounding_by_role.down), or write {where}.fold=false"
            )
        for role in set(roles) & set(PRODUCERS):
            problems += self._obstacles(where, role, context)
        return problems

    def _obstacles(self, where: str, role: str, context: Context) -> Iterator[str]:
        """What lies between the scales of a role and the linear they go into."""
        method, producer = context.method, PRODUCERS[role]
        instead = f"write {where}.fold=false"
        if role == "o" and context.arch.n_heads != context.arch.n_kv_heads:
            yield (
                f"{where}: with grouped heads several inputs of o are one output of v, so that o's scales cannot go "
                f"into v; {instead}"
            )
        for name, part in method.transforms.items():
            online = isinstance(part, OnlineDown) if role == "down" else isinstance(part, HeadRotation) and part.online
            if online or part.scope == "site":
                yield (
                    f"{where}: method.transforms.{name} mixes the inputs of {role} at run time, so that its scales "
                    f"cannot go into {producer}; leave it out (~method.transforms.{name}) or {instead}"
                )
        weight = context.widths.weight[producer]
        if method.rounding_of(producer) is not None and getattr(FORMATS.get(weight.format), "block", None):
            yield (
                f"{where}: the scales of {weight.format} are rounded themselves, so that {producer} cannot take over "
                f"those of {role}; use an integer format for {producer}, or {instead}"
            )


def dual_scale(w_OW: Tensor, terms: int, *, iterations: int = 15) -> tuple[Tensor, Tensor]:
    """Row scales [O, K] and positive column scales [W] of `w_OW`; with 0 iterations those it starts from.

    `BinaryGrid(terms)` has the codes: the levels of an element are those of its row times the scale of its column.
    """
    w = wide(w_OW)
    column = w.abs().mean(0).clamp(min=EPS)
    matrices, rows, rest = [], [], w
    for _ in range(terms):
        b = torch.where(rest >= 0, 1.0, -1.0).to(w.dtype)
        r = ((rest * column * b).sum(1).abs() / column.square().sum().clamp(min=EPS)).clamp(min=EPS)
        rest = rest - r[:, None] * column * b
        matrices.append(b)
        rows.append(r)
    row = torch.stack(rows, -1)
    for _ in range(iterations):
        squared, weighted = column.square(), column * w
        a = w.new_empty(len(w), terms, terms)
        for i, j in combinations_with_replacement(range(terms), 2):
            product = squared[None] if i == j else squared * matrices[i] * matrices[j]
            a[:, i, j] = a[:, j, i] = product.sum(1)
        row = _least_squares(a, torch.stack([(weighted * b).sum(1) for b in matrices], -1), row)
        level = reduce(torch.add, (b * r[:, None] for b, r in zip(matrices, row.unbind(-1), strict=True)))
        row = row.abs().clamp(min=EPS)  # a sign that turns with its scale leaves the product alone
        column = ((w * level).sum(0).abs() / level.square_().sum(0).clamp(min=EPS)).clamp(min=EPS)
        matrices = terms_of(nearest(w, [r[:, None] * column for r in row.unbind(-1)]), terms)
    return row, column


def _least_squares(a_OKK: Tensor, b_OK: Tensor, last_OK: Tensor) -> Tensor:
    """The solution of `A r = b` of every row; where there is no single one, the last scales."""
    if b_OK.shape[1] == 2:
        (a, c), d = a_OKK[:, 0].unbind(-1), a_OKK[:, 1, 1]
        determinant = torch.maximum(a * d - c.square(), EPS * a * d)
        first, second = b_OK.unbind(-1)
        solution = torch.stack((d * first - c * second, a * second - c * first), -1) / determinant[:, None]
        return torch.where(torch.isfinite(solution), solution, last_OK)
    solution, info = torch.linalg.solve_ex(a_OKK, b_OK)
    return torch.where((info == 0)[:, None] & torch.isfinite(solution).all(-1, keepdim=True), solution, last_OK)
