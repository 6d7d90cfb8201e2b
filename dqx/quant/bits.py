"""What `bits=` means: widths, group size, symmetry and number format of weights, activations, keys and values.

No torch here. A width of 16 means "not quantized": the tensor keeps the dtype of the model. The dataclasses are not
frozen because OmegaConf makes frozen ones read-only when they serve as a schema.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields, replace

UNQUANTIZED = 16
WIDTHS = (2, 3, 4, 5, 6, 7, 8, UNQUANTIZED)


@dataclass(frozen=True)
class Format:
    """What a number format fixes, and what its scales take."""

    widths: tuple[int, ...]
    block: int | None = None  # inputs that share a scale; None: the choice is free
    has_zero_point: bool = False
    scale_bits: int = 16  # per group
    tensor_bits: int = 0  # per weight


FORMATS = {
    "int": Format(WIDTHS[:-1], has_zero_point=True),
    "fp8": Format((8,)),  # E4M3
    "mxfp4": Format((4,), block=32, scale_bits=8),
    "nvfp4": Format((4,), block=16, scale_bits=8, tensor_bits=32),
}
FLOATS = tuple(name for name, format in FORMATS.items() if not format.has_zero_point)


@dataclass
class WeightBits:
    """Grid of every quantized weight."""

    bits: int = UNQUANTIZED
    group_size: int = 128  # inputs that share a scale; -1 is one group per output row
    symmetric: bool = False
    format: str = "int"


@dataclass
class ActivationBits:
    """Grid of the input of every quantized linear; which values share a scale is the method's choice."""

    bits: int = UNQUANTIZED
    symmetric: bool = False
    format: str = "int"


@dataclass
class KVBits:
    """Width of keys and values, for methods that quantize them (`method.kv`)."""

    bits: int | None = None  # null: as the activations, in methods that quantize keys and values


@dataclass
class RoleBits:
    """Other widths for one role; null: as all roles."""

    weight: int | None = None
    activation: int | None = None
    group_size: int | None = None
    format: str | None = None  # of weight and input; its width and group size must be given too where they differ


@dataclass
class RoleOverrides:
    """Mixed widths: `bits.overrides.down.weight=8`."""

    q: RoleBits = field(default_factory=RoleBits)
    k: RoleBits = field(default_factory=RoleBits)
    v: RoleBits = field(default_factory=RoleBits)
    o: RoleBits = field(default_factory=RoleBits)
    gate: RoleBits = field(default_factory=RoleBits)
    up: RoleBits = field(default_factory=RoleBits)
    down: RoleBits = field(default_factory=RoleBits)


@dataclass
class BitsConfig:
    """One choice of the `bits` group, for example `w4a16`."""

    name: str = "w16a16"
    weight: WeightBits = field(default_factory=WeightBits)
    activation: ActivationBits = field(default_factory=ActivationBits)
    kv: KVBits = field(default_factory=KVBits)
    overrides: RoleOverrides = field(default_factory=RoleOverrides)

    def weight_of(self, role: str) -> WeightBits:
        """The weight grid of a role, its overrides applied."""
        own: RoleBits = getattr(self.overrides, role)
        return replace(
            self.weight,
            bits=self.weight.bits if own.weight is None else own.weight,
            group_size=self.weight.group_size if own.group_size is None else own.group_size,
            format=own.format or self.weight.format,
            symmetric=self.weight.symmetric or own.format in FLOATS,
        )

    @property
    def block_formats(self) -> list[str]:
        """The formats of weights that fix which inputs share a scale."""
        used = {w.format for f in fields(RoleOverrides) if (w := self.weight_of(f.name)).bits != UNQUANTIZED}
        return [name for name, format in FORMATS.items() if name in used and format.block is not None]

    def activation_of(self, role: str) -> ActivationBits:
        """The grid of a role's input, its overrides applied."""
        own: RoleBits = getattr(self.overrides, role)
        return replace(
            self.activation,
            bits=self.activation.bits if own.activation is None else own.activation,
            format=own.format or self.activation.format,
            symmetric=self.activation.symmetric or own.format in FLOATS,
        )


def label(bits: BitsConfig) -> str:
    """A short name that tells settings apart: w4a16, w8a8_fp8, w4a16-down8, w4a4kv16-v8a8-down8a8.

    Formats follow the widths, those of weights first. An override is the role with its weight's width, `a` and its
    input's width, `g` and its group size, `_` and its format. Group size and symmetry of all roles are left out.
    """
    kv = "" if bits.kv.bits is None else f"kv{bits.kv.bits}"
    formats = [part.format for part in (bits.weight, bits.activation) if part.bits != UNQUANTIZED]
    suffix = "" if set(formats) <= {"int"} else "_" + "_".join(dict.fromkeys(formats))
    overrides = []
    for role in (f.name for f in fields(RoleOverrides)):
        own = getattr(bits.overrides, role)
        changes = (("", own.weight), ("a", own.activation), ("g", own.group_size), ("_", own.format))
        if text := "".join(f"{letter}{value}" for letter, value in changes if value is not None):
            overrides.append(f"-{role}{text}")
    return f"w{bits.weight.bits}a{bits.activation.bits}{kv}{suffix}{''.join(overrides)}"
