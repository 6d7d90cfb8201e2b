"""Corrections: parameters added to the model so that what quantization shifted comes back on average.

D2Quant's deviation-aware correction (DAC), arXiv:2602.02546, adds a bias at the norm before the MLP of every block
(`MeanShift`) and, in the released code, one at the final norm (`FinalShift`). RMSNorm has no bias, so these are new
parameters, one vector each.

I = channels.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor, nn

from dqx.models.transformer import Block, RMSNorm
from dqx.quant.protocols import FINAL, Context, Part, choice_problems

TEACHERS = ("fp", "block")


@dataclass(frozen=True)
class MeanShift(Part):
    """A bias at the norm before the MLP: the mean over calibration tokens of (teacher - quantized) output there.

    It is fitted once attention is quantized, and everything after it (the rounding of gate and up included) sees
    corrected inputs. Two teachers:

    * "block": the same block before rounding on the quantized model's input. Takes back what quantizing this block's
      attention shifted, as the released code does.
    * "fp": the full-precision model. Takes back all that was shifted from the embedding on.

    In channel j with mean mu and variance v of the difference, the mean square mu^2 + v falls to v on the calibration
    tokens: the expected reduction is mu^2 / (mu^2 + v). `shrink` multiplies mu by that share, which spares channels
    whose mean is small beside its scatter; the code has masks by the same share, all off by default.
    """

    teacher: str = "block"  # or fp
    limit: float | None = 10.0  # of |shift|, in the units of the norm's output; null: none
    shrink: bool = False  # multiply each channel's shift by its expected error reduction
    site: ClassVar[str] = "mlp_in"
    needs: ClassVar[frozenset[str]] = frozenset({"shift"})

    @property
    def stream(self) -> str:
        return "both" if self.teacher == "fp" else "block"

    def apply(self, place: Block, stats: Mapping[str, Any], context: Context) -> None:
        if not isinstance(place.inputs[self.site], nn.Identity):
            raise ValueError("the mean shift is that of the norm's output, but a transform changes it at run time")
        add_bias(place.mlp_norm, mean_shift(stats["shift"], shrink=self.shrink, limit=self.limit))

    def problems(self, where: str, context: Context) -> list[str]:
        problems = choice_problems(f"{where}.teacher", self.teacher, TEACHERS)
        return [*problems, *_limit_problems(where, self.limit)]


@dataclass(frozen=True)
class FinalShift(Part):
    """A bias at the final norm: the mean of its (teacher - quantized) output after the last block.

    The teacher is the last block with attention rounded and corrected, and its MLP as it was; both sides see the
    quantized model's input. The mean is over sequences of each one's mean over tokens, as in the released code, so that
    short sequences count as much as long ones.
    """

    limit: float | None = 10.0  # of |shift|, in the units of the norm's output; null: none
    site: ClassVar[str] = FINAL
    needs: ClassVar[frozenset[str]] = frozenset({"sequence_shift"})
    stream: ClassVar[str] = "block"

    def apply(self, place: RMSNorm, stats: Mapping[str, Any], context: Context) -> None:
        add_bias(place, mean_shift(stats["sequence_shift"], limit=self.limit))

    def problems(self, where: str, context: Context) -> list[str]:
        return _limit_problems(where, self.limit)


def add_bias(norm: RMSNorm, shift_I: Tensor) -> None:
    """Add a vector to the output of a norm."""
    bias = shift_I.to(norm.weight)
    norm.bias = nn.Parameter(bias if norm.bias is None else norm.bias + bias, requires_grad=False)


def mean_shift(shift_2I: Tensor, *, shrink: bool = False, limit: float | None = None) -> Tensor:
    """What to add to each channel [I], given mean and variance [2, I] of full-precision minus quantized values."""
    mean_I = shift_2I[0]
    shift_I = mean_I * expected_reduction(shift_2I) if shrink else mean_I
    return shift_I if limit is None else shift_I.clamp(-limit, limit)


def _limit_problems(where: str, limit: float | None) -> list[str]:
    if limit is None or limit > 0:
        return []
    return [f"{where}.limit={limit} must be above 0; 10 is the released code's, null is none"]


def expected_reduction(shift_2I: Tensor) -> Tensor:
    """Share of the mean square difference [I] that adding the mean removes: mu^2 / (mu^2 + v), 0 where both are 0."""
    mean_I, variance_I = shift_2I
    square_I = mean_I.square()
    return (square_I / (square_I + variance_I)).nan_to_num(0.0)
