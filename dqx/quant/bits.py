"""What `bits=` means: widths, group size and symmetry of weights and activations. No torch here.

A width of 16 means "not quantized": the tensor keeps the dtype of the model. The dataclasses are not frozen because
OmegaConf makes frozen ones read-only when they serve as a schema.
"""

from __future__ import annotations

from dataclasses import dataclass, field

UNQUANTIZED = 16
WIDTHS = (2, 3, 4, 5, 6, 7, 8, UNQUANTIZED)


@dataclass
class WeightBits:
    """Grid of every quantized weight."""

    bits: int = UNQUANTIZED
    group_size: int = 128  # inputs that share a scale; -1 is one group per output row
    symmetric: bool = False


@dataclass
class ActivationBits:
    """Grid of the input of every quantized linear; which values share a scale is the method's choice."""

    bits: int = UNQUANTIZED
    symmetric: bool = False


@dataclass
class BitsConfig:
    """One choice of the `bits` group, for example `w4a16`."""

    name: str = "w16a16"
    weight: WeightBits = field(default_factory=WeightBits)
    activation: ActivationBits = field(default_factory=ActivationBits)
