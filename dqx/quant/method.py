"""A quantization method as a composition of parts, and which bits it can be asked for."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import reduce
from typing import Any

import torch
from torch import Tensor

from dqx.formats.bits import UNQUANTIZED, WEIGHT_FORMATS, BitsConfig, Widths
from dqx.models.architecture import Architecture
from dqx.quant.bits_problems import bits_problems, entry_problems, in_entry
from dqx.quant.protocols import (
    FINAL,
    STREAMS,
    Activation,
    BlockTransform,
    Clip,
    Context,
    Correction,
    KeysValues,
    ModelChange,
    Rounding,
    SiteTransform,
    TokenWeight,
    Transform,
    choice_problems,
)
from dqx.quant.stats import COLLECTORS

QUANTIZES = ("weights", "weights_and_activations")


@dataclass(frozen=True)
class Method:
    """What `conf/method/*.yaml` fills in; `dqx.quant.protocols` says what each slot takes.

    `rounding` None: weights stay as they are (fp16). `activation` None: a weight-only method. `rounding_by_role`
    replaces the rounding of single roles (`down: {_target_: ...}`; None leaves the role in 16 bit, its input too).
    `transforms` are applied in their order, `corrections` at their sites. `order` lists the steps in which the linears
    of a block are rounded, in each some roles of one site, which see the same statistics; none: site by site.
    `token_weight` None: all calibration tokens count alike. `variant`
    tells settings apart that share a name, such as "as_published". `quantizes` decides what `bits=N` means: "weights"
    is N-bit weights in groups of 128 and 16-bit activations, "weights_and_activations" N bits for both.
    """

    name: str
    rounding: Rounding | None = None
    activation: Activation | None = None
    rounding_by_role: Mapping[str, Rounding | None] = field(default_factory=dict)
    transforms: Mapping[str, Transform] = field(default_factory=dict)
    clip: Clip | None = None
    kv: KeysValues | None = None
    corrections: Mapping[str, Correction] = field(default_factory=dict)
    order: Sequence[Sequence[str]] = ()
    token_weight: TokenWeight | None = None
    variant: str = ""
    quantizes: str = "weights"

    def rounding_of(self, role: str) -> Rounding | None:
        """The rounding part of a role, or None where the role's linear stays in 16 bit."""
        return self.rounding_by_role.get(role, self.rounding)

    def steps(self, arch: Architecture) -> list[tuple[str, Sequence[str]]]:
        """Site and roles of every step of a block, in their order."""
        sites = {role: site for site, roles in arch.sites.items() for role in roles}
        return [(sites[roles[0]], roles) for roles in self.order] if self.order else list(arch.sites.items())

    def clip_of(self, role: str) -> Clip | None:
        """The clip of a role's weights, or None where their whole range is represented."""
        return None if self.clip is None or role in self.clip.skip_roles else self.clip

    def quantizes_input(self, role: str) -> bool:
        """True if the role's input goes through the activation quantizer (which 16 bits makes a no-op)."""
        left_alone = role in self.rounding_by_role and self.rounding_by_role[role] is None
        return self.activation is not None and not left_alone

    def changes(self, context: Context, device: torch.device) -> list[ModelChange]:
        """What the model transforms do, in their order."""
        return [part.prepare(context.at(name=name), device) for name, part in self._transforms("model").items()]

    def residual_map(self, bits: BitsConfig, arch: Architecture, *, seed: int = 0) -> Callable[[Tensor], Tensor]:
        """How the residual stream x [..., D] of a model looks after `quantize(model, method, bits, seed=seed)`.

        Rotations are drawn again from the seed; errors of rounding are not in it, nor other changes of the function.
        """
        changes = self.changes(Context(arch, bits.resolve(arch).usual, self, seed), torch.device("cpu"))
        maps = [change.residual for change in changes if change.residual is not None]
        return lambda x: reduce(lambda y, change: change(y), maps, x)

    @property
    def block_transforms(self) -> dict[str, BlockTransform]:
        return self._transforms("block")

    @property
    def site_transforms(self) -> dict[str, SiteTransform]:
        return self._transforms("site")

    def _transforms(self, scope: str) -> dict[str, Any]:
        return {name: part for name, part in self.transforms.items() if part.scope == scope}

    def streams(self, widths: Widths | None = None) -> frozenset[str]:
        """Whose activations the parts look at, at these widths (None: at any): "quantized", "fp", "mean"."""
        named = self._streams(widths)
        pairs = {"both": {"quantized", "fp"}, "block": {"quantized"}}
        return frozenset(named - pairs.keys()).union(*(pairs[name] for name in named & pairs.keys()))

    @property
    def compares(self) -> bool:
        """Whether a part looks at a block before rounding when some of it is rounded already."""
        return not self._streams() <= {"quantized", "mean"}

    def _streams(self, widths: Widths | None = None) -> set[str]:
        named = {part.stream for part in self.block_transforms.values() if any(part.needs.values())}
        named |= {part.stream for part in self.site_transforms.values() if part.needs}
        for role in ("", *self.rounding_by_role) if widths is None else widths.usual.weight:  # "": any other role
            rounding, clip = self.rounding_of(role), self.clip_of(role)
            if rounding is not None and (widths is None or widths.rounds_weight(role)):
                named |= {part.stream for part in (rounding, clip) if part is not None and part.needs}
            rounds_input = widths is None or widths.rounds_input(role)
            if self.activation is not None and self.activation.needs and self.quantizes_input(role) and rounds_input:
                named.add("quantized")
        if self.kv is not None and self.kv.needs and (widths is None or widths.rounds_values):
            named.add("quantized")
        return named | {part.stream for part in self.corrections.values() if part.needs}

    def weighs_by(self, fact: str) -> bool:
        """Whether calibration tokens have weights that depend on a fact: "confidence", "committed"."""
        return self.token_weight is not None and fact in self.token_weight.needs

    @property
    def needs_data(self) -> bool:
        return bool(self.streams())

    def problems(self, bits: BitsConfig, arch: Architecture) -> list[str]:
        """Everything about this method at these bits on this architecture that cannot work, with the remedy."""
        if entries := entry_problems(bits, arch):
            return [*self._slot_problems(arch), *entries]
        problems = [*self._slot_problems(arch), *self._part_problems(Context(arch, bits.resolve(arch).usual, self))]
        for name in bits.blocks:
            own = Context(arch, bits.of_entry(name).resolve(arch).usual, self)
            problems += in_entry(name, self._part_problems(own), problems)
        return [*problems, *self._pair_problems(bits, arch), *bits_problems(bits, arch)]

    def _slot_problems(self, arch: Architecture) -> Iterator[str]:
        yield from choice_problems("method.quantizes", self.quantizes, QUANTIZES)
        if self.quantizes == "weights_and_activations" and self.activation is None:
            yield (
                "method.quantizes=weights_and_activations needs an activation part; set method.activation, "
                "or method.quantizes=weights"
            )
        unknown = [role for role in self.rounding_by_role if role not in arch.roles]
        if unknown:
            yield f"method.rounding_by_role has {', '.join(unknown)}; the roles are {', '.join(arch.roles)}"
        if self.clip is not None and (strange := [role for role in self.clip.skip_roles if role not in arch.roles]):
            yield f"method.clip.skip_roles has {', '.join(strange)}; the roles are {', '.join(arch.roles)}"
        yield from self._order_problems(arch)
        yield from self._weight_problems()
        for name, part in self.corrections.items():
            if part.site not in (*arch.sites, FINAL):
                sites = ", ".join((*arch.sites, FINAL))
                yield f"method.corrections.{name}.site={part.site} is unknown; the sites are {sites}"
        for where, streamed in self._parts().items():
            stream = getattr(streamed, "stream", "quantized")
            if stream not in STREAMS:
                yield f"{where}.stream={stream} is unknown; write {', '.join(STREAMS)}"

    def _order_problems(self, arch: Architecture) -> Iterator[str]:
        sites = {role: site for site, roles in arch.sites.items() for role in roles}
        listed = [role for roles in self.order for role in roles]
        usual = [list(roles) for roles in arch.sites.values()]
        if self.order and sorted(listed) != sorted(arch.roles):
            yield f"method.order={self._told()} must have every role once; [] is that of the data flow: {usual}"
        elif any(not roles or len({sites[role] for role in roles}) > 1 for roles in self.order):
            yield f"method.order={self._told()} has a step whose roles read different inputs; split it, as in {usual}"
        elif self.order and self.corrections:
            first = next(iter(self.corrections))
            yield (
                f"method.order={self._told()}: method.corrections.{first} repairs what the linears before it have "
                f"shifted, which must be rounded by then; write method.order=[], or ~method.corrections.{first}"
            )

    def _weight_problems(self) -> Iterator[str]:
        if self.token_weight is None:
            return
        weighted = {name for name, statistic in COLLECTORS.items() if statistic.weighted}
        if not any(weighted & _statistics(part) for part in self._parts().values()):
            yield (
                f"method.token_weight={type(self.token_weight).__name__} weighs the calibration tokens in statistics "
                f"that are averages over them, but method {self.name} has no part that looks at one; write "
                "method.token_weight=null, or take a part that does (method.rounding=gptq)"
            )

    def _told(self) -> list[list[str]]:
        return [list(roles) for roles in self.order]

    def _part_problems(self, context: Context) -> list[str]:
        return [problem for where, part in self._parts().items() for problem in part.problems(where, context)]

    def _parts(self) -> dict[str, Any]:
        """All parts by their config keys."""
        named = {
            **{f"method.transforms.{name}": part for name, part in self.transforms.items()},
            "method.clip": self.clip,
            "method.rounding": self.rounding,
            **{f"method.rounding_by_role.{role}": part for role, part in self.rounding_by_role.items()},
            "method.activation": self.activation,
            "method.kv": self.kv,
            "method.token_weight": self.token_weight,
            **{f"method.corrections.{name}": part for name, part in self.corrections.items()},
        }
        return {where: part for where, part in named.items() if part is not None}

    def _pair_problems(self, bits: BitsConfig, arch: Architecture) -> list[str]:
        """Widths that this method cannot be asked for."""
        rounds_weights = any(self.rounding_of(role) is not None for role in arch.roles)
        widths, input_widths = bits.settings("weight"), bits.settings("activation")
        kv_widths = bits.settings_of_kv()
        asked = {**widths, **input_widths, **kv_widths}
        asked = {key: width for key, width in asked.items() if width not in (None, UNQUANTIZED)}
        if not rounds_weights and self.activation is None:
            if asked:
                return [
                    f"bits={bits.name}: {self.name} quantizes nothing; bits must be w16a16. "
                    "Full precision is part of every run: in a sweep over bits leave this method out"
                ]
            return []
        problems = []
        if not rounds_weights:
            rounds_none = f"but method {self.name} rounds no weights"
            problems += [f"{key}={asked[key]}, {rounds_none}; write {key}=16" for key in widths if key in asked]
        if self.activation is None:
            format = "" if bits.weight.format == "int" else f"{bits.weight.format}_"
            of_files = bits.weight.format in WEIGHT_FORMATS or bits.weight.scale_dtype != "float32"
            problems += [
                f"{key}={asked[key]}, but method {self.name} quantizes weights only; write "
                + (
                    f"bits={format}w{bits.weight.bits}a16"
                    if key == "bits.activation.bits" and not of_files
                    else f"{key}=16"
                )
                + ", or take a method that quantizes activations (rtn does)"
                for key in input_widths
                if key in asked
            ]
        if self.kv is None:
            problems += [
                f"{key}={asked[key]}, but method {self.name} leaves keys and values in 16 bit; "
                f"add a part (method.kv=per_head), or write {key}=null"
                for key in kv_widths
                if key in asked
            ]
        return problems


def _statistics(part: Any) -> set[str]:
    """The statistics that a part asks for, at whatever site."""
    needs = getattr(part, "needs", ())
    return set().union(*needs.values()) if isinstance(needs, Mapping) else set(needs)
