"""A quantized linear whose product is computed on codes, and what such a product is asked for.

N = tokens, I = inputs, O = outputs.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn

from dqx.formats.binary import BinaryGrid
from dqx.formats.bits import UNQUANTIZED, ActivationBits, WeightBits
from dqx.formats.integers import Grid
from dqx.quant.linear import QuantLinear, made_once

#: Code of the input [N, I], scale [N, 1] or [], zero point of the same shape or None, sum of the codes [N, 1] or None.
Encoded = tuple[Tensor, Tensor, Tensor | None, Tensor | None]


@dataclass(frozen=True)
class Product:
    """What a linear multiplies, as far as a configuration can tell. `grid` None: the weight is not rounded."""

    weight: WeightBits
    grid: Grid | None
    activation: ActivationBits
    grid_per_token: bool  # whether the input's quantizer gives every token one scale and zero point
    n_in: int
    n_out: int


class KernelLinear(nn.Module, ABC):
    """Stands in for a `QuantLinear`: rounds the input to codes and multiplies these with the codes of the weight.

    Sums are exact (int8) or those of the kernel (fp8), and scales come after them, in float32, where the simulation
    multiplies rounded numbers in the model's dtype. The weight itself is kept in no other form.
    """

    scale: Tensor  # [O]

    name: ClassVar[str]
    takes: ClassVar[str]  # in words
    bits: ClassVar[str]  # the choice of `bits` that is taken as a whole
    format: ClassVar[str]
    multiple: ClassVar[int]  # of which both widths must be one

    def __init__(self, linear: QuantLinear):
        super().__init__()
        assert linear.grid is not None
        assert linear.scale is not None
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.activation: Any = linear.activation  # with `token_grid`
        self.activation_bits = linear.activation_bits
        self.bias = linear.bias
        self.register_buffer("scale", linear.scale.view(-1).float())  # [O]

    @classmethod
    def codes_of(cls, linear: QuantLinear) -> Tensor:
        """The codes [O, I] as uint8 whose values are the weight to the bit. Raises ValueError where it has none."""
        codes = linear.exact_codes()
        if codes is None:
            raise ValueError(
                "its weights are no longer values of its grid (something changed them afterwards), and "
                f"backend={cls.name} multiplies their codes; write backend=simulated"
            )
        return codes

    @classmethod
    def unfit(cls, product: Product) -> Iterator[str]:
        """Why the kernel cannot compute a product, in words that follow "which has"."""
        for what, part in (("weights", product.weight), ("inputs", product.activation)):
            if part.bits == UNQUANTIZED or (what == "weights" and product.grid is None):
                yield f"{what} in 16 bit"
            elif (part.bits, part.format) != (8, cls.format):
                yield f"{what} in {part.bits} bits" + ("" if part.format == "int" else f" ({part.format})")
            elif part.group_size != -1:
                yield f"{what} in groups of {part.group_size}"
        if isinstance(product.grid, BinaryGrid):
            yield "levels fitted to the weights"
        if product.activation.scale_dtype != "float32":
            yield f"scales of inputs in {product.activation.scale_dtype}"
        if not product.grid_per_token:
            yield "no method.activation that gives a token one scale"
        if product.n_in % cls.multiple or product.n_out % cls.multiple:
            yield f"widths ({product.n_in}, {product.n_out}) that are no multiples of {cls.multiple}"

    @classmethod
    @abstractmethod
    def untrusted(cls, device: torch.device) -> str | None:
        """What the kernel gets wrong on a device, in words; None where it is right."""

    @abstractmethod
    def encode(self, x_NI: Tensor) -> Encoded:
        """The codes of the input."""

    @abstractmethod
    def multiply(self, encoded: Encoded) -> Tensor:
        """The product [N, O] without the bias, in float32."""

    def forward(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, self.in_features)

        def encode(x: Tensor) -> Encoded:
            return self.encode(rows)

        y = self.multiply(made_once(encode, x, type(self), self.activation, self.activation_bits))
        if self.bias is not None:
            y += self.bias
        return y.to(x.dtype).view(*x.shape[:-1], self.out_features)

    def token_grid(self, x_NI: Tensor) -> tuple[Grid, Tensor, Tensor]:
        """The grid of the tokens, and their scales and zero points."""
        return cast(tuple[Grid, Tensor, Tensor], self.activation.token_grid(x_NI, self.activation_bits))

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, {self.name}"


def as_kernels_read(codes_OI: Tensor) -> Tensor:
    """Codes [I, O], on a CPU with their rows in one piece and on GPUs with their columns, which each reads faster."""
    return codes_OI.t().contiguous() if codes_OI.device.type == "cpu" else codes_OI.contiguous().t()
