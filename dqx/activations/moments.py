"""Mean and central moments of any number of values, merged chunk by chunk in float64 (Pebay 2008, SAND2008-6212).

G groups of tokens, N tokens, C channels.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


class Moments:
    """`sums` [G, 5]: count, mean, and the sums of 2nd to 4th powers of differences from it."""

    def __init__(self, groups: int = 1, device: torch.device | str = "cpu"):
        self.sums = torch.zeros(groups, 5, dtype=torch.float64, device=device)

    def add(self, x: Tensor, finite: Tensor | None = None, member: Tensor | None = None) -> None:
        """Take in x [N, C]; member [G, N], 0 and 1, says which group a row belongs to. `finite` as for `LogHistogram`.

        Powers are of differences from the mean of the chunk, so that large means cost no digits.
        """
        n = x.shape[1] * x.new_ones(len(x), dtype=torch.float64) if finite is None else finite.sum(1).double()
        wide = x.double() if finite is None else x.double().masked_fill(~finite, 0.0)
        pivot = wide.sum() / n.sum().clamp(min=1)
        d = wide - pivot if finite is None else (wide - pivot).masked_fill(~finite, 0.0)
        square = d * d
        rows = torch.stack((n, d.sum(1), square.sum(1), (square * d).sum(1), square.square_().sum(1)), dim=1)
        s = rows.sum(0, keepdim=True) if member is None else member.double() @ rows
        self.sums = merged(self.sums, _central(s, pivot))

    def merge(self, other: Moments) -> None:
        """Take in what another one has."""
        self.sums = merged(self.sums, other.sums)

    def total(self) -> Moments:
        """All groups as one."""
        found = Moments(1, self.sums.device)
        for row in self.sums:
            found.sums = merged(found.sums, row[None])
        return found

    def of(self, group: int = 0) -> tuple[float, float, float | None]:
        """Mean, standard deviation and kurtosis of a group: NaN without values, kurtosis None without spread."""
        n, mean, m2, _, m4 = self.sums[group].tolist()
        variance = m2 / n if n else math.nan
        return mean if n else math.nan, math.sqrt(variance), m4 / n / variance**2 if variance > 0 else None


def _central(s: Tensor, pivot: Tensor) -> Tensor:
    """Count, mean and central sums [G, 5] from the sums s [G, 5] of powers 0 to 4 of differences from `pivot`."""
    n, s1, s2, s3, s4 = s.unbind(1)
    m = s1 / n.clamp(min=1)
    m2 = (s2 - m * s1).clamp(min=0)
    m3 = s3 - 3 * m * s2 + 2 * m**2 * s1
    m4 = (s4 - 4 * m * s3 + 6 * m**2 * s2 - 3 * m**3 * s1).clamp(min=0)
    return torch.stack((n, pivot + m, m2, m3, m4), dim=1)


def merged(a: Tensor, b: Tensor) -> Tensor:
    """Pebay's formulas for the union of two sets, group by group; of an empty one nothing comes."""
    na, mean, a2, a3, a4 = a.unbind(1)
    nb, other, b2, b3, b4 = b.unbind(1)
    n = na + nb
    whole = n.clamp(min=1)
    gap = torch.where((na > 0) & (nb > 0), other - mean, 0.0)
    return torch.stack(
        (
            n,
            torch.where(na > 0, mean + gap * nb / whole, other),
            a2 + b2 + gap**2 * na * nb / whole,
            a3 + b3 + gap**3 * na * nb * (na - nb) / whole**2 + 3 * gap * (na * b2 - nb * a2) / whole,
            a4
            + b4
            + gap**4 * na * nb * (na * na - na * nb + nb * nb) / whole**3
            + 6 * gap**2 * (na * na * b2 + nb * nb * a2) / whole**2
            + 4 * gap * (na * b3 - nb * a3) / whole,
        ),
        dim=1,
    )
