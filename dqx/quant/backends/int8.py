"""8-bit integers, multiplied by `torch._int_mm` and summed in 32 bits.

With codes q and zero points z, `sum (q_x - z_x)(q_w - z_w)` is the sum of the codes' products less
`z_x (sum q_w - I z_w) + z_w sum q_x`. Codes are stored less 128, and so are zero points. All of it is computed in
32-bit integers, exactly, unless ranges need not hold zero: then zero points may be any number, and float64 takes them.

N = tokens, I = inputs, O = outputs.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from dqx.quant.backends.kernel import Encoded, KernelLinear, Product, as_kernels_read
from dqx.quant.linear import QuantLinear

MIDDLE = 128  # of the codes, which becomes 0
MOST_INPUTS = 2**17 - 1  # whose products of -128 and -128 a sum in 32 bits holds
FEWEST_ROWS = 17  # that the kernel of CUDA takes
#: Of the start-up test, tokens, inputs and outputs: a long sum, and few tokens.
TESTED = ((32, 18944, 64), (17, 256, 32))


class Int8Linear(KernelLinear):
    """Weights per row and inputs per token, symmetric or not."""

    codes: Tensor  # [I, O]
    zero: Tensor  # [O]; zero points
    less: Tensor  # [O]; what a zero point of 1 of the input takes off

    name: ClassVar[str] = "int8"
    takes: ClassVar[str] = "8-bit integers with one scale per row of a weight and per token of an input"
    bits: ClassVar[str] = "w8a8"
    format: ClassVar[str] = "int"
    multiple: ClassVar[int] = 8

    def __init__(self, linear: QuantLinear):
        super().__init__(linear)
        assert linear.grid is not None
        assert linear.zero_point is not None
        codes = (self.codes_of(linear).to(torch.int16) - MIDDLE).to(torch.int8)
        zero = linear.zero_point.view(-1).double() - MIDDLE
        self.symmetric_weight = bool((zero == 0).all())
        ends = torch.stack((codes.amin(1), codes.amax(1))).double()
        largest = (
            (ends - zero).abs().max() * 255 * self.in_features
        )  # that a sum can be, where inputs' ranges hold zero
        holds_zero = getattr(linear.activation, "include_zero", False) or linear.activation_bits.symmetric
        self.exact = torch.int32 if holds_zero and largest < 2**31 else torch.float64
        less = codes.sum(1, dtype=torch.int64) - self.in_features * zero
        self.register_buffer("codes", as_kernels_read(codes))
        self.register_buffer("zero", zero.to(self.exact))
        self.register_buffer("less", less.to(self.exact))

    @classmethod
    def unfit(cls, product: Product) -> Iterator[str]:
        yield from super().unfit(product)
        if product.n_in > MOST_INPUTS:
            yield f"{product.n_in} inputs, more than {MOST_INPUTS}"

    def encode(self, x_NI: Tensor) -> Encoded:
        grid, scale, zero = self.token_grid(x_NI)
        codes = grid.codes(x_NI, scale, zero).sub_(MIDDLE).to(torch.int8)
        sums = None if self.symmetric_weight else codes.sum(1, keepdim=True, dtype=torch.int32)
        return codes, scale, None if grid.symmetric else zero.sub(MIDDLE), sums

    def multiply(self, encoded: Encoded) -> Tensor:
        codes, scale, zero, sums = encoded
        return self.sums(codes, zero, sums).float().mul_(scale.float()).mul_(self.scale)

    def sums(self, codes_NI: Tensor, zero: Tensor | None, sums_N1: Tensor | None) -> Tensor:
        """`sum (q_x - z_x)(q_w - z_w)` [N, O], exact."""
        total = product(codes_NI, self.codes)
        if zero is None and self.symmetric_weight:
            return total
        total = total.to(self.exact)
        if zero is not None:
            total -= zero.to(self.exact) * self.less
        if not self.symmetric_weight:
            own = codes_NI.sum(1, keepdim=True, dtype=torch.int32) if sums_N1 is None else sums_N1
            total -= own.to(self.exact) * self.zero
        return total

    @classmethod
    def untrusted(cls, device: torch.device) -> str | None:
        g = torch.Generator().manual_seed(0)
        try:
            for n, n_in, n_out in TESTED:
                for a, w in ((127, 127), (127, -128), (-128, 127), (-128, -128)):
                    left, right = (
                        torch.full((n, n_in), a, dtype=torch.int8),
                        torch.full((n_out, n_in), w).to(torch.int8),
                    )
                    if told := _wrong(left, right, torch.full((n, n_out), a * w * n_in), device):
                        return told
                left, right = (torch.randint(-128, 128, (m, n_in), generator=g).to(torch.int8) for m in (n, n_out))
                if told := _wrong(left, right, (left.double() @ right.double().t()).long(), device):
                    return told
        except (RuntimeError, AttributeError, NotImplementedError) as error:
            return f"torch._int_mm cannot be used ({str(error).splitlines()[0]})"
        return None


def product(codes_NI: Tensor, codes_IO: Tensor) -> Tensor:
    """The product of int8 matrices [N, O], int32."""
    n = len(codes_NI)
    if codes_NI.device.type != "cpu" and n < FEWEST_ROWS:
        codes_NI = F.pad(codes_NI, (0, 0, 0, FEWEST_ROWS - n))
    return torch._int_mm(codes_NI, codes_IO)[:n]


def _wrong(left_NI: Tensor, right_OI: Tensor, expected_NO: Tensor, device: torch.device) -> str | None:
    found = product(left_NI.to(device), as_kernels_read(right_OI.to(device))).long().cpu()
    if (differ := found != expected_NO).any():
        at = tuple(differ.nonzero()[0].tolist())
        return (
            f"torch._int_mm gives {found[at]} for a sum of {left_NI.shape[1]} products that is {expected_NO[at]}, as "
            "processors do that add products in 16 bits (on CPUs: those without VNNI)"
        )
    return None
