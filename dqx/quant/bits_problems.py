"""What can be wrong with `bits` on an architecture, whatever the method: formats, widths, symmetry and groups."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from math import gcd

from dqx.common.names import did_you_mean
from dqx.formats.bits import (
    FORMATS,
    SCALE_DTYPES,
    SETTINGS,
    UNQUANTIZED,
    WEIGHT_FORMATS,
    WIDTHS,
    BitsConfig,
    BlockWidths,
    RoleBits,
    block_range,
)
from dqx.models.architecture import Architecture


def bits_problems(bits: BitsConfig, arch: Architecture) -> list[str]:
    """Every setting that cannot work in some block, with its remedy; `entry_problems` have been looked for."""
    problems = _problems(bits.of_entry(None), arch)
    for name in bits.blocks:
        problems += in_entry(name, _problems(bits.of_entry(name), arch), problems)
    return problems


def entry_problems(bits: BitsConfig, arch: Architecture) -> list[str]:
    """What keeps `bits` from being read: roles that the model has not, blocks that it has not or twice, no widths."""
    problems: list[str] = []
    for role, own in bits.overrides.items():
        if role in arch.roles:
            problems += [] if isinstance(own, RoleBits) else _shape_problems(f"bits.overrides.{role}", own, SETTINGS)
        elif bits.override(role) != RoleBits() or not isinstance(own, RoleBits):
            problems.append(f"bits.overrides.{role} is no linear of the model; {did_you_mean(role, arch.roles)}")
    taken: dict[int, str] = {}
    for name, entry in bits.blocks.items():
        key, blocks = f"bits.blocks.{name}", block_range(name)
        if not blocks:
            problems.append(f"{key} names no block; write b3 for one, or b0-3 for the first four")
        elif blocks[-1] >= arch.n_blocks:
            problems.append(f"{key}: the model has {arch.n_blocks} blocks, b0 to b{arch.n_blocks - 1}")
        elif both := [taken[index] for index in blocks if index in taken]:
            problems.append(
                f"{key} and bits.blocks.{both[0]} are both for block {max(blocks[0], block_range(both[0])[0])}"
            )
        taken |= {index: name for index in blocks if index not in taken}
        problems += _shape_problems(key, entry, (*SETTINGS, *arch.roles))
        for role in arch.roles:
            if isinstance(entry, Mapping) and role in entry:
                problems += _shape_problems(f"{key}.{role}", entry[role], SETTINGS)
    return problems


def _shape_problems(key: str, entry: object, known: Iterable[str]) -> Iterator[str]:
    if not isinstance(entry, Mapping):
        yield f"{key}={entry} says not of what; write {key}.weight={entry}"
        return
    for name in entry:
        if name not in known:
            yield f"{key}.{name} is no setting; {did_you_mean(name, known)}"


def in_entry(name: str, problems: Iterable[str], told: Iterable[str]) -> list[str]:
    """Problems of an entry's widths that are not `told` of the others, with the settings by the entry's names."""
    renamed = {
        "bits.weight.bits": f"bits.blocks.{name}.weight",
        "bits.activation.bits": f"bits.blocks.{name}.activation",
        "bits.overrides": f"bits.blocks.{name}",
        **{f"bits.weight.{key}": f"bits.blocks.{name}.{key}" for key in SETTINGS},
        "bits.activation.format": f"bits.blocks.{name}.format",
    }
    reworded: dict[str, None] = {}
    for problem in problems:
        if problem not in told:
            for usual, own in renamed.items():
                problem = problem.replace(usual, own)
            reworded[problem] = None
    return list(reworded)


def _problems(bits: BitsConfig, arch: Architecture) -> list[str]:
    formats = [*_format_problems(bits), *_scale_problems(bits)]
    if formats:
        return formats
    widths = bits.resolve(arch).usual
    return [
        *_width_problems(bits, widths),
        *_symmetry_problems(bits),
        *_group_problems(bits, widths, arch),
        *_block_problems(widths, arch),
    ]


def _format_problems(bits: BitsConfig) -> Iterator[str]:
    named = {"bits.weight.format": bits.weight.format, "bits.activation.format": bits.activation.format}
    own_formats = {role: bits.override(role).format for role in bits.overrides}
    named |= {f"bits.overrides.{role}.format": format for role, format in own_formats.items() if format}
    for key, name in named.items():
        if name not in FORMATS:
            yield f"{key}={name} is unknown; {did_you_mean(name, FORMATS)}"

    if bits.activation.format in WEIGHT_FORMATS and bits.activation.bits != UNQUANTIZED:
        yield f"bits.activation.format={bits.activation.format} is for weights alone; write bits.activation.format=int"


def _scale_problems(bits: BitsConfig) -> Iterator[str]:
    """What integers alone can have, and what their scales cannot be."""
    for key, part in (("weight", bits.weight), ("activation", bits.activation)):
        if part.scale_dtype not in SCALE_DTYPES:
            told = did_you_mean(part.scale_dtype, SCALE_DTYPES)
            yield f"bits.{key}.scale_dtype={part.scale_dtype} is unknown; {told}"
        elif part.scale_dtype != "float32" and part.format != "int":
            yield (
                f"bits.{key}.scale_dtype={part.scale_dtype} is for integers, and {part.format} says itself what its "
                f"scales are; write bits.{key}.scale_dtype=float32"
            )
    own = bits.activation
    if own.full_range and not (own.symmetric and own.format == "int"):
        yield (
            "bits.activation.full_range=true is for symmetric integers; write bits.activation.symmetric=true "
            "bits.activation.format=int, or bits.activation.full_range=false"
        )


def _width_problems(bits: BitsConfig, widths: BlockWidths) -> Iterator[str]:
    """Widths that their format does not have. Overrides are judged with their own format."""
    weight, activation = bits.weight, bits.activation
    asked: dict[str, tuple[int, str]] = {
        "bits.weight.bits": (weight.bits, weight.format),
        "bits.activation.bits": (activation.bits, activation.format),
    }
    asked |= {key: (width, activation.format) for key, width in bits.settings_of_kv().items() if width is not None}
    for role in widths.weight:
        own, of_weight, of_input = bits.override(role), widths.weight[role], widths.activation[role]
        if own.weight is not None or own.format is not None:
            asked[f"bits.overrides.{role}.weight"] = (of_weight.bits, of_weight.format)
        if own.activation is not None or own.format is not None:
            asked[f"bits.overrides.{role}.activation"] = (of_input.bits, of_input.format)
    for key, (width, name) in asked.items():
        known = (*FORMATS[name].widths, UNQUANTIZED)
        if isinstance(width, bool) or width not in (WIDTHS if name == "int" else known):
            if name == "int":
                yield f"{key}={width} is no width dqx has; 2, 3, 4, 5, 6, 7, 8 and 16 (not quantized) are"
            else:
                yield f"{key}={width}, but {name} has {known[0]} bits; write {key}={known[0]} or 16 (not quantized)"


def _symmetry_problems(bits: BitsConfig) -> Iterator[str]:
    for key, part in (("weight", bits.weight), ("activation", bits.activation)):
        fixed = FORMATS[part.format].symmetric
        if part.bits != UNQUANTIZED and fixed is not None and part.symmetric != fixed:
            why = "no zero point" if fixed else "a minimum per group"
            yield (
                f"bits.{key}.symmetric={str(part.symmetric).lower()}, but {part.format} has {why}; write "
                f"bits.{key}.symmetric={str(fixed).lower()}, or bits.{key}.format=int"
            )


def _group_problems(bits: BitsConfig, widths: BlockWidths, arch: Architecture) -> Iterator[str]:
    """Group sizes of weights that do not divide the inputs, or are not those of the format."""
    common = gcd(*(arch.in_features(role) for role in arch.roles))
    powers = [2**n for n in range(17, 3, -1) if common % 2**n == 0][:3]
    remedy = ", ".join(map(str, powers)) + " and -1 do" if powers else "-1 (one group per row) does"
    offenders: dict[tuple[str, int, int], list[str]] = {}
    split: dict[tuple[str, int, int], list[str]] = {}
    foreign: dict[str, str] = {}
    for role, weight in widths.weight.items():
        own = bits.override(role)
        key = "bits.weight.group_size" if own.group_size is None else f"bits.overrides.{role}.group_size"
        block = FORMATS[weight.format].block
        if weight.bits == UNQUANTIZED:
            continue
        if block is not None and weight.group_size != block:
            write = f"bits.overrides.{role}.group_size={block}" if own.format else f"{key}={block}"
            foreign[f"{key}={weight.group_size}, but {weight.format} has a scale per {block} inputs"] = write
        elif (superblock := FORMATS[weight.format].superblock) and arch.in_features(role) % superblock:
            split.setdefault((weight.format, superblock, arch.in_features(role)), []).append(role)
        elif weight.group_size != -1:
            offenders.setdefault((key, weight.group_size, arch.in_features(role)), []).append(role)
    yield from (f"{problem}; write {write}" for problem, write in foreign.items())
    for (name, superblock, width), roles in split.items():
        owners = [f"bits.overrides.{role}.format" for role in roles if bits.override(role).format]
        yield (
            f"{owners[0] if owners else 'bits.weight.format'}={name} has superblocks of {superblock} inputs, which do "
            f"not divide {width}, the inputs of {', '.join(roles)}; write bits=gguf_q4_0 (gguf_q4_1, gguf_q5_0, "
            f"gguf_q5_1, gguf_q8_0), which have blocks of 32, or {_leave_out(roles, 'weight')}"
        )
    hopeless = set()
    for (key, size, width), roles in offenders.items():
        if isinstance(size, bool) or not isinstance(size, int) or size < 1:
            if key not in hopeless:
                yield f"{key}={size} is no number of inputs; for this model {remedy}"
            hopeless.add(key)
        elif width % size:
            name = widths.weight[roles[0]].format
            instead = f"{name} cannot be had for them; write {_leave_out(roles, 'weight')}"
            yield (
                f"{key}={size} does not divide {width}, the inputs of {', '.join(roles)} ({arch.n_blocks} blocks); "
                + (remedy if FORMATS[name].block is None else instead)
            )


def _block_problems(widths: BlockWidths, arch: Architecture) -> Iterator[str]:
    """Activation formats whose blocks do not fill a linear's input, and groups that do not or that the format fixes."""
    common = gcd(*(arch.in_features(role) for role in arch.roles))
    offenders: dict[tuple[str, int, int], list[str]] = {}
    groups: dict[tuple[int, int], list[str]] = {}
    fixed: dict[str, None] = {}
    for role, activation in widths.activation.items():
        width, block, size = arch.in_features(role), FORMATS[activation.format].block, activation.group_size
        if activation.bits == UNQUANTIZED:
            continue
        if block is not None and size not in (-1, block):
            fixed[f"bits.activation.group_size={size}, but {activation.format} has a scale per {block} channels"] = None
        elif block is None and size != -1 and (isinstance(size, bool) or size < 1 or width % size):
            groups.setdefault((size, width), []).append(role)
        if block is not None and width % block:
            offenders.setdefault((activation.format, block, width), []).append(role)
    yield from (f"{problem}; write bits.activation.group_size=-1" for problem in fixed)
    for (size, width), roles in groups.items():
        yield (
            f"bits.activation.group_size={size} does not divide {width}, the inputs of {', '.join(roles)}; "
            f"{common & -common} and -1 (one grid per token) do"
        )
    for (name, block, width), roles in offenders.items():
        yield (
            f"bits.activation.format={name} has a scale per {block} channels, which do not divide {width}, the inputs "
            f"of {', '.join(roles)}; write {_leave_out(roles, 'activation')}"
        )


def _leave_out(roles: list[str], what: str) -> str:
    return " ".join(f"bits.overrides.{role}.{what}=16" for role in roles)
