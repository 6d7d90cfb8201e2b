"""E4M3, multiplied by `torch._scaled_mm`.

Scales are applied behind it: scaled by rows and tokens it gives bfloat16 alone on some GPUs.

N = tokens, I = inputs, O = outputs.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from dqx.formats.floats import E4M3
from dqx.formats.integers import wide
from dqx.quant.backends.kernel import Encoded, KernelLinear
from dqx.quant.linear import QuantLinear

#: The largest error of a sum that passes, as a share of the sum of its products' magnitudes. A sum in float32 is far
#: below; one that keeps some 14 bits over thousands of products is above. One rounding to E4M3 is up to 2^-4.
TOLERANCE = 2.0**-9
TESTED = (32, 18944, 64)  # tokens, inputs, outputs


class FP8Linear(KernelLinear):
    """E4M3 weights per row and inputs per token."""

    codes: Tensor  # [O, I]
    one: Tensor  # []

    name: ClassVar[str] = "fp8"
    takes: ClassVar[str] = "E4M3 with one scale per row of a weight and per token of an input"
    bits: ClassVar[str] = "fp8"
    format: ClassVar[str] = "fp8"
    multiple: ClassVar[int] = 16

    def __init__(self, linear: QuantLinear):
        super().__init__(linear)
        self.register_buffer("codes", self.codes_of(linear).view(torch.float8_e4m3fn))
        self.register_buffer("one", torch.ones((), device=self.codes.device))

    def encode(self, x_NI: Tensor) -> Encoded:
        _grid, scale, _zero = self.token_grid(x_NI)
        return encode(wide(x_NI) / scale), scale, None, None

    def multiply(self, encoded: Encoded) -> Tensor:
        codes, scale, _zero, _sums = encoded
        return product(codes, self.codes, self.one).mul_(scale.float()).mul_(self.scale)

    @classmethod
    def untrusted(cls, device: torch.device) -> str | None:
        n, n_in, n_out = TESTED
        g = torch.Generator().manual_seed(0)
        pairs = [(torch.full((n, n_in), a), torch.full((n_out, n_in), 448.0)) for a in (448.0, -448.0)]
        pairs.append(tuple(torch.randint(-15, 16, (m, n_in), generator=g).float() for m in (n, n_out)))  # type: ignore[arg-type]
        try:
            for left, right in pairs:
                expected, most = left.double() @ right.double().t(), left.double().abs() @ right.double().abs().t()
                codes, weight = (encode(part).to(device) for part in (left, right))
                found = product(codes, weight, torch.ones((), device=device)).double().cpu()
                error = float(((found - expected).abs() / most).nan_to_num(nan=1.0).max())
                if error > TOLERANCE:
                    return (
                        f"torch._scaled_mm is off by {error:.1e} of the magnitudes in a sum of {n_in} products; "
                        f"{TOLERANCE:.1e} pass"
                    )
        except (RuntimeError, AttributeError, NotImplementedError, ValueError) as error:
            return f"torch._scaled_mm cannot be used ({str(error).splitlines()[0]})"
        return None


def encode(x: Tensor) -> Tensor:
    """The E4M3 numbers nearest to x, saturating."""
    return x.clamp(-E4M3.largest, E4M3.largest).to(torch.float8_e4m3fn)


def product(left_NI: Tensor, right_OI: Tensor, one: Tensor) -> Tensor:
    """The product of E4M3 matrices [N, O], float32."""
    return torch._scaled_mm(left_NI, right_OI.t(), one, one, out_dtype=torch.float32)
