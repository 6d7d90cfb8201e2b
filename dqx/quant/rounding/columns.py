"""The loop over the columns of a chunk: each is rounded, and its error is pushed onto those after it.

On an accelerator a column's dozen of small kernels are done sooner than the host has started them. So nothing here is
read back by the host, shapes do not depend on values, and everything lies at the same place in every chunk: from the
second chunk on, `captured` may replay the loop as a graph.

O = outputs, C = columns of a chunk, R >= C columns that are known while it is rounded.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from dqx.common.accelerator import captured
from dqx.formats.integers import Grid


class ColumnLoop:
    """What rounding the columns of a chunk reads and writes. The caller fills in what is read.

    `updated` of the R columns get every column's error, the first `inside` are rounded. With `carries`, column j also
    adds `live[j] p[j, k]` to every later column k; beyond the chunk `nearest[j] p[j, k]` with `carry_rounded`.
    """

    def __init__(
        self,
        like: Tensor,
        grid: Grid,
        inside: int,
        reach: int,
        *,
        updated: int,
        terms: tuple[int, ...] = (),
        clamps: bool = False,
        carries: bool = False,
        carry_rounded: bool = False,
    ):
        n_out = like.shape[1]
        self.grid, self.inside, self.updated = grid, inside, updated
        self.live = like.new_empty(reach, n_out)  # the columns as they are by now [R, O]
        self.u = like.new_empty(reach, reach)  # factor of the inverse Hessian, H^-1 = U^T U
        self.scale = like.new_empty(inside, n_out, *terms)  # of every column [C, O], or [C, O, K] of sums of K signs
        self.zero_point = like.new_empty(inside, n_out)
        self.bounds = [like.new_empty(inside, n_out) for _ in range(2 if clamps else 0)]  # what they are clamped to
        self.p = like.new_empty(inside, reach) if carries else None
        self.rest = like.new_empty(inside, n_out) if carries else None  # W - W_q so far, with what is carried [C, O]
        self.codes = torch.empty(inside, n_out, dtype=torch.uint8, device=like.device)
        self.nearest = like.new_empty(inside, n_out)  # the rounded columns
        self.carried = self.nearest if carry_rounded else self.live
        self._loops: dict[tuple[int, int], Callable[[], None]] = {}

    def release(self) -> None:
        """Let recorded loops go, which hold this one."""
        self._loops.clear()

    def run(self, first: int, stop: int) -> None:
        """Round columns [first, stop) of the chunk: fills `codes` and `nearest`, updates `live` and `rest`."""
        if (first, stop) not in self._loops:
            self._loops[first, stop] = captured(partial(self._round, first, stop), self.live.device)
        self._loops[first, stop]()

    def _round(self, first: int, stop: int) -> None:
        live, diagonal, updated = self.live, self.u.diagonal(), self.updated
        for i in range(first, stop):
            wanted = live[i].clamp(*(bound[i] for bound in self.bounds)) if self.bounds else live[i]
            self.codes[i] = rounded = self.grid.codes(wanted, self.scale[i], self.zero_point[i])
            self.nearest[i] = nearest = self.grid.dequantize(rounded, self.scale[i], self.zero_point[i])
            live[i + 1 : updated].addr_(self.u[i, i + 1 : updated], (live[i] - nearest) / diagonal[i], alpha=-1)
            if self.p is not None and self.rest is not None:
                inside, p = self.inside, self.p[i]
                live[i + 1 : inside].addr_(p[i + 1 : inside], live[i])
                live[inside:updated].addr_(p[inside:updated], self.carried[i])
                self.rest[i + 1 :].addr_(p[i + 1 : inside], live[i])
