"""Floating-point number formats as grids: fp8, mxfp4, nvfp4. The only place that rounds to small floats.

* `fp8`: elements E4M3 of the OCP 8-bit floating point specification 1.0 (torch.float8_e4m3fn), saturating at 448;
  `scale = absmax / 448` per row, group or token.
* `mxfp4`: OCP Microscaling (MX) specification 1.0. Elements E2M1, one scale E8M0 (a power of two) per 32 inputs:
  `scale = 2^(floor(log2 absmax) - 2)`. Values above 6 scales, which that scale leaves for absmax above 6/8 of the next
  power of two, saturate.
* `nvfp4`: elements E2M1, one scale E4M3 per 16 inputs, and one float32 scale per tensor, `absmax / (448 * 6)`:
  `scale = E4M3(absmax of the block / (6 * tensor_scale)) * tensor_scale`.

Codes are bit patterns (sign, exponent, mantissa), rounding is half to even, -0.0 keeps its code. Grids are symmetric
around zero; zero points are 0 and mean nothing.

What nvfp4's "tensor" is. Weights: what is rounded in one call, so where q, k, v have equal settings they share a
tensor scale, and gate and up do; kernels that multiply them in one matmul know a single one. It comes from the weight
before any rounding; a block that GPTQ's updates push beyond it saturates. Activations: a token, so that a result does
not depend on what else is in the batch (with one scale per activation tensor it would).
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import cache
from typing import ClassVar

import torch
from torch import Tensor

from dqx.formats.bits import FORMATS
from dqx.formats.integers import Grid, wide


@dataclass(frozen=True)
class Minifloat:
    """A sign, `exponent_bits` and `mantissa_bits` with subnormals and without infinities; saturates at `largest`.

    The exponent bias is 2^(exponent_bits - 1) - 1. Magnitudes and their codes rise together, so the code of
    `n * 2^(e - mantissa_bits)` is `n + (e - e_min) * 2^mantissa_bits`, across subnormals and binades alike.
    """

    exponent_bits: int
    mantissa_bits: int
    largest: float

    @property
    def bits(self) -> int:
        return 1 + self.exponent_bits + self.mantissa_bits

    @property
    def smallest_exponent(self) -> int:
        """Of normal numbers; subnormals share its step."""
        return 2 - 2 ** (self.exponent_bits - 1)

    def nearest(self, x: Tensor) -> Tensor:
        """The representable value closest to each x, halves to the even mantissa. NaN stays NaN."""
        step = self._binade(x) * 2.0**-self.mantissa_bits
        return x.div(step).round_().mul_(step).clamp_(-self.largest, self.largest)

    def encode(self, values: Tensor) -> Tensor:
        """Bit patterns, uint8, of representable values."""
        binade = self._binade(values)
        exponent = torch.frexp(binade).exponent - 1 - self.smallest_exponent
        magnitude = (values.abs() / binade * 2**self.mantissa_bits).int() + exponent * 2**self.mantissa_bits
        return (magnitude + torch.signbit(values).int() * 2 ** (self.bits - 1)).to(torch.uint8)

    def decode(self, codes: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """The values of bit patterns. E4M3's two patterns for NaN give NaN."""
        return _values(self, codes.device, dtype)[codes.int()]

    def _binade(self, x: Tensor) -> Tensor:
        """The power of two at or below |x|, kept within the format's exponents. Exact."""
        magnitude = x.abs().clamp_(2.0**self.smallest_exponent, self.largest)
        return power_of_two(magnitude)


def power_of_two(x: Tensor) -> Tensor:
    """2^floor(log2 x), exactly: positive normal float32 or float64 numbers without the bits of their mantissa."""
    if x.dtype == torch.float64:
        return (x.view(torch.int64) & 0x7FF0000000000000).view(torch.float64)
    return (x.view(torch.int32) & 0x7F800000).view(torch.float32)


@cache
def _values(element: Minifloat, device: torch.device, dtype: torch.dtype) -> Tensor:
    """The value of every bit pattern [2^bits]."""
    m = element.mantissa_bits
    positive = []
    for code in range(2 ** (element.bits - 1)):
        exponent, mantissa = code >> m, code & (2**m - 1)
        fraction = mantissa / 2**m + (exponent > 0)
        value = fraction * 2.0 ** (max(exponent, 1) - 1 + element.smallest_exponent)
        positive.append(value if value <= element.largest else float("nan"))
    return torch.tensor([*positive, *(-v for v in positive)], dtype=dtype, device=device)


E4M3 = Minifloat(4, 3, 448.0)
E2M1 = Minifloat(2, 1, 6.0)


@dataclass(frozen=True)
class FloatGrid(Grid):
    """What the formats share: a grid without zero point whose elements are small floats."""

    bits: int
    symmetric: bool = True
    element: ClassVar[Minifloat]

    @property
    def max_code(self) -> int:
        return 2**self.element.bits - 1

    def from_range(self, lo: Tensor, hi: Tensor) -> tuple[Tensor, Tensor]:
        """Scale (and a zero point of 0) for values of magnitude up to max(|lo|, |hi|). All-zero ranges count as 1."""
        absmax = torch.maximum(lo.abs(), hi.abs())
        scale = self.scale_of(absmax.where(absmax > 0, 1))
        return scale, torch.zeros_like(scale)

    def scale_of(self, absmax: Tensor) -> Tensor:
        """The scale of blocks with these largest magnitudes, all above zero."""
        raise NotImplementedError

    def codes(self, x: Tensor, scale: Tensor, zero_point: Tensor) -> Tensor:
        """Bit patterns, uint8, of the elements nearest to x / scale."""
        return self.element.encode(self.element.nearest(wide(x) / scale))

    def nearest(self, x: Tensor, scale: Tensor, zero_point: Tensor) -> Tensor:
        return scale * self.element.nearest(wide(x) / scale)

    def dequantize(self, codes: Tensor, scale: Tensor, zero_point: Tensor) -> Tensor:
        return scale * self.element.decode(codes, scale.dtype)

    def fake(self, x: Tensor, dim: int = -1, clip_ratio: float = 1.0) -> Tensor:
        """x rounded to its own grids along `dim`, in the dtype of x. `clip_ratio` shrinks the range of every block.

        A format with blocks cuts `dim` into them; where it has a scale per tensor and `for_tensor` has not set it, a
        slice along `dim` counts as a tensor. Raises ValueError where the blocks do not fill `dim`.
        """
        dim %= x.ndim
        size, block = x.shape[dim], self.block or x.shape[dim]
        if size % block:
            raise ValueError(f"{size} values cannot be cut into blocks of {block}, which this format shares a scale in")
        blocks = wide(x).unflatten(dim, (size // block, block))
        lo, hi = torch.aminmax(blocks, dim=dim + 1, keepdim=True)
        grid = self._for_slices(torch.maximum(lo.abs(), hi.abs()).amax(dim, keepdim=True))
        rounded = self.nearest(blocks, *grid.from_range(lo * clip_ratio, hi * clip_ratio))
        return rounded.flatten(dim, dim + 1).to(x.dtype)

    def _for_slices(self, absmax: Tensor) -> FloatGrid:
        return self


@dataclass(frozen=True)
class FP8(FloatGrid):
    """E4M3 elements under a float scale."""

    bits: int = 8
    element: ClassVar[Minifloat] = E4M3

    def scale_of(self, absmax: Tensor) -> Tensor:
        return (absmax / self.element.largest).clamp(min=torch.finfo(absmax.dtype).tiny)


@dataclass(frozen=True)
class MXFP4(FloatGrid):
    """E2M1 elements under a power of two per 32 inputs."""

    bits: int = 4
    element: ClassVar[Minifloat] = E2M1
    block: ClassVar[int | None] = FORMATS["mxfp4"].block

    def scale_of(self, absmax: Tensor) -> Tensor:
        """2^(floor(log2 absmax) - 2). E8M0 begins at 2^-127; we stop at 2^-126, float32's smallest normal number."""
        return power_of_two(absmax.clamp(min=2.0**-124)) / 4


@dataclass(frozen=True)
class NVFP4(FloatGrid):
    """E2M1 elements under an E4M3 scale per 16 inputs and a float32 scale per tensor."""

    bits: int = 4
    tensor_scale: Tensor | None = field(default=None, compare=False)
    element: ClassVar[Minifloat] = E2M1
    block: ClassVar[int | None] = FORMATS["nvfp4"].block

    def for_tensor(self, x: Tensor) -> NVFP4:
        """This grid for the blocks of x."""
        return self._with_tensor_scale(wide(torch.stack(torch.aminmax(x)).abs().amax()))

    def scale_of(self, absmax: Tensor) -> Tensor:
        """Raises ValueError before `for_tensor`. A block scale is at least E4M3's smallest value, never zero."""
        if self.tensor_scale is None:
            raise ValueError("the scale of an nvfp4 block depends on the whole tensor: call for_tensor first")
        relative = E4M3.nearest(absmax / (self.element.largest * self.tensor_scale))
        return relative.clamp(min=2.0**-9) * self.tensor_scale

    def _for_slices(self, absmax: Tensor) -> NVFP4:
        return self if self.tensor_scale is not None else self._with_tensor_scale(absmax)

    def _with_tensor_scale(self, absmax: Tensor) -> NVFP4:
        scale = absmax.where(absmax > 0, 1) / (E4M3.largest * self.element.largest)
        return replace(self, tensor_scale=scale.clamp(min=torch.finfo(scale.dtype).tiny * 2**9))


FLOAT_GRIDS: dict[str, FloatGrid] = {"fp8": FP8(), "mxfp4": MXFP4(), "nvfp4": NVFP4()}
