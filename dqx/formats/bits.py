"""What `bits=` means: widths, group size, symmetry and number format of weights, activations, keys and values.

No torch here. A width of 16 means "not quantized": the tensor keeps the dtype of the model. The dataclasses are not
frozen because OmegaConf makes frozen ones read-only when they serve as a schema.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any

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

    def of_weight(self, usual: WeightBits) -> WeightBits:
        """A weight's grid with what is said here in place of the usual."""
        return replace(
            usual,
            bits=usual.bits if self.weight is None else self.weight,
            group_size=usual.group_size if self.group_size is None else self.group_size,
            format=self.format or usual.format,
            symmetric=usual.symmetric or self.format in FLOATS,
        )

    def of_activation(self, usual: ActivationBits) -> ActivationBits:
        """An input's grid with what is said here in place of the usual."""
        return replace(
            usual,
            bits=usual.bits if self.activation is None else self.activation,
            format=self.format or usual.format,
            symmetric=usual.symmetric or self.format in FLOATS,
        )

    def changed(self, other: RoleBits) -> RoleBits:
        """This with what `other` says."""
        return replace(self, **{name: value for name, value in vars(other).items() if value is not None})


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
    """One choice of the `bits` group, for example `w4a16`.

    `blocks` has other widths for some blocks, by name: `b31`, or `b0-3` for the first four. An entry says what a
    role's override says, for all roles of the block that have no override, and by role for these:
    `b0-3: {weight: 8, down: {weight: 16}}`.
    """

    name: str = "w16a16"
    weight: WeightBits = field(default_factory=WeightBits)
    activation: ActivationBits = field(default_factory=ActivationBits)
    kv: KVBits = field(default_factory=KVBits)
    overrides: RoleOverrides = field(default_factory=RoleOverrides)
    blocks: dict[str, Any] = field(default_factory=dict)

    def weight_of(self, role: str) -> WeightBits:
        """The weight grid of a role, its overrides applied."""
        own: RoleBits = getattr(self.overrides, role)
        return own.of_weight(self.weight)

    @property
    def block_formats(self) -> list[str]:
        """The formats of weights that fix which inputs share a scale."""
        used = {w.format for role in ROLES if (w := self.weight_of(role)).bits != UNQUANTIZED}
        return [name for name, format in FORMATS.items() if name in used and format.block is not None]

    def activation_of(self, role: str) -> ActivationBits:
        """The grid of a role's input, its overrides applied."""
        own: RoleBits = getattr(self.overrides, role)
        return own.of_activation(self.activation)

    def of_block(self, index: int) -> BitsConfig:
        """The widths of one block, without `blocks`."""
        return next((self.of_entry(name) for name in self.blocks if index in block_range(name)), self.of_entry(None))

    def of_entry(self, name: str | None) -> BitsConfig:
        """The widths of an entry of `blocks`, or of the blocks that have none."""
        entry = _mapping({} if name is None else self.blocks[name])
        own = _role_bits(entry)
        roles = {role: usual.changed(_role_bits(entry.get(role))) for role, usual in vars(self.overrides).items()}
        return replace(
            self,
            weight=own.of_weight(self.weight),
            activation=own.of_activation(self.activation),
            overrides=RoleOverrides(**roles),
            blocks={},
        )

    def rounds_weight(self, role: str) -> bool:
        """Whether the role's weight has less than 16 bits in some block."""
        return any(self.of_entry(name).weight_of(role).bits != UNQUANTIZED for name in (None, *self.blocks))

    def rounds_input(self, role: str) -> bool:
        """Whether the role's input has less than 16 bits in some block."""
        return any(self.of_entry(name).activation_of(role).bits != UNQUANTIZED for name in (None, *self.blocks))

    def widths(self, setting: str) -> dict[str, int | None]:
        """All widths of weights (`weight`) or inputs (`activation`) by the keys that set them; null where not set."""
        found = {f"bits.{setting}.bits": getattr(self, setting).bits}
        found |= {
            f"bits.overrides.{role}.{setting}": getattr(own, setting) for role, own in vars(self.overrides).items()
        }
        for name, entry in self.blocks.items():
            said = {"": entry} | {f".{role}": _mapping(entry).get(role) for role in ROLES}
            found |= {f"bits.blocks.{name}{role}.{setting}": _mapping(own).get(setting) for role, own in said.items()}
        return found


SETTINGS, ROLES = (tuple(f.name for f in fields(cls)) for cls in (RoleBits, RoleOverrides))


def _mapping(entry: Any) -> Mapping[str, Any]:
    """An entry of `blocks`, or a role's part of it; nothing where it is none (which `entry_problems` tells)."""
    return entry if isinstance(entry, Mapping) else {}


def _role_bits(entry: Any) -> RoleBits:
    """What an entry says, as far as it can be read."""
    return RoleBits(**{key: value for key, value in _mapping(entry).items() if key in SETTINGS})


def block_range(name: str) -> range:
    """The blocks that an entry of `blocks` is for; none for a name that is no such entry's."""
    found = re.fullmatch(r"b(\d+)(?:-(\d+))?", name)
    return range(int(found[1]), int(found[2] or found[1]) + 1) if found else range(0)


def label(bits: BitsConfig) -> str:
    """A short name that tells settings apart: w4a16, w8a8_fp8, w4a16-down8, w4a4kv16-v8a8-down8a8, w4a16-b0-3w8.

    Formats follow the widths, those of weights first. An override is the role with its weight's width, `a` and its
    input's width, `g` and its group size, `_` and its format; of a block, the block before them and `w` before the
    width that is for all its roles. Group size and symmetry of all roles are left out.
    """
    kv = "" if bits.kv.bits is None else f"kv{bits.kv.bits}"
    formats = [part.format for part in (bits.weight, bits.activation) if part.bits != UNQUANTIZED]
    suffix = "" if set(formats) <= {"int"} else "_" + "_".join(dict.fromkeys(formats))
    overrides = [_changes(role, "", getattr(bits.overrides, role)) for role in ROLES]
    for name, entry in bits.blocks.items():
        own = _mapping(entry)
        overrides.append(_changes(name, "w", own))
        overrides += [_changes(f"{name}{role}", "", _mapping(own.get(role))) for role in ROLES]
    return f"w{bits.weight.bits}a{bits.activation.bits}{kv}{suffix}{''.join(overrides)}"


def _changes(whose: str, letter: str, own: Any) -> str:
    said = own if isinstance(own, Mapping) else vars(own)
    letters = {"weight": letter, "activation": "a", "group_size": "g", "format": "_"}
    text = "".join(f"{letter}{said[key]}" for key, letter in letters.items() if said.get(key) is not None)
    return f"-{whose}{text}" if text else ""
