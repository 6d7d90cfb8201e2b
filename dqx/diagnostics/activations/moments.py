"""Mean and central moments of any number of values, merged chunk by chunk in float64 (as Pebay 2008, SAND2008-6212).

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
        self.sums = united(torch.stack((self.sums, _central(s, pivot))))

    def merge(self, other: Moments) -> None:
        """Take in what another one has, group by group; where this one has a single group, all groups as one."""
        self.sums = united(torch.cat((self.sums[None], other.sums.unflatten(0, (-1, len(self.sums))))))

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


def united(parts: Tensor) -> Tensor:
    """Count, mean and central sums [..., 5] of the union of K sets [K, ..., 5], each about its own mean."""
    n, mean, m2, m3, m4 = parts.unbind(-1)
    whole = n.sum(0)
    centre = (n * mean).sum(0) / whole.clamp(min=1)
    d = mean - centre
    square = d * d
    return torch.stack(
        (
            whole,
            centre,
            (m2 + square * n).sum(0),
            (m3 + d * (3 * m2 + square * n)).sum(0),
            (m4 + d * (4 * m3 + d * (6 * m2 + square * n))).sum(0),
        ),
        dim=-1,
    )
