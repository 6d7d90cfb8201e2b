"""What `bits=` means: widths, group size, symmetry and number format of weights, activations, keys and values.

No torch here. A width of 16 means "not quantized": the tensor keeps the dtype of the model. The dataclasses are not
frozen because OmegaConf makes frozen ones read-only when they serve as a schema.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, Protocol, TypeVar

UNQUANTIZED = 16
WIDTHS = (2, 3, 4, 5, 6, 7, 8, UNQUANTIZED)


@dataclass(frozen=True)
class Format:
    """What a number format fixes, and what its scales take."""

    widths: tuple[int, ...]
    block: int | None = None  # inputs that share a scale; None: the choice is free
    superblock: int | None = None  # inputs whose scales are integers times one number
    symmetric: bool | None = True  # None: the choice is free
    scale_bits: int = 16  # per group, with what a minimum takes
    tensor_bits: int = 0  # per weight
    weights_only: bool = False


FORMATS = {
    "int": Format(WIDTHS[:-1], symmetric=None),
    "fp8": Format((8,)),  # E4M3
    "mxfp4": Format((4,), block=32, scale_bits=8),
    "nvfp4": Format((4,), block=16, scale_bits=8, tensor_bits=32),
    "q4_1": Format((4,), block=32, symmetric=False, scale_bits=32, weights_only=True),
    "q5_1": Format((5,), block=32, symmetric=False, scale_bits=32, weights_only=True),
    "q2_k": Format((2,), block=16, superblock=256, symmetric=False, scale_bits=10, weights_only=True),
    "q3_k": Format((3,), block=16, superblock=256, scale_bits=7, weights_only=True),
    "q4_k": Format((4,), block=32, superblock=256, symmetric=False, scale_bits=16, weights_only=True),
    "q6_k": Format((6,), block=16, superblock=256, scale_bits=9, weights_only=True),
}
WEIGHT_FORMATS = tuple(name for name, format in FORMATS.items() if format.weights_only)
SCALE_DTYPES = ("float32", "float16")


@dataclass
class WeightBits:
    """Grid of every quantized weight."""

    bits: int = UNQUANTIZED
    group_size: int = 128  # inputs that share a scale; -1 is one group per output row
    symmetric: bool = False
    format: str = "int"
    scale_dtype: str = "float32"  # of integers; float16: scales are rounded to it before codes are chosen


@dataclass
class ActivationBits:
    """Grid of the input of every quantized linear, at run time or on a calibrated range as the method says."""

    bits: int = UNQUANTIZED
    symmetric: bool = False
    format: str = "int"
    group_size: int = -1  # neighbouring channels of a token that share a scale; -1 is one group per token
    scale_dtype: str = "float32"  # of integers; float16: scales are rounded to it after codes are chosen, as engines do
    full_range: bool = False  # symmetric integers: absmax / (2^(b-1) - 1/2) per step in place of absmax / (2^(b-1) - 1)


Usual = TypeVar("Usual", WeightBits, ActivationBits)


@dataclass
class KVBits:
    """Width of keys and values, for methods that quantize them (`method.kv`)."""

    bits: int | None = None  # None: as the activations, in methods that quantize keys and values
    keys: int | None = None  # another width for keys alone; None: that of both
    values: int | None = None  # likewise


@dataclass
class RoleBits:
    """Other widths for one role; None: as all roles."""

    weight: int | None = None
    activation: int | None = None
    group_size: int | None = None
    format: str | None = None  # of weight and, unless it is for weights alone, of input; with width and group size

    def of_weight(self, usual: WeightBits) -> WeightBits:
        group_size = usual.group_size if self.group_size is None else self.group_size
        return replace(self._grid(usual, self.weight), group_size=group_size)

    def of_activation(self, usual: ActivationBits) -> ActivationBits:
        of_weight = self.format in WEIGHT_FORMATS
        return (replace(self, format=None) if of_weight else self)._grid(usual, self.activation)

    def _grid(self, usual: Usual, bits: int | None) -> Usual:
        """A weight's or an input's grid with what is said here in place of the usual."""
        fixed = FORMATS[self.format].symmetric if self.format in FORMATS else None
        symmetric = usual.symmetric if fixed is None else fixed
        bits = usual.bits if bits is None else bits
        return replace(usual, bits=bits, format=self.format or usual.format, symmetric=symmetric)

    def changed(self, other: RoleBits) -> RoleBits:
        """This with what `other` says."""
        return replace(self, **{name: value for name, value in vars(other).items() if value is not None})


#: Roles that a command line can override without `+`: those of a dense transformer.
DENSE_ROLES = ("q", "k", "v", "o", "gate", "up", "down")


class Linears(Protocol):
    """What widths are resolved for: the linears of a model, as its architecture tells."""

    @property
    def roles(self) -> tuple[str, ...]: ...

    @property
    def n_blocks(self) -> int: ...


@dataclass(frozen=True)
class BlockWidths:
    """The grids of a block: of every linear's weight and input, by role, and of keys and values."""

    weight: Mapping[str, WeightBits]
    activation: Mapping[str, ActivationBits]
    keys: ActivationBits  # in methods that quantize keys and values
    values: ActivationBits


@dataclass(frozen=True)
class Widths:
    """What a `BitsConfig` comes to for a model: the grids of every block, and those of a block without an entry."""

    usual: BlockWidths
    blocks: tuple[BlockWidths, ...]

    def rounds_weight(self, role: str) -> bool:
        return any(block.weight[role].bits != UNQUANTIZED for block in self.blocks)

    def rounds_input(self, role: str) -> bool:
        return any(block.activation[role].bits != UNQUANTIZED for block in self.blocks)

    @property
    def rounds_values(self) -> bool:
        """In methods that quantize keys and values."""
        return any(block.values.bits != UNQUANTIZED for block in self.blocks)


@dataclass
class BitsConfig:
    """One choice of the `bits` group, for example `w4a16`.

    `overrides` has other widths for some roles, those of a `RoleBits`: `bits.overrides.down.weight=8`. `blocks` has
    other widths for some blocks, by name: `b31`, or `b0-3` for the first four. An entry says what a role's override
    says, for all roles of the block that have no override, and by role for these: `b0-3: {weight: 8, down: {weight:
    16}}`.
    """

    name: str = "w16a16"
    weight: WeightBits = field(default_factory=WeightBits)
    activation: ActivationBits = field(default_factory=ActivationBits)
    kv: KVBits = field(default_factory=KVBits)
    overrides: dict[str, Any] = field(default_factory=lambda: {role: RoleBits() for role in DENSE_ROLES})
    blocks: dict[str, Any] = field(default_factory=dict)

    def override(self, role: str) -> RoleBits:
        """What is said for a role alone."""
        return _role_bits(self.overrides.get(role))

    def resolve(self, linears: Linears) -> Widths:
        """The grids of a model's linears. What cannot be read is left out; `entry_problems` tells of it."""
        by_entry = {name: self.of_entry(name)._grids(linears.roles) for name in (None, *self.blocks)}
        entries = {index: name for name in reversed(self.blocks) for index in block_range(name)}
        return Widths(by_entry[None], tuple(by_entry[entries.get(index)] for index in range(linears.n_blocks)))

    def _grids(self, roles: Sequence[str]) -> BlockWidths:
        keys, values = self.kv_widths()
        return BlockWidths(
            {role: self.override(role).of_weight(self.weight) for role in roles},
            {role: self.override(role).of_activation(self.activation) for role in roles},
            replace(self.activation, bits=keys, group_size=-1),
            replace(self.activation, bits=values, group_size=-1),
        )

    def of_entry(self, name: str | None) -> BitsConfig:
        """These settings with an entry of `blocks` in the place of what is usual (None: as they are, without entries).

        An entry's own settings for a role are its override.
        """
        entry = _mapping({} if name is None else self.blocks[name])
        own = _role_bits(entry)
        roles = [*self.overrides, *(key for key in entry if key not in (*SETTINGS, *self.overrides))]
        return replace(
            self,
            weight=own.of_weight(self.weight),
            activation=own.of_activation(self.activation),
            overrides={role: self.override(role).changed(_role_bits(entry.get(role))) for role in roles},
            blocks={},
        )

    def settings(self, part: str) -> dict[str, int | None]:
        """All widths of weights (`weight`) or inputs (`activation`) by the keys that set them; None where not set."""
        widths = {f"bits.{part}.bits": getattr(self, part).bits}
        widths |= {f"bits.overrides.{role}.{part}": getattr(self.override(role), part) for role in self.overrides}
        for name, entry in self.blocks.items():
            own = {"": entry} | {f".{role}": said for role, said in _roles_of(_mapping(entry)).items()}
            widths |= {f"bits.blocks.{name}{role}.{part}": _mapping(said).get(part) for role, said in own.items()}
        return widths

    def kv_widths(self) -> tuple[int, int]:
        """The widths of keys and of values, in methods that quantize them."""
        both = self.activation.bits if self.kv.bits is None else self.kv.bits
        keys, values = (both if own is None else own for own in (self.kv.keys, self.kv.values))
        return keys, values

    def settings_of_kv(self) -> dict[str, int | None]:
        """The widths of keys and values by the keys that set them; None where not set."""
        return {f"bits.kv.{name}": width for name, width in vars(self.kv).items()}


SETTINGS = tuple(f.name for f in fields(RoleBits))


def block_formats(grids: Iterable[WeightBits | ActivationBits]) -> list[str]:
    """The formats among these grids that fix which inputs share a scale."""
    used = {grid.format for grid in grids if grid.bits != UNQUANTIZED}
    return [name for name, format in FORMATS.items() if name in used and format.block is not None]


def _mapping(entry: Any) -> Mapping[str, Any]:
    """What an entry of `blocks`, or a role's part of it, says; nothing where it is none (`entry_problems` tells)."""
    return vars(entry) if isinstance(entry, RoleBits | KVBits) else entry if isinstance(entry, Mapping) else {}


def _roles_of(entry: Mapping[str, Any]) -> dict[str, Any]:
    """The part of an entry that is by role, in the order of `DENSE_ROLES`."""
    return {key: entry[key] for key in dict.fromkeys((*DENSE_ROLES, *entry)) if key in entry and key not in SETTINGS}


def _role_bits(entry: Any) -> RoleBits:
    """What an entry says, as far as it can be read."""
    return RoleBits(**{key: value for key, value in _mapping(entry).items() if key in SETTINGS})


def block_range(name: str) -> range:
    """The blocks that an entry of `blocks` is for; none for a name that is no such entry's."""
    match = re.fullmatch(r"b(\d+)(?:-(\d+))?", name)
    return range(int(match[1]), int(match[2] or match[1]) + 1) if match else range(0)


def label(bits: BitsConfig) -> str:
    """A short name that tells settings apart: w4a16, w8a8_fp8, w4a16-down8, w4a4kv16-v8a8-down8a8, w4a16-b0-3w8.

    `kv` is the width of keys and values, `k` and `v` that of one of them alone: w16a16kv4, w16a16k4v2.

    Formats follow the widths, those of weights first. An override is the role with its weight's width, `a` and its
    input's width, `g` and its group size, `_` and its format; of a block, the block before them and `w` before the
    width that is for all its roles. `g` behind the width of the activations is their group size: w4a4g128, and `s16`
    tells of scales of integer weights in float16: w4a8g32s16. Group size of weights and symmetry are left out of what
    is for all roles, and so is the format of the activations beside one for weights alone.
    """
    weight, size = bits.weight, bits.activation.group_size
    groups = f"g{size}" if size != -1 and bits.activation.bits != UNQUANTIZED else ""
    if weight.format == "int" and weight.scale_dtype == "float16" and weight.bits != UNQUANTIZED:
        groups += "s16"
    said = _mapping(bits.kv)  # of a DictConfig, `keys` and `values` are methods
    named = {"kv": said.get("bits"), "k": said.get("keys"), "v": said.get("values")}
    kv = "".join(f"{whose}{width}" for whose, width in named.items() if width is not None)
    formats = [part.format for part in (bits.weight, bits.activation) if part.bits != UNQUANTIZED]
    if weight.bits != UNQUANTIZED and weight.format in WEIGHT_FORMATS:
        formats = [weight.format, *(name for name in formats[1:] if name != "int")]
    suffix = "" if set(formats) <= {"int"} else "_" + "_".join(dict.fromkeys(formats))
    overrides = [_changes(role, "", own) for role, own in bits.overrides.items()]
    for name, entry in bits.blocks.items():
        overrides.append(_changes(name, "w", entry))
        overrides += [_changes(f"{name}{role}", "", own) for role, own in _roles_of(_mapping(entry)).items()]
    return f"w{bits.weight.bits}a{bits.activation.bits}{groups}{kv}{suffix}{''.join(overrides)}"


def _changes(whose: str, letter: str, own: Any) -> str:
    said = _mapping(own)
    letters = {"weight": letter, "activation": "a", "group_size": "g", "format": "_"}
    text = "".join(f"{letter}{said[key]}" for key, letter in letters.items() if said.get(key) is not None)
    return f"-{whose}{text}" if text else ""
