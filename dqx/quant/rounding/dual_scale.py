"""Dual scales for down: besides the grid's scales along the inputs of a row, one scale per input for all rows.

D2Quant's dual-scale quantizer, arXiv:2602.02546. The weight is approximated by W_q diag(s), with W_q on the grid. Two
steps alternate: W_q = Q(W / s) with ranges read anew, and s_j = <W_j, W_qj> / <W_qj, W_qj>, least squares for column j.
s costs nothing at run time: input j of down is row j of up (times the gate's activation), so s is folded into the rows
of up, where it multiplies the grid's scale and leaves the codes alone.

The final codes come from another rounding, applied to what the model then multiplies: W / s, and an input x * s, whose
Hessian is diag(s) H diag(s) and whose cross term is diag(s) D diag(s). Two choices of our own: reading ranges anew can
raise the error again, so the best s of all iterations is returned, that of no scale (s = 1) included; and s stays
positive: where the least-squares value is not (a column that is all zero on the grid), the last one is kept.

O = outputs, I = inputs.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from dqx.formats.bits import FORMATS, WeightBits
from dqx.formats.integers import Grid, wide
from dqx.formats.weight import BoundClip, QuantizedWeight
from dqx.quant.protocols import Context, Rounding, Stats
from dqx.quant.rounding.gptaq import GPTAQ
from dqx.quant.rounding.rtn import rtn_round
from dqx.quant.transforms.online import HeadRotation, OnlineDown

PRODUCERS = {"down": "up", "o": "v"}  # into whose rows a role's scales go


@dataclass(frozen=True)
class DualScale:
    """A scale per input, found by alternation, under another rounding."""

    iterations: int = 15  # alternations; 0 leaves every scale at 1
    rounding: Rounding = field(default_factory=GPTAQ)  # gives the final codes

    @property
    def needs(self) -> frozenset[str]:
        return self.rounding.needs

    @property
    def stream(self) -> str:
        return self.rounding.stream

    def grid(self, bits: WeightBits) -> Grid:
        return self.rounding.grid(bits)

    def __call__(self, w_OI: Tensor, bits: WeightBits, stats: Stats, clip: BoundClip | None = None) -> QuantizedWeight:
        w = wide(w_OI)
        s_I = column_scale(w, self.grid(bits), bits.group_size, clip, iterations=self.iterations)
        rounded = self.rounding(w / s_I, bits, scaled_statistics(stats, s_I), clip)
        return replace(rounded, column_scale=s_I)

    def problems(self, where: str, context: Context) -> list[str]:
        problems = self.rounding.problems(f"{where}.rounding", context)
        if self.iterations < 0:
            problems.append(f"{where}.iterations={self.iterations} must be 0 or more; 15 is usual")
        roles = [role for role in context.arch.roles if context.method.rounding_of(role) is self]
        strange = [role for role in roles if role not in PRODUCERS]
        if strange:
            problems.append(
                f"{where}: the scales of {', '.join(strange)} have no linear before them to go into; use dual scales "
                "for down only (method.rounding_by_role.down)"
            )
        for role in set(roles) & set(PRODUCERS):
            problems += self._obstacles(where, role, context)
        return problems

    def _obstacles(self, where: str, role: str, context: Context) -> Iterator[str]:
        """What lies between the scales of a role and the linear they go into."""
        method, producer = context.method, PRODUCERS[role]
        instead = f"give {role} another rounding (method.rounding_by_role.{role}=gptaq)"
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
        clip = method.clip_of(role)
        if clip is not None and clip.needs:
            yield (
                f"{where}: method.clip judges the inputs of {role} as they are before they are rescaled; write "
                f"method.clip=weight_mse, or add {role} to method.clip.skip_roles"
            )
        weight = context.widths.weight[producer]
        if method.rounding_of(producer) is not None and getattr(FORMATS.get(weight.format), "block", None):
            yield (
                f"{where}: the scales of {weight.format} are rounded themselves, so that {producer} cannot take over "
                f"those of {role}; use an integer format, or {instead}"
            )


def column_scale(
    w_OI: Tensor, grid: Grid, group_size: int = -1, clip: BoundClip | None = None, *, iterations: int = 15
) -> Tensor:
    """Positive s [I] for which `||W - Q(W / s) diag(s)||^2` is the least of all iterations, s = 1 included.

    Q rounds to nearest on the grid, with ranges (and `clip`) of W / s.
    """
    w = wide(w_OI)
    s = torch.ones_like(w[0])
    best, least = s, torch.inf
    for iteration in range(iterations + 1):
        on_grid = rtn_round(w / s, grid, group_size, clip).dequantize()
        error = float((w - on_grid * s).square().sum())
        if error < least:
            best, least = s, error
        if iteration < iterations:
            fitted = (w * on_grid).sum(0) / on_grid.square().sum(0)
            s = torch.where(torch.isfinite(fitted) & (fitted > 0), fitted, s)
    return best


def scaled_statistics(stats: Stats, s_I: Tensor) -> Stats:
    """Statistics of the input x * s from those of x: the Hessian and the cross term [I, I]; others are left out."""
    pairs_II = s_I[:, None] * s_I
    return {name: wide(stats[name]) * pairs_II for name in ("hessian", "cross") if name in stats}
