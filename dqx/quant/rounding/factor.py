"""The triangular factor of a Hessian that GPTQ's column loop works with.

I = inputs.
"""

from __future__ import annotations

import torch
from torch import Tensor

BLOCK = 256  # columns per step of the factorisation


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
        h = hessian_II.to(dtype, copy=True)
        h.diagonal().masked_fill_(h.diagonal() == 0, 1.0).add_(damp * mean.to(dtype))
        if not _factor_in_place(h):
            continue
        notes: tuple[str, ...] = ()
        if attempt:
            precision = str(hessian_II.dtype).removeprefix("torch.")
            change = "" if damp == damping else f" and damping {damp:g} instead of {damping:g}"
            notes = (f"Cholesky failed in {precision}; solved in float64{change}",)
        return h.to(hessian_II.dtype), notes
    raise ValueError(
        "the Hessian cannot be factored even with a damping of 1; is it symmetric, and are its inputs finite?"
    )


def _factor_in_place(h_II: Tensor) -> bool:
    """Turn H into R, from the last block of columns to the first. False if H is not positive definite.

    The host waits for the device once, at the end.
    """
    failed = []
    for end in range(len(h_II), 0, -BLOCK):
        start = max(0, end - BLOCK)
        lower, info = torch.linalg.cholesky_ex(h_II[start:end, start:end].flip(0, 1))
        failed.append(info)
        h_II[start:end, start:end] = last = lower.flip(0, 1)
        panel = h_II[:start, start:end]
        panel.copy_(panel @ triangular_inverse(last).T)
        for left in range(0, start, 4 * BLOCK):  # what remains, upper half only
            right = min(left + 4 * BLOCK, start)
            h_II[:right, left:right].addmm_(panel[:right], panel[left:right].T, alpha=-1)
    h_II.triu_()
    return not bool(torch.stack(failed).any())


def triangular_inverse(upper_II: Tensor, leaf: int = 256) -> Tensor:
    """Inverse of an upper triangular matrix, by halves: a third less work than solving against the identity."""
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
