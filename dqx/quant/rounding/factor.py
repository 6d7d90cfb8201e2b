"""The triangular factor of a Hessian that GPTQ's column loop works with.

I = inputs, M rows.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

BLOCK = 256  # columns per step of the factorisation
TILE = 4 * BLOCK  # columns that are brought up to date, or solved for, at a time


@contextmanager
def factored(hessian_II: Tensor, damping: float) -> Iterator[tuple[Tensor, tuple[str, ...]]]:
    """`upper_factor` without a second matrix: R lies in the upper half of H itself while the context lasts.

    Nothing below the diagonal may be read meanwhile. Afterwards H is as before; where it was not symmetric to the last
    bit, its upper half is what its lower half was.
    """
    mean = hessian_II.diagonal().mean()
    kept = [hessian_II[left:right, left:right].clone() for left, right in _tiles(len(hessian_II))]
    try:
        good = _factor_in_place(_damped(hessian_II, damping, mean))
        if good:
            yield hessian_II, ()
    finally:
        for (left, right), tile in zip(_tiles(len(hessian_II)), kept, strict=True):
            hessian_II[left:right, left:right] = tile
            hessian_II[left:right, right:] = hessian_II[right:, left:right].T
    if not good:
        del kept
        yield upper_factor(hessian_II, damping)


def upper_factor(hessian_II: Tensor, damping: float) -> tuple[Tensor, tuple[str, ...]]:
    """Upper triangular R [I, I] with H + damping * mean(diag H) * 1 = R R^T, and notes on what it took.

    Its inverse U = R^-1 is the factor of the paper, (H + damping * ...)^-1 = U^T U. Inputs with H_ii = 0 are decoupled
    (their diagonal becomes 1). Raises ValueError if H cannot be factored even in float64 with a damping of 1.
    """
    mean = hessian_II.diagonal().mean()
    tries = [(hessian_II.dtype, damping), (torch.float64, damping)]
    while tries[-1][1] < 1:
        tries.append((torch.float64, min(1.0, max(10 * tries[-1][1], 1e-3))))
    for attempt, (dtype, damp) in enumerate(tries):
        h = _damped(hessian_II.to(dtype, copy=True), damp, mean)
        if not _factor_in_place(h):
            continue
        notes: tuple[str, ...] = ()
        if attempt:
            precision = str(hessian_II.dtype).removeprefix("torch.")
            change = "" if damp == damping else f" and damping {damp:g} instead of {damping:g}"
            notes = (f"Cholesky failed in {precision}; solved in float64{change}",)
        return h.triu_().to(hessian_II.dtype), notes
    raise ValueError(
        "the Hessian cannot be factored even with a damping of 1; is it symmetric, and are its inputs finite?"
    )


def _damped(h_II: Tensor, damping: float, mean: Tensor) -> Tensor:
    """In place: the damped Hessian, dead inputs decoupled."""
    h_II.diagonal().masked_fill_(h_II.diagonal() == 0, 1.0).add_(damping * mean.to(h_II.dtype))
    return h_II


def _tiles(n: int) -> list[tuple[int, int]]:
    return [(left, min(left + TILE, n)) for left in range(0, n, TILE)]


def _factor_in_place(h_II: Tensor) -> bool:
    """Turn H into R, from the last block of columns to the first. False if H is not positive definite.

    Outside the tiles on the diagonal the lower half stays as it is. The host waits for the device once, at the end.
    """
    failed = []
    for end in range(len(h_II), 0, -BLOCK):
        start = max(0, end - BLOCK)
        block = h_II[start:end, start:end]
        lower, info = torch.linalg.cholesky_ex(block.flip(0, 1))
        failed.append(info)
        last = lower.flip(0, 1)
        block.copy_(last + block.tril(-1))
        panel = h_II[:start, start:end]
        panel.copy_(panel @ triangular_inverse(last).T)
        for left, right in _tiles(start):  # what remains, upper half only
            h_II[:right, left:right].addmm_(panel[:right], panel[left:right].T, alpha=-1)
    return not bool(torch.stack(failed).any())


class Solver:
    """Solves against the trailing part of R for a few rows, so that its inverse U [I, I] is never held."""

    def __init__(self, r_II: Tensor):
        self.r = r_II
        self.inverses = [triangular_inverse(r_II[left:right, left:right]) for left, right in _tiles(len(r_II))]

    def _parts(self, start: int) -> list[tuple[int, int, Tensor]]:
        """The tiles from `start` on: where they begin and end, and their inverses."""
        parts = []
        for (left, right), inverse in zip(_tiles(len(self.r)), self.inverses, strict=True):
            if right > start:
                skipped = max(0, start - left)
                parts.append((left + skipped, right, inverse[skipped:, skipped:]))
        return parts

    def times_u(self, x: Tensor, start: int) -> Tensor:
        """`X U[start:, start:]`, in place of x [M, I - start]."""
        for left, right, inverse in self._parts(start):
            own, before = slice(left - start, right - start), slice(0, left - start)
            x[:, own] = (x[:, own] - x[:, before] @ self.r[start:left, left:right]) @ inverse
        return x

    def times_u_transposed(self, x: Tensor, start: int) -> Tensor:
        """`X U[start:, start:]^T`, in place of x [M, I - start]."""
        for left, right, inverse in reversed(self._parts(start)):
            own, after = slice(left - start, right - start), slice(right - start, None)
            x[:, own] = (x[:, own] - x[:, after] @ self.r[left:right, right:].T) @ inverse.T
        return x


def triangular_inverse(upper_II: Tensor, leaf: int = 256) -> Tensor:
    """Inverse of an upper triangular matrix, by halves: a third less work than solving against the identity.

    Nothing below the diagonal is read.
    """
    n = len(upper_II)
    if n <= leaf:
        identity = torch.eye(n, dtype=upper_II.dtype, device=upper_II.device)
        return torch.linalg.solve_triangular(upper_II, identity, upper=True)
    half = n // 2
    inverse = torch.zeros_like(upper_II)
    first = inverse[:half, :half] = triangular_inverse(upper_II[:half, :half], leaf)
    last = inverse[half:, half:] = triangular_inverse(upper_II[half:, half:], leaf)
    inverse[:half, half:] = -(first @ (upper_II[:half, half:] @ last))
    return inverse
