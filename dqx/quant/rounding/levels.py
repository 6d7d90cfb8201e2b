"""Which values a group of weights can take, where they are fitted to it instead of being the grid of `bits`.

The parts are binary matrices with scales (`dqx.formats.binary`): `dual_scale.py` (D2Quant) and `daq.py` (Quant-dLLM).
They are an option of the roundings, `levels`, which say when a group is fitted and what happens to the error. All rows
of a linear share the column scales, so linears are rounded one by one.

O = outputs, I = inputs, W = columns of a group, G groups, K terms.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Protocol

import torch
from torch import Tensor

from dqx.formats.binary import BinaryGrid
from dqx.formats.bits import UNQUANTIZED, WeightBits
from dqx.formats.chunks import row_slices
from dqx.formats.integers import Grid
from dqx.formats.weight import QuantizedWeight
from dqx.quant.protocols import Context, Rounding

MOST_TERMS = 4  # more levels than that an element is not compared with


class Allocation(Protocol):
    """How many terms each group gets."""

    def __call__(self, score_G: Tensor, usual: int) -> list[int]: ...

    def problems(self, where: str, context: Context) -> list[str]: ...


@dataclass(frozen=True)
class BinaryLevels:
    """What the parts have in common. `fit` gives scales [O, K] and column scales [W, 1 or K], which multiply them."""

    shared_columns: ClassVar[bool]  # all terms have one column scale, else each its own
    iterations: int = 15  # alternations of scales and signs
    allocation: Allocation | None = None  # groups with more and with fewer terms; null: as many as bits everywhere

    def grid(self, bits: WeightBits) -> Grid:
        """Sums of as many signs as bits, one more where some groups get one more."""
        return Grid(UNQUANTIZED) if bits.bits == UNQUANTIZED else BinaryGrid(bits.bits + self._more)

    @property
    def _more(self) -> int:
        return 0 if self.allocation is None else 1

    def terms(self, w_OI: Tensor, u_I: Tensor, group_I: Tensor, grid: Grid) -> list[int]:
        """The number of terms of every group, given the weight and which group each of its columns is in."""
        n_groups = int(group_I.max()) + 1
        if self.allocation is None:
            return [grid.bits] * n_groups
        square_I = torch.zeros(w_OI.shape[1], dtype=torch.float64, device=w_OI.device)
        for rows in row_slices(len(w_OI), w_OI.shape[1], w_OI.device):
            square_I += w_OI[rows].double().square().sum(0)
        score_I = square_I / u_I.double().square()
        score_G = torch.zeros(n_groups, dtype=torch.float64, device=w_OI.device).index_add_(0, group_I, score_I)
        return self.allocation(score_G, grid.bits - self._more)

    def fit(self, w_OW: Tensor, u_W: Tensor, terms: int) -> tuple[Tensor, Tensor]:
        """Scales of one group. `u_W`: the diagonal of U, H^-1 = U^T U, at its columns, up to a factor."""
        raise NotImplementedError

    def fit_group(self, w_OW: Tensor, u_W: Tensor, terms: int, grid: Grid) -> tuple[Tensor, Tensor]:
        """`fit` with the terms that other groups have more of as zeros: scales [O, K], column scales [W, 1 or K]."""
        row, column = self.fit(w_OW, u_W, terms)
        missing = grid.bits - terms
        pad = torch.nn.functional.pad
        return pad(row, (0, missing)), column if self.shared_columns else pad(column, (0, missing))

    def problems(self, where: str, context: Context) -> list[str]:
        problems = [] if self.allocation is None else self.allocation.problems(f"{where}.allocation", context)
        if self.iterations < 0:
            problems.append(f"{where}.iterations={self.iterations} must be 0 or more; 15 is usual")
        clipped, used = [], roles_with(self, context)
        for role in used:
            weight = context.widths.weight[role]
            if weight.bits == UNQUANTIZED:
                continue
            if context.method.clip_of(role) is not None:
                clipped.append(role)
            if weight.format != "int":
                problems.append(
                    f"{where} replaces the grid of {role}, but its bits ask for {weight.format}; write "
                    f"bits.overrides.{role}.format=int, or another rounding (method.rounding_by_role.{role}=gptq)"
                )
            elif weight.scale_dtype != "float32":
                problems.append(
                    f"{where} has scales of its own for {role}, in float32; write bits.weight.scale_dtype=float32, or "
                    f"{where}=null for the grid of bits"
                )
            elif weight.bits + self._more > MOST_TERMS:
                most = MOST_TERMS - self._more
                problems.append(
                    f"{where} has 2^{weight.bits + self._more} levels at {weight.bits} bits, more than it is made for; "
                    f"write bits.overrides.{role}.weight={most} or fewer, or {where}=null for the grid of bits"
                )
        if clipped:
            problems.append(
                f"{where} has no range to clip; write method.clip.skip_roles=[{','.join(clipped)}], or method.clip=null"
            )
        return problems


class FittedLevels:
    """The levels of a weight's groups [G], fitted one after the other in the order that a rounding chooses.

    Scales [G, O, K]; column scales [I, 1 or K] in the order of the inputs. `u_I` is what the fits see of U; None for
    `scored_u_I`: the scores of groups see the same.
    """

    def __init__(
        self,
        levels: BinaryLevels,
        grid: Grid,
        w_OI: Tensor,
        u_I: Tensor,
        group_I: Tensor,
        scored_u_I: Tensor | None = None,
    ):
        self.levels, self.grid, self.u_I, self.group_I = levels, grid, u_I, group_I
        self.terms = levels.terms(w_OI, u_I if scored_u_I is None else scored_u_I, group_I, grid)
        self.scale = w_OI.new_zeros(len(self.terms), len(w_OI), grid.bits)
        self.column = w_OI.new_ones(w_OI.shape[1], 1 if levels.shared_columns else grid.bits)

    def fit(self, g: int, w_OW: Tensor, columns_W: Tensor) -> None:
        """Fit group g to its columns as they are now; `columns_W` says which inputs they stand for."""
        fitted = self.levels.fit_group(w_OW, self.u_I[columns_W], self.terms[g], self.grid)
        self.scale[g], self.column[columns_W] = fitted

    def at(self, columns_W: Tensor) -> Tensor:
        """The scales of these inputs' weights [O, W, K]."""
        return self.scale[self.group_I[columns_W]].transpose(0, 1) * self.column[columns_W]

    def rounded(self, codes_OI: Tensor, notes: tuple[str, ...] = ()) -> QuantizedWeight:
        """The weight, when all groups are fitted."""
        scale = self.scale.transpose(0, 1).contiguous()
        return QuantizedWeight(
            codes_OI.to(torch.uint8),
            scale,
            torch.zeros_like(scale[..., 0]),
            self.group_I,
            self.grid,
            notes,
            self.column,
            () if self.levels.allocation is None else tuple(self.terms),
            getattr(self.levels, "fold", False),
        )


def roles_with(levels: BinaryLevels, context: Context) -> list[str]:
    """The roles whose rounding has these levels."""
    return [role for role in context.arch.roles if levels_of(context.method.rounding_of(role)) is levels]


def levels_of(rounding: Rounding | None) -> BinaryLevels | None:
    """The levels of a rounding that has them."""
    found = getattr(rounding, "levels", None)
    return found if isinstance(found, BinaryLevels) else None
